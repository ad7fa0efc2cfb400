"""The verdict of a study: one plain paragraph made from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyperlora.effects import show
from hyperlora.verdict import BUSY, beyond, change, crashed, difference, number, one_row, untuned, words

#: Claims are made at this level, shared among all of a kind (Bonferroni).
LEVEL = 0.05


def matters(effect: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """A knob whose levels differ beyond chance, with as many knobs as were tried."""
    return effect["p"] is not None and effect["p"] * len(result["effects"]) < LEVEL


def verdict(result: Mapping[str, Any]) -> str:
    """Which knob matters, the recommended setting, whether dynamic rank pays, and what is missing."""
    sentences = []
    if result["missing"]:
        sentences.append(f"This result is partial: {len(result['missing'])} trials have not ended.")
    left_out = [f for f in result["failed"] if f.get("stage") != "tune"]
    if left_out:
        sentences.append(f"{len(left_out)} trials failed and are left out.")
    sentences += crashed(result["failed"])
    if result["recommended"] is None:
        return " ".join([*sentences, "No trial has finished, so that nothing can be said."])
    sentences += [_knobs(result), *_together(result), _setting(result), _dynamic(result), _untuned(result)]
    stability = result["rank_stability"]
    if stability["mean"] is not None:
        sentences.append(
            f"Between seeds the modules' final ranks correlate with ρ = {number(stability['mean'])} on average."
        )
    if result["share"]:
        sentences.append(one_row(result["held_out_rows"]))
    return " ".join(s for s in sentences if s)


def _knobs(result: Mapping[str, Any]) -> str:
    effects = [e for e in result["effects"] if e["effect"]["mean"] is not None]
    if not effects:
        return "Too few points have finished to tell the knobs apart."
    effects = sorted(effects, key=lambda e: -e["effect"]["mean"])
    strong = [e for e in effects if matters(e, result)]
    metric = words(result["metric"])
    if all(e["p"] is None for e in effects):
        return (
            f"The points leave no noise by which a knob's change of {metric} could be told from chance; the largest "
            f"difference is that of {_effect(effects[0], result)}."
        )
    if not strong:
        return (
            f"No knob changes {metric} beyond chance; the largest difference is that of {_effect(effects[0], result)}."
        )
    rest = [e["label"] for e in effects if e not in strong]
    text = f"What matters for {metric}: " + "; ".join(_effect(e, result) for e in strong) + "."
    return text + (f" No effect beyond chance: {', '.join(rest)}." if rest else "")


def _effect(e: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    share = result["importances"].get(e["key"])
    explained = f", {100 * share['mean']:.0f} % of the variance by fANOVA" if share else ""
    size = difference(e["effect"], result["share"]).removeprefix("+").replace("one seed, no interval", "no interval")
    return f"{e['label']}, {size} between {e['effect']['from']} and {e['effect']['to']}{explained}"


def _together(result: Mapping[str, Any]) -> list[str]:
    pairs = result["interactions"]
    strong = [i for i in pairs if i["p"] is not None and i["p"] * len(pairs) < LEVEL]
    if not strong:
        return []
    return ["Not independent of each other: " + "; ".join(f"{i['a']} and {i['b']}" for i in strong) + "."]


def _setting(result: Mapping[str, Any]) -> str:
    chosen = result["recommended"]
    labels = {p["key"]: p["label"] for p in result["parameters"]}
    values = ", ".join(f"{labels[key]} {show(value)}" for key, value in chosen["values"].items())
    (point,) = (p for p in result["points_measured"] if p["point"] == chosen["point"])
    text = (
        f"Recommended: {values}, with {words(result['metric'])} {level(point['mean'], result)} over {point['n']} seed"
    )
    text += "s" if point["n"] > 1 else ""
    if chosen["compared"]:
        text += f"; {len(chosen['alike'])} of the {chosen['compared']} other points cannot be told from it"
    return text + "."


def _dynamic(result: Mapping[str, Any]) -> str:
    found, reference = result["dynamic_rank"], result["reference_measured"]
    if reference is None:
        return ""
    if reference["failed"]:
        return f"{reference['label']} failed, so that nothing can be said of dynamic rank."
    if not reference["by_seed"]:
        return f"{reference['label']} has not finished: no word on dynamic rank yet."
    if found is None:
        return "Whether dynamic rank pays is not told: one seed has to choose the setting that another one judges."
    gap, higher = found["chosen"], result["higher_is_better"]
    if gap["low"] is None:
        claim = "One seed does not tell whether dynamic rank pays"
    elif not beyond(gap, 1 / result["held_out_rows"] if result["share"] else 0.0):
        claim = "That dynamic rank pays on this task is not shown"
    elif (gap["mean"] > 0) == higher:
        claim = "Dynamic rank pays on this task"
    else:
        claim = "Dynamic rank does not pay on this task"
    return (
        f"{claim}: against {reference['label']} (learning rate {reference['lr']:g}, chosen by training loss), whose "
        f"final adapter is {number(1 / found['size_ratio'])} times as large, the setting that the other seeds chose "
        f"differs by {difference(gap, result['share'])}, and the average point by "
        f"{difference(found['typical'], result['share'])}; {_time(found)}.{_rates(result)}"
    )


def _time(found: Mapping[str, Any]) -> str:
    # Results of earlier versions do not know how long their trials waited.
    if (share := found.get("waited_share", 0.0)) > BUSY:
        return (
            f"the time of a step cannot be told, as trials waited for a processor up to {100 * share:.0f} % of theirs"
        )
    return f"a step takes {change(found['time_ratio'], 'less', 'as much')} time"


def _rates(result: Mapping[str, Any]) -> str:
    """What makes the comparison with LoRA one of unequals."""
    if any(p["key"] == "optimizer.lr" for p in result["parameters"]):
        return ""
    return (
        f" The points keep the recipe's learning rate, {result['recipe']['optimizer']['lr']:g}; only LoRA's was chosen."
    )


def _untuned(result: Mapping[str, Any]) -> str:
    reference = result["reference_measured"]
    # Results of earlier versions do not know the edge.
    if reference is None or not reference["by_seed"] or reference.get("edge") is None:
        return ""
    return untuned(f"{reference['label']} (the {reference['edge']}est, {reference['lr']:g})")


def level(value: float, result: Mapping[str, Any]) -> str:
    """A value of the metric for people."""
    return f"{number(100 * value, 1)} %" if result["share"] else number(value, 4)
