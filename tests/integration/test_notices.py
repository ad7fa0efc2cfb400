"""A notice that a worker may go away makes a checkpoint; metrics that are slow to arrive hold up commits alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import small_recipe

from hyperlora import checkpoint
from hyperlora.config import Recipe, parse
from hyperlora.training import RunInfo, Silent, train


def recipe(folder: Path) -> Recipe:
    content = small_recipe(folder)
    content["training"] |= {"steps": 12, "checkpoint_every": 5, "keep_checkpoints": 10, "eval_before": False}
    return parse(content)


def steps(uri: Path) -> list[int]:
    return [checkpoint.step_of(found) for found in checkpoint.committed(str(uri))]


class Unhurried(Silent):
    """Shows a step only once the checkpoint before it is committed: none gives way to a newer one."""

    def __init__(self, uri: Path, due: set[int]) -> None:
        self._uri, self._due = uri, due
        self.phases: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        while not {n for n in self._due if n < step} <= set(steps(self._uri)):
            time.sleep(0.01)


def test_a_notice_makes_one_checkpoint_of_the_step_at_hand(tmp_path: Path) -> None:
    whole, noticed = tmp_path / "whole", tmp_path / "noticed"
    undisturbed = train(recipe(tmp_path), RunInfo(str(whole)), sink=Unhurried(whole, {5, 10}))
    asked = iter(range(1, 100))  # once a step
    sink = Unhurried(noticed, {5, 7, 10})
    outcome = train(recipe(tmp_path), RunInfo(str(noticed)), sink=sink, leaving=lambda: next(asked) == 7)
    assert steps(whole) == [5, 10, 12]
    assert steps(noticed) == [5, 7, 10, 12]
    assert sum("going away" in phase for phase in sink.phases) == 1
    assert outcome["losses"] == undisturbed["losses"]


class Slow(Silent):
    """Metrics that arrive once the run is at its tenth step."""

    def __init__(self, uri: Path) -> None:
        self._uri, self._arrived = uri, threading.Event()
        self.committed_before: list[int] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if step == 10:
            self.committed_before = steps(self._uri)
            self._arrived.set()

    def flush(self) -> Callable[[], Any]:
        return lambda: self._arrived.wait(60)


def test_training_goes_on_while_the_commit_waits_for_metrics(tmp_path: Path) -> None:
    sink = Slow(tmp_path / "run")
    train(recipe(tmp_path), RunInfo(str(tmp_path / "run")), sink=sink)
    assert sink.committed_before == [], "a checkpoint was committed before its metrics had arrived"
    assert steps(tmp_path / "run")[-1] == 12
