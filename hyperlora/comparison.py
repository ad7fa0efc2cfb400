"""Statistics of a comparison: methods by learning rates by seeds, paired by seed, from the records of its trials.

Plain numpy and pure functions. How a loss curve is read, the same way for every contestant:

- *smoothed*: centred moving average over max(5, steps/20) steps, shorter at the ends;
- *final loss*: mean of the smoothed curve over the last tenth of the steps; learning rates are selected by it as well;
- *monotone*: least-squares non-increasing fit of the smoothed curve. A lucky dip, or a loss that rises again, is
  averaged with what follows it, so that a level counts as reached when the curve stays there. The fit of a curve always
  reaches that curve's own final loss, so that the baseline always reaches its target;
- *steps to* a level: first crossing of the monotone fit, interpolated between steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from hyperlora.figures import smooth

Record = Mapping[str, Any]


# -------------------------------------------------------------------- one loss curve


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Moving average of a loss curve, (T,), over max(5, T/20) steps."""
    return smooth(np.asarray(losses, dtype=float), max(5, len(losses) // 20))


def final_loss(losses: Sequence[float]) -> float:
    """Mean of the smoothed curve over the last tenth of the steps; infinite when a loss is not finite."""
    if not np.isfinite(losses).all():
        return math.inf
    return float(smoothed(losses)[-max(1, len(losses) // 10) :].mean())


# -------------------------------------------------------------------- selection of the learning rate


def search_scores(records: Sequence[Record], contestant: str) -> dict[float, float]:
    """Final training loss of every rate tried in stage ``tune``, by rising rate; infinite for failed trials."""
    scores: dict[float, list[float]] = {}
    for r in records:
        if r["contestant"] == contestant and r["stage"] == "tune" and r["status"] != "missing":
            score = final_loss(r["outcome"]["losses"]) if r["status"] == "finished" else math.inf
            scores.setdefault(float(r["lr"]), []).append(score)
    return {lr: float(np.mean(scores[lr])) for lr in sorted(scores)}


def select_rate(records: Sequence[Record], contestant: str) -> float | None:
    """The tried learning rate with the lowest final training loss; of equals the lower one; None when all failed."""
    scores = search_scores(records, contestant)
    best = min(scores, key=lambda lr: scores[lr], default=None)
    return best if best is not None and math.isfinite(scores[best]) else None


def edge(records: Sequence[Record], contestant: str) -> Literal["low", "high"] | None:
    """On which side the best rate is the last one tried; None when rates on both sides were tried.

    ``low`` also when every rate failed, since lower rates diverge less, and when there is only one rate.
    """
    rates = list(search_scores(records, contestant))
    best = select_rate(records, contestant)
    if not rates:
        return None
    if best is None or best == rates[0]:
        return "low"
    return "high" if best == rates[-1] else None
