"""What is checked before a job is sent."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from hyperlora import jobs
from hyperlora.config import RecipeError
from pipelines import submit
from pipelines.common import load_recipe, shipped

THERE = ["storage.uri=s3://bucket/runs", "mlflow.tracking_uri=http://mlflow:5000"]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_shipped_recipes_can_be_sent(name: str) -> None:
    recipe = load_recipe(name, THERE)
    files = ["data.root=s3://bucket/data"] if recipe.data.source == "files" else []
    assert submit.unreachable(load_recipe(name, [*THERE, *files])) == []


def test_relative_places_are_refused() -> None:
    places = {"data.root": "data", "data.source": "files", "monitors.baseline": "a.json"}
    recipe = load_recipe(
        "quickstart", [*THERE, *(f"{k}={v}" for k, v in places.items()), "data.train=a", "data.eval=b"]
    )
    assert {p.field for p in submit.unreachable(recipe)} == {"data.root", "monitors.baseline"}


@pytest.mark.parametrize("out", [None, "here"])
def test_a_search_needs_a_folder_that_all_nodes_share(out: str | None) -> None:
    inner = Namespace(command="tune", recipe="quickstart", overrides=THERE, out=out, workers=1)
    args = Namespace(words=["tune", "quickstart", *THERE], env=[], address="http://head:8265", install=False)
    with pytest.raises(RecipeError, match="--out: got"):
        submit._job(args, inner)


def test_following_ends_when_the_cluster_answers_errors_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(address: str) -> Any:
        raise RuntimeError("Request failed with status code 500: job 404 is odd.")

    monkeypatch.setattr(jobs, "connect", broken)
    monkeypatch.setattr(jobs, "RETRY", 0.01)
    monkeypatch.setattr(jobs, "LOST", 0.1)
    told: list[str] = []
    with pytest.raises(RecipeError, match="a cluster that answers"):
        jobs.follow("http://head:8265", "job", lambda text: None, told.append)
    assert len(told) == 1, "said once"
