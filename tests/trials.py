"""Records of made-up trials of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

STEPS = 200


def decay(rate: float = 1.0, seed: int = 0, noise: float = 0.0, steps: int = STEPS) -> list[float]:
    """A loss that falls from 1, ``rate`` times as fast as the baseline's, with noise that the seed gives."""
    t = np.arange(steps) * rate / 60
    values = 0.3 + 0.7 * np.exp(-t) - 0.02 * t + noise * np.random.default_rng(seed).standard_normal(steps)
    return values.tolist()


def record(
    contestant: str,
    losses: Sequence[float] | None,
    *,
    seed: int = 1,
    lr: float = 2e-3,
    stage: str = "report",
    metric: float = 0.8,
    step_seconds: float = 0.1,
    ranks: Sequence[int] = (4, 3, 2, 1),
    waited_share: float | None = None,
) -> dict[str, Any]:
    """One trial; a failed one when there are no losses."""
    base = {"contestant": contestant, "lr": lr, "seed": seed, "stage": stage}
    if losses is None:
        reason = "NonFiniteError: loss is not finite at step 17"
        return base | {"status": "failed", "reason": reason, "outcome": None, "peak_memory_bytes": None}
    parts = ("attention.q_proj", "attention.v_proj")
    modules = [
        {"name": f"layer.{n // 2}.{parts[n % 2]}", "layer": n // 2, "part": parts[n % 2], "rank": rank}
        for n, rank in enumerate(ranks)
    ]
    outcome = {
        "losses": list(losses),
        "step_seconds": [step_seconds] * len(losses),
        "waited_share": waited_share,
        "metric": "accuracy",
        "higher_is_better": True,
        "metric_after": metric,
        "held_out_loss_after": 1 - metric,
        "held_out_rows": 200,
        "optimizer_state_bytes": 600_000,
        "trainable_parameters": 75_000,
        "rank_initial": 8 * len(modules),
        "rank_final": sum(ranks),
        "modules": modules,
    }
    return base | {"status": "finished", "reason": None, "outcome": outcome, "peak_memory_bytes": 3 * 2**28}


def search(contestant: str, best: float = 2e-3) -> list[dict[str, Any]]:
    """Tuning trials at three rates, the middle one the best."""
    rates = (best / 2, best, 2 * best)
    return [
        record(contestant, STEPS * [1.0 + abs(n - 1)], seed=0, lr=lr, stage="tune", metric=0.5)
        for n, lr in enumerate(rates)
    ]


def plan(*contestants: str, seeds: Sequence[int] = (1, 2, 3, 4, 5), steps: int = STEPS) -> dict[str, Any]:
    """What ``analyse`` is told; the first contestant is the baseline, and labels are the names in capitals."""
    return {
        "name": "made-up",
        "command": "hyperlora compare made-up --seeds 5",
        "baseline": contestants[0],
        "steps": steps,
        "lrs": [1e-3, 2e-3, 4e-3],
        "seeds": list(seeds),
        "recipe": {"name": "made-up", "optimizer": {"lr": 1e-3}},
        "contestants": [{"name": n, "label": n.upper(), "set": {"method": n}} for n in contestants],
        "selection": "The rate with the lowest training loss, mean over the last tenth of the steps.",
        "provenance": {
            "versions": {"torch": "2.13.0"},
            "git": {"commit": "0123abc", "dirty": False},
            "machine": {"cpus": 2},
        },
    }
