"""Which adapter of a study or search is registered, and what is said of it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperlora import candidates, runs, storage
from hyperlora.adapters import resolve_path
from hyperlora.config import Recipe, RecipeError
from hyperlora.fingerprint import base_model
from hyperlora.training import RunInfo
from pipelines.common import load_recipe

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def trial(folder: Path, name: str, seed: int, metric: float, loss: float, parameters: int, **more: Any) -> None:
    """A finished run, without what ``best`` does not read."""
    recipe = load_recipe("quickstart", [f"seed={seed}"])
    runs.record(RunInfo(str(folder / "trials" / name)), recipe)
    outcome = {"metric": "accuracy", "metric_after": metric, "higher_is_better": True, "held_out_loss_after": loss}
    outcome |= {"adapter_parameters_final": parameters, "labels": [], "metric_before": None, "steps": 9} | more
    outcome |= {"held_out_loss_before": None, "held_out_rows": 8, "rank_initial": 4, "rank_final": 2}
    (folder / "trials" / name / "result.json").write_bytes(storage.sealed(outcome))


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The study of SST-2, with the trials as their table has them; the rows of its points."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copy(RESULTS / "sensitivity-sst2/study.json", folder)
    rows = list(csv.DictReader((RESULTS / "sensitivity-sst2/trials.csv").open()))
    for row in rows:
        numbers = (float(row["metric"]), float(row["held_out_loss"]), int(row["adapter_parameters_final"]))
        trial(folder, row["trial"], int(row["seed"]), *numbers)
    return folder, [row for row in rows if row["kind"] == "point"]


def points(rows: list[dict[str, str]], column: str) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        found.setdefault(int(row["point"]), {})[int(row["seed"])] = float(row[column])
    return found


@pytest.mark.parametrize("metric", [None, "held_out_loss"])
def test_of_a_study_the_best_trial_of_the_point_with_the_best_mean(
    committed: tuple[Path, list[dict[str, str]]], metric: str | None
) -> None:
    folder, rows = committed
    sign = 1 if metric is None else -1
    values = points(rows, metric or "metric")
    assert len(values) == 20
    point = max(values, key=lambda n: sign * np.mean(list(values[n].values())))
    seed = max(values[point], key=lambda s: sign * values[point][s])
    found = candidates.best(str(folder), metric)
    assert found.uri.endswith(f"trials/p{point:03d}-seed{seed}")
    # What goes into the registry is what this very adapter measured, not the mean that it was chosen by.
    assert (found.value, found.metric) == (values[point][seed], metric or "accuracy")
    facts = candidates.facts(found, str(folder), "e", {})
    assert facts["value"] == facts["metrics"][found.metric] == values[point][seed]
    mean = np.mean(list(values[point].values()))
    name = found.metric.replace("_", " ")
    assert found.choice == f"best mean {name} of 3 seeds of 20 points, {mean:.6g}; of these seeds it is the best"
    assert found.choice == facts["choice"]


@pytest.mark.parametrize("margin", [0, 0.002, 0.005, 0.02, 1])
def test_of_a_study_the_smallest_point_that_is_good_enough(
    committed: tuple[Path, list[dict[str, str]]], margin: float
) -> None:
    folder, rows = committed
    values, sizes = points(rows, "metric"), points(rows, "adapter_parameters_final")
    mean = {n: float(np.mean(list(v.values()))) for n, v in values.items()}
    size = {n: float(np.mean(list(v.values()))) for n, v in sizes.items()}
    leader = max(mean, key=lambda n: mean[n])
    good = [n for n in mean if mean[leader] - mean[n] <= margin + 1e-12]
    point = min(good, key=lambda n: (size[n], -mean[n]))
    seed = max(values[point], key=lambda s: values[point][s])
    found = candidates.best(str(folder), margin=margin)
    assert found.uri.endswith(f"trials/p{point:03d}-seed{seed}")
    assert found.value == values[point][seed] >= mean[leader] - margin
    start = f"smallest of {len(good)} of 20 points whose mean accuracy of 3 seeds is at most {margin:g} worse than"
    assert found.choice.startswith(start)
    if point == leader:
        assert found.choice.endswith(": the best itself; of these seeds it is the best")
        return
    differences = [values[leader][s] - values[point][s] for s in values[leader]]
    half = 4.302653 * np.std(differences, ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    worse = np.mean(differences)
    numbers = re.search(r": worse by (\S+) \(95 % interval (\S+) to (\S+)\)", found.choice)
    assert numbers is not None
    assert [float(n) for n in numbers.groups()] == pytest.approx([worse, worse - half, worse + half], rel=1e-4)
    # Three seeds of a noisy metric prove little, and the user is told.
    assert (f"which 3 seeds do not show to be within {margin:g}" in found.choice) == (worse + half > margin)


def study(folder: Path, measured: dict[int, dict[int, tuple[float, int]]]) -> str:
    """A study's folder: accuracy and size under each seed of each point."""
    found = []
    for point, seeds in measured.items():
        for seed, (metric, parameters) in seeds.items():
            trial(folder, f"p{point:03d}-seed{seed}", seed, metric, 1 - metric, parameters)
        by_seed = {str(seed): metric for seed, (metric, _) in seeds.items()}
        found.append({"point": point, "by_seed": by_seed, "n": len(by_seed)})
    (folder / "study.json").write_text(json.dumps({"metric": "accuracy", "points_measured": found}))
    return str(folder)


def test_only_points_of_equally_many_seeds_are_compared(tmp_path: Path) -> None:
    """A point with one lucky seed, as long as others are missing, or because they failed; and one without any."""
    measured = {
        0: {1: (0.99, 10)},
        1: {1: (0.7, 90), 2: (0.8, 90), 3: (0.75, 90)},
        2: {},
        3: {1: (0.6, 50), 2: (0.7, 50), 3: (0.9, 50)},
    }
    found = candidates.best(study(tmp_path, measured))
    assert (found.uri.rsplit("/", 1)[1], found.value) == ("p001-seed2", 0.8)
    assert "of 3 seeds of 2 points" in found.choice
    smaller = candidates.best(str(tmp_path), margin=0.02)
    assert (smaller.uri.rsplit("/", 1)[1], smaller.value) == ("p003-seed3", 0.9)
    assert ", which 3 seeds do not show to be within 0.02; of these seeds it is the best" in smaller.choice


def test_what_is_worse_by_the_margin_is_within_it_and_the_better_of_equal_sizes_is_taken(tmp_path: Path) -> None:
    measured = {0: {1: (0.8, 90)}, 1: {1: (0.7, 50)}, 2: {1: (0.72, 50)}, 3: {1: (0.69, 10)}}
    place = study(tmp_path, measured)
    assert -0.7 > -0.8 + 0.1, "as computers have it"
    for margin, point in ((0.079, 0), (0.08, 2), (0.1, 2), (0.11, 3)):
        assert candidates.best(place, margin=margin).uri.endswith(f"p{point:03d}-seed1"), margin
    measured.pop(2)
    assert candidates.best(study(tmp_path, measured), margin=0.1).uri.endswith("p001-seed1")
    told = (
        "smallest of 2 of 3 points whose accuracy is at most 0.1 worse than the best, 0.8: worse by 0.1, under too few"
    )
    assert candidates.best(str(tmp_path), margin=0.1).choice == f"{told} seeds to say how sure that is"


def test_differences_that_all_seeds_agree_on_are_shown_to_be_within_the_margin(tmp_path: Path) -> None:
    measured = {
        0: {1: (0.9, 90), 2: (0.8, 90), 3: (0.85, 90)},
        1: {1: (0.89, 50), 2: (0.789, 50), 3: (0.841, 50)},
    }
    choice = candidates.best(study(tmp_path, measured), margin=0.02).choice
    assert ": worse by 0.01 (95 % interval 0.00751586 to 0.0124841); of these seeds it is the best" in choice


def test_of_a_search_nothing_is_known_of_seeds(tmp_path: Path) -> None:
    measured = [{"trial": f"t{n}", "status": status} for n, status in enumerate(("finished", "finished", "stopped"))]
    (tmp_path / "tune.json").write_text(json.dumps({"metric": "accuracy", "measured": measured}))
    trial(tmp_path, "t0", 1, 0.9, 0.1, 90)
    trial(tmp_path, "t1", 1, 0.88, 0.2, 50)
    assert candidates.best(str(tmp_path)).choice == "best accuracy of 2 trials, 0.9"
    assert candidates.best(str(tmp_path), margin=0.01).choice.endswith("than the best, 0.9: the best itself")
    assert ": worse by 0.02, under too few seeds" in candidates.best(str(tmp_path), margin=0.05).choice


@pytest.mark.parametrize("found", [[], [{"point": 0, "by_seed": {}, "n": 0}]])
def test_a_study_without_a_finished_trial_has_nothing_to_register(tmp_path: Path, found: list[Any]) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"metric": "accuracy", "points_measured": found}))
    with pytest.raises(RecipeError, match="at least one finished trial"):
        candidates.best(str(tmp_path), margin=0.1)


def test_the_base_model_is_known_by_the_hash_of_its_files(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_path("builtin:storylm"), tmp_path / "base"))

    def known(path: str) -> dict[str, Any]:
        recipe: Recipe = load_recipe("quickstart", [f"model.path={path}"])
        return base_model(recipe)

    shipped, copy = known("builtin:storylm"), known(str(folder))
    assert copy == {"path": str(folder), "revision": None, "sha256": shipped["sha256"]}
    (folder / "README.md").write_text("of no account")
    assert known(str(folder)) == copy
    for name in ("model.safetensors", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert known(str(folder))["sha256"] != copy["sha256"]
        (folder / name).write_bytes(content)
