"""What the index would offer: a wheel with the three packages whole, which works away from the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipelines.common import shipped

ROOT = Path(__file__).parents[2]
PACKAGES = ("hyperlora", "pipelines", "tune_spaces")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of the build is left in the repository."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(built), str(source))
    (found,) = built.glob("*.whl")
    return found


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-index", "--no-deps", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_is_in_it(wheel: Path) -> None:
    assert wheel.name.startswith("hyperadalora-")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted
    assert {n for n in names if ".dist-info/" not in n} == wanted


def test_it_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--target", str(site), str(wheel))

    def run(*words: str) -> str:
        command = [sys.executable, "-c", "import sys, pipelines.cli; sys.exit(pipelines.cli.main())", *words]
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = (
        "import hyperlora, pipelines, tune_spaces; print(*(m.__file__ for m in (hyperlora, pipelines, tune_spaces)))"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert all(name.startswith(str(site)) for name in done.stdout.split()), done
    run("recipes", "--json", "recipes.json")
    assert {row["name"] for row in json.loads((tmp_path / "recipes.json").read_text())} == set(shipped())
    assert "rank budget" in run("train", "quickstart", "--dry-run")
    assert "trials" in run("tune", "quickstart", "--space", "smoke", "--dry-run")
