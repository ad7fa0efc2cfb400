"""Where P, λ, Q come from: direct parameters, or hypernetworks under one of six update rules.

With H the hypernetworks, θ the factors, D direct parameters and a a scale, θ_{i+1} is

    generate     H(θ_i)                      HyperAdaLoRA's text (arXiv 2510.02630, eq. 5-7) taken literally
    residual     θ_i + a·H(θ_i)
    friction     the same, and the output maps decay by 1 - μ after each step: with linear output maps the residual
                 rule integrates the gradient twice, which is momentum without friction
    anchored     θ_0 + a·H(θ_0)              a pure reparametrisation
    reanchored   anchored, with θ_0 := θ_i and the output maps at zero every K steps
    hybrid       D + a·H(θ_0)                where Φ moves at every K-th step and D at each

Only the parameters Φ of H, and D, are optimized. The graph of the last generation is kept until the gradients of θ
arrive: that is the second stage of the backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hyperlora.factors import FactorLayout, Factors
from hyperlora.hypernetworks import HypernetworkTriple
from hyperlora.polar import polar
from hyperlora.settings import AdamSettings, Direction, HypernetworkSpec, UpdateRule

#: What AdamW's updates usually measure (arXiv 2502.16982, section 2.2), so that its learning rates carry over.
UPDATE_RMS = 0.2


class Adam:
    """AdamW over a list of tensors as one fused kernel; skips its step on the device when ``found_inf`` is 1.

    The CPU's fused kernel pairs numbers by their place in memory and checks no strides, so everything that it is given
    has to be contiguous.
    """

    def __init__(self, tensors: list[Tensor], settings: AdamSettings) -> None:
        assert all(t.is_contiguous() for t in tensors), "AdamW's fused kernel needs contiguous tensors"
        self._tensors, self._settings = tensors, settings
        self._mean = [torch.zeros_like(t) for t in tensors]
        self._square = [torch.zeros_like(t) for t in tensors]
        self._steps = [torch.zeros((), dtype=torch.float32, device=t.device) for t in tensors]

    def step(self, gradients: list[Tensor], lr: float, found_inf: Tensor) -> None:
        self._run(self._tensors, gradients, lr, self._settings.weight_decay, found_inf)

    def direction(self, gradients: list[Tensor], found_inf: Tensor) -> list[Tensor]:
        """Update the moments alone; returns -m̂/(√v̂ + ε) for each tensor, zero when the step is skipped."""
        result = [torch.zeros_like(t) for t in self._tensors]
        self._run(result, gradients, 1.0, 0.0, found_inf)
        return result

    def _run(
        self, target: list[Tensor], gradients: list[Tensor], lr: float, weight_decay: float, found_inf: Tensor
    ) -> None:
        if not target:
            return
        beta1, beta2 = self._settings.betas
        adamw(
            target,
            [g.contiguous() for g in gradients],
            self._mean,
            self._square,
            [],
            self._steps,
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self._settings.eps,
            maximize=False,
        )

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Named moments and step counts, the tensors themselves."""
        named = {"mean": self._mean, "square": self._square, "steps": self._steps}
        return {f"{prefix}.{key}.{n}": t for key, tensors in named.items() for n, t in enumerate(tensors)}


class ParameterAdam(Adam):
    """AdamW of a model's own parameters.

    One of another precision is moved in ``dtype``, and the model has it rounded: a bfloat16 number to which small steps
    are added stays where it is. What others put in the place of a parameter's data, as casting a model does, or write
    into it, counts.

    Args:
        parameters: on their final device; changed in place.
        settings: constants of AdamW.
        dtype: of the gradients.
    """

    def __init__(self, parameters: Sequence[Tensor], settings: AdamSettings, dtype: torch.dtype) -> None:
        self._parameters, self._dtype = parameters, dtype
        self._own = [p.detach() for p in parameters]
        self._versions = [p._version for p in parameters]
        super().__init__([self._value(own) for own in self._own], settings)

    def _value(self, own: Tensor) -> Tensor:
        """What AdamW moves: the model's data itself where it can be."""
        return own.to(self._dtype).contiguous()

    def _follow(self) -> None:
        """Take over what others wrote into parameters, or put in the place of their data."""
        for n, (parameter, own) in enumerate(zip(self._parameters, self._own, strict=True)):
            if parameter.data_ptr() != own.data_ptr():
                self._own[n] = parameter.detach()
                self._tensors[n] = self._value(self._own[n])
            elif parameter._version != self._versions[n]:
                value = self._tensors[n]
                if value is not own:
                    # What is the rounded value still, as after a model was loaded with its optimizer, keeps its bits.
                    value.copy_(torch.where(value.to(own.dtype) == own, value, own.to(self._dtype)))
            self._versions[n] = parameter._version

    def _rounded(self) -> tuple[list[Tensor], list[Tensor]]:
        """Data of the model that is no value itself, and the values."""
        pairs = [(own, value) for own, value in zip(self._own, self._tensors, strict=True) if own is not value]
        return [own for own, _ in pairs], [value for _, value in pairs]

    def step(self, gradients: list[Tensor], lr: float, found_inf: Tensor) -> None:
        self._follow()
        super().step(gradients, lr, found_inf)
        rounded, values = self._rounded()
        if rounded:
            torch._foreach_copy_(rounded, values)
        self._versions = [p._version for p in self._parameters]

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Moments, step counts, and what the model has rounded."""
        self._follow()
        return super().state(prefix) | {f"{prefix}.value.{n}": t for n, t in enumerate(self._rounded()[1])}


class FactorAdam:
    """AdamW over P, Q and, at its own rate, λ.

    Args:
        factors: the tensors to move, in place.
        settings: constants of AdamW.
        direction: ``adam``, or ``orthogonal``: P and Q move along the polar factor of Adam's direction, so long that an
            entry moves by :data:`UPDATE_RMS` learning rates in the root mean square.
    """

    def __init__(self, factors: Factors, settings: AdamSettings, direction: Direction = "adam") -> None:
        self._factors, self._decay, self._direction = factors, settings.weight_decay, direction
        self._matrices = Adam([*factors.p, *factors.q], settings)
        self._lam = Adam([] if factors.lam is None else [factors.lam], settings)

    def step(self, gradients: Factors, lr: float, ratio: float, found_inf: Tensor, live: list[Tensor]) -> None:
        """``ratio`` is λ's learning rate over that of P and Q; ``live`` as the hypernetworks get it."""
        if self._direction == "adam":
            self._matrices.step([*gradients.p, *gradients.q], lr, found_inf)
        else:
            self._orthogonal_step(gradients, lr, found_inf, live)
        if gradients.lam is not None:
            self._lam.step([gradients.lam], lr * ratio, found_inf)

    def _orthogonal_step(self, gradients: Factors, lr: float, found_inf: Tensor, live: list[Tensor]) -> None:
        n = len(self._factors.p)
        masks = [*live[:n], *live[len(live) - len(self._factors.q) :]]
        moves = self._matrices.direction([*gradients.p, *gradients.q], found_inf)
        # A pruned direction still has moments, but no say in where the others go.
        rows = [m.transpose(1, 2) if i < n else m for i, m in enumerate(moves)]
        rows = polar([r * mask.unsqueeze(-1) for r, mask in zip(rows, masks, strict=True)])
        moves = [(r.transpose(1, 2) if i < n else r) * (UPDATE_RMS * r.shape[-1] ** 0.5) for i, r in enumerate(rows)]
        tensors = [*self._factors.p, *self._factors.q]
        if self._decay:
            torch._foreach_mul_(tensors, 1 - lr * self._decay * (1 - found_inf).to(tensors[0].dtype))
        torch._foreach_add_(tensors, moves, alpha=lr)

    def state(self, prefix: str) -> dict[str, Tensor]:
        return self._matrices.state(prefix) | self._lam.state(f"{prefix}.lam")


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of one step: factors (direct parameters), hypernetwork trunk, output maps.

    ``singular_values`` multiplies all three for λ and H_Λ.
    """

    factors: float
    trunk: float
    output: float
    singular_values: float = 1.0


class FactorSource(Protocol):
    """What the optimizer asks of direct and generated factors alike."""

    factors: Factors

    def advance(
        self, gradients: Factors, rates: LearningRates, found_inf: Tensor, live: list[Tensor], *, pruned: bool = True
    ) -> None:
        """Take the gradients of the factors, update what is optimized, and set the next ``factors``.

        ``pruned``: whether ``live`` may differ from that of the last call.
        """

    def state(self) -> dict[str, Tensor]:
        """All tensors that a checkpoint needs, by name."""

    def restored(self, live: list[Tensor]) -> None:
        """Called after values were copied into the tensors of :meth:`state`."""

    def optimized(self) -> Iterable[Tensor]:
        """The tensors that carry optimizer state."""


class DirectFactors:
    """AdamW on P, λ, Q themselves: AdaLoRA's own parametrisation, and LoRA's when there is no λ."""

    def __init__(self, initial: Factors, settings: AdamSettings, direction: Direction = "adam") -> None:
        self.factors = initial
        self._adam = FactorAdam(initial, settings, direction)

    def advance(
        self, gradients: Factors, rates: LearningRates, found_inf: Tensor, live: list[Tensor], *, pruned: bool = True
    ) -> None:
        self._adam.step(gradients, rates.factors, rates.singular_values, found_inf, live)

    def state(self) -> dict[str, Tensor]:
        return {f"factors.{n}": t for n, t in enumerate(self.factors.tensors())} | self._adam.state("adam.factors")

    def restored(self, live: list[Tensor]) -> None:
        pass

    def optimized(self) -> Iterable[Tensor]:
        return self.factors.tensors()


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Products of float32 matrices in this precision within the block, whatever the program around it allows.

    Args:
        precision: ``ieee``, as the factors need it: of rounded Gram matrices the polar factor's iteration diverges. Or
            ``tf32`` on a GPU, ten bits of mantissa, for what the hypernetworks compute: their cost is their products.
    """
    backends: list[Any] = [torch.backends.cuda.matmul]
    if precision == "ieee":  # what a program allows on a CPU is bfloat16
        backends.append(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, own in zip(backends, before, strict=True):
            backend.fp32_precision = own


class GeneratedFactors:
    """Hypernetworks generate P, λ, Q; AdamW runs on their parameters (and on D under ``hybrid``)."""

    def __init__(
        self,
        initial: Factors,
        networks: HypernetworkTriple,
        rule: UpdateRule,
        settings: AdamSettings,
        live: list[Tensor],
        direction: Direction = "adam",
    ) -> None:
        self.networks, self.rule, self._settings = networks, rule, settings
        self._output: list[Tensor] = [*networks.output_parameters()]
        # Token input of H, and the additive part θ_i, θ_0 or D.
        self._input = initial.like([t.clone() for t in initial.tensors()])
        self._base = initial.like([t.clone() for t in initial.tensors()])
        self._learn_all_but(())
        self._adam_base = FactorAdam(self._base, settings, direction) if rule.name == "hybrid" else None
        self._step, self._steps_done = torch.zeros((), dtype=torch.int64), 0  # of the state, and as the host reads it
        self._generate(live)

    def _learn_all_but(self, names: Collection[str]) -> None:
        for name, parameter in self.networks.named_parameters():
            parameter.requires_grad_(name not in names)
        lam = set() if self.networks.lam is None else {id(p) for p in self.networks.lam.parameters()}
        parts = (self.networks.trunk_parameters(), self.networks.output_parameters())
        # Trunk and output maps of H_P and H_Q, then those of H_Λ, which has a rate of its own.
        self._phi: list[list[Tensor]] = [
            [p for p in part if p.requires_grad and (id(p) in lam) == of_lam]
            for of_lam in (False, True)
            for part in parts
        ]
        self._adam_phi = [Adam(part, self._settings) for part in self._phi]

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters of the hypernetworks that do not learn."""
        return [name for name, p in self.networks.named_parameters() if not p.requires_grad]

    def freeze(self, names: Collection[str], live: list[Tensor]) -> None:
        """Let the named parameters of the hypernetworks, and no others, stay as they are from now on.

        They get neither gradients nor optimizer state; the moments of the others start at zero.

        Raises:
            ValueError: nothing would learn, or a rule that shrinks the output maps would change frozen ones.
        """
        maps = {id(p) for p in self._output}
        frozen_maps = [n for n, p in self.networks.named_parameters() if n in names and id(p) in maps]
        if frozen_maps and self.rule.name != "hybrid":
            raise ValueError(
                f"update rule {self.rule.name!r} learns through its output maps: freeze them under 'hybrid' alone"
            )
        self._learn_all_but(names)
        self._generate(live)

    def _generate(self, live: list[Tensor]) -> None:
        """Run H on the current input and keep its graph."""
        outputs, inputs = len(self._input.p), self._input
        with torch.enable_grad(), products("tf32"):
            generated = self.networks.p([t.transpose(1, 2) for t in inputs.p], live[:outputs])
            self._generated = [t.transpose(1, 2) for t in generated]
            if inputs.lam is not None:
                assert self.networks.lam is not None
                self._generated += [self.networks.lam([inputs.lam.unsqueeze(-1)], [live[outputs]])[0].squeeze(-1)]
            self._generated += self.networks.q(inputs.q, live[outputs + 1 :])
        self._combine()

    def _combine(self) -> None:
        """Set ``factors`` from what H generated last and the additive part."""
        values = [t.detach() for t in self._generated]
        if self.rule.name != "generate":
            values = list(torch._foreach_add(self._base.tensors(), values, alpha=self.rule.scale))
        self.factors = self._input.like([v.contiguous() for v in values])

    def generated(self) -> list[Tensor]:
        """The factors with the graph to Φ attached, in the order of ``Factors.tensors``."""
        if self.rule.name == "generate":
            return self._generated
        pairs = zip(self._base.tensors(), self._generated, strict=True)
        return [base + self.rule.scale * out for base, out in pairs]

    @property
    def phi(self) -> list[Tensor]:
        """Parameters of the hypernetworks that learn: trunk and output maps of H_P and H_Q, then of H_Λ."""
        return [p for part in self._phi for p in part]

    def gradients(self, gradients: Factors) -> list[Tensor]:
        """Second stage: ∂L/∂Φ from the gradients of the factors, in the order of :attr:`phi`."""
        scale = 1.0 if self.rule.name == "generate" else self.rule.scale
        weighted = list(torch._foreach_mul(gradients.tensors(), scale))
        # What a wholly frozen network generates has no graph.
        pairs = [(out, g) for out, g in zip(self._generated, weighted, strict=True) if out.requires_grad]
        if not pairs:
            return []
        with products("tf32"):
            return list(torch.autograd.grad([out for out, _ in pairs], self.phi, [g for _, g in pairs]))

    def advance(
        self, gradients: Factors, rates: LearningRates, found_inf: Tensor, live: list[Tensor], *, pruned: bool = True
    ) -> None:
        name = self.rule.name
        self._step += 1
        self._steps_done += 1
        moves = name != "hybrid" or self._steps_done % self.rule.every == 0
        if moves:
            phi = self.gradients(gradients)
            speeds = [rates.trunk, rates.output, *(r * rates.singular_values for r in (rates.trunk, rates.output))]
            for part, adam, rate in zip(self._phi, self._adam_phi, speeds, strict=True):
                adam.step(phi[: len(part)], rate, found_inf)
                phi = phi[len(part) :]
        if name == "hybrid":
            assert self._adam_base is not None
            self._adam_base.step(gradients, rates.factors, rates.singular_values, found_inf, live)
        elif name == "generate":
            self._keep(self._input, found_inf)
        elif name in ("residual", "friction"):
            self._keep(self._input, found_inf)
            self._keep(self._base, found_inf)
            if name == "friction":
                taken = (1 - found_inf).to(self._output[0].dtype)
                with torch.no_grad():
                    torch._foreach_mul_(self._output, 1 - self.rule.friction * taken)
        elif name == "reanchored" and self._steps_done % self.rule.reanchor_every == 0:
            # With the new Φ first, so that the step just taken is not lost with the output maps.
            self._generate(live)
            self._keep(self._input, found_inf)
            self._keep(self._base, found_inf)
            with torch.no_grad():
                torch._foreach_mul_(self._output, found_inf.to(self._output[0].dtype))
        if moves or pruned:
            self._generate(live)
        else:
            self._combine()

    def _keep(self, target: Factors, found_inf: Tensor) -> None:
        """``target := factors``, unless the step was skipped."""
        for old, new in zip(target.tensors(), self.factors.tensors(), strict=True):
            old.copy_(torch.where(found_inf > 0, old, new))

    def state(self) -> dict[str, Tensor]:
        named = {f"input.{n}": t for n, t in enumerate(self._input.tensors())}
        named |= {f"base.{n}": t for n, t in enumerate(self._base.tensors())}
        named |= {f"hypernetwork.{n}": p.detach() for n, p in self.networks.named_parameters()}
        parts = ("trunk", "output", "lam.trunk", "lam.output")
        for part, adam in zip(parts, self._adam_phi, strict=True):
            named |= adam.state(f"adam.{part}")
        if self._adam_base is not None:
            named |= self._adam_base.state("adam.base")
        return named | {"rule_step": self._step}

    def restored(self, live: list[Tensor]) -> None:
        self._steps_done = int(self._step)
        self._generate(live)

    def optimized(self) -> Iterable[Tensor]:
        return [*self.phi, *(self._base.tensors() if self.rule.name == "hybrid" else [])]


def _layers(layout: FactorLayout) -> list[int | None]:
    """The layers of a model, each of which has as many modules of every shape.

    Raises:
        ValueError: they differ; their sets of networks are told apart by the modules' order.
    """
    layers = list(dict.fromkeys(m.layer for m in layout.modules))
    for members in [range(len(layout.modules)), *(c.members for c in layout.classes)]:
        found = [layout.modules[n].layer for n in members]
        if found != [layer for layer in layers for _ in range(len(found) // len(layers))]:
            raise ValueError(
                "per-layer hypernetworks need the same modules in every layer, one layer after another; modules of one "
                f"shape are in the layers {', '.join(map(str, found))}"
            )
    return layers


def build_networks(
    layout: FactorLayout,
    spec: HypernetworkSpec,
    *,
    start: tuple[float, float | None, float],
    rule: UpdateRule,
    seed: int,
) -> HypernetworkTriple:
    """Hypernetworks that fit a model's shape classes; shared, or one set for each layer.

    Args:
        layout: of the model.
        spec: kind and size.
        start: under ``generate``, the norms of columns of P, of λ (None: no H_Λ) and of rows of Q with which the
            output maps start; under all other rules they start at zero, so that training starts from the initial
            factors.
        rule: how outputs become factors.
        seed: of the initial values.

    Raises:
        ValueError: per-layer networks on a model whose layers differ, or ``heads`` that do not divide the hidden size.
    """
    groups = len(_layers(layout)) if spec.per_layer else 1
    p, lam, q = start if rule.name == "generate" else (0.0, 0.0, 0.0)
    device, dtype = layout.classes[0].buffer.device, layout.classes[0].buffer.dtype
    networks = HypernetworkTriple(
        spec,
        output_dims=[c.dim for c in layout.outputs],
        output_counts=[len(c.members) for c in layout.outputs],
        input_dims=[c.dim for c in layout.inputs],
        input_counts=[len(c.members) for c in layout.inputs],
        modules=len(layout.modules),
        rank=layout.rank,
        groups=groups,
        singular_values=start[1] is not None,
        output_std=(p, lam or 0.0, q),
        seed=seed,
    )
    return networks.to(device=device, dtype=dtype if dtype.itemsize >= 4 else torch.float32)


def copy_state(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy a saved state into live tensors of the same names and shapes.

    Raises:
        ValueError: names or shapes differ; all differences are named.
    """
    problems = [f"{name} is missing" for name in target.keys() - source.keys()]
    problems += [f"{name} is unknown" for name in source.keys() - target.keys()]
    problems += [
        f"{name} has shape {tuple(source[name].shape)}, expected {tuple(t.shape)}"
        for name, t in target.items()
        if name in source and source[name].shape != t.shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"optimizer state does not fit this model and method: {shown}")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
