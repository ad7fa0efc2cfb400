"""Effects of a designed experiment's factors: least squares on the points' means.

Every point is run with the same seeds, so that its mean is one observation and what all points share of a seed drops
out. Where trials are missing that share is estimated and taken out first (:func:`seed_shares`). Residuals of the
additive model hold the noise of the seeds and the interactions alike: intervals are wide where interactions are strong.
Factors are sum-coded; at points where a factor does not exist its columns are 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

#: More distinct numbers than these are told apart by three bins of equal numbers of points.
MOST_LEVELS, BINS = 5, 3
CONFIDENCE = 0.95
#: What is smaller than this part of the values is their rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Factor:
    """A parameter at the points of a design.

    Attributes:
        key, label: of the parameter.
        levels: for people, in their order.
        codes: the level of every point, (n,); -1 where the parameter does not exist.
    """

    key: str
    label: str
    levels: tuple[str, ...]
    codes: np.ndarray

    def columns(self) -> np.ndarray:
        """Sum coding, (n, levels - 1)."""
        last = len(self.levels) - 1
        x = (self.codes[:, None] == np.arange(last)).astype(float)
        x[self.codes == last] = -1
        return x

    def linear(self) -> np.ndarray:
        """The place among the levels from -1 to 1, (n,)."""
        place = 2 * self.codes / max(1, len(self.levels) - 1) - 1.0
        return np.where(self.codes < 0, 0.0, place)


def factor(parameter: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Factor:
    """How the points cover one parameter (``key``, ``label``, ``choices``)."""
    key = parameter["key"]
    values = [point.get(key) for point in points]
    present = [v for v in values if v is not None]
    order: list[Any] = list(parameter["choices"]) if parameter["choices"] else sorted(set(present))
    if parameter["choices"] or len(order) <= MOST_LEVELS:
        order = [v for v in order if v in present]
        codes = [-1 if v is None else order.index(v) for v in values]
        return Factor(key, parameter["label"], tuple(show(v) for v in order), np.array(codes))
    edges = np.quantile(present, np.linspace(0, 1, BINS + 1))
    names = tuple(f"{show(float(a))} to {show(float(b))}" for a, b in itertools.pairwise(edges))
    codes = [-1 if v is None else min(BINS - 1, int(np.searchsorted(edges[1:], v))) for v in values]
    return Factor(key, parameter["label"], names, np.array(codes))


def show(value: Any) -> str:
    """A value of a parameter for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its t interval, which holds at three seeds already; no interval below two values."""
    n = len(values)
    if not n:
        return {"mean": None, "low": None, "high": None, "n": 0}
    mean = float(np.mean(values))
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = float(special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * np.std(values, ddof=1) / np.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def seed_shares(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What all points share of each seed, from their values by seed: least squares of value = point + seed.

    The shares add up to 0. Without them a point that lacks a good seed would look worse than it is. All are 0 where
    every point has the same seeds: then they change no mean.
    """
    seeds = sorted({seed for point in points for seed in point})
    if all(len(point) == len(seeds) for point in points):
        return dict.fromkeys(seeds, 0.0)
    cells = [(n, seeds.index(seed), value) for n, point in enumerate(points) for seed, value in point.items()]
    at, of, values = (np.array(column) for column in zip(*cells, strict=True))
    by_seed = np.eye(len(seeds))[:, :-1]
    by_seed[-1] = -1
    beta = np.linalg.lstsq(np.hstack([np.eye(len(points))[at], by_seed[of]]), values, rcond=None)[0]
    shares = by_seed @ beta[len(points) :]
    return dict(zip(seeds, shares.tolist(), strict=True))


@dataclass(frozen=True)
class Fit:
    """Weighted least squares.

    Attributes:
        beta: coefficients, (p,).
        covariance: of them, (p, p); zero when nothing is left to estimate it from.
        residual: weighted sum of squares; 0 when it is the values' rounding.
        freedom: degrees of freedom of the residual.
        x: the design, (n, p).
    """

    beta: np.ndarray
    covariance: np.ndarray
    residual: float
    freedom: int
    x: np.ndarray

    @property
    def testable(self) -> bool:
        """Whether a residual is left that anything could be held against."""
        return self.freedom > 0 and self.residual > 0

    def contrast(self, c: np.ndarray, levels: int = 2) -> dict[str, float | None]:
        """A combination of the coefficients with its interval and the p of its t test; None what cannot be told.

        Args:
            c: the combination, (p,).
            levels: how many it is the largest difference of, which widens the interval.
        """
        nothing: dict[str, float | None] = {"mean": None, "low": None, "high": None, "p": None}
        projected = np.linalg.pinv(self.x) @ self.x @ c
        if not np.allclose(projected, c, atol=1e-6):
            return nothing
        mean = float(c @ self.beta)
        if not self.testable:
            return nothing | {"mean": mean}
        error = float(np.sqrt(c @ self.covariance @ c))
        half = _reach(levels, self.freedom) * error
        p = float(2 * special.stdtr(self.freedom, -abs(mean) / error))
        return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


@functools.cache
def _reach(levels: int, freedom: int) -> float:
    """Standard errors to either side of the largest difference of some levels: Tukey's studentized range.

    Of two levels it is Student's t.
    """
    if levels <= 2:
        return float(special.stdtrit(freedom, 0.5 + CONFIDENCE / 2))
    from scipy.stats import studentized_range  # takes a second to import

    return float(studentized_range.ppf(CONFIDENCE, levels, freedom) / np.sqrt(2))


def least_squares(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Fit:
    """Fit y, (n,), on the columns of x, (n, p), with weights, (n,)."""
    root = np.sqrt(weights)
    xw, yw = x * root[:, None], y * root
    beta, _, rank, _ = np.linalg.lstsq(xw, yw, rcond=None)
    residual = float(((yw - xw @ beta) ** 2).sum())
    if residual <= ROUNDING**2 * float((yw**2).sum()):
        residual = 0.0
    freedom = len(y) - int(rank)
    variance = residual / freedom if freedom > 0 else 0.0
    return Fit(beta, variance * np.linalg.pinv(xw.T @ xw), residual, freedom, x)


def main_effects(factors: Sequence[Factor], y: np.ndarray, weights: np.ndarray) -> list[dict[str, Any]]:
    """What each factor changes, the others held: adjusted means of its levels, and the largest difference of two.

    Returns:
        For each factor ``key``, ``label``, ``levels`` (each with ``label``, ``points`` and the adjusted ``mean``,
        ``low``, ``high``), ``effect`` (highest minus lowest level, with ``from`` and ``to``; its interval allows for
        their being the extremes of all), and ``p``, the F test of all its levels.
    """
    blocks = [f.columns() for f in factors]
    x = np.hstack([np.ones((len(y), 1)), *blocks])
    whole = least_squares(x, y, weights)
    found, start = [], 1
    for f, block in zip(factors, blocks, strict=True):
        width = block.shape[1]
        own = slice(start, start + width)
        rows = np.zeros((len(f.levels), x.shape[1]))
        rows[:, 0] = 1
        rows[:width, own] = np.eye(width)
        rows[-1, own] = -1
        means = [whole.contrast(row) for row in rows]
        known = [i for i, m in enumerate(means) if m["mean"] is not None]
        levels = [
            {"label": name, "points": int((f.codes == i).sum()), **{k: means[i][k] for k in ("mean", "low", "high")}}
            for i, name in enumerate(f.levels)
        ]
        effect: dict[str, Any] = {"mean": None, "low": None, "high": None, "from": None, "to": None}
        if len(known) > 1:
            lowest = min(known, key=lambda i: float(means[i]["mean"] or 0.0))
            # Of equals the last, so that it is another level where all are equal.
            highest = max(reversed(known), key=lambda i: float(means[i]["mean"] or 0.0))
            gap = whole.contrast(rows[highest] - rows[lowest], len(known))
            effect = {k: gap[k] for k in ("mean", "low", "high")}
            effect |= {"from": f.levels[lowest], "to": f.levels[highest]}
        p = _joint_test(np.delete(x, np.r_[own], axis=1), whole, y, weights)
        found.append({"key": f.key, "label": f.label, "levels": levels, "effect": effect, "p": p})
        start += width
    return found


def _joint_test(without: np.ndarray, whole: Fit, y: np.ndarray, weights: np.ndarray) -> float | None:
    """p of the F test that some columns do nothing; None when it cannot be made."""
    less = least_squares(without, y, weights)
    extra = less.freedom - whole.freedom
    if extra < 1 or not whole.testable:
        return None
    f = max(0.0, less.residual - whole.residual) / extra / (whole.residual / whole.freedom)  # below 0 by rounding only
    return float(special.fdtrc(extra, whole.freedom, f))


def interactions(factors: Sequence[Factor], y: np.ndarray, weights: np.ndarray) -> list[dict[str, Any]]:
    """How much one factor's whole change depends on another's, pair by pair beside all main effects.

    Levels count by their place from first to last; the estimate is the difference of the first factor's change between
    the last and the first level of the second. What other pairs do is in the residual.
    """
    base = np.hstack([np.ones((len(y), 1)), *(f.columns() for f in factors)])
    found = []
    for a, b in itertools.combinations(factors, 2):
        x = np.hstack([base, (a.linear() * b.linear())[:, None]])
        c = np.zeros(x.shape[1])
        c[-1] = 4  # both codes run from -1 to 1
        found.append({"a": a.label, "b": b.label, **least_squares(x, y, weights).contrast(c)})
    return sorted(found, key=lambda e: 2.0 if e["p"] is None else e["p"])
