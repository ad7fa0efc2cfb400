"""Names of runs, which are their order."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest

from hyperlora import runs
from hyperlora.config import Recipe, RecipeError, parse, parse_recorded
from hyperlora.training import RunInfo
from pipelines.common import load_recipe


class Clock:
    """In the place of ``datetime``."""

    def __init__(self, hour: int) -> None:
        self.hour = hour

    def now(self, zone: tzinfo) -> datetime:
        return datetime(2026, 1, 1, self.hour, tzinfo=zone)


def start(recipe: Recipe) -> str:
    """A run that has begun; its folder's name."""
    uri = runs.new_uri(recipe)
    runs.record(RunInfo(uri), recipe)
    return uri.rsplit("/", 1)[1]


def test_the_newest_run_is_the_last_to_have_begun_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("quickstart", [f"storage.uri={tmp_path}"])
    clock = Clock(12)
    monkeypatch.setattr(runs, "datetime", clock)
    names = []
    for hour in (12, 11, *8 * [12], 10, 13, 12):
        clock.hour = hour
        names.append(start(recipe))
        assert runs.unfinished(recipe).uri == f"{tmp_path}/{names[-1]}"
    noon = [f"quickstart-20260101-120000{number}" for number in ("", *(f"-{n}" for n in range(2, 12)))]
    assert names == [*noon, "quickstart-20260101-130000", "quickstart-20260101-130000-2"]


def test_runs_of_other_names_do_not_count(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [f"storage.uri={tmp_path}"])
    for other in ("quickstart-2-29990101-000000", "quickstart-entailment-29990101-000000", "quickstart-best"):
        (tmp_path / other).mkdir()
    today = datetime.now(UTC)
    assert start(recipe) < f"quickstart-{today.year + 1}"


def test_what_came_of_a_run_is_read_whatever_it_ran_on() -> None:
    recipe = load_recipe("quickstart", [])
    recorded = recipe.model_dump(mode="json")
    recorded["ray"]["gpus_per_worker"] = 2  # allowed once
    assert parse_recorded(recorded).data == recipe.data
    with pytest.raises(RecipeError, match=r"ray\.gpus_per_worker: got 2"):
        parse(recorded)


def test_a_field_that_is_newer_than_the_record_had_its_default() -> None:
    recipe = load_recipe("quickstart", ["task.kind=completion"])
    recorded = recipe.model_dump(mode="json")
    del recorded["task"]["chat"]
    assert runs.differences(recorded, recipe) == []
    chats = load_recipe("quickstart", ["task.kind=completion", "task.chat=true"])
    assert runs.differences(recorded, chats) == [("task.chat", False, True)]
