"""``hyperlora tune``: a sampler looks for the best point of a space, with early stopping.

OUT/trials/tNUMBER/              what tuning.py keeps of a trial
OUT/tune.json, tune.html         the result, also while trials are missing
OUT/trials.csv, trials.parquet   all trials as a table
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from hyperlora import tuning, uris
from hyperlora.config import METHODS, Problem, Recipe, RecipeError
from hyperlora.preflight import Estimate, inspect
from hyperlora.sampling import SAMPLERS, Objective, Proposals, Searched
from hyperlora.search import Result, Trial
from hyperlora.study import row
from hyperlora.tasks import FAMILIES
from hyperlora.tuning import Search, Stopping
from hyperlora.tuning_report import analyse, tuning_page
from pipelines import screens
from pipelines.common import (
    MOST,
    check_out,
    check_owned,
    command_line,
    gathered,
    load_recipe,
    number,
    owned,
    tell,
    write_json,
)
from pipelines.cost import probe
from pipelines.progress import TrialsProgress
from pipelines.searching import Log, Seldom, tracked_trials, write_result
from pipelines.study import parameters, provenance, trial_recipe
from tune_spaces.reading import read_space
from tune_spaces.space import BoundSpace, Parameter, Space, Values

FILES = ("tune.html", "tune.json", "trials.csv", "trials.parquet")
#: Of a whole trial, for early stopping, where neither --evaluations nor the recipe says how many.
EVALUATIONS = 8
#: What --objectives names, beside the metric.
OTHERS = {"rank": "rank_final", "seconds": "training_seconds"}
KEPT_RANK = Parameter(
    key="adapter.target_rank", label="kept rank", low=0.125, high=1, unit="rank", integer=True, levels=(0.25, 0.5, 1)
)


@dataclass(frozen=True)
class Options:
    """What the command line says, checked.

    Attributes:
        recipe: as a trial runs it.
        tracked: the user's recipe, whose ``mlflow`` section holds.
        watched: metric that early stopping compares; None: every trial runs to its end.
        evaluations: of a whole trial; None: the command line does not say.
        concurrency: None takes what the cluster holds.
    """

    recipe: Recipe
    tracked: Recipe
    space: Space
    sampler: str
    trials: int
    metric: str
    objectives: list[Objective]
    watched: Objective | None
    seed: int
    evaluations: int | None
    concurrency: int | None
    out: str
    command: str


@dataclass(frozen=True)
class Tuning:
    """Everything that is decided before the first trial."""

    options: Options
    space: BoundSpace
    recipe: Recipe
    plan: dict[str, Any]

    def trial(self, name: str, values: Values) -> Trial:
        """The trial at a point."""
        return Trial(name, f"{self.options.out}/trials/{name}", self.space.recipe_at(values), values)

    def search(self) -> Search:
        o, steps = self.options, self.plan["steps"]
        stopping = None
        if o.watched is not None:
            first = self.recipe.training.eval_every or steps
            stopping = Stopping(o.watched.name, o.watched.higher, min(first, steps), steps)
        return Search(o.out, self.plan["trials"], self.trial, o.objectives, stopping, o.concurrency)

    def proposals(self) -> Proposals:
        grid = self.space.feasible(self.space.grid()) if self.options.sampler == "grid" else []
        searched = Searched(
            self.plan["parameters"], self.space.suggest, self.space.infeasible, grid, self.space.start()
        )
        o = self.options
        return Proposals(o.sampler, searched, o.objectives, o.seed, parallel=o.concurrency != 1)  # type: ignore[arg-type]


def main(args: Namespace, console: Console) -> int:
    """Validate, show the cost, run what is missing, and write the result; returns the exit status."""
    options = resolved(args)
    with console.status("checking recipe, data and model"):
        estimate = inspect(options.recipe)
        tuned = _decide(options, estimate)
    seconds = None
    if options.recipe.ray.address is None and options.recipe.ray.most == 1:
        with console.status("timing a few steps"):
            cost = probe(tuned.recipe, estimate.notes)
        if cost is not None:
            each = cost.seconds(tuned.plan["steps"], tuned.recipe.training.eval_every)
            seconds = tuned.plan["trials"] * each
    tell(console, estimate.notes)
    console.print(screens.tuning_plan(tuned.plan, seconds, options.out))
    if args.dry_run:
        write_json(args.json, tuned.plan | {"seconds": seconds})
        return 0
    mlflow = tracked_trials(
        options.tracked,
        options.out,
        tuned.plan,
        "tuning",
        PARAMS,
        record=record,
        figures=_figures,
        files=FILES,
    )
    with owned(options.out, "search"), mlflow as (log, finish):
        result = _run(tuned, estimate.rows_sha256, console, args.verbose, log)
        finish(result)
    screens.tuning_summary(console, result, options.out)
    write_json(args.json, result)
    return 0 if result["complete"] and result["counts"]["finished"] else 1


# ---------------------------------------------------------------- before anything runs


def resolved(args: Namespace) -> Options:
    """Everything that the command line says.

    Raises:
        RecipeError: with all that is wrong with options, recipe and space.
    """
    problems: list[Problem] = []
    recipe = gathered(problems, lambda: load_recipe(args.recipe, args.overrides))
    space = gathered(problems, lambda: read_space(args.space))
    whole = f"a whole number, 1 to {MOST}"
    trials = number("--trials", args.trials, int, whole, problems)
    workers = number("--workers", args.workers, int, whole, problems)
    evaluations = number("--evaluations", args.evaluations, int, whole, problems) if args.evaluations else None
    concurrency = number("--concurrency", args.concurrency, int, whole, problems) if args.concurrency else None
    seed = number("--seed", args.seed, int, whole, problems)
    if args.sampler not in SAMPLERS:
        problems.append(Problem("--sampler", args.sampler, f"allowed: {', '.join(SAMPLERS)}"))
    metric, objectives, watched = args.metric, [], None
    if recipe is not None:
        family = FAMILIES[recipe.task.kind]
        metrics = {"held_out_loss": False, family.metric: family.higher_is_better}
        metric = metric or family.metric
        if metric not in metrics:
            problems.append(Problem("--metric", metric, f"allowed: {', '.join(metrics)}"))
        if args.stop_on not in (*metrics, "none"):
            problems.append(Problem("--stop-on", args.stop_on, f"allowed: {', '.join(metrics)}, none"))
        objectives = _objectives(args.objectives, metric, metrics.get(metric, False), problems)
        # Stopping by one objective would decide the trade-off.
        if args.stop_on in metrics and len(objectives) == 1:
            watched = Objective(args.stop_on, metrics[args.stop_on])
        if workers > 0 and recipe.training.batch_size % workers:
            problems.append(
                Problem("--workers", workers, f"must divide the batch of {recipe.training.batch_size} rows")
            )
    check_out(args.out, problems)
    if problems:
        raise RecipeError(problems)
    assert recipe is not None
    assert space is not None
    prunes = METHODS[recipe.method].singular_values  # the rank of others is what adapter.rank says
    keys = {p.key for p in space.parameters}
    if prunes and any(o.name == "rank_final" for o in objectives) and KEPT_RANK.key not in keys:
        space = space.model_copy(update={"parameters": (*space.parameters, KEPT_RANK)})
    shown = ("space", "trials", "sampler", "metric", "objectives", "stop-on", "evaluations", "seed", "workers")
    out = uris.absolute(args.out or f"{recipe.storage.uri}/tune-{recipe.name}-{space.name}")
    return Options(
        recipe=trial_recipe(recipe, workers),
        tracked=recipe,
        space=space,
        sampler=args.sampler,
        trials=trials,
        metric=metric,
        objectives=objectives,
        watched=watched,
        seed=seed,
        evaluations=evaluations,
        concurrency=concurrency,
        out=out,
        command=command_line(args, *shown, "concurrency", "out"),
    )


def _objectives(text: str, metric: str, higher: bool, problems: list[Problem]) -> list[Objective]:
    """The metric first, then rank and seconds as asked for."""
    names = [name.strip() for name in text.split(",")]
    allowed = f"allowed: metric, {', '.join(OTHERS)}; metric is among them"
    if "metric" not in names or any(name not in ("metric", *OTHERS) for name in names):
        problems.append(Problem("--objectives", text, allowed))
    return [Objective(metric, higher)] + [Objective(OTHERS[n], False) for n in dict.fromkeys(names) if n in OTHERS]


def _decide(options: Options, estimate: Estimate) -> Tuning:
    """The space in the recipe's units, and the recipe with the evaluations that early stopping needs.

    Raises:
        RecipeError: the space does not fit the recipe.
    """
    recipe, steps = options.recipe, estimate.steps
    if options.watched is not None:
        every = recipe.training.eval_every or max(1, steps // (options.evaluations or EVALUATIONS))
        if recipe.training.eval_every:
            note = f"the recipe's training.eval_every={every} says when trials are evaluated; --evaluations does not"
            estimate.notes.append(note)
        # A trial that is killed goes on from where it last reported.
        save = min(recipe.training.checkpoint_every or every, every)
        training = recipe.training.model_copy(update={"eval_every": every, "checkpoint_every": save})
        recipe = recipe.model_copy(update={"training": training})
    elif options.evaluations is not None:
        estimate.notes.append(f"--evaluations={options.evaluations} has no part: no trial is stopped early")
    space = options.space.bind(recipe, estimate)
    trials = options.trials
    if options.sampler == "grid":
        trials = min(trials, len(space.feasible(space.grid())))
    plan = {
        "name": recipe.name,
        "command": options.command,
        "space": options.space.name,
        "sampler": options.sampler,
        "metric": options.metric,
        "objectives": [{"name": o.name, "higher": o.higher} for o in options.objectives],
        "stopping": None if options.watched is None else options.watched.name,
        "steps": steps,
        "trials": trials,
        "parameters": parameters(space),
        "recipe": recipe.model_dump(mode="json"),
        "provenance": provenance(recipe),
    }
    return Tuning(options, space, recipe, plan)


# ---------------------------------------------------------------- running

PARAMS = ("command", "space", "sampler", "metric", "steps", "stopping")


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The search's own numbers for MLflow."""
    found = {f"importance/{key}": share["mean"] for key, share in result["importances"].items()}
    return found if result["best"] is None else found | {"best": result["best"]["metric"]}


def record(result: Result) -> dict[str, Any]:
    """A trial as the analysis reads it."""
    return {
        "trial": result.trial.name,
        "status": result.status,
        "reason": result.reason,
        "values": result.trial.key,
        "seed": result.trial.recipe.seed,
        "outcome": result.outcome,
        "reports": tuning.reports(result.trial),
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def _run(tuned: Tuning, sha256: Mapping[str, str], console: Console, verbose: bool, log: Log) -> dict[str, Any]:
    """Run the trials that are missing, with the partial result on disk after each; returns the whole result."""
    done: dict[str, dict[str, Any]] = {}
    running: dict[str, Trial] = {}
    write_seldom = Seldom(lambda: _write(tuned, done, running))
    progress = TrialsProgress(console, tuned.options.concurrency or 1)

    def show() -> None:
        counts = {s: sum(r["status"] == s for r in done.values()) for s in ("stopped", "failed")}
        progress.show(
            len(done), tuned.plan["trials"], len(running), counts["failed"], _best(done, tuned), counts["stopped"]
        )

    def started(trial: Trial, at_once: int) -> None:
        running[trial.name] = trial
        progress.concurrency = at_once
        show()

    def over(result: Result) -> None:
        name = result.trial.name
        fresh = running.pop(name, None) is not None
        done[name] = record(result)
        if result.outcome is not None:
            progress.finished(result.outcome)
        elif result.status == "stopped":
            progress.stopped(done[name]["reports"][-1]["step"] / tuned.plan["steps"])
        log(result)
        show()
        if fresh:
            progress.line(_line(done[name], tuned.options.metric))
            write_seldom()

    try:
        tuning.run(
            tuned.search(),
            tuned.recipe,
            tuned.proposals(),
            sha256=sha256,
            check=lambda: check_owned(tuned.options.out),
            started=started,
            over=over,
            unused=lambda gpus: console.print(screens.unused_gpus(gpus), soft_wrap=True),
            verbose=verbose,
        )
    except RecipeError as error:
        raise RecipeError([_named(p, tuned.options) for p in error.problems]) from error
    except KeyboardInterrupt:
        _write(tuned, done, running)
        raise
    else:
        if len(done) < tuned.plan["trials"]:
            console.print(f"the space has no more than {len(done)} points that the sampler finds", soft_wrap=True)
            tuned.plan["trials"] = len(done)
        return _write(tuned, done, running)
    finally:
        progress.close()


def _named(problem: Problem, options: Options) -> Problem:
    """A refusal of what nobody has typed, as one of the options that it follows from."""
    if problem.field != "training.eval_every" or options.recipe.training.eval_every is not None:
        return problem
    allowed = f"what gives the trials of one search the same training.eval_every: {problem.allowed}"
    return Problem("--evaluations, --stop-on, --objectives", f"training.eval_every={problem.value}", allowed)


def _best(done: Mapping[str, Mapping[str, Any]], tuned: Tuning) -> str:
    """The trial with the best metric so far."""
    first = tuned.options.objectives[0]
    values = {n: tuning.figure(r["outcome"], first.name) for n, r in done.items() if r["outcome"] is not None}
    name = max(values, key=lambda n: values[n] if first.higher else -values[n], default=None)
    return "" if name is None else f"best {name} {values[name]:.4f}"


def _line(entry: Mapping[str, Any], metric: str) -> str:
    name = entry["trial"]
    if entry["status"] == "failed":
        return f"[red]{name} failed[/]: {escape(str(entry['reason']))}"
    if entry["status"] == "stopped":
        last = entry["reports"][-1]
        return f"{name}: stopped early at step {last['step']:.0f}, {metric.replace('_', ' ')} {last[metric]:.4f}"
    value, seconds = tuning.figure(entry["outcome"], metric), entry["outcome"]["training_seconds"]
    return f"{name}: {metric.replace('_', ' ')} {value:.4f}  {seconds:.0f} s"


def _write(tuned: Tuning, done: Mapping[str, dict[str, Any]], running: Mapping[str, Trial]) -> dict[str, Any]:
    """Analyse what there is and write page, JSON and tables."""
    at_work = [record(Result(t, "failed", None, None, None)) | {"status": "running"} for t in running.values()]
    records = sorted([*done.values(), *at_work], key=lambda r: r["trial"])
    result = analyse(records, tuned.plan)
    rows = [row(r | {"kind": "point", "point": None}, tuned.options.metric) for r in records]
    write_result(tuned.options.out, "tune", result, tuning_page(result), rows)
    return result
