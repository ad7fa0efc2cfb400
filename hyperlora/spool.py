"""A queue of JSON records that outlives its process: what waits for a server that is away."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

#: Records that wait at most; ten metrics each are about 40 MB on disk.
CAPACITY = 100_000
# Key of a file's first line, which is no record.
_ABOUT = "about"


def folder() -> Path:
    """Where queues lie on this machine."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "hyperlora"


def about(path: Path) -> dict[str, Any]:
    """What the process that began a file said of it; empty where it said nothing."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    found = first.get(_ABOUT) if isinstance(first, dict) else None
    return found if isinstance(found, dict) else {}


def in_use(path: Path) -> bool:
    """Whether the process whose records are in a file lives, and has not closed it."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Spool:
    """Records in order, in memory and in a file that goes when it is empty.

    A process that finds the file of an earlier one goes on with what that one had left. When it is full, newer records
    are dropped and counted. A file that cannot be written costs the durability, with a warning, and nothing else.

    Args:
        path: of the file.
        capacity: records at most.
        about: what a file that is begun says of itself, for :func:`about`.
    """

    def __init__(self, path: Path, capacity: int = CAPACITY, about: dict[str, Any] | None = None) -> None:
        self.path, self._capacity, self._about = path, capacity, about
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._durable = True
        self.dropped = 0
        #: Records that were removed.
        self.removed = 0
        # How many of those are still at the head of the file.
        self._stale = 0
        self._records: list[dict[str, Any]] = []
        try:
            records, whole = _read(path)
            # A kill may have left records at the head that had been removed.
            self._records = records[-capacity:]
            self._stale = len(records) - len(self._records)
            if not whole:
                self._rewrite()
            elif records:
                self._file = _locked(path, "a")
        except OSError as error:
            self._memory_only(error)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def added(self) -> int:
        """All records that were ever in the queue."""
        with self._lock:
            return self.removed + len(self._records)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record of JSON types."""
        with self._lock:
            if len(self._records) >= self._capacity:
                if not self.dropped:
                    logger.warning("%d metrics wait for a server; newer ones are dropped", self._capacity)
                self.dropped += 1
                return
            self._records.append(record)
            if self._durable:
                try:
                    self._append(record)
                except OSError as error:
                    self._memory_only(error)

    def _memory_only(self, error: OSError) -> None:
        if self._durable:
            logger.warning("metrics that wait for a server are kept in memory only: %s", error)
        self._durable = False

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            self._file = _locked(self.path, "a")
            if new:
                self._file.write(self._head())
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _head(self) -> str:
        return "" if self._about is None else json.dumps({_ABOUT: self._about}) + "\n"

    def _rewrite(self) -> None:
        """Have the file hold what waits and nothing else; one that cannot be replaced stays as it is."""
        if not self._records:
            self._close()
            self.path.unlink(missing_ok=True)
            self._stale = 0
            return
        path = self.path.with_suffix(".tmp")
        file = _locked(path, "w")
        try:
            file.write(self._head())
            file.writelines(json.dumps(record) + "\n" for record in self._records)
            file.flush()
            path.replace(self.path)
        except OSError:
            with suppress(OSError):
                file.close()
            path.unlink(missing_ok=True)
            raise
        self._close()
        self._file, self._stale = file, 0

    def first(self, count: int) -> list[dict[str, Any]]:
        """The oldest records, which stay."""
        with self._lock:
            return self._records[:count]

    def remove(self, count: int) -> None:
        """Forget the oldest records."""
        with self._lock:
            count = len(self._records[:count])
            self.removed += count
            self._stale += count
            del self._records[:count]
            # Seldom enough that a record is written at most twice on average.
            full = self._stale >= max(len(self._records), self._capacity // 100)
            if not self._records or (self._durable and full):
                try:
                    self._rewrite()
                except OSError as error:
                    self._memory_only(error)

    def close(self) -> None:
        """Leave what still waits in the file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # what an earlier write could not write
                self._memory_only(error)


def _locked(path: Path, mode: str) -> TextIO:
    """A file that is in use until it is closed."""
    file: TextIO = path.open(mode, encoding="utf-8")  # type: ignore[assignment]
    with suppress(OSError):  # some network file systems know no locks
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The records of a file, and whether there is nothing else in it: a kill may have left half a line at its end."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records, True
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text.endswith("\n")
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            whole = False
            break
        if _ABOUT not in record:
            records.append(record)
    return records, whole and bool(records)
