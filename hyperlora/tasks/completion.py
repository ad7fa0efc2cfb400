"""Prompt to completion, as instruction tuning has it; the metric is the held-out loss of the completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hyperlora.config import Problem, Recipe, RecipeError, first_line
from hyperlora.tasks.base import IGNORED, TOKENS, Batch, Task, next_token_loss_sum


class Completion(Task):
    """Next-token loss on the completion alone; metric: mean held-out loss in nats per token (lower is better).

    Raises:
        RecipeError: ``task.chat`` for a tokenizer without a chat template, or with one that cannot say a reply alone.
    """

    metric = "held_out_loss"
    higher_is_better = False

    columns = pa.schema([("input_ids", TOKENS), ("labels", TOKENS), ("weight", pa.int32())])

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()) -> None:
        super().__init__(recipe, tokenizer, labels)
        if recipe.task.chat:
            self._turns("Hello", "Hello")

    def encode(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return self._encoded(*self._tokenized(rows))

    def _tokenized(self, rows: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[int]]]:
        """Of the prompts and of the completions."""
        data, task = self.recipe.data, self.recipe.task
        texts = [(str(row[data.prompt]), str(row[data.completion])) for row in rows]
        if task.chat:
            pairs = [self._turns(*row) for row in texts]
        else:
            end = self.tokenizer.eos_token or ""
            pairs = [(task.prompt_format.replace("{prompt}", p), f" {c}{end}") for p, c in texts]
        # A chat template writes the tokens that begin a text itself.
        prompts = self.tokenizer([p for p, _ in pairs], add_special_tokens=not task.chat)["input_ids"]
        return prompts, self.tokenizer([c for _, c in pairs], add_special_tokens=False)["input_ids"]

    def _encoded(self, prompts: list[list[int]], completions: list[list[int]]) -> dict[str, list[Any]]:
        most = self.recipe.task.max_length
        labels = [([IGNORED] * len(p) + c)[:most] for p, c in zip(prompts, completions, strict=True)]
        return {
            "input_ids": [(p + c)[:most] for p, c in zip(prompts, completions, strict=True)],
            "labels": labels,
            "weight": [sum(t != IGNORED for t in row[1:]) for row in labels],
            "cut": [len(p) + len(c) > most for p, c in zip(prompts, completions, strict=True)],
        }

    def _turns(self, prompt: str, completion: str) -> tuple[str, str]:
        """The user's turn with the beginning of the reply, and the rest of the reply."""

        def refused(allowed: str) -> RecipeError:
            return RecipeError([Problem("task.chat", True, f"true for a tokenizer with a chat template: {allowed}")])

        asked = [{"role": "user", "content": prompt}]
        answered = [*asked, {"role": "assistant", "content": completion}]
        try:
            start = str(self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
            whole = str(self.tokenizer.apply_chat_template(answered, tokenize=False))
        except Exception as error:  # a chat template is a program
            raise refused(first_line(error)) from error
        if not whole.startswith(start):
            raise refused("in this one's a reply does not begin as it is asked for")
        return start, whole[len(start) :]

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return next_token_loss_sum(model, batch)

    def metric_value(self, sums: Sequence[float]) -> float:
        return sums[0] / sums[1]
