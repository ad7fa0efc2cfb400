"""What a study says, on made-up trials whose effects are known."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import trials

from hyperlora import table
from hyperlora.effects import factor, interactions, least_squares, main_effects, seed_shares
from hyperlora.importance import importances
from hyperlora.study import analyse, front, row
from hyperlora.study_page import study_page
from hyperlora.study_verdict import verdict

KNOBS: list[dict[str, Any]] = [
    {"key": "pruning.interval", "label": "ΔT", "choices": (), "low": 2, "high": 20, "log": True},
    {"key": "pruning.count", "label": "k", "choices": (), "low": 2, "high": 48, "log": True},
    {"key": "pruning.score", "label": "score", "choices": ("smoothed", "sensitivity")},
]
KNOBS = [{"low": 0, "high": 0, "log": False, "integer": True, "default": 2, **k} for k in KNOBS]
KNOBS[2]["default"] = "smoothed"
GRID = [
    dict(zip(("pruning.interval", "pruning.count", "pruning.score"), values, strict=True))
    for values in itertools.product((2, 6, 20), (2, 10, 48), ("smoothed", "sensitivity"))
]
SEEDS = (1, 2, 3)


def plan(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "made-up",
        "command": "hyperlora study made-up",
        "space": "pruning",
        "design": "grid",
        "metric": "accuracy",
        "steps": trials.STEPS,
        "seeds": list(SEEDS),
        "parameters": KNOBS,
        "points": GRID,
        "reference": {"label": "uniform LoRA of rank 4", "rank": 4},
        "recipe": {"name": "made-up", "gamma": None, "optimizer": {"lr": 3e-3}},
        "provenance": {"git": {}},
    }
    return base | changes


def ended(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    if base["outcome"] is not None:
        base["outcome"] |= {"adapter_parameters_final": 1000, "training_seconds": 9.0, "steps": trials.STEPS}
    return base | more


def point(n: int, seed: int, metric: float | None, **more: Any) -> dict[str, Any]:
    losses = None if metric is None else trials.decay()
    made = trials.record("", losses, seed=seed, metric=metric or 0.0, **more)
    return ended(made, trial=f"p{n:03d}-seed{seed}", kind="point", point=n, values=GRID[n])


def lora(seed: int, metric: float, lr: float = 2e-3, **more: Any) -> dict[str, Any]:
    stage = "report" if seed else "tune"
    made = trials.record("lora", trials.decay(), seed=seed, lr=lr, metric=metric, stage=stage, **more)
    values = {"optimizer.lr": lr}
    return ended(made, trial=f"lora-lr{lr:g}-seed{seed}", kind="reference", point=None, values=values)


def study(
    metric: Callable[[dict[str, Any], int], float], reference: float = 0.7, noise: float = 0.002, **changes: Any
) -> dict[str, Any]:
    """A whole study in which a point's metric is a function of its knobs and seed."""
    rng = np.random.default_rng(0)
    records = [
        point(n, seed, metric(values, seed) + noise * rng.standard_normal())
        for seed in SEEDS
        for n, values in enumerate(GRID)
    ]
    records += [lora(0, 0.1), *(lora(seed, reference + 0.01 * seed) for seed in SEEDS)]
    return analyse(records, plan(**changes))


def planted(values: dict[str, Any], seed: int) -> float:
    """ΔT costs 6 points from 2 to 20, k nothing, the score 1; seed lifts all alike."""
    place = {2: 0.0, 6: 0.5, 20: 1.0}[values["pruning.interval"]]
    return 0.8 - 0.06 * place - 0.01 * (values["pruning.score"] == "sensitivity") + 0.01 * seed


def test_main_effects_are_the_planted_ones() -> None:
    effects = {e["key"]: e for e in study(planted)["effects"]}
    for key, size, ends in (
        ("pruning.interval", 0.06, ("20", "2")),
        ("pruning.score", 0.01, ("sensitivity", "smoothed")),
    ):
        e = effects[key]["effect"]
        assert e["low"] < size < e["high"]
        assert e["high"] - e["low"] < 0.006
        assert (e["from"], e["to"]) == ends
    assert effects["pruning.interval"]["p"] < 1e-6
    assert effects["pruning.count"]["p"] > 0.01
    (level,) = (v for v in effects["pruning.interval"]["levels"] if v["label"] == "2")
    assert level["points"] == 6
    assert level["mean"] == pytest.approx(0.8 - 0.005 + 0.02, abs=0.002)


def test_effects_are_adjusted_for_an_unbalanced_design() -> None:
    """Slow intervals only with large counts: raw means of ΔT would show k's effect, adjusted ones do not."""
    points = [g for g in GRID if not (g["pruning.interval"] == 20 and g["pruning.count"] == 2)]
    y = np.array([0.05 * (g["pruning.count"] == 2) for g in points])
    factors = [factor(k, points) for k in KNOBS]
    found = {e["label"]: e["effect"]["mean"] for e in main_effects(factors, y, np.ones(len(y)))}
    assert found["k"] == pytest.approx(0.05)
    assert found["ΔT"] == pytest.approx(0, abs=1e-9)


def test_intervals_cover_what_they_promise() -> None:
    """95 % of the intervals of a true difference of two levels hold it, in a thousand made-up experiments."""
    rng = np.random.default_rng(1)
    f = [factor(k, GRID) for k in KNOBS]
    x = np.hstack([np.ones((len(GRID), 1)), *(g.columns() for g in f)])
    truth = rng.standard_normal(x.shape[1])
    contrast = np.array([0.0, 1, -1, 0, 0, 0])
    hits = 0
    for _ in range(1000):
        c = least_squares(x, x @ truth + rng.standard_normal(len(GRID)), np.ones(len(GRID))).contrast(contrast)
        hits += c["low"] < contrast @ truth < c["high"]  # type: ignore[operator]
    assert 930 <= hits <= 967


def test_the_reported_effect_covers_what_it_promises() -> None:
    """The highest level minus the lowest of three that are alike: 0 lies in 95 % of the intervals."""
    rng = np.random.default_rng(1)
    factors = [factor(k, GRID) for k in KNOBS]
    hits = np.zeros(len(KNOBS))
    for _ in range(400):
        found = main_effects(factors, rng.standard_normal(len(GRID)), np.ones(len(GRID)))
        hits += [e["effect"]["low"] <= 0 <= e["effect"]["high"] for e in found]
    assert (hits >= 370).all()
    assert (hits <= 390).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.995, 137 / 200])
def test_where_nothing_varies_nothing_is_claimed(value: float) -> None:
    result = study(lambda v, s: value, noise=0)
    json.dumps(result, allow_nan=False)
    assert {e["p"] for e in (*result["effects"], *result["interactions"])} == {None}
    assert {e["effect"]["low"] for e in result["effects"]} == {None}
    assert (
        "The points leave no noise by which a knob's change of accuracy could be told from chance" in result["verdict"]
    )
    assert "Not independent" not in result["verdict"]
    assert ", 0.00 points (no interval) between" in result["verdict"]
    assert "0.00 points<small>no interval" in study_page(result)


def test_a_knob_that_changes_nothing_does_so_up_to_rounding() -> None:
    """Its columns are orthogonal to the values, and what they explain may be rounded below 0."""
    factors = [factor(k, GRID) for k in KNOBS]
    pattern = factors[0].linear() * factors[1].linear()
    for scale in (0.1, 0.7, 1.3):
        found = main_effects(factors, 0.5 + scale * pattern, np.ones(len(GRID)))
        assert [e["p"] for e in found] == pytest.approx([1, 1, 1])


def test_interactions_are_the_planted_ones() -> None:
    def together(values: dict[str, Any], seed: int) -> float:
        a = {2: -1, 6: 0, 20: 1}[values["pruning.interval"]]
        b = {2: -1, 10: 0, 48: 1}[values["pruning.count"]]
        return 0.7 + 0.01 * a * b

    result = study(together)
    first = result["interactions"][0]
    assert {first["a"], first["b"]} == {"ΔT", "k"}
    assert first["low"] < 0.04 < first["high"], "0.02 better at one end, 0.02 worse at the other"
    assert all(i["p"] > 0.01 for i in result["interactions"][1:])
    assert "Not independent of each other: ΔT and k." in result["verdict"]


def test_what_the_points_cannot_tell_is_not_told() -> None:
    points = [g for g in GRID if (g["pruning.interval"] == 2) == (g["pruning.score"] == "smoothed")]
    points = [g for g in points if g["pruning.interval"] != 6]
    factors = [factor(k, points) for k in KNOBS]
    y = np.arange(len(points), dtype=float)
    found = {e["label"]: e for e in main_effects(factors, y, np.ones(len(y)))}
    assert found["ΔT"]["effect"]["mean"] is None, "ΔT and the score move together"
    assert found["k"]["effect"]["mean"] is not None


def test_a_knob_that_exists_at_some_points_only() -> None:
    points = [{"s": "interval", "k": k} for k in (2, 10, 48)] + [{"s": "cubic"}] * 2
    knobs = [{"key": "s", "label": "s", "choices": ("interval", "cubic")}, {"key": "k", "label": "k", "choices": ()}]
    y = np.array([1.0, 2.0, 3.0, 10.0, 10.0])
    found = {e["label"]: e["effect"] for e in main_effects([factor(k, points) for k in knobs], y, np.ones(5))}
    assert found["k"]["mean"] == pytest.approx(2)
    assert found["s"]["mean"] == pytest.approx(8)
    assert interactions([factor(k, points) for k in knobs], y, np.ones(5))[0]["mean"] is None


def test_fanova_gives_the_variance_to_the_knob_that_makes_it() -> None:
    shares = {key: share["mean"] for key, share in study(planted)["importances"].items()}
    assert shares["pruning.interval"] > 0.7
    assert shares["pruning.count"] < 0.1
    assert importances(KNOBS, [(GRID[0], 0.5)] * 10) == {}, "nothing varies"
    assert importances(KNOBS, [(g, 0.5 + 1e-10 * n) for n, g in enumerate(GRID)]) == {}, "less than a tree can split"


def test_many_values_of_a_number_are_binned() -> None:
    points = [{"optimizer.lr": 0.001 * 1.1**n} for n in range(30)]
    knob = {"key": "optimizer.lr", "label": "rate", "choices": ()}
    f = factor(knob, points)
    assert [int((f.codes == i).sum()) for i in range(3)] == [10, 10, 10]
    assert f.levels[0].startswith("0.001 to ")


def test_the_verdict_names_the_knob_and_the_setting() -> None:
    text = study(planted)["verdict"]
    assert "What matters for accuracy: ΔT, 6.0" in text
    assert "between 20 and 2" in text
    assert "No effect beyond chance: k." in text
    assert "Recommended: ΔT 2, k " in text
    assert "score smoothed, with accuracy 82.0" in text or "score smoothed, with accuracy 82.1" in text
    assert "Dynamic rank pays on this task: against uniform LoRA of rank 4 (learning rate 0.002" in text
    assert "The points keep the recipe's learning rate, 0.003; only LoRA's was chosen." in text
    assert "One of the 200 held-out rows is 0.50 points" in text


@pytest.mark.parametrize(
    ("rates", "said"),
    [((5e-4, 1e-3, 2e-3), "(the highest, 0.002)"), ((2e-3, 4e-3), "(the lowest, 0.002)"), ((1e-3, 2e-3, 4e-3), "")],
)
def test_a_reference_that_is_not_tuned_to_the_end_is_named(
    rates: tuple[float, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperlora.study.importances", lambda *known: {})  # forests take a second
    records = [point(n, s, 0.8 + 0.01 * n) for n in range(2) for s in SEEDS]
    for lr in rates:
        records.append(lora(0, 0.1, lr=lr))
        records[-1]["outcome"]["losses"] = trials.STEPS * [1.0 + abs(lr - 2e-3)]
    running = analyse(records, plan(points=GRID[:2]))
    assert "Not tuned to the end" not in running["verdict"], "nothing rests on it yet"
    result = analyse([*records, *(lora(s, 0.7) for s in SEEDS)], plan(points=GRID[:2]))
    sentence = "Not tuned to the end, since the best learning rate is the last one tried: uniform LoRA of rank 4 "
    assert (f"{sentence}{said}." in result["verdict"]) == bool(said)
    assert ("Not tuned to the end" in result["verdict"]) == bool(said)
    del result["reference_measured"]["edge"]
    assert "Not tuned to the end" not in verdict(result), "an earlier version's result"


def test_where_the_learning_rate_is_searched_the_verdict_names_none() -> None:
    rate = {"key": "optimizer.lr", "label": "learning rate", "levels": [1e-3, 2e-3]}
    text = study(planted, parameters=[*KNOBS, rate])["verdict"]
    assert "Dynamic rank pays on this task" in text
    assert "recipe's learning rate" not in text


@pytest.mark.parametrize(("share", "told"), [(None, True), (0.04, True), (0.63, False)])
def test_times_of_trials_beside_others_are_no_times(share: float | None, told: bool) -> None:
    records = [point(n, seed, planted(v, seed)) for seed in SEEDS for n, v in enumerate(GRID)]
    records += [lora(0, 0.1), *(lora(seed, 0.7, waited_share=share) for seed in SEEDS)]
    text = analyse(records, plan())["verdict"]
    assert ("; a step takes as much time." in text) == told
    assert ("cannot be told, as trials waited for a processor up to 63 % of theirs." in text) == (not told)


def test_whether_dynamic_rank_pays() -> None:
    worse = study(planted, reference=0.9)["verdict"]
    assert "Dynamic rank does not pay on this task" in worse
    same = study(lambda v, s: 0.7 + 0.01 * s + 0.02 * (-1) ** s, noise=0.001)["verdict"]
    assert "That dynamic rank pays on this task is not shown" in same
    assert "No knob changes accuracy beyond chance" in same


def test_one_held_out_row_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """All seeds differ by the same row or rows of 200, and the intervals have no width."""
    monkeypatch.setattr("hyperlora.study.importances", lambda *known: {})  # forests take a second
    for lora_metric, other, claim, alike in (
        (0.995, 0.995, "That dynamic rank pays on this task is not shown", [1]),
        (0.99, 0.99, "Dynamic rank pays on this task", []),
    ):
        records = [lora(0, 0.1), *(lora(s, lora_metric) for s in SEEDS)]
        records += [point(n, s, metric) for n, metric in enumerate((1.0, other)) for s in SEEDS]
        result = analyse(records, plan(points=GRID[:2]))
        assert claim in result["verdict"]
        assert result["recommended"]["alike"] == alike
        assert "a difference of one row or less is none" in result["verdict"]


def test_one_seed_does_not_judge_what_it_chose() -> None:
    records = [lora(0, 0.1), lora(1, 0.7), *(point(n, 1, 0.8 + 0.01 * n) for n in range(2))]
    result = analyse(records, plan(points=GRID[:2], seeds=[1]))
    assert result["complete"]
    assert result["dynamic_rank"] is None
    assert "Whether dynamic rank pays is not told" in result["verdict"]


def test_lora_that_failed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperlora.study.importances", lambda *known: {})  # forests take a second
    failed = lora(0, 0.1) | {"status": "failed", "reason": "loss is not finite at step 17", "outcome": None}
    records = [failed, *(point(n, s, 0.8 + 0.01 * n) for n in range(2) for s in SEEDS)]
    result = analyse(records, plan(points=GRID[:2]))
    assert "uniform LoRA of rank 4 failed, so that nothing can be said of dynamic rank." in result["verdict"]
    missing = failed | {"status": "missing", "reason": None, "lr": 1e-3}
    text = analyse([*records, missing], plan(points=GRID[:2]))["verdict"]
    assert "uniform LoRA of rank 4 has not finished: no word on dynamic rank yet." in text


def test_dynamic_rank_is_judged_at_the_size_of_uniform_lora() -> None:
    """A larger adapter is better whatever its ranks are: that it beats a smaller uniform one says nothing."""
    records = [lora(0, 0.1, ranks=(4, 4, 4, 4)), *(lora(s, 0.7 + 0.01 * s, ranks=(4, 4, 4, 4)) for s in SEEDS)]
    for n, seed in itertools.product(range(len(GRID)), SEEDS):
        large = n % 2
        metric = 0.7 + 0.2 * large + 0.01 * seed - 0.001 * (seed == 2)
        records.append(point(n, seed, metric, ranks=(16, 8, 6, 2) if large else (8, 4, 3, 1)))
    result = analyse(records, plan())
    assert result["points_measured"][result["recommended"]["point"]]["rank_final"] == 32
    assert result["dynamic_rank"]["typical"]["mean"] == pytest.approx(-0.001 / 3)
    assert "That dynamic rank pays on this task is not shown" in result["verdict"]


def test_the_best_of_many_equal_points_does_not_beat_lora_by_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pruning changes nothing and LoRA is as good, the chosen point's lead is centred on zero."""
    monkeypatch.setattr("hyperlora.study.importances", lambda *known: {})  # forests would take a minute
    leads, naive, claims = [], [], 0
    rng = np.random.default_rng(3)
    for _ in range(40):
        records = [point(n, s, 0.8 + 0.01 * rng.standard_normal()) for n in range(len(GRID)) for s in SEEDS]
        records += [lora(0, 0.1), *(lora(s, 0.8 + 0.01 * rng.standard_normal()) for s in SEEDS)]
        result = analyse(records, plan())
        leads.append(result["dynamic_rank"]["chosen"]["mean"])
        claims += "Dynamic rank pays on this task" in result["verdict"]
        best = result["points_measured"][result["recommended"]["point"]]["mean"]
        naive.append(best - result["reference_measured"]["mean"])
    assert abs(np.mean(leads)) < 0.004
    assert claims <= 4
    assert np.mean(naive) > 0.008, "what the best mean itself would claim"


@pytest.mark.parametrize("missing", [[(1, 2), (0, 1)], [(1, 1)], [(0, 2), (1, 2)]])
def test_trials_that_are_missing_crosswise_do_not_end_a_study(missing: list[tuple[int, int]]) -> None:
    """Of two points and two seeds each; the report of what is there can always be made."""
    there = [(n, s) for n in (0, 1) for s in (1, 2) if (n, s) not in missing]
    records = [lora(0, 0.1), *(lora(s, 0.7) for s in (1, 2)), *(point(n, s, 0.8) for n, s in there)]
    result = analyse(records, plan(points=GRID[:2], seeds=[1, 2]))
    assert {p["point"]: p["n"] for p in result["points_measured"]} == {
        n: [m for m, _ in there].count(n) for n, _ in there
    }
    # Crosswise, no seed can judge what the other one chose, nor can one seed alone.
    assert (result["dynamic_rank"] is None) == (len(missing) == 2)


def test_a_seed_that_some_points_lack_is_no_effect_of_their_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study runs seed by seed: stopped within one, it has the first half of the points under more seeds."""
    monkeypatch.setattr("hyperlora.study.importances", lambda *known: {})  # forests would take a minute
    rng, claims = np.random.default_rng(5), 0
    for _ in range(40):
        there = [(n, s) for s in (1, 2) for n in range(len(GRID)) if s == 1 or n < len(GRID) // 2]
        records = [point(n, s, 0.8 + 0.05 * s + 0.002 * rng.standard_normal()) for n, s in there]
        result = analyse(records, plan(seeds=[1, 2], reference=None))
        claims += "What matters" in result["verdict"]
        adjusted = [p["adjusted"] for p in result["points_measured"]]
        assert np.ptp(adjusted) < 0.02, "half a seed's share would be 0.025"
    assert claims <= 4
    # What is known of every seed is not changed.
    whole = study(planted)["points_measured"]
    assert [p["adjusted"] for p in whole] == [p["mean"] for p in whole]


def test_shares_of_seeds_are_the_planted_ones() -> None:
    points = [{s: a + share for s, share in (("1", -0.3), ("2", 0.1), ("3", 0.2))} for a in (1.0, 2.0, 5.0)]
    assert seed_shares(points) == {"1": 0.0, "2": 0.0, "3": 0.0}
    del points[0]["3"], points[2]["1"]
    assert seed_shares(points) == pytest.approx({"1": -0.3, "2": 0.1, "3": 0.2})


def test_a_rate_that_crashed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperlora.study.importances", lambda *known: {})  # forests take a second
    gone = {"status": "failed", "reason": "OutOfMemoryError", "outcome": None, "crashed": True}
    records = [lora(0, 0.1), lora(0, 0.1, lr=8e-3) | gone, *(lora(s, 0.7) for s in SEEDS)]
    records += [point(n, s, 0.8 + 0.01 * n) for n in range(2) for s in SEEDS]
    text = analyse(records, plan(points=GRID[:2]))["verdict"]
    assert "count as infinitely bad until the same command repeats them: 1 trial (lora-lr0.008-seed0)." in text
    assert "left out" not in text


def test_for_a_loss_less_is_better() -> None:
    records = [point(n, s, 0.5) for n in range(len(GRID)) for s in SEEDS]
    for r in records:
        r["outcome"]["held_out_loss_after"] = 0.4 if r["point"] == 7 else 0.6
    result = analyse(records, plan(metric="held_out_loss", reference=None))
    assert result["recommended"]["point"] == 7
    assert not result["share"]
    assert "held-out loss 0.4000" in result["verdict"]


def test_heat_maps_hold_the_means_of_their_cells() -> None:
    result = study(planted, noise=0)
    (one,) = result["heat_maps"]
    assert one["gamma"] == "the method's own"
    cells = {(one["rows"][c["row"]], one["columns"][c["column"]]): c for c in one["cells"]}
    assert cells["20", "48"]["mean"] == pytest.approx(0.8 - 0.06 - 0.005 + 0.02)
    assert cells["20", "48"]["points"] == 2
    gammas = [{**g, "gamma": 0.1 * (n % 2)} for n, g in enumerate(GRID)]
    knob = {**KNOBS[0], "key": "gamma", "label": "γ", "low": 0, "high": 1, "log": False, "integer": False}
    records = [point(n, s, planted(GRID[n], s)) | {"values": gammas[n]} for n in range(len(GRID)) for s in SEEDS]
    maps = analyse(records, plan(parameters=[*KNOBS, knob], points=gammas))["heat_maps"]
    assert [m["gamma"] for m in maps] == ["0", "0.1"]
    assert sum(c["points"] for m in maps for c in m["cells"]) == len(GRID)


def test_rank_patterns_and_the_noise_of_seeds() -> None:
    ranks = {1: (4, 3, 2, 1), 2: (4, 3, 2, 1), 3: (1, 2, 3, 4)}
    records = [point(0, s, 0.8 + 0.01 * s, ranks=ranks[s]) for s in SEEDS]
    result = analyse(records, plan(points=GRID[:1], reference=None))
    assert result["points_measured"][0]["rank_stability"] == pytest.approx(-1 / 3)
    assert result["noise"] == pytest.approx(0.01)


def test_the_front() -> None:
    assert front([(1, 3), (2, 2), (3, 1), (2, 3), (1, 3)]) == [True, True, True, False, True]
    records = [point(n, 1, metric) for n, metric in enumerate((0.8, 0.7, 0.6))]
    for r, size in zip(records, (100, 50, 60), strict=True):
        r["outcome"]["adapter_parameters_final"] = size
    result = analyse(records, plan(points=GRID[:3], reference=None))
    assert [e["front"] for e in result["pareto"]] == [True, True, False]


def test_a_partial_study_is_readable() -> None:
    records = [point(0, 1, 0.8), point(1, 1, None)]
    missing = {"trial": "p002-seed1", "kind": "point", "point": 2, "values": GRID[2], "seed": 1}
    records.append(missing | {"status": "missing", "reason": None, "outcome": None, "peak_memory_bytes": None})
    result = analyse(records, plan())
    assert not result["complete"]
    assert "This result is partial: 1 trials have not ended. 1 trials failed" in result["verdict"]
    page = study_page(result)
    assert "p002-seed1" in page
    assert "loss is not finite at step 17" in page
    nothing = analyse([records[2]], plan())
    assert "No trial has finished" in study_page(nothing)
    for r in (result, nothing):
        json.dumps(r, allow_nan=False)


def test_the_page_is_self_contained_and_safe_with_any_text() -> None:
    result = study(planted, name="<script>alert(1)</script>", command="x </pre><script>")
    page = study_page(result)
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") == 2
    assert page.count('<table class="heat') == 1
    assert 'name="viewport"' in page
    assert "(recommended)" in page


def test_tables_hold_every_trial() -> None:
    records = [point(0, 1, 0.8), point(1, 2, None)]
    files = table.files([row(r, "accuracy") for r in records])
    parquet = pyarrow.parquet.read_table(io.BytesIO(files["trials.parquet"])).to_pylist()
    text = pyarrow.csv.read_csv(io.BytesIO(files["trials.csv"])).to_pylist()
    for rows in (parquet, text):
        assert [r["trial"] for r in rows] == ["p000-seed1", "p001-seed2"]
        assert rows[0]["metric"] == pytest.approx(0.8)
        assert rows[1]["metric"] is None
        assert rows[0]["pruning.interval"] == 2
        assert "not finite" in rows[1]["reason"]
