"""The loop under a real Ray: two workers compute what one process computes, and survive being killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import psutil
import pytest
import ray
import yaml
from conftest import small_recipe
from nodes import wait_until
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file

from hyperlora import checkpoint, distributed, storage
from hyperlora.ownership import Lease, ReplacedError
from hyperlora.training import RunInfo, Silent
from pipelines.cli import main
from pipelines.common import load_recipe

TWO = ("ray.backend=ray", "ray.num_workers=2")
STEPS = "training.steps=160"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests of this file; the command uses a Ray that runs already."""
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=True, log_to_driver=False)
    yield
    ray.shutdown()


def run(recipe: Path, *changes: str) -> dict:
    summary = recipe.parent / "summary.json"
    assert main(["train", str(recipe), *changes, "--json", str(summary)]) == 0
    result = json.loads(summary.read_text())
    whole = json.loads((Path(result["adapter"]).parent / "result.json").read_text())
    return result | {key: whole[key] for key in ("losses", "step_seconds")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one process comes to in :data:`STEPS` steps."""
    recipe = tmp_path_factory.mktemp("alone") / "small.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(recipe.parent)), encoding="utf-8")
    return run(recipe, STEPS)


@pytest.fixture(scope="module")
def whole(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two workers that nothing disturbs come to."""
    recipe = tmp_path_factory.mktemp("whole") / "small.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(recipe.parent)), encoding="utf-8")
    return run(recipe, STEPS, "training.checkpoint_every=20", *TWO)


def same_bytes(whole: dict, again: dict) -> None:
    """A run that was killed comes to what the undisturbed one comes to, bit for bit."""
    assert again["losses"] == whole["losses"]
    assert again["ranks"] == whole["ranks"]
    one, other = (Path(r["adapter"]) / "adapter_model.safetensors" for r in (whole, again))
    assert one.read_bytes() == other.read_bytes()


def same(alone: dict, several: dict) -> None:
    """Several workers come to what one process comes to."""
    assert several["losses"] == pytest.approx(alone["losses"], abs=1e-6)
    assert max(alone["losses"]) - min(alone["losses"]) > 0.01
    assert several["metric_after"] == alone["metric_after"]
    assert several["ranks"] == alone["ranks"]
    one, other = (load_file(Path(r["adapter"]) / "adapter_model.safetensors") for r in (alone, several))
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 1e-6, name


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("changes", "workers", "found"),
    [
        (("method=hyperadalora", "adapter.factorization=triplet", "gamma=0.1"), "2", 2),
        (("method=dora",), "[1, 3]", 3),
    ],
    ids=["triplets", "dora"],
)
def test_several_workers_give_the_losses_of_one_process(
    recipe_file: Path, changes: tuple[str, ...], workers: str, found: int
) -> None:
    alone = run(recipe_file, *changes)
    # Three workers split eight rows unevenly.
    several = run(recipe_file, *changes, "ray.backend=ray", f"ray.num_workers={workers}")
    assert (alone["workers"], several["workers"]) == (1, found)
    same(alone, several)


def test_a_killed_worker_is_replaced_and_the_run_ends_the_same(recipe_file: Path, alone: dict, whole: dict) -> None:
    same(alone, whole)
    runs = recipe_file.parent / "runs"
    process = subprocess.Popen([sys.executable, "-c", KILLER, str(runs)], stdout=subprocess.PIPE, text=True)
    again = run(recipe_file, STEPS, "training.checkpoint_every=20", *TWO)
    told, _ = process.communicate(timeout=300)
    kept = json.loads(told)
    assert again["step_seconds"][: len(kept)] == kept, "no step of the checkpoint was taken twice"
    assert len(kept) >= 20
    same_bytes(whole, again)


# Waits for the run's first checkpoint, then kills one of the Ray Train workers of the test that started this; tells the
# times of the steps in the checkpoint.
KILLER = """
import json, os, pathlib, signal, sys, time
import psutil
from hyperlora import checkpoint
runs = pathlib.Path(sys.argv[1])
deadline = time.monotonic() + 240
while time.monotonic() < deadline:
    if any(runs.glob("*/checkpoints/*/COMMIT")):
        try:
            processes = [(p, " ".join(p.cmdline())) for p in psutil.Process(os.getppid()).children(recursive=True)]
            workers = [(p, line) for p, line in processes if "RayTrainWorker" in line]
            busy = [p for p, line in workers if "execute" in line or p.cpu_times().user > 1]
        except psutil.Error:
            continue  # one ended while it was looked at
        if busy:
            os.kill(busy[-1].pid, signal.SIGKILL)
            (run,) = runs.glob("small-*")
            print(json.dumps(checkpoint.load(checkpoint.committed(str(run))[-1]).trainer["step_seconds"]))
            break
    time.sleep(0.02)
"""


class TakenOver(Silent):
    """Another process claims the run's folder once there is a step."""

    def __init__(self, uri: str) -> None:
        self._uri, self.phases, self._done = uri, [], False

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if not self._done:
            self._done = True
            storage.write(f"{self._uri}/owners/00000009-00c0ffee.json", b"{}")


@pytest.mark.usefixtures("cluster")
def test_a_run_that_was_taken_over_is_not_started_again(recipe_file: Path, tmp_path: Path) -> None:
    """Nor does the second worker wait for the first, which alone finds out."""
    uri = str(tmp_path / "runs/small")
    recipe = load_recipe(str(recipe_file), [*TWO, "training.steps=100000", "ray.max_failures=20"])
    sink, before = TakenOver(uri), len(placement_group_table())
    with Lease(uri) as lease, pytest.raises(ReplacedError, match="taken over by another process"):
        distributed.run(recipe, RunInfo(uri, owner=lease.owner), sink)
    assert sink.phases.count("loading model and data") == 1
    # Ray may have begun to start them again when it heard that there is no need to.
    assert len(placement_group_table()) - before <= 2
    wait_until(lambda: ray.available_resources().get("CPU") == 4, 60)


@pytest.mark.usefixtures("cluster")
def test_errors_of_workers_reach_the_user(recipe_file: Path, capfd: pytest.CaptureFixture) -> None:
    changes = ["optimizer.lr=1e200", "optimizer.warmup=0", "optimizer.max_grad_norm=null", "method=adalora"]
    assert main(["train", str(recipe_file), *changes, *TWO]) == 1
    message = capfd.readouterr().err
    assert "the step was not taken and the last checkpoint is kept" in message
    assert "Traceback" not in message


@pytest.mark.usefixtures("cluster")
def test_warnings_of_workers_reach_the_user_once(recipe_file: Path, capsys: pytest.CaptureFixture) -> None:
    changes = ["model.path=builtin:storylm", "model.init=pretrained", "training.steps=20", "optimizer.lr=1"]
    # Gradients explode where the hypernetworks, too, move at every step.
    result = run(recipe_file, *changes, "optimizer.warmup=0.9", "hypernetwork.every=1", *TWO)
    (warning,) = result["warnings"]
    assert warning["monitor"] == "gradient"
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("training on CPUs: ray.gpus_per_worker is 0 (GPUs that stay idle: 1)") == 1
    assert out.count("warning (gradient): gradient norm") == 1
    assert f"warning, step {warning['step']} gradient: gradient norm" in out


@pytest.mark.usefixtures("cluster")
def test_more_than_the_cluster_has(recipe_file: Path, capfd: pytest.CaptureFixture) -> None:
    changes = ["ray.cpus_per_worker=3", "ray.gpus_per_worker=1"]
    assert main(["train", str(recipe_file), *changes, *TWO]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "ray.cpus_per_worker: got 3.0; 2 workers need 6 CPUs, the cluster has 4" in message
    assert "ray.gpus_per_worker: got 1.0; 2 workers need 2 GPUs, the cluster has 1" in message


def test_killed_with_its_whole_cluster_a_run_resumes_to_the_same_bits(recipe_file: Path, whole: dict) -> None:
    """Everything dies at once: driver, Ray and workers. The next command goes on from the last checkpoint.

    The first shows what Ray says, which it does not without ``-v``: the quickstart's test.
    """
    changes = (STEPS, "training.checkpoint_every=20")
    runs = recipe_file.parent / "runs"
    arguments = [sys.executable, "-m", "pipelines.cli", "train", str(recipe_file), *changes, *TWO, "-v"]
    shown = recipe_file.parent / "shown"
    with shown.open("wb") as file:
        process = subprocess.Popen(arguments, start_new_session=True, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 300
        while not any(runs.glob("*/checkpoints/*/COMMIT")):
            assert process.poll() is None, shown.read_text()
            assert time.monotonic() < deadline, "no checkpoint in five minutes"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (killed,) = runs.glob("small-*")
    kept = checkpoint.load(checkpoint.committed(str(killed))[-1]).trainer["step_seconds"]
    said = shown.read_text()
    assert "Started a local Ray instance" in said
    assert "(RayTrainWorker pid=" in said or "(TrainController pid=" in said
    resumed = run(recipe_file, *changes, *TWO, "--resume")
    assert resumed["step_seconds"][: len(kept)] == kept, "no step of the checkpoint was taken twice"
    same_bytes(whole, resumed)


def test_sigterm_of_the_driver_saves_a_checkpoint_on_the_workers(recipe_file: Path, alone: dict) -> None:
    changes = (STEPS, "training.checkpoint_every=1000")
    runs = recipe_file.parent / "runs"
    arguments = [sys.executable, "-m", "pipelines.cli", "train", str(recipe_file), *changes, *TWO]
    process = subprocess.Popen(
        arguments, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if (shown := re.search(r"step (\d+)/160", line)) and int(shown[1]) > 1:
            break
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, message
    (new,) = runs.glob("small-*")
    (saved,) = new.glob("checkpoints/*/trainer.json")
    step = json.loads(saved.read_text())["step"]
    assert 1 < step < 160
    assert f"told to stop after step {step} of 160; the last checkpoint is {saved.parent}" in " ".join(message.split())
    # The rest runs in this process alone: another number of workers.
    resumed = run(recipe_file, *changes, "--resume")
    assert resumed["losses"] == pytest.approx(alone["losses"], abs=1e-6)
    assert resumed["ranks"] == alone["ranks"]


def test_sigterm_while_ray_starts_ends_it_with_its_processes(recipe_file: Path) -> None:
    arguments = [sys.executable, "-m", "pipelines.cli", "train", str(recipe_file)]
    process = subprocess.Popen([*arguments, *TWO], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    started: list[psutil.Process] = []
    while not started:
        assert process.poll() is None
        time.sleep(0.01)
        started = processes.below(process.pid, "gcs_server")
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, message
    assert message.strip().splitlines()[-1].startswith("interrupted; the same command with --resume goes on"), message
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
