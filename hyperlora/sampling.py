"""Which point to try next: Optuna's TPE, random draws or a grid, without infeasible points and without repeats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import optuna
from optuna.trial import TrialState, create_trial

from hyperlora.importance import distribution

Values = dict[str, Any]
Sampler = Literal["tpe", "random", "grid"]
SAMPLERS = get_args(Sampler)
#: Draws for one point, after which the space counts as exhausted.
DRAWS = 1000
#: Draws of the sampler itself, after which they are random.
INSISTS = 50


@dataclass(frozen=True)
class Objective:
    """What is to become small or large.

    Attributes:
        name: of the value in a trial's last report.
        higher: more of it is better.
    """

    name: str
    higher: bool


@dataclass(frozen=True)
class Searched:
    """A space, as far as a sampler has to know it.

    Attributes:
        parameters: each with ``key``, ``choices``, ``low``, ``high``, ``log`` and ``integer``.
        suggest: a point from an Optuna trial.
        infeasible: why a point cannot be run; None when it can.
        grid: feasible points of its levels.
        start: the first point; None for none.
    """

    parameters: Sequence[Mapping[str, Any]]
    suggest: Callable[[optuna.Trial], Values]
    infeasible: Callable[[Values], str | None]
    grid: Sequence[Values] = ()
    start: Values | None = None


class Proposals:
    """Points to try, from the results so far.

    Args:
        sampler: tpe, random or grid (in random order).
        space: that is searched.
        objectives: one or several.
        seed: of the draws.
        parallel: several points are at work at a time; TPE then keeps away from those that have no result yet.
    """

    def __init__(
        self, sampler: Sampler, space: Searched, objectives: Sequence[Objective], seed: int, *, parallel: bool = False
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._sampler, self._seed, self._parallel = sampler, seed, parallel
        self._earlier = 0  # points of earlier runs
        # Pruned trials without a value count as worse than all others; Optuna has them for single objectives only.
        self._worst = TrialState.PRUNED if len(objectives) == 1 else TrialState.FAIL
        study = optuna.study.StudyDirection
        directions = [study.MAXIMIZE if o.higher else study.MINIMIZE for o in objectives]
        self._study = optuna.create_study(directions=directions)
        self._sample(seed)
        self._distributions = {p["key"]: distribution(p) for p in space.parameters}
        self._open: dict[str, optuna.Trial] = {}
        self._seen: set[str] = set()
        self._queue: list[Values] = [] if space.start is None else [space.start]
        self._grid: list[Values] | None = None
        if sampler == "grid":
            order = np.random.default_rng(seed).permutation(len(space.grid))
            self._queue, self._grid = [], [space.grid[i] for i in order]

    def _sample(self, seed: int) -> None:
        """Draw with this seed from here on."""
        # Random draws have no second stream of the same seed: behind the first one it finds what is known.
        self._study.sampler = self._chance = optuna.samplers.RandomSampler(seed=seed)
        if self._sampler == "tpe":
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self._parallel)

    def _resample(self) -> None:
        """Draw anew, for a point of an earlier run: its draws once more find nothing but what is known or refused."""
        self._earlier += 1
        self._sample(int(np.random.SeedSequence((self._seed, self._earlier)).generate_state(1)[0]))

    def ask(self) -> Values | None:
        """The next point; None when nothing new can be found."""
        values: Values | None
        if self._grid is not None:
            new = [p for p in self._grid if _key(p) not in self._seen]
            return self._ask_for(new[0]) if new else None
        while self._queue:
            point = self._queue.pop(0)
            if _key(point) not in self._seen:
                return self._ask_for(point)
        learned = self._study.sampler
        for number in range(DRAWS):
            # A sampler that insists on what is refused is helped out by chance.
            self._study.sampler = learned if number < INSISTS else self._chance
            trial = self._study.ask()
            values = self._space.suggest(trial)
            known = _key(values) in self._seen
            if not known and self._space.infeasible(values) is None:
                self._opened(values, trial)
                break
            # A point that is known already is no bad one: what came of it is told under its own trial.
            self._study.tell(trial, state=TrialState.FAIL if known else self._worst)
        else:
            values = None
        self._study.sampler = learned
        return values

    def _ask_for(self, values: Values) -> Values:
        self._study.enqueue_trial(values)
        trial = self._study.ask()
        self._opened(self._space.suggest(trial), trial)
        return values

    def _opened(self, values: Values, trial: optuna.Trial) -> None:
        self._open[_key(values)] = trial
        self._seen.add(_key(values))

    def check(self, values: Values) -> None:
        """Find out whether a point of an earlier run is one of the space.

        Raises:
            ValueError: the space has not all its parameters, or not with these values; names them.
        """
        outside = []
        for key, value in values.items():
            try:
                create_trial(state=TrialState.FAIL, params={key: value}, distributions={key: self._distributions[key]})
            except (KeyError, ValueError):
                outside.append(f"{key}={value}")
        if outside:
            raise ValueError(f"it has no {', '.join(outside)}")

    def resume(self, values: Values) -> None:
        """A point of an earlier run, one of the space, goes on: it is at work without having been asked for."""
        self._ask_for(values)
        self._resample()

    def tell(
        self,
        values: Values,
        status: Literal["finished", "stopped", "failed"],
        results: Sequence[float] | None,
        reports: Sequence[tuple[int, float]] = (),
    ) -> None:
        """How a point of the space ended, asked for in this run or an earlier one.

        Args:
            values: the point.
            status: stopped early and failed ones count as worse than all finished ones.
            results: of the objectives, of a finished point.
            reports: steps and values of the first objective on the way.
        """
        self._seen.add(_key(values))
        state = TrialState.COMPLETE if status == "finished" else self._worst
        shown = dict(reports) if state == TrialState.PRUNED and status == "stopped" else {}
        trial = self._open.pop(_key(values), None)
        if trial is None:
            self._resample()
            self._study.add_trial(
                create_trial(
                    state=state,
                    values=None if results is None else list(results),
                    params=dict(values),
                    distributions={k: self._distributions[k] for k in values},
                    intermediate_values=shown,
                )
            )
            return
        for step, value in shown.items():
            trial.report(value, step)
        # Told without a value, Optuna takes a pruned trial's last report for one.
        self._study.tell(trial, None if results is None else list(results), state=state)


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
