"""How a run or a search ends before its end: by SIGTERM, the notice before a machine goes away, or by an error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come, and ends the command as Ctrl-C does."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`TerminatedError`, in the main thread.

    Ray takes SIGTERM for itself when it starts, to exit with the signal's number: around its start the block makes the
    same error of that, and gives the signal back.
    """
    mine = threading.current_thread() is threading.main_thread()
    if mine:
        before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise TerminatedError from error
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise TerminatedError


class Notice:
    """Within its ``with`` block SIGTERM ends nothing: it makes :meth:`given` true.

    Signals reach the main thread alone: in another thread, as in a trial of Ray Tune, the block changes nothing.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._before: Any = None
        self._mine = False

    def given(self) -> bool:
        """Whether SIGTERM has come."""
        return self._event.is_set()

    def __enter__(self) -> Notice:
        self._mine = threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            signal.signal(signal.SIGTERM, self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._event.set()


class NonFiniteError(RuntimeError):
    """The loss or a gradient was not finite on some worker; the optimizer did not take the step."""


class StoppedError(RuntimeError):
    """The run was told to stop, and did so between two steps."""


class NotStoredError(RuntimeError):
    """The end of the run could not be written where it belongs."""
