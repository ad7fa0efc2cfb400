"""Prompt to completion with an exact final answer, in the form of GSM8K (arXiv 2110.14168): ``#### n`` ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig

from hyperlora.tasks.base import TOKENS, Task
from hyperlora.tasks.completion import Completion

#: Sign, number, and what makes it another number or none: 3/4, 1e5, 5-6, 1.2.3.
_FINAL = re.compile(
    r"####[\s$*]*(?:([-\N{MINUS SIGN}])[$*]*)?(\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
    r"([\w^=+]| ?/|[.,:*\N{MINUS SIGN}\N{EN DASH}-]\d)?"
)


def final_answer(text: str, *, last: bool = False) -> str | None:
    """The number after the first ``####``, or the last, without thousands separators; None if there is none."""
    found = list(_FINAL.finditer(text))
    if not found:
        return None
    sign, number, more = found[-1 if last else 0].groups()
    return None if more else ("-" if sign else "") + number.replace(",", "")


def same_answer(found: str | None, expected: str) -> bool:
    """Whether two final answers are one number; an empty one is none."""
    if not found or not expected:
        return False
    return Decimal(found) == Decimal(expected)


class Generation(Completion):
    """Loss on the completion alone; metric: share of held-out rows whose final answer, decoded greedily, is right."""

    metric = "exact_match"
    higher_is_better = True

    columns = pa.schema([*Completion.columns, ("prompt_ids", TOKENS), ("answer", pa.string())])

    def encode(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        prompts, completions = self._tokenized(rows)
        most = self.recipe.task.max_new_tokens
        return self._encoded(prompts, completions) | {
            "prompt_ids": prompts,
            "answer": [final_answer(str(row[self.recipe.data.completion]), last=True) or "" for row in rows],
            # An answer is whole without the end token.
            "long": [len(c) - bool(self.tokenizer.eos_token) > most for c in completions],
        }

    def metric_sums(self, model: nn.Module, rows: list[dict[str, Any]], device: torch.device) -> Tensor:
        sums = super().metric_sums(model, rows, device)
        longest = max(len(row["prompt_ids"]) for row in rows)
        pad = int(self.tokenizer.pad_token_id or 0)
        ids = torch.tensor([[pad] * (longest - len(r["prompt_ids"])) + r["prompt_ids"] for r in rows], device=device)
        seen = torch.tensor([[0] * (longest - len(r["prompt_ids"])) + [1] * len(r["prompt_ids"]) for r in rows])
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        inherited = base.generation_config
        own = inherited.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        if self.reply_end is not None:
            ends.add(self.tokenizer.convert_tokens_to_ids(self.reply_end))
        greedy = GenerationConfig(
            max_new_tokens=self.recipe.task.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
        )
        # What it is not told, generate takes from the model's own: bans, penalties, beams.
        base.generation_config = greedy
        try:
            output = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=seen.to(device), generation_config=greedy
            )
        finally:
            base.generation_config = inherited
        texts = self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        sums[2] = sum(same_answer(final_answer(t), row["answer"]) for t, row in zip(texts, rows, strict=True))
        return sums

    def metric_value(self, sums: Sequence[float]) -> float:
        return Task.metric_value(self, sums)
