"""Explained variance adaptation: what it looks at, and what it leaves behind."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertTokenizerFast

from hyperlora.adapters import build_model, load_tokenizer
from hyperlora.baselines import UnequalLoRA
from hyperlora.config import Recipe
from hyperlora.eva import redistribute_ranks
from hyperlora.export import plain_adapter
from hyperlora.tasks import Task, build_task
from pipelines.common import load_recipe

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = list(range(64))


@pytest.fixture(autouse=True)
def rows_are_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))


def built(name: str, folder: Path, model_type: str, *changes: str) -> tuple[Recipe, Task, PeftModel]:
    """A task of 64 rows and a model of two layers with made-up weights, before its ranks move."""
    architecture = ["model.init=random", f"model.architecture.model_type={model_type}", "pruning.schedule=none"]
    architecture += ["model.architecture.vocab_size=1024", *(f"model.architecture.{k}={v}" for k, v in SIZES.items())]
    small = ["data.train_rows=64", "data.eval_rows=8", "training.batch_size=8", "ray.num_workers=1", "adapter.rank=4"]
    recipe = load_recipe(name, ["method=eva", f"storage.uri={folder}", *architecture, *small, *changes])
    tokenizer = load_tokenizer(recipe.model)
    task = build_task(recipe, tokenizer)
    return recipe, task, build_model(recipe, tokenizer, task.num_labels, CPU, recipe.total_steps(64))


def test_adapters_of_a_bfloat16_base_stay_in_float32(tmp_path: Path) -> None:
    recipe, task, model = built("quickstart", tmp_path, "llama", "model.dtype=bfloat16")
    redistribute_ranks(model, recipe, task, ROWS, CPU)
    weights = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert {len(p) for name, p in weights.items() if ".lora_A." in name} - {4}, "no rank has changed"
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert all(p.requires_grad for p in weights.values())
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_it_sees_the_activations_of_training_for_a_pair(tmp_path: Path) -> None:
    """A BERT tells a pair's sentences apart, and what flows into its modules depends on that."""
    letters = string.ascii_lowercase
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "."]))
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("".join(f"\n##{letter}" for letter in letters))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(str(tmp_path / "tokenizer"))
    changes = [f"model.tokenizer={tmp_path / 'tokenizer'}", "adapter.modules_to_save=[classifier]"]
    recipe, task, model = built("quickstart-entailment", tmp_path, "bert", *changes, "model.dtype=float32")
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    model.eval().base_model.model.bert.encoder.register_forward_pre_hook(look)
    redistribute_ranks(model, recipe, task, ROWS, CPU)
    first = seen[0]
    batch = task.collate([task.train[n] for n in ROWS[: len(first)]], CPU)
    assert batch["token_type_ids"].any()
    with torch.no_grad():
        task.loss_sum(model, batch)
    torch.testing.assert_close(first, seen[-1])


def test_an_adapter_that_is_packed_later_is_that_of_its_step(tmp_path: Path) -> None:
    """A checkpoint is packed in another thread while training goes on."""
    _, _, model = built("quickstart", tmp_path, "llama", "model.dtype=float32")
    optimizer = UnequalLoRA(model, lr=1e-2)
    taken = plain_adapter(model, optimizer)
    then = {name: (a.clone(), b.clone()) for name, (a, b) in taken.pairs.items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    now = plain_adapter(model, optimizer)
    for name, (a, b) in taken.pairs.items():
        assert torch.equal(a, then[name][0])
        assert torch.equal(b, then[name][1])
        assert not torch.equal(a, now.pairs[name][0])
