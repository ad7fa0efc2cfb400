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

    It is raised in whatever is at work, which may make another error of it, as of Ctrl-C: making a class does, and
    importing a C extension. The block makes the interruption of that again.

    Ray takes SIGTERM for itself when it starts, to exit with the signal's number: around its start the block makes the
    same error of that, and gives the signal back.
    """
    mine = threading.current_thread() is threading.main_thread()
    told = False

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        raise TerminatedError

    if mine:
        before = signal.signal(signal.SIGTERM, take)
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise TerminatedError from error
    except (OSError, NonFiniteError, StoppedError, NotStoredError):
        raise  # says what became of the run, or of its report
    except Exception as error:
        interruption = TerminatedError if told else _interruption(error)
        if interruption is None:
            raise
        raise interruption from error
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def _interruption(error: BaseException | None) -> type[KeyboardInterrupt] | None:
    """What an error was made of, if that was an interruption."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return None if error is None else type(error)


class Notice:
    """Within its ``with`` block SIGTERM ends nothing: it makes :meth:`given` true.

    Signals reach the main thread alone: in another thread, as in a trial of Ray Tune, the block changes nothing.

    Args:
        interrupts: the same for the first Ctrl-C; the second ends the command at once. An error that comes out of
            whatever is at work, the import of a C extension say, need not come out as what it was.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self._numbers = [signal.SIGTERM, *([signal.SIGINT] if interrupts else [])]
        self._before: dict[int, Any] = {}
        self._taken: int | None = None

    def given(self) -> bool:
        """Whether a signal has come."""
        return self._taken is not None

    def check(self) -> None:
        """Raise what the signal would have raised, if one has come.

        Raises:
            TerminatedError: it was SIGTERM.
            KeyboardInterrupt: it was Ctrl-C.
        """
        if self._taken is not None:
            raise TerminatedError if self._taken == signal.SIGTERM else KeyboardInterrupt

    def __enter__(self) -> Notice:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                # What is started in the background ignores Ctrl-C, and goes on to.
                if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._taken = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


class NonFiniteError(RuntimeError):
    """The loss or a gradient was not finite on some worker; the optimizer did not take the step."""


class StoppedError(RuntimeError):
    """The run was told to stop, and did so between two steps."""


class NotStoredError(RuntimeError):
    """The end of the run could not be written where it belongs."""
