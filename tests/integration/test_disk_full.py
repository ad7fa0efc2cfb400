"""The disk that takes the checkpoints runs full, and has room again, or not: a real file system of a few megabytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_disk import mounts, train

from hyperlora import checkpoint
from pipelines.cli import main

ROOM = 150_000  # bytes: a run's small files, no checkpoint
TRAIN = ["training.steps=60", "training.checkpoint_every=5", "storage.final_retry_seconds=1"]


def expected(recipe: Path) -> tuple[list[float], dict]:
    """Losses and adapter of the run on a disk with room."""
    assert main(["train", str(recipe), *TRAIN]) == 0
    (run,) = (recipe.parent / "runs").glob("small-*")
    return json.loads((run / "result.json").read_text())["losses"], load_file(run / "adapter/adapter_model.safetensors")


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


@pytest.mark.skipif(not mounts(), reason="mounts need user namespaces")
def test_training_goes_on_and_ends_whole_when_there_is_room_again(recipe_file: Path, tmp_path: Path) -> None:
    done = train(recipe_file, tmp_path, *TRAIN, room=ROOM, after=None, until="warning")
    assert done.returncode == 0, done
    assert done.stdout.count("was not written") == 2, "once when it happens, once in the summary"
    assert "No space left on device" in done.stdout
    losses, adapter = expected(recipe_file)
    (run,) = (tmp_path / "out").glob("small-*")
    assert json.loads((run / "result.json").read_text())["losses"] == losses
    assert same(load_file(run / "adapter/adapter_model.safetensors"), adapter)
    for uri in checkpoint.committed(str(run)):
        checkpoint.load(uri)
    assert not list(run.rglob("*.new")), "parts of files stay behind"


@pytest.mark.skipif(not mounts(), reason="mounts need user namespaces")
def test_a_disk_that_stays_full_loses_nothing(recipe_file: Path, tmp_path: Path) -> None:
    done = train(recipe_file, tmp_path, *TRAIN, room=ROOM, after=None, until="never")
    assert done.returncode == 1, done
    assert "Traceback" not in done.stdout
    (kept,) = (tmp_path / "state/hyperlora").glob("small-*")
    assert f"a local copy of checkpoint and adapter is kept in {kept}" in done.stdout
    losses, adapter = expected(recipe_file)
    assert same(load_file(kept / "adapter/adapter_model.safetensors"), adapter)
    (saved,) = checkpoint.committed(str(kept))
    assert checkpoint.load(saved).trainer["losses"] == losses
