"""Waiting for a processor is told from working, on a processor that two programs share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperlora import checkpoint, runs, training
from hyperlora.contention import waited
from hyperlora.stopping import StoppedError
from hyperlora.training import RunInfo
from pipelines.common import load_recipe


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


def test_what_was_waited_before_a_kill_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(10**6))
    monkeypatch.setattr(training, "waited", lambda: 0.01 * next(seconds))
    changes = ["ray.num_workers=1", "data.train_rows=64", "data.eval_rows=8", "training.steps=6"]
    recipe, info = load_recipe("quickstart", changes), RunInfo(str(tmp_path / "run"))
    asked = iter(range(10**6))
    with pytest.raises(StoppedError):
        training.train(recipe, info, stop=lambda: next(asked) >= 8)
    taken = runs.read(checkpoint.committed(info.uri)[-1], "trainer.json")["step"]
    assert 1 < taken < 6
    outcome = training.train(recipe, info)
    assert outcome["waited_share"] == pytest.approx(6 * 0.01 / sum(outcome["step_seconds"]))
