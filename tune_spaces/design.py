"""Designed experiments over a space: full grid, fraction of it, Sobol points; feasible points only."""

from __future__ import annotations

import itertools
import json
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import qmc

from hyperlora.config import Problem, RecipeError
from tune_spaces.space import BoundSpace, Domain, Values

Design = Literal["grid", "fraction", "sobol"]
DESIGNS = get_args(Design)
#: Variance that an interaction is expected to have, relative to a main effect's.
INTERACTIONS = 0.25
DRAWS = 2**14


def points_of(space: BoundSpace, design: Design, count: int) -> list[Values]:
    """The points of a designed experiment.

    Args:
        space: whose levels (or ranges) are covered.
        design: ``grid`` takes every feasible combination of the levels; ``fraction`` the ``count`` of them that
            tell most about main effects and interactions of two; ``sobol`` ``count`` points of a scrambled Sobol
            sequence.
        count: of points, for the last two.

    Raises:
        RecipeError: there are not enough feasible points.
    """
    if design == "sobol":
        return _sobol(space, count)
    grid = space.feasible(space.grid())
    if len(grid) < 2:
        raise RecipeError([Problem("--space", len(grid), "at least two feasible combinations of its levels")])
    return grid if design == "grid" or len(grid) <= count else _fraction(space, grid, count)


def _sobol(space: BoundSpace, count: int) -> list[Values]:
    sequence = qmc.Sobol(len(space.domains), rng=np.random.default_rng(0))
    found: dict[str, Values] = {}
    for _ in range(DRAWS // 64):
        for shares in sequence.random(64):
            share = dict(zip((d.key for d in space.domains), shares, strict=True))
            point = space.pick(lambda domain, share=share: domain.at(share[domain.key]))  # type: ignore[misc]
            if space.infeasible(point) is None:
                found.setdefault(json.dumps(point, sort_keys=True), point)
            if len(found) == count:
                return list(found.values())
    raise RecipeError([Problem("--points", count, f"at most {len(found)}: {DRAWS} draws held no more feasible points")])


def _fraction(space: BoundSpace, grid: list[Values], count: int) -> list[Values]:
    """A Bayesian D-optimal subset of a grid (DuMouchel and Jones 1994), by exchange from a greedy start."""
    x, prior = _model(space, grid)
    chosen: list[int] = []
    information = prior.copy()
    for _ in range(count):
        gain = np.einsum("ij,jk,ik->i", x, np.linalg.inv(information), x)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        information += np.outer(x[best], x[best])
    for _ in range(10):
        before = list(chosen)
        for place, old in enumerate(chosen):
            without = information - np.outer(x[old], x[old])
            gain = np.einsum("ij,jk,ik->i", x, np.linalg.inv(without), x)
            gain[[i for i in chosen if i != old]] = -1
            # A gain that is only rounding would exchange for ever.
            new = int(gain.argmax()) if gain.max() > gain[old] * (1 + 1e-9) else old
            chosen[place] = new
            information = without + np.outer(x[new], x[new])
        if chosen == before:
            break
    return [grid[i] for i in sorted(chosen)]


def _model(space: BoundSpace, grid: list[Values]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of main effects and of products of two parameters' codes; the prior's information."""
    main, codes = [np.ones((len(grid), 1))], []
    for domain in space.domains:
        levels = [point.get(domain.key, domain.levels[0]) for point in grid]
        indicator = np.array([[level == other for other in domain.levels[1:]] for level in levels], dtype=float)
        main.append(indicator - indicator.mean(axis=0))
        codes.append(np.array([_code(domain, level) for level in levels]))
    products = [a * b for a, b in itertools.combinations(codes, 2)]
    count = sum(m.shape[1] for m in main)
    x = np.hstack([*main, *(p[:, None] for p in products)])
    # A vague prior keeps the information invertible while few points are chosen.
    prior = np.diag([1e-6] * count + [1 / INTERACTIONS] * len(products))
    return x, prior


def _code(domain: Domain, level: Any) -> float:
    """A level's place among the levels, from -1 to 1."""
    return 2 * domain.levels.index(level) / max(1, len(domain.levels) - 1) - 1
