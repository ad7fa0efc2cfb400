"""The page of a study."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from hyperlora.effects import show
from hyperlora.page import INK, PALETTE, figure, page, section, significant
from hyperlora.study_verdict import level, matters
from hyperlora.verdict import difference, number, words

Result = Mapping[str, Any]


def study_page(result: Result) -> str:
    """One self-contained HTML page of what ``hyperlora.study.analyse`` found."""
    sections = [f'<p class="verdict">{escape(result["verdict"])}</p>', gaps(result)]
    if result["effects"]:
        sections += [
            section("What each knob changes", _effects(result)),
            section("Which knobs depend on each other", _interactions(result)),
        ]
    if result["heat_maps"]:
        sections.append(section("ΔT and k", _heat_maps(result)))
    if len(result["pareto"]) > 1:
        sections.append(section("Quality against the size of the final adapter", _pareto(result)))
    if result["recommended"] is not None:
        sections.append(section("All points", _points(result)))
    sections += [section("How to read this page", _guide(result)), provenance(result)]
    subtitle = (
        f"space {result['space']}, {len(result['points'])} points ({result['design']}), {len(result['seeds'])} seeds, "
        f"{result['steps']:,} steps each; {result['created'].replace('T', ' ').replace('+00:00', ' UTC')}"
    )
    return page(f"Study: {result['name']}", subtitle, [s for s in sections if s])


def gaps(result: Result) -> str:
    """What is missing and what failed, before any number."""
    parts = []
    if result["missing"]:
        parts.append(f"<p><strong>Not yet ended ({len(result['missing'])}):</strong> {_list(result['missing'])}</p>")
    if result["failed"]:
        items = [f"{f['trial']} ({f['reason']})" for f in result["failed"]]
        parts.append(f"<p><strong>Failed ({len(items)}):</strong> {_list(items, '; ')}</p>")
    return f'<div class="gaps">{"".join(parts)}</div>' if parts else ""


def _list(items: Sequence[str], separator: str = ", ") -> str:
    more = "" if len(items) <= 12 else f"{separator}and {len(items) - 12} more"
    return escape(separator.join(items[:12]) + more)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A wide table whose first column stays in sight; the cells are HTML."""
    top = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table class="wide plain"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _scaled(result: Result) -> tuple[float, str]:
    """Factor and axis label of the metric."""
    metric = words(result["metric"])
    return (100.0, f"{metric}, %") if result["share"] else (1.0, metric)


# -------------------------------------------------------------------- effects


def _effects(result: Result) -> str:
    effects = [e for e in result["effects"] if any(v["mean"] is not None for v in e["levels"])]
    if not effects:
        return "<p>Too few points have finished.</p>"
    scale, label = _scaled(result)

    def draw(canvas: Figure) -> None:
        for n, (axes, effect) in enumerate(
            zip(canvas.subplots(len(effects), 1, sharex=True, squeeze=False)[:, 0], effects, strict=True)
        ):
            color = PALETTE[n % len(PALETTE)]
            for y, entry in enumerate(effect["levels"]):
                if entry["mean"] is None:
                    continue
                if entry["low"] is not None:
                    axes.plot([scale * entry["low"], scale * entry["high"]], [y, y], color=color, linewidth=2.2)
                axes.plot(scale * entry["mean"], y, "D", color=color, markersize=6)
            axes.set_yticks(range(len(effect["levels"])), [entry["label"] for entry in effect["levels"]])
            axes.set_ylim(len(effect["levels"]) - 0.5, -0.5)
            axes.set_title(effect["label"], loc="left", fontsize=10)
        axes.set_xlabel(label)

    height = 0.7 + sum(0.5 + 0.25 * len(e["levels"]) for e in effects)
    alt = f"Adjusted mean of {label} at each level of each knob, with intervals"
    rows = []
    for e in sorted(effects, key=lambda e: -(e["effect"]["mean"] or 0)):
        share = result["importances"].get(e["key"])
        rows.append(
            [
                escape(e["label"]) + (" <strong>*</strong>" if matters(e, result) else ""),
                _difference(e["effect"], result),
                escape(f"{e['effect']['from']} → {e['effect']['to']}") if e["effect"]["mean"] is not None else "–",
                _p(e["p"]),
                _share(share),
            ]
        )
    caption = (
        "Adjusted for the other knobs. A star: the levels differ beyond chance, with as many knobs as were tried. "
        "Importance: share of the variance over all trials, mean and range of five forests."
    )
    head = ("knob", "difference", "from → to", "p", "fANOVA importance")
    return f'<div class="one">{figure("effects", alt, 4.6, height, draw)}</div>' + table(head, rows, caption)


def _difference(entry: Mapping[str, Any], result: Result) -> str:
    if entry["mean"] is None:
        return "–"
    mean, _, rest = difference(entry, result["share"]).partition(" (")
    return f"{escape(mean)}<small>{escape(rest.removesuffix(')').replace('one seed, ', ''))}</small>"


def _p(p: float | None) -> str:
    return "–" if p is None else "&lt; 0.001" if p < 0.001 else number(p, 3)


def _share(share: Mapping[str, float] | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share['mean']:.0f} %<small>{100 * share['low']:.0f} to {100 * share['high']:.0f}</small>"


def _interactions(result: Result) -> str:
    rows = [
        [escape(f"{i['a']} × {i['b']}"), _difference(i, result), _p(i["p"])]
        for i in result["interactions"]
        if i["mean"] is not None
    ]
    if not rows:
        return "<p>The finished points cannot tell any pair apart.</p>"
    caption = (
        "How much more the first knob changes the metric, first to last level, at the last level of the second than at "
        f"its first. With {len(rows)} pairs one of twenty lies below p = 0.05 by chance."
    )
    return table(("pair", "difference", "p"), rows, caption)


# -------------------------------------------------------------------- maps and fronts


def _heat_maps(result: Result) -> str:
    means = [c["mean"] for m in result["heat_maps"] for c in m["cells"] if c["mean"] is not None]
    low, high = min(means), max(means)

    def cell(c: Mapping[str, Any]) -> str:
        if c["mean"] is None:
            return "<td>·</td>"
        place = (c["mean"] - low) / (high - low) if high > low else 0.5
        place = place if result["higher_is_better"] else 1 - place
        shown = number(100 * c["mean"], 1) if result["share"] else significant(c["mean"])
        return f'<td style="background:rgba(0,114,178,{0.7 * place:.2f})">{shown}<small>{c["points"]}</small></td>'

    maps = []
    for m in result["heat_maps"]:
        head = "".join(f"<th scope=col>k {escape(name)}</th>" for name in m["columns"])
        body = "".join(
            f"<tr><th scope=row>ΔT {escape(name)}</th>{''.join(cell(c) for c in m['cells'] if c['row'] == i)}</tr>"
            for i, name in enumerate(m["rows"])
        )
        maps.append(
            f'<div><h3>γ: {escape(m["gamma"])}</h3><div class="scroll"><table class="heat level">'
            f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
        )
    note = (
        f"Mean {escape(_scaled(result)[1])} over all points with that ΔT and k, whatever their other knobs; below it "
        "how many points. Darker is better. A dot: no point, mostly because k times the events cannot reach the target."
    )
    return f'<div class="maps">{"".join(maps)}</div><p class="quiet">{note}</p>'


def _pareto(result: Result) -> str:
    scale, label = _scaled(result)

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots()
        line = sorted((e for e in result["pareto"] if e["front"]), key=lambda e: e["parameters"])
        axes.plot([e["parameters"] for e in line], [scale * e["metric"] for e in line], color=INK, linewidth=1)
        for e in result["pareto"]:
            reference = e["point"] is None
            marker, color = ("s", PALETTE[1]) if reference else ("o", PALETTE[0])
            face = color if e["front"] else "none"
            axes.plot(e["parameters"], scale * e["metric"], marker, color=color, markerfacecolor=face, markersize=6)
            if e["front"] or reference:
                axes.annotate(
                    e["name"], (e["parameters"], scale * e["metric"]), (4, 4), textcoords="offset points", fontsize=9
                )
        axes.set_xlabel("numbers in the final adapter")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda numbers, _: f"{numbers:,.0f}")
        axes.set_ylabel(label)

    listed = "; ".join(f"{e['name']}: {level(e['metric'], result)}" for e in result["pareto"] if e["front"])
    caption = (
        "Means over seeds. Filled: no other is both better and as small. The square is LoRA with one rank everywhere. "
        "All points end at the same number of directions, unless the space varies the target; modules differ in width."
    )
    drawn = figure("pareto", f"{label} against adapter size; on the front: {listed}", 4.6, 3.4, draw)
    return f'<div class="one">{drawn}</div><p class="quiet">{caption}</p>'


def _points(result: Result) -> str:
    keys = {p["key"]: p["label"] for p in result["parameters"]}
    chosen = result["recommended"]
    measured = [p for p in result["points_measured"] if p["n"]]
    # Results of earlier versions have no adjusted means.
    measured.sort(key=lambda p: p.get("adjusted", p["mean"]), reverse=bool(result["higher_is_better"]))
    rows = [
        _point(f"point {p['point']}", [show(p["values"].get(key, "–")) for key in keys], p, result) for p in measured
    ]
    for row, p in zip(rows, measured, strict=True):
        if p["point"] == chosen["point"]:
            row[0] += " (recommended)"
        elif p["point"] in chosen["alike"]:
            row[0] += " ≈"
    reference = result["reference_measured"]
    if reference is not None and reference["n"]:
        rows.insert(0, _point(f"{reference['label']}, rate {reference['lr']:g}", ["–"] * len(keys), reference, result))
    head = ("", words(result["metric"]), *keys.values(), "final rank", "adapter", "s/step", "ranks alike, ρ")
    noise = result["noise"]
    spread = "" if noise is None else f" Standard deviation over seeds: {_spread(noise, result)}."
    caption = f"Best first, mean over seeds with 95 % interval; ≈: not told apart from the recommended point.{spread}"
    return table(head, rows, caption)


def _spread(noise: float, result: Result) -> str:
    return f"{number(100 * noise)} points" if result["share"] else significant(noise)


def _point(name: str, values: Sequence[str], p: Mapping[str, Any], result: Result) -> list[str]:
    def shown(value: float | None, how: Callable[[float], str]) -> str:
        return "–" if value is None else how(value)

    interval = "" if p["low"] is None else f"<small>{level(p['low'], result)} to {level(p['high'], result)}</small>"
    return [
        escape(name),
        level(p["mean"], result) + interval,
        *(escape(v) for v in values),
        shown(p["rank_final"], lambda v: f"{v:,.0f}"),
        shown(p["parameters"], lambda v: f"{v:,.0f}"),
        shown(p["seconds_per_step"], significant),
        shown(p["rank_stability"], number),
    ]


# -------------------------------------------------------------------- words


def _guide(result: Result) -> str:
    items = [
        (
            "Points and seeds",
            "A point is one setting of all knobs. All points run under the same seeds, so that the same batches come "
            "in the same order. A point's mean over its seeds is one observation. Where trials are missing, what all "
            "points share of a seed is estimated and taken out before points that lack one are compared; the table of "
            "points has the plain means.",
        ),
        (
            "Differences and their intervals",
            "Least squares on the points' means with every knob's levels as sum-coded factors; 95 % intervals. Noise "
            "and interactions are both in the residual. Levels and pairs have t intervals; a knob's difference is that "
            "of its highest and lowest level of all, and its interval Tukey's. p is the F test that a knob does "
            "nothing. A fit that leaves no residual gives neither.",
        ),
        (
            "A knob that exists at some points only",
            "k means nothing under the cubic schedule: its difference is over the points that have it; for fANOVA it "
            "stands at its default elsewhere.",
        ),
        (
            "fANOVA",
            "Share of the variance of all trials that a knob explains alone, over the box of all ranges, infeasible "
            "corners included (Hutter et al. 2014, as in Optuna).",
        ),
        (
            "Uniform LoRA",
            "Plain LoRA that has from the start the rank that pruning ends at, at the same alpha/rank. Its learning "
            "rate is the one with the lowest training loss at seed 0, searched beyond its list while the best is an "
            "edge, by four rates at most. The pruned point it is compared with is, for every seed, the one that the "
            "other seeds chose.",
        ),
        (
            "Ranks alike, ρ",
            "Mean Spearman correlation of the modules' final ranks over all pairs of seeds; 1 is the same order "
            "each time.",
        ),
    ]
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in items) + "</dl>"


def provenance(result: Result) -> str:
    """How the page came about: command, versions, git state, machine, recipe."""

    def pretty(content: Any) -> str:
        return f"<pre>{escape(json.dumps(content, indent=2, ensure_ascii=False))}</pre>"

    return section(
        "Provenance",
        f"<pre>{escape(result['command'])}</pre>"
        f"<details open><summary>Fingerprints, versions, git state, machine</summary>{pretty(result['provenance'])}"
        f"</details><details><summary>The knobs</summary>{pretty(result['parameters'])}</details>"
        f"<details><summary>Recipe that all share</summary>{pretty(result['recipe'])}</details>",
    )
