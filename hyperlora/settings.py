"""What a run is made of: names, sizes and constants of methods, hypernetworks, update rules and optimizers.

Whoever reads a recipe needs these, and PyTorch takes seconds to import: it is not imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

Kind = Literal["attention", "mlp", "cnn"]
Freeze = Literal["none", "trunk", "all"]
Rule = Literal["generate", "residual", "friction", "anchored", "reanchored", "hybrid"]
Direction = Literal["adam", "orthogonal"]
Initialization = Literal["orthonormal", "gaussian"]
Factorization = Literal["triplet", "fused"]
CNN_KERNEL = 3


@dataclass(frozen=True)
class HypernetworkSpec:
    """Kind and size of the three networks H_P, H_Λ, H_Q.

    Attributes:
        kind: ``attention`` (a BERT layer), ``mlp`` or ``cnn``.
        hidden_size: h, width of a token inside the network.
        heads: attention heads; must divide ``hidden_size``.
        intermediate_size: f, inner width; ``None`` takes TinyBERT's ratio 1200/312 for attention and, for ``mlp`` and
            ``cnn``, the width whose parameter count comes closest to that attention layer's.
        layers: depth of the trunk.
        per_layer: one network for each transformer layer instead of one shared by all.
    """

    kind: Kind = "attention"
    hidden_size: int = 312
    heads: int = 12
    intermediate_size: int | None = None
    layers: int = 1
    per_layer: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"hypernetwork kind {self.kind!r} is unknown; allowed: {', '.join(get_args(Kind))}")
        for name in ("hidden_size", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"hypernetwork {name}={getattr(self, name)}; allowed: 1 or more")

    @property
    def inner(self) -> int:
        """f with ``None`` resolved."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        attention_inner = round(self.hidden_size * 1200 / 312)
        if self.kind == "attention":
            return attention_inner
        h = self.hidden_size
        goal = replace(self, kind="attention").trunk_parameters
        # Solve the count below for f: it is linear in f for both kinds.
        width = 2 * h + 1 if self.kind == "mlp" else 2 * CNN_KERNEL * h + 1
        return max(1, round((goal / self.layers - 3 * h) / width))

    @property
    def trunk_parameters(self) -> int:
        """Parameters of one trunk (one network, one group)."""
        h, f = self.hidden_size, self.inner
        if self.kind == "attention":
            each = 4 * h * h + 4 * h + 2 * h * f + f + h + 4 * h
        elif self.kind == "mlp":
            each = 2 * h * f + f + h + 2 * h
        else:
            each = 2 * CNN_KERNEL * h * f + f + h + 2 * h
        return self.layers * each


@dataclass(frozen=True)
class UpdateRule:
    """The rule and its constants.

    Attributes:
        name: see :mod:`hyperlora.update_rules`.
        scale: a.
        friction: μ, for ``friction`` only: momentum is 1 - μ.
        reanchor_every: K, in optimizer steps, for ``reanchored`` only.
        every: K, in optimizer steps, for ``hybrid`` only: Φ moves by the gradient of every K-th step.
    """

    name: Rule = "hybrid"
    scale: float = 1.0
    friction: float = 0.1
    reanchor_every: int = 50
    every: int = 8

    def __post_init__(self) -> None:
        if self.name not in get_args(Rule):
            raise ValueError(f"update rule {self.name!r} is unknown; allowed: {', '.join(get_args(Rule))}")
        for name in ("every", "reanchor_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 step")


@dataclass(frozen=True)
class AdamSettings:
    """Constants of AdamW (arXiv 1711.05101)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Method:
    """What one method name stands for: the factors it has and where they come from.

    Attributes:
        singular_values: P, λ, Q with pruning and penalty (AdaLoRA), or B, A alone (LoRA).
        hypernetwork: the factors are generated instead of optimized directly.
        dora: PEFT's weight-decomposed layers; the magnitudes are optimized directly (arXiv 2402.09353).
        truncated: each step trains a random number of leading directions (DyLoRA, arXiv 2210.07558).
    """

    singular_values: bool = False
    hypernetwork: bool = False
    dora: bool = False
    truncated: bool = False

    def fuses(self, factorization: Factorization | None) -> bool:
        """Whether λ and Q are one tensor; ``None`` is fused for generated factors and triplets for direct ones."""
        return self.singular_values and (factorization or ("fused" if self.hypernetwork else "triplet")) == "fused"


METHODS: dict[str, Method] = {
    "lora": Method(),
    "dora": Method(dora=True),
    "dylora": Method(truncated=True),
    "adalora": Method(singular_values=True),
    "hyperlora": Method(hypernetwork=True),
    "hyperdora": Method(hypernetwork=True, dora=True),
    "hyperdylora": Method(hypernetwork=True, truncated=True),
    "hyperadalora": Method(singular_values=True, hypernetwork=True),
}
#: The rest of the field, which the optimizer of factors cannot drive; see :mod:`hyperlora.baselines`.
BASELINES: dict[str, Method] = {"rslora": Method(), "eva": Method(), "peft-adalora": Method(singular_values=True)}
#: Baselines that run on one worker: their gradients are in no flat buffer that could be averaged.
SINGLE_WORKER = ("eva", "peft-adalora")
