"""Task families: rows in, batches and a metric out. One file each."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from hyperlora import uris
from hyperlora.config import Recipe
from hyperlora.packed import LAYOUT, fetch, obtain, write
from hyperlora.tasks.base import Task
from hyperlora.tasks.classification import Classification, label_names
from hyperlora.tasks.completion import Completion
from hyperlora.tasks.data import PARTS, Part, Parts, Row, same_rows, survey
from hyperlora.tasks.generation import Generation
from hyperlora.tasks.language_modeling import LanguageModeling

__all__ = ["FAMILIES", "Task", "build_task"]

FAMILIES: dict[str, type[Classification] | type[LanguageModeling]] = {
    "generation": Generation,
    "classification": Classification,
    "completion": Completion,
    "language-modeling": LanguageModeling,
}
#: Modules that decide what a row becomes.
CODE = ("base", "classification", "completion", "generation", "language_modeling")
#: Of a tokenizer, what its vocabulary and pipeline do not say: which end is cut, whether special tokens in a text are
#: some, whether there are segments, and how a chat is written.
SETTINGS = ("truncation_side", "split_special_tokens", "model_input_names", "chat_template", "special_tokens_map")


def shared_rows(recipe: Recipe) -> str:
    """Where a recipe's tokenised rows lie for workers on other machines."""
    return f"{uris.absolute(recipe.storage.uri)}/rows"


def build_task(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Task:
    """A recipe's task with its tokenised rows, which are taken from the cache or built.

    Args:
        recipe: a valid recipe.
        tokenizer: of its model.
        rows: fingerprint of rows that another process has shared; the recipe's own files are then not read.
        say: is told what is being done.

    Raises:
        RecipeError: a file is missing, unreadable or empty, a row lacks a column or has an unknown label, or the rows
            changed while they were read.
        StorageError: the shared rows cannot be read.
    """
    family = FAMILIES[recipe.task.kind]
    shared = shared_rows(recipe)
    if rows is not None:
        packed = fetch(rows, shared)
        task = family(recipe, tokenizer, packed.labels)
    else:
        found = survey(recipe.data, recipe.task.kind)
        labels = label_names(recipe, found) if recipe.task.kind == "classification" else ()
        task = family(recipe, tokenizer, labels)

        def build(folder: Path) -> None:
            parts: dict[str, Iterator[Row]] = {
                part: same_rows(recipe.data, recipe.task.kind, part, found[part]) for part in PARTS
            }
            write(folder, parts, task.columns, task.encode, labels, say)

        packed = obtain(_fingerprint(recipe, tokenizer, found, labels), build, shared)
    task.packed, task.train, task.held_out = packed, packed.rows("train"), packed.rows("eval")
    return task


def _fingerprint(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, found: Mapping[Parts, Part], labels: tuple[str, ...]
) -> str:
    """Of the rows, the way they become tokens, and the code that does it."""
    fields = recipe.data.model_dump(
        mode="json", include={"text", "text_pair", "label", "prompt", "completion", "template"}
    )
    code = [Path(sys.modules[f"{__name__}.{name}"].__file__ or "").read_bytes() for name in CODE]
    content = [
        {part: content.sha256 for part, content in found.items()},
        [fields, recipe.task.model_dump(mode="json"), labels],
        [_vocabulary(tokenizer), type(tokenizer).__name__, [str(getattr(tokenizer, name, None)) for name in SETTINGS]],
        [
            LAYOUT,
            transformers.__version__,
            tokenizers.__version__,
            *(hashlib.sha256(text).hexdigest() for text in code),
        ],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that a tokenizer does with a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        content |= {"truncation": None, "padding": None}  # left by the last call
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
