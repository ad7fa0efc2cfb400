"""Checkpoints written while training goes on: one thread, one upload at a time, the newest snapshot next."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from hyperlora import checkpoint, ownership
from hyperlora.ownership import RENEWAL, ReplacedError
from hyperlora.storage import StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state of one step, which nothing changes any more.

    Attributes:
        step: optimizer steps done.
        files: packs the checkpoint's files; called in the background.
        patience: seconds that each operation of the store is tried again.
        reported: waits until what was reported up to this step is delivered; called in the background.
    """

    step: int
    files: Callable[[], dict[str, bytes]]
    patience: float
    reported: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """What came of a snapshot.

    Attributes:
        step: of the snapshot.
        uri: of the committed checkpoint; None if it failed.
        error: why it failed.
        seconds: of the whole upload with its retries.
        bytes: of the files.
    """

    step: int
    uri: str | None
    error: StorageError | None
    seconds: float
    bytes: int


class Uploader:
    """Commits snapshots of a run from a background thread.

    A store that fails costs the snapshot and nothing else; every other error, a lost claim among them, is raised by
    the next :meth:`finished` or :meth:`drain`.

    Args:
        run_uri: the run's folder.
        writer: see :func:`hyperlora.checkpoint.write`.
        owner: the claim that must be the highest; None where no two ever write into the run.
        keep: checkpoints to keep.
    """

    def __init__(self, run_uri: str, writer: str | None, owner: str | None, keep: int) -> None:
        self._uri, self._writer, self._owner, self._keep = run_uri, writer, owner, keep
        #: URIs of checkpoints that did not verify.
        self.refused: Collection[str] = ()
        self._condition = threading.Condition()
        self._give_up = threading.Event()
        self._waiting: Snapshot | None = None
        self._busy = self._closed = False
        self._outcomes: list[Outcome] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, snapshot: Snapshot) -> None:
        """Upload this after what is in flight, in place of any other that waits for it; returns at once."""
        with self._condition:
            if self._error is not None:
                return  # told by finished()
            self._waiting = snapshot
            self._start()
            self._condition.notify_all()

    def watch(self) -> None:
        """Find out from now on, every few seconds, whether the run is still ours; told by :meth:`finished`."""
        with self._condition:
            if self._owner is not None and not self._closed:
                self._start()

    def finished(self) -> list[Outcome]:
        """Outcomes since the last call.

        Raises:
            ReplacedError: another process has taken over the run.
        """
        with self._condition:
            outcomes, self._outcomes = self._outcomes, []
            if self._error is not None:
                raise self._error
            return outcomes

    def drain(self) -> list[Outcome]:
        """Wait until everything submitted is committed or has failed; outcomes as from :meth:`finished`."""
        with self._condition:
            self._condition.wait_for(lambda: not self._busy and self._waiting is None)
        return self.finished()

    def close(self) -> None:
        """End the thread after what is in flight and waiting, each of which gives up at its next error."""
        self._give_up.set()
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting is not None or self._closed, timeout=RENEWAL)
                snapshot, self._waiting = self._waiting, None
                if snapshot is None and self._closed:
                    return
                self._busy = snapshot is not None
            try:
                if snapshot is not None:
                    self._upload(snapshot)
                else:
                    self._check()
            except BaseException as error:
                with self._condition:
                    self._error, self._waiting, self._closed = error, None, True
            with self._condition:
                self._busy = False
                self._condition.notify_all()

    def _check(self) -> None:
        """Between uploads: find out whether the run is still ours."""
        with suppress(StorageError):  # asked again in a few seconds, and before each commit
            ownership.check(self._uri, self._owner)

    def _upload(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        files = snapshot.files()
        uri, failure = None, None

        def before_commit() -> None:
            # The run that goes on from this checkpoint reports none of these steps again.
            snapshot.reported()
            ownership.check(self._uri, self._owner, snapshot.patience)

        try:
            uri = checkpoint.write(
                self._uri,
                snapshot.step,
                files,
                writer=self._writer,
                patience=snapshot.patience,
                give_up=self._give_up,
                before_commit=before_commit,
            )
        except FileExistsError as error:
            raise ReplacedError(str(error)) from error
        except FileNotFoundError as error:
            failure = StorageError(self._uri, str(error), transient=False)
        except StorageError as error:
            failure = error
        else:
            self._prune()
        size = sum(len(data) for data in files.values())
        with self._condition:
            self._outcomes.append(Outcome(snapshot.step, uri, failure, time.monotonic() - started, size))

    def _prune(self) -> None:
        try:
            # The commit may have taken so long that somebody else has the run by now, and is writing into it.
            ownership.check(self._uri, self._owner)
            number = None if self._owner is None else ownership.number(self._owner)
            checkpoint.prune(self._uri, self._keep, self.refused, number)
        except StorageError as error:
            logger.warning("old checkpoints stay until the next one is written: %s", error)
