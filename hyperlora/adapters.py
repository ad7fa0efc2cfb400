"""The base model, its tokenizer, and the PEFT LoRA adapter on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
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

from hyperlora.config import BUILTIN, METHODS, ModelConfig, Problem, Recipe, RecipeError
from hyperlora.optimizer import GAMMA
from hyperlora.weights import AbsentError, absent, misfit, read_shapes

#: Heads that PEFT trains and saves for a classification.
HEADS = ("classifier", "score")


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
        names = ", ".join(f"{BUILTIN}{p.name}" for p in sorted(root.iterdir()) if (p / "config.json").is_file())
        raise RecipeError([Problem("model.path", path, f"allowed built-in models: {names}")])
    return str(folder)


def model_folder(model: ModelConfig) -> Path | None:
    """Where a base model lies on this machine: a folder, or one in the hub's cache, which may hold a part of it."""
    folder = Path(resolve_path(model.path))
    if folder.is_dir():
        return folder
    try:
        # Where it is known that files are missing, a folder is found only by those that are there.
        found = snapshot_download(
            model.path, revision=model.revision, allow_patterns="config.json", local_files_only=True
        )
    except (OSError, ValueError):
        return None
    return Path(found)


def model_problems(model: ModelConfig) -> list[Problem]:
    """What can be known about the base model and its tokenizer without loading weights."""
    described = model.init == "random" and bool(model.architecture)
    problems = []
    try:
        if not described:
            _check_folder(resolve_path(model.path))
        config = load_config(model)
    except RecipeError as error:
        return error.problems
    except Exception as error:  # whatever a config that says nonsense leads to
        field, value = ("model.architecture", model.architecture) if described else ("model.path", model.path)
        allowed = "a published config" if described else "a model folder, a hub name, or builtin:NAME"
        if model.config and not isinstance(error, OSError):
            field, value, allowed = "model.config", model.config, "settings of the model"
        problems.append(Problem(field, value, f"{allowed} ({_first_lines(error)})"))
        if model.tokenizer is None and not described:
            return problems
    else:
        problems += _misspelt(model, config)
    try:
        load_tokenizer(model)
    except RecipeError as error:
        problems += error.problems
    except Exception as error:  # the tokenizers library raises no narrower type
        field, value = ("model.path", model.path) if model.tokenizer is None else ("model.tokenizer", model.tokenizer)
        problems.append(Problem(field, value, f"a folder or hub name with a tokenizer ({_first_lines(error)})"))
    return problems


def _misspelt(model: ModelConfig, config: PretrainedConfig) -> list[Problem]:
    """Settings that a config takes and no model reads, and that differ from a real one by a slip."""
    try:
        known = {*type(config)().to_dict(), *config.attribute_map}
    except Exception:  # a config of code from the hub that needs more than its defaults
        return []
    found = []
    for section in ("architecture", "config"):
        for key, value in getattr(model, section).items():
            close = [] if key in known else difflib.get_close_matches(key, known, n=1, cutoff=0.85)
            if close:
                allowed = f"a setting of the model; did you mean {close[0]}?"
                found.append(Problem(f"model.{section}.{key}", value, allowed))
    return found


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = ": ".join(lines[:2]) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _check_folder(path: str) -> None:
    """Raise ValueError for a local path that holds no model of its own."""
    if Path(path).is_file():
        raise ValueError("this is a file")
    if Path(path, "adapter_config.json").is_file():
        raise ValueError("this folder holds an adapter, not a base model")


def weight_problems(recipe: Recipe, base: PreTrainedModel, num_labels: int | None) -> list[Problem]:
    """Whether the weights that are here are those of ``base``, which may be on the meta device; reads headers only."""
    model = recipe.model
    folder = None if model.init == "random" else model_folder(model)
    if folder is None:
        return []
    try:
        shapes = read_shapes(folder)
    except ValueError as error:
        if isinstance(error, AbsentError) and not Path(resolve_path(model.path)).is_dir():
            return []  # what the hub's cache lacks is fetched when the model is loaded
        return [Problem("model.path", model.path, f"a model with safetensors weights ({error})")]
    if getattr(base.config, "quantization_config", None) is not None:
        return []  # packed weights have shapes of their own
    if (reason := misfit(shapes, base, base.base_model_prefix)) is not None:
        return [Problem("model.path", model.path, f"weights that fit the config ({reason})")]
    return _absent(recipe, absent(shapes, base, base.base_model_prefix), num_labels)


def _absent(recipe: Recipe, names: Iterable[str], num_labels: int | None) -> list[Problem]:
    """Weights that a model lacks and the adapter does not save: random here, and random again where it is loaded."""
    new = {*recipe.adapter.modules_to_save, *(HEADS if num_labels is not None else ())}
    lost = sorted(name for name in names if not new & set(name.split(".")))
    if not lost:
        return []
    shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    if num_labels is None:
        return [Problem("model.path", recipe.model.path, f"a model with all its weights; it lacks {shown}")]
    allowed = f"also the modules of {shown}: {recipe.model.path} has no weights for them, and they have to be learned"
    return [Problem("adapter.modules_to_save", recipe.adapter.modules_to_save, allowed)]


def load_config(model: ModelConfig, **extra: Any) -> PretrainedConfig:
    """The model's configuration with the recipe's overrides."""
    overrides = {**model.config, **extra}
    if model.init == "random" and model.architecture:
        fields = {**model.architecture, **overrides}
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoConfig.from_pretrained(
        resolve_path(model.path),
        **pinned(model),
        **overrides,
    )


def pinned(model: ModelConfig) -> dict[str, Any]:
    """Which revision of the hub repository is loaded, and of which its code; the code may lie in another repository."""
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return options | ({"code_revision": model.revision} if model.trust_remote_code else {})


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token."""
    path = model.tokenizer or model.path
    if model.tokenizer is None and model.init == "random" and model.architecture:
        # Any tokenizer serves weights that know nothing; this one ships with the package and is the smallest.
        path = f"{BUILTIN}storylm"
    # The revision is the model's; code of another repository would be pinned by nothing.
    options = pinned(model) if model.tokenizer is None else {"trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(path), **options)
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
    try:
        options = {"config": config, "dtype": dtype, "use_safetensors": True, **pinned(model)}
        loaded: Any = factory.from_pretrained(resolve_path(model.path), output_loading_info=True, **options)
        base, found = loaded
    except OSError as error:
        allowed = f"a model with safetensors weights ({_first_lines(error)})"
        raise RecipeError([Problem("model.path", model.path, allowed)]) from error
    if problems := _absent(recipe, found["missing_keys"], num_labels):
        raise RecipeError(problems)
    return base


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
    unknown = _unknown_modules(base, recipe)
    if unknown:
        raise RecipeError(unknown)
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise RecipeError([Problem("adapter.target_modules", recipe.adapter.target_modules, str(error))]) from error


def _unknown_modules(base: PreTrainedModel, recipe: Recipe) -> list[Problem]:
    """Names of modules that the model does not have."""
    names = [name for name, _ in base.named_modules()]
    short = sorted({name.rsplit(".", 1)[-1] for name in names if name and not name.rsplit(".", 1)[-1].isdigit()})
    targets, saved = recipe.adapter.target_modules, recipe.adapter.modules_to_save
    wanted = {"target_modules": () if isinstance(targets, str) else targets, "modules_to_save": saved}
    problems = []
    for field, modules in wanted.items():
        missing = tuple(m for m in modules if not any(n == m or n.endswith(f".{m}") for n in names))
        if missing:
            problems.append(Problem(f"adapter.{field}", missing, f"modules of the model: {', '.join(short)}"))
    return problems


def prepare(model: PeftModel, recipe: Recipe) -> PeftModel:
    """PEFT makes adapters of a float64 model in float32; here they follow the base."""
    return model.double() if recipe.model.dtype == "float64" else model
