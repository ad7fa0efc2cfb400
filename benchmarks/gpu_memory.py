"""The estimate of `hyperlora train --dry-run` against what a GPU allocates: peak over five steps of the real loop.

Four layers of LLaMA-3.1-8B's shape with random weights and a vocabulary of 32,000, rank 16 on all linears, rows of the
full length: a made-up file and the tokenizer that ships with the package. No hub is needed.

    python -m benchmarks.gpu_memory --json out/gpu_memory.json
    python -m benchmarks.gpu_memory --dry-run      the estimates alone, on any machine
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import provenance, write_json
from hyperlora.config import Recipe
from hyperlora.preflight import inspect
from hyperlora.training import RunInfo, Silent, Trainer, World
from pipelines.common import load_recipe

STEPS, LAYERS = 5, 4
#: Name and changes of the recipe.
CASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("recomputed, 1 x 2048", ("training.batch_size=1",)),
    ("recomputed, 4 x 2048", ("training.batch_size=4",)),
    ("kept, 1 x 2048", ("training.batch_size=1", "model.gradient_checkpointing=false")),
    ("kept, 2 x 2048", ("training.batch_size=2", "model.gradient_checkpointing=false")),
    ("kept, 2 x 2048, lora", ("training.batch_size=2", "model.gradient_checkpointing=false", "method=lora")),
    ("recomputed, 1 x 2048, float32", ("training.batch_size=1", "model.dtype=float32")),
)


def recipe(folder: Path, changes: tuple[str, ...]) -> Recipe:
    """The shipped recipe of LLaMA-3.1-8B as language modelling on the rows in ``folder``."""
    own = [
        "model.init=random",
        "model.tokenizer=builtin:storylm",
        f"model.config.num_hidden_layers={LAYERS}",
        "model.config.vocab_size=32000",
        "task={kind: language-modeling, max_length: 2048}",
        f"data={{source: files, format: jsonl, root: {folder}, train: rows.jsonl, eval: rows.jsonl}}",
        'data.template="{text}"',
        "training.epochs=null",
        f"training.steps={STEPS}",
        "training.gradient_accumulation=1",
        "training.eval_before=false",
        "pruning.start=1",
        "pruning.final=1",
        "pruning.interval=1",
        "ray={backend: local, num_workers: 1}",
        "mlflow.enabled=false",
        f"storage.uri={folder}",
    ]
    return load_recipe("llama-3.1-8b", [*own, *changes])


def peak(wanted: Recipe) -> int:
    """Most bytes that PyTorch's allocator held at a time, over the construction's remains and all steps."""
    gc.collect()
    torch.cuda.empty_cache()
    trainer = Trainer(wanted, RunInfo(wanted.storage.uri), World(), Silent())
    torch.cuda.reset_peak_memory_stats()
    size = wanted.training.batch_size
    for step in range(STEPS):
        trainer.train_step(list(range(step * size, (step + 1) * size))).read()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="the estimates alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = " ".join(["Ada has 3 apples and Ben gives her 4 more."] * 300)
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(4 * STEPS)))
        for case, changes in CASES:
            wanted = recipe(folder, changes)
            row: dict[str, Any] = {"case": case, "estimated_bytes": inspect(wanted).memory_bytes}
            if not options.dry_run:
                row["peak_bytes"] = peak(wanted)
            rows.append(row)
            found = f"  peak {row['peak_bytes'] / 2**30:6.2f} GiB" if "peak_bytes" in row else ""
            share = f"  estimate / peak {row['estimated_bytes'] / row['peak_bytes']:.2f}" if "peak_bytes" in row else ""
            print(f"{case:32} estimate {row['estimated_bytes'] / 2**30:6.2f} GiB{found}{share}", flush=True)
    if options.json:
        write_json(options.json, {"layers": LAYERS, "cases": rows, **provenance()})


if __name__ == "__main__":
    main()
