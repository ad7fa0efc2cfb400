"""One writer a run: who is refused, who takes over, who is fenced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nodes import wait_until

from hyperlora import ownership, storage, uploads
from hyperlora.ownership import Lease, OwnedElsewhereError, ReplacedError

HOLDER = """
import sys, time
from hyperlora.ownership import Lease
print(Lease(sys.argv[1]).owner, flush=True)
time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "RENEWAL", 0.5)
    monkeypatch.setattr(ownership, "LEASE", 4.0)


def test_the_second_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    with Lease(str(tmp_path)) as first:
        ownership.check(str(tmp_path), first.owner)
        with pytest.raises(OwnedElsewhereError, match=f"process {os.getpid()}"):
            Lease(str(tmp_path))
        ownership.check(str(tmp_path), first.owner)
    with Lease(str(tmp_path)) as second:
        assert ownership.number(second.owner) == ownership.number(first.owner) + 1
        with pytest.raises(ReplacedError, match="taken over by another process"):
            ownership.check(str(tmp_path), first.owner)
    assert len(list((tmp_path / "owners").iterdir())) == 1


def test_a_killed_process_is_followed_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    owner = process.stdout.readline().strip()
    with pytest.raises(OwnedElsewhereError, match=f"process {process.pid}"):
        Lease(str(tmp_path))
    process.send_signal(signal.SIGKILL)
    # Not even waited for: what is dead and not buried has no claim.
    while ownership._started(process.pid) is not None:
        time.sleep(0.01)
    started = time.monotonic()
    with Lease(str(tmp_path)) as lease:
        assert time.monotonic() - started < ownership.LEASE / 2
        assert ownership.number(lease.owner) == ownership.number(owner) + 1
    process.communicate()


def elsewhere(run: Path, owner: str) -> Path:
    """Make a claim look like one of another machine, whose processes nobody here can see."""
    claim = run / f"owners/{owner}.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"machine": "other", "host": "far"}))
    return claim


@pytest.mark.usefixtures("quick")
def test_a_silent_claim_of_another_machine_is_waited_out(tmp_path: Path) -> None:
    lease = Lease(str(tmp_path))
    lease._over.set()
    lease._thread.join()
    elsewhere(tmp_path, lease.owner)
    started = time.monotonic()
    with Lease(str(tmp_path)):
        assert time.monotonic() - started >= 4.0
        with pytest.raises(ReplacedError):
            ownership.check(str(tmp_path), lease.owner)


@pytest.mark.usefixtures("quick")
def test_a_renewed_claim_of_another_machine_is_respected(tmp_path: Path) -> None:
    with Lease(str(tmp_path)) as lease:
        lease._content |= {"machine": "other", "host": "far"}
        elsewhere(tmp_path, lease.owner)
        with pytest.raises(OwnedElsewhereError, match="far, process"):
            Lease(str(tmp_path))


@pytest.mark.usefixtures("quick")
def test_a_claim_is_renewed_while_one_request_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, hangs, over = storage.write, [True], threading.Event()

    def write(uri: str, data: bytes) -> None:
        if hangs:
            hangs.pop()
            assert over.wait(60)
        put(uri, data)

    with Lease(str(tmp_path)) as lease:
        lease._content |= {"machine": "other", "host": "far"}
        elsewhere(tmp_path, lease.owner)
        monkeypatch.setattr(storage, "write", write)
        with pytest.raises(OwnedElsewhereError, match="far, process"):
            Lease(str(tmp_path))
        threading.Timer(0.3, over.set).start()
    assert over.is_set(), "nothing comes after the release"


@pytest.mark.usefixtures("quick")
def test_a_claim_is_renewed_after_an_error_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, errors = storage.write, [FileNotFoundError("404"), storage.StorageError("x", "503", transient=True)]

    def write(uri: str, data: bytes) -> None:
        if errors:
            raise errors.pop()
        put(uri, data)

    with Lease(str(tmp_path)) as lease:
        monkeypatch.setattr(storage, "write", write)
        wait_until(lambda: json.loads((tmp_path / f"owners/{lease.owner}.json").read_text())["renewals"] >= 3, 20)
        errors.append(FileNotFoundError("404"))  # when it is released


def test_whoever_is_replaced_learns_it_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "RENEWAL", 0.1)
    with Lease(str(tmp_path)) as lease:
        uploader = uploads.Uploader(str(tmp_path), None, lease.owner, 1)
        uploader.watch()
        assert uploader.finished() == []
        higher = f"{ownership.number(lease.owner) + 1:08d}-00c0ffee"
        storage.write(f"{tmp_path}/owners/{higher}.json", b"{}")

        def told() -> bool:
            try:
                return bool(uploader.finished())
            except ReplacedError:
                return True

        wait_until(told, 20)
        uploader.close()


def test_of_many_at_once_at_most_one_is_let_in(tmp_path: Path) -> None:
    for attempt in range(5):
        start = threading.Barrier(6)

        def race(run: str, start: threading.Barrier = start) -> list[Lease]:
            start.wait()
            try:
                return [Lease(run)]
            except OwnedElsewhereError:
                return []

        with ThreadPoolExecutor(6) as threads:
            won = [lease for leases in threads.map(race, 6 * [f"{tmp_path}/{attempt}"]) for lease in leases]
        assert len(won) <= 1
        for lease in won:
            ownership.check(f"{tmp_path}/{attempt}", lease.owner)
            lease.release()


def test_a_claim_that_came_between_two_looks_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One looks while a third's claim is there; it is taken back, and another comes in under the same number."""
    run, claims, others = str(tmp_path), ownership._claims, []

    def look(uri: str, *patience: float) -> list[str]:
        if others:
            return claims(uri, *patience)
        others.append(None)
        others[0] = Lease(run)
        return ["00000001-0badcafe"]

    monkeypatch.setattr(ownership, "_claims", look)
    with pytest.raises(OwnedElsewhereError, match="belongs to a command that is running"):
        Lease(run)
    (other,) = others
    ownership.check(run, other.owner)
    other.release()


def test_a_damaged_claim_blocks_nobody(tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/owners/00000007-00c0ffee.json", b"{")
    with Lease(str(tmp_path)) as lease:
        assert ownership.number(lease.owner) == 8
