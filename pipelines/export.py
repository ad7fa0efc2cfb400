"""``hyperlora export``: a plain PEFT LoRA adapter from a run, a checkpoint or another adapter."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from hyperlora import checkpoint, export, runs, storage, uris
from hyperlora.config import Problem, RecipeError, parse_recorded
from hyperlora.export import CARD, CONFIG, FILES, RECORD, TENSORS, PlainAdapter
from hyperlora.storage import patiently
from pipelines import screens
from pipelines.common import check_new_folder, write_json


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        uri: of the checkpoint or the adapter's folder.
        checkpoint: it is a checkpoint.
        adapter: that it holds.
        step: optimizer steps that made it; None where nothing says so.
        run_id: MLflow run that made it, if that is known.
        card: the model card of the adapter as it is written, if there is one.
    """

    uri: str
    checkpoint: bool
    adapter: PlainAdapter
    step: int | None
    run_id: str | None
    card: Callable[[PlainAdapter], str | None]


def main(args: Namespace, console: Console) -> int:
    """Write the adapter; returns the exit status."""
    wrong = [
        Problem(name, uris.redacted(uri), allowed)
        for name, uri in (("RUN_OR_CHECKPOINT", args.source), ("DIR", args.folder))
        if (allowed := uris.problem(uri, written=name == "DIR")) is not None
    ]
    if wrong:
        raise RecipeError(wrong)
    source = find(uris.absolute(args.source), console)
    target = uris.absolute(args.folder)
    check_new_folder("DIR", target)
    adapter = source.adapter
    if args.uniform_rank:
        try:
            adapter = adapter.padded()
        except ValueError as error:
            raise RecipeError([Problem("--uniform-rank", args.source, str(error))]) from error
    files, card = export.adapter_files(adapter), source.card(adapter)
    if card is not None:
        files[CARD] = card.encode()
    try:
        export.write_files(target, files)
    except OSError as error:
        raise RecipeError([Problem("DIR", target, f"a folder that can be written ({error})")]) from error
    ranks = {name: a.shape[0] for name, (a, _) in adapter.pairs.items()}
    summary = {
        "adapter": target,
        "source": source.uri,
        "checkpoint": source.uri if source.checkpoint else None,
        "step": source.step,
        "ranks": ranks,
        "uniform_rank": max(ranks.values()) if args.uniform_rank else None,
        "parameters": adapter.parameters,
        "mlflow_run_id": source.run_id,
    }
    what = f"rank {summary['uniform_rank']} everywhere" if args.uniform_rank else f"{sum(ranks.values())} directions"
    step = "" if source.step is None else f"step {source.step}, "
    for line in (f"{target}: {adapter.parameters:,} parameters, {what}", f"{step}from {screens.local(source.uri)}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    write_json(args.json, summary)
    return 0


def find(uri: str, console: Console) -> Source:
    """What a URI names: a checkpoint, a run with its newest good one or else its adapter, or an adapter.

    Raises:
        RecipeError: there is none of them, none verifies, or of a finished run not the checkpoint of its end.
        StorageError: the store does not answer.
    """
    try:
        if patiently(storage.exists, f"{uri}/{checkpoint.COMMIT}"):
            return _of_checkpoint(checkpoint.load(uri))
    except checkpoint.RefusedError as error:
        raise RecipeError([Problem("RUN_OR_CHECKPOINT", uri, str(error))]) from error
    saved, refused = checkpoint.load_latest(uri)
    reasons = "; ".join(map(str, refused))
    if saved is None:
        source = None if refused else _of_adapter(uri)
        if source is None:
            reasons = reasons or f"it holds neither a checkpoint nor a checkpoints folder, nor {CONFIG} and {TENSORS}"
            raise RecipeError([Problem("RUN_OR_CHECKPOINT", uri, f"a run's folder or a checkpoint's: {reasons}")])
        return source
    outcome = runs.result(uri)
    # By name: the run's folder may have been moved.
    if outcome is not None and _name(outcome["checkpoint"]) != _name(saved.uri):
        allowed = (
            f"a finished run with the checkpoint that its {runs.RESULT} names, {outcome['checkpoint']} "
            f"({reasons or 'it is not there'}); the newest that verifies is {saved.uri}: give that one, or "
            f"{uri}/adapter, to export it"
        )
        raise RecipeError([Problem("RUN_OR_CHECKPOINT", uri, allowed)])
    if refused:
        said = f"refused: {reasons}; taking step {checkpoint.step_of(saved.uri)}"
        console.print(Text(said, "yellow"), soft_wrap=True)
    return _of_checkpoint(saved, outcome)


def _name(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]


def _of_checkpoint(saved: checkpoint.Checkpoint, outcome: Mapping[str, Any] | None = None) -> Source:
    """A checkpoint whose bytes are what its writer wrote; with the outcome of the run that it ends.

    Raises:
        RecipeError: its writer was another program or version.
    """
    try:
        adapter, trainer = export.from_checkpoint(saved), saved.trainer
        recipe, facts = parse_recorded(trainer["recipe"]), export.card_facts(trainer, outcome)
        step, run_id = trainer["step"], trainer["run"]["mlflow_run_id"]
    except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        allowed = f"a checkpoint of this program and version ({reason})"
        raise RecipeError([Problem("RUN_OR_CHECKPOINT", saved.uri, allowed)]) from error
    return Source(saved.uri, True, adapter, step, run_id, lambda written: export.model_card(written, recipe, facts))


def _of_adapter(uri: str) -> Source | None:
    """The adapter in the folder of a finished run, or in one of its own; None when there is none.

    Raises:
        RecipeError: it is not what the run or ``register`` wrote, or no adapter of this program.
    """
    run = uri.removesuffix("/adapter")
    outcome = runs.result(run) if patiently(storage.exists, f"{run}/{runs.RESULT}") else None
    step = run_id = None
    if outcome is not None:
        uri, step, run_id = f"{run}/adapter", outcome["steps"], outcome["mlflow_run_id"]
        files = {name: runs.adapter_file(run, outcome, name) for name in outcome["adapter_files"]}
    else:
        names = [name for name in FILES if patiently(storage.exists, f"{uri}/{name}")]
        # A checkpoint without its manifest has these files too.
        if not {CONFIG, TENSORS} <= set(names) or checkpoint.FOLDER.match(_name(uri)):
            return None
        files = {name: patiently(storage.read, f"{uri}/{name}") for name in names}
        step = _registered_step(uri, files)
    try:
        adapter = export.from_files(files)
        card = files[CARD].decode() if CARD in files else None
    except (ValueError, TypeError, RecursionError, SafetensorError) as error:
        allowed = f"an adapter of this program ({type(error).__name__}: {error})"
        raise RecipeError([Problem("RUN_OR_CHECKPOINT", uri, allowed)]) from error

    def told(written: PlainAdapter) -> str | None:
        if card is None or written is adapter:
            return card
        rank = max(a.shape[0] for a, _ in written.pairs.values())
        return (
            f"{card.rstrip()}\n\nFilled with zeros to rank {rank} in every module: {written.parameters:,} parameters.\n"
        )

    return Source(uri, False, adapter, step, run_id, told)


def _registered_step(uri: str, files: Mapping[str, bytes]) -> int | None:
    """Optimizer steps of an adapter by the record beside it; None when it has none.

    Raises:
        RecipeError: the record is damaged, or a file is not the one that was registered.
    """
    record: Any = runs.read(uri, RECORD)
    if record is None:
        return None
    try:
        record = storage.unsealed(record)
        for name, facts in checkpoint.identities(files).items():
            if facts["sha256"] != record["files"][name]:
                raise ValueError(f"{name} is not the file that was registered: SHA-256 differs")
        return record["metrics"]["steps"]
    except (ValueError, LookupError, TypeError) as error:
        allowed = f"an adapter as hyperlora pull wrote it ({type(error).__name__}: {error})"
        raise RecipeError([Problem("RUN_OR_CHECKPOINT", uri, allowed)]) from error
