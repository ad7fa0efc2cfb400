"""Waiting for a processor is told from working, on a processor that two programs share."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from hyperlora.contention import waited


def work(seconds: float) -> float:
    """Share of the time that this thread waited, while it had something to do."""
    before, began = waited(), time.perf_counter()
    while time.perf_counter() - began < seconds:
        pass
    after = waited()
    assert before is not None
    assert after is not None
    return (after - before) / (time.perf_counter() - began)


@pytest.mark.skipif(waited() is None, reason="nobody counts here")
def test_a_thread_that_shares_its_processor_waits() -> None:
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(ours)})
    try:
        beside = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.5)
            shared = work(2)
        finally:
            beside.kill()
            beside.wait()
    finally:
        os.sched_setaffinity(0, ours)
    assert 0.2 < shared < 1
