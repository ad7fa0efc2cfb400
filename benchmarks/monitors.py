"""What the monitors say of runs that go well and of runs that do not.

Every run is of a recipe that ships, 150 steps, one process. Printed are the largest value of each monitor, in units of
its threshold (from 1 on it warns), the steps of the warnings, and the error of a run that came to no end. The healthy
adalora run of the quickstart is the baseline of ``stall`` for the faults.

    OMP_NUM_THREADS=1 python -m benchmarks.monitors --json out/monitors.json

``--curve`` writes the curve that ships for a recipe instead: the mean over the seeds of a comparison's baseline.

    python -m benchmarks.monitors --curve quickstart benchmarks/results/quickstart-rules/comparison.json
    python -m benchmarks.monitors --curve quickstart-entailment benchmarks/results/quickstart-entailment/comparison.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import provenance, write_json
from hyperlora.config import MonitorsConfig, read_yaml
from hyperlora.monitors import read_baseline
from hyperlora.stopping import NonFiniteError
from hyperlora.training import RunInfo, Silent, train
from pipelines.common import find_recipe, load_recipe

COMMON = ("ray.backend=local", "ray.num_workers=1", "mlflow.enabled=false", "training.eval_before=false")
COMMON += ("training.checkpoint_every=null", "training.steps=150", "data.eval_rows=50")
BASELINE = ("quickstart", "method=adalora", "seed=1")
HEALTHY = (
    BASELINE,
    ("quickstart", "seed=0"),
    ("quickstart", "seed=2", "training.eval_every=30"),
    ("quickstart", "method=lora", "optimizer.lr=4e-3", "seed=3"),
    ("quickstart-entailment", "seed=0"),
    ("quickstart-entailment", "method=adalora", "seed=1"),
)
ONE_EVENT = ("adapter.target_rank=0.1", "pruning.start=75", "pruning.interval=100", "pruning.final=50")
FAULTS = (
    ("quickstart", *ONE_EVENT),
    ("quickstart", "method=adalora", *ONE_EVENT),
    ("quickstart", "optimizer.lr=0.3"),
    ("quickstart", "optimizer.lr=1", "optimizer.warmup=0.9"),
    ("quickstart", "optimizer.lr=1e-5"),
    ("quickstart", "method=adalora", "optimizer.lr=1"),
)


class Largest(Silent):
    """Keeps the largest value of each monitor, and its warnings."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.warnings: list[tuple[str, int]] = []

    def warning(self, monitor: str, step: int, message: str) -> None:
        self.warnings.append((monitor, step))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self._take(metrics)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._take(metrics)

    def _take(self, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            if key.startswith("monitor/"):
                name = key.removeprefix("monitor/")
                self.values[name] = max(value, self.values.get(name, value))


def run(name: str, changes: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Train and print one line."""
    largest = Largest()
    end = None
    try:
        train(load_recipe(name, [*COMMON, *changes]), RunInfo(str(folder)), sink=largest)
    except NonFiniteError as error:
        end = str(error)
    shown = "  ".join(f"{key} {value:.2f}" for key, value in sorted(largest.values.items()))
    told = ", ".join(f"{monitor} at step {step}" for monitor, step in largest.warnings) or "none"
    print(
        f"{' '.join((name, *changes))}\n    {shown}   warnings: {told}{f'   ended: {end}' if end else ''}", flush=True
    )
    return {"recipe": name, "changes": changes, "largest": largest.values, "warnings": largest.warnings, "ended": end}


def write_curve(name: str, comparison: Path) -> None:
    """Write ``hyperlora/assets/curves/NAME.json`` for the shipped recipe ``name``."""
    result = json.loads(comparison.read_text(encoding="utf-8"))
    (baseline,) = (c for c in result["contestants"] if c["name"] == result["baseline"])
    curve = read_baseline(MonitorsConfig(baseline=str(comparison)), result["steps"])
    assert curve is not None
    recipe = read_yaml(find_recipe(name))
    kept = {key: recipe[key] for key in ("name", "model", "task", "data")}
    kept["training"] = {key: recipe["training"][key] for key in ("steps", "batch_size")}
    runs = len(baseline["trials"])
    content = {
        "what": f"training loss after each step, mean of {runs} runs of {baseline['name']}, smoothed",
        "optimizer.lr": baseline["best_lr"],
        "command": result["command"],
        "recipe": kept,
        "smoothed": [round(loss, 6) for loss in curve],
    }
    path = Path("hyperlora/assets/curves") / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--curve", nargs=2, metavar=("NAME", "COMPARISON"))
    arguments = parser.parse_args()
    if arguments.curve:
        write_curve(arguments.curve[0], Path(arguments.curve[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        healthy = [run(name, tuple(changes), root / f"healthy-{n}") for n, (name, *changes) in enumerate(HEALTHY)]
        baseline = f"monitors.baseline={root / 'healthy-0' / 'result.json'}"
        faults = [run(name, (*changes, baseline), root / f"fault-{n}") for n, (name, *changes) in enumerate(FAULTS)]
    if arguments.json:
        for record in faults:
            record["changes"] = record["changes"][:-1]  # a folder that is gone
        write_json(arguments.json, {"healthy": healthy, "faults": faults, **provenance()})


if __name__ == "__main__":
    main()
