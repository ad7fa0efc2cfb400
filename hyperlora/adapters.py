"""The base model, its tokenizer, and the PEFT LoRA adapter on it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hyperlora.config import METHODS, ModelConfig, Problem, Recipe, RecipeError
from hyperlora.optimizer import GAMMA

BUILTIN = "builtin:"


def resolve_path(path: str) -> str:
    """A model path with ``builtin:NAME`` replaced by the folder that ships with the package.

    Raises:
        RecipeError: there is no such built-in model.
    """
    if not path.startswith(BUILTIN):
        return path
    root = Path(str(files("hyperlora"))) / "assets"
    folder = root / path.removeprefix(BUILTIN)
    if not (folder / "config.json").is_file():
        names = ", ".join(f"{BUILTIN}{p.name}" for p in sorted(root.iterdir()) if p.is_dir())
        raise RecipeError([Problem("model.path", path, f"allowed built-in models: {names}")])
    return str(folder)


def model_problems(model: ModelConfig) -> list[Problem]:
    """What can be known about the base model without loading it."""
    try:
        load_config(model)
    except RecipeError as error:
        return error.problems
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()
        described = model.init == "random" and bool(model.architecture)
        field, value = ("model.architecture", model.architecture) if described else ("model.path", model.path)
        allowed = "a published config" if described else "a model folder, a hub name, or builtin:NAME"
        return [Problem(field, value, f"{allowed} ({': '.join(line.strip() for line in reason[:2])})")]
    return []


def load_config(model: ModelConfig, **extra: Any) -> PretrainedConfig:
    """The model's configuration with the recipe's overrides."""
    overrides = {**model.config, **extra}
    if model.init == "random" and model.architecture:
        fields = {**model.architecture, **overrides}
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoConfig.from_pretrained(
        resolve_path(model.path),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        **overrides,
    )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token."""
    path = model.tokenizer or model.path
    if model.tokenizer is None and model.init == "random" and model.architecture:
        # Any tokenizer serves weights that know nothing; this one ships with the package and is the smallest.
        path = f"{BUILTIN}storylm"
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_path(path), revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, num_labels: int | None) -> PreTrainedModel:
    """The base model: a sequence classifier when ``num_labels`` is given, a causal LM otherwise."""
    model = recipe.model
    extra = {} if num_labels is None else {"num_labels": num_labels, "pad_token_id": tokenizer.pad_token_id}
    config = load_config(model, **extra)
    factory = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    dtype = getattr(torch, model.dtype)
    torch.manual_seed(recipe.seed)  # a new classification head draws from the global generator
    if model.init == "random":
        return factory.from_config(config, dtype=dtype)
    return factory.from_pretrained(
        resolve_path(model.path),
        config=config,
        dtype=dtype,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def lora_config(recipe: Recipe, num_labels: int | None, total_steps: int) -> LoraConfig:
    """PEFT's configuration of the adapter for a run of ``total_steps`` optimizer steps."""
    adapter = recipe.adapter
    targets = adapter.target_modules
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM" if num_labels is None else "SEQ_CLS",
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(adapter.modules_to_save) or None,
        "base_model_name_or_path": recipe.model.path,
        "revision": recipe.model.revision,
    }
    if recipe.method == "peft-adalora":
        pruning = recipe.resolved_pruning(total_steps)
        return AdaLoraConfig(
            init_r=adapter.rank,
            target_r=int(recipe.target_rank),
            tinit=pruning.start,
            tfinal=pruning.final,
            deltaT=pruning.interval,
            beta1=pruning.beta1,
            beta2=pruning.beta2,
            orth_reg_weight=GAMMA if recipe.gamma is None else recipe.gamma,
            total_step=total_steps,
            **common,
        )
    if recipe.method == "eva":
        # A classifier's labels belong to rows, not to tokens, and select none.
        common |= {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0, use_label_mask=num_labels is None)}
    return LoraConfig(
        r=adapter.rank,
        use_dora=METHODS[recipe.method].dora,
        use_rslora=recipe.method == "rslora",
        **common,
    )


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, num_labels: int | None, device: torch.device, total_steps: int
) -> PeftModel:
    """The base model with its adapter on ``device``; the same values on every worker.

    Raises:
        RecipeError: the adapter does not fit the model or the schedule does not fit the run.
    """
    base = build_base(recipe, tokenizer, num_labels)
    if recipe.model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    torch.manual_seed(recipe.seed)
    model = attach(base, recipe, num_labels, total_steps)
    return prepare(model, recipe).to(device)


def attach(base: PreTrainedModel, recipe: Recipe, num_labels: int | None, total_steps: int) -> PeftModel:
    """The base model with its adapter, where it is (the meta device, too).

    Raises:
        RecipeError: as :func:`build_model`.
    """
    try:
        config = lora_config(recipe, num_labels, total_steps)
    except ValueError as error:
        raise RecipeError([Problem("pruning", recipe.pruning.model_dump(), str(error))]) from error
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise RecipeError([Problem("adapter.target_modules", recipe.adapter.target_modules, str(error))]) from error


def prepare(model: PeftModel, recipe: Recipe) -> PeftModel:
    """PEFT makes adapters of a float64 model in float32; here they follow the base."""
    return model.double() if recipe.model.dtype == "float64" else model
