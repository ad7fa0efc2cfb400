"""The training loop under Ray Train. The only module that imports ray.train."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import urlsplit

# Ray reads these when it is imported. Its usage report is off; accelerators are shown to workers as Ray assigns them;
# Ray Train asks every second, not every five, whether a node is going away.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")

import grpc
import pyarrow.fs
import ray
import ray.train
import torch
import torch.distributed as dist
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.actor import ActorHandle
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError, RayActorError, RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hyperlora import autoscaling, capacity, packed, runs, storage, tokens, training
from hyperlora.adapters import load_tokenizer
from hyperlora.capacity import Growth, Node
from hyperlora.config import Problem, Recipe, RecipeError, first_line, parse
from hyperlora.environment import ADDRESS, changed
from hyperlora.ownership import ReplacedError
from hyperlora.stopping import NonFiniteError, Notice, NotStoredError, StoppedError, terminable
from hyperlora.storage import StorageError
from hyperlora.tasks import build_task, shared_rows
from hyperlora.training import RunInfo, Sink, Tee, World

logger = logging.getLogger(__name__)


Event = tuple[str, tuple[Any, ...]]

#: What Ray's clients take for the dashboard of their cluster, the first before the second.
DASHBOARD = (ADDRESS, "RAY_ADDRESS")
#: A resource that Ray gives to the head alone.
HEAD = "node:__internal_head__"
#: Seconds for which nobody takes the order to stop before the run ends without: Ray kills a job some minutes after.
UNHEARD = 30.0


class _QueueSink:
    """Puts events into a queue for the driver a few times a second."""

    def __init__(self, queue: Queue, interval: float = 0.2) -> None:
        self._queue, self._interval = queue, interval
        self._events: list[Event] = []
        self._sent = 0.0

    def _add(self, kind: str, *arguments: Any) -> None:
        self._events.append((kind, arguments))
        if kind != "step" or time.monotonic() - self._sent > self._interval:
            self._send()

    def phase(self, name: str) -> None:
        self._add("phase", name)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self._add("step", step, metrics)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._add("evaluation", step, metrics)

    def warning(self, monitor: str, step: int, message: str) -> None:
        self._add("warning", monitor, step, message)

    def flush(self) -> Callable[[], None]:
        self._send()
        return lambda: None

    def close(self) -> None:
        self._send()

    def _send(self) -> None:
        if self._events:
            self._queue.put_nowait_batch(self._events)
        self._events, self._sent = [], time.monotonic()


class _Order:
    """The driver's order to stop, waited for in the background.

    Taken as often as it comes, until the worker is done: that is how the driver knows that there is one.
    """

    def __init__(self, orders: Queue) -> None:
        self._given, self._over = threading.Event(), threading.Event()
        self._orders = orders
        threading.Thread(target=self._ask, name="orders", daemon=True).start()

    def given(self) -> bool:
        return self._given.is_set()

    def close(self) -> None:
        self._over.set()

    def _ask(self) -> None:
        while not self._over.is_set():
            with suppress(Empty):
                self._orders.get(timeout=1)
                self._given.set()


class _Trainer(TorchTrainer):
    """Knows its controller: the one that waits for room does not listen, and is ended from outside."""

    controller: ActorHandle | None = None

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()  # type: ignore[misc]  # of version 2
        # It starts a process that hands out Ray's data sets, of which a run has none.
        return [callback for callback in found if not isinstance(callback, DatasetsCallback)]

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        self.controller = controller
        super()._register_sigint_handler(controller)  # type: ignore[misc]  # of version 2


class _Preemption:
    """Whether Ray has told of another node that is going away: of a spot machine, or one that is drained.

    Read where Ray leaves it in this process. ``ray.train.get_preemption_info`` waits for all workers at every call.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self) -> bool:
        info = get_train_context().preemption_context.preemption_info
        leaving = set() if info is None else set(info.preempted_node_ids)
        new = not leaving <= self._known
        self._known |= leaving
        return new


def _worker(config: dict[str, Any]) -> None:
    """What runs on every Ray Train worker."""
    recipe = parse(config["recipe"])
    run = RunInfo(**config["run"])
    queue: Queue = config["queue"]
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, int(recipe.ray.cpus_per_worker)))
    world = World(rank, size, dist.group.WORLD if size > 1 else None, get_device())
    sinks: list[Sink] = []
    if rank == 0:
        progress = _QueueSink(queue)
        sinks.append(progress)
        if run.mlflow_run_id is not None:
            from hyperlora.tracking import MLflowSink  # seconds of import that the other workers need not spend

            # The driver, which may be on another machine, sees nothing of what is logged here.
            sinks.append(MLflowSink(recipe.mlflow.tracking_uri, run.mlflow_run_id, warn=progress.warning))
    order = _Order(config["orders"]) if rank == 0 else None
    leaving = _Preemption() if rank == 0 else lambda: False
    try:
        training.train(recipe, run, world, Tee(*sinks), lambda: order is not None and order.given(), leaving)
    except (NonFiniteError, RecipeError, StoppedError, NotStoredError) as error:
        # Every worker meets these at the same point, and starting again would only meet them again.
        if rank == 0:
            queue.put(("failed", (error,)))
    except ReplacedError as error:
        # Worker 0 alone meets this, and the others wait for it: whoever hears of it ends them all.
        queue.put(("failed", (error,)))
        raise
    finally:
        if order is not None:
            order.close()


@contextmanager
def cluster(recipe: Recipe, verbose: bool, *, dashboard: bool = True) -> Iterator[None]:
    """A Ray that is running: the one of ``ray.address``, the caller's own, or one started here and stopped after.

    Ray Train asks the dashboard for the state of its workers; trials of one process each, which are the workers of a
    recipe without it, do without its processes.

    Raises:
        RecipeError: there is no cluster at the address, or it can never give what the recipe asks for.
    """
    mine = not ray.is_initialized()
    if mine:
        address = recipe.ray.address
        shown: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
        if address is None:
            # Workers that wait for gradients of each other may share cores; a laptop with one core runs two.
            cpus = max(os.cpu_count() or 1, int(-(-recipe.ray.most * recipe.ray.cpus_per_worker // 1)))
            with terminable():
                _start(shown | {"num_cpus": cpus, "include_dashboard": dashboard})
        else:
            _check_address(address)
            if tokens.elsewhere(address) and _lets_all_in(address):
                logger.warning(tokens.open_to_all(address))
            try:
                with terminable():
                    ray.init(address=address, **shown)
            except (OSError, ValueError, RuntimeError, RayError) as error:
                raise _unreachable(address, error) from error
    # The one machine of a Ray that is started here goes with this process: nobody has to announce it.
    alone = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if mine and recipe.ray.address is None else {}
    try:
        _check_resources(recipe, trials=not dashboard)
        with changed(alone):
            yield
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def _known_to_helpers() -> Iterator[None]:
    """Ray Train's helpers ask the dashboard of the cluster that they are in.

    The one that frees the places of a trial that was stopped asks whatever dashboard the environment names, and on a
    machine with two clusters none.
    """
    ENV_VARS_TO_PROPAGATE.update(DASHBOARD)
    with changed(dict(zip(DASHBOARD, ("", ray.get_runtime_context().gcs_address), strict=True))):
        yield


def _start(options: dict[str, Any], attempts: int = 3) -> None:
    """Start Ray on this machine; on one that is busy its processes may need longer than the half minute Ray gives."""
    for left in reversed(range(attempts)):
        try:
            # Without "local" Ray would join a cluster that happens to run on this machine.
            ray.init(address="local", **options)
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            logger.warning("Ray did not start in time, trying again: %s", error)
        else:
            return


def _check_address(address: str) -> None:
    """Find out in seconds whether anybody listens and lets us in: Ray itself tries for minutes, and does not say why.

    Raises:
        RecipeError: nobody does, or it is no address.
    """
    tokens.use()
    Config.initialize("")  # Ray has read its settings when it was imported
    if address == "auto":
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
        if not host or port is None or parts.scheme not in ("", "ray"):
            raise ValueError("host or port is missing")
        socket.create_connection((host, port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, error) from error
    try:
        with init_grpc_channel(parts.netloc) as channel:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=10)
    except AuthenticationError as error:  # RAY_AUTH_MODE asks for a token, and there is none
        raise _not_let_in(address, first_line(error)) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise _not_let_in(address, error.details()) from error
        # Ray's port for clients does not know this question; what is not Ray at all, Ray finds out.


def _lets_all_in(address: str) -> bool:
    """Whether a cluster answers without a token; Ray's port for clients (ray://) does not say, and is not asked."""
    if "://" in address:
        return False
    try:
        with grpc.insecure_channel(address) as channel:  # no token is added to this one
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=10)
    except grpc.RpcError:
        return False
    return True


def _not_let_in(address: str, reason: str) -> RecipeError:
    allowed = f"a cluster that lets this user in: {tokens.HOW} ({reason})"
    return RecipeError([Problem("ray.address", address, allowed)])


def _unreachable(address: str, error: Exception) -> RecipeError:
    allowed = f"HOST:PORT or ray://HOST:PORT of a running cluster, auto, or null to start Ray here ({error})"
    return RecipeError([Problem("ray.address", address, allowed)])


def living() -> list[Node]:
    """The nodes of the cluster."""
    return [Node(n["Resources"], n.get("Labels") or {}) for n in ray.nodes() if n["Alive"]]


def unused_gpus(recipe: Recipe) -> float:
    """GPUs of the cluster where the recipe's workers ask for none."""
    return 0 if recipe.ray.gpus_per_worker else sum(node.resources.get("GPU", 0) for node in living())


def growth() -> Growth | None:
    """How far the cluster's autoscaler goes, as its head knows; None when nothing there says so."""
    (head,) = (n for n in ray.nodes() if n["Alive"] and HEAD in n["Resources"])
    place = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    return ray.get(ray.remote(num_cpus=0)(autoscaling.growth).options(scheduling_strategy=place).remote())


def _check_resources(recipe: Recipe, *, trials: bool) -> None:
    nodes = living()
    problems = capacity.told(recipe.ray, nodes, trials=trials)
    if problems and capacity.may_grow(nodes):
        limit = growth()
        if limit is None:
            logger.warning("waiting for nodes that an autoscaler adds: %s", "; ".join(map(str, problems)))
            return
        problems = capacity.told(recipe.ray, nodes, limit, trials=trials)
    if problems:
        raise RecipeError(problems)


def share_rows(recipe: Recipe, rows: str | None = None) -> str:
    """Fingerprint of a recipe's tokenised rows, which lie below ``storage.uri`` afterwards.

    Args:
        recipe: a valid recipe.
        rows: their fingerprint, where they are ready; the data is then not read again.

    Raises:
        RecipeError: the rows cannot be read, or ``storage.uri`` cannot be written.
    """
    shared = shared_rows(recipe)
    try:
        ready = build_task(recipe, load_tokenizer(recipe.model)).packed if rows is None else packed.fetch(rows, shared)
        packed.share(ready, shared)
    except StorageError as error:
        allowed = f"a writable folder or URI ({error})"
        raise RecipeError([Problem("storage.uri", recipe.storage.uri, allowed)]) from error
    return ready.fingerprint


def run(recipe: Recipe, info: RunInfo, sink: Sink, *, verbose: bool = False) -> None:
    """Train a recipe on Ray Train workers; the outcome is ``result.json`` in the run's folder.

    Args:
        recipe: a valid recipe.
        info: the run, whose folder every worker can reach.
        sink: receives worker 0's progress, in the driver.
        verbose: show the logs of Ray and of the workers.

    Raises:
        RecipeError: the recipe does not fit the cluster, the data or the model.
        NonFiniteError: a loss or gradient was not finite.
        StoppedError: this process got SIGTERM, and the workers saved a checkpoint.
        TerminatedError: this process got SIGTERM, and no worker was at work.
        NotStoredError: the end of the run could not be written.
        ReplacedError: another process has taken over the run.
        RuntimeError: workers died more often than ``ray.max_failures``.
    """

    def loop(config: dict[str, Any]) -> None:
        # Travels by value, with plain data, so that Ray's controller does not import the library as well.
        from hyperlora.distributed import _worker

        _worker(config)

    sink.phase("starting Ray")
    with cluster(recipe, verbose), _known_to_helpers(), Notice() as notice:
        # Beside this process: they must not go with a node that only lends its workers.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue, orders = (Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(2))
        fs, root = storage.filesystem(info.uri)
        info = replace(info, rows=share_rows(recipe, info.rows))
        settings = recipe.ray
        trainer = _Trainer(
            loop,
            train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": asdict(info)}
            | {"queue": queue, "orders": orders},
            scaling_config=ScalingConfig(
                num_workers=settings.num_workers,  # type: ignore[arg-type]  # a range, in version 2
                placement_strategy=settings.placement,
                accelerator_type=settings.accelerator_type,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker={"CPU": settings.cpus_per_worker}
                | ({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}),
            ),
            run_config=RunConfig(
                # Our own checkpoints carry the state; Ray's record of an attempt is of no use to the next one.
                name=f"attempt-{time.time_ns()}",
                storage_path=f"{root}/ray",
                storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
        )
        sink.phase("starting workers")
        over = threading.Event()
        failures: list[Exception] = []
        follower = threading.Thread(
            target=_follow, args=(queue, sink, trainer, over, failures), name="progress", daemon=True
        )
        orderer = threading.Thread(target=_order, args=(notice, orders, trainer, over), name="stopping", daemon=True)
        orderer.start()
        follower.start()
        lost: RayActorError | None = None
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _failure(error) from error
        except RayActorError as error:
            lost = error
        finally:
            over.set()
            follower.join()
            orderer.join()
            storage.tidy(f"{info.uri}/ray")
        if failures:
            raise failures[0]
        # What was ended from outside may have been done already.
        if lost is not None and runs.result(info.uri) is None:
            notice.check()
            raise lost


def _order(notice: Notice, orders: Queue, trainer: _Trainer, over: threading.Event) -> None:
    """Hand the wish to stop to worker 0, and to the next one if it dies; where none is at work, end the run."""
    since = time.monotonic()
    while not over.wait(0.2):
        if not notice.given() or trainer.controller is None:
            continue
        if orders.empty():
            orders.put("stop")
            since = time.monotonic()
        elif time.monotonic() - since > UNHEARD:
            ray.kill(trainer.controller)
            return


def _follow(queue: Queue, sink: Sink, trainer: _Trainer, over: threading.Event, failures: list[Exception]) -> None:
    """Hand worker 0's events to the driver's sink until the run is over; end one that was taken over."""
    last = False
    while not last:
        last = over.wait(0.2)
        try:
            events: list[Event] = queue.get_nowait_batch(queue.qsize())
        except RayActorError as error:
            logger.warning("progress is no longer shown: %s", error)
            return
        for kind, arguments in events:
            if kind == "failed":
                failures.append(*arguments)
                if isinstance(failures[-1], ReplacedError) and trainer.controller is not None:
                    ray.kill(trainer.controller)  # it would start the workers again
            else:
                getattr(sink, kind)(*arguments)


def _failure(error: BaseException) -> RuntimeError:
    """The workers' own errors, without the traceback of the machinery; that the run was taken over as what it is."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return RuntimeError(str(error))
    lines = []
    for rank, failure in sorted(failures.items()):
        cause = failure.cause if isinstance(failure, RayTaskError) else failure
        if isinstance(cause, ReplacedError):
            return cause
        lines.append(f"worker {rank}: {type(cause).__name__}: {first_line(cause)}")
    return RuntimeError("training failed on the workers\n  " + "\n  ".join(lines))
