"""Adapters as folders that plain PEFT loads, and vLLM with one rank for all modules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load as load_tensors
from torch import Tensor

from hyperlora import checkpoint, storage
from hyperlora.adapters import pinned
from hyperlora.baselines import AdapterOptimizer, UnequalLoRA
from hyperlora.config import BUILTIN, METHODS, Recipe
from hyperlora.optimizer import HyperAdaLoRA
from hyperlora.storage import patiently

# Ranks that vLLM's --max-lora-rank takes (vllm/config/lora.py, MaxLoRARanks).
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
PREFIX = "base_model.model."
#: Files of an adapter, and what ``hyperlora register`` puts beside them.
CONFIG, TENSORS, CARD = FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
RECORD = "registration.json"
A_OF = re.compile(rf"^{re.escape(PREFIX)}(.+)\.lora_A\.weight$")


@dataclass(frozen=True)
class PlainAdapter:
    """A LoRA adapter without λ, masks or scale: ``ΔW = B A`` for each module.

    Attributes:
        pairs: module name to (A (r, in), B (out, r)), the live directions only; the scale is in B.
        others: other trained tensors under PEFT's names (heads, DoRA magnitudes).
        config: PEFT's adapter_config of the training run.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    others: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def parameters(self) -> int:
        return sum(a.numel() + b.numel() for a, b in self.pairs.values())

    def padded(self) -> PlainAdapter:
        """All modules at the smallest rank that vLLM accepts, filled with zeros.

        Raises:
            ValueError: a module's rank exceeds every accepted rank, or there is more than LoRA's matrices (DoRA's
                magnitudes, a classifier's head, other modules trained in full), which vLLM refuses.
        """
        saved = ["DoRA's magnitudes"] if self.config.get("use_dora") else self.config.get("modules_to_save")
        if more := sorted(set(saved or self.others)):
            raise ValueError(
                f"an adapter of LoRA's matrices alone: vLLM does not serve {', '.join(more)}; exported without "
                "--uniform-rank it loads in PEFT"
            )
        largest = max(a.shape[0] for a, _ in self.pairs.values())
        fitting = [r for r in SERVED_RANKS if r >= largest]
        if not fitting:
            raise ValueError(f"rank {largest} exceeds the largest rank that vLLM serves, {SERVED_RANKS[-1]}")
        rank = fitting[0]

        def fill(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            more = rank - a.shape[0]
            return torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))

        return replace(self, pairs={name: fill(a, b) for name, (a, b) in self.pairs.items()})


def plain_adapter(model: PeftModel, optimizer: AdapterOptimizer) -> PlainAdapter:
    """The adapter as the optimizer defines it, scale baked into B, pruned directions dropped."""
    # By itself PEFT asks the hub whether the vocabulary has grown, and would save the base model's embeddings then.
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {k: v.detach().cpu().clone() for k, v in saved.items()}
    if isinstance(optimizer, UnequalLoRA):
        # Copies, as everything here is: it is packed in another thread while training goes on.
        found = {name: (a.to("cpu", copy=True), b.cpu()) for name, (a, b) in optimizer.pairs().items()}
        pairs = {name: (a.contiguous(), b.contiguous()) for name, (a, b) in found.items()}
    else:
        pairs = _factor_pairs(state, optimizer)
    others = {k: v for k, v in state.items() if not re.search(r"\.lora_[ABE]\b", k)}
    config = _plain_config(model.peft_config["default"]).to_dict()
    return PlainAdapter(pairs, others, json.loads(json.dumps(config, default=_jsonable)))


def _factor_pairs(state: dict[str, Tensor], optimizer: HyperAdaLoRA) -> dict[str, tuple[Tensor, Tensor]]:
    live = optimizer.mask.cpu()
    pairs = {}
    for index, module in enumerate(optimizer.layout.modules):
        a = state[f"{PREFIX}{module.name}.lora_A.weight"][live[index]]
        b = state[f"{PREFIX}{module.name}.lora_B.weight"][:, live[index]] * module.scaling
        pairs[module.name] = (a.contiguous(), b.contiguous())
    return pairs


def _plain_config(config: Any) -> LoraConfig:
    """The configuration of an ordinary LoRA adapter on the same modules; PEFT's AdaLoRA is folded into one."""
    if isinstance(config, AdaLoraConfig):
        return LoraConfig(**{f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init})
    return config


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def adapter_files(adapter: PlainAdapter) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors as PEFT reads them.

    Modules of rank zero are left out. Ranks differ through ``rank_pattern``, and ``alpha_pattern`` equals it, so that
    PEFT's scale alpha/r is one everywhere.

    Raises:
        ValueError: every module has rank zero: there is no adapter to write.
    """
    pairs = {name: pair for name, pair in adapter.pairs.items() if pair[0].shape[0]}
    if not pairs:
        raise ValueError("every module was pruned to rank zero; there is no adapter to export")
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    common = max(set(ranks.values()), key=lambda r: (list(ranks.values()).count(r), r))
    pattern = {name: r for name, r in ranks.items() if r != common}
    # PEFT needs full names only where modules were dropped; otherwise the names that the run was given.
    targets = adapter.config["target_modules"] if len(pairs) == len(adapter.pairs) else sorted(pairs)
    config = {
        **adapter.config,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets,
        "inference_mode": True,
        "init_lora_weights": True,
        "eva_config": None,
        "use_rslora": False,
    }
    tensors = dict(adapter.others)
    for name, (a, b) in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    return {
        CONFIG: storage.pack_json(config),
        TENSORS: checkpoint.pack(tensors, {"format": "pt"}),
    }


def from_checkpoint(saved: checkpoint.Checkpoint) -> PlainAdapter:
    """The adapter inside a verified checkpoint; needs no base model."""
    return from_files(saved.files)


def from_files(files: Mapping[str, bytes]) -> PlainAdapter:
    """The adapter in files that :func:`adapter_files` made; needs no base model.

    Raises:
        ValueError: they hold something else.
        SafetensorError: the tensors cannot be read.
    """
    config = json.loads(files[CONFIG])
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or "target_modules" not in config:
        raise ValueError("adapter_config.json is not that of a LoRA adapter")
    same = config.get("lora_alpha") == config.get("r") and config.get("alpha_pattern") == config.get("rank_pattern")
    if not same or config.get("use_rslora"):
        raise ValueError("its scale alpha/r is not one in every module")
    tensors = load_tensors(files[TENSORS])
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module in [m[1] for name in tensors if (m := A_OF.match(name))]:
        a = tensors.pop(f"{PREFIX}{module}.lora_A.weight")
        b = tensors.pop(f"{PREFIX}{module}.lora_B.weight", None)
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{module} has no matrices A and B of one rank")
        pairs[module] = (a, b)
    if not pairs:
        raise ValueError("it adapts no module")
    if strange := [name for name in tensors if re.search(r"\.lora_(?!magnitude)", name)]:
        raise ValueError(f"{strange[0]} is neither A nor B of a linear layer")
    return PlainAdapter(pairs, tensors, config)


def card_facts(trainer: Mapping[str, Any], outcome: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a model card says of a checkpoint: steps, labels, and quality as last measured, with its step.

    Args:
        trainer: of the checkpoint.
        outcome: of the run that this checkpoint ends; the checkpoint may be older than the last evaluation.
    """
    metric, evaluations = trainer["metric"], trainer["evaluations"]
    # Older checkpoints do not say how they pad.
    facts = {"steps": trainer["step"], "labels": trainer["labels"]}
    facts |= {key: trainer.get(key) for key in ("pad_token_id", "reply_end")}
    if outcome is not None:
        return facts | {key: outcome[key] for key in ("metric", "metric_before", "metric_after")}
    if not evaluations or not evaluations[-1]["step"]:
        return facts
    first, last = evaluations[0], evaluations[-1]
    before = first[metric] if first["step"] == 0 else None
    return facts | {
        "metric": metric,
        "metric_before": before,
        "metric_after": last[metric],
        "metric_step": last["step"],
    }


def write_adapter(
    uri: str, adapter: PlainAdapter, recipe: Recipe, outcome: dict[str, Any], patience: float = storage.PATIENCE
) -> dict[str, dict[str, Any]]:
    """Write adapter and model card into a folder; returns size and SHA-256 of the files by name.

    Args:
        uri: path or URI.
        adapter: what to write.
        recipe: of the run that made it.
        outcome: of that run, for the model card.
        patience: seconds that each operation is tried again.

    Raises:
        StorageError: the store does not take a file.
        ValueError: as :func:`adapter_files`.
    """
    files = adapter_files(adapter) | {CARD: model_card(adapter, recipe, outcome).encode()}
    return write_files(uri, files, patience)


def write_files(uri: str, files: Mapping[str, bytes], patience: float = storage.PATIENCE) -> dict[str, dict[str, Any]]:
    """Write an adapter's files into a folder; returns size and SHA-256 of each by name.

    Raises:
        StorageError: the store does not take a file.
    """
    for name, data in files.items():
        patiently(storage.write, f"{uri}/{name}", data, patience=patience)
    return checkpoint.identities(files)


def model_card(adapter: PlainAdapter, recipe: Recipe, outcome: dict[str, Any]) -> str:
    """README.md of an adapter, in the form that model hubs read."""
    metric = outcome.get("metric")
    ranks = [a.shape[0] for a, _ in adapter.pairs.values()]
    rows = [
        ("base model", f"`{recipe.model.path}`" + (f" at `{recipe.model.revision}`" if recipe.model.revision else "")),
        *([("tokenizer", f"`{recipe.model.tokenizer}`")] if recipe.model.tokenizer else []),
        ("method", recipe.method),
        ("task", f"{recipe.task.kind} on {recipe.data.root or recipe.data.source}"),
        ("ranks", f"{min(ranks)} to {max(ranks)}, {sum(ranks)} in all over {len(ranks)} modules"),
        ("parameters", f"{adapter.parameters:,}"),
        ("steps", f"{outcome.get('steps', 'unknown')}"),
    ]
    if metric is not None:
        before = outcome.get("metric_before")
        start = "" if before is None else f" (base model {before:.4f})"
        step = outcome.get("metric_step", outcome["steps"])
        earlier = "" if step == outcome["steps"] else f" at step {step}"
        rows.append((f"held-out {metric}{earlier}", f"{outcome['metric_after']:.4f}{start}"))
    labels = outcome["labels"]
    if labels:
        rows.append(("labels", ", ".join(f"{n} {label}" for n, label in enumerate(labels))))
    table = "\n".join(f"| {k} | {v} |" for k, v in rows)
    loader = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    imports, path = "", json.dumps(recipe.model.path)
    if recipe.model.path.startswith(BUILTIN):
        imports, path = "\nfrom hyperlora.adapters import resolve_path", f"resolve_path({path})"
    options = _arguments({name: value for name, value in pinned(recipe.model).items() if value})
    # As in training: a model, unlike its config, does not take every setting.
    settings = dict(recipe.model.config)
    if labels:
        settings["num_labels"] = len(labels)
        if (pad := outcome.get("pad_token_id")) is not None:
            settings["pad_token_id"] = pad
    classes, config = loader, ""
    if settings:
        classes = f"AutoConfig, {loader}"
        config = f"config = AutoConfig.from_pretrained({path}{options}{_arguments(settings)})\n"
        options = f", config=config{options}"
    baked = "The scale is baked into the weights"
    if METHODS[recipe.method].singular_values:
        baked = "Singular values and scale are baked into the weights and pruned directions are gone"
    return f"""---
base_model: "{recipe.model.path}"
library_name: peft
tags: [{", ".join(dict.fromkeys(("lora", recipe.method)))}]
---
# {recipe.name}

A LoRA adapter, trained by hyperlora with method `{recipe.method}`.
{baked}, so that it is an ordinary PEFT LoRA adapter.

| | |
|---|---|
{table}

```python
from peft import PeftModel
from transformers import {classes}{imports}

{config}base = {loader}.from_pretrained({path}{options})
model = PeftModel.from_pretrained(base, ".")
```
{_reading(recipe, outcome.get("reply_end"))}"""


def _reading(recipe: Recipe, reply_end: str | None) -> str:
    """How the rows were written that it learned from: other prompts are answered worse, and nothing says so."""
    data, task = recipe.data, recipe.task
    if task.kind == "classification":
        if data.text_pair is None:
            return ""
        said = f"pairs, {_code(data.text)} first and {_code(data.text_pair)} second"
    elif task.kind == "language-modeling":
        said = f"texts {_code(data.template)}, each followed by the tokenizer's end token"
    elif task.chat:
        said = "chats: the prompt is the user's turn in the tokenizer's chat template, the completion is the reply"
        said += f", which ends with {_code(reply_end)}" if reply_end else ""
    else:
        more = "each followed by a space, its completion and the tokenizer's end token"
        said = f"prompts {_code(task.prompt_format)}, {more}"
    return f"\nTrained on {said}.\n"


def _code(text: str) -> str:
    """A Python literal in Markdown, whose own backticks a longer row of them encloses."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text!r}{fence}"


def _arguments(values: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in values.items())
