"""What a task makes of rows, and of a model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets import Image as Decoded
from PIL import Image
from tokenizers.processors import ByteLevel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    RobertaConfig,
)
from transformers import RobertaForSequenceClassification as Roberta
from transformers.modeling_outputs import CausalLMOutput

from hyperlora.adapters import resolve_path
from hyperlora.config import DataConfig, RecipeError
from hyperlora.preflight import inspect
from hyperlora.tasks import shared_rows
from hyperlora.tasks.base import next_token_loss_sum
from hyperlora.tasks.classification import Classification
from hyperlora.tasks.data import read_rows, same_rows, survey
from hyperlora.training import RunInfo, Silent, Trainer, World
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


def test_the_estimate_counts_the_largest_share_of_a_batch() -> None:
    few = ["data.train_rows=64", "data.eval_rows=8", "training.batch_size=32", "training.eval_batch_size=1"]
    found = [
        inspect(load_recipe("quickstart", [*few, f"ray.num_workers={n}", "training.gradient_accumulation=4"]))
        for n in ("[3,8]", "2", "4")
    ]
    shared, larger, smaller = (estimate.activation_bytes for estimate in found)
    # 32 rows in 12 passes, of 2 or 3 rows each.
    assert (2 * shared, 2 * larger) == (3 * smaller, 4 * smaller)


def test_the_estimate_counts_keys_and_values_of_an_evaluation() -> None:
    """Of the answers where they are long, and beside the logits of the loss where they are not."""
    few = ["data.train_rows=64", "data.eval_rows=8", "training.eval_batch_size=1000000"]

    def found(*changes: str) -> int:
        return inspect(load_recipe("quickstart", [*few, *changes])).activation_bytes

    config = AutoConfig.from_pretrained(resolve_path("builtin:storylm"))
    head = config.hidden_size // config.num_attention_heads
    token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * head
    long, longer = (found("task.max_length=512", f"task.max_new_tokens={n}") for n in (400, 410))
    assert longer - long == 10**7 * token
    loss = found("task.kind=language-modeling")
    rows = (loss // 10**6) / (4 * config.vocab_size + token)
    assert rows == int(rows) > 10, "tokens of the longest row"


def test_a_padding_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    """No row has it: the first batch of unequal rows would."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("builtin:storylm"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    recipe = load_recipe("quickstart", ["data.train_rows=64", "data.eval_rows=8", f"model.tokenizer={tmp_path}"])
    with pytest.raises(RecipeError, match=r"model.tokenizer.*has 434 tokens: this one gives number 434"):
        inspect(recipe)


def test_rows_without_text_are_noted_and_a_batch_of_them_moves_nothing(tmp_path: Path) -> None:
    """A third of WikiText's rows are blank; many tokenizers begin a text with no token of their own."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("builtin:storylm"))
    tokenizer.backend_tokenizer.post_processor = ByteLevel()
    tokenizer.save_pretrained(tmp_path)
    texts = [*["the cat sat on the mat"] * 12, *[""] * 12]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n' * 12)
    changes = ["task.kind=language-modeling", "data.source=files", f"data.root={tmp_path}", "data.template='{text}'"]
    changes += ["data.train=rows.jsonl", "data.eval=rows.jsonl", "data.train_rows=null", "data.eval_rows=null"]
    changes += [
        f"model.tokenizer={tmp_path}",
        "training.batch_size=8",
        "ray.num_workers=1",
        "hypernetwork.hidden_size=24",
        "hypernetwork.heads=2",
    ]
    recipe = load_recipe("quickstart", changes)
    notes = inspect(recipe).notes
    assert [note for note in notes if "text" in note] == [
        "12 of 24 training rows have no text",
        "12 of 24 held-out rows have no text",
    ]
    trainer = Trainer(recipe, RunInfo(str(tmp_path / "run")), World(), Silent())
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert trainer.train_step(list(range(12, 20))).read()["loss"] == 0
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert trainer.train_step(list(range(8, 16))).read()["loss"] > 0
    with pytest.raises(RecipeError, match="rows with something to learn: 12 of 12 have no text"):
        inspect(load_recipe("quickstart", [*changes, "data.train=blank.jsonl"]))


def test_workers_have_the_rows_where_the_driver_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = load_recipe("quickstart", ["storage.uri=out", "hypernetwork.init_from=~/runs/first"]).with_absolute_paths()
    monkeypatch.chdir("/")
    assert shared_rows(recipe) == str(tmp_path / "out/rows")
    assert recipe.hypernetwork.init_from == str(tmp_path / "home/runs/first")
    bucket = load_recipe("quickstart", ["storage.uri=s3://bucket/out"]).with_absolute_paths()
    assert bucket.storage.uri == "s3://bucket/out"


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


def test_an_image_beside_the_text_is_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    columns = {"sentence": ["a", "b"], "label": [0, 1], "image": [str(tmp_path / "one.png")] * 2}
    rows = Dataset.from_dict(columns).cast_column("image", Decoded())
    monkeypatch.setattr("hyperlora.tasks.data.load_dataset", lambda *_, **__: rows)
    kept = list(rows)  # so that the next ones lie elsewhere
    found = survey(hub_data(tmp_path), "classification", ("train",))["train"]
    read = list(same_rows(hub_data(tmp_path), "classification", "train", found))
    assert [row["sentence"] for row in read] == ["a", "b"]
    assert str(kept[0]["image"]) != str(read[0]["image"])


def test_rows_of_the_hub_are_those_of_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_revision(root: str, subset: str | None, split: str, revision: str | None) -> Dataset:
        return Dataset.from_list([{"sentence": f"of {revision}", "label": 0}])

    monkeypatch.setattr("hyperlora.tasks.data.load_dataset", of_revision)
    rows = [next(read_rows(hub_data(Path("a/b"), at), "classification", "train")) for at in (None, "abc123")]
    assert [row["sentence"] for row in rows] == ["of None", "of abc123"]


def test_only_the_hub_has_revisions() -> None:
    with pytest.raises(RecipeError, match=r"data.revision: got 'main'; null for data.source=word-problems"):
        load_recipe("quickstart", ["data.revision=main"])
