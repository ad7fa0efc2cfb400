"""Ray jobs: a command of this package as a job on a cluster, followed, listed, stopped. Imports ray.job_submission.

What a job needs travels as its working directory: the packages and the files that the command names. Secrets are given
by name: their values are read from this process's environment and travel as a file of that directory, since Ray logs
the variables of a runtime environment and tells them to whoever asks for the job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.exceptions import RayError, RayTaskError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException
from requests.exceptions import RequestException

from hyperlora import autoscaling, collective, tokens, uris
from hyperlora.capacity import Growth, Node
from hyperlora.config import Problem, RecipeError, first_line
from hyperlora.environment import ADDRESS, GIVEN, changed, take_given

PACKAGES = ("hyperlora", "pipelines", "tune_spaces")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "runs", "mlflow.db", "mlartifacts", "mlruns")
#: Bytes of a working directory. Ray refuses more than 500 MiB; what is larger than this is data for a store.
LARGEST = 64 * 2**20
#: Seconds that a stopped job has before it is killed: for its checkpoint, where the store is away for as long as
#: ``storage.final_retry_seconds`` waits (300), and for writing it on the machine's own disk then.
STOP_SECONDS = 420
#: Seconds between attempts to reach a cluster whose connection was lost, and how long it may be lost.
RETRY, LOST = 2.0, 600.0
#: Seconds without output after which the connection that brings it is made anew: it may be open at this end alone.
QUIET = 60.0
#: Seconds that a node has for an answer.
ANSWER = 120.0
#: Seconds that all nodes have to install what a job needs: as many as Ray gives the first of them.
INSTALLED = 900.0
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)

#: Extras of this package for stores that not everybody has.
STORES = ("gs", "az")

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


class NoSuchJobError(RecipeError):
    """The cluster has no submitted job of this id."""


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
    if (allowed := uris.secret_problem(url)) is not None:
        raise RecipeError([Problem("--address", uris.redacted(url), allowed)])
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it names no host over http or https")
    except ValueError as error:
        allowed = f"the URL of the cluster's dashboard, such as http://HOST:8265 ({error})"
        raise RecipeError([Problem("--address", address, allowed)]) from error
    with changed({ADDRESS: url}):
        yield url


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

    Of the packages, what .gitignore and .rayignore of a checkout name stays here; the command's files go in any case.

    Raises:
        RecipeError: it is too large.
    """
    for package in PACKAGES:
        source = Path(str(resources.files(package)))
        shutil.copytree(source, folder / package, ignore=_left_out(source.parent))
    for name, file in job.files.items():
        shutil.copyfile(file, folder / name)
    if job.env:
        given = folder / GIVEN
        given.touch(mode=0o600)  # Ray unpacks it as it is
        given.write_text(json.dumps({name: os.environ[name] for name in job.env}), encoding="utf-8")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if size > LARGEST:
        allowed = f"at most {LARGEST // 2**20} MiB with the packages; put data into a store that every node reaches"
        names = ", ".join(str(f) for f in job.files.values())
        raise RecipeError([Problem("files of the job", f"{size / 2**20:.0f} MiB ({names})", allowed)])
    return size


def _left_out(root: Path) -> Callable[[str, list[str]], set[str]]:
    """For ``copytree``, as Ray would leave out: it looks for rules in the working directory alone, which is a copy."""
    rules = get_excludes_from_ignore_files(
        root, include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1"
    )

    def left_out(folder: str, names: list[str]) -> set[str]:
        return IGNORED(folder, names) | {n for n in names if any(rule(Path(folder, n)) for rule in rules)}

    return left_out


def pinned() -> list[str]:
    """The package's dependencies, and theirs, at the versions that are installed here; of its stores those that are.

    Raises:
        RecipeError: the package itself is not installed, so that nothing says what it needs.
    """
    if _installed("hyperadalora") is None:
        allowed = "a package that is installed here, as its dependencies are read from that (pip install --no-deps .)"
        raise RecipeError([Problem("--install", "hyperadalora", allowed)])
    found: dict[str, set[str]] = {}
    waiting = [("hyperadalora", {"", *STORES})]
    while waiting:
        name, extras = waiting.pop()
        for need in map(Requirement, metadata.requires(name) or []):
            if need.marker is not None and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            known = found.setdefault(canonicalize_name(need.name), set())
            new = ({""} | need.extras) - known
            if new and _installed(need.name):
                known |= new
                waiting.append((need.name, new))
    pins = []
    for name, extras in sorted(found.items()):
        if (version := _installed(name)) is not None:
            asked = ",".join(sorted(extras - {""}))
            pins.append(f"{name}[{asked}]=={version}" if asked else f"{name}=={version}")
    return pins


def _installed(name: str) -> str | None:
    """The version, without what says for which device it was built: that is of this machine, and no index has it."""
    try:
        return Version(metadata.version(name)).public
    except metadata.PackageNotFoundError:
        return None


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
    return _sent(client, entry, _runtime(job, folder), shlex.join(["hyperlora", *job.words]), lost)


def _sent(
    client: JobSubmissionClient, entry: str, runtime: dict[str, Any], words: str, lost: Callable[[str], None]
) -> str:
    # Chosen here: a job whose answer was lost on its way is recognised when it is sent again.
    job_id = f"hyperlora-{secrets.token_hex(8)}"
    since, told = time.monotonic(), False
    while True:
        try:
            tags = {"hyperlora": words}
            client.submit_job(entrypoint=entry, submission_id=job_id, runtime_env=runtime, metadata=tags)
            return job_id
        except (RequestException, RuntimeError) as error:
            if f"{job_id} already exists" in str(error):
                return job_id
            # Of a traceback of the cluster's the last line; Ray ends it with a point on a line of its own.
            reason = str(error).rstrip(". \n").rpartition("\n")[2]
            # A head that has just been started has nobody yet who takes jobs.
            if isinstance(error, RuntimeError) and "No available agent" not in reason:
                raise RecipeError([Problem("job", words, f"one that the cluster takes ({reason})")]) from error
            if time.monotonic() - since > LOST:
                allowed = f"a cluster that answers; it may have taken the job {job_id} ({reason})"
                raise RecipeError([Problem("--address", client.get_address(), allowed)]) from error
            if not told:
                lost(reason)
                told = True
        time.sleep(RETRY)


def _runtime(job: Job, folder: Path) -> dict[str, Any]:
    runtime: dict[str, Any] = {
        "working_dir": str(folder),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"},
    }
    if job.env:
        # In every process that Ray starts for the job; its own command takes them itself.
        runtime["worker_process_setup_hook"] = f"{take_given.__module__}.{take_given.__name__}"
    return runtime | ({"pip": pinned()} if job.install else {})


def growth(client: JobSubmissionClient, job: Job) -> Growth | None:
    """How far the cluster's autoscaler goes; None when that is told nowhere.

    The dashboard does not know, so it is asked by a small job on the head, with the working directory that ``job``
    gets, without its secrets: Ray keeps one copy where there are none.

    Raises:
        RecipeError: the small job failed, or has not ended after minutes.
    """
    small_job = replace(job, env=(), install=False)
    with tempfile.TemporaryDirectory() as folder:
        pack(small_job, Path(folder))
        runtime, what = _runtime(small_job, Path(folder)), "(how far the autoscaler goes)"
        if job.install:
            # All that it imports and a head that takes jobs may lack: the rest takes minutes.
            runtime["pip"] = [f"fsspec=={_installed('fsspec')}"]
        small = _sent(client, "python -m hyperlora.autoscaling", runtime, what, lambda reason: None)
    deadline, status, told = time.monotonic() + LOST, JobStatus.PENDING, None
    while status not in ENDED and time.monotonic() < deadline:
        with suppress(RequestException):
            found = client.get_job_info(small)
            status, told = found.status, reason(found) if found.status in ENDED else found.message
        time.sleep(0.5)
    text = client.get_job_logs(small)
    if status not in ENDED:
        client.stop_job(small)
    try:
        return autoscaling.read(text)
    except ValueError as error:
        last = (told or text).strip().rpartition("\n")[2]
        state = f"{'' if status in ENDED else 'is still '}{status.value.lower()}"
        allowed = f"a cluster whose head runs jobs; the one that asks for its autoscaler {state}: {last}"
        raise RecipeError([Problem("job", small, allowed)]) from error


def follow(address: str, job_id: str, show: Callable[[str], None], lost: Callable[[str], None]) -> JobDetails:
    """Show a job's output until it ends, however often the connection is lost meanwhile; returns how it ended.

    Args:
        address: of the cluster's dashboard.
        job_id: of the job.
        show: gets new output.
        lost: told what cannot be reached, and why, when it is tried again.

    Raises:
        NoSuchJobError: there is no such job.
        RecipeError: the cluster has not answered for ten minutes, or not told what the job, which runs, has written.
    """
    shown, lost_since, ended = 0, None, None
    while True:
        try:
            client = connect(address)
            job = known(client, job_id, address)
            ended = job if job.status in ENDED else None
            if new := client.get_job_logs(job_id)[shown:]:
                shown += len(new)
                show(new)
            lost_since = None
            if ended is not None:
                return ended
            # Sooner than by asking again; where something on the way lets no WebSocket through, that has to do.
            with suppress(RuntimeError, aiohttp.ClientError, OSError):
                for new in _tail(client, job_id, shown):
                    shown += len(new)
                    show(new)
        except NoSuchJobError:
            raise
        except (RecipeError, RuntimeError, aiohttp.ClientError, OSError) as error:
            why = first_line(error)
            if lost_since is None:
                what = "connection lost" if ended is None else "the job has ended, but its output cannot be read"
                lost(f"{what} ({why}); {'the job goes on, ' if ended is None else ''}trying again")
                lost_since = time.monotonic()
            if time.monotonic() - lost_since > LOST:
                if ended is not None:
                    return ended
                allowed = f"a cluster that answers; it has not for {LOST / 60:.0f} minutes ({why})"
                raise RecipeError([Problem("--address", address, allowed)]) from error
        time.sleep(RETRY)


def known(client: JobSubmissionClient, job_id: str, address: str) -> JobDetails:
    """A submitted job of the cluster.

    Raises:
        NoSuchJobError: there is none of this id.
        RuntimeError: the cluster could not say.
    """
    try:
        found = client.get_job_info(job_id)
    except RuntimeError as error:
        if re.search(r"status code 404|does not exist", str(error)):
            allowed = f"a job of {address}; hyperlora jobs lists them"
            raise NoSuchJobError([Problem("ID", job_id, allowed)]) from error
        raise
    if found.type != JobType.SUBMISSION:
        allowed = (
            "a job that was submitted; this one is a command that runs elsewhere, and is followed and stopped there"
        )
        raise NoSuchJobError([Problem("ID", job_id, allowed)])
    return found


def reason(job: JobDetails) -> str | None:
    """Why a job failed whose output does not say it: its command did not start, was killed, or its node was lost."""
    if job.status != JobStatus.FAILED:
        return None
    if job.driver_exit_code is None:
        return (job.message or "").strip() or None
    # Of a shell's the signal is what is above 128. SIGTERM's is the command's own, which says why it ends.
    code = job.driver_exit_code
    number = -code if code < 0 else code - 128
    if number not in set(signal.Signals) or code == 128 + signal.SIGTERM:
        return None
    advice = "; the head may be out of memory" if number == signal.SIGKILL else ""
    return f"its command was ended by signal {number} ({signal.Signals(number).name}){advice}"


def _tail(client: JobSubmissionClient, job_id: str, skip: int) -> Iterator[str]:
    """New output while the job runs, past the first ``skip`` characters; ends when there is none for a while."""
    stream = client.tail_job_logs(job_id)

    async def one() -> str | None:
        return await asyncio.wait_for(anext(stream, None), QUIET)

    # What is still at work when a signal comes, and the stream, are ended with the runner.
    with asyncio.Runner() as runner, suppress(TimeoutError):
        while (text := runner.run(one())) is not None:
            new = text[skip:]
            skip = max(0, skip - len(text))
            if new:
                yield new


def each_node(
    function: Callable[..., Any], *arguments: Any, start: float = ANSWER
) -> Iterator[tuple[dict[str, Any], Any, float, float]]:
    """Call a function on every living node of the cluster that this process is in.

    Args:
        function: that each node can import.
        arguments: of the function.
        start: seconds until the first process of the job has to run on all of them.

    Yields:
        The node as Ray describes it, what the function returned (or its exception), and the times before and after,
        seconds.
    """
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    alive = [n for n in ray.nodes() if n["Alive"]]
    # On all at once, since each may install what the job needs.
    ray.wait([_task(node, lambda: None).remote() for node in alive], num_returns=len(alive), timeout=start)
    for node in alive:
        asked = time.time()
        try:
            answer: Any = ray.get(_task(node, function).remote(*arguments), timeout=ANSWER)
        except RayError as error:
            answer = error
        yield node, answer, asked, time.time()


def _task(node: Mapping[str, Any], function: Callable[..., Any]) -> Any:
    """A function as a task of one node, however busy it is."""
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=place)


def apart(backend: str, nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Why processes, one on each of these nodes of the cluster, do not come together; None when they do.

    Args:
        backend: nccl, with the first GPU of each, or gloo.
        nodes: as Ray describes them, at least one.
    """
    try:
        at = ray.get(_task(nodes[0], collective.free_address).remote(nodes[0]["NodeManagerAddress"]), timeout=ANSWER)
        tasks = [
            _task(node, collective.problem).remote(backend, 1, first=rank, of=len(nodes), at=at)
            for rank, node in enumerate(nodes)
        ]
        told = ray.get(tasks, timeout=ANSWER)
    except RayError as error:
        return first_line(error.cause if isinstance(error, RayTaskError) else error)
    found = [f"{n['NodeManagerAddress']}: {t}" for n, t in zip(nodes, told, strict=True) if t is not None]
    # One that fails leaves the others waiting for it, who say less.
    return min(found, key=lambda text: collective.NOTHING in text, default=None)


def listed(client: JobSubmissionClient) -> list[JobDetails]:
    """The cluster's jobs, newest first."""
    return sorted(client.list_jobs(), key=lambda j: j.start_time or 0, reverse=True)
