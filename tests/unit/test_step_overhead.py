"""What a step costs in operations: a constant above LoRA, all of it in the optimizer's step."""

from __future__ import annotations

import pytest

from benchmarks.step_overhead import count_methods
from hyperlora import HypernetworkSpec

NAMES = ("lora", "adalora", "hyperadalora")


@pytest.fixture(scope="module")
def counts() -> dict[int, dict[str, dict[str, int]]]:
    small = HypernetworkSpec(hidden_size=24, heads=2)
    return {layers: count_methods(layers, NAMES, small) for layers in (2, 8)}


@pytest.mark.parametrize("method", NAMES[1:])
def test_forward_and_backward_are_loras(counts, method: str) -> None:
    for of in counts.values():
        assert of[method]["forward"] == of["lora"]["forward"]
        assert of[method]["backward"] == of["lora"]["backward"]


@pytest.mark.parametrize("method", NAMES[1:])
def test_a_step_takes_at_most_800_operations_more(counts, method: str) -> None:
    for of in counts.values():
        assert of[method]["total"] - of["lora"]["total"] <= 800


@pytest.mark.parametrize("method", NAMES[1:])
def test_more_layers_cost_no_more_operations(counts, method: str) -> None:
    """What grows with the modules is views alone: operations proper are batched over modules of equal shape."""
    proper = {layers: of[method]["step"] - of[method]["views"] for layers, of in counts.items()}
    lora = {layers: of["lora"]["step"] - of["lora"]["views"] for layers, of in counts.items()}
    assert proper[8] - proper[2] <= lora[8] - lora[2]


@pytest.mark.parametrize("method", NAMES[1:])
def test_the_host_reads_nothing(counts, method: str) -> None:
    for of in counts.values():
        assert of[method]["reads"] == 0
