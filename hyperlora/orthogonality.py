"""Orthogonality penalty of AdaLoRA (arXiv 2303.10512, eq. 4), batched over factors of equal shape.

Shape legend: M modules of one shape class, r directions, d dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _gram_residual(rows: Tensor, live: Tensor) -> Tensor:
    """``X Xᵀ - diag(live)`` of rows (M, r, d) whose dead directions are already zero, as (M, r, r)."""
    return torch.baddbmm(torch.diag_embed(live), rows, rows.transpose(1, 2), beta=-1)


def penalty(rows: Sequence[Tensor], live: Sequence[Tensor], modules: int) -> tuple[Tensor, list[Tensor]]:
    """The penalty and its gradient over the live directions, in closed form.

    R = 1/modules · Σ ‖X Xᵀ - I‖_F², where the rows of X are one factor's directions. A pruned direction is
    left out of X and of I, so that removing it physically changes nothing.

    Args:
        rows: per shape class the directions, (M, r, d): Q as it is, P transposed.
        live: per shape class 1 for a live and 0 for a pruned direction, (M, r), in the dtype of ``rows``.
        modules: the number of adapted modules, over which the mean is taken.

    Returns:
        R as a scalar tensor and the gradients ∂R/∂X, (M, r, d) each: 4/modules · (X Xᵀ - I) X.
    """
    gradients, squares = [], []
    for x, mask in zip(rows, live, strict=True):
        x = x * mask.unsqueeze(-1)
        residual = _gram_residual(x, mask)
        squares.append(torch.linalg.vector_norm(residual).square())
        gradients.append(torch.bmm(residual, x).mul_(4.0 / modules))
    return torch.stack(squares).sum() / modules, gradients
