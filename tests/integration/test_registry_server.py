"""Runs on S3, a tracking server whose artifacts lie on S3, its registry, and back; clients know the server alone."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3
import torch
import yaml
from conftest import small_recipe
from payload import Payload
from peft import PeftModel
from tracking_server import Server

from hyperlora import storage
from hyperlora.adapters import build_base, load_tokenizer
from hyperlora.config import parse
from hyperlora.tasks import build_task
from pipelines.cli import main

ARTIFACTS = "s3://bucket/mlflow"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with s3.running(s3.moto()) as store:
        for name, value in {**s3.ENVIRONMENT, "AWS_ENDPOINT_URL": store.url}.items():
            monkeypatch.setenv(name, value)
        # MLflow's own client of S3 has a name of its own for it.
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", store.url)
        fs = storage.filesystem(ARTIFACTS)[0]
        type(fs).clear_instance_cache()
        storage.filesystem(ARTIFACTS)[0].mkdir("bucket")
        server = Server(tmp_path, ARTIFACTS)
        server.start()
        yield server
        server.stop()


def command(*words: str, folder: Path) -> dict[str, Any]:
    summary = folder / "summary.json"
    assert main([*words, "--json", str(summary)]) == 0
    return json.loads(summary.read_text())


def test_from_a_run_on_s3_into_the_registry_and_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    content = small_recipe(tmp_path) | {"model": {"path": "builtin:storylm"}, "storage": {"uri": "s3://bucket/runs"}}
    content["training"] |= {"steps": 8, "eval_before": False}
    content["mlflow"] = {"tracking_uri": server.uri}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    run = command("train", str(tmp_path / "small.yaml"), folder=tmp_path)["adapter"].removesuffix("/adapter")
    assert run.startswith("s3://bucket/runs/")
    assert {"loss_curve.png", "rank_heat_map.png", "recipe.yaml"} <= {
        path.rsplit("/", 1)[1] for path in storage.tree(ARTIFACTS)
    }
    options = ("--name", "served", "--metric", "held_out_loss")
    found = command("register", run, *options, folder=tmp_path)
    assert (found["version"], found["alias"]) == (1, "champion")
    (weights,) = (p for p in storage.tree(ARTIFACTS) if p.endswith("adapter/adapter_model.safetensors"))

    # Whoever pulls has no credentials of the store.
    with monkeypatch.context() as without:
        for name in s3.ENVIRONMENT:
            without.delenv(name)
        pulled = ("pull", "models:/served@champion", str(tmp_path / "pulled"), "--tracking-uri", server.uri)
        record = command(*pulled, folder=tmp_path)
    assert record["value"] == found["value"]
    recipe = parse(json.loads((tmp_path / "pulled/registration.json").read_text())["recipe"])
    tokenizer = load_tokenizer(recipe.model)
    task = build_task(recipe, tokenizer)
    model = PeftModel.from_pretrained(build_base(recipe, tokenizer, None), str(tmp_path / "pulled")).eval()
    with torch.no_grad():
        rows = [task.held_out[n] for n in range(len(task.held_out))]
        sums = task.metric_sums(model, rows, torch.device("cpu")).tolist()
    assert sums[0] / sums[1] == pytest.approx(record["value"], abs=1e-5)

    # Somebody who can write into the store puts pickles beside the weights, then in their place.
    folder, pwned = f"{ARTIFACTS}/{weights.rsplit('/', 1)[0]}", tmp_path / "pwned"
    for name in ("adapter_model.bin", "training_args.bin"):
        storage.write(f"{folder}/{name}", pickle.dumps(Payload(pwned)))
    words = ("pull", "models:/served@champion", "--tracking-uri", server.uri)
    command(*words, str(tmp_path / "beside"), folder=tmp_path)
    assert {p.name for p in (tmp_path / "beside").iterdir()} == {p.name for p in (tmp_path / "pulled").iterdir()}
    PeftModel.from_pretrained(build_base(recipe, tokenizer, None), str(tmp_path / "beside"))
    storage.write(f"{folder}/adapter_model.safetensors", pickle.dumps(Payload(pwned)))
    assert main([*words, str(tmp_path / "replaced")]) == 2
    assert "adapter_model.safetensors is not the file that was registered" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "replaced").exists()
    assert not pwned.exists()
    pickle.loads(pickle.dumps(Payload(pwned)))
    assert pwned.is_dir(), "the payload works"
