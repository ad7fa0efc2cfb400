"""Statistics of a comparison on numbers that can be checked by hand."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from trials import STEPS, decay, plan, record, search

from hyperlora.comparison import (
    analyse,
    edge,
    final_loss,
    interval,
    monotone,
    rank_stability,
    search_scores,
    seconds_at,
    select_rate,
    smoothed,
    steps_to,
)
from hyperlora.report import comparison_page
from hyperlora.verdict import change, verdict


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


# -------------------------------------------------------------------- reading one curve


def test_monotone_fit_pools_rises_with_what_precedes_them() -> None:
    np.testing.assert_allclose(monotone(np.array([5.0, 3.0, 4.0, 1.0])), [5, 3.5, 3.5, 1])
    # A dip to 1 that does not last counts as the mean of what follows.
    np.testing.assert_allclose(monotone(np.array([6.0, 1.0, 4.0, 4.0])), [6, 3, 3, 3])
    np.testing.assert_allclose(monotone(np.array([1.0, 2.0, 3.0])), [2, 2, 2])
    falling = np.array([4.0, 3.0, 1.0])
    np.testing.assert_array_equal(monotone(falling), falling)


def test_monotone_fit_is_the_nearest_of_all_non_increasing_curves() -> None:
    rng = np.random.default_rng(3)
    curve = rng.standard_normal(12)
    fit = monotone(curve)
    assert (np.diff(fit) <= 1e-12).all()
    for _ in range(300):
        other = np.sort(fit + 0.3 * rng.standard_normal(12))[::-1]
        assert ((fit - curve) ** 2).sum() <= ((other - curve) ** 2).sum() + 1e-12


def test_crossings_are_interpolated_and_lucky_dips_do_not_count() -> None:
    falling = np.array([4.0, 3.0, 1.0, 0.5])
    assert steps_to(falling, 3.0) == 2
    assert steps_to(falling, 2.0) == 2.5
    assert steps_to(falling, 9.0) == 1
    assert steps_to(falling, 0.4) is None
    assert steps_to(np.array([4.0, 0.5, 4.0, 3.0]), 1.0) is None


def test_seconds_are_interpolated_within_a_step() -> None:
    assert seconds_at([1.0, 3.0, 5.0], 2.0) == 4
    assert seconds_at([1.0, 3.0, 5.0], 2.5) == 6.5
    assert seconds_at([1.0], None) is None


@pytest.mark.parametrize("seed", range(20))
def test_every_curve_reaches_its_own_final_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat = rng.standard_normal(100)
    for losses in (flat, flat + np.linspace(0, 3, 100), flat - np.linspace(0, 3, 100), np.ones(100)):
        assert steps_to(smoothed(losses), final_loss(losses)) is not None


# -------------------------------------------------------------------- intervals


def test_interval_of_the_mean() -> None:
    assert interval([]) == {"mean": None, "low": None, "high": None, "n": 0}
    assert interval([3.0]) == {"mean": 3.0, "low": None, "high": None, "n": 1}
    assert interval([2.0, 2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 3}
    # Of two values the t distribution is Cauchy's: 12.7062 standard errors.
    two = interval([0.0, 2.0])
    assert (two["mean"], two["n"]) == (1.0, 2)
    assert [two["low"], two["high"]] == pytest.approx([1 - 12.7062, 1 + 12.7062], abs=1e-4)
    logs, ratios = interval([math.log(v) for v in (0.5, 0.6, 0.8)]), interval([0.5, 0.6, 0.8], ratios=True)
    assert ratios["mean"] == pytest.approx(1.9 / 3)
    assert [ratios["low"], ratios["high"]] == pytest.approx([math.exp(logs["low"]), math.exp(logs["high"])])


def test_bootstrap_interval_of_the_mean() -> None:
    # The mean of a resample of five values is 0, 2, … 10 with chances of (4/5)⁵, … (1/5)⁵; 10 has less than the tail.
    assert interval([0.0, 0.0, 0.0, 0.0, 10.0]) == {"mean": 2.0, "low": 0.0, "high": 8.0, "n": 5}
    assert interval([1.0, 4.0, 2.0, 7.0, 3.0]) == interval([1.0, 4.0, 2.0, 7.0, 3.0])
    assert interval([1.0, 4.0, 2.0, 7.0, 3.0], ratios=True) == interval([1.0, 4.0, 2.0, 7.0, 3.0])


def test_bootstrap_interval_is_that_of_the_normal_law_for_many_values() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    found = interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_of_five_seeds_cover_the_mean() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        found = interval(rng.standard_normal(5).tolist())
        covered += found["low"] <= 0 <= found["high"]
    # The plain percentile interval comes to 83 %.
    assert 0.87 <= covered / 300 <= 0.97


@pytest.mark.parametrize("seeds", [2, 3, 4])
@pytest.mark.parametrize("ratios", [False, True])
def test_intervals_of_fewer_seeds_cover_the_mean(seeds: int, ratios: bool) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        values = 0.2 * rng.standard_normal(seeds)
        found = interval((np.exp(values) if ratios else values).tolist(), ratios=ratios)
        covered += found["low"] <= (1 if ratios else 0) <= found["high"]
    # Bootstrap intervals come to 52, 71 and 87 %.
    assert 0.935 <= covered / 2000 <= 0.965


def test_stability_of_ranks() -> None:
    assert rank_stability([[1, 2, 3], [2, 4, 9]]) == pytest.approx(1)
    assert rank_stability([[1, 2, 3], [3, 2, 1], [1, 2, 3]]) == pytest.approx((1 - 1 - 1) / 3)
    # Ties share a place: (1.5, 1.5, 3) against (1, 2, 3).
    assert rank_stability([[0, 0, 5], [1, 2, 3]]) == pytest.approx(math.sqrt(3) / 2)
    assert rank_stability([[4, 4, 4], [4, 4, 4]]) is None
    assert rank_stability([[1, 2, 3]]) is None


# -------------------------------------------------------------------- the whole comparison


def of(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in result["contestants"] if c["name"] == name)


def field(losses: Any, *, base: Any = lambda seed: decay(), seeds: Any = range(1, 6), **rest: Any) -> dict[str, Any]:
    """The baseline ``adalora`` against ``new``, each with a curve by seed."""
    records = search("adalora") + search("new")
    for seed in seeds:
        records += [record("adalora", base(seed), seed=seed), record("new", losses(seed), seed=seed, **rest)]
    return analyse(records, plan("adalora", "new"))


def test_a_baseline_shifted_by_k_steps_needs_k_steps_fewer() -> None:
    line = np.linspace(2.0, 0.0, STEPS)  # falls by one part in 199 of 2 per step
    k = 30
    ahead = line - k * 2 / (STEPS - 1)
    result = field(lambda _: ahead.tolist(), base=lambda _: line.tolist())
    base, new = of(result, "adalora"), of(result, "new")
    own = base["trials"][0]["steps_to_final"]
    # The last tenth of a line has its mean at step 190.5; smoothing at the end of the run lifts it a little.
    assert 189 < own < 190.5
    assert new["trials"][0]["steps_to_final"] == pytest.approx(own - k)
    ratio = new["against_baseline"]["steps_to_final_ratio"]
    assert ratio["mean"] == pytest.approx((own - k) / own)
    assert ratio["low"] == ratio["high"] == pytest.approx(ratio["mean"])
    assert (ratio["n"], ratio["reached"]) == (5, 5)
    assert new["against_baseline"]["final_loss_difference"]["mean"] == pytest.approx(-k * 2 / (STEPS - 1))
    assert new["against_baseline"]["auc_difference"]["mean"] == pytest.approx(-k * 2 / (STEPS - 1))
    assert base["against_baseline"] == {}


def test_ninety_percent_of_the_gain() -> None:
    line = np.linspace(2.0, 0.0, STEPS)
    trial = of(field(lambda _: line.tolist(), base=lambda _: line.tolist()), "new")["trials"][0]
    curve = np.asarray(trial["smoothed"])
    level = curve[0] - 0.9 * (curve[0] - trial["target"])
    assert np.interp(trial["steps_to_90"], np.arange(1, STEPS + 1), curve) == pytest.approx(level, abs=1e-5)
    assert trial["seconds_to_90"] == pytest.approx(0.1 * trial["steps_to_90"])


def test_pairs_are_of_one_seed() -> None:
    # Seeds differ by far more than the methods: only pairs show that every seed gains exactly 0.05.
    result = field(lambda s: [x + s - 0.05 for x in decay()], base=lambda s: [x + s for x in decay()])
    gap = of(result, "new")["against_baseline"]["final_loss_difference"]
    assert gap["low"] == pytest.approx(-0.05)
    assert gap["high"] == pytest.approx(-0.05)
    ratio = of(result, "new")["against_baseline"]["steps_to_final_ratio"]
    assert ratio["high"] < 1


def test_a_level_that_is_never_reached_counts_as_the_whole_run() -> None:
    result = field(lambda s: decay(0.5) if s <= 2 else decay(2.0))
    new = of(result, "new")
    own = of(result, "adalora")["trials"][0]["steps_to_final"]
    ratio = new["against_baseline"]["steps_to_final_ratio"]
    assert [t["steps_to_final"] is None for t in new["trials"]] == [True, True, False, False, False]
    assert (ratio["n"], ratio["reached"]) == (5, 3)
    assert ratio["values"][:2] == [pytest.approx(STEPS / own)] * 2
    assert new["summary"]["steps_to_final"]["n"] == 5
    assert new["summary"]["steps_to_final"]["reached"] == 3
    assert "reached the loss under 3 of 5 seeds only" in result["verdict"]
    assert "at least" in result["verdict"]
    assert "interval below 1:" not in result["verdict"]


def test_failed_and_missing_trials_are_left_out_and_named() -> None:
    records = search("adalora") + search("new")
    records += [record("adalora", decay(), seed=s) for s in (1, 2, 3)]
    records += [record("new", decay(2.0), seed=1), record("new", None, seed=2), record("new", decay()[:50], seed=3)]
    records += [record("new", [math.nan] * STEPS, seed=4)]
    result = analyse(records, plan("adalora", "new"))
    assert [f["trial"] for f in result["failed"]] == [f"new-lr0.002-seed{s}" for s in (2, 3, 4)]
    assert "50 losses" in result["failed"][1]["reason"]
    assert not result["complete"]
    assert result["missing"] == ["adalora-lr0.002-seed4", "adalora-lr0.002-seed5", "new-lr0.002-seed5"]
    assert of(result, "new")["against_baseline"]["steps_to_final_ratio"]["n"] == 1
    assert "partial; not yet ended: 3 trials (adalora" in result["verdict"]
    assert "left out of all means: 3 trials (new-lr0.002-seed2" in result["verdict"]
    assert "goal" in result["verdict"]
    assert "is met" not in result["verdict"]


def test_a_crash_in_the_search_of_the_rate_is_told_and_a_divergence_is_not() -> None:
    search_of = [*search("adalora"), *search("new")]
    at = next(n for n, r in enumerate(search_of) if r["contestant"] == "new")
    search_of[at] |= {"status": "failed", "reason": "OutOfMemoryError: x", "outcome": None}
    records = [*search_of, *(record(name, decay(), seed=s) for name in ("adalora", "new") for s in (1, 2))]
    told = "Crashed, so that their learning rates count as infinitely bad until the same command repeats them: 1 trial"
    assert told not in analyse(records, plan("adalora", "new", seeds=(1, 2)))["verdict"]
    search_of[at]["crashed"] = True
    assert told in analyse(records, plan("adalora", "new", seeds=(1, 2)))["verdict"]


def test_trials_at_another_rate_than_the_best_are_not_mixed_in() -> None:
    records = [*search("adalora"), record("adalora", decay(), seed=1), record("adalora", decay(3.0), seed=2, lr=0.001)]
    result = analyse(records, plan("adalora", seeds=(1, 2)))
    assert [t["seed"] for t in of(result, "adalora")["trials"]] == [1]
    assert result["missing"] == ["adalora-lr0.002-seed2"]


def test_nothing_is_there_yet() -> None:
    result = analyse([], plan("adalora", "new", seeds=(1,)))
    assert len(result["missing"]) == 2 * (3 + 1)
    assert "nothing can be compared" in result["verdict"]
    json.dumps(result, allow_nan=False)


def test_a_run_of_one_step() -> None:
    records = [record(name, [0.7], seed=s) for name in ("adalora", "new") for s in (1, 2)]
    records += [record(name, [0.7], seed=0, stage="tune") for name in ("adalora", "new")]
    result = analyse(records, plan("adalora", "new", seeds=(1, 2), steps=1) | {"lrs": [2e-3]})
    json.dumps(result, allow_nan=False)
    assert of(result, "new")["summary"]["auc"]["mean"] == pytest.approx(0.7)


def test_the_result_is_plain_json() -> None:
    result = field(lambda s: decay(1.2, s, 0.05))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["complete"]
    assert of(result, "new")["summary"]["peak_memory_bytes"]["mean"] == 3 * 2**28


# -------------------------------------------------------------------- the verdict


def test_verdict_on_a_winner() -> None:
    text = field(lambda s: decay(1.5, s, 0.01), base=lambda s: decay(1.0, s, 0.01))["verdict"]
    assert "The strongest of 1 contestant against the baseline (ADALORA) is NEW" in text
    assert "is met by NEW" in text
    assert "interval below 1: NEW 0.6" in text
    assert "One of the 200 held-out rows is 0.50 points" in text
    assert "partial" not in text


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ({"step_seconds": 0.11}, "a step takes 10 % more time"),
        ({"metric": 0.7}, "accuracy is worse beyond the interval"),
    ],
)
def test_speed_alone_does_not_meet_the_goal(rest: dict[str, Any], reason: str) -> None:
    text = field(lambda s: decay(1.5), **rest)["verdict"]
    assert f"is not met: {reason}." in text


@pytest.mark.parametrize(("share", "told"), [(None, True), (0.04, True), (0.63, False)])
def test_times_of_trials_beside_others_are_no_times(share: float | None, told: bool) -> None:
    result = field(lambda s: decay(1.5), step_seconds=0.11, waited_share=share)
    text = result["verdict"]
    assert ("10 % more time" in text) == ("1.10 times the time per step" in text) == told
    assert ("is not met: its time per step cannot be told." in text) == (not told)
    assert ("trials waited for one up to 63 % of their time" in text) == (not told)
    assert ("waited for a processor" in comparison_page(result)) == (share is not None)


def test_what_an_older_result_says_of_its_times() -> None:
    result = field(lambda s: decay(1.5), step_seconds=0.11) | {"times": "tests ran beside"}
    assert "not met: its time per step cannot be told." in (text := verdict(result))
    assert text.count("Times say little: tests ran beside.") == 1


def test_verdict_on_a_small_gain_a_tie_and_a_loser() -> None:
    small = field(lambda s: decay(1.1))["verdict"]
    assert "is not met: it takes 9" in small
    assert "interval below 1: NEW 0.9" in small
    tie = field(lambda s: decay(1.0))["verdict"]
    assert "Neither fewer nor more steps within the interval: NEW 1.00 (1.00 to 1.00)" in tie
    bounded = field(lambda s: decay(1.1 if s % 2 else 0.95))["verdict"]
    assert "NEW: it takes at most 3" in bounded
    assert "as some seeds never reached the loss: NEW at least 0.9" in bounded
    assert re.search(r"NEW at least 0\.9\d \(from 0\.9\d; reached under 3 of 5 seeds\)", bounded), "no upper end"
    assert "within the interval" not in bounded
    loser = field(lambda s: decay(0.7))["verdict"]
    assert "NEW: it takes at least 5.3 % more steps" in loser
    assert "interval above 1: NEW at least 1.0" in loser
    assert "reached under 0 of 5 seeds" in loser


def test_verdict_on_one_seed() -> None:
    records = [*search("adalora"), *search("new"), record("adalora", decay()), record("new", decay(1.5))]
    text = analyse(records, plan("adalora", "new", seeds=(1,)))["verdict"]
    assert "is not met: one seed gives no interval of its step ratio." in text
    assert "Whether in fewer or more steps, one seed does not tell: NEW 0.6" in text
    assert "within the interval" not in text
    assert "reaches 1" not in text


@pytest.mark.parametrize(("metric", "differs"), [(0.795, False), (0.805, False), (0.79, True), (0.81, True)])
def test_one_held_out_row_under_every_seed_is_no_difference(metric: float, differs: bool) -> None:
    text = field(lambda s: decay(1.5), metric=metric)["verdict"]
    assert ("accuracy beyond the interval" in text) == differs
    assert ("is met by NEW" in text) == (metric != 0.79)


def test_verdict_names_better_metrics_and_contestants_at_the_edge() -> None:
    records = search("adalora") + search("new")[:2]
    for s in range(1, 6):
        records += [record("adalora", decay(), seed=s), record("new", decay(), seed=s, metric=0.82)]
    text = analyse(records, plan("adalora", "new") | {"lrs": [1e-3, 2e-3]})["verdict"]
    assert "Better accuracy beyond the interval: NEW +2.00 points" in text
    assert "NEW (the highest, 0.002)" in text


def test_verdict_when_lower_is_better() -> None:
    records = search("adalora") + search("new")
    for s in range(1, 6):
        records += [record("adalora", decay(), seed=s, metric=1.5), record("new", decay(1.5), seed=s, metric=1.7)]
    for r in records:
        r["outcome"] |= {"metric": "held_out_loss", "higher_is_better": False}
    text = analyse(records, plan("adalora", "new"))["verdict"]
    assert "held-out loss is worse beyond the interval" in text
    assert "points" not in text
    assert text.count("Worse held-out loss beyond the interval: NEW +0.2000") == 1


@pytest.mark.parametrize(("loss", "word"), [(0.25, "Worse"), (0.15, "Better")])
def test_verdict_tells_the_held_out_loss_beside_another_metric(loss: float, word: str) -> None:
    records = search("adalora") + search("new")
    for s in range(1, 6):
        new = record("new", decay(1.5), seed=s)
        new["outcome"] |= {"held_out_loss_after": loss + 0.001 * s}
        records += [record("adalora", decay(), seed=s), new]
    text = analyse(records, plan("adalora", "new"))["verdict"]
    gap = f"{loss + 0.003 - 0.2:+.4f}".replace("-", "−")
    assert f"{word} held-out loss beyond the interval: NEW {gap} (" in text
    assert text.count("held-out loss") == 1
    assert "is met by NEW" in text, "the goal is about the metric"
    assert "held-out loss" not in field(lambda s: decay(1.5))["verdict"]


def test_a_claim_needs_students_interval_as_well() -> None:
    """One seed of five differs far more than the others: the bootstrap interval leaves out 1 and 0, Student's not."""
    records = search("adalora") + search("new")
    for s in range(1, 6):
        odd = s == 5
        records += [
            record("adalora", decay(), seed=s),
            record("new", decay(6.0 if odd else 1.3), seed=s, metric=0.9 if odd else 0.81),
        ]
    result = analyse(records, plan("adalora", "new"))
    against, text = of(result, "new")["against_baseline"], result["verdict"]
    assert against["steps_to_final_ratio"]["mean"] < 0.8
    assert against["steps_to_final_ratio"]["high"] < 0.95
    assert against["metric_difference"]["low"] > 0.005
    assert re.search(r"is not met: Student's t interval of its step ratio reaches 1 \(0\.\d\d to 1\.\d\d\)\.", text)
    assert "interval below 1:" not in text
    item = r"NEW 0\.\d\d \(0\.\d\d to 0\.\d\d, by Student's t 0\.\d\d to 1\.\d\d\)"
    assert re.search(f"Neither fewer nor more steps within the interval: {item}", text)
    assert "accuracy beyond the interval" not in text
    split = "Neither better nor worse accuracy, as only one interval leaves out 0: NEW +2.80 points (1.00 to "
    assert split in text
    assert ", by Student's t −" in text[text.index(split) :]
    assert "Neither better nor worse held-out loss, as only one interval leaves out 0: NEW −0.0280" in text


def test_a_metric_that_is_worse_by_one_of_the_intervals_keeps_from_the_goal() -> None:
    records = search("adalora") + search("new")
    for s in range(1, 6):
        new = record("new", decay(1.5), seed=s, metric=0.7 if s == 5 else 0.79)
        records += [record("adalora", decay(), seed=s), new]
    text = analyse(records, plan("adalora", "new"))["verdict"]
    assert "is not met: accuracy is worse beyond one of its two intervals." in text
    assert "Worse accuracy" not in text


def test_more_steps_are_claimed_by_both_intervals_only() -> None:
    """The baseline's curve of one seed ends flat, so that its ratio is far above the others'."""
    flat = np.maximum(decay(2.0), decay(2.0)[80]).tolist()
    text = field(lambda s: decay(0.5), base=lambda s: flat if s == 5 else decay())["verdict"]
    assert "interval above 1:" not in text
    assert re.search(
        r"never reached the loss: NEW at least 1\.\d\d \(from 1\.\d\d, by Student's t from 0\.\d\d; reached", text
    )


def test_what_misses_a_goal_does_not_read_as_if_it_met_it() -> None:
    assert change(0.803, "fewer", "as many") == change(0.8, "fewer", "as many", 0.8) == "20 % fewer"
    assert change(0.803, "fewer", "as many", 0.8) == "19.7 % fewer"
    assert change(0.797, "fewer", "as many", 0.8) == "20.3 % fewer"
    assert change(1.0304, "less", "as much", 1.03) == "3.04 % more"
    result = field(lambda s: decay(1.4))
    of(result, "new")["against_baseline"]["steps_to_final_ratio"]["mean"] = 0.803
    of(result, "new")["against_baseline"]["seconds_per_step_ratio"]["mean"] = 1.0304
    text = verdict(result)
    assert "is not met: it takes 19.7 % fewer steps; a step takes 3.04 % more time." in text
    assert "NEW: it takes 19.7 % fewer steps" in text
