"""Language modelling of whole rows; the metric is the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from hyperlora.tasks.base import TOKENS, Batch, Task, next_token_loss_sum


class LanguageModeling(Task):
    """Next-token loss on every token of a row; metric: mean held-out loss in nats per token (lower is better)."""

    metric = "held_out_loss"
    higher_is_better = False

    columns = pa.schema([("input_ids", TOKENS), ("labels", TOKENS), ("weight", pa.int32())])

    def encode(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        data = self.recipe.data
        eos = str(self.tokenizer.eos_token or "")
        columns = [{**row, "prompt": row.get(data.prompt), "completion": row.get(data.completion)} for row in rows]
        texts = [data.template.format_map(row) + eos for row in columns]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.recipe.task.max_length)
        ids, weights = encoded["input_ids"], [max(0, len(row) - 1) for row in encoded["input_ids"]]
        return {"input_ids": ids, "labels": ids, "weight": weights, "cut": self._cut(encoded)}

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return next_token_loss_sum(model, batch)

    def metric_value(self, sums: Sequence[float]) -> float:
        return sums[0] / sums[1]
