"""Three failures that show while a run is under way: stall, quality drop after pruning, unstable gradients.

They are the failure signatures of HyperAdaLoRA (arXiv 2510.02630). Each is one number a step, in units of its
threshold, so that 1 fires; each warns once a run. They see only numbers that the host has read anyway, and change
nothing. ``docs/method.md`` has the formulas, ``docs/decisions.md`` what the thresholds rest on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import fsspec

from hyperlora import storage
from hyperlora.config import BUILTIN, MonitorsConfig, Problem, Recipe, RecipeError

Monitor = Literal["stall", "pruning_drop", "gradient", "checkpoint"]
# Gradient norms whose median is "now": one odd batch, or two, are no instability.
RECENT = 5
# Fewest earlier norms to compare with: too high a rate explodes as soon as the warm-up is over.
EARLIER = 3


@dataclass(frozen=True)
class MonitorWarning:
    """What a monitor found: ``value`` is its statistic in units of the threshold."""

    monitor: Monitor
    step: int
    value: float
    message: str


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def squared_error_of_mean(values: Sequence[float]) -> float:
    """Variance of the mean of noisy values around a trend, from the differences of neighbours (von Neumann 1941).

    0 for a single value, of whose noise nothing is known.
    """
    differences = [b - a for a, b in pairwise(values)]
    return mean([d * d for d in differences]) / (2 * len(values)) if differences else 0.0


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values up to each one; of fewer at the start."""
    return [mean(values[max(0, n + 1 - window) : n + 1]) for n in range(len(values))]


def in_units_of(value: float, unit: float) -> float:
    """``value / unit``; 0 where the unit is 0, which says that nothing is known of the noise."""
    return value / unit if unit else 0.0


def loss_window(config: MonitorsConfig, total_steps: int) -> int:
    """Optimizer steps that a loss is averaged over."""
    return config.window or max(10, total_steps // 20)


def monitors_of(recipe: Recipe) -> MonitorsConfig:
    """``recipe.monitors``, without a curve that ships with the package and belongs to another task.

    A shipped curve belongs to a model, task, data, rows a step and steps; everything else is what it judges.

    Raises:
        RecipeError: no such curve ships.
    """
    name = recipe.monitors.baseline
    if name is None or not name.startswith(BUILTIN):
        return recipe.monitors
    measured = Recipe.model_validate(json.loads(_shipped(name).read_text(encoding="utf-8"))["recipe"])
    if _belongs_to(recipe) == _belongs_to(measured):
        return recipe.monitors
    return recipe.monitors.model_copy(update={"baseline": None})


def _belongs_to(recipe: Recipe) -> tuple[object, ...]:
    training = recipe.training
    data = recipe.data.model_copy(update={"eval_rows": None})
    return recipe.model, recipe.task, data, training.steps, training.epochs, training.batch_size


def _shipped(name: str) -> Path:
    folder = Path(str(files("hyperlora"))) / "assets" / "curves"
    names = {f"{BUILTIN}{path.stem}": path for path in sorted(folder.glob("*.json"))}
    if name not in names:
        raise RecipeError([Problem("monitors.baseline", name, "curves that ship: " + ", ".join(names))])
    return names[name]


def read_baseline(config: MonitorsConfig, total_steps: int) -> list[float] | None:
    """Smoothed losses, one a step, of the curve that ``monitors.baseline`` names; None without one.

    Raises:
        RecipeError: the file cannot be read, is of no known form, or its losses do not fall.
    """
    if config.baseline is None:
        return None
    allowed = "a result.json, a comparison.json or a JSON list of losses, one a step"
    place = str(_shipped(config.baseline)) if config.baseline.startswith(BUILTIN) else config.baseline
    try:
        with fsspec.open(place, "r", encoding="utf-8") as file:
            curve = _curve(json.load(file), loss_window(config, total_steps))
    except Exception as error:  # of what the file holds, or of a store's own library
        problem = Problem("monitors.baseline", config.baseline, f"{allowed} ({type(error).__name__}: {error})")
        raise RecipeError([problem]) from error
    if not min(curve) < curve[0]:
        problem = Problem("monitors.baseline", config.baseline, "losses that fall below the first one")
        raise RecipeError([problem])
    return curve


def _curve(content: Any, window: int) -> list[float]:
    if isinstance(content, dict) and "contestants" in content:
        (baseline,) = (c for c in content["contestants"] if c["name"] == content["baseline"])
        smoothed = [trial["smoothed"] for trial in baseline["trials"]]
        curve = [mean([float(x) for x in values]) for values in zip(*smoothed, strict=True)]
    elif isinstance(content, dict) and "smoothed" in content:
        curve = [float(x) for x in content["smoothed"]]
    else:
        if isinstance(content, dict) and storage.SEAL in content:
            content = storage.unsealed(content)
        losses = content["losses"] if isinstance(content, dict) else content
        if not isinstance(losses, list):
            raise TypeError(f"losses are {type(losses).__name__}")
        curve = trailing_mean([float(x) for x in losses], window)
    if not curve or not all(map(math.isfinite, curve)):
        raise ValueError("needs one finite loss or more")
    return curve


class Monitors:
    """The three monitors of one run.

    Args:
        config: thresholds.
        total_steps: T, optimizer steps of the run.
        events: optimizer steps whose update prunes; the loss of the step after sees it.
        metric: name of the held-out metric.
        higher_is_better: whether a larger metric is better.
        held_out_rows: rows behind the metric.
        batch_size: rows behind one training loss.

    Raises:
        RecipeError: the baseline curve is not usable.
    """

    def __init__(
        self,
        config: MonitorsConfig,
        *,
        total_steps: int,
        events: Collection[int],
        metric: str,
        higher_is_better: bool,
        held_out_rows: int,
        batch_size: int,
    ) -> None:
        self._config, self._events = config, frozenset(events)
        self._metric, self._sign = metric, 1 if higher_is_better else -1
        self._held_out_rows, self._batch_size = held_out_rows, batch_size
        self.window = loss_window(config, total_steps)
        self._baseline = read_baseline(config, total_steps)
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._drop = 0.0
        self._evaluation: tuple[int, float] | None = None
        self.warnings: list[MonitorWarning] = []

    def step(self, step: int, loss: float, grad_norm: float) -> tuple[dict[str, float], list[MonitorWarning]]:
        """Take in one optimizer step (1-based); returns its metrics and the warnings that it raises."""
        before = len(self.warnings)
        self._losses = [*self._losses, loss][-2 * self.window :]
        self._norms = [*self._norms, grad_norm][-self._config.gradient_history - RECENT :]
        metrics = {"monitor/gradient": self._gradient(step), "monitor/pruning_drop": self._training_drop(step)}
        if self._baseline is not None:
            metrics["monitor/stall"] = self._stall(step, self._baseline)
        return metrics, self.warnings[before:]

    def evaluation(self, step: int, value: float) -> tuple[dict[str, float], list[MonitorWarning]]:
        """Take in the held-out metric after ``step``; returns metrics and warnings as :meth:`step` does."""
        before, earlier = len(self.warnings), self._evaluation
        self._evaluation = (step, value)
        if earlier is None or not any(earlier[0] < event <= step for event in self._events):
            return {}, []
        name = self._metric.removeprefix("held_out_").replace("_", " ")
        fall = self._sign * (earlier[1] - value)
        statistic = in_units_of(fall, self._config.deviations * self._held_out_error(earlier[1], value))
        self._warn(
            "pruning_drop",
            step,
            statistic,
            f"held-out {name} went from {earlier[1]:.4g} at step {earlier[0]} to {value:.4g}, with pruning "
            "between: prune less at once (pruning.interval, pruning.count), or less (adapter.target_rank)",
        )
        return {"monitor/held_out_drop": statistic}, self.warnings[before:]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint."""
        return {
            "losses": self._losses,
            "grad_norms": self._norms,
            "drop": self._drop,
            "evaluation": self._evaluation,
            "warnings": [asdict(w) for w in self.warnings],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._losses, self._norms = list(state["losses"]), list(state["grad_norms"])
        self._drop = state["drop"]
        self._evaluation = None if state["evaluation"] is None else (state["evaluation"][0], state["evaluation"][1])
        self.warnings = [MonitorWarning(**w) for w in state["warnings"]]

    # ---------------------------------------------------------------- the statistics

    def _stall(self, step: int, baseline: list[float]) -> float:
        """How far the smoothed loss is above the baseline's at ``1 / stall_slowdown`` of the steps."""
        if len(self._losses) < self.window:
            return 0.0
        recent = self._losses[-self.window :]
        then = min(math.ceil(step / self._config.stall_slowdown), len(baseline))
        # What a base model unlearns in its first steps would hide all that comes after.
        gain = baseline[min(self.window, len(baseline)) - 1] - min(baseline)
        noise = math.sqrt(2 * squared_error_of_mean(recent))
        behind = mean(recent) - baseline[then - 1]
        statistic = in_units_of(behind, max(self._config.stall_margin * gain, self._config.deviations * noise))
        self._warn(
            "stall",
            step,
            statistic,
            f"training loss {mean(recent):.4g} (mean of {self.window} steps) at step {step}; the baseline had "
            f"{baseline[then - 1]:.4g} at step {then}: look at optimizer.lr and hypernetwork.update",
        )
        return statistic

    def _training_drop(self, step: int) -> float:
        """Rise of the mean loss over the window after an event, in standard errors; of the last event judged."""
        event = step - self.window
        if event not in self._events or len(self._losses) < 2 * self.window:
            return self._drop
        before, after = self._losses[: self.window], self._losses[self.window :]
        noise = math.sqrt(squared_error_of_mean(before) + squared_error_of_mean(after))
        self._drop = in_units_of(mean(after) - mean(before), self._config.deviations * noise)
        self._warn(
            "pruning_drop",
            step,
            self._drop,
            f"training loss rose from {mean(before):.4g} to {mean(after):.4g} ({self.window} steps each) after the "
            f"pruning event at step {event}: prune less at once (pruning.interval, pruning.count), or less "
            "(adapter.target_rank)",
        )
        return self._drop

    def _gradient(self, step: int) -> float:
        """Median of the last gradient norms over the median of those before."""
        now, earlier = self._norms[-RECENT:], self._norms[:-RECENT]
        if len(earlier) < EARLIER:
            return 0.0
        statistic = in_units_of(median(now), self._config.gradient_factor * median(earlier))
        self._warn(
            "gradient",
            step,
            statistic,
            f"gradient norm {median(now):.4g} (median of {RECENT} steps) at step {step}, against {median(earlier):.4g} "
            f"over the {len(earlier)} steps before: lower optimizer.lr, or lengthen optimizer.warmup",
        )
        return statistic

    def _held_out_error(self, one: float, other: float) -> float:
        """Standard error of the difference of two evaluations, as if their rows were drawn anew."""
        n = self._held_out_rows
        if self._metric == "held_out_loss":
            # A batch's loss has the same noise per row as the held-out loss.
            row = self._batch_size * len(self._losses) * squared_error_of_mean(self._losses)
            return math.sqrt(2 * row / n)
        # One success and one failure more, so that 0 and 1 have an error as well.
        shares = [(n * p + 1) / (n + 2) for p in (one, other)]
        return math.sqrt(sum(p * (1 - p) / n for p in shares))

    def _warn(self, monitor: Monitor, step: int, statistic: float, message: str) -> None:
        if statistic >= 1 and all(w.monitor != monitor for w in self.warnings):
            self.warnings.append(MonitorWarning(monitor, step, statistic, message))
