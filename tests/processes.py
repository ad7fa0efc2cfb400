"""Processes of a test's own that start quickly, and those of others, each of which may end while it is looked at."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from contextlib import suppress

import psutil

#: Forks from a process that has imported what takes seconds, and that has the environment of its first use.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["hyperlora.training", "peft", "transformers.models.llama.modeling_llama"])


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
