"""Held-out loss of counting tokens, against which that of a language model has to be read.

Of the training rows that a run's first steps see: how often each token occurs (add one half), and how often after the
token before it, mixed with the former as if it had been seen so five times (Dirichlet prior). No parameter is fitted.

    python -m benchmarks.token_counts benchmarks/recipes/gsm8k.yaml
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.common import provenance, write_json
from hyperlora.adapters import load_tokenizer
from hyperlora.tasks import build_task
from hyperlora.training import global_batches
from pipelines.common import load_recipe

PRIOR = 5.0


def pairs(rows: list[list[int]]) -> np.ndarray:
    """Each token with the one before it, (tokens, 2)."""
    return np.concatenate([np.stack([row[:-1], row[1:]], axis=1) for row in map(np.asarray, rows) if len(row) > 1])


def losses(train: np.ndarray, held_out: np.ndarray, tokens: int) -> dict[str, float]:
    """Mean loss in nats per token, without and with the token before it.

    Args:
        train, held_out: as of :func:`pairs`.
        tokens: in the vocabulary.
    """
    alone = np.bincount(train[:, 1], minlength=tokens) + 0.5
    alone /= alone.sum()
    before, token = held_out.T
    keys, counts = np.unique(train @ [tokens, 1], return_counts=True)
    wanted = held_out @ [tokens, 1]
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    together = np.where(keys[at] == wanted, counts[at], 0)
    after = (together + PRIOR * alone[token]) / (np.bincount(train[:, 0], minlength=tokens)[before] + PRIOR)
    return {"token": float(-np.log(alone[token]).mean()), "after_token": float(-np.log(after).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    tokenizer = load_tokenizer(recipe.model)
    task = build_task(recipe, tokenizer)
    steps, size = recipe.training.steps, recipe.training.batch_size
    if recipe.task.kind != "language-modeling" or steps is None:
        parser.error("the recipe has to be of language modelling, with training.steps")
    batches = islice(global_batches(len(task.train), size, recipe.seed, 0), steps)
    seen = task.train[[row for batch in batches for row in batch]]["input_ids"]
    result = losses(pairs(seen), pairs(task.held_out[:]["input_ids"]), len(tokenizer))
    print(f"{recipe.name}: {len(seen):,} rows to train on, {len(task.held_out):,} held out, {len(tokenizer):,} tokens")
    print(f"frequency of the token alone    {result['token']:.3f} nats")
    print(f"after the token before it       {result['after_token']:.3f} nats")
    if args.json is not None:
        write_json(args.json, {"recipe": recipe.name, "rows": len(seen), **result, **provenance()})


if __name__ == "__main__":
    main()
