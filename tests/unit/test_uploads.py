"""Uploads in the background: one at a time, and the newest snapshot next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from hyperlora import checkpoint
from hyperlora.uploads import Snapshot, Uploader


def test_one_upload_is_in_flight_and_only_the_newest_snapshot_waits(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    in_flight: list[int] = []
    most = 0

    def files(step: int) -> Callable[[], dict[str, bytes]]:
        def pack() -> dict[str, bytes]:
            nonlocal most
            in_flight.append(step)
            most = max(most, len(in_flight))
            begun.set()
            assert go_on.wait(30)
            return {"data": bytes([step])}

        return pack

    def end(step: int) -> Callable[[], None]:
        return lambda: in_flight.remove(step)

    uploader = Uploader(str(tmp_path), None, None, keep=5)
    uploader.submit(Snapshot(1, files(1), 0.0, end(1)))
    assert begun.wait(30)
    for step in (2, 3, 4):
        uploader.submit(Snapshot(step, files(step), 0.0, end(step)))
    assert uploader.finished() == []  # training goes on meanwhile
    go_on.set()
    outcomes = uploader.drain()
    uploader.close()
    assert [(o.step, o.error) for o in outcomes] == [(1, None), (4, None)]
    assert most == 1
    assert [checkpoint.step_of(uri) for uri in checkpoint.committed(str(tmp_path))] == [1, 4]
