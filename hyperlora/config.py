"""The typed recipe: one YAML file is a whole run.

Every field states its unit and allowed values; unknown keys, wrong types and impossible combinations are reported
together, each with field, value and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic_core import to_jsonable_python

from hyperlora import plain_yaml, uris
from hyperlora.pruning import BudgetPlan, Pruning, ResolvedPruning, Schedule, Score
from hyperlora.settings import (
    BASELINES,
    SINGLE_WORKER,
    AdamSettings,
    Direction,
    Factorization,
    Freeze,
    HypernetworkSpec,
    Initialization,
    Kind,
    Rule,
    UpdateRule,
)
from hyperlora.settings import METHODS as FACTOR_METHODS

LARGEST = 2**31 - 1
#: Before the name of a model, or of a curve for the stall monitor, that ships with the package.
BUILTIN = "builtin:"
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], Strict(False)]  # YAML has lists
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
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
#: Characters of a value that a message repeats.
LONGEST_VALUE = 160
#: What loading a model's config takes beside the config's own settings.
LOADING = {
    "token",
    "use_auth_token",
    "trust_remote_code",
    "revision",
    "code_revision",
    "auto_map",
    "proxies",
    "cache_dir",
}
assert set(MethodName.__args__) == set(METHODS)  # type: ignore[attr-defined]


class Section(BaseModel):
    # Strict: true is no 1, and "8" is no 8.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


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
    revision: str | None = Field(None, description="hub revision of the base model, best a commit hash")
    trust_remote_code: bool = Field(
        False, description="run code of the hub repository; needs a commit hash in revision"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")


class DataConfig(Section):
    """Rows for training and evaluation."""

    source: Literal["word-problems", "entailment", "files", "hub"] = Field(
        description="the two generated tasks, files below root, or a hub data set"
    )
    root: str | None = Field(None, description="folder of the files, or hub data set name")
    subset: str | None = Field(None, description="configuration of a hub data set")
    revision: str | None = Field(None, description="hub revision of the data set, best a commit hash")
    train: str | None = Field(None, description="file below root, or hub split, to train on")
    eval: str | None = Field(None, description="file below root, or hub split, held out")
    format: Literal["jsonl", "json", "tsv", "csv", "label-text"] = Field(
        "jsonl", description="of the files; label-text is one 'label sentence' a line"
    )
    encoding: str = Field("utf-8", description="of the files")
    text: str = Field("sentence", description="column of the text, or of the first sentence")
    text_pair: str | None = Field(None, description="column of the second sentence")
    label: str = Field("label", description="column of the class label; hub rows that have none (-1) are left out")
    labels: Names = Field((), description="class labels in order of their index; empty: sorted from train")
    prompt: str = Field("question", description="column of the prompt")
    completion: str = Field(
        "answer", description="column of the completion; for generation with its final answer as in #### 12"
    )
    template: str = Field("{prompt}\n\n{completion}", description="text of a language modelling row, from its columns")
    train_rows: Positive | None = Field(None, description="rows to generate, or the most to read; null reads all")
    eval_rows: Positive | None = Field(None, description="held-out rows to generate, or the most to read; null: all")
    seed: NonNegative = Field(0, description="of the generated rows")


class TaskConfig(Section):
    """What is learned and how it is measured."""

    kind: Literal["generation", "classification", "completion", "language-modeling"] = Field(
        description="exact match of the final answer (#### 12), accuracy, loss of completions, or loss of whole rows"
    )
    max_length: Positive = Field(256, description="tokens; longer rows are cut (prompt and completion together)")
    max_new_tokens: Positive = Field(64, description="tokens generated for an answer at evaluation")
    prompt_format: str = Field("Question: {prompt}\nAnswer:", description="text before a completion")
    chat: bool = Field(
        False, description="prompt and completion as turns of the tokenizer's chat template, in place of prompt_format"
    )


class AdapterConfig(Section):
    """The PEFT LoRA adapter."""

    target_modules: str | Names = Field(
        "all-linear", description="all-linear, a list of names, or a regular expression of whole names, as PEFT's"
    )
    rank: Positive = Field(8, description="initial rank of every module")
    target_rank: float | None = Field(
        None, gt=0, description="mean rank over the modules at the end; null: half of rank; methods with λ only"
    )
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="scale is alpha/rank")
    dropout: Fraction = Field(0.0, description="on the adapter's input")
    modules_to_save: Names = Field((), description="other modules trained in full, as PEFT's")
    initialization: Initialization = Field("orthonormal", description="of P and Q")
    factorization: Factorization | None = Field(
        None,
        description="triplet: P, λ, Q as AdaLoRA updates them; fused: P and diag(λ)Q; null: fused with hypernetworks",
    )


class HypernetworkConfig(Section):
    """H_P, H_Λ and H_Q, and how their outputs become factors."""

    kind: Kind = Field("attention", description="one BERT layer, an MLP, or a 1-d CNN")
    hidden_size: Annotated[int, Field(gt=0, le=4096)] = Field(312, description="h; 312 is TinyBERT's")
    heads: Positive = Field(12, description="attention heads; must divide hidden_size")
    intermediate_size: Annotated[int, Field(gt=0, le=16384)] | None = Field(
        None, description="f; null: 1200/312·h, or matched to attention"
    )
    layers: Annotated[int, Field(gt=0, le=24)] = Field(1, description="depth")
    per_layer: bool = Field(False, description="one set of networks per transformer layer instead of one shared")
    update: Rule = Field("hybrid", description="update rule")
    scale: Annotated[float, Field(gt=0)] = Field(1.0, description="a, weight of the generated part")
    friction: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="μ of the friction rule")
    reanchor_every: Positive = Field(50, description="K of the reanchored rule, optimizer steps")
    every: Positive = Field(8, description="K of the hybrid rule, optimizer steps: Φ moves at every K-th")
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
    lambda_ratio: Rate = Field(
        1.0, description="learning rates of λ and H_Λ over those of P, Q, H_P and H_Q; triplets only"
    )
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = Field((0.9, 0.999), description="decay of the moments")
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
    count: NonNegative | None = Field(
        None, description="k, singular values per event of schedule=interval; null: as many as needed"
    )
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


def _workers(value: Any) -> Any:
    """A number, or a range, which is a list in YAML."""
    several = isinstance(value, list | tuple)
    parts = value if several else [value]
    counts = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= LARGEST for n in parts)
    if not counts or (several and (len(parts) != 2 or parts[0] > parts[1])):
        raise ValueError("allowed: a number of at least 1, or [fewest, most]")
    return tuple(parts) if several else value


def _gpus(value: float) -> float:
    """One GPU or a part of one: more would be reserved and never used."""
    if value > 1:
        raise ValueError("allowed: at most 1: a worker computes on one GPU; use more workers")
    return value


Workers = Annotated[int | tuple[int, int], BeforeValidator(_workers)]
Gpus = Annotated[float, Field(ge=0), AfterValidator(_gpus)]
Placement = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Share = Annotated[float, Field(gt=0)]


class RayConfig(Section):
    """How the loop is distributed."""

    backend: Literal["ray", "local"] = Field("ray", description="Ray Train workers, or this process alone")
    num_workers: Workers = Field(
        1, description="Ray Train workers, which split each batch; [fewest, most]: as many as the cluster has room for"
    )
    cpus_per_worker: Share = Field(1, description="CPUs")
    gpus_per_worker: Gpus = Field(0, description="GPUs: one, or a part of one")
    accelerator_type: str | None = Field(None, description="of the nodes for the workers, such as H100; null: any")
    placement: Placement = Field("PACK", description="of the workers on nodes: few nodes, or many; STRICT: or none")
    max_failures: NonNegative = Field(1, description="restarts from the last checkpoint after a worker died")
    address: str | None = Field(None, description="of a running cluster; null starts Ray here")

    @property
    def fewest(self) -> int:
        """Workers that the run can do with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """Workers that the run can use."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class ClusterConfig(Section):
    """What is different when the recipe is submitted to a cluster; null: the same as here."""

    address: str | None = Field(None, description="URL of the cluster's dashboard, such as http://HOST:8265")
    num_workers: Workers | None = Field(None, description="in place of ray.num_workers")
    cpus_per_worker: Share | None = Field(None, description="in place of ray.cpus_per_worker")
    gpus_per_worker: Gpus | None = Field(None, description="in place of ray.gpus_per_worker")
    accelerator_type: str | None = Field(None, description="in place of ray.accelerator_type")
    placement: Placement | None = Field(None, description="in place of ray.placement")
    storage_uri: str | None = Field(None, description="in place of storage.uri")
    tracking_uri: str | None = Field(None, description="in place of mlflow.tracking_uri")
    env: Names = Field((), description="names of variables whose values the job gets, read where it is submitted")

    def overrides(self) -> list[str]:
        """What a job has to change in the recipe, as ``key.sub=value``."""
        places = {"storage_uri": "storage.uri", "tracking_uri": "mlflow.tracking_uri"}
        values = self.model_dump(mode="json", exclude={"address", "env"})
        return [f"{places.get(k, f'ray.{k}')}={json.dumps(v)}" for k, v in values.items() if v is not None]


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
    experiment: str = Field("hyperlora", min_length=1, description="experiment name")


class MonitorsConfig(Section):
    """Warnings of a run that goes wrong; each is given once and changes nothing."""

    baseline: str | None = Field(
        None,
        description="file or URI of a result.json, comparison.json or list of losses; builtin:quickstart and "
        "builtin:quickstart-entailment, these recipes' curves, count for their tasks alone; null: no stall monitor",
    )
    window: Annotated[int, Field(gt=1)] | None = Field(
        None, description="optimizer steps that a loss is averaged over; null: a twentieth of the run, at least 10"
    )
    deviations: Rate = Field(5.0, description="standard errors that make a change of a loss or metric more than noise")
    stall_slowdown: Annotated[float, Field(ge=1)] = Field(
        2.0, description="the loss is compared with the baseline's after steps/stall_slowdown"
    )
    stall_margin: Rate = Field(
        0.2, description="fraction of the baseline's gain after its first window that it may lie above that"
    )
    gradient_factor: Annotated[float, Field(gt=1)] = Field(
        6.0, description="gradient norm (median of 5 steps) over its median of the steps before"
    )
    gradient_history: Annotated[int, Field(ge=10)] = Field(50, description="optimizer steps of that earlier median")


class Recipe(Section):
    """One run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="of the run's folder: letters, digits, '.', '_' and '-'",
    )
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
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    mlflow: MLflowConfig = MLflowConfig()

    # ---- what the optimizer is built from

    @property
    def target_rank(self) -> float:
        """Mean rank over the modules at the end: the initial rank for methods without singular values."""
        if not METHODS[self.method].singular_values or self.pruning.schedule == "none":
            return float(self.adapter.rank)
        return self.adapter.rank / 2 if self.adapter.target_rank is None else self.adapter.target_rank

    @property
    def has_lambda(self) -> bool:
        """Whether λ is updated for itself, with P and Q, and has a learning rate."""
        method = METHODS[self.method]
        triplets = method.singular_values and not method.fuses(self.adapter.factorization)
        return triplets and self.method not in BASELINES

    def total_steps(self, train_rows: int) -> int:
        """T, optimizer steps of the run; the last incomplete batch of an epoch is dropped."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.epochs is not None
        return max(1, int(self.training.epochs * (train_rows // self.training.batch_size)))

    def resolved_pruning(self, total_steps: int) -> ResolvedPruning:
        """The pruning schedule with every null filled in for a run of ``total_steps``."""
        c = self.pruning
        return Pruning(
            schedule=c.schedule,
            interval=c.interval,
            count=c.count,
            start=c.start,
            final=c.final,
            score="adalora" if self.method == "peft-adalora" else c.score,  # PEFT has no other
            beta1=c.beta1,
            beta2=c.beta2,
            reactivation=c.reactivation,
        ).resolved(total_steps)

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
            hypernetwork = hypernetwork.model_copy(update={"init_from": uris.absolute(source)})
        monitors = self.monitors.model_copy(update={"baseline": absolute(self.monitors.baseline)})
        mlflow = self.mlflow
        if mlflow.tracking_uri.startswith("sqlite:///"):
            database = Path(mlflow.tracking_uri.removeprefix("sqlite:///")).expanduser().absolute()
            mlflow = mlflow.model_copy(update={"tracking_uri": f"sqlite:///{database}"})
        # Workers have a working directory of their own, and look for the rows below it.
        storage = self.storage.model_copy(update={"uri": uris.absolute(self.storage.uri)})
        changed = {"model": model, "data": data, "hypernetwork": hypernetwork, "monitors": monitors, "mlflow": mlflow}
        changed["storage"] = storage
        return self.model_copy(update=changed)

    def hypernetwork_spec(self) -> HypernetworkSpec:
        c = self.hypernetwork
        return HypernetworkSpec(c.kind, c.hidden_size, c.heads, c.intermediate_size, c.layers, c.per_layer)

    def update_rule(self) -> UpdateRule:
        c = self.hypernetwork
        return UpdateRule(c.update, c.scale, c.friction, c.reanchor_every, c.every)

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
        shown = uris.without_secrets(repr(self.value))
        shown = shown if len(shown) <= LONGEST_VALUE else shown[: LONGEST_VALUE - 3] + "..."
        return uris.without_secrets(f"{self.field}: got {shown}; {self.allowed}")


class RecipeError(ValueError):
    """All problems of a recipe at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count > 1 else ''}:"
        super().__init__("\n  ".join([head, *(str(p) for p in self.problems)]))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[list[Problem]]]:
        return type(self), (self.problems,)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def first_line(error: BaseException) -> str:
    """What an error says, in one line: all problems of a recipe, the first line of anything else, or its type."""
    if isinstance(error, RecipeError):
        return "; ".join(map(str, error.problems))
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as nested dictionaries.

    Raises:
        RecipeError: the file is not UTF-8 YAML with a mapping at the top, or larger than any recipe.
    """

    def refused(value: Any, allowed: str) -> RecipeError:
        return RecipeError([Problem(str(path), value, allowed)])

    try:
        size = path.stat().st_size
        if size > plain_yaml.LARGEST:
            raise refused(f"{size:,} bytes", f"allowed: at most {plain_yaml.LARGEST:,}")
        content = plain_yaml.load(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise refused(error.strerror, "allowed: a file that can be read") from error
    except UnicodeDecodeError as error:
        raise refused(f"{error.reason} at byte {error.start}", "allowed: UTF-8") from error
    except ValueError as error:
        raise refused(path.name, f"allowed: plain YAML without tags, aliases and repeated keys ({error})") from error
    if not isinstance(content, dict):
        found = "an empty file" if content is None else type(content).__name__
        raise refused(found, "allowed: a mapping of sections")
    return content


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
            value = plain_yaml.load(text)
        except ValueError:
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
        problems = _problems(error.errors())
        # A wrong member, whose place is a number, goes with its list.
        bad = [_location([part for part in e["loc"] if isinstance(part, str)]) for e in error.errors()]
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


def _without(content: Any, bad: Sequence[Sequence[str]]) -> Any:
    result = _copied(content)
    for location in bad:
        node = result
        for part in location[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(location[-1], None)
    return result


def _problem(error: Any) -> Problem:
    location = _location(error["loc"])
    field = ".".join(location)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(field, error["input"], _unknown_key(location))
    if kind == "missing" and _section_of(location[:-1]) is not None:
        return Problem(field, None, f"required: {_describe(location)}")
    if kind in ("literal_error", "enum"):
        return Problem(field, error["input"], f"allowed: {context['expected']}")
    if kind == "model_type":
        return Problem(field, error["input"], "allowed: a section of key: value lines")
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return Problem(field, error["input"], f"{message} ({_describe(location)})")


def _location(parts: Sequence[Any]) -> list[str]:
    """Where an error is, without the names that pydantic gives to the members of a union."""
    location: list[str] = []
    for part in parts:
        outside = bool(location) and _section_of(location) is None and _section_of(location[:-1]) is not None
        if not (outside and isinstance(part, str)):
            location.append(str(part))
    return location


def _problems(errors: Sequence[Any]) -> list[Problem]:
    """One problem for each field: the members of a union complain one by one."""
    found: dict[str, Problem] = {}
    for problem in map(_problem, errors):
        found.setdefault(problem.field, problem)
    return list(found.values())


def _section_of(location: Sequence[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(part)
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


def default_of(key: str) -> Any:
    """What a recipe has under a dotted key that it does not name, as JSON has it; None of one that it has to name."""
    *sections, name = key.split(".")
    section = _section_of(sections)
    field = None if section is None else section.model_fields.get(name)
    if field is None or field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


def parse_recorded(content: Mapping[str, Any]) -> Recipe:
    """The recipe of a run as it was recorded: on what it ran is nothing to who reads what came of it.

    Raises:
        RecipeError: as :func:`parse`.
    """
    return parse({key: value for key, value in content.items() if key not in ("ray", "cluster")})


def _describe(location: Sequence[str]) -> str:
    names = [part for part in location if not part.isdigit()] or list(location)  # a member is described by its list
    section = _section_of(names[:-1])
    field = section.model_fields.get(names[-1]) if section is not None and names else None
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

    found += _uri_problems(recipe)
    t, r, d, m, h = recipe.training, recipe.ray, recipe.data, recipe.model, recipe.hypernetwork
    if (t.steps is None) == (t.epochs is None):
        add("training.steps", t.steps, "give training.steps or training.epochs, one of the two")
    parts = r.most * t.gradient_accumulation
    # Of a range no number of workers is known; theirs may differ by a row.
    if t.batch_size % parts if r.fewest == r.most else t.batch_size < parts:
        least = "a multiple of ray.num_workers" if r.fewest == r.most else "at least the most of ray.num_workers"
        add("training.batch_size", t.batch_size, f"must be {least} x training.gradient_accumulation = {parts}")
    if r.backend == "local" and r.most > 1:
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
    if recipe.method in SINGLE_WORKER and r.most > 1:
        add("ray.num_workers", r.num_workers, f"1 for method={recipe.method}, which averages no gradients over workers")
    if recipe.pruning.reactivation and METHODS[recipe.method].hypernetwork:
        add("pruning.reactivation", True, f"false for method={recipe.method}: a generated λ cannot be set to 0")
    if recipe.pruning.schedule == "cubic" and recipe.pruning.count is not None:
        add("pruning.count", recipe.pruning.count, "null for pruning.schedule=cubic, whose budget sets it")
    if recipe.optimizer.lambda_ratio != 1 and not recipe.has_lambda:
        allowed = "1 where no λ is updated for itself: that is in the triplets of methods with singular values"
        add("optimizer.lambda_ratio", recipe.optimizer.lambda_ratio, allowed)
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
        fit = "generation, completion or language-modeling" if d.source == "word-problems" else "classification"
        add("task.kind", recipe.task.kind, f"data.source={d.source} has rows for {fit}")
    elif d.source == "entailment" and recipe.task.kind != "classification":
        add("task.kind", recipe.task.kind, "data.source=entailment has rows for classification")
    found += _model_problems(m)
    found += _data_problems(d)
    targets = recipe.adapter.target_modules
    if not targets:
        add("adapter.target_modules", targets, "all-linear, or one name or more")
    elif isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            add("adapter.target_modules", targets, f"a regular expression ({error})")
    if "{prompt}" not in recipe.task.prompt_format:
        add("task.prompt_format", recipe.task.prompt_format, "must contain {prompt}")
    if recipe.task.chat:
        if recipe.task.kind not in ("generation", "completion"):
            add("task.chat", True, "for task.kind=generation and completion")
        if recipe.task.prompt_format != TaskConfig.model_fields["prompt_format"].default:
            add("task.prompt_format", recipe.task.prompt_format, "its default beside task.chat=true, which replaces it")
    if recipe.task.kind == "generation" and recipe.task.max_new_tokens >= recipe.task.max_length:
        add("task.max_new_tokens", recipe.task.max_new_tokens, f"less than task.max_length = {recipe.task.max_length}")
    # The schedule can be checked when nothing that it is made of is wrong.
    made_of = ("adapter.rank", "adapter.target_rank", "pruning", "training")
    if t.steps is not None and not any(p.field.startswith(made_of) for p in found):
        found += schedule_problems(recipe, t.steps, modules=1)
    return found


def worker_problems(settings: RayConfig) -> list[Problem]:
    """Workers that one run cannot have, whatever the cluster: trials of one process each know nothing of each other."""
    gpus, placement = settings.gpus_per_worker, settings.placement
    if not isinstance(settings.num_workers, int) and placement.startswith("STRICT"):
        # Ray starts as many as there is room for on all nodes together, and tries again without end what has no place.
        allowed = f"one number for ray.placement={placement}; PACK or SPREAD for a range"
        return [Problem("ray.num_workers", settings.num_workers, allowed)]
    if settings.most == 1 or not 0 < gpus < 1:
        return []
    if not isinstance(settings.num_workers, int):
        allowed = f"a whole number for ray.num_workers={list(settings.num_workers)}: Ray adds up parts of several GPUs"
        return [Problem("ray.gpus_per_worker", gpus, allowed)]
    if gpus <= 0.5 and placement != "STRICT_SPREAD":
        allowed = f"above 0.5 for {settings.most} workers: NCCL refuses two of a run on one GPU"
        return [Problem("ray.gpus_per_worker", gpus, allowed)]
    return []


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


def _uri_problems(recipe: Recipe) -> list[Problem]:
    """Paths and URIs that name no place, or a secret."""
    places: dict[str, str | None] = {
        "storage.uri": recipe.storage.uri,
        "monitors.baseline": recipe.monitors.baseline,
        "hypernetwork.init_from": recipe.hypernetwork.init_from,
        "data.root": recipe.data.root if recipe.data.source == "files" else None,
        "cluster.storage_uri": recipe.cluster.storage_uri,
    }
    # Read by libraries with schemes of their own.
    others: dict[str, str | None] = {
        "mlflow.tracking_uri": recipe.mlflow.tracking_uri,
        "ray.address": recipe.ray.address,
        "cluster.address": recipe.cluster.address,
        "cluster.tracking_uri": recipe.cluster.tracking_uri,
        "model.path": recipe.model.path,
        "model.tokenizer": recipe.model.tokenizer,
    }
    written = ("storage.uri", "cluster.storage_uri")
    checked = [(field, uri, uris.problem(uri, field in written)) for field, uri in places.items() if uri is not None]
    checked += [(field, uri, uris.secret_problem(uri)) for field, uri in others.items() if uri is not None]
    found = [Problem(field, uris.redacted(uri), allowed) for field, uri, allowed in checked if allowed is not None]
    # Whatever else a recipe says ends in logs and in MLflow as well.
    for field, value in flatten(recipe.model_dump(mode="json")).items():
        if field not in places | others and uris.without_secrets(str(value)) != str(value):
            found.append(Problem(field, uris.without_secrets(str(value)), uris.WITHOUT_CREDENTIALS))
    return found


def _model_problems(model: ModelConfig) -> list[Problem]:
    """What would run code that nobody read, or hide a loading option in the model's config."""
    found = []
    if model.trust_remote_code:
        if model.revision is None or not COMMIT_HASH.fullmatch(model.revision):
            allowed = "the commit whose code was read and is trusted, 40 hexadecimal digits, for trust_remote_code"
            found.append(Problem("model.revision", model.revision, allowed))
        for field, path in (("model.path", model.path), ("model.tokenizer", model.tokenizer)):
            if path is not None and Path(path).exists():
                allowed = "a hub name for trust_remote_code: no revision pins the code of a local folder"
                found.append(Problem(field, path, allowed))
    for section in ("config", "architecture"):
        for key in sorted(LOADING & getattr(model, section).keys()):
            allowed = "no setting of a model; a token comes from the environment (HF_TOKEN), the rest from the recipe"
            found.append(Problem(f"model.{section}.{key}", "***", allowed))
    return found


def _data_problems(data: DataConfig) -> list[Problem]:
    """What no file could satisfy."""
    found = []
    repeated = sorted({label for label in data.labels if data.labels.count(label) > 1})
    if repeated or len(data.labels) == 1:
        found.append(Problem("data.labels", data.labels, "two labels or more, each once"))
    try:
        "".encode(data.encoding)
    except (LookupError, ValueError):
        found.append(Problem("data.encoding", data.encoding, "an encoding of text that Python knows, such as utf-8"))
    if not template_columns(data):
        allowed = "text with {prompt}, {completion} or {another column}, without formats, indices and attributes"
        found.append(Problem("data.template", data.template, allowed))
    if data.revision is not None and data.source != "hub":
        allowed = f"null for data.source={data.source}, which is no repository of the hub"
        found.append(Problem("data.revision", data.revision, allowed))
    for field in ("train", "eval"):
        name = getattr(data, field)
        if data.source == "files" and name is not None and not _inside(name):
            found.append(Problem(f"data.{field}", name, "a file below data.root, without .."))
    return found


def template_columns(data: DataConfig) -> list[str]:
    """The columns that ``data.template`` names; empty for a template that is not usable."""
    try:
        fields = [(name, form or kind) for _, name, form, kind in Formatter().parse(data.template) if name is not None]
    except ValueError:
        return []
    # Attributes and indices reach into values, formats pad to any width.
    if any(more or not name or name.isdigit() or re.search(r"[.\[\]]", name) for name, more in fields):
        return []
    renamed = {"prompt": data.prompt, "completion": data.completion}
    return [renamed.get(name, name) for name, _ in fields]


def _inside(name: str) -> bool:
    """Whether a path stays in the folder that it is relative to."""
    parts = name.split("/")
    return bool(name.strip()) and "\0" not in name and "://" not in name and parts[0] != "" and ".." not in parts


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
        pruning = replace(pruning, count=None)
    try:
        BudgetPlan(pruning, initial, min(initial, max(1, round(recipe.target_rank * modules))), total_steps)
    except ValueError as error:
        shown = {k: getattr(pruning, k) for k in ("schedule", "interval", "count", "start", "final")}
        return [Problem("pruning", shown, str(error))]
    return []
