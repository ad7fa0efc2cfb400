"""A small run: two layers, made-up weights, a few rows; seconds on one core."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import Refused, checker

# The tests' own Ray needs no dashboard clients, proxies or usage reports.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Tokenised rows of earlier versions are none of the tests' business.
_CACHE = tempfile.TemporaryDirectory(prefix="hyperlora-cache-")
os.environ["HYPERLORA_CACHE"] = _CACHE.name
# Nor is what waits on this machine for the MLflow of its user.
os.environ["XDG_STATE_HOME"] = f"{_CACHE.name}/state"

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def small_recipe(folder: Path) -> dict[str, Any]:
    return {
        "name": "small",
        "model": {"path": "none", "init": "random", "architecture": ARCHITECTURE, "dtype": "float64"},
        "task": {"kind": "generation", "max_length": 96, "max_new_tokens": 8},
        "data": {"source": "word-problems", "train_rows": 64, "eval_rows": 8},
        "adapter": {"rank": 4, "target_rank": 2, "alpha": 8},
        "hypernetwork": {"hidden_size": 24, "heads": 2, "every": 4},  # few steps, and they are to move
        "optimizer": {"lr": 0.01},
        "training": {"steps": 20, "batch_size": 8, "checkpoint_every": 5},
        "ray": {"backend": "local"},
        "storage": {"uri": str(folder / "runs")},
        "mlflow": {"tracking_uri": f"sqlite:///{folder / 'mlflow.db'}", "enabled": False},
    }


@pytest.fixture(autouse=True)
def tokens_are_not_left_behind() -> Iterator[None]:
    """A command that went to a cluster has Ray send a token; the Ray of the next test must not learn of it."""
    before = os.environ.get("RAY_AUTH_MODE")
    yield
    if before is None:
        os.environ.pop("RAY_AUTH_MODE", None)
    else:
        os.environ["RAY_AUTH_MODE"] = before


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path)), encoding="utf-8")
    return path


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command in ``tmp_path`` that has to be refused; returns its message in one line."""
    monkeypatch.chdir(tmp_path)
    return checker(tmp_path, capfd)
