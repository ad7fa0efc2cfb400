"""The typed recipe: one YAML file is a whole run.

Every field states its unit and allowed values; unknown keys, wrong types and impossible combinations are reported
together, each with field, value and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hyperlora import storage
from hyperlora.baselines import BASELINES, SINGLE_WORKER
from hyperlora.hypernetworks import Freeze, HypernetworkSpec, Kind
from hyperlora.optimizer import METHODS as FACTOR_METHODS
from hyperlora.optimizer import Factorization, Initialization
from hyperlora.pruning import BudgetPlan, Pruning, Schedule, Score
from hyperlora.update_rules import AdamSettings, Direction, Rule, UpdateRule

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
METHODS = FACTOR_METHODS | BASELINES
MethodName = Literal[
    "lora",
    "dora",
    "dylora",
    "adalora",
    "hyperlora",
    "hyperdora",
    "hyperdylora",
    "hyperadalora",
    "rslora",
    "eva",
    "peft-adalora",
]
assert set(MethodName.__args__) == set(METHODS)  # type: ignore[attr-defined]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


class ModelConfig(Section):
    """The base model."""

    path: str = Field(description="folder, hub name, or builtin:storylm (the small model that ships with the package)")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random builds the architecture without weights, for smoke tests"
    )
    architecture: dict[str, Any] = Field(
        default_factory=dict,
        description="published config with model_type; used when init is random",
    )
    config: dict[str, Any] = Field(default_factory=dict, description="overrides of the model's own config")
    tokenizer: str | None = Field(None, description="folder, hub name or builtin:storylm; null takes path")
    dtype: Literal["float32", "bfloat16", "float64"] = Field("float32", description="of the frozen base weights")
    revision: str | None = Field(None, description="hub revision (commit hash) of the base model")
    trust_remote_code: bool = Field(False, description="run code from the model repository; needs revision")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")


class DataConfig(Section):
    """Rows for training and evaluation."""

    source: Literal["word-problems", "entailment", "files", "hub"] = Field(
        description="the two generated tasks, files below root, or a hub data set"
    )
    root: str | None = Field(None, description="folder of the files, or hub data set name")
    subset: str | None = Field(None, description="configuration of a hub data set")
    train: str | None = Field(None, description="file below root, or hub split, to train on")
    eval: str | None = Field(None, description="file below root, or hub split, held out")
    format: Literal["jsonl", "json", "tsv", "csv", "label-text"] = Field(
        "jsonl", description="of the files; label-text is one 'label sentence' a line"
    )
    encoding: str = Field("utf-8", description="of the files")
    text: str = Field("sentence", description="column of the text, or of the first sentence")
    text_pair: str | None = Field(None, description="column of the second sentence")
    label: str = Field("label", description="column of the class label")
    labels: tuple[str, ...] = Field((), description="class labels in order of their index; empty: sorted from train")
    prompt: str = Field("question", description="column of the prompt (generation)")
    completion: str = Field("answer", description="column of the expected completion (generation)")
    template: str = Field("{prompt}\n\n{completion}", description="text of a language modelling row, from its columns")
    train_rows: Positive | None = Field(None, description="rows to generate, or the most to read; null reads all")
    eval_rows: Positive | None = Field(None, description="held-out rows to generate, or the most to read; null: all")
    seed: NonNegative = Field(0, description="of the generated rows")


class TaskConfig(Section):
    """What is learned and how it is measured."""

    kind: Literal["generation", "classification", "language-modeling"] = Field(
        description="exact match of the final answer, accuracy, or held-out loss"
    )
    max_length: Positive = Field(256, description="tokens; longer rows are cut (prompt and completion together)")
    max_new_tokens: Positive = Field(64, description="tokens generated for an answer at evaluation")
    prompt_format: str = Field("Question: {prompt}\nAnswer:", description="text before a completion (generation)")


class AdapterConfig(Section):
    """The PEFT LoRA adapter."""

    target_modules: str | tuple[str, ...] = Field("all-linear", description="as PEFT's LoraConfig")
    rank: Positive = Field(8, description="initial rank of every module")
    target_rank: float | None = Field(
        None, gt=0, description="mean rank over the modules at the end; null: half of rank; methods with λ only"
    )
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="scale is alpha/rank")
    dropout: Fraction = Field(0.0, description="on the adapter's input")
    modules_to_save: tuple[str, ...] = Field((), description="other modules trained in full, as PEFT's")
    initialization: Initialization = Field("orthonormal", description="of P and Q")
    factorization: Factorization | None = Field(
        None,
        description="triplet: P, λ, Q as AdaLoRA updates them; fused: P and diag(λ)Q; null: fused with hypernetworks",
    )


class HypernetworkConfig(Section):
    """H_P, H_Λ and H_Q, and how their outputs become factors."""

    kind: Kind = Field("attention", description="one BERT layer, an MLP, or a 1-d CNN")
    hidden_size: Positive = Field(312, description="h; 312 is TinyBERT's")
    heads: Positive = Field(12, description="attention heads; must divide hidden_size")
    intermediate_size: Positive | None = Field(None, description="f; null: 1200/312·h, or matched to attention")
    layers: Positive = Field(1, description="depth")
    per_layer: bool = Field(False, description="one set of networks per transformer layer instead of one shared")
    update: Rule = Field("hybrid", description="update rule")
    scale: Annotated[float, Field(gt=0)] = Field(1.0, description="a, weight of the generated part")
    friction: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="μ of the friction rule")
    reanchor_every: Positive = Field(50, description="K of the reanchored rule, optimizer steps")
    init_from: str | None = Field(
        None, description="run, checkpoint or trial folder, or URI, whose hypernetworks to start with; null: new ones"
    )
    freeze: Freeze = Field(
        "none", description="what does not learn: trunk is all but the maps of each dimension; all needs init_from"
    )


class OptimizerConfig(Section):
    """AdamW, its learning rates and schedule."""

    lr: Rate = Field(3e-3, description="of direct factors")
    trunk_lr: Rate | None = Field(None, description="of the hypernetworks' trunks; null: lr, 0.05 lr for hybrid")
    output_lr: Rate | None = Field(None, description="of their output maps; null: lr, 0.05 lr for hybrid")
    other_lr: Rate | None = Field(None, description="of heads and magnitudes; null: lr")
    lambda_ratio: Rate = Field(1.0, description="learning rates of λ and H_Λ over those of P, Q, H_P and H_Q")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="decay of the moments")
    eps: Rate = Field(1e-8, description="added to the root of the second moment")
    direction: Direction | None = Field(
        None,
        description="of the steps of direct factors: adam, or orthogonal, the polar factor of Adam's direction; "
        "null: orthogonal for hyperadalora under hybrid",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled, per unit of learning rate")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="clip of the gradient; null: none")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="of all learning rates")
    warmup: Fraction = Field(0.05, description="fraction of the steps")


class PruningConfig(Section):
    """When the rank falls."""

    schedule: Schedule = Field("interval", description="k values every ΔT steps, AdaLoRA's cubic budget, or none")
    interval: Positive | None = Field(None, description="ΔT, optimizer steps; null: a hundredth of the run")
    count: NonNegative | None = Field(None, description="k, singular values per event; null: as many as needed")
    start: NonNegative | None = Field(None, description="t_init, optimizer steps; null: a tenth of the run")
    final: NonNegative | None = Field(None, description="t_final, optimizer steps; null: two fifths of the run")
    score: Score = Field("smoothed", description="|λ·∂L/∂λ|, its smoothed form, or AdaLoRA's over the triplet")
    beta1: Fraction = Field(0.85, description="decay of the smoothed score's mean (AdaLoRA's value)")
    beta2: Fraction = Field(0.85, description="decay of its uncertainty (AdaLoRA's value)")
    reactivation: bool = Field(
        False, description="pruned values may grow again until the last event, as published AdaLoRA's; method=adalora"
    )


class TrainingConfig(Section):
    """Steps, batches, evaluation, checkpoints."""

    steps: Positive | None = Field(None, description="optimizer steps; give this or epochs")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="passes over the training rows")
    batch_size: Positive = Field(32, description="rows per optimizer step over all workers")
    gradient_accumulation: Positive = Field(1, description="backward passes per optimizer step and worker")
    eval_batch_size: Positive = Field(64, description="rows per forward pass at evaluation and worker")
    eval_every: Positive | None = Field(None, description="optimizer steps between evaluations; null: end only")
    eval_before: bool = Field(True, description="evaluate the base model before the first step")
    checkpoint_every: Positive | None = Field(100, description="optimizer steps; null: end only")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept")


class RayConfig(Section):
    """How the loop is distributed."""

    backend: Literal["ray", "local"] = Field("ray", description="Ray Train workers, or this process alone")
    num_workers: Positive = Field(1, description="Ray Train workers; the batch is split among them")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1, description="CPUs")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0, description="GPUs")
    max_failures: NonNegative = Field(1, description="restarts from the last checkpoint after a worker died")
    address: str | None = Field(None, description="of a running cluster; null starts Ray here")


class StorageConfig(Section):
    """Where checkpoints and adapters go; credentials come from the environment."""

    uri: str = Field("runs", description="folder or URI (s3://, gs://, az://); a run is a folder below it")
    retry_seconds: Annotated[float, Field(ge=0)] = Field(
        60.0, description="seconds that writing a checkpoint is tried again while training goes on"
    )
    final_retry_seconds: Annotated[float, Field(ge=0)] = Field(
        300.0, description="seconds that writing the end of the run is tried again before it is kept here"
    )


class MLflowConfig(Section):
    """Tracking."""

    enabled: bool = Field(True, description="log to MLflow")
    tracking_uri: str = Field("sqlite:///mlflow.db", description="server or database")
    experiment: str = Field("hyperlora", description="experiment name")


class MonitorsConfig(Section):
    """Warnings of a run that goes wrong; each is given once and changes nothing."""

    baseline: str | None = Field(
        None, description="file or URI of a result.json, comparison.json or list of losses; null: no stall monitor"
    )
    window: Annotated[int, Field(gt=1)] | None = Field(
        None, description="optimizer steps that a loss is averaged over; null: a twentieth of the run, at least 10"
    )
    deviations: Rate = Field(5.0, description="standard errors that make a change of a loss or metric more than noise")
    stall_slowdown: Annotated[float, Field(ge=1)] = Field(
        2.0, description="the loss is compared with the baseline's after steps/stall_slowdown"
    )
    stall_margin: Rate = Field(0.2, description="fraction of the baseline's whole gain that it may lie above that")
    gradient_factor: Annotated[float, Field(gt=1)] = Field(
        6.0, description="gradient norm (median of 5 steps) over its median of the steps before"
    )
    gradient_history: Annotated[int, Field(ge=10)] = Field(50, description="optimizer steps of that earlier median")


class Recipe(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run's folder")
    description: str = Field("", description="one line for `hyperlora recipes`")
    seed: NonNegative = Field(0, description="of data order, initial values and dropout")
    method: MethodName = Field("hyperadalora", description="one of: " + ", ".join(METHODS))
    gamma: Annotated[float, Field(ge=0)] | None = Field(
        None, description="γ, weight of the orthogonality penalty; null: 0.1 for triplets, 0 for fused factors"
    )
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    hypernetwork: HypernetworkConfig = HypernetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    pruning: PruningConfig = PruningConfig()
    training: TrainingConfig = TrainingConfig()
    monitors: MonitorsConfig = MonitorsConfig()
    ray: RayConfig = RayConfig()
    storage: StorageConfig = StorageConfig()
    mlflow: MLflowConfig = MLflowConfig()

    # ---- what the optimizer is built from

    @property
    def target_rank(self) -> float:
        """Mean rank over the modules at the end: the initial rank for methods without singular values."""
        if not METHODS[self.method].singular_values or self.pruning.schedule == "none":
            return float(self.adapter.rank)
        return self.adapter.rank / 2 if self.adapter.target_rank is None else self.adapter.target_rank

    def total_steps(self, train_rows: int) -> int:
        """T, optimizer steps of the run; the last incomplete batch of an epoch is dropped."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.epochs is not None
        return max(1, int(self.training.epochs * (train_rows // self.training.batch_size)))

    def resolved_pruning(self, total_steps: int) -> Pruning:
        """The pruning schedule with every null filled in for a run of ``total_steps``."""
        c = self.pruning
        return Pruning(
            schedule=c.schedule,
            interval=c.interval or max(1, total_steps // 100),
            count=c.count,
            start=total_steps // 10 if c.start is None else c.start,
            final=2 * total_steps // 5 if c.final is None else c.final,
            score="adalora" if self.method == "peft-adalora" else c.score,  # PEFT has no other
            beta1=c.beta1,
            beta2=c.beta2,
            reactivation=c.reactivation,
        )

    def with_absolute_paths(self) -> Recipe:
        """The recipe as it reads from any working directory: relative paths that exist here are made absolute."""

        def absolute(path: str | None) -> str | None:
            found = path is not None and "://" not in path and Path(path).exists()
            return str(Path(path).absolute()) if found and path is not None else path

        model = self.model.model_copy(
            update={"path": absolute(self.model.path), "tokenizer": absolute(self.model.tokenizer)}
        )
        data = self.data.model_copy(update={"root": absolute(self.data.root)})
        hypernetwork, source = self.hypernetwork, self.hypernetwork.init_from
        if source is not None and "://" not in source:
            # Also when it is gone: a resumed run needs it no more, and has to say the same.
            hypernetwork = hypernetwork.model_copy(update={"init_from": str(Path(source).absolute())})
        monitors = self.monitors.model_copy(update={"baseline": absolute(self.monitors.baseline)})
        mlflow = self.mlflow
        if mlflow.tracking_uri.startswith("sqlite:///"):
            database = Path(mlflow.tracking_uri.removeprefix("sqlite:///")).absolute()
            mlflow = mlflow.model_copy(update={"tracking_uri": f"sqlite:///{database}"})
        changed = {"model": model, "data": data, "hypernetwork": hypernetwork, "monitors": monitors, "mlflow": mlflow}
        return self.model_copy(update=changed)

    def hypernetwork_spec(self) -> HypernetworkSpec:
        c = self.hypernetwork
        return HypernetworkSpec(c.kind, c.hidden_size, c.heads, c.intermediate_size, c.layers, c.per_layer)

    def update_rule(self) -> UpdateRule:
        c = self.hypernetwork
        return UpdateRule(c.update, c.scale, c.friction, c.reanchor_every)

    def adam_settings(self) -> AdamSettings:
        return AdamSettings(self.optimizer.betas, self.optimizer.eps, self.optimizer.weight_decay)


# -------------------------------------------------------------------- reading and reporting


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: dotted field, the value received, what is allowed."""

    field: str
    value: Any
    allowed: str

    def __str__(self) -> str:
        shown = repr(self.value)
        return f"{self.field}: got {shown if len(shown) <= 80 else shown[:77] + '...'}; {self.allowed}"


class RecipeError(ValueError):
    """All problems of a recipe at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count > 1 else ''} in the recipe:"
        super().__init__("\n  ".join([head, *(str(p) for p in self.problems)]))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[list[Problem]]]:
        return type(self), (self.problems,)


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as nested dictionaries.

    Raises:
        RecipeError: the file is not UTF-8 YAML with a mapping at the top.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError([Problem(str(path), str(error).replace("\n", " "), "allowed: UTF-8 YAML")]) from error
    if not isinstance(content, dict):
        raise RecipeError([Problem(str(path), type(content).__name__, "allowed: a mapping of sections")])
    return content


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as everybody who types a learning rate expects."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def apply_overrides(recipe: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted ``key.sub=value`` pairs (values in YAML) in a copy of ``recipe``.

    Raises:
        RecipeError: an override without ``=``, with an empty key, through something that is no section, or with a
            value that is no YAML.
    """
    result = _copied(recipe)
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(Problem(override, override, "allowed: key.sub=value"))
            continue
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            problems.append(Problem(key, text, "allowed: a YAML value (quote special characters)"))
            continue
        node = result
        for depth, part in enumerate(parts[:-1]):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                problems.append(Problem(key, text, f"{'.'.join(parts[: depth + 1])} is a value, not a section"))
                break
        else:
            node[parts[-1]] = value
    if problems:
        raise RecipeError(problems)
    return result


def _copied(node: Any) -> Any:
    return {k: _copied(v) for k, v in node.items()} if isinstance(node, Mapping) else node


def parse(content: Mapping[str, Any]) -> Recipe:
    """Validate nested dictionaries as a recipe.

    Raises:
        RecipeError: with every problem found: unknown keys, wrong types and values, impossible combinations.
    """
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_problem(e) for e in error.errors()]
        bad = [tuple(e["loc"]) for e in error.errors()]
        # Combinations are checked on what is left, so that one answer names everything that can be known.
        try:
            rest = Recipe.model_validate(_without(content, bad))
        except ValidationError:
            raise RecipeError(problems) from None
        named = {p.field for p in problems}
        problems += [p for p in combination_problems(rest) if p.field not in named]
        raise RecipeError(problems) from None
    problems = combination_problems(recipe)
    if problems:
        raise RecipeError(problems)
    return recipe


def _without(content: Any, bad: Sequence[tuple[Any, ...]]) -> Any:
    result = _copied(content)
    for location in bad:
        node = result
        for part in location[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(location[-1], None)
    return result


def _problem(error: Any) -> Problem:
    location = [str(part) for part in error["loc"]]
    field = ".".join(location)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(field, error["input"], _unknown_key(location))
    if kind == "missing":
        return Problem(field, None, f"required: {_describe(location)}")
    if kind in ("literal_error", "enum"):
        return Problem(field, error["input"], f"allowed: {context['expected']}")
    return Problem(field, error["input"], f"{error['msg'].lower()} ({_describe(location)})")


def _section_of(location: Sequence[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(part)
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


def _describe(location: Sequence[str]) -> str:
    section = _section_of(location[:-1])
    field = section.model_fields.get(location[-1]) if section is not None else None
    if field is None:
        return "see the recipe reference"
    if field.description:
        return field.description
    return (field.annotation.__doc__ or "").strip().splitlines()[0] if field.annotation else ""


def _unknown_key(location: Sequence[str]) -> str:
    section = _section_of(location[:-1])
    names = list(section.model_fields) if section is not None else []
    close = difflib.get_close_matches(location[-1], names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {hint}allowed: {', '.join(names)}"


def combination_problems(recipe: Recipe) -> list[Problem]:
    """Everything wrong with a recipe that no single field shows."""
    found: list[Problem] = []

    def add(field: str, value: Any, allowed: str) -> None:
        found.append(Problem(field, value, allowed))

    uris = {
        "storage.uri": recipe.storage.uri,
        "monitors.baseline": recipe.monitors.baseline,
        "hypernetwork.init_from": recipe.hypernetwork.init_from,
    }
    if recipe.data.source == "files":
        uris["data.root"] = recipe.data.root
    for field, uri in uris.items():
        if uri is not None and (allowed := storage.problem(uri)) is not None:
            add(field, storage.redacted(uri), allowed)
    t, r, d, m, h = recipe.training, recipe.ray, recipe.data, recipe.model, recipe.hypernetwork
    if (t.steps is None) == (t.epochs is None):
        add("training.steps", t.steps, "give training.steps or training.epochs, one of the two")
    parts = r.num_workers * t.gradient_accumulation
    if t.batch_size % parts:
        add(
            "training.batch_size",
            t.batch_size,
            f"must be a multiple of ray.num_workers x training.gradient_accumulation = {parts}",
        )
    if r.backend == "local" and r.num_workers > 1:
        add("ray.num_workers", r.num_workers, "ray.backend=local runs one worker; use ray.backend=ray for more")
    if recipe.optimizer.direction == "orthogonal" and METHODS[recipe.method].hypernetwork and h.update != "hybrid":
        add(
            "optimizer.direction", "orthogonal", f"adam for hypernetwork.update={h.update}: nothing is updated directly"
        )
    if h.kind == "attention" and h.hidden_size % h.heads:
        add("hypernetwork.heads", h.heads, f"must divide hypernetwork.hidden_size = {h.hidden_size}")
    found += _warm_start_problems(recipe)
    target = recipe.adapter.target_rank
    if target is not None and target > recipe.adapter.rank:
        add("adapter.target_rank", target, f"at most adapter.rank = {recipe.adapter.rank}")
    if recipe.method in SINGLE_WORKER and r.num_workers > 1:
        add("ray.num_workers", r.num_workers, f"1 for method={recipe.method}, which averages no gradients over workers")
    if recipe.pruning.reactivation and METHODS[recipe.method].hypernetwork:
        add("pruning.reactivation", True, f"false for method={recipe.method}: a generated λ cannot be set to 0")
    if recipe.method == "peft-adalora":
        found += _peft_adalora_problems(recipe)
    if d.source in ("files", "hub"):
        if d.root is None:
            what = "the folder that holds the files" if d.source == "files" else "the hub name of the data set"
            add("data.root", d.root, f"required for data.source={d.source}: {what}")
        for name in ("train", "eval"):
            if getattr(d, name) is None:
                add(f"data.{name}", None, f"required for data.source={d.source}")
    elif {"word-problems": "classification", "entailment": "generation"}[d.source] == recipe.task.kind:
        fit = "generation or language-modeling" if d.source == "word-problems" else "classification"
        add("task.kind", recipe.task.kind, f"data.source={d.source} has rows for {fit}")
    elif d.source == "entailment" and recipe.task.kind != "classification":
        add("task.kind", recipe.task.kind, "data.source=entailment has rows for classification")
    if m.trust_remote_code and m.revision is None:
        add("model.trust_remote_code", True, "needs model.revision, the commit whose code was read and is trusted")
    if "{prompt}" not in recipe.task.prompt_format:
        add("task.prompt_format", recipe.task.prompt_format, "must contain {prompt}")
    if recipe.task.kind == "generation" and recipe.task.max_new_tokens >= recipe.task.max_length:
        add("task.max_new_tokens", recipe.task.max_new_tokens, f"less than task.max_length = {recipe.task.max_length}")
    if t.steps is not None and not found:
        found += schedule_problems(recipe, t.steps, modules=1)
    return found


def _warm_start_problems(recipe: Recipe) -> list[Problem]:
    """Starts of hypernetworks that cannot be, and freezing after which nothing learns."""
    h, found = recipe.hypernetwork, []
    if not METHODS[recipe.method].hypernetwork:
        without = f"for method={recipe.method}, which has no hypernetworks"
        if h.init_from is not None:
            found.append(Problem("hypernetwork.init_from", h.init_from, f"null {without}"))
        if h.freeze != "none":
            found.append(Problem("hypernetwork.freeze", h.freeze, f"none {without}"))
    elif h.freeze == "all":
        if h.update != "hybrid":
            allowed = f"none or trunk for hypernetwork.update={h.update}: nothing else learns the factors"
            found.append(Problem("hypernetwork.freeze", "all", allowed))
        if h.init_from is None:
            allowed = "none or trunk without hypernetwork.init_from: new output maps generate nothing"
            found.append(Problem("hypernetwork.freeze", "all", allowed))
    return found


def _peft_adalora_problems(recipe: Recipe) -> list[Problem]:
    """What AdaLoRA as PEFT ships it cannot do."""
    found = []
    p, target, rank = recipe.pruning, recipe.target_rank, recipe.adapter.rank
    if p.schedule != "cubic":
        found.append(Problem("pruning.schedule", p.schedule, "cubic for method=peft-adalora: PEFT has no other"))
    elif target != int(target) or target >= rank:
        # PEFT counts target_r in whole directions, and its threshold fails on an empty selection.
        allowed = f"a whole number below adapter.rank = {rank} for method=peft-adalora"
        found.append(Problem("adapter.target_rank", target, allowed))
    for name in ("beta1", "beta2"):
        if getattr(p, name) == 0:
            found.append(Problem(f"pruning.{name}", 0, "above 0 for method=peft-adalora"))
    return found


def schedule_problems(recipe: Recipe, total_steps: int, modules: int) -> list[Problem]:
    """Whether the pruning schedule reaches its target within the run; exact once the modules are counted."""
    if not METHODS[recipe.method].singular_values:
        return []
    pruning = recipe.resolved_pruning(total_steps)
    initial = modules * recipe.adapter.rank
    if modules == 1:
        # Modules are not counted yet: only check that events fit at all.
        pruning = Pruning(**{**pruning.__dict__, "count": None})
    try:
        BudgetPlan(pruning, initial, min(initial, max(1, round(recipe.target_rank * modules))), total_steps)
    except ValueError as error:
        shown = {k: getattr(pruning, k) for k in ("schedule", "interval", "count", "start", "final")}
        return [Problem("pruning", shown, str(error))]
    return []
