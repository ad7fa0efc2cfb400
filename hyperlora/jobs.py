"""Ray jobs: a command of this package as a job on a cluster, followed, listed, stopped. Imports ray.job_submission.

What a job needs travels as its working directory: the packages and the files that the command names. Secrets travel by
name: values are read from this process's environment and given to the job alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
from packaging.requirements import Requirement
from packaging.version import Version
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException
from requests.exceptions import RequestException

from hyperlora import autoscaling, tokens
from hyperlora.capacity import Growth, Node
from hyperlora.config import Problem, RecipeError, first_line

PACKAGES = ("hyperlora", "pipelines", "tune_spaces")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "runs", "mlflow.db", "mlartifacts", "mlruns")
#: Bytes of a working directory. Ray refuses more than 500 MiB; what is larger than this is data for a store.
LARGEST = 64 * 2**20
#: Seconds that a stopped job has for its checkpoint before it is killed.
STOP_SECONDS = 300
#: Seconds between attempts to follow a job whose connection was lost, and how long it may be lost.
RETRY, LOST = 2.0, 600.0
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)

#: Extras of this package for stores that not everybody has.
STORES = ("gs", "az")
#: The variable that Ray's own commands for jobs read.
ADDRESS = "RAY_API_SERVER_ADDRESS"

#: Loggers of Ray that tell of uploads and connections whatever Ray's own level is.
CHATTER = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True)
class Job:
    """A command as the cluster runs it.

    Attributes:
        words: of the command, without ``hyperlora``; files by their names in the working directory.
        files: name in the working directory to the file here.
        env: names of environment variables whose values the job gets.
        install: whether the nodes install the dependencies, at the versions that are installed here.
        more: words that are of interest to the cluster alone, and are not listed.
    """

    words: Sequence[str]
    files: Mapping[str, Path]
    env: Sequence[str] = ()
    install: bool = False
    more: Sequence[str] = ()


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's dashboard.

    Raises:
        RecipeError: nobody answers there, or it asks for a token that is not given here.
    """
    if logging.getLogger().level > logging.INFO:
        for name in CHATTER:
            logging.getLogger(name).setLevel(logging.WARNING)
    with _only(address) as url:
        try:
            client = JobSubmissionClient(url)
            client.get_version()
        except (RayError, RuntimeError, RequestException, OSError, ValueError) as error:
            raise _refusal(address, error) from error
    return client


@contextmanager
def _only(address: str) -> Iterator[str]:
    """The URL of an address, and no other: Ray's clients take what the environment says before what they are told.

    Raises:
        RecipeError: it is no URL of a dashboard.
    """
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it names no host over http or https")
    except ValueError as error:
        allowed = f"the URL of the cluster's dashboard, such as http://HOST:8265 ({error})"
        raise RecipeError([Problem("--address", address, allowed)]) from error
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = url
    try:
        yield url
    finally:
        os.environ.pop(ADDRESS)
        if before is not None:
            os.environ[ADDRESS] = before


@contextmanager
def answered(address: str) -> Iterator[None]:
    """For requests to a cluster that may go away meanwhile.

    Raises:
        RecipeError: it does not answer any more, or no longer lets us in.
    """
    try:
        yield
    except (RayError, RequestException) as error:
        raise _refusal(address, error) from error


def _refusal(address: str, error: Exception) -> RecipeError:
    text = str(error).strip()
    if re.search(r"authentication|\b40[13]\b", text, re.IGNORECASE):
        reason = text.splitlines()[0].split(". ")[0]  # Ray goes on with its own advice
        allowed = f"a cluster that lets this user in: {tokens.HOW} ({reason})"
    else:
        allowed = f"the dashboard of a running Ray cluster ({text.splitlines()[0] if text else type(error).__name__})"
    return RecipeError([Problem("--address", address, allowed)])


def nodes(address: str) -> list[Node]:
    """The living nodes of a cluster.

    Raises:
        RecipeError: its dashboard does not say.
    """
    with _only(address) as url:
        try:
            # Where nodes have died, Ray takes the filtered answer for a truncated one and raises.
            found = list_nodes(url, limit=10_000, filters=[("state", "=", "ALIVE")], raise_on_missing_output=False)
        except (RayError, RayStateApiException, RuntimeError, RequestException, OSError, ValueError) as error:
            raise _refusal(address, error) from error
    return [Node(n.resources_total or {}, n.labels or {}) for n in found]


def pack(job: Job, folder: Path) -> int:
    """Fill a working directory; returns its size in bytes.

    Raises:
        RecipeError: it is too large.
    """
    for package in PACKAGES:
        shutil.copytree(Path(str(resources.files(package))), folder / package, ignore=IGNORED)
    for name, file in job.files.items():
        shutil.copyfile(file, folder / name)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if size > LARGEST:
        allowed = f"at most {LARGEST // 2**20} MiB with the packages; put data into a store that every node reaches"
        names = ", ".join(str(f) for f in job.files.values())
        raise RecipeError([Problem("files of the job", f"{size / 2**20:.0f} MiB ({names})", allowed)])
    return size


def pinned() -> list[str]:
    """The package's dependencies at the versions that are installed here, and those of its stores that are."""
    found = []
    for text in metadata.requires("hyperadalora") or []:
        need = Requirement(text)
        needed = need.marker is None or need.marker.evaluate({"extra": ""})
        if not needed and not any(need.marker.evaluate({"extra": store}) for store in STORES):  # type: ignore[union-attr]
            continue
        try:
            # Without what says for which device it was built: that is of this machine, and no index has it.
            version = Version(metadata.version(need.name)).public
        except metadata.PackageNotFoundError:
            if needed:
                raise
            continue
        extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
        found.append(f"{need.name}{extras}=={version}")
    return found


def submit(client: JobSubmissionClient, job: Job, folder: Path, lost: Callable[[str], None]) -> str:
    """Submit a job whose working directory is ``folder``, once, however often the connection is lost; returns its id.

    Args:
        client: of the cluster.
        job: to submit.
        folder: filled by :func:`pack`.
        lost: told why the connection was lost.

    Raises:
        RecipeError: the cluster does not take it, or has not answered for ten minutes.
    """
    entry = shlex.join(["python", "-m", "pipelines.cli", *job.words, *job.more])
    words = shlex.join(["hyperlora", *job.words])
    # Chosen here: a job whose answer was lost on its way is recognised when it is sent again.
    job_id = f"hyperlora-{secrets.token_hex(8)}"
    since, told = time.monotonic(), False
    while True:
        try:
            runtime, tags = _runtime(job, folder), {"hyperlora": words}
            client.submit_job(entrypoint=entry, submission_id=job_id, runtime_env=runtime, metadata=tags)
            return job_id
        except RequestException as error:
            if time.monotonic() - since > LOST:
                allowed = f"a cluster that answers; it may have taken the job {job_id} ({first_line(error)})"
                raise RecipeError([Problem("--address", client.get_address(), allowed)]) from error
            if not told:
                lost(first_line(error))
                told = True
        except RuntimeError as error:
            if f"{job_id} already exists" in str(error):
                return job_id
            last = str(error).strip().splitlines()[-1]
            raise RecipeError([Problem("job", words, f"one that the cluster takes ({last})")]) from error
        time.sleep(RETRY)


def _runtime(job: Job, folder: Path) -> dict[str, Any]:
    env = {name: os.environ[name] for name in job.env}
    runtime: dict[str, Any] = {
        "working_dir": str(folder),
        "env_vars": {**env, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"},
    }
    return runtime | ({"pip": pinned()} if job.install else {})


def growth(client: JobSubmissionClient, job: Job) -> Growth | None:
    """How far the cluster's autoscaler goes; None when that is told nowhere.

    The dashboard does not know, so it is asked by a small job on the head, with the working directory that ``job``
    gets: Ray keeps one copy.

    Raises:
        RecipeError: the small job failed, or has not ended after minutes.
    """
    small_job = replace(job, env=())  # no secrets: it needs none
    with tempfile.TemporaryDirectory() as folder:
        pack(small_job, Path(folder))
        small = client.submit_job(
            entrypoint="python -m hyperlora.autoscaling",
            runtime_env=_runtime(small_job, Path(folder)),
            metadata={"hyperlora": "(how far the autoscaler goes)"},
        )
    deadline = time.monotonic() + LOST
    while (status := client.get_job_status(small)) not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    text = client.get_job_logs(small)
    try:
        return autoscaling.read(text)
    except ValueError as error:
        last = (text.strip().splitlines() or [""])[-1]
        allowed = f"a cluster whose head runs jobs; the one that asks for its autoscaler {status.value.lower()}: {last}"
        raise RecipeError([Problem("job", small, allowed)]) from error


def follow(address: str, job_id: str, show: Callable[[str], None], lost: Callable[[str], None]) -> JobStatus:
    """Show a job's output until it ends, however often the connection is lost meanwhile; returns how it ended.

    Args:
        address: of the cluster's dashboard.
        job_id: of the job.
        show: gets new output.
        lost: told why the connection was lost.

    Raises:
        RecipeError: there is no such job, or the cluster has not answered for ten minutes.
    """
    shown, silent_since, told = 0, time.monotonic(), False
    while True:
        try:
            client = connect(address)
            status = client.get_job_status(job_id)
            if status in ENDED:
                show(client.get_job_logs(job_id)[shown:])
                return status
            for text in _tail(client, job_id, shown):
                shown += len(text)
                show(text)
                silent_since, told = time.monotonic(), False
        except (RecipeError, RuntimeError, aiohttp.ClientError, OSError) as error:
            if isinstance(error, RuntimeError) and re.search(r"status code 404|does not exist", str(error)):
                raise RecipeError([Problem("ID", job_id, f"a job of {address}; hyperlora jobs lists them")]) from error
            if time.monotonic() - silent_since > LOST:
                allowed = f"a cluster that answers; it has not for {LOST / 60:.0f} minutes ({first_line(error)})"
                raise RecipeError([Problem("--address", address, allowed)]) from error
            if not told:
                lost(first_line(error))
                told = True
        time.sleep(RETRY)


def _tail(client: JobSubmissionClient, job_id: str, skip: int) -> Iterator[str]:
    """New output while the job runs, past the first ``skip`` characters."""
    stream = client.tail_job_logs(job_id)
    with asyncio.Runner() as runner:

        async def one() -> str | None:
            return await anext(stream, None)

        try:
            while (text := runner.run(one())) is not None:
                new = text[skip:]
                skip = max(0, skip - len(text))
                if new:
                    yield new
        finally:
            runner.run(stream.aclose())  # type: ignore[attr-defined]


def each_node(function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[str, Any, float, float]]:
    """Call a function on every living node of the cluster that this process is in.

    Yields:
        Address of the node, what the function returned (or its exception), and the times before and after, seconds.
    """
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    for living in [n for n in ray.nodes() if n["Alive"]]:
        place = NodeAffinitySchedulingStrategy(living["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=place)
        asked = time.time()
        try:
            answer: Any = ray.get(task.remote(*arguments), timeout=120)
        except RayError as error:
            answer = error
        yield living["NodeManagerAddress"], answer, asked, time.time()


def listed(client: JobSubmissionClient) -> list[JobDetails]:
    """The cluster's jobs, newest first."""
    return sorted(client.list_jobs(), key=lambda j: j.start_time or 0, reverse=True)
