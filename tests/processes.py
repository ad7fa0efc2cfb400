"""Processes of others, each of which may end while it is looked at."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil


def below(pid: int, word: str) -> list[psutil.Process]:
    """Those that a process has started, at any depth, with a word in their command line."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if word in " ".join(process.cmdline()) else []
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL of all that are still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
