"""Proposals: as good as plain Optuna's, never infeasible, never twice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest

from hyperlora import sampling
from hyperlora.sampling import Objective, Proposals, Searched

PARAMETERS = [
    {"key": "x", "choices": (), "low": 1e-4, "high": 1.0, "log": True, "integer": False},
    {"key": "n", "choices": (), "low": 1, "high": 64, "log": True, "integer": True},
    {"key": "kind", "choices": ("a", "b", "c")},
]
PARAMETERS[2] |= {"low": 0, "high": 0, "log": False, "integer": False}


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "x": trial.suggest_float("x", 1e-4, 1.0, log=True),
        "n": trial.suggest_int("n", 1, 64, log=True),
        "kind": trial.suggest_categorical("kind", ("a", "b", "c")),
    }


def loss(values: dict[str, Any]) -> float:
    """Lowest, 0, at x = 0.01, n = 8, kind b."""
    return (math.log10(values["x"]) + 2) ** 2 + 0.3 * (math.log2(values["n"]) - 3) ** 2 + 1.0 * (values["kind"] != "b")


def searched(infeasible: Any = lambda values: None, **more: Any) -> Searched:
    return Searched(PARAMETERS, suggest, infeasible, **more)


def proposals(sampler: Any = "tpe", seed: int = 0, **more: Any) -> Proposals:
    return Proposals(sampler, searched(**more), [Objective("loss", False)], seed)


def run(source: Proposals, count: int) -> list[float]:
    found = []
    for _ in range(count):
        values = source.ask()
        assert values is not None
        found.append(loss(values))
        source.tell(values, "finished", [found[-1]])
    return found


def test_a_planted_optimum_is_found_as_fast_as_by_plain_optuna() -> None:
    """With the same seed even by the same points."""
    for seed in range(3):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        study.optimize(lambda trial: loss(suggest(trial)), n_trials=60)
        plain = [t.value for t in study.trials]
        ours = run(proposals(seed=seed), 60)
        assert ours == pytest.approx(plain)
        assert min(ours) < 0.1


def test_tpe_is_better_than_chance() -> None:
    tpe = [min(run(proposals(seed=s), 50)) for s in range(5)]
    random = [min(run(proposals("random", seed=s), 50)) for s in range(5)]
    assert np.median(tpe) < np.median(random) / 2


def test_infeasible_points_are_not_proposed() -> None:
    """Also where the optimum lies outside: the best feasible point is at the border, x = 0.03."""

    def infeasible(values: dict[str, Any]) -> str | None:
        return "x below 0.03" if values["x"] < 0.03 else None

    source = proposals(infeasible=infeasible)
    points = []
    for _ in range(60):
        values = source.ask()
        assert values is not None
        points.append(values)
        source.tell(values, "finished", [loss(values)])
    assert all(p["x"] >= 0.03 for p in points)
    best = min(points, key=loss)
    assert best["x"] < 0.06
    assert best["kind"] == "b"


def test_no_point_twice_and_an_end() -> None:
    few = [{"key": "kind", "choices": ("a", "b", "c"), "low": 0, "high": 0, "log": False, "integer": False}]

    def kinds(trial: optuna.Trial) -> dict[str, Any]:
        return {"kind": trial.suggest_categorical("kind", ("a", "b", "c"))}

    source = Proposals("tpe", Searched(few, kinds, lambda v: None), [Objective("loss", False)], 0)
    seen = []
    while (values := source.ask()) is not None:
        seen.append(values["kind"])
        source.tell(values, "finished", [1.0])
    assert sorted(seen) == ["a", "b", "c"]
    again = Proposals("tpe", Searched(few, kinds, lambda v: None), [Objective("loss", False)], 0)
    for kind in seen:
        again.tell({"kind": kind}, "finished", [1.0])
    assert again.ask() is None


def test_the_grid_is_walked_once() -> None:
    grid = [{"x": x, "n": 8, "kind": k} for x in (0.001, 0.01, 0.1) for k in ("a", "b")]
    source = proposals("grid", grid=grid)
    source.tell(grid[4], "finished", [1.0])
    seen = []
    while (values := source.ask()) is not None:
        seen.append(values)
        source.tell(values, "finished", [loss(values)])
    assert sorted(map(str, [*seen, grid[4]])) == sorted(map(str, grid))


def test_the_start_comes_first() -> None:
    start = {"x": 0.5, "n": 1, "kind": "c"}
    source = proposals(start=start)
    assert source.ask() == start
    assert source.ask() != start


def test_what_an_earlier_run_found_is_known() -> None:
    """Sixty points of an earlier run, then ten of this: all near the optimum; without the earlier ones they are not."""
    first = proposals(seed=1)
    points = []
    for _ in range(60):
        values = first.ask()
        assert values is not None
        points.append(values)
        first.tell(values, "finished", [loss(values)])
    later = proposals(seed=2)
    for values in points:
        later.tell(values, "finished", [loss(values)])
    assert np.median(run(later, 10)) < 1.0
    assert np.median(run(proposals(seed=2), 10)) > 2.0
    again = proposals(seed=1)
    assert again.ask() == points[0], "the same seed asks the same"
    known = proposals(seed=1)
    for values in points:
        known.tell(values, "finished", [loss(values)])
    assert known.ask() not in points


def test_a_point_of_an_earlier_run_that_the_space_does_not_hold() -> None:
    source = proposals()
    good = {"x": 1.0, "n": 64, "kind": "a"}
    source.check(good)
    source.check({"kind": "b"})  # one that has not all parameters is one of the space
    bad: list[tuple[dict[str, Any], str]] = [
        ({"rank": 4}, "rank=4"),
        ({"x": 2.0}, "x=2.0"),
        ({"n": "many"}, "n=many"),
        ({"n": 0, "kind": "d"}, "n=0, kind=d"),
    ]
    for changes, named in bad:
        with pytest.raises(ValueError, match=f"it has no {named}$"):
            source.check(good | changes)
    assert source.ask() == proposals().ask(), "asking leaves no trace"


def seldom(values: dict[str, Any]) -> str | None:
    """Three of ten points can be run."""
    return "x above 0.0158" if values["x"] > 10**-2.8 else None


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_goes_on_where_an_earlier_run_needed_more_draws_than_one_point_has(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every further run; TPE by chance, as where it insists on what is refused."""
    monkeypatch.setattr(sampling, "INSISTS", 0)
    known: list[dict[str, Any]] = []
    for count in (450, 3, 3):
        source = proposals(sampler, infeasible=seldom)
        for values in known:
            source.tell(values, "finished", [loss(values)])
        for _ in range(count):
            new = source.ask()
            assert new is not None
            assert new not in known
            known.append(new)


def test_a_point_that_goes_on_is_one_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "DRAWS", 1)
    first = proposals("random").ask()
    source = proposals("random")
    assert first is not None
    source.resume(first)
    assert source.ask() not in (first, None)


def test_random_draws_do_not_run_out_where_few_points_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of ten, and now and then none of the first twenty draws is one."""
    monkeypatch.setattr(sampling, "INSISTS", 20)
    monkeypatch.setattr(sampling, "DRAWS", 100)
    source = proposals("random", infeasible=seldom)
    points = [source.ask() for _ in range(400)]
    assert None not in points
    assert len({str(p) for p in points}) == 400


def test_points_that_fail_or_are_stopped_are_kept_away_from() -> None:
    source = proposals(seed=3)
    kinds = []
    for _ in range(60):
        values = source.ask()
        assert values is not None
        kinds.append(values["kind"])
        if values["kind"] == "a":
            source.tell(values, "failed", None)
        elif values["kind"] == "c":
            source.tell(values, "stopped", None, [(10, 5.0)])
        else:
            source.tell(values, "finished", [loss(values)])
    assert kinds[30:].count("b") > 17


def test_several_objectives() -> None:
    source = Proposals("tpe", searched(), [Objective("a", False), Objective("b", True)], 0)
    for n in range(30):
        values = source.ask()
        assert values is not None
        source.tell(values, *(("failed", None) if n == 3 else ("finished", [loss(values), values["n"]])))  # type: ignore
    known = {"x": 0.02, "n": 4, "kind": "a"}
    source.tell(known, "failed", None)
    source.tell({**known, "n": 5}, "finished", [0.1, 5.0])
    assert source.ask() is not None
