"""One optimizer step on the LLaMA-3.1-8B architecture: time, peak memory and kernel launches, against plain LoRA.

Random bf16 weights, rank 16 on all linears, sequences of 2,048 tokens, activation checkpointing. Every method is built
in turn on the same base model, and every round times one step of each, so that drift of the machine hits all alike.
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
    """Seconds of one training step: forward and backward, then everything after."""
    synchronize(ids.device)
    start = time.perf_counter()
    subject.forward(ids).backward()
    synchronize(ids.device)
    middle = time.perf_counter()
    subject.step()
    synchronize(ids.device)
    end = time.perf_counter()
    return {"forward_backward": middle - start, "step": end - middle, "total": end - start}


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
    name: str, base: LlamaForCausalLM, ids: torch.Tensor, rank: int, repeats: int, spec: HypernetworkSpec | None
) -> dict[str, Any]:
    """One method, built on ``base`` and taken off it again."""
    subject = build_subject(name, base, rank, hypernetwork=spec)
    subject.model.enable_input_require_grads()
    for _ in range(WARM_UP):
        subject.train_step(ids)
    synchronize(ids.device)
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ids.device)
    rows = [timed(subject, ids) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(ids.device) if ids.device.type == "cuda" else None
    count = launches(subject, ids)
    subject.model.unload()
    return {"rows": rows, "peak_memory_bytes": peak, "kernel_launches": count}


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
            found[name].append(measure_one(name, base, ids, options.rank, options.repeats, spec))
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
        "peak_memory_bytes": rounds[0]["peak_memory_bytes"],
        "kernel_launches": rounds[0]["kernel_launches"],
    }


def show(result: dict[str, Any]) -> None:
    base = result["methods"]["lora"]
    print(
        f"{result['layers']} layers of width {result['hidden_size']}, rank {result['rank']}, {result['tokens']} tokens"
    )
    print(f"{'':14}{'time ×LoRA':>12}{'step share':>12}{'peak ×LoRA':>12}{'launches':>10}{'over LoRA':>11}")
    for name, row in result["methods"].items():
        time_ratio = row["seconds"]["total"] / base["seconds"]["total"]
        share = row["seconds"]["step"] / row["seconds"]["total"]
        peak = (
            "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / base['peak_memory_bytes']:.3f}"
        )
        count = row["kernel_launches"]
        over = "-" if count is None else f"{count - base['kernel_launches']:+}"
        print(f"{name:14}{time_ratio:>12.3f}{share:>12.3f}{peak:>12}{'-' if count is None else count:>10}{over:>11}")


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
