"""What the training loop asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from hyperlora.config import Recipe
from hyperlora.packed import Packed

IGNORED = -100
Batch = dict[str, Tensor]
TOKENS = pa.list_(pa.int32())


class Task(ABC):
    """Tokenised rows, a loss and a metric.

    Attributes:
        metric: name of the held-out metric.
        higher_is_better: whether a larger metric is better.
        num_labels: classes of a classifier, None for a causal LM.
        labels: their names in order of the index, empty for a causal LM.
        columns: of a tokenised row: ``input_ids``, ``labels``, ``weight``, the number of targets in a row's loss, and
            what else the metric needs.
        train, held_out: tokenised rows, mapped into memory.
        packed: where they lie, and their counts.
        reply_end: the token that ends a reply of a chat; None for what is no chat.
    """

    metric: str
    higher_is_better: bool = True
    num_labels: int | None = None
    labels: tuple[str, ...]
    columns: pa.Schema
    train: Dataset
    held_out: Dataset
    packed: Packed
    reply_end: str | None = None

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()) -> None:
        self.recipe, self.tokenizer, self.labels = recipe, tokenizer, labels

    @abstractmethod
    def encode(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Tokenise rows: a list for each of ``columns``, and ``cut``, whether a row was longer than it may be."""

    @staticmethod
    def _cut(encoded: BatchEncoding) -> list[bool]:
        """Which rows a tokenizer has cut; a slow one does not tell."""
        return [bool(row.overflowing) for row in encoded.encodings or []]

    def inputs(self, model: nn.Module, batch: Batch) -> Batch:
        """What of a batch the model is called with, by the loss and by whoever wants the activations of training."""
        return _tokens(batch)

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over a batch's targets, nats."""

    def metric_sums(self, model: nn.Module, rows: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Sums over held-out rows: [loss, targets, correct, rows]; correct is 0 where the metric is the loss."""
        batch = self.collate(rows, device)
        loss, targets = self.loss_sum(model, batch), sum(row["weight"] for row in rows)
        return torch.stack(
            [loss.double(), *torch.tensor([targets, 0.0, len(rows)], dtype=torch.float64, device=device)]
        )

    def metric_value(self, sums: Sequence[float]) -> float:
        """The metric from sums over all held-out rows."""
        return sums[2] / sums[3]

    def collate(self, rows: list[dict[str, Any]], device: torch.device) -> Batch:
        """Pad rows on the right: input_ids, attention_mask and labels, (rows, longest) each."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id or 0))
        seen = torch.zeros(len(rows), longest, dtype=torch.long)
        for n, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[n, :length] = torch.tensor(row["input_ids"])
            seen[n, :length] = 1
        batch = {"input_ids": ids, "attention_mask": seen, "labels": self._labels(rows, longest)}
        return {k: v.to(device, non_blocking=True) for k, v in batch.items()}

    def _labels(self, rows: list[dict[str, Any]], longest: int) -> Tensor:
        labels = torch.full((len(rows), longest), IGNORED)
        for n, row in enumerate(rows):
            labels[n, : len(row["labels"])] = torch.tensor(row["labels"])
        return labels


def _tokens(batch: Batch) -> Batch:
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def next_token_loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Summed cross-entropy of the next token where ``labels`` is not ignored; logits in at least float32.

    Without gradients row by row, so that no copy of all logits is needed.
    """
    logits = model(**_tokens(batch)).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    if torch.is_grad_enabled():
        return _loss_sum(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return torch.stack([_loss_sum(*row) for row in zip(logits, targets, strict=True)]).sum()


def _loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
