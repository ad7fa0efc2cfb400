"""Base models that cannot be trained: told before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from refusals import Refused
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from hyperlora.adapters import resolve_path
from pipelines.cli import main

ENCODER = {
    "model_type": "bert",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the small model that ships with the package."""
    return Path(shutil.copytree(resolve_path("builtin:storylm"), tmp_path / "model"))


def pretrained(model: Path) -> list[str]:
    return ["model.init=pretrained", f"model.path={model}", "model.dtype=float32"]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def index(model: Path, **weight_map: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_tensors(path: Path) -> None:
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path)


def drop_tensor(path: Path) -> None:
    save_file({name: tensor for name, tensor in load_file(path).items() if "layers.3.mlp.up" not in name}, path)


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (lambda m: shutil.rmtree(m), "a model folder, a hub name, or builtin:NAME"),
        (lambda m: (m / "config.json").unlink(), "a model folder, a hub name, or builtin:NAME"),
        (lambda m: (m / "config.json").write_text("{"), "a model folder, a hub name, or builtin:NAME"),
        (lambda m: (m / "config.json").write_text("[]"), "a model folder, a hub name, or builtin:NAME"),
        (lambda m: (m / "config.json").write_text('{"model_type": "lama"}'), "a model folder, a hub name"),
        (lambda m: edit(m / "config.json", hidden_size=100), "weights that fit the config ("),
        (lambda m: edit(m / "config.json", num_attention_heads=7), "model.path: got "),
        (lambda m: (m / "model.safetensors").unlink(), "it holds neither model.safetensors nor model.safetensors.in"),
        (lambda m: (m / "model.safetensors").write_bytes(b""), "model.safetensors is no whole safetensors file"),
        (lambda m: shorten(m / "model.safetensors"), "model.safetensors is no whole safetensors file"),
        (lambda m: rename_tensors(m / "model.safetensors"), "tensors belongs to "),
        (lambda m: drop_tensor(m / "model.safetensors"), "all its weights; it lacks model.layers.3.mlp.up_proj.weight"),
        (lambda m: index(m, a="part-1.safetensors"), "part-1.safetensors is missing"),
        (lambda m: index(m, a="../runs/x.safetensors"), "names a file outside its folder: ../runs/x.safetensors"),
        (lambda m: index(m), "names a file outside its folder"),
        (lambda m: (m / "adapter_config.json").write_text("{}"), "this folder holds an adapter, not a base model"),
        (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "a folder or hub name with a tokenizer"),
        (lambda m: (m / "tokenizer.json").write_text("{"), "a folder or hub name with a tokenizer"),
    ],
)
def test_folders(recipe_file: Path, model: Path, refused: Refused, breaks, expected: str) -> None:
    breaks(model)
    message = refused("train", recipe_file, *pretrained(model))
    assert "model.path: got " in message
    assert expected in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["model.init=pretrained", "model.path=./no"], "model.path: got './no'; a model folder"),
        (
            ["model.init=pretrained", "model.path=small.yaml"],
            "small.yaml'; a model folder, a hub name, or builtin:NAME (this is a file)",
        ),
        (["model.path=builtin:nothing", "model.init=pretrained"], "allowed built-in models: builtin:storylm"),
        (["model.path=builtin:../..", "model.init=pretrained"], "allowed built-in models: builtin:storylm"),
        (["model.tokenizer=./no"], "model.tokenizer: got './no'; a folder or hub name with a tokenizer"),
        (["model.architecture.num_attention_heads=5"], "hidden size (32) is not a multiple"),
        (["model.architecture.num_attention_heads=0"], "model.architecture: got {"),
        (["model.config.hidden_size=-8"], "model.config: got {'hidden_size': -8}; a model for task.kind=generation"),
        (["model.config.hidden_act=foo"], "model.config: got {'hidden_act': 'foo'}; a model for task.kind=generation"),
        (["model.config.vocab_size=0"], "a tokenizer of the model, which has 0 tokens"),
        (["model.config.hiddn_size=8"], "model.config.hiddn_size: got 8; a setting of the model; did you mean hidden"),
        (["model.architecture.hiddn_size=8"], "model.architecture.hiddn_size: got 8; a setting of the model"),
        (["model.architecture.model_type=lama"], "model.architecture: got {"),
        (["model.architecture.model_type=clip"], "model.path: got 'none'; a model for task.kind=generation"),
        ([f"model.architecture={ENCODER}"], "task.kind: got 'generation'; classification: bert sees the tokens"),
        (["model.architecture.vocab_size=100"], "model.tokenizer: got 'none'; a tokenizer of the model, which has 100"),
        (
            ["model.architecture.max_position_embeddings=20"],
            "task.max_length: got 96; at most the model's 20 positions",
        ),
        (
            ["model.architecture.max_position_embeddings=100", "task.max_new_tokens=90"],
            "task.max_new_tokens: got 90; at most ",
        ),
        (
            ["adapter.target_modules=[nothing]"],
            "adapter.target_modules: got ('nothing',); modules of the model: act_fn",
        ),
        (
            ["adapter.target_modules=[q_proj, nothing]"],
            "adapter.target_modules: got ('nothing',); modules of the model",
        ),
        (["adapter.target_modules=nothing"], "adapter.target_modules: got 'nothing'; "),
        (["adapter.modules_to_save=[score]"], "adapter.modules_to_save: got ('score',); modules of the model"),
        (["adapter.rank=64", "adapter.target_rank=2"], "rank 64 exceeds a dimension"),
    ],
)
def test_models_and_adapters(recipe_file: Path, refused: Refused, changes: list[str], expected: str) -> None:
    assert expected in refused("train", recipe_file, *changes)


def test_weights_that_a_model_lacks_have_to_be_learned(recipe_file: Path, tmp_path: Path, refused: Refused) -> None:
    """A BERT without its pooler, which is above the layers: transformers makes a new one, whose values nobody keeps."""
    base = BertModel(BertConfig(**{k: v for k, v in ENCODER.items() if k != "model_type"}), add_pooling_layer=False)
    base.save_pretrained(tmp_path / "encoder")
    for file in Path(resolve_path("builtin:storylm")).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "encoder")
    changes = ["task.kind=classification", "data.source=entailment", "data.text=sentence1", "data.text_pair=sentence2"]
    changes += ["task.max_length=64", "adapter.target_rank=4", "training.steps=2", *pretrained(tmp_path / "encoder")]
    message = refused("train", recipe_file, *changes)
    assert (
        "adapter.modules_to_save: got (); also the modules of bert.pooler.dense.bias, bert.pooler.dense.we" in message
    )
    assert main(["train", str(recipe_file), *changes, "adapter.modules_to_save=[pooler]"]) == 0


def test_model_and_data_are_told_at_once(recipe_file: Path, tmp_path: Path, refused: Refused) -> None:
    data = ["data.source=files", f"data.root={tmp_path}", "data.train=none.jsonl", "data.eval=none.jsonl"]
    message = refused("train", recipe_file, "model.init=pretrained", "model.path=./no", *data)
    assert "3 problems: model.path: got './no'" in message
    assert "data.train: got " in message
    assert "data.eval: got " in message
