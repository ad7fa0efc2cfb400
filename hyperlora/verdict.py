"""The verdict of a comparison: one plain paragraph made from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hyperlora.effects import mean_interval

Contestant = Mapping[str, Any]

# The goal: at least 20 % fewer steps, at most 3 % more time per step, held-out metric not worse.
STEPS_GOAL, TIME_GOAL = 0.8, 1.03
#: Share of their steps' time that trials may wait for a processor before their times are none of theirs.
BUSY = 0.05
STEPS, TIME, METRIC = "steps_to_final_ratio", "seconds_per_step_ratio", "metric_difference"
LOSS, LOSS_DIFFERENCE = "held_out_loss", "held_out_loss_difference"


def all_reached(entry: Mapping[str, Any]) -> bool:
    """Whether the level of a mean was reached under every seed, if it is of a level: else it is a lower bound."""
    return "reached" not in entry or entry["reached"] == entry["n"]


def student(values: Sequence[float], *, ratios: bool = False) -> dict[str, Any]:
    """Mean over seeds with Student's t interval, of ratios that of their logarithms; none below two values."""
    found = mean_interval(values)
    if ratios and len(values) > 1:
        logs = mean_interval([math.log(v) for v in values])
        found |= {side: math.exp(logs[side]) for side in ("low", "high")}
    return found


def _by_t(entry: Mapping[str, Any], *, ratios: bool = False) -> dict[str, Any]:
    """A ratio or difference with Student's t interval over the same seeds instead of its own.

    The bootstrap interval of five seeds is too narrow for a claim (see :func:`hyperlora.comparison.interval`): what is
    claimed is what both show.
    """
    return student(entry["values"], ratios=ratios) | {"reached": entry["reached"]}


def step_sides(c: Contestant) -> tuple[int, int]:
    """Where the step ratio's interval lies as shown, and where Student's t interval does.

    1 below 1, when the baseline's loss was reached under every seed; -1 above 1, where trials that never reached it are
    lower bounds, so that this is safe; 0 neither.
    """

    def side(s: Mapping[str, Any]) -> int:
        if s["high"] is None:
            return 0
        if round(s["high"], 2) < 1 and all_reached(s):
            return 1
        return -1 if round(s["low"], 2) > 1 else 0

    shown = c["against_baseline"][STEPS]
    return side(shown), side(_by_t(shown, ratios=True))


def beyond(gap: Mapping[str, Any], row: float) -> bool:
    """Whether a difference's interval leaves out 0, and the difference is more than that of one held-out row.

    Differences that are alike under all seeds have an interval without width, and may be one row's.

    Args:
        gap: ``mean``, ``low`` and ``high``.
        row: what one held-out row makes of the metric; 0 for a metric that does not count rows.
    """
    return gap["low"] is not None and not gap["low"] <= 0 <= gap["high"] and abs(gap["mean"]) > row * (1 + 1e-9)


def gap_sides(c: Contestant, result: Mapping[str, Any], key: str = METRIC) -> tuple[int, int]:
    """Whether a held-out difference is better by its interval as shown, and by Student's t interval.

    1 when it is better beyond the interval and one row, -1 when it is worse, 0 when neither.
    """
    shown, higher = c["against_baseline"][key], key == METRIC and result["higher_is_better"]
    row = 1 / result["held_out_rows"] if higher else 0.0
    side = 1 if (shown["mean"] > 0) == higher else -1
    return side * beyond(shown, row), side * beyond(_by_t(shown), row)


def waited_share(result: Mapping[str, Any]) -> float | None:
    """The largest share of its steps' time that a reported trial waited for a processor; None where nobody counted."""
    shares = [t.get("waited_share") for c in result["contestants"] for t in c["trials"]]
    return max((share for share in shares if share is not None), default=None)


def busy(result: Mapping[str, Any]) -> bool:
    """Whether others were at work beside the trials, so that times say little; older results say so under ``times``."""
    return "times" in result or (waited_share(result) or 0.0) > BUSY


def shortfalls(c: Contestant, result: Mapping[str, Any]) -> list[str]:
    """What keeps a contestant from the goal; empty when it meets it."""
    steps, time = c["against_baseline"][STEPS], c["against_baseline"][TIME]
    planned = len(result["seeds"])
    by_t = _by_t(steps, ratios=True)
    sides = gap_sides(c, result)
    found = []
    if steps["mean"] > STEPS_GOAL:
        found.append(f"it takes {_steps(steps)} steps")
    if steps["high"] is None:
        found.append("one seed gives no interval of its step ratio")
    elif round(steps["high"], 2) >= 1:
        found.append("the interval of its step ratio reaches 1")
    elif round(by_t["high"], 2) >= 1:
        found.append(f"Student's t interval of its step ratio reaches 1 ({_range(by_t)})")
    if not all_reached(steps):
        found.append(f"it reached the loss under {steps['reached']} of {steps['n']} seeds only")
    if steps["n"] < planned:
        found.append(f"{steps['n']} of {planned} seeds are there")
    # Here one interval is enough: to ask for both would make the goal easier to meet.
    if -1 in sides:
        which = "the interval" if sides == (-1, -1) else "one of its two intervals"
        found.append(f"{words(result['metric'])} is worse beyond {which}")
    if busy(result):
        found.append("its time per step cannot be told")
    elif time["mean"] > TIME_GOAL:
        found.append(f"a step takes {_time(time)} time")
    return found


def verdict(result: Mapping[str, Any]) -> str:
    """What the comparison shows, what it does not show, and what is missing, in one paragraph."""
    base = next(c for c in result["contestants"] if c["name"] == result["baseline"])
    rivals = [c for c in result["contestants"] if c is not base and _compared(c)]
    sentences: list[str] = []
    if not result["complete"]:
        sentences.append(f"This result is partial; not yet ended: {_some(result['missing'])}.")
    if not base["trials"]:
        sentences.append(f"No trial of {base['label']}, the baseline, has finished, so that nothing can be compared.")
    elif not rivals:
        sentences.append(f"No contestant shares a finished seed with {base['label']}, so that nothing can be compared.")
    else:
        sentences += _findings(base, rivals, result)
    return " ".join(sentences + _warnings(result))


def _compared(c: Contestant) -> bool:
    return bool(c["against_baseline"]) and c["against_baseline"][STEPS]["n"] > 0


def _findings(base: Contestant, rivals: Sequence[Contestant], result: Mapping[str, Any]) -> list[str]:
    metric, higher = words(result["metric"]), result["higher_is_better"]

    def order(c: Contestant) -> tuple[bool, bool, bool, float]:
        s = c["against_baseline"][STEPS]
        return bool(shortfalls(c, result)), gap_sides(c, result) == (-1, -1), not all_reached(s), s["mean"]

    rivals = sorted(rivals, key=order)
    best = rivals[0]
    steps, time, gap = (best["against_baseline"][key] for key in (STEPS, TIME, METRIC))
    lacks = shortfalls(best, result)
    sentences = [
        f"The strongest of {len(rivals)} contestant{'s' if len(rivals) > 1 else ''} against the baseline "
        f"({base['label']}) is "
        f"{best['label']}: it takes {_steps(steps)} steps to the baseline's own final "
        f"training loss (ratio {_ratio(steps)}), "
        + (
            f"and its {metric} differs by {difference(gap, higher)}."
            if busy(result)
            else f"its {metric} differs by {difference(gap, higher)}, and a step takes {_time(time)} time "
            f"(ratio {_ratio(time)})."
        ),
        "The goal (at least 20 % fewer steps, held-out metric not worse, at most 3 % more time per step) is "
        + (
            f"not met: {'; '.join(lacks)}."
            if lacks
            else f"met by {_names(c for c in rivals if not shortfalls(c, result))}."
        ),
    ]
    fewer = [c for c in rivals if step_sides(c) == (1, 1)]
    more = [c for c in rivals if step_sides(c) == (-1, -1)]
    single = [c for c in rivals if c["against_baseline"][STEPS]["high"] is None]
    bounded = [c for c in rivals if not all_reached(c["against_baseline"][STEPS]) and c not in more and c not in single]
    open_ = [c for c in rivals if c not in fewer and c not in more and c not in single and c not in bounded]
    for group, text in (
        (fewer, "Fewer steps than the baseline, with the interval below 1: "),
        (open_, "Neither fewer nor more steps within the interval: "),
        (bounded, "Neither fewer nor more steps is shown, as some seeds never reached the loss: "),
        (more, "More steps, with the interval above 1: "),
        (single, "Whether in fewer or more steps, one seed does not tell: "),
    ):
        if group:
            sentences.append(text + "; ".join(_item(c, not busy(result)) for c in group) + ".")
    sentences += _held_out(rivals, result, METRIC, metric)
    if result["metric"] != LOSS:
        sentences += _held_out(rivals, result, LOSS_DIFFERENCE, words(LOSS))
    if higher:
        sentences.append(one_row(result["held_out_rows"]))
    return sentences


def _held_out(rivals: Sequence[Contestant], result: Mapping[str, Any], key: str, name: str) -> list[str]:
    """Who is better or worse on held-out rows beyond both intervals, and who beyond one of them only."""
    points = key == METRIC and result["higher_is_better"]
    found = [(c["label"], c["against_baseline"][key], gap_sides(c, result, key)) for c in rivals]
    sentences = []
    for side, word in ((-1, "Worse"), (1, "Better")):
        items = [f"{label} {difference(gap, points)}" for label, gap, sides in found if sides == (side, side)]
        if items:
            sentences.append(f"{word} {name} beyond the interval: {'; '.join(items)}.")
    split = [f"{label} {difference(gap, points, _by_t(gap))}" for label, gap, (a, b) in found if a != b]
    if split:
        sentences.append(f"Neither better nor worse {name}, as only one interval leaves out 0: {'; '.join(split)}.")
    return sentences


def _warnings(result: Mapping[str, Any]) -> list[str]:
    sentences = []
    if busy(result):
        counted = "others, or more trials than processors, were at work, and trials waited for one up to "
        counted += f"{100 * (waited_share(result) or 0):.0f} % of their time"
        sentences.append(f"Times say little: {result.get('times', counted)}.")
    at_edge = [c for c in result["contestants"] if c["edge"] is not None and c["best_lr"] is not None]
    if at_edge:
        rates = "; ".join(f"{c['label']} (the {c['edge']}est, {c['best_lr']:g})" for c in at_edge)
        sentences.append(untuned(rates))
    hopeless = [c for c in result["contestants"] if c["search"] and c["best_lr"] is None]
    if hopeless:
        sentences.append(f"Failed at every learning rate: {_names(hopeless)}.")
    sentences += crashed(result["failed"])
    failed = [f["trial"] for f in result["failed"] if f["stage"] == "report"]
    if failed:
        sentences.append(f"Failed at the chosen rate, and left out of all means: {_some(failed)}.")
    return sentences


# -------------------------------------------------------------------- numbers in words


def crashed(failed: Sequence[Mapping[str, Any]]) -> list[str]:
    """That trials which chose a learning rate crashed, if some did."""
    trials = [f["trial"] for f in failed if f.get("crashed") and f["stage"] == "tune"]
    if not trials:
        return []
    return [
        f"Crashed, so that their learning rates count as infinitely bad until the same command repeats them: "
        f"{_some(trials)}."
    ]


def untuned(rates: str) -> str:
    """That a search of the learning rate ended at an edge; ``rates`` says whose."""
    return f"Not tuned to the end, since the best learning rate is the last one tried: {rates}."


def number(value: float, digits: int = 2) -> str:
    """Fixed decimals with a true minus sign, and none before zero."""
    return f"{value:z.{digits}f}".replace("-", "−")


def one_row(rows: int) -> str:
    """What one held-out row is worth, for people."""
    return f"One of the {rows:,} held-out rows is {number(100 / rows)} points; a difference of one row or less is none."


def words(metric: str) -> str:
    """A metric's name as prose has it."""
    return metric.replace("_", " ").replace("held out", "held-out")


def change(ratio: float, less: str, equal: str, goal: float | None = None) -> str:
    """A ratio as a change: ``28 % fewer``, ``3.1 % more``, or ``equal``; never as large as a goal that it is not."""
    percent = abs(100 * (ratio - 1))
    if not round(percent, 1):
        return equal
    digits = 0 if round(percent, 1) >= 10 else 1
    of_goal = percent if goal is None else abs(100 * (goal - 1))
    while not math.isclose(percent, of_goal) and f"{percent:.{digits}f}" == f"{of_goal:.{digits}f}":
        digits += 1
    return f"{percent:.{digits}f} % {less if ratio < 1 else 'more'}"


def _steps(ratio: Mapping[str, Any]) -> str:
    """A ratio of steps as a change; of a lower bound, which way it is one."""
    text = change(ratio["mean"], "fewer", "as many", STEPS_GOAL)
    if all_reached(ratio):
        return text
    return f"{'at most' if text.endswith('fewer') else 'at least'} {text}"


def _time(ratio: Mapping[str, Any]) -> str:
    """A ratio of times of a step as a change."""
    return change(ratio["mean"], "less", "as much", TIME_GOAL)


def difference(entry: Mapping[str, Any], points: bool, by_t: Mapping[str, Any] | None = None) -> str:
    """A difference of a metric with its interval, or both: in points for shares of right rows, else as it is."""
    scale, digits, unit = (100, 2, " points") if points else (1, 4, "")
    mean = f"{'+' if entry['mean'] > 0 else ''}{number(scale * entry['mean'], digits)}{unit}"
    other = "" if by_t is None else f", by Student's t {_range(by_t, scale, digits)}"
    return f"{mean} ({_range(entry, scale, digits)}{other})"


def _range(entry: Mapping[str, Any], scale: float = 1, digits: int = 2) -> str:
    if entry["low"] is None:
        return "one seed, no interval"
    if not all_reached(entry):
        return f"from {number(scale * entry['low'], digits)}"
    return f"{number(scale * entry['low'], digits)} to {number(scale * entry['high'], digits)}"


def _ratio(entry: Mapping[str, Any]) -> str:
    bound = "" if all_reached(entry) else "at least "
    return f"{bound}{number(entry['mean'])}, 95 % interval {_range(entry)}, n = {entry['n']}"


def _item(c: Contestant, timed: bool) -> str:
    s, t = c["against_baseline"][STEPS], c["against_baseline"][TIME]
    seeds = "" if all_reached(s) else f"; reached under {s['reached']} of {s['n']} seeds"
    shown, by_t = step_sides(c)
    other = "" if shown == by_t else f", by Student's t {_range(_by_t(s, ratios=True))}"
    found = f"{c['label']} {'at least ' if seeds else ''}{number(s['mean'])} ({_range(s)}{other}{seeds})"
    return f"{found} at {number(t['mean'])} times the time per step" if timed else found


def _names(contestants: Any) -> str:
    return ", ".join(c["label"] for c in contestants)


def _some(trials: Sequence[str]) -> str:
    shown = ", ".join(trials[:4]) + (", …" if len(trials) > 4 else "")
    return f"{len(trials)} trial{'s' if len(trials) > 1 else ''} ({shown})"
