"""Time of one training step of each contestant of a comparison, side by side in one process.

All contestants are built on models of their own and take the same batches in turn, each round beginning with another
one, so that what slows the machine slows all alike. A step is the loop's own: batch, forward, backward, optimizer,
pruning events, statistics. Printed is the ratio of the seconds of twenty steps to the baseline's in the same rounds:
its mean over the run with its interval (:func:`hyperlora.comparison.interval`). The warm-up is not counted. Pruning
events come as often as in a run of the recipe's own steps.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time benchmarks/recipes/gsm8k.yaml --json out/step_time.json
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import interleaved, provenance, write_json
from hyperlora.comparison import interval
from hyperlora.config import Problem, RecipeError
from hyperlora.field import read_field, resolve
from hyperlora.training import RunInfo, Silent, Trainer, World, global_batches
from pipelines.common import load_recipe, shipped

#: Steps that make one ratio: not all cost the same.
BLOCK = 20
#: One ratio has no interval.
FEWEST = 2 * BLOCK
ONLY = "peft-adalora,lora,dora,orthogonal,hyperadalora"


def measure(path: str, overrides: list[str], only: list[str], rounds: int, warm_up: int, folder: str) -> dict[str, Any]:
    """Ratios of the contestants' seconds per step to the baseline's.

    Raises:
        RecipeError: the recipe or a contestant is not valid.
    """
    field = read_field(shipped("fields")["default"])
    steps = warm_up + rounds
    own = load_recipe(path, overrides)
    if own.training.steps is None:
        allowed = "the steps of the run whose share of pruning events is timed"
        raise RecipeError([Problem("training.steps", None, allowed)])
    # A run of another length would prune at another share of its steps, which cost more than others.
    interval_of_run = own.resolved_pruning(own.training.steps).interval
    changes = [f"training.steps={steps}", f"pruning.interval={interval_of_run}"]
    recipe = load_recipe(path, [*overrides, *changes])
    trainers = {
        c.name: Trainer(c.recipe, RunInfo(f"{folder}/{c.name}"), World(), Silent())
        for c in resolve(field, recipe, only)
    }
    rows = len(next(iter(trainers.values())).task.train)
    batches = global_batches(rows, recipe.training.batch_size, recipe.seed, 0)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    order = iter(interleaved(tuple(trainers), steps))
    for number, batch in enumerate(islice(batches, steps), 1):
        for name in islice(order, len(trainers)):
            seconds[name].append(trainers[name].train_step(batch).read()["step_seconds"])
        if number % 50 == 0:
            print(f"{number} of {steps} rounds", flush=True)
    starts = range(warm_up, steps, BLOCK)
    base = seconds[field.baseline]
    return {
        name: interval([sum(own[n : n + BLOCK]) / sum(base[n : n + BLOCK]) for n in starts])
        for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe file or the name of one that ships")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--only", default=ONLY, help="contestants of the default field, beside its baseline")
    parser.add_argument(
        "--rounds", type=int, default=200, help=f"timed steps of each, {FEWEST} or a higher multiple of {BLOCK}"
    )
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < FEWEST or options.rounds % BLOCK:
        parser.error(f"--rounds {options.rounds}: {FEWEST} or a higher multiple of {BLOCK}")
    with tempfile.TemporaryDirectory() as folder:
        only = options.only.split(",")
        ratios = measure(options.recipe, options.overrides, only, options.rounds, options.warm_up, folder)
    for name, r in ratios.items():
        print(f"{name:16}{r['mean']:.3f} ({r['low']:.3f} to {r['high']:.3f})")
    if options.json:
        settings = {"recipe": options.recipe, "overrides": options.overrides, "rounds": options.rounds}
        write_json(options.json, settings | {"ratios": ratios} | provenance())


if __name__ == "__main__":
    main()
