"""What both benchmarks share: the methods under test, the order of their runs, and where a result was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, PreTrainedModel

from hyperlora import HyperAdaLoRA, HypernetworkSpec, Pruning, UpdateRule

METHODS = ("lora", "peft-adalora", "adalora", "hyperadalora")
BASELINE = "lora"
#: ΔT of every method that prunes: steps between two pruning events.
INTERVAL = 100
TOTAL_STEPS = 10_000
PACKAGES = ("torch", "transformers", "peft")

#: The published values of LLaMA-3.1-8B.
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


def tiny_llama(layers: int) -> LlamaConfig:
    """LLaMA's seven linears per layer at widths where arithmetic costs next to nothing."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


@dataclass
class Subject:
    """One method, ready to train: ``forward`` gives the loss, ``step`` is everything after the backward pass."""

    name: str
    model: PeftModel
    forward: Callable[[torch.Tensor], torch.Tensor]
    step: Callable[[], None]

    def train_step(self, ids: torch.Tensor) -> None:
        self.forward(ids).backward()
        self.step()


def build_subject(
    name: str,
    base: PreTrainedModel,
    rank: int,
    *,
    steps_done: int = 0,
    hypernetwork: HypernetworkSpec | None = None,
    **changes: Any,
) -> Subject:
    """``name`` of :data:`METHODS` on ``base``, the baselines driven as their own documentation says.

    Args:
        name: of the method.
        base: the model to adapt.
        rank: initial rank; the target is half of it.
        steps_done: where in the pruning schedule to start; events are at the multiples of :data:`INTERVAL`.
        hypernetwork: of ``hyperadalora``; ``None`` is the default one.
        changes: other arguments of :class:`hyperlora.HyperAdaLoRA`.
    """
    torch.manual_seed(0)
    shared: dict[str, Any] = {"lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if name == "peft-adalora":
        config: LoraConfig = AdaLoraConfig(
            init_r=rank, target_r=rank // 2, deltaT=INTERVAL, tinit=0, tfinal=100, total_step=TOTAL_STEPS, **shared
        )
    else:
        config = LoraConfig(r=rank, **shared)
    model = get_peft_model(base, config)
    model.train()

    if name in ("lora", "peft-adalora"):
        # foreach is torch's default on an accelerator; naming it makes counts on the CPU the accelerator's.
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, foreach=True
        )
    else:
        settings: dict[str, Any] = {
            "lr": 1e-3,
            "method": name,
            "total_steps": TOTAL_STEPS,
            "target_rank": rank / 2,
            "pruning": Pruning(interval=INTERVAL, start=INTERVAL, final=100),
            "hypernetwork": hypernetwork,
            # The costliest step, at every one: by default Φ moves at every eighth, which a median would not show.
            "update_rule": UpdateRule(every=1),
        }
        optimizer = HyperAdaLoRA(model, **settings | changes)
        optimizer.steps_done = steps_done
    done = steps_done

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    def step() -> None:
        nonlocal done
        done += 1
        optimizer.step()
        if name == "peft-adalora":
            model.base_model.update_and_allocate(done)
        optimizer.zero_grad()

    return Subject(name, model, forward, step)


def interleaved(names: tuple[str, ...], repeats: int) -> list[str]:
    """Every method once per round, each round starting with another, so that drift of the machine hits all alike."""
    return [names[(start + n) % len(names)] for start in range(repeats) for n in range(len(names))]


def ratio(values: dict[str, list[float]], name: str) -> float:
    """Median of ``name`` over the median of the baseline."""
    return statistics.median(values[name]) / statistics.median(values[BASELINE])


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    """The processor's model; ``platform.processor()`` is empty on most Linux systems."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Machine, versions and git state, for the result file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git": {"commit": _git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)},
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
