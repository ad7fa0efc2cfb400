"""Final answers, greedy decoding, and completions that are longer than what is generated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hyperlora.adapters import load_tokenizer
from hyperlora.config import parse
from hyperlora.packed import Packed, write
from hyperlora.preflight import _notes
from hyperlora.tasks.generation import Generation, final_answer, same_answer
from pipelines.common import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 3 = 5 #### 5", "5"),
        ("####5", "5"),
        ("####\n5", "5"),
        ("#### -5", "-5"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### $5", "5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### **5**", "5"),
        ("#### *$1,234.50*", "1234.50"),
        ("#### 1,234,567", "1234567"),
        ("#### .5", ".5"),
        ("#### 5.", "5"),
        ("#### 5, as said", "5"),
        ("#### 5%", "5"),
        ("#### 5 apples\n6", "5"),
        ("#### Steps\n#### 5", "5"),
        ("#### 5\nQuestion: more?\nAnswer: #### 6", "5"),
        ("#### 3/4", None),
        ("#### 3 / 4", None),
        ("#### 13/4", None),
        ("#### 1e5", None),
        ("#### 12e5", None),
        ("#### 5x", None),
        ("#### 5_0", None),
        ("#### 5^2", None),
        ("#### 5+1", None),
        ("#### 5*2", None),
        ("#### 5-6", None),
        ("#### 5\N{EN DASH}6", None),
        ("#### 5:30", None),
        ("#### 1.2.3", None),
        ("#### 1.234,5", None),
        ("#### 3/4\n#### 5", None),
        ("#### x", None),
        ("5", None),
    ],
)
def test_a_final_answer_is_one_whole_number(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


def test_answers_are_compared_by_value() -> None:
    assert same_answer("5.0", "5")
    assert same_answer("-0", "0")
    assert same_answer(final_answer("#### 1,000.50"), "1000.5")
    assert not same_answer("5", "-5")
    large = 10**40
    assert not same_answer(str(large), str(large + 1))
    assert not same_answer(None, "")
    assert not same_answer("5", "")
    assert not same_answer(None, "5")


def generation(*changes: str) -> Generation:
    recipe = load_recipe("quickstart", list(changes))
    return Generation(recipe, load_tokenizer(recipe.model))


def rows_of(task: Generation, *rows: tuple[str, str]) -> list[dict[str, Any]]:
    columns = task.encode([{"question": question, "answer": answer} for question, answer in rows])
    return [{name: columns[name][n] for name in task.columns.names} for n in range(len(rows))]


def test_the_expected_answer_is_the_last_of_a_completion() -> None:
    (row,) = rows_of(generation(), ("How many?", "#### 2 apples, then 3 more #### 5"))
    assert row["answer"] == "5"


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=434, initializer_range=0.5, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def likeliest(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generated(task: Generation, model: nn.Module, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that an evaluation generates."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(task.tokenizer, "batch_decode", lambda ids, **how: [str(seen.append(ids))])
    with torch.no_grad():
        task.metric_sums(model, [row], torch.device("cpu"))
    return seen[-1][0].tolist()


@pytest.mark.parametrize("adapted", [False, True])
def test_evaluation_is_plain_greedy_decoding(
    model: LlamaForCausalLM, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = generation("task.max_new_tokens=8")
    (row,) = rows_of(task, ("How many?", "#### 5"))
    expected = likeliest(model, row["prompt_ids"], 8)
    assert len(set(expected)) < len(expected), "or penalties of repetition would do nothing"
    inherited = {
        "repetition_penalty": {"repetition_penalty": 5.0},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "suppress_tokens": {"suppress_tokens": expected[:1]},
        "num_beams": {"num_beams": 3, "num_return_sequences": 3},
        "sampling": {"do_sample": True, "temperature": 5.0, "top_p": 0.9},
    }
    whole = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if adapted else model
    for name, values in inherited.items():
        model.generation_config = config = GenerationConfig(**values)
        assert generated(task, whole.eval(), row, monkeypatch) == expected, name
        assert model.generation_config is config


def test_generation_stops_at_the_models_own_end_and_the_tokenizers(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = generation("task.max_new_tokens=8")
    (row,) = rows_of(task, ("How many?", "#### 5"))
    (end,) = likeliest(model, row["prompt_ids"], 1)
    for own in (end, [400, end]):
        model.generation_config = GenerationConfig(eos_token_id=own)
        assert generated(task, model, row, monkeypatch) == [end]
    model.generation_config = GenerationConfig(eos_token_id=400)
    task.tokenizer.eos_token = task.tokenizer.convert_ids_to_tokens(end)
    assert generated(task, model, row, monkeypatch) == [end]


def test_completions_that_generation_cannot_end_are_told(tmp_path: Path) -> None:
    task = generation()
    completion = "1 + 2 = 3 #### 3"
    tokens = len(task.tokenizer(f" {completion}", add_special_tokens=False)["input_ids"])
    short, longer = ({"question": "How many?", "answer": f"{more}{completion}"} for more in ("", "1 + 1 = 2, "))
    for limit, expected in ((tokens, 2), (tokens - 1, 3)):
        task = generation(f"task.max_new_tokens={limit}")
        parts = {"train": iter([longer]), "eval": iter([short, longer, longer])}
        write(tmp_path, parts, task.columns, task.encode, (), print)
        packed = Packed(tmp_path, json.loads((tmp_path / "rows.json").read_text()))
        note = f"{expected} of 3 held-out completions are longer than task.max_new_tokens={limit}"
        assert _notes(task.recipe, packed) == [f"{note}, where generation stops"]


def test_the_readmes_recipe_generates_as_much_as_the_shipped_one() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert parse(shown).task == load_recipe("qwen2.5-7b", ["data.root=x"]).task
