"""One line of progress on the driver: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

#: Seconds after which a run that nobody watches on a terminal writes a line, whatever came of its steps.
EVERY = 60.0
#: Seconds that two steps may be apart and still tell of the time left.
SLOWEST = 300.0


class _Left(ProgressColumn):
    """Time left, which falls while nothing else changes."""

    def __init__(self, words: Callable[[], str]) -> None:
        self._words = words
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(self._words())


class TrialsProgress:
    """One line over many trials: finished of all, running, stopped early, failed, the best so far, time left.

    Args:
        console: where to draw.
        concurrency: trials at a time.
    """

    def __init__(self, console: Console, concurrency: int) -> None:
        self._console, self.concurrency = console, concurrency
        self._live = console.is_terminal
        self._started = time.monotonic()
        self._seconds: list[float] = []
        self._shares: list[float] = []
        self._state = ""
        self._end: float | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("trials"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            _Left(self._left),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("starting Ray", total=None)
        self._bar.start()

    def finished(self, outcome: Mapping[str, Any]) -> None:
        """A trial ended with this outcome."""
        # The loop's seconds begin anew where a trial went on from a checkpoint; those of its steps do not.
        self._seconds.append(max(outcome["loop_seconds"], outcome["training_seconds"]))
        self._shares.append(1.0)

    def stopped(self, share: float) -> None:
        """A trial was stopped early, after this share of its steps."""
        self._shares.append(share)

    def show(self, done: int, total: int, running: int, failed: int, best: str, stopped: int = 0) -> None:
        """What is true now."""
        counts = {"running": running, "stopped early": stopped, "failed": failed}
        parts = [f"{count} {name}" for name, count in counts.items() if count or name == "running"]
        text = "  ".join([*parts, *([best] if best else [])])
        self._state = f"{done}/{total}  {text}"
        self._end = None
        if self._seconds and done < total:
            each = fmean(self._seconds) * fmean(self._shares)
            # The last trials do not get faster by having the places of others free.
            self._end = time.monotonic() + each * max(1.0, (total - done) / self.concurrency)
        self._bar.update(self._task, completed=done, total=total, description=text)

    def line(self, text: str) -> None:
        """Something that stays on the screen; where no bar moves, with the state of all."""
        left = self._left()
        state = "" if self._live else f"  [dim]({self._state}{'  ' if left else ''}{left})[/]"
        shown = f"[dim]{time.monotonic() - self._started:5.0f} s[/]  {text}{state}"
        self._console.print(shown, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        """Time left, in words; nothing as long as nobody knows, or when it is over and trials still run."""
        if self._end is None or (seconds := self._end - time.monotonic()) <= 0:
            return ""
        return f"about {duration(seconds)} left"

    def close(self) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class ProgressSink:
    """Shows phase, steps, loss, live rank, tokens/s and time left.

    Args:
        console: where to draw.
        total_steps: optimizer steps of the run.
    """

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console, self._total = console, total_steps
        self._live = console.is_terminal
        self._rate = 0.0
        self._next_line, self._next_time = 0, 0.0
        self._started = time.monotonic()
        self._closed = threading.Event()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not self._live,
            speed_estimate_period=SLOWEST,
        )
        self._task = self._bar.add_task("starting", total=total_steps, detail="")
        self._bar.start()

    def phase(self, name: str) -> None:
        self._bar.update(self._task, description=name)
        if not self._live:
            self._print(name)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        seen = metrics["tokens_per_second"]
        self._rate = seen if not self._rate else 0.9 * self._rate + 0.1 * seen
        detail = f"loss {metrics['loss']:.3f}  rank {metrics['live_rank']:.0f}  {self._rate:,.0f} tok/s"
        self._bar.update(self._task, completed=step, detail=detail)
        now = time.monotonic()
        if not self._live and (step >= min(self._next_line, self._total) or now >= self._next_time):
            left = self._bar.tasks[self._task].time_remaining
            self._print(f"step {step}/{self._total}  {detail}{f'  about {duration(left)} left' if left else ''}")
            self._next_line, self._next_time = step + max(1, self._total // 10), now + EVERY

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        seen = {k: v for k, v in metrics.items() if not k.startswith("monitor/")}
        shown = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in seen.items())
        self._print(f"held out at step {step}: {shown}")

    def warning(self, monitor: str, step: int, message: str) -> None:
        self._print(f"[yellow]warning ({monitor.replace('_', ' ')}): {escape(message)}[/]")

    def flush(self) -> Callable[[], None]:
        return lambda: None

    def _print(self, text: str) -> None:
        shown = f"[dim]{time.monotonic() - self._started:5.0f} s[/]  {text}"
        self._console.print(shown, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._bar.stop()
