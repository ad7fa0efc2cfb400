"""The training loop: plain PyTorch, one process or several, no Ray and no MLflow."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hyperlora import checkpoint, ownership, packed, storage
from hyperlora.adapters import build_model, load_tokenizer
from hyperlora.baselines import AdapterOptimizer, PeftAdaLoRA, UnequalLoRA
from hyperlora.checkpoint import Checkpoint, RefusedError
from hyperlora.config import OptimizerConfig, Problem, Recipe, RecipeError, schedule_problems
from hyperlora.contention import waited
from hyperlora.eva import EVA_BATCHES, redistribute_ranks
from hyperlora.export import PlainAdapter, adapter_files, plain_adapter, write_adapter
from hyperlora.monitors import Monitors, MonitorWarning, monitors_of
from hyperlora.optimizer import HyperAdaLoRA
from hyperlora.ownership import Lease
from hyperlora.settings import SINGLE_WORKER
from hyperlora.stopping import NonFiniteError, NotStoredError, StoppedError
from hyperlora.storage import patiently
from hyperlora.tasks import Task, build_task
from hyperlora.uploads import Outcome, Snapshot, Uploader
from hyperlora.warm_start import WarmStart, read, start_from

T = TypeVar("T")
#: What a checkpoint's trainer.json has, for a run to go on.
STATE = {"step", "total_steps", "data", "optimizer", "scheduler", "losses", "step_seconds", "evaluations"}
STATE |= {"rank_history", "monitors", "warm_start", "training_seconds", "tokens_seen"}


@dataclass(frozen=True)
class World:
    """Which worker this is.

    Attributes:
        rank, size: of this worker among all.
        group: of the gradient all-reduce; None for a single process.
        device: of the model.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the workers."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def together(self, call: Callable[[], T]) -> T:
        """What ``call`` returns here, or on every worker the RecipeError of the first worker on which it raises one.

        Otherwise the others would wait, until their patience ends, for one that has given up.
        """
        if self.group is None:
            return call()
        found: list[T] = []
        mine: RecipeError | None = None
        try:
            found = [call()]
        except RecipeError as error:
            mine = error
        errors: list[RecipeError | None] = [None] * self.size
        dist.all_gather_object(errors, mine, group=self.group)
        for told in errors:
            if told is not None:
                raise told
        return found[0]

    def first(self, call: Callable[[], T]) -> T:
        """What ``call`` returns on worker 0, or the RecipeError that it raises there, on every worker."""
        if self.group is None:
            return call()
        answer: list[Any] = [None]
        if self.rank == 0:
            try:
                answer = [call()]
            except RecipeError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0, group=self.group, device=self.device)
        if isinstance(answer[0], RecipeError):
            raise answer[0]
        return answer[0]


class Sink(Protocol):
    """Where a run reports to; only worker 0 calls it."""

    def phase(self, name: str) -> None:
        """A named part of the run begins."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """An optimizer step ended."""

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation ended."""

    def warning(self, monitor: str, step: int, message: str) -> None:
        """A monitor found that the run goes wrong; once for each monitor."""

    def flush(self) -> Callable[[], None]:
        """A checkpoint is due: what was reported before it will not be reported again.

        Returns at once; what it returns is called from another thread before the checkpoint is committed, and waits
        until all of that is delivered or somewhere safe.
        """
        ...

    def close(self) -> None:
        """The run ended, well or not."""


class Silent:
    """A sink that drops everything."""

    def phase(self, name: str) -> None: ...

    def step(self, step: int, metrics: dict[str, float]) -> None: ...

    def evaluation(self, step: int, metrics: dict[str, float]) -> None: ...

    def warning(self, monitor: str, step: int, message: str) -> None: ...

    def flush(self) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None: ...


class Tee:
    """Several sinks as one."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def phase(self, name: str) -> None:
        for sink in self._sinks:
            sink.phase(name)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.step(step, metrics)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.evaluation(step, metrics)

    def warning(self, monitor: str, step: int, message: str) -> None:
        for sink in self._sinks:
            sink.warning(monitor, step, message)

    def flush(self) -> Callable[[], None]:
        waits = [sink.flush() for sink in self._sinks]

        def wait() -> None:
            for one in waits:
                one()

        return wait

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


@dataclass(frozen=True)
class RunInfo:
    """Identity of a run.

    Attributes:
        uri: its folder, without a slash at the end.
        mlflow_run_id: its MLflow run.
        owner: the claim under which its folder is written, see ownership.py.
        rows: fingerprint of the tokenised rows, in this machine's cache or below ``storage.uri``; None: this process
            reads the data.
    """

    uri: str
    mlflow_run_id: str | None = None
    owner: str | None = None
    rows: str | None = None


def derived_seed(*parts: object) -> int:
    """A seed that depends on every part and on nothing else (63 bits)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def global_batches(rows: int, batch_size: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """Row indices of each optimizer step from ``first_step`` on, the same for any number of workers.

    Every epoch is a permutation by (seed, epoch); its last incomplete batch is dropped.
    """
    per_epoch = rows // batch_size
    step = first_step
    while True:
        epoch = step // per_epoch
        rng = torch.Generator().manual_seed(derived_seed("order", seed, epoch))
        order = torch.randperm(rows, generator=rng)
        for position in range(step % per_epoch, per_epoch):
            yield order[position * batch_size : (position + 1) * batch_size].tolist()
        step = (epoch + 1) * per_epoch


def schedule_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """Multiplier of the learning rates at 0-based ``step``: linear warm-up, then the configured decay to zero."""
    warmup = int(config.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(recipe: Recipe, model: PeftModel, total_steps: int, world: World) -> AdapterOptimizer:
    """The optimizer that a recipe describes.

    Raises:
        RecipeError: the pruning schedule cannot reach its target on this model, or a hypernetwork does not fit it.
    """
    o = recipe.optimizer
    if recipe.method in SINGLE_WORKER:
        kind = PeftAdaLoRA if recipe.method == "peft-adalora" else UnequalLoRA
        adam = recipe.adam_settings()
        return kind(model, o.lr, other_lr=o.other_lr, adam=adam, max_grad_norm=o.max_grad_norm)
    try:
        optimizer = HyperAdaLoRA(
            model,
            o.lr,
            method="lora" if recipe.method == "rslora" else recipe.method,  # the scale is the layers'
            trunk_lr=o.trunk_lr,
            output_lr=o.output_lr,
            other_lr=o.other_lr,
            lambda_ratio=o.lambda_ratio,
            total_steps=total_steps,
            target_rank=recipe.target_rank,
            pruning=recipe.resolved_pruning(total_steps),
            gamma=recipe.gamma,
            hypernetwork=recipe.hypernetwork_spec(),
            update_rule=recipe.update_rule(),
            adam=recipe.adam_settings(),
            initialization=recipe.adapter.initialization,
            factorization=recipe.adapter.factorization,
            direction=o.direction,
            max_grad_norm=o.max_grad_norm,
            seed=recipe.seed,
            process_group=world.group,
        )
    except ValueError as error:
        modules = sum(1 for name, _ in model.named_modules() if name.endswith("lora_A.default"))
        problems = schedule_problems(recipe, total_steps, modules)
        raise RecipeError(problems or [Problem("adapter", recipe.adapter.model_dump(), str(error))]) from error
    return optimizer


class PendingMetrics:
    """Metrics of one step on their way from the device; reading them waits for that step alone.

    Args:
        clock: was started with the step.
        step: its number.
        tokens: of its batch.
        names: of ``values``.
        values: on the device.
        known: what the host knows by itself.
    """

    def __init__(
        self, clock: Clock, step: int, tokens: int, names: list[str], values: Tensor, known: dict[str, float]
    ) -> None:
        self.step, self.tokens, self._clock, self._names, self._known = step, tokens, clock, names, known
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        else:
            self._values = values
        clock.stop()

    def read(self) -> dict[str, float]:
        seconds = self._clock.seconds()
        speed = {"step_seconds": seconds, "tokens_per_second": self.tokens / seconds}
        return dict(zip(self._names, self._values.tolist(), strict=True)) | self._known | speed


class Clock:
    """How long one step takes: on a GPU as the device sees it, since the host is done long before, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2 if device.type == "cuda" else 0)]
        self._times: list[float] = []
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def seconds(self) -> float:
        """Waits until the step is over."""
        if self._events:
            begin, end = self._events
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000
        return self._times[1] - self._times[0]

    def _mark(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        else:
            self._times.append(time.perf_counter())


class Trainer:
    """State of one run and its loop.

    Args:
        recipe: a valid recipe.
        run: where the run lives.
        world: which worker this is.
        sink: where progress and metrics go.
        stop: whether the run is to stop after the step at hand.
        leaving: whether a checkpoint is due after the step at hand, since a worker may go away.

    Raises:
        RecipeError: the data or the model does not fit the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunInfo,
        world: World,
        sink: Sink,
        stop: Callable[[], bool] = lambda: False,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self.recipe, self.run, self.world, self.sink, self._stop = recipe, run, world, sink, stop
        self._leaving = leaving
        if world.rank == 0:
            sink.phase("loading model and data")
        self.tokenizer = load_tokenizer(recipe.model)
        self.task: Task = build_task(recipe, self.tokenizer, rows=run.rows)
        rows, batch = len(self.task.train), recipe.training.batch_size
        if rows < batch:
            raise RecipeError([Problem("training.batch_size", batch, f"at most the {rows} training rows")])
        self.total_steps = recipe.total_steps(rows)
        self.model = build_model(recipe, self.tokenizer, self.task.num_labels, world.device, self.total_steps)
        if recipe.method == "eva":
            redistribute_ranks(self.model, recipe, self.task, self._first_rows(), world.device)
        self.model.train()  # a loaded model comes in evaluation mode: without dropout and recomputed activations
        self.optimizer = build_optimizer(recipe, self.model, self.total_steps, world)
        factor = lambda step: schedule_factor(recipe.optimizer, step, self.total_steps)  # noqa: E731
        self.scheduler = LambdaLR(self.optimizer, factor)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad and ".lora_" not in n}
        self.trained |= {n: p for n, p in self.model.named_parameters() if ".lora_magnitude_vector." in n}
        self.monitors = Monitors(
            monitors_of(recipe),
            total_steps=self.total_steps,
            events=self.optimizer.plan.falls(),
            metric=self.task.metric,
            higher_is_better=self.task.higher_is_better,
            held_out_rows=len(self.task.held_out),
            batch_size=batch,
        )
        self._quantiles = torch.tensor([0.1, 0.5, 0.9], device=world.device)
        self.step = 0
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.rank_history: list[tuple[int, int]] = [(0, self.optimizer.live)]
        self.training_seconds = 0.0
        #: What the steps took for which it was counted, and how much of that they waited for a processor.
        self._watched, self._waited = 0.0, 0.0
        self.tokens_seen = 0
        self.warm_start: dict[str, Any] | None = None
        writer = None if run.owner is None else f"{ownership.number(run.owner):08d}-{secrets.token_hex(3)}"
        self.uploads = Uploader(run.uri, writer, run.owner, recipe.training.keep_checkpoints)
        self._committed: str | None = None
        self._failing = False
        self._checkpoint_metrics: dict[str, float] = {}
        self._told_to_stop = self._told_of_leaving = False
        #: Step of the last checkpoint that was begun.
        self._saved: int | None = None

    def _first_rows(self) -> list[int]:
        """Rows of the first training batches, in the order in which they will be trained on."""
        batches = global_batches(len(self.task.train), self.recipe.training.batch_size, self.recipe.seed, 0)
        return [row for _ in range(EVA_BATCHES) for row in next(batches)]

    def start(self) -> None:
        """Start the hypernetworks as the recipe says; what goes on from a checkpoint has it in its state.

        Raises:
            RecipeError: their source cannot be read or does not fit.
        """
        c = self.recipe.hypernetwork
        if c.init_from is None and c.freeze == "none":
            return
        assert isinstance(self.optimizer, HyperAdaLoRA)
        uri = c.init_from
        # Worker 0 alone reads: what is newest may change while the run that it belongs to goes on.
        source = None if uri is None else self.world.first(lambda: read(uri))
        started: WarmStart = start_from(self.optimizer, source, c.freeze)
        self.warm_start = asdict(started)
        if self.world.rank == 0:
            self.sink.phase(f"hypernetworks {started}")

    # ---------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out loss and metric over all workers, which look up after every batch: it may take minutes.

        Raises:
            NonFiniteError: they are no numbers.
            StoppedError: the run was told to stop.
        """
        self.model.eval()
        mine = range(self.world.rank, len(self.task.held_out), self.world.size)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        size = self.recipe.training.eval_batch_size
        # Rows of similar length together: generation runs as long as the longest prompt needs.
        lengths = self.task.held_out.with_format(None)["input_ids"]
        order = sorted(mine, key=lambda n: len(lengths[n]))
        # As many batches as the worker with the most rows has.
        for start in range(0, math.ceil(len(self.task.held_out) / self.world.size), size):
            self._look_up()
            if rows := [self.task.held_out[n] for n in order[start : start + size]]:
                sums += self.task.metric_sums(self.model, rows, self.world.device)
        self.model.train()
        total = self.world.sum(sums).tolist()
        result = {"held_out_loss": total[0] / total[1]}
        if self.task.metric != "held_out_loss":
            result[self.task.metric] = self.task.metric_value(total)
        if not all(map(math.isfinite, result.values())):
            found = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.items())
            raise NonFiniteError(
                f"after step {self.step}: {found}; the last checkpoint is kept; lower optimizer.lr "
                f"(now {self.recipe.optimizer.lr})"
            )
        self.evaluations.append({"step": self.step, **result})
        statistics, warnings = self.monitors.evaluation(self.step, result[self.task.metric])
        if self.world.rank == 0:
            self.sink.evaluation(self.step, result | statistics)
        self._warn(warnings)
        return result

    def _look_up(self) -> None:
        """Within an evaluation: stop or save, all workers at once, if one of them is told to."""
        stop, leaving = self._stop(), self._leaving()
        if self.world.size > 1:
            wishes = torch.tensor([stop, leaving], dtype=torch.float64, device=self.world.device)
            stop, leaving = map(bool, self.world.sum(wishes).tolist())
        if stop:
            self._stop_here()
        if leaving and self.step == 0:
            self._told_of_leaving = True  # there is nothing to save before the first step
        elif leaving and self._saved != self.step:
            self._save_before_leaving()

    def _save_before_leaving(self) -> None:
        if self.world.rank == 0:
            self.sink.phase(f"a node is going away: saving a checkpoint of step {self.step}")
        self.checkpoint()

    # ---------------------------------------------------------------- one step

    def train_step(self, indices: list[int]) -> PendingMetrics:
        """Forward, backward and optimizer step on one global batch of row indices."""
        clock = Clock(self.world.device)
        rows = self.task.train[indices]
        # All workers know the whole batch, so that the mean runs over its targets and not over workers' means.
        # A batch of rows without any has no loss, and moves nothing.
        targets, tokens = max(1, sum(rows["weight"])), sum(len(ids) for ids in rows["input_ids"])
        parts = self.recipe.training.gradient_accumulation
        pieces = self.world.size * parts
        torch.manual_seed(derived_seed("dropout", self.recipe.seed, self.step, self.world.rank))
        loss = torch.zeros((), device=self.world.device)
        for part in range(parts):
            piece = self.world.rank * parts + part
            mine = range(piece * len(indices) // pieces, (piece + 1) * len(indices) // pieces)
            some = [{k: v[n] for k, v in rows.items()} for n in mine]
            batch = self.task.collate(some, self.world.device)
            part_loss = self.task.loss_sum(self.model, batch) * (self.world.size / targets)
            part_loss.backward()
            loss = loss + part_loss.detach()
        # All workers stop or save after the same step, so the wish to travels with the gradients.
        wishes = [torch.full_like(loss, float(wish())) for wish in (self._stop, self._leaving)]
        self.optimizer.step(metrics=torch.stack([loss, *wishes]))
        rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        names, values = self._stats()
        self.step += 1
        known = {"live_rank": float(self.optimizer.live), "learning_rate": rate}
        if self.rank_history[-1][1] != self.optimizer.live:
            self.rank_history.append((self.step, self.optimizer.live))
        return PendingMetrics(clock, self.step, tokens, names, values, known)

    def _stats(self) -> tuple[list[str], Tensor]:
        """Names and values (one tensor on the device) of what the optimizer saw in the last step."""
        stats = self.optimizer.stats
        loss, stop, leaving = stats["metrics"]
        columns = {
            "loss": loss,
            "stop": stop,
            "leaving": leaving,
            "grad_norm": stats["grad_norm"],
            "found_inf": stats["found_inf"],
        }
        if "penalty" in stats:
            columns["penalty"] = stats["penalty"]
        if isinstance(self.optimizer, HyperAdaLoRA) and "importance" in stats:
            live = stats["importance"].masked_fill(~self.optimizer.mask, float("nan")).float().flatten()
            quantiles = torch.nanquantile(live, self._quantiles)
            columns |= {f"importance_q{n}": q for n, q in zip((10, 50, 90), quantiles, strict=True)}
        return list(columns), torch.stack([c.double() for c in columns.values()])

    def report(self, pending: PendingMetrics) -> None:
        """Read one step's metrics and pass them on.

        Raises:
            NonFiniteError: a loss or gradient of any worker was not finite; that step changed nothing.
        """
        metrics = pending.read()
        if metrics.pop("found_inf"):
            raise NonFiniteError(
                f"step {pending.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; the step was not "
                f"taken and the last checkpoint is kept; lower optimizer.lr (now {self.recipe.optimizer.lr})"
            )
        self._told_to_stop |= metrics.pop("stop") > 0
        self._told_of_leaving |= metrics.pop("leaving") > 0
        self.losses.append(metrics["loss"])
        self.step_seconds.append(metrics["step_seconds"])
        self.training_seconds += metrics["step_seconds"]
        self._watched += metrics["step_seconds"]
        self.tokens_seen += pending.tokens
        statistics, warnings = self.monitors.step(pending.step, metrics["loss"], metrics["grad_norm"])
        if self.world.rank == 0:
            self._take_in(self.uploads.finished())
            self.sink.step(pending.step, metrics | statistics | self._checkpoint_metrics)
            self._checkpoint_metrics = {}
        self._warn(warnings)

    def _warn(self, warnings: list[MonitorWarning]) -> None:
        if self.world.rank == 0:
            for warning in warnings:
                self.sink.warning(warning.monitor, warning.step, warning.message)

    # ---------------------------------------------------------------- the run

    def fit(self) -> dict[str, Any]:
        """Train from the present step to the end; returns the outcome (JSON types) on every worker.

        Raises:
            NonFiniteError: a loss or gradient was not finite.
            StoppedError: the run was told to stop.
            ReplacedError: another process took over the run's folder.
            NotStoredError: the end of the run could not be written.
        """
        t, rank0 = self.recipe.training, self.world.rank == 0
        started = time.perf_counter()
        if self.step == 0 and t.eval_before and not self._evaluated():
            if rank0:
                self.sink.phase("evaluating the base model")
            self.evaluate()
        if rank0:
            self.uploads.watch()
            self.sink.phase("training")
        if 0 < self.step < self.total_steps and self._due(t.eval_every) and not self._evaluated():
            self.evaluate()  # the run was stopped after this step, before it came to that
        batches = global_batches(len(self.task.train), t.batch_size, self.recipe.seed, self.step)
        waiting: PendingMetrics | None = None
        while self.step < self.total_steps:
            before = waited()
            newest = self.train_step(next(batches))
            self._waited += (waited() or 0.0) - (before or 0.0)
            if self.world.size == 1:  # nobody has to agree
                self._told_to_stop |= self._stop()
            if waiting is not None:
                self.report(waiting)
            waiting = newest
            last = self.step == self.total_steps
            evaluates = not last and self._due(t.eval_every)
            saves = not last and self._due(t.checkpoint_every)
            # On a GPU metrics are read one step late, so that the host never waits for the step at hand.
            told = self._told_to_stop or self._told_of_leaving
            if waiting is not None and (last or evaluates or saves or told or self.world.device.type == "cpu"):
                self.report(waiting)
                waiting = None
            if self._told_to_stop:
                self._stop_here()
            if evaluates:
                self.evaluate()
            leaving, self._told_of_leaving = self._told_of_leaving and not last, False
            if self._saved == self.step:
                continue  # while it was evaluated
            if leaving:
                self._save_before_leaving()
            elif saves:
                self.checkpoint()
        if not self._evaluated():
            if rank0:
                self.sink.phase("evaluating")
            self.evaluate()
        if rank0:
            self.sink.phase("saving adapter and checkpoint")
        return self.finish(time.perf_counter() - started)

    def _evaluated(self) -> bool:
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.step

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _stop_here(self) -> None:
        """Save the step at hand and stop.

        Raises:
            StoppedError: always; says what was saved.
        """
        where = "nothing was saved by this worker"
        if self.world.rank == 0:
            self.sink.phase("told to stop: saving a checkpoint")
            if self._already_committed() is None:
                self.uploads.submit(self._snapshot(self.recipe.storage.retry_seconds))
                self._take_in(self.uploads.drain())
            where = f"the last checkpoint is {self._committed}" if self._committed else "there is no checkpoint yet"
        raise StoppedError(f"told to stop after step {self.step} of {self.total_steps}; {where}; --resume goes on")

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write the last checkpoint, the adapter and ``result.json``; returns the outcome.

        Raises:
            NotStoredError: something could not be written; names the local copy of everything.
        """
        adapter_uri = f"{self.run.uri}/adapter"
        if self.world.rank != 0:
            return self.outcome(None, adapter_uri, seconds)
        patience = self.recipe.storage.final_retry_seconds
        snapshot = self._snapshot(patience)
        adapter = plain_adapter(self.model, self.optimizer)
        try:
            uri = self._already_committed() or self._commit(snapshot)
            outcome = self.outcome(uri, adapter_uri, seconds) | {"adapter_parameters_final": adapter.parameters}
            ownership.check(self.run.uri, self.run.owner, patience)
            outcome["adapter_files"] = write_adapter(adapter_uri, adapter, self.recipe, outcome, patience)
            ownership.check(self.run.uri, self.run.owner, patience)  # the store may have been away for minutes
            result = storage.sealed(outcome)
            patiently(storage.write, f"{self.run.uri}/result.json", result, patience=patience)
        except OSError as error:
            raise NotStoredError(self._keep_here(snapshot, adapter, seconds, error)) from error
        return outcome

    def _keep_here(self, snapshot: Snapshot, adapter: PlainAdapter, seconds: float, error: OSError) -> str:
        """Write what the store did not take into a folder of this machine; returns what to tell the user."""
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
        folder = f"{base}/hyperlora/{self.run.uri.rsplit('/', 1)[1]}"
        try:
            uri = checkpoint.write(folder, snapshot.step, snapshot.files(), writer=f"00000000-{secrets.token_hex(3)}")
            write_adapter(f"{folder}/adapter", adapter, self.recipe, self.outcome(uri, f"{folder}/adapter", seconds))
        except OSError as worse:
            return f"the end of the run was lost: {error}; and no local copy could be kept: {worse}"
        return (
            f"the end of the run could not be stored ({error}); a local copy of checkpoint and adapter is kept in "
            f"{folder} on {platform.node()}; the newest checkpoint in the store: {self._committed or 'none'}"
        )

    def outcome(self, checkpoint_uri: str | None, adapter: str, seconds: float) -> dict[str, Any]:
        first, last = self.evaluations[0], self.evaluations[-1]
        before = first if first["step"] == 0 else {}
        modules = self.optimizer.layout.modules
        per_module = self.optimizer.layout.rank
        return {
            "name": self.recipe.name,
            "method": self.recipe.method,
            "labels": list(self.task.labels),
            "pad_token_id": self.tokenizer.pad_token_id,
            "reply_end": self.task.reply_end,
            "metric": self.task.metric,
            "higher_is_better": self.task.higher_is_better,
            "metric_before": before.get(self.task.metric),
            "metric_after": last[self.task.metric],
            "held_out_loss_before": before.get("held_out_loss"),
            "held_out_loss_after": last["held_out_loss"],
            "loss_first": self.losses[0],
            "loss_last": self.losses[-1],
            "rank_initial": self.optimizer.plan.initial,
            "rank_final": self.optimizer.live,
            "rank_target": self.optimizer.plan.target,
            "rank_per_module_initial": per_module,
            "modules": [
                {"name": m.name, "layer": m.layer, "part": m.short_name, "rank": rank}
                for m, rank in zip(modules, self.optimizer.ranks().values(), strict=True)
            ],
            "rank_history": [list(pair) for pair in self.rank_history],
            "trainable_parameters": self.optimizer.trainable_parameters,
            "adapter_parameters": self.optimizer.layout.parameters,
            "other_parameters": sum(p.numel() for p in self.trained.values()),
            "optimizer_state_bytes": self.optimizer.state_bytes,
            "base_parameters": sum(p.numel() for p in self.model.parameters()) - self.optimizer.layout.parameters,
            "train_rows": len(self.task.train),
            "held_out_rows": len(self.task.held_out),
            "rows_sha256": self.task.packed.sha256,
            "steps": self.step,
            "tokens_per_second": self.tokens_seen / self.training_seconds if self.training_seconds else 0.0,
            "training_seconds": self.training_seconds,
            "waited_share": None if waited() is None or not self._watched else self._waited / self._watched,
            "loop_seconds": seconds,
            "workers": self.world.size,
            "losses": self.losses,
            "step_seconds": self.step_seconds,
            "evaluations": self.evaluations,
            "warnings": [asdict(warning) for warning in self.monitors.warnings],
            "warm_start": self.warm_start,
            "adapter": adapter,
            "checkpoint": checkpoint_uri,
            "mlflow_run_id": self.run.mlflow_run_id,
        }

    # ---------------------------------------------------------------- checkpoints

    def checkpoint(self) -> None:
        """Have worker 0 write a checkpoint of the step at hand while training goes on."""
        if self.world.rank != 0:
            return
        started = time.perf_counter()
        self._saved = self.step
        self.uploads.submit(self._snapshot(self.recipe.storage.retry_seconds))
        self._checkpoint_metrics["checkpoint/stall_seconds"] = time.perf_counter() - started

    def save(self) -> str | None:
        """Write a checkpoint from worker 0 and wait for it; returns its URI there.

        Raises:
            StorageError: it could not be written.
        """
        return self._commit(self._snapshot(self.recipe.storage.retry_seconds)) if self.world.rank == 0 else None

    def _already_committed(self) -> str | None:
        """The checkpoint of the step at hand, if one was begun within its evaluation and has arrived."""
        if self._saved != self.step:
            return None
        self._take_in(self.uploads.drain())
        last = self._committed
        return last if last is not None and checkpoint.step_of(last) == self.step else None

    def _commit(self, snapshot: Snapshot) -> str:
        self.uploads.submit(snapshot)
        outcomes = self.uploads.drain()
        last = outcomes[-1]
        if last.uri is None:
            self._take_in(outcomes[:-1])
            assert last.error is not None
            raise last.error
        self._take_in(outcomes)
        return last.uri

    def _snapshot(self, patience: float) -> Snapshot:
        """The state as it is now, copied to the host; packing and hashing are left to the upload."""
        state = self.optimizer.state_dict()
        tensors = {f"optimizer.{k}": v for k, v in state.pop("state").items()}
        tensors |= {f"model.{n}": p for n, p in self.trained.items()}
        copies = {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}
        trainer = {
            "step": self.step,
            "total_steps": self.total_steps,
            "data": self._data() | {"seed": self.recipe.seed, "next_batch": self.step},
            "rng": "every step seeds the generator with (recipe.seed, step, worker)",
            "optimizer": copy.deepcopy(state),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "losses": list(self.losses),
            "step_seconds": list(self.step_seconds),
            "metric": self.task.metric,
            "labels": list(self.task.labels),
            "pad_token_id": self.tokenizer.pad_token_id,
            "reply_end": self.task.reply_end,
            "evaluations": list(self.evaluations),
            "rank_history": list(self.rank_history),
            "monitors": copy.deepcopy(self.monitors.state_dict()),
            "warm_start": self.warm_start,
            "training_seconds": self.training_seconds,
            "watched": self._watched,
            "waited": self._waited,
            "tokens_seen": self.tokens_seen,
            "run": asdict(self.run),
            "recipe": self.recipe.model_dump(mode="json"),
        }
        adapter = plain_adapter(self.model, self.optimizer)
        files = lambda: checkpoint.content(copies, trainer, adapter_files(adapter))  # noqa: E731
        return Snapshot(self.step, files, patience, self.sink.flush())

    def _take_in(self, outcomes: list[Outcome]) -> None:
        """Tell of checkpoints that were written, and once of the first that was not."""
        for outcome in outcomes:
            if outcome.uri is not None:
                self._committed, self._failing = outcome.uri, False
                self._checkpoint_metrics["checkpoint/committed_step"] = outcome.step
                self._checkpoint_metrics["checkpoint/upload_seconds"] = outcome.seconds
                self._checkpoint_metrics["checkpoint/bytes"] = outcome.bytes
                continue
            self._checkpoint_metrics["checkpoint/failed_step"] = outcome.step
            if not self._failing:
                self._failing = True
                last = f"the last one is {self._committed}" if self._committed else "there is none yet"
                self._tell(
                    outcome.step,
                    f"the checkpoint of step {outcome.step} was not written, tried for {outcome.seconds:.0f} s "
                    f"({outcome.error}); training goes on, the next one tries again; {last}",
                )

    def refused(self, checkpoints: list[RefusedError]) -> None:
        """Tell of newer checkpoints than the one that was taken up, and why they were not."""
        self.uploads.refused = {error.uri for error in checkpoints}
        reasons = "; ".join(map(str, checkpoints))
        self._tell(self.step, f"refused: {reasons}; going on from step {self.step}")

    def _tell(self, step: int, message: str) -> None:
        warning = MonitorWarning("checkpoint", step, 0.0, message)
        self.monitors.warnings.append(warning)
        self._warn([warning])

    def _data(self) -> dict[str, Any]:
        """What the rows to train and evaluate on are."""
        return {"rows": len(self.task.train), "rows_sha256": self.task.packed.sha256}

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint of the same recipe.

        Raises:
            RecipeError: the checkpoint is of other rows, of another model, or of another version.
        """
        trainer, data = saved.trainer, self._data()
        if missing := sorted(STATE - trainer.keys()):
            allowed = f"a checkpoint of this version: its trainer.json has no {', '.join(missing)}"
            raise RecipeError([Problem("--resume", saved.uri, allowed)])
        packed.check_same(saved.uri, trainer["data"].get("rows_sha256", {}), data["rows_sha256"])
        if trainer["total_steps"] != self.total_steps:
            raise RecipeError(
                [Problem("training", self.total_steps, f"the {trainer['total_steps']} steps of {saved.uri}")]
            )
        optimizer = {k.removeprefix("optimizer."): v for k, v in saved.tensors.items() if k.startswith("optimizer.")}
        try:
            self.optimizer.load_state_dict({**trainer["optimizer"], "state": optimizer})
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(saved.tensors[f"model.{name}"])
        except (KeyError, ValueError, RuntimeError) as error:
            allowed = f"the model whose adapter {saved.uri} holds ({error})"
            raise RecipeError([Problem("model.path", self.recipe.model.path, allowed)]) from error
        lambdas = [None] * len(self.optimizer.param_groups)  # functions are no state; None keeps this run's
        self.scheduler.load_state_dict({**trainer["scheduler"], "lr_lambdas": lambdas})
        self.step, self._committed = trainer["step"], saved.uri
        self.losses = list(trainer["losses"])
        self.step_seconds = list(trainer["step_seconds"])
        self.evaluations = list(trainer["evaluations"])
        self.rank_history = [(int(s), int(n)) for s, n in trainer["rank_history"]]
        self.monitors.load_state_dict(trainer["monitors"])
        self.warm_start = trainer["warm_start"]
        self.training_seconds = trainer["training_seconds"]
        self._watched, self._waited = (trainer.get(key, 0.0) for key in ("watched", "waited"))
        self.tokens_seen = trainer["tokens_seen"]


def train(
    recipe: Recipe,
    run: RunInfo,
    world: World | None = None,
    sink: Sink | None = None,
    stop: Callable[[], bool] = lambda: False,
    leaving: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a recipe, going on from the newest good checkpoint of the run if it has one; returns the outcome.

    Args:
        recipe: a valid recipe.
        run: where the run lives; without an owner its folder is claimed here.
        world: which worker this is.
        sink: where progress and metrics go.
        stop: whether the run is to stop after the step at hand, with a checkpoint.
        leaving: whether a worker may go away soon; true once for each notice, which makes a checkpoint due.

    Raises:
        RecipeError: the data or the model does not fit the recipe, or no checkpoint of the run verifies.
        OwnedElsewhereError: another process has claimed the run's folder.
        ReplacedError: another process has taken it over.
        RuntimeError: as :meth:`Trainer.fit`.
        StorageError: the store does not answer at the start.
    """
    world, sink = world or World(), sink or Silent()
    lease: Lease | None = None
    try:
        if run.owner is None and world.rank == 0:
            lease = Lease(run.uri)
            run = replace(run, owner=lease.owner)
        elif world.rank == 0:  # loading takes minutes, and who was started again may have been replaced meanwhile
            ownership.check(run.uri, run.owner)
        trainer = world.together(lambda: Trainer(recipe, run, world, sink, stop, leaving))
        try:
            _resume(trainer)
            return trainer.fit()
        finally:
            trainer.uploads.close()
    finally:
        if lease is not None:
            lease.release()
        if world.rank == 0:
            sink.close()


def _resume(trainer: Trainer) -> None:
    """Take up the newest checkpoint that verifies, on all workers the one that worker 0 found, or start anew.

    Raises:
        RecipeError: there are checkpoints, and none verifies; or the start does not fit.
    """
    run = trainer.run
    saved: Checkpoint | None = None

    def newest() -> tuple[str | None, list[RefusedError]]:
        nonlocal saved
        ownership.check(run.uri, run.owner)
        saved, refused = checkpoint.load_latest(run.uri)
        if saved is None and refused:
            reasons = "; ".join(map(str, refused))
            raise RecipeError([Problem("--resume", run.uri, f"no checkpoint of this run verifies: {reasons}")])
        return None if saved is None else saved.uri, refused

    uri, refused = trainer.world.first(newest)
    if uri is None:
        trainer.start()
        return
    trainer.restore(checkpoint.load(uri) if saved is None else saved)
    if refused:
        trainer.refused(refused)
