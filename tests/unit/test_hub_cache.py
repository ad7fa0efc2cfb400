"""What is known of a hub model by what the hub's cache holds of it here. No hub is asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hyperlora.adapters import resolve_path
from hyperlora.config import Recipe, RecipeError
from hyperlora.fingerprint import base_model
from hyperlora.preflight import inspect
from pipelines.common import load_recipe

COMMIT, NAME = "c" * 40, "someone/story"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model that ships with the package, all of it, as the cache has a model of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "rows"))
    repository = tmp_path / "hub/models--someone--story"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    return Path(shutil.copytree(resolve_path("builtin:storylm"), repository / "snapshots" / COMMIT))


def recipe(path: str = NAME) -> Recipe:
    return load_recipe("quickstart", [f"model.path={path}", "data.train_rows=64", "data.eval_rows=8"])


def known(path: str = NAME) -> str:
    return str(base_model(recipe(path))["sha256"])


def split(folder: Path) -> Path:
    """Tell of a second file of weights; returns where it would be."""
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))
    return folder / "model-2.safetensors"


def test_a_cached_model_has_the_hash_of_the_same_folder(snapshot: Path) -> None:
    assert known() == known("builtin:storylm")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "model-2.safetensors"])
def test_a_model_that_is_not_all_here_has_no_hash(snapshot: Path, missing: str) -> None:
    """A dry run, for one, fetches the config alone."""
    if missing == "model-2.safetensors":
        split(snapshot)
    else:
        (snapshot / missing).unlink()
    with pytest.raises(RecipeError, match=f"model.path: got '{NAME}'; .* this machine") as refused:
        known()
    assert len(refused.value.problems) == 1
    folder = Path(shutil.copytree(snapshot, snapshot.parents[3] / "folder"))
    with pytest.raises(RecipeError, match=r"model\.path: got "):
        known(str(folder))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_hash_is_of_the_files_that_the_model_is_loaded_from(snapshot: Path, sharded: bool) -> None:
    if sharded:
        split(snapshot).write_bytes(b"weights")
    before = known()
    (snapshot / "consolidated.safetensors").write_bytes(b"the same weights once more")
    assert known() == before
    if sharded:
        (snapshot / "model-2.safetensors").write_bytes(b"weightz")
        assert known() != before


def shorten(snapshot: Path) -> None:
    path = snapshot / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(snapshot: Path) -> None:
    path = snapshot / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "layers.3.mlp.up" not in name}, path)


def widen(snapshot: Path) -> None:
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (shorten, "model.safetensors is no whole safetensors file"),
        (drop_tensor, "it lacks model.layers.3.mlp.up_proj.weight"),
        (widen, "weights that fit the config"),
    ],
)
def test_weights_in_the_cache_are_checked_before_anything_starts(
    snapshot: Path, breaks: Callable[[Path], None], expected: str
) -> None:
    inspect(recipe())
    breaks(snapshot)
    with pytest.raises(RecipeError, match=f"model.path: got '{NAME}'; .*{expected}"):
        inspect(recipe())


@pytest.mark.parametrize("part", [False, True])
def test_weights_that_are_not_in_the_cache_yet_are_no_problem(snapshot: Path, part: bool) -> None:
    if part:
        split(snapshot)
    else:
        (snapshot / "model.safetensors").unlink()
    assert inspect(recipe()).base_parameters > 0
