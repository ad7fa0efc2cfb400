"""Importance of parameters by functional ANOVA over a random forest (Hutter et al. 2014), Optuna's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import create_trial

#: Forests, of different seeds, whose spread is shown.
FORESTS = 5
#: Fewer trials than these tell nothing.
FEWEST = 4


def distribution(parameter: Mapping[str, Any]) -> BaseDistribution:
    """Optuna's of a parameter with ``choices``, or ``low``, ``high``, ``log`` and ``integer``."""
    if parameter["choices"]:
        return CategoricalDistribution(tuple(parameter["choices"]))
    if parameter["integer"]:
        return IntDistribution(int(parameter["low"]), int(parameter["high"]), log=parameter["log"])
    return FloatDistribution(parameter["low"], parameter["high"], log=parameter["log"])


def importances(
    parameters: Sequence[Mapping[str, Any]], trials: Sequence[tuple[Mapping[str, Any], float]]
) -> dict[str, dict[str, float]]:
    """Share of the variance that each parameter alone explains, by key: ``mean``, ``low``, ``high`` over forests.

    A parameter that does not exist at a point counts there with its default. Empty when there are too few trials or
    their values vary by less than some 1e-8, which no tree splits.

    Args:
        parameters: with ``key`` and ``default`` beside what :func:`distribution` reads.
        trials: values of the parameters and the objective of each.
    """
    if len(trials) < FEWEST or np.ptp([y for _, y in trials]) == 0:
        return {}
    from optuna.importance import FanovaImportanceEvaluator  # takes a second, which no trial needs

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    distributions = {p["key"]: distribution(p) for p in parameters}
    for values, y in trials:
        params = {p["key"]: values.get(p["key"], p["default"]) for p in parameters}
        study.add_trial(create_trial(params=params, distributions=distributions, value=y))
    try:
        forests = [FanovaImportanceEvaluator(seed=seed).evaluate(study) for seed in range(FORESTS)]
    except RuntimeError:  # no variance in any tree
        return {}
    shares = {key: [forest[key] for forest in forests] for key in distributions}
    return {key: {"mean": float(np.mean(s)), "low": min(s), "high": max(s)} for key, s in shares.items()}
