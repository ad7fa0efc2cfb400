"""A cluster whose autoscaler really adds nodes: what it can give is waited for, more is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from conftest import small_recipe
from nodes import TOKEN, Cluster, hyperlora, submit, wait_until


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head of one CPU that may get one more node of one CPU."""
    found = Cluster(1, grows={"small": {"resources": {"CPU": 1}, "max_workers": 1}})
    try:
        yield found
    finally:
        found.kill()


def test_what_the_autoscaler_can_give_is_waited_for_and_more_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "grow.yaml"
    recipe = small_recipe(tmp_path) | {"name": "grow", "ray": {"backend": "ray"}}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    beyond = "4 workers need 4 CPUs, the cluster can have 2"
    refused = hyperlora("submit", "train", str(path), "ray.num_workers=4", "--address", cluster.url)
    assert refused.returncode == 2, refused
    assert beyond in " ".join(refused.stderr.split())
    fits = submit(cluster.url, tmp_path, "train", str(path), "ray.num_workers=2", "--no-follow")
    assert "waits for nodes that an autoscaler adds: ray.cpus_per_worker: got 1; 2 workers need 2 CPUs" in fits["shown"]
    # The job asks again when it starts, and then the autoscaler; what it adds here shares the head's folder, in which
    # a job does not live long.
    wait_until(lambda: len(living(cluster)) == 2, 120)


def living(cluster: Cluster) -> list[dict[str, Any]]:
    """The cluster's living nodes, as the dashboard tells."""
    headers = {"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"}
    answer = requests.get(f"{cluster.url}/api/v0/nodes?detail=1", headers=headers, timeout=30).json()
    return [n for n in answer["data"]["result"]["result"] if n["state"] == "ALIVE"]
