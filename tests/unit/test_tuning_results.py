"""What a search by a sampler says, on made-up trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import trials

from hyperlora import runs, tuning
from hyperlora.config import RecipeError
from hyperlora.sampling import Objective, Proposals, Searched
from hyperlora.search import Result, Trial, write
from hyperlora.training import RunInfo
from hyperlora.tuning import STOPPED, VALUES, Search
from hyperlora.tuning_report import analyse, tuning_page
from pipelines.common import load_recipe

RATE = {"key": "optimizer.lr", "label": "learning rate", "choices": (), "low": 1e-4, "high": 1.0, "log": True}
RATE |= {"integer": False, "default": 1e-3}


def plan(*objectives: str, count: int) -> dict[str, Any]:
    return {
        "name": "made-up",
        "command": "hyperlora tune made-up",
        "space": "mine",
        "sampler": "tpe",
        "metric": "accuracy",
        "objectives": [{"name": name, "higher": name == "accuracy"} for name in ("accuracy", *objectives)],
        "steps": trials.STEPS,
        "trials": count,
        "parameters": [RATE],
        "recipe": {"name": "made-up"},
        "provenance": {"git": {}},
    }


def trial(n: int, status: str = "finished", *, step: int = 0, metric: float = 0.8, seconds: float = 9.0) -> dict:
    """One that ended at a step, where its whole length does not count."""
    made = trials.record("mine", trials.decay() if status == "finished" else None, metric=metric)
    if made["outcome"] is not None:
        more = {"adapter_parameters_final": 1000, "training_seconds": seconds, "steps": trials.STEPS, "adapter": "a"}
        made["outcome"] |= more
    reports = [{"step": step, "accuracy": metric}] if step else []
    return made | {"trial": f"t{n:04d}", "status": status, "values": {"optimizer.lr": 1e-3 * n}, "reports": reports}


def test_what_failed_trials_did_not_run_is_not_saved_by_early_stopping() -> None:
    records = [trial(1), trial(2, "stopped", step=50), trial(3, "failed"), trial(4, "failed", step=25)]
    result = analyse(records, plan(count=4))
    assert (result["steps_spent"], result["steps_without_stopping"]) == (250, 400)
    assert "1 were stopped early, which saved 38 % of the steps. 2 failed." in result["verdict"]


@pytest.mark.parametrize("count", [0, 2])
def test_without_a_finished_trial_nothing_is_said(count: int) -> None:
    result = analyse([trial(n, "failed") for n in range(1, 1 + count)], plan(count=2))
    assert (result["best"], result["steps_spent"], result["complete"]) == (None, 0, count == 2)
    assert "No trial has finished" in result["verdict"]
    assert "No trial has finished" in tuning_page(result)


def test_the_front_of_metric_and_seconds() -> None:
    """In both directions: more of the metric, less of the time."""
    points = [(0.9, 9.0), (0.8, 5.0), (0.7, 6.0), (0.8, 7.0), (0.9, 9.5), (0.6, 1.0)]
    records = [trial(n, metric=metric, seconds=seconds) for n, (metric, seconds) in enumerate(points, 1)]
    result = analyse([*records, trial(7, "failed")], plan("training_seconds", count=7))
    assert [t["trial"] for t in result["measured"] if t["front"]] == ["t0001", "t0002", "t0006"]
    assert result["best"]["trial"] == "t0001", "of two with the same metric the faster one"
    assert "3 trials lie on the front of accuracy, training time." in result["verdict"]
    assert "Trials that no other beats in all of accuracy, training time." in tuning_page(result)


KIND = {"key": "kind", "choices": ("a", "b"), "low": 0, "high": 0, "log": False, "integer": False}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"adapter.target_rank": 4}, "adapter.target_rank=4"),  # a parameter that is gone
        ({"kind": "c"}, "kind=c"),  # a choice
        ({"optimizer.lr": 2.0}, "optimizer.lr=2.0"),  # the end of a range
    ],
)
@pytest.mark.parametrize("over", [True, False])
def test_a_search_does_not_go_on_in_a_folder_with_points_that_its_space_has_not(
    changed: dict[str, Any], named: str, over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the trial has ended or was interrupted; nothing is told of, removed or started before."""

    def suggest(trial: optuna.Trial) -> dict[str, Any]:
        return {
            "optimizer.lr": trial.suggest_float("optimizer.lr", 1e-4, 1.0, log=True),
            "kind": trial.suggest_categorical("kind", KIND["choices"]),
        }

    def started(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a search starts")

    recipe = load_recipe("quickstart", ["ray.num_workers=1"])
    for n, values in enumerate(({"optimizer.lr": 0.1, "kind": "a"}, {"optimizer.lr": 0.2, "kind": "b"} | changed)):
        uri = str(tmp_path / f"trials/t{n:04d}")
        runs.record(RunInfo(uri), recipe)
        (Path(uri) / "checkpoints").mkdir()
        write(uri, VALUES, values)
        if over or n == 0:
            write(uri, STOPPED, {"step": 3, "reason": "others were better"})
    told: list[Result] = []
    objectives = [Objective("loss", higher=False)]
    proposals = Proposals("tpe", Searched([RATE, KIND], suggest, lambda values: None), objectives, seed=0)
    search = Search(str(tmp_path), 3, lambda name, v: Trial(name, f"{tmp_path}/trials/{name}", recipe), objectives)
    monkeypatch.setattr(tuning, "cluster", started)
    with pytest.raises(RecipeError) as error:
        tuning.run(search, recipe, proposals, started=started, over=told.append, trainable=started)
    (problem,) = error.value.problems
    assert problem.field == "--space"
    assert problem.allowed.endswith(f"or another --out (it has no {named})")
    assert told == []
    assert len(list(tmp_path.glob("trials/*/checkpoints"))) == 2
