"""Whether a cluster can ever give what a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperlora.config import Problem, RayConfig

ACCELERATOR = "accelerator_type:"
#: Ray labels the nodes that an autoscaler has started with their group.
GROUP = "ray.io/node-group"
#: Nodes of a group that is said to have no limit; more make no difference.
UNLIMITED = 10_000


@dataclass(frozen=True)
class TooMany(Problem):
    """Not so many workers, but one of them would fit."""


@dataclass(frozen=True)
class Node:
    """A living node.

    Attributes:
        resources: in all, whoever uses them now, by Ray's names.
        labels: Ray's.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Equal nodes that an autoscaler starts when they are needed.

    Attributes:
        name: also in the nodes' labels.
        resources: of each, by Ray's names.
        most: nodes at a time; None: no limit.
    """

    name: str
    resources: Mapping[str, float]
    most: int | None


@dataclass(frozen=True)
class Growth:
    """How far an autoscaler goes.

    Attributes:
        groups: of nodes that it starts.
        most: nodes of all groups at a time; None: no limit.
        resources: of the whole cluster, at most; what is not named has no limit.
    """

    groups: Sequence[Group]
    most: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)


def may_grow(nodes: Sequence[Node]) -> bool:
    """Whether an autoscaler started some of the nodes, and may start more."""
    return any(n.labels.get(GROUP) for n in nodes)


def grown(settings: RayConfig, nodes: Sequence[Node], growth: Growth) -> list[Node]:
    """The cluster of these nodes that holds most of a recipe's workers once its autoscaler has done what it can."""
    names = {g.name for g in growth.groups}
    candidates = []
    for group in growth.groups:
        count = UNLIMITED if group.most is None else min(group.most, UNLIMITED)
        # Living nodes know their accelerator, but an autoscaler does not learn it from them.
        living = [{**n.resources, **group.resources} for n in nodes if n.labels.get(GROUP) == group.name]
        equal = [*living, *[group.resources] * count][:count]
        candidates += [Node(resources, {GROUP: group.name}) for resources in equal]
    candidates.sort(key=lambda n: _held(settings, n.resources), reverse=True)
    # What is idle now makes room for others.
    return [*(n for n in nodes if n.labels.get(GROUP) not in names), *candidates[: growth.most]]


def _silent(group: Group) -> bool:
    """Whether a group has GPUs and does not say of what kind."""
    return bool(group.resources.get("GPU")) and not any(r.startswith(ACCELERATOR) for r in group.resources)


def _each(settings: RayConfig) -> dict[str, float]:
    gpus = settings.gpus_per_worker
    return {"CPU": settings.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def _held(settings: RayConfig, resources: Mapping[str, float]) -> int:
    """Workers that a node of these resources holds."""
    kind = settings.accelerator_type
    if kind is not None and ACCELERATOR + kind not in resources:
        return 0
    each = _each(settings)
    held = min(_parts(name, amount, resources.get(name, 0)) for name, amount in each.items())
    if isinstance(settings.num_workers, int):
        return held
    # For a range Ray divides floats: it finds four of 0.2 CPUs in one, and waits for ever for the fifth.
    return min(held, *(int(resources.get(name, 0) // amount) for name, amount in each.items()))


def _parts(name: str, amount: float, total: float) -> int:
    """How often a node gives an amount of a resource; parts of a GPU are of one GPU: two of 0.4 each."""
    if name == "GPU" and amount < 1:
        return times(amount, 1) * int(total)
    return times(amount, total)


def times(amount: float, total: float) -> int:
    """How often a resource holds an amount of it, in Ray's own unit of a ten-thousandth: 1 // 0.2 is 4."""
    return round(total * 10_000) // max(1, round(amount * 10_000))


def trials(settings: RayConfig, nodes: Sequence[Node], growth: Growth | None = None) -> int:
    """How many trials run at a time, each with all workers of a recipe.

    Args:
        settings: of the recipe.
        nodes: the living ones.
        growth: how far an autoscaler goes, which then counts in place of what it has started by now.
    """
    workers, limits = settings.most, {} if growth is None else growth.resources
    if growth is not None:
        nodes = grown(settings, nodes, growth)
    held = [_held(settings, n.resources) for n in nodes]
    found = sum(held) // workers
    if settings.placement == "STRICT_PACK":
        found = sum(h // workers for h in held)
    elif settings.placement == "STRICT_SPREAD":
        # A node takes one worker of each trial.
        found = next((n for n in range(found, 0, -1) if sum(min(h, n) for h in held) >= n * workers), 0)
    return min([found, *(times(a * workers, limits[name]) for name, a in _each(settings).items() if name in limits)])


def problems(settings: RayConfig, nodes: Sequence[Node], growth: Growth | None = None) -> list[Problem]:
    """What the fewest workers of a recipe ask for beyond all that the nodes have; nothing when it fits.

    Args:
        settings: of the recipe.
        nodes: the living ones.
        growth: how far an autoscaler goes, which then counts in place of what it has started by now.
    """
    wanted, each, kind = settings.fewest, _each(settings), settings.accelerator_type
    limits = {} if growth is None else growth.resources
    has, hold = ("has", "hold") if growth is None else ("can have", "can hold")
    if growth is not None:
        nodes = grown(settings, nodes, growth)
    there = sorted({r.removeprefix(ACCELERATOR) for n in nodes for r in n.resources if r.startswith(ACCELERATOR)})
    silent = [g.name for g in growth.groups if _silent(g)] if kind is not None and growth is not None else []
    advice = (
        f"; its autoscaler starts no {', '.join(silent)} for it until they declare {ACCELERATOR}{kind} as a resource"
    )
    found: list[Problem] = []

    def add(field: str, value: Any, allowed: str, what: type[Problem] = Problem) -> None:
        found.append(what(field, value, allowed + (advice if silent else "")))

    if kind is not None and kind not in there:
        add("ray.accelerator_type", kind, f"of the cluster's nodes: {', '.join(there) or 'none has an accelerator'}")
        return found
    fit = [n.resources for n in nodes if kind is None or ACCELERATOR + kind in n.resources]
    for name, amount in each.items():
        key = f"ray.{name.lower()}s_per_worker"
        total, largest = sum(r.get(name, 0) for r in fit), max((r.get(name, 0) for r in fit), default=0)
        total = min(total, limits.get(name, total))
        if wanted > times(amount, total):
            allowed = f"{wanted} workers need {wanted * amount:g} {name}s, the cluster {has} {total:g}"
            add(key, amount, allowed, TooMany if amount <= min(total, largest) else Problem)
        elif amount > largest:
            add(key, amount, f"at most the {largest:g} {name}s of the largest node")
    if found:
        return found
    held = [_held(settings, r) for r in fit]
    needs = " and ".join(f"{amount:g} {name}s" for name, amount in each.items())
    counts = ", ".join(map(str, held)) if len(held) <= 16 else f"at most {max(held)}"
    room = f"the cluster's {len(held)} nodes {hold} {counts} workers of {needs}"
    strict = {"STRICT_PACK": max(held), "STRICT_SPREAD": sum(h > 0 for h in held)}
    if wanted > sum(held):
        add("ray.num_workers", settings.num_workers, room, TooMany if any(held) else Problem)
    elif wanted > strict.get(settings.placement, wanted):
        where = "on one node" if settings.placement == "STRICT_PACK" else "on a node each"
        add("ray.placement", settings.placement, f"{wanted} workers {where}: {room}")
    return found


def of_trials(found: Sequence[Problem], concurrency: int) -> list[Problem]:
    """What :func:`problems` has found where workers are trials of one process: nobody has typed how many workers."""
    text = "the number of trials at a time, one worker each: "
    return [Problem("--concurrency", concurrency, text + p.allowed) if isinstance(p, TooMany) else p for p in found]


def told(settings: RayConfig, nodes: Sequence[Node], growth: Growth | None = None, *, trials: bool) -> list[Problem]:
    """:func:`problems` as one is told them who asked for workers, or for ``trials``: see :func:`of_trials`."""
    found = problems(settings, nodes, growth)
    return of_trials(found, settings.fewest) if trials else found
