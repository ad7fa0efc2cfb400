"""Hypernetworks that start where those of an earlier run ended, of the same method or another.

Parameters Φ of H_P, H_Λ and H_Q are taken by name, their maps by the dimension d that they serve; moments are not.
Kind, sizes and sharing have to agree, and the source needs maps for every dimension of the new model. Embeddings of
modules and directions start anew where their number is another one, and so do whole networks that the source lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from hyperlora import checkpoint
from hyperlora.checkpoint import Checkpoint
from hyperlora.config import Problem, RecipeError
from hyperlora.optimizer import HyperAdaLoRA
from hyperlora.settings import Freeze, HypernetworkSpec
from hyperlora.update_rules import GeneratedFactors

FIELD = "hypernetwork.init_from"
#: What a finished trial keeps of its last checkpoint: a folder like a run's, with one checkpoint of the networks alone.
KEPT = "hypernetworks"
PREFIX = "hypernetwork."
NETWORKS = {"p": "H_P", "lam": "H_Λ", "q": "H_Q"}
#: Lists of maps, one for each dimension d, and the axis of d: (g, d, h) and (g, h, d).
MAPS = {"embed": 1, "output_maps": 2}


@dataclass(frozen=True)
class Source:
    """Hypernetworks of an earlier run.

    Attributes:
        name: the checkpoint's URI, or what else messages call it.
        method: that trained them.
        steps: optimizer steps that they took.
        spec: kind and size.
        parameters: by name, such as ``p.embed.0`` (g, d, h).
    """

    name: str
    method: str
    steps: int
    spec: HypernetworkSpec
    parameters: dict[str, Tensor]


@dataclass(frozen=True)
class WarmStart:
    """What a run started its hypernetworks with, by network where all of it shares a fate, else by parameter.

    Attributes:
        source, method, steps: of the :class:`Source`; None without one.
        freeze: as it was asked for; only what was taken is frozen, and without a source initial values are.
        taken: from the source.
        new: not in the source, or of another shape there.
        left_out: in the source, but not in the new method or model.
        frozen_parameters, parameters: how many numbers do not learn, and how many there are.
    """

    source: str | None
    method: str | None
    steps: int | None
    freeze: Freeze
    taken: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    frozen_parameters: int
    parameters: int

    def __str__(self) -> str:
        lists = {"taken": self.taken, "new": self.new, "left out": self.left_out}
        parts = [f"{name}: {', '.join(names)}" for name, names in lists.items() if names]
        if self.source is not None:
            parts.insert(0, f"from {self.source} ({self.method}, step {self.steps})")
        return "; ".join([*parts, f"frozen: {self.frozen_parameters:,} of {self.parameters:,} parameters"])


def read(uri: str) -> Source:
    """The hypernetworks of a run, checkpoint or trial folder; of a run from its newest checkpoint that verifies.

    Raises:
        RecipeError: there is no such checkpoint, or its method has no hypernetworks.
    """
    try:
        saved = _newest(uri.rstrip("/"))
        state = {n.removeprefix("optimizer."): t for n, t in saved.tensors.items() if n.startswith("optimizer.")}
        return _source(uri, saved.uri, {**saved.trainer["optimizer"], "state": state})
    except RecipeError:
        raise
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        allowed = f"a run, checkpoint or trial folder with a whole checkpoint ({error})"
        raise RecipeError([Problem(FIELD, uri, allowed)]) from error


def _newest(uri: str) -> Checkpoint:
    if checkpoint.FOLDER.match(uri.rsplit("/", 1)[-1]):
        return checkpoint.load(uri)
    for run in (uri, f"{uri}/{KEPT}"):
        saved, refused = checkpoint.load_latest(run)
        if saved is not None:
            return saved
        if refused:
            raise ValueError("; ".join(map(str, refused)))
    raise ValueError(f"{uri} has none")


def _source(value: str, name: str, state_dict: Mapping[str, Any]) -> Source:
    spec = state_dict.get("hypernetwork")
    if spec is None:
        method = state_dict.get("method", "another optimizer")
        allowed = f"what a method with hypernetworks has trained; {name} is of {method}"
        raise RecipeError([Problem(FIELD, value, allowed)])
    named = {n.removeprefix(PREFIX): t for n, t in state_dict["state"].items() if n.startswith(PREFIX)}
    return Source(name, state_dict["method"], state_dict["steps_done"], HypernetworkSpec(**spec), named)


def keep_networks(run_uri: str) -> None:
    """Write the hypernetworks of a run's newest checkpoint, if it has any, where :func:`read` finds them without it."""
    saved, _ = checkpoint.load_latest(run_uri)
    if saved is None or saved.trainer["optimizer"].get("hypernetwork") is None:
        return
    tensors = {n: t for n, t in saved.tensors.items() if n.startswith(f"optimizer.{PREFIX}")}
    kept = {key: saved.trainer["optimizer"][key] for key in ("method", "steps_done", "hypernetwork")}
    trainer = {"optimizer": kept, "recipe": saved.trainer["recipe"]}
    files = checkpoint.content(tensors, trainer, {})
    checkpoint.write(f"{run_uri.rstrip('/')}/{KEPT}", saved.trainer["step"], files)


def start_from(
    optimizer: HyperAdaLoRA, source: str | Source | Mapping[str, Any] | None, freeze: Freeze = "none"
) -> WarmStart:
    """Give an optimizer the hypernetworks of an earlier run before its first step; works with any training loop.

    Args:
        optimizer: of a method with hypernetworks. Resuming it later restores all of this: call it for new runs alone.
        source: folder or URI of a run, checkpoint or trial; a :class:`Source`; a ``state_dict()`` of another
            :class:`HyperAdaLoRA` (``optimizer.pt`` of a ``transformers.Trainer``); None keeps the initial values.
        freeze: what does not learn of that which was taken: ``none``, ``trunk`` (all but the maps from and to each
            dimension) or ``all``, for the update rule ``hybrid`` alone. What starts anew learns in any case.

    Returns:
        What was taken, what starts anew, and what is frozen.

    Raises:
        RecipeError: the source cannot be read, or does not fit; names all that does not.
        ValueError: the method has no hypernetworks, steps were taken, or after ``freeze`` nothing would learn.
    """
    if not isinstance(optimizer.source, GeneratedFactors):
        raise ValueError(f"method {optimizer.method_name!r} has no hypernetworks")
    networks = optimizer.source.networks
    covered = networks.covered_by(freeze)
    ours = dict(networks.named_parameters())
    if source is None:
        if freeze == "all":
            raise ValueError("freeze='all' needs a source: new output maps generate nothing")
        optimizer.take_networks({}, covered)
        return WarmStart(None, None, None, freeze, (), _described(ours, ours), (), *_sizes(optimizer.source))
    if isinstance(source, str):
        source = read(source)
    elif isinstance(source, Mapping):
        source = _source("state_dict", "the state_dict", source)
    problems = _problems(optimizer, ours, source)
    if problems:
        raise RecipeError(problems)

    theirs = _keys(source.parameters)
    found = {name: theirs[key] for key, name in _keys(ours).items() if key in theirs}
    taken = {n: source.parameters[m] for n, m in found.items() if source.parameters[m].shape == ours[n].shape}
    optimizer.take_networks(taken, [name for name in covered if name in taken])
    return WarmStart(
        source.name,
        source.method,
        source.steps,
        freeze,
        _described(taken, ours),
        _described([name for name in ours if name not in taken], ours),
        _described(source.parameters.keys() - found.values(), source.parameters),
        *_sizes(optimizer.source),
    )


def _sizes(source: GeneratedFactors) -> tuple[int, int]:
    numbers = {name: p.numel() for name, p in source.networks.named_parameters()}
    return sum(numbers[name] for name in source.frozen), sum(numbers.values())


# ---------------------------------------------------------------- what fits


def _keys(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Names by what they are known by in any model: maps by their dimension d, other parameters by their name."""
    keys = {}
    for name, tensor in parameters.items():
        network, part, *_ = name.split(".")
        keys[f"{network}.{part} of {tensor.shape[MAPS[part]]}" if part in MAPS else name] = name
    return keys


def _dimensions(parameters: Mapping[str, Tensor], network: str) -> set[int]:
    return {t.shape[MAPS["embed"]] for n, t in parameters.items() if n.startswith(f"{network}.embed.")}


def _problems(optimizer: HyperAdaLoRA, ours: Mapping[str, Tensor], source: Source) -> list[Problem]:
    """Everything that has to agree and does not."""
    spec, other = optimizer.hypernetwork, source.spec
    assert spec is not None
    of = f"as in {source.name}"
    names = ["kind", "hidden_size", "layers", "per_layer"]
    if spec.kind == other.kind == "attention":
        names.append("heads")
    found = [
        Problem(f"hypernetwork.{name}", getattr(spec, name), f"{getattr(other, name)}, {of}")
        for name in names
        if getattr(spec, name) != getattr(other, name)
    ]
    if (spec.kind, spec.hidden_size) == (other.kind, other.hidden_size) and spec.inner != other.inner:
        found.append(Problem("hypernetwork.intermediate_size", spec.inner, f"{other.inner}, {of}"))
    groups, known = (p["p.embed_norm.weight"].shape[0] for p in (ours, source.parameters))
    if spec.per_layer and other.per_layer and groups != known:
        allowed = f"false: this model adapts {groups} layers, and {source.name} has networks for {known}"
        found.append(Problem("hypernetwork.per_layer", True, allowed))
    for network in ("p", "q"):
        known_dimensions = _dimensions(source.parameters, network)
        missing = _dimensions(ours, network) - known_dimensions
        if missing:
            allowed = (
                f"a source whose {NETWORKS[network]} has maps for the dimensions {sorted(missing)} of this model; "
                f"it has them for {sorted(known_dimensions)}"
            )
            found.append(Problem(FIELD, source.name, allowed))
    return found


def _described(names: Collection[str], of: Collection[str]) -> tuple[str, ...]:
    """Names for people: a network whose parameters are all there by itself, other parameters one by one."""
    result: list[str] = []
    for network, label in NETWORKS.items():
        whole = [name for name in of if name.startswith(f"{network}.")]
        mine = [name for name in whole if name in names]
        result += [label] if mine and len(mine) == len(whole) else [f"{label}.{n.split('.', 1)[1]}" for n in mine]
    return tuple(result)
