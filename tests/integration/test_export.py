"""The adapter is a plain PEFT LoRA adapter that computes what was trained."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hyperlora.adapters import build_base, load_tokenizer
from hyperlora.config import Recipe, parse, read_yaml
from hyperlora.training import RunInfo, Silent, Trainer, World
from pipelines.cli import main

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


def test_classifier_comes_with_its_head(recipe_file: Path) -> None:
    recipe, trainer = trained(
        recipe_file,
        task__kind="classification",
        data__source="entailment",
        data__text="sentence1",
        data__text_pair="sentence2",
        adapter__modules_to_save=["score"],
    )
    check(trainer, *plain(recipe, recipe_file.parent / "run" / "adapter", num_labels=2))


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


def run_card(folder: Path) -> dict:
    """Run the Python of a model card from its own folder, as its reader would."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(code, found)
    finally:
        os.chdir(before)
    return found


def test_the_code_of_the_model_card_loads_the_adapter(recipe_file: Path, tmp_path: Path) -> None:
    _, trainer = trained(
        recipe_file,
        model={"path": "builtin:storylm"},
        task__kind="classification",
        data__source="entailment",
        data__text="sentence1",
        data__text_pair="sentence2",
        adapter__modules_to_save=["score"],
    )
    assert main(["export", str(recipe_file.parent / "run"), str(tmp_path / "mine")]) == 0
    for folder in (recipe_file.parent / "run/adapter", tmp_path / "mine"):
        model = run_card(folder)["model"].eval()
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, trainer.model(IDS).logits, rtol=0, atol=1e-5)
        assert "0 entailment, 1 not_entailment" in (folder / "README.md").read_text()
