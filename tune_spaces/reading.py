"""Spaces by name, or from a user's YAML or Python file."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hyperlora.config import Problem, RecipeError, read_yaml
from tune_spaces import hypernetwork, joint, pruning, smoke
from tune_spaces.space import Parameter, Space

SHIPPED = {space.name: space for space in (pruning.SPACE, hypernetwork.SPACE, joint.SPACE, smoke.SPACE)}


def read_space(name: str) -> Space:
    """A shipped space by name, a YAML file, or a Python file that defines ``SPACE``.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    path = Path(name)
    try:
        good = path.suffix in (".py", ".yaml", ".yml") and path.is_file()
    except OSError:  # too long a name
        good = False
    if not good:
        raise RecipeError([Problem("--space", name, f"a YAML or Python file, or one of: {', '.join(SHIPPED)}")])
    try:
        return _from_python(path) if path.suffix == ".py" else Space.model_validate(read_yaml(path))
    except ValidationError as error:
        # A list whose entries are all wrong is not too short as well.
        raise RecipeError(
            [_problem(path, e) for e in error.errors() if e["type"] != "too_short" or not e["input"]]
        ) from None


def _from_python(path: Path) -> Space:
    try:
        found = runpy.run_path(str(path)).get("SPACE")
    except ValidationError:
        raise
    except Exception as error:  # whatever a user's file raises is what is wrong with it
        raise RecipeError([Problem("--space", str(path), f"{type(error).__name__}: {error}")]) from error
    if not isinstance(found, Space):
        raise RecipeError([Problem("--space", str(path), "a file that defines SPACE, a tune_spaces.space.Space")])
    return found


def _problem(path: Path, error: Any) -> Problem:
    location = [str(part) for part in error["loc"]]
    fields = Parameter.model_fields if len(location) > 2 or "key" in location else Space.model_fields
    allowed = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        allowed = f"unknown key; allowed: {', '.join(fields)}"
    elif error["type"] == "missing":
        allowed = f"required: {fields[location[-1]].description}"
    shown = error["input"]
    if isinstance(shown, dict):
        shown = shown.get("key") or shown.get("name")
    return Problem(f"{path.name}: {'.'.join(location) or 'space'}", shown, allowed)
