"""Killed at every step, within every pruning event and at every write: the adapter is the undisturbed run's."""

from __future__ import annotations

import itertools
from pathlib import Path

import kills
import pytest
from conftest import small_recipe
from kills import Where

from hyperlora import checkpoint

STEPS = 12
#: Steps and pruning events are the recipe's; writes are those of two checkpoints, adapter and outcome, twice each.
POINTS: dict[Where, int] = {"step": STEPS, "pruning event": 6, "write": 24}


@pytest.mark.parametrize("where", POINTS)
def test_killed_anywhere_a_run_ends_with_the_same_adapter(where: Where, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    recipe["training"] |= {"steps": STEPS, "checkpoint_every": 6, "eval_before": False}
    recipe["pruning"] = {"start": 2, "final": 3, "interval": 1}
    recipe["data"] |= {"eval_rows": 2}
    assert kills.run(recipe, str(tmp_path / "whole"))
    wanted = (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes()
    went_on = set()
    for n in itertools.count(1):
        uri = tmp_path / f"killed-{n}"
        if kills.run(recipe, str(uri), where, n):
            break
        committed = checkpoint.committed(str(uri))
        went_on.add(checkpoint.load(committed[-1]).trainer["step"] if committed else 0)
        assert kills.run(recipe, str(uri)), n
        assert (uri / "adapter/adapter_model.safetensors").read_bytes() == wanted, n
    assert n > POINTS[where]
    assert len(went_on) > 1, "from the start and from checkpoints"
