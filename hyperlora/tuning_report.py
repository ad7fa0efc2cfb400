"""What a search by a sampler found: its result as plain JSON, its verdict, and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from matplotlib.figure import Figure

from hyperlora.comparison import Record
from hyperlora.effects import show
from hyperlora.importance import importances
from hyperlora.page import INK, PALETTE, figure, page, section, significant
from hyperlora.study import front, measured, row
from hyperlora.study_page import gaps, provenance, table
from hyperlora.study_verdict import level
from hyperlora.verdict import words

PLAN = ("name", "command", "space", "sampler", "metric", "objectives", "steps", "trials", "parameters", "recipe")
#: Trials in the page's table.
SHOWN = 20
KINDS = {"finished": "o", "stopped": "v"}


def analyse(records: Sequence[Record], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the trials of a search say; also while trials are missing.

    Args:
        records: ``trial``, ``status`` (finished, stopped, failed or running), ``reason``, ``values``, ``seed``,
            ``outcome``, ``reports`` (held-out metrics with ``step``) and ``peak_memory_bytes``.
        plan: ``name``, ``command``, ``space``, ``sampler``, ``metric``, ``objectives`` (each ``name`` and ``higher``),
            ``steps``, ``trials`` (how many), ``parameters``, ``recipe`` and ``provenance``.
    """
    metric = plan["metric"]
    finished = [r for r in records if r["status"] == "finished"]
    known: Mapping[str, Any] = next((r["outcome"] for r in finished), {})
    higher = next(o["higher"] for o in plan["objectives"] if o["name"] == metric)
    over = [r for r in records if r["status"] != "running"]
    costs = [[_cost(r["outcome"], o, metric) for o in plan["objectives"]] for r in finished]
    on_front = {r["trial"] for r, best in zip(finished, front(costs), strict=True) if best}
    best = min(zip(costs, finished, strict=True), key=lambda e: e[0], default=None)
    # Those that failed would not have gone on without early stopping.
    spent = [_steps(r, plan["steps"]) for r in over if r["status"] != "failed"]
    names = [r["trial"] for r in records if r["status"] == "running"]
    result = {key: plan[key] for key in (*PLAN, "provenance")} | {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "higher_is_better": higher,
        "share": metric in ("accuracy", "exact_match"),
        "held_out_rows": known.get("held_out_rows"),
        "missing": names,
        "complete": not names and len(over) >= plan["trials"],
        "failed": [{"trial": r["trial"], "reason": r["reason"]} for r in records if r["status"] == "failed"],
        "counts": {s: sum(r["status"] == s for r in records) for s in ("finished", "stopped", "failed", "running")},
        "best": None if best is None else {"trial": best[1]["trial"], "values": best[1]["values"]},
        "measured": [_trial(r, metric, r["trial"] in on_front, plan["steps"]) for r in records],
        "steps_spent": sum(spent),
        "steps_without_stopping": plan["steps"] * len(spent),
        "importances": importances(
            plan["parameters"], [(r["values"], measured(r["outcome"], metric)[0]) for r in finished]
        ),
    }
    if best is not None:
        result["best"]["metric"] = measured(best[1]["outcome"], metric)[0]
        result["best"]["uri"] = best[1]["outcome"]["adapter"]
    return result | {"verdict": verdict(result)}


def _cost(outcome: Mapping[str, Any], objective: Mapping[str, Any], metric: str) -> float:
    name = objective["name"]
    value = measured(outcome, metric)[0] if name == metric else float(outcome[name])
    return -value if objective["higher"] else value


def _steps(record: Record, steps: int) -> int:
    if record["status"] == "finished":
        return steps
    return int(max((r["step"] for r in record["reports"]), default=0))


def _trial(record: Record, metric: str, on_front: bool, steps: int) -> dict[str, Any]:
    flat = row({**record, "kind": "point", "point": None}, metric)
    curve = [[int(r["step"]), r[metric]] for r in record["reports"] if metric in r]
    last = flat["metric"] if flat["metric"] is not None else curve[-1][1] if curve else None
    own = {key: flat[key] for key in ("trial", "status", "reason", "rank_final", "training_seconds")}
    more = {"values": dict(record["values"]), "metric": last, "curve": curve, "front": on_front}
    return own | more | {"steps": _steps(record, steps)}


def verdict(result: Mapping[str, Any]) -> str:
    """The best setting, what the search cost and what it saved, in one paragraph."""
    counts, best = result["counts"], result["best"]
    over = counts["finished"] + counts["stopped"] + counts["failed"]
    sentences = []
    if not result["complete"]:
        sentences.append(f"This result is partial: {over} of {result['trials']} trials have ended.")
    if best is None:
        return " ".join([*sentences, "No trial has finished, so that nothing can be said."])
    labels = {p["key"]: p["label"] for p in result["parameters"]}
    values = ", ".join(f"{labels[key]} {show(value)}" for key, value in best["values"].items())
    metric = words(result["metric"])
    sentences.append(f"Best of {over} trials: {best['trial']}, {metric} {level(best['metric'], result)}, at {values}.")
    if len(result["objectives"]) > 1:
        many = sum(t["front"] for t in result["measured"])
        sentences.append(f"{many} trials lie on the front of {', '.join(_titles(result))}.")
    if counts["stopped"]:
        saved = 1 - result["steps_spent"] / result["steps_without_stopping"]
        sentences.append(f"{counts['stopped']} were stopped early, which saved {100 * saved:.0f} % of the steps.")
    if counts["failed"]:
        sentences.append(f"{counts['failed']} failed.")
    if result["importances"]:
        first = max(result["importances"], key=lambda k: result["importances"][k]["mean"])
        share = result["importances"][first]["mean"]
        sentences.append(
            f"Over the {counts['finished']} finished trials {labels[first]} explains most, {100 * share:.0f} % of the "
            "variance by fANOVA."
        )
    sentences.append("The best of many trials with one seed owes part of its lead to luck; run it under other seeds.")
    return " ".join(sentences)


def _titles(result: Mapping[str, Any]) -> list[str]:
    names = {"rank_final": "kept rank", "training_seconds": "training time"}
    return [names.get(o["name"], words(o["name"])) for o in result["objectives"]]


# -------------------------------------------------------------------- the page


def tuning_page(result: Mapping[str, Any]) -> str:
    """One self-contained HTML page of a search."""
    sections = [f'<p class="verdict">{escape(result["verdict"])}</p>', gaps(result)]
    shown = [t for t in result["measured"] if t["metric"] is not None]
    if shown:
        sections += [
            section("Trials in their order", _history(result, shown)),
            section("Held-out metric over the steps", _curves(result, shown)),
            section("Each parameter", _slices(result, shown)),
        ]
        if len(result["objectives"]) > 1 and any(t["front"] for t in shown):
            sections.append(section("Trade-offs", _trade_offs(result)))
        sections.append(section("Best trials", _best(result, shown)))
    sections.append(provenance(result))
    counts = ", ".join(f"{n} {name}" for name, n in result["counts"].items() if n)
    subtitle = (
        f"space {result['space']}, {result['sampler']}, {result['trials']} trials of {result['steps']:,} steps"
        f"{f' ({counts})' if counts else ''}; {result['created'].replace('T', ' ').replace('+00:00', ' UTC')}"
    )
    return page(f"Search: {result['name']}", subtitle, [s for s in sections if s])


def _axis(result: Mapping[str, Any]) -> tuple[float, str]:
    metric = words(result["metric"])
    return (100.0, f"{metric}, %") if result["share"] else (1.0, metric)


def _mark(axes: Any, x: float, y: float, trial: Mapping[str, Any], best: str | None) -> None:
    color = PALETTE[1] if trial["trial"] == best else PALETTE[0]
    face = color if trial["status"] == "finished" else "none"
    marker = KINDS.get(trial["status"], ".")
    axes.plot(x, y, marker, color=color, markerfacecolor=face, markersize=5)


def _history(result: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    scale, label = _axis(result)
    better = max if result["higher_is_better"] else min
    best = result["best"] and result["best"]["trial"]

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots()
        lead: list[float] = []
        for n, trial in enumerate(shown, 1):
            _mark(axes, n, scale * trial["metric"], trial, best)
            if trial["status"] == "finished":
                lead.append(trial["metric"] if not lead else better(lead[-1], trial["metric"]))
            elif lead:
                lead.append(lead[-1])
        start = len(shown) - len(lead) + 1
        axes.step(range(start, start + len(lead)), [scale * v for v in lead], where="post", color=INK, linewidth=1)
        axes.set_xlabel("trial")
        axes.set_ylabel(label)

    note = "Filled: ran to its end. Hollow triangles: stopped early, at the last value. The line is the best so far."
    drawn = figure("history", f"{label} of every trial", 4.6, 3.4, draw)
    return f'<div class="one">{drawn}</div><p class="quiet">{note}</p>'


def _curves(result: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    scale, label = _axis(result)
    best = result["best"] and result["best"]["trial"]

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots()
        for trial in shown:
            if not trial["curve"]:
                continue
            chosen = trial["trial"] == best
            steps, values = zip(*trial["curve"], strict=True)
            color, alpha = (PALETTE[1], 1.0) if chosen else (PALETTE[0], 0.35)
            axes.plot(steps, [scale * v for v in values], color=color, alpha=alpha, linewidth=2 if chosen else 1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)

    return f'<div class="one">{figure("curves", f"{label} over the steps of every trial", 4.6, 3.4, draw)}</div>'


def _slices(result: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    scale, label = _axis(result)
    best = result["best"] and result["best"]["trial"]
    figures = []
    for n, p in enumerate(result["parameters"]):
        own = [t for t in shown if p["key"] in t["values"]]

        def draw(canvas: Figure, p: Mapping[str, Any] = p, own: Sequence[Mapping[str, Any]] = own) -> None:
            axes = canvas.subplots()
            for trial in own:
                value = trial["values"][p["key"]]
                x = list(p["choices"]).index(value) if p["choices"] else value
                _mark(axes, x, scale * trial["metric"], trial, best)
            if p["choices"]:
                axes.set_xticks(range(len(p["choices"])), [show(c) for c in p["choices"]])
            elif p["log"]:
                axes.set_xscale("log")
            share = result["importances"].get(p["key"])
            axes.set_xlabel(p["label"] + (f" ({100 * share['mean']:.0f} % of the variance)" if share else ""))
            axes.set_ylabel(label)

        figures.append(figure(f"slice{n}", f"{label} against {p['label']}", 4.0, 2.6, draw))
    return f'<div class="pair">{"".join(figures)}</div>'


def _trade_offs(result: Mapping[str, Any]) -> str:
    rows = []
    for t in sorted((t for t in result["measured"] if t["front"]), key=lambda t: t["rank_final"]):
        values = ", ".join(f"{k.rsplit('.', 1)[-1]} {show(v)}" for k, v in t["values"].items())
        seconds = significant(t["training_seconds"])
        rows.append([t["trial"], level(t["metric"], result), f"{t['rank_final']:,}", seconds, escape(values)])
    head = ("trial", words(result["metric"]), "kept rank", "training, s", "at")
    return table(head, rows, f"Trials that no other beats in all of {', '.join(_titles(result))}.")


def _best(result: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    keys = {p["key"]: p["label"] for p in result["parameters"]}
    sign = -1 if result["higher_is_better"] else 1
    order = sorted(shown, key=lambda t: (t["status"] != "finished", sign * t["metric"]))[:SHOWN]
    rows = [
        [
            escape(t["trial"]),
            level(t["metric"], result),
            *(escape(show(t["values"].get(key, "–"))) for key in keys),
            t["status"],
            f"{t['steps']:,}",
            "–" if t["rank_final"] is None else f"{t['rank_final']:,}",
        ]
        for t in order
    ]
    head = ("trial", words(result["metric"]), *keys.values(), "status", "steps", "final rank")
    return table(head, rows, f"The best {len(rows)} of {len(result['measured'])}; finished ones first.")
