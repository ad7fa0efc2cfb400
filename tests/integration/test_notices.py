"""A notice that a worker may go away makes a checkpoint, SIGTERM also ends the run, both within a step or a batch of an
evaluation; metrics that are slow to arrive hold up commits alone."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import small_recipe
from processes import FORKSERVER

from hyperlora import checkpoint
from hyperlora.config import Recipe, parse
from hyperlora.stopping import Notice, StoppedError
from hyperlora.training import RunInfo, Silent, World, train


def recipe(folder: Path, **training: Any) -> Recipe:
    content = small_recipe(folder)
    content["training"] |= {"steps": 12, "checkpoint_every": 5, "keep_checkpoints": 10, "eval_before": False}
    content["training"] |= training
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


class Ended(Silent):
    """Sends SIGTERM to this process when a step's metrics arrive."""

    def __init__(self, at: int) -> None:
        self._at = at

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if step == self._at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_within_one_step(tmp_path: Path) -> None:
    for at in (1, 7):
        uri = tmp_path / f"run{at}"
        notice = Notice()
        with notice, pytest.raises(StoppedError, match=f"told to stop after step {at + 1} of 12"):
            train(recipe(tmp_path), RunInfo(str(uri)), sink=Ended(at), stop=notice.given)
        assert steps(uri)[-1] == at + 1


def test_a_notice_within_an_evaluation_makes_one_checkpoint_of_its_step(tmp_path: Path) -> None:
    """In the one that comes when a checkpoint is due anyway, in another, and in the last."""
    whole = tmp_path / "whole"
    settings = {"eval_every": 5, "eval_batch_size": 2, "steps": 13}  # an evaluation is four batches
    undisturbed = train(recipe(tmp_path, **settings), RunInfo(str(whole)), sink=Unhurried(whole, {5, 10}))
    # What is asked: steps 1 to 5, four batches, 6 to 10, four batches, 11 to 13, four batches.
    for asked_at, found in ((7, [5, 10, 13]), (22, [5, 10, 13])):
        noticed, asked = tmp_path / f"noticed{asked_at}", iter(range(1, 100))
        sink = Unhurried(noticed, {5, 10})
        leaving = lambda asked=asked, at=asked_at: next(asked) == at  # noqa: E731
        outcome = train(recipe(tmp_path, **settings), RunInfo(str(noticed)), sink=sink, leaving=leaving)
        assert steps(noticed) == found
        (phase,) = (p for p in sink.phases if "going away" in p)
        assert phase.endswith(f"of step {5 if asked_at == 7 else 13}")
        assert outcome["losses"] == undisturbed["losses"]
        assert outcome["evaluations"] == undisturbed["evaluations"]
        assert checkpoint.load(outcome["checkpoint"]).trainer["step"] == 13


def test_a_notice_before_the_first_step_makes_a_checkpoint_after_it(tmp_path: Path) -> None:
    asked = iter(range(1, 100))
    sink = Unhurried(tmp_path / "run", {1, 5, 10})
    settings = recipe(tmp_path, eval_before=True, eval_batch_size=2)
    train(settings, RunInfo(str(tmp_path / "run")), sink=sink, leaving=lambda: next(asked) == 2)
    assert steps(tmp_path / "run") == [1, 5, 10, 12]


def _stopped(rank: int, folder: str) -> None:
    """One of two workers with unequal numbers of rows; worker 0 is told to stop in the evaluation's second batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    asked = iter(range(1, 100))
    stop = (lambda: next(asked) == 2) if rank == 0 else lambda: False
    told, world = None, World(rank, 2, dist.group.WORLD)
    try:
        train(parse(json.loads(Path(folder, "recipe.json").read_text())), RunInfo(f"{folder}/run"), world, stop=stop)
    except StoppedError as error:
        told = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def test_several_workers_stop_within_an_evaluation(tmp_path: Path) -> None:
    content = small_recipe(tmp_path)
    content["data"]["eval_rows"] = 9
    content["training"]["eval_batch_size"] = 2
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    mp.start_processes(_stopped, (str(tmp_path),), nprocs=2, start_method=FORKSERVER.get_start_method())
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all("told to stop after step 0 of 20" in t for t in told), told
    (saved,) = checkpoint.committed(str(tmp_path / "run"))
    assert checkpoint.load(saved).trainer["evaluations"] == []


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
