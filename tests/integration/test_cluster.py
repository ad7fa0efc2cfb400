"""Jobs on a cluster of a head and two more nodes, with an S3 endpoint and an MLflow server; nodes die in the middle."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import s3
import yaml
from conftest import small_recipe
from mlflow import MlflowClient
from nodes import TOKEN, Cluster, Node, hyperlora, submit, wait_until
from safetensors.torch import load
from tracking_server import Server

from hyperlora import checkpoint, storage
from hyperlora.environment import GIVEN
from pipelines.cli import main

STORE = "s3://bucket/runs"
STEPS = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes of one CPU each; the last test kills two of them."""
    found = Cluster(1, 1, 1)
    try:
        yield found
    finally:
        found.kill()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A recipe's ``cluster`` part for an S3 endpoint and an MLflow server, and the credentials in the environment."""
    tracking = Server(tmp_path_factory.mktemp("tracking"))
    tracking.start()
    with s3.running(s3.moto()) as endpoint, pytest.MonkeyPatch.context() as monkeypatch:
        environment = s3.ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint.url}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        type(storage.filesystem(STORE)[0]).clear_instance_cache()
        storage.filesystem(STORE)[0].mkdir("bucket")
        yield {"storage_uri": STORE, "tracking_uri": tracking.uri, "env": sorted(environment)}
    tracking.stop()


def write(folder: Path, name: str, cluster: dict[str, Any], **training: Any) -> Path:
    recipe = small_recipe(folder) | {"name": name, "cluster": cluster}
    recipe["training"] |= {"batch_size": 64} | training
    recipe["ray"] = {"num_workers": 2}
    recipe["mlflow"]["enabled"] = True
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def outcome(folder: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Result and adapter of the only run of a name."""
    fs, root = storage.filesystem(folder)
    (run,) = fs.glob(f"{root}/{name}-*")
    return json.loads(fs.cat_file(f"{run}/result.json")), load(fs.cat_file(f"{run}/adapter/adapter_model.safetensors"))


def saved(name: str) -> list[int]:
    """Steps of the checkpoints that are there."""
    fs, root = storage.filesystem(STORE)
    fs.invalidate_cache()
    return [
        checkpoint.step_of(path.rsplit("/", 1)[0]) for path in fs.glob(f"{root}/{name}-*/checkpoints/*/trainer.json")
    ]


def with_a_worker(nodes: list[Node]) -> list[Node]:
    """The nodes on which a training worker runs."""
    return [n for n in nodes if any(map(trains, n.processes()))]


def trains(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # it ended while it was looked at
        return process.status() != psutil.STATUS_ZOMBIE and "RayTrainWorker" in " ".join(process.cmdline())
    return False


def follow(url: str, job: str) -> dict[str, Any]:
    """A job's end, and what it has shown."""
    done = hyperlora("logs", job, "--follow", "--address", url)
    return {"exit": done.returncode, "shown": done.stdout + done.stderr}


def test_more_than_the_cluster_can_give_is_refused_when_it_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    path = write(tmp_path, "large", {"storage_uri": str(tmp_path), "num_workers": 4, "gpus_per_worker": 1})
    words = ["submit", "train", str(path), "mlflow.enabled=false", "--address", cluster.url]
    done = hyperlora(*words)
    assert done.returncode == 2
    message = " ".join(done.stderr.split())
    assert "2 problems" in message
    assert "4 workers need 4 CPUs, the cluster has 3" in message
    assert "4 workers need 4 GPUs, the cluster has 0" in message
    done = hyperlora(*words, "ray.num_workers=1", "ray.gpus_per_worker=0", "ray.cpus_per_worker=2")
    assert "ray.cpus_per_worker: got 2.0; at most the 1 CPUs of the largest node" in " ".join(done.stderr.split())
    listing = tmp_path / "jobs.json"
    assert hyperlora("jobs", "--address", cluster.url, "--json", str(listing)).returncode == 0
    assert json.loads(listing.read_text()) == []


TIMES = """
import json, sys
from hyperlora import jobs
print(json.dumps({j.submission_id: [j.start_time, j.end_time] for j in jobs.listed(jobs.connect(sys.argv[1]))}))
"""


@pytest.fixture(scope="module")
def two_jobs(
    cluster: Cluster, places: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What came of two jobs of the same recipe at once, one with a worker more than the other, undisturbed."""
    folder = tmp_path_factory.mktemp("jobs")
    found = []
    for name, workers in (("one", 1), ("two", 2)):
        path = write(folder, name, places | {"num_workers": workers}, steps=STEPS)
        found.append(submit(cluster.url, folder, "train", str(path), "--no-follow")["job_id"])
    listing = folder / "jobs.json"
    ends = [follow(cluster.url, job) for job in found]
    assert [e["exit"] for e in ends] == [0, 0], ends
    assert hyperlora("jobs", "--address", cluster.url, "--json", str(listing)).returncode == 0
    ended = {j["job_id"]: j["status"] for j in json.loads(listing.read_text())}
    assert {job: ended[job] for job in found} == dict.fromkeys(found, "SUCCEEDED")
    done = subprocess.run(
        [sys.executable, "-c", TIMES, cluster.url], env=os.environ | TOKEN, capture_output=True, text=True, check=True
    )
    times = json.loads(done.stdout.splitlines()[-1])
    (start, end), (other_start, other_end) = (times[job] for job in found)
    assert max(start, other_start) < min(end, other_end), "they were to run at once"
    return [dict(zip(("result", "adapter"), outcome(STORE, name), strict=True)) for name in ("one", "two")]


def test_the_doctor_tries_every_node(cluster: Cluster, places: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, "doctor", places)
    summary = tmp_path / "doctor.json"
    done = hyperlora("doctor", str(path), "--address", cluster.url, "--json", str(summary))
    assert done.returncode == 0, done
    names = [check["name"] for check in json.loads(summary.read_text())["checks"]]
    assert sum(bool(re.fullmatch("node [^,]+, shared storage", name)) for name in names) == 3, names
    assert len(re.findall(r"ok\s+node [^,\n]+: the same versions as here", done.stdout)) == 3, done
    assert done.stdout.count("written and read in") == 5, "here, in the job, and on every node"
    assert done.stdout.count(": a run written in") == 5
    assert len(re.findall(r"ok\s+node [^,\n]+, shared storage: what the job wrote is there", done.stdout)) == 3, done


def told(cluster: Cluster, secret: str) -> list[str]:
    """Where a cluster shows a value: its files, and what it answers of jobs, actors and workers."""
    # It passes over files that Ray removes meanwhile.
    folders = [node.folder for node in (cluster.head, *cluster.nodes)]
    command = ["grep", "-rlsF", f"--exclude={GIVEN}", secret, *folders]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()
    headers = {"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"}
    for of in ("jobs/", "v0/jobs?detail=true", "v0/actors?detail=true", "v0/workers?detail=true"):
        answer = requests.get(f"{cluster.url}/api/{of}", headers=headers, timeout=60)
        answer.raise_for_status()
        found += [of] if secret in answer.text else []
    return found


def test_the_quickstart_trains_as_in_one_process(cluster: Cluster, places: dict[str, Any], tmp_path: Path) -> None:
    """The shipped recipe, a few steps of it, with variables of here that only its own processes see."""
    fewer = ["training.steps=4", "training.checkpoint_every=2", "data.train_rows=64", "data.eval_rows=4"]
    words = ["train", "quickstart", *fewer]
    # Ray's own clients would follow these, whatever address they are told.
    others = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "RAY_ADDRESS": "127.0.0.1:1"}
    given = {"STORE_KEY": "topsecret", "HYPERLORA_CACHE": str(tmp_path / "cache")}
    kept = [f"storage.uri={STORE}", f"mlflow.tracking_uri={places['tracking_uri']}"]
    names = ",".join([*given, *places["env"]])
    done = submit(cluster.url, tmp_path, *words, *kept, "--env", names, **given, **others)
    assert (done["exit"], done["status"]) == (0, "SUCCEEDED"), done["shown"]
    assert done["job_id"] in done["shown"]
    assert "held-out exact match" in done["shown"]
    assert "topsecret" not in str(done)
    assert told(cluster, "topsecret") == []
    files = Path(cluster.head.folder).glob(f"session_2*/runtime_resources/working_dir_files/*/{GIVEN}")
    (there,) = (file for file in files if "topsecret" in file.read_text())
    assert given.items() <= json.loads(there.read_text()).items()
    assert there.stat().st_mode & 0o777 == 0o600
    # Command and workers keep rows where the job says, not where the nodes do.
    (rows,) = (p.name for p in Path(tmp_path, "cache/rows").iterdir() if p.is_dir())
    assert storage.exists(f"{STORE}/rows/{rows}/rows.json")
    assert not [n for n in (cluster.head, *cluster.nodes) if Path(n.folder, "cache/rows", rows).exists()]
    remote, _ = outcome(STORE, "quickstart")
    assert (remote["workers"], len(remote["losses"])) == (2, 4)
    tracked = MlflowClient(places["tracking_uri"]).get_run(remote["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["loss"] == remote["losses"][-1]
    alone = [f"storage.uri={tmp_path / 'runs'}", "mlflow.enabled=false", "ray.backend=local", "ray.num_workers=1"]
    assert main([*words, *alone]) == 0
    local, _ = outcome(str(tmp_path / "runs"), "quickstart")
    assert remote["losses"] == pytest.approx(local["losses"], abs=1e-4)
    assert remote["modules"] == local["modules"]
    listed = hyperlora("jobs", "--address", cluster.url)
    assert re.search(rf"{done['job_id']}\s+SUCCEEDED", listed.stdout), listed
    assert "topsecret" not in listed.stdout
    summary = tmp_path / "logs.json"
    shown = hyperlora("logs", done["job_id"], "--address", cluster.url, "--json", str(summary)).stdout
    assert "held-out exact match" in shown
    known = json.loads(summary.read_text())
    assert (known["job_id"], known["status"]) == (done["job_id"], "SUCCEEDED")
    assert "held-out exact match" in known["logs"]


def test_two_jobs_share_the_cluster(two_jobs: list[dict[str, Any]]) -> None:
    one, two = (job["result"] for job in two_jobs)
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
    assert one["modules"] == two["modules"]


def test_a_node_dies_and_the_run_ends_with_the_same_adapter(
    cluster: Cluster, places: dict[str, Any], two_jobs: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = write(tmp_path, "fixed", places | {"placement": "STRICT_SPREAD"}, steps=STEPS, checkpoint_every=5)
    job = submit(cluster.url, tmp_path, "train", str(path), "--no-follow")
    wait_until(lambda: len(saved("fixed")) >= 2, 180)
    victim = with_a_worker(cluster.nodes)[0]
    victim.kill()
    cluster.nodes.remove(victim)
    (uri,) = (f"{STORE}/{run.removesuffix('/run.json')}" for run in storage.glob(STORE, "fixed-*/run.json"))
    kept = checkpoint.load(checkpoint.committed(uri)[-1]).trainer["step_seconds"]
    done = follow(cluster.url, job["job_id"])
    assert done["exit"] == 0, done["shown"]
    result, adapter = outcome(STORE, "fixed")
    assert result["workers"] == 2
    assert done["shown"].count("loading model and data") == 2, "the run did not notice that a node died"
    assert len(kept) >= 5
    assert result["step_seconds"][: len(kept)] == kept, "no step of the checkpoint was taken twice"
    whole, expected = two_jobs[1]["result"], two_jobs[1]["adapter"]
    assert result["losses"] == whole["losses"]
    assert adapter.keys() == expected.keys()
    assert all(adapter[k].equal(expected[k]) for k in expected)
    client = MlflowClient(places["tracking_uri"])
    (run,) = client.search_runs(["1"], "attributes.run_name LIKE 'fixed-%'")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(m.step for m in history) == list(range(1, STEPS + 1)), "each once"

    # What is left holds one worker beside the head's: the elastic run goes on with one when that node goes as well, now
    # with a notice, as a cloud takes back a machine. Its only checkpoint is of the step at which the notice came.
    path = write(tmp_path, "elastic", places | {"num_workers": [1, 2]}, steps=STEPS, checkpoint_every=1000)
    job = submit(cluster.url, tmp_path, "train", str(path), "--no-follow")
    (last,) = cluster.nodes
    wait_until(lambda: with_a_worker([last]), 180)
    last.drain()
    (step,) = wait_until(lambda: saved("elastic"), 180)
    last.kill()
    cluster.nodes.remove(last)
    done = follow(cluster.url, job["job_id"])
    assert done["exit"] == 0, done["shown"]
    elastic, _ = outcome(STORE, "elastic")
    assert done["shown"].count("loading model and data") == 2
    assert 1 <= step < STEPS
    assert elastic["workers"] == 1
    assert elastic["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    assert elastic["modules"] == whole["modules"]


def test_a_node_joins_and_the_run_goes_on_with_its_worker_as_well(
    cluster: Cluster, places: dict[str, Any], tmp_path: Path
) -> None:
    while cluster.nodes:
        cluster.nodes.pop().kill()
    path = write(tmp_path, "growing", places | {"num_workers": [1, 2]}, steps=10_000, checkpoint_every=20)
    job = submit(cluster.url, tmp_path, "train", str(path), "--no-follow")
    wait_until(lambda: saved("growing"), 180)
    cluster.nodes.append(Node(1, cluster.head.address))
    wait_until(lambda: with_a_worker(cluster.nodes), 150)
    before = max(saved("growing"))
    wait_until(lambda: max(saved("growing")) > before, 120)
    stopped = hyperlora("stop", job["job_id"], "--address", cluster.url)
    assert stopped.returncode == 0, stopped
    assert stopped.stdout.count("loading model and data") == 2
    (uri,) = (f"{STORE}/{run.removesuffix('/run.json')}" for run in storage.glob(STORE, "growing-*/run.json"))
    steps = checkpoint.load(checkpoint.committed(uri)[-1]).trainer
    assert len(steps["step_seconds"]) == steps["step"] > before, "each once"
