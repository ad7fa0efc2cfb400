"""What the doctor says of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

from hyperlora import collective, diagnosis, distributed, storage, uris
from pipelines import doctor
from pipelines.common import load_recipe


@pytest.mark.parametrize(("free", "state"), [(diagnosis.SMALL_DISK - 1, "warn"), (diagnosis.SMALL_DISK, "ok")])
def test_a_disk_that_is_nearly_full_is_warned_of(
    free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> Any:
        asked.append(folder)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(diagnosis.shutil, "disk_usage", usage)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    (check,) = diagnosis.disks()
    assert (check.state, check.found) == (state, f"10 GiB free in {tmp_path}")
    assert ("RAY_TMPDIR" in check.advice) == (state == "warn")
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(diagnosis.packed, "cache", lambda: Path("/dev/shm/hyperlora/rows"))
    checks = diagnosis.disks()
    assert asked == [tmp_path, Path("/tmp"), Path("/dev/shm")], "where Ray writes, and where the rows go"
    assert ("HYPERLORA_CACHE" in checks[1].advice) == (state == "warn")


def test_a_disk_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    stat = os.statvfs(tmp_path)
    free = float(diagnosis.disks()[0].found.split()[0])
    assert free == pytest.approx(stat.f_bavail * stat.f_frsize / 2**30, abs=2)


def test_the_folder_of_ray_may_not_be_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "not/yet"))
    assert diagnosis.disks()[0].found.endswith(f" GiB free in {tmp_path}")


def test_a_node_looks_at_the_disk_that_it_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/shm")
    asked: list[Any] = []

    def each_node(function: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        asked.append(cloudpickle.loads(cloudpickle.dumps(function))(*arguments))
        return iter(())

    monkeypatch.setattr(doctor.jobs, "each_node", each_node)
    monkeypatch.setattr(distributed, "living", lambda: [])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_temp_dir=lambda: str(tmp_path / "ray")))
    words = [f"storage.uri={tmp_path}/runs", "mlflow.enabled=false"]
    list(doctor._inside(load_recipe("quickstart", words), {}, False))
    (told,) = asked
    (disk,) = (c for c in told["checks"] if c[0] == "disk")
    assert disk[2].endswith(f" GiB free in {tmp_path}")


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("s3://bucket/runs", "AWS_ENDPOINT_URL"),
        ("gs://bucket/runs", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("abfss://container/runs", "AZURE_STORAGE_CONNECTION_STRING"),
        ("gs/runs", "check the path"),
    ],
)
def test_a_store_that_fails_has_advice_of_its_own(uri: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise storage.StorageError(uri, "it does not answer", transient=True)

    monkeypatch.setattr(storage, "write", fail)
    monkeypatch.setattr(storage, "remove", fail)
    monkeypatch.setattr(uris, "problem", lambda *_, **__: None)  # whatever packages this machine has
    (check,) = diagnosis.store(uri)
    assert check.state == "fail"
    assert "it does not answer" in check.found
    assert named in check.advice


def with_gpus(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> list[Any]:
    """Two GPUs that are joined or not; what is asked of them."""
    asked: list[Any] = []

    def problem(*arguments: Any) -> str | None:
        asked.append(arguments)
        return reason

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"GPU {n}")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(collective, "problem", problem)
    return asked


def test_gpus_that_nccl_does_not_join_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_gpus(monkeypatch, "process 1 of 2: unhandled system error")
    check = diagnosis.devices()
    assert asked == [("nccl", 2)]
    assert check.state == "fail"
    expected = "GPU 0, GPU 1; NCCL 2.28.3 does not join them (process 1 of 2: unhandled system error)"
    assert check.found == expected
    assert "the driver" in check.advice
    assert ("device", "fail", expected) in [c[:3] for c in diagnosis.node()["checks"]], "on every node of a cluster"


def test_gpus_that_nccl_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, None)
    check = diagnosis.devices()
    assert (check.state, check.found) == ("ok", "GPU 0, GPU 1, joined by NCCL 2.28.3")
