"""Aten operations and time of one optimizer step, against plain LoRA, on the CPU.

On an accelerator each operation is about one kernel launch. The model is tiny, so that the times show what a method
adds; hypernetworks of the default size cost the same arithmetic here as on a real model, and therefore stand out (for
their share of a real step see ``gpu_step.py``). PEFT's AdaLoRA is driven as its documentation says, with
``update_and_allocate`` after ``optimizer.step()``.

    python -m benchmarks.step_overhead --layers 32 --repeats 20 --json out/step_overhead.json
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from benchmarks.common import (
    BASELINE,
    INTERVAL,
    METHODS,
    Subject,
    build_subject,
    interleaved,
    provenance,
    ratio,
    tiny_llama,
    write_json,
)
from hyperlora import HypernetworkSpec, Pruning, UpdateRule
from hyperlora.settings import Kind, Rule

PHASES = ("forward", "backward", "step")
WARM_UP = 2
#: What makes the host wait: reading a number back, or a result whose shape depends on values. PyTorch's AdamW keeps its
#: step counts on the host and reads one for each parameter and step.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave")
#: Likewise, where the index is a mask.
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


def forms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Forms besides the defaults: the method's name and what its optimizer is given.

    Operations do not depend on the size of the hypernetworks, so that a small one will do.
    """
    published = Pruning("cubic", interval=INTERVAL, start=INTERVAL, final=100, score="adalora")
    small = {"hidden_size": 24, "heads": 2}
    return {
        "adalora as published": (
            "adalora",
            {"gamma": 0.1, "pruning": dataclasses.replace(published, reactivation=True)},
        ),
        "triplets, γ, AdaLoRA's score": (
            "hyperadalora",
            {
                "factorization": "triplet",
                "gamma": 0.1,
                "pruning": published,
                "hypernetwork": HypernetworkSpec(**small),
            },
        ),
        **{
            f"rule {rule}": (
                "hyperadalora",
                {"update_rule": UpdateRule(rule, every=1), "hypernetwork": HypernetworkSpec(**small)},
            )
            for rule in get_args(Rule)
        },
        **{kind: ("hyperadalora", {"hypernetwork": HypernetworkSpec(kind, **small)}) for kind in get_args(Kind)},
        "per layer": ("hyperadalora", {"hypernetwork": HypernetworkSpec(per_layer=True, **small)}),
        "between two moves of Φ": (
            "hyperadalora",
            {"update_rule": UpdateRule(every=INTERVAL), "hypernetwork": HypernetworkSpec(**small)},
        ),
    }


class CountOperations(TorchDispatchMode):
    """Counts aten operations; views, which only change metadata, and reads of numbers by the host apart."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "aten":
            name = func._schema.name.removeprefix("aten::")
            reads = name in READS or (name in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1]))
            kind = self.reads if reads else self.views if func.is_view else self.operations
            kind[name] += 1
        return func(*args, **(kwargs or {}))


def count_step(subject: Subject, ids: torch.Tensor) -> dict[str, CountOperations]:
    """Operations of one training step by phase."""
    counts = {phase: CountOperations() for phase in PHASES}
    with counts["forward"]:
        loss = subject.forward(ids)
    with counts["backward"]:
        loss.backward()
    with counts["step"]:
        subject.step()
    return counts


def summarize(counts: dict[str, CountOperations]) -> dict[str, int]:
    """Operations by phase and their total, views included; how many are views; and the reads, not in the total."""
    sums = {phase: c.operations.total() + c.views.total() for phase, c in counts.items()}
    return {
        **sums,
        "total": sum(sums.values()),
        "views": sum(c.views.total() for c in counts.values()),
        "reads": sum(c.reads.total() for c in counts.values()),
    }


def build(name: str, layers: int, rank: int = 8, **changes: Any) -> Subject:
    torch.manual_seed(0)
    return build_subject(name, LlamaForCausalLM(tiny_llama(layers)), rank, **changes)


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(0))


def count_methods(
    layers: int, names: tuple[str, ...] = METHODS, hypernetwork: HypernetworkSpec | None = None
) -> dict[str, dict[str, int]]:
    """Operations of an ordinary step (no pruning event) of each method, after warm-up."""
    return {
        name: summarize(count_after(build(name, layers, hypernetwork=hypernetwork), WARM_UP, tokens()))
        for name in names
    }


def count_forms(layers: int) -> dict[str, dict[str, int]]:
    """Operations of an ordinary step of each of the :func:`forms`."""
    ids = tokens()
    return {
        form: summarize(count_after(build(name, layers, **changes), WARM_UP, ids))
        for form, (name, changes) in forms().items()
    }


def count_after(subject: Subject, steps: int, ids: torch.Tensor) -> dict[str, CountOperations]:
    """Operations of the step that follows ``steps`` others."""
    for _ in range(steps):
        subject.train_step(ids)
    return count_step(subject, ids)


def time_methods(subjects: dict[str, Subject], repeats: int) -> dict[str, list[float]]:
    ids, seconds = tokens(), {name: [] for name in subjects}  # type: ignore[var-annotated]
    for name in interleaved(tuple(subjects), repeats):
        start = time.perf_counter()
        subjects[name].train_step(ids)
        seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(layers: int, repeats: int, rank: int) -> dict[str, Any]:
    ids = tokens()
    # Warm-up, one counted step, the timed ones, and then the step of a pruning event.
    first = INTERVAL - (WARM_UP + 1 + repeats) - 1
    subjects = {name: build(name, layers, rank, steps_done=first) for name in METHODS}
    ordinary = {name: count_after(subject, WARM_UP, ids) for name, subject in subjects.items()}
    seconds = time_methods(subjects, repeats)
    event = {name: count_step(subject, ids) for name, subject in subjects.items()}
    return {
        "layers": layers,
        "linears": 7 * layers,
        "rank": rank,
        "repeats": repeats,
        "methods": {
            name: {
                "operations": summarize(ordinary[name]),
                "operations_at_pruning_event": summarize(event[name]),
                "step_operations_by_name": {
                    "operations": dict(ordinary[name]["step"].operations.most_common()),
                    "views": dict(ordinary[name]["step"].views.most_common()),
                },
                "seconds_per_step": statistics.median(seconds[name]),
                "time_ratio_to_lora": ratio(seconds, name),
            }
            for name in METHODS
        },
        "forms": count_forms(layers),
        **provenance(),
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['layers']} layers, {result['linears']} adapted linears, rank {result['rank']}")
    columns = [*PHASES, "total", "views", "reads"]
    print(f"{'':16}" + "".join(f"{c:>10}" for c in columns) + f"{'over LoRA':>12}{'at event':>10}{'time ×LoRA':>12}")
    base = result["methods"][BASELINE]["operations"]["total"]
    for name, row in result["methods"].items():
        counts = row["operations"]
        print(
            f"{name:16}"
            + "".join(f"{counts[c]:>10}" for c in columns)
            + f"{counts['total'] - base:>+12}{row['operations_at_pruning_event']['total']:>10}"
            + f"{row['time_ratio_to_lora']:>12.2f}"
        )
    print()
    for form, counts in result["forms"].items():
        print(f"{form:30}{counts['total'] - base:>+8} over LoRA, {counts['reads']} reads")
    print()
    print("total includes views, not reads by the host")
    print(f"at event: total of the step in every {INTERVAL} that prunes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20, help=f"timed steps of each method, 1 to {INTERVAL - 5}")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not 1 <= arguments.repeats <= INTERVAL - 5:
        parser.error(f"--repeats {arguments.repeats}: allowed 1 to {INTERVAL - 5}")
    result = measure(arguments.layers, arguments.repeats, arguments.rank)
    show(result)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
