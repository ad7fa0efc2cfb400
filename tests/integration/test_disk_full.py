"""The disk that takes the checkpoints runs full, and has room again, or not: a real file system of a few megabytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hyperlora import checkpoint
from pipelines.cli import main

ROOM = 150_000  # bytes: a run's small files, no checkpoint
TRAIN = ["training.steps=60", "training.checkpoint_every=5", "storage.final_retry_seconds=1"]

#: Runs in a mount namespace of its own: mount a file system, fill it, train, and make room after the first warning.
PROGRAM = """
import os, pathlib, shutil, subprocess, sys
disk, out, room, make_room, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], check=True)
filler = pathlib.Path(disk, "filler")
filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - int(room)))
training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
for line in training.stdout:
    print(line, end="")
    if "was not written" in line and make_room == "yes":
        filler.unlink(missing_ok=True)
shutil.copytree(pathlib.Path(disk, "runs"), out)
sys.exit(training.wait())
"""

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def mounts() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run([*UNSHARE, "true"], check=False).returncode


def train(recipe: Path, folder: Path, make_room: str) -> subprocess.CompletedProcess[str]:
    (folder / "disk").mkdir()
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "train",
        str(recipe),
        *TRAIN,
        f"storage.uri={folder / 'disk/runs'}",
    ]
    words = [sys.executable, "-c", PROGRAM, str(folder / "disk"), str(folder / "out"), str(ROOM), make_room, *command]
    environment = os.environ | {"XDG_STATE_HOME": str(folder / "state"), "COLUMNS": "1000"}
    return subprocess.run([*UNSHARE, *words], env=environment, capture_output=True, text=True, timeout=300, check=False)


def expected(recipe: Path) -> tuple[list[float], dict]:
    """Losses and adapter of the run on a disk with room."""
    assert main(["train", str(recipe), *TRAIN]) == 0
    (run,) = (recipe.parent / "runs").glob("small-*")
    return json.loads((run / "result.json").read_text())["losses"], load_file(run / "adapter/adapter_model.safetensors")


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


@pytest.mark.skipif(not mounts(), reason="mounts need user namespaces")
def test_training_goes_on_and_ends_whole_when_there_is_room_again(recipe_file: Path, tmp_path: Path) -> None:
    done = train(recipe_file, tmp_path, "yes")
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
    done = train(recipe_file, tmp_path, "no")
    assert done.returncode == 1, done
    assert "Traceback" not in done.stdout
    (kept,) = (tmp_path / "state/hyperlora").glob("small-*")
    assert f"a local copy of checkpoint and adapter is kept in {kept}" in done.stdout
    losses, adapter = expected(recipe_file)
    assert same(load_file(kept / "adapter/adapter_model.safetensors"), adapter)
    (saved,) = checkpoint.committed(str(kept))
    assert checkpoint.load(saved).trainer["losses"] == losses
