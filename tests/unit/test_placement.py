"""Where a recipe says that its workers run reaches Ray; no Ray is started."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig

from hyperlora import distributed
from hyperlora.config import Recipe
from hyperlora.training import RunInfo, Silent
from pipelines.common import load_recipe
from pipelines.submit import on_cluster


class AskedError(Exception):
    """In place of training."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ScalingConfig]:
    found: list[ScalingConfig] = []

    class Trainer:
        controller = None

        def __init__(self, loop: Any, *, scaling_config: ScalingConfig, **options: Any) -> None:
            found.append(scaling_config)

        def fit(self) -> None:
            raise AskedError

    here = SimpleNamespace(get_node_id=lambda: "ab" * 28, gcs_address="here:6379")
    queue = SimpleNamespace(qsize=lambda: 0, get_nowait_batch=lambda count: [])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(distributed, "cluster", lambda recipe, verbose: nullcontext())
    monkeypatch.setattr(distributed, "Queue", lambda **options: queue)
    monkeypatch.setattr(distributed, "share_rows", lambda recipe, rows: "rows")
    monkeypatch.setattr(distributed, "_Trainer", Trainer)
    return found


def scaling(recipe: Recipe, asked: list[ScalingConfig], uri: Any) -> tuple[Any, str, list[dict[str, float]]]:
    """Workers, their placement, and what each of them takes, as Ray Train makes its placement group of it."""
    with pytest.raises(AskedError):
        distributed.run(recipe, RunInfo(str(uri)), Silent())
    (found,) = asked
    return found.num_workers, found.placement_strategy, found._resources_per_worker_not_none


@pytest.mark.parametrize("placement", ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])
def test_the_placement_and_the_accelerator_reach_ray(placement: str, asked: list[ScalingConfig], tmp_path: Any) -> None:
    settings = {"num_workers": 4, "gpus_per_worker": 1, "cpus_per_worker": 2, "accelerator_type": "H100"}
    recipe = load_recipe("quickstart", [f"ray.{k}={v}" for k, v in (settings | {"placement": placement}).items()])
    each = {"CPU": 2, "GPU": 1, "accelerator_type:H100": 0.001}
    assert scaling(recipe, asked, tmp_path) == (4, placement, each)


def test_where_a_recipe_says_nothing_any_node_will_do(asked: list[ScalingConfig], tmp_path: Any) -> None:
    assert scaling(load_recipe("quickstart", []), asked, tmp_path) == (2, "PACK", {"CPU": 1})


def test_what_a_recipe_says_of_clusters_reaches_ray(asked: list[ScalingConfig], tmp_path: Any) -> None:
    part = ["cluster.placement=STRICT_SPREAD", "cluster.accelerator_type=L4", "cluster.gpus_per_worker=1"]
    recipe, _ = on_cluster("quickstart", part)
    each = {"CPU": 1, "GPU": 1, "accelerator_type:L4": 0.001}
    assert scaling(recipe, asked, tmp_path) == (2, "STRICT_SPREAD", each)
