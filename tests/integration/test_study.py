"""A whole study with a real Ray: cost shown, repeated, killed and taken up again, tracked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import ray
import yaml
from conftest import small_recipe
from mlflow import MlflowClient
from safetensors import safe_open
from searches import finished, hear_ctrl_c, wait_for

from hyperlora.config import parse
from hyperlora.fingerprint import data_fingerprint, recipe_fingerprint
from hyperlora.tracking import git_state
from pipelines.cli import main


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the tests of this file; the command uses a Ray that runs already."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def prepare(folder: Path, **recipe: Any) -> list[str]:
    (folder / "small.yaml").write_text(yaml.safe_dump(small_recipe(folder) | recipe), encoding="utf-8")
    options = ["--space", "smoke", "--seeds", "2", "--lora-lrs", "0.02", "--metric", "held_out_loss"]
    return ["study", str(folder / "small.yaml"), *options, "--out", str(folder / "out")]


@pytest.fixture(scope="module")
def whole(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study")
    command = [*prepare(folder), "mlflow.enabled=true"]
    assert main([*command, "--json", str(folder / "summary.json")]) == 0
    return command, folder, json.loads((folder / "summary.json").read_text())


def test_the_whole_study(whole: tuple[list[str], Path, dict[str, Any]]) -> None:
    _, folder, result = whole
    assert result["complete"]
    assert len(result["points"]) == 4
    for point in result["points_measured"]:
        assert set(point["by_seed"]) == {"1", "2"}
        trial = json.loads((folder / f"out/trials/p{point['point']:03d}-seed1/result.json").read_text())
        run = json.loads((folder / f"out/trials/p{point['point']:03d}-seed1/run.json").read_text())
        assert point["by_seed"]["1"] == trial["held_out_loss_after"]
        assert run["recipe"]["pruning"]["interval"] == point["values"]["pruning.interval"]
        assert run["recipe"]["optimizer"]["lr"] == point["values"]["optimizer.lr"]
        with safe_open(f"{trial['adapter']}/adapter_model.safetensors", "pt") as file:
            numbers = sum(file.get_tensor(k).numel() for k in file.keys() if "lora_" in k)  # noqa: SIM118
        assert trial["adapter_parameters_final"] == numbers
    assert {e["label"] for e in result["effects"]} == {"ΔT", "learning rate"}
    assert result["reference_measured"]["n"] == 2
    assert "Recommended: ΔT" in result["verdict"]
    rows = pyarrow.parquet.read_table(folder / "out/trials.parquet").to_pylist()
    assert {r["trial"] for r in rows} == set(finished(folder / "out"))


def test_tracked_as_one_run_with_one_for_each_trial(whole: tuple[list[str], Path, dict[str, Any]]) -> None:
    command, folder, result = whole
    before = finished(folder / "out")
    assert main(command) == 0
    assert finished(folder / "out") == before, "nothing is done twice"
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("hyperlora").experiment_id], max_results=100)
    (parent,) = (r for r in runs if r.data.tags.get("hyperlora.kind") == "study")
    nested = {r.data.tags["hyperlora.trial"]: r for r in runs if "hyperlora.trial" in r.data.tags}
    assert len(runs) == 1 + len(nested)
    assert nested.keys() == before.keys()
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == {
        "study.html",
        "study.json",
        "trials.csv",
        "trials.parquet",
    }
    one = nested["p000-seed1"]
    assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id
    commit = git_state().get("git.commit")
    for name, run in nested.items():
        recipe = parse(json.loads((folder / f"out/trials/{name}/run.json").read_text())["recipe"])
        assert run.data.tags["hyperlora.recipe_fingerprint"] == recipe_fingerprint(recipe)
        assert run.data.tags["hyperlora.data_fingerprint"] == data_fingerprint(recipe)
        assert run.data.tags.get("git.commit") == commit
    assert len({run.data.tags["hyperlora.recipe_fingerprint"] for run in nested.values()}) == len(nested)
    assert one.data.params["pruning.interval"] == str(result["points"][0]["pruning.interval"])
    loss = result["points_measured"][0]["by_seed"]["1"]
    assert one.data.metrics["held_out_loss"] == pytest.approx(loss)
    names = {f.path for f in client.list_artifacts(one.info.run_id)}
    assert {"rank_heat_map.png", "ranks.json", "adapter"} <= names
    files = {f.path for f in client.list_artifacts(one.info.run_id, "adapter")}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= files
    assert main([*command, "--metric", "exact_match"]) == 0
    parent = client.get_run(parent.info.run_id)
    assert parent.data.params["metric"] == "held_out_loss"
    assert parent.data.tags["hyperlora.metric"] == "exact_match", "what its figures are of by now"


def test_a_failing_point_is_marked_and_stops_nothing(cluster: None, tmp_path: Path) -> None:
    content = {
        "name": "wild",
        "parameters": [{"key": "optimizer.lambda_ratio", "low": 1, "high": 1e200, "levels": [1, 1e200]}],
    }
    (tmp_path / "wild.yaml").write_text(yaml.safe_dump(content))
    command = prepare(tmp_path, method="adalora")
    command[command.index("smoke")] = str(tmp_path / "wild.yaml")
    assert main([*command, "--seeds", "1", "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    (failure,) = result["failed"]
    assert failure["trial"] == "p001-seed1"
    assert "gradient norm" in failure["reason"]
    assert result["points_measured"][0]["n"] == 1
    assert "gradient norm" in (tmp_path / "out/study.html").read_text()


def test_the_cost_is_shown_first(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main([*prepare(tmp_path), "--dry-run", "--json", str(tmp_path / "plan.json")]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "4 points (fraction) x 2 seeds, and uniform LoRA of rank 2" in shown
    assert "220 optimizer steps, about" in shown
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["trials"] == 11
    assert plan["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_all_problems_at_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    options = ["--space", "none.yaml", "--seeds", "0", "--design", "star", "--metric", "bleu", "--lora-lrs", "x"]
    assert main(["study", prepare(tmp_path)[1], *options]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "5 problems" in message
    for option in ("--space", "--seeds", "--design", "--metric", "--lora-lrs"):
        assert f"{option}: got" in message


def test_interrupted_it_leaves_a_report_and_goes_on(tmp_path: Path) -> None:
    command = [*prepare(tmp_path), "--seeds", "1"]
    arguments = [sys.executable, "-m", "pipelines.cli", *command]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, **pipes, preexec_fn=hear_ctrl_c) as process:
        wait_for(process, lambda: finished(tmp_path / "out"))
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=120)[1]
    assert process.returncode == 130, message
    assert "interrupted; the same command goes on from the last checkpoint" in message
    assert "Traceback" not in message
    partial = json.loads((tmp_path / "out/study.json").read_text())
    assert not partial["complete"]
    assert partial["missing"]
    assert "Not yet ended" in (tmp_path / "out/study.html").read_text()
    before = finished(tmp_path / "out")
    assert main(command) == 0
    assert before.items() <= finished(tmp_path / "out").items(), "finished trials are not repeated"
    assert json.loads((tmp_path / "out/study.json").read_text())["complete"]
