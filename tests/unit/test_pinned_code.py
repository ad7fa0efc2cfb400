"""A model with code of its own: every loader runs that of the commit that the recipe names. No hub is asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import dynamic_module_utils

from hyperlora import adapters
from hyperlora.config import Recipe, parse

READ, OTHER = "a" * 40, "b" * 40
NAME = "someone/own"
#: ``commit`` tells which one was run.
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own"
    commit = "{commit}"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    commit = "{commit}"

class OwnTokenizer(PreTrainedTokenizerFast):
    commit = "{commit}"
"""
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(params=["", "someone/code--"], ids=["beside", "elsewhere"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repositories of two commits, as the hub's cache has them; ``main`` is the one that nobody read.

    The code lies beside the weights, or in a repository of its own.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    where = request.param
    auto = {"AutoConfig": f"{where}own.OwnConfig", "AutoModelForCausalLM": f"{where}own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto, **SHAPE}
    tokenizer = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, f"{where}own.OwnTokenizer"]},
        "eos_token": "<|endoftext|>",
    }
    weights = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).state_dict()
    words = Path(adapters.resolve_path("builtin:storylm"), "tokenizer.json").read_text(encoding="utf-8")
    for commit in (READ, OTHER):
        for repository in ("own", "code"):
            (tmp_path / f"hub/models--someone--{repository}/snapshots/{commit}").mkdir(parents=True)
            (tmp_path / f"hub/models--someone--{repository}/refs").mkdir(exist_ok=True)
            (tmp_path / f"hub/models--someone--{repository}/refs/main").write_text(OTHER)
        folder = tmp_path / f"hub/models--someone--own/snapshots/{commit}"
        code = tmp_path / f"hub/models--someone--code/snapshots/{commit}" if where else folder
        (code / "own.py").write_text(CODE.format(commit=commit))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer.json").write_text(words, encoding="utf-8")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def recipe(**model: Any) -> Recipe:
    given = {"path": NAME, "revision": READ, "trust_remote_code": True, **model}
    data = {"source": "word-problems", "train_rows": 8, "eval_rows": 8}
    content = {"model": given, "task": {"kind": "generation"}, "data": data, "training": {"steps": 1}}
    return parse({"name": "own", **content})


def test_config_tokenizer_and_model_run_the_code_of_the_commit(hub: None) -> None:
    given = recipe()
    config, tokenizer = adapters.load_config(given.model), adapters.load_tokenizer(given.model)
    base = adapters.build_base(given, tokenizer, None)
    assert [type(x).__name__ for x in (config, tokenizer, base)] == ["OwnConfig", "OwnTokenizer", "OwnModel"]
    assert [x.commit for x in (config, tokenizer, base, base.config)] == 4 * [READ]


def test_code_is_not_run_where_the_recipe_does_not_say_so(hub: None) -> None:
    given = recipe(trust_remote_code=False)
    for load in (adapters.load_config, adapters.load_tokenizer):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(given.model)


def test_a_tokenizer_of_another_repository_brings_no_code(hub: None) -> None:
    """The commit is the model's: nothing pins the code of another."""
    given = recipe(path="someone/other", tokenizer=NAME)
    with pytest.raises(ValueError, match="trust_remote_code"):
        adapters.load_tokenizer(given.model)
