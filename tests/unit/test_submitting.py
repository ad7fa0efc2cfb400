"""What is checked before a job is sent."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from hyperlora import jobs, tokens
from hyperlora.config import RecipeError
from pipelines import submit
from pipelines.cli import parse_arguments
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


def sent(*words: str) -> Any:
    """What ``hyperlora submit`` makes of a job's words."""
    args = Namespace(words=list(words), env=[], address="http://head:8265", install=False)
    return submit._job(args, parse_arguments(words))


@pytest.mark.parametrize("out", [None, "here", "s3://bucket/out", "/shared/out"])
def test_a_search_needs_a_folder_that_all_nodes_share(out: str | None) -> None:
    words = ["tune", "quickstart", *THERE, *([] if out is None else ["--out", out])]
    if out == "here":
        with pytest.raises(RecipeError, match="--out: got 'here'; an absolute path that every node shares"):
            sent(*words)
    else:  # without it, below storage.uri
        assert sent(*words)[1].words[:2] == ["tune", "quickstart"]


@pytest.mark.parametrize(
    ("command", "option", "workers"),
    [
        ("train", [], 2),
        ("tune", ["--workers", "4"], 4),
        ("tune", ["--concurrency", "3"], 1),
        ("study", ["--concurrency", "3"], 3),
        ("compare", ["--concurrency", "3"], 3),
    ],
)
def test_the_cluster_has_to_hold_what_is_at_work_at_a_time(command: str, option: list[str], workers: int) -> None:
    assert sent(command, "quickstart", *THERE, *option)[0].num_workers == workers


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("tune", ["--trials", "0", "--sampler", "x"], ["--trials", "--sampler"]),
        ("study", ["--space", "x", "--design", "x"], ["--space", "--design"]),
        ("compare", ["--lrs", "x", "--field", "x"], ["--lrs", "--field"]),
    ],
)
def test_a_search_is_refused_here_with_all_that_is_wrong_with_it(
    command: str, options: list[str], named: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        sent(command, "quickstart", *THERE, "gamma=-1", *options)
    assert sorted(p.field for p in caught.value.problems) == sorted(["gamma", *named])


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
