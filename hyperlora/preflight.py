"""What a run will be, known before any worker starts: problems, parameter counts, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hyperlora.adapters import attach, load_config, load_tokenizer, model_problems, prepare, weight_problems
from hyperlora.baselines import AdapterOptimizer
from hyperlora.config import METHODS, Problem, Recipe, RecipeError, first_line, worker_problems
from hyperlora.monitors import monitors_of, read_baseline
from hyperlora.optimizer import HyperAdaLoRA
from hyperlora.packed import Packed
from hyperlora.tasks import Task, build_task
from hyperlora.tasks.data import PARTS, survey
from hyperlora.training import World, build_optimizer
from hyperlora.warm_start import Source, read, start_from


@dataclass(frozen=True)
class Sizes:
    """Of one method on the recipe's model.

    Attributes:
        trainable: numbers that AdamW moves.
        adapter: numbers in lora_A and lora_B at the initial rank.
        state_bytes: optimizer state beside the weights: moments, importance, masks.
        owned_bytes: everything that the optimizer holds, with factors, hypernetworks and the gradient buffer.
    """

    trainable: int
    adapter: int
    state_bytes: int
    owned_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Of one run; bytes are for each worker, ``rows`` is the fingerprint of the tokenised rows, ``rows_sha256`` that of
    the tokens of each part, ``decided`` is what the recipe leaves open (null) as the optimizer decides it, and
    ``notes`` say what of the rows does not count.

    ``activation_bytes`` follows Korthikanti et al. (arXiv 2205.05198, table 2, without the attention matrix, which
    fused kernels do not keep): 34 bytes per token, hidden unit and layer in 16 bits, twice that in 32. In 16 bits
    PEFT's layers keep a float32 copy of every adapted module's input besides. Recomputation keeps the layers' inputs,
    and at a time either one layer's activations or the logits with their float32 copy, softmax and gradient. Where the
    logits of an evaluation's batch, with the keys and values of its tokens, are more than all that, or the keys and
    values of the answers that it generates, it is these.
    """

    rows: str
    rows_sha256: dict[str, str]
    train_rows: int
    held_out_rows: int
    steps: int
    base_parameters: int
    modules: int
    layers: int
    rank_initial: int
    rank_target: int
    pruning: dict[str, Any]
    sizes: Sizes
    adalora: Sizes
    base_bytes: int
    adapter_bytes: int
    activation_bytes: int
    decided: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def memory_bytes(self) -> int:
        """Peak of one worker, without the runtime's own share."""
        return self.base_bytes + self.adapter_bytes + self.sizes.owned_bytes + self.activation_bytes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory_bytes": self.memory_bytes}


def meta_model(recipe: Recipe, task: Task, total_steps: int) -> PeftModel:
    """The model and its adapter without memory behind them.

    Raises:
        RecipeError: the architecture does not fit the task, or the weights or the adapter do not fit the architecture.
    """
    extra = {} if task.num_labels is None else {"num_labels": task.num_labels}
    config = load_config(recipe.model, **extra)
    factory = AutoModelForCausalLM if task.num_labels is None else AutoModelForSequenceClassification
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if task.num_labels is None and encoder:
        allowed = f"classification: {config.model_type} sees the tokens that it would have to predict"
        raise RecipeError([Problem("task.kind", recipe.task.kind, allowed)])
    with torch.device("meta"):
        try:
            base = factory.from_config(config, dtype=getattr(torch, recipe.model.dtype))
        except Exception as error:  # whatever a config that says nonsense leads to
            allowed = f"a model for task.kind={recipe.task.kind} ({type(error).__name__}: {first_line(error)[:300]})"
            field = "config" if recipe.model.config else "path"
            raise RecipeError([Problem(f"model.{field}", getattr(recipe.model, field), allowed)]) from error
        problems = weight_problems(recipe, base, task.num_labels) + _row_problems(recipe, task, base)
        if problems:
            raise RecipeError(problems)
        model = attach(base, recipe, task.num_labels, total_steps)
    return prepare(model, recipe)


def _positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest row that a model can take; None where it says nothing."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    # RoBERTa and its kin count positions from the one after their padding's.
    before = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return positions - max(before, default=0)


def _row_problems(recipe: Recipe, task: Task, model: PreTrainedModel) -> list[Problem]:
    """Rows that the model cannot take or learn nothing from."""
    text = model.config.get_text_config()
    problems = []
    packed = task.packed
    largest, longest = (max(packed.count(part, name) for part in PARTS) for name in ("largest", "longest"))
    largest = max(largest, int(task.tokenizer.pad_token_id or 0))  # which no row has, and every batch
    if largest >= text.vocab_size:
        allowed = f"a tokenizer of the model, which has {text.vocab_size:,} tokens: this one gives number {largest:,}"
        problems.append(Problem("model.tokenizer", recipe.model.tokenizer or recipe.model.path, allowed))
    positions = _positions(model)
    if positions is not None and positions < longest:
        problems.append(
            Problem("task.max_length", recipe.task.max_length, f"at most the model's {positions} positions")
        )
    if positions is not None and recipe.task.kind == "generation":
        prompt, new = packed.count("eval", "longest_prompt"), recipe.task.max_new_tokens
        if prompt + new > positions:
            allowed = (
                f"at most {max(0, positions - prompt)}: the longest held-out prompt has {prompt} tokens, "
                f"the model {positions} positions"
            )
            problems.append(Problem("task.max_new_tokens", new, allowed))
    for part in PARTS:
        if not packed.count(part, "targets"):
            rows = packed.count(part, "rows")
            why = f"{rows} of {rows} have no text"
            if recipe.task.kind in ("generation", "completion"):
                why = f"in {rows} of {rows} the prompt alone fills task.max_length tokens"
            allowed = f"rows with something to learn: {why}"
            problems.append(Problem(f"data.{part}", getattr(recipe.data, part) or recipe.data.source, allowed))
    unanswered, rows = (packed.count("eval", name) for name in ("unanswered", "rows"))
    if recipe.task.kind == "generation" and unanswered == rows:
        allowed = (
            f"rows with a final answer, such as #### 12, in column {recipe.data.completion}: none of {rows} has one, "
            "and exact match would be 0; task.kind=completion needs none"
        )
        problems.append(Problem("data.eval", recipe.data.eval or recipe.data.source, allowed))
    return problems


def _notes(recipe: Recipe, packed: Packed) -> list[str]:
    """What of the rows is lost without an error."""
    found = []
    for part, words in (("train", "training"), ("eval", "held-out")):
        cut, empty, rows = (packed.count(part, name) for name in ("cut", "empty", "rows"))
        if cut:
            more = f"; nothing is left to learn of {empty:,}" if empty else ""
            found.append(f"{cut:,} of {rows:,} {words} rows are cut at task.max_length={recipe.task.max_length}{more}")
        elif empty:
            found.append(f"{empty:,} of {rows:,} {words} rows have no text")
    if unanswered := packed.count("eval", "unanswered"):
        found.append(f"{unanswered:,} held-out rows have no final answer (#### 12) and count as wrong")
    if long := packed.count("eval", "long"):
        found.append(
            f"{long:,} of {packed.count('eval', 'rows'):,} held-out completions are longer than "
            f"task.max_new_tokens={recipe.task.max_new_tokens}, where generation stops"
        )
    return found


def _chat_notes(task: Task) -> list[str]:
    end, own = task.reply_end, task.tokenizer.eos_token
    if end is None or end == own:
        return []
    told = f"replies end with {end}, which is not the tokenizer's own end ({own})"
    return [f"{told}: what serves the adapter has to stop there"]


def _decided(optimizer: AdapterOptimizer) -> dict[str, Any]:
    """By the recipe's names, where it has them."""
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups if g.get("name") and g["params"]}
    keys = {
        "factors": "lr",
        "hypernetwork_trunk": "trunk_lr",
        "hypernetwork_output": "output_lr",
        "other": "other_lr",
    }
    found = {f"optimizer.{keys[name]}": rate for name, rate in rates.items()}
    if not isinstance(optimizer, HyperAdaLoRA):
        return found
    found |= {"gamma": optimizer.gamma, "optimizer.direction": optimizer.direction}
    if optimizer.method.singular_values:
        found["adapter.factorization"] = "fused" if optimizer.fused else "triplet"
    if optimizer.hypernetwork is not None:
        found["hypernetwork.intermediate_size"] = optimizer.hypernetwork.inner
    return found


def _sizes(
    recipe: Recipe, model: PeftModel, steps: int, source: Source | None = None
) -> tuple[Sizes, int, int, dict[str, Any]]:
    optimizer = build_optimizer(recipe, model, steps, World(device=torch.device("meta")))
    freeze = recipe.hypernetwork.freeze
    if METHODS[recipe.method].hypernetwork and (source is not None or freeze == "trunk"):
        assert isinstance(optimizer, HyperAdaLoRA)
        start_from(optimizer, source, freeze)
    sizes = Sizes(
        optimizer.trainable_parameters, optimizer.layout.parameters, optimizer.state_bytes, optimizer.owned_bytes
    )
    return sizes, optimizer.plan.initial, optimizer.plan.target, _decided(optimizer)


def inspect(recipe: Recipe, *, resume: bool = False, say: Callable[[str], None] = lambda text: None) -> Estimate:
    """Validate a recipe against its data and its model, and estimate the run.

    Args:
        recipe: parsed.
        resume: the run has its hypernetworks, and their source is not looked at.
        say: is told what is being done.

    Raises:
        RecipeError: with everything that is wrong with model, data, adapter, schedule and the hypernetworks' source.
    """
    problems, source = model_problems(recipe.model) + worker_problems(recipe.ray), None
    if recipe.hypernetwork.init_from is not None and not resume:
        try:
            source = read(recipe.hypernetwork.init_from)
        except RecipeError as error:
            problems += error.problems
    if problems:
        # Rows can be read without a model, so that a wrong path of each is told at once.
        try:
            survey(recipe.data, recipe.task.kind)
        except RecipeError as error:
            problems += error.problems
        raise RecipeError(problems)
    task = build_task(recipe, load_tokenizer(recipe.model), say=say)
    rows, batch = len(task.train), recipe.training.batch_size
    if rows < batch:
        raise RecipeError([Problem("training.batch_size", batch, f"at most the {rows} training rows")])
    steps = recipe.total_steps(rows)
    read_baseline(monitors_of(recipe), steps)
    model = meta_model(recipe, task, steps)
    base = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    base_bytes = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".lora_" not in n)
    adapter_bytes = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    plain = METHODS[recipe.method].dora is False and recipe.method != "peft-adalora"
    reference = recipe if recipe.method == "adalora" else recipe.model_copy(update={"method": "adalora"})
    reference_model = copy.deepcopy(model) if plain else meta_model(reference, task, steps)
    sizes, initial, target, decided = _sizes(recipe, model, steps, source)
    adalora = _sizes(reference, reference_model, steps)[0]
    pruning = recipe.resolved_pruning(steps)
    layers, hidden = _shape(model)
    return Estimate(
        rows=task.packed.fingerprint,
        rows_sha256=task.packed.sha256,
        train_rows=rows,
        held_out_rows=len(task.held_out),
        steps=steps,
        base_parameters=base,
        modules=initial // recipe.adapter.rank,
        layers=layers,
        rank_initial=initial,
        rank_target=target,
        pruning=asdict(pruning) if METHODS[recipe.method].singular_values else {},
        sizes=sizes,
        adalora=adalora,
        base_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        activation_bytes=_activations(recipe, task, model, layers, hidden),
        decided=decided,
        notes=_notes(recipe, task.packed) + _chat_notes(task),
    )


def _shape(model: PeftModel) -> tuple[int, int]:
    config: PretrainedConfig = model.get_base_model().config  # type: ignore[assignment]
    config = config.get_text_config()
    return int(config.num_hidden_layers), int(config.hidden_size)


def _key_width(config: PretrainedConfig) -> int:
    """Numbers in the keys of one token in one layer; 0 without attention."""
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    if not heads:
        return 0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(size) * int(getattr(config, "num_key_value_heads", None) or heads)


def _activations(recipe: Recipe, task: Task, model: PeftModel, layers: int, hidden: int) -> int:
    width = torch.empty((), dtype=getattr(torch, recipe.model.dtype)).element_size()
    packed = task.packed
    per_pass = -(-recipe.training.batch_size // (recipe.ray.fewest * recipe.training.gradient_accumulation))
    tokens = per_pass * min(recipe.task.max_length, packed.count("train", "longest"))
    copied = 4 * sum(m.in_features or 0 for m in model.modules() if isinstance(m, LoraLayer)) if width < 4 else 0
    every_layer = 34 * hidden * width // 2 * layers + copied
    config: PretrainedConfig = model.get_base_model().config  # type: ignore[assignment]
    vocabulary = 0 if task.num_labels is not None else int(config.get_text_config().vocab_size)
    logits = vocabulary * (12 + width)
    evaluated = recipe.training.eval_batch_size * min(recipe.task.max_length, packed.count("eval", "longest"))
    # Models that generate keep keys and values of every token, also where only the loss is asked for.
    kept = 0 if task.num_labels is not None else 2 * layers * _key_width(config.get_text_config()) * width
    answered = packed.count("eval", "longest_prompt") + recipe.task.max_new_tokens
    generated = recipe.training.eval_batch_size * answered * kept if recipe.task.kind == "generation" else 0
    evaluation = max(evaluated * (vocabulary * width + kept), generated)
    if recipe.model.gradient_checkpointing:
        return max(evaluation, tokens * (2 * width * hidden * layers + max(every_layer // layers, logits)))
    return max(evaluation, tokens * (every_layer + logits))
