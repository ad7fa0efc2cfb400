"""``hyperlora train``: one recipe, one run, one adapter."""

from __future__ import annotations

import os
import shlex
import sys
import time
from argparse import Namespace
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hyperlora import runs, storage, tracking
from hyperlora.config import METHODS, Recipe, RecipeError
from hyperlora.ownership import Lease, OwnedElsewhereError, ReplacedError
from hyperlora.preflight import Estimate, inspect
from hyperlora.stopping import Notice, StoppedError
from hyperlora.training import RunInfo, Tee, train
from pipelines import screens
from pipelines.common import in_job, load_recipe, tell, typed, write_json
from pipelines.deliver import deliver
from pipelines.progress import ProgressSink


def main(args: Namespace, console: Console) -> int:
    """Validate, train, and show what came of it; returns the exit status."""
    started = time.monotonic()
    named = load_recipe(args.recipe, args.overrides)
    # Workers have their own working directory: paths mean the same from there.
    recipe = named.with_absolute_paths()
    with console.status("checking recipe, data and model") as status:
        estimate = inspect(recipe, resume=args.resume, say=status.update)
    tell(console, estimate.notes)
    if args.dry_run:
        console.print(screens.estimate(recipe, estimate))
        write_json(args.json, {"recipe": recipe.model_dump(mode="json"), "estimate": estimate.to_json()})
        return 0
    if recipe.mlflow.enabled:
        try:
            tracking.check(recipe)
            for run, reason in deliver(tracking.missed(recipe.mlflow.tracking_uri)):
                said = "has got what it missed" if reason is None else f"still misses something: {reason}"
                console.print(Text(f"MLflow run {run.run_id} {said}", "dim"), soft_wrap=True)
        except RecipeError as error:
            # A run that goes on keeps its metrics until the server is back.
            if not args.resume:
                raise
            console.print(Text(f"going on without MLflow for now: {error}", "yellow"), soft_wrap=True)
    with ExitStack() as stack:
        if recipe.ray.backend == "ray":
            from hyperlora.distributed import cluster, unused_gpus

            with console.status("starting Ray"):
                stack.enter_context(cluster(recipe, args.verbose))
            if gpus := unused_gpus(recipe):
                console.print(screens.unused_gpus(gpus), soft_wrap=True)
        with console.status("claiming the run's folder"):
            claimed, lease = _claim(recipe, args.resume, console)
        stack.enter_context(lease)
        return _train(named, recipe, claimed, estimate, args, console, started)


def _train(
    named: Recipe,
    recipe: Recipe,
    claimed: RunInfo,
    estimate: Estimate,
    args: Namespace,
    console: Console,
    started: float,
) -> int:
    """Train in a run's folder, and show what came of it."""
    info = replace(_open_run(recipe, claimed, estimate, args.resume), rows=estimate.rows)
    console.print(
        f"[bold]{recipe.name}[/] ({recipe.method}) in {screens.local(info.uri)}", highlight=False, soft_wrap=True
    )
    sink = ProgressSink(console, estimate.steps)
    try:
        _run(recipe, info, sink, args.verbose)
        outcome = runs.result(info.uri)
        assert outcome is not None, f"the run in {info.uri} ended without result.json"
        if info.mlflow_run_id is not None:
            sink.phase("drawing")
            tracking.finish(recipe, info.mlflow_run_id, outcome)
    except BaseException as error:
        sink.close()
        if info.mlflow_run_id is not None:
            if _is_finished(info.uri) and not isinstance(error, ReplacedError):
                _leave_to_deliver(recipe, info.mlflow_run_id, info.uri, console)
            else:
                status = "KILLED" if isinstance(error, KeyboardInterrupt | StoppedError) else "FAILED"
                tracking.fail(recipe, info.mlflow_run_id, status)
        raise
    sink.close()
    wall = time.monotonic() - started
    screens.summary(console, outcome, recipe, estimate.adalora, wall, _next(named, info, args))
    if info.mlflow_run_id in {run.run_id for run in tracking.missed()}:
        said = f"\nMLflow was away; {_sender()} what it missed, once it is back"
        console.print(Text(said, "yellow"), soft_wrap=True)
    write_json(args.json, runs.summary(outcome, wall))
    return 0


def _claim(recipe: Recipe, resume: bool, console: Console) -> tuple[RunInfo, Lease]:
    """The run's folder; of one that a kill ended between its last write and MLflow, MLflow gets to know that later."""
    try:
        return runs.claim(recipe, resume)
    except RecipeError as error:
        (problem, *_) = error.problems
        if recipe.mlflow.enabled and problem.field == "--resume" and _is_finished(str(problem.value)):
            uri = str(problem.value)
            run_id = (runs.begun(uri) or {}).get("mlflow_run_id")
            if run_id is not None and tracking.left_open(recipe, run_id):
                with suppress(OwnedElsewhereError), Lease(uri):  # whoever has it is telling MLflow now
                    _leave_to_deliver(recipe, run_id, uri, console)
        raise


def _is_finished(uri: str) -> bool:
    """Asked once: the store may be what the run has failed on. Who reads the outcome finds out if it is damaged."""
    try:
        storage.read(f"{uri}/{runs.RESULT}")
    except OSError:
        return False
    return True


def _leave_to_deliver(recipe: Recipe, run_id: str, uri: str, console: Console) -> None:
    tracking.finished(recipe, run_id, uri)
    said = f"the run in {screens.local(uri)} is finished; {_sender()} what MLflow does not know of it yet"
    console.print(Text(said, "yellow"), soft_wrap=True)


def _sender() -> str:
    """Who sends MLflow what this machine keeps for it; a job's is seldom the one where this is read."""
    if in_job():
        host = os.uname().nodename
        return f"the next run on this cluster that goes to this server, or hyperlora deliver on {host}, sends"
    return "hyperlora deliver sends"


def _open_run(recipe: Recipe, info: RunInfo, estimate: Estimate, resume: bool) -> RunInfo:
    """Record a run in its folder and in MLflow."""
    known = info.mlflow_run_id
    if resume and recipe.mlflow.enabled and known is not None and tracking.resume(recipe, known):
        return info
    info = replace(info, mlflow_run_id=None)
    if not resume:
        runs.record(info, recipe)
    # Killed before MLflow knew of it, or now on another server, a run gets its MLflow run when it goes on.
    if not recipe.mlflow.enabled:
        return info
    facts = {
        "total_steps": estimate.steps,
        "rank_target": estimate.rank_target,
        "trainable_parameters": estimate.sizes.trainable,
        "pruning": estimate.pruning,
        **estimate.decided,
    }
    info = replace(info, mlflow_run_id=tracking.start(recipe, info.uri, info.uri.rsplit("/", 1)[1], facts))
    runs.record(info, recipe)
    return info


def _run(recipe: Recipe, info: RunInfo, sink: ProgressSink, verbose: bool) -> None:
    if recipe.ray.backend == "ray":
        from hyperlora import distributed

        distributed.run(recipe, info, sink, verbose=verbose)
        return
    tracked = (
        [] if info.mlflow_run_id is None else [tracking.MLflowSink(recipe.mlflow.tracking_uri, info.mlflow_run_id)]
    )
    with Notice() as notice:
        train(recipe, info, sink=Tee(sink, *tracked), stop=notice.given)


def _next(recipe: Recipe, info: RunInfo, args: Namespace) -> list[str]:
    # vLLM serves nothing but LoRA's matrices.
    more = METHODS[recipe.method].dora or recipe.task.kind == "classification" or recipe.adapter.modules_to_save
    padded = "" if more else " --uniform-rank"
    commands = [f"hyperlora export {shlex.quote(screens.local(info.uri))} my-adapter{padded}"]
    if recipe.mlflow.enabled:
        store = shlex.quote(recipe.mlflow.tracking_uri)
        local = recipe.mlflow.tracking_uri.startswith("sqlite:")
        commands.append(f"mlflow ui --backend-store-uri {store}" if local else f"open {recipe.mlflow.tracking_uri}")
    same = shlex.join(typed(["train", args.recipe, *args.overrides]))
    h = recipe.hypernetwork
    warm = h.init_from is not None or h.freeze != "none"
    cold = " hypernetwork.init_from=null hypernetwork.freeze=none" if warm else ""
    commands.append(f"hyperlora {same} method=adalora{cold}")
    # The commands of an environment that is not activated are found only by their path.
    folder = Path(sys.executable).parent
    if folder.as_posix() not in os.environ.get("PATH", "").split(os.pathsep):
        commands.insert(0, f"source {os.path.relpath(folder / 'activate')}")
    return commands
