"""The doctor finds what is broken and says what to do; on a cluster see test_submit.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import BIN, PORTS, TOKEN, Cluster, hyperlora, wait_until
from ray.util import get_node_ip_address
from s3 import free_port

from hyperlora import collective, diagnosis, distributed, tokens
from hyperlora.tracking import versions
from pipelines.cli import main


def doctor(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    summary = folder / "doctor.json"
    status = main(["doctor", *words, "--json", str(summary)])
    return status, {c["name"]: c for c in json.loads(summary.read_text())["checks"]}


def test_all_is_well(recipe_file: Path, tmp_path: Path) -> None:
    status, checks = doctor(tmp_path, str(recipe_file), "mlflow.enabled=true")
    assert status == 0
    assert {c["state"] for c in checks.values()} <= {"ok", "warn"}
    assert checks["storage"]["state"] == checks["conditional write"]["state"] == checks["MLflow"]["state"] == "ok"
    assert not list(tmp_path.glob("runs/*")), "nothing is left behind"


def test_a_database_by_a_relative_path(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, checks = doctor(tmp_path, str(recipe_file), "mlflow.enabled=true", "mlflow.tracking_uri=sqlite:///new.db")
    assert (status, checks["MLflow"]["state"]) == (0, "ok")


def test_what_is_broken_is_found(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    changes = [f"storage.uri={tmp_path}/file/runs", "mlflow.enabled=true", "mlflow.tracking_uri=http://127.0.0.1:1"]
    status, checks = doctor(tmp_path, str(recipe_file), *changes)
    assert status == 1
    assert {name for name, c in checks.items() if c["state"] == "fail"} == {"storage", "MLflow", "Ray token"}
    assert all(c["advice"] for c in checks.values() if c["state"] == "fail")


def test_nodes_that_differ() -> None:
    told = diagnosis.node()
    began, ended = told["time"]
    same = list(diagnosis.compare(versions(), told, began - 1, ended + 1, 0))
    assert same[0].found == "the same versions as here"
    assert not [c for c in same if "clock" in c.found]
    other = told | {"versions": told["versions"] | {"torch": "1.0"}}
    checks = list(diagnosis.compare(versions(), other, began + 100, ended + 101, 0))
    assert checks[0].state == "fail"
    assert "torch 1.0 (here " in checks[0].found
    assert checks[1].found == "its clock differs by 100 s"
    major, minor, patch = versions()["python"].split(".")
    for python in (f"{major}.{minor}.{int(patch) + 1}", f"{major}.{int(minor) + 1}.{patch}"):
        other = told | {"versions": told["versions"] | {"python": python}}
        (check, *_) = diagnosis.compare(versions(), other, began, ended, 0)
        assert check.state == "warn", python
    # A build for another device is no other version.
    here = versions() | {"torch": versions()["torch"].partition("+")[0]}
    other = told | {"versions": here | {"torch": f"{here['torch']}+cu130"}}
    (check, *_) = diagnosis.compare(here, other, began, ended, 0)
    assert check.state == "ok"
    # A container that its GPUs are not shown to.
    without = told | {"gpus": 1}
    found = [c.found for c in diagnosis.compare(versions(), without, began, ended, 4) if c.state == "fail"]
    assert found == ["Ray gives out 4 GPUs, torch sees 1"]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_that_come_together(processes: int) -> None:
    """The check that GPUs get from NCCL, on CPUs."""
    assert collective.problem("gloo", processes, 300) is None


def test_processes_that_do_not_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = collective.problem("nonsense", 1, 300)
    assert reason is not None
    assert reason == "process 0 of 1: AssertionError: Unknown backend type nonsense"
    # One that never comes.
    original = subprocess.Popen

    def first_alone(words: list[str], **options: Any) -> Any:
        return original(words if words[-3] == "0" else ["sleep", "1000"], **options)

    monkeypatch.setattr(collective.subprocess, "Popen", first_alone)
    assert collective.problem("gloo", 2, 3) == "nothing after 3 s"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_are_joined_by_nccl() -> None:
    check = diagnosis.devices()
    assert check.state == "ok", check
    assert "joined by NCCL" in check.found
    count = torch.cuda.device_count()
    reason = collective.problem("nccl", count + 1)
    assert reason is not None
    assert reason.startswith(f"process {count} of {count + 1}: "), reason


@pytest.fixture
def open_head() -> Iterator[tuple[str, str]]:
    """A head that asks for no token, by an address that other machines have of this one: dashboard and Ray's own."""
    ip = get_node_ip_address()
    if ip.startswith("127."):
        pytest.skip("this machine has no other address than that of itself")
    ports = {name: free_port() for name in ("port", "dashboard-port", *PORTS)}
    with tempfile.TemporaryDirectory(prefix="hl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=0", f"--temp-dir={folder}"]
        command += [f"--dashboard-host={ip}", "--object-store-memory=100000000", "--disable-usage-stats"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_")} | {"RAY_AUTH_MODE": "disabled"}
        head = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = f"http://{ip}:{ports['dashboard-port']}"
            wait_until(lambda: head.poll() is not None or tokens.warning(url), 120)
            assert head.poll() is None
            yield url, f"{ip}:{ports['port']}"
        finally:
            head.terminate()
            head.wait(60)


def test_a_cluster_that_is_open_to_all_is_warned_of(open_head: tuple[str, str]) -> None:
    url, address = open_head
    assert tokens.elsewhere(url)
    assert tokens.elsewhere(address)
    assert distributed._lets_all_in(address)
    done = hyperlora("jobs", "--address", url)  # with a token, which nobody asks for
    assert done.returncode == 0, done
    assert f"{url} is another machine and asks for no token: whoever reaches it can run any code there" in done.stdout


def test_a_node_that_does_not_share_the_storage(tmp_path: Path) -> None:
    def shared(place: str) -> list[Any]:
        return [check for check in diagnosis.node(place)["checks"] if check[0] in ("shared storage", "storage")]

    with diagnosis.mark(str(tmp_path / "runs")) as place:
        assert [check[1] for check in shared(place)] == ["ok", "ok"]
        (tmp_path / "elsewhere").mkdir()
        missing, works = shared(f"{tmp_path}/elsewhere/{place.rsplit('/', 1)[1]}")
    assert (missing[1], works[1]) == ("fail", "ok")
    assert "same place from every node" in missing[3]
    assert not list(tmp_path.glob("*/.doctor-*")), "nothing is left behind"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and a node, and a group that its autoscaler has no node of."""
    found = Cluster(1, 1, grows={"large": {"resources": {"CPU": 8}, "max_workers": 1}})
    try:
        yield found
    finally:
        found.kill()


def test_groups_of_nodes_that_are_not_there_are_named(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    summary = tmp_path / "doctor.json"
    done = hyperlora("doctor", str(recipe_file), "--address", cluster.url, "--json", str(summary))
    assert done.returncode == 0, done
    checks = [(c["name"], c["state"], c["found"]) for c in json.loads(summary.read_text())["checks"]]
    assert ("node groups", "warn", "not tried, as no node of them is there: large") in checks
    assert len([name for name, state, _ in checks if name.endswith(", disk")]) == 2, "the nodes that are there"


APART = """
import json, ray
from hyperlora import jobs
ray.init(address="auto", log_to_driver=False)
nodes = [n for n in ray.nodes() if n["Alive"]]
lost = [nodes[0], nodes[1] | {"NodeID": "0" * 56}]
print(json.dumps([jobs.apart("gloo", nodes), jobs.apart("nonsense", nodes), jobs.apart("gloo", lost)]))
"""


def test_processes_of_several_nodes_come_together(cluster: Cluster) -> None:
    """The check that nodes with GPUs get with NCCL, on CPUs."""
    env = os.environ | TOKEN | {"RAY_ADDRESS": str(cluster.head.address)}
    done = subprocess.run([sys.executable, "-c", APART], env=env, capture_output=True, text=True, check=True)
    together, nonsense, lost = json.loads(done.stdout.splitlines()[-1])
    assert together is None
    assert nonsense.endswith(" of 2: AssertionError: Unknown backend type nonsense")
    assert lost
