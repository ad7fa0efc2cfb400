"""Polar factors from Gram matrices, and the steps that follow them."""

from __future__ import annotations

import pytest
import torch
from models import build_llama, build_optimizer, train_steps

from hyperlora.polar import polar
from hyperlora.update_rules import UPDATE_RMS


def test_equals_the_singular_value_decomposition() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, 6, d, generator=rng) for d in (16, 384)]
    for x, found in zip(rows, polar(rows), strict=True):
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        assert (found - u @ v).abs().max() < 0.02


def test_directions_that_resemble_each_other_are_told_apart() -> None:
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(4, 1, 64, generator=rng).expand(4, 8, 64)
    x = common + 0.05 * torch.randn(4, 8, 64, generator=rng)
    values = torch.linalg.svdvals(polar([x])[0])
    assert values.min() > 0.95
    assert values.max() < 1.05


@pytest.mark.parametrize(("part", "lowest"), [(780, 0.994), (1260, 0.9), (3050, 0.5)])
def test_how_small_a_singular_value_may_be(part: int, lowest: float) -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 64, generator=rng, dtype=torch.float64)).Q for n in (64, 256))
    values = torch.full((64,), 1 / part, dtype=torch.float64)
    values[:32] = ((1 - 32 / part**2) / 32) ** 0.5
    found = torch.linalg.svdvals(polar([(left * values @ right.T)[None]])[0])
    assert lowest - 1e-3 < found.min() < lowest + 6e-3
    assert found.max() < 1 + 1e-9


def test_the_length_of_the_input_does_not_matter() -> None:
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(polar([1e-12 * x])[0], polar([1e6 * x])[0], rtol=1e-3, atol=1e-4)


def test_zero_rows_and_matrices_stay_zero() -> None:
    x = torch.zeros(2, 4, 32)
    x[0, :2] = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    found = polar([x])[0]
    assert torch.equal(found[1], torch.zeros(4, 32))
    assert torch.equal(found[0, 2:], torch.zeros(2, 32))
    torch.testing.assert_close(found[0, :2] @ found[0, :2].T, torch.eye(2), rtol=0.0, atol=0.02)


@pytest.mark.parametrize(("method", "rule"), [("lora", "direct"), ("adalora", "direct"), ("hyperadalora", "hybrid")])
def test_every_live_direction_moves_and_by_the_learning_rate(method: str, rule: str) -> None:
    model = build_llama(dtype=torch.float32)
    optimizer = build_optimizer(model, method, rule, lr=1e-3, direction="orthogonal", gamma=0.0)
    train_steps(model, optimizer, 12)
    source = optimizer.source
    factors = source.factors if rule == "direct" else source._base
    before = [t.clone() for t in factors.tensors()]
    mask = optimizer.mask.clone()
    train_steps(model, optimizer, 1)
    for shape_class, old, new in zip(optimizer.layout.inputs, before[-len(factors.q) :], factors.q, strict=True):
        for place, index in enumerate(shape_class.members):
            move = (new - old)[place][mask[index]]
            assert torch.equal(new[place][~mask[index]], old[place][~mask[index]]), "pruned directions rest"
            if len(move) == 0:
                continue
            gram = move @ move.T / ((UPDATE_RMS * 1e-3) ** 2 * move.shape[1])
            torch.testing.assert_close(gram, torch.eye(len(move)), rtol=0.0, atol=0.06)


def test_weight_decay_and_skipped_steps() -> None:
    from hyperlora import AdamSettings

    model = build_llama(dtype=torch.float32)
    optimizer = build_optimizer(
        model, "adalora", "direct", direction="orthogonal", gamma=0.0, adam=AdamSettings(weight_decay=0.1), lr=1e-2
    )
    train_steps(model, optimizer, 5)
    before = [t.clone() for t in optimizer.source.factors.tensors()]
    optimizer.layout.modules[0].b.grad = torch.ones_like(optimizer.layout.modules[0].b)
    optimizer.step(metrics=torch.tensor([float("nan")]))
    for old, new in zip(before, optimizer.source.factors.tensors(), strict=True):
        assert torch.equal(old, new)
    plain = build_optimizer(
        build_llama(dtype=torch.float32), "adalora", "direct", direction="orthogonal", gamma=0.0, lr=1e-2
    )
    decayed = build_optimizer(
        build_llama(dtype=torch.float32),
        "adalora",
        "direct",
        direction="orthogonal",
        gamma=0.0,
        lr=1e-2,
        adam=AdamSettings(weight_decay=0.1),
    )
    for optimizer in (plain, decayed):
        optimizer.layout.modules[0].b.grad = torch.zeros_like(optimizer.layout.modules[0].b)
        optimizer.step()  # Adam's direction is zero, and only the decay moves P
    for old, new in zip(plain.source.factors.p, decayed.source.factors.p, strict=True):
        torch.testing.assert_close(new, old * (1 - 1e-2 * 0.1))


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"direction 'muon' is unknown; allowed: adam, orthogonal"):
        build_optimizer(build_llama(), direction="muon")
    with pytest.raises(ValueError, match="update rule 'anchored' has none"):
        build_optimizer(build_llama(), rule="anchored", direction="orthogonal")
    with pytest.raises(ValueError, match=r"factorization 'svd' is unknown; allowed: triplet, fused"):
        build_optimizer(build_llama(), factorization="svd")
