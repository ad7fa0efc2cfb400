"""Classification of a sentence or a sentence pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hyperlora.config import Problem, Recipe, RecipeError
from hyperlora.tasks.base import TOKENS, Batch, Task
from hyperlora.tasks.data import Part, Parts


def label_names(recipe: Recipe, found: Mapping[Parts, Part]) -> tuple[str, ...]:
    """The labels in order of their index: as the recipe has them, or those of the training rows, sorted.

    Whole numbers, as class labels of data sets often are, are sorted as such.

    Raises:
        RecipeError: a label of the rows is not among them, or there are fewer than two.
    """
    there = found["train"].labels
    numbers = all(label.isascii() and label.isdigit() for label in there)
    names = recipe.data.labels or tuple(sorted(there, key=(lambda label: (int(label), label)) if numbers else None))
    problems = []
    if len(names) < 2:
        problems.append(Problem("data.labels", names, "two labels or more in the training rows, or named here"))
    for part, content in found.items():
        unknown = sorted(content.labels - set(names))
        if unknown:
            known = f"labels in column {recipe.data.label}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
            problems.append(Problem(f"data.{part}", unknown[:5], known))
    if problems:
        raise RecipeError(problems)
    return names


class Classification(Task):
    """Cross-entropy of the class; metric: accuracy on the held-out rows."""

    metric = "accuracy"
    columns = pa.schema([("input_ids", TOKENS), ("labels", pa.int32()), ("weight", pa.int32())])

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()) -> None:
        super().__init__(recipe, tokenizer, labels)
        self.num_labels = len(labels)
        # Which of a pair's sentences a token is of; of one sentence it is what a model assumes anyway.
        self._segments = recipe.data.text_pair is not None and "token_type_ids" in tokenizer.model_input_names
        if self._segments:
            self.columns = self.columns.append(pa.field("token_type_ids", TOKENS))
        self.label_index = {name: n for n, name in enumerate(labels)}

    def encode(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        data = self.recipe.data
        texts = [str(row[data.text]) for row in rows]
        pairs = [str(row[data.text_pair]) for row in rows] if data.text_pair else None
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.recipe.task.max_length)
        ids = encoded["input_ids"]
        labels = [self.label_index[str(row[data.label])] for row in rows]
        columns = {"input_ids": ids, "labels": labels, "weight": [1] * len(ids), "cut": self._cut(encoded)}
        return columns | ({"token_type_ids": encoded["token_type_ids"]} if self._segments else {})

    def collate(self, rows: list[dict[str, Any]], device: torch.device) -> Batch:
        batch = super().collate(rows, device)
        if not self._segments:
            return batch
        segments = torch.zeros(batch["input_ids"].shape, dtype=torch.long)
        for n, row in enumerate(rows):
            segments[n, : len(row["token_type_ids"])] = torch.tensor(row["token_type_ids"])
        return batch | {"token_type_ids": segments.to(device, non_blocking=True)}

    def _labels(self, rows: list[dict[str, Any]], longest: int) -> Tensor:
        return torch.tensor([row["labels"] for row in rows])

    def inputs(self, model: nn.Module, batch: Batch) -> Batch:
        inputs = super().inputs(model, batch)
        if "token_type_ids" in batch and getattr(model.config, "type_vocab_size", 0) > 1:  # BERT's, for one
            inputs["token_type_ids"] = batch["token_type_ids"]
        return inputs

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**self.inputs(model, batch)).logits
        return logits if logits.dtype.itemsize >= 4 else logits.float()

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self._logits(model, batch), batch["labels"], reduction="sum")

    def metric_sums(self, model: nn.Module, rows: list[dict[str, Any]], device: torch.device) -> Tensor:
        batch = self.collate(rows, device)
        logits = self._logits(model, batch)
        loss = F.cross_entropy(logits, batch["labels"], reduction="sum").double()
        correct = (logits.argmax(-1) == batch["labels"]).sum().double()
        count = torch.tensor(float(len(rows)), dtype=torch.float64, device=device)
        return torch.stack([loss, count, correct, count])
