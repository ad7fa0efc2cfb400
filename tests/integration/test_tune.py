"""A search with a real Ray Tune: early stopping, failures, kills, interruption, several workers."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from conftest import small_recipe
from mlflow import MlflowClient
from nodes import TOKEN, Cluster
from searches import finished, hear_ctrl_c, interrupted, kill, wait_for

from pipelines.cli import main

#: Bytes of data of one worker: enough for PyTorch and a small trial.
MOST_MEMORY = 5 * 2**29
#: Beside its result, what says that a trial has ended.
STOPPED = "stopped.json"


def prepare(folder: Path, **training: Any) -> list[str]:
    recipe = small_recipe(folder)
    recipe["training"] |= training
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    options = ["--space", "smoke", "--metric", "held_out_loss", "--out", str(folder / "out")]
    return ["tune", str(folder / "small.yaml"), *options]


def tune(command: list[str], folder: Path) -> dict[str, Any]:
    assert main([*command, "--json", str(folder / "summary.json")]) == 0
    return json.loads((folder / "summary.json").read_text())


def test_trials_are_stopped_early_and_the_best_is_kept(tmp_path: Path) -> None:
    result = tune([*prepare(tmp_path), "mlflow.enabled=true", "--trials", "6"], tmp_path)
    assert result["complete"]
    assert len(result["measured"]) == 6
    assert result["counts"]["stopped"] > 0
    assert 0 < result["steps_spent"] < result["steps_without_stopping"] == 120
    for t in result["measured"]:
        if t["status"] == "stopped":
            assert 0 < t["steps"] < 20
            assert not list(tmp_path.glob(f"out/trials/{t['trial']}/checkpoints/*"))
    best = min((t for t in result["measured"] if t["status"] == "finished"), key=lambda t: t["metric"])
    assert result["best"]["trial"] == best["trial"]
    outcome = json.loads((tmp_path / f"out/trials/{best['trial']}/result.json").read_text())
    assert outcome["held_out_loss_after"] == best["metric"]
    assert "<svg" in (tmp_path / "out/tune.html").read_text()
    before = finished(tmp_path / "out", STOPPED)
    again = tune([*prepare(tmp_path), "mlflow.enabled=true", "--trials", "7"], tmp_path)
    assert before.items() <= finished(tmp_path / "out", STOPPED).items(), "what has ended is not repeated"
    assert len(again["measured"]) == 7
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("hyperlora").experiment_id], max_results=100)
    (parent,) = (r for r in runs if r.data.tags.get("hyperlora.kind") == "tuning")
    nested = {r.data.tags["hyperlora.trial"]: r for r in runs if "hyperlora.trial" in r.data.tags}
    assert len(runs) == 8
    assert {r.data.tags["mlflow.parentRunId"] for r in nested.values()} == {parent.info.run_id}
    assert parent.data.metrics["best"] == again["best"]["metric"]
    for t in again["measured"]:
        assert nested[t["trial"]].data.tags["hyperlora.status"] == t["status"]
        assert nested[t["trial"]].data.params["optimizer.lr"] == str(t["values"]["optimizer.lr"])
        assert nested[t["trial"]].data.metrics["held_out_loss"] == pytest.approx(t["metric"])
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} >= {"tune.html", "tune.json", "trials.parquet"}


def start(command: list[str]) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "pipelines.cli", *command]
    return subprocess.Popen(words, start_new_session=True, preexec_fn=hear_ctrl_c)


def wait_for_work(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until a trial more than before has ended and another has a checkpoint."""
    before = set(finished(out, STOPPED))
    wait_for(process, lambda: set(finished(out, STOPPED)) - before and interrupted(out, STOPPED))


def test_interrupted_and_killed_it_goes_on(tmp_path: Path) -> None:
    """Ctrl-C leaves a report; then driver, Ray and trials die at once; the same command ends the search."""
    command, out = [*prepare(tmp_path, steps=30), "--trials", "5", "--stop-on", "none"], tmp_path / "out"
    process = start(command)
    wait_for_work(process, out)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    result = json.loads((out / "tune.json").read_text())
    assert not result["complete"]
    assert result["missing"]
    assert "This result is partial" in (out / "tune.html").read_text()
    process = start(command)
    try:
        wait_for_work(process, out)
    finally:
        kill(process)
    before, checkpoints = finished(out, STOPPED), interrupted(out, STOPPED)
    assert len(before) >= 2
    assert checkpoints
    result = tune(command, tmp_path)
    assert before.items() <= finished(out, STOPPED).items(), "finished trials are not repeated"
    assert len(result["measured"]) == 5
    assert result["counts"]["finished"] == 5
    for name, seconds in checkpoints.items():
        outcome = json.loads((out / f"trials/{name}/result.json").read_text())
        assert outcome["step_seconds"][: len(seconds)] == seconds, "an interrupted trial goes on from its checkpoint"


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))


@pytest.fixture
def small_workers() -> Iterator[None]:
    """A Ray whose workers get little memory; the command uses a Ray that runs already."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    limit = {"worker_process_setup_hook": limit_memory}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=limit)
    yield
    ray.shutdown()


def test_failing_trials_are_marked_with_their_reasons_and_stop_nothing(tmp_path: Path, small_workers: None) -> None:
    """One is out of memory, one diverges, which its next evaluation shows; the space has no fourth point."""
    size = {"key": "hypernetwork.hidden_size", "choices": [24, 4096]}
    rate = {"key": "optimizer.lr", "choices": [0.01, 1e200], "when": {size["key"]: [24]}}
    (tmp_path / "wild.yaml").write_text(yaml.safe_dump({"name": "wild", "parameters": [size, rate]}))
    command = prepare(tmp_path)
    command[command.index("smoke")] = str(tmp_path / "wild.yaml")
    # Four layers of this width take more than a worker has.
    result = tune([*command, "hypernetwork.layers=4", "--trials", "5", "--evaluations", "20"], tmp_path)
    sizes = {t["trial"]: t["values"][size["key"]] for t in result["measured"]}
    reasons = {sizes[failure["trial"]]: failure["reason"] for failure in result["failed"]}
    assert "can't allocate memory" in reasons[4096]
    assert "held out loss nan" in reasons[24]
    assert len(result["measured"]) == result["trials"] == 3
    assert result["counts"]["finished"] == 1
    assert result["complete"]


def test_a_recipe_that_diverges_costs_the_estimate_alone(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = [*prepare(tmp_path), "optimizer.lr=1e200", "--dry-run", "--json", str(tmp_path / "plan.json")]
    assert main(command) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["seconds"] is None
    assert (
        "note: no estimate of the time, since a few steps failed: after step 4: held out loss nan"
        in capfd.readouterr().out
    )


def test_several_objectives(tmp_path: Path) -> None:
    result = tune([*prepare(tmp_path), "--trials", "3", "--objectives", "metric,rank"], tmp_path)
    assert result["counts"]["finished"] == 3
    costs = {}
    for t in result["measured"]:
        outcome = json.loads((tmp_path / f"out/trials/{t['trial']}/result.json").read_text())
        assert "adapter.target_rank" in t["values"]
        costs[t["trial"]] = (outcome["held_out_loss_after"], outcome["rank_final"])
    for t in result["measured"]:
        loss, rank = costs[t["trial"]]
        beaten = any(a <= loss and b <= rank and (a, b) != (loss, rank) for a, b in costs.values())
        assert t["front"] == (not beaten)


def test_trials_of_several_workers_are_stopped_early_and_leave_their_places(tmp_path: Path) -> None:
    """Two at a time fill the machine, so that no other starts before the workers of one that was stopped have ended.

    Ray's helper that ends them must not ask the other cluster, which the environment names.
    """
    command = [*prepare(tmp_path), "ray.cpus_per_worker=0.5", "--trials", "5", "--workers", "2"]
    other = Cluster(1)
    try:
        words = [*command, "--concurrency", "2", "--json", str(tmp_path / "summary.json")]
        env = os.environ | TOKEN | {"RAY_API_SERVER_ADDRESS": other.url}
        subprocess.run([sys.executable, "-m", "pipelines.cli", *words], env=env, check=True, timeout=400)
    finally:
        other.kill()
    result = json.loads((tmp_path / "summary.json").read_text())
    assert result["complete"]
    counts = result["counts"]
    assert counts["failed"] == 0
    assert counts["stopped"] > 0
    assert counts["finished"] > 0
    trials = tmp_path / "out/trials"
    for t in result["measured"]:
        if t["status"] == "stopped":
            assert 0 < t["steps"] < 20
            assert not (trials / t["trial"] / "result.json").exists(), "its workers went on"
        else:
            assert json.loads((trials / t["trial"] / "result.json").read_text())["workers"] == 2
    # Each from when its point was chosen to its last report.
    ends = ("values.json", "reports.json")
    spans = [[(folder / name).stat().st_mtime for name in ends] for folder in trials.iterdir()]
    at_once = [sum(start <= at < end for start, end in spans) for at, _ in spans]
    assert max(at_once) == 2, "they were to run two at a time"


def test_a_killed_trial_of_several_workers_goes_on(tmp_path: Path) -> None:
    command, out = [*prepare(tmp_path, steps=60), "ray.cpus_per_worker=0.5", "--trials", "1"], tmp_path / "out"
    command += ["--workers", "2", "--stop-on", "none"]
    process = start(command)
    try:
        wait_for(process, lambda: interrupted(out))
    finally:
        kill(process)
    ((name, seconds),) = interrupted(out).items()
    assert tune(command, tmp_path)["counts"]["finished"] == 1
    outcome = json.loads((out / f"trials/{name}/result.json").read_text())
    assert outcome["workers"] == 2
    assert 0 < len(seconds) < len(outcome["step_seconds"]) == 60
    assert outcome["step_seconds"][: len(seconds)] == seconds, "it goes on from its checkpoint"


def test_all_problems_at_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    options = ["--trials", "0", "--sampler", "luck", "--objectives", "rank", "--stop-on", "x", "--workers", "3"]
    assert main([*prepare(tmp_path), *options]) == 2
    message = " ".join(capfd.readouterr().err.split())
    for option in ("--trials", "--sampler", "--objectives", "--stop-on", "--workers"):
        assert f"{option}: got" in message
