"""Where a run reads and writes, and the options and files of the other commands: told before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from refusals import Refused

from hyperlora import storage

# ---------------------------------------------------------------- storage and tracking


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["storage.uri=nowhere://x"], "storage.uri: got 'nowhere://x'; allowed: a path, or a URI that starts with s3"),
        (["storage.uri=s3://"], "storage.uri: got 's3://'; allowed: s3://BUCKET/PATH; the bucket is missing"),
        (["storage.uri=''"], "storage.uri: got ''; allowed: a path or a URI"),
        (['storage.uri="a\\0b"'], "allowed: a path or a URI"),
        ([f"storage.uri={'x' * 300}"], "storage.uri: got 'xxx"),
        ([f"model.path={'x' * 300}"], "model.path: got 'xxx"),
        (["storage.uri=/proc/nowhere"], "storage.uri: got '/proc/nowhere'; a writable folder"),
        (["storage.uri=small.yaml"], "/small.yaml'; a writable folder"),
        (["storage.uri=small.yaml/below"], "/small.yaml/below'; a writable folder"),
        (["mlflow.enabled=true", "mlflow.tracking_uri=sqlite:////proc/x.db"], "mlflow.tracking_uri"),
        (["mlflow.enabled=true", "mlflow.tracking_uri=sqlite:///small.yaml"], "mlflow.tracking_uri: got 'sqlite:///"),
        (["mlflow.enabled=true", "mlflow.tracking_uri=nowhere://x"], "mlflow.tracking_uri: got 'nowhere://x'; a reach"),
        (["mlflow.enabled=true", "mlflow.tracking_uri=http://127.0.0.1:1"], "mlflow.tracking_uri: got 'http://127.0.0"),
    ],
)
def test_places_of_a_run(recipe_file: Path, refused: Refused, changes: list[str], expected: str) -> None:
    assert expected in refused("train", recipe_file, *changes)


def test_an_experiment_that_was_deleted(
    recipe_file: Path, tmp_path_factory: pytest.TempPathFactory, refused: Refused
) -> None:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    client = MlflowClient(uri)
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    changes = ["mlflow.enabled=true", f"mlflow.tracking_uri={uri}", "mlflow.experiment=gone"]
    message = refused("train", recipe_file, *changes)
    assert "1 problem: mlflow.experiment: got 'gone'; another name, or an experiment that is not deleted: " in message
    assert f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number} brings it back" in message


# ---------------------------------------------------------------- monitors.baseline


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "FileNotFoundError"),
        (b"", "JSONDecodeError"),
        (b"[", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"3", "TypeError"),
        (b"{}", "KeyError: 'losses'"),
        (b"[]", "needs one finite loss or more"),
        (b'["high", "low"]', "ValueError: could not convert string"),
        (b'{"losses": "54321"}', "TypeError: losses are str"),
        (b"[3.0, NaN, 1.0]", "needs one finite loss or more"),
        (b"[1.0, 1.0, 2.0]", "losses that fall below the first one"),
        (b'{"contestants": [], "baseline": "a"}', "ValueError"),
        (b'{"contestants": [3], "baseline": "a"}', "TypeError"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_baselines(recipe_file: Path, tmp_path: Path, refused: Refused, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "curve.json").write_bytes(content)
    message = refused("train", recipe_file, "monitors.baseline=curve.json")
    assert "1 problem: monitors.baseline: got " in message
    assert "curve.json'; " in message
    assert expected in message


# ---------------------------------------------------------------- hyperlora compare

FIELD = """
baseline: lora
contestants:
  - {name: lora, set: {method: lora}}
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--field", "missing"], "--field: got 'missing'; a YAML file or one of: "),
        (["--field", "."], "--field: got '.'; a YAML file or one of: "),
        (["--field", "x" * 5000], "a YAML file or one of: "),
        (["--only", "nobody"], "--only: got 'nobody'; allowed: "),
        (["--lrs", ""], "--lrs: got ''; learning rates above 0, separated by commas"),
        (["--lrs", "1e-3,,2"], "--lrs: got ''; learning rates above 0"),
        (["--lrs", "nan"], "--lrs: got 'nan'; learning rates above 0"),
        (["--lrs", "1e-3,-1"], "--lrs: got '-1'; learning rates above 0"),
        (["--lrs", "fast"], "--lrs: got 'fast'; learning rates above 0"),
        (["--seeds", "0"], "--seeds: got '0'; a whole number of seeds, 1 to 1000"),
        (["--seeds", "2.5"], "--seeds: got '2.5'; a whole number of seeds"),
        (["--seeds", "9999999999"], "--seeds: got '9999999999'; a whole number of seeds"),
        (["--concurrency", "none"], "--concurrency: got 'none'; a whole number of trials, 1 to 1000"),
        (["--out", "s3://"], "--out: got 's3://'; allowed: s3://BUCKET/PATH; the bucket is missing"),
        (["--out", "s3://key:word@bucket/x"], "--out: got 's3://***@bucket/x'; allowed: a URI without credentials"),
        (["--out", "small.yaml"], "a writable folder"),
        (["adapter.rank=-1"], "adapter.rank: got -1; input should be greater than 0"),
    ],
)
def test_options_of_compare(
    recipe_file: Path, tmp_path: Path, refused: Refused, options: list[str], expected: str
) -> None:
    (tmp_path / "field.yaml").write_text(FIELD, encoding="utf-8")
    assert expected in refused("compare", recipe_file, "--field", "field.yaml", *options)


def test_all_problems_of_compare_at_once(recipe_file: Path, refused: Refused) -> None:
    message = refused("compare", recipe_file, "metod=lora", "--field", "missing", "--seeds", "no", "--lrs", "0")
    assert "4 problems: " in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "got 'an empty file'; allowed: a mapping of sections"),
        ("- lora\n", "got 'list'; allowed: a mapping of sections"),
        ("baseline: lora\ncontestants: []\n", "field.yaml: contestants: got []; tuple should have at least 1 item"),
        ("baseline: lora\ncontestants: lora\n", "field.yaml: contestants: got 'lora'; input should be a valid tuple"),
        ("baseline: lora\n", "field.yaml: contestants: got "),
        (FIELD.replace("baseline: lora", "baseline: dora"), "field.yaml: baseline: got 'dora'; allowed: lora"),
        (FIELD + "  - {name: lora}\n", "field.yaml: contestants: got 'lora'; each name once"),
        (FIELD + "  - {name: ../up}\n", "field.yaml: contestants.1.name: got '../up'; string should match"),
        (FIELD + "  - {name: a, seed: 3}\n", "field.yaml: contestants.1.seed: got 3; unknown key; allowed: name"),
        (FIELD + "  - {name: a, set: {seed: 3}}\n", "field.yaml: a: seed: got 3; the same for all contestants"),
        (FIELD + "  - {name: a, set: {metod: lora}}\n", "a: metod: got 'lora'; unknown key; did you mean method?"),
        (FIELD + "  - {name: a, set: {adapter.rank: 2024-01-01}}\n", "a: adapter.rank: got '2024-01-01'; input sho"),
        (FIELD + "  - {name: a, set: {adapter.alpha: .nan}}\n", "a: adapter.alpha: got 'NaN'; input should be a val"),
        (FIELD + "  - {name: a, set: !!python/name:os.system }\n", "python/name:os.system; remove it"),
    ],
)
def test_fields_of_compare(recipe_file: Path, tmp_path: Path, refused: Refused, content: str, expected: str) -> None:
    (tmp_path / "field.yaml").write_text(content, encoding="utf-8")
    assert expected in refused("compare", recipe_file, "--field", "field.yaml")


# ---------------------------------------------------------------- hyperlora train --resume


def test_nothing_to_resume(recipe_file: Path, refused: Refused) -> None:
    assert "no run of 'small' to resume; start without --resume" in refused("train", recipe_file, "--resume")


def test_a_finished_run_is_not_resumed(recipe_file: Path, tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "runs" / "small-20260101-000000"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"recipe": {}, "mlflow_run_id": None}), encoding="utf-8")
    (run / "result.json").write_bytes(storage.sealed({"adapter_files": {}}))
    assert "this run is finished; start without --resume" in refused("train", recipe_file, "--resume")


@pytest.mark.parametrize(
    "words",
    [
        ["jobs", "--address", "http://[x"],
        ["logs", "job", "--address", "http://[x"],
        ["jobs", "--address", "ftp://head:8265"],
        ["train", "small.yaml", "ray.backend=ray", "ray.address=[::1"],
    ],
)
def test_addresses(recipe_file: Path, refused: Refused, words: list[str]) -> None:
    assert "address: got '" in refused(*words)
