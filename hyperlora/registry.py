"""The best adapters in MLflow's model registry: plain files, never a pickle. Imports mlflow.

A version of a registered model is a folder of artifacts

    adapter_config.json, adapter_model.safetensors   a plain PEFT LoRA adapter
    README.md                                        its model card
    registration.json                                what was measured, on which rows and base model; files' SHA-256

``@champion`` is the best version by its metric. Two metrics are compared only when task, held-out rows and base model
are the same, which ``evaluation`` in ``registration.json`` says.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before mlflow, for the settings that it makes.
from hyperlora import tracking

# isort: split
import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from hyperlora import storage, uris
from hyperlora.config import MLflowConfig, Problem, RecipeError, first_line
from hyperlora.export import CARD, FILES, RECORD
from hyperlora.storage import patiently

CHAMPION, CHALLENGER = "champion", "challenger"
MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[1-9]\d*))$")
#: Names of registered models that fit into a URI and a folder.
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
# Characters of a version's description that MLflow's tables on PostgreSQL and MySQL have room for.
DESCRIPTION = 5000
#: What ``registration.json`` has to say.
FACTS = ("metric", "value", "higher_is_better", "evaluation", "base_model", "source", "metrics", "recipe")


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        alias: champion or challenger.
        reason: why it is that.
        champion: version that is the champion now.
        run_id: MLflow run that holds the files.
    """

    name: str
    version: int
    alias: str
    reason: str
    champion: int
    run_id: str


def register(
    mlflow_config: MLflowConfig, name: str, files: Mapping[str, bytes], facts: Mapping[str, Any]
) -> Registered:
    """A new version of a registered model, which becomes champion when it beats the present one.

    Args:
        mlflow_config: where the server or database is, and in which experiment the files' run is made.
        name: of the registered model, which is made when it is not there.
        files: :data:`FILES` by name.
        facts: :data:`FACTS`, as JSON.

    Raises:
        RecipeError: MLflow cannot be reached or refuses.
    """
    uri = mlflow_config.tracking_uri
    record = {**facts, "files": {n: hashlib.sha256(data).hexdigest() for n, data in files.items()}}
    try:
        client = MlflowClient(uri)
        known = max((int(v.version) for v in _versions(client, name)), default=0)
        run_id = _store(client, mlflow_config, name, {**files, RECORD: storage.sealed(record)}, facts)
        _make(client, name)
        version = client.create_model_version(
            name,
            source=f"runs:/{run_id}/adapter",
            run_id=run_id,
            tags={
                f"hyperlora.{k}": json.dumps(facts[k]) for k in ("metric", "value", "higher_is_better", "evaluation")
            },
            description=_description(files[CARD].decode()),
        )
        # Now, since others may have registered theirs while the files went up.
        champion = _champion(client, name)
        better, reason = _beats(facts, None if champion is None else (champion.version, _facts(champion)))
        if better:
            client.set_registered_model_alias(name, CHAMPION, str(version.version))
            champion = _settled(client, name, known, version, facts)
            if int(champion.version) != int(version.version):
                better, reason = _beats(facts, (champion.version, _facts(champion)))
        if not better:
            client.set_registered_model_alias(name, CHALLENGER, str(version.version))
    except tracking.ERRORS as error:
        raise tracking.unreachable(uri, error) from error
    assert champion is not None, "there is one, or this is it"
    number, alias = int(version.version), CHAMPION if better else CHALLENGER
    return Registered(name, number, alias, reason, int(champion.version), run_id)


def pull(tracking_uri: str, model_uri: str, folder: str) -> dict[str, Any]:
    """Write the files of a registered version into a folder; returns its ``registration.json``.

    Args:
        tracking_uri: of the MLflow server or database.
        model_uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        folder: a new or an empty one, path or URI.

    Raises:
        RecipeError: there is no such version, or its files are not what was registered.
        StorageError: the folder cannot be written.
    """
    match = MODEL_URI.match(model_uri)
    if match is None:
        raise RecipeError(
            [Problem("MODEL", model_uri, "models:/NAME@champion, another alias, or models:/NAME/VERSION")]
        )
    name, alias, version = match["name"], match["alias"], match["version"]
    tracking.answers(tracking_uri)
    try:
        client = MlflowClient(tracking_uri)
        if alias is not None:
            version = str(client.get_model_version_by_alias(name, alias).version)
        place = client.get_model_version_download_uri(name, version)
        with tempfile.TemporaryDirectory() as temporary:
            found = mlflow.artifacts.download_artifacts(
                artifact_uri=place, dst_path=temporary, tracking_uri=tracking_uri
            )
            files = {p.name: p.read_bytes() for p in Path(found).iterdir() if p.name in (*FILES, RECORD)}
    except tracking.ERRORS as error:
        missing = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        if isinstance(error, MlflowException) and error.error_code in missing:
            allowed = f"a version that is registered in {uris.redacted(tracking_uri)} ({first_line(error)})"
            raise RecipeError([Problem("MODEL", model_uri, allowed)]) from error
        raise tracking.unreachable(tracking_uri, error) from error
    record = _verified(model_uri, files)
    for file, data in files.items():
        patiently(storage.write, f"{folder}/{file}", data)
    return {**record, "name": name, "version": int(version), "folder": folder}


def _verified(model_uri: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """``registration.json``, when all files are there and are those that were registered."""

    def refuse(reason: str) -> RecipeError:
        return RecipeError([Problem("MODEL", model_uri, f"a version that hyperlora register made: {reason}")])

    if RECORD not in files:
        raise refuse(f"{RECORD} is missing")
    try:
        record = storage.unsealed(json.loads(files[RECORD]))
        wanted = {name: str(record["files"][name]) for name in FILES}
        missing = [key for key in FACTS if key not in record]
    except (ValueError, LookupError, TypeError) as error:
        raise refuse(f"{RECORD} cannot be read ({type(error).__name__}: {error})") from error
    if missing:
        raise refuse(f"{RECORD} lacks {', '.join(missing)}")
    for name, digest in wanted.items():
        if name not in files:
            raise refuse(f"{name} is missing")
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise refuse(f"{name} is not the file that was registered (SHA-256 differs)")
    return dict(record)


def _store(
    client: MlflowClient, config: MLflowConfig, name: str, files: Mapping[str, bytes], facts: Mapping[str, Any]
) -> str:
    """Put the files into a run of their own; returns its id."""
    tags = {"mlflow.runName": f"register-{name}", "hyperlora.kind": "registration", "hyperlora.source": facts["source"]}
    tags |= {f"version.{k}": v for k, v in tracking.versions().items()} | tracking.git_state()
    run_id = client.create_run(tracking.experiment(client, config), tags=tags).info.run_id
    for key, value in facts["metrics"].items():
        if isinstance(value, int | float):
            client.log_metric(run_id, key, value, synchronous=True)
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            (Path(folder) / file).write_bytes(data)
        client.log_artifacts(run_id, folder, "adapter")
    client.set_terminated(run_id, "FINISHED")
    return str(run_id)


def _description(card: str) -> str:
    """As much of a card as databases hold; all of it is among the files."""
    return card if len(card) <= DESCRIPTION else card[:DESCRIPTION].rsplit("\n", 1)[0]


def _make(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{name}'"))


def _settled(
    client: MlflowClient, name: str, known: int, champion: ModelVersion, facts: Mapping[str, Any]
) -> ModelVersion:
    """The champion, once none that was registered at the same time beats it.

    Others may have compared theirs with the same old champion, and MLflow moves an alias without a condition. Whoever
    moved it last looks last, and finds the versions of them all.

    Args:
        client: of MLflow.
        name: of the registered model.
        known: newest version when this registration began.
        champion: to which the alias was moved.
        facts: of it.
    """
    while True:
        rivals = [v for v in _versions(client, name) if int(v.version) > known]
        better = [v for v in rivals if _beats(_facts(v), (champion.version, facts))[0]]
        if not better:
            return champion
        champion, facts = better[0], _facts(better[0])
        client.set_registered_model_alias(name, CHAMPION, str(champion.version))


def _facts(version: ModelVersion) -> dict[str, Any]:
    """What a version's tags say; empty for one that something else registered."""
    found = {k.removeprefix("hyperlora."): v for k, v in version.tags.items() if k.startswith("hyperlora.")}
    try:
        return {key: json.loads(value) for key, value in found.items()}
    except ValueError:
        return {}


def _beats(facts: Mapping[str, Any], champion: tuple[Any, Mapping[str, Any]] | None) -> tuple[bool, str]:
    """Whether a candidate takes the place of the champion (its version and facts), and why."""
    if champion is None:
        return True, "there was no champion"
    number, its = champion
    if its.get("evaluation") != facts.get("evaluation") or its.get("metric") != facts.get("metric"):
        return False, f"version {number} was measured by another metric, on other rows or on another base model"
    mine, theirs = facts["value"], its["value"]
    better = mine > theirs if facts["higher_is_better"] else mine < theirs
    name, relation = facts["metric"].replace("_", " "), "beats" if better else "does not beat"
    return better, f"{name} {mine:.6g} {relation} {theirs:.6g} of version {number}"
