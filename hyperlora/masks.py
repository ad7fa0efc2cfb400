"""Which singular values live: exact masks, and the smoothed scores that rank them.

Source: AdaLoRA (arXiv 2303.10512, eq. 8-12 for the smoothed score).

Shape legend: M adapted modules, r directions of each (the initial rank).
"""

from __future__ import annotations

import torch
from torch import Tensor


def prune_to(mask: Tensor, score: Tensor, live: int, budget: int) -> Tensor:
    """Zero the ``live - budget`` smallest scores among the live directions of all modules.

    Ties: of equal scores the direction with the higher index goes first, then the module with the lower index,
    so that a tie over everything thins all modules evenly instead of emptying the first ones.

    Args:
        mask: live directions, (M, r), bool.
        score: importance, (M, r).
        live: how many directions of ``mask`` are live (the host knows; nothing is read back from the device).
        budget: how many may stay.

    Returns:
        The new mask, (M, r); the same tensor when ``budget >= live``.
    """
    if budget >= live:
        return mask
    ranked = score.masked_fill(~mask, float("inf")).flip(1).t().reshape(-1)
    drop = torch.sort(ranked, stable=True).indices[: live - budget]
    flat = mask.flip(1).t().reshape(-1).clone()
    flat.index_fill_(0, drop, False)  # an assignment would have the host wait for the device
    return flat.reshape(mask.shape[1], mask.shape[0]).t().flip(1).contiguous()


class Smoothed:
    """AdaLoRA's smoothed sensitivity: running mean Ī times running uncertainty Ū (arXiv 2303.10512, eq. 9-11).

    The state is plain tensors, one pair for each tensor it follows, and belongs in every checkpoint.
    """

    def __init__(self, like: list[Tensor], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean = [torch.zeros_like(t) for t in like]
        self.uncertainty = [torch.zeros_like(t) for t in like]

    def update(self, sensitivity: list[Tensor], found_inf: Tensor) -> list[Tensor]:
        """Take in |θ·∂L/∂θ| of one step, unless ``found_inf`` is 1; returns Ī·Ū of each tensor."""
        taken = (1 - found_inf).to(self.mean[0].dtype)
        self._move(self.mean, sensitivity, taken * (1 - self.beta1))
        deviation = torch._foreach_sub(sensitivity, self.mean)
        torch._foreach_abs_(deviation)
        self._move(self.uncertainty, list(deviation), taken * (1 - self.beta2))
        return list(torch._foreach_mul(self.mean, self.uncertainty))

    @staticmethod
    def _move(average: list[Tensor], value: list[Tensor], weight: Tensor) -> None:
        """``average += weight · (value - average)``, with the weight on the device."""
        change = torch._foreach_sub(value, average)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(average, change)
