"""Orthogonal updates: the polar factor of every matrix's step, for all matrices at once.

Adam's directions of the r rows of a matrix soon resemble each other, so that a rank-r adapter moves as if its rank were
lower. The polar factor (X Xᵀ)^{-1/2} X is the nearest matrix with orthonormal rows: every direction moves, and each by
the same length. That is the update of Muon (arXiv 2502.16982), here over the r directions of a factor and on Adam's
direction instead of the momentum.

Shape legend: m modules of one shape class, r directions, d dimensions, n matrices over all classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Muon's quintic (arXiv 2502.16982, section 2.1) raises small singular values fast; the cubic then settles them at one.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_CUBIC = (1.5, -0.5, 0.0)
_STEPS = [*[_QUINTIC] * 5, *[_CUBIC] * 3]


def polar(rows: Sequence[Tensor]) -> list[Tensor]:
    """The polar factors of stacks of matrices: rows that are orthonormal and span the same space.

    Newton-Schulz on the r x r Gram matrices alone: an iteration multiplies X by a polynomial of X Xᵀ, and these
    commute, so that the products can be gathered before X is touched. One batch for all shapes. Singular values below
    a 780th of the matrix's Frobenius norm stay smaller than one; a zero row or matrix stays zero.

    Args:
        rows: per shape class (m, r, d), r <= d, at least float32.

    Returns:
        Per shape class (m, r, d).
    """
    gram = torch.cat([torch.bmm(x, x.transpose(1, 2)) for x in rows])
    # The trace bounds the largest eigenvalue, so that all singular values start in (0, 1].
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1).clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram / trace
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = identity.expand_as(gram) * trace.rsqrt()
    for a, b, c in _STEPS:
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        factor = torch.bmm(polynomial, factor)
        gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    parts = factor.split([len(x) for x in rows])
    return [torch.bmm(part, x) for part, x in zip(parts, rows, strict=True)]
