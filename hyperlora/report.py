"""The page of a comparison: one HTML file that opens offline, on a phone as on a desk, in light and dark.

Figures are inline SVG without a background, whose ink is the text colour of the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperlora.figures import rank_table
from hyperlora.page import INK, PALETTE, figure, page, section, significant, size
from hyperlora.verdict import (
    LOSS,
    LOSS_DIFFERENCE,
    METRIC,
    STEPS,
    STEPS_GOAL,
    TIME,
    all_reached,
    number,
    waited_share,
    words,
)

Contestant = Mapping[str, Any]

DASHES = (("solid", "solid"), ((0, (5, 2)), "dashed"), ((0, (1, 1.5)), "dotted"))
HEAT_MAPS = 4


def comparison_page(result: Mapping[str, Any]) -> str:
    """One self-contained HTML page of what ``hyperlora.comparison.analyse`` found."""
    contestants = _ordered(result)
    looks = {c["name"]: _look(n - 1) for n, c in enumerate(contestants)}
    sections = [
        f'<p class="verdict">{escape(result["verdict"])}</p>',
        _gaps(result),
        section("Contestants", _tables(contestants, looks, result)),
    ]
    if any(c["trials"] for c in contestants):
        legend = _legend(contestants, looks)
        sections += [
            section("Steps to the baseline's final loss", _forest(contestants, looks, result)),
            section("Training loss", legend + _curves(contestants, looks, result)),
            section(
                "Held-out " + words(result["metric"]).removeprefix("held-out "), _held_out(contestants, looks, result)
            ),
        ]
    if any(_searched(c) for c in contestants):
        sections.append(
            section("Search of the learning rate", _legend(contestants, looks) + _search(contestants, looks, result))
        )
    sections += [
        _rank_maps(contestants, result),
        section("How to read this page", _guide(result)),
        _provenance(result),
    ]
    subtitle = (
        f"{len(contestants)} contestants, {len(result['seeds'])} seeds, {result['steps']:,} steps each; "
        f"{result['created'].replace('T', ' ').replace('+00:00', ' UTC')}"
    )
    return page(f"Comparison: {result['name']}", subtitle, [s for s in sections if s])


# -------------------------------------------------------------------- pieces


def _ordered(result: Mapping[str, Any]) -> list[Contestant]:
    """The baseline first, then by rising step ratio, then those without one."""

    def place(c: Contestant) -> tuple[bool, float]:
        mean = c["against_baseline"].get(STEPS, {}).get("mean")
        return c["name"] != result["baseline"], math.inf if mean is None else mean

    return sorted(result["contestants"], key=place)


def _look(place: int) -> dict[str, Any]:
    """Colour and line style of the contestant at a 0-based place after the baseline, which is drawn in ink."""
    if place < 0:
        return {"color": INK, "linestyle": "solid", "css": "border-color:currentColor"}
    line, css = DASHES[place // len(PALETTE) % len(DASHES)]
    color = PALETTE[place % len(PALETTE)]
    return {"color": color, "linestyle": line, "css": f"border-color:{color};border-top-style:{css}"}


def _key(look: Mapping[str, Any]) -> str:
    return f'<span class="key" style="{look["css"]}"></span>'


def _legend(contestants: Sequence[Contestant], looks: Mapping[str, Any]) -> str:
    shown = [c for c in contestants if c["trials"] or _searched(c)]
    items = "".join(f"<li>{_key(looks[c['name']])}{escape(c['label'])}</li>" for c in shown)
    return f'<ul class="legend">{items}</ul>'


def _gaps(result: Mapping[str, Any]) -> str:
    """What is missing and what failed, before any number."""
    parts = []
    if result["missing"]:
        parts.append(
            f"<p><strong>Not yet ended ({len(result['missing'])}):</strong> {escape(', '.join(result['missing']))}</p>"
        )
    for stage, title in (
        ("report", "Failed at the chosen rate, left out of all means"),
        ("tune", "Failed in the search, counted as infinitely bad"),
    ):
        failed = [f for f in result["failed"] if f["stage"] == stage]
        if failed:
            items = "; ".join(f"{f['trial']} ({f['reason']})" for f in failed)
            parts.append(f"<p><strong>{title} ({len(failed)}):</strong> {escape(items)}</p>")
    return f'<div class="gaps">{"".join(parts)}</div>' if parts else ""


# -------------------------------------------------------------------- numbers


def _cell(entry: Mapping[str, Any] | None, show: Callable[[float], str]) -> str:
    """Mean and, below it, its interval and how many seeds reached the level."""
    if not entry or entry["mean"] is None:
        return "<td>–</td>"
    unreached = not all_reached(entry)
    low, high = entry["low"], entry["high"]
    below = [] if low is None else [f"from {show(low)}" if unreached else f"{show(low)} to {show(high)}"]
    if unreached:
        below.append(f"reached {entry['reached']} of {entry['n']}")
    small = "".join(f"<small>{line}</small>" for line in below)
    return f"<td>{'≥ ' if unreached else ''}{show(entry['mean'])}{small}</td>"


def _tables(contestants: Sequence[Contestant], looks: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What the comparison is about, and below it what each contestant costs and where its ranks ended."""
    points = result["higher_is_better"]
    metric = words(result["metric"] or "metric")

    def share(v: float) -> str:
        return number(100 * v, 2) if points else number(v, 4)

    def signed(v: float) -> str:
        return ("+" if v > 0 else "") + share(v)

    def nats(v: float) -> str:
        return ("+" if v > 0 else "") + number(v, 4)

    def plain(v: float) -> str:
        return f"{v:,.0f}"

    def against(key: str, show: Callable[[float], str] = number) -> Callable[[Contestant], str]:
        return lambda c: _cell(c["against_baseline"].get(key), show)

    def measured(key: str, show: Callable[[float], str]) -> Callable[[Contestant], str]:
        return lambda c: _cell(c["summary"][key], show)

    def mean(key: str, show: Callable[[float], str]) -> Callable[[Contestant], str]:
        return lambda c: _mean(c["summary"][key]["mean"], show)

    main = {
        "steps, × baseline": against(STEPS),
        metric + (", %" if points else ""): measured("metric", share),
        f"{metric} − baseline" + (", points" if points else ""): against(METRIC, signed),
        **({} if result["metric"] == LOSS else {f"{words(LOSS)} − baseline": against(LOSS_DIFFERENCE, nats)}),
        "time per step, × baseline": against(TIME),
        "time to final loss, × baseline": against("seconds_to_final_ratio"),
        "steps to 90 %, × baseline": against("steps_to_90_ratio"),
        "steps to the baseline's final loss": measured("steps_to_final", plain),
        "final training loss": measured("final_loss", lambda v: number(v, 4)),
        "area under the loss curve": measured("auc", lambda v: number(v, 4)),
        "area − baseline": against("auc_difference", nats),
    }
    costs = {
        "best learning rate": _rate,
        "seconds per step": mean("seconds_per_step", significant),
        "peak memory": mean("peak_memory_bytes", size),
        "optimizer state": mean("optimizer_state_bytes", size),
        "trainable parameters": mean("trainable_parameters", plain),
        "final rank, sum": mean("rank_final", plain),
        "ranks alike over seeds, ρ": lambda c: _mean(c["rank_stability"], number),
        "seeds": lambda c: _mean(len(c["trials"]), plain),
    }
    if waited_share(result) is not None:
        costs["waited for a processor"] = mean("waited_share", "{:.0%}".format)
    note = "Means over seeds; below each its 95 % interval. The baseline is the first row."
    return _table(contestants, looks, main, note) + _table(contestants, looks, costs, "Means over seeds.")


def _table(
    contestants: Sequence[Contestant],
    looks: Mapping[str, Any],
    columns: Mapping[str, Callable[[Contestant], str]],
    caption: str,
) -> str:
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><th scope=row>{_key(looks[c['name']])}{escape(c['label'])}</th>"
        f"{''.join(cell(c) for cell in columns.values())}</tr>"
        for c in contestants
    )
    return (
        f'<div class="scroll"><table class="wide"><caption>{caption}</caption>'
        f"<thead><tr><th scope=col>contestant</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _mean(value: float | None, show: Callable[[float], str]) -> str:
    return f"<td>{'–' if value is None else show(value)}</td>"


def _rate(c: Contestant) -> str:
    if c["best_lr"] is None:
        return "<td>–</td>"
    note = f"<small>{c['edge']}est tried</small>" if c["edge"] else ""
    return f"<td>{c['best_lr']:g}{note}</td>"


# -------------------------------------------------------------------- figures


def _band(axes: Axes, x: np.ndarray, curves: np.ndarray, look: Mapping[str, Any]) -> None:
    """Mean of curves, (seeds, T), and a band of one standard deviation over the seeds."""
    mean, spread = curves.mean(axis=0), curves.std(axis=0)
    axes.plot(x, mean, color=look["color"], linestyle=look["linestyle"], linewidth=1.6)
    axes.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.12, linewidth=0)


def _frame(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Fit the height to all but the first tenth of the steps, whose fall would press the rest into one line."""
    late = [curve[len(curve) // 10 :] for curve in curves if len(curve) > 1]
    if late:
        low, high = min(c.min() for c in late), max(c.max() for c in late)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-12)


def _curves(contestants: Sequence[Contestant], looks: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    # A few hundred points draw as well as all of them and keep the page small.
    steps = np.arange(0, result["steps"], max(1, result["steps"] // 250))
    curves = {c["name"]: {t["seed"]: np.asarray(t["smoothed"])[steps] for t in c["trials"]} for c in contestants}
    base = curves[result["baseline"]]

    def losses(figure: Figure) -> None:
        axes = figure.subplots()
        for name, by_seed in reversed(curves.items()):
            if by_seed:
                _band(axes, steps + 1, np.stack(list(by_seed.values())), looks[name])
        _frame(axes, [values for by_seed in curves.values() for values in by_seed.values()])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("smoothed training loss, nats")

    def gaps(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=1.2)
        drawn = [np.zeros(len(steps))]
        for name, by_seed in reversed(curves.items()):
            shared = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
            if shared and name != result["baseline"]:
                _band(axes, steps + 1, np.stack(shared), looks[name])
                drawn += shared
        _frame(axes, drawn)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("smoothed loss − baseline's, nats")

    alt = "Smoothed training loss over optimizer steps, mean over seeds with a band, of every contestant"
    gap = "Difference of the smoothed training loss to the baseline's of the same seed, of every contestant"
    first = figure("loss", alt, 4.6, 3.4, losses)
    second = figure("gap", gap, 4.6, 3.4, gaps) if base else ""
    caption = (
        "Mean over seeds; bands are one standard deviation. The first tenth of the steps may leave the frame. Right or "
        "below: paired difference, less is faster."
    )
    return f'<div class="pair">{first}{second}</div><p class="quiet">{caption}</p>'


def _rows(
    name: str,
    alt: str,
    label: str,
    entries: Sequence[tuple[Contestant, Mapping[str, Any], Sequence[float]]],
    looks: Mapping[str, Any],
    marks: Callable[[Axes], None],
    scale: float = 1.0,
) -> str:
    """One row per contestant: its name, one faint dot per seed, the mean and its interval."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (c, entry, values) in enumerate(entries):
            look = looks[c["name"]]
            hollow = not all_reached(entry)
            axes.plot(
                scale * np.asarray(values),
                [y + 0.14] * len(values),
                "o",
                color=look["color"],
                alpha=0.4,
                markersize=3.5,
            )
            if entry["low"] is not None:
                axes.plot([scale * entry["low"], scale * entry["high"]], [y, y], color=look["color"], linewidth=2.2)
            fill = "none" if hollow else look["color"]
            axes.plot(scale * entry["mean"], y, "D", color=look["color"], markerfacecolor=fill, markersize=6.5)
            text = c["label"] if len(c["label"]) <= 48 else c["label"][:47] + "…"
            axes.text(0.01, y - 0.24, text, transform=axes.get_yaxis_transform(), fontsize=9.5, va="bottom")
        marks(axes)
        axes.set_ylim(len(entries) - 0.6, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)

    return f'<div class="one">{figure(name, alt, 4.6, 0.9 + 0.46 * len(entries), draw)}</div>'


def _forest(contestants: Sequence[Contestant], looks: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    entries = [
        (c, entry, entry["values"]) for c in contestants if (entry := c["against_baseline"].get(STEPS)) and entry["n"]
    ]
    if not entries:
        return "<p>No contestant shares a finished seed with the baseline.</p>"

    def marks(axes: Axes) -> None:
        axes.axvline(1, color=INK, linewidth=1.2)
        axes.axvline(STEPS_GOAL, color=INK, linewidth=1, linestyle=(0, (4, 3)))

    listed = "; ".join(f"{c['label']} {number(e['mean'])}" for c, e, _ in entries)
    alt = f"Steps to the baseline's final loss over the baseline's own steps, mean and interval: {listed}"
    caption = (
        "Mean (diamond) with 95 % interval (bar) and one dot per seed. Left of the solid line is faster than the "
        "baseline; the dashed line is the goal of 20 % fewer steps. A hollow diamond is a lower bound: some seed never "
        "reached the loss."
    )
    return _rows("forest", alt, "steps, × baseline", entries, looks, marks) + f'<p class="quiet">{caption}</p>'


def _held_out(contestants: Sequence[Contestant], looks: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    points = result["higher_is_better"]
    scale = 100.0 if points else 1.0
    entries = [
        (c, c["summary"]["metric"], [t["metric"] for t in c["trials"]])
        for c in contestants
        if c["summary"]["metric"]["n"]
    ]
    base = next((e["mean"] for c, e, _ in entries if c["name"] == result["baseline"]), None)
    row = 100 / result["held_out_rows"]

    def marks(axes: Axes) -> None:
        if base is None:
            return
        axes.axvline(scale * base, color=INK, linewidth=1.2)
        if points:
            axes.axvspan(100 * base - row, 100 * base + row, color=INK, alpha=0.08, linewidth=0)

    metric = words(result["metric"])
    listed = "; ".join(f"{c['label']} {number(scale * e['mean'], 2 if points else 4)}" for c, e, _ in entries)
    label = f"held-out {metric}, %" if points else f"{metric}, nats (lower is better)"
    caption = "Mean with 95 % interval and one dot per seed; the line is the baseline's mean"
    caption += f", the grey band one held-out row on either side ({number(row)} points)." if points else "."
    return (
        _rows("metric", f"{label}: {listed}", label, entries, looks, marks, scale) + f'<p class="quiet">{caption}</p>'
    )


def _searched(c: Contestant) -> bool:
    return any(s["score"] is not None for s in c["search"])


def _search(contestants: Sequence[Contestant], looks: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    shown = [c for c in contestants if _searched(c)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for c in reversed(shown):
            points = [(s["lr"], s["score"]) for s in c["search"] if s["score"] is not None]
            look = looks[c["name"]]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=look["color"], linestyle=look["linestyle"], linewidth=1.4, marker="o", markersize=3.5)
            best = min(points, key=lambda p: p[1])
            axes.plot(*best, "D", color=look["color"], markersize=7)
        axes.set_xscale("log")
        rates = sorted({s["lr"] for c in shown for s in c["search"]})
        axes.set_xticks(rates, [f"{lr:g}" for lr in rates], rotation=45 if len(rates) > 6 else 0)
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
        axes.set_ylabel("final training loss, nats")

    listed = "; ".join(f"{c['label']} {c['best_lr']:g}" for c in shown if c["best_lr"] is not None)
    alt = f"Final training loss against the learning rate, of every contestant. Best rates: {listed}"
    caption = f"{result['selection']} A diamond marks the best rate; rates that failed have no point."
    return f'<div class="one">{figure("search", alt, 4.6, 3.4, draw)}</div><p class="quiet">{escape(caption)}</p>'


def _rank_maps(contestants: Sequence[Contestant], result: Mapping[str, Any]) -> str:
    """Where the rank went, mean over seeds, for the first contestants whose ranks moved."""
    moved = [c for c in contestants if c["modules"] and any(t["rank_final"] < t["rank_initial"] for t in c["trials"])]
    maps = "".join(_rank_map(c) for c in moved[:HEAT_MAPS])
    if not maps:
        return ""
    shown = f"{min(len(moved), HEAT_MAPS)} of {len(moved)}"
    note = f"Live rank after training, mean over seeds. Shown: {shown} contestants that prune."
    return section("Where the rank went", f'<div class="maps">{maps}</div><p class="quiet">{note}</p>')


def _rank_map(c: Contestant) -> str:
    mean = np.mean([t["ranks"] for t in c["trials"]], axis=0)
    # The table is laid out with each module's index in place of its rank, since means are no whole numbers.
    rows, columns, table = rank_table({"modules": [{**m, "rank": n} for n, m in enumerate(c["modules"])]})
    initial = max(t["rank_initial"] for t in c["trials"]) / len(mean)

    def cell(n: int) -> str:
        if n < 0:
            return "<td></td>"
        return f'<td style="background:rgba(0,114,178,{0.75 * min(1, mean[n] / initial):.2f})">{mean[n]:.1f}</td>'

    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(cell(n) for n in line)}</tr>"
        for name, line in zip(rows, table.tolist(), strict=True)
    )
    return (
        f'<div><h3>{escape(c["label"])}</h3><div class="scroll"><table class="heat">'
        f"<thead><tr><th>layer</th>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


# -------------------------------------------------------------------- words


def _guide(result: Mapping[str, Any]) -> str:
    window = max(5, result["steps"] // 20)
    items = [
        (
            "Smoothed loss, final loss",
            f"Moving average of the training loss over {window} steps; its mean over the last tenth of the steps.",
        ),
        (
            "Steps to the baseline's final loss",
            "The target is the baseline's own final loss with the same seed, and so the same batches in the same "
            "order. A smoothed curve is first fitted by the nearest non-increasing curve, so that a lucky dip or a "
            "loss that rises again does not count as reached; then the crossing is interpolated. The baseline is read "
            "in the same way. Where its curve ends nearly flat, noise lets it reach its own final loss well before "
            "the end, and a gain comes out smaller than on curves without noise (simulated: 23 % fewer steps as 14 %).",
        ),
        (
            "Never reached (≥)",
            "A seed that never reaches the target enters means as the whole run. Mean and interval are then of lower "
            "bounds: the interval has no upper end, and the contestant is never called faster.",
        ),
        (
            "90 %",
            "The same for the loss at which the baseline has made 90 % of its gain, from its first smoothed loss to "
            "its final one.",
        ),
        (
            "Area under the loss curve",
            "Mean of the smoothed training loss over all steps, in nats per step.",
        ),
        (
            "Intervals",
            "Ratios and differences are formed within each seed, then averaged. Intervals are expanded percentile "
            "bootstrap intervals of that mean (20,000 resamples of the seeds; Hesterberg 2015). Simulated with normal "
            "values, at five seeds they cover the true mean in 91 % of the cases, at ten in 96 %. Below five seeds "
            "they are Student's t intervals, of ratios on the log scale; one seed has none. The verdict claims a "
            "difference only where Student's t interval over the same seeds shows it as well. With many contestants, "
            "the best of them owes part of its lead to luck.",
        ),
        (
            "Time",
            "Seconds per step is the mean over the steps of a trial, on the machine below, which may run other "
            "trials at the same time.",
        ),
        (
            "Ranks alike over seeds",
            "Mean Spearman correlation ρ of the modules' final ranks over all pairs of seeds; 1 is the same order each "
            "time.",
        ),
    ]
    if result["higher_is_better"]:
        row = number(100 / result["held_out_rows"])
        items.append(
            (
                "Points",
                f"Of {result['held_out_rows']:,} held-out rows one is {row} points. A difference is called better or "
                "worse when its intervals leave out 0 and it is more than one row.",
            )
        )
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in items) + "</dl>"


def _provenance(result: Mapping[str, Any]) -> str:
    def pretty(content: Any) -> str:
        return f"<pre>{escape(json.dumps(content, indent=2, ensure_ascii=False))}</pre>"

    settings = {c["name"]: c["set"] for c in result["contestants"]}
    rates = ", ".join(f"{lr:g}" for lr in result["lrs"])
    seeds = ", ".join(str(s) for s in result["seeds"])
    return section(
        "Provenance",
        f"<pre>{escape(result['command'])}</pre>"
        f'<p class="quiet">Learning rates tried first: {rates}. Seeds: {seeds}. '
        f"{escape(result['selection'])}</p>"
        f"<details open><summary>Versions, git state, machine</summary>{pretty(result['provenance'])}</details>"
        f"<details><summary>What each contestant sets</summary>{pretty(settings)}</details>"
        f"<details><summary>Recipe that all share</summary>{pretty(result['recipe'])}</details>",
    )
