"""P, λ and Q over the plain LoRA layers of a PEFT model, stacked by shape.

PEFT computes ``scale · B(A(x))``. With ``A = diag(λ·mask) Q`` and ``B = P`` that is AdaLoRA's update (DESIGN: the model
stays plain LoRA), and the gradients of the factors follow from those of A and B:

    ∂L/∂P = ∂L/∂B,   ∂L/∂Q_k = λ_k mask_k ∂L/∂A_k,   ∂L/∂λ_k = mask_k ⟨∂L/∂A_k, Q_k⟩

Shape legend: M modules, m modules of one shape class, r directions (initial rank), i input and o output dimensions.
``A``: (m, r, i); ``B``: (m, o, r); ``P``: (m, o, r); ``Q``: (m, r, i); ``lam``, ``mask``: (M, r).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: ‖B A‖ over ‖B‖ ‖A‖ up to which a product that cancels counts as zero: B and A may be rounded to bfloat16.
ROUNDING = 2.0**-8


@dataclass(frozen=True)
class AdaptedModule:
    """One module with a LoRA adapter: its name in the PEFT model and the weights of its adapter."""

    name: str
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dora: bool = False

    @property
    def layer(self) -> int | None:
        """Index of the transformer layer, the first number in the dotted name; None outside the stack."""
        found = re.search(r"\.(\d+)\.", f".{self.name}.")
        return int(found.group(1)) if found else None

    @property
    def short_name(self) -> str:
        """The name below the layer, such as ``self_attn.q_proj``."""
        return re.sub(r"^.*?\.\d+\.", "", self.name, count=1)


def adapted_modules(model: nn.Module, adapter_name: str = "default") -> list[AdaptedModule]:
    """The modules of ``model`` that carry the LoRA adapter ``adapter_name``, in module order.

    Raises:
        ValueError: there is none, one is no linear LoRA layer or adapts several experts, ranks differ between modules,
            or the rank exceeds a dimension of the module it adapts.
    """
    from peft.tuners.lora import LoraLayer  # takes seconds

    found, problems = [], []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter_name not in module.lora_A:
            if adapter_name in module.lora_embedding_A:
                problems.append(f"{name}: embedding adapters have no A and B as linear layers do")
            continue
        a: nn.Parameter = module.lora_A[adapter_name].weight  # type: ignore[assignment]
        b: nn.Parameter = module.lora_B[adapter_name].weight  # type: ignore[assignment]
        if a.ndim != 2:
            problems.append(f"{name}: only linear layers are supported, not a weight of {a.ndim} dimensions")
            continue
        # As it is without torch.compile and DistributedDataParallel around it, so that a state fits with and without.
        clean = name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("base_model.model.")
        experts = getattr(module, "num_experts", 1)
        if experts > 1:
            # PEFT's A has all rows of one expert after another, its B the experts of one direction.
            problems.append(
                f"{clean}: a parameter of {experts} experts (target_parameters) is not supported: row k of A does not "
                "belong to column k of B"
            )
            continue
        dora = adapter_name in module.lora_magnitude_vector
        found.append(AdaptedModule(clean, a, b, module.scaling[adapter_name], dora))
        rank = a.shape[0]
        if rank > min(a.shape[1], b.shape[0]):
            problems.append(f"{clean}: rank {rank} exceeds a dimension of the {b.shape[0]}x{a.shape[1]} weight")
    ranks = {m.a.shape[0] for m in found}
    if len(ranks) > 1:
        problems.append(f"all modules need one initial rank, found {sorted(ranks)} (a rank_pattern?)")
    if len({m.scaling for m in found}) > 1:
        problems.append("all modules need one scale alpha/r (an alpha_pattern?)")
    if len({(m.a.device, m.a.dtype) for m in found}) > 1:
        problems.append("all adapter weights need one device and one dtype")
    if not found:
        problems.append(f"the model has no linear LoRA layer with an adapter named {adapter_name!r}")
    if problems:
        raise ValueError("; ".join(problems))
    return found


@dataclass
class Factors:
    """P, λ, Q of all modules; ``lam`` is None for the methods without singular values."""

    p: list[Tensor]
    lam: Tensor | None
    q: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """All factor tensors in the fixed order P…, λ, Q…"""
        return [*self.p, *([] if self.lam is None else [self.lam]), *self.q]

    def like(self, tensors: list[Tensor]) -> Factors:
        """The same structure over other tensors given in the order of :meth:`tensors`."""
        n = len(self.p)
        if self.lam is None:
            return Factors(tensors[:n], None, tensors[n:])
        return Factors(tensors[:n], tensors[n], tensors[n + 1 :])


class ShapeClass:
    """Modules whose weights on one side have equal shape, with their weights as views of one stacked buffer."""

    def __init__(self, dim: int, members: list[int], weights: list[nn.Parameter]) -> None:
        self.dim = dim
        self.members = members
        self.weights = weights
        self.buffer = torch.stack([w.detach() for w in weights])
        self.index = torch.tensor(members, device=self.buffer.device)
        self.attach()

    def attach(self) -> None:
        """Make the modules' weights views of the buffer, which takes over their dtype: what was cast stays cast.

        Raises:
            RuntimeError: the weights are on another device.
        """
        now = self.weights[0]
        if now.device != self.buffer.device:
            raise RuntimeError(
                f"the model is on {now.device}, but the optimizer was built when it was on {self.buffer.device}: move "
                "the model first"
            )
        # Factors that live in the old buffer stay there, as precise as they were.
        self.buffer = self.buffer.to(now.dtype)
        for weight, view in zip(self.weights, self.buffer.unbind(0), strict=True):
            weight.data = view

    def attached(self) -> bool:
        """Whether the weights still are views of the buffer (moving or casting a model replaces them)."""
        start, stride = self.buffer.data_ptr(), self.buffer.stride(0) * self.buffer.element_size()
        return all(w.data_ptr() == start + n * stride for n, w in enumerate(self.weights))


class FactorLayout:
    """How the modules of a model are grouped: ``inputs`` by width of A, ``outputs`` by height of B."""

    def __init__(self, modules: list[AdaptedModule]) -> None:
        self.modules = modules
        self.rank = modules[0].a.shape[0]
        self.scaling = modules[0].scaling
        self.outputs = self._group([m.b.shape[0] for m in modules], [m.b for m in modules])
        self.inputs = self._group([m.a.shape[1] for m in modules], [m.a for m in modules])

    @staticmethod
    def _group(dims: list[int], weights: list[nn.Parameter]) -> list[ShapeClass]:
        classes = []
        for dim in sorted(set(dims)):
            members = [n for n, d in enumerate(dims) if d == dim]
            classes.append(ShapeClass(dim, members, [weights[n] for n in members]))
        return classes

    @property
    def classes(self) -> list[ShapeClass]:
        return [*self.outputs, *self.inputs]

    def versions(self) -> list[int]:
        """Counts of what was written into the weights themselves; writing the buffers does not move them."""
        return [w._version for c in self.classes for w in c.weights]

    @property
    def parameters(self) -> int:
        """Numbers in A and B of all modules."""
        return sum(c.buffer.numel() for c in self.classes)

    def holds_update(self) -> Tensor:
        """Whether B A of each module is not zero, (M,) bool; ‖B A‖² = ⟨BᵀB, A Aᵀ⟩ needs no product of full size."""
        count, buffer = len(self.modules), self.outputs[0].buffer
        dtype = buffer.dtype if buffer.dtype.itemsize >= 4 else torch.float32
        of_b, of_a = torch.empty(2, count, self.rank, self.rank, dtype=dtype, device=buffer.device)
        for shape_class in self.outputs:
            b = shape_class.buffer.to(dtype)
            of_b.index_copy_(0, shape_class.index, b.transpose(1, 2) @ b)
        for shape_class in self.inputs:
            a = shape_class.buffer.to(dtype)
            of_a.index_copy_(0, shape_class.index, a @ a.transpose(1, 2))
        product = (of_b * of_a).sum((1, 2))
        norms = of_b.diagonal(dim1=1, dim2=2).sum(-1) * of_a.diagonal(dim1=1, dim2=2).sum(-1)
        return ~(product <= norms * ROUNDING**2)

    def write(self, factors: Factors, gain: Tensor | None) -> None:
        """Put the factors into the model's weights: ``B = P`` and ``A = gain · Q`` (gain (M, r), None for one)."""
        for shape_class, p in zip(self.outputs, factors.p, strict=True):
            if p.data_ptr() != shape_class.buffer.data_ptr():
                shape_class.buffer.copy_(p)
        for shape_class, q in zip(self.inputs, factors.q, strict=True):
            if gain is not None:
                scaled = q * gain.index_select(0, shape_class.index).unsqueeze(-1)
                shape_class.buffer.copy_(scaled)
            elif q.data_ptr() != shape_class.buffer.data_ptr():
                shape_class.buffer.copy_(q)

    def gradients(self, factors: Factors, mask: Tensor, grad_b: list[Tensor], grad_a: list[Tensor]) -> Factors:
        """Gradients of P, λ, Q from those of B and A, with pruned directions at zero."""
        if factors.lam is None:
            return Factors(list(grad_b), None, list(grad_a))
        gain = factors.lam * mask
        grad_lam = torch.empty_like(factors.lam)
        grad_q = []
        for shape_class, q, g in zip(self.inputs, factors.q, grad_a, strict=True):
            grad_lam.index_copy_(0, shape_class.index, (g * q).sum(-1))
            grad_q.append(g * gain.index_select(0, shape_class.index).unsqueeze(-1))
        return Factors(list(grad_b), grad_lam.mul_(mask), grad_q)
