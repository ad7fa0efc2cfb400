"""``hyperlora register`` and ``hyperlora pull``: the best adapter into MLflow's model registry, and back."""

from __future__ import annotations

import math
import os
import shlex
from argparse import Namespace

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from hyperlora import candidates, registry, uris
from hyperlora.config import MLflowConfig, Problem, RecipeError
from hyperlora.export import CARD, FILES
from hyperlora.fingerprint import base_model, evaluation_fingerprint
from hyperlora.tracking import check
from pipelines import screens
from pipelines.common import check_new_folder, write_json


def main(args: Namespace, console: Console) -> int:
    """Register the best adapter of a run, study or search; returns the exit status."""
    problems = _places(("STUDY_OR_RUN", args.source))
    if not registry.NAME.match(args.name):
        problems.append(Problem("--name", args.name, "letters, digits, '.', '_' and '-', at most 100"))
    margin = None
    if args.non_inferior is not None:
        try:
            margin = float(args.non_inferior)
        except ValueError:
            margin = math.nan
        if not (math.isfinite(margin) and margin >= 0):
            problems.append(Problem("--non-inferior", args.non_inferior, "a number, at least 0, in the metric's unit"))
    if problems:
        raise RecipeError(problems)
    source = uris.absolute(args.source)
    candidate = candidates.best(source, args.metric, margin)
    recipe = candidate.recipe
    mlflow = recipe.mlflow.model_copy(update={"tracking_uri": args.tracking_uri or recipe.mlflow.tracking_uri})
    check(recipe.model_copy(update={"mlflow": mlflow}))
    with console.status("reading held-out rows and base model"):
        facts = candidates.facts(
            candidate, source, evaluation_fingerprint(recipe, candidate.outcome), base_model(recipe)
        )
    files = candidates.adapter_files(candidate, FILES)
    files[CARD] = candidates.card(files[CARD], facts)
    with console.status("registering"):
        done = registry.register(mlflow, args.name, files, facts)
    console.print(
        f"[bold]{escape(args.name)}[/] version {done.version} is @{done.alias}: {done.reason}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"from {screens.local(candidate.uri)}, {candidate.parameters:,} parameters", highlight=False, soft_wrap=True
    )
    if candidate.choice:
        console.print(candidate.choice, highlight=False, markup=False, soft_wrap=True)
    words = ["hyperlora", "pull", f"models:/{args.name}@{done.alias}", "DIR"]
    if mlflow.tracking_uri != _default():
        words += ["--tracking-uri", uris.redacted(mlflow.tracking_uri)]
    console.print(Text(shlex.join(words)), soft_wrap=True)
    summary = {
        "name": args.name,
        "version": done.version,
        "alias": done.alias,
        "reason": done.reason,
        "champion": done.champion,
        "mlflow_run_id": done.run_id,
        "tracking_uri": uris.redacted(mlflow.tracking_uri),
        **{k: v for k, v in facts.items() if k != "recipe"},
    }
    write_json(args.json, summary)
    return 0


def pull(args: Namespace, console: Console) -> int:
    """Write a registered adapter into a folder; returns the exit status."""
    if problems := _places(("DIR", args.folder)):
        raise RecipeError(problems)
    folder = uris.absolute(args.folder)
    check_new_folder("DIR", folder)
    uri = args.tracking_uri or _default()
    with console.status("fetching"):
        record = registry.pull(uri, args.model, folder)
    base = record["base_model"]
    console.print(
        f"{screens.local(folder)}: {record['name']} version {record['version']}, {record['metric'].replace('_', ' ')} "
        f"{record['value']:.6g}, for the base model {base['path']}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    write_json(args.json, {k: v for k, v in record.items() if k != "recipe"})
    return 0


def _default() -> str:
    """Where ``pull`` looks without being told."""
    return os.environ.get("MLFLOW_TRACKING_URI") or MLflowConfig().tracking_uri


def _places(*named: tuple[str, str]) -> list[Problem]:
    return [
        Problem(name, uris.redacted(uri), allowed)
        for name, uri in named
        if (allowed := uris.problem(uri, written=name == "DIR")) is not None
    ]
