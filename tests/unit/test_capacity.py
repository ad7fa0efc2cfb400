"""Asking for more than a cluster can ever give is found out from its nodes."""

from __future__ import annotations

from typing import Any

import pytest

from hyperlora import capacity
from hyperlora.capacity import Node
from hyperlora.config import RayConfig

NODES = [
    Node({"CPU": 4, "memory": 1e9}),
    Node({"CPU": 8, "GPU": 2, "accelerator_type:L4": 1}),
    Node({"CPU": 8, "GPU": 2, "accelerator_type:L4": 1}),
]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_workers": 20},
        {"num_workers": 4, "gpus_per_worker": 1, "accelerator_type": "L4"},
        {"num_workers": (4, 64), "gpus_per_worker": 1},
        {"num_workers": 2, "gpus_per_worker": 1, "placement": "STRICT_SPREAD"},
        {"num_workers": 2, "gpus_per_worker": 1, "placement": "STRICT_PACK"},
        {"num_workers": 8, "gpus_per_worker": 0.5},
    ],
)
def test_what_fits(asked: dict[str, Any]) -> None:
    assert capacity.problems(RayConfig(**asked), NODES) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_workers": 21}, "ray.cpus_per_worker: got 1; 21 workers need 21 CPUs, the cluster has 20"),
        (
            {"num_workers": 6, "gpus_per_worker": 1},
            "ray.gpus_per_worker: got 1.0; 6 workers need 6 GPUs, the cluster has 4",
        ),
        ({"gpus_per_worker": 3}, "ray.gpus_per_worker: got 3.0; at most the 2 GPUs of the largest node"),
        ({"accelerator_type": "H100"}, "ray.accelerator_type: got 'H100'; of the cluster's nodes: L4"),
        (
            {"num_workers": (3, 4), "cpus_per_worker": 6},
            "ray.num_workers: got (3, 4); the cluster's nodes hold 0, 1, 1 workers of 6 CPUs",
        ),
        (
            {"num_workers": 3, "gpus_per_worker": 1, "placement": "STRICT_PACK"},
            "ray.placement: got 'STRICT_PACK'; 3 workers on one node: the cluster's nodes hold 0, 2, 2 workers of 1 "
            "CPUs and 1 GPUs",
        ),
        (
            {"num_workers": 3, "gpus_per_worker": 1, "placement": "STRICT_SPREAD"},
            "ray.placement: got 'STRICT_SPREAD'; 3 workers on a node each: the cluster's nodes hold 0, 2, 2 workers of "
            "1 CPUs and 1 GPUs",
        ),
    ],
)
def test_what_does_not_fit(asked: dict[str, Any], message: str) -> None:
    assert [str(p) for p in capacity.problems(RayConfig(**asked), NODES)] == [message]


def test_an_autoscaler_may_start_what_is_not_there() -> None:
    assert not capacity.may_grow(NODES)
    assert capacity.may_grow([*NODES, Node({"CPU": 1}, {"ray.io/node-group": "head"})])
