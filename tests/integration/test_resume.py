"""A run that was killed goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_recipe
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaAttention

from hyperlora import checkpoint, runs
from hyperlora.config import parse
from hyperlora.training import RunInfo
from pipelines.cli import main
from pipelines.common import load_recipe

STEPS = 60
# A model that is loaded comes in evaluation mode, and this one has a dropout of its own.
PRETRAINED = ("model.path=builtin:storylm", "model.init=pretrained", "model.config.attention_dropout=0.2")


def command(recipe: Path, *more: str) -> list[str]:
    return ["train", str(recipe), f"training.steps={STEPS}", *more]


def run(recipe: Path, *more: str) -> dict:
    summary = recipe.parent / "summary.json"
    assert main([*command(recipe, *more), "--json", str(summary)]) == 0
    return json.loads(summary.read_text())


def kill_after_a_checkpoint(recipe: Path, *more: str) -> None:
    """Start a run in another process and kill it, and all that it started, once it has a checkpoint."""
    runs = recipe.parent / "runs"
    before = set(runs.glob("*/checkpoints/*/COMMIT"))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command(recipe, *more)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 300
        while not set(runs.glob("*/checkpoints/*/COMMIT")) - before:
            assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
            assert time.monotonic() < deadline, "no checkpoint in five minutes"
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def adapters_equal(first: str, second: str) -> bool:
    one, two = (load_file(Path(uri.removeprefix("file://")) / "adapter_model.safetensors") for uri in (first, second))
    return one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


@pytest.mark.parametrize(
    "changes",
    [
        ("method=hyperadalora", "hypernetwork.update=reanchored"),
        ("method=hyperadalora", "adapter.factorization=triplet", "gamma=0.1", "pruning.score=adalora"),
        ("method=adalora", "gamma=0.1"),
        ("method=dylora",),
        (*PRETRAINED, "method=hyperadalora"),
        (*PRETRAINED, "method=dylora"),
    ],
    ids=["reanchored", "triplets", "adalora", "dylora", "pretrained", "pretrained-dylora"],
)
def test_killed_run_resumes_to_the_same_adapter(recipe_file: Path, changes: tuple[str, ...]) -> None:
    changes = (*changes, "adapter.dropout=0.1")
    whole = run(recipe_file, *changes)
    kill_after_a_checkpoint(recipe_file, *changes)
    resumed = run(recipe_file, *changes, "--resume")
    assert resumed["adapter"] != whole["adapter"]
    assert (resumed["loss_last"], resumed["metric_after"]) == (whole["loss_last"], whole["metric_after"])
    assert resumed["ranks"] == whole["ranks"]
    assert adapters_equal(whole["adapter"], resumed["adapter"])


def test_a_run_that_is_older_than_a_field_goes_on(recipe_file: Path) -> None:
    whole = run(recipe_file)
    kill_after_a_checkpoint(recipe_file)
    (record,) = [f for f in recipe_file.parent.glob("runs/*/run.json") if not (f.parent / "result.json").exists()]
    content = json.loads(record.read_text())
    del content["recipe"]["task"]["chat"]
    record.write_text(json.dumps(content))
    assert run(recipe_file, "--resume")["loss_last"] == whole["loss_last"]


def test_a_killed_run_goes_on_with_less_memory(recipe_file: Path) -> None:
    whole = run(recipe_file)
    kill_after_a_checkpoint(recipe_file)
    less = "training.gradient_accumulation=4", "training.eval_batch_size=2", "model.gradient_checkpointing=true"
    resumed = run(recipe_file, "--resume", *less)
    assert resumed["loss_last"] == pytest.approx(whole["loss_last"], abs=1e-9)
    assert resumed["ranks"] == whole["ranks"]


def test_a_run_trains_alike_whether_the_base_model_was_evaluated_or_not(recipe_file: Path) -> None:
    changes = (*PRETRAINED, "training.steps=3", "training.checkpoint_every=null")
    losses = [run(recipe_file, *changes, f"training.eval_before={before}")["loss_last"] for before in ("true", "false")]
    assert losses[0] == losses[1]
    assert losses[0] != run(recipe_file, *changes, "model.config.attention_dropout=0")["loss_last"]


def test_activations_are_recomputed_from_the_first_step(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    forward = LlamaAttention.forward

    def counted(layer: LlamaAttention, *arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += torch.is_grad_enabled()
        return forward(layer, *arguments, **options)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    changes = [*PRETRAINED[:2], "training.steps=1", "training.eval_before=false"]
    run(recipe_file, *changes)
    kept, passes = passes, 0
    run(recipe_file, *changes, "model.gradient_checkpointing=true")
    assert passes == 2 * kept, "each layer once more with gradients, in the backward pass"


def test_resume_goes_on_in_the_same_mlflow_run(recipe_file: Path, tmp_path: Path) -> None:
    kill_after_a_checkpoint(recipe_file, "mlflow.enabled=true")
    resumed = run(recipe_file, "mlflow.enabled=true", "--resume")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hyperlora").experiment_id
    (tracked,) = client.search_runs([experiment])
    assert tracked.info.run_id == resumed["mlflow_run_id"]
    assert tracked.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(tracked.info.run_id, "loss")]
    assert steps == list(range(1, STEPS + 1)), "no step is missing or logged twice"


def test_resume_without_mlflow_or_on_another_server(recipe_file: Path, tmp_path: Path) -> None:
    kill_after_a_checkpoint(recipe_file, "mlflow.enabled=true")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    resumed = run(recipe_file, "mlflow.enabled=true", f"mlflow.tracking_uri={other}", "--resume")
    client = MlflowClient(other)
    tracked = client.get_run(resumed["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(tracked.info.run_id, "loss")]
    assert steps == list(range(steps[0], STEPS + 1)), "what came after the checkpoint"
    (first,) = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    kill_after_a_checkpoint(recipe_file, "mlflow.enabled=true")
    assert run(recipe_file, "mlflow.enabled=false", "--resume")["mlflow_run_id"] is None
    runs_there = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    assert {r.info.status for r in runs_there} == {"RUNNING"}, "as they were killed"
    assert first.info.run_id in {r.info.run_id for r in runs_there}


def test_names_that_begin_alike(tmp_path: Path) -> None:
    content = small_recipe(tmp_path)
    for name in ("exp", "exp-3"):
        runs.record(RunInfo(f"{tmp_path}/runs/{name}-20260101-101010"), parse(content | {"name": name}))
    found = [runs.unfinished(parse(content | {"name": name})).uri.rsplit("/", 1)[1] for name in ("exp", "exp-3")]
    assert found == ["exp-20260101-101010", "exp-3-20260101-101010"]


def test_what_cannot_be_resumed(recipe_file: Path, capfd: pytest.CaptureFixture) -> None:
    assert main([*command(recipe_file), "--resume"]) == 2
    assert "no run of 'small' to resume" in capfd.readouterr().err.replace("\n", " ")
    kill_after_a_checkpoint(recipe_file)
    assert main([*command(recipe_file), "--resume", "optimizer.lr=0.5", "seed=1"]) == 2
    message = capfd.readouterr().err
    assert "optimizer.lr: got 0.5; the run to resume has 0.01" in message
    assert "seed: got 1; the run to resume has 0" in message
    run(recipe_file, "--resume", "training.checkpoint_every=7")
    assert main([*command(recipe_file), "--resume"]) == 2
    assert "this run is finished" in capfd.readouterr().err


@pytest.mark.parametrize("change", ["another row", "another word", "another word held out"])
def test_a_run_does_not_go_on_with_other_rows(recipe_file: Path, change: str, capfd: pytest.CaptureFixture) -> None:
    original = [json.dumps({"question": f"What is {n} and 1?", "answer": f"#### {n + 1}"}) for n in range(64)]
    data = recipe_file.parent / "train.jsonl"
    data.write_text("\n".join(original))
    (recipe_file.parent / "eval.jsonl").write_text("\n".join(original[:8]))
    fields = {"source": "files", "root": str(data.parent), "train": "train.jsonl", "eval": "eval.jsonl"}
    changes = [f"data.{k}={v}" for k, v in (fields | {"prompt": "question", "completion": "answer"}).items()]
    changes.append("data.train_rows=null")
    kill_after_a_checkpoint(recipe_file, *changes)
    other = original[0].replace("0 and", "7 and")
    rows = [*original, other] if change == "another row" else [other, *original[1:]]
    part = "eval" if "held out" in change else "train"
    (data.parent / f"{part}.jsonl").write_text("\n".join(rows[:8] if part == "eval" else rows))
    capfd.readouterr()
    assert main([*command(recipe_file, *changes), "--resume"]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert re.search(rf"data\.{part}: got '[0-9a-f]{{64}}'; the rows of \S+, SHA-256 of whose tokens is", message)
    assert message.count("data.") == 1
    data.write_text("\n".join(original))
    (data.parent / "eval.jsonl").write_text("\n".join(original[:8]))
    run(recipe_file, *changes, "--resume")


def test_a_checkpoint_of_another_version_is_refused(recipe_file: Path, capfd: pytest.CaptureFixture) -> None:
    folder = recipe_file.parent / "runs/small-20260101-000000"
    runs.record(RunInfo(str(folder)), load_recipe(str(recipe_file), [f"training.steps={STEPS}"]))
    uri = checkpoint.save(str(folder), 5, {}, {"step": 5}, {})
    assert main([*command(recipe_file), "--resume"]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert f"--resume: got '{uri}'; a checkpoint of this version: its trainer.json has no data, evaluations" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "run.json; a folder whose run.json is a JSON object or list (JSONDecodeError"),
        ("{}", "run.json; the record of a run, with its recipe"),
        ("[]", "run.json; the record of a run, with its recipe"),
        ("[" * 100_000, "run.json; a folder whose run.json is a JSON object or list (RecursionError"),
    ],
)
def test_a_damaged_record_is_refused_by_its_name(
    recipe_file: Path, content: str, expected: str, capfd: pytest.CaptureFixture
) -> None:
    folder = recipe_file.parent / "runs/small-20260101-000000"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    assert main([*command(recipe_file), "--resume"]) == 2
    assert expected in " ".join(capfd.readouterr().err.split()).replace("'", "")


def test_an_incomplete_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(str(tmp_path), 5, {}, {"step": 5}, {"a.json": b"{}"})
    checkpoint.save(str(tmp_path), 10, {}, {"step": 10}, {"a.json": b"{}"})
    (tmp_path / "checkpoints/step-00000010/COMMIT").unlink()
    found, refused = checkpoint.load_latest(str(tmp_path))
    assert found is not None
    assert (found.trainer["step"], refused) == (5, [])


def test_a_manifest_cannot_leave_its_folder(tmp_path: Path) -> None:
    checkpoint.save(str(tmp_path), 5, {}, {"step": 5}, {})
    marker = tmp_path / "checkpoints/step-00000005/COMMIT"
    content = json.loads(marker.read_text())
    content["files"]["../secret"] = content["files"]["trainer.json"]
    marker.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside its folder"):
        checkpoint.load(str(tmp_path / "checkpoints/step-00000005"))
