"""``hyperlora doctor``: the whole chain tried out, and what to do about what fails."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.job_submission import JobStatus
from rich.console import Console
from rich.text import Text

from hyperlora import capacity, diagnosis, jobs
from hyperlora.config import Problem, Recipe, RecipeError, first_line
from hyperlora.diagnosis import Check
from hyperlora.tracking import versions
from pipelines.common import load_recipe, write_json
from pipelines.submit import follow, on_cluster, send, unreachable, unset, with_files

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def main(args: Namespace, console: Console) -> int:
    """Run every check; returns 1 when one failed."""
    recipe = load_recipe(args.recipe, args.overrides)
    alone = args.address is None
    problems = unset(args.env)
    if args.install and alone and not args.expect:
        problems.append(Problem("--install", True, "with --address: it is the nodes that install"))
    if problems:
        raise RecipeError(problems)
    found = []
    for check in _inside(recipe, json.loads(args.expect), args.install) if args.expect else _here(recipe, alone):
        found.append(check)
        _show(check, console)
    if not alone:
        found += _on_cluster(args, console)
    good = all(c.state != "fail" for c in found)
    write_json(args.json, {"good": good, "checks": [asdict(c) for c in found]})
    return 0 if good else 1


def _show(check: Check, console: Console) -> None:
    line = Text.assemble((f"{check.state:4} ", STYLES[check.state]), (check.name, "bold"), f": {check.found}")
    console.print(line, soft_wrap=True)
    if check.advice:
        console.print(Text(f"     {check.advice}"), soft_wrap=True)


def shown(text: str) -> list[Check]:
    """The checks that a job's output shows."""
    lines = re.findall(r"^(ok  |warn|fail) (.+?): (.*)(?:\n     (.*))?$", text, re.MULTILINE)
    return [Check(name, state.strip(), found, advice) for state, name, found, advice in lines]


def _here(recipe: Recipe, alone: bool) -> Iterator[Check]:
    """On this machine; where a cluster does the work, its places need not be reached from here."""
    known, recipe = versions(), recipe.with_absolute_paths()
    yield Check("versions", "ok", ", ".join(f"{k} {known[k]}" for k in ("python", "torch", "ray", "mlflow", "peft")))
    yield diagnosis.devices()
    yield from diagnosis.disks()
    yield diagnosis.token()
    for check in (*diagnosis.store(recipe.storage.uri), diagnosis.tracking(recipe.mlflow)):
        if alone or check.state != "fail":
            yield check
        else:
            yield replace(check, state="warn", advice="what counts is whether the cluster reaches it: below")


def _inside(recipe: Recipe, expected: dict[str, str], install: bool) -> Iterator[Check]:
    """In a job: storage and MLflow as its process sees them, then as every node does."""
    yield from diagnosis.store(recipe.storage.uri)
    yield diagnosis.tracking(recipe.mlflow)
    with ExitStack() as stack:
        place: str | None = None
        with suppress(OSError):  # told above
            place = stack.enter_context(diagnosis.mark(recipe.storage.uri))
        start = jobs.INSTALLED if install else jobs.ANSWER
        with_gpus = {}

        # Within another it travels as it is, so that nodes do not have to import this module.
        def there(*arguments: Any) -> dict[str, Any]:
            return diagnosis.node(*arguments, ray.get_runtime_context().get_temp_dir())

        for node, told, asked, answered in jobs.each_node(there, place, recipe.mlflow, start=start):
            if isinstance(told, GetTimeoutError):
                yield diagnosis.silent(node["NodeManagerAddress"], jobs.ANSWER)
            elif isinstance(told, BaseException):
                advice = "look at the node's logs; is the package installed there?"
                reason = first_line(told.cause if isinstance(told, RayTaskError) else told)
                yield Check(f"node {node['NodeManagerAddress']}", "fail", reason, advice)
            else:
                yield from diagnosis.compare(expected, told, asked, answered, node["Resources"].get("GPU", 0))
                if told["gpus"] and node["Resources"].get("GPU"):
                    with_gpus[told["host"]] = node  # several nodes of one machine have the same GPUs
        if len(with_gpus) > 1:
            yield diagnosis.joined(len(with_gpus), jobs.apart("nccl", list(with_gpus.values())))
        yield from _not_there()


def _not_there() -> Iterator[Check]:
    """Of the nodes that the cluster's autoscaler may start, those that nothing is known of."""
    from hyperlora import distributed  # seconds of import that are not needed where no cluster is

    nodes = distributed.living()
    if capacity.may_grow(nodes) and (growth := distributed.growth()) is not None:
        there = {n.labels.get(capacity.GROUP) for n in nodes}
        if missing := [g.name for g in growth.groups if g.most != 0 and g.name not in there]:
            yield diagnosis.absent(missing)


def _on_cluster(args: Namespace, console: Console) -> list[Check]:
    """The same on the cluster, as a job.

    Raises:
        RecipeError: nobody answers there, or the recipe's places mean nothing there.
    """
    recipe, changes = on_cluster(args.recipe, args.overrides)
    if problems := [*unset(recipe.cluster.env), *unreachable(recipe)]:
        raise RecipeError(problems)
    client = jobs.connect(args.address)
    advice = "a run waits for it where an autoscaler adds nodes, else is refused"
    found = [
        Check("Jobs API", "ok", f"{args.address} answers"),
        *(Check("room", "warn", str(p), advice) for p in capacity.problems(recipe.ray, jobs.nodes(args.address))),
    ]
    for check in found:
        _show(check, console)
    words, files = with_files(["doctor", args.recipe, *args.overrides, *changes], [args.recipe])
    env, more = [*args.env, *recipe.cluster.env], ["--expect", json.dumps(versions())]
    more += [f"--{name}" for name in ("install", "verbose") if getattr(args, name)]
    job = jobs.Job(words, files, env, args.install, more)
    with jobs.answered(args.address):
        job_id, _ = send(client, job, console)
    status = follow(args.address, job_id, console).status
    with jobs.answered(args.address):
        told = shown(client.get_job_logs(job_id))
    if status != JobStatus.SUCCEEDED and all(c.state != "fail" for c in told):
        told.append(Check("job", "fail", f"{job_id} {status.value.lower()}", "look at what it has shown"))
    return [*found, *told]
