"""The queue keeps records, their order, and nothing twice, also over the end of a process."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hyperlora.spool import Spool


def filled(path: Path, *numbers: int, capacity: int = 100) -> Spool:
    queue = Spool(path, capacity)
    for number in numbers:
        queue.add({"n": number})
    return queue


def numbers(queue: Spool) -> list[int]:
    return [record["n"] for record in queue.first(len(queue))]


def test_the_next_process_goes_on_with_what_was_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "queue.jsonl"
    filled(path, 1, 2, 3)  # never closed: as after a kill
    queue = filled(path, 4)
    assert numbers(queue) == [1, 2, 3, 4]
    assert numbers(Spool(path)) == [1, 2, 3, 4]


def test_half_a_line_at_the_end_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "queue.jsonl"
    filled(path, 1, 2).close()
    with path.open("a") as file:
        file.write('{"n": 3')
    assert numbers(filled(path, 4)) == [1, 2, 4]
    assert numbers(Spool(path)) == [1, 2, 4]


def test_an_empty_queue_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "queue.jsonl"
    queue = filled(path, 1, 2, 3)
    queue.remove(2)
    assert numbers(queue) == [3]
    assert path.exists()
    queue.remove(1)
    assert not path.exists()
    queue.add({"n": 4})
    assert numbers(Spool(path)) == [4]


def test_a_full_queue_drops_the_newest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "queue.jsonl"
    with caplog.at_level(logging.WARNING):
        queue = filled(path, *range(10), capacity=4)
    assert numbers(queue) == [0, 1, 2, 3]
    assert queue.dropped == 6
    assert len(caplog.records) == 1
    assert len(path.read_text().splitlines()) == 4


def test_a_file_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        queue = filled(tmp_path / "file" / "queue.jsonl", 1, 2)
    assert numbers(queue) == [1, 2]
    assert "kept in memory only" in caplog.text
