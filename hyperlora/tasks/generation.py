"""Prompt to completion with an exact final answer, in the form of GSM8K (arXiv 2110.14168): ``#### n`` ends it."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from hyperlora.tasks.base import IGNORED, TOKENS, Batch, Task, next_token_loss_sum

_FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def final_answer(text: str) -> str | None:
    """The number after the first ``####``, without thousands separators; None if there is none."""
    found = _FINAL.search(text)
    return found.group(1).replace(",", "") if found else None


class Generation(Task):
    """Loss on the completion alone; metric: share of held-out rows whose final answer is exactly right."""

    metric = "exact_match"

    columns = pa.schema(
        [
            ("input_ids", TOKENS),
            ("labels", TOKENS),
            ("weight", pa.int32()),
            ("prompt_ids", TOKENS),
            ("answer", pa.string()),
        ]
    )

    def encode(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        data, task = self.recipe.data, self.recipe.task
        prompts = [task.prompt_format.replace("{prompt}", str(row[data.prompt])) for row in rows]
        completions = [f" {row[data.completion]}{self.tokenizer.eos_token or ''}" for row in rows]
        prompt_ids = self.tokenizer(prompts)["input_ids"]
        completion_ids = self.tokenizer(completions, add_special_tokens=False)["input_ids"]
        ids = [(p + c)[: task.max_length] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        labels = [([IGNORED] * len(p) + c)[: task.max_length] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        return {
            "input_ids": ids,
            "labels": labels,
            "weight": [sum(t != IGNORED for t in row[1:]) for row in labels],
            "prompt_ids": prompt_ids,
            "answer": [final_answer(c) or "" for c in completions],
            "cut": [len(p) + len(c) > task.max_length for p, c in zip(prompt_ids, completion_ids, strict=True)],
        }

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return next_token_loss_sum(model, batch)

    def metric_sums(self, model: nn.Module, rows: list[dict[str, Any]], device: torch.device) -> Tensor:
        sums = super().metric_sums(model, rows, device)
        longest = max(len(row["prompt_ids"]) for row in rows)
        pad = int(self.tokenizer.pad_token_id or 0)
        ids = torch.tensor([[pad] * (longest - len(r["prompt_ids"])) + r["prompt_ids"] for r in rows], device=device)
        seen = torch.tensor([[0] * (longest - len(r["prompt_ids"])) + [1] * len(r["prompt_ids"]) for r in rows])
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=seen.to(device),
            max_new_tokens=self.recipe.task.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        texts = self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        sums[2] = sum(final_answer(t) == row["answer"] for t, row in zip(texts, rows, strict=True))
        return sums
