"""P, λ, Q over the model's weights."""

from __future__ import annotations

import pytest
import torch
from models import build_batch, build_llama, build_optimizer, train_steps
from peft import LoraConfig, get_peft_model
from torch import nn

from hyperlora.factors import FactorLayout, Factors, adapted_modules


def test_factor_gradients_equal_autograd() -> None:
    layout = FactorLayout(adapted_modules(build_llama()))
    rng = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    modules, rank = len(layout.modules), layout.rank
    factors = Factors(
        [normal(*c.buffer.shape).requires_grad_() for c in layout.outputs],
        normal(modules, rank).requires_grad_(),
        [normal(*c.buffer.shape).requires_grad_() for c in layout.inputs],
    )
    assert factors.lam is not None
    mask = torch.randint(0, 2, (modules, rank), generator=rng).double()
    # Any scalar function of A and B does; this one has the gradients grad_b and grad_a.
    grad_b = [normal(*p.shape) for p in factors.p]
    grad_a = [normal(*q.shape) for q in factors.q]
    value = sum((p * g).sum() for p, g in zip(factors.p, grad_b, strict=True))
    for shape_class, q, g in zip(layout.inputs, factors.q, grad_a, strict=True):
        a = (factors.lam * mask)[shape_class.index].unsqueeze(-1) * q
        value = value + (a * g).sum()
    expected = torch.autograd.grad(value, factors.tensors())  # type: ignore[arg-type]
    with torch.no_grad():
        got = layout.gradients(factors, mask, grad_b, grad_a)
    for wanted, found in zip(expected, got.tensors(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_weights_are_views_of_stacked_buffers() -> None:
    model = build_llama()
    layout = FactorLayout(adapted_modules(model))
    assert len(layout.classes) < len(layout.modules)
    for shape_class in layout.classes:
        assert shape_class.attached()
        shape_class.buffer.fill_(0.5)
        assert all((w == 0.5).all() for w in shape_class.weights)


def test_model_computes_with_the_factors() -> None:
    model = build_llama()
    optimizer = build_optimizer(model, "adalora")
    train_steps(model, optimizer, 12)
    factors, gain = optimizer.source.factors, optimizer.source.factors.lam * optimizer.mask
    for shape_class, q in zip(optimizer.layout.inputs, factors.q, strict=True):
        for place, index in enumerate(shape_class.members):
            torch.testing.assert_close(
                optimizer.layout.modules[index].a.detach(), gain[index].unsqueeze(-1) * q[place], rtol=0, atol=0
            )
    for shape_class, p in zip(optimizer.layout.outputs, factors.p, strict=True):
        for place, index in enumerate(shape_class.members):
            assert torch.equal(optimizer.layout.modules[index].b.detach(), p[place])


def test_weights_replaced_by_the_user_are_attached_again() -> None:
    model = build_llama(dtype=torch.float32)
    optimizer = build_optimizer(model, "adalora")
    module = optimizer.layout.modules[0]
    module.a.data = module.a.data.clone()
    train_steps(model, optimizer, 2)
    assert all(c.attached() for c in optimizer.layout.classes)
    ids = build_batch()
    before = model(input_ids=ids).logits
    assert torch.equal(before, model(input_ids=ids).logits)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.narrow = nn.Linear(8, 2)
        self.embedding = nn.Embedding(8, 8)
        self.conv = nn.Conv1d(8, 8, 3)


def test_all_unsuitable_layers_are_named() -> None:
    config = LoraConfig(r=4, target_modules=["linear", "narrow", "embedding", "conv"], rank_pattern={"linear": 3})
    with pytest.raises(ValueError, match="rank 4 exceeds") as error:
        adapted_modules(get_peft_model(Mixed(), config))  # type: ignore[arg-type]
    for part in ("embedding adapters", "3 dimensions", r"one initial rank", "one scale"):
        assert part in str(error.value)


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Mixture(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.experts = Experts(*shape)


def test_parameters_of_several_experts_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    with pytest.raises(ValueError, match=r"experts: a parameter of 4 experts \(target_parameters\) is not supported"):
        adapted_modules(get_peft_model(Mixture(4, 8, 8), config))  # type: ignore[arg-type]
    (module,) = adapted_modules(get_peft_model(Mixture(8, 6), config))  # type: ignore[arg-type]
    assert (module.a.shape, module.b.shape) == ((2, 6), (8, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_update_is_a_product_that_is_not_zero(dtype: torch.dtype) -> None:
    layout = FactorLayout(adapted_modules(build_llama(dtype=dtype)))
    assert not layout.holds_update().any(), "B is zero"
    for weights in layout.classes:
        weights.buffer.normal_()
    for a in layout.inputs:
        a.buffer[:, 2:] = 0.0
    for b in layout.outputs:
        b.buffer[:, :, :2] = 0.0
    # Products that cancel but for the rounding of a common turn of both.
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for a in layout.inputs:
        a.buffer.copy_(turn @ a.buffer.double())
    for b in layout.outputs:
        b.buffer.copy_(b.buffer.double() @ turn.T)
    assert all(w.abs().sum() > 0 for c in layout.classes for w in c.weights)
    assert not layout.holds_update().any()
    with torch.no_grad():
        layout.modules[5].b.copy_(1e-6 * layout.modules[5].a.sum(1))
        layout.modules[9].b[0, 0] = float("nan")
    assert layout.holds_update().nonzero().flatten().tolist() == [5, 9]


def test_no_adapter() -> None:
    with pytest.raises(ValueError, match="no linear LoRA layer"):
        adapted_modules(nn.Linear(2, 2))


def test_names() -> None:
    module = adapted_modules(build_llama())[8]
    assert (module.name, module.layer, module.short_name) == ("model.layers.1.self_attn.k_proj", 1, "self_attn.k_proj")
