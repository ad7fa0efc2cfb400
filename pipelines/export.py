"""``hyperlora export``: a plain PEFT LoRA adapter from a run or a checkpoint."""

from __future__ import annotations

from argparse import Namespace

from rich.console import Console
from safetensors import SafetensorError

from hyperlora import checkpoint, export, storage, uris
from hyperlora.config import Problem, Recipe, RecipeError, parse
from hyperlora.storage import patiently
from pipelines.common import check_new_folder, write_json


def main(args: Namespace, console: Console) -> int:
    """Write the adapter; returns the exit status."""
    wrong = [
        Problem(name, uris.redacted(uri), allowed)
        for name, uri in (("RUN_OR_CHECKPOINT", args.source), ("DIR", args.folder))
        if (allowed := uris.problem(uri, written=name == "DIR")) is not None
    ]
    if wrong:
        raise RecipeError(wrong)
    saved = find(storage.absolute(args.source))
    target = storage.absolute(args.folder)
    check_new_folder("DIR", target)
    adapter, recipe = _contents(saved)
    if args.uniform_rank:
        try:
            adapter = adapter.padded()
        except ValueError as error:
            raise RecipeError([Problem("--uniform-rank", args.source, str(error))]) from error
    try:
        export.write_adapter(target, adapter, recipe, export.card_facts(saved.trainer))
    except OSError as error:
        raise RecipeError([Problem("DIR", target, f"a folder that can be written ({error})")]) from error
    ranks = {name: a.shape[0] for name, (a, _) in adapter.pairs.items()}
    summary = {
        "adapter": target,
        "checkpoint": saved.uri,
        "step": saved.trainer["step"],
        "ranks": ranks,
        "uniform_rank": max(ranks.values()) if args.uniform_rank else None,
        "parameters": adapter.parameters,
        "mlflow_run_id": saved.trainer["run"]["mlflow_run_id"],
    }
    what = f"rank {summary['uniform_rank']} everywhere" if args.uniform_rank else f"{sum(ranks.values())} directions"
    console.print(f"{target}: {adapter.parameters:,} parameters, {what}", highlight=False, soft_wrap=True)
    write_json(args.json, summary)
    return 0


def _contents(saved: checkpoint.Checkpoint) -> tuple[export.PlainAdapter, Recipe]:
    """Adapter and recipe of a checkpoint whose bytes are what its writer wrote.

    Raises:
        RecipeError: its writer was another program or version.
    """
    try:
        return export.from_checkpoint(saved), parse(saved.trainer["recipe"])
    except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        allowed = f"a checkpoint of this program and version ({reason})"
        raise RecipeError([Problem("RUN_OR_CHECKPOINT", saved.uri, allowed)]) from error


def find(uri: str) -> checkpoint.Checkpoint:
    """The checkpoint at a URI: itself, or the newest good one of a run.

    Raises:
        RecipeError: there is neither, or none verifies.
    """
    try:
        if patiently(storage.exists, f"{uri}/{checkpoint.COMMIT}"):
            return checkpoint.load(uri)
    except ValueError as error:
        raise RecipeError([Problem("RUN_OR_CHECKPOINT", uri, str(error))]) from error
    saved, refused = checkpoint.load_latest(uri)
    if saved is None:
        reason = "; ".join(map(str, refused)) or "it holds neither a checkpoint nor a checkpoints folder"
        raise RecipeError([Problem("RUN_OR_CHECKPOINT", uri, f"a run's folder or a checkpoint's: {reason}")])
    return saved
