"""Pictures of a finished run: where the rank went, and how the loss fell.

Matplotlib is imported where a picture is drawn: whoever prints a table would wait a second for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rank_table(outcome: Mapping[str, Any]) -> tuple[list[str], list[str], np.ndarray]:
    """Final ranks as a table: row labels (layers), column labels (modules), ranks (rows, columns; -1 where none)."""
    modules = outcome["modules"]
    layers = sorted({-1 if m["layer"] is None else m["layer"] for m in modules})
    columns = list(dict.fromkeys(m["part"] for m in modules))
    table = np.full((len(layers), len(columns)), -1, dtype=int)
    for m in modules:
        table[layers.index(-1 if m["layer"] is None else m["layer"]), columns.index(m["part"])] = m["rank"]
    return ["other" if layer < 0 else str(layer) for layer in layers], shortest_labels(columns), table


def shortest_labels(parts: Sequence[str]) -> list[str]:
    """The last words of each dotted name that tell it from the others, without a last ``dense`` or ``_proj``."""
    split = [part.removesuffix(".dense").split(".") for part in parts]
    labels = []
    for words in split:
        length = 1
        while length < len(words) and sum(other[-length:] == words[-length:] for other in split) > 1:
            length += 1
        labels.append(".".join(words[-length:]).removesuffix("_proj"))
    return labels if len(set(labels)) == len(labels) else list(parts)


def rank_heat_map(outcome: Mapping[str, Any]) -> Figure:
    """Layers x modules, the live rank written into each cell."""
    from matplotlib.figure import Figure

    rows, columns, table = rank_table(outcome)
    figure = Figure(figsize=(1.6 + 0.95 * len(columns), 1.7 + 0.32 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots()
    highest = outcome["rank_per_module_initial"]
    image = axes.imshow(np.ma.masked_less(table, 0), cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    for (y, x), rank in np.ndenumerate(table):
        if rank >= 0:
            axes.text(x, y, str(rank), ha="center", va="center", color="white" if rank > 0.6 * highest else "#1b2a41")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel("layer")
    axes.set_title(
        f"live rank after {outcome['steps']} steps: {outcome['rank_final']} of {outcome['rank_initial']}", fontsize=10
    )
    figure.colorbar(image, ax=axes, label="rank")
    return figure


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average whose window shrinks at the ends; the same length as ``values``."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
    start = np.maximum(np.arange(len(values)) - half, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def loss_curve(outcome: Mapping[str, Any]) -> Figure:
    """Training loss of every step, its moving average, held-out losses, and the live rank on a second axis."""
    from matplotlib.figure import Figure

    losses = np.asarray(outcome["losses"])
    steps = np.arange(1, len(losses) + 1)
    figure = Figure(figsize=(7.2, 4.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9db8d9", linewidth=0.7, label="training loss")
    axes.plot(steps, smooth(losses, max(1, len(losses) // 25)), color="#1f4e8c", linewidth=1.8, label="moving average")
    held_out = [(e["step"], e["held_out_loss"]) for e in outcome["evaluations"]]
    axes.plot(*zip(*held_out, strict=True), "o", color="#c0392b", markersize=5, label="held-out loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per target")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    ranks = axes.twinx()
    history = [*outcome["rank_history"], [outcome["steps"], outcome["rank_final"]]]
    ranks.step(*zip(*history, strict=True), where="post", color="#e08e0b", linewidth=1.4, label="live rank")
    ranks.set_ylim(0, 1.05 * outcome["rank_initial"])
    ranks.set_ylabel("live singular values")
    handles = [*axes.get_legend_handles_labels()[0], *ranks.get_legend_handles_labels()[0]]
    axes.legend(handles, [str(h.get_label()) for h in handles], loc="upper right", fontsize=8)
    axes.set_title(f"{outcome['name']} ({outcome['method']})", fontsize=10)
    return figure
