"""What the commands share: finding recipes, and writing their summaries."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, TypeVar

from rich.console import Console
from rich.text import Text

from hyperlora import ownership, storage, uris
from hyperlora.config import Problem, Recipe, RecipeError, apply_overrides, parse, read_yaml
from hyperlora.ownership import Lease, OwnedElsewhereError
from hyperlora.storage import patiently

T = TypeVar("T")

#: What submitting adds to a job's words; the second to those of a run alone.
THERE = ("ray.address=auto", "ray.backend=ray")
#: Seeds, trials at a time: more is a typing error.
MOST = 1000


def shipped(kind: str = "recipes") -> dict[str, Path]:
    """Recipes (or ``fields`` of comparisons) that come with the package, by name."""
    folder = Path(str(files("pipelines"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe by name, or of one by path.

    Raises:
        RecipeError: there is none.
    """
    path = shipped().get(name, Path(name))
    if not is_file(path):
        raise RecipeError([Problem("RECIPE", name, f"a YAML file or one of: {', '.join(shipped())}")])
    return path


def load_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """A shipped recipe by name, or a YAML file by path, with overrides.

    Raises:
        RecipeError: with everything that is wrong with it.
    """
    return parse(apply_overrides(read_yaml(find_recipe(name)), overrides))


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


def alone(recipe: Recipe, workers: int = 1) -> Recipe:
    """The recipe as a trial runs it: one process, without a tracking run of its own, from any working directory.

    A pass has no more rows than one of the recipe's workers has (of a range: where the fewest share a batch), so that
    a trial needs no more memory.

    Args:
        recipe: of the search.
        workers: of the trial, which divide the batch; several are Ray Train's.
    """
    training = recipe.training
    least, rows = training.gradient_accumulation * recipe.ray.fewest, training.batch_size // workers
    passes = next(n for n in range(math.ceil(least / workers), rows + 1) if rows % n == 0)
    backend = "ray" if workers > 1 else "local"
    changes = {
        "ray": recipe.ray.model_copy(update={"backend": backend, "num_workers": workers}),
        "training": training.model_copy(update={"gradient_accumulation": passes}),
        "mlflow": recipe.mlflow.model_copy(update={"enabled": False}),
    }
    return recipe.with_absolute_paths().model_copy(update=changes)


def number(option: str, text: str, kind: type, allowed: str, problems: list[Problem]) -> Any:
    """A number above 0, at most :data:`MOST`, from the command line; what is none goes to ``problems``."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value <= MOST:  # no NaN, no infinity, and no whole number that is too large for a float
        problems.append(Problem(option, text, allowed))
        value = 0
    return value


def command_line(args: Namespace, *options: str) -> str:
    """The command as somebody would type it again, with the options that have a value."""
    words = [args.command, args.recipe, *args.overrides]
    for option in options:
        if value := getattr(args, option.replace("-", "_")):
            words += [f"--{option}", value]
    return shlex.join(["hyperlora", *typed(words)])


def in_job() -> bool:
    """Whether this process is the command of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def typed(words: Sequence[str]) -> list[str]:
    """A command's words as they were typed, here or to submit them; of a file's path its job knows only the name."""
    if not in_job():
        return list(words)
    return ["submit", *(re.sub(r"^file\d+-", "", word) for word in words if word not in THERE)]


def gathered(problems: list[Problem], read: Callable[[], T]) -> T | None:
    """What ``read`` returns; None when it raises RecipeError, whose problems then join the others."""
    try:
        return read()
    except RecipeError as error:
        problems += error.problems
        return None


def tell(console: Console, notes: Sequence[str]) -> None:
    """What a user should know before it starts."""
    for note in notes:
        console.print(Text(f"note: {note}", "yellow"), soft_wrap=True)


def check_out(out: str | None, problems: list[Problem]) -> None:
    """Find out whether the folder that somebody wants for a search can be one."""
    if out is not None and (allowed := uris.problem(out, written=True)) is not None:
        problems.append(Problem("--out", uris.redacted(out), allowed))


#: This process's claims to folders of searches on a store, by folder.
_claims: dict[str, str] = {}


@contextmanager
def owned(out: str, what: str) -> Iterator[None]:
    """The folder of a search, for this command alone.

    Raises:
        RecipeError: it cannot be written, or another command is at work in it.
    """
    busy = f"a folder in which no other {what} runs now"
    try:
        lock = _locked(Path(storage.filesystem(out)[1])) if storage.is_local(out) else Lease(out)
    except BlockingIOError:
        raise RecipeError([Problem("--out", out, busy)]) from None
    except OwnedElsewhereError as error:
        raise RecipeError([Problem("--out", out, f"{busy} ({error})")]) from error
    except OSError as error:
        raise RecipeError([Problem("--out", out, f"a writable folder ({error.strerror or error})")]) from error
    if isinstance(lock, Lease):
        _claims[out] = lock.owner
    try:
        with lock:
            yield
    finally:
        _claims.pop(out, None)


def check_owned(out: str) -> None:
    """Find out whether a folder that :func:`owned` gave us is still ours: a process that slept may have lost it.

    Raises:
        ReplacedError: another command has it.
    """
    if out in _claims:
        patiently(ownership.check, out, _claims[out])


def _locked(folder: Path) -> IO[str]:
    """The lock of a folder on this machine, until it is closed.

    Raises:
        BlockingIOError: another process has it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    return lock


def check_new_folder(name: str, uri: str) -> None:
    """Find out whether files can be put into a folder without meeting others.

    Raises:
        RecipeError: it has files, or is one.
        StorageError: the store does not answer.
    """
    file = storage.is_local(uri) and Path(storage.filesystem(uri)[1]).is_file()
    if file or patiently(storage.tree, uri):
        raise RecipeError([Problem(name, uri, "a new or an empty folder")])


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
