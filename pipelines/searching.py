"""What the commands that run many trials share: the loop over planned trials, MLflow's runs, the files of a result."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from hyperlora import storage, table, tracking
from hyperlora.comparison import Record
from hyperlora.config import Recipe, first_line
from hyperlora.fingerprint import recipe_fingerprint
from hyperlora.search import Result, Trial, run
from hyperlora.storage import StorageError, patiently
from pipelines import screens
from pipelines.common import check_owned
from pipelines.progress import TrialsProgress

logger = logging.getLogger(__name__)

Log = Callable[[Result], None]
Finish = Callable[[Mapping[str, Any]], None]
#: Trials that are wanted now, and how many more the later ones will be, when these results are known.
Wanted = Callable[[Mapping[str, Result]], tuple[Sequence[Trial], int]]


class Seldom:
    """Calls something that takes time from the trials so seldom that it takes a tenth of one core at most."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._next = call, 0.0

    def __call__(self) -> None:
        if (began := time.monotonic()) >= self._next:
            try:
                self._call()
            except StorageError as error:
                logger.warning("the partial result could not be written, the trials go on: %s", error)
            self._next = began + 10 * (time.monotonic() - began)


def run_planned(
    wanted: Wanted,
    recipe: Recipe,
    concurrency: int,
    console: Console,
    *,
    best: Callable[[Mapping[str, Result]], str],
    line: Callable[[Result], str],
    write: Callable[[Mapping[str, Result]], dict[str, Any]],
    out: str,
    sha256: Mapping[str, str],
    log: Log = lambda result: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run the trials that are missing, with the partial result on disk on the way; returns the whole result.

    Args:
        wanted: asked again after every result.
        recipe: says which cluster to use, and what a trial needs of it.
        concurrency: trials at a time.
        console: shows progress.
        best: the best trial so far, in words.
        line: what is printed of a trial that ended.
        write: writes the result of what is known, and returns it.
        out: folder of the whole, which has to be this command's still when a trial starts.
        sha256: of the tokens of each part of the data.
        log: told of every result, those of earlier runs first.
        verbose: show the logs of Ray and of the workers.
    """
    done: dict[str, Result] = {}
    running: set[str] = set()
    write_seldom = Seldom(lambda: write(done))
    progress = TrialsProgress(console, concurrency)

    def show() -> None:
        trials, later = wanted(done)
        failed = sum(r.status == "failed" for r in done.values())
        progress.show(len(done), len(trials) + later, len(running), failed, best(done))

    def started(trial: Trial) -> None:
        running.add(trial.name)
        show()

    results = run(
        lambda known: list(wanted(known)[0]),
        recipe,
        concurrency,
        sha256=sha256,
        check=lambda: check_owned(out),
        started=started,
        unused=lambda gpus: console.print(screens.unused_gpus(gpus), soft_wrap=True),
        verbose=verbose,
    )
    try:
        with closing(results):
            for result in results:
                name = result.trial.name
                done[name] = result
                fresh = name in running
                running.discard(name)
                if result.outcome is not None:
                    progress.finished(result.outcome)
                log(result)
                show()
                if fresh:
                    progress.line(line(result))
                    write_seldom()
    except KeyboardInterrupt:
        write(done)
        raise
    else:
        return write(done)
    finally:
        progress.close()


@contextmanager
def tracked(
    recipe: Recipe, out: str, name: str, params: Mapping[str, Any], kind: str, tags: Mapping[str, str] | None = None
) -> Iterator[str | None]:
    """The MLflow run of what happens in the folder ``out``, marked as it ends; None when nothing is to be tracked."""
    if not recipe.mlflow.enabled:
        yield None
        return
    recipe = recipe.with_absolute_paths()
    run_id = tracking.start_search(recipe, out, name, params, kind, tags)
    try:
        yield run_id
    except BaseException as error:
        tracking.fail(recipe, run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


@contextmanager
def tracked_trials(
    recipe: Recipe,
    out: str,
    plan: Mapping[str, Any],
    kind: str,
    params: Sequence[str],
    *,
    record: Callable[[Result], Record],
    figures: Callable[[Mapping[str, Any]], Mapping[str, float]],
    files: Sequence[str],
) -> Iterator[tuple[Log, Finish]]:
    """The MLflow run of a study or search with one for each trial; yields what logs a trial and the whole result.

    Args:
        recipe: whose ``mlflow`` section holds.
        out: folder of the study or search.
        plan: what ``params`` and the fingerprints are taken from.
        kind: study or tuning.
        params: keys of the plan.
        record: of a trial, as the analysis reads it.
        figures: of the whole result, for MLflow.
        files: of the whole result, in the folder.
    """
    recipe = recipe.with_absolute_paths()
    tags = {f"hyperlora.{k}": plan["provenance"][k] for k in ("recipe_fingerprint", "data_fingerprint")}
    with tracked(recipe, out, out.rsplit("/", 1)[1], {k: plan[k] for k in params}, kind, tags) as parent:
        late: list[Result] = []

        def log(result: Result) -> None:
            # One that hangs would hold up every trial.
            if late:
                late.append(result)
                return
            try:
                log_now(result)
            except tracking.ERRORS as error:
                logger.warning("MLflow does not answer; trials are logged at the end: %s", first_line(error))
                late.append(result)

        def log_now(result: Result) -> None:
            if parent is None:
                return
            entry = {"reports": [], **record(result)}
            content = {k: entry[k] for k in ("status", "reason", "outcome", "reports")} | {"uri": result.trial.uri}
            trial = result.trial.recipe.model_copy(update={"mlflow": recipe.mlflow})
            own = tags | {"hyperlora.recipe_fingerprint": recipe_fingerprint(trial)}
            tracking.log_trial(trial, parent, result.trial.name, entry["values"], content, own)

        def finish(result: Mapping[str, Any]) -> None:
            if parent is None:
                return
            status = "FINISHED" if result["complete"] else "KILLED"
            try:
                for trial in late:
                    log_now(trial)
                with fetched(out, files) as here:
                    tracking.finish_search(recipe, parent, figures(result), here, status)
            except tracking.ERRORS as error:
                logger.warning("MLflow lacks what is in %s; the same command logs it: %s", out, first_line(error))

        yield log, finish


def write_result(
    out: str, stem: str, result: Mapping[str, Any], page: str, rows: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write a result as ``stem.json`` and ``stem.html``, and its trials as ``trials.csv`` and ``trials.parquet``.

    Raises:
        ReplacedError: another command has the folder by now.
    """
    check_owned(out)
    files = {
        f"{stem}.json": (json.dumps(result, indent=1, allow_nan=False) + "\n").encode(),
        f"{stem}.html": page.encode(),
    }
    for name, content in (files | ({} if rows is None else table.files(rows))).items():
        patiently(storage.write, f"{out}/{name}", content)


@contextmanager
def fetched(out: str, names: Sequence[str]) -> Iterator[list[Path]]:
    """Files of a result on this machine, from where MLflow takes them."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            patiently(storage.download, f"{out}/{name}", Path(folder, name))
        yield [Path(folder, name) for name in names]
