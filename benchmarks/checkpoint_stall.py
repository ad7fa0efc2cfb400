"""How long training stands still for checkpoints that go to an S3 endpoint while it goes on.

    python -m benchmarks.checkpoint_stall [--workers N --tracking SECONDS] [--endpoint URL --bucket NAME] [--json FILE]

Trains the quickstart in this process, or on N Ray workers that log to an MLflow server which every request reaches
SECONDS late, with a checkpoint every few steps, so that there are enough of them to measure,
and reports what one costs per 30 s of training. Without --endpoint a moto server is started beside it. Two shares:

    stall      seconds that the loop spends within ``checkpoint()``: copying the state, delivering metrics, handing over
    slowdown   what the steps during an upload last longer than the others, for the length of an upload

The second is the price of the upload's share of the cores; on a machine with cores to spare it is next to nothing. It
is measured in this process only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.common import provenance, write_json
from hyperlora import storage
from hyperlora.training import RunInfo, Silent, train
from pipelines import cli
from pipelines.common import load_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import s3
from nodes import Line
from tracking_server import Server

EVERY = 30.0  # seconds between checkpoints that the shares are given for


class Record(Silent):
    """What each step took, and each checkpoint."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.stalls: list[float] = []
        self.uploads: list[tuple[float, float]] = []
        self.bytes = 0.0
        self.warnings: list[str] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        self.steps.append((now, metrics["step_seconds"]))
        if "checkpoint/stall_seconds" in metrics:
            self.stalls.append(metrics["checkpoint/stall_seconds"])
        if "checkpoint/upload_seconds" in metrics:
            self.uploads.append((now - metrics["checkpoint/upload_seconds"], now))
            self.bytes = metrics["checkpoint/bytes"]

    def warning(self, monitor: str, step: int, message: str) -> None:
        self.warnings.append(f"{monitor}: {message}")


def measure(recipe_name: str, overrides: list[str], bucket: str) -> dict[str, Any]:
    """Train once and say what checkpoints cost."""
    recipe = load_recipe(recipe_name, ["ray.backend=local", "ray.num_workers=1", "mlflow.enabled=false", *overrides])
    record = Record()
    uri = f"s3://{bucket}/checkpoint-stall-{time.time_ns()}"
    outcome = train(recipe, RunInfo(uri), sink=record)
    storage.remove_tree(uri)
    busy = [s for end, s in record.steps if any(a < end and end - s < b for a, b in record.uploads)]
    idle = [s for end, s in record.steps if not any(a < end and end - s < b for a, b in record.uploads)]
    upload = statistics.mean(b - a for a, b in record.uploads)
    slower = max(0.0, statistics.median(busy) / statistics.median(idle) - 1) if busy and idle else None
    stall = statistics.mean(record.stalls)
    return {
        "recipe": recipe_name,
        "overrides": overrides,
        "steps": outcome["steps"],
        "training_seconds": outcome["training_seconds"],
        "checkpoints": len(record.stalls),
        "checkpoint_bytes": record.bytes,
        "stall_seconds": {"mean": stall, "most": max(record.stalls), "all": record.stalls},
        "stall_share_every_30_s": stall / EVERY,
        "stall_share_of_this_run": sum(record.stalls) / (outcome["training_seconds"] + sum(record.stalls)),
        "upload_seconds": upload,
        "step_seconds_during_upload": statistics.median(busy) if busy else None,
        "step_seconds_otherwise": statistics.median(idle) if idle else None,
        "slowdown_share_every_30_s": None if slower is None else slower * min(upload, EVERY) / EVERY,
        "warnings": record.warnings,
    }


def measure_tracked(
    recipe_name: str, overrides: list[str], bucket: str, workers: int, delay: float, folder: Path
) -> dict[str, Any]:
    """Train once with the command, and read from MLflow what its checkpoints cost."""
    server = Server(folder)
    server.start()
    places = [
        f"storage.uri=s3://{bucket}/tracked-{time.time_ns()}",
        f"mlflow.tracking_uri={Line(server.port, delay).url}",
    ]
    backend = [f"ray.backend={'ray' if workers > 1 else 'local'}", f"ray.num_workers={workers}"]
    command = ["train", recipe_name, *overrides, *places, *backend, "mlflow.enabled=true"]
    assert cli.main([*command, "--json", str(folder / "summary.json")]) == 0
    outcome = json.loads((folder / "summary.json").read_text())
    client = MlflowClient(server.uri)
    found = {
        name: [m.value for m in client.get_metric_history(outcome["mlflow_run_id"], f"checkpoint/{name}")]
        for name in ("stall_seconds", "upload_seconds", "bytes")
    }
    server.stop()
    stalls = found["stall_seconds"]
    return {
        "recipe": recipe_name,
        "overrides": overrides,
        "workers": workers,
        "tracking_delay_seconds": delay,
        "steps": outcome["steps"],
        "training_seconds": outcome["training_seconds"],
        "checkpoints": len(stalls),
        "checkpoint_bytes": found["bytes"][-1],
        "stall_seconds": {"mean": statistics.mean(stalls), "most": max(stalls), "all": stalls},
        "stall_share_every_30_s": statistics.mean(stalls) / EVERY,
        "stall_share_of_this_run": sum(stalls) / (outcome["training_seconds"] + sum(stalls)),
        "upload_seconds": statistics.mean(found["upload_seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="on Ray, if more than one")
    parser.add_argument("--tracking", type=float, metavar="SECONDS", help="of delay of an MLflow server; default: none")
    parser.add_argument("--endpoint", help="of an S3 server; credentials come from the environment")
    parser.add_argument("--bucket", default="checkpoint-stall", help="created if it is not there")
    parser.add_argument("--json", type=Path, help="write the result")
    args = parser.parse_args()
    overrides = ["training.checkpoint_every=8", "training.eval_before=false", *args.overrides]
    with ExitStack() as stack:
        url = args.endpoint
        if url is None:
            url = stack.enter_context(s3.running(s3.moto())).url
            for name, value in s3.ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        state = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ.update({"AWS_ENDPOINT_URL": url, "XDG_STATE_HOME": state})
        fs, _ = storage.filesystem(f"s3://{args.bucket}")
        if not fs.exists(args.bucket):
            fs.mkdir(args.bucket)
        if args.tracking is None and args.workers == 1:
            result = measure(args.recipe, overrides, args.bucket)
        else:
            delay = args.tracking or 0.0
            result = measure_tracked(args.recipe, overrides, args.bucket, args.workers, delay, Path(state))
    print(
        f"{result['checkpoints']} checkpoints of {result['checkpoint_bytes'] / 2**20:.1f} MiB: stall "
        f"{1000 * result['stall_seconds']['mean']:.1f} ms each (most {1000 * result['stall_seconds']['most']:.1f} ms), "
        f"{100 * result['stall_share_every_30_s']:.3f} % of the time with one every 30 s; upload "
        f"{result['upload_seconds']:.2f} s"
    )
    if "step_seconds_otherwise" in result:
        during, otherwise = result["step_seconds_during_upload"], result["step_seconds_otherwise"]
        print(f"steps during an upload {during} s, otherwise {otherwise} s")
    if args.json:
        write_json(args.json, result | provenance())


if __name__ == "__main__":
    main()
