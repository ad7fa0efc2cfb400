"""Which methods a comparison runs, at which learning rates and seeds: contestants as named changes of one recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, ValidationError

from hyperlora.comparison import Record, edge, search_scores, select_rate
from hyperlora.config import Problem, Recipe, RecipeError, Section, apply_overrides, parse, read_yaml

#: The seed at which learning rates are chosen; the reported seeds start after it.
TUNING_SEED = 0
#: Learning rates are a factor of two apart, and at most so many are added when the best lies on an edge.
FACTOR, EXTENSIONS = 2.0, 4
#: Equal for all contestants of a comparison, or decided by it.
EQUAL = ("name", "description", "seed", "model", "task", "data", "training", "ray", "cluster", "storage", "mlflow")
DECIDED = ("optimizer.lr", "optimizer.other_lr")


class ContestantConfig(Section):
    """One method in the field."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=60, description="of its trials' folders")
    label: str = Field("", description="for people; empty: the name")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted keys of the recipe and their values")
    rank: Literal["initial", "final"] = Field(
        "initial", description="adapter.rank, or from the start the rank that pruning ends at, at the same alpha/rank"
    )


class FieldConfig(Section):
    """A field file."""

    description: str = Field("", description="one line")
    baseline: str = Field(description="name of the contestant that the others are compared with")
    contestants: Annotated[tuple[ContestantConfig, ...], Strict(False)] = Field(
        min_length=1, description="in the order of the report"
    )


@dataclass(frozen=True)
class Contestant:
    """A method with everything resolved but the learning rate and the seed.

    Attributes:
        name, label: of the field file.
        changes: of the base recipe, dotted.
        recipe: the base recipe with these changes.
    """

    name: str
    label: str
    changes: dict[str, Any]
    recipe: Recipe


def read_field(path: Path) -> FieldConfig:
    """A field file.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    try:
        field = FieldConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise RecipeError([_problem(path, e) for e in error.errors()]) from None
    names = [c.name for c in field.contestants]
    problems = [
        Problem(f"{path.name}: contestants", name, "each name once")
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if field.baseline not in names:
        problems.append(Problem(f"{path.name}: baseline", field.baseline, f"allowed: {', '.join(names)}"))
    for contestant in field.contestants:
        for key, value in contestant.set.items():
            if key in DECIDED or key.split(".")[0] in EQUAL:
                where = f"{path.name}: {contestant.name}: {key}"
                problems.append(Problem(where, value, "the same for all contestants, or chosen by the comparison"))
    if problems:
        raise RecipeError(problems)
    return field


def _problem(path: Path, error: Any) -> Problem:
    location = list(error["loc"])
    section = FieldConfig if len(location) == 1 else ContestantConfig
    allowed = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "extra_forbidden":
        allowed = f"unknown key; allowed: {', '.join(section.model_fields)}"
    elif error["type"] == "missing":
        allowed = f"required: {section.model_fields[str(location[-1])].description}"
    return Problem(f"{path.name}: {'.'.join(map(str, location))}", error["input"], allowed)


def resolve(field: FieldConfig, base: Recipe, only: Sequence[str] = ()) -> list[Contestant]:
    """The contestants' recipes; with ``only``, these and the baseline.

    Raises:
        RecipeError: with every problem of every contestant, named.
    """
    names = [c.name for c in field.contestants]
    problems = [Problem("--only", n, f"allowed: {', '.join(names)}") for n in only if n not in names]
    # Heads and magnitudes learn at one rate whatever the rate under comparison.
    other = base.optimizer.lr if base.optimizer.other_lr is None else base.optimizer.other_lr
    content = apply_overrides(base.model_dump(mode="json"), [f"optimizer.other_lr={other}"])
    found = []
    for contestant in field.contestants:
        if only and contestant.name not in (*only, field.baseline):
            continue
        changes = (_final_rank(base) if contestant.rank == "final" else {}) | contestant.set
        try:
            overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
            recipe = parse(apply_overrides(content, overrides)).with_absolute_paths()
        except RecipeError as error:
            problems += [Problem(f"{contestant.name}: {p.field}", p.value, p.allowed) for p in error.problems]
            continue
        found.append(Contestant(contestant.name, contestant.label or contestant.name, changes, recipe))
    if problems:
        raise RecipeError(problems)
    return found


def _final_rank(base: Recipe) -> dict[str, Any]:
    """The adapter at the rank that pruning ends at, from the start, with alpha/rank as it was."""
    a = base.adapter
    final = a.rank / 2 if a.target_rank is None else a.target_rank
    whole = int(final) if final == int(final) else final  # a rank that is no whole number is refused by the recipe
    return {"adapter.rank": whole, "adapter.alpha": a.alpha * final / a.rank}


# ---------------------------------------------------------------- which trials


@dataclass(frozen=True)
class Entry:
    """A trial of the comparison."""

    contestant: str
    lr: float
    seed: int

    @property
    def stage(self) -> Literal["tune", "report"]:
        return "tune" if self.seed == TUNING_SEED else "report"

    @property
    def name(self) -> str:
        return f"{self.contestant}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Search:
    """Of one contestant's learning rate.

    Attributes:
        rates: tried or to be tried, ascending.
        over: nothing more is to be tried.
        best: the chosen rate; None while the search goes on, and when every rate failed.
    """

    rates: tuple[float, ...]
    over: bool = False
    best: float | None = None


def rate(value: float) -> float:
    """A learning rate as folders name it: six digits."""
    return float(f"{value:.6g}")


def search(records: Sequence[Record], contestant: str, rates: Sequence[float]) -> Search:
    """How far a contestant's search is: all ``rates``, then one more at a time beyond the best while it is an edge."""
    tried = search_scores(records, contestant).keys() | set(rates)
    missing = tried - search_scores(records, contestant).keys()
    side = None if missing else edge(records, contestant)
    if not missing and (side is None or len(tried) - len(rates) >= EXTENSIONS):
        return Search(tuple(sorted(tried)), True, select_rate(records, contestant))
    if side is not None:
        tried |= {rate(min(tried) / FACTOR if side == "low" else max(tried) * FACTOR)}
    return Search(tuple(sorted(tried)))


def planned(
    contestants: Sequence[str], rates: Sequence[float], seeds: Sequence[int], records: Sequence[Record]
) -> tuple[list[Entry], int]:
    """The trials that are known to be wanted, in the order to run them, and at least how many more will follow.

    Contestants take turns, so that what drifts on the machine hits all alike.

    Args:
        contestants: names.
        rates: learning rates that each tries.
        seeds: reported, at the best rate.
        records: of the trials so far.
    """
    tuning: list[tuple[int, int, Entry]] = []
    reporting: list[tuple[int, int, Entry]] = []
    later = 0
    for order, name in enumerate(contestants):
        state = search(records, name, rates)
        tuning += [(turn, order, Entry(name, lr, TUNING_SEED)) for turn, lr in enumerate(state.rates)]
        later += 0 if state.over else len(seeds)
        if state.best is not None:
            reporting += [(turn, order, Entry(name, state.best, seed)) for turn, seed in enumerate(seeds)]
    by_turn = sorted(tuning, key=lambda t: t[:2]) + sorted(reporting, key=lambda t: t[:2])
    return [entry for *_, entry in by_turn], later
