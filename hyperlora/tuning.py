"""Trials that a sampler chooses, run by Ray Tune: early stopping, several at a time, resumable. Imports ray.tune.

A trial is a folder as in :mod:`hyperlora.search`, and beside that

    values.json    what the sampler chose
    reports.json   held-out metrics on the way, each with its ``step``
    stopped.json   why and at which step the trial was stopped early

Nothing else is kept: whoever runs the same search again learns all from these folders. Ray's own record of the
experiment is thrown away.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Ray Tune reads these when it is imported: nothing but our own files is written, and Ctrl-C is taken by our Notice.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Seconds that a trial which is stopped may take to leave its process to the next: it may be sending a checkpoint.
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "600")

# Before ray, for the settings that it makes.
from hyperlora.distributed import cluster, growth, living, share_rows, unused_gpus
from hyperlora.distributed import run as run_workers

# isort: split
import pyarrow.fs
import torch
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from hyperlora import capacity, checkpoint, runs, storage, training
from hyperlora.config import Problem, Recipe, RecipeError, parse
from hyperlora.ownership import RENEWAL, Lease, OwnedElsewhereError
from hyperlora.sampling import Objective, Proposals, Values
from hyperlora.search import (
    DIVERGED,
    PeakMemory,
    Result,
    Trial,
    drop_checkpoints,
    keep_networks,
    only_process,
    recorded,
    world_of,
    write,
)
from hyperlora.stopping import NonFiniteError, Notice
from hyperlora.storage import StorageError, patiently
from hyperlora.training import RunInfo, Silent

VALUES, REPORTS, STOPPED = "values.json", "reports.json", "stopped.json"
#: A trial's driver asks for this much memory and no CPU: its workers need every CPU there is.
DRIVER = {"memory": float(2**20)}
#: As PyTorch says it of CPU and GPU, and Ray of a worker that it ended.
SHORT_OF_MEMORY = re.compile("allocate memory|out of memory|low on memory", re.IGNORECASE)


@dataclass(frozen=True)
class Stopping:
    """ASHA (Li et al. 2020): at each rung only the best of those that came so far go on.

    Attributes:
        metric: of the reports, that is compared.
        higher: more of it is better.
        first: steps before a trial can be stopped; rungs are this times powers of ``factor``.
        last: steps of a whole trial.
        factor: one of so many goes on at each rung.
    """

    metric: str
    higher: bool
    first: int
    last: int
    factor: int = 3


@dataclass(frozen=True)
class Search:
    """What is searched.

    Attributes:
        uri: folder of the search, which every worker can reach.
        count: trials in all, those of earlier runs included.
        make: a trial of this name at a point.
        objectives: of the sampler, by name of a figure in a trial's outcome or last evaluation.
        stopping: None lets every trial run to its end.
        concurrency: trials at a time, at most; None takes what the cluster holds.
    """

    uri: str
    count: int
    make: Callable[[str, Values], Trial]
    objectives: Sequence[Objective]
    stopping: Stopping | None = None
    concurrency: int | None = None


def figure(outcome: Mapping[str, Any], name: str) -> float:
    """A figure of a finished trial: of its last evaluation, or of the outcome itself."""
    last = outcome["evaluations"][-1]
    return float(last[name] if name in last else outcome[name])


def reports(trial: Trial) -> list[dict[str, float]]:
    """Held-out metrics of a trial, by rising step."""
    return runs.read(trial.uri, REPORTS) or []


def known(search: Search) -> list[Trial]:
    """Trials that earlier runs of the search started, in that order."""
    storage.filesystem(search.uri)[0].invalidate_cache()
    names = [path.split("/")[1] for path in patiently(storage.glob, search.uri, f"trials/*/{VALUES}")]
    return [search.make(name, runs.read(f"{search.uri}/trials/{name}", VALUES)) for name in names]


def ended(trial: Trial, sha256: Mapping[str, str] | None = None) -> Result | None:
    """How a trial ended in an earlier run; None while it has to go on.

    Raises:
        RecipeError: it is of other rows than those of ``sha256``.
    """
    found = recorded(trial, sha256)
    if found is None and (stop := runs.read(trial.uri, STOPPED)) is not None:
        return Result(trial, "stopped", stop["reason"], None, None)
    return found


def run(
    search: Search,
    recipe: Recipe,
    proposals: Proposals,
    *,
    sha256: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
    started: Callable[[Trial, int], None],
    over: Callable[[Result], None],
    unused: Callable[[float], None] = lambda gpus: None,
    trainable: Callable[[dict[str, Any]], None] | None = None,
    verbose: bool = False,
) -> None:
    """Run the trials of a search that have not ended; those of earlier runs are told first.

    A failing trial does not stop the others. An interrupted search goes on when it is run again.

    Args:
        search: what is searched.
        recipe: whose ``ray`` section says which cluster to use, and workers, CPUs and GPUs of one trial.
        proposals: asked for the points.
        sha256: of the tokens of each part of the data; results of other rows are refused. None: not looked at.
        check: called before a trial starts; what it raises ends the search.
        started: told of every trial that starts, and how many may run at a time.
        over: told of every trial that ended.
        unused: told how many GPUs the cluster has, where trials ask for none and leave them idle.
        trainable: instead of training: gets ``name`` and ``uri`` of a trial, reports to Ray Tune and writes
            ``result.json``.
        verbose: show the logs of Ray and of the workers.

    Raises:
        RecipeError: the cluster cannot hold a trial, or a trial's folder is of another recipe, of other rows, or of a
            point that the space does not hold.
    """
    scheduler = None if search.stopping is None else _asha(search.stopping)
    waiting, past = [], 0
    earlier = known(search)
    for trial in earlier:
        values = runs.read(trial.uri, VALUES)
        try:
            proposals.check(values)
        except ValueError as error:
            allowed = f"a space that holds the points of the trials in {search.uri}, or another --out ({error})"
            raise RecipeError([Problem("--space", values, allowed)]) from error
    for trial in earlier:
        runs.check_same(trial.uri, trial.recipe)
        result = ended(trial, sha256)
        if result is None:
            waiting.append(trial)
            continue
        past += 1
        # A run that was killed kept them.
        (keep_networks if result.status == "finished" else drop_checkpoints)(trial.uri)
        _tell(proposals, search, result)
        _replay(scheduler, result)
        over(result)
    if past >= search.count:
        return
    settings = recipe.ray
    if not verbose:
        # Tune's new output prints tables whatever its verbosity is.
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    rows = share_rows(recipe) if trainable is None else ""
    # What is left for the end is done however the search ends, when the processes of its trials are gone.
    with (
        ExitStack() as end,
        cluster(recipe, verbose, dashboard=settings.most > 1),
        Notice(interrupts=True) as notice,
    ):
        if gpus := unused_gpus(recipe):
            unused(gpus)
        at_once = min(_at_once(recipe, search.concurrency), search.count - past)
        driver = _Driver(search, proposals, waiting, check, lambda trial: started(trial, at_once), over, notice)
        end.callback(driver.drop_checkpoints)
        alone = settings.most == 1
        own = {"CPU": settings.cpus_per_worker} | (
            {"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}
        )
        if settings.accelerator_type is not None:
            own[capacity.ACCELERATOR + settings.accelerator_type] = 0.001  # as Ray itself asks: nodes have 1
        fs, root = storage.filesystem(search.uri)
        scratch = f"{root}/ray"
        try:
            tune.Tuner(
                tune.with_resources(trainable or _trainable, own if alone else DRIVER),
                tune_config=tune.TuneConfig(
                    search_alg=_Searcher(driver, rows),
                    scheduler=scheduler,
                    num_samples=search.count - past,
                    max_concurrent_trials=at_once,
                    # A fresh process for each trial would spend seconds on imports.
                    reuse_actors=alone,
                ),
                run_config=tune.RunConfig(
                    name=f"attempt-{time.time_ns()}",
                    storage_path=scratch,
                    storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
                    callbacks=[driver],
                    verbose=0,
                ),
            ).fit()
        except TuneError as error:
            # Of the driver: those of trials are told as theirs.
            raise RuntimeError(f"the search ended: {_why(str(error))}; the same command goes on") from error
        finally:
            storage.tidy(f"{search.uri}/ray")


def _at_once(recipe: Recipe, asked: int | None) -> int:
    """Trials at a time: as many as the cluster holds once it has grown, and no more than were asked for."""
    nodes = living()
    grows = capacity.may_grow(nodes)
    limit = growth() if grows else None
    held = capacity.trials(recipe.ray, nodes, limit)
    if asked is not None and grows and limit is None:  # nobody knows how far
        return asked
    return max(1, min(held, asked or held))


def _asha(stopping: Stopping) -> ASHAScheduler:
    return ASHAScheduler(
        time_attr="step",
        metric=stopping.metric,
        mode="max" if stopping.higher else "min",
        max_t=stopping.last,
        grace_period=stopping.first,
        reduction_factor=stopping.factor,
        # A trial that passed the last rung runs to its end and writes its result.
        stop_last_trials=False,
    )


def _replay(scheduler: ASHAScheduler | None, result: Result) -> None:
    """Let ASHA know what a trial of an earlier run reported, so that its rungs are what they were."""
    if scheduler is None:
        return
    trial: Any = SimpleNamespace(trial_id=result.trial.name)
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    for report in reports(result.trial):
        scheduler.on_trial_result(None, trial, report)  # type: ignore[arg-type]


def _tell(proposals: Proposals, search: Search, result: Result) -> None:
    objective = search.objectives[0].name
    values = None if result.outcome is None else [figure(result.outcome, o.name) for o in search.objectives]
    on_the_way = [(int(r["step"]), r[objective]) for r in reports(result.trial) if objective in r]
    proposals.tell(runs.read(result.trial.uri, VALUES), result.status, values, on_the_way)


class _Driver(tune.Callback):
    """The search in the driver: which trial is which, and what became of it."""

    def __init__(
        self,
        search: Search,
        proposals: Proposals,
        waiting: Sequence[Trial],
        check: Callable[[], None],
        started: Callable[[Trial], None],
        over: Callable[[Result], None],
        notice: Notice,
    ) -> None:
        self._search, self._proposals, self._waiting = search, proposals, list(waiting)
        self._check, self._started, self._told, self._notice = check, started, over, notice
        self._number = 1 + max((int(t.name.removeprefix("t")) for t in known(search)), default=0)
        self._running: dict[str, Trial] = {}
        self._stopped: list[Trial] = []
        self._ended = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles its experiment for a restore, which nothing here makes

    def next(self) -> Trial | None:
        """The next trial to start, first those that were interrupted; None when the sampler has no more points."""
        self._check()
        if self._waiting:
            trial = self._waiting.pop(0)
            self._proposals.resume(runs.read(trial.uri, VALUES))
        else:
            values = self._proposals.ask()
            if values is None:
                return None
            trial = self._search.make(f"t{self._number:04d}", values)
            self._number += 1
            runs.record(RunInfo(trial.uri), trial.recipe)
            write(trial.uri, VALUES, values)
        self._running[trial.name] = trial
        return trial

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # Here, where nothing is half done: an exception of a signal would come out of whatever is at work.
        self._notice.check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._started(self._running[trial.config["name"]])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self._running.pop(trial.config["name"])
        result = ended(own)
        if result is None:
            step = int(trial.last_result.get("step", 0))
            why = f"stopped early at step {step}: others were better by then"
            write(own.uri, STOPPED, {"step": step, "reason": why})
            result = Result(own, "stopped", why, None, None)
            self._stopped.append(own)
            threading.Thread(target=self._drop_once_left, args=(own,), name="checkpoints", daemon=True).start()
        self._over(result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self._running.pop(trial.config["name"])
        # Here and as text: what is in the store by now may lack it, and the error itself is a pickle.
        text = Path(trial.error_file).read_text(encoding="utf-8")
        self._over(recorded(own) or Result(own, "failed", _why(text), None, None))

    def _drop_once_left(self, trial: Trial) -> None:
        """Remove a stopped trial's checkpoints when its process, which may be sending one, has left the folder."""
        while not self._ended.wait(RENEWAL):
            with suppress(OwnedElsewhereError, StorageError), Lease(trial.uri):
                drop_checkpoints(trial.uri)
                return

    def drop_checkpoints(self) -> None:
        """Remove those of the trials that were stopped, when all processes are gone."""
        self._ended.set()
        for trial in self._stopped:
            drop_checkpoints(trial.uri)

    def _over(self, result: Result) -> None:
        _tell(self._proposals, self._search, result)
        self._told(result)


def _why(text: str) -> str:
    """The line of an error's text that says most: that memory ran out, or the last."""
    lines = text.strip().splitlines()
    return next((line for line in lines if SHORT_OF_MEMORY.search(line)), lines[-1]).strip()[:300]


class _Searcher(Searcher):
    """Hands the driver's trials to Ray Tune, which needs their names and folders alone."""

    def __init__(self, driver: _Driver, rows: str) -> None:
        super().__init__()
        self._driver, self._rows = driver, rows

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        trial = self._driver.next()
        return Searcher.FINISHED if trial is None else {"name": trial.name, "uri": trial.uri, "rows": self._rows}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The driver learns it as a callback, with the error."""

    def save(self, checkpoint_path: str) -> None:
        """The folders of the trials are the state."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from the folders of its trials")


# ---------------------------------------------------------------- in the trial's process


def _trainable(config: dict[str, Any]) -> None:
    # Travels by value, so that the library is imported in the process of the trial.
    from hyperlora.training import RunInfo
    from hyperlora.tuning import train_trial

    train_trial(RunInfo(config["uri"], rows=config["rows"]))


def train_trial(info: RunInfo) -> None:
    """Train the trial in a folder and report its held-out metrics to Ray Tune, the last after ``result.json``."""
    uri = info.uri
    recipe = parse(runs.read(uri, "run.json")["recipe"])
    torch.set_num_threads(max(1, int(recipe.ray.cpus_per_worker)))
    with only_process(uri):
        done = runs.result(uri)
        if done is None:
            newest = max(map(checkpoint.step_of, checkpoint.committed(uri)), default=0)
            kept = [r for r in runs.read(uri, REPORTS) or [] if r["step"] <= newest]
            for report in kept:
                tune.report(report)
            sink = _Reports(uri, kept)
            try:
                if recipe.ray.most == 1:
                    world = world_of(recipe)
                    training.train(recipe, info, world, training.Tee(sink, PeakMemory(uri, world.device)))
                else:
                    _train_workers(recipe, info, sink)
            except NonFiniteError as error:
                write(uri, DIVERGED, {"reason": str(error)})
                drop_checkpoints(uri)
                raise
            keep_networks(uri)
            done = runs.result(uri)
            assert done is not None, f"the trial in {uri} ended without {runs.RESULT}"
    tune.report(done["evaluations"][-1] | {k: done[k] for k in ("rank_final", "training_seconds")})


class _Reports(Silent):
    """Reports every evaluation to Ray Tune, which may end the trial there, and keeps it in ``reports.json``.

    The last evaluation is kept, and reported when the trial's result is written.
    """

    def __init__(self, uri: str, earlier: Sequence[dict[str, float]]) -> None:
        self._uri, self._all = uri, list(earlier)
        self._over = False

    def phase(self, name: str) -> None:
        self._over = name == "evaluating"

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        report = {"step": step, **{k: v for k, v in metrics.items() if not k.startswith("monitor/")}}
        self._all.append(report)
        write(self._uri, REPORTS, self._all)
        if not self._over:
            tune.report(report)


def _train_workers(recipe: Recipe, info: RunInfo, sink: _Reports) -> None:
    """Train on several Ray Train workers; their evaluations are reported from this thread, which Ray Tune may end."""
    events: queue.Queue[Callable[[], None]] = queue.Queue()
    failures: list[BaseException] = []

    class Relay(Silent):
        def phase(self, name: str) -> None:
            events.put(lambda: sink.phase(name))

        def evaluation(self, step: int, metrics: dict[str, float]) -> None:
            events.put(lambda: sink.evaluation(step, metrics))

    def work() -> None:
        try:
            run_workers(recipe, info, Relay())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="workers", daemon=True)
    thread.start()
    while thread.is_alive() or not events.empty():
        try:
            events.get(timeout=0.5)()
        except queue.Empty:
            continue
    if failures:
        raise failures[0]
