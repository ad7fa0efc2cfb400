"""What a designed experiment shows, from the records of its trials. Plain numpy and pure functions.

Every point of the design runs under the same seeds; beside them runs plain LoRA whose rank is, from the start, the one
that pruning ends at.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hyperlora.comparison import Record, edge, final_loss, rank_stability, select_rate
from hyperlora.effects import Factor, factor, interactions, main_effects, mean_interval, seed_shares, show
from hyperlora.importance import importances
from hyperlora.study_verdict import verdict
from hyperlora.verdict import beyond

REFERENCE = "lora"
INTERVAL, COUNT, GAMMA = "pruning.interval", "pruning.count", "gamma"
PLAN = ("name", "command", "space", "design", "metric", "steps", "seeds", "parameters", "points", "reference", "recipe")


def measured(outcome: Mapping[str, Any], metric: str) -> tuple[float, bool]:
    """The value of a held-out metric after training, and whether more of it is better.

    Raises:
        ValueError: the trial has no such metric.
    """
    if metric == outcome["metric"]:
        return float(outcome["metric_after"]), bool(outcome["higher_is_better"])
    if metric == "held_out_loss":
        return float(outcome["held_out_loss_after"]), False
    raise ValueError(f"metric {metric!r}; allowed: {outcome['metric']}, held_out_loss")


def row(record: Record, metric: str) -> dict[str, Any]:
    """One trial as a flat table has it: values of the parameters, and what was measured."""
    outcome = record["outcome"]
    known = {key: record.get(key) for key in ("trial", "kind", "point", "seed", "status", "reason")}
    numbers: dict[str, Any] = dict.fromkeys(NUMBERS)
    if outcome is not None:
        numbers = {
            "metric": measured(outcome, metric)[0],
            "held_out_loss": outcome["held_out_loss_after"],
            "training_loss": final_loss(outcome["losses"]),
            "steps": outcome["steps"],
            "rank_initial": outcome["rank_initial"],
            "rank_final": outcome["rank_final"],
            "adapter_parameters_final": outcome["adapter_parameters_final"],
            "trainable_parameters": outcome["trainable_parameters"],
            "training_seconds": outcome["training_seconds"],
            "seconds_per_step": float(np.mean(outcome["step_seconds"])),
        }
    return known | dict(record["values"]) | numbers | {"peak_memory_bytes": record["peak_memory_bytes"]}


NUMBERS = (
    "metric",
    "held_out_loss",
    "training_loss",
    "steps",
    "rank_initial",
    "rank_final",
    "adapter_parameters_final",
    "trainable_parameters",
    "training_seconds",
    "seconds_per_step",
)


def analyse(records: Sequence[Record], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the trials of a study say, as plain JSON; also while trials are missing.

    Args:
        records: of the trials: ``trial`` (name), ``kind`` (point or reference), ``point`` (index), ``values``,
            ``seed``, ``status`` (finished, failed or missing), ``reason``, ``outcome``, ``peak_memory_bytes``;
            references also ``contestant``, ``lr`` and ``stage`` (tune or report).
        plan: ``name``, ``command``, ``space``, ``design``, ``metric``, ``steps``, ``seeds``, ``parameters`` (each with
            ``key``, ``label``, ``choices``, ``low``, ``high``, ``log``, ``integer``, ``default``), ``points``,
            ``reference`` (None, or its ``label`` and ``rank``), ``recipe`` and ``provenance``.
    """
    ended = [r for r in records if r["status"] == "finished"]
    known: Mapping[str, Any] = next((r["outcome"] for r in ended), {})
    metric = plan["metric"]
    higher = measured(known, metric)[1] if known else None
    points = [_point(n, values, records, plan) for n, values in enumerate(plan["points"])]
    usable = [p for p in points if p["n"]]
    reference = _reference(records, plan)
    shares = seed_shares([p["by_seed"] for p in usable])
    for p in (*usable, *([reference] if reference is not None and reference["n"] else [])):
        p["adjusted"] = _mean(list(_comparable(p, shares).values()))
    result = {key: plan[key] for key in (*PLAN, "provenance")} | {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "higher_is_better": higher,
        "share": metric in ("accuracy", "exact_match"),
        "held_out_rows": known.get("held_out_rows"),
        "missing": [r["trial"] for r in records if r["status"] == "missing"],
        "failed": [
            {"trial": r["trial"], "reason": r["reason"], "stage": r.get("stage"), "crashed": r.get("crashed", False)}
            for r in records
            if r["status"] == "failed"
        ],
        "points_measured": points,
        "noise": _noise(points),
        "effects": [],
        "interactions": [],
        "importances": {},
        "heat_maps": [],
        "reference_measured": reference,
    }
    result["complete"] = not result["missing"]
    if len(usable) > 1:
        varied = [p for p in plan["parameters"] if len({show(q["values"].get(p["key"])) for q in usable}) > 1]
        factors = [factor(p, [q["values"] for q in usable]) for p in varied]
        factors = [f for f in factors if len(f.levels) > 1]
        y, weights = np.array([p["adjusted"] for p in usable]), np.array([float(p["n"]) for p in usable])
        result["effects"] = main_effects(factors, y, weights)
        result["interactions"] = interactions(factors, y, weights)
        trials = [(p["values"], value) for p in usable for value in _comparable(p, shares).values()]
        result["importances"] = importances(varied, trials)
        result["heat_maps"] = _heat_maps(factors, usable, plan)
    one_row = 1 / result["held_out_rows"] if known and result["share"] else 0.0
    result["recommended"] = _recommended(usable, shares, higher, one_row)
    result["dynamic_rank"] = _dynamic_rank(_of_equal_size(usable, reference), reference, shares, higher)
    result["pareto"] = _pareto(usable, reference, higher)
    stable = [p["rank_stability"] for p in usable if p["rank_stability"] is not None]
    result["rank_stability"] = mean_interval(stable)
    return result | {"verdict": verdict(result)}


def _point(n: int, values: Mapping[str, Any], records: Sequence[Record], plan: Mapping[str, Any]) -> dict[str, Any]:
    own = [r for r in records if r["kind"] == "point" and r["point"] == n and r["status"] == "finished"]
    own.sort(key=lambda r: r["seed"])
    return {"point": n, "values": dict(values), **_measures(own, plan["metric"])}


def _measures(own: Sequence[Record], metric: str) -> dict[str, Any]:
    by_seed = {str(r["seed"]): measured(r["outcome"], metric)[0] for r in own}
    outcomes = [r["outcome"] for r in own]
    return {
        "by_seed": by_seed,
        **mean_interval(list(by_seed.values())),
        "parameters": _mean([o["adapter_parameters_final"] for o in outcomes]),
        "rank_final": _mean([o["rank_final"] for o in outcomes]),
        "seconds_per_step": _mean([float(np.mean(o["step_seconds"])) for o in outcomes]),
        "waited_share": max((o.get("waited_share") or 0.0 for o in outcomes), default=0.0),
        "rank_stability": rank_stability([[m["rank"] for m in o["modules"]] for o in outcomes]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _reference(records: Sequence[Record], plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Uniform LoRA at the learning rate that its training loss at another seed chose."""
    if plan["reference"] is None:
        return None
    own = [r for r in records if r["kind"] == "reference"]
    best = select_rate(own, REFERENCE)
    chosen = [
        r
        for r in own
        if r["status"] == "finished" and r["stage"] == "report" and best is not None and np.isclose(r["lr"], best)
    ]
    failed = bool(own) and not chosen and all(r["status"] != "missing" for r in own)
    measures = _measures(sorted(chosen, key=lambda r: r["seed"]), plan["metric"])
    return {**plan["reference"], "lr": best, "edge": edge(own, REFERENCE), "failed": failed, **measures}


def _noise(points: Sequence[Mapping[str, Any]]) -> float | None:
    """Standard deviation of the metric over seeds within a point, pooled; None without repeats."""
    squares, freedom = 0.0, 0
    for point in points:
        values = list(point["by_seed"].values())
        if len(values) > 1:
            squares += float(np.var(values) * len(values))
            freedom += len(values) - 1
    return float(np.sqrt(squares / freedom)) if freedom else None


def _recommended(
    points: Sequence[Mapping[str, Any]], shares: Mapping[str, float], higher: bool | None, one_row: float
) -> dict[str, Any] | None:
    """The point with the best mean among those that finished under most seeds, and how many cannot be told from it."""
    if not points:
        return None
    most = max(p["n"] for p in points)
    whole = [p for p in points if p["n"] == most]
    best = _best(whole, shares, higher)
    alike = [p["point"] for p in whole if p is not best and not _differs(p, best, one_row)]
    return {"point": best["point"], "values": best["values"], "alike": alike, "compared": len(whole) - 1}


def _comparable(point: Mapping[str, Any], shares: Mapping[str, float]) -> dict[str, float]:
    """A point's values by seed, without what all points share of the seed: as far as ``shares`` has it."""
    return {seed: value - shares.get(seed, 0.0) for seed, value in point["by_seed"].items()}


def _best(points: Sequence[Any], shares: Mapping[str, float], higher: bool | None) -> Any:
    """The point with the best mean over the seeds of ``shares``."""

    def score(point: Any) -> float:
        value = float(np.mean([v for seed, v in _comparable(point, shares).items() if seed in shares]))
        return -value if higher else value

    return min(points, key=score)


def _differs(a: Mapping[str, Any], b: Mapping[str, Any], one_row: float) -> bool:
    shared = [s for s in a["by_seed"] if s in b["by_seed"]]
    return beyond(mean_interval([a["by_seed"][s] - b["by_seed"][s] for s in shared]), one_row)


def _of_equal_size(
    points: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None
) -> Sequence[Mapping[str, Any]]:
    """The points whose final rank comes nearest to uniform LoRA's, where the space varies it; else all of them."""
    if reference is None or not reference["by_seed"] or not points:
        return points
    distances = [abs(p["rank_final"] - reference["rank_final"]) for p in points]
    half = reference["rank_final"] / reference["rank"] / 2  # half a rank in each module
    return [p for p, distance in zip(points, distances, strict=True) if distance <= min(distances) + half]


def _dynamic_rank(
    points: Sequence[Any], reference: Mapping[str, Any] | None, shares: Mapping[str, float], higher: bool | None
) -> dict[str, Any] | None:
    """Pruned adapters minus uniform LoRA, under each seed: the point that the *other* seeds chose, and all points.

    A point that is chosen by the seeds it is judged by owes part of its lead to luck; chosen by the others it does not.
    None where no seed can judge what others chose.
    """
    if reference is None or not reference["by_seed"] or not points:
        return None
    shared = [s for s in reference["by_seed"] if any(s in p["by_seed"] for p in points)]
    chosen = []
    for seed in shared:
        others = {s: shares[s] for s in shared if s != seed}
        candidates = [p for p in points if seed in p["by_seed"] and others.keys() & p["by_seed"].keys()]
        if not candidates:  # with one seed, as long as trials are missing, or when they have failed crosswise
            continue
        best = _best(candidates, others, higher)
        chosen.append(best["by_seed"][seed] - reference["by_seed"][seed])
    if not chosen:
        return None
    every = [
        float(np.mean([p["by_seed"][s] for p in points if s in p["by_seed"]])) - reference["by_seed"][s] for s in shared
    ]
    sizes = [p["parameters"] for p in points]
    return {
        "chosen": mean_interval(chosen),
        "typical": mean_interval(every),
        "size_ratio": float(np.mean(sizes)) / reference["parameters"],
        "time_ratio": float(np.mean([p["seconds_per_step"] for p in points])) / reference["seconds_per_step"],
        "waited_share": max(p["waited_share"] for p in (*points, reference)),
    }


def _pareto(
    points: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None, higher: bool | None
) -> list[dict[str, Any]]:
    """Held-out metric against the numbers in the final adapter, of points and reference; the front is marked."""
    entries = [
        {"name": f"point {p['point']}", "point": p["point"], "metric": p["adjusted"], "parameters": p["parameters"]}
        for p in points
    ]
    if reference is not None and reference["n"]:
        entries.append(
            {"name": reference["label"], "point": None}
            | {"metric": reference["adjusted"], "parameters": reference["parameters"]}
        )
    flags = front([(-e["metric"] if higher else e["metric"], e["parameters"]) for e in entries])
    return [e | {"front": flag} for e, flag in zip(entries, flags, strict=True)]


def front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Which rows no other row beats: as good in every column and better in one. Less is better."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)

    return [not any(beats(other, own) for other in costs) for own in costs]


def _heat_maps(
    factors: Sequence[Factor], points: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Mean of the metric over the points of each ΔT and k, one map for each γ; empty when the space lacks ΔT or k."""
    by_key = {f.key: f for f in factors}
    if INTERVAL not in by_key or COUNT not in by_key:
        return []
    rows, columns, gamma = by_key[INTERVAL], by_key[COUNT], by_key.get(GAMMA)
    y = np.array([p["adjusted"] for p in points])
    fixed = plan["recipe"][GAMMA]
    planes = [("the method's own" if fixed is None else show(fixed), np.ones(len(points), dtype=bool))]
    if gamma is not None:
        planes = [(level, gamma.codes == n) for n, level in enumerate(gamma.levels)]
    maps = []
    for name, inside in planes:
        cells = []
        for i, j in itertools.product(range(len(rows.levels)), range(len(columns.levels))):
            here = inside & (rows.codes == i) & (columns.codes == j)
            cells.append(
                {
                    "row": i,
                    "column": j,
                    "mean": float(y[here].mean()) if here.any() else None,
                    "points": int(here.sum()),
                }
            )
        maps.append({"gamma": name, "rows": list(rows.levels), "columns": list(columns.levels), "cells": cells})
    return maps
