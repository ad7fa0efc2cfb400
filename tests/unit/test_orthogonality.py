"""The batched closed form against autograd over one matrix at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperlora.orthogonality import penalty


def by_autograd(classes: list[Tensor], live: list[Tensor], modules: int) -> tuple[Tensor, list[Tensor]]:
    leaves = [c.clone().requires_grad_() for c in classes]
    total = torch.zeros((), dtype=torch.float64)
    for x, mask in zip(leaves, live, strict=True):
        for matrix, kept in zip(x, mask, strict=True):
            some = matrix[kept.bool()]
            total = total + ((some @ some.T - torch.eye(len(some), dtype=x.dtype)) ** 2).sum()
    total = total / modules
    return total.detach(), list(torch.autograd.grad(total, leaves))


def test_closed_form_equals_autograd_over_live_directions() -> None:
    rng = torch.Generator().manual_seed(0)
    classes = [torch.randn(m, 4, d, generator=rng, dtype=torch.float64) for m, d in ((3, 7), (5, 11))]
    live = [torch.rand(m, 4, generator=rng, dtype=torch.float64).round() for m in (3, 5)]
    assert 0 < sum(int(mask.sum()) for mask in live) < 32
    value, gradients = penalty(classes, live, modules=4)
    expected, expected_gradients = by_autograd(classes, live, modules=4)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_orthonormal_rows_cost_nothing() -> None:
    rows = torch.linalg.qr(torch.randn(2, 9, 4, dtype=torch.float64)).Q.transpose(1, 2)
    value, gradients = penalty([rows], [torch.ones(2, 4, dtype=torch.float64)], modules=2)
    assert value < 1e-25
    assert gradients[0].abs().max() < 1e-12


def test_known_value() -> None:
    # X = 2·I of two rows: X Xᵀ - I = 3·I, squared norm 18, over 3 modules 6; gradient 4/3 · 3 · 2 = 8 on the diagonal.
    value, gradients = penalty([2 * torch.eye(2).unsqueeze(0)], [torch.ones(1, 2)], modules=3)
    torch.testing.assert_close(value, torch.tensor(6.0))
    torch.testing.assert_close(gradients[0][0], 8 * torch.eye(2))
