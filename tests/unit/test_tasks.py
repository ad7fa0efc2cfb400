"""What a task makes of rows, and of a model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta
from transformers.modeling_outputs import CausalLMOutput

from hyperlora.config import DataConfig, RecipeError
from hyperlora.preflight import inspect
from hyperlora.tasks.base import next_token_loss_sum
from hyperlora.tasks.classification import Classification
from hyperlora.tasks.data import read_rows, survey
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


HUB = """---
configs: [{config_name: default, data_files: [{split: train, path: train.jsonl}]}]
dataset_info:
  features:
    - {name: sentence, dtype: string}
    - name: label
      dtype: {class_label: {names: {"0": "no", "1": "yes"}}}
---
"""


def hub_data(root: Path, revision: str | None = None) -> DataConfig:
    return DataConfig(source="hub", root=str(root), revision=revision, train="train", eval="train")


def test_rows_of_the_hub_without_a_class_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SNLI has some on which the annotators did not agree."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "set"
    root.mkdir()
    (root / "README.md").write_text(HUB)
    labels = (1, -1, 0, -1, 1)
    (root / "train.jsonl").write_text("".join(f'{{"sentence": "row {n}", "label": {n}}}\n' for n in labels))
    found = survey(hub_data(root), "classification", ("train",))["train"]
    assert (found.rows, found.labels) == (3, {"0", "1"})
    # -1 is a label like any other where nothing says that it stands for none.
    (root / "README.md").unlink()
    assert survey(hub_data(root), "classification", ("train",))["train"].labels == {"-1", "0", "1"}


def test_rows_of_the_hub_are_those_of_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_revision(root: str, subset: str | None, split: str, revision: str | None) -> Dataset:
        return Dataset.from_list([{"sentence": f"of {revision}", "label": 0}])

    monkeypatch.setattr("hyperlora.tasks.data.load_dataset", of_revision)
    rows = [next(read_rows(hub_data(Path("a/b"), at), "classification", "train")) for at in (None, "abc123")]
    assert [row["sentence"] for row in rows] == ["of None", "of abc123"]


def test_only_the_hub_has_revisions() -> None:
    with pytest.raises(RecipeError, match=r"data.revision: got 'main'; null for data.source=word-problems"):
        load_recipe("quickstart", ["data.revision=main"])
