"""Classification of a sentence or a sentence pair."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hyperlora.config import Problem, Recipe, RecipeError
from hyperlora.tasks.base import Batch, Task


class Classification(Task):
    """Cross-entropy of the class; metric: accuracy on the held-out rows.

    Raises:
        RecipeError: a label of the rows is not among ``data.labels``, or there are fewer than two.
    """

    metric = "accuracy"

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        train: list[dict[str, Any]],
        held_out: list[dict[str, Any]],
    ) -> None:
        super().__init__(recipe, tokenizer)
        column = recipe.data.label
        names = recipe.data.labels or tuple(sorted({str(row[column]) for row in train}))
        problems = []
        if len(names) < 2:
            problems.append(Problem("data.labels", names, "two labels or more in the training rows, or named here"))
        for part, rows in (("train", train), ("eval", held_out)):
            unknown = sorted({str(row[column]) for row in rows} - set(names))
            if unknown:
                known = f"labels in column {column}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
                problems.append(Problem(f"data.{part}", unknown[:5], known))
        if problems:
            raise RecipeError(problems)
        self.label_index = {name: n for n, name in enumerate(names)}
        self.num_labels, self.labels = len(names), names
        self.train = self._encode(train)
        self.held_out = self._encode(held_out)

    def _encode(self, rows: list[dict[str, Any]]) -> Dataset:
        data = self.recipe.data
        texts = [str(row[data.text]) for row in rows]
        pairs = [str(row[data.text_pair]) for row in rows] if data.text_pair else None
        ids = self.tokenizer(texts, pairs, truncation=True, max_length=self.recipe.task.max_length)["input_ids"]
        labels = [self.label_index[str(row[data.label])] for row in rows]
        return Dataset.from_dict({"input_ids": ids, "labels": labels, "weight": [1] * len(ids)})

    def _labels(self, rows: list[dict[str, Any]], longest: int) -> Tensor:
        return torch.tensor([row["labels"] for row in rows])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
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
