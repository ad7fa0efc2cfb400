"""One writer for a run's folder: numbered claims, renewed while their holder lives, fenced by higher numbers.

    <run>/owners/00000003-5f2c9a1e.json    number and token; who holds it; a count that grows with every renewal

Whoever wants to write sees to it that the holders of all claims there are gone, puts a claim with the next number and
a token of its own, then lists the folder again: a claim that was not there before means that somebody else came at the
same moment, and this one is taken back. Of two that come at once the later therefore sees the earlier. That needs a
store whose listings show finished writes (local folders, S3, GCS, Azure) and no conditional writes, so that it holds on
stores without them as well. A holder that finds a higher number has been replaced and writes no more.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import re
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from hyperlora import storage, uris
from hyperlora.storage import PATIENCE, patiently

logger = logging.getLogger(__name__)

#: Seconds between renewals, and after which a claim that nobody renews counts as abandoned.
RENEWAL, LEASE = 5.0, 20.0
NAME = re.compile(r"^(\d{8})-[0-9a-f]{8}$")


class OwnedElsewhereError(RuntimeError):
    """Another process is at work in the run's folder."""


class ReplacedError(RuntimeError):
    """Another process took over the run's folder; this one must write no more."""


def number(owner: str) -> int:
    """Number of a claim by its name."""
    match = NAME.match(owner)
    if match is None:
        raise ValueError(f"owner {owner!r}; allowed: eight digits, a hyphen, eight hexadecimal digits")
    return int(match[1])


def check(run_uri: str, owner: str | None, patience: float = PATIENCE) -> None:
    """Find out whether a claim is still the highest.

    Args:
        run_uri: the run's folder.
        owner: the claim; None where no two ever write, which always holds.
        patience: seconds that listing the claims is tried again.

    Raises:
        ReplacedError: it is not.
        StorageError: the claims cannot be listed.
    """
    if owner is None:
        return
    higher = [name for name in _claims(run_uri, patience) if number(name) > number(owner)]
    if not higher:
        return
    raise ReplacedError(
        f"{uris.redacted(run_uri)} was taken over by another process{_holder(_read(run_uri, max(higher)))}; "
        "this one has stopped and written nothing since"
    )


class Lease:
    """The right to write into a run's folder, renewed in the background until it is released.

    Args:
        run_uri: the run's folder.

    Raises:
        OwnedElsewhereError: a process that is alive has it.
        StorageError: the claims cannot be read or written.
    """

    def __init__(self, run_uri: str) -> None:
        self._uri = run_uri
        self._content: dict[str, Any] = _identity() | {"renewals": 0, "released": False}
        self.owner = self._acquire()
        self._over = threading.Event()
        self._renewals: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the next process have the folder at once."""
        self._over.set()
        self._thread.join()
        for renewal in self._renewals:  # none may come after what follows
            renewal.join()
        self._content["released"] = True
        try:
            self._write(storage.pack_json(self._content))
        except OSError as error:
            logger.warning("the next process waits %g s for %s: %s", LEASE, self._uri, error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _acquire(self) -> str:
        content = storage.pack_json(self._content)
        for _ in range(5):
            names = _claims(self._uri)
            last = max((number(n) for n in names), default=0)
            for name in names:
                if number(name) == last:
                    _wait_for(self._uri, name)
            self.owner = f"{last + 1:08d}-{secrets.token_hex(4)}"
            patiently(storage.create, _path(self._uri, self.owner), content)
            if set(_claims(self._uri)) <= {*names, self.owner}:
                for name in names:
                    patiently(storage.remove, _path(self._uri, name))
                return self.owner
            patiently(storage.remove, _path(self._uri, self.owner))
            time.sleep(random.uniform(0.1, 1))
        raise OwnedElsewhereError(f"{uris.redacted(self._uri)} is claimed by several processes at once; try again")

    def _write(self, content: bytes) -> None:
        storage.write(_path(self._uri, self.owner), content)

    def _renew(self) -> None:
        while not self._over.wait(RENEWAL):
            self._content["renewals"] += 1
            content = storage.pack_json(self._content)
            # A request may hang for longer than the lease: the next one does not wait for it.
            renewal = threading.Thread(target=self._try, args=(content,), name="renewal", daemon=True)
            renewal.start()
            self._renewals = [thread for thread in self._renewals if thread.is_alive()] + [renewal]

    def _try(self, content: bytes) -> None:
        try:
            self._write(content)
        except OSError as error:  # a store that answers 404 as well: who stops here loses the run
            logger.info("claim not renewed, the next time is in %g s: %s", RENEWAL, error)


def _claims(run_uri: str, patience: float = PATIENCE) -> list[str]:
    found = patiently(storage.tree, f"{run_uri}/owners", patience=patience)
    return sorted(name.removesuffix(".json") for name in found if NAME.match(name.removesuffix(".json")))


def _path(run_uri: str, owner: str) -> str:
    return f"{run_uri}/owners/{owner}.json"


def _read(run_uri: str, owner: str) -> dict[str, Any]:
    """What a claim says; nothing if it was taken back or is damaged."""
    try:
        content = json.loads(patiently(storage.read, _path(run_uri, owner)))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and {"pid", "started", "renewals"} <= content.keys() else {}


def _holder(content: dict[str, Any]) -> str:
    return f" ({content['host']}, process {content['pid']})" if {"host", "pid"} <= content.keys() else ""


def _wait_for(run_uri: str, owner: str) -> None:
    """Return when the holder of a claim is gone.

    Raises:
        OwnedElsewhereError: it is alive.
    """
    first = _read(run_uri, owner)
    if first.get("released", True):
        return
    refusal = OwnedElsewhereError(
        f"{uris.redacted(run_uri)} belongs to a command that is running{_holder(first)}; stop that one first"
    )
    here = _identity()
    if first.get("machine") == here["machine"] and here["machine"] is not None:
        if _started(first["pid"]) == first["started"]:
            raise refusal
        return
    deadline = time.monotonic() + LEASE
    while time.monotonic() < deadline:
        time.sleep(1)
        now = _read(run_uri, owner)
        if now.get("released", True):
            return
        if now["renewals"] != first["renewals"]:
            raise refusal


def _identity() -> dict[str, Any]:
    """This process, so that another one on the same machine can tell whether it lives."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    machine = f"{boot.read_text().strip()} {space.readlink()}" if boot.is_file() and space.is_symlink() else None
    return {"host": platform.node(), "machine": machine, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> int | None:
    """When a process started, clock ticks since the boot; None for one that is not there or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
