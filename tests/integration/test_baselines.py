"""The rest of the field through `hyperlora train`: each learns, keeps its ranks' promise, and loads in PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import AdaLoraModel, PeftModel

from hyperlora import checkpoint
from hyperlora.adapters import build_base, load_tokenizer
from hyperlora.baselines import PeftAdaLoRA, UnequalLoRA
from hyperlora.config import Recipe, RecipeError, parse, read_yaml
from hyperlora.export import from_checkpoint
from hyperlora.preflight import inspect
from hyperlora.training import RunInfo, Silent, Trainer, World
from pipelines.cli import main

IDS = torch.tensor([[5, 9, 33, 7, 120, 4], [8, 8, 60, 2, 99, 31]])
CUBIC = {"schedule": "cubic", "interval": 2, "start": 4, "final": 6}
BERT = {
    "model_type": "bert",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FIELD = ("rslora", "eva", "peft-adalora")


def recipe_of(path: Path, method: str, **training: int) -> Recipe:
    content = read_yaml(path)
    content |= {"method": method, "pruning": CUBIC}
    content["model"]["dtype"] = "float32"
    content["training"] |= training
    return parse(content)


def trainer_of(recipe: Recipe, uri: str) -> Trainer:
    return Trainer(recipe, RunInfo(uri), World(device=torch.device("cpu")), Silent())


@pytest.mark.parametrize("method", FIELD)
def test_learns_with_the_ranks_it_promises(recipe_file: Path, method: str) -> None:
    summary = recipe_file.with_suffix(".json")
    changes = ["model.path=builtin:storylm", "model.init=pretrained", "model.dtype=float32", "training.steps=30"]
    changes += [f"method={method}", "pruning.schedule=cubic", "gamma=0.01", "training.checkpoint_every=null"]
    assert main(["train", str(recipe_file), "--json", str(summary), *changes]) == 0
    result = json.loads(summary.read_text())
    assert result["loss_last"] < result["loss_first"] - 0.8
    ranks, modules = list(result["ranks"].values()), 28
    assert sum(ranks) == result["rank_final"] == result["rank_target"]
    assert result["rank_initial"] == 4 * modules
    if method == "eva":
        assert sum(ranks) == 4 * modules
        assert min(ranks) < 4 < max(ranks) <= 8
    if method == "peft-adalora":
        assert sum(ranks) == 2 * modules
        assert len(set(ranks)) > 1
    if method == "rslora":
        assert set(ranks) == {4}


@pytest.mark.parametrize("method", FIELD)
def test_plain_peft_computes_the_same_logits(recipe_file: Path, method: str) -> None:
    recipe, uri = recipe_of(recipe_file, method), str(recipe_file.parent / "run")
    trainer = trainer_of(recipe, uri)
    trainer.fit()
    base = build_base(recipe, load_tokenizer(recipe.model), None).eval()
    with torch.no_grad():
        wanted, without = (m.eval()(input_ids=IDS).logits for m in (trainer.model, base))
        got = PeftModel.from_pretrained(base, f"{uri}/adapter").eval()(input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (got - without).abs().max() > 1e-3


@pytest.mark.parametrize("method", FIELD)
def test_resumes_to_the_same_losses(recipe_file: Path, method: str) -> None:
    recipe, uri = recipe_of(recipe_file, method), str(recipe_file.parent / "run")
    first, rows = trainer_of(recipe, uri), list(range(8))
    for _ in range(7):  # in the middle of the pruning schedule
        first.report(first.train_step(rows))
    first.save()
    second = trainer_of(recipe, uri)
    saved, _ = checkpoint.load_latest(uri)
    assert saved is not None
    second.restore(saved)
    losses = [[trainer.train_step(rows).read()["loss"] for _ in range(9)] for trainer in (first, second)]
    assert losses[0] == losses[1]
    assert first.optimizer.ranks() == second.optimizer.ranks()


@pytest.mark.parametrize("method", FIELD)
def test_stopped_before_its_first_step_it_saves_that(recipe_file: Path, method: str) -> None:
    recipe, uri = recipe_of(recipe_file, method), str(recipe_file.parent / "run")
    trainer = trainer_of(recipe, uri)
    trainer.save()
    saved, _ = checkpoint.load_latest(uri)
    assert saved is not None
    assert sum(a.shape[0] for a, _ in from_checkpoint(saved).pairs.values()) == trainer.optimizer.plan.initial


@pytest.mark.parametrize("method", FIELD)
def test_the_estimate_is_what_the_run_has(recipe_file: Path, method: str) -> None:
    recipe = recipe_of(recipe_file, method)
    estimate, trainer = inspect(recipe), trainer_of(recipe, "unused")
    plan = trainer.optimizer.plan
    assert (estimate.rank_initial, estimate.rank_target) == (plan.initial, plan.target)
    # EVA moves ranks between modules of different width; nothing is known of that before the model is there.
    exact = {"rel": 0.25} if method == "eva" else {"abs": 0}
    assert estimate.sizes.trainable == pytest.approx(trainer.optimizer.trainable_parameters, **exact)
    assert estimate.sizes.state_bytes == pytest.approx(trainer.optimizer.state_bytes, **exact)


def test_rslora_scales_by_the_root_of_the_rank(recipe_file: Path) -> None:
    trainer = trainer_of(recipe_of(recipe_file, "rslora"), "unused")
    assert {m.scaling for m in trainer.optimizer.layout.modules} == {8 / math.sqrt(4)}


def test_eva_starts_from_the_leading_directions_at_the_scale_of_lora(recipe_file: Path) -> None:
    """A's rows are orthonormal, B is zero, and alpha follows the rank so that every scale is LoRA's."""
    optimizer = trainer_of(recipe_of(recipe_file, "eva"), "unused").optimizer
    assert isinstance(optimizer, UnequalLoRA)
    for m in optimizer.layout.modules:
        torch.testing.assert_close(m.a @ m.a.T, torch.eye(len(m.a)), atol=1e-4, rtol=0)
        assert not m.b.any()
        assert m.scaling == 2.0


def test_peft_adalora_adds_pefts_own_penalty_and_does_not_report_it(recipe_file: Path) -> None:
    """The term equals what PEFT adds to outputs.loss, value and gradient, but for the clipping that comes after."""
    recipe = recipe_of(recipe_file, "peft-adalora").model_copy(update={"gamma": 0.3})
    trainer = trainer_of(recipe, "unused")
    assert isinstance(trainer.model.base_model, AdaLoraModel)
    assert isinstance(trainer.optimizer, PeftAdaLoRA)
    plain = torch.nn.functional.cross_entropy(
        trainer.model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    )
    penalized = trainer.model(input_ids=IDS, labels=IDS).loss
    (penalized - plain).backward()
    weights = [p for n, p in trainer.model.named_parameters() if ".lora_A" in n or ".lora_B" in n]
    wanted = [p.grad.clone() for p in weights]
    trainer.model.zero_grad()
    trainer.optimizer._add_to_loss()
    assert 0.3 * trainer.optimizer.stats["penalty"].item() == pytest.approx((penalized - plain).item(), rel=1e-5)
    for p, gradient in zip(weights, wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)
    trainer.model.zero_grad()
    reported = trainer.train_step(list(range(8))).read()
    other = trainer_of(recipe.model_copy(update={"gamma": 0.0}), "unused").train_step(list(range(8))).read()
    assert reported["loss"] == other["loss"]
    assert reported["penalty"] > 1


def test_a_step_that_is_not_finite_changes_nothing(recipe_file: Path) -> None:
    for method in ("eva", "peft-adalora"):
        trainer = trainer_of(recipe_of(recipe_file, method), "unused")
        optimizer = trainer.optimizer
        trainer.train_step(range(8))
        for entry, metric in ((float("nan"), 1.0), (1.0, float("nan"))):
            before = {k: v.clone() for k, v in optimizer.state_dict()["state"].items()}
            for module in optimizer.layout.modules:
                module.b.grad = torch.ones_like(module.b)
            optimizer.layout.modules[1].b.grad[0, 0] = entry
            optimizer.step(metrics=torch.tensor([metric]))
            assert optimizer.stats["found_inf"] == 1
            after = optimizer.state_dict()["state"]
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before), method


@pytest.mark.parametrize(
    ("changes", "field", "allowed"),
    [
        ({"pruning": {"schedule": "interval"}}, "pruning.schedule", "cubic for method=peft-adalora"),
        ({"adapter": {"rank": 4, "target_rank": 4}}, "adapter.target_rank", "below adapter.rank = 4"),
        ({"adapter": {"rank": 4, "target_rank": 1.5}}, "adapter.target_rank", "a whole number"),
        ({"ray": {"num_workers": 2}}, "ray.num_workers", "1 for method=peft-adalora"),
        ({"pruning": CUBIC | {"start": 14}}, "pruning", "budgeting phase"),
        ({"method": "eva", "ray": {"num_workers": 2}}, "ray.num_workers", "1 for method=eva"),
        ({"method": "hyperadalora", "pruning": {"reactivation": True}}, "pruning.reactivation", "false for method"),
    ],
)
def test_what_cannot_be_done_is_said(recipe_file: Path, changes: dict, field: str, allowed: str) -> None:
    content = read_yaml(recipe_file) | {"method": "peft-adalora", "pruning": CUBIC} | changes
    with pytest.raises(RecipeError) as caught:
        inspect(parse(content))
    assert any(p.field == field and allowed in p.allowed for p in caught.value.problems), caught.value


def test_eva_takes_a_pooler_that_sees_one_row_per_example(recipe_file: Path) -> None:
    content = read_yaml(recipe_file) | {"method": "eva", "task": {"kind": "classification"}}
    content["model"] |= {"architecture": BERT, "dtype": "float32"}
    content["data"] |= {"source": "entailment", "text": "sentence1", "text_pair": "sentence2"}
    content["adapter"] = {"rank": 4, "modules_to_save": ["classifier"]}
    trainer = trainer_of(parse(content), str(recipe_file.parent / "run"))
    ranks = trainer.optimizer.ranks()
    assert "bert.pooler.dense" in ranks
    assert sum(ranks.values()) == 4 * 13
    assert trainer.fit()["other_parameters"] == 2 * 32 + 2


def test_eva_says_when_a_module_is_too_narrow(recipe_file: Path) -> None:
    content = read_yaml(recipe_file) | {"method": "eva", "adapter": {"rank": 16}}
    with pytest.raises(RecipeError, match="4·rank = 64"):
        trainer_of(parse(content), "unused")
