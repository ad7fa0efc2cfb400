"""Which adapter to register: of a run itself, or the best of a study or search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperlora import runs
from hyperlora.config import Problem, Recipe, RecipeError, parse
from hyperlora.study import measured
from hyperlora.tasks import FAMILIES

SEARCHES = ("study.json", "tune.json")


@dataclass(frozen=True)
class Candidate:
    """A finished run.

    Attributes:
        uri: of its folder.
        recipe: of the run.
        outcome: its ``result.json``.
        metric: by which it was chosen, and how it is judged in the registry.
        value: of the metric after training.
        higher: more of it is better.
    """

    uri: str
    recipe: Recipe
    outcome: Mapping[str, Any]
    metric: str
    value: float
    higher: bool

    @property
    def parameters(self) -> int:
        """Numbers in the exported adapter."""
        return int(self.outcome["adapter_parameters_final"])


def best(uri: str, metric: str | None = None, margin: float | None = None) -> Candidate:
    """The adapter to register from the folder of a run, a study or a search.

    Of a study, the trial with the best metric at the point with the best mean over seeds; of a search, the best trial.

    Args:
        uri: of the folder.
        metric: held-out metric; None: the study's or search's own, or the task's.
        margin: take the smallest adapter whose metric (at a study's point: the mean) is at most this much worse.

    Raises:
        RecipeError: there is no finished run, or it has no such metric.
    """
    if runs.result(uri) is not None:
        if margin is not None:
            raise RecipeError([Problem("--non-inferior", margin, "only with the folder of a study or search")])
        return _candidate(uri, metric)
    found = next(((name, s) for name in SEARCHES if (s := runs.read(uri, name)) is not None), None)
    if found is None:
        names = ", ".join(("result.json", *SEARCHES))
        raise RecipeError([Problem("STUDY_OR_RUN", uri, f"the folder of a finished run, study or search ({names})")])
    name, result = found
    try:
        metric = metric or result["metric"]
        points = _study_points(result) if name == "study.json" else _search_points(result)
    except (LookupError, TypeError) as error:
        allowed = f"a file that study or tune has written ({type(error).__name__}: {error})"
        raise RecipeError([Problem("STUDY_OR_RUN", f"{uri}/{name}", allowed)]) from error
    groups = [[_candidate(f"{uri}/trials/{trial}", metric) for trial in trials] for trials in points]
    groups = [g for g in groups if g]
    if not groups:
        raise RecipeError([Problem("STUDY_OR_RUN", uri, "at least one finished trial")])
    group = _chosen(groups, margin)
    return min(group, key=lambda c: _cost(c.value, c.higher))


def _study_points(result: Mapping[str, Any]) -> list[list[str]]:
    """Finished trials of every point; only points with as many seeds as any are compared."""
    most = max((p["n"] for p in result["points_measured"]), default=0)
    return [
        [f"p{p['point']:03d}-seed{seed}" for seed in p["by_seed"]]
        for p in result["points_measured"]
        if p["n"] == most and most
    ]


def _search_points(result: Mapping[str, Any]) -> list[list[str]]:
    return [[t["trial"]] for t in result["measured"] if t["status"] == "finished"]


def _chosen(groups: Sequence[list[Candidate]], margin: float | None) -> list[Candidate]:
    def mean_cost(group: Sequence[Candidate]) -> float:
        return float(np.mean([_cost(c.value, c.higher) for c in group]))

    leader = min(groups, key=mean_cost)
    if margin is None:
        return leader
    good = [g for g in groups if mean_cost(g) <= mean_cost(leader) + margin]
    return min(good, key=lambda g: (np.mean([c.parameters for c in g]), mean_cost(g)))


def _cost(value: float, higher: bool) -> float:
    return -value if higher else value


def _candidate(uri: str, metric: str | None) -> Candidate:
    outcome, begun = runs.result(uri), runs.begun(uri)
    if outcome is None or begun is None:
        raise RecipeError(
            [Problem("STUDY_OR_RUN", uri, "the folder of a finished run: result.json or run.json is missing")]
        )
    recipe = parse(begun["recipe"])
    name = metric or FAMILIES[recipe.task.kind].metric
    try:
        value, higher = measured(outcome, name)
    except ValueError as error:
        raise RecipeError([Problem("--metric", name, str(error))]) from error
    return Candidate(uri, recipe, outcome, name, value, higher)


def facts(candidate: Candidate, source: str, evaluation: str, base_model: Mapping[str, Any]) -> dict[str, Any]:
    """What the registry keeps of a candidate, as JSON.

    Args:
        candidate: the run.
        source: folder that was named.
        evaluation: :func:`hyperlora.fingerprint.evaluation_fingerprint`.
        base_model: :func:`hyperlora.fingerprint.base_model`.
    """
    o = candidate.outcome
    metrics = {
        candidate.metric: candidate.value,
        f"{o['metric']}_before": o["metric_before"],
        o["metric"]: o["metric_after"],
        "held_out_loss_before": o["held_out_loss_before"],
        "held_out_loss": o["held_out_loss_after"],
        "held_out_rows": o["held_out_rows"],
        "rank_initial": o["rank_initial"],
        "rank_final": o["rank_final"],
        "adapter_parameters": candidate.parameters,
        "steps": o["steps"],
    }
    return {
        "metric": candidate.metric,
        "value": candidate.value,
        "higher_is_better": candidate.higher,
        "evaluation": evaluation,
        "base_model": dict(base_model),
        "labels": list(o["labels"]),
        "source": source,
        "run": candidate.uri,
        "metrics": metrics,
        "recipe": candidate.recipe.model_dump(mode="json"),
    }


def adapter_files(candidate: Candidate, names: Sequence[str]) -> dict[str, bytes]:
    """The files of the run's exported adapter.

    Raises:
        RecipeError: one is missing, or damaged.
        StorageError: the store does not answer.
    """
    return {name: runs.adapter_file(candidate.uri, candidate.outcome, name) for name in names}


def card(text: bytes, record: Mapping[str, Any]) -> bytes:
    """A run's model card with the table of what was measured and the base model's hash."""
    rows = "\n".join(
        f"| {key.replace('_', ' ')} | {value:.6g} |"
        for key, value in record["metrics"].items()
        if isinstance(value, int | float)
    )
    base = record["base_model"]
    more = f"""
## Registered

Chosen by {record["metric"].replace("_", " ")}. Base model `{base["path"]}`, SHA-256 of its weights and configuration
`{base["sha256"]}`.

| measured | |
|---|---|
{rows}
"""
    return text.rstrip() + b"\n" + more.encode()
