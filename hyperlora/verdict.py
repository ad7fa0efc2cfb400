"""The verdict of a comparison: one plain paragraph made from its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Contestant = Mapping[str, Any]

# The goal: at least 20 % fewer steps, at most 3 % more time per step, held-out metric not worse.
STEPS_GOAL, TIME_GOAL = 0.8, 1.03
STEPS, TIME, METRIC = "steps_to_final_ratio", "seconds_per_step_ratio", "metric_difference"


def all_reached(entry: Mapping[str, Any]) -> bool:
    """Whether the level of a mean was reached under every seed, if it is of a level: else it is a lower bound."""
    return "reached" not in entry or entry["reached"] == entry["n"]


def needs_fewer(c: Contestant) -> bool:
    """The interval of the step ratio lies below 1 as shown, and the baseline's loss was reached under every seed."""
    s = c["against_baseline"][STEPS]
    return s["high"] is not None and round(s["high"], 2) < 1 and all_reached(s)


def needs_more(c: Contestant) -> bool:
    """The interval of the step ratio lies above 1 as shown; unreached trials are lower bounds, so that this is safe."""
    low = c["against_baseline"][STEPS]["low"]
    return low is not None and round(low, 2) > 1


def beyond(gap: Mapping[str, Any], row: float) -> bool:
    """Whether a difference's interval leaves out 0, and the difference is more than that of one held-out row.

    Differences that are alike under all seeds have an interval without width, and may be one row's.

    Args:
        gap: ``mean``, ``low`` and ``high``.
        row: what one held-out row makes of the metric; 0 for a metric that does not count rows.
    """
    return gap["low"] is not None and not gap["low"] <= 0 <= gap["high"] and abs(gap["mean"]) > row * (1 + 1e-9)


def metric_side(c: Contestant, result: Mapping[str, Any]) -> int:
    """1 when the held-out metric is better beyond its interval and one row, -1 when it is worse, 0 when neither."""
    m, higher = c["against_baseline"][METRIC], result["higher_is_better"]
    if not beyond(m, 1 / result["held_out_rows"] if higher else 0.0):
        return 0
    return 1 if (m["mean"] > 0) == higher else -1


def shortfalls(c: Contestant, result: Mapping[str, Any]) -> list[str]:
    """What keeps a contestant from the goal; empty when it meets it."""
    steps, time = c["against_baseline"][STEPS], c["against_baseline"][TIME]
    planned = len(result["seeds"])
    found = []
    if steps["mean"] > STEPS_GOAL:
        found.append(f"it takes {_steps(steps)} steps")
    if steps["high"] is None:
        found.append("one seed gives no interval of its step ratio")
    elif round(steps["high"], 2) >= 1:
        found.append("the interval of its step ratio reaches 1")
    if not all_reached(steps):
        found.append(f"it reached the loss under {steps['reached']} of {steps['n']} seeds only")
    if steps["n"] < planned:
        found.append(f"{steps['n']} of {planned} seeds are there")
    if metric_side(c, result) < 0:
        found.append(f"{words(result['metric'])} is worse beyond the interval")
    if time["mean"] > TIME_GOAL:
        found.append(f"a step takes {change(time['mean'], 'less', 'as much')} time")
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
        return bool(shortfalls(c, result)), metric_side(c, result) < 0, not all_reached(s), s["mean"]

    rivals = sorted(rivals, key=order)
    best = rivals[0]
    steps, time, gap = (best["against_baseline"][key] for key in (STEPS, TIME, METRIC))
    lacks = shortfalls(best, result)
    sentences = [
        f"The strongest of {len(rivals)} contestant{'s' if len(rivals) > 1 else ''} against the baseline "
        f"({base['label']}) is "
        f"{best['label']}: it takes {_steps(steps)} steps to the baseline's own final "
        f"training loss (ratio {_ratio(steps)}), its {metric} differs by {difference(gap, higher)}, and a step takes "
        f"{change(time['mean'], 'less', 'as much')} time (ratio {_ratio(time)}).",
        "The goal (at least 20 % fewer steps, held-out metric not worse, at most 3 % more time per step) is "
        + (
            f"not met: {'; '.join(lacks)}."
            if lacks
            else f"met by {_names(c for c in rivals if not shortfalls(c, result))}."
        ),
    ]
    fewer = [c for c in rivals if needs_fewer(c)]
    more = [c for c in rivals if needs_more(c)]
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
            sentences.append(text + "; ".join(_item(c) for c in group) + ".")
    for side, word in ((-1, "Worse"), (1, "Better")):
        group = [c for c in rivals if metric_side(c, result) == side]
        if group:
            items = "; ".join(f"{c['label']} {difference(c['against_baseline'][METRIC], higher)}" for c in group)
            sentences.append(f"{word} {metric} beyond the interval: {items}.")
    if higher:
        sentences.append(one_row(result["held_out_rows"]))
    return sentences


def _warnings(result: Mapping[str, Any]) -> list[str]:
    sentences = []
    at_edge = [c for c in result["contestants"] if c["edge"] is not None and c["best_lr"] is not None]
    if at_edge:
        rates = "; ".join(f"{c['label']} (the {c['edge']}est, {c['best_lr']:g})" for c in at_edge)
        sentences.append(untuned(rates))
    hopeless = [c for c in result["contestants"] if c["search"] and c["best_lr"] is None]
    if hopeless:
        sentences.append(f"Failed at every learning rate: {_names(hopeless)}.")
    crashed = [f["trial"] for f in result["failed"] if f.get("crashed") and f["stage"] == "tune"]
    if crashed:
        sentences.append(
            f"Crashed, so that their learning rates count as infinitely bad until the same command repeats them: "
            f"{_some(crashed)}."
        )
    failed = [f["trial"] for f in result["failed"] if f["stage"] == "report"]
    if failed:
        sentences.append(f"Failed at the chosen rate, and left out of all means: {_some(failed)}.")
    return sentences


# -------------------------------------------------------------------- numbers in words


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


def change(ratio: float, less: str, equal: str) -> str:
    """A ratio as a change: ``28 % fewer``, ``3.1 % more``, or ``equal``."""
    percent = round(abs(100 * (ratio - 1)), 1)
    if not percent:
        return equal
    return f"{percent:.{0 if percent >= 10 else 1}f} % {less if ratio < 1 else 'more'}"


def _steps(ratio: Mapping[str, Any]) -> str:
    """A ratio of steps as a change; of a lower bound, which way it is one."""
    text = change(ratio["mean"], "fewer", "as many")
    if all_reached(ratio):
        return text
    return f"{'at most' if text.endswith('fewer') else 'at least'} {text}"


def difference(entry: Mapping[str, Any], points: bool) -> str:
    """A difference of a metric with its interval: in points for shares of right rows, else as it is."""
    scale, digits, unit = (100, 2, " points") if points else (1, 4, "")
    mean = f"{'+' if entry['mean'] > 0 else ''}{number(scale * entry['mean'], digits)}{unit}"
    return f"{mean} ({_range(entry, scale, digits)})"


def _range(entry: Mapping[str, Any], scale: float = 1, digits: int = 2) -> str:
    if entry["low"] is None:
        return "one seed, no interval"
    if not all_reached(entry):
        return f"from {number(scale * entry['low'], digits)}"
    return f"{number(scale * entry['low'], digits)} to {number(scale * entry['high'], digits)}"


def _ratio(entry: Mapping[str, Any]) -> str:
    bound = "" if all_reached(entry) else "at least "
    return f"{bound}{number(entry['mean'])}, 95 % interval {_range(entry)}, n = {entry['n']}"


def _item(c: Contestant) -> str:
    s, t = c["against_baseline"][STEPS], c["against_baseline"][TIME]
    seeds = "" if all_reached(s) else f"; reached under {s['reached']} of {s['n']} seeds"
    return (
        f"{c['label']} {'at least ' if seeds else ''}{number(s['mean'])} ({_range(s)}{seeds}) "
        f"at {number(t['mean'])} times the time per step"
    )


def _names(contestants: Any) -> str:
    return ", ".join(c["label"] for c in contestants)


def _some(trials: Sequence[str]) -> str:
    shown = ", ".join(trials[:4]) + (", …" if len(trials) > 4 else "")
    return f"{len(trials)} trial{'s' if len(trials) > 1 else ''} ({shown})"
