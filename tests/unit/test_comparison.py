"""Statistics of a comparison on numbers that can be checked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hyperlora.comparison import edge, final_loss, search_scores, select_rate


def tune(contestant: str, lr: float, level: float | None, status: str = "finished") -> dict[str, Any]:
    outcome = None if level is None else {"losses": [level] * 20}
    return {"contestant": contestant, "lr": lr, "seed": 0, "stage": "tune", "status": status, "outcome": outcome}


def test_final_loss_is_the_mean_of_the_smoothed_last_tenth() -> None:
    # 20 steps: window 5, last tenth = 2 steps, whose windows are the last 4 and the last 3 losses.
    losses = [9.0] * 16 + [4.0, 1.0, 2.0, 3.0]
    assert final_loss(losses) == pytest.approx(((4 + 1 + 2 + 3) / 4 + (1 + 2 + 3) / 3) / 2)
    assert final_loss([1.0, math.nan, 1.0]) == math.inf


@pytest.mark.parametrize(
    ("levels", "best", "side"),
    [
        ([3.0, 1.0, 2.0], 2e-3, None),
        ([1.0, 2.0, 3.0], 1e-3, "low"),
        ([3.0, 2.0, 1.0], 4e-3, "high"),
        ([1.0, 1.0, 2.0], 1e-3, "low"),
        ([3.0, 2.0, None], 2e-3, None),
        ([3.0, 2.0, math.nan], 2e-3, None),
        ([None, None, None], None, "low"),
        ([], None, None),
    ],
)
def test_the_rate_is_selected_by_training_loss(levels: list[float | None], best: float | None, side: str) -> None:
    tried = list(zip((1e-3, 2e-3, 4e-3), levels, strict=False))
    records = [tune("a", lr, x, "failed" if x is None else "finished") for lr, x in reversed(tried)]
    records += [tune("b", 8e-3, 0.0), tune("a", 8e-3, None, "missing"), tune("a", 8e-3, 0.0) | {"stage": "report"}]
    assert select_rate(records, "a") == best
    assert edge(records, "a") == side
    assert list(search_scores(records, "a")) == [lr for lr, _ in tried]
