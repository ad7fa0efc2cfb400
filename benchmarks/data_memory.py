"""Peak memory of the driver against the number of training rows.

For each size a file of word problems is written, and a fresh process does what ``hyperlora train`` does before it
starts workers: rows are read, verified, tokenised and packed, verified again, and uploaded to an S3 store, which is a
process of its own beside it (rclone). Reported is the process's peak above that with the smallest file, what a row
costs, and the peak before the upload.

    python -m benchmarks.data_memory --json benchmarks/results/data_memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import provenance, write_json
from hyperlora.tasks.generated import word_problems

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import s3

DRIVER = """
import json, resource, sys, time
from hyperlora.distributed import share_rows
from hyperlora.preflight import inspect
from pipelines.common import load_recipe

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

recipe = load_recipe("quickstart", sys.argv[1:]).with_absolute_paths()
began = time.perf_counter()
estimate = inspect(recipe)
found = {"rows": estimate.train_rows, "inspect_peak_bytes": peak(), "inspect_seconds": time.perf_counter() - began}
began = time.perf_counter()
share_rows(recipe, estimate.rows)
print(json.dumps(found | {"peak_bytes": peak(), "share_seconds": time.perf_counter() - began}))
"""


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """What a driver does with so many training rows in a process of its own, nothing of it in cache and store."""
    problems = word_problems(min(rows, 10_000), 0, "train")
    lines = [json.dumps(problem) for problem in problems]
    with (folder / "train.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            stream.write(lines[number % len(lines)] + "\n")
    (folder / "eval.jsonl").write_text("\n".join(lines[:200]) + "\n", encoding="utf-8")
    data = ["data.source=files", f"data.root={folder}", "data.train=train.jsonl", "data.eval=eval.jsonl"]
    words = [sys.executable, "-c", DRIVER, *data, "data.train_rows=null", "mlflow.enabled=false"]
    store = folder / "store"
    (store / "bucket").mkdir(parents=True)
    with s3.running(s3.rclone(store)) as endpoint:
        environment = os.environ | s3.ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint.url}
        environment |= {"HYPERLORA_CACHE": str(folder / "cache")}
        words.append("storage.uri=s3://bucket/runs")
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    packed, stored = (sum(f.stat().st_size for f in where.rglob("*.arrow")) for where in (folder / "cache", store))
    if not packed or packed != stored:
        raise RuntimeError(f"{packed} bytes are packed and {stored} stored")
    return found | {"file_bytes": (folder / "train.jsonl").stat().st_size, "packed_bytes": packed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    columns = ("file", "packed", "unsent", "peak", "above 1st")
    print(f"{'rows':>10}  " + "  ".join(f"{column:>9}" for column in columns) + f"  {'per row':>8}  {'seconds':>8}")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            one = measure(Path(folder), rows)
        one["above_first_bytes"] = one["peak_bytes"] - (found[0]["peak_bytes"] if found else one["peak_bytes"])
        found.append(one)
        names = ("file_bytes", "packed_bytes", "inspect_peak_bytes", "peak_bytes", "above_first_bytes")
        sizes = "  ".join(f"{one[name] / 2**20:>5.0f} MiB" for name in names)
        per_row, seconds = one["above_first_bytes"] / rows, one["inspect_seconds"] + one["share_seconds"]
        print(f"{rows:>10,}  {sizes}  {per_row:>6.0f} B  {seconds:>6.0f} s", flush=True)
    if arguments.json:
        result = {"when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **provenance(), "measured": found}
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
