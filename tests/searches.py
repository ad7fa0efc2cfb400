"""Searches as processes of their own that are stopped and killed, and what they leave in their folders."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import psutil


def finished(out: Path, *more: str) -> dict[str, int]:
    """When every trial that needs no more work ended: by its ``result.json``, or another file of these names."""
    names = ("result.json", *more)
    return {p.parent.name: p.stat().st_mtime_ns for name in names for p in out.glob(f"trials/*/{name}")}


def interrupted(out: Path, *more: str) -> dict[str, list[float]]:
    """Unfinished trials that have a checkpoint: the times of its steps."""
    found = {}
    for marker in sorted(out.glob("trials/*/checkpoints/*/COMMIT")):
        if (name := marker.parents[2].name) not in finished(out, *more):
            with contextlib.suppress(FileNotFoundError):  # an old one that the running trial has just removed
                found[name] = json.loads((marker.parent / "trainer.json").read_text())["step_seconds"]
    return found


def wait_for(process: subprocess.Popen[Any], condition: Callable[[], Any], seconds: float = 500) -> None:
    """Until it is true of a search that is at work."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline, "not so far in minutes"
        time.sleep(0.01)


def kill(process: subprocess.Popen[Any]) -> None:
    """Driver, Ray and trials at once, of a process that leads its session."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    # Ray ends its processes when their driver is gone; a trial of a second would have finished before.
    processes.kill(family)
    process.wait()


def hear_ctrl_c() -> None:
    """In a new process: a shell that starts the tests in the background has them, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
