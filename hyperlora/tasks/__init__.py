"""Task families: rows in, batches and a metric out. One file each."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hyperlora.config import Recipe
from hyperlora.tasks.base import Task
from hyperlora.tasks.classification import Classification
from hyperlora.tasks.data import load_rows
from hyperlora.tasks.generation import Generation
from hyperlora.tasks.language_modeling import LanguageModeling

__all__ = ["FAMILIES", "Task", "build_task"]

FAMILIES: dict[str, type[Classification] | type[Generation] | type[LanguageModeling]] = {
    "generation": Generation,
    "classification": Classification,
    "language-modeling": LanguageModeling,
}


def build_task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Read the rows of a recipe and tokenise them.

    Raises:
        RecipeError: a file is missing, unreadable or empty, or a row lacks a column or has an unknown label.
    """
    train, held_out = load_rows(recipe.data, recipe.task.kind)
    return FAMILIES[recipe.task.kind](recipe, tokenizer, train, held_out)
