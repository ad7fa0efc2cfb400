"""Signals within a search: the first waits for a moment at which nothing is half done."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from hyperlora.stopping import Notice, TerminatedError


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
