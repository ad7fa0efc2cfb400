"""Searches without Ray: their cost, their points, how they end, what they leave behind."""

from __future__ import annotations

import io
import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import trials
from datasets import Dataset
from mlflow import MlflowClient
from rich.console import Console

from hyperlora import capacity, distributed, runs, search, storage, tracking, tuning, warm_start
from hyperlora.capacity import Group, Growth, Node
from hyperlora.config import Recipe, RecipeError
from hyperlora.field import Entry
from hyperlora.ownership import Lease, ReplacedError
from hyperlora.preflight import inspect
from hyperlora.sampling import Objective, Proposals, Searched
from hyperlora.search import DIVERGED, Result, Trial, write
from hyperlora.stopping import NonFiniteError
from hyperlora.training import RunInfo, Sink, Trainer, World, train
from hyperlora.tuning import REPORTS, STOPPED, VALUES, Search, Stopping
from pipelines import compare, cost, searching, study, tune
from pipelines.cli import parse_arguments
from pipelines.common import load_recipe
from pipelines.cost import Cost, probe

STEPS = 120  # of the quickstart
SECONDS = {"training_seconds": 1.0}


@pytest.fixture(autouse=True, scope="module")
def rows_are_kept_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPERLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their plots take seconds."""
    for command, page in ((tune, "tuning_page"), (study, "study_page"), (compare, "comparison_page")):
        monkeypatch.setattr(command, page, lambda result: "")


def run(command: Any, folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON and screen of a command in a folder."""
    name, screen = command.__name__.rsplit(".", 1)[1], io.StringIO()
    places = ["--out", str(folder / "out"), "--json", str(folder / "result.json")]
    args = parse_arguments([name, "quickstart", "data.train_rows=64", "data.eval_rows=8", *words, *places])
    status = command.main(args, Console(file=screen, width=200))
    return status, json.loads((folder / "result.json").read_text()), screen.getvalue()


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("reason", ["", "held out loss nan", "CUDA out of memory. Tried to allocate 2.00 GiB\nDetails"])
def test_timing_leaves_no_memory_behind_and_a_failure_is_a_note(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    class Stub:
        def __init__(self, *arguments: Any) -> None:
            self.task = SimpleNamespace(train=range(64), held_out=Dataset.from_dict({"n": list(range(8))}))
            self.me = self  # what a model and its hooks do
            made.append(weakref.ref(self))

        def train_step(self, indices: list[int]) -> Any:
            return SimpleNamespace(read=dict)

        def evaluate(self) -> None:
            if reason:
                raise (torch.OutOfMemoryError if "memory" in reason else NonFiniteError)(reason)

    left: list[Any] = []
    monkeypatch.setattr(cost, "Trainer", Stub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(made[0]()))
    notes: list[str] = []
    found = probe(load_recipe("quickstart", []), notes)
    assert left == [None], "the cache is emptied once, after all that was in it is gone"
    assert (found is None) == bool(reason)
    line = reason.partition("\n")[0]
    assert notes == [f"no estimate of the time, since a few steps failed: {line}"] * bool(reason)


def test_a_part_of_an_evaluation_tells_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def evaluated(trainer: Trainer) -> None:
        rows.append(len(trainer.task.held_out))
        time.sleep(0.01 * rows[-1])

    monkeypatch.setattr(Trainer, "evaluate", evaluated)
    found = probe(load_recipe("quickstart", ["training.eval_batch_size=11"]), [])
    assert rows == [11, 22]
    assert found is not None
    assert found.evaluation == pytest.approx(0.01 * 200, rel=0.5)


def test_without_a_gpu_the_time_on_one_is_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cost, "_timed", lambda recipe: pytest.fail("nothing is to run"))
    notes: list[str] = []
    assert probe(load_recipe("quickstart", ["ray.gpus_per_worker=1"]), notes) is None
    assert notes == ["no estimate of the time: trials run on GPUs, and this machine has none"]


@pytest.mark.parametrize("command", [tune, study])
def test_a_search_whose_first_steps_fail_has_no_estimate(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(recipe: Recipe) -> Cost:
        raise NonFiniteError("held out loss nan")

    monkeypatch.setattr(cost, "_timed", fails)
    status, plan, screen = run(command, tmp_path, "--space", "smoke", "--dry-run")
    assert (status, plan["seconds"]) == (0, None)
    assert "note: no estimate of the time, since a few steps failed: held out loss nan" in screen
    assert "optimizer steps, about" not in screen


@pytest.mark.parametrize(
    ("words", "evaluations"),
    [([], 8), (["--evaluations", "4"], 4), (["--evaluations", "4", "training.eval_every=50"], 3)],
)
def test_the_cost_is_that_of_the_evaluations_that_there_are(
    words: list[str], evaluations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "probe", lambda recipe, notes: Cost(1.0, 10.0))
    _, plan, screen = run(tune, tmp_path, "--space", "smoke", "--trials", "2", "--dry-run", *words)
    assert plan["seconds"] == 2 * (STEPS + 10 * evaluations)
    assert ("training.eval_every=50 says when trials are evaluated; --evaluations does not" in screen) == (
        "training.eval_every=50" in words
    )
    without = run(tune, tmp_path, "--space", "smoke", "--trials", "2", "--dry-run", "--stop-on", "none", *words)[1]
    assert without["seconds"] == 2 * (STEPS + 10 * (3 if "training.eval_every=50" in words else 1))


@pytest.mark.parametrize("words", [("--stop-on", "none"), ("--objectives", "metric,seconds")])
def test_evaluations_that_nothing_is_stopped_by_are_a_note(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "probe", lambda recipe, notes: None)
    for given in ([], ["--evaluations", "8"]):
        screen = run(tune, tmp_path, "--space", "smoke", "--dry-run", *words, *given)[2]
        assert ("note: --evaluations=8 has no part: no trial is stopped early" in screen) == bool(given)


def test_what_only_triplets_have_does_not_keep_lora_from_running_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "probe", lambda recipe, notes: None)
    words = ("--space", "pruning", "--points", "8", "--dry-run", "method=adalora", "optimizer.lambda_ratio=2")
    plan = run(study, tmp_path, *words)[1]
    assert plan["recipe"]["optimizer"]["lambda_ratio"] == 2
    assert plan["reference"]["label"] == "uniform LoRA of rank 4"


@pytest.mark.parametrize(("method", "varies"), [("adalora", True), ("lora", False)])
def test_the_kept_rank_varies_where_the_method_prunes(method: str, varies: bool) -> None:
    words = ["tune", "quickstart", f"method={method}", "--space", "joint", "--objectives", "metric,rank"]
    keys = {p.key for p in tune.resolved(parse_arguments(words)).space.parameters}
    assert ("adapter.target_rank" in keys) == varies


# ---------------------------------------------------------------- points


def asked(sampler: str, seed: int = 1) -> list[dict[str, Any]]:
    """The first points of a search of the smoke space, at most five."""
    words = ["tune", "quickstart", "data.train_rows=64", "--space", "smoke", "--sampler", sampler, "--seed", str(seed)]
    options = tune.resolved(parse_arguments(words))
    proposals = tune._decide(options, inspect(options.recipe)).proposals()
    found = []
    while len(found) < 5 and (values := proposals.ask()) is not None:
        found.append(values)
        proposals.tell(values, "finished", [1.0])
    return found


def test_the_grid_is_all_combinations_once_in_an_order_of_the_seed() -> None:
    rate = load_recipe("quickstart", []).optimizer.lr
    found = asked("grid")
    points = [(p["pruning.interval"], p["optimizer.lr"]) for p in found]
    assert sorted(points) == [(6, rate / 4), (6, rate), (24, rate / 4), (24, rate)]
    assert any(asked("grid", seed) != found for seed in (2, 3))


def test_random_draws_begin_with_the_recipes_own_setting_and_stay_within_the_ranges() -> None:
    rate = load_recipe("quickstart", []).optimizer.lr
    found = asked("random")
    # The recipe prunes every step, which lies below the range.
    assert found[0] == {"pruning.interval": 6, "optimizer.lr": rate}
    assert len({json.dumps(p) for p in found}) == 5
    assert all(6 <= p["pruning.interval"] <= 24 and rate / 4 <= p["optimizer.lr"] <= rate for p in found)
    assert asked("random") == found
    assert asked("random", 2)[1:] != found[1:]


# ---------------------------------------------------------------- how a command ends


def ended(trial: Trial, good: bool) -> Result:
    """A trial without training; what it measured is made up."""
    if not good:
        return Result(trial, "failed", "out of memory", None, None)
    outcome = trials.record("any", trials.decay(steps=STEPS))["outcome"]
    outcome |= {"metric": "exact_match", "adapter_parameters_final": 1000, "training_seconds": 9.0, "steps": STEPS}
    outcome |= {"loop_seconds": 9.0, "adapter": "a", "evaluations": [{"step": STEPS, "exact_match": 0.8}]}
    return Result(trial, "finished", None, outcome, None)


def planned(good: Callable[[Trial], bool]) -> Callable[..., Iterator[Result]]:
    """In the place of ``search.run``."""

    def run(plan: search.Plan, *arguments: Any, **options: Any) -> Iterator[Result]:
        done: dict[str, Result] = {}
        while new := [t for t in plan(done) if t.name not in done]:
            done[new[0].name] = ended(new[0], good(new[0]))
            yield done[new[0].name]

    return run


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize("good", [0, 1])
def test_a_search_without_a_finished_trial_has_failed(
    good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(wanted: Search, recipe: Recipe, proposals: Proposals, *, over: Callable, **options: Any) -> None:
        for n in range(wanted.count):
            values = proposals.ask()
            assert values is not None
            over(ended(wanted.make(f"t{n:04d}", values), n < good))

    monkeypatch.setattr(tuning, "run", fake)
    monkeypatch.setattr(tune, "probe", lambda recipe, notes: None)
    status, result, _ = run(tune, tmp_path, "--space", "smoke", "--trials", "3")
    assert result["complete"]
    assert (status, result["counts"]["finished"]) == (0 if good else 1, good)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize(("good", "status"), [("", 1), ("lora", 1), ("p000", 0)])
def test_a_study_without_a_finished_point_has_failed(
    good: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "run", planned(lambda trial: bool(good) and trial.name.startswith(good)))
    monkeypatch.setattr(study, "probe", lambda recipe, notes: None)
    found, result, _ = run(study, tmp_path, "--space", "smoke", "--seeds", "1")
    assert result["complete"]
    assert found == status


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize(("good", "status"), [((), 1), (("lora",), 1), (("adalora",), 0)])
def test_a_comparison_without_a_finished_baseline_has_failed(
    good: tuple[str, ...], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_good(trial: Trial) -> bool:
        assert isinstance(trial.key, Entry)
        return trial.key.contestant in good

    monkeypatch.setattr(searching, "run", planned(is_good))
    found, result, _ = run(compare, tmp_path, "--only", "lora", "--seeds", "2", "--lrs", "0.01")
    assert result["complete"]
    assert found == status


# ---------------------------------------------------------------- how many trials at a time

MOVING = {"ray.io/node-group": "cpu"}
FOUR = Growth([Group("cpu", {"CPU": 2}, 4)])


@pytest.mark.parametrize(
    ("nodes", "growth", "asked", "trials"),
    [
        ([Node({"CPU": 4})], None, None, 4),
        ([Node({"CPU": 4})], None, 2, 2),
        ([Node({"CPU": 4})], None, 9, 4),
        ([Node({"CPU": 0})], None, None, 1),
        # What lives now of a cluster that grows says nothing.
        ([Node({"CPU": 1}, MOVING)], FOUR, None, 8),
        ([Node({"CPU": 1}, MOVING)], FOUR, 3, 3),
        ([Node({"CPU": 1}, MOVING)], FOUR, 9, 8),
        # Where nobody says how far it grows, whoever asks for more knows better.
        ([Node({"CPU": 1}, MOVING)], None, None, 1),
        ([Node({"CPU": 1}, MOVING)], None, 9, 9),
    ],
)
def test_trials_at_a_time_follow_from_the_cluster(
    nodes: list[Node], growth: Growth | None, asked: int | None, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "living", lambda: nodes)
    monkeypatch.setattr(tuning, "growth", lambda: growth)
    assert tuning._at_once(load_recipe("quickstart", ["ray.num_workers=1"]), asked) == trials


def test_planned_trials_ask_for_the_accelerator_of_the_recipe_and_for_no_placement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    @contextmanager
    def cluster(recipe: Recipe, *arguments: Any, **options: Any) -> Iterator[None]:
        asked.append(recipe.ray)
        yield

    def remote(**options: Any) -> None:
        asked.append(options)
        raise InterruptedError

    monkeypatch.setattr(search, "cluster", cluster)
    monkeypatch.setattr(search, "share_rows", lambda recipe: "")
    monkeypatch.setattr(search, "ray", SimpleNamespace(remote=remote))
    words = ["ray.num_workers=2", "ray.placement=STRICT_SPREAD", "ray.accelerator_type=L4", "ray.gpus_per_worker=0.5"]
    recipe = load_recipe("quickstart", words)
    planned = [Trial("t1", str(tmp_path / "t1"), recipe)]
    with pytest.raises(InterruptedError):
        next(search.run(lambda done: planned, recipe, 3))
    cluster_has, trial_has = asked
    # Three that one node may hold.
    assert capacity.problems(cluster_has, [Node({"CPU": 4, "GPU": 2, "accelerator_type:L4": 1})]) == []
    assert {k: trial_has[k] for k in ("num_cpus", "num_gpus", "accelerator_type")} == {
        "num_cpus": 1,
        "num_gpus": 0.5,
        "accelerator_type": "L4",
    }

    small = [Node({"CPU": 2, "GPU": 1, "accelerator_type:L4": 1})]
    monkeypatch.setattr(distributed, "living", lambda: small)
    monkeypatch.setattr(search, "cluster", distributed.cluster)
    monkeypatch.setattr(distributed.ray, "is_initialized", lambda: True)
    with pytest.raises(RecipeError, match="--concurrency: got 3; the number of trials at a time, one worker each: 3 "):
        next(search.run(lambda done: planned, recipe, 3))


def test_what_waits_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each start anew it would be seconds on a store, in which a GPU stands idle."""
    reads: Counter[str] = Counter()
    read = runs.read

    def counted(uri: str, name: str) -> Any:
        reads[f"{Path(uri).name}/{name}"] += 1
        return read(uri, name)

    class Train:
        """Of a process: done at once."""

        def remote(self, content: dict[str, Any], uri: str, rows: str) -> str:
            Path(uri, runs.RESULT).write_bytes(storage.sealed({"evaluations": []}))
            return uri

    actor = SimpleNamespace(remote=lambda: SimpleNamespace(train=Train()))
    ray = SimpleNamespace(
        remote=lambda **options: lambda process: actor,
        wait=lambda references, **options: (references[:1], references[1:]),
        get=lambda reference: None,
        kill=lambda actor: None,
    )
    monkeypatch.setattr(search, "ray", ray)
    monkeypatch.setattr(search, "cluster", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(search, "unused_gpus", lambda recipe: 0)
    monkeypatch.setattr(search, "share_rows", lambda recipe: "")
    monkeypatch.setattr(runs, "read", counted)
    recipe = load_recipe("quickstart", ["ray.num_workers=1"])
    planned = [Trial(f"t{n}", str(tmp_path / f"t{n}"), recipe) for n in range(5)]
    assert [r.status for r in search.run(lambda done: planned, recipe, 1)] == ["finished"] * 5
    assert {reads[f"t{n}/{DIVERGED}"] for n in range(5)} == {1}
    # Its result is read once more when it is there.
    assert {reads[f"t{n}/{runs.RESULT}"] for n in range(5)} == {2}


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize("command", [compare, study, tune])
def test_gpus_that_trials_leave_idle_are_told(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*arguments: Any, unused: Callable[[float], None], **options: Any) -> Any:
        unused(2)
        raise InterruptedError

    monkeypatch.setattr(searching, "run", told)
    monkeypatch.setattr(tuning, "run", told)
    screen = io.StringIO()
    for module in (tune, study):
        monkeypatch.setattr(module, "probe", lambda recipe, notes: None)
    words = [command.__name__.rsplit(".", 1)[1], "quickstart", "data.train_rows=64", "data.eval_rows=8"]
    words += ["mlflow.enabled=false", "--out", str(tmp_path / "out")]
    with pytest.raises(InterruptedError):
        command.main(parse_arguments(words), Console(file=screen, width=200))
    assert "training on CPUs: ray.gpus_per_worker is 0 (GPUs that stay idle: 2)" in screen.getvalue()


@pytest.mark.parametrize(("gpus", "told"), [("0", [2.0]), ("0.5", [])])
@pytest.mark.parametrize("where", [tuning, search])
def test_a_search_knows_which_gpus_its_trials_leave_idle(
    where: Any, gpus: str, told: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(distributed, "living", lambda: [Node({"CPU": 4, "GPU": 2})])
    monkeypatch.setattr(where, "cluster", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(search, "share_rows", lambda recipe: "")
    monkeypatch.setattr(search, "ray", SimpleNamespace(remote=stop))
    monkeypatch.setattr(tuning, "_at_once", stop)
    found: list[float] = []
    recipe = load_recipe("quickstart", ["ray.num_workers=1", f"ray.gpus_per_worker={gpus}"])
    planned = [Trial("t1", str(tmp_path / "t1"), recipe)]
    asks = f"ray.gpus_per_worker={gpus}"
    start = {
        tuning: lambda: tuned(tmp_path, 1, asks, trainable=lambda config: None, unused=found.append),
        search: lambda: list(search.run(lambda done: planned, recipe, 1, unused=found.append)),
    }
    with pytest.raises(InterruptedError):
        start[where]()
    assert found == told


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.5, "cuda")])
@pytest.mark.parametrize("where", [tuning, search])
def test_a_trial_is_on_the_gpu_that_it_asks_for_and_otherwise_on_the_cpu(
    where: Any, gpus: float, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever GPUs its process sees; what measures its memory looks at no other device either."""
    devices: list[str] = []

    def train(recipe: Recipe, info: RunInfo, world: World, sink: Sink) -> None:
        devices.append(world.device.type)
        sink.phase("training")
        Path(info.uri, runs.RESULT).write_bytes(storage.sealed({"evaluations": [{}], "rank_final": 1} | SECONDS))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: devices.append("cuda"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda at: devices.append(at.type))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda at: devices.append(at.type) or 1)
    monkeypatch.setattr(where.training, "train", train)
    monkeypatch.setattr(tuning.tune, "report", lambda metrics: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    made = trial(tmp_path, "t0001", values={"x": 1})
    recipe = load_recipe("quickstart", ["ray.num_workers=1", f"ray.gpus_per_worker={gpus}"])
    runs.record(RunInfo(made.uri), recipe)
    if where is tuning:
        tuning.train_trial(RunInfo(made.uri))
    else:
        search._train(recipe.model_dump(mode="json"), made.uri, "")
    assert set(devices) == {device}
    monkeypatch.setattr(cost, "Trainer", lambda recipe, info, world, sink: devices.append(world.device.type))
    with pytest.raises(AttributeError):  # of a trainer that is none
        cost._timed(recipe)
    assert set(devices) == {device}, "its steps are timed there as well"


@pytest.mark.usefixtures("without_pages")
def test_a_search_shows_what_became_of_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of an earlier run and a failed one; two that are stopped after an eighth and three eighths."""

    def fake(wanted: Search, recipe: Recipe, proposals: Proposals, *, started: Any, over: Any, **options: Any) -> None:
        for n in range(5):
            made = wanted.make(f"t{n:04d}", proposals.ask() or {})
            result = ended(made, n == 0)
            if n:
                started(made, 1)
            if n > 1:
                write(made.uri, REPORTS, [{"step": step, "exact_match": 0.5} for step in (15, 45)[: n - 1]])
                result = Result(made, "stopped", "others were better", None, None)
            if n < 4:
                over(result)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "run", fake)
    monkeypatch.setattr(tune, "probe", lambda recipe, notes: None)
    screen = io.StringIO()
    words = ["tune", "quickstart", "data.train_rows=64", "mlflow.enabled=false", "--space", "smoke", "--trials", "6"]
    with pytest.raises(KeyboardInterrupt):
        tune.main(parse_arguments([*words, "--out", str(tmp_path / "out")]), Console(file=screen, width=200))
    lines = [line.split(" s  ", 1)[1] for line in screen.getvalue().splitlines() if line.endswith(" left)")]
    # Of 9 s, the mean share of those that did not fail: 1, then 9/16, then 1/2.
    assert lines == [
        "t0001 failed: out of memory  (2/6  0 running  1 failed  best t0000 0.8000  about 36 s left)",
        "t0002: stopped early at step 15, exact match 0.5000  "
        "(3/6  0 running  1 stopped early  1 failed  best t0000 0.8000  about 15 s left)",
        "t0003: stopped early at step 45, exact match 0.5000  "
        "(4/6  0 running  2 stopped early  1 failed  best t0000 0.8000  about 9 s left)",
    ]


# ---------------------------------------------------------------- what stays in the folder


def trial(folder: Path, name: str, **files: Any) -> Trial:
    """One that has begun and has a checkpoint, with these JSON files beside it."""
    made = Trial(name, str(folder / "trials" / name), load_recipe("quickstart", ["ray.num_workers=1"]), name)
    runs.record(RunInfo(made.uri), made.recipe)
    (folder / "trials" / name / "checkpoints/step-5").mkdir(parents=True)
    for file, content in files.items():
        write(made.uri, f"{file}.json", content)
    return made


def with_checkpoints(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("trials/*/checkpoints")}


def tuned(folder: Path, count: int, *changes: str, measured: str = "loss", **options: Any) -> list[str]:
    """Names and ends of the trials of a search in a folder."""
    recipe, told = load_recipe("quickstart", ["ray.num_workers=1", *changes]), []
    parameter = {"key": "x", "choices": (), "low": 0, "high": 9, "log": False, "integer": True}
    space = Searched([parameter], lambda t: {"x": t.suggest_int("x", 0, 9)}, lambda values: None)
    objective = Objective(measured, False)
    proposals = Proposals("random", space, [objective], 1)
    wanted = Search(str(folder), count, lambda name, v: Trial(name, f"{folder}/trials/{name}", recipe, v), [objective])

    def over(result: Result) -> None:
        told.append(f"{result.trial.name} {result.status}")

    tuning.run(wanted, recipe, proposals, started=lambda trial, most: None, over=over, **options)
    return told


def test_the_next_run_drops_the_checkpoints_that_a_killed_one_kept(tmp_path: Path) -> None:
    trial(tmp_path, "t0001", values={"x": 1}, stopped={"step": 3, "reason": "others were better"})
    trial(tmp_path, "t0002", values={"x": 2}, diverged={"reason": "loss nan"})
    trial(tmp_path, "t0003", values={"x": 3})
    assert tuned(tmp_path, 2) == ["t0001 stopped", "t0002 failed"]
    assert with_checkpoints(tmp_path) == {"t0003"}, "what has not ended goes on from its own"


def test_an_interrupted_search_drops_the_checkpoints_of_stopped_trials_when_ray_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def cluster(*arguments: Any, **options: Any) -> Iterator[None]:
        try:
            yield
        finally:
            assert with_checkpoints(tmp_path) == {"t0001", "t0002"}, "a process may still be at work"

    class Tuner:
        def __init__(self, trainable: Any, *, run_config: Any, **options: Any) -> None:
            (self.driver,) = run_config.callbacks

        def fit(self) -> None:
            for _ in range(2):
                made = self.driver.next()
                Path(made.uri, "checkpoints").mkdir()
            at_work.append(Lease(f"{tmp_path}/trials/t0001"))
            self.driver.on_trial_complete(0, [], SimpleNamespace(config={"name": "t0001"}, last_result={"step": 3}))
            raise KeyboardInterrupt

    at_work: list[Lease] = []
    monkeypatch.setattr(tuning, "cluster", cluster)
    monkeypatch.setattr(tuning, "unused_gpus", lambda recipe: 0)
    monkeypatch.setattr(tuning, "_at_once", lambda recipe, asked: 2)
    monkeypatch.setattr(tuning.tune, "Tuner", Tuner)
    monkeypatch.setattr(tuning, "RENEWAL", 0.01)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, 3, trainable=lambda config: None)
    at_work[0].release()
    assert (tmp_path / "trials/t0001" / STOPPED).is_file()
    assert with_checkpoints(tmp_path) == {"t0002"}


def test_a_stopped_trial_loses_its_checkpoints_when_its_process_has_left_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only when the search ends: those of a large model fill a disk."""
    left: list[set[str]] = []

    class Tuner:
        def __init__(self, trainable: Any, *, run_config: Any, **options: Any) -> None:
            (self.driver,) = run_config.callbacks

        def fit(self) -> None:
            made = self.driver.next()
            Path(made.uri, "checkpoints").mkdir()
            at_work = Lease(made.uri)
            self.driver.on_trial_complete(0, [], SimpleNamespace(config={"name": "t0001"}, last_result={"step": 3}))
            time.sleep(0.5)
            left.append(with_checkpoints(tmp_path))
            at_work.release()
            end = time.monotonic() + 60
            while with_checkpoints(tmp_path) and time.monotonic() < end:
                time.sleep(0.01)
            left.append(with_checkpoints(tmp_path))

    monkeypatch.setattr(tuning, "cluster", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(tuning, "unused_gpus", lambda recipe: 0)
    monkeypatch.setattr(tuning, "_at_once", lambda recipe, asked: 1)
    monkeypatch.setattr(tuning.tune, "Tuner", Tuner)
    monkeypatch.setattr(tuning, "RENEWAL", 0.01)
    assert tuned(tmp_path, 2, trainable=lambda config: None) == ["t0001 stopped"]
    assert left == [{"t0001"}, set()]


@pytest.mark.parametrize("killed", [False, True])
def test_a_finished_trial_keeps_the_hypernetworks_that_others_start_from(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was killed between its result and that."""
    words = ["ray.num_workers=1", "data.train_rows=64", "data.eval_rows=8", "training.steps=2"]
    made = Trial("t0001", f"{tmp_path}/trials/t0001", load_recipe("quickstart", words))
    runs.record(RunInfo(made.uri), made.recipe)
    write(made.uri, VALUES, {"x": 1})
    if killed:
        train(made.recipe, RunInfo(made.uri))
        assert with_checkpoints(tmp_path) == {"t0001"}
        assert tuned(tmp_path, 1, *words, measured="held_out_loss") == ["t0001 finished"]
    else:
        monkeypatch.setattr(tuning.tune, "report", lambda metrics: None)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        tuning.train_trial(RunInfo(made.uri))
    assert not with_checkpoints(tmp_path)
    assert warm_start.read(made.uri).steps == 2


def test_a_planned_trial_that_was_killed_after_its_result_keeps_its_hypernetworks(tmp_path: Path) -> None:
    words = ["ray.num_workers=1", "data.train_rows=64", "data.eval_rows=8", "training.steps=2"]
    made = Trial("one", f"{tmp_path}/trials/one", load_recipe("quickstart", words))
    runs.record(RunInfo(made.uri), made.recipe)
    train(made.recipe, RunInfo(made.uri))
    assert with_checkpoints(tmp_path) == {"one"}
    (found,) = search.run(lambda done: [made], made.recipe, concurrency=1)
    assert found.status == "finished"
    assert not with_checkpoints(tmp_path)
    assert warm_start.read(made.uri).steps == 2


def test_trials_of_one_folder_have_the_same_passes(tmp_path: Path) -> None:
    """Their memory and time are compared."""
    recipe = load_recipe("quickstart", [])
    runs.record(RunInfo(str(tmp_path / "one")), recipe)
    runs.check_same(str(tmp_path / "one"), recipe)
    other = load_recipe("quickstart", ["training.gradient_accumulation=4"])
    with pytest.raises(RecipeError, match=r"training\.gradient_accumulation: got 4"):
        runs.check_same(str(tmp_path / "one"), other)


@pytest.mark.parametrize(
    ("then", "now"), [([], ["--evaluations", "4"]), (["--evaluations", "4"], ["--stop-on", "none"])]
)
def test_other_evaluations_than_before_are_refused_by_the_options_that_give_them(
    then: list[str], now: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials would be compared at other steps. With the recipe's own key nothing else decides."""
    words = ["quickstart", "data.train_rows=64", "data.eval_rows=8", "--space", "smoke", "--trials", "2"]
    options = tune.resolved(parse_arguments(["tune", *words, *then, "--out", str(tmp_path / "out")]))
    begun = tune._decide(options, inspect(options.recipe))
    made = begun.trial("t0001", begun.space.default())
    runs.record(RunInfo(made.uri), made.recipe)
    write(made.uri, VALUES, made.key)
    monkeypatch.setattr(tune, "probe", lambda recipe, notes: None)
    options_named = (
        r"1 problem:\n  --evaluations, --stop-on, --objectives: got 'training.eval_every=\w+'; .* was run with"
    )
    with pytest.raises(RecipeError, match=options_named):
        run(tune, tmp_path, *words[3:], "mlflow.enabled=false", *now)
    with pytest.raises(RecipeError, match=r"1 problem:\n  training.eval_every: got 7; .* was run with"):
        run(tune, tmp_path, *words[3:], "mlflow.enabled=false", "training.eval_every=7")


def test_trials_of_a_search_ask_for_the_accelerator_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def with_resources(trainable: Any, resources: Any) -> None:
        asked.append(resources)
        raise InterruptedError

    monkeypatch.setattr(tuning, "cluster", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(tuning, "unused_gpus", lambda recipe: 0)
    monkeypatch.setattr(tuning, "_at_once", lambda recipe, asked: 1)
    monkeypatch.setattr(tuning.tune, "with_resources", with_resources)
    for changes in ([], ["ray.gpus_per_worker=0.5", "ray.accelerator_type=L4"]):
        with pytest.raises(InterruptedError):
            tuned(tmp_path, 1, *changes, trainable=lambda config: None)
    assert asked == [{"CPU": 1}, {"CPU": 1, "GPU": 0.5, "accelerator_type:L4": 0.001}]


@pytest.mark.parametrize("where", [tuning, search])
def test_a_trial_that_diverges_keeps_no_checkpoints(
    where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*arguments: Any, **options: Any) -> None:
        raise NonFiniteError("loss nan")

    monkeypatch.setattr(where.training, "train", diverges)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    made = trial(tmp_path, "t0001", values={"x": 1})
    content = made.recipe.model_dump(mode="json")
    with pytest.raises(NonFiniteError):
        tuning.train_trial(RunInfo(made.uri)) if where is tuning else search._train(content, made.uri, "")
    assert (tmp_path / "trials/t0001" / DIVERGED).is_file()
    assert not with_checkpoints(tmp_path)


def test_the_next_run_of_a_planned_search_drops_those_of_diverged_trials(tmp_path: Path) -> None:
    made = trial(tmp_path, "wild", diverged={"reason": "loss nan"})

    def plan(done: Mapping[str, Result]) -> list[Trial]:
        return [made]

    assert [r.status for r in search.run(plan, made.recipe, 1)] == ["failed"]
    assert not with_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("rows", "refused"), [({"train": "a", "eval": "b"}, False), ({"train": "a", "eval": "c"}, True), (None, False)]
)
def test_results_of_other_rows_are_not_mixed_in(
    rows: dict[str, str] | None, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = {"evaluations": [{"step": 5, "loss": 1.0}]} | ({"rows_sha256": rows} if rows else {})
    made = trial(tmp_path, "t0001", values={"x": 1}, result=json.loads(storage.sealed(outcome)), reports=[])
    now = {"train": "a", "eval": "b"}
    for go_on in (
        lambda: list(search.run(lambda done: [made], made.recipe, 1, sha256=now)),
        lambda: tuned(tmp_path, 1, sha256=now),
    ):
        if refused:
            with pytest.raises(RecipeError, match=r"data.eval: got 'b'; the rows of \S+, SHA-256 of whose tokens is c"):
                go_on()
        else:
            go_on()


def test_a_search_that_was_taken_over_starts_nothing(tmp_path: Path) -> None:
    made = Trial("new", str(tmp_path / "trials/new"), load_recipe("quickstart", ["ray.num_workers=1"]))

    def check() -> None:
        raise ReplacedError("taken over")

    driver = tuning._Driver(
        Search(str(tmp_path), 1, lambda name, values: made, []), Mock(), [], check, Mock(), Mock(), Mock()
    )
    with pytest.raises(ReplacedError):
        driver.next()
    assert not (tmp_path / "trials").exists()


def test_what_a_diverged_trial_reported_still_counts_at_the_rungs(tmp_path: Path) -> None:
    """As in a search that was not interrupted: Ray Tune lets a failed trial's reports stand."""
    made = trial(tmp_path, "t0001", values={"x": 1}, reports=[{"step": 3, "loss": 1.0}])
    assert {VALUES, REPORTS} == {"values.json", "reports.json"}
    scheduler = tuning._asha(Stopping("loss", higher=False, first=3, last=27))
    tuning._replay(scheduler, Result(made, "failed", "loss nan", None, None))
    worse: Any = SimpleNamespace(trial_id="t0002")
    scheduler.on_trial_add(None, worse)  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, worse, {"step": 3, "loss": 2.0}) == scheduler.STOP  # type: ignore[arg-type]


# ---------------------------------------------------------------- MLflow


def test_mlflow_knows_with_what_a_search_was_taken_up_again(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    recipe = load_recipe("quickstart", ["mlflow.enabled=true", f"mlflow.tracking_uri={uri}"])

    def start(metric: str, seeds: list[int], data: str) -> str:
        params = {"metric": metric, "seeds": seeds}
        return tracking.start_search(recipe, "/out", "name", params, "study", {"hyperlora.data_fingerprint": data})

    run_id = start("accuracy", [1, 2], "a")
    first = MlflowClient(uri).get_run(run_id)
    assert start("held_out_loss", [1, 2, 3], "b") == run_id
    again = MlflowClient(uri).get_run(run_id)
    assert again.data.params == first.data.params == {"metric": "accuracy", "seeds": "[1, 2]"}
    found = [[r.data.tags[f"hyperlora.{k}"] for k in ("metric", "seeds", "data_fingerprint")] for r in (first, again)]
    assert found == [["accuracy", "[1, 2]", "a"], ["held_out_loss", "[1, 2, 3]", "b"]]
    assert again.data.tags["mlflow.runName"] == "name"


def test_once_mlflow_has_failed_trials_wait_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each would wait for a server that hangs."""
    told: list[str] = []
    away = True

    def log_trial(recipe: Recipe, parent: str, name: str, *known: Any) -> None:
        told.append(name)
        if away:
            raise TimeoutError("no answer")

    monkeypatch.setattr(tracking, "start_search", lambda *known: "run")
    monkeypatch.setattr(tracking, "log_trial", log_trial)
    monkeypatch.setattr(tracking, "finish_search", lambda *known: told.append("the end"))
    recipe = load_recipe("quickstart", ["mlflow.enabled=true"])
    plan = {"provenance": dict.fromkeys(("recipe_fingerprint", "data_fingerprint"), "a")}
    options: dict[str, Any] = {"record": tune.record, "figures": lambda result: {}, "files": ()}
    with searching.tracked_trials(recipe, str(tmp_path), plan, "tuning", (), **options) as (log, finish):
        for name in ("t1", "t2", "t3"):
            log(ended(trial(tmp_path, name, values={}), False))
        assert told == ["t1"]
        assert len(caplog.records) == 1
        away = False
        finish({"complete": True})
    assert told == ["t1", "t1", "t2", "t3", "the end"]
    assert len(caplog.records) == 1


# ---------------------------------------------------------------- peak memory


#: On a GPU it is what is allocated there; without glibc it is not measured.
on_the_heap = pytest.mark.skipif(
    torch.cuda.is_available() or search.heap_reader() is None, reason="the heap is not what is measured here"
)


def peak(folder: Path) -> int:
    return json.loads((folder / search.MEMORY).read_text())[search.PEAK]


@on_the_heap
def test_peak_memory_is_that_of_the_trial_and_not_of_its_process(tmp_path: Path) -> None:
    left: list[torch.Tensor] = []

    def trial(name: str) -> int:
        folder = tmp_path / name
        folder.mkdir()
        sink = search.PeakMemory(str(folder))
        blocks = [torch.zeros(2**18) for _ in range(100)]  # of 1 MiB
        sink.phase("training")
        left.extend(blocks[::2])  # a cache, and holes
        sink.close()
        return peak(folder)

    first, second = trial("first"), trial("second")
    assert first == pytest.approx(100 * 2**20, rel=0.02)
    assert second == pytest.approx(first, rel=0.02)


@on_the_heap
def test_the_second_of_two_equal_trials_has_the_same_peak_memory(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["data.train_rows=64", "data.eval_rows=8", "training.steps=15"])
    peaks = []
    for name in ("first", "second"):
        train(recipe, RunInfo(str(tmp_path / name)), sink=search.PeakMemory(str(tmp_path / name)))
        peaks.append(peak(tmp_path / name))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.15)
    # Of the trial alone: importing PyTorch and the rest takes five times as much.
    assert 2**25 < peaks[0] < 2**27


@on_the_heap
def test_a_trial_looks_at_its_memory_until_it_ends(tmp_path: Path) -> None:
    """Between two phases as well, in which a batch comes and goes."""
    others = set(threading.enumerate())
    sink = search.PeakMemory(str(tmp_path))
    (thread,) = set(threading.enumerate()) - others
    batch = torch.zeros(2**23)  # 32 MiB
    # In a process with many holes between its blocks a look takes long, and the next one waits a hundred times as long.
    end = time.monotonic() + 60
    while sink._highest - sink._start < 2**25 * 0.98 and time.monotonic() < end:
        time.sleep(search.LOOK_SECONDS)
    del batch
    sink.phase("evaluating")
    assert peak(tmp_path) > 2**25 * 0.98
    assert thread.is_alive()
    sink.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
