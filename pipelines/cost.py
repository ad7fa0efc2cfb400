"""What the trials of a search will cost, from a few real steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hyperlora.config import Recipe
from hyperlora.training import RunInfo, Silent, Trainer, World, global_batches

STEPS = 3


@dataclass(frozen=True)
class Cost:
    """Of one trial, on the machine of the driver with nothing beside it.

    Attributes:
        step: seconds of an optimizer step.
        evaluation: seconds of an evaluation of the held-out rows.
    """

    step: float
    evaluation: float

    def seconds(self, steps: int, evaluations: int) -> float:
        """Of a whole trial."""
        return steps * self.step + evaluations * self.evaluation


def probe(recipe: Recipe) -> Cost:
    """Time a few steps and an evaluation of a recipe in this process; nothing is written."""
    trainer = Trainer(recipe, RunInfo("memory://probe"), World(), Silent())
    batches = global_batches(len(trainer.task.train), recipe.training.batch_size, recipe.seed, 0)
    trainer.train_step(next(batches)).read()  # the first one pays for what is set up once
    started = time.perf_counter()
    for _ in range(STEPS):
        trainer.train_step(next(batches)).read()
    step = (time.perf_counter() - started) / STEPS
    started = time.perf_counter()
    trainer.evaluate()
    return Cost(step, time.perf_counter() - started)
