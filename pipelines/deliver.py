"""``hyperlora deliver``: send what MLflow missed of runs that ended, or were killed, on this machine."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from hyperlora import runs, tracking
from hyperlora.config import first_line
from hyperlora.tracking import Missed
from pipelines.common import write_json


def main(args: Namespace, console: Console) -> int:
    """Deliver what waits of runs that have no process here; returns 1 when something of them still does."""
    waiting = tracking.missed()
    rows = []
    with console.status("delivering"):
        for run, error in deliver(waiting):
            rows.append({"run_id": run.run_id, "tracking_uri": run.tracking_uri, "error": error})
            said = "delivered what this machine kept" if error is None else f"still waits: {error}"
            style = "green" if error is None else "yellow"
            console.print(Text(f"MLflow run {run.run_id} in {run.tracking_uri}: {said}", style), soft_wrap=True)
    others = tracking.undelivered()
    for run_id in others:
        said = "has metrics waiting, which the command that is at work on it sends"
        console.print(Text(f"MLflow run {run_id} {said}", "yellow"), soft_wrap=True)
    if not waiting and not others:
        console.print("nothing waits for MLflow on this machine")
    write_json(args.json, rows)
    return int(any(row["error"] for row in rows))


def deliver(waiting: Sequence[Missed]) -> Iterator[tuple[Missed, str | None]]:
    """Each run with the reason why it still waits, if it does."""
    for run in waiting:
        error: str | None = None
        try:
            outcome = None if run.run_uri is None else runs.result(run.run_uri)
            tracking.deliver(run, outcome)
        except tracking.ERRORS as reason:
            error = first_line(reason)
        yield run, error
