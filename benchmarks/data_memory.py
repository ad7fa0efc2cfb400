"""Peak memory of the driver against the number of training rows.

For each size a file of word problems is written, and a fresh process checks the recipe as ``hyperlora train`` does
before it starts workers: rows are read, verified, tokenised and packed. Reported is the process's peak above that of
the same check with the smallest file, and what a row costs.

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

CHECK = """
import json, resource, sys, time
from hyperlora.preflight import inspect
from pipelines.common import load_recipe
recipe = load_recipe("quickstart", sys.argv[1:]).with_absolute_paths()
began = time.perf_counter()
estimate = inspect(recipe)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"rows": estimate.train_rows, "peak_bytes": peak, "seconds": seconds}))
"""


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Check a recipe with so many training rows in a process of its own, nothing of it in the cache."""
    problems = word_problems(min(rows, 10_000), 0, "train")
    lines = [json.dumps(problem) for problem in problems]
    with (folder / "train.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            stream.write(lines[number % len(lines)] + "\n")
    (folder / "eval.jsonl").write_text("\n".join(lines[:200]) + "\n", encoding="utf-8")
    data = ["data.source=files", f"data.root={folder}", "data.train=train.jsonl", "data.eval=eval.jsonl"]
    environment = os.environ | {"HYPERLORA_CACHE": str(folder / f"cache-{rows}")}
    words = [sys.executable, "-c", CHECK, *data, "data.train_rows=null", "mlflow.enabled=false"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    packed = sum(file.stat().st_size for file in (folder / f"cache-{rows}").rglob("*.arrow"))
    return found | {"file_bytes": (folder / "train.jsonl").stat().st_size, "packed_bytes": packed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    print(f"{'rows':>10}  {'file':>9}  {'packed':>9}  {'peak':>9}  {'above 1st':>9}  {'per row':>8}")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            one = measure(Path(folder), rows)
        one["above_first_bytes"] = one["peak_bytes"] - (found[0]["peak_bytes"] if found else one["peak_bytes"])
        found.append(one)
        sizes = [one[k] / 2**20 for k in ("file_bytes", "packed_bytes", "peak_bytes", "above_first_bytes")]
        per_row = one["above_first_bytes"] / rows
        print(f"{rows:>10,}  " + "  ".join(f"{n:>5.0f} MiB" for n in sizes) + f"  {per_row:>6.0f} B", flush=True)
    if arguments.json:
        result = {"when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **provenance(), "measured": found}
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
