"""Comparison, study and search with their folders on a real S3 endpoint, trials in a real Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import s3
import yaml
from conftest import small_recipe
from mlflow import MlflowClient

from hyperlora import storage
from hyperlora.ownership import Lease, ReplacedError
from pipelines.cli import main
from pipelines.common import owned
from pipelines.searching import write_result

STORE = "s3://bucket/runs"
FIELD = """baseline: ada
contestants:
  - {name: ada, set: {method: adalora}}
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[None]:
    """A bucket, and one Ray whose workers know where it is."""
    with s3.running(s3.moto()) as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in (s3.ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint.url}).items():
            patch.setenv(name, value)
        type(storage.filesystem(STORE)[0]).clear_instance_cache()
        storage.filesystem(STORE)[0].mkdir("bucket")
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def test_a_command_that_lost_its_folder_writes_no_more(bucket: None) -> None:
    out = f"{STORE}/lost"
    with owned(out, "search"):
        write_result(out, "tune", {"first": True}, "")
        storage.write(f"{out}/owners/00000009-00000000.json", storage.pack_json({}))
        with pytest.raises(ReplacedError, match="taken over by another process"):
            write_result(out, "tune", {"first": False}, "")
    assert json.loads(storage.read(f"{out}/tune.json")) == {"first": True}


@pytest.mark.parametrize(
    ("words", "stem", "tables"),
    [
        (("compare", "--field", "{folder}/field.yaml", "--lrs", "0.02", "--seeds", "1"), "comparison", False),
        (("study", "--space", "smoke", "--seeds", "1", "--points", "1", "--lora-lrs", "none"), "study", True),
        (("tune", "--space", "smoke", "--trials", "1", "--stop-on", "none"), "tune", True),
    ],
)
def test_reports_and_trials_are_below_the_storage(
    bucket: None, tmp_path: Path, capfd: pytest.CaptureFixture, words: tuple[str, ...], stem: str, tables: bool
) -> None:
    recipe = small_recipe(tmp_path)
    recipe["storage"]["uri"] = STORE
    recipe["mlflow"]["enabled"] = True
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (tmp_path / "field.yaml").write_text(FIELD, encoding="utf-8")
    name, *options = (word.format(folder=tmp_path) for word in words)
    out = f"{STORE}/out-{name}"
    command = [name, str(tmp_path / "small.yaml"), *options, "--concurrency", "1", "--out", out]
    with Lease(out):
        assert main(command) == 2
    assert "runs now" in capfd.readouterr().err
    assert main([*command, "--json", str(tmp_path / "summary.json")]) == 0, capfd.readouterr().err
    result = json.loads(storage.read(f"{out}/{stem}.json"))
    assert result == json.loads((tmp_path / "summary.json").read_text())
    assert result["complete"]
    assert b"<html" in storage.read(f"{out}/{stem}.html")
    files = storage.tree(out)
    assert ({"trials.csv", "trials.parquet"} <= files.keys()) == tables
    assert any(path.startswith("trials/") and path.endswith("/result.json") for path in files)
    assert not [path for path in files if path.split("/")[2:3] == ["checkpoints"] or path.startswith("ray/")]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = [r for r in client.search_runs(["1"], max_results=50) if r.data.tags["hyperlora.run_uri"] == out]
    assert f"{stem}.json" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    # What is there is read, not repeated.
    assert main(command) == 0
    again = storage.tree(out)
    assert {p for p in again if p.startswith("trials/")} == {p for p in files if p.startswith("trials/")}
    # What was made of other rows is not mixed in.
    one = next(path for path in files if path.endswith("/result.json"))
    outcome = storage.unsealed(json.loads(storage.read(f"{out}/{one}")))
    outcome["rows_sha256"]["eval"] = "other"
    storage.write(f"{out}/{one}", storage.sealed(outcome))
    assert main(command) == 2
    assert "SHA-256 of whose tokens is other" in " ".join(capfd.readouterr().err.split())
