"""What the driver makes of Ray; no Ray is started."""

from __future__ import annotations

import os
import pickle
import queue
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from nodes import wait_until
from ray.train import WorkerGroupError
from ray.util.queue import Empty

from hyperlora import distributed
from hyperlora.environment import changed
from hyperlora.ownership import ReplacedError


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
