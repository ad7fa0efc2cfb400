"""Search spaces: what varies in a recipe, how far, what holds between the values, and where to start.

A :class:`Space` is written once for all recipes: ranges may be in units of the run (its steps, the singular values that
have to go, the recipe's own learning rate). :meth:`Space.bind` fits it to one recipe and gives whole numbers.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, Field, Strict, model_validator

from hyperlora.config import METHODS, Problem, Recipe, RecipeError, Section, apply_overrides, parse, schedule_problems
from hyperlora.field import EQUAL
from hyperlora.preflight import Estimate

Values = dict[str, Any]
Unit = Literal["steps", "excess", "rank", "lr", "trunk_lr"]
#: Counted in whole numbers, whatever the range says.
WHOLE = ("steps", "excess")
#: Points of the grid that are looked at before a search, and as many drawn from it.
ASKED = 4096


# YAML has lists.
Choices = Annotated[tuple[str | bool | int | float, ...], Strict(False)]


class Parameter(Section):
    """One key of the recipe that varies, over a range or over choices."""

    key: str = Field(description="dotted key of the recipe")
    label: str = Field("", description="for people; empty: the key")
    low: float | None = Field(None, allow_inf_nan=False, description="lowest value, in units of `unit`")
    high: float | None = Field(None, allow_inf_nan=False, description="highest value, in units of `unit`")
    choices: Choices = Field((), description="instead of low and high")
    log: bool = Field(False, description="evenly spread on a logarithmic scale")
    integer: bool = Field(False, description="whole numbers only")
    unit: Unit | None = Field(
        None,
        description="of low, high, levels and default: the run's steps, the singular values that have to go, "
        "adapter.rank, optimizer.lr, or the trunks' rate; null: 1",
    )
    levels: int | Annotated[tuple[float, ...], Strict(False)] = Field(
        3, description="values of a designed experiment, or how many of them"
    )
    default: str | bool | int | float | None = Field(
        None, description="where a search starts; null: the recipe's value"
    )
    when: dict[str, Choices] = Field(
        default_factory=dict,
        description="the parameter exists only where an earlier one has one of these values; elsewhere its key is "
        "null, if that is its default, and otherwise what the recipe says",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Parameter:
        if self.choices:
            if self.low is not None or self.high is not None:
                raise ValueError("give choices, or low and high")
            if len(set(self.choices)) < len(self.choices):
                raise ValueError("choices: each value once")
            if self.default is not None and self.default not in self.choices:
                raise ValueError(f"default: one of {', '.join(map(str, self.choices))}")
            if ignored := [name for name in ("unit", "log", "integer", "levels") if name in self.model_fields_set]:
                raise ValueError(f"{', '.join(ignored)}: for low and high alone; choices are the recipe's own values")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give choices, or low and high")
        if self.low >= self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range starts above 0")
        if isinstance(self.levels, int):
            if self.levels < 2:
                raise ValueError("levels: 2 or more")
        elif len(self.levels) < 2 or not all(self.low <= level <= self.high for level in self.levels):
            raise ValueError(f"levels: two or more values from {self.low:g} to {self.high:g}")
        if self.default is not None and not (
            isinstance(self.default, int | float) and self.low <= self.default <= self.high
        ):
            raise ValueError(f"default: from {self.low:g} to {self.high:g}")
        return self


@dataclass(frozen=True)
class Constraint:
    """What must hold between the values of a point.

    Attributes:
        text: for people.
        holds: from the point and the facts of the run.
    """

    text: str
    holds: Callable[[Mapping[str, Any], Facts], bool]


class Space(Section):
    """Parameters, and what holds between them beside the recipe's own rules.

    The recipe's rules always hold: among them that the pruning schedule's k times its events reach the target budget,
    and that attention heads divide the hidden size.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="of the space")
    description: str = Field("", description="one line")
    parameters: Annotated[tuple[Parameter, ...], Strict(False)] = Field(min_length=1, description="what varies")
    constraints: Annotated[tuple[Any, ...], Strict(False)] = Field(
        (), description="Constraint objects; in a Python file"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Space:
        seen: dict[str, Parameter] = {}
        for parameter in self.parameters:
            if parameter.key in seen:
                raise ValueError(f"{parameter.key}: each key once")
            if not _is_key(parameter.key):
                raise ValueError(f"{parameter.key}: no key of a recipe")
            if parameter.key.split(".")[0] in EQUAL:
                raise ValueError(
                    f"{parameter.key}: the same for all trials; allowed are keys outside {', '.join(EQUAL)}"
                )
            for key, allowed in parameter.when.items():
                if key not in seen or not set(allowed) <= set(seen[key].choices):
                    raise ValueError(
                        f"{parameter.key}: when names choices of an earlier parameter; {key} has not these"
                    )
            seen[parameter.key] = parameter
        if not all(isinstance(c, Constraint) for c in self.constraints):
            raise ValueError("constraints: Constraint objects, in a Python file")
        return self

    def bind(self, recipe: Recipe, estimate: Estimate) -> BoundSpace:
        """The space for one recipe, whose sizes ``hyperlora.preflight.inspect`` tells.

        Raises:
            RecipeError: a parameter has no effect on the recipe's method, its range is empty in whole numbers, or no
                point of the space is feasible.
        """
        method = METHODS[recipe.method]
        needs = dict.fromkeys(("pruning", "gamma", "adapter.target_rank"), method.singular_values)
        needs |= dict.fromkeys(("hypernetwork", "optimizer.trunk_lr", "optimizer.output_lr"), method.hypernetwork)
        problems = []
        for parameter in self.parameters:
            needed = parameter.key if parameter.key in needs else parameter.key.split(".")[0]
            if not needs.get(needed, True):
                field = f"--space {self.name}: {parameter.key}"
                problems.append(Problem(field, recipe.method, f"a method that has {needed}; this one has not"))
            now = _at(recipe, parameter.key)
            number = now is None or (isinstance(now, int | float) and not isinstance(now, bool))
            if isinstance(now, BaseModel) or not (number or parameter.choices):
                shown = "a section" if isinstance(now, BaseModel) else now
                allowed = "a key that holds a number; for a key that holds something else, choices"
                problems.append(Problem(f"--space {self.name}: {parameter.key}", shown, allowed))
        if problems:
            raise RecipeError(problems)
        excess = estimate.rank_initial - estimate.rank_target
        facts = Facts(estimate.steps, estimate.modules, estimate.rank_initial, excess)
        bound = BoundSpace(recipe, facts, tuple(_domain(p, recipe, facts) for p in self.parameters), self.constraints)
        # A constraint that cannot be asked at some points is told of before a search comes to them.
        for point in bound.some() if self.constraints else ():
            bound.violated(point)
        if bound.start() is None:
            reason = bound.infeasible(bound.default())
            allowed = f"no feasible point found: {reason}"
            raise RecipeError([Problem(f"--space {self.name}", bound.default(), allowed)])
        return bound


@dataclass(frozen=True)
class Facts:
    """Sizes of the run that a space is bound to.

    Attributes:
        steps: T, optimizer steps.
        modules: adapted matrices.
        initial: singular values at the start, over all modules.
        excess: singular values that pruning has to remove, with the recipe's own target.
    """

    steps: int
    modules: int
    initial: int
    excess: int


class Suggests(Protocol):
    """The part of an Optuna trial that a domain draws from."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Domain:
    """A parameter in the recipe's own units.

    Attributes:
        key, label: as the parameter's.
        low, high, log, integer: of a range.
        choices: instead of a range.
        levels: of a designed experiment.
        default: where a search starts.
        when: other keys' values for which this parameter exists.
    """

    key: str
    label: str
    low: float
    high: float
    log: bool
    integer: bool
    choices: tuple[Any, ...]
    levels: tuple[Any, ...]
    default: Any
    when: Mapping[str, tuple[Any, ...]]

    def exists(self, values: Mapping[str, Any]) -> bool:
        """Whether a point with these earlier values has the parameter."""
        return all(values.get(key) in allowed for key, allowed in self.when.items())

    def suggest(self, trial: Suggests) -> Any:
        """A value from an Optuna trial."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.integer:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def at(self, share: float) -> Any:
        """The value at a share of the range, in [0, 1)."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        if self.integer:  # every whole number has an equal part of the scale
            return min(int(self.high), max(int(self.low), round(self._scaled(share, self.low - 0.5, self.high + 0.5))))
        return float(f"{self._scaled(share, self.low, self.high):.6g}")

    def _scaled(self, share: float, low: float, high: float) -> float:
        if self.log:
            return low * (high / low) ** share
        return low + share * (high - low)


@dataclass(frozen=True)
class BoundSpace:
    """A space in the units of one recipe."""

    recipe: Recipe
    facts: Facts
    domains: tuple[Domain, ...]
    constraints: tuple[Constraint, ...] = ()

    def pick(self, value: Callable[[Domain], Any]) -> Values:
        """A point, one parameter after the other, without those that do not exist beside the earlier values."""
        values: Values = {}
        for domain in self.domains:
            if domain.exists(values):
                values[domain.key] = value(domain)
        return values

    def suggest(self, trial: Suggests) -> Values:
        """A point from an Optuna trial, which may be infeasible."""
        return self.pick(lambda domain: domain.suggest(trial))

    def default(self) -> Values:
        """The default of every parameter; it may be infeasible."""
        return self.pick(lambda domain: domain.default)

    def start(self) -> Values | None:
        """The default, or another feasible point; None when none was found."""
        points = itertools.chain([self.default()], self.some())
        return next((p for p in points if self.infeasible(p) is None), None)

    def infeasible(self, values: Mapping[str, Any]) -> str | None:
        """Why a point cannot be run; None when it can.

        Raises:
            RecipeError: as :meth:`violated`.
        """
        if (text := self.violated(values)) is not None:
            return text
        try:
            recipe = self.recipe_at(values)
        except RecipeError as error:
            return "; ".join(str(p) for p in error.problems)
        problems = schedule_problems(recipe, self.facts.steps, self.facts.modules)
        return "; ".join(p.allowed for p in problems) or None

    def violated(self, values: Mapping[str, Any]) -> str | None:
        """The text of the first constraint that does not hold at a point; None when all do.

        Raises:
            RecipeError: a constraint fails.
        """
        for constraint in self.constraints:
            try:
                holds = bool(constraint.holds(values, self.facts))
            except Exception as error:  # whatever a user's function raises
                allowed = f"a constraint that can be asked at every point ({type(error).__name__}: {error})"
                raise RecipeError([Problem(f"--space: {constraint.text}", dict(values), allowed)]) from error
            if not holds:
                return constraint.text
        return None

    def recipe_at(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a point.

        Raises:
            RecipeError: the values break a rule of recipes.
        """
        # What the recipe says of a parameter may be refused where that does not exist, as k beside cubic.
        absent = [d.key for d in self.domains if not d.exists(values) and _null_by_default(self.recipe, d.key)]
        # A trial has a working directory of its own, and choices may be paths.
        return recipe_with(self.recipe, dict.fromkeys(absent) | dict(values)).with_absolute_paths()

    def some(self) -> Iterator[Values]:
        """The first points of the grid, and as many drawn from all of it: of a small one every point."""
        yield from itertools.islice(self.grid(), ASKED)
        rng = np.random.default_rng(0)
        for _ in range(ASKED):
            yield self.pick(lambda d: d.levels[rng.integers(len(d.levels))])

    def grid(self) -> Iterator[Values]:
        """Every combination of the levels, infeasible ones too, each once; made one by one, since they may be many."""
        points: Iterator[Values] = iter([{}])
        for domain in self.domains:
            points = _crossed(points, domain)
        return points

    def feasible(self, points: Iterable[Values]) -> list[Values]:
        """The points that can be run, in their order."""
        return [p for p in points if self.infeasible(p) is None]


def recipe_with(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with dotted keys changed.

    Raises:
        RecipeError: the values break a rule of recipes.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return parse(apply_overrides(recipe.model_dump(mode="json"), overrides))


def _null_by_default(recipe: Recipe, key: str) -> bool:
    section, _, name = key.rpartition(".")
    owner = _at(recipe, section) if section else recipe
    return type(owner).model_fields[name].default is None


def _crossed(points: Iterable[Values], domain: Domain) -> Iterator[Values]:
    """Each point with every level of a parameter that exists there."""
    for point in points:
        if domain.exists(point):
            for level in domain.levels:
                yield {**point, domain.key: level}
        else:
            yield point


def _is_key(key: str) -> bool:
    section: type[BaseModel] = Recipe
    parts = key.split(".")
    for part in parts[:-1]:
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return False
        section = field.annotation
    return parts[-1] in section.model_fields


def _domain(p: Parameter, recipe: Recipe, facts: Facts) -> Domain:
    """A parameter in the units of a recipe."""
    present = _present(recipe, facts)
    default = _at(recipe, p.key) if p.default is None else p.default
    if p.choices:
        # As the choices have it: a recipe's 0.0 and a choice of 0 are one point.
        default = next((choice for choice in p.choices if choice == default), p.choices[0])
        return Domain(p.key, p.label or p.key, 0, 0, False, False, p.choices, p.choices, default, p.when)
    assert p.low is not None
    assert p.high is not None
    unit = 1.0 if p.unit is None else _units(recipe, facts)[p.unit]
    whole = p.integer or p.unit in WHOLE

    def value(number: float) -> Any:
        if whole:
            return max(1 if p.low else 0, round(number * unit))
        return float(f"{number * unit:.6g}")

    low, high = value(p.low), value(p.high)
    if low >= high:
        raise RecipeError(
            [Problem(p.key, f"{low} to {high}", f"a range: {p.low:g} to {p.high:g} times {unit:g} is too narrow")]
        )
    if p.default is None:
        known = present.get(p.key) if default is None else default
        default = (low + high) / 2 if known is None else min(high, max(low, known))
        default = round(default) if whole else default
    else:
        assert isinstance(p.default, int | float)
        default = value(p.default)
    if isinstance(p.levels, int):
        shares = np.linspace(0, 1, p.levels)
        found = [p.low * (p.high / p.low) ** s if p.log else p.low + s * (p.high - p.low) for s in shares]
    else:
        found = list(p.levels)
    levels = tuple(dict.fromkeys(value(float(x)) for x in found))
    return Domain(p.key, p.label or p.key, low, high, p.log, whole, (), levels, default, p.when)


def _units(recipe: Recipe, facts: Facts) -> dict[str, float]:
    lr = recipe.optimizer.lr
    return {
        "steps": facts.steps,
        "excess": facts.excess,
        "rank": recipe.adapter.rank,
        "lr": lr,
        "trunk_lr": 0.05 * lr if recipe.hypernetwork.update == "hybrid" else lr,
    }


def _present(recipe: Recipe, facts: Facts) -> dict[str, float]:
    """What the recipe's null values stand for."""
    pruning = recipe.resolved_pruning(facts.steps)
    events = len(range(max(pruning.start, 1), facts.steps - pruning.final + 1, pruning.interval))
    rates = _units(recipe, facts)
    return {
        "pruning.interval": pruning.interval,
        "pruning.count": math.ceil(facts.excess / max(events, 1)),
        "pruning.start": pruning.start,
        "pruning.final": pruning.final,
        "adapter.target_rank": recipe.target_rank,
        "optimizer.trunk_lr": rates["trunk_lr"],
        "optimizer.output_lr": rates["trunk_lr"],
        "optimizer.other_lr": rates["lr"],
    }


def _at(recipe: Recipe, key: str) -> Any:
    node: Any = recipe
    for part in key.split("."):
        node = getattr(node, part)
    return node
