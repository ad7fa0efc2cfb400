"""What the commands share: finding recipes, and writing their summaries."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hyperlora.config import Problem, Recipe, RecipeError, apply_overrides, parse, read_yaml


def shipped(kind: str = "recipes") -> dict[str, Path]:
    """Recipes (or ``fields`` of comparisons) that come with the package, by name."""
    folder = Path(str(files("pipelines"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """A shipped recipe by name, or a YAML file by path, with overrides.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    path = shipped().get(name, Path(name))
    if not is_file(path):
        raise RecipeError([Problem("RECIPE", name, f"a YAML file or one of: {', '.join(shipped())}")])
    return parse(apply_overrides(read_yaml(path), overrides))


def is_file(path: Path) -> bool:
    """Whether a name that somebody typed is a file; it may be too long, or hold what no name can."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_json(path: str | None) -> None:
    """Find out before a command runs whether its summary can be written, without writing it.

    Raises:
        RecipeError: it cannot.
    """
    if path is None:
        return
    target = Path(path).absolute()
    try:
        folder = next(p for p in target.parents if p.exists())
        good = folder.is_dir() and not target.is_dir() and os.access(target if target.exists() else folder, os.W_OK)
    except (OSError, ValueError):  # too long a name, or a character that no name has
        good = False
    if not good:
        raise RecipeError([Problem("--json", path, "a writable file")])


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, never meets half of it."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def write_json(path: str | None, content: Any) -> None:
    """Write a command's summary for scripts.

    Raises:
        RecipeError: the file cannot be written.
    """
    if path is None:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError([Problem("--json", path, f"a writable file ({error.strerror})")]) from error
