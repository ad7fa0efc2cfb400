"""Trials that fail each in their own way, under a real Ray."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import processes
import pytest
import ray
from conftest import small_recipe

from hyperlora import checkpoint, runs, search
from hyperlora.config import RecipeError, parse
from hyperlora.search import Result, Trial


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The search uses a Ray that runs already."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def trial(folder: Path, name: str, steps: int = 10, **sections: Any) -> Trial:
    content = small_recipe(folder)
    content["training"] |= {"steps": steps, "eval_before": False}
    return Trial(name, str(folder / name), parse(content | sections))


def run(*trials: Trial, concurrency: int = 2) -> dict[str, Result]:
    return {r.trial.name: r for r in search.run(lambda done: trials, trials[0].recipe, concurrency)}


def kill_the_worker(folder: Path) -> None:
    """Kill the process of this test's own Ray that is at work on a trial, once that has a checkpoint."""
    while not list(folder.glob("checkpoints/*/COMMIT")):
        time.sleep(0.01)
    processes.kill(processes.below(os.getpid(), "ray::_Process"))


@pytest.mark.usefixtures("cluster")
def test_failing_trials_do_not_stop_the_others(tmp_path: Path) -> None:
    good, misfit = trial(tmp_path, "good"), trial(tmp_path, "misfit", adapter={"target_modules": ["nothing"]})
    found = run(misfit, good)
    assert found["good"].status == "finished"
    assert found["good"].outcome is not None
    assert len(found["good"].outcome["step_seconds"]) == 10
    assert found["misfit"].status == "failed"
    assert "RecipeError: 1 problem: adapter.target_modules" in str(found["misfit"].reason)


def process_of(folder: Path) -> int:
    """Which one had the claim to a trial's folder."""
    (claim,) = folder.glob("owners/*.json")
    return int(json.loads(claim.read_text())["pid"])


@pytest.mark.usefixtures("cluster")
def test_a_process_is_for_one_trial_after_the_other_until_one_fails(tmp_path: Path) -> None:
    """What has failed may have broken it, as an assertion on a GPU does; that a loss is not finite has not."""
    wild = trial(tmp_path, "wild", method="adalora", optimizer={"lr": 1e200, "warmup": 0, "max_grad_norm": None})
    misfit = trial(tmp_path, "misfit", adapter={"target_modules": ["nothing"]})
    found = run(wild, misfit, trial(tmp_path, "good", steps=1), concurrency=1)
    assert {name: result.status for name, result in found.items()} == {
        "wild": "failed",
        "misfit": "failed",
        "good": "finished",
    }
    assert "the step was not taken" in str(found["wild"].reason)
    assert "RecipeError: 1 problem: adapter.target_modules" in str(found["misfit"].reason)
    first, second, third = (process_of(tmp_path / name) for name in ("wild", "misfit", "good"))
    assert first == second != third


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_fails_its_trial_which_can_go_on_later(tmp_path: Path) -> None:
    long = trial(tmp_path, "long", steps=200)
    killer = threading.Thread(target=kill_the_worker, args=(tmp_path / "long",))
    killer.start()
    found = run(long, trial(tmp_path, "next"), concurrency=1)
    killer.join()
    assert (found["long"].status, found["next"].status) == ("failed", "finished")
    assert "ActorDiedError: Worker unexpectedly exits" in str(found["long"].reason)
    first_part = runs.read(checkpoint.committed(str(tmp_path / "long"))[-1], "trainer.json")["step_seconds"]
    outcome = run(long)["long"].outcome
    assert outcome is not None
    assert outcome["step_seconds"][: len(first_part)] == first_part


@pytest.mark.usefixtures("cluster")
def test_trials_may_depend_on_results(tmp_path: Path) -> None:
    """And what is on disk needs no run: the second time nothing starts."""

    def plan(done: Mapping[str, Result]) -> list[Trial]:
        return [trial(tmp_path, "first"), *([trial(tmp_path, "second")] if "first" in done else [])]

    started: list[str] = []
    for _ in range(2):
        names = [
            r.trial.name for r in search.run(plan, plan({})[0].recipe, 2, started=lambda t: started.append(t.name))
        ]
        assert names == ["first", "second"]
    assert started == ["first", "second"]


@pytest.mark.usefixtures("cluster")
def test_more_trials_at_a_time_than_the_cluster_holds(tmp_path: Path) -> None:
    one = trial(tmp_path, "one")
    with pytest.raises(RecipeError, match="5 workers need 5 CPUs, the cluster has 2"):
        list(search.run(lambda done: [one], one.recipe, 5))
