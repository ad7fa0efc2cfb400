"""A run in a process of its own that is killed at the n-th of some kind of point."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

from processes import FORKSERVER

from hyperlora import checkpoint, optimizer
from hyperlora.config import parse
from hyperlora.training import RunInfo, Silent, train

Where = Literal["step", "pruning event", "write"]


class _Death:
    """SIGKILL of this process at the n-th call."""

    def __init__(self, n: int) -> None:
        self._left = n

    def __call__(self) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


class _Steps(Silent):
    """Goes on after a checkpoint was due once it is there, so that what is killed later has one."""

    def __init__(self, uri: str, every: int, death: Callable[[], None]) -> None:
        self._uri, self._every, self._death = uri, every, death

    def step(self, step: int, metrics: dict[str, float]) -> None:
        due = (step - 1) // self._every * self._every
        while due and due not in map(checkpoint.step_of, checkpoint.committed(self._uri)):
            time.sleep(0.01)
        self._death()


def _run(recipe: dict[str, Any], uri: str, where: Where, n: int) -> None:
    warnings.simplefilter("ignore")  # pytest, which shows each once, is in another process
    death, every = _Death(n), recipe["training"]["checkpoint_every"]
    sink = _Steps(uri, every, death if where == "step" else lambda: None)
    if where == "pruning event":
        # The mask is chosen; nothing of the event has been written.
        prune = optimizer.prune_to

        def prune_to(*args: Any) -> Any:
            mask = prune(*args)
            death()
            return mask

        optimizer.prune_to = prune_to  # type: ignore[assignment]
    elif where == "write":
        fsync = os.fsync

        def flush(descriptor: int) -> None:
            """Of a file that has its content and not yet its name, or of the folder where it just got it."""
            death()
            fsync(descriptor)

        os.fsync = flush
    train(parse(recipe), RunInfo(uri), sink=sink)


def run(recipe: dict[str, Any], uri: str, where: Where = "step", n: int = 0) -> bool:
    """Train, going on from the run's newest checkpoint; whether it came to its end.

    Args:
        recipe: as a file holds it.
        uri: of the run.
        where: at what the process is killed.
        n: at which of them, from 1; 0 is never.
    """
    process = FORKSERVER.Process(target=_run, args=(recipe, uri, where, n))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0
