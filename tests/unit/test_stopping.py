"""Signals within a search: the first waits for a moment at which nothing is half done."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from hyperlora.stopping import Notice, NotStoredError, TerminatedError, terminable


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Python's own, whatever the tests' shell has made of them."""
    numbers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_ctrl_c_waits_and_the_second_does_not() -> None:
    with Notice(interrupts=True) as notice:
        notice.check()
        signal.raise_signal(signal.SIGINT)
        assert notice.given()
        with pytest.raises(KeyboardInterrupt) as error:
            notice.check()
        assert not isinstance(error.value, TerminatedError)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_sigterm_is_told_apart() -> None:
    with Notice(interrupts=True) as notice:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(TerminatedError):
            notice.check()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Notice(interrupts=True) as notice:
        signal.raise_signal(signal.SIGINT)
    assert not notice.given()


def test_elsewhere_ctrl_c_is_what_it_always_is() -> None:
    with Notice() as notice, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not notice.given()


class Signals:
    """Sends a signal while a class is made that has it; Python makes another error of what comes out of that."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __set_name__(self, owner: type, name: str) -> None:
        signal.raise_signal(self._number)


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_while_a_class_is_made_is_an_interruption(number: int, expected: type[BaseException]) -> None:
    with pytest.raises(KeyboardInterrupt) as error, terminable():
        type("Made", (), {"field": Signals(number)})
    assert type(error.value) is expected


def end_with(error: Exception) -> None:
    """Make this of SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    raise error


def test_sigterm_that_an_import_makes_an_error_of_its_own_of_is_an_interruption() -> None:
    with pytest.raises(TerminatedError), terminable():
        end_with(ImportError("a C extension failed to import"))


def fail_after_interruption() -> None:
    with Notice() as notice:
        signal.raise_signal(signal.SIGTERM)
        try:
            notice.check()
        finally:
            raise RuntimeError("what cleans up fails")


def test_what_was_made_of_sigterm_elsewhere_is_no_ctrl_c() -> None:
    with pytest.raises(TerminatedError), terminable():
        fail_after_interruption()


def test_what_became_of_the_run_is_told_after_sigterm_too() -> None:
    with pytest.raises(NotStoredError), terminable():
        end_with(NotStoredError("a local copy is kept"))


def test_errors_without_a_signal_are_what_they_are() -> None:
    with pytest.raises(ValueError, match="mine"), terminable():
        raise ValueError("mine")
