"""What a user sees of a run, and of many trials, while they are at work: on a terminal, and in a file."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from rich.console import Console

from hyperlora.search import Plan, Result, Trial
from pipelines import progress, searching
from pipelines.common import load_recipe
from pipelines.progress import ProgressSink, TrialsProgress


class Clock:
    """In the place of ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(progress, "time", made := Clock())
    return made


def outcome(seconds: float, steps: float | None = None) -> dict[str, float]:
    """Of a trial whose last attempt took so many seconds, and the steps of all its attempts so many."""
    return {"loop_seconds": seconds, "training_seconds": seconds if steps is None else steps}


def in_a_file(trials: TrialsProgress, screen: io.StringIO) -> str:
    """The state that stands beside a line."""
    trials.line("t0001: accuracy 0.8")
    return screen.getvalue().splitlines()[-1].partition("  (")[2].removesuffix(")")


def made(concurrency: int) -> tuple[TrialsProgress, io.StringIO]:
    screen = io.StringIO()
    return TrialsProgress(Console(file=screen, width=40), concurrency), screen


def test_a_file_has_a_line_for_each_trial_that_ended_with_the_state_of_all(clock: Clock) -> None:
    trials, screen = made(2)
    trials.show(0, 8, 2, 0, "")
    assert screen.getvalue() == "", "nothing moves in a file"
    clock.now = 61
    trials.finished(outcome(60))
    trials.show(1, 8, 1, 0, "best t0001 0.8000")
    trials.line("t0001: accuracy 0.8000")
    trials.show(3, 8, 1, 1, "best t0001 0.8000", 1)
    trials.line("[red]t0003 failed[/]: out of memory")
    trials.close()
    # However narrow it is, a line stays one.
    assert screen.getvalue().splitlines() == [
        "   61 s  t0001: accuracy 0.8000  (1/8  1 running  best t0001 0.8000  about 4 min left)",
        "   61 s  t0003 failed: out of memory  "
        "(3/8  1 running  1 stopped early  1 failed  best t0001 0.8000  about 2 min left)",
    ]


def test_a_terminal_has_one_line_that_moves(clock: Clock) -> None:
    screen = io.StringIO()
    trials = TrialsProgress(Console(file=screen, width=150, force_terminal=True, color_system=None), 2)

    def drawn() -> str:
        trials._bar.refresh()
        last = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()[-1]
        return " ".join(re.sub("[^ -~]", "", last).split())  # without the spinner and the bar

    assert drawn() == "trials 0/? starting Ray"
    trials.show(0, 8, 2, 0, "")
    assert drawn() == "trials 0/8 2 running"
    trials.finished(outcome(100))
    trials.show(2, 8, 2, 1, "best t0001 0.8000")
    assert drawn() == "trials 2/8 2 running 1 failed best t0001 0.8000 about 5 min left"
    clock.now = 240
    assert drawn().endswith("about 60 s left"), "it falls while no trial ends"
    clock.now = 301
    assert drawn().endswith("best t0001 0.8000"), "over the time, it says nothing"
    trials.line("t0002: accuracy 0.7000")
    assert "  301 s  t0002: accuracy 0.7000\n" in re.sub(r" +\n", "\n", screen.getvalue()), "the bar has the state"
    trials.close()


@pytest.mark.parametrize(
    ("done", "concurrency", "left"),
    [
        (0, 2, "about 400 s left"),
        (4, 2, "about 200 s left"),
        (7, 2, "about 100 s left"),  # one trial takes its time, whoever idles beside it
        (6, 8, "about 100 s left"),
        (8, 2, ""),
    ],
)
def test_time_left(done: int, concurrency: int, left: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "duration", lambda seconds: f"{seconds:.0f} s")
    trials, screen = made(concurrency)
    trials.finished(outcome(80))
    trials.finished(outcome(120))
    trials.show(done, 8, 1, 0, "")
    assert in_a_file(trials, screen) == f"{done}/8  1 running" + ("  " + left if left else "")


def test_no_time_is_left_to_tell_before_a_trial_has_finished(clock: Clock) -> None:
    trials, screen = made(2)
    trials.stopped(0.25)
    trials.show(3, 8, 2, 2, "", 1)
    assert in_a_file(trials, screen) == "3/8  2 running  1 stopped early  2 failed"


def test_a_trial_that_went_on_from_a_checkpoint_counts_with_all_its_steps(clock: Clock) -> None:
    trials, screen = made(1)
    trials.finished(outcome(5, steps=60))
    trials.show(1, 2, 1, 0, "")
    assert in_a_file(trials, screen) == "1/2  1 running  about 60 s left"


def test_trials_that_are_stopped_early_take_less(clock: Clock) -> None:
    trials, screen = made(1)
    trials.finished(outcome(80))
    for share in (0.125, 0.375):
        trials.stopped(share)
    trials.show(3, 6, 1, 0, "", 2)
    # Half a trial each.
    assert in_a_file(trials, screen) == "3/6  1 running  2 stopped early  about 2 min left"


def test_resumed_searches_go_on_counting(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials of an earlier run, one of which failed, and two of this one, one of which fails."""
    recipe, screen = load_recipe("quickstart", []), io.StringIO()
    plan = [Trial(f"t{n}", f"/nowhere/t{n}", recipe) for n in range(4)]
    whole: Any = outcome(60)
    results = [
        Result(t, "finished", None, whole, None) if n % 2 else Result(t, "failed", "no luck", None, None)
        for n, t in enumerate(plan)
    ]

    def run(wanted: Plan, *arguments: Any, started: Any, **options: Any) -> Iterator[Result]:
        yield from results[:2]
        started(plan[2])
        started(plan[3])
        yield from results[2:]

    def wanted(done: Mapping[str, Result]) -> tuple[list[Trial], int]:
        return plan, 0

    monkeypatch.setattr(searching, "run", run)
    searching.run_planned(
        wanted,
        recipe,
        2,
        Console(file=screen, width=40),
        best=lambda done: "best t1 0.5" if "t1" in done else "",
        line=lambda result: f"{result.trial.name} {result.status}",
        write=lambda done: {},
        out="",
        sha256={},
    )
    assert screen.getvalue().splitlines() == [
        "    0 s  t2 failed  (3/4  1 running  2 failed  best t1 0.5  about 60 s left)",
        "    0 s  t3 finished  (4/4  0 running  2 failed  best t1 0.5)",
    ]


@pytest.mark.parametrize("each", [7, 100])
def test_a_run_that_takes_long_has_a_line_every_minute_with_the_time_left(each: float, clock: Clock) -> None:
    screen = io.StringIO()
    sink = ProgressSink(Console(file=screen, width=40, get_time=clock.monotonic), 1000)
    lines: list[tuple[float, str]] = []
    for step in range(1, 29):
        clock.now += each
        sink.step(step, {"tokens_per_second": 1000, "loss": 1.0, "live_rank": 8})
        lines += [(clock.now, line) for line in screen.getvalue().splitlines()[len(lines) :]]
    # At the first step after a minute.
    assert [after - now for (now, _), (after, _) in itertools.pairwise(lines)] == [max(63, each)] * (len(lines) - 1)
    assert len(lines) == (4 if each == 7 else 28)
    left = progress.duration(972 * each)
    assert lines[-1][1] == f"{28 * each:5.0f} s  step 28/1000  loss 1.000  rank 8  1,000 tok/s  about {left} left"
    sink.close()


def test_a_run_that_takes_seconds_has_a_line_every_tenth_of_its_steps(clock: Clock) -> None:
    screen = io.StringIO()
    sink = ProgressSink(Console(file=screen, width=40, get_time=clock.monotonic), 50)
    for step in range(1, 51):
        clock.now += 0.1
        sink.step(step, {"tokens_per_second": 1000, "loss": 1.0, "live_rank": 8})
    steps = [int(n) for n in re.findall(r"step (\d+)/50", screen.getvalue())]
    assert steps == [1, 6, 11, 16, 21, 26, 31, 36, 41, 46, 50]
    assert "left" not in screen.getvalue().splitlines()[0], "nobody knows yet"
    assert screen.getvalue().splitlines()[-1].endswith("1,000 tok/s"), "it is over"
    sink.close()
