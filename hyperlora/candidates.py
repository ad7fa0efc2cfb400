"""Which adapter to register: of a run itself, or the best of a study or search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hyperlora import runs
from hyperlora.config import Problem, Recipe, RecipeError, parse_recorded
from hyperlora.effects import mean_interval
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
        choice: among what it was chosen, and how sure that is; nothing of a run that was named itself.
    """

    uri: str
    recipe: Recipe
    outcome: Mapping[str, Any]
    metric: str
    value: float
    higher: bool
    choice: str = ""

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
    leader = min(groups, key=_mean_cost)
    good = [leader] if margin is None else [g for g in groups if _within(g, leader, margin)]
    group = min(good, key=lambda g: (np.mean([c.parameters for c in g]), _mean_cost(g)))
    kind = "points" if name == "study.json" else "trials"
    choice = _choice(group, leader, f"{len(groups)} {kind}", None if margin is None else (margin, len(good)))
    return replace(min(group, key=lambda c: _cost(c.value, c.higher)), choice=choice)


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


def _mean_cost(group: Sequence[Candidate]) -> float:
    return float(np.mean([_cost(c.value, c.higher) for c in group]))


def _within(group: Sequence[Candidate], leader: Sequence[Candidate], margin: float) -> bool:
    """Whether the mean is at most so much worse; what is exactly so much worse is, however it is rounded."""
    return _mean_cost(group) - _mean_cost(leader) <= margin * (1 + 1e-9) + 1e-12


def _choice(group: Sequence[Candidate], leader: Sequence[Candidate], among: str, good: tuple[float, int] | None) -> str:
    """Why these trials of one point were chosen, in words.

    Args:
        group: the chosen ones.
        leader: those of the best point.
        among: all that there were.
        good: the margin, and how many are within it.
    """
    metric, best = group[0].metric.replace("_", " "), _cost(_mean_cost(leader), leader[0].higher)
    seeds = sorted({c.recipe.seed for c in group})
    under = f"mean {metric} of {len(seeds)} seeds" if len(seeds) > 1 else metric
    own = "; of these seeds it is the best" if len(seeds) > 1 else ""
    if good is None:
        return f"best {under} of {among}, {best:.6g}{own}"
    margin, count = good
    text = f"smallest of {count} of {among} whose {under} is at most {margin:g} worse than the best, {best:.6g}"
    if group is leader:
        return f"{text}: the best itself{own}"
    costs = {c.recipe.seed: _cost(c.value, c.higher) for c in leader}
    worse = [_cost(c.value, c.higher) - costs[c.recipe.seed] for c in group if c.recipe.seed in costs]
    interval = mean_interval(worse)
    text += f": worse by {_mean_cost(group) - _mean_cost(leader):.6g}"
    if interval["low"] is None:
        return f"{text}, under too few seeds to say how sure that is{own}"
    text += f" (95 % interval {interval['low']:.6g} to {interval['high']:.6g})"
    if interval["high"] > margin:
        text += f", which {interval['n']} seeds do not show to be within {margin:g}"
    return text + own


def _cost(value: float, higher: bool) -> float:
    return -value if higher else value


def _candidate(uri: str, metric: str | None) -> Candidate:
    outcome, begun = runs.result(uri), runs.begun(uri)
    if outcome is None or begun is None:
        raise RecipeError(
            [Problem("STUDY_OR_RUN", uri, "the folder of a finished run: result.json or run.json is missing")]
        )
    recipe = parse_recorded(begun["recipe"])
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
        "choice": candidate.choice,
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
    base, choice = record["base_model"], f": {record['choice']}" if record["choice"] else ""
    more = f"""
## Registered

Chosen by {record["metric"].replace("_", " ")}{choice}. Base model `{base["path"]}`, SHA-256 of its weights and
configuration `{base["sha256"]}`.

| measured | |
|---|---|
{rows}
"""
    return text.rstrip() + b"\n" + more.encode()
