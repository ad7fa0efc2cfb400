"""What is checked before a job is sent."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from hyperlora import jobs, tokens
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


@pytest.mark.parametrize("out", [None, "here", "s3://bucket/out", "/shared/out"])
def test_a_search_needs_a_folder_that_all_nodes_share(out: str | None) -> None:
    inner = Namespace(command="tune", recipe="quickstart", overrides=THERE, out=out, workers=1)
    args = Namespace(words=["tune", "quickstart", *THERE], env=[], address="http://head:8265", install=False)
    if out == "here":
        with pytest.raises(RecipeError, match="--out: got 'here'; an absolute path that every node shares"):
            submit._job(args, inner)
    else:  # without it, below storage.uri
        assert submit._job(args, inner)[1].words[:2] == ["tune", "quickstart"]


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


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("http://head:8265", True),
        ("head:6379", True),
        ("ray://10.0.0.1:10001", True),
        ("http://localhost:8265", False),
        ("127.0.0.1:6379", False),
        ("http://[::1]:8265", False),
        ("auto", False),
    ],
)
def test_another_machine_without_a_token_is_warned_of(
    address: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    told = tokens.warning(address)
    assert (told is not None) == warned
    if told is not None:
        assert "no token" in told
        assert address in told
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert tokens.warning(address) is None
