"""What the trials of a search will cost, from a few real steps."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch

from hyperlora.config import Recipe, first_line
from hyperlora.search import world_of
from hyperlora.training import RunInfo, Silent, Trainer, global_batches

STEPS = 3
#: Batches of held-out rows that an evaluation is timed on: all may take minutes where answers are generated.
BATCHES = 2


@dataclass(frozen=True)
class Cost:
    """Of one trial, on the machine of the driver with nothing beside it.

    Attributes:
        step: seconds of an optimizer step.
        evaluation: seconds of an evaluation of the held-out rows.
    """

    step: float
    evaluation: float

    def seconds(self, steps: int, eval_every: int | None) -> float:
        """Of a whole trial, which is evaluated every so many steps and at its end."""
        return steps * self.step + (1 + (steps - 1) // (eval_every or steps)) * self.evaluation


def probe(recipe: Recipe, notes: list[str]) -> Cost | None:
    """Time a few steps and a part of an evaluation of a recipe in this process; nothing is written.

    None where they fail, with a note why: a trial that fails stops no search, and its other points need not fail. None
    as well where trials have a GPU and this machine has none.
    """
    if recipe.ray.gpus_per_worker and not torch.cuda.is_available():
        notes.append("no estimate of the time: trials run on GPUs, and this machine has none")
        return None
    cost = None
    try:
        cost = _timed(recipe)
    except RuntimeError as error:  # it diverges, or the device is out of memory
        notes.append(f"no estimate of the time, since a few steps failed: {first_line(error)}")
    # This process stays for the whole search, whose trials need the memory of the GPU that PyTorch would keep for it.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return cost


def _timed(recipe: Recipe) -> Cost:
    trainer = Trainer(recipe, RunInfo("memory://probe"), world_of(recipe), Silent())
    batches = global_batches(len(trainer.task.train), recipe.training.batch_size, recipe.seed, 0)
    trainer.train_step(next(batches)).read()  # the first one pays for what is set up once
    started = time.perf_counter()
    for _ in range(STEPS):
        trainer.train_step(next(batches)).read()
    step = (time.perf_counter() - started) / STEPS
    held_out = trainer.task.held_out
    size = recipe.training.eval_batch_size
    seconds = 0.0
    for few in (size, BATCHES * size):  # the first one pays here as well
        trainer.task.held_out = held_out.select(range(0, len(held_out), max(1, len(held_out) // few))[:few])
        started = time.perf_counter()
        trainer.evaluate()
        seconds = time.perf_counter() - started
    return Cost(step, seconds * len(held_out) / len(trainer.task.held_out))
