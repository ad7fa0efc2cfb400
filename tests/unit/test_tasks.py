"""What a task makes of rows, and of a model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta
from transformers.modeling_outputs import CausalLMOutput

from hyperlora.preflight import inspect
from hyperlora.tasks.base import next_token_loss_sum
from hyperlora.tasks.classification import Classification
from pipelines.common import load_recipe

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ROWS = [
    {"sentence1": "a b c", "sentence2": "d", "label": "no"},
    {"sentence1": "b", "sentence2": "c d a b", "label": "yes"},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizerFast:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


def rows_of(task: Classification) -> list[dict[str, Any]]:
    columns = task.encode(ROWS)
    del columns["cut"]
    assert set(columns) == set(task.columns.names)
    return [{name: values[n] for name, values in columns.items()} for n in range(len(ROWS))]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_pair_is_classified_as_it_is_served(tokenizer: BertTokenizerFast, kind: str) -> None:
    """With the segments that the tokenizer gives, where the model knows any."""
    recipe = load_recipe("quickstart-entailment", ["data.text=sentence1", "data.text_pair=sentence2"])
    task = Classification(recipe, tokenizer, ("no", "yes"))
    torch.manual_seed(0)
    if kind == "bert":
        model: nn.Module = BertForSequenceClassification(BertConfig(vocab_size=9, **SIZES))
    else:
        model = Roberta(RobertaConfig(vocab_size=9, type_vocab_size=1, pad_token_id=0, **SIZES))
    texts, pairs = ([row[name] for row in ROWS] for name in ("sentence1", "sentence2"))
    served = dict(tokenizer(texts, pairs, padding=True, return_tensors="pt"))
    assert served["token_type_ids"].any()
    if kind == "roberta":
        del served["token_type_ids"]
    with torch.no_grad():
        logits = model.eval()(**served).logits
        found = task.loss_sum(model, task.collate(rows_of(task), torch.device("cpu")))
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 1]), reduction="sum")
    torch.testing.assert_close(found, expected)


def test_single_sentences_have_no_segments(tokenizer: BertTokenizerFast) -> None:
    recipe = load_recipe("quickstart-entailment", ["data.text=sentence1", "data.text_pair=null"])
    task = Classification(recipe, tokenizer, ("no", "yes"))
    assert "token_type_ids" not in task.collate(rows_of(task), torch.device("cpu"))


class Logits(nn.Module):
    """A language model that says the same whatever it is given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits)


class Largest(TorchDispatchMode):
    """The largest float32 tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_an_evaluation_makes_no_float32_copy_of_all_logits() -> None:
    rows, length, vocabulary = 8, 6, 50
    torch.manual_seed(0)
    logits = torch.randn(rows, length, vocabulary, dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (rows, length))
    labels[:, 4:] = -100
    batch = {"input_ids": labels, "attention_mask": labels, "labels": labels}
    trained = next_token_loss_sum(Logits(logits), batch)
    with torch.no_grad(), Largest() as largest:
        evaluated = next_token_loss_sum(Logits(logits), batch)
    torch.testing.assert_close(evaluated, trained)
    assert largest.numbers == (length - 1) * vocabulary


def test_the_estimate_counts_the_logits_of_an_evaluation() -> None:
    few = ["data.train_rows=64", "data.eval_rows=8"]
    found = [
        inspect(load_recipe("quickstart", [*few, f"training.eval_batch_size={n}"])).activation_bytes
        for n in (1, 2, 10**6, 2 * 10**6)
    ]
    assert found[0] == found[1], "training needs more"
    assert found[3] == 2 * found[2]
