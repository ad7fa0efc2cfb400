"""Completions: the loss leaves the prompt out, and chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from hyperlora.adapters import load_tokenizer
from hyperlora.config import RecipeError, parse
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


def test_what_a_chat_has_no_use_for_is_refused() -> None:
    recipe = load_recipe("quickstart", []).model_dump(mode="json")
    for kind in ("language-modeling", "generation"):
        with pytest.raises(RecipeError) as refused:
            parse(recipe | {"task": {"kind": kind, "chat": True, "prompt_format": "Q: {prompt}"}})
        fields = [p.field for p in refused.value.problems]
        assert fields == (["task.chat"] if kind == "language-modeling" else []) + ["task.prompt_format"]
