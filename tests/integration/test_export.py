"""The adapter is a plain PEFT LoRA adapter that computes what was trained."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import run_card
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hyperlora.adapters import build_base, load_tokenizer
from hyperlora.config import Recipe, parse, read_yaml
from hyperlora.training import RunInfo, Silent, Trainer, World
from pipelines.cli import main

ENTAILMENT = {
    "task__kind": "classification",
    "data__source": "entailment",
    "data__text": "sentence1",
    "data__text_pair": "sentence2",
    "adapter__modules_to_save": ["score"],
}
IDS = torch.tensor([[5, 9, 33, 7, 120, 4], [8, 8, 60, 2, 99, 31]])


def trained(recipe_file: Path, **changes) -> tuple[Recipe, Trainer]:
    content = read_yaml(recipe_file)
    content["model"]["dtype"] = "float32"
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (content[section] if section else content)[name] = value
    recipe = parse(content)
    uri = str(recipe_file.parent / "run")
    trainer = Trainer(recipe, RunInfo(uri), World(device=torch.device("cpu")), Silent())
    trainer.fit()
    trainer.model.eval()
    return recipe, trainer


def plain(recipe: Recipe, folder: Path, num_labels: int | None = None) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The base model, and another one with the adapter that plain PEFT loaded."""
    base = build_base(recipe, load_tokenizer(recipe.model), num_labels).eval()
    other = build_base(recipe, load_tokenizer(recipe.model), num_labels)
    return base, PeftModel.from_pretrained(other, str(folder)).eval()


@torch.no_grad()
def check(trainer: Trainer, base: torch.nn.Module, loaded: torch.nn.Module) -> None:
    wanted, got, without = (m(input_ids=IDS).logits for m in (trainer.model, loaded, base))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (got - without).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["lora", "dora", "dylora", "adalora", "hyperadalora", "hyperdora"])
def test_plain_peft_computes_the_same_logits(recipe_file: Path, method: str) -> None:
    recipe, trainer = trained(recipe_file, method=method)
    check(trainer, *plain(recipe, recipe_file.parent / "run" / "adapter"))


def test_triplets_that_are_generated(recipe_file: Path) -> None:
    recipe, trainer = trained(recipe_file, adapter__factorization="triplet", gamma=0.1)
    assert trainer.optimizer.source.factors.lam is not None
    check(trainer, *plain(recipe, recipe_file.parent / "run" / "adapter"))


def test_modules_of_rank_zero_are_dropped(recipe_file: Path) -> None:
    recipe, trainer = trained(recipe_file, adapter__target_rank=0.5)
    ranks = trainer.optimizer.ranks()
    assert min(ranks.values()) == 0 < max(ranks.values())
    folder = recipe_file.parent / "run" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(name for name, rank in ranks.items() if rank)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(t.shape[0] for name, t in tensors.items() if "lora_A" in name) == sum(ranks.values())
    check(trainer, *plain(recipe, folder))


def test_classifier_comes_with_its_head(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    recipe, trainer = trained(recipe_file, **ENTAILMENT)
    check(trainer, *plain(recipe, recipe_file.parent / "run" / "adapter", num_labels=2))
    run = str(recipe_file.parent / "run")
    assert main(["export", run, str(tmp_path / "served"), "--uniform-rank"]) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "vLLM does not serve classifier, score; exported without --uniform-rank it loads in PEFT" in message
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize(
    ("changes", "padded"),
    [
        ({}, True),
        ({"method": "hyperdora"}, False),
        (ENTAILMENT, False),
        ({"adapter__modules_to_save": ["norm"]}, False),
    ],
    ids=["plain", "dora", "classifier", "modules"],
)
def test_the_export_that_a_run_ends_with_works(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    changes: dict[str, Any],
    padded: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    assert main(["train", str(recipe_file), *overrides]) == 0
    (command,) = [x.strip() for x in capfd.readouterr().out.splitlines() if x.strip().startswith("hyperlora export")]
    assert ("--uniform-rank" in command) is padded
    assert main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "my-adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_uniform_rank_for_vllm(recipe_file: Path, tmp_path: Path, source: str) -> None:
    recipe, trainer = trained(recipe_file, adapter__target_rank=0.5)
    origin = recipe_file.parent / "run"
    if source == "checkpoint":
        (origin,) = origin.glob("checkpoints/step-00000020")
    summary, folder = tmp_path / "export.json", tmp_path / "served"
    arguments = ["export", str(origin), str(folder), "--uniform-rank", "--json", str(summary)]
    assert main(arguments) == 0
    told = json.loads(summary.read_text())
    assert told["uniform_rank"] == 8
    assert told["ranks"] == dict.fromkeys(told["ranks"], 8)
    config = json.loads((folder / "adapter_config.json").read_text())
    # vLLM reads r, lora_alpha and target_modules, and knows no patterns.
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {8}
    assert {t.shape[1] for n, t in tensors.items() if "lora_B" in n} == {8}
    check(trainer, *plain(recipe, folder))
    assert main(arguments) == 2, "an existing adapter must not be overwritten"


def test_export_without_padding_is_the_adapter_of_the_run(recipe_file: Path, tmp_path: Path) -> None:
    trained(recipe_file)
    assert main(["export", str(recipe_file.parent / "run"), str(tmp_path / "again")]) == 0
    files = "adapter_model.safetensors", "adapter_config.json"
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (recipe_file.parent / "run" / "adapter" / name).read_bytes()
    card = (tmp_path / "again" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "held-out exact_match" in card


def test_damaged_checkpoints_are_refused(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    trained(recipe_file)
    newest = recipe_file.parent / "run/checkpoints/step-00000020"
    state = newest / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    assert main(["export", str(newest), str(tmp_path / "a")]) == 2
    assert "state.safetensors does not match the SHA-256" in capfd.readouterr().err.replace("\n", " ")
    # A finished run has a checkpoint of its end, and an unfinished one falls back to the newest that verifies.
    run, summary = recipe_file.parent / "run", tmp_path / "b.json"
    arguments = ["export", str(run), str(tmp_path / "b"), "--json", str(summary)]
    assert main(arguments) == 2
    message = capfd.readouterr().err.replace("\n", " ")
    assert f"result.json names, {newest} (" in message
    assert f"the newest that verifies is {run}/checkpoints/step-00000015" in message
    (run / "result.json").unlink()
    assert main(arguments) == 0
    assert json.loads(summary.read_text())["step"] == 15
    out = capfd.readouterr().out
    assert "state.safetensors does not match the SHA-256 in COMMIT; taking step 15" in out
    assert "step 15, from " in out
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "c")]) == 2
    assert "neither a checkpoint nor a checkpoints folder" in capfd.readouterr().err.replace("\n", " ")


def test_uniform_rank_of_a_trial_without_checkpoints(recipe_file: Path, tmp_path: Path) -> None:
    recipe, trainer = trained(recipe_file, adapter__target_rank=0.5)
    trial = recipe_file.parent / "run"
    shutil.rmtree(trial / "checkpoints")
    summary, folder = tmp_path / "export.json", tmp_path / "served"
    assert main(["export", str(trial), str(folder), "--uniform-rank", "--json", str(summary)]) == 0
    told = json.loads(summary.read_text())
    assert (told["checkpoint"], told["step"], told["uniform_rank"]) == (None, 20, 8)
    assert {t.shape[0] for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in n} == {8}
    check(trainer, *plain(recipe, folder))


def test_the_code_of_the_model_card_loads_the_adapter(recipe_file: Path, tmp_path: Path) -> None:
    _, trainer = trained(recipe_file, model={"path": "builtin:storylm"}, **ENTAILMENT)
    assert main(["export", str(recipe_file.parent / "run"), str(tmp_path / "mine")]) == 0
    for folder in (recipe_file.parent / "run/adapter", tmp_path / "mine"):
        model = run_card(folder)["model"].eval()
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, trainer.model(IDS).logits, rtol=0, atol=1e-5)
        assert "0 entailment, 1 not_entailment" in (folder / "README.md").read_text()


def test_the_code_of_the_model_card_loads_the_base_model_as_it_was_trained(recipe_file: Path, tmp_path: Path) -> None:
    """Whose config has no padding token, and which the recipe changes; one setting is none of the model's."""
    content = read_yaml(recipe_file)
    base = LlamaForCausalLM(LlamaConfig(**content["model"]["architecture"]))
    assert base.config.pad_token_id is None
    base.save_pretrained(tmp_path / "base")
    changes = {"rms_norm_eps": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "comment": None}
    model = {"path": str(tmp_path / "base"), "tokenizer": "builtin:storylm", "config": changes}
    _, trainer = trained(recipe_file, model=model, **ENTAILMENT)
    assert main(["export", str(recipe_file.parent / "run"), str(tmp_path / "mine")]) == 0
    rows = [{"input_ids": ids, "labels": 0} for ids in ([5, 9, 33, 7, 120, 4], [8, 8, 60])]
    batch = trainer.task.collate(rows, torch.device("cpu"))
    batch.pop("labels")
    for folder in (recipe_file.parent / "run/adapter", tmp_path / "mine"):
        loaded = run_card(folder)["model"].eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, trainer.model(**batch).logits, rtol=0, atol=1e-5)
