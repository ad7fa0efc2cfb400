"""Many trials of recipes in processes of Ray, some at a time, each going on where it was.

A trial is a recipe with a folder of its own:

    run.json       the recipe; a folder is never shared by two
    checkpoints/   while it runs
    hypernetworks/ what remains of the last checkpoint for others to start from, if there are any
    result.json    the outcome; a trial that has it is read, not repeated
    diverged.json  the reason why it ended without one, when repeating it would end the same
    memory.json    peak memory, of the trial and not of its process
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Before ray, for the settings that it makes.
from hyperlora.distributed import cluster, share_rows, unused_gpus

# isort: split
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from hyperlora import packed, runs, storage, training, warm_start
from hyperlora.config import Recipe, StorageConfig, parse
from hyperlora.stopping import NonFiniteError, Notice
from hyperlora.storage import patiently
from hyperlora.training import RunInfo, Silent, World

logger = logging.getLogger(__name__)

DIVERGED, MEMORY = "diverged.json", "memory.json"
#: Seconds that a trial's own files may wait for a store that is away: as long as its checkpoints by default.
OUTAGE = StorageConfig().retry_seconds
#: In the latter file. (Older ones have what was resident in the whole process, as "peak_memory_bytes".)
PEAK = "peak_allocated_bytes"
#: Between two looks at the heap, each of which takes some ten microseconds or more.
LOOK_SECONDS = 0.005
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        name: unique in the search.
        uri: its folder, which every worker can reach.
        recipe: trained by one process; its ``ray`` section says with how many CPUs and GPUs.
        key: whatever the caller knows the trial by.
    """

    name: str
    uri: str
    recipe: Recipe
    key: Any = None


@dataclass(frozen=True)
class Result:
    """How a trial ended.

    Attributes:
        trial: which one.
        status: whether there is an outcome; ``stopped`` early by a search that tunes.
        reason: why it failed or was stopped, in one line.
        outcome: of the trainer.
        peak_memory_bytes: most that it had allocated on the heap, or on its GPU; None where neither can be read.
        crashed: whether it failed for a reason that may not come again, as memory or a node that is gone; the next
            search in its folder repeats it.
    """

    trial: Trial
    status: Literal["finished", "stopped", "failed"]
    reason: str | None
    outcome: dict[str, Any] | None
    peak_memory_bytes: int | None
    crashed: bool = False


#: From the results so far to all trials that are wanted, in the order in which they start.
Plan = Callable[[Mapping[str, Result]], Iterable[Trial]]


def run(
    plan: Plan,
    recipe: Recipe,
    concurrency: int,
    *,
    sha256: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
    started: Callable[[Trial], None] = lambda trial: None,
    unused: Callable[[float], None] = lambda gpus: None,
    verbose: bool = False,
) -> Iterator[Result]:
    """Run what a plan wants until it wants no more; yields every result once, those of earlier runs first.

    A failing trial does not stop the others. Closing the iterator ends the trials that are running; they go on from
    their newest checkpoints next time.

    Args:
        plan: asked again after every result, so that trials may depend on results.
        recipe: whose ``ray`` section says which cluster to use, and the CPUs and GPUs of one trial; its data is that of
            all trials.
        concurrency: trials at a time.
        sha256: of the tokens of each part of the data; results of other rows are refused. None: not looked at.
        check: called before a trial starts; what it raises ends the search.
        started: told of every trial that starts.
        unused: told how many GPUs the cluster has, where trials ask for none and leave them idle.
        verbose: show the logs of Ray and of the workers.

    Raises:
        RecipeError: the cluster cannot hold ``concurrency`` trials, or a trial's folder is of another recipe, or of
            other rows.
    """
    done: dict[str, Result] = {}
    seen: set[str] = set()
    yield from _recorded(plan, done, seen, sha256)
    if all(trial.name in done for trial in plan(done)):
        return
    # Where workers of one run have to be is nothing to trials, which know nothing of each other.
    settings = recipe.ray.model_copy(update={"num_workers": concurrency, "placement": "PACK"})
    rows = share_rows(recipe)
    with ExitStack() as stack:
        stack.enter_context(cluster(recipe.model_copy(update={"ray": settings}), verbose, dashboard=False))
        notice = stack.enter_context(Notice(interrupts=True))
        if gpus := unused_gpus(recipe):
            unused(gpus)
        # Actors, since Ray may give each task of a process another GPU, and PyTorch stays on its first.
        process: Any = ray.remote(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            accelerator_type=settings.accelerator_type,  # type: ignore[arg-type]  # None: any
        )(_Process)
        running: dict[Any, tuple[Trial, Any]] = {}
        idle: list[Any] = []
        ended: list[Result] = []
        try:
            while True:
                names = done.keys() | {trial.name for trial, _ in running.values()}
                waiting = [trial for trial in plan(done) if trial.name not in names]
                for trial in waiting[: concurrency - len(running)]:
                    check()
                    runs.record(RunInfo(trial.uri), trial.recipe)
                    actor = idle.pop() if idle else process.remote()
                    running[actor.train.remote(trial.recipe.model_dump(mode="json"), trial.uri, rows)] = trial, actor
                    started(trial)
                # Nothing waits for these: others may have their places.
                while idle:
                    ray.kill(idle.pop())
                # The next trials run while the caller looks at these.
                yield from ended
                if not running:
                    return
                over: list[Any] = []
                while not over:
                    notice.check()
                    over, _ = ray.wait(list(running), num_returns=1, timeout=1)
                (ready,) = over
                trial, actor = running.pop(ready)
                failure = _failure(ready)
                if failure is None or isinstance(_cause(failure), NonFiniteError):
                    idle.append(actor)
                else:  # after an assertion on its GPU, say, every later trial of this process would fail as well
                    ray.kill(actor)
                done[trial.name] = _result(trial, failure)
                ended = [done[trial.name], *_recorded(plan, done, seen, sha256)]
        finally:
            for actor in [*idle, *(actor for _, actor in running.values())]:
                ray.kill(actor)


def _recorded(
    plan: Plan, done: dict[str, Result], seen: set[str], sha256: Mapping[str, str] | None
) -> Iterator[Result]:
    """Results that earlier runs left in the folders of wanted trials; they may make a plan want more.

    A folder is read once: what is in ``seen``, to which this adds, has been.
    """
    while new := [trial for trial in plan(done) if trial.name not in seen]:
        seen |= {trial.name for trial in new}
        for trial in new:
            runs.check_same(trial.uri, trial.recipe)
            found = recorded(trial, sha256)
            if found is not None:
                # Its process may have been killed before it did.
                (keep_networks if found.status == "finished" else drop_checkpoints)(trial.uri)
                done[trial.name] = found
                yield found


def recorded(trial: Trial, sha256: Mapping[str, str] | None = None) -> Result | None:
    """The result in a trial's folder; None while it has to run.

    Raises:
        RecipeError: it is of other rows than those of ``sha256``.
    """
    peak = (runs.read(trial.uri, MEMORY) or {}).get(PEAK)
    if (outcome := runs.result(trial.uri)) is not None:
        if sha256 is not None and "rows_sha256" in outcome:  # older results do not tell
            packed.check_same(trial.uri, outcome["rows_sha256"], sha256)
        return Result(trial, "finished", None, outcome, peak)
    if (failure := runs.read(trial.uri, DIVERGED)) is not None:
        return Result(trial, "failed", failure["reason"], None, peak)
    return None


def _failure(reference: Any) -> RayError | None:
    """What a trial's process raised, or that it ended; None when it raised nothing."""
    try:
        ray.get(reference)
    except RayError as error:
        return error
    return None


def _result(trial: Trial, failure: RayError | None) -> Result:
    """What came of a trial whose process is done with it."""
    if failure is not None:
        logger.info("trial %s failed", trial.name, exc_info=failure)
        peak = (runs.read(trial.uri, MEMORY) or {}).get(PEAK)
        # What fails after the last file has not failed the trial.
        return recorded(trial) or Result(trial, "failed", reason(failure), None, peak, crashed=True)
    found = recorded(trial)
    if found is None:
        return Result(
            trial,
            "failed",
            f"no {runs.RESULT} in {trial.uri}: is it a folder that all workers share?",
            None,
            None,
            crashed=True,
        )
    return found


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) else error


def reason(error: BaseException) -> str:
    """Why a trial failed, in one line."""
    cause = _cause(error)
    if isinstance(cause, NonFiniteError):
        return str(cause)
    # Of a process that died Ray says first which one that was.
    text = " ".join(str(cause).split()).rpartition("Worker exit detail: ")[2]
    return f"{type(cause).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"


# ---------------------------------------------------------------- in the worker process


class _Process:
    """Trains one trial after the other: importing everything costs seconds."""

    def train(self, content: dict[str, Any], uri: str, rows: str) -> None:
        _train(content, uri, rows)


def _train(content: dict[str, Any], uri: str, rows: str) -> None:
    recipe = parse(content)
    world = world_of(recipe)
    torch.set_num_threads(max(1, int(recipe.ray.cpus_per_worker)))
    with only_process(uri):
        if runs.result(uri) is not None or runs.read(uri, DIVERGED) is not None:
            return
        try:
            training.train(recipe, RunInfo(uri, rows=rows), world, PeakMemory(uri, world.device))
        except NonFiniteError as error:
            write(uri, DIVERGED, {"reason": str(error)})
            drop_checkpoints(uri)
            raise
        keep_networks(uri)


def world_of(recipe: Recipe) -> World:
    """Of a trial in one process: on the GPU that Ray gave it, or on the CPU, since Ray hides no GPU from it."""
    return World() if recipe.ray.gpus_per_worker else World(device=CPU)


def keep_networks(uri: str) -> None:
    """Of a finished trial's checkpoints: a search of a hundred trials would keep gigabytes of the rest."""
    warm_start.keep_networks(uri)
    drop_checkpoints(uri)


def drop_checkpoints(uri: str) -> None:
    """Remove what served to go on after a kill."""
    storage.tidy(f"{uri}/checkpoints")


@contextmanager
def only_process(uri: str) -> Iterator[None]:
    """Wait for a process of a killed search that is still at work in a local folder: Ray takes seconds to end it."""
    if not storage.is_local(uri):
        yield
        return
    with Path(storage.filesystem(uri)[1], ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class PeakMemory(Silent):
    """Writes the peak memory of a trial at each of its phases, so that a finished trial always has it.

    On a CPU it is what is allocated on the heap beyond what was at the start, as a GPU counts it. What is resident does
    not tell trials apart: how their blocks fit into the holes that others left makes a tenth of it, in either way.
    """

    def __init__(self, uri: str, device: torch.device = CPU) -> None:
        self._uri, self._device = uri, device
        self._ended = threading.Event()
        # What an earlier trial of this process left behind is not this one's.
        gc.collect()
        # A GPU that the trial does not use is not looked at: that alone would take memory there.
        self._heap = None if device.type == "cuda" else heap_reader()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        elif self._heap is not None:
            self._start = self._highest = self._heap()
            threading.Thread(target=self._watch, args=(self._heap,), name="peak-memory", daemon=True).start()

    def _watch(self, heap: Callable[[], int]) -> None:
        pause = LOOK_SECONDS
        while not self._ended.wait(pause):
            before = time.thread_time()
            self._highest = max(self._highest, heap())
            # With many holes between blocks a look takes longer; it is not to take the time that is measured.
            pause = max(LOOK_SECONDS, 100 * (time.thread_time() - before))

    def phase(self, name: str) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self._heap is not None:
            peak = max(self._highest, self._heap()) - self._start
        else:
            return
        before = (runs.read(self._uri, MEMORY) or {}).get(PEAK, 0)
        write(self._uri, MEMORY, {PEAK: max(peak, before)})

    def close(self) -> None:
        self._ended.set()


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def heap_reader() -> Callable[[], int] | None:
    """What reads how many bytes are allocated on the heap; None where that is not to be had, or PyTorch has its own."""
    if sys.platform != "linux" or (mallinfo := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None:
        return None
    mallinfo.restype = _Mallinfo

    def heap() -> int:
        found = mallinfo()
        return int(found.uordblks + found.hblkhd)

    before = heap()
    probe = torch.empty(2**24, dtype=torch.uint8)
    return heap if heap() - before > probe.nbytes // 2 else None


def write(uri: str, name: str, content: Any) -> None:
    """Write a JSON file of a trial's folder whole."""
    patiently(storage.write, f"{uri}/{name}", storage.pack_json(content), patience=OUTAGE)
