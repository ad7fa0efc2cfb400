"""``hyperlora study``: a designed experiment over a search space, with repeats, beside uniform LoRA.

OUT/trials/pPOINT-seedSEED/, lora-lrLR-seedSEED/   what search.py keeps of a trial
OUT/study.json, study.html                         the result, also while trials are missing
OUT/trials.csv, trials.parquet                     all trials as a table
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from hyperlora import tracking, uris
from hyperlora.config import METHODS, Problem, Recipe, RecipeError
from hyperlora.field import Entry, planned, rate
from hyperlora.fingerprint import data_fingerprint, recipe_fingerprint
from hyperlora.preflight import Estimate, inspect
from hyperlora.search import Result, Trial
from hyperlora.study import REFERENCE, analyse, measured, row
from hyperlora.study_page import study_page
from hyperlora.tasks import FAMILIES
from pipelines import screens
from pipelines.common import (
    MOST,
    alone,
    check_out,
    command_line,
    gathered,
    load_recipe,
    number,
    owned,
    tell,
    write_json,
)
from pipelines.cost import Cost, probe
from pipelines.searching import Log, run_planned, tracked_trials, write_result
from tune_spaces.design import DESIGNS, points_of
from tune_spaces.reading import read_space
from tune_spaces.space import BoundSpace, Space, Values, recipe_with

FILES = ("study.html", "study.json", "trials.csv", "trials.parquet")


@dataclass(frozen=True)
class Options:
    """What the command line says, checked.

    Attributes:
        recipe: as a trial runs it.
        tracked: the user's recipe, whose ``mlflow`` section holds.
        rates: learning rates that uniform LoRA tries first; empty: it does not run.
    """

    recipe: Recipe
    tracked: Recipe
    space: Space
    design: str
    points: int
    seeds: list[int]
    metric: str
    rates: list[float]
    concurrency: int
    out: str
    command: str


@dataclass(frozen=True)
class Study:
    """Everything that is decided before the first trial.

    Attributes:
        points: settings of the knobs.
        reference: label and rank of uniform LoRA, and its recipe; None when it does not run.
    """

    options: Options
    space: BoundSpace
    points: list[Values]
    reference: tuple[str, int, Recipe] | None
    plan: dict[str, Any]

    def wanted(self, done: Mapping[str, Result]) -> tuple[list[Trial], int]:
        """Trials known to be wanted in the order to run them, and at least how many more will follow."""
        trials, later = [], 0
        if self.reference is not None:
            records = [record(r.trial, r) for r in done.values() if isinstance(r.trial.key, Entry)]
            entries, later = planned([REFERENCE], self.options.rates, self.options.seeds, records)
            trials += [self._reference_trial(entry) for entry in entries]
        for seed in self.options.seeds:
            trials += [self._trial(n, values, seed) for n, values in enumerate(self.points)]
        return trials, later

    def _trial(self, n: int, values: Values, seed: int) -> Trial:
        recipe = self.space.recipe_at(values).model_copy(update={"seed": seed})
        name = f"p{n:03d}-seed{seed}"
        return Trial(name, self._uri(name), recipe, (n, values))

    def _reference_trial(self, entry: Entry) -> Trial:
        assert self.reference is not None
        recipe = recipe_with(self.reference[2], {"optimizer.lr": entry.lr, "seed": entry.seed})
        return Trial(entry.name, self._uri(entry.name), recipe, entry)

    def _uri(self, name: str) -> str:
        return f"{self.options.out}/trials/{name}"


def record(trial: Trial, result: Result | None) -> dict[str, Any]:
    """A trial as the analysis reads it."""
    base = {
        "trial": trial.name,
        "seed": trial.recipe.seed,
        "status": result.status if result else "missing",
        "reason": result.reason if result else None,
        "crashed": bool(result and result.crashed),
        "outcome": result.outcome if result else None,
        "peak_memory_bytes": result.peak_memory_bytes if result else None,
    }
    if isinstance(trial.key, Entry):
        entry = trial.key
        values = {"optimizer.lr": entry.lr}
        base |= {"contestant": entry.contestant, "lr": entry.lr, "stage": entry.stage}
        return base | {"kind": "reference", "point": None, "values": values}
    n, values = trial.key
    return base | {"kind": "point", "point": n, "values": values}


def main(args: Namespace, console: Console) -> int:
    """Validate, show the cost, run what is missing, and write the result; returns the exit status."""
    options = resolved(args)
    with console.status("checking recipe, data and model"):
        estimate = inspect(options.recipe)
        study = _decide(options, estimate)
    cost = None
    if options.recipe.ray.address is None:
        with console.status("timing a few steps"):
            cost = probe(options.recipe, estimate.notes)
    trials, later = study.wanted({})
    tell(console, estimate.notes)
    console.print(screens.study_plan(study.plan, estimate, len(trials) + later, _hours(study, cost), options.out))
    if args.dry_run:
        write_json(args.json, study.plan | {"trials": len(trials) + later, "seconds": _hours(study, cost)})
        return 0
    mlflow = tracked_trials(
        options.tracked,
        options.out,
        study.plan,
        "study",
        PARAMS,
        record=lambda result: record(result.trial, result),
        figures=_figures,
        files=FILES,
    )
    with owned(options.out, "study"), mlflow as (log, finish):
        result = _run(study, estimate.rows_sha256, console, args.verbose, log)
        finish(result)
    screens.study_summary(console, result, options.out)
    write_json(args.json, result)
    return 0 if result["complete"] and any(point["n"] for point in result["points_measured"]) else 1


# ---------------------------------------------------------------- before anything runs


def resolved(args: Namespace) -> Options:
    """Everything that the command line says.

    Raises:
        RecipeError: with all that is wrong with options, recipe and space.
    """
    problems: list[Problem] = []
    recipe = gathered(problems, lambda: load_recipe(args.recipe, args.overrides))
    space = gathered(problems, lambda: read_space(args.space))
    rates = []
    if args.lora_lrs != "none":
        allowed = "learning rates above 0, or none"
        rates = [rate(number("--lora-lrs", t, float, allowed, problems)) for t in args.lora_lrs.split(",")]
    seeds = number("--seeds", args.seeds, int, f"a whole number of seeds, 1 to {MOST}", problems)
    points = number("--points", args.points, int, f"a whole number of points, 1 to {MOST}", problems)
    concurrency = number("--concurrency", args.concurrency, int, f"a whole number of trials, 1 to {MOST}", problems)
    if args.design not in DESIGNS:
        problems.append(Problem("--design", args.design, f"allowed: {', '.join(DESIGNS)}"))
    metric = args.metric
    if recipe is not None:
        names = dict.fromkeys((FAMILIES[recipe.task.kind].metric, "held_out_loss"))
        metric = metric or next(iter(names))
        if metric not in names:
            problems.append(Problem("--metric", metric, f"allowed: {', '.join(names)}"))
    check_out(args.out, problems)
    if problems:
        raise RecipeError(problems)
    assert recipe is not None
    assert space is not None
    out = uris.absolute(args.out or f"{recipe.storage.uri}/study-{recipe.name}-{space.name}")
    options = ("space", "seeds", "design", "points", "metric", "lora-lrs", "concurrency", "out")
    return Options(
        recipe=trial_recipe(recipe),
        tracked=recipe,
        space=space,
        design=args.design,
        points=points,
        seeds=list(range(1, seeds + 1)),
        metric=metric,
        rates=sorted(set(rates)),
        concurrency=concurrency,
        out=out,
        command=command_line(args, *options),
    )


def trial_recipe(recipe: Recipe, workers: int = 1) -> Recipe:
    """The recipe that all trials of a search start from: alone, the base model not evaluated again by each."""
    trial = alone(recipe, workers)
    training = trial.training.model_copy(update={"eval_before": False})
    # Heads and magnitudes learn at one rate whatever rate is varied.
    other = recipe.optimizer.lr if recipe.optimizer.other_lr is None else recipe.optimizer.other_lr
    optimizer = recipe.optimizer.model_copy(update={"other_lr": other})
    return trial.model_copy(update={"training": training, "optimizer": optimizer})


def _decide(options: Options, estimate: Estimate) -> Study:
    """The points, and uniform LoRA.

    Raises:
        RecipeError: the space does not fit the recipe, or LoRA cannot run with it.
    """
    space = options.space.bind(options.recipe, estimate)
    points = points_of(space, options.design, options.points)  # type: ignore[arg-type]
    reference = None
    if options.rates and METHODS[options.recipe.method].singular_values:
        reference = _uniform_lora(options.recipe)
        inspect(reference[2])
    plan = {
        "name": options.recipe.name,
        "command": options.command,
        "space": options.space.name,
        "design": options.design,
        "metric": options.metric,
        "steps": estimate.steps,
        "seeds": options.seeds,
        "points": points,
        "parameters": parameters(space),
        "reference": None if reference is None else {"label": reference[0], "rank": reference[1]},
        "recipe": options.recipe.model_dump(mode="json"),
        "provenance": provenance(options.recipe),
    }
    return Study(options, space, points, reference, plan)


def _uniform_lora(recipe: Recipe) -> tuple[str, int, Recipe]:
    """Plain LoRA with the rank that pruning ends at, or the next whole one above, at the same alpha/rank."""
    rank = math.ceil(recipe.target_rank)
    alpha = recipe.adapter.alpha * rank / recipe.adapter.rank
    values = {"method": "lora", "adapter.rank": rank, "adapter.alpha": alpha, "adapter.target_rank": None}
    # It has no hypernetwork to start from, and no λ.
    values |= {"hypernetwork.init_from": None, "hypernetwork.freeze": "none", "optimizer.lambda_ratio": 1.0}
    return f"uniform LoRA of rank {rank}", rank, recipe_with(recipe, values)


def parameters(space: BoundSpace) -> list[dict[str, Any]]:
    """The knobs as the analysis reads them."""
    fields = ("key", "label", "choices", "low", "high", "log", "integer", "default")
    return [{name: getattr(domain, name) for name in fields} for domain in space.domains]


def provenance(recipe: Recipe) -> dict[str, Any]:
    """Where a search's numbers come from."""
    git = tracking.git_state()
    return {
        "recipe_fingerprint": recipe_fingerprint(recipe),
        "data_fingerprint": data_fingerprint(recipe),
        "versions": tracking.versions(),
        "git": {k.removeprefix("git."): v for k, v in git.items()},
        "machine": tracking.machine(),
    }


def _hours(study: Study, cost: Cost | None) -> float | None:
    """Seconds that all trials will take; None when no step was timed."""
    if cost is None:
        return None
    trials, later = study.wanted({})
    each = cost.seconds(study.plan["steps"], study.options.recipe.training.eval_every)
    return each * (len(trials) + later) / study.options.concurrency


# ---------------------------------------------------------------- running

PARAMS = ("command", "space", "design", "metric", "steps", "seeds")


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The study's own numbers for MLflow."""
    found = {f"importance/{key}": share["mean"] for key, share in result["importances"].items()}
    for e in result["effects"]:
        found |= {f"effect/{e['key']}": e["effect"]["mean"]} if e["effect"]["mean"] is not None else {}
    if result["dynamic_rank"] is not None:
        found["dynamic_rank_against_lora"] = result["dynamic_rank"]["chosen"]["mean"]
    return found


def _run(study: Study, sha256: Mapping[str, str], console: Console, verbose: bool, log: Log) -> dict[str, Any]:
    """Run the trials that are missing, with the partial result on disk on the way; returns the whole result."""
    options = study.options
    return run_planned(
        study.wanted,
        options.recipe,
        options.concurrency,
        console,
        best=lambda done: _best(done, options.metric),
        line=lambda result: _line(result, options.metric),
        write=lambda done: _write(study, done),
        out=options.out,
        sha256=sha256,
        log=log,
        verbose=verbose,
    )


def _best(done: Mapping[str, Result], metric: str) -> str:
    """The trial with the best metric so far."""
    values = {name: measured(r.outcome, metric) for name, r in done.items() if r.outcome is not None}
    name = max(values, key=lambda n: values[n][0] if values[n][1] else -values[n][0], default=None)
    return "" if name is None else f"best {name} {values[name][0]:.4f}"


def _line(result: Result, metric: str) -> str:
    if result.outcome is None:
        return f"[red]{result.trial.name} failed[/]: {escape(str(result.reason))}"
    value = measured(result.outcome, metric)[0]
    return f"{result.trial.name}: {metric.replace('_', ' ')} {value:.4f}  {result.outcome['training_seconds']:.0f} s"


def _write(study: Study, done: Mapping[str, Result]) -> dict[str, Any]:
    """Analyse what there is and write page, JSON and tables."""
    records = [record(trial, done.get(trial.name)) for trial in study.wanted(done)[0]]
    result = analyse(records, study.plan)
    write_result(
        study.options.out, "study", result, study_page(result), [row(r, study.options.metric) for r in records]
    )
    return result
