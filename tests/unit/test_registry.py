"""Who is champion when several register at once; the database is a real one."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from hyperlora import registry
from hyperlora.config import MLflowConfig, RecipeError
from hyperlora.export import CARD, PlainAdapter, model_card
from hyperlora.registry import CHALLENGER, CHAMPION, Registered
from pipelines.common import load_recipe

FILES = dict.fromkeys(registry.FILES, b"x")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MLflowConfig:
    return MLflowConfig(tracking_uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a repository, whose state takes time to find out."""
    monkeypatch.chdir(tmp_path)


def register(
    config: MLflowConfig, name: str, value: float, evaluation: str = "rows", files: Mapping[str, bytes] = FILES
) -> Registered:
    facts: dict[str, Any] = {"metric": "exact_match", "value": value, "higher_is_better": True, "source": "run"}
    facts |= {"evaluation": evaluation, "base_model": {}, "metrics": {}, "recipe": {}}
    return registry.register(config, name, files, facts)


def aliases(config: MLflowConfig, name: str) -> dict[str, int]:
    found = MlflowClient(config.tracking_uri).get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


@pytest.mark.parametrize(
    ("first", "second", "evaluation", "best"),
    [(0.8, 0.9, "rows", 3), (0.9, 0.8, "rows", 2), (0.8, 0.9, "other rows", 2)],
)
def test_of_two_that_register_at_once_the_better_is_champion(
    config: MLflowConfig, first: float, second: float, evaluation: str, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first knows the old champion and has not moved the alias."""
    name = f"at-once-{first}-{evaluation.replace(' ', '-')}"
    register(config, name, 0.1)
    champion, others = registry._champion, []

    def look(client: MlflowClient, name: str) -> Any:
        found = champion(client, name)
        if not others:
            others.append(None)
            others[0] = register(config, name, second, evaluation)
        return found

    monkeypatch.setattr(registry, "_champion", look)
    done = register(config, name, first)
    assert done.version == 2
    assert (done.alias, done.champion) == (CHAMPION if best == 2 else CHALLENGER, best)
    assert aliases(config, name)[CHAMPION] == best
    if best == 3:
        assert done.reason == "exact match 0.8 does not beat 0.9 of version 3"


def test_a_champion_that_somebody_put_back_is_compared_with_and_not_replaced_by_a_better_one(
    config: MLflowConfig,
) -> None:
    for value in (0.1, 0.9):
        register(config, "put-back", value)
    MlflowClient(config.tracking_uri).set_registered_model_alias("put-back", CHAMPION, "1")
    done = register(config, "put-back", 0.5)
    assert (done.alias, done.champion) == (CHAMPION, 3)
    assert aliases(config, "put-back") == {CHAMPION: 3}


def test_of_a_card_that_is_longer_than_databases_hold_the_description_is_what_fits(
    config: MLflowConfig, tmp_path: Path
) -> None:
    adapter = PlainAdapter({"q": (torch.zeros(2, 3), torch.zeros(3, 2))}, {}, {})
    outcome = {"steps": 8, "metric": "accuracy", "metric_after": 0.5, "labels": [f"intent {n}" for n in range(500)]}
    card = model_card(adapter, load_recipe("quickstart-entailment", []), outcome)
    assert len(card) > registry.DESCRIPTION
    register(config, "short", 0.1)
    with closing(sqlite3.connect(config.tracking_uri.removeprefix("sqlite:///"))) as database:
        # SQLite takes any length; PostgreSQL and MySQL do not.
        refuse = "BEGIN SELECT RAISE(ABORT, 'value too long'); END"
        too_long = "BEFORE INSERT ON model_versions WHEN length(NEW.description) > 5000"
        database.execute(f"CREATE TRIGGER room {too_long} {refuse}")
    try:
        done = register(config, "labels", 0.5, files=FILES | {CARD: card.encode()})
    finally:
        with closing(sqlite3.connect(config.tracking_uri.removeprefix("sqlite:///"))) as database:
            database.execute("DROP TRIGGER room")
    description = MlflowClient(config.tracking_uri).get_model_version("labels", str(done.version)).description
    assert card.startswith(f"{description}\n")
    assert "| held-out accuracy | 0.5000 |" in description
    registry.pull(config.tracking_uri, "models:/labels@champion", str(tmp_path / "pulled"))
    assert (tmp_path / "pulled" / CARD).read_text() == card


def test_a_refusal_is_told_wherever_the_environment_has_mlflow_send_later(
    config: MLflowConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    facts = dict.fromkeys(registry.FACTS, "x") | {"metrics": {"no: such; name": 0.5}}
    with pytest.raises(RecipeError, match="no: such; name"):
        registry.register(config, "later", FILES, facts)
