"""A trial of a search needs no more memory than a worker of its recipe, and learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlora.config import Recipe, RecipeError, parse
from hyperlora.preflight import inspect
from hyperlora.training import RunInfo, Silent, Trainer, World
from pipelines import study, tune
from pipelines.cli import parse_arguments
from pipelines.common import alone, load_recipe


@pytest.fixture(autouse=True)
def rows_are_kept_elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path_factory.mktemp("cache")))


def recipe(batch: int, accumulation: int, workers: str) -> Recipe:
    words = [f"training.batch_size={batch}", f"training.gradient_accumulation={accumulation}"]
    words += ["data.train_rows=64", "data.eval_rows=8", "training.eval_batch_size=1", "method=lora"]
    return load_recipe("quickstart", [*words, "model.dtype=float64", f"ray.num_workers={workers}"])


def trained(given: Recipe) -> tuple[list[float], int]:
    """Losses of two steps in this process, and rows of the largest pass."""
    trainer = Trainer(given, RunInfo("memory://alone"), World(device=torch.device("cpu")), Silent())
    loss_sum = trainer.task.loss_sum
    passes: list[int] = []

    def counted(model: Any, batch: dict[str, Tensor]) -> Tensor:
        passes.append(len(batch["input_ids"]))
        return loss_sum(model, batch)

    trainer.task.loss_sum = counted  # type: ignore[method-assign]
    rows = list(range(given.training.batch_size))
    return [trainer.train_step(rows).read()["loss"] for _ in range(2)], max(passes)


@pytest.mark.parametrize(
    ("batch", "accumulation", "workers", "rows"),
    [
        (32, 4, "4", 2),
        (32, 1, "2", 16),
        (32, 4, "1", 8),
        (24, 2, "[2,3]", 6),  # where two workers share a batch
        (10, 3, "[1,2]", 2),  # one has three or four, which do not divide the batch
    ],
)
def test_a_trial_has_the_rows_of_a_worker_in_a_pass(batch: int, accumulation: int, workers: str, rows: int) -> None:
    given = recipe(batch, accumulation, workers)
    trial = alone(given)
    assert parse(trial.model_dump(mode="json")) == trial, "it breaks no rule of recipes"
    assert inspect(trial).activation_bytes <= inspect(given).activation_bytes
    losses, largest = trained(trial)
    assert largest == rows
    assert losses == pytest.approx(trained(recipe(batch, 1, "1"))[0], rel=1e-9)


def test_trials_of_studies_and_searches_have_the_rows_of_a_worker_in_a_pass(tmp_path: Path) -> None:
    words = ["quickstart", "training.gradient_accumulation=4", "ray.num_workers=4", "--out", str(tmp_path)]
    found = [study.resolved(parse_arguments(["study", *words])).recipe]
    found += [tune.resolved(parse_arguments(["tune", *words, "--workers", n])).recipe for n in "1248"]
    assert [(r.ray.most, r.training.gradient_accumulation) for r in found] == [(1, 16), (1, 16), (2, 8), (4, 4), (8, 2)]
    assert not found[0].training.eval_before
    assert all(parse(r.model_dump(mode="json")) == r for r in found), "they break no rule of recipes"
    most = tune.resolved(parse_arguments(["tune", *words, "--workers", "32"])).recipe
    assert most.training.gradient_accumulation == 1, "each has one row"
    with pytest.raises(RecipeError, match="--workers: got 3; must divide the batch of 32 rows"):
        tune.resolved(parse_arguments(["tune", *words, "--workers", "3"]))
