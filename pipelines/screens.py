"""What the commands print: resolved recipe and estimate before a run, its summary after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from hyperlora.config import Recipe, flatten
from hyperlora.effects import show
from hyperlora.field import Contestant
from hyperlora.figures import rank_table
from hyperlora.preflight import Estimate, Sizes
from hyperlora.verdict import all_reached, words
from hyperlora.warm_start import WarmStart
from pipelines.progress import duration


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _grid(rows: list[tuple[str, RenderableType]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def estimate(recipe: Recipe, e: Estimate) -> RenderableType:
    """The resolved recipe and what it will need."""
    said = recipe.model_dump(mode="json")
    content = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
    given = flatten(said)
    p = e.pruning
    falls = (
        f"{p['schedule']}: every {p['interval']} steps from {p['start']} to {e.steps - p['final']}, score {p['score']}"
        if p and e.rank_target < e.rank_initial
        else "none"
    )
    fewest, most = recipe.ray.fewest, recipe.ray.most
    workers = str(most) if fewest == most else f"{fewest} to {most}"
    rows: list[tuple[str, RenderableType]] = [
        ("rows", f"{e.train_rows:,} to train on, {e.held_out_rows:,} held out"),
        ("steps", f"{e.steps:,} of {recipe.training.batch_size} rows over {workers} worker(s)"),
        ("base model", f"{e.base_parameters:,} parameters, frozen"),
        ("adapter", f"{e.sizes.adapter:,} parameters in {e.modules} modules at rank {recipe.adapter.rank}"),
        ("rank budget", f"{e.rank_initial:,} to {e.rank_target:,}; pruning {falls}"),
        ("decided for it", ", ".join(f"{k} {v}" for k, v in e.decided.items() if given.get(k) is None)),
        ("trainable", f"{e.sizes.trainable:,} ({recipe.method}); AdaLoRA {e.adalora.trainable:,}"),
        ("optimizer state", f"{size(e.sizes.state_bytes)} ({recipe.method}); AdaLoRA {size(e.adalora.state_bytes)}"),
        (
            "memory, each worker",
            f"{size(e.memory_bytes)} and the runtime: base {size(e.base_bytes)}, adapter and gradients "
            f"{size(e.adapter_bytes)}, optimizer {size(e.sizes.owned_bytes)}, activations about "
            f"{size(e.activation_bytes)}",
        ),
    ]
    return Group(
        Syntax(content.rstrip(), "yaml", theme="ansi_dark", background_color="default", word_wrap=True),
        Text(),
        _grid(rows),
    )


def unused_gpus(count: float) -> Text:
    """That workers or trials ask for no GPU, and the cluster has some."""
    return Text(f"training on CPUs: ray.gpus_per_worker is 0 (GPUs that stay idle: {count:g})", "yellow")


def comparison_plan(
    contestants: Sequence[Contestant], estimates: Mapping[str, Estimate], plan: Mapping[str, Any], out: str
) -> RenderableType:
    """What a comparison will run."""
    field: list[tuple[str, RenderableType]] = []
    for c in contestants:
        e = estimates[c.name]
        changes = ", ".join(f"{key}={value}" for key, value in c.changes.items())
        budget = f"{e.rank_initial:,} to {e.rank_target:,}" if e.rank_target < e.rank_initial else f"{e.rank_initial:,}"
        sizes = f"rank {budget}, {e.sizes.trainable:,} trainable, optimizer state {size(e.sizes.state_bytes)}"
        label = Text(c.label + (" (baseline)" if c.name == plan["baseline"] else ""), style="bold")
        field.append((c.name, Text("\n").join([label, Text(changes), Text(sizes, style="dim")])))
    rates, seeds, count = plan["lrs"], plan["seeds"], len(contestants)
    search, report = count * len(rates), count * len(seeds)
    e, recipe = estimates[plan["baseline"]], contestants[0].recipe
    rows: list[tuple[str, RenderableType]] = [
        ("recipe", f"{plan['name']}: {e.train_rows:,} rows to train on, {e.held_out_rows:,} held out"),
        ("each trial", f"{plan['steps']:,} steps of {recipe.training.batch_size} rows, one process"),
        ("learning rates", f"{', '.join(f'{lr:g}' for lr in rates)}, and beyond while the best is the last on a side"),
        ("fixed", f"optimizer.other_lr={recipe.optimizer.other_lr:g} (heads and magnitudes)"),
        ("seeds", f"0 for the learning rate, {seeds[0]} to {seeds[-1]} reported"),
        (
            "trials",
            f"{search + report}: {search} to choose learning rates, {report} to report, more where a search goes on",
        ),
        ("folder", Text(local(out))),
    ]
    return Group(_grid(field), Text(), _grid(rows))


def comparison_summary(console: Console, result: Mapping[str, Any], out: str) -> None:
    """Print the end of a comparison, whole or not."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("")
    columns = {"best rate": "", "training loss": "final_loss", "steps to baseline's": "steps_to_final"}
    columns |= {f"held-out {str(result['metric']).replace('_', ' ')}": "metric", "s/step": "seconds_per_step"}
    for column in columns:
        table.add_column(column, justify="right")
    for contestant in result["contestants"]:
        best = contestant["best_lr"]
        cells = ["" if best is None else f"{best:g}"]
        cells += [_interval(contestant["summary"][key]) for key in columns.values() if key]
        table.add_row(escape(contestant["label"]), *cells)
    console.print(Text(f"\ncomparison on {result['name']}", style="bold"), table, sep="\n")
    for failure in result["failed"]:
        console.print(Text(f"failed: {failure['trial']}: {failure['reason']}", style="red"), soft_wrap=True)
    if result["missing"]:
        console.print(Text(f"missing: {', '.join(result['missing'])}", style="yellow"), soft_wrap=True)
    console.print(Text(), Text(result["verdict"]), Text(), sep="\n")
    for name in ("comparison.html", "comparison.json"):
        console.print(Text(local(f"{out}/{name}")), soft_wrap=True)


def study_plan(plan: Mapping[str, Any], e: Estimate, trials: int, seconds: float | None, out: str) -> RenderableType:
    """What a study will run and what it will cost."""
    reference = plan["reference"]
    runs = f"{len(plan['points'])} points ({plan['design']}) x {len(plan['seeds'])} seeds"
    beside = f", and {reference['label']} at several learning rates" if reference else ""
    rows: list[tuple[str, RenderableType]] = [
        ("recipe", f"{plan['name']}: {e.train_rows:,} rows to train on, {e.held_out_rows:,} held out"),
        ("space", f"{plan['space']}: {', '.join(_knob(p) for p in plan['parameters'])}"),
        ("rank budget", f"{e.rank_initial:,} to {e.rank_target:,}"),
        ("trials", f"{trials}: {runs}{beside}"),
        ("cost", f"{trials * plan['steps']:,} optimizer steps{_time(seconds)}"),
        ("folder", Text(local(out))),
    ]
    return _grid(rows)


def _knob(p: Mapping[str, Any]) -> str:
    if p["choices"]:
        return f"{p['label']} {'/'.join(show(c) for c in p['choices'])}"
    return f"{p['label']} {show(p['low'])} to {show(p['high'])}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f", about {duration(seconds)} by the time of a few steps on this machine"


def study_summary(console: Console, result: Mapping[str, Any], out: str) -> None:
    """Print the end of a study, whole or not."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for column in ("knob", "from → to", "difference", "p", "importance"):
        table.add_column(column, justify="left" if column in ("knob", "from → to") else "right")
    for e in sorted(result["effects"], key=lambda e: -(e["effect"]["mean"] or 0)):
        if e["effect"]["mean"] is None:
            continue
        share = result["importances"].get(e["key"])
        table.add_row(
            escape(e["label"]),
            escape(f"{e['effect']['from']} → {e['effect']['to']}"),
            _interval(e["effect"]),
            "–" if e["p"] is None else f"{e['p']:.3f}",
            "–" if share is None else f"{100 * share['mean']:.0f} %",
        )
    console.print(Text(f"\nstudy of {result['name']}, space {result['space']}", style="bold"), table, sep="\n")
    ending(console, result, out, ("study.html", "study.json", "trials.csv", "trials.parquet"))


def tuning_plan(plan: Mapping[str, Any], seconds: float | None, out: str) -> RenderableType:
    """What a search will run and what it will cost at most."""
    stopping = f"early by {words(plan['stopping'])}" if plan["stopping"] else "none"
    rows: list[tuple[str, RenderableType]] = [
        ("recipe", plan["name"]),
        ("space", f"{plan['space']}: {', '.join(_knob(p) for p in plan['parameters'])}"),
        ("trials", f"{plan['trials']}, chosen by {plan['sampler']}; stopping {stopping}"),
        ("for", ", ".join(f"{'more' if o['higher'] else 'less'} {words(o['name'])}" for o in plan["objectives"])),
        ("cost", f"at most {plan['trials'] * plan['steps']:,} optimizer steps{_time(seconds)}, one trial at a time"),
        ("folder", Text(local(out))),
    ]
    return _grid(rows)


def tuning_summary(console: Console, result: Mapping[str, Any], out: str) -> None:
    """Print the end of a search, whole or not."""
    console.print(Text(f"\nsearch on {result['name']}, space {result['space']}", style="bold"))
    ending(console, result, out, ("tune.html", "tune.json", "trials.csv", "trials.parquet"))


def ending(console: Console, result: Mapping[str, Any], out: str, files: Sequence[str]) -> None:
    """Failures, gaps, verdict and files of a search."""
    for failure in result["failed"]:
        console.print(Text(f"failed: {failure['trial']}: {failure['reason']}", style="red"), soft_wrap=True)
    if result["missing"]:
        console.print(Text(f"missing: {len(result['missing'])} trials", style="yellow"), soft_wrap=True)
    console.print(Text(), Text(result["verdict"]), Text(), sep="\n")
    for name in files:
        console.print(Text(local(f"{out}/{name}")), soft_wrap=True)


def _interval(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "–"
    if value["low"] is None:
        return f"{value['mean']:.4g}"
    if not all_reached(value):
        return f"at least {value['mean']:.4g} (from {value['low']:.4g})"
    return f"{value['mean']:.4g} ({value['low']:.4g} to {value['high']:.4g})"


def ranks(outcome: Mapping[str, Any]) -> RenderableType:
    """The rank of every module: one row a layer, and a bar for the layer's share of its initial rank."""
    rows, columns, table = rank_table(outcome)
    full = outcome["rank_per_module_initial"]
    shown = Table(box=None, padding=(0, 1), pad_edge=False)
    shown.add_column("layer", justify="right", style="dim")
    for column in columns:
        shown.add_column(column, justify="right")
    shown.add_column("of its rank", justify="left", no_wrap=True)
    for label, row in zip(rows, table, strict=True):
        cells = ["" if r < 0 else str(r) for r in row]
        there = row[row >= 0]
        share = there.sum() / (full * len(there))
        shown.add_row(label, *cells, Text(f"{_bar(share, 10)} {100 * share:.0f} %", style="blue"))
    return shown


def _bar(share: float, width: int) -> str:
    return "█" * round(share * width) + "░" * (width - round(share * width))


def summary(
    console: Console, outcome: Mapping[str, Any], recipe: Recipe, adalora: Sizes, wall: float, commands: list[str]
) -> None:
    """Print the end of a training run."""
    metric = outcome["metric"].replace("_", " ")
    percent = outcome["metric"] in ("exact_match", "accuracy")

    def value(x: float | None) -> str:
        return "not measured" if x is None else f"{100 * x:.1f} %" if percent else f"{x:.4f}"

    rows: list[tuple[str, RenderableType]] = []
    if percent:
        held_out = f"{value(outcome['metric_before'])} → [bold]{value(outcome['metric_after'])}[/]"
        rows.append((f"held-out {metric}", f"{held_out} of {outcome['held_out_rows']} rows"))
    before = outcome["held_out_loss_before"]
    rows += [
        ("held-out loss", ("" if before is None else f"{before:.4f} → ") + f"{outcome['held_out_loss_after']:.4f}"),
        ("training loss", f"{outcome['loss_first']:.4f} → {outcome['loss_last']:.4f} in {outcome['steps']} steps"),
        ("live rank", f"{outcome['rank_initial']} → {outcome['rank_final']} (target {outcome['rank_target']})"),
        ("trainable", f"{outcome['trainable_parameters']:,} parameters; AdaLoRA {adalora.trainable:,}"),
        ("optimizer state", f"{size(outcome['optimizer_state_bytes'])}; AdaLoRA {size(adalora.state_bytes)}"),
        (
            "time",
            f"{wall:.0f} s in all, {outcome['training_seconds']:.0f} s of training on {outcome['workers']} worker(s) "
            f"at {outcome['tokens_per_second']:,.0f} tokens/s",
        ),
    ]
    if outcome["warm_start"] is not None:
        rows.append(("hypernetworks", Text(str(WarmStart(**outcome["warm_start"])))))
    rows += [
        (f"warning, step {w['step']}", Text(f"{w['monitor'].replace('_', ' ')}: {w['message']}", style="yellow"))
        for w in outcome["warnings"]
    ]
    places = {"adapter": local(outcome["adapter"]), "checkpoint": local(outcome["checkpoint"])}
    if outcome["mlflow_run_id"]:
        places["MLflow run"] = f"{outcome['mlflow_run_id']} in {recipe.mlflow.tracking_uri}"
    console.print(Text(f"{outcome['name']} ({outcome['method']})", style="bold"))
    console.print(_grid(rows), Text(), ranks(outcome), Text(), sep="\n")
    # Paths and commands are there to be copied: the terminal may wrap them, nothing may break or cut them.
    for name, place in places.items():
        console.print(Text.assemble((f"{name:<10}  ", "dim"), place), soft_wrap=True)
    console.print(Text("\nnext", style="bold"))
    for command in commands:
        console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)


def local(uri: str) -> str:
    """A local path relative to here when that is shorter; any other URI as it is."""
    return uri if "://" in uri else min(uri, os.path.relpath(uri), key=len)
