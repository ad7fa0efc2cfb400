"""MLflow: one run per training run. The only module that imports mlflow."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# A background thread asks again anyway; MLflow's own attempts would hold up the end of a run for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from hyperlora import __version__, spool, storage, uris
from hyperlora.config import MLflowConfig, Problem, Recipe, RecipeError, first_line, flatten
from hyperlora.ownership import ReplacedError
from hyperlora.spool import Spool
from hyperlora.verdict import all_reached

logger = logging.getLogger(__name__)
#: What telling MLflow may end in: it lets through what the libraries of databases and artifact stores raise.
ERRORS = (Exception,)
# What MLflow answers to a record that it will never take, and to all that is said of a run that was deleted.
REFUSED = "INVALID_PARAMETER_VALUE"
PACKAGES = ("torch", "transformers", "peft", "ray", "mlflow", "datasets")
# MLflow takes at most this many metrics, parameters and tags in one request. Every request is ``synchronous``: one that
# MLFLOW_ENABLE_ASYNC_LOGGING puts off would fail where nobody hears of it.
BATCH = 1000
PARAMS = 100
VALUE = 6000
# Steps in one delivery; each has about ten metrics.
RECORDS = 50
# The metric by which a step or an evaluation is known to be in a run.
_SIGN = {"step": "loss", "evaluation": "held_out_loss"}
# Seconds that the commit of a checkpoint waits, in the background, for metrics to be delivered.
PATIENCE = 5.0


def versions() -> dict[str, str]:
    """Python and the packages that decide a result."""
    # Of this package by itself: a job on a cluster brings it as a folder, which no index knows.
    own = {"python": platform.python_version(), "hyperadalora": __version__}
    return own | {name: metadata.version(name) for name in PACKAGES}


def git_state() -> dict[str, str]:
    """Commit of the working directory and whether it was changed; empty outside a repository."""

    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # Data, models and runs beside the code are no change of it.
        changed = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"git.commit": ask("rev-parse", "HEAD"), "git.changed": str(changed).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def machine() -> dict[str, Any]:
    """What a measurement ran on; ``memory_bytes`` is installed memory."""
    import torch  # workers' metrics need none of it

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": platform.platform(),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def start(recipe: Recipe, run_uri: str, run_name: str, facts: Mapping[str, Any]) -> str:
    """Create the MLflow run of a training run and log what is known before it starts; returns the run id.

    Raises:
        RecipeError: the tracking server or database cannot be reached.
    """
    uri = recipe.mlflow.tracking_uri
    try:
        client = MlflowClient(uri)
        experiment_id = experiment(client, recipe.mlflow)
        tags = {"mlflow.runName": run_name, "hyperlora.run_uri": run_uri, "hyperlora.method": recipe.method}
        tags |= {f"version.{k}": v for k, v in versions().items()} | git_state()
        run_id = client.create_run(experiment_id, tags=tags).info.run_id
        params = flatten(recipe.model_dump(mode="json")) | {f"resolved.{k}": v for k, v in flatten(facts).items()}
        items = [Param(k, str(v)[:VALUE]) for k, v in params.items()]
        for first in range(0, len(items), PARAMS):
            client.log_batch(run_id, params=items[first : first + PARAMS], synchronous=True)
        client.log_text(run_id, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), "recipe.yaml")
    except ERRORS as error:
        raise unreachable(uri, error) from error
    return str(run_id)


def experiment(client: MlflowClient, config: MLflowConfig) -> str:
    """Id of the experiment, which is created when it is not there."""
    found = client.get_experiment_by_name(config.experiment)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(config.experiment, _artifact_location(config.tracking_uri)))
    except MlflowException as error:
        # Another run made it meanwhile.
        found = client.get_experiment_by_name(config.experiment)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return str(found.experiment_id)


def unreachable(uri: str, error: Exception) -> RecipeError:
    """What to tell the user when the server or database does not answer."""
    allowed = f"a reachable server or database ({first_line(error)})"
    return RecipeError([Problem("mlflow.tracking_uri", uris.redacted(uri), allowed)])


def start_search(
    recipe: Recipe, uri: str, name: str, params: Mapping[str, Any], kind: str, tags: Mapping[str, str] | None = None
) -> str:
    """The one MLflow run of the search in the folder ``uri``, created or taken up again; returns the run id.

    Args:
        recipe: says where MLflow is.
        uri: of the search's folder.
        name: of the run.
        params: of the run; as tags they are those of the newest start.
        kind: comparison, study or tuning.
        tags: beside versions, git state, kind and folder.

    Raises:
        RecipeError: the tracking server or database cannot be reached.
    """
    check(recipe)
    try:
        client = MlflowClient(recipe.mlflow.tracking_uri)
        experiment_id = experiment(client, recipe.mlflow)
        # MLflow's filters know no escapes: the folder is compared here.
        earlier = client.search_runs([experiment_id], f"tags.`hyperlora.kind` = '{kind}'")
        same = [run.info.run_id for run in earlier if run.data.tags["hyperlora.run_uri"] == uri]
        # MLflow lets no param change: what an earlier start had need not be what the figures belong to.
        every = {f"hyperlora.{k}": str(v)[:VALUE] for k, v in params.items()}
        every |= {**(tags or {}), "hyperlora.kind": kind, "hyperlora.run_uri": uri}
        every |= {f"version.{k}": v for k, v in versions().items()} | git_state()
        if same:
            client.update_run(same[0], status="RUNNING")
            client.log_batch(same[0], tags=[RunTag(k, v) for k, v in every.items()], synchronous=True)
            return str(same[0])
        run_id = client.create_run(experiment_id, tags=every | {"mlflow.runName": name}).info.run_id
        client.log_batch(run_id, params=[Param(k, str(v)[:VALUE]) for k, v in params.items()], synchronous=True)
    except ERRORS as error:
        raise unreachable(recipe.mlflow.tracking_uri, error) from error
    return str(run_id)


def finish_comparison(recipe: Recipe, run_id: str, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Log every contestant's mean figures as ``contestant/figure``, its differences to the baseline, and the files.

    Beside a mean stand the ends of its interval, ``_low`` and ``_high``, and the number of seeds that have what is
    averaged, ``_reached``. A lower bound has no ``_high``.
    """
    client, now = MlflowClient(recipe.mlflow.tracking_uri), int(time.time() * 1000)
    values: dict[str, float] = {}
    for contestant in result["contestants"]:
        for table, suffix in (("summary", ""), ("against_baseline", "_against_baseline")):
            for key, interval in contestant[table].items():
                for edge in ("mean", "low", "high", "reached"):
                    value = interval.get(edge)
                    if value is not None and (edge != "high" or all_reached(interval)):
                        end = "" if edge == "mean" else f"_{edge}"
                        values[f"{contestant['name']}/{key}{suffix}{end}"] = float(value)
    metrics = [Metric(key, value, now, 0) for key, value in values.items()]
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH], synchronous=True)
    for file in files:
        client.log_artifact(run_id, str(file))
    client.set_terminated(run_id, "FINISHED")


def log_trial(
    recipe: Recipe,
    parent: str,
    name: str,
    values: Mapping[str, Any],
    record: Mapping[str, Any],
    tags: Mapping[str, str],
) -> None:
    """Log a trial that ended as a run nested in its search's; once, however often it is called.

    A finished trial has its summary figures, its held-out metrics over the steps, its rank map and its adapter.

    Args:
        recipe: of the trial.
        parent: run id of the search.
        name: of the trial, unique in the search.
        values: what the search varied.
        record: ``status`` (finished, stopped or failed), ``reason``, ``uri``, ``outcome`` and ``reports`` (held-out
            metrics with their ``step``, of a trial that was stopped).
        tags: of the run, beside git state.
    """
    from hyperlora.figures import rank_heat_map  # workers, which import this module, draw nothing

    client, now = MlflowClient(recipe.mlflow.tracking_uri), int(time.time() * 1000)
    experiment = client.get_run(parent).info.experiment_id
    mine = f"tags.`mlflow.parentRunId` = '{parent}' AND tags.`hyperlora.trial` = '{name}'"
    for earlier in client.search_runs([experiment], mine):
        over = earlier.info.status in ("FINISHED", "FAILED")
        # A trial that failed once may have finished since.
        if over and earlier.data.tags.get("hyperlora.status") == record["status"]:
            return
        client.delete_run(earlier.info.run_id)
    every = {**tags, **git_state(), "mlflow.runName": name, "mlflow.parentRunId": parent, "hyperlora.trial": name}
    every |= {"hyperlora.status": record["status"], "hyperlora.run_uri": record["uri"]}
    if record["reason"]:
        every["hyperlora.reason"] = str(record["reason"])[:VALUE]
    run_id = client.create_run(experiment, tags=every).info.run_id
    params = {**values, "seed": recipe.seed, "method": recipe.method}
    client.log_batch(run_id, params=[Param(k, str(v)[:VALUE]) for k, v in params.items()], synchronous=True)
    outcome = record["outcome"]
    reports = record["reports"] if outcome is None else outcome["evaluations"]
    metrics = [Metric(k, float(v), now, int(r["step"])) for r in reports for k, v in r.items() if k != "step"]
    if outcome is not None:
        known = {k: v for k, v in outcome.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        metrics += [Metric(f"summary/{k}", float(v), now, int(outcome["steps"])) for k, v in known.items()]
        client.log_figure(run_id, rank_heat_map(outcome), "rank_heat_map.png")
        client.log_dict(run_id, {m["name"]: m["rank"] for m in outcome["modules"]}, "ranks.json")
        _log_folder(client, run_id, outcome["adapter"], "adapter")
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH], synchronous=True)
    client.set_terminated(run_id, "FAILED" if record["status"] == "failed" else "FINISHED")


def _log_folder(client: MlflowClient, run_id: str, uri: str, name: str) -> None:
    """Files of a folder, wherever it is, as artifacts below ``name``."""
    fs, root = storage.filesystem(uri)
    with tempfile.TemporaryDirectory() as folder:
        fs.get(f"{root}/", f"{folder}/", recursive=True)
        client.log_artifacts(run_id, folder, name)


def finish_search(
    recipe: Recipe, run_id: str, metrics: Mapping[str, float], files: Sequence[Path], status: str = "FINISHED"
) -> None:
    """Log a search's own figures and files, and mark it."""
    client, now = MlflowClient(recipe.mlflow.tracking_uri), int(time.time() * 1000)
    figures = [Metric(key, float(value), now, 0) for key, value in metrics.items()]
    client.log_batch(run_id, metrics=figures, synchronous=True)
    for file in files:
        client.log_artifact(run_id, str(file))
    client.set_terminated(run_id, status)


def check(recipe: Recipe) -> None:
    """Find out in seconds whether a database or server is there: MLflow itself tries for minutes.

    Raises:
        RecipeError: it is not, or the experiment was deleted: MLflow then makes neither a run in it nor another one.
    """
    uri, name = recipe.mlflow.tracking_uri, recipe.mlflow.experiment
    answers(uri, new=True)
    try:
        found = MlflowClient(uri).get_experiment_by_name(name)
    except ERRORS as error:
        raise unreachable(uri, error) from error
    if found is not None and found.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        where = f"MLFLOW_TRACKING_URI={uris.redacted(uri)}"
        allowed = f"another name, or an experiment that is not deleted: {where} {restore} brings it back"
        raise RecipeError([Problem("mlflow.experiment", name, allowed)])


def probe(config: MLflowConfig) -> None:
    """Write a run and delete it.

    Raises:
        RecipeError: nobody answers in seconds.
        MlflowException: the server refuses.
    """
    answers(config.tracking_uri, new=True)
    client = MlflowClient(config.tracking_uri)
    run_id = client.create_run(experiment(client, config), tags={"mlflow.runName": "doctor"}).info.run_id
    client.log_metric(run_id, "probe", 1.0, synchronous=True)
    client.log_text(run_id, "probe", "probe.txt")
    client.delete_run(run_id)


def answers(uri: str, new: bool = False) -> None:
    """Raise RecipeError when nobody answers at a URI; ``new``: a database may still have to be made."""
    try:
        if uri.startswith("sqlite:///"):
            database = Path(uri.removeprefix("sqlite:///"))
            if new:
                database.parent.mkdir(parents=True, exist_ok=True)
            elif not database.is_file():
                raise FileNotFoundError("there is no such file")
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA schema_version").close()
        elif uri.startswith(("http://", "https://")):
            urllib.request.urlopen(uri, timeout=10).close()
        elif (place := urlsplit(uri)).hostname and place.port:
            socket.create_connection((place.hostname, place.port), timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answered
    except (sqlite3.Error, OSError, ValueError) as error:
        # Whom to trust, and with which certificate, MLflow has settings of its own for.
        if not isinstance(error.reason if isinstance(error, urllib.error.URLError) else error, ssl.SSLError):
            raise unreachable(uri, error) from error


def _artifact_location(uri: str) -> str | None:
    """Artifacts of a local database lie beside it; a server has a place of its own."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()


def resume(recipe: Recipe, run_id: str) -> bool:
    """Mark an interrupted run as running again; False where the server does not know it, or it was deleted.

    A server that is away is told nothing and misses no metric.
    """
    try:
        MlflowClient(recipe.mlflow.tracking_uri).update_run(run_id, status="RUNNING")
    except ERRORS as error:
        if isinstance(error, MlflowException) and error.error_code in ("RESOURCE_DOES_NOT_EXIST", REFUSED):
            return False
        _not_told(run_id, error)
    _record(run_id).unlink(missing_ok=True)  # this process delivers what waits
    return True


def finish(recipe: Recipe, run_id: str, outcome: Mapping[str, Any]) -> None:
    """Log summary figures and pictures of a finished run and mark it so; the run is finished without it, too."""
    uri = recipe.mlflow.tracking_uri
    if not _tell(run_id, lambda: _finish(MlflowClient(uri), run_id, outcome)):
        finished(recipe, run_id, outcome["adapter"].rsplit("/", 1)[0])


def finished(recipe: Recipe, run_id: str, run_uri: str) -> None:
    """Have :func:`deliver` tell that a run is finished, and its outcome."""
    _remember(Missed(run_id, recipe.mlflow.tracking_uri, run_uri, "FINISHED"))


def left_open(recipe: Recipe, run_id: str) -> bool:
    """Whether MLflow has a run and does not know that it is finished; False where nobody answers."""
    try:
        run = MlflowClient(recipe.mlflow.tracking_uri).get_run(run_id)
    except ERRORS:
        return False
    return bool(run.info.lifecycle_stage == "active" and run.info.status != "FINISHED")


def _tell(run_id: str, action: Callable[[], Any]) -> bool:
    """Whether the server took it."""
    try:
        action()
    except ERRORS as error:
        _not_told(run_id, error)
        return False
    return True


def _not_told(run_id: str, error: BaseException) -> None:
    logger.warning("MLflow run %s could not be updated: %s", run_id, first_line(error))


def _finish(client: MlflowClient, run_id: str, outcome: Mapping[str, Any]) -> None:
    from hyperlora.figures import loss_curve, rank_heat_map  # workers, which import this module, draw nothing

    now, step = int(time.time() * 1000), int(outcome["steps"])
    known = {
        f"summary/{k}": float(v) for k, v in outcome.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    there = client.get_run(run_id).data.metrics  # of an attempt that did not come to its end
    metrics = [Metric(k, v, now, step) for k, v in known.items() if there.get(k) != v]
    client.log_batch(run_id, metrics, tags=[RunTag("hyperlora.adapter", outcome["adapter"])], synchronous=True)
    client.log_figure(run_id, rank_heat_map(outcome), "rank_heat_map.png")
    client.log_figure(run_id, loss_curve(outcome), "loss_curve.png")
    client.log_dict(run_id, {k: v for k, v in outcome.items() if k not in ("losses", "step_seconds")}, "result.json")
    client.set_terminated(run_id, "FINISHED")


def fail(recipe: Recipe, run_id: str, status: str) -> None:
    """Mark a run as FAILED or KILLED; a server that is away does not hide the error that led here.

    Called while that error is handled: after a ReplacedError how the run ends is for another process to say.
    """
    if isinstance(sys.exception(), ReplacedError):
        return
    uri = recipe.mlflow.tracking_uri
    if not _tell(run_id, lambda: _end(MlflowClient(uri), run_id, status)):
        _remember(Missed(run_id, uri, None, status))


def _end(client: MlflowClient, run_id: str, status: str) -> None:
    """Mark a run that has not finished meanwhile, on another machine."""
    if client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, status)


@dataclass(frozen=True)
class Missed:
    """What MLflow does not know of a run that ended while it was away, beside the metrics that wait.

    Attributes:
        run_id: of the MLflow run.
        tracking_uri: where it is.
        run_uri: folder of a run that finished, where its outcome is; None otherwise.
        status: FINISHED, FAILED or KILLED; None when MLflow knows it.
    """

    run_id: str
    tracking_uri: str
    run_uri: str | None = None
    status: str | None = None


def _record(run_id: str) -> Path:
    return spool.folder() / f"mlflow-{run_id}.json"


def _remember(missed: Missed) -> None:
    """Keep it on this machine, until :func:`deliver`; costs a warning where it cannot be written."""
    path = _record(missed.run_id)
    try:
        known = _read_missed(path)
        if known is not None and missed.status is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(missed)), encoding="utf-8")
    except OSError as error:
        logger.warning("that MLflow run %s ended cannot be kept for later: %s", missed.run_id, error)


def _read_missed(path: Path) -> Missed | None:
    """None where there is none, or what is there is not one."""
    try:
        return Missed(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def missed(tracking_uri: str | None = None) -> list[Missed]:
    """Runs that ended, or were killed, on this machine while MLflow was away, of one server or of all."""
    read = [_read_missed(path) for path in sorted(spool.folder().glob("mlflow-*.json"))]
    found = {m.run_id: m for m in read if m is not None}
    for run_id, path in _queues().items():
        uri = spool.about(path).get("tracking_uri")
        if run_id not in found and isinstance(uri, str) and not spool.in_use(path):
            found[run_id] = Missed(run_id, uri)
    return [m for m in found.values() if tracking_uri in (None, m.tracking_uri)]


def undelivered() -> list[str]:
    """Ids of runs whose metrics wait on this machine and whose command has not ended."""
    ended = {run.run_id for run in missed()}
    return [run_id for run_id, path in _queues().items() if run_id not in ended and spool.in_use(path)]


def _queues() -> dict[str, Path]:
    """Files of metrics that wait, by the ids of their runs."""
    return {path.stem.removeprefix("mlflow-"): path for path in sorted(spool.folder().glob("mlflow-*.jsonl"))}


def deliver(run: Missed, outcome: Mapping[str, Any] | None) -> None:
    """Send what MLflow missed of a run: its metrics, in order and once, and how it ended.

    Args:
        run: of :func:`missed`.
        outcome: of the run in ``run.run_uri``.

    Raises:
        RecipeError: nobody answers there.
        Exception: it refuses, or went away again; of any type.
    """
    answers(run.tracking_uri)
    client = MlflowClient(run.tracking_uri)
    if client.get_run(run.run_id).info.lifecycle_stage != "active":
        raise ValueError(f"it was deleted there; restore it, or delete {_record(run.run_id).with_suffix('.*')}")
    MLflowSink(run.tracking_uri, run.run_id).close()
    if _waiting(run.run_id).exists():
        raise OSError(f"metrics still wait in {_waiting(run.run_id)}")
    if outcome is not None:
        _finish(client, run.run_id, outcome)
    elif run.status is not None:
        _end(client, run.run_id, run.status)
    _record(run.run_id).unlink(missing_ok=True)


def _waiting(run_id: str) -> Path:
    return spool.folder() / f"mlflow-{run_id}.jsonl"


class MLflowSink:
    """Sends each step's metrics from a background thread, in order, many at a time.

    While the server is away metrics wait in a :class:`~hyperlora.spool.Spool`, from which they are delivered when it is
    back, by this process or by the one that goes on with the run on this machine. Steps that the run or the queue
    already has are not added again, and a metric that is sent twice is stored once: it keeps its time. What the server
    will never take is left out, with one warning.

    Args:
        tracking_uri: server or database.
        run_id: of a run that exists.
        interval: seconds between deliveries.
        warn: is told, beside the log, as a sink of a warning, what closing left on this machine.
    """

    def __init__(
        self,
        tracking_uri: str,
        run_id: str,
        interval: float = 2.0,
        warn: Callable[[str, int, str], None] = lambda monitor, step, message: None,
    ) -> None:
        self._uri, self._run_id, self._warn = tracking_uri, run_id, warn
        self._client: MlflowClient | None = None
        self._interval = interval
        self._spool = Spool(_waiting(run_id), about={"tracking_uri": tracking_uri})
        self._closed = self._away = self._refused = False
        self._wake = threading.Event()
        waiting = self._spool.first(len(self._spool))
        #: Last step in the queue, and the steps in the run once the server told them.
        self._queued = {kind: max((r["step"] for r in waiting if r["kind"] == kind), default=-1) for kind in _SIGN}
        self._sent: dict[str, set[int]] | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        pass

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self._add("step", step, metrics)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._add("evaluation", step, metrics)

    def warning(self, monitor: str, step: int, message: str) -> None:
        self._spool.add({"kind": "tag", "key": f"hyperlora.warning.{monitor}", "value": f"step {step}: {message}"})

    def _add(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        if step > self._queued[kind]:
            self._queued[kind] = step
            self._spool.add({"kind": kind, "step": step, "time": int(time.time() * 1000), "metrics": metrics})

    def flush(self) -> Callable[[], None]:
        """Have everything delivered; what is returned waits for that, unless the server is away."""
        last = self._spool.added
        self._wake.set()

        def wait() -> None:
            deadline = time.monotonic() + PATIENCE
            while self._spool.removed < last and not self._away and time.monotonic() < deadline:
                time.sleep(0.005)

        return wait

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()
        for wait in (0, 1, 3):
            time.sleep(wait)
            self._send()
            if not len(self._spool):
                known = _read_missed(_record(self._run_id))
                if known is not None and known.status is None:
                    _record(self._run_id).unlink(missing_ok=True)
                return
        self._spool.close()
        _remember(Missed(self._run_id, self._uri))
        message = (
            f"{len(self._spool)} records of MLflow run {self._run_id} wait on {platform.node()} in {self._spool.path}; "
            f"run `hyperlora deliver` there, once it reaches {uris.redacted(self._uri)}"
        )
        logger.warning("%s", message)
        self._warn("mlflow", self._queued["step"], message)

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._interval)
            self._wake.clear()
            self._send()

    def _send(self) -> None:
        count = RECORDS
        try:
            while len(self._spool):
                records = self._spool.first(count)
                try:
                    self._deliver(records)
                except MlflowException as error:
                    if error.error_code != REFUSED or self._sent is None or not self._active():
                        raise
                    if len(records) > 1:
                        count = 1  # which of them it is
                        continue
                    self._leave_out(records[0], error)
                    count = RECORDS
                self._away = False
                self._spool.remove(len(records))
        except ERRORS as error:
            if not self._away:
                gone = isinstance(error, MlflowException) and error.error_code in ("RESOURCE_DOES_NOT_EXIST", REFUSED)
                what = f"MLflow run {self._run_id} is no longer there, its" if gone else "MLflow is away,"
                logger.warning("%s metrics wait for it: %s", what, first_line(error))
            self._away = True

    def _active(self) -> bool:
        """Whether the run was not deleted."""
        assert self._client is not None
        return bool(self._client.get_run(self._run_id).info.lifecycle_stage == "active")

    def _leave_out(self, record: dict[str, Any], error: MlflowException) -> None:
        if not self._refused:
            what = record.get("key") or f"{record['kind']} {record['step']}"
            logger.warning("MLflow run %s goes on without what it refuses: %s: %s", self._run_id, what, error.message)
        self._refused = True

    def _deliver(self, records: list[dict[str, Any]]) -> None:
        # A database that is away is asked when a client of it is made.
        client = self._client = self._client or MlflowClient(self._uri)
        if self._sent is None:
            history = {kind: client.get_metric_history(self._run_id, key) for kind, key in _SIGN.items()}
            self._sent = {kind: {m.step for m in found} for kind, found in history.items()}
        tags = [RunTag(r["key"], r["value"]) for r in records if r["kind"] == "tag"]
        new = [r for r in records if r["kind"] != "tag" and r["step"] not in self._sent[r["kind"]]]
        metrics = [Metric(key, value, r["time"], r["step"]) for r in new for key, value in r["metrics"].items()]
        for first in range(0, max(1, len(metrics)), BATCH - len(tags)):
            some = metrics[first : first + BATCH - len(tags)]
            client.log_batch(self._run_id, metrics=some, tags=tags, synchronous=True)
