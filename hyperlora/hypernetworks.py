"""Hypernetworks that generate the factors (arXiv 2510.02630, section 3): attention, MLP and 1-d CNN.

A token is one rank-1 direction: a column of P, a row of Q, or one singular value. A linear map per dimension brings a
token to the hidden size h, a trunk shared by all shapes transforms the r tokens of a matrix, and a linear map per
dimension brings them back. Module and direction embeddings are added as BERT adds positions: singular values start
equal, and without them every one would stay equal. All parameters carry a leading group axis g: one group when the
networks are shared over layers, one for each layer otherwise; both run as the same batched kernels.

Shape legend: g groups, n modules in a group, r tokens (directions), d dimensions, h hidden size, f inner size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperlora.settings import CNN_KERNEL, Freeze, HypernetworkSpec


class _GroupLinear(nn.Module):
    """``x W + b`` with one weight for each group: x (g, t, in) to (g, t, out)."""

    def __init__(self, groups: int, fan_in: int, fan_out: int, rng: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(fan_in)
        self.weight = nn.Parameter(torch.empty(groups, fan_in, fan_out).uniform_(-bound, bound, generator=rng))
        self.bias = nn.Parameter(torch.zeros(groups, 1, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class _GroupNorm(nn.Module):
    """Layer norm over the last axis with one gain and bias for each group: x (g, t, h)."""

    def __init__(self, groups: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, 1, size))
        self.bias = nn.Parameter(torch.zeros(groups, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        # BERT's epsilon: tokens come in at the size of its 0.02 initialisation.
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-12), self.weight)


class _AttentionBlock(nn.Module):
    """One BERT layer over the live tokens of each matrix."""

    def __init__(self, spec: HypernetworkSpec, groups: int, rng: torch.Generator) -> None:
        super().__init__()
        h = spec.hidden_size
        self.heads = spec.heads
        self.qkv = _GroupLinear(groups, h, 3 * h, rng)
        self.out = _GroupLinear(groups, h, h, rng)
        self.norm1 = _GroupNorm(groups, h)
        self.up = _GroupLinear(groups, h, spec.inner, rng)
        self.down = _GroupLinear(groups, spec.inner, h, rng)
        self.norm2 = _GroupNorm(groups, h)

    def forward(self, x: Tensor, live: Tensor, rank: int) -> Tensor:
        g, t, h = x.shape
        q, k, v = self.qkv(x).view(g * t // rank, rank, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=live.view(-1, 1, 1, rank))
        x = self.norm1(x + self.out(seen.transpose(1, 2).reshape(g, t, h)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class _MLPBlock(nn.Module):
    """A token-wise MLP with residual and norm."""

    def __init__(self, spec: HypernetworkSpec, groups: int, rng: torch.Generator) -> None:
        super().__init__()
        self.up = _GroupLinear(groups, spec.hidden_size, spec.inner, rng)
        self.down = _GroupLinear(groups, spec.inner, spec.hidden_size, rng)
        self.norm = _GroupNorm(groups, spec.hidden_size)

    def forward(self, x: Tensor, live: Tensor, rank: int) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class _CNNBlock(nn.Module):
    """Two convolutions of width 3 along the directions of each matrix, with residual and norm."""

    def __init__(self, spec: HypernetworkSpec, groups: int, rng: torch.Generator) -> None:
        super().__init__()
        self.up = _GroupLinear(groups, CNN_KERNEL * spec.hidden_size, spec.inner, rng)
        self.down = _GroupLinear(groups, CNN_KERNEL * spec.inner, spec.hidden_size, rng)
        self.norm = _GroupNorm(groups, spec.hidden_size)

    @staticmethod
    def _windows(x: Tensor, live: Tensor, rank: int) -> Tensor:
        """Each token with its two neighbours, zeros at the ends and for pruned tokens: (g, t, 3c)."""
        g, t, c = x.shape
        padded = F.pad((x.view(-1, rank, c) * live.view(-1, rank, 1)), (0, 0, 1, 1))
        return padded.unfold(1, CNN_KERNEL, 1).transpose(2, 3).reshape(g, t, CNN_KERNEL * c)

    def forward(self, x: Tensor, live: Tensor, rank: int) -> Tensor:
        inner = F.gelu(self.up(self._windows(x, live, rank)))
        return self.norm(x + self.down(self._windows(inner, live, rank)))


_BLOCKS: dict[str, type[nn.Module]] = {"attention": _AttentionBlock, "mlp": _MLPBlock, "cnn": _CNNBlock}


class Hypernetwork(nn.Module):
    """Generates one factor of every module: lists of (m, r, d) tokens in, lists of the same shapes out.

    Args:
        spec: kind and size.
        dims: d of each shape class.
        counts: modules in each shape class; each must be a multiple of ``groups``, ordered group by group.
        rank: r.
        groups: g, 1 for a network shared by all layers.
        output_std: standard deviation of an output entry at initialisation; 0 starts the output maps at zero.
        rng: source of the initial values, so that every worker builds the same network.

    Raises:
        ValueError: ``heads`` does not divide ``hidden_size``, or a class does not split into ``groups`` equal parts.
    """

    def __init__(
        self,
        spec: HypernetworkSpec,
        dims: Sequence[int],
        counts: Sequence[int],
        rank: int,
        groups: int,
        output_std: Sequence[float],
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        h = spec.hidden_size
        if spec.kind == "attention" and h % spec.heads:
            raise ValueError(f"hypernetwork heads={spec.heads} must divide hidden_size={h}")
        if any(n % groups for n in counts):
            raise ValueError(
                f"per-layer hypernetworks need the same modules in every layer: {list(counts)} modules "
                f"of the shape classes do not split into {groups} layers"
            )
        self.rank, self.groups, self.counts = rank, groups, [n // groups for n in counts]

        def normal(std: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).normal_(0.0, 1.0, generator=rng) * std)

        # 0.02 is BERT's initialisation; a unit-norm token then enters at the size of its position embeddings.
        self.embed = nn.ParameterList([normal(0.02, groups, d, h) for d in dims])
        self.module_embedding = normal(0.02, groups, sum(self.counts), 1, h)
        self.direction_embedding = normal(0.02, groups, 1, rank, h)
        self.embed_norm = _GroupNorm(groups, h)
        self.trunk = nn.ModuleList([_BLOCKS[spec.kind](spec, groups, rng) for _ in range(spec.layers)])
        # A hidden state has unit entries, so that an output entry has std = std(W)·√h · 1/h.
        self.output_maps = nn.ParameterList(
            [normal(std * math.sqrt(h), groups, h, d) for std, d in zip(output_std, dims, strict=True)]
        )

    def forward(self, tokens: Sequence[Tensor], live: Sequence[Tensor]) -> list[Tensor]:
        """Generate one factor.

        Args:
            tokens: per shape class (m, r, d).
            live: per shape class (m, r), bool; pruned tokens are seen by no other token.

        Returns:
            Per shape class (m, r, d). Outputs carry the multiplier 1/h of maximal-update scaling (arXiv 2203.03466),
            without which Adam moves them about h times too far.
        """
        g, r = self.groups, self.rank
        # A matrix without live tokens attends to all of them: its output is unused, but must stay finite.
        masks = torch.cat([m.view(g, -1, r) for m in live], 1)
        masks = masks | ~masks.any(-1, keepdim=True)
        parts = [
            torch.bmm(x.reshape(g, -1, x.shape[-1]), w).view(g, -1, r, w.shape[-1])
            for x, w in zip(tokens, self.embed, strict=True)
        ]
        x = torch.cat(parts, 1) + self.module_embedding + self.direction_embedding
        x = self.embed_norm(x.view(g, -1, x.shape[-1]))
        for block in self.trunk:
            x = block(x, masks, r)
        x = x / x.shape[-1]
        pieces = x.split([n * r for n in self.counts], 1)
        return [torch.bmm(piece, w).view(-1, r, w.shape[-1]) for piece, w in zip(pieces, self.output_maps, strict=True)]


class HypernetworkTriple(nn.Module):
    """H_P, H_Λ and H_Q (H_Λ is absent for methods without singular values).

    Args:
        spec: kind and size of each.
        output_dims, output_counts: shape classes of P.
        input_dims, input_counts: shape classes of Q.
        modules: M.
        rank: r.
        groups: 1, or the number of layers.
        singular_values: whether H_Λ exists.
        output_std: standard deviation of the output entries times √d, for (P, Λ, Q).
        seed: of the initial values.
    """

    def __init__(
        self,
        spec: HypernetworkSpec,
        *,
        output_dims: Sequence[int],
        output_counts: Sequence[int],
        input_dims: Sequence[int],
        input_counts: Sequence[int],
        modules: int,
        rank: int,
        groups: int,
        singular_values: bool,
        output_std: tuple[float, float, float],
        seed: int,
    ) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)

        def build(dims: Sequence[int], counts: Sequence[int], std: float) -> Hypernetwork:
            return Hypernetwork(spec, dims, counts, rank, groups, [std / math.sqrt(d) for d in dims], rng)

        self.p = build(output_dims, output_counts, output_std[0])
        self.lam = build([1], [modules], output_std[1]) if singular_values else None
        self.q = build(input_dims, input_counts, output_std[2])

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Everything but the output maps."""
        return [p for n, p in self.named_parameters() if "output_maps" not in n]

    def output_parameters(self) -> list[nn.Parameter]:
        """The maps from the hidden size back to the factors."""
        return [p for n, p in self.named_parameters() if "output_maps" in n]

    def covered_by(self, freeze: Freeze) -> list[str]:
        """Names of the parameters that do not learn: none, all but the maps of each dimension d, or all."""
        if freeze == "none":
            return []
        maps = (".embed.", ".output_maps.") if freeze == "trunk" else ()
        return [n for n, _ in self.named_parameters() if not any(part in n for part in maps)]
