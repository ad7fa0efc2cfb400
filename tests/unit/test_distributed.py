"""What the driver makes of Ray; no Ray is started."""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch.distributed as dist
import torch.multiprocessing as mp
from nodes import wait_until
from processes import FORKSERVER
from ray.train import WorkerGroupError
from ray.util.queue import Empty

from hyperlora import capacity, distributed, storage
from hyperlora.capacity import Group, Growth, Node
from hyperlora.config import RecipeError
from hyperlora.environment import changed
from hyperlora.ownership import ReplacedError
from hyperlora.training import RunInfo, Silent, World, train
from pipelines.common import load_recipe


@pytest.mark.parametrize("first", [ReplacedError("taken over"), ValueError("no such\nthing")])
def test_a_run_that_was_taken_over_ends_as_that_and_not_as_a_failure(first: Exception) -> None:
    error = pickle.loads(pickle.dumps(WorkerGroupError("", {1: RuntimeError("connection lost"), 0: first})))
    found = distributed._failure(error)
    if isinstance(first, ReplacedError):
        assert isinstance(found, ReplacedError)
        assert str(found) == "taken over"
    else:
        assert type(found) is RuntimeError
        told = ("worker 0: ValueError: no such", "worker 1: RuntimeError: connection lost")
        assert str(found).split("\n  ") == ["training failed on the workers", *told]


@pytest.mark.parametrize("limit", [None, Growth([Group("cpu", {"CPU": 1}, 2)])])
@pytest.mark.parametrize(("trials", "key"), [(True, "--concurrency"), (False, "ray.cpus_per_worker")])
def test_too_little_room_is_told_by_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trials: bool, key: str, limit: Growth | None
) -> None:
    """Also where an autoscaler may add what is missing, and nobody knows how far it goes."""
    monkeypatch.setattr(distributed, "living", lambda: [Node({"CPU": 1}, {capacity.GROUP: "cpu"})])
    monkeypatch.setattr(distributed, "growth", lambda: limit)
    recipe = load_recipe("quickstart", ["ray.num_workers=4"])
    with nullcontext() if limit is None else pytest.raises(RecipeError) as caught:
        distributed._check_resources(recipe, trials=trials)
    told = caplog.messages if limit is None else [str(p) for p in caught.value.problems]
    assert [text.removeprefix("waiting for nodes that an autoscaler adds: ").split(": ")[0] for text in told] == [key]


class Phases(Silent):
    """Keeps their names."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def phase(self, name: str) -> None:
        self.told.append(name)


def test_a_run_that_was_taken_over_loads_no_model(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["data.train_rows=64", "data.eval_rows=8", "mlflow.enabled=false"])
    storage.write(f"{tmp_path}/owners/00000002-00c0ffee.json", b"{}")
    phases = Phases()
    with pytest.raises(ReplacedError, match="taken over by another process"):
        train(recipe, RunInfo(str(tmp_path), owner="00000001-00c0ffee"), World(), phases)
    assert phases.told == []


@pytest.mark.parametrize("before", [None, "http://other:8265"])
def test_variables_are_afterwards_what_they_were(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = distributed.DASHBOARD
    monkeypatch.delenv(second, raising=False)
    monkeypatch.delenv(first, raising=False)
    if before is not None:
        monkeypatch.setenv(first, before)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here:6379"))

    def now() -> list[str | None]:
        return [os.environ.get(name) for name in (first, second)]

    with distributed._known_to_helpers():
        assert now() == ["", "here:6379"]
        with suppress(KeyError), changed({first: "http://inner:8265"}):
            assert now() == ["http://inner:8265", "here:6379"]
            os.environ.pop(first)
            raise KeyError
        assert now() == ["", "here:6379"]
    assert now() == [before, None]


def lacks_room(rank: int, folder: str) -> None:
    """A worker of two, on whose machine there is no room for rows if it is the second."""
    os.environ["HYPERLORA_CACHE"] = f"{folder}/cache" if rank == 0 else "/proc/none"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    recipe = load_recipe("quickstart", ["data.train_rows=64", "data.eval_rows=8", "mlflow.enabled=false"])
    try:
        train(recipe, RunInfo(f"{folder}/run"), World(rank, 2, dist.group.WORLD))
    except Exception as error:
        Path(folder, f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def test_what_one_worker_cannot_do_ends_all_with_its_reason() -> None:
    """Otherwise the others wait for it until the process group's patience ends, and nobody says why."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(lacks_room, (folder,), nprocs=2, start_method=FORKSERVER.get_start_method())
        told = [Path(folder, f"{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith("RecipeError: 1 problem")
    assert "a folder with room for the tokenised rows in HYPERLORA_CACHE" in told[0]


class Orders(queue.Queue[str]):
    """In the place of Ray's queue."""

    def get(self, block: bool = True, timeout: float | None = None) -> str:
        try:
            return super().get(block, timeout)
        except queue.Empty as error:
            raise Empty from error


def test_a_run_that_is_to_stop_is_ended_once_nobody_is_there_to_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has taken the order may die, and then it is for the next one, if there is room for that."""
    killed: list[Any] = []
    monkeypatch.setattr(distributed, "UNHEARD", 3.0)
    monkeypatch.setattr(ray, "kill", killed.append)
    orders: Any = Orders()
    notice, trainer, over = SimpleNamespace(given=lambda: True), SimpleNamespace(controller="it"), threading.Event()
    driver = threading.Thread(target=distributed._order, args=(notice, orders, trainer, over))
    first = distributed._Order(orders)
    driver.start()
    try:
        wait_until(first.given, 20)
        first.close()
        second = distributed._Order(orders)
        wait_until(second.given, 20)
        time.sleep(5)
        assert not killed, "a worker that takes minutes for its checkpoint is left alone"
        second.close()
        wait_until(lambda: killed == ["it"], 20)
    finally:
        over.set()
        driver.join()
