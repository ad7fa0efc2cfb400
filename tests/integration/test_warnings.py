"""Runs that go wrong in each of the three ways, for real, and one that does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hyperlora.training import RunInfo, Silent, train
from pipelines.cli import main
from pipelines.common import load_recipe

SMALL = (
    "model.path=builtin:storylm",
    "model.init=pretrained",
    "model.dtype=float32",
    "training.eval_before=false",
    "training.checkpoint_every=10",
)
HEALTHY = (*SMALL, "training.steps=40")
# One event that leaves 14 of 112 directions.
CUT = ("method=adalora", *SMALL, "training.steps=60", "pruning.start=40", "pruning.interval=100", "pruning.final=10")
CUT = ("method=adalora", *CUT, "adapter.target_rank=0.5")
# The warm-up climbs through every rate up to one that is 100 times too high.
TOO_FAST = ("method=adalora", *SMALL, "training.steps=20", "optimizer.lr=1", "optimizer.warmup=0.9")
TOO_FAST = (*TOO_FAST, "pruning.schedule=none")  # an event would be blamed as well
MONITORS = ("monitor/gradient", "monitor/pruning_drop", "monitor/stall")


def run(recipe: Path, *changes: str) -> dict:
    summary = recipe.with_suffix(".json")
    assert main(["train", str(recipe), "--json", str(summary), *changes]) == 0
    return json.loads(summary.read_text())


def logged(folder: Path, result: dict) -> None:
    """A warning is its monitor's first value of 1 or more in MLflow, and a tag."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (warning,) = result["warnings"]
    history = client.get_metric_history(result["mlflow_run_id"], f"monitor/{warning['monitor']}")
    assert [m.step for m in history] == list(range(1, result["steps"] + 1))
    values = [m.value for m in history]
    first = next(n for n, value in enumerate(values, 1) if value >= 1)
    assert (warning["step"], warning["value"]) == (first, values[first - 1])
    tag = client.get_run(result["mlflow_run_id"]).data.tags[f"hyperlora.warning.{warning['monitor']}"]
    assert tag == f"step {first}: {warning['message']}"


def shown(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def baseline(recipe_file: Path) -> str:
    """``result.json`` of a healthy run."""
    return str(Path(run(recipe_file, *HEALTHY)["adapter"]).parent / "result.json")


def test_a_healthy_run_has_no_warning(recipe_file: Path, baseline: str, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert run(recipe_file, *HEALTHY, "seed=1", f"monitors.baseline={baseline}")["warnings"] == []
    for method in ("adalora", "lora"):
        assert run(recipe_file, *HEALTHY, f"method={method}")["warnings"] == []
    assert "warning" not in shown(capsys)


def test_stall(recipe_file: Path, baseline: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    changes = (*HEALTHY, "optimizer.lr=1e-5", f"monitors.baseline={baseline}", "mlflow.enabled=true")
    result = run(recipe_file, *changes)
    (warning,) = result["warnings"]
    assert warning["monitor"] == "stall"
    assert "warning (stall): training loss" in shown(capsys)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for name in MONITORS:
        history = client.get_metric_history(result["mlflow_run_id"], name)
        assert [m.step for m in history] == list(range(1, 41)), name
    logged(tmp_path, result)


def test_quality_drop_after_pruning(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = run(recipe_file, *CUT, "mlflow.enabled=true")
    logged(tmp_path, result)
    (warning,) = result["warnings"]
    assert (warning["monitor"], warning["step"]) == ("pruning_drop", 50)
    assert warning["value"] > 2
    out = shown(capsys)
    assert out.count("warning (pruning drop): training loss rose from") == 1
    assert "warning, step 50 pruning drop: training loss rose from" in out, "in the summary"
    saved = json.loads((Path(result["adapter"]).parent / "result.json").read_text())
    assert saved["warnings"] == result["warnings"]
    # Spread over many events the same cut is none.
    assert run(recipe_file, *CUT, "pruning.start=15", "pruning.interval=1", "adapter.target_rank=2")["warnings"] == []


def test_drop_of_the_held_out_metric(recipe_file: Path) -> None:
    # The evaluation after step 40 sees the event of that step; the training loss shows it later.
    language = ("task.kind=language-modeling", "data.template='{prompt} {completion}'", "data.eval_rows=64")
    (warning,) = run(recipe_file, *CUT, *language, "training.eval_every=20")["warnings"]
    assert (warning["monitor"], warning["step"]) == ("pruning_drop", 40)
    assert warning["message"].startswith("held-out loss went from")


def test_gradient_instability(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = run(recipe_file, *TOO_FAST, "mlflow.enabled=true")
    logged(tmp_path, result)
    (warning,) = result["warnings"]
    assert warning["monitor"] == "gradient"
    assert shown(capsys).count("warning (gradient): gradient norm") == 1
    # A threshold that is not reached: the same run, no warning.
    factor = f"monitors.gradient_factor={1e3 * warning['value']}"
    assert run(recipe_file, *TOO_FAST, factor)["warnings"] == []


class Recorder(Silent):
    """Keeps what the monitors say; ends the run as a kill would, before step ``stop`` is reported."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.metrics: dict[int, dict[str, float]] = {}
        self.warnings: list[tuple[str, int]] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.stop:
            raise InterruptedError
        self.metrics[step] = {k: v for k, v in metrics.items() if k.startswith("monitor/")}

    def warning(self, monitor: str, step: int, message: str) -> None:
        self.warnings.append((monitor, step))


@pytest.mark.parametrize(("stop", "resumed_at"), [(45, 40), (55, 50)])
def test_resume_goes_on_with_the_monitors(recipe_file: Path, tmp_path: Path, stop: int, resumed_at: int) -> None:
    """Interrupted between the event and its warning, and after the warning."""
    recipe = load_recipe(str(recipe_file), [*CUT, "training.eval_every=10"])
    whole, first, second = Recorder(), Recorder(stop), Recorder()
    outcome = train(recipe, RunInfo(str(tmp_path / "whole")), sink=whole)
    with pytest.raises(InterruptedError):
        train(recipe, RunInfo(str(tmp_path / "cut")), sink=first)
    resumed = train(recipe, RunInfo(str(tmp_path / "cut")), sink=second)
    assert second.metrics == {n: m for n, m in whole.metrics.items() if n > resumed_at}
    assert first.warnings + second.warnings == whole.warnings == [("pruning_drop", 50)]
    assert resumed["warnings"] == outcome["warnings"]


@pytest.mark.parametrize(("changes", "warns"), [((), False), (("optimizer.lr=1e-5",), True)])
def test_the_quickstart_is_held_against_the_curve_that_ships(
    tmp_path: Path, changes: tuple[str, ...], warns: bool
) -> None:
    local = ("ray.backend=local", "ray.num_workers=1", "mlflow.enabled=false", "training.eval_before=false")
    recorder = Recorder(stop=41)
    with pytest.raises(InterruptedError):
        train(load_recipe("quickstart", [*local, *changes]), RunInfo(str(tmp_path)), sink=recorder)
    assert [monitor for monitor, _ in recorder.warnings] == (["stall"] if warns else [])
    assert (recorder.metrics[40]["monitor/stall"] >= 1) == warns


@pytest.mark.parametrize("content", [None, "{}", "[1, 2", "[1, 2]"])
def test_a_baseline_that_is_none(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture, content: str | None
) -> None:
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_text(content)
    assert main(["train", str(recipe_file), f"monitors.baseline={path}"]) == 2
    assert "monitors.baseline: got" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "runs").exists()
