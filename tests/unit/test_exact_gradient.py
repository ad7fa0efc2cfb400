"""The two-stage gradient is the gradient of the whole: model and hypernetworks as one graph, in float64."""

from __future__ import annotations

import pytest
import torch
from models import RULES, build_batch, build_llama, build_optimizer, train_steps
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call

from hyperlora import METHODS, HyperAdaLoRA, HypernetworkSpec, Pruning, UpdateRule
from hyperlora.factors import Factors
from hyperlora.settings import Factorization, Kind
from hyperlora.update_rules import GeneratedFactors


def trained(
    rule: str, *, method: str = "hyperadalora", checkpointing: bool = False, **changes
) -> tuple[PeftModel, HyperAdaLoRA, GeneratedFactors]:
    """A model some steps into training: λ is not zero and some directions are pruned."""
    model = build_llama(dora=METHODS[method].dora)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    pruning = Pruning(score="sensitivity", interval=2, start=3, final=35)
    # Hybrid's hypernetworks move at every third step: after five steps, at the next.
    update = UpdateRule(rule, reanchor_every=7, every=3)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, method, gamma=0.0, pruning=pruning, update_rule=update, **changes)
    train_steps(model, optimizer, 5)
    assert isinstance(optimizer.source, GeneratedFactors)
    if optimizer.method.singular_values:
        assert 0 < optimizer.live < optimizer.mask.numel()
        assert singular_values(optimizer)[optimizer.mask].min() > 0
    return model, optimizer, optimizer.source


def singular_values(optimizer: HyperAdaLoRA) -> Tensor:
    """|λ| (M, r); ‖S_k‖ where λ and Q are one tensor."""
    factors = optimizer.source.factors
    if factors.lam is not None:
        return factors.lam.abs()
    result = torch.zeros(optimizer.mask.shape, dtype=factors.q[0].dtype)
    for shape_class, s in zip(optimizer.layout.inputs, factors.q, strict=True):
        result[shape_class.members] = s.norm(dim=-1)
    return result


def whole_loss(model: PeftModel, optimizer: HyperAdaLoRA, factors: Factors, ids: Tensor) -> Tensor:
    """The loss with lora_A = diag(λ·mask) Q and lora_B = P as outputs of the hypernetworks' graph."""
    names = {id(p): n for n, p in model.named_parameters()}
    written = optimizer._truncation() if optimizer.method.truncated else optimizer.mask
    weights = {}
    for shape_class, p in zip(optimizer.layout.outputs, factors.p, strict=True):
        for place, index in enumerate(shape_class.members):
            weights[names[id(optimizer.layout.modules[index].b)]] = p[place]
    for shape_class, q in zip(optimizer.layout.inputs, factors.q, strict=True):
        for place, index in enumerate(shape_class.members):
            gain = (written if factors.lam is None else factors.lam * written)[index].unsqueeze(-1)
            weights[names[id(optimizer.layout.modules[index].a)]] = gain * q[place]
    assert len(weights) == 2 * len(optimizer.layout.modules)
    return functional_call(model, weights, (), {"input_ids": ids, "labels": ids}).loss


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    difference = sum((f - w).square().sum() for f, w in zip(found, wanted, strict=True))
    return float((difference / sum(w.square().sum() for w in wanted)).sqrt())  # type: ignore[union-attr]


def both_ways(
    model: PeftModel,
    optimizer: HyperAdaLoRA,
    source: GeneratedFactors,
    monkeypatch: pytest.MonkeyPatch,
    accumulation: int = 1,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """∂L/∂Φ of one step by autograd end to end and by the optimizer, and |λ·∂L/∂λ| by autograd."""
    ids = build_batch(seed=11)
    factors = source.factors.like(source.generated())
    # λ as a factor of its own: a gain of one on S, which scales ∂L/∂λ as λ does.
    gain = torch.ones(optimizer.mask.shape, dtype=torch.float64, requires_grad=True)
    scaled = [q * gain[c.members].unsqueeze(-1) for c, q in zip(optimizer.layout.inputs, factors.q, strict=True)]
    loss = whole_loss(model, optimizer, Factors(factors.p, factors.lam, scaled), ids)
    gradients = list(torch.autograd.grad(loss, [*source.phi, gain], retain_graph=True))
    by_gain = gradients.pop().abs()
    importance = by_gain if optimizer.method.singular_values else None

    found: list[Tensor] = []
    second_stage = source.gradients

    def recorded(of: Factors) -> list[Tensor]:
        found.extend(second_stage(of))
        return found

    monkeypatch.setattr(source, "gradients", recorded)
    for part in ids.chunk(accumulation):
        (model(input_ids=part, labels=part).loss / accumulation).backward()
    optimizer.step()
    return gradients, found, importance


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointing"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("factorization", ["triplet", "fused"])
@pytest.mark.parametrize("rule", RULES)
def test_gradient_and_importance_equal_autograd_end_to_end(
    rule: str,
    factorization: Factorization,
    accumulation: int,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, source = trained(rule, checkpointing=checkpointing, factorization=factorization)
    mask = optimizer.mask.clone()
    wanted, found, importance = both_ways(model, optimizer, source, monkeypatch, accumulation)
    assert relative_error(found, wanted) < 1e-8
    assert importance is not None
    torch.testing.assert_close(optimizer.stats["importance"], importance, rtol=1e-8, atol=1e-16)
    assert (importance[mask] > 0).all()
    assert (importance[~mask] == 0).all()


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per layer"])
@pytest.mark.parametrize("kind", ["attention", "mlp", "cnn"])
def test_every_kind_of_hypernetwork(kind: Kind, per_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = HypernetworkSpec(kind, hidden_size=24, heads=2, layers=2, per_layer=per_layer)
    wanted, found, _ = both_ways(*trained("residual", hypernetwork=spec), monkeypatch)
    assert all(g.abs().max() > 0 for g in wanted)
    assert relative_error(found, wanted) < 1e-8


@pytest.mark.parametrize("method", ["hyperlora", "hyperdora", "hyperdylora"])
@pytest.mark.parametrize("rule", RULES)
def test_without_singular_values(rule: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, source = trained(rule, method=method)
    if method == "hyperdylora":
        kept = optimizer._truncation()[0].sum()
        assert 0 < kept < optimizer.layout.rank, "a step that truncates"
    wanted, found, _ = both_ways(model, optimizer, source, monkeypatch)
    assert relative_error(found, wanted) < 1e-8


def test_the_measure_sees_a_gradient_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, source = trained("residual")
    wanted, found, _ = both_ways(model, optimizer, source, monkeypatch)
    assert relative_error([g * (1 + 1e-6) for g in found], wanted) > 1e-7


@pytest.mark.parametrize("factorization", ["triplet", "fused"])
def test_penalty_enters_the_gradient_as_the_penalty_of_the_generated_factors(
    factorization: Factorization, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, source = trained("hybrid", factorization=factorization)
    optimizer.gamma = 0.3
    factors = source.factors.like(source.generated())
    ids, modules = build_batch(seed=11), len(optimizer.layout.modules)
    total = whole_loss(model, optimizer, factors, ids)
    penalty = torch.zeros((), dtype=torch.float64)
    directions = [q / q.norm(dim=-1, keepdim=True) for q in factors.q] if optimizer.fused else factors.q
    rows = [p.transpose(1, 2) for p in factors.p] + directions
    for shape_class, x in zip(optimizer.layout.classes, rows, strict=True):
        for place, index in enumerate(shape_class.members):
            live = x[place][optimizer.mask[index]]
            penalty = penalty + (live @ live.T - torch.eye(len(live))).square().sum() / modules
    phi = source.phi
    wanted = list(torch.autograd.grad(total + 0.3 * penalty, phi, retain_graph=True))
    reported = penalty.item()
    _, found, _ = both_ways(model, optimizer, source, monkeypatch)
    assert relative_error(found, wanted) < 1e-8
    assert optimizer.stats["penalty"].item() == pytest.approx(reported, rel=1e-9)
    assert reported > 1e-6
