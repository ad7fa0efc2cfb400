"""The recipes of a paper say what its authors published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from transformers import AutoModelForSequenceClassification

from hyperlora.adapters import attach, load_config, load_tokenizer
from hyperlora.factors import adapted_modules
from pipelines.common import load_recipe

#: Training rows; those of WNLI are of the public split of its 635 rows into 565 and 70.
RTE, WNLI = 2490, 565
LINEARS = {f"attention.self.{name}" for name in ("query", "key", "value")}
LINEARS |= {"attention.output.dense", "intermediate.dense", "output.dense"}


@pytest.mark.parametrize("model", ["roberta-base", "deberta-v3-base"])
@pytest.mark.parametrize(
    ("task", "rows", "steps", "start", "final"),
    [("rte", RTE, 3850, 600, 1800), ("wnli", WNLI, 850, 130, 390)],
)
def test_glue_has_the_budget_and_the_rates_of_the_adalora_authors(
    model: str, task: str, rows: int, steps: int, start: int, final: int
) -> None:
    """RTE as in arXiv 2303.10512, table 10, and the authors' script for DeBERTa; WNLI in proportion to T."""
    recipe = load_recipe(f"{model}-{task}", ["model.init=random"])
    assert recipe.total_steps(rows) == steps
    adapter, optimizer, pruning = recipe.adapter, recipe.optimizer, recipe.resolved_pruning(steps)
    assert (adapter.rank, recipe.target_rank, adapter.alpha, adapter.dropout) == (2, 1, 32, 0)
    assert (optimizer.lr, optimizer.weight_decay, recipe.gamma) == (1.2e-3, 0.01, 0.3)
    assert (optimizer.schedule, round(optimizer.warmup * 3850)) == ("linear", 200)
    assert (recipe.training.batch_size, recipe.training.epochs, recipe.task.max_length) == (32, 50, 320)
    assert (pruning.schedule, pruning.interval, pruning.start, pruning.final) == ("cubic", 1, start, final)
    assert (pruning.start / steps, pruning.final / steps) == pytest.approx((600 / 3850, 1800 / 3850), rel=0.02)
    assert (pruning.score, pruning.beta1, pruning.beta2) == ("adalora", 0.85, 0.85)
    assert list(recipe.model.config.values()) == [0.2], "dropout of the classifier"
    with torch.device("meta"):
        base = AutoModelForSequenceClassification.from_config(load_config(recipe.model, num_labels=2))
        modules = adapted_modules(attach(base, recipe, 2, steps), "default")
    assert len(modules) == 72, "and none of the head"
    for layer in range(12):
        assert {m.short_name.removesuffix("_proj") for m in modules if m.layer == layer} == LINEARS


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """DeBERTa-v3's repositories have no other."""
    text = tmp_path / "text"
    text.write_text("\n".join(f"the cat number {n} saw {7 * n} dogs" for n in range(300)))
    special = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    pieces = {f"{name}_piece": piece for name, piece in special.items()}
    ids = {f"{name}_id": n for n, name in enumerate(special)}
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spm"), vocab_size=60, minloglevel=2, **pieces, **ids
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    tokenizer = load_tokenizer(load_recipe("deberta-v3-base-rte", [f"model.path={tmp_path}"]).model)
    encoded = tokenizer("the cat", "dogs")
    assert tokenizer.decode(encoded["input_ids"]) == "[CLS] the cat[SEP] dogs[SEP]"
    assert tokenizer.pad_token == "[PAD]"
