"""Short hashes that are equal when recipes, or the rows they train and evaluate on, are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hyperlora.adapters import model_folder
from hyperlora.config import Problem, Recipe, RecipeError, flatten
from hyperlora.runs import FREE
from hyperlora.tasks.data import survey
from hyperlora.weights import weight_files


def recipe_fingerprint(recipe: Recipe) -> str:
    """Of everything in a recipe that decides what it computes; where and on what it runs is left out."""
    flat = flatten(recipe.model_dump(mode="json"))
    return _hash({key: value for key, value in flat.items() if not key.startswith(FREE)})


def data_fingerprint(recipe: Recipe) -> str:
    """Of the training and held-out rows, in their order.

    Raises:
        RecipeError: they cannot be read.
    """
    return _hash({part: found.sha256 for part, found in survey(recipe.data, recipe.task.kind).items()})


def evaluation_fingerprint(recipe: Recipe, outcome: Mapping[str, Any]) -> str:
    """Of the task, the held-out rows in their order, how they are read, and the base model with its tokenizer: metrics
    are comparable when it is equal.

    The rows are those that the run was evaluated on, whatever is in their file by now; those of the file where an older
    outcome does not tell.

    Raises:
        RecipeError: rows or weights cannot be read.
    """
    held_out = outcome.get("rows_sha256", {}).get("eval")
    if held_out is None:
        held_out = survey(recipe.data, recipe.task.kind, ("eval",))["eval"].sha256
    read = recipe.data.model_dump(include={"text", "text_pair", "label", "prompt", "completion", "template"})
    model = [base_model(recipe)["sha256"], recipe.model.tokenizer, recipe.model.config]
    task = recipe.task.model_dump(mode="json")
    if not task["chat"]:
        del task["chat"]  # older than this field are fingerprints that champions have
    return _hash([task, read, held_out, model])


def base_model(recipe: Recipe) -> dict[str, Any]:
    """Reference to the base model: ``path``, ``revision`` and one ``sha256`` over the weights that are loaded and
    its configuration.

    Of a model with random weights, over its configuration and the run's seed.

    Raises:
        RecipeError: not all of the model is in a local folder or in the hub's cache.
    """
    model = recipe.model
    named = {"path": model.path, "revision": model.revision}
    if model.init == "random":
        config = [model.model_dump(mode="json"), recipe.seed]
        return named | {"sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()}
    folder = model_folder(model)
    if folder is None:
        allowed = "a local folder, or a model in the hub's cache on this machine"
        raise RecipeError([Problem("model.path", model.path, allowed)])
    digest = hashlib.sha256()
    try:
        for name in sorted([*weight_files(folder), "config.json"]):
            with (folder / name).open("rb") as content:
                digest.update(name.encode() + b"\0" + hashlib.file_digest(content, "sha256").digest())
    except (OSError, ValueError) as error:
        allowed = f"a model whose configuration and weights are on this machine ({error})"
        raise RecipeError([Problem("model.path", model.path, allowed)]) from error
    return named | {"sha256": digest.hexdigest()}


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
