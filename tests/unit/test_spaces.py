"""Spaces and the designs over them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml

from hyperlora.config import Recipe, RecipeError, parse
from hyperlora.preflight import Estimate, Sizes
from hyperlora.pruning import BudgetPlan
from tune_spaces.design import points_of
from tune_spaces.reading import SHIPPED, read_space
from tune_spaces.space import BoundSpace, Constraint, Parameter, Space

STEPS, MODULES, RANK = 200, 12, 8


def recipe(**sections: Any) -> Recipe:
    content = {
        "name": "r",
        "model": {"path": "none"},
        "task": {"kind": "generation"},
        "data": {"source": "word-problems"},
        "training": {"steps": STEPS},
        "adapter": {"rank": RANK, "target_rank": 4},
        "optimizer": {"lr": 0.01},
    }
    return parse(content | sections)


def estimate(modules: int = MODULES) -> Estimate:
    sizes = Sizes(0, 0, 0, 0)
    counts = dict.fromkeys(("train_rows", "held_out_rows", "base_parameters", "layers"), 100)
    memory = dict.fromkeys(("base_bytes", "adapter_bytes", "activation_bytes"), 0)
    return Estimate(
        rows_sha256={},
        **counts,
        **memory,
        steps=STEPS,
        modules=modules,
        rank_initial=RANK * modules,
        rank_target=4 * modules,
        pruning={},
        sizes=sizes,
        adalora=sizes,
        rows="",
    )


def bound(name: str, **sections: Any) -> BoundSpace:
    return SHIPPED[name].bind(recipe(**sections), estimate())


def reaches_target(space: BoundSpace, point: dict[str, Any]) -> bool:
    """Written without the space's own check: k times the events in the window, against what has to go."""
    p = space.recipe_at(point).pruning
    if p.schedule == "cubic":
        return True
    events = len([s for s in range(p.start, STEPS - p.final + 1) if (s - p.start) % p.interval == 0])
    return p.count * events >= MODULES * (RANK - 4)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_fit_a_recipe(name: str) -> None:
    space = bound(name)
    start = space.start()
    assert start is not None
    assert space.infeasible(start) is None
    assert space.feasible(space.grid())


def test_ranges_are_in_units_of_the_run() -> None:
    domains = {d.key: d for d in bound("pruning").domains}
    assert (domains["pruning.interval"].low, domains["pruning.interval"].high) == (2, 20)
    assert domains["pruning.interval"].levels == (2, 6, 20)
    assert domains["pruning.count"].levels == (2, 10, 48)  # 48 values have to go
    assert domains["pruning.interval"].default == 2, "the recipe's null, a hundredth of the run"
    assert {d.key: d for d in bound("joint").domains}["optimizer.lr"].high == pytest.approx(0.08)


def test_paths_among_choices_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial has a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    start = Parameter(key="hypernetwork.init_from", choices=("runs/a", "runs/b"))
    space = Space(name="warm", parameters=(start,)).bind(recipe(), estimate())
    source = space.recipe_at({"hypernetwork.init_from": "runs/b"}).hypernetwork.init_from
    assert source == str(tmp_path / "runs/b")


def test_the_recipes_value_is_the_choice_that_it_equals() -> None:
    """A sampler, and the files of trials, tell 0.0 from 0: the point would run twice."""
    decay = Parameter(key="optimizer.weight_decay", choices=(1, 0))
    space = Space(name="decay", parameters=(decay,)).bind(recipe(), estimate())
    assert recipe().optimizer.weight_decay == 0.0
    assert json.dumps(space.default()) in [json.dumps(point) for point in space.grid()]


@pytest.mark.parametrize("design", ["grid", "fraction", "sobol"])
def test_designs_hold_only_points_that_reach_the_target(design: Any) -> None:
    space = bound("pruning")
    points = points_of(space, design, 24)
    assert len({json.dumps(p, sort_keys=True) for p in points}) == len(points)
    assert all(reaches_target(space, p) for p in points)
    assert all(("pruning.count" in p) == (p["pruning.schedule"] == "interval") for p in points)
    for p in points:  # and the run itself would accept them
        pruning = space.recipe_at(p).resolved_pruning(STEPS)
        assert BudgetPlan(pruning, RANK * MODULES, 4 * MODULES, STEPS).budget(STEPS) == 4 * MODULES
    if design == "grid":
        everything = space.grid()
        left_out = [p for p in everything if p not in points]
        assert left_out, "the grid has infeasible corners"
        assert not any(reaches_target(space, p) for p in left_out)
    else:
        assert len(points) == 24


@pytest.mark.parametrize("design", ["grid", "sobol"])
def test_a_count_of_the_recipe_is_not_for_points_that_have_none(design: Any) -> None:
    """The cubic budget refuses any."""
    given, free = bound("pruning", pruning={"count": 8}), bound("pruning")
    cubic = [p for p in points_of(given, design, 24) if p["pruning.schedule"] == "cubic"]
    assert cubic
    assert cubic == [p for p in points_of(free, design, 24) if p["pruning.schedule"] == "cubic"]
    assert all(given.recipe_at(p).pruning.count is None for p in cubic)
    assert given.recipe_at({"pruning.schedule": "interval"}).pruning.count == 8, "where it exists the recipe's holds"


def many(*constraints: Constraint) -> Space:
    """Some 200,000 combinations of levels; the default is feasible."""
    schedule = Parameter(key="pruning.schedule", choices=("interval", "cubic"))
    keys = ("eps", "lr", "trunk_lr", "output_lr", "other_lr", "weight_decay")
    ranges = (Parameter(key=f"optimizer.{key}", low=1e-9, high=1, levels=7) for key in keys)
    return Space(name="many", parameters=(schedule, *ranges), constraints=constraints)


def test_levels_cost_nothing_where_a_search_starts_from_the_default() -> None:
    tracemalloc.start()
    space = many(Constraint("true", lambda values, facts: True)).bind(recipe(), estimate())
    assert space.start() == space.default()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21, "all combinations take a hundred times as much"


def test_a_constraint_is_asked_at_points_from_all_of_a_large_grid() -> None:
    wrong = Constraint("γ", lambda values, facts: values["pruning.schedule"] == "interval" or values["gamma"] > 0)
    with pytest.raises(RecipeError, match=r"γ: got \{'pruning.schedule': 'cubic'.*KeyError: 'gamma'"):
        many(wrong).bind(recipe(), estimate())


def test_where_the_default_is_infeasible_the_first_feasible_level_starts() -> None:
    longest = Constraint("ΔT above 30", lambda values, facts: values["pruning.interval"] > 30)
    space = SHIPPED["smoke"].model_copy(update={"constraints": (longest,)}).bind(recipe(), estimate())
    assert space.start() == {"pruning.interval": 40, "optimizer.lr": 0.0025}


def test_the_fraction_tells_more_than_chance() -> None:
    """Information on main effects under the chosen subset, against random subsets of the same size."""
    space = bound("pruning")
    grid = space.feasible(space.grid())

    def columns(points: list[dict[str, Any]]) -> np.ndarray:
        rows = [
            [1.0, *(float(p.get(d.key, d.levels[0]) == level) for d in space.domains for level in d.levels[1:])]
            for p in points
        ]
        return np.array(rows)

    def information(points: list[dict[str, Any]]) -> float:
        x = columns(points)
        return float(np.linalg.slogdet(x.T @ x)[1])

    chosen = information(points_of(space, "fraction", 20))
    rng = np.random.default_rng(0)
    random = [information([grid[i] for i in rng.choice(len(grid), 20, replace=False)]) for _ in range(100)]
    assert chosen > np.quantile(random, 0.95)


def test_sobol_covers_every_range() -> None:
    points = points_of(bound("joint"), "sobol", 64)
    rates = np.log([p["optimizer.lr"] for p in points])
    counts, _ = np.histogram(rates, bins=8, range=(np.log(0.00125), np.log(0.08)))
    assert counts.min() >= 4
    assert {p["hypernetwork.hidden_size"] for p in points} == {24, 48, 96, 192, 312}


def test_suggestions_of_optuna_are_in_the_recipes_units() -> None:
    space = bound("pruning")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [space.suggest(study.ask()) for _ in range(50)]
    assert any(space.infeasible(p) for p in points)
    assert all(2 <= p["pruning.interval"] <= 20 for p in points)
    assert all(("pruning.count" in p) == (p["pruning.schedule"] == "interval") for p in points)


def test_heads_divide_the_hidden_size_at_every_point() -> None:
    points = points_of(bound("hypernetwork"), "grid", 0)
    heads = {(p["hypernetwork.hidden_size"], p["hypernetwork.heads"]) for p in points if "hypernetwork.heads" in p}
    assert (312, 12) in heads
    assert all(size % n == 0 for size, n in heads)


def test_a_space_of_ones_own(tmp_path: Path) -> None:
    content = {
        "name": "mine",
        "parameters": [{"key": "optimizer.lr", "low": 0.5, "high": 2, "unit": "lr", "log": True, "levels": 3}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    space = read_space(str(tmp_path / "mine.yaml")).bind(recipe(), estimate())
    assert [p["optimizer.lr"] for p in space.grid()] == [0.005, 0.01, 0.02]

    (tmp_path / "mine.py").write_text(
        "from tune_spaces.space import Constraint, Parameter, Space\n"
        "SPACE = Space(name='mine', parameters=(\n"
        "    Parameter(key='adapter.target_rank', low=2, high=8, integer=True, levels=(2, 4, 8)),\n"
        "    Parameter(key='gamma', choices=(0.0, 0.1))),\n"
        "    constraints=(Constraint('γ only at rank 4',\n"
        "        lambda v, f: v['gamma'] == 0 or v['adapter.target_rank'] == 4),))\n"
    )
    space = read_space(str(tmp_path / "mine.py")).bind(recipe(), estimate())
    points = [(p["adapter.target_rank"], p["gamma"]) for p in space.feasible(space.grid())]
    assert points == [(2, 0.0), (4, 0.0), (4, 0.1), (8, 0.0)]
    assert space.infeasible({"adapter.target_rank": 2, "gamma": 0.1}) == "γ only at rank 4"


BAD = {
    "misspelt key": ({"key": "optimizer.rl", "low": 1, "high": 2}, "optimizer.rl: no key of a recipe"),
    "fixed key": ({"key": "training.steps", "low": 1, "high": 2}, "training.steps: the same for all trials"),
    "empty range": ({"key": "gamma", "low": 2, "high": 1}, "low must be below high"),
    "log of zero": ({"key": "gamma", "low": 0, "high": 1, "log": True}, "a logarithmic range starts above 0"),
    "no range": ({"key": "gamma"}, "give choices, or low and high"),
    "unknown unit": ({"key": "gamma", "low": 0, "high": 1, "unit": "meter"}, "steps"),
    "unknown field": ({"key": "gamma", "low": 0, "hihg": 1}, "unknown key; allowed: key, label, low"),
    "no key": ({"low": 0, "high": 1}, "required: dotted key of the recipe"),
    "level outside": (
        {"key": "gamma", "low": 0, "high": 1, "levels": [0, 2]},
        "levels: two or more values from 0 to 1",
    ),
    "unit of choices": ({"key": "optimizer.lr", "choices": [0.5, 1, 2], "unit": "lr"}, "unit: for low and high alone"),
    "range of choices": (
        {"key": "gamma", "choices": [0.1, 1], "levels": 2, "integer": False, "log": True},
        "log, integer, levels: for low and high alone; choices are the recipe's own values",
    ),
    "strange when": (
        {"key": "gamma", "low": 0, "high": 1, "when": {"method": ["lora"]}},
        "when names choices of an earlier parameter",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_spaces_get_one_clear_error(case: str, tmp_path: Path) -> None:
    parameter, expected = BAD[case]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"name": "bad", "parameters": [parameter]}))
    with pytest.raises(RecipeError) as error:
        read_space(str(tmp_path / "bad.yaml"))
    assert expected in str(error.value)
    assert "bad.yaml: " in str(error.value)


def test_all_problems_of_a_space_at_once(tmp_path: Path) -> None:
    parameters = [{"key": "gamma"}, {"key": "optimizer.lr", "low": 3, "high": 1}]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"name": "Bad name", "parameters": parameters}))
    with pytest.raises(RecipeError) as error:
        read_space(str(tmp_path / "bad.yaml"))
    assert len(error.value.problems) == 3


def test_files_that_are_no_spaces(tmp_path: Path) -> None:
    (tmp_path / "crash.py").write_text("1 / 0")
    (tmp_path / "empty.py").write_text("")
    for name, expected in (
        ("nothing", "a YAML or Python file, or one of: pruning, hypernetwork, joint, smoke"),
        (str(tmp_path / "crash.py"), "ZeroDivisionError: division by zero"),
        (str(tmp_path / "empty.py"), "a file that defines SPACE"),
    ):
        with pytest.raises(RecipeError, match=expected):
            read_space(name)


@pytest.mark.parametrize(
    ("key", "shown"), [("hypernetwork.kind", "attention"), ("pruning", "a section"), ("optimizer", "a section")]
)
def test_a_range_needs_a_number(key: str, shown: str) -> None:
    space = Space(name="wrong", parameters=(Parameter(key=key, low=1, high=2),))
    with pytest.raises(RecipeError) as error:
        space.bind(recipe(), estimate())
    (problem,) = error.value.problems
    assert (problem.field, problem.value) == (f"--space wrong: {key}", shown)
    assert "a key that holds a number" in problem.allowed


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(RecipeError, match="a YAML or Python file"):
        read_space("x" * 300 + ".yaml")


KEPT = Space(name="kept", parameters=(Parameter(key="adapter.target_rank", low=2, high=8, integer=True),))
RATES = Space(
    name="rates",
    parameters=tuple(Parameter(key=f"optimizer.{key}", low=1e-4, high=1) for key in ("lr", "trunk_lr", "output_lr")),
)


def test_spaces_that_do_not_fit_the_recipe() -> None:
    assert KEPT.bind(recipe(method="adalora"), estimate()).start()
    assert RATES.bind(recipe(method="hyperlora"), estimate()).start()
    with pytest.raises(RecipeError, match=r"pruning\.interval: got 'lora'; a method that has pruning"):
        bound("pruning", method="lora")
    with pytest.raises(RecipeError, match=r"hypernetwork\.kind: got 'adalora'; a method that has hypernetwork"):
        bound("hypernetwork", method="adalora")
    with pytest.raises(RecipeError, match=r"adapter\.target_rank: got 'lora'; a method that has adapter\.target_rank"):
        KEPT.bind(recipe(method="lora"), estimate())
    for method in ("lora", "adalora"):
        with pytest.raises(RecipeError) as error:
            RATES.bind(recipe(method=method), estimate())
        assert [p.field for p in error.value.problems] == [
            "--space rates: optimizer.trunk_lr",
            "--space rates: optimizer.output_lr",
        ]
    never = Space(
        name="never",
        parameters=(Parameter(key="gamma", choices=(0.0, 0.1)),),
        constraints=(Constraint("γ above 1", lambda values, facts: values["gamma"] > 1),),
    )
    with pytest.raises(RecipeError, match="no feasible point found: γ above 1"):
        never.bind(recipe(), estimate())


def test_a_constraint_that_fails_is_told_by_its_text() -> None:
    """Also where it can be asked at the point that a search starts from."""
    parameters = (
        Parameter(key="pruning.schedule", choices=("interval", "cubic")),
        Parameter(key="pruning.count", low=0.5, high=1, unit="excess", when={"pruning.schedule": ("interval",)}),
    )
    wrong = Constraint("k is even", lambda values, facts: values["pruning.count"] % 2 == 0)
    expected = r"k is even: got \{'pruning.schedule': 'cubic'\}; .*\(KeyError: 'pruning.count'\)"
    with pytest.raises(RecipeError, match=expected):
        Space(name="mine", parameters=parameters, constraints=(wrong,)).bind(recipe(), estimate())
    right = Constraint("k is even", lambda values, facts: values.get("pruning.count", 0) % 2 == 0)
    space = Space(name="mine", parameters=parameters, constraints=(right,)).bind(recipe(), estimate())
    assert space.infeasible({"pruning.schedule": "interval", "pruning.count": 25}) == "k is even"
    assert space.infeasible({"pruning.schedule": "cubic"}) is None
