"""Prompt to completion, as instruction tuning has it; the metric is the held-out loss of the completions."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from hyperlora.config import Problem, Recipe, RecipeError, first_line
from hyperlora.tasks.base import IGNORED
from hyperlora.tasks.language_modeling import LanguageModeling

#: Comes before a chat template: one that writes a date writes Llama's own, which it has where it knows none. The same
#: rows are the same tokens tomorrow.
UNDATED = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"


def _no_chat(why: str) -> RecipeError:
    return RecipeError([Problem("task.chat", True, f"true for a tokenizer with a chat template: {why}")])


class Completion(LanguageModeling):
    """Next-token loss on the completion alone; metric: mean held-out loss in nats per token (lower is better).

    Raises:
        RecipeError: ``task.chat`` for a tokenizer without a chat template, or with one that cannot say a reply alone.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()) -> None:
        super().__init__(recipe, tokenizer, labels)
        if recipe.task.chat:
            self.reply_end = self._end_of(self._turns("Hello", "Hello")[1])

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

    def _end_of(self, reply: str) -> str:
        """The token that ends a turn, which is not always the tokenizer's own: base models have another one."""
        special = {*self.tokenizer.all_special_ids}
        special |= {n for n, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ids = self.tokenizer([reply], add_special_tokens=False)["input_ids"][0]
        end = next((n for n in ids if n in special), None)
        if end is None:
            raise _no_chat("in this one's no special token ends a reply")
        return str(self.tokenizer.convert_ids_to_tokens(end))

    def _turns(self, prompt: str, completion: str) -> tuple[str, str]:
        """The user's turn with the beginning of the reply, and the rest of the reply."""
        asked = [{"role": "user", "content": prompt}]
        answered = [*asked, {"role": "assistant", "content": completion}]
        try:
            template = UNDATED + self.tokenizer.get_chat_template()
            written = partial(self.tokenizer.apply_chat_template, chat_template=template, tokenize=False)
            start, whole = str(written(asked, add_generation_prompt=True)), str(written(answered))
        except Exception as error:  # a chat template is a program
            raise _no_chat(first_line(error)) from error
        if not whole.startswith(start):
            raise _no_chat("in this one's a reply does not begin as it is asked for")
        return start, whole[len(start) :]
