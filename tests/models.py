"""Small models that every test may build."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hyperlora import METHODS, HyperAdaLoRA, HypernetworkSpec, Pruning, UpdateRule

RULES = ("generate", "residual", "friction", "anchored", "reanchored", "hybrid")
VARIANTS = [(m, r) for m in METHODS for r in (RULES if METHODS[m].hypernetwork else ("direct",))]


def build_llama(
    *,
    layers: int = 2,
    rank: int = 4,
    alpha: int = 8,
    dora: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> PeftModel:
    """A Llama with grouped-query attention and PEFT LoRA on all seven linears of each layer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    base = LlamaForCausalLM(config).to(dtype)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    return get_peft_model(base, lora).to(dtype)


def build_optimizer(model: PeftModel, method: str = "hyperadalora", rule: str = "hybrid", **changes) -> HyperAdaLoRA:
    settings: dict = {
        "lr": 1e-2,
        "method": method,
        "total_steps": 40,
        "pruning": Pruning(interval=4, start=8, final=16),
        "seed": 3,
    }
    if METHODS[method].singular_values:
        settings["target_rank"] = 2
    if METHODS[method].hypernetwork:
        settings["hypernetwork"] = HypernetworkSpec(hidden_size=24, heads=2)
        settings["update_rule"] = UpdateRule(rule, reanchor_every=7, every=4)
    return HyperAdaLoRA(model, **{**settings, **changes})


def build_batch(rows: int = 8, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 48, (rows, 10), generator=torch.Generator().manual_seed(seed))


def train_steps(model: PeftModel, optimizer: HyperAdaLoRA, steps: int, ids: torch.Tensor | None = None) -> list[float]:
    """Full-batch steps on fixed tokens; returns the losses."""
    ids = build_batch() if ids is None else ids
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
