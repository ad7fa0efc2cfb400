"""``hyperlora train`` in one process: what it learns, writes, tracks and refuses."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hyperlora import METHODS
from hyperlora.tracking import git_state
from pipelines.cli import main

KEYS = {
    "metric",
    "metric_before",
    "metric_after",
    "loss_first",
    "loss_last",
    "rank_initial",
    "rank_final",
    "rank_target",
    "optimizer_state_bytes",
    "tokens_per_second",
    "wall_seconds",
    "adapter",
    "checkpoint",
    "mlflow_run_id",
}


PRETRAINED = ("model.path=builtin:storylm", "model.init=pretrained", "model.dtype=float32", "training.steps=30")


def train(recipe: Path, *overrides: str) -> dict:
    summary = recipe.with_suffix(".json")
    assert main(["train", str(recipe), "--json", str(summary), *overrides]) == 0
    return json.loads(summary.read_text())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(recipe_file: Path, method: str) -> None:
    result = train(recipe_file, f"method={method}", *PRETRAINED)
    assert result.keys() >= KEYS
    assert result["loss_last"] < result["loss_first"] - 0.8
    modules = 28
    assert result["rank_initial"] == 4 * modules
    assert result["rank_final"] == result["rank_target"] == (2 if METHODS[method].singular_values else 4) * modules


@pytest.mark.parametrize("kind", ["attention", "mlp", "cnn"])
@pytest.mark.parametrize("per_layer", ["true", "false"])
def test_every_hypernetwork_learns(recipe_file: Path, kind: str, per_layer: str) -> None:
    changes = [f"hypernetwork.kind={kind}", f"hypernetwork.per_layer={per_layer}", "hypernetwork.update=anchored"]
    result = train(recipe_file, *changes, *PRETRAINED)
    assert result["loss_last"] < result["loss_first"] - 0.8


def test_gradient_accumulation_changes_nothing(recipe_file: Path) -> None:
    whole = train(recipe_file)
    parts = train(recipe_file, "training.gradient_accumulation=4", "model.gradient_checkpointing=true")
    assert parts["loss_last"] == pytest.approx(whole["loss_last"], abs=1e-9)
    assert parts["ranks"] == whole["ranks"]


def test_reported_losses_do_not_contain_the_penalty(recipe_file: Path) -> None:
    plain = train(recipe_file, "gamma=0", "training.steps=1", "pruning.schedule=none")
    heavy = train(recipe_file, "gamma=1000", "training.steps=1", "pruning.schedule=none")
    assert heavy["loss_first"] == plain["loss_first"]
    assert heavy["held_out_loss_before"] == plain["held_out_loss_before"]


def test_language_modelling_learns(recipe_file: Path) -> None:
    changes = ["task.kind=language-modeling", "data.template='{prompt} {completion}'", "model.dtype=float32"]
    result = train(recipe_file, *changes)
    assert result["metric"] == "held_out_loss"
    assert result["metric_after"] < result["metric_before"]


def test_classification_learns_what_a_word_tells(recipe_file: Path, tmp_path: Path) -> None:
    """A model of random weights, of which only adapters and head learn."""
    words = {"pos": ("fine", "good"), "neg": ("bad", "poor")}
    for split, things in (("train", "abcdefgh"), ("eval", "ijkl")):
        rows = [(label, f"a {word} {thing}") for label, both in words.items() for word in both for thing in things]
        text = "".join(json.dumps({"label": label, "sentence": sentence}) + "\n" for label, sentence in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    changes = ["task.kind=classification", "data.source=files", f"data.root={tmp_path}", "data.train=train.jsonl"]
    changes += ["data.eval=eval.jsonl", "data.format=jsonl", "adapter.modules_to_save=[score]", "training.steps=60"]
    result = train(recipe_file, *changes, "model.dtype=float32")
    assert result["metric"] == "accuracy"
    assert result["metric_before"] < 0.8
    assert result["metric_after"] == 1.0
    assert result["loss_last"] < 0.1 < 0.5 < result["loss_first"]


def test_files_are_read_in_every_format(recipe_file: Path, tmp_path: Path) -> None:
    texts = [("pos", "a fine day"), ("neg", "a bad day"), ("pos", "fine apples"), ("neg", 'bad "apples')] * 4
    files = {
        "label-text": "".join(f"{label} {text}\n" for label, text in texts),
        "tsv": "label\tsentence\n" + "".join(f"{label}\t{text}\n" for label, text in texts),
        "csv": "label,sentence\n"
        + "".join(f'{label},"{text.replace(chr(34), chr(34) * 2)}"\n' for label, text in texts),
        "jsonl": "".join(json.dumps({"label": label, "sentence": text}) + "\n" for label, text in texts),
        "json": json.dumps([{"label": label, "sentence": text} for label, text in texts]),
    }
    losses = set()
    for name, content in files.items():
        (tmp_path / f"rows.{name}").write_text(content, encoding="latin-1")
        changes = ["data.source=files", f"data.root={tmp_path}", f"data.train=rows.{name}", f"data.eval=rows.{name}"]
        changes += [f"data.format={name}", "data.encoding=latin-1", "task.kind=classification", "training.steps=4"]
        losses.add(train(recipe_file, *changes, "adapter.modules_to_save=[score]")["loss_last"])
    assert len(losses) == 1


def test_mlflow_has_every_step(recipe_file: Path, tmp_path: Path) -> None:
    result = train(recipe_file, "mlflow.enabled=true", "training.eval_every=10", "gamma=0.1")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    names = (
        "loss grad_norm penalty live_rank learning_rate tokens_per_second step_seconds importance_q10 importance_q50"
    )
    for name in [*names.split(), "importance_q90"]:
        history = client.get_metric_history(run.info.run_id, name)
        assert [m.step for m in history] == list(range(1, 21)), name
    losses = [m.value for m in client.get_metric_history(run.info.run_id, "loss")]
    assert (losses[0], losses[-1]) == (result["loss_first"], result["loss_last"])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "held_out_loss")] == [0, 10, 20]
    assert run.data.params["optimizer.lr"] == "0.01"
    assert run.data.params["resolved.pruning.interval"] == "1"
    decided = {k: run.data.params[f"resolved.{k}"] for k in ("adapter.factorization", "optimizer.direction", "gamma")}
    assert decided == {"adapter.factorization": "fused", "optimizer.direction": "orthogonal", "gamma": "0.1"}
    assert run.data.params["resolved.optimizer.trunk_lr"] == "0.0005"
    assert git_state().items() <= run.data.tags.items()
    assert {"version.torch", "version.peft", "hyperlora.method"} <= run.data.tags.keys()
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"recipe.yaml", "rank_heat_map.png", "loss_curve.png", "result.json"} <= artifacts
    for name in ("rank_heat_map.png", "loss_curve.png"):
        picture = Path(client.download_artifacts(run.info.run_id, name, str(tmp_path))).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000


def test_a_diverging_run_stops_before_the_step(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    # At 1e200 the first step is finite, its weights are not usable, and the next loss or gradient overflows.
    changes = ["optimizer.lr=1e200", "optimizer.warmup=0", "optimizer.max_grad_norm=null", "mlflow.enabled=true"]
    assert main(["train", str(recipe_file), *changes, "method=adalora", "training.checkpoint_every=1"]) == 1
    message = capfd.readouterr().err
    assert "the step was not taken and the last checkpoint is kept" in message
    assert "1e+200" in message
    (run,) = (tmp_path / "runs").iterdir()
    assert list(run.glob("checkpoints/*/COMMIT"))
    assert not (run / "result.json").exists()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("hyperlora").experiment_id])
    assert tracked.info.status == "FAILED"


def test_dry_run_starts_nothing(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary = tmp_path / "dry.json"
    assert main(["train", str(recipe_file), "--dry-run", "--json", str(summary)]) == 0
    shown = capsys.readouterr().out
    decided = "optimizer.trunk_lr 0.0005, optimizer.output_lr 0.0005, gamma 0.0, optimizer.direction orthogonal"
    shown = " ".join(shown.split())
    for part in ("method: hyperadalora", "64 to train on, 8 held out", "rank budget", "56 to 28", "memory", decided):
        assert part in shown
    estimate = json.loads(summary.read_text())["estimate"]
    assert estimate["decided"]["adapter.factorization"] == "fused"
    assert estimate["decided"]["hypernetwork.intermediate_size"] == 92
    assert (estimate["modules"], estimate["rank_initial"], estimate["rank_target"]) == (14, 56, 28)
    assert not (tmp_path / "runs").exists()
    actual = train(recipe_file, "training.steps=20")
    assert estimate["sizes"]["trainable"] == actual["trainable_parameters"]
    assert estimate["sizes"]["state_bytes"] == actual["optimizer_state_bytes"]


def test_a_terminal_shows_one_bar(recipe_file: Path) -> None:
    """Loss, live rank, tokens per second, steps and time left, on one line that moves."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 160))
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "train",
        str(recipe_file),
        "training.steps=60",
        "pruning.start=30",
    ]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    bars = re.findall(r"training [━╸╺ ]+ +(\d+)/60 loss (\d\.\d+) +rank (\d+) +([\d,]+) tok/s +(\S+)", text)
    assert len({bar[0] for bar in bars}) > 3, text
    assert {int(bar[2]) for bar in bars} >= {56}, "the initial rank"
    assert any(re.fullmatch(r"\d\d:\d\d", bar[4]) for bar in bars), bars
    assert "step 6/60" not in text, "no lines beside the bar"
