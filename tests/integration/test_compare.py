"""A whole comparison with a real Ray: searched, reported, killed and taken up again."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from botocore.exceptions import NoCredentialsError
from conftest import small_recipe
from mlflow import MlflowClient
from searches import finished, interrupted, kill, wait_for

from pipelines.cli import main

ADA = {"name": "ada", "label": "AdaLoRA", "set": {"method": "adalora"}}
LORA = {"name": "lora", "label": "LoRA", "set": {"method": "lora"}, "rank": "final"}
RATES = "--lrs", "0.02,0.04"
#: What no clock decides.
EXACT = ("seed", "final_loss", "auc", "metric", "held_out_loss", "rank_final", "ranks", "smoothed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the tests of this file; the command uses a Ray that runs already."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def prepare(folder: Path, *contestants: dict[str, Any], **training: Any) -> list[str]:
    """A recipe and a field in files; the command that compares them."""
    recipe = small_recipe(folder)
    recipe["training"] |= training
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    field = {"baseline": "ada", "contestants": list(contestants)}
    (folder / "field.yaml").write_text(yaml.safe_dump(field), encoding="utf-8")
    return ["compare", str(folder / "small.yaml"), "--field", str(folder / "field.yaml"), *RATES, "--seeds", "2"]


def compare(command: list[str], out: Path, *more: str) -> dict[str, Any]:
    summary = out.parent / "summary.json"
    assert main([*command, "--out", str(out), "--json", str(summary), *more]) == 0
    result = json.loads(summary.read_text())
    assert json.loads((out / "comparison.json").read_text())["contestants"] == result["contestants"]
    return result


def exact(result: dict[str, Any]) -> list[Any]:
    return [
        (c["name"], c["best_lr"], c["search"], [{k: t[k] for k in EXACT} for t in c["trials"]])
        for c in result["contestants"]
    ]


@pytest.fixture(scope="module")
def whole(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, dict[str, Any]]:
    """A comparison from beginning to end: its command, its folder, its result."""
    folder = tmp_path_factory.mktemp("whole")
    command = prepare(folder, ADA, LORA, steps=40)
    return command, folder / "out", compare(command, folder / "out", "mlflow.enabled=true")


def test_the_whole_comparison(whole: tuple[list[str], Path, dict[str, Any]]) -> None:
    _, out, result = whole
    assert result["complete"]
    assert result["failed"] == result["missing"] == []
    for contestant in result["contestants"]:
        scores = {s["lr"]: s["score"] for s in contestant["search"]}
        rates = sorted(scores)
        best = min(scores, key=lambda lr: scores[lr])
        assert contestant["best_lr"] == best
        # Two rates always have their best on an edge: the search went on until it was inside, or four times.
        assert {0.02, 0.04} < set(rates)
        assert rates[0] < best < rates[-1] or len(rates) == 6
        assert [t["seed"] for t in contestant["trials"]] == [1, 2]
        for trial in contestant["trials"]:
            saved = json.loads(
                (out / f"trials/{contestant['name']}-lr{best:g}-seed{trial['seed']}/result.json").read_text()
            )
            assert len(saved["step_seconds"]) == len(saved["losses"]) == 40
            assert trial["peak_memory_bytes"] > 4 * saved["base_parameters"], "more than the weights, in float32"
            assert sum(saved["step_seconds"]) == pytest.approx(saved["training_seconds"])
    ada, lora = (c["trials"][0] for c in result["contestants"])
    assert ada["rank_final"] == lora["rank_final"] == 28
    assert result["recipe"]["mlflow"]["enabled"]
    assert result["provenance"]["machine"]["cores"] >= 1
    assert "<html" in (out / "comparison.html").read_text()
    assert not list(out.glob("trials/*/checkpoints")), "they are of no use to a finished trial"


def test_nothing_is_done_twice(whole: tuple[list[str], Path, dict[str, Any]]) -> None:
    command, out, result = whole
    before = finished(out)
    again = compare(command, out, "mlflow.enabled=true")
    assert finished(out) == before
    assert exact(again) == exact(result)
    client = MlflowClient(f"sqlite:///{out.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hyperlora").experiment_id
    (tracked,) = client.search_runs([experiment])
    assert tracked.info.status == "FINISHED"
    loss = result["contestants"][1]["summary"]["final_loss"]["mean"]
    assert tracked.data.metrics["lora/final_loss"] == pytest.approx(loss)
    assert {f.path for f in client.list_artifacts(tracked.info.run_id)} == {"comparison.html", "comparison.json"}


def test_the_result_does_not_depend_on_mlflow(
    whole: tuple[list[str], Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A store of artifacts that takes nothing, and a database that is not there yet, by a relative path."""
    command, out, result = whole

    def refuse(*arguments: object) -> None:
        raise NoCredentialsError

    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    again = compare(command, out, "mlflow.enabled=true", "mlflow.tracking_uri=sqlite:///other.db")
    assert exact(again) == exact(result)
    assert "MLflow lacks what is in" in caplog.text
    assert "Unable to locate credentials" in caplog.text


def test_a_folder_belongs_to_one_recipe(
    whole: tuple[list[str], Path, dict[str, Any]], capfd: pytest.CaptureFixture
) -> None:
    command, out, _ = whole
    before = (out / "comparison.json").read_text()
    assert main([*command, "--out", str(out), "training.steps=41"]) == 2
    assert "training.steps: got 41;" in " ".join(capfd.readouterr().err.split())
    assert (out / "comparison.json").read_text() == before


def test_stopped_killed_and_taken_up_again(whole: tuple[list[str], Path, dict[str, Any]], tmp_path: Path) -> None:
    """SIGTERM leaves a partial result; then driver, Ray and trials die at once; the same command ends as ever."""
    command, _, result = whole
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "pipelines.cli", *command, "--out", str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, lambda: finished(out))
        process.terminate()
        message = process.communicate(timeout=120)[1]
    assert process.returncode == 143, message
    assert "interrupted; the same command goes on from the last checkpoint" in message
    assert "Traceback" not in message
    partial = json.loads((out / "comparison.json").read_text())
    assert not partial["complete"]
    stopped = finished(out)
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(process, lambda: len(finished(out)) > len(stopped) and interrupted(out))
    finally:
        kill(process)
    partial = json.loads((out / "comparison.json").read_text())
    assert not partial["complete"]
    assert "ada-seed1 (rate open)" in partial["missing"] or any(m.startswith("ada-lr") for m in partial["missing"])
    before, checkpoints = finished(out), interrupted(out)
    assert checkpoints
    assert stopped.items() <= before.items()
    again = compare(command, out)
    assert exact(again) == exact(result)
    assert before.items() <= finished(out).items(), "finished trials are not repeated"
    for name, seconds in checkpoints.items():
        times = json.loads((out / "trials" / name / "result.json").read_text())["step_seconds"]
        assert times[: len(seconds)] == seconds, "an interrupted trial goes on from its newest checkpoint"


@pytest.mark.usefixtures("cluster")
def test_a_contestant_that_diverges_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    wild = {"name": "wild", "set": {"method": "adalora", "optimizer.lambda_ratio": 1.0e200}}
    command = [*prepare(tmp_path, ADA, wild, steps=10, eval_before=False), "--seeds", "1"]
    result = compare(command, tmp_path / "out")
    ada, wild_result = result["contestants"]
    assert result["complete"]
    assert ada["best_lr"] is not None
    assert [t["seed"] for t in ada["trials"]] == [1]
    assert (wild_result["best_lr"], wild_result["trials"]) == (None, [])
    # Two rates and four more below them.
    assert len(result["failed"]) == len(wild_result["search"]) == 6
    assert all(f["trial"].startswith("wild-lr") and "gradient norm" in f["reason"] for f in result["failed"])
    assert "failed: wild-lr0.02-seed0: step " in capfd.readouterr().out
    assert exact(compare(command, tmp_path / "out")) == exact(result)


def test_dry_run(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = prepare(tmp_path, ADA, LORA)
    assert main([*command, "--dry-run", "--json", str(tmp_path / "plan.json")]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "4 to choose learning rates, 4 to report" in shown
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["contestants"][1]["set"] == {"adapter.rank": 2, "adapter.alpha": 4.0, "method": "lora"}
    assert (plan["lrs"], plan["seeds"], plan["steps"]) == ([0.02, 0.04], [1, 2], 20)
    assert not (tmp_path / "runs").exists()


def test_all_problems_at_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = prepare(tmp_path, ADA, LORA)
    more = [
        "--only",
        "loraa",
        "--lrs",
        "0.1,-1,x",
        "--seeds",
        "0",
        "--concurrency",
        "1.5",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*command, *more]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "5 problems" in message
    for expected in (
        "--only: got 'loraa'; allowed: ada, lora",
        "--lrs: got '-1'",
        "--lrs: got 'x'",
        "--seeds: got '0'; a whole number of seeds, 1 to 1000",
        "--concurrency: got '1.5'",
    ):
        assert expected in message
    assert main(["compare", "nothing", "--field", str(tmp_path / "none.yaml")]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "RECIPE: got 'nothing'" in message
    assert "--field: got" in message
    assert not (tmp_path / "o").exists()


def test_what_does_not_fit_the_model_is_told_with_the_contestant(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    wide = {"name": "wide", "set": {"method": "lora", "adapter.rank": 64}}
    assert main(prepare(tmp_path, ADA, wide)) == 2
    assert "wide: adapter" in " ".join(capfd.readouterr().err.split())
    # What is wrong with all is told once, without a name.
    assert main([*prepare(tmp_path, ADA, LORA), "adapter.target_modules=[nothing]"]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "1 problem: adapter.target_modules: got ('nothing',)" in message


def test_one_comparison_in_a_folder_at_a_time(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([*prepare(tmp_path, ADA), "--out", str(tmp_path / "out")]) == 2
    assert "no other comparison runs" in " ".join(capfd.readouterr().err.split())
