"""``hyperlora submit``, ``jobs``, ``logs`` and ``stop``: the same commands as Ray jobs on a cluster."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hyperlora import jobs
from hyperlora.config import Problem, Recipe, RecipeError
from pipelines.common import gathered, is_file, load_recipe, shipped, write_json

#: Arguments of the jobs that may name a file, which then travels with the job.
FILES = ("recipe", "space", "field")


def main(args: Namespace, inner: Namespace, console: Console) -> int:
    """Validate, package, submit, follow; returns 0 when the job succeeded.

    Args:
        args: of this command; ``words`` are the job's.
        inner: what the job's words say.
        console: of the terminal.
    """
    job = _job(args, inner)
    if jobs.unprotected(args.address):
        console.print(
            f"[yellow]{args.address} is another machine, and there is no token for it: if it asks for none, whoever "
            "reaches it can run any code there[/]",
            soft_wrap=True,
        )
    client = jobs.connect(args.address)
    job_id, size = send(client, job, console)
    console.print(f"[bold]{job_id}[/] on {args.address}, {size / 2**20:.1f} MiB", highlight=False, soft_wrap=True)
    summary = {"job_id": job_id, "address": args.address, "bytes": size, "command": list(job.words)}
    if args.no_follow:
        console.print(f"hyperlora logs {job_id} --follow --address {args.address}", highlight=False, soft_wrap=True)
        write_json(args.json, summary | {"status": None})
        return 0
    status = follow(args.address, job_id, console)
    write_json(args.json, summary | {"status": status.value})
    return _exit(status)


def _job(args: Namespace, inner: Namespace) -> jobs.Job:
    """The job that the command line asks for.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    problems = unset(args.env)
    recipe = gathered(problems, lambda: load_recipe(inner.recipe, inner.overrides))
    if recipe is not None:
        problems += unreachable(recipe)
    if problems:
        raise RecipeError(problems)
    words, files = with_files(args.words, [getattr(inner, name, None) for name in FILES])
    words.append("ray.address=auto")
    if inner.command == "train":
        words.append("ray.backend=ray")
    return jobs.Job(words, files, args.env, args.install)


def with_files(words: Sequence[str], named: Sequence[str | None]) -> tuple[list[str], dict[str, Path]]:
    """A job's words with the files among ``named`` by their names in its working directory, and those files."""
    files: dict[str, Path] = {}
    words = list(words)
    for value in named:
        if value is None or value in shipped() or not is_file(Path(value)):
            continue
        name = f"file{len(files)}-{Path(value).name}"
        files[name] = Path(value)
        words = [
            name if word == value else word.removesuffix(value) + name if word.endswith(f"={value}") else word
            for word in words
        ]
    return words, files


def send(client: JobSubmissionClient, job: jobs.Job, console: Console) -> tuple[str, int]:
    """Package and submit a job; returns its id and its size in bytes."""
    with tempfile.TemporaryDirectory() as folder, console.status("packaging and submitting"):
        size = jobs.pack(job, Path(folder))
        return jobs.submit(client, job, Path(folder)), size


def unset(names: Sequence[str]) -> list[Problem]:
    """Variables that a job is to get and that have no value here."""
    allowed = "names of variables that are set here, separated by commas"
    return [Problem("--env", name, allowed) for name in names if name not in os.environ]


def unreachable(recipe: Recipe) -> list[Problem]:
    """Places that mean something else, or nothing, on another machine: a job's working directory goes with the job."""
    allowed = "a URI, or an absolute path that every node shares: a job's working directory goes with the job"
    places = {"storage.uri": recipe.storage.uri, "data.root": recipe.data.root}
    found = [Problem(k, v, allowed) for k, v in places.items() if v and "://" not in v and not Path(v).is_absolute()]
    tracking = recipe.mlflow.tracking_uri
    if recipe.mlflow.enabled and tracking.startswith("sqlite:///") and not tracking.startswith("sqlite:////"):
        server = "the URL of an MLflow server, or mlflow.enabled=false"
        found.append(Problem("mlflow.tracking_uri", tracking, server))
    path = Path(recipe.model.path)
    if recipe.model.init != "random" and path.is_dir() and not path.is_absolute():
        found.append(Problem("model.path", recipe.model.path, allowed))
    return found


def follow(address: str, job_id: str, console: Console) -> JobStatus:
    def show(text: str) -> None:
        console.print(Text.from_ansi(text.removesuffix("\n")), end="\n" if text.endswith("\n") else "", soft_wrap=True)

    def lost(reason: str) -> None:
        console.print(f"[yellow]connection lost ({reason}); the job goes on, trying again[/]", soft_wrap=True)

    try:
        status = jobs.follow(address, job_id, show, lost)
    except KeyboardInterrupt:
        console.print(f"\nthe job goes on; hyperlora logs {job_id} --follow --address {address}", soft_wrap=True)
        raise
    console.print(f"[bold]{job_id}[/] {status.value.lower()}", highlight=False)
    return status


def _exit(status: JobStatus) -> int:
    return {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: 143}.get(status, 1)


def listing(args: Namespace, console: Console) -> int:
    """List a cluster's jobs; returns the exit status."""
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
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for column in ("job", "status", "started", "minutes"):
        table.add_column(column, no_wrap=True)  # an id in two lines cannot be copied
    table.add_column("command", overflow="fold", min_width=16)
    for r in rows:
        minutes = "" if r["seconds"] is None else f"{float(r['seconds']) / 60:.1f}"
        started = str(r["started"] or "")[:16].replace("T", " ")
        table.add_row(*(Text(str(x)) for x in (r["job_id"], r["status"], started, minutes, r["command"])))
    console.print(table)
    write_json(args.json, rows)
    return 0


def logs(args: Namespace, console: Console) -> int:
    """Show a job's output; returns its exit status when followed."""
    client = jobs.connect(args.address)
    if args.follow:
        return _exit(follow(args.address, args.job, console))
    try:
        text = client.get_job_logs(args.job)
    except RuntimeError as error:
        raise _no_job(args) from error
    console.print(Text.from_ansi(text), soft_wrap=True)
    return 0


def stop(args: Namespace, console: Console) -> int:
    """Tell a job to save a checkpoint and end, and wait for it; returns the exit status."""
    client = jobs.connect(args.address)
    try:
        running = client.stop_job(args.job)
    except RuntimeError as error:
        raise _no_job(args) from error
    if not running:
        console.print(f"{args.job} is not running")
        return 1
    return 0 if follow(args.address, args.job, console) == JobStatus.STOPPED else 1


def _no_job(args: Namespace) -> RecipeError:
    return RecipeError([Problem("ID", args.job, f"a job of {args.address}; hyperlora jobs lists them")])
