"""Short hashes that are equal when recipes, or the rows they train and evaluate on, are equal."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hyperlora.config import Recipe
from hyperlora.runs import FREE
from hyperlora.tasks.data import load_rows
from hyperlora.tracking import flatten


def recipe_fingerprint(recipe: Recipe) -> str:
    """Of everything in a recipe that decides what it computes; where and on what it runs is left out."""
    flat = flatten(recipe.model_dump(mode="json"))
    return _hash({key: value for key, value in flat.items() if not key.startswith(FREE)})


def data_fingerprint(recipe: Recipe) -> str:
    """Of the training and held-out rows, in their order.

    Raises:
        RecipeError: they cannot be read.
    """
    return _hash(load_rows(recipe.data, recipe.task.kind))


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
