"""``hyperlora compare``: methods x learning rates x seeds of one task, equal in everything else.

OUT/trials/CONTESTANT-lrLR-seedSEED/   what search.py keeps of a trial
OUT/comparison.json, comparison.html   the result, also while trials are missing
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from hyperlora import tracking, uris
from hyperlora.comparison import analyse, final_loss
from hyperlora.config import Problem, Recipe, RecipeError, first_line
from hyperlora.field import Contestant, Entry, planned, rate, read_field, resolve
from hyperlora.preflight import Estimate, inspect
from hyperlora.report import comparison_page
from hyperlora.search import Result, Trial
from pipelines import screens
from pipelines.common import (
    MOST,
    alone,
    check_out,
    command_line,
    gathered,
    is_file,
    load_recipe,
    number,
    owned,
    shipped,
    tell,
    write_json,
)
from pipelines.searching import fetched, run_planned, tracked, write_result

logger = logging.getLogger(__name__)

SELECTION = (
    "Every contestant's learning rate is the one with the lowest training loss (mean over the last tenth of the steps) "
    "at seed 0, which is not among the reported seeds; the held-out metric has no part in it."
)


@dataclass(frozen=True)
class Comparison:
    """Everything that is decided before the first trial."""

    recipe: Recipe
    contestants: list[Contestant]
    baseline: str
    rates: list[float]
    seeds: list[int]
    concurrency: int
    out: str
    command: str

    def plan(self, steps: int) -> dict[str, Any]:
        """What the analysis is told beside the records."""
        git = tracking.git_state()
        return {
            "name": self.recipe.name,
            "command": self.command,
            "baseline": self.baseline,
            "steps": steps,
            "lrs": self.rates,
            "seeds": self.seeds,
            "recipe": self.recipe.model_dump(mode="json"),
            "contestants": [{"name": c.name, "label": c.label, "set": c.changes} for c in self.contestants],
            "selection": SELECTION,
            "provenance": {
                "versions": tracking.versions(),
                "git": {k.removeprefix("git."): v for k, v in git.items()},
                "machine": tracking.machine(),
            },
        }

    def wanted(self, done: Mapping[str, Result]) -> tuple[list[Trial], int]:
        """Trials known to be wanted in the order to run them, and at least how many more will follow."""
        records = [record(result.trial, result) for result in done.values()]
        entries, later = planned([c.name for c in self.contestants], self.rates, self.seeds, records)
        return [self._trial(entry) for entry in entries], later

    def _trial(self, entry: Entry) -> Trial:
        (recipe,) = (c.recipe for c in self.contestants if c.name == entry.contestant)
        optimizer = recipe.optimizer.model_copy(update={"lr": entry.lr})
        recipe = recipe.model_copy(update={"seed": entry.seed, "optimizer": optimizer})
        return Trial(entry.name, f"{self.out}/trials/{entry.name}", recipe, entry)


def record(trial: Trial, result: Result | None) -> dict[str, Any]:
    """A trial as the analysis reads it."""
    entry: Entry = trial.key
    return {
        "contestant": entry.contestant,
        "lr": entry.lr,
        "seed": entry.seed,
        "stage": entry.stage,
        "status": result.status if result else "missing",
        "reason": result.reason if result else None,
        "crashed": bool(result and result.crashed),
        "outcome": result.outcome if result else None,
        "peak_memory_bytes": result.peak_memory_bytes if result else None,
    }


def main(args: Namespace, console: Console) -> int:
    """Validate, run what is missing, and write the result; returns the exit status."""
    comparison = resolved(args)
    with console.status("checking every contestant's recipe, data and model"):
        estimates = _inspect(comparison.contestants)
    plan = comparison.plan(next(iter(estimates.values())).steps)
    tell(console, next(iter(estimates.values())).notes)
    console.print(screens.comparison_plan(comparison.contestants, estimates, plan, comparison.out))
    if args.dry_run:
        sizes = {name: e.to_json() for name, e in estimates.items()}
        write_json(args.json, {**plan, "out": comparison.out, "estimates": sizes})
        return 0
    with owned(comparison.out, "comparison"), _tracked(comparison, plan) as log:
        sha256 = next(iter(estimates.values())).rows_sha256
        result = _run(comparison, plan, sha256, console, args.verbose)
        if result["complete"]:
            log(result)
    screens.comparison_summary(console, result, comparison.out)
    write_json(args.json, result)
    (baseline,) = (c for c in result["contestants"] if c["name"] == comparison.baseline)
    return 0 if result["complete"] and baseline["trials"] else 1


# ---------------------------------------------------------------- before anything runs


def resolved(args: Namespace) -> Comparison:
    """Everything that the command line says.

    Raises:
        RecipeError: with all that is wrong with options, recipe, field and contestants.
    """
    problems: list[Problem] = []
    rates, seeds, concurrency = _options(args, problems)
    recipe = gathered(problems, lambda: load_recipe(args.recipe, args.overrides))
    field = None
    fields = shipped("fields")
    path = fields.get(args.field, Path(args.field))
    if not is_file(path):
        problems.append(Problem("--field", args.field, f"a YAML file or one of: {', '.join(fields)}"))
    else:
        field = gathered(problems, lambda: read_field(path))
    contestants: list[Contestant] = []
    if recipe is not None and field is not None:
        only = [name.strip() for name in args.only.split(",") if name.strip()]
        trial = alone(recipe)
        contestants = gathered(problems, lambda: resolve(field, trial, only)) or []
    check_out(args.out, problems)
    if problems:
        raise RecipeError(problems)
    assert recipe is not None
    assert field is not None
    suffix = "" if args.field == "default" else f"-{path.stem}"
    out = uris.absolute(args.out or f"{recipe.storage.uri}/compare-{recipe.name}{suffix}")
    command = command_line(args, "field", "only", "lrs", "seeds", "concurrency", "out")
    return Comparison(recipe, contestants, field.baseline, rates, seeds, concurrency, out, command)


def _options(args: Namespace, problems: list[Problem]) -> tuple[list[float], list[int], int]:
    """Learning rates, reported seeds and trials at a time."""
    rates = {
        rate(number("--lrs", text, float, f"learning rates above 0, separated by commas, at most {MOST}", problems))
        for text in args.lrs.split(",")
    }
    seeds = number("--seeds", args.seeds, int, f"a whole number of seeds, 1 to {MOST}", problems)
    concurrency = number("--concurrency", args.concurrency, int, f"a whole number of trials, 1 to {MOST}", problems)
    return sorted(rates), list(range(1, seeds + 1)), concurrency


def _inspect(contestants: Sequence[Contestant]) -> dict[str, Estimate]:
    """Sizes of every contestant, by name.

    Raises:
        RecipeError: with what is wrong with each; what is wrong with all is told once.
    """
    found: dict[str, Estimate] = {}
    problems: dict[str, tuple[Problem, list[str]]] = {}
    for contestant in contestants:
        try:
            found[contestant.name] = inspect(contestant.recipe)
        except RecipeError as error:
            for problem in error.problems:
                problems.setdefault(str(problem), (problem, []))[1].append(contestant.name)
    if problems:
        everybody = len(contestants)
        raise RecipeError(
            [
                p if len(names) == everybody else Problem(f"{', '.join(names)}: {p.field}", p.value, p.allowed)
                for p, names in problems.values()
            ]
        )
    return found


# ---------------------------------------------------------------- running


@contextmanager
def _tracked(comparison: Comparison, plan: Mapping[str, Any]) -> Iterator[Any]:
    """The comparison's MLflow run, if there is to be one; yields what logs the finished result to it."""
    recipe, out = comparison.recipe, comparison.out
    params = {k: plan[k] for k in ("command", "baseline", "steps", "lrs", "seeds", "selection")}
    with tracked(recipe, out, f"compare-{plan['name']}", params, "comparison") as run_id:

        def log(result: Mapping[str, Any]) -> None:
            if run_id is not None:
                try:
                    with fetched(out, ("comparison.json", "comparison.html")) as files:
                        tracking.finish_comparison(recipe, run_id, result, files)
                except tracking.ERRORS as error:
                    logger.warning("MLflow lacks what is in %s; the same command logs it: %s", out, first_line(error))

        yield log


def _run(
    comparison: Comparison, plan: Mapping[str, Any], sha256: Mapping[str, str], console: Console, verbose: bool
) -> dict[str, Any]:
    """Run the trials that are missing, with the partial result on disk on the way; returns the whole result."""
    return run_planned(
        comparison.wanted,
        alone(comparison.recipe),
        comparison.concurrency,
        console,
        best=_best,
        line=_line,
        write=lambda done: _write(comparison, plan, done),
        out=comparison.out,
        sha256=sha256,
        verbose=verbose,
    )


def _best(done: Mapping[str, Result]) -> str:
    """The trial with the lowest training loss so far."""
    scores = {name: final_loss(r.outcome["losses"]) for name, r in done.items() if r.outcome is not None}
    name = min(scores, key=lambda n: scores[n], default=None)
    return "" if name is None else f"best {name} {scores[name]:.4f}"


def _line(result: Result) -> str:
    if result.outcome is None:
        return f"[red]{result.trial.name} failed[/]: {escape(str(result.reason))}"
    o = result.outcome
    score = f"{o['metric'].replace('_', ' ')} {o['metric_after']:.4f}"
    return f"{result.trial.name}: training loss {final_loss(o['losses']):.4f}  {score}  {o['training_seconds']:.0f} s"


def _write(comparison: Comparison, plan: Mapping[str, Any], done: Mapping[str, Result]) -> dict[str, Any]:
    """Analyse what there is and write ``comparison.json`` and ``comparison.html``."""
    trials, _ = comparison.wanted(done)
    result = analyse([record(trial, done.get(trial.name)) for trial in trials], plan)
    write_result(comparison.out, "comparison", result, comparison_page(result))
    return result
