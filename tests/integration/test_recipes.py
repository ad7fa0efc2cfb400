"""Every shipped recipe through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.common import load_recipe, shipped

GENERATED = ("quickstart", "quickstart-entailment")
# The real models' recipes without weights or files: their own architectures, generated rows of the same task family.
ROWS = {
    "classification": ["data.source=entailment", "data.text=sentence1", "data.text_pair=sentence2"],
    "generation": ["data.source=word-problems"],
    "language-modeling": ["data.source=word-problems"],
}
SMALL = ("hidden_size=64", "intermediate_size=96", "num_hidden_layers=2", "num_attention_heads=4", "vocab_size=1024")
REDUCED = {
    "llama-3.1-8b": (*SMALL, "num_key_value_heads=2"),
    "qwen2.5-7b": (*SMALL, "num_key_value_heads=2"),
    "qwen2.5-14b": (*SMALL, "num_key_value_heads=2"),
    "roberta-base-rte": SMALL,
    "deberta-v3-base-wnli": (*SMALL, "pooler_hidden_size=64"),
}


def changes_for(name: str, kind: str) -> list[str]:
    if name in GENERATED:
        return []
    changes = [*ROWS[kind], "data.train_rows=2000", "data.eval_rows=8", "data.labels=[]"]
    if name not in ("minilm-sst2", "gsm8k-storylm"):
        changes += ["model.init=random"]
    return changes


@pytest.mark.parametrize("name", shipped())
def test_recipe_is_valid(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, [])
    changes = changes_for(name, recipe.task.kind)
    if name == "minilm-sst2":
        changes += ["model.path=builtin:storylm", "adapter.modules_to_save=[score]"]
    summary = tmp_path / "dry.json"
    assert main(["train", name, "--dry-run", "--json", str(summary), *changes]) == 0
    estimate = json.loads(summary.read_text())["estimate"]
    assert 0 < estimate["rank_target"] < estimate["rank_initial"]
    expected = {
        "llama-3.1-8b": (8_030_261_248, 224),
        "qwen2.5-7b": (7_615_616_512, 196),
        "qwen2.5-14b": (14_770_033_664, 336),
    }
    if name in expected:
        assert (estimate["base_parameters"], estimate["modules"]) == expected[name]


@pytest.mark.parametrize("name", REDUCED)
def test_real_architectures_train_reduced(name: str, tmp_path: Path) -> None:
    kind = load_recipe(name, []).task.kind
    sizes = [f"model.config.{change}" for change in REDUCED[name]]
    changes = [*changes_for(name, kind), *sizes, "training.epochs=null", "training.steps=12", "pruning.start=2"]
    changes += ["data.train_rows=64", "pruning.final=4", "pruning.interval=1", "training.eval_before=false"]
    changes += ["ray.backend=local", "ray.num_workers=1", "ray.gpus_per_worker=0", "hypernetwork.hidden_size=24"]
    changes += ["task.max_length=96", "task.max_new_tokens=4", "hypernetwork.heads=2", "mlflow.enabled=false"]
    changes += [f"storage.uri={tmp_path}"]
    summary = tmp_path / "out.json"
    assert main(["train", name, "--json", str(summary), *changes]) == 0
    result = json.loads(summary.read_text())
    assert result["rank_final"] == result["rank_target"] < result["rank_initial"]


def test_recipes_are_listed(tmp_path: Path) -> None:
    assert main(["recipes", "--json", str(tmp_path / "r.json")]) == 0
    listed = {row["name"] for row in json.loads((tmp_path / "r.json").read_text())}
    assert listed == set(shipped())
