"""What early stopping saves, and what a trial costs beyond its training.

The same points, drawn at random under one seed, are searched twice: every trial to its end, and with ASHA. Reported are
the steps of the second over those of the first, the best metric of both with the recipe's own metric at that point, and
the seconds that a trial needs beyond its steps and evaluations (start of a trial's folder to its result; those that a
fresh process served are left out, because processes are kept).

    python -m benchmarks.early_stopping --json benchmarks/results/early_stopping.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import provenance, write_json
from pipelines.cli import main as hyperlora


def search(arguments: argparse.Namespace, stop_on: str, folder: Path) -> dict[str, Any]:
    """One search to its end; goes on when it was interrupted."""
    words = ["tune", arguments.recipe, *arguments.overrides, "mlflow.enabled=false", "--sampler", "random"]
    words += ["--space", arguments.space, "--trials", str(arguments.trials), "--stop-on", stop_on]
    words += ["--concurrency", str(arguments.concurrency), "--metric", arguments.metric]
    status = hyperlora([*words, "--out", str(folder), "--json", str(folder / "summary.json")])
    if status:
        sys.exit(status)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def overheads(folder: Path, fresh: int) -> list[float]:
    """Seconds of every finished trial beyond its loop, without the first ``fresh``."""
    found = []
    for trial in sorted(folder.glob("trials/*"))[fresh:]:
        result = trial / "result.json"
        if result.is_file():
            took = result.stat().st_mtime - (trial / "values.json").stat().st_mtime
            found.append(took - json.loads(result.read_text(encoding="utf-8"))["loop_seconds"])
    return found


def own_metric(best: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The metric of the recipe itself that the best trial ended with."""
    result = json.loads((folder / "trials" / best["trial"] / "result.json").read_text(encoding="utf-8"))
    return {"name": result["metric"], "value": result["metric_after"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--space", default="joint")
    parser.add_argument("--metric", default="held_out_loss")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/early-stopping"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    whole = search(arguments, "none", folder / "whole")
    stopped = search(arguments, "held_out_loss", folder / "asha")
    searches = {"whole": whole, "asha": stopped}
    points = [{json.dumps(t["values"], sort_keys=True) for t in result["measured"]} for result in searches.values()]
    beyond = overheads(folder / "whole", arguments.concurrency)
    result = {
        "command": "python -m benchmarks.early_stopping " + " ".join(sys.argv[1:]),
        "trials": arguments.trials,
        "same_points": points[0] == points[1],
        "steps_ratio": stopped["steps_spent"] / whole["steps_spent"],
        "best": {name: found["best"] for name, found in searches.items()},
        "metric_of_best": {name: own_metric(found["best"], folder / name) for name, found in searches.items()},
        "same_best": whole["best"]["values"] == stopped["best"]["values"],
        "seconds_beyond_training": {"median": statistics.median(beyond), "largest": max(beyond), "trials": len(beyond)},
        "counts": {name: found["counts"] for name, found in searches.items()},
        "provenance": provenance(),
    }
    print(f"steps with ASHA / without: {result['steps_ratio']:.2f}; the same points: {result['same_points']}")
    print(f"best {arguments.metric}: {whole['best']['metric']:.5g} without, {stopped['best']['metric']:.5g} with ASHA")
    for name, own in result["metric_of_best"].items():
        print(f"{own['name']} of the best, {name}: {own['value']:.4f}")
    print(f"seconds of a trial beyond its training: median {statistics.median(beyond):.2f}, at most {max(beyond):.2f}")
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
