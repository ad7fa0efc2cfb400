"""How many singular values live, and when that changes: the budget's schedules.

Sources: AdaLoRA (arXiv 2303.10512, section 3.3) for the cubic budget and HyperAdaLoRA (arXiv 2510.02630) for the
interval schedule with a fixed count. :mod:`hyperlora.masks` says which ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["interval", "cubic", "none"]
Score = Literal["sensitivity", "smoothed", "adalora"]


@dataclass(frozen=True)
class Pruning:
    """When and how far the rank budget falls.

    Attributes:
        schedule: ``interval`` zeroes ``count`` values at each event, ``cubic`` follows AdaLoRA's budget,
            ``none`` never prunes.
        interval: ΔT, optimizer steps between two events; ``None``: a hundredth of the run.
        count: k, singular values zeroed per event over all modules; ``None`` takes the smallest k that reaches
            the target at the last event. The cubic schedule has none.
        start: t_init, optimizer steps before the first event; ``None``: a tenth of the run, at least 2: at the first
            step λ is zero and no score tells directions apart.
        final: t_final, optimizer steps after the last event; ``None``: two fifths of the run.
        score: ``sensitivity`` is |λ·∂L/∂λ| of the step at hand; ``smoothed`` the same with AdaLoRA's running mean
            and uncertainty; ``adalora`` adds the mean smoothed sensitivity of the direction in P and Q.
        beta1: decay of the running mean of the sensitivity.
        beta2: decay of the running mean of its uncertainty.
        reactivation: pruned values are zeroed once and may grow again, to be chosen anew at the next event; the last
            event is final. This is the published AdaLoRA (section 3.3); for direct factors. ``False`` never returns.
    """

    schedule: Schedule = "interval"
    interval: int | None = None
    count: int | None = None
    start: int | None = None
    final: int | None = None
    score: Score = "smoothed"
    beta1: float = 0.85
    beta2: float = 0.85
    reactivation: bool = False

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("schedule", self.schedule, get_args(Schedule)),
            ("score", self.score, get_args(Score)),
        ):
            if value not in allowed:
                raise ValueError(f"pruning {field} {value!r} is unknown; allowed: {', '.join(allowed)}")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"pruning interval={self.interval}; allowed: 1 or more optimizer steps")
        if self.schedule == "cubic" and self.count is not None:
            raise ValueError(f"pruning count={self.count}; allowed: None for schedule='cubic', which follows a budget")

    def resolved(self, total_steps: int) -> ResolvedPruning:
        """The same for a run of ``total_steps``, with every ``None`` but the count's filled in."""
        final = 2 * total_steps // 5 if self.final is None else self.final
        first = min(max(2, total_steps // 10), max(1, total_steps - final))
        return ResolvedPruning(
            **vars(self)
            | {
                "interval": max(1, total_steps // 100) if self.interval is None else self.interval,
                "start": first if self.start is None else self.start,
                "final": final,
            }
        )


@dataclass(frozen=True)
class ResolvedPruning(Pruning):
    """A schedule in optimizer steps of one run; made by :meth:`Pruning.resolved`."""

    interval: int = 1
    start: int = 0
    final: int = 0


class BudgetPlan:
    """The number of live singular values after each optimizer step; known on the host before training starts.

    Args:
        pruning: the schedule.
        initial: M·r, the live singular values at the start.
        target: the live singular values at the end.
        total_steps: T, optimizer steps of the run.

    Raises:
        ValueError: the target lies outside 0..initial, no event fits between ``start`` and T - ``final``, or
            ``count`` per event cannot reach the target.
    """

    def __init__(self, pruning: Pruning, initial: int, target: int, total_steps: int) -> None:
        if not 0 <= target <= initial:
            raise ValueError(f"target budget {target} is outside 0..{initial}, the initial budget")
        self.initial, self.target = initial, target
        self._pruning = pruning = pruning.resolved(total_steps)
        self._last = total_steps - pruning.final
        self.events: dict[int, int] = {}
        if pruning.schedule == "none" or target == initial:
            self.target = initial
            return
        steps = list(range(max(pruning.start, 1), self._last + 1, pruning.interval))
        if not steps:
            raise ValueError(
                f"no pruning event fits: start={pruning.start}, final={pruning.final} and interval="
                f"{pruning.interval} leave none within {total_steps} steps"
            )
        if pruning.schedule == "interval":
            self._plan_interval(steps)
        else:
            self._plan_cubic(steps)

    def _plan_interval(self, steps: list[int]) -> None:
        excess = self.initial - self.target
        count = self._pruning.count
        if count is None:
            count = -(-excess // len(steps))
        elif count * len(steps) < excess:
            raise ValueError(
                f"count={count} over {len(steps)} events zeroes {count * len(steps)} singular values, but "
                f"{excess} must go to reach the target budget {self.target} from {self.initial}: "
                f"use count >= {-(-excess // len(steps))}, a shorter interval, or a higher target"
            )
        budget = self.initial
        for step in steps:
            if budget == self.target or count == 0:
                break
            budget = max(self.target, budget - count)
            self.events[step] = budget

    def _plan_cubic(self, steps: list[int]) -> None:
        # The last event lands on T - t_final exactly, so that the target is reached whatever ΔT is.
        start, span = steps[0], max(self._last - steps[0], 1)
        for step in sorted({*steps, self._last}):
            left = (1 - (step - start) / span) ** 3 if step < self._last else 0.0
            # The fraction is dropped, as in the authors' code.
            self.events[step] = self.target + int((self.initial - self.target) * left)

    @property
    def last(self) -> int:
        """The step of the last event; 0 when there is none."""
        return max(self.events, default=0)

    def falls(self) -> list[int]:
        """Optimizer steps (1-based) at which singular values are zeroed, in order."""
        return [step for step, budget in self.events.items() if budget < self.budget(step - 1)]

    def budget(self, step: int) -> int:
        """Live singular values after optimizer step ``step`` (1-based; 0 is the start)."""
        past = [s for s in self.events if s <= step]
        return self.events[max(past)] if past else self.initial
