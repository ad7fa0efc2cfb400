"""Asking for more than a cluster can ever give is found out from its nodes."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from hyperlora import capacity
from hyperlora.capacity import Group, Growth, Node
from hyperlora.config import RayConfig, worker_problems

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
        {"num_workers": 20, "gpus_per_worker": 0.2, "cpus_per_worker": 0.5},
        {"num_workers": 30, "cpus_per_worker": 0.1},
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
        ({"cpus_per_worker": 9}, "ray.cpus_per_worker: got 9.0; at most the 8 CPUs of the largest node"),
        ({"accelerator_type": "H100"}, "ray.accelerator_type: got 'H100'; of the cluster's nodes: L4"),
        (
            {"num_workers": (3, 4), "cpus_per_worker": 6},
            "ray.num_workers: got (3, 4); the cluster's 3 nodes hold 0, 1, 1 workers of 6 CPUs",
        ),
        (
            {"num_workers": 3, "gpus_per_worker": 1, "placement": "STRICT_PACK"},
            "ray.placement: got 'STRICT_PACK'; 3 workers on one node: the cluster's 3 nodes hold 0, 2, 2 workers of 1 "
            "CPUs and 1 GPUs",
        ),
        (
            {"num_workers": 3, "gpus_per_worker": 1, "placement": "STRICT_SPREAD"},
            "ray.placement: got 'STRICT_SPREAD'; 3 workers on a node each: the cluster's 3 nodes hold 0, 2, 2 workers "
            "of 1 CPUs and 1 GPUs",
        ),
    ],
)
def test_what_does_not_fit(asked: dict[str, Any], message: str) -> None:
    assert [str(p) for p in capacity.problems(RayConfig(**asked), NODES)] == [message]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_workers": 5, "gpus_per_worker": 1},
            "--concurrency: got 5; the number of trials at a time, one worker each: 5 workers need 5 GPUs, the cluster "
            "has 4",
        ),
        (
            {"num_workers": 3, "cpus_per_worker": 6},
            "--concurrency: got 3; the number of trials at a time, one worker each: the cluster's 3 nodes hold 0, 1, 1 "
            "workers of 6 CPUs",
        ),
        # One alone would not fit.
        ({"num_workers": 3, "cpus_per_worker": 9}, "ray.cpus_per_worker: got 9.0; 3 workers need 27 CPUs"),
        ({"num_workers": 2, "accelerator_type": "H100"}, "ray.accelerator_type: got 'H100'; of the cluster's nodes"),
    ],
)
def test_too_many_trials_at_a_time_are_the_fault_of_their_number(asked: dict[str, Any], message: str) -> None:
    settings = RayConfig(**asked)
    (found,) = capacity.of_trials(capacity.problems(settings, NODES), settings.fewest)
    assert str(found).startswith(message)
    assert capacity.of_trials(capacity.problems(RayConfig(gpus_per_worker=1), NODES), 1) == []


def test_an_autoscaler_may_start_what_is_not_there() -> None:
    assert not capacity.may_grow(NODES)
    assert capacity.may_grow([*NODES, Node({"CPU": 1}, {"ray.io/node-group": "head"})])


SMALL = Group("small", {"CPU": 4}, 10)
GPUS = Group("gpu", {"CPU": 8, "GPU": 1}, 4)
L4S = Group("l4", {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}, 4)
HEAD = Node({"CPU": 2}, {"ray.io/node-group": "head"})
#: All that three of the small group are now.
BUSY = [HEAD, *[Node({"CPU": 4}, {"ray.io/node-group": "small"})] * 3]


@pytest.mark.parametrize(
    ("asked", "growth", "message"),
    [
        ({"num_workers": 4, "gpus_per_worker": 1}, Growth([SMALL, GPUS]), None),
        (
            {"num_workers": 5, "gpus_per_worker": 1},
            Growth([SMALL, GPUS]),
            "ray.gpus_per_worker: got 1.0; 5 workers need 5 GPUs, the cluster can have 4",
        ),
        ({"cpus_per_worker": 9}, Growth([GPUS]), "got 9.0; at most the 8 CPUs of the largest node"),
        # Three small nodes live, of four in all; when they are idle they make room for the others.
        ({"num_workers": 4, "gpus_per_worker": 1}, Growth([SMALL, GPUS], most=4), None),
        (
            {"num_workers": 4, "gpus_per_worker": 1},
            Growth([SMALL, GPUS], most=3),
            "ray.gpus_per_worker: got 1.0; 4 workers need 4 GPUs, the cluster can have 3",
        ),
        # What lives of a group is part of its most.
        (
            {"num_workers": 11, "cpus_per_worker": 4},
            Growth([SMALL]),
            "ray.cpus_per_worker: got 4.0; 11 workers need 44 CPUs, the cluster can have 42",
        ),
        ({"num_workers": 10, "cpus_per_worker": 4}, Growth([SMALL]), None),
        ({"num_workers": 99, "gpus_per_worker": 1}, Growth([Group("gpu", {"CPU": 8, "GPU": 1}, None)]), None),
        (
            {"num_workers": 99, "gpus_per_worker": 1},
            Growth([Group("gpu", {"CPU": 8, "GPU": 1}, None)], resources={"GPU": 64}),
            "ray.gpus_per_worker: got 1.0; 99 workers need 99 GPUs, the cluster can have 64",
        ),
        # An autoscaler knows of a node that it has not started only what the group says.
        (
            {"gpus_per_worker": 1, "accelerator_type": "L4"},
            Growth([SMALL, GPUS]),
            "ray.accelerator_type: got 'L4'; of the cluster's nodes: none has an accelerator; its autoscaler starts "
            "no gpu for it until they declare accelerator_type:L4 as a resource",
        ),
        ({"num_workers": 4, "gpus_per_worker": 1, "accelerator_type": "L4"}, Growth([L4S]), None),
        (
            {"gpus_per_worker": 1, "accelerator_type": "H100"},
            Growth([L4S]),
            "ray.accelerator_type: got 'H100'; of the cluster's nodes: L4",
        ),
        (
            {"num_workers": 5, "gpus_per_worker": 1, "placement": "STRICT_PACK"},
            Growth([Group("gpu", {"CPU": 8, "GPU": 4}, 2)]),
            "ray.placement: got 'STRICT_PACK'; 5 workers on one node: the cluster's 6 nodes can hold "
            "0, 0, 0, 0, 4, 4 workers of 1 CPUs and 1 GPUs",
        ),
    ],
)
def test_an_autoscaler_goes_so_far(asked: dict[str, Any], growth: Growth, message: str | None) -> None:
    settings = RayConfig(**asked)
    assert capacity.problems(settings, BUSY), "it does not fit as it is"
    found = [str(p) for p in capacity.problems(settings, BUSY, growth)]
    if message is None:
        assert found == []
    else:
        (text,) = found
        assert message in text


def test_what_lives_has_its_accelerator_and_says_nothing_of_the_next_node_of_its_group() -> None:
    living = Node({"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}, {"ray.io/node-group": "gpu"})
    asked = RayConfig(gpus_per_worker=1, accelerator_type="L4")
    assert capacity.problems(asked, [HEAD, living], Growth([GPUS])) == []
    several = asked.model_copy(update={"num_workers": 2})
    assert [str(p) for p in capacity.problems(several, [HEAD, living], Growth([GPUS]))] == [
        "ray.gpus_per_worker: got 1.0; 2 workers need 2 GPUs, the cluster can have 1; its autoscaler starts no gpu for "
        "it until they declare accelerator_type:L4 as a resource"
    ]
    assert capacity.trials(asked, [HEAD, living], Growth([GPUS])) == 1
    # The living one is one of the four.
    declared = Growth([Group("gpu", L4S.resources, 4)])
    assert capacity.trials(asked, [HEAD, living], declared) == 4


@pytest.mark.parametrize(
    ("asked", "trials"),
    [
        ({}, 20),
        ({"cpus_per_worker": 3}, 5),  # of 20 CPUs, but what a node has too many of helps no other
        ({"cpus_per_worker": 16}, 0),
        ({"cpus_per_worker": 0.1}, 200),
        ({"gpus_per_worker": 1}, 4),
        ({"gpus_per_worker": 1, "cpus_per_worker": 8}, 2),
        ({"gpus_per_worker": 0.2, "cpus_per_worker": 0.5}, 20),
        ({"gpus_per_worker": 0.4, "cpus_per_worker": 0.5}, 8),  # a part is of one GPU: two of each
        ({"gpus_per_worker": 0.06, "cpus_per_worker": 0.25}, 64),
        ({"gpus_per_worker": 1, "accelerator_type": "L4"}, 4),
        ({"accelerator_type": "L4"}, 16),
        ({"accelerator_type": "H100"}, 0),
        # Workers of a trial may be on several nodes, unless the recipe says otherwise.
        ({"num_workers": 3}, 6),
        ({"num_workers": (1, 3)}, 6),
        ({"num_workers": 3, "gpus_per_worker": 1}, 1),
        ({"num_workers": 3, "placement": "STRICT_PACK"}, 5),
        ({"num_workers": 3, "placement": "STRICT_SPREAD"}, 4),
        ({"num_workers": 2, "placement": "STRICT_SPREAD"}, 10),
        ({"num_workers": 4, "placement": "STRICT_SPREAD"}, 0),
        ({"num_workers": 3, "gpus_per_worker": 1, "placement": "STRICT_PACK"}, 0),
    ],
)
def test_as_many_trials_run_at_a_time_as_the_nodes_hold(asked: dict[str, Any], trials: int) -> None:
    assert capacity.trials(RayConfig(**asked), NODES) == trials


@pytest.mark.parametrize(
    ("asked", "growth", "trials"),
    [
        ({"cpus_per_worker": 4}, None, 3),
        ({"cpus_per_worker": 4}, Growth([SMALL]), 10),
        ({"gpus_per_worker": 1}, None, 0),
        ({"gpus_per_worker": 1}, Growth([SMALL, GPUS]), 4),
        ({"gpus_per_worker": 1, "num_workers": 2}, Growth([SMALL, GPUS]), 2),
        ({"gpus_per_worker": 1}, Growth([SMALL, GPUS], most=3), 3),
        ({"gpus_per_worker": 0.5}, Growth([GPUS], resources={"GPU": 1}), 2),
        ({"gpus_per_worker": 1, "num_workers": 2}, Growth([GPUS], resources={"GPU": 3}), 1),
        ({"gpus_per_worker": 1}, Growth([Group("gpu", {"CPU": 8, "GPU": 1}, None)]), capacity.UNLIMITED),
    ],
)
def test_an_autoscaler_starts_nodes_for_trials(asked: dict[str, Any], growth: Growth | None, trials: int) -> None:
    assert capacity.trials(RayConfig(**asked), BUSY, growth) == trials


@pytest.mark.parametrize(("amount", "total"), [(0.2, 1), (0.1, 1), (0.3, 3), (0.25, 1), (1, 4)])
def test_workers_of_a_fraction_are_counted_exactly_and_those_of_a_range_as_ray_counts_them(
    amount: float, total: int
) -> None:
    node, exactly = Node({"CPU": total}), round(total / amount)
    for more, fits in ((0, True), (1, False)):
        asked = RayConfig(num_workers=exactly + more, cpus_per_worker=amount)
        assert (capacity.problems(asked, [node]) == []) is fits
    scaling = ScalingConfig(num_workers=(1, exactly), resources_per_worker={"CPU": amount})
    counted = ElasticScalingPolicy(scaling)._count_possible_workers({"node": {"CPU": float(total)}})
    for fewest in range(1, exactly + 1):
        asked = RayConfig(num_workers=(fewest, exactly), cpus_per_worker=amount)
        assert (capacity.problems(asked, [node]) == []) is (fewest <= counted), "else Ray waits for ever"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus_per_worker": 0.5}, None),
        ({"num_workers": 2, "gpus_per_worker": 1}, None),
        ({"num_workers": 2, "gpus_per_worker": 0}, None),
        # Two of them are never on one GPU.
        ({"num_workers": 2, "gpus_per_worker": 0.6}, None),
        ({"num_workers": 2, "gpus_per_worker": 0.5, "placement": "STRICT_SPREAD"}, None),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, "got 0.5; above 0.5 for 2 workers: NCCL refuses two of a run on"),
        (
            {"num_workers": (1, 2), "gpus_per_worker": 0.6},
            "got 0.6; a whole number for ray.num_workers=[1, 2]: Ray add",
        ),
        (
            {"num_workers": (1, 2), "gpus_per_worker": 0.2},
            "got 0.2; a whole number for ray.num_workers=[1, 2]: Ray add",
        ),
    ],
)
def test_workers_of_one_run_share_no_gpu(asked: dict[str, Any], message: str | None) -> None:
    found = [str(p) for p in worker_problems(RayConfig(**asked))]
    assert len(found) == (message is not None)
    assert all(f"ray.gpus_per_worker: {message}" in text for text in found)


def test_ray_takes_parts_of_two_gpus_for_one_in_a_range() -> None:
    scaling = ScalingConfig(num_workers=(1, 4), use_gpu=True, resources_per_worker={"CPU": 1, "GPU": 0.6})
    room = {"node": {"CPU": 8.0, "GPU": 2.0}}
    assert ElasticScalingPolicy(scaling)._count_possible_workers(room) == 3
    assert capacity.trials(RayConfig(gpus_per_worker=0.6), [Node(room["node"])]) == 2, "all that there are places for"


def test_parts_of_two_gpus_are_no_worker() -> None:
    (problem,) = capacity.problems(RayConfig(num_workers=5, gpus_per_worker=0.4), [Node({"CPU": 8, "GPU": 2})])
    assert str(problem).startswith("ray.num_workers: got 5; the cluster's 1 nodes hold 4 workers of")
