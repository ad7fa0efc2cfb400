"""Ray Tune with an analytic stand-in for training: a planted optimum, and who is stopped early."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from conftest import small_recipe

from hyperlora import storage
from hyperlora.config import parse
from hyperlora.sampling import Objective, Proposals, Searched
from hyperlora.search import Result, Trial
from hyperlora.tuning import Search, Stopping, run, tune

RUNGS = (1, 3, 9)
STEPS = 27
LOSS = Objective("loss", higher=False)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all; a search uses a Ray that runs already. Its workers do not know this file."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def stand_in(config: dict[str, Any]) -> None:
    """Reports a curve that ends at the loss of the point, and writes what a trial writes."""
    folder = Path(config["uri"])
    end = loss(json.loads((folder / "values.json").read_text()))
    seen = []
    for step in (*RUNGS, STEPS):
        now = end + 3 / step
        seen.append({"step": step, "loss": now, "accuracy": 1 / (1 + now)})
        (folder / "reports.json").write_text(json.dumps(seen))
        if step == STEPS:
            (folder / "result.json").write_bytes(storage.sealed({"evaluations": seen}))
        tune.report(seen[-1])


def slow_to_leave(config: dict[str, Any]) -> None:
    """As one whose last checkpoint is on its way to a slow store when it is stopped."""
    try:
        stand_in(config)
    except SystemExit:
        time.sleep(4)
        raise


def loss(values: dict[str, Any]) -> float:
    """Lowest, 0, at x = 0.01, n = 8."""
    return (math.log10(values["x"]) + 2) ** 2 + 0.3 * (math.log2(values["n"]) - 3) ** 2


PARAMETERS = [
    {"key": "x", "choices": (), "low": 1e-4, "high": 1.0, "log": True, "integer": False},
    {"key": "n", "choices": (), "low": 1, "high": 64, "log": True, "integer": True},
]


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {"x": trial.suggest_float("x", 1e-4, 1.0, log=True), "n": trial.suggest_int("n", 1, 64, log=True)}


def search(
    folder: Path,
    count: int,
    stopping: Stopping | None = None,
    points: list[dict[str, Any]] | None = None,
    objective: Objective = LOSS,
    trainable: Callable[[dict[str, Any]], None] = stand_in,
) -> list[tuple[dict[str, Any], Result]]:
    """Points and results of a search, one trial at a time, in the order in which they ended; those of before first."""
    content = small_recipe(folder)
    content["ray"] = {"backend": "ray", "num_workers": 1}
    recipe = parse(content)
    made: dict[str, dict[str, Any]] = {}

    def make(name: str, values: dict[str, Any]) -> Trial:
        made[name] = values
        return Trial(name, str(folder / "trials" / name), recipe, name)

    space = Searched(PARAMETERS, suggest, lambda values: None, grid=points or ())
    proposals = Proposals("grid" if points else "tpe", space, [objective], seed=0)
    wanted = Search(str(folder), count, make, [objective], stopping, concurrency=1)
    found: list[Result] = []
    run(wanted, recipe, proposals, started=lambda trial, most: None, over=found.append, trainable=trainable)
    return [(made[r.trial.name], r) for r in found]


def test_a_planted_optimum_is_found_as_fast_as_by_plain_optuna(tmp_path: Path) -> None:
    """One trial at a time and with the same seed, by the same points."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: loss(suggest(trial)), n_trials=30)
    found = search(tmp_path, 30)
    assert [values for values, _ in found] == [pytest.approx(trial.params) for trial in study.trials]
    assert min(loss(values) for values, _ in found) < 0.2


def last_step(folder: Path, result: Result) -> int:
    return int(json.loads((Path(result.trial.uri) / "reports.json").read_text())[-1]["step"])


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_worse_ones_are_stopped_whichever_way_the_metric_points(metric: str, tmp_path: Path) -> None:
    objective = Objective(metric, higher=metric == "accuracy")
    stopping = Stopping(metric, objective.higher, first=RUNGS[0], last=STEPS)
    points = [{"x": 10.0**-e, "n": n} for e in (0, 1, 2, 3) for n in (1, 8)]
    found = search(tmp_path, len(points), stopping, points, objective)
    assert len(found) == len(points)
    best = min(range(len(found)), key=lambda n: loss(found[n][0]))
    assert found[best][1].status == "finished"
    seen: list[float] = []
    for values, result in found:
        here = loss(values)
        # ASHA lets the best third of those that reached a rung go on, and always the best so far.
        if all(here < other for other in seen):
            assert result.status == "finished", values
        elif sum(other < here for other in seen) > len(seen) * 2 / 3:
            assert result.status == "stopped", values
            assert last_step(tmp_path, result) < STEPS
            assert "stopped early at step" in str(result.reason)
        seen.append(here)
    assert {result.status for _, result in found} == {"finished", "stopped"}


def test_a_stopped_trial_that_is_slow_to_leave_does_not_fail_the_next(tmp_path: Path) -> None:
    stopping = Stopping("loss", higher=False, first=RUNGS[0], last=STEPS)
    points = [{"x": 10.0**-e, "n": 8} for e in range(4)]
    found = search(tmp_path, len(points), stopping, points, trainable=slow_to_leave)
    assert {result.status for _, result in found} == {"finished", "stopped"}


def test_an_interrupted_search_goes_on_with_the_rungs_that_it_had(tmp_path: Path) -> None:
    stopping = Stopping("loss", higher=False, first=RUNGS[0], last=STEPS)
    points = [{"x": 10.0**-e, "n": n} for e in (0, 1, 2, 3) for n in (1, 4, 8)]
    whole = search(tmp_path / "whole", len(points), stopping, points)
    first = search(tmp_path / "parts", 5, stopping, points)
    both = search(tmp_path / "parts", len(points), stopping, points)
    assert [(v, r.status) for v, r in both[:5]] == [(v, r.status) for v, r in first]
    assert [(v, r.status) for v, r in both] == [(v, r.status) for v, r in whole]
