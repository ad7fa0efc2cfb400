"""Whether a cluster can ever give what a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hyperlora.config import Problem, RayConfig

ACCELERATOR = "accelerator_type:"
#: Ray labels the nodes that an autoscaler has started with their group.
GROUP = "ray.io/node-group"


@dataclass(frozen=True)
class Node:
    """A living node.

    Attributes:
        resources: in all, whoever uses them now, by Ray's names.
        labels: Ray's.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def may_grow(nodes: Sequence[Node]) -> bool:
    """Whether an autoscaler started some of the nodes, and may start more."""
    return any(n.labels.get(GROUP) for n in nodes)


def problems(settings: RayConfig, nodes: Sequence[Node]) -> list[Problem]:
    """What the fewest workers of a recipe ask for beyond all that the nodes have; nothing when it fits."""
    wanted = settings.fewest
    each = {"CPU": settings.cpus_per_worker} | ({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {})
    kind = settings.accelerator_type
    there = sorted({r.removeprefix(ACCELERATOR) for n in nodes for r in n.resources if r.startswith(ACCELERATOR)})
    if kind is not None and kind not in there:
        allowed = f"of the cluster's nodes: {', '.join(there) or 'none has an accelerator'}"
        return [Problem("ray.accelerator_type", kind, allowed)]
    fit = [n.resources for n in nodes if kind is None or ACCELERATOR + kind in n.resources]
    found = []
    for name, amount in each.items():
        key = f"ray.{name.lower()}s_per_worker"
        total, largest = sum(r.get(name, 0) for r in fit), max((r.get(name, 0) for r in fit), default=0)
        if wanted * amount > total:
            allowed = f"{wanted} workers need {wanted * amount:g} {name}s, the cluster has {total:g}"
            found.append(Problem(key, amount, allowed))
        elif amount > largest:
            found.append(Problem(key, amount, f"at most the {largest:g} {name}s of the largest node"))
    if found:
        return found
    held = [int(min(r.get(name, 0) // amount for name, amount in each.items())) for r in fit]
    needs = " and ".join(f"{amount:g} {name}s" for name, amount in each.items())
    room = f"the cluster's nodes hold {', '.join(map(str, held))} workers of {needs}"
    strict = {"STRICT_PACK": max(held), "STRICT_SPREAD": sum(h > 0 for h in held)}
    if wanted > sum(held):
        found.append(Problem("ray.num_workers", settings.num_workers, room))
    elif wanted > strict.get(settings.placement, wanted):
        where = "on one node" if settings.placement == "STRICT_PACK" else "on a node each"
        found.append(Problem("ray.placement", settings.placement, f"{wanted} workers {where}: {room}"))
    return found
