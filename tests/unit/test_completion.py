"""Completions: the loss leaves the prompt out, and chat templates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hyperlora.adapters import load_tokenizer
from hyperlora.config import RecipeError, parse
from hyperlora.preflight import _chat_notes
from hyperlora.tasks.completion import Completion
from hyperlora.tasks.generation import Generation
from pipelines.common import load_recipe

TURN = "<{{ m['role'] }}>{{ m['content'] }}</s>"
CHAT = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
ROWS = [{"question": "How many?", "answer": "Two #### 2"}, {"question": "And you?", "answer": "I am well. #### 7"}]


def tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    found = load_tokenizer(load_recipe("quickstart", []).model)
    found.chat_template = template
    return found


def completion(*changes: str, template: str | None = None, kind: str = "completion") -> Completion:
    recipe = load_recipe("quickstart", [f"task.kind={kind}", *changes])
    return (Generation if kind == "generation" else Completion)(recipe, tokenizer(template))


def learned(task: Completion, rows: list[dict[str, Any]]) -> list[str]:
    """What the loss is of, row by row."""
    labels = task.encode(rows)["labels"]
    return [task.tokenizer.decode([t for t in row if t != -100]) for row in labels]


def test_the_loss_is_of_the_completion_alone() -> None:
    task = completion()
    end = task.tokenizer.eos_token
    assert learned(task, ROWS) == [f" Two #### 2{end}", f" I am well. #### 7{end}"]
    columns = task.encode(ROWS)
    assert [task.tokenizer.decode(ids) for ids in columns["input_ids"]] == [
        f"<s>Question: How many?\nAnswer: Two #### 2{end}",
        f"<s>Question: And you?\nAnswer: I am well. #### 7{end}",
    ]
    assert columns["weight"] == [sum(t != -100 for t in row) for row in columns["labels"]]
    assert (task.metric, task.higher_is_better) == ("held_out_loss", False)
    assert task.metric_value([6.0, 4.0, 0.0, 2.0]) == 1.5


def test_generation_learns_the_same_and_is_measured_by_answers() -> None:
    task = completion(kind="generation")
    assert learned(task, ROWS) == learned(completion(), ROWS)
    assert (task.metric, task.higher_is_better) == ("exact_match", True)
    assert task.metric_value([6.0, 4.0, 1.0, 2.0]) == 0.5


@pytest.mark.parametrize("kind", ["completion", "generation"])
def test_a_chat_template_writes_both_turns(kind: str) -> None:
    task = completion("task.chat=true", kind=kind, template=CHAT)
    columns = task.encode(ROWS)
    assert learned(task, ROWS) == ["Two #### 2</s>", "I am well. #### 7</s>"]
    whole = [task.tokenizer.decode(ids) for ids in columns["input_ids"]]
    assert whole[0] == "<user>How many?</s><assistant>Two #### 2</s>"
    if kind == "generation":
        assert task.tokenizer.decode(columns["prompt_ids"][0]) == "<user>How many?</s><assistant>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "chat_template"),
        (CHAT.replace("<assistant>", "<bot>"), "a reply does not begin as it is asked for"),
        ("{{ raise_exception('a system turn first') }}", "a system turn first"),
    ],
)
def test_tokenizers_that_cannot_chat_are_refused(template: str | None, why: str) -> None:
    with pytest.raises(RecipeError) as refused:
        completion("task.chat=true", template=template)
    assert "task.chat: got True; true for a tokenizer with a chat template: " in str(refused.value)
    assert why in str(refused.value)


@pytest.mark.parametrize("kind", ["completion", "generation"])
def test_replies_end_as_the_template_says_and_generation_stops_there(kind: str) -> None:
    task = completion("task.chat=true", kind=kind, template=CHAT.replace("</s>", "<pad>\n"))
    assert task.reply_end == "<pad>" != task.tokenizer.eos_token
    assert learned(task, ROWS[:1]) == ["Two #### 2<pad>\n"]
    end = task.tokenizer.convert_tokens_to_ids("<pad>")
    assert _chat_notes(task) == [
        "replies end with <pad>, which is not the tokenizer's own end (</s>): what serves the adapter has to stop there"
    ]
    assert _chat_notes(completion("task.chat=true", kind=kind, template=CHAT)) == []
    if kind == "generation":
        columns = task.encode(ROWS[:1])
        row = {name: values[0] for name, values in columns.items()}
        model = Ending()
        task.metric_sums(model, [row], torch.device("cpu"))
        assert end in model.stops


class Ending(nn.Module):
    """Takes note of where it is told to stop."""

    generation_config = GenerationConfig()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 1024))

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig) -> Tensor:
        self.stops = generation_config.eos_token_id
        return input_ids


def test_a_template_without_an_end_is_refused() -> None:
    with pytest.raises(RecipeError, match="no special token ends a reply"):
        completion("task.chat=true", template=CHAT.replace("</s>", "\n"))


def test_a_template_with_a_date_gives_the_same_rows_on_every_day() -> None:
    dated = "{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    dated += "{{ date_string }} {{ strftime_now('%H') }}" + CHAT
    (ids,) = completion("task.chat=true", template=dated).encode(ROWS[:1])["input_ids"]
    text = tokenizer().decode(ids)
    assert text.startswith("26 Jul 2024 26 Jul 2024<user>")


def test_what_a_chat_has_no_use_for_is_refused() -> None:
    recipe = load_recipe("quickstart", []).model_dump(mode="json")
    for kind in ("language-modeling", "generation"):
        with pytest.raises(RecipeError) as refused:
            parse(recipe | {"task": {"kind": kind, "chat": True, "prompt_format": "Q: {prompt}"}})
        fields = [p.field for p in refused.value.problems]
        assert fields == (["task.chat"] if kind == "language-modeling" else []) + ["task.prompt_format"]
