"""What a step costs in operations: a constant above LoRA, all of it in the optimizer's step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import step_overhead
from benchmarks.step_overhead import CountOperations, count_forms, count_methods, forms
from hyperlora import HypernetworkSpec

NAMES = ("lora", "adalora", "hyperadalora")
OURS = (*NAMES[1:], *forms())


@pytest.fixture(scope="module")
def counts() -> dict[int, dict[str, dict[str, int]]]:
    small = HypernetworkSpec(hidden_size=24, heads=2)
    return {layers: count_methods(layers, NAMES, small) | count_forms(layers) for layers in (2, 8)}


@pytest.mark.parametrize("method", OURS)
def test_forward_and_backward_are_loras(counts, method: str) -> None:
    for of in counts.values():
        assert of[method]["forward"] == of["lora"]["forward"]
        assert of[method]["backward"] == of["lora"]["backward"]


@pytest.mark.parametrize("method", OURS)
def test_a_step_takes_at_most_800_operations_more(counts, method: str) -> None:
    for of in counts.values():
        assert of[method]["total"] - of["lora"]["total"] <= 800


@pytest.mark.parametrize("method", OURS)
def test_more_layers_cost_no_more_operations(counts, method: str) -> None:
    """What grows with the modules is views alone: operations proper are batched over modules of equal shape."""
    proper = {layers: of[method]["step"] - of[method]["views"] for layers, of in counts.items()}
    lora = {layers: of["lora"]["step"] - of["lora"]["views"] for layers, of in counts.items()}
    assert proper[8] - proper[2] <= lora[8] - lora[2]


@pytest.mark.parametrize("method", OURS)
def test_the_host_reads_nothing(counts, method: str) -> None:
    for of in counts.values():
        assert of[method]["reads"] == 0


def test_waits_of_the_host_are_seen() -> None:
    numbers = torch.arange(4)
    with CountOperations() as counted:
        numbers.sum().item()
        numbers[numbers > 1]
        torch.equal(numbers, numbers)
    assert counted.reads.total() == 3


def test_the_command_writes_what_it_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "overhead.json"
    monkeypatch.setattr(sys, "argv", ["step_overhead", "--layers", "1", "--repeats", "1", "--json", str(path)])
    step_overhead.main()
    result = json.loads(path.read_text())
    assert list(result["methods"]) == ["lora", "peft-adalora", "adalora", "hyperadalora"]
    for row in result["methods"].values():
        assert row["seconds_per_step"] > 0
        parts = row["operations"]
        assert parts["total"] == parts["forward"] + parts["backward"] + parts["step"]
    base = result["methods"]["lora"]["operations"]["total"]
    shown = capsys.readouterr().out
    assert f"{result['methods']['peft-adalora']['operations']['total'] - base:+}" in shown
    assert result["forms"].keys() == forms().keys()
