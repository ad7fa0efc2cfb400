"""A queue of JSON records that outlives its process: what waits for a server that is away."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

#: Records that wait at most; ten metrics each are about 40 MB on disk.
CAPACITY = 100_000


def folder() -> Path:
    """Where queues lie on this machine."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "hyperlora"


class Spool:
    """Records in order, in memory and in a file that goes when it is empty.

    A process that finds the file of an earlier one goes on with what that one had left. When it is full, newer records
    are dropped and counted. A file that cannot be written costs the durability, with a warning, and nothing else.

    Args:
        path: of the file.
        capacity: records at most.
    """

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        self.path, self._capacity = path, capacity
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._durable = True
        self.dropped = 0
        #: Records that were removed.
        self.removed = 0
        self._records: list[dict[str, Any]] = []
        try:
            self._records = _read(path)[:capacity]
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
        self._durable = False
        logger.warning("metrics that wait for a server are kept in memory only: %s", error)

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def first(self, count: int) -> list[dict[str, Any]]:
        """The oldest records, which stay."""
        with self._lock:
            return self._records[:count]

    def remove(self, count: int) -> None:
        """Forget the oldest records."""
        with self._lock:
            self.removed += len(self._records[:count])
            del self._records[:count]
            if not self._records:
                self._close()
                self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave what still waits in the file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a kill may have left half a line at its end."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return records
