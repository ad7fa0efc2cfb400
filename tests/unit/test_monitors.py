"""The monitors' statistics against numbers computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hyperlora import storage
from hyperlora.config import MonitorsConfig, RecipeError
from hyperlora.monitors import Monitors, monitors_of, read_baseline, squared_error_of_mean, trailing_mean
from hyperlora.pruning import BudgetPlan, Pruning
from pipelines.common import load_recipe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def monitors(events: tuple[int, ...] = (), metric: str = "accuracy", **fields: Any) -> Monitors:
    config = MonitorsConfig(window=2, **fields)
    better = metric != "held_out_loss"
    return Monitors(
        config,
        total_steps=100,
        events=events,
        metric=metric,
        higher_is_better=better,
        held_out_rows=100,
        batch_size=25,
    )


def fed(m: Monitors, name: str, losses: list[float], norms: list[float] | None = None) -> list[float]:
    rows = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [m.step(n, loss, norm)[0][name] for n, (loss, norm) in enumerate(rows, 1)]


def raised(m: Monitors) -> list[tuple[str, int]]:
    return [(w.monitor, w.step) for w in m.warnings]


def test_error_of_a_mean_and_trailing_mean() -> None:
    # Differences 2 and -1: their mean square is 2.5, half of it the variance of one value, a third of that of the mean.
    assert squared_error_of_mean([1.0, 3.0, 2.0]) == pytest.approx(2.5 / 2 / 3)
    assert squared_error_of_mean([1.0]) == 0
    assert trailing_mean([4.0, 2.0, 0.0], 2) == [4.0, 3.0, 1.0]


def test_drop_after_an_event_in_standard_errors() -> None:
    # Means 1.1 and 2.2; the variances of the means are 0.2²/4 = 0.01 and 0.4²/4 = 0.04: 1.1/√0.05 = 4.919 errors.
    losses = [1.0, 1.2, 2.0, 2.4, 2.4, 2.4]
    quiet = monitors((2,))
    assert fed(quiet, "monitor/pruning_drop", losses) == pytest.approx([0, 0, 0, *[4.91935 / 5] * 3], abs=1e-5)
    assert raised(quiet) == []
    m = monitors((2,), deviations=4.0)
    assert fed(m, "monitor/pruning_drop", losses)[3] == pytest.approx(4.91935 / 4, abs=1e-5)
    assert raised(m) == [("pruning_drop", 4)]
    assert "rose from 1.1 to 2.2 (2 steps each) after the pruning event at step 2" in m.warnings[0].message


def test_a_rise_without_an_event_is_no_drop() -> None:
    assert fed(monitors(), "monitor/pruning_drop", [1.0, 1.1, 9.0, 9.1, 9.0]) == [0.0] * 5
    # The first event has too few losses before it, the last too few after.
    assert fed(monitors((1, 4)), "monitor/pruning_drop", [1.0, 9.0, 9.1, 9.0, 19.0]) == [0.0] * 5


def test_held_out_drop_in_standard_errors() -> None:
    m = monitors((5,))
    assert m.evaluation(4, 0.9) == ({}, [])
    # (91·11 + 61·41)/102² over 100 rows: a standard error of 0.058017; a fall by 0.3 is 5.171 of them.
    statistics, (warning,) = m.evaluation(5, 0.6)
    assert statistics["monitor/held_out_drop"] == pytest.approx(5.171 / 5, abs=1e-3)
    assert warning.message.startswith("held-out accuracy went from 0.9 at step 4 to 0.6")
    assert m.evaluation(6, 0.1) == ({}, []), "no event since step 5"
    better = monitors((5,))
    better.evaluation(4, 0.6)
    assert better.evaluation(5, 0.9)[0]["monitor/held_out_drop"] < 0


def test_held_out_loss_has_the_noise_of_the_training_loss() -> None:
    m = monitors((3,), metric="held_out_loss")
    fed(m, "monitor/pruning_drop", [1.0, 1.2])
    m.evaluation(2, 1.0)
    # One batch of 25 has variance 0.02, so 100 rows have 0.005, and a difference 0.01.
    assert m.evaluation(3, 2.0)[0]["monitor/held_out_drop"] == pytest.approx(1.0 / 0.1 / 5)
    assert raised(m) == [("pruning_drop", 3)]


def test_gradient_against_its_own_past() -> None:
    m = monitors()
    values = fed(m, "monitor/gradient", [1.0] * 10, [1.0, 1.0, 1.0, 12.0, 12.0, 12.0, 12.0, 12.0, 12.0, 12.0])
    assert values == [0.0] * 7 + [2.0, 2.0, 2.0]
    assert raised(m) == [("gradient", 8)]
    outliers = [1.0, 1.0, 500.0, 1.0, 1.0, 900.0, 900.0, 1.0, 1.0, 1.0]
    assert max(fed(monitors(), "monitor/gradient", [1.0] * 10, outliers)) == pytest.approx(1 / 6)


def test_gradient_history_is_bounded() -> None:
    norms = [100.0] * 30 + [1.0] * 15 + [20.0] * 5
    m = monitors(gradient_history=10)
    fed(m, "monitor/gradient", [1.0] * 50, norms)
    # Of the ten norms before the last three all are 1, whatever came before.
    assert raised(m) == [("gradient", 48)]


def test_stall_against_the_baseline_at_half_the_steps(tmp_path: Path) -> None:
    (tmp_path / "curve.json").write_text("[4, 3, 2, 1]")
    # Smoothed 4, 3.5, 2.5, 1.5: after the window a gain of 2, a margin of 0.4. At step 3 the baseline's step 2 counts.
    m = monitors(baseline=str(tmp_path / "curve.json"))
    values = fed(m, "monitor/stall", [4.25] * 9 + [4.25, 1.0, 1.0])
    # From step 9 on the baseline is at its end, and keeps its last value; step 11 is noisy.
    assert values == pytest.approx(
        [0, 0.625, 1.875, 1.875, 4.375, 4.375, *[6.875] * 4, 1.125 / 11.4905, -1.25], abs=1e-4
    )
    assert raised(m) == [("stall", 3)]
    noisy = monitors(baseline=str(tmp_path / "curve.json"))
    # A step of 0.5 between two losses: the difference of two such means has error √(2·0.0625), and 5 of them are 1.77.
    assert fed(noisy, "monitor/stall", [4.0, 4.0, 4.5, 4.0])[3] == pytest.approx(0.75 / 1.76777, abs=1e-4)
    assert raised(noisy) == []


def test_a_shock_at_the_start_does_not_hide_a_stall(tmp_path: Path) -> None:
    (tmp_path / "curve.json").write_text('{"smoothed": [22, 6, 6, 5, 4.5, 4, 4, 4]}')
    m = monitors(baseline=str(tmp_path / "curve.json"))
    fed(m, "monitor/stall", [22, *[6.0] * 15])
    # A fifth of the whole gain of 18 is 3.6, by which 6 would be good for ever; of the 2 after the window it is 0.4.
    assert raised(m) == [("stall", 7)]


def test_no_baseline_no_stall() -> None:
    assert "monitor/stall" not in monitors().step(1, 1.0, 1.0)[0]


def test_every_form_of_a_baseline(tmp_path: Path) -> None:
    def read(content: Any) -> list[float] | None:
        (tmp_path / "b.json").write_text(json.dumps(content))
        return read_baseline(MonitorsConfig(baseline=str(tmp_path / "b.json"), window=2), 100)

    assert read([4, 2, 0]) == read({"losses": [4, 2, 0], "name": "x"}) == [4.0, 3.0, 1.0]
    (tmp_path / "result.json").write_bytes(storage.sealed({"losses": [4, 2, 0]}).replace(b"4", b"5"))
    with pytest.raises(RecipeError, match="does not match the SHA-256 in it"):
        read_baseline(MonitorsConfig(baseline=str(tmp_path / "result.json"), window=2), 100)
    trials = [{"smoothed": [4, 3, 2]}, {"smoothed": [2, 1, 0]}]
    contestants = [{"name": "lora", "trials": []}, {"name": "adalora", "trials": trials}]
    assert read({"baseline": "adalora", "contestants": contestants}) == [3.0, 2.0, 1.0]
    for content, allowed in (
        ({"steps": 3}, "KeyError"),
        ([], "needs one finite loss"),
        ({"baseline": "dora", "contestants": contestants}, "result.json, a comparison.json"),
        ([1, "x"], "could not convert"),
        ([1, float("nan")], "needs one finite loss"),
        ([1, 2, 3], "losses that fall below the first one"),
    ):
        with pytest.raises(RecipeError, match=r"monitors\.baseline") as error:
            read(content)
        assert allowed in str(error.value)


@pytest.mark.parametrize(
    ("name", "comparison"),
    [("quickstart", "quickstart-rules"), ("quickstart-entailment", "quickstart-entailment")],
)
def test_a_curve_that_ships_counts_for_its_task_alone(name: str, comparison: str) -> None:
    judged = ("method=lora", "optimizer.lr=1", "adapter.rank=4", "pruning.schedule=none", "seed=5", "data.eval_rows=7")
    for changes in ((), judged):
        recipe = load_recipe(name, changes)
        config = monitors_of(recipe)
        assert config == recipe.monitors
        assert config.baseline == f"builtin:{name}"
        curve = read_baseline(config, recipe.total_steps(0))
        assert curve is not None
    result = json.loads((RESULTS / comparison / "comparison.json").read_text())
    assert result["steps"] == len(curve) == recipe.training.steps
    (adalora,) = (c for c in result["contestants"] if c["name"] == "adalora")
    last = [trial["smoothed"][-1] for trial in adalora["trials"]]
    assert curve[-1] == pytest.approx(sum(last) / len(last), abs=1e-6)
    for change in (
        "training.steps=40",
        "training.batch_size=16",
        "data.train_rows=100",
        "data.seed=1",
        "model.dtype=bfloat16",
        "task.max_length=64",
    ):
        assert monitors_of(load_recipe(name, [change])).baseline is None, change


def test_a_curve_that_does_not_ship() -> None:
    with pytest.raises(
        RecipeError, match=r"monitors\.baseline: got 'builtin:x'; curves that ship: builtin:quickstart-ent"
    ):
        monitors_of(load_recipe("quickstart", ["monitors.baseline=builtin:x"]))


def test_state_goes_on_where_it_was() -> None:
    losses = [1.0, 1.2, 2.0, 2.4, 2.0, 9.0, 9.5, 9.0]
    norms = [1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    events = (2, 5)
    whole = monitors(events, deviations=3.0)
    expected = [whole.step(n, x, g) for n, (x, g) in enumerate(zip(losses, norms, strict=True), 1)]
    assert raised(whole) == [("pruning_drop", 4), ("gradient", 8)]
    for cut in range(1, len(losses)):
        first, second = monitors(events, deviations=3.0), monitors(events, deviations=3.0)
        for n in range(cut):
            first.step(n + 1, losses[n], norms[n])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.step(n + 1, losses[n], norms[n]) for n in range(cut, len(losses))] == expected[cut:]
        assert second.warnings == whole.warnings


def test_events_are_the_steps_at_which_the_budget_falls() -> None:
    assert BudgetPlan(Pruning(interval=10, count=3, start=10), 10, 5, 100).falls() == [10, 20]
    cubic = BudgetPlan(Pruning("cubic", interval=1, start=10, final=50), 10, 8, 100)
    assert cubic.falls() == [s for s in sorted(cubic.events) if cubic.budget(s) < cubic.budget(s - 1)]
    assert len(cubic.falls()) == 2 < len(cubic.events)
