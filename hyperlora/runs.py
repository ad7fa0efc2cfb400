"""Run folders: where a run lives, and which one a resume goes on with.

<storage.uri>/<name>-<time>/run.json       recipe and MLflow run, written when the run starts
                            owners/        who may write here, see ownership.py
                            checkpoints/   the newest ones
                            adapter/       the plain PEFT adapter, when the run is finished
                            result.json    the outcome; a run that has it is finished
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from hyperlora import checkpoint, storage, uris
from hyperlora.config import Problem, Recipe, RecipeError, default_of, flatten
from hyperlora.ownership import Lease, OwnedElsewhereError
from hyperlora.storage import patiently
from hyperlora.training import RunInfo

RESULT = "result.json"
# What may change between a run and its resumption: where and on what it runs, not what it computes.
FREE = (
    "ray.",
    "cluster.",
    "storage.",
    "mlflow.",
    "monitors.",
    "description",
    "training.checkpoint_every",
    "training.keep_checkpoints",
)
# And within a run: a place with less memory takes the same rows in more passes. Trials are compared in memory and time.
MEMORY = ("training.gradient_accumulation", "training.eval_batch_size", "model.gradient_checkpointing")


def new_uri(recipe: Recipe) -> str:
    """The folder of a new run, named by the recipe and the time (UTC).

    A clock that was set back gives the time of the newest run once more: names are the order of runs.
    """
    base = uris.absolute(recipe.storage.uri)
    places = [_place(folder, recipe.name) for folder in patiently(storage.glob, base, f"{recipe.name}-*")]
    newest, number = max(filter(None, places), default=("", 0))
    now = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return f"{base}/{recipe.name}-" + (now if now > newest else f"{newest}-{number + 1}")


def claim(recipe: Recipe, resume: bool) -> tuple[RunInfo, Lease]:
    """A new run, or the one to go on with, and the right to write into its folder.

    Raises:
        RecipeError: the folder cannot be written or belongs to a command that is running, or as :func:`unfinished`.
    """
    try:
        if not resume:
            return _claim_new(recipe)
        info = unfinished(recipe)
        try:
            lease = Lease(info.uri)
        except OwnedElsewhereError as error:
            raise RecipeError([Problem("--resume", info.uri, str(error))]) from error
        try:
            _must_be_unfinished(info.uri)
        except RecipeError:
            lease.release()
            raise
        return replace(info, owner=lease.owner), lease
    except OSError as error:
        raise _unwritable(recipe, error) from error


def _unwritable(recipe: Recipe, error: OSError) -> RecipeError:
    return RecipeError([Problem("storage.uri", recipe.storage.uri, f"a writable folder or URI ({error})")])


def _claim_new(recipe: Recipe) -> tuple[RunInfo, Lease]:
    while True:
        uri = new_uri(recipe)
        try:
            lease = Lease(uri)
        except OwnedElsewhereError:
            continue  # somebody else took this name in the same second
        return RunInfo(uri, owner=lease.owner), lease


def record(info: RunInfo, recipe: Recipe) -> None:
    """Write ``run.json``.

    Raises:
        RecipeError: the folder cannot be written.
    """
    content = {"recipe": recipe.model_dump(mode="json"), "mlflow_run_id": info.mlflow_run_id}
    try:
        patiently(storage.write, f"{info.uri}/run.json", storage.pack_json(content))
    except OSError as error:
        raise _unwritable(recipe, error) from error


def check_same(uri: str, recipe: Recipe) -> None:
    """Find out whether a folder is free, or of this recipe.

    Raises:
        RecipeError: it was run with a recipe that computes something else; names every field.
    """
    found = begun(uri)
    changed = [] if found is None else differences(found["recipe"], recipe)
    if changed:
        allowed = f"{uri} was run with"
        raise RecipeError([Problem(k, new, f"{allowed} {old!r}; choose another folder") for k, old, new in changed])


def begun(uri: str) -> dict[str, Any] | None:
    """What ``run.json`` says of a run, its ``recipe`` among it; None when it is not there.

    Raises:
        RecipeError: it is no record of a run.
        StorageError: the store does not answer.
    """
    content = read(uri, "run.json")
    if content is None:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise RecipeError([Problem("run", f"{uri}/run.json", "the record of a run, with its recipe")])
    return content


def result(uri: str) -> dict[str, Any] | None:
    """The outcome of a finished run; None if it is not finished.

    Raises:
        RecipeError: ``result.json`` is damaged.
        StorageError: the store does not answer.
    """
    found = read(uri, RESULT)
    try:
        return None if found is None else storage.unsealed(found)
    except ValueError as error:
        raise _damaged(f"{uri}/{RESULT}", str(error)) from error


def adapter_file(uri: str, outcome: Mapping[str, Any], name: str) -> bytes:
    """A file of a finished run's adapter.

    Raises:
        RecipeError: it is missing, or not what the run wrote.
        StorageError: the store does not answer.
    """
    facts = outcome["adapter_files"][name]
    try:
        return checkpoint.verified(f"{uri}/adapter", name, facts["bytes"], facts["sha256"], RESULT)
    except checkpoint.RefusedError as error:
        raise _damaged(f"{uri}/adapter/{name}", str(error)) from error


def _damaged(file: str, reason: str) -> RecipeError:
    again = f"without {RESULT} the same command (train: with --resume) writes all of it again"
    return RecipeError([Problem("run", file, f"the file that the run wrote: {reason}; {again}")])


def read(uri: str, name: str) -> Any:
    """A JSON file of a folder; None when it is not there.

    Raises:
        RecipeError: it is no JSON object or list.
        StorageError: the store does not answer.
    """
    try:
        found = json.loads(patiently(storage.read, f"{uri}/{name}"))
        if not isinstance(found, dict | list):
            raise ValueError(f"it holds {type(found).__name__}")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        if name == RESULT:
            raise _damaged(f"{uri}/{name}", f"{type(error).__name__}: {error}") from error
        allowed = f"a folder whose {name} is a JSON object or list ({type(error).__name__}: {error})"
        raise RecipeError([Problem("run", f"{uri}/{name}", allowed)]) from error
    return found


def unfinished(recipe: Recipe) -> RunInfo:
    """The newest run of the recipe's name, which must be unfinished and of the same recipe.

    Raises:
        RecipeError: there is none, it is finished, its end is damaged, or its recipe differs in what it computes.
        StorageError: the store does not answer.
    """
    base = uris.absolute(recipe.storage.uri)
    found = patiently(storage.glob, base, f"{recipe.name}-*/run.json")
    names = [path.removesuffix("/run.json") for path in found]
    places = {name: place for name in names if (place := _place(name, recipe.name)) is not None}
    if not places:
        raise RecipeError(
            [Problem("storage.uri", base, f"no run of {recipe.name!r} to resume; start without --resume")]
        )
    uri = f"{base}/{max(places, key=lambda name: places[name])}"
    _must_be_unfinished(uri)
    content = begun(uri)
    assert content is not None, "it was listed"
    changed = [change for change in differences(content["recipe"], recipe) if change[0] not in MEMORY]
    if changed:
        raise RecipeError([Problem(key, new, f"the run to resume has {old!r}") for key, old, new in changed])
    return RunInfo(uri, content.get("mlflow_run_id"))


def _must_be_unfinished(uri: str) -> None:
    outcome = result(uri)
    if outcome is not None:
        for name in outcome["adapter_files"]:
            adapter_file(uri, outcome, name)
        raise RecipeError([Problem("--resume", uri, "this run is finished; start without --resume for a new one")])


def differences(recorded: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Fields in which a recipe computes something else than the one recorded in ``run.json``: key, then, now."""
    before, now = flatten(recorded), flatten(recipe.model_dump(mode="json"))
    # Fields that are newer than the record had their defaults.
    before = {key: default_of(key) for key in now} | before
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE)
    ]


def _place(folder: str, name: str) -> tuple[str, int] | None:
    """Of a run's folder among those of its recipe's name: the time, and a number within it; None for any other."""
    # quickstart-entailment-… and quickstart-2-… are no runs of quickstart: what follows the name is the time.
    match = re.fullmatch(r"(\d{8}-\d{6})(?:-(\d+))?", folder[len(name) + 1 :])
    return None if match is None else (match[1], int(match[2] or 1))


def summary(outcome: Mapping[str, Any], wall_seconds: float) -> dict[str, Any]:
    """What ``hyperlora train --json`` writes."""
    keys = [
        "name",
        "method",
        "metric",
        "metric_before",
        "metric_after",
        "held_out_loss_before",
        "held_out_loss_after",
        "loss_first",
        "loss_last",
        "rank_initial",
        "rank_final",
        "rank_target",
        "trainable_parameters",
        "optimizer_state_bytes",
        "tokens_per_second",
        "steps",
        "training_seconds",
        "workers",
        "warnings",
        "warm_start",
        "adapter",
        "checkpoint",
        "mlflow_run_id",
    ]
    ranks = {m["name"]: m["rank"] for m in outcome["modules"]}
    return {key: outcome[key] for key in keys} | {"ranks": ranks, "wall_seconds": wall_seconds}
