"""The queue keeps records, their order, and nothing twice, also over the end of a process."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from hyperlora import spool
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


def test_the_file_of_a_queue_that_is_never_empty_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "queue.jsonl"
    queue = filled(path, 0, capacity=10)
    for number in range(1, 1001):
        queue.add({"n": number})
        assert queue.first(1) == [{"n": number - 1}]
        queue.remove(1)
        assert len(path.read_text().splitlines()) < 4
    assert numbers(Spool(path, 10)) == [1000]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_file_of_a_long_queue_is_seldom_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, written, replace = tmp_path / "queue.jsonl", [], Path.replace
    queue = filled(path, *range(1000), capacity=1000)
    monkeypatch.setattr(Path, "replace", lambda new, old: (written.append(len(queue)), replace(new, old))[1])
    for _ in range(99):
        queue.remove(10)
    assert sum(written) <= 1000
    assert len(path.read_text().splitlines()) <= 2 * 10 + 10


def test_of_more_records_than_it_holds_a_queue_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "queue.jsonl"
    filled(path, *range(15)).close()  # the first five were delivered before a kill
    assert numbers(Spool(path, 10)) == list(range(5, 15))


def test_records_outlive_a_disk_that_is_full_when_half_a_line_is_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "queue.jsonl"
    filled(path, 1, 2).close()
    with path.open("a") as file:
        file.write('{"n": 3')
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert numbers(filled(path, 4)) == [1, 2, 4]
    assert "kept in memory only" in caplog.text
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert numbers(Spool(path)) == [1, 2]


def test_a_whole_file_is_not_written_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "queue.jsonl"
    filled(path, 1, 2).close()
    before = path.stat()
    assert numbers(Spool(path)) == [1, 2]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_records_of_a_file_that_is_read_only_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, opened = tmp_path / "queue.jsonl", Path.open
    filled(path, 1, 2).close()

    def refuse(path: Path, mode: str = "r", *arguments: object, **options: object) -> object:
        if mode != "r":  # which a mode of the file would not refuse to root
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, mode, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    assert numbers(filled(path, 3)) == [1, 2, 3]
    assert len(caplog.records) == 1


def test_a_full_disk_does_not_end_who_closes_the_queue(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "queue.jsonl"
    path.symlink_to("/dev/full")
    queue = filled(path, 1)
    queue.close()
    assert numbers(queue) == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "metrics that wait for a server are kept in memory only: [Errno 28] No space left on device"
    ]


def test_a_file_says_what_it_is_about_and_whether_its_process_lives(tmp_path: Path) -> None:
    path = tmp_path / "queue.jsonl"
    queue = Spool(path, 10, about={"to": "there"})
    assert (spool.about(path), spool.in_use(path)) == ({}, False)
    for number in range(4):
        queue.add({"n": number})
    assert (spool.about(path), spool.in_use(path)) == ({"to": "there"}, True)
    queue.remove(3)  # the file is written anew
    assert (spool.about(path), spool.in_use(path)) == ({"to": "there"}, True)
    queue.close()
    assert not spool.in_use(path)
    again = Spool(path, 10)
    assert numbers(again) == [3]
    assert spool.in_use(path), "by who goes on with it"
    again.remove(1)
    assert (spool.about(path), spool.in_use(path)) == ({}, False)
