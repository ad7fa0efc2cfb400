"""Who is champion when several register at once; the database is a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from hyperlora import registry
from hyperlora.config import MLflowConfig
from hyperlora.registry import CHALLENGER, CHAMPION, Registered

FILES = dict.fromkeys(registry.FILES, b"x")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MLflowConfig:
    return MLflowConfig(tracking_uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a repository, whose state takes time to find out."""
    monkeypatch.chdir(tmp_path)


def register(config: MLflowConfig, name: str, value: float, evaluation: str = "rows") -> Registered:
    facts: dict[str, Any] = {"metric": "exact_match", "value": value, "higher_is_better": True, "source": "run"}
    facts |= {"evaluation": evaluation, "base_model": {}, "metrics": {}, "recipe": {}}
    return registry.register(config, name, FILES, facts)


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
