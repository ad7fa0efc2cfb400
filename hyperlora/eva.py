"""Explained variance adaptation: ranks and A from activations, once, before training (arXiv 2410.07170, PEFT's EVA).

A starts as the leading right singular vectors of what flows into each module, B at zero. The budget of rank x modules
goes to the vectors that explain the largest share of their module's variance; a module gets at most twice its rank.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, initialize_lora_eva_weights
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor

from hyperlora.adapters import prepare
from hyperlora.config import Problem, Recipe, RecipeError
from hyperlora.tasks import Task
from hyperlora.tasks.base import Batch

#: Training batches whose activations decide; they are passed again until the vectors stand still (cosine 0.99).
EVA_BATCHES = 16
#: Forward passes after which the vectors should have stood still.
MOST_PASSES = 500


def redistribute_ranks(
    model: PeftModel, recipe: Recipe, task: Task, rows: list[int], device: torch.device
) -> PeftModel:
    """Give every module of ``model`` its rank and its A, in place; modules of rank zero lose their adapter.

    Args:
        model: with LoRA layers of one rank, ``init_lora_weights="eva"``.
        recipe: of the run.
        task: its training rows.
        rows: indices of the rows to look at.
        device: of the model.

    Raises:
        RecipeError: there are too few rows, a module is too narrow for its rank, or the vectors do not settle.
    """
    rank = recipe.adapter.rank
    # PEFT's incremental SVD looks at twice as many directions as the highest rank, 2r, in every batch. A module that
    # sees one token of a row (a pooler) needs as many rows.
    size = max(recipe.training.batch_size, 4 * rank)
    batches = [
        task.collate([task.train[n] for n in rows[start : start + size]], device)
        for start in range(0, len(rows) - size + 1, size)
    ]
    narrow = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and int(module.in_features or 0) < 4 * rank
    ]
    if narrow or not batches:
        what = f"modules {narrow} are too narrow" if narrow else f"{len(rows)} rows of {recipe.training.batch_size}"
        raise RecipeError([Problem("adapter.rank", rank, f"method=eva needs 4·rank = {4 * rank} of each: {what}")])
    passes = 0

    def forward(peft_model: PeftModel, batch: Batch) -> None:
        nonlocal passes
        passes += 1
        if passes > MOST_PASSES:
            allowed = (
                f"method=eva: singular vectors still move after {MOST_PASSES} batches; a larger batch or lower rank"
            )
            raise RecipeError([Problem("training.batch_size", recipe.training.batch_size, allowed)])
        peft_model(**task.inputs(peft_model, batch))

    initialize_lora_eva_weights(
        model, batches, forward_fn=forward, prepare_layer_inputs_fn=_inputs, show_progress_bar=False
    )
    # A layer whose rank has changed is new and has the base's dtype; adapters of half precision train in float32.
    cast_adapter_dtype(model, adapter_name="default")
    return prepare(model, recipe)


def _inputs(layer_input: Tensor | tuple[Tensor, ...], positions: Tensor, name: str) -> Tensor:
    """Rows of a module's input at the token positions (n, 2); all for a module that sees one row per example."""
    states = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return states.contiguous() if states.ndim == 2 else states[positions.T.unbind()]
