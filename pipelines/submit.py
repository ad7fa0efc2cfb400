"""``hyperlora submit``, ``jobs``, ``logs`` and ``stop``: the same commands as Ray jobs on a cluster."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console
from rich.text import Text

from hyperlora import capacity, jobs, tokens
from hyperlora.config import BUILTIN, Problem, RayConfig, Recipe, RecipeError, worker_problems
from hyperlora.environment import ADDRESS
from pipelines.common import THERE, gathered, is_file, load_recipe, shipped, write_json

#: Arguments of the jobs that may name a file, which then travels with the job.
FILES = ("recipe", "space", "field")
#: Commands whose trials are one process each, ``--concurrency`` of them at a time.
PLANNED = ("study", "compare")


def main(args: Namespace, inner: Namespace, console: Console) -> int:
    """Validate, package, submit, follow; returns 0 when the job succeeded.

    Args:
        args: of this command; ``words`` are the job's.
        inner: what the job's words say.
        console: of the terminal.
    """
    settings, job, address = _job(args, inner)
    client = jobs.connect(address)
    if told := tokens.warning(address):
        console.print(Text(told, "yellow"), soft_wrap=True)
    with jobs.answered(address):
        _check_room(settings, client, job, address, console, planned=inner.command in PLANNED)
        job_id, size = send(client, job, console)
    console.print(f"[bold]{job_id}[/] on {address}, {size / 2**20:.1f} MiB", highlight=False, soft_wrap=True)
    summary = {"job_id": job_id, "address": address, "bytes": size, "command": list(job.words)}
    if args.no_follow:
        console.print(f"hyperlora logs {job_id} --follow --address {address}", highlight=False, soft_wrap=True)
        write_json(args.json, summary | {"status": None, "reason": None})
        return 0
    ended = follow(address, job_id, console)
    write_json(args.json, summary | _outcome(ended))
    return _exit(ended.status)


def _job(args: Namespace, inner: Namespace) -> tuple[RayConfig, jobs.Job, str]:
    """The workers that the cluster has to hold, the job that the command line asks for, and where it goes.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    problems: list[Problem] = []
    env, address = args.env, args.address or os.environ.get(ADDRESS)
    there = gathered(problems, lambda: on_cluster(inner.recipe, inner.overrides))
    workers = None
    if inner.command != "train":
        overrides = [*inner.overrides, *(there[1] if there is not None else ())]
        more: list[Problem] = []
        workers = gathered(more, lambda: _at_once(Namespace(**vars(inner) | {"overrides": overrides})))
        problems += [p for p in more if p not in problems]
    if there is not None:
        recipe, changes = there
        problems += unreachable(recipe)
        if inner.command == "train":
            problems += worker_problems(recipe.ray)
        elif inner.command == "tune" and workers is not None:
            problems += worker_problems(recipe.ray.model_copy(update={"num_workers": workers}))
        env = [*args.env, *recipe.cluster.env]
        address = args.address or recipe.cluster.address or address
        if address is None:
            allowed = f"the URL of the cluster's dashboard, here, in the recipe's cluster.address, or in {ADDRESS}"
            problems.append(Problem("--address", None, allowed))
    problems += unset(env)
    out = getattr(inner, "out", None)
    if out is not None and "://" not in out and not Path(out).is_absolute():
        problems.append(Problem("--out", out, "an absolute path that every node shares"))
    if problems or there is None or address is None:
        raise RecipeError(problems)
    words, files = with_files(args.words, [getattr(inner, name, None) for name in FILES])
    there_only = [*(THERE if inner.command == "train" else THERE[:1]), *(["--verbose"] if args.verbose else [])]
    changed: dict[str, object] = {} if workers is None else {"num_workers": workers}
    if inner.command in PLANNED:
        changed["placement"] = "PACK"  # whatever the recipe says: their trials know nothing of each other
    settings = recipe.ray.model_copy(update=changed)
    return settings, jobs.Job([*words, *changes], files, env, args.install, there_only), address


def _at_once(search: Namespace) -> int:
    """Workers that a search needs at a time, at least: those of one trial, or the trials of one worker each.

    Raises:
        RecipeError: with all that is wrong with its recipe and options.
    """
    if search.command == "tune":
        from pipelines import tune

        return tune.resolved(search).recipe.ray.fewest
    if search.command == "study":
        from pipelines import study

        return study.resolved(search).concurrency
    from pipelines import compare

    return compare.resolved(search).concurrency


def on_cluster(name: str, overrides: Sequence[str]) -> tuple[Recipe, list[str]]:
    """A recipe as it runs on a cluster, and what its ``cluster`` part changes; what is typed counts more."""
    typed = [o.partition("=")[0].strip() for o in overrides]
    changes = [
        c
        for c in load_recipe(name, overrides).cluster.overrides()
        if not any(f"{c.partition('=')[0]}.".startswith(f"{t}.") for t in typed)  # ray={...} is typed as well
    ]
    return load_recipe(name, [*overrides, *changes]), changes


def _check_room(
    settings: RayConfig, client: JobSubmissionClient, job: jobs.Job, address: str, console: Console, *, planned: bool
) -> None:
    """Find out whether the cluster can ever hold the job, whose workers are trials where it is ``planned``.

    Raises:
        RecipeError: it cannot, and no autoscaler adds enough to it.
    """
    nodes = jobs.nodes(address)
    problems = capacity.told(settings, nodes, trials=planned)
    if not problems:
        return
    if not capacity.may_grow(nodes):
        raise RecipeError(problems)
    with console.status("asking what the cluster's autoscaler adds"):
        growth = jobs.growth(client, job)
    if growth is not None and (beyond := capacity.told(settings, nodes, growth, trials=planned)):
        raise RecipeError(beyond)
    for problem in problems:
        console.print(Text(f"the job waits for nodes that an autoscaler adds: {problem}", "yellow"), soft_wrap=True)


def with_files(words: Sequence[str], named: Sequence[str | None]) -> tuple[list[str], dict[str, Path]]:
    """A job's words with the files among ``named`` by their names in its working directory, and those files."""
    files: dict[str, Path] = {}
    words = list(words)
    for value in named:
        if value is None or value in shipped() or not is_file(Path(value)):
            continue
        name = f"file{len(files)}-{Path(value).name}"
        files[name] = Path(value)
        words[1:] = [
            name if word == value else word.removesuffix(value) + name if word.endswith(f"={value}") else word
            for word in words[1:]
        ]
    return words, files


def send(client: JobSubmissionClient, job: jobs.Job, console: Console) -> tuple[str, int]:
    """Package and submit a job; returns its id and its size in bytes."""

    def lost(reason: str) -> None:
        console.print(Text(f"the cluster did not take the job ({reason}); trying again", "yellow"), soft_wrap=True)

    with tempfile.TemporaryDirectory() as folder, console.status("packaging and submitting"):
        size = jobs.pack(job, Path(folder))
        return jobs.submit(client, job, Path(folder), lost), size


def unset(names: Sequence[str]) -> list[Problem]:
    """Variables that a job is to get and that have no value here."""
    allowed = "names of variables that are set here"
    return [Problem("--env or cluster.env", name, allowed) for name in names if name not in os.environ]


def unreachable(recipe: Recipe) -> list[Problem]:
    """Places that mean something else, or nothing, on another machine: a job's working directory goes with the job."""
    allowed = "a URI, or an absolute path that every node shares: a job's working directory goes with the job"
    places = {
        "storage.uri": recipe.storage.uri,
        # Of the other sources it is no path.
        "data.root": recipe.data.root if recipe.data.source == "files" else None,
        "hypernetwork.init_from": recipe.hypernetwork.init_from,
        "monitors.baseline": recipe.monitors.baseline,
    }
    found = [
        Problem(key, value, allowed)
        for key, value in places.items()
        if value and "://" not in value and not value.startswith(BUILTIN) and not Path(value).is_absolute()
    ]
    tracking = recipe.mlflow.tracking_uri
    if recipe.mlflow.enabled and tracking.startswith("sqlite:///") and not tracking.startswith("sqlite:////"):
        server = "the URL of an MLflow server, or mlflow.enabled=false"
        found.append(Problem("mlflow.tracking_uri", tracking, server))
    named = {"model.path": None if recipe.model.init == "random" else recipe.model.path}
    for key, value in (named | {"model.tokenizer": recipe.model.tokenizer}).items():
        # A name of the hub is no folder here.
        if value is not None and Path(value).is_dir() and not Path(value).is_absolute():
            found.append(Problem(key, value, allowed))
    return found


def follow(address: str, job_id: str, console: Console) -> JobDetails:
    within_line = False

    def show(text: str) -> None:
        nonlocal within_line
        within_line = not text.endswith("\n")
        console.print(Text.from_ansi(text.removesuffix("\n")), end="\n" if text.endswith("\n") else "", soft_wrap=True)

    def lost(told: str) -> None:
        start = "\n" if within_line else ""
        console.print(Text(f"{start}{told}", "yellow"), soft_wrap=True)

    try:
        ended = jobs.follow(address, job_id, show, lost)
    except KeyboardInterrupt:
        console.print(f"\nthe job goes on; hyperlora logs {job_id} --follow --address {address}", soft_wrap=True)
        raise
    console.print(f"[bold]{job_id}[/] {ended.status.value.lower()}", highlight=False)
    _explain(ended, console)
    return ended


def _explain(job: JobDetails, console: Console) -> None:
    if (reason := jobs.reason(job)) is not None:
        console.print(Text(reason, "red"), soft_wrap=True)


def _outcome(job: JobDetails) -> dict[str, str | None]:
    return {"status": job.status.value, "reason": jobs.reason(job)}


def _exit(status: JobStatus) -> int:
    return {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: 143}.get(status, 1)


def listing(args: Namespace, console: Console) -> int:
    """List a cluster's jobs; returns the exit status."""
    with jobs.answered(args.address):
        found = jobs.listed(jobs.connect(args.address))
    rows = [
        {
            "job_id": j.submission_id or j.job_id,
            "status": j.status.value,
            "started": j.start_time
            and datetime.fromtimestamp(j.start_time / 1000).astimezone().isoformat(timespec="minutes"),
            "seconds": j.start_time and ((j.end_time or datetime.now().timestamp() * 1000) - j.start_time) / 1000,
            "command": (j.metadata or {}).get("hyperlora", j.entrypoint),
        }
        for j in found
    ]
    for r in rows:
        minutes = "" if r["seconds"] is None else f"{float(r['seconds']) / 60:.1f} min"
        started = str(r["started"] or "")[:16].replace("T", " ")
        heading = Text.assemble((str(r["job_id"]), "bold"), f"  {r['status']}  {started}  {minutes}")
        # One line each, however long: what is cut or broken cannot be copied.
        console.print(heading, soft_wrap=True)
        console.print(Text(f"    {r['command']}", "dim"), soft_wrap=True)
    write_json(args.json, rows)
    return 0


def logs(args: Namespace, console: Console) -> int:
    """Show a job's output; returns its exit status when followed."""
    client = jobs.connect(args.address)
    if args.follow:
        ended = follow(args.address, args.job, console)
        write_json(args.json, {"job_id": args.job} | _outcome(ended))
        return _exit(ended.status)
    with jobs.answered(args.address):
        job = jobs.known(client, args.job, args.address)
        text = client.get_job_logs(args.job)
    console.print(Text.from_ansi(text), soft_wrap=True)
    _explain(job, console)
    write_json(args.json, {"job_id": args.job} | _outcome(job) | {"logs": text})
    return 0


def stop(args: Namespace, console: Console) -> int:
    """Tell a job to save a checkpoint and end, and wait for it; returns the exit status."""
    client = jobs.connect(args.address)
    with jobs.answered(args.address):
        job = jobs.known(client, args.job, args.address)
        running = client.stop_job(args.job)
    if running:
        job = follow(args.address, args.job, console)
    else:
        console.print(f"{args.job} is not running")
    write_json(args.json, {"job_id": args.job} | _outcome(job))
    # One that came to its end meanwhile is no failure to stop it.
    return 0 if running and job.status in (JobStatus.STOPPED, JobStatus.SUCCEEDED) else 1
