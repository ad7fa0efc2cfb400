"""Jobs on a real cluster of one node, a process of its own with token authentication, through Ray's Jobs API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import small_recipe
from mlflow import MlflowClient
from nodes import BIN, TOKEN, Cluster, Line, hyperlora, submit, wait_until

from hyperlora import jobs
from pipelines.cli import main


@pytest.fixture(scope="module")
def address(cluster: Cluster) -> str:
    """The dashboard's URL of a cluster of one node that asks for a token."""
    return cluster.url


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    found = Cluster(2)
    try:
        yield found
    finally:
        found.kill()


def recipe_file(folder: Path, name: str, **training: Any) -> Path:
    recipe = small_recipe(folder) | {"name": name}
    recipe["training"] |= training
    recipe["ray"] = {"num_workers": 2}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(folder.glob(f"runs/{name}-*/result.json"))]


def listed(address: str, folder: Path) -> set[str]:
    """Ids of the cluster's jobs."""
    listing = folder / "jobs.json"
    assert hyperlora("jobs", "--address", address, "--json", str(listing)).returncode == 0
    return {job["job_id"] for job in json.loads(listing.read_text())}


def test_a_stopped_job_saves_a_checkpoint_and_goes_on_when_submitted_again(address: str, tmp_path: Path) -> None:
    # Telling it to stop takes ten seconds of imports, in which it must not end.
    path = recipe_file(tmp_path, "long", steps=100, checkpoint_every=1000, batch_size=64)
    job = submit(address, tmp_path, "train", str(path), "--no-follow")
    assert job["exit"] == 0
    line = Line(int(address.rpartition(":")[2]))
    command = [sys.executable, "-m", "pipelines.cli", "logs", job["job_id"], "--follow", "--address", line.url]
    env = os.environ | {"RAY_AUTH_TOKEN": TOKEN["RAY_AUTH_TOKEN"]}
    follower = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    seen, lost = [], False
    for shown in follower.stdout:
        seen.append(shown)
        if "loading model" in shown:
            line.cut()
        elif "connection lost" in shown:
            line.mend()
            lost = True
        elif lost and re.search(r"step \d+/100", shown):
            break
    summary = tmp_path / "stop.json"
    stopped = hyperlora("stop", job["job_id"], "--address", address, "--json", str(summary))
    rest = follower.stdout.read()
    assert lost
    assert stopped.returncode == 0, rest
    assert follower.wait(60) == 143
    followed = "".join(t for t in [*seen, *rest.splitlines(keepends=True)] if not t.startswith("connection lost"))
    logged = hyperlora("logs", job["job_id"], "--address", address).stdout
    # A line that was cut goes on in another.
    assert followed.replace("\n", "").startswith(logged.replace("\n", "")), f"{followed}\n-----\n{logged}"
    (saved,) = tmp_path.glob("runs/long-*/checkpoints/*/trainer.json")
    step = json.loads(saved.read_text())["step"]
    assert 1 <= step < 100
    again = submit(address, tmp_path, "train", str(path), "--resume")
    assert again["exit"] == 0, again["shown"]
    assert "\n  hyperlora submit train long.yaml method=adalora\n" in again["shown"]
    (resumed,) = results(tmp_path, "long")
    assert main(["train", str(path), "ray.backend=local", "ray.num_workers=1"]) == 0
    whole = results(tmp_path, "long")[-1]
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-4)  # one worker, not two
    assert resumed["modules"] == whole["modules"]


def test_a_job_that_waits_for_room_is_stopped_as_well(address: str, tmp_path: Path) -> None:
    """None of its workers runs: nobody is there to save a checkpoint, and it ends as what was interrupted."""
    path = recipe_file(tmp_path, "waiting")
    full = [BIN / "ray", "job", "submit", f"--address={address}", "--submission-id=full", "--entrypoint-num-cpus=2"]
    subprocess.run([*full, "--no-wait", "--", "sleep", "900"], env=os.environ | TOKEN, check=True)
    try:
        job = submit(address, tmp_path, "train", str(path), "mlflow.enabled=true", "--no-follow")["job_id"]
        logs = ["logs", job, "--address", address]
        wait_until(lambda: "starting workers" in hyperlora(*logs).stdout, 180)
        began = time.monotonic()
        stopped = hyperlora("stop", job, "--address", address)
        took = time.monotonic() - began
    finally:
        hyperlora("stop", "full", "--address", address)
    assert stopped.returncode == 0, stopped
    assert "interrupted; the same command with --resume goes on from the last checkpoint" in stopped.stdout
    assert took < jobs.STOP_SECONDS / 2, "Ray had to kill it"
    (tracked,) = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    assert tracked.info.status == "KILLED"


def test_searches_are_jobs_that_share_the_cluster_and_the_rows(address: str, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "searched", steps=20, checkpoint_every=20)
    ada = {"name": "ada", "label": "AdaLoRA", "set": {"method": "adalora"}}
    lora = {"name": "lora", "label": "LoRA", "set": {"method": "lora"}, "rank": "final"}
    field = tmp_path / "field.yaml"
    field.write_text(yaml.safe_dump({"baseline": "ada", "contestants": [ada, lora]}), encoding="utf-8")
    one, smoke = ["--concurrency", "1"], ["--space", "smoke", "--metric", "held_out_loss"]
    study = ["--seeds", "1", "--design", "sobol", "--points", "2", "--lora-lrs", "none"]
    searches = {
        "tune": [*smoke, "--trials", "2", "--stop-on", "none"],
        "study": [*smoke, *study],
        "compare": ["--field", str(field), "--lrs", "0.02", "--seeds", "1"],
    }
    found = {}
    for command, options in searches.items():
        words = [command, str(path), *options, *one, "--out", str(tmp_path / command), "--no-follow"]
        found[command] = submit(address, tmp_path, *words)["job_id"]
    listing = tmp_path / "jobs.json"
    assert hyperlora("jobs", "--address", address, "--json", str(listing)).returncode == 0
    running = [j for j in json.loads(listing.read_text()) if j["status"] == "RUNNING" and j["job_id"] in found.values()]
    assert len(running) >= 2, "they were to run at once"
    for command, job in found.items():
        done = hyperlora("logs", job, "--follow", "--address", address)
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}"
    for command, name in (("tune", "tune"), ("study", "study"), ("compare", "comparison")):
        assert json.loads((tmp_path / command / f"{name}.json").read_text())["complete"] is True
    assert len(list(tmp_path.glob("runs/rows/*"))) == 1, "tokenised and stored once"


def test_a_job_whose_answer_is_lost_is_sent_once_and_its_failure_is_the_commands(
    cluster: Cluster, tmp_path: Path
) -> None:
    path = recipe_file(tmp_path, "bad")
    changes = ["optimizer.lr=1e200", "optimizer.warmup=0", "optimizer.max_grad_norm=null", "method=adalora"]
    before = listed(cluster.url, tmp_path)
    line = Line(cluster.head.dashboard, lose=b"POST /api/jobs/")
    done = submit(line.url, tmp_path, "train", str(path), *changes)
    assert line.lost == 1
    assert "the cluster did not take the job" in done["shown"]
    assert listed(cluster.url, tmp_path) - before == {done["job_id"]}
    assert (done["exit"], done["status"]) == (1, "FAILED"), done["shown"]
    assert "lower optimizer.lr" in done["shown"]


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_without_the_token_it_says_how_to_give_it(address: str, tmp_path: Path, mode: str) -> None:
    done = hyperlora("jobs", "--address", address, HOME=str(tmp_path), RAY_AUTH_TOKEN="", RAY_AUTH_MODE=mode)
    assert done.returncode == 2
    assert "give its token in RAY_AUTH_TOKEN" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("mode", "token"), [("disabled", ""), ("token", ""), ("token", "wrong")])
@pytest.mark.parametrize("command", ["submit", "train"])
def test_a_missing_or_wrong_token_is_explained(
    cluster: Cluster, tmp_path: Path, command: str, mode: str, token: str
) -> None:
    path = recipe_file(tmp_path, "token")
    words = ["submit", "train", str(path), "--address", cluster.url]
    if command == "train":
        words = ["train", str(path), f"ray.address={cluster.head.address}"]
    done = hyperlora(*words, HOME=str(tmp_path), RAY_AUTH_TOKEN=token, RAY_AUTH_MODE=mode)
    assert done.returncode == 2, done
    message = " ".join(done.stderr.split())
    assert message.startswith("1 problem: ")
    assert "a cluster that lets this user in: give its token in RAY_AUTH_TOKEN" in message
    assert not list(tmp_path.glob("runs/token-*"))


def test_a_token_opens_the_cluster_without_a_job(cluster: Cluster, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "direct")
    done = hyperlora("train", str(path), f"ray.address={cluster.head.address}", "ray.backend=ray", "training.steps=2")
    assert done.returncode == 0, done
    assert len(results(tmp_path, "direct")) == 1


def test_what_cannot_work_on_a_cluster_is_refused_here(tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe_file(tmp_path, "here")
    changes = [
        "storage.uri=runs",
        "mlflow.enabled=true",
        "mlflow.tracking_uri=sqlite:///mlflow.db",
        "training.steps=-1",
    ]
    command = ["submit", "train", str(path), *changes, "--env", "NOT_SET_HERE", "--address", "http://127.0.0.1:1"]
    assert main(command) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "NOT_SET_HERE" in message
    assert "training.steps: got -1" in message
    assert main([w for w in command if w not in ("--env", "NOT_SET_HERE", "training.steps=-1")]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "2 problems" in message
    assert "storage.uri: got 'runs'; a URI, or an absolute path that every node shares" in message
    for address in ("http://127.0.0.1:1", "ray://x:1"):
        assert main(["submit", "train", str(path), "--address", address]) == 2
        assert f"--address: got '{address}'" in " ".join(capfd.readouterr().err.split())


def test_packages_and_files_travel_with_the_job(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    size = jobs.pack(jobs.Job(["train"], {"recipe-mine.yaml": tmp_path / "mine.yaml"}), packed)
    names = {p.relative_to(packed).as_posix() for p in packed.rglob("*") if p.is_file()}
    assert {"recipe-mine.yaml", "hyperlora/optimizer.py", "pipelines/cli.py", "tune_spaces/space.py"} <= names
    assert "hyperlora/assets/storylm/model.safetensors" in names
    assert not [n for n in names if "__pycache__" in n]
    assert size == sum(p.stat().st_size for p in packed.rglob("*") if p.is_file())
    pins = jobs.pinned()
    assert any(p.startswith("torch==") for p in pins)
    assert not [p for p in pins if "+" in p], "no index has a build for one device under its name"
    assert any(p.startswith("ray[default,train,tune]==") for p in pins)
    assert any(p.startswith("botocore==") for p in pins), "what its dependencies need is pinned as well"
    names = [p.partition("==")[0].partition("[")[0] for p in pins]
    assert len(names) == len(set(names))
