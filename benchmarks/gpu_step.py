"""One optimizer step on the LLaMA-3.1-8B architecture: time, peak memory and kernel launches, against plain LoRA.

Random bf16 weights, rank 16 on all linears, sequences of 2,048 tokens, activation checkpointing. Every round builds
each method in turn on the same base model and times some steps of it, beginning with another one each time.
PEFT's AdaLoRA is driven as its documentation says, with ``update_and_allocate`` after ``optimizer.step()``. Neither Ray
nor MLflow is needed.

    python -m benchmarks.gpu_step --json out/gpu_step.json
    python -m benchmarks.gpu_step --reduced      the same on a CPU with two thin layers, to try the script
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.common import LLAMA_8B, METHODS, Subject, build_subject, provenance, tiny_llama, write_json
from hyperlora import HypernetworkSpec

WARM_UP = 2


def base_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The architecture with its own random initialisation, made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(subject: Subject, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of one training step as a loop takes it, and of the part after the backward pass in another step.

    The host waits for the device around the whole step alone: what it does after the backward pass overlaps with what
    the device still has to do, as in training. ``step_alone`` is from a second step, with the device idle before it.
    """
    synchronize(ids.device)
    start = time.perf_counter()
    subject.train_step(ids)
    synchronize(ids.device)
    total = time.perf_counter() - start
    subject.forward(ids).backward()
    synchronize(ids.device)
    middle = time.perf_counter()
    subject.step()
    synchronize(ids.device)
    return {"total": total, "step_alone": time.perf_counter() - middle}


def host_waits(subject: Subject, ids: torch.Tensor) -> int | None:
    """How often the host waits for the accelerator in what follows the backward pass; None on a CPU."""
    if ids.device.type != "cuda":
        return None
    subject.forward(ids).backward()
    synchronize(ids.device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subject.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


def launches(subject: Subject, ids: torch.Tensor) -> int | None:
    """Kernels that one training step starts on the accelerator; None on a CPU."""
    if ids.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        subject.train_step(ids)
        synchronize(ids.device)
    names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
    return sum(e.count for e in recorded.key_averages() if e.key in names)


def measure_one(
    name: str,
    base: LlamaForCausalLM,
    ids: torch.Tensor,
    rank: int,
    repeats: int,
    spec: HypernetworkSpec | None,
    counts: bool,
) -> dict[str, Any]:
    """One method, built on ``base`` and taken off it again; ``counts`` also what does not change between rounds."""
    subject = build_subject(name, base, rank, hypernetwork=spec)
    subject.model.enable_input_require_grads()
    for _ in range(WARM_UP):
        subject.train_step(ids)
    synchronize(ids.device)
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ids.device)
    rows = [timed(subject, ids) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(ids.device) if ids.device.type == "cuda" else None
    found = {"peak_memory_bytes": peak}
    if counts:
        found |= {"kernel_launches": launches(subject, ids), "host_waits": host_waits(subject, ids)}
    subject.model.unload()
    return {"rows": rows, **found}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cpu" if options.reduced or not torch.cuda.is_available() else "cuda")
    config = tiny_llama(2) if options.reduced else copy.deepcopy(LLAMA_8B)
    if options.layers:
        config.num_hidden_layers = options.layers
    length = min(options.length, 32) if options.reduced else options.length
    base = base_model(config, device, torch.bfloat16)
    ids = torch.randint(0, config.vocab_size, (options.batch, length), device=device)
    spec = HypernetworkSpec(hidden_size=24, heads=2) if options.reduced else None
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    # Two adapters of this size do not share one base: each round builds every method anew.
    for round_ in range(options.rounds):
        for n in range(len(METHODS)):
            name = METHODS[(n + round_) % len(METHODS)]
            found[name].append(measure_one(name, base, ids, options.rank, options.repeats, spec, round_ == 0))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            last = statistics.median(r["total"] for r in found[name][-1]["rows"])
            print(f"round {round_ + 1} {name:14} {last:.4f} s a step", flush=True)
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "rank": options.rank,
        "tokens": options.batch * length,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "methods": {name: summarize(rounds) for name, rounds in found.items()},
        **provenance(),
    }


def summarize(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [row for r in rounds for row in r["rows"]]
    return {
        "seconds": {key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "seconds_by_round": [statistics.median(row["total"] for row in r["rows"]) for r in rounds],
        **{key: rounds[0][key] for key in ("peak_memory_bytes", "kernel_launches", "host_waits")},
    }


def show(result: dict[str, Any]) -> None:
    base = result["methods"]["lora"]
    print(
        f"{result['layers']} layers of width {result['hidden_size']}, rank {result['rank']}, {result['tokens']} tokens"
    )
    print(f"{'':14}{'time ×LoRA':>12}{'step alone':>12}{'peak ×LoRA':>12}{'launches':>10}{'over LoRA':>11}{'waits':>7}")
    for name, row in result["methods"].items():
        cells = [f"{row['seconds']['total'] / base['seconds']['total']:.3f}"]
        cells += [f"{row['seconds']['step_alone'] / base['seconds']['total']:.3f}"]
        if row["peak_memory_bytes"] is None:
            cells += ["-"] * 4
        else:
            cells += [f"{row['peak_memory_bytes'] / base['peak_memory_bytes']:.3f}", f"{row['kernel_launches']}"]
            cells += [f"{row['kernel_launches'] - base['kernel_launches']:+}", f"{row['host_waits']}"]
        widths = (12, 12, 12, 10, 11, 7)
        print(f"{name:14}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="sequences per step")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--repeats", type=int, default=8, help="timed steps of each method and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--reduced", action="store_true", help="two thin layers on the CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options)
    show(result)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
