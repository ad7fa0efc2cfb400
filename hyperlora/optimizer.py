"""HyperAdaLoRA as one torch optimizer over a model with plain PEFT LoRA layers (arXiv 2510.02630, 2303.10512).

The model computes ordinary LoRA, ``scale · B A x``. The optimizer owns P, λ, Q, writes ``A = diag(λ·mask) Q`` and
``B = P``, and in :meth:`HyperAdaLoRA.step` does the rest: factor gradients, importance, orthogonality, pruning, the
second stage of the backward pass through the hypernetworks, their AdamW step and the next P, λ, Q. Forward and backward
therefore cost what LoRA's cost, and no training loop has to know about any of it.

Shape legend: M modules, m modules of one shape class, r directions (initial rank), i input and o output dimensions.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, get_args
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperlora import orthogonality
from hyperlora.factors import ROUNDING, FactorLayout, Factors, adapted_modules
from hyperlora.masks import Smoothed, prune_to
from hyperlora.pruning import BudgetPlan, Pruning
from hyperlora.settings import (
    METHODS,
    AdamSettings,
    Direction,
    Factorization,
    HypernetworkSpec,
    Initialization,
    UpdateRule,
)
from hyperlora.update_rules import (
    DirectFactors,
    FactorSource,
    GeneratedFactors,
    LearningRates,
    ParameterAdam,
    build_networks,
    copy_state,
    products,
)

#: γ of triplets when none is given; AdaLoRA's range for GLUE is 0.1 to 0.3.
GAMMA = 0.1
#: Learning rate of hypernetworks over that of direct factors under ``hybrid``.
BESIDE = 0.05
#: Steps between two looks at the count of skipped ones.
LOOK = 20
#: Steps between two times that the processes of a group take over the state of the first.
AGREE = 100
#: Of the largest entry, by which weights that two processors made from one seed may differ.
UNLIKE = 1e-5
#: Models whose adapters are views of stacked buffers; a copy of one is none of them.
_STACKED: WeakSet[nn.Module] = WeakSet()
#: Models that DyLoRA trains, and by which optimizer; a copy of one is none of them.
_TRUNCATING: WeakKeyDictionary[nn.Module, ref[HyperAdaLoRA]] = WeakKeyDictionary()


def _own_tensors(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Give the adapter's entries of a state tensors of their own.

    Views of one buffer count as one tensor for safetensors, which would keep the first of them.
    """
    for name, tensor in state.items():
        adapter = name.startswith(prefix) and (".lora_A." in name or ".lora_B." in name)
        if module in _STACKED and adapter and not isinstance(tensor, nn.Parameter):  # as they are with keep_vars
            state[name] = tensor.clone()


def _show(module: nn.Module, truncated: bool) -> None:
    optimizer = _TRUNCATING[module]() if module in _TRUNCATING else None
    if optimizer is not None:
        optimizer.show(truncated)


def _match_mode(module: nn.Module, _inputs: Any) -> None:
    _show(module, module.training)


def _show_all(module: nn.Module, _prefix: str, _keep: bool) -> None:
    _show(module, False)


class HyperAdaLoRA(torch.optim.Optimizer):
    """Optimizer of the adapters (and of every other trainable parameter) of a PEFT LoRA model.

    Parameter groups, in order: ``factors`` (lora_A and lora_B; its rate drives direct factors), ``hypernetwork_trunk``,
    ``hypernetwork_output``, and ``other`` (trainable parameters outside the LoRA pairs, such as a classification head
    or DoRA's magnitudes, under plain AdamW). A scheduler scales all of them.

    Args:
        model: a PEFT model with LoRA layers of one initial rank, on its final device.
        lr: of direct factors (``lora``, ``dora``, ``dylora``, ``adalora``, and the direct part of ``hybrid``).
        method: a key of :data:`METHODS`.
        trunk_lr: of the hypernetworks without their output maps; ``None`` takes ``lr``, and under ``hybrid``, where the
            direct factors learn beside them, :data:`BESIDE` times ``lr``.
        output_lr: of the output maps; ``None`` as for ``trunk_lr``.
        other_lr: of all other trainable parameters; ``None`` takes ``lr``.
        lambda_ratio: learning rates of λ and H_Λ over those of P, Q, H_P and H_Q.
        total_steps: T, optimizer steps of the whole run; needed when ranks are to fall.
        target_rank: mean rank over the modules at the end; ``None`` keeps the initial rank.
        pruning: schedule and score; used by methods with singular values.
        gamma: weight of the orthogonality penalty in the training objective; it is in no reported loss. ``None`` takes
            :data:`GAMMA` for triplets, and 0 where P and diag(λ)Q are updated.
        hypernetwork: kind and size.
        update_rule: how outputs become factors.
        adam: constants of AdamW.
        initialization: of P and Q: ``orthonormal`` directions, or ``gaussian`` entries of std 0.02 (PEFT's AdaLoRA).
            λ starts at zero. Methods without λ start from the values that PEFT gave A and B.
        factorization: of methods with singular values. ``triplet`` updates P, λ and Q each for itself, as AdaLoRA does;
            ``fused`` updates P and S = diag(λ)Q, so that λ_k = ‖S_k‖ and a direction turns as fast while its λ is small
            as later. ``None`` takes ``fused`` for generated and ``triplet`` for direct factors.
        direction: of the steps of direct factors and of the direct part of ``hybrid``: ``adam``, or ``orthogonal``, the
            polar factor of Adam's direction in each matrix. ``None`` takes ``orthogonal`` for ``hyperadalora`` under
            ``hybrid`` and ``adam`` otherwise.
        max_grad_norm: clip the averaged gradient of A, B and other parameters to this norm; ``None`` does not.
        seed: of factors, hypernetworks and truncation.
        process_group: average gradients over it in one all-reduce per step; ``None`` leaves that to the caller (DDP).
        adapter_name: of the PEFT adapter.
        replace: overwrite an adapter that already holds an update (B A is not zero) where the factors start anew: with
            singular values, or under ``generate``. For a state that :meth:`load_state_dict` brings back afterwards.

    Raises:
        ValueError: an unknown method, a model without suitable LoRA layers, an update that would be lost, a budget that
            cannot be reached, or a rank budget without ``total_steps``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-3,
        *,
        method: str = "hyperadalora",
        trunk_lr: float | None = None,
        output_lr: float | None = None,
        other_lr: float | None = None,
        lambda_ratio: float = 1.0,
        total_steps: int | None = None,
        target_rank: float | None = None,
        pruning: Pruning | None = None,
        gamma: float | None = None,
        hypernetwork: HypernetworkSpec | None = None,
        update_rule: UpdateRule | None = None,
        adam: AdamSettings | None = None,
        initialization: Initialization = "orthonormal",
        factorization: Factorization | None = None,
        direction: Direction | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        adapter_name: str = "default",
        replace: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}")
        if initialization not in get_args(Initialization):
            allowed = ", ".join(get_args(Initialization))
            raise ValueError(f"initialization {initialization!r} is unknown; allowed: {allowed}")
        if factorization not in (None, *get_args(Factorization)):
            allowed = ", ".join(get_args(Factorization))
            raise ValueError(f"factorization {factorization!r} is unknown; allowed: {allowed}")
        self.method = METHODS[method]
        self.method_name = method
        modules = adapted_modules(model, adapter_name)
        if self.method.dora and not all(m.dora for m in modules):
            raise ValueError(f"method {method!r} needs DoRA layers: LoraConfig(use_dora=True)")
        self.rule = rule = update_rule or UpdateRule()
        #: Of the steps of direct factors.
        self.direction = direction = self._resolved_direction(direction, rule)
        #: Whether λ and Q are one tensor, S = diag(λ)Q.
        self.fused = self.method.fuses(factorization)
        self.layout = FactorLayout(modules)
        self._adam_settings = adam or AdamSettings()
        if gamma is None:
            gamma = 0.0 if self.fused else GAMMA
        #: Weight of the penalty; 0 for methods without singular values.
        self.gamma = gamma if self.method.singular_values else 0.0
        self._lambda_ratio = lambda_ratio
        self._max_grad_norm = max_grad_norm
        self._seed = seed
        self._process_group = process_group
        self._agreed = process_group is None

        device = modules[0].a.device
        dtype = modules[0].a.dtype if modules[0].a.dtype.itemsize >= 4 else torch.float32
        anew = self.method.singular_values or (self.method.hypernetwork and rule.name == "generate")
        if anew and not replace and device.type != "meta":
            self._refuse_update()
        count, rank = len(modules), self.layout.rank
        self.steps_done = 0
        self.mask = torch.ones(count, rank, dtype=torch.bool, device=device)
        if pruning is not None and pruning.schedule != "none" and target_rank is None and self.method.singular_values:
            raise ValueError(f"pruning={pruning.schedule!r} needs target_rank, the mean rank at the end")
        self.plan = self._plan(pruning or Pruning(), count * rank, target_rank, total_steps)
        self.live = count * rank

        #: Kind and size of the hypernetworks; None for direct factors.
        self.hypernetwork = (hypernetwork or HypernetworkSpec()) if self.method.hypernetwork else None
        with torch.device("cpu"):  # where one seed gives the same numbers, whatever the program's own default is
            self.source = self._build_source(self._initial_factors(initialization, dtype))

        owned = {id(p) for m in modules for p in (m.a, m.b)}
        self._other = [p for p in model.parameters() if p.requires_grad and id(p) not in owned]
        self._adam_other = ParameterAdam(self._other, self._adam_settings, dtype)
        self._allocate_gradients(dtype, device)
        self._smoothed = self._build_smoothed()

        generator_lr = BESIDE * lr if rule.name == "hybrid" else lr
        generated = self.source if isinstance(self.source, GeneratedFactors) else None
        groups: list[dict[str, Any]] = [
            {"params": [p for m in modules for p in (m.a, m.b)], "lr": lr, "name": "factors"},
            {
                "params": generated.networks.trunk_parameters() if generated else [],
                "lr": generator_lr if trunk_lr is None else trunk_lr,
                "name": "hypernetwork_trunk",
            },
            {
                "params": generated.networks.output_parameters() if generated else [],
                "lr": generator_lr if output_lr is None else output_lr,
                "name": "hypernetwork_output",
            },
            {"params": self._other, "lr": lr if other_lr is None else other_lr, "name": "other"},
        ]
        super().__init__(groups, {"lr": lr})
        #: Device tensors of the last step: loss-like ``metrics`` averaged over workers, ``grad_norm``, ``found_inf``,
        #: ``penalty`` and ``importance`` (M, r). Read them when a host synchronisation does not hurt.
        self.stats: dict[str, Tensor] = {}
        self._truncated_written = False
        self._versions: list[int] = []
        self._skipped = torch.zeros((), device=device)
        self._skipped_told = 0
        self._skipped_seen = torch.zeros((), device="cpu", pin_memory=device.type == "cuda")
        self._complete = True
        self._install_hooks(model)
        self._write()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the groups follow from the model."""
        if getattr(self, "_complete", False):
            raise ValueError("the parameter groups are fixed: what is trainable when the optimizer is built is trained")
        super().add_param_group(param_group)

    # ---------------------------------------------------------------- construction

    def _resolved_direction(self, direction: Direction | None, rule: UpdateRule) -> Direction:
        if direction not in (None, *get_args(Direction)):
            raise ValueError(f"direction {direction!r} is unknown; allowed: {', '.join(get_args(Direction))}")
        direct = not self.method.hypernetwork or rule.name == "hybrid"
        if direction == "orthogonal" and not direct:
            raise ValueError(f"direction='orthogonal' is of direct factors; update rule {rule.name!r} has none")
        if direction is None:
            return "orthogonal" if self.method_name == "hyperadalora" and direct else "adam"
        return direction

    def _refuse_update(self) -> None:
        held = self.layout.holds_update().tolist()
        names = [m.name for m, holds in zip(self.layout.modules, held, strict=True) if holds]
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"the adapter holds an update, which method {self.method_name!r} would overwrite: B A is not zero in "
                f"{shown}; allowed: a new adapter that changes nothing yet (init_lora_weights not 'pissa' or 'olora'), "
                "the trained one merged into the base first (merge_and_unload), or replace=True where load_state_dict "
                "follows"
            )

    def _plan(self, pruning: Pruning, initial: int, target_rank: float | None, total: int | None) -> BudgetPlan:
        modules = len(self.layout.modules)
        if not self.method.singular_values or target_rank is None:
            return BudgetPlan(Pruning(schedule="none"), initial, initial, 0)
        if total is None:
            raise ValueError("target_rank needs total_steps: the pruning schedule ends relative to it")
        if not 0 < target_rank <= self.layout.rank:
            raise ValueError(f"target_rank={target_rank}; allowed: above 0, up to the initial rank {self.layout.rank}")
        if pruning.reactivation and self.method.hypernetwork:
            raise ValueError(
                "reactivation=True needs direct factors (method 'adalora'): a generated λ cannot be set to 0"
            )
        return BudgetPlan(pruning, initial, max(1, round(target_rank * modules)), total)

    def _initial_factors(self, initialization: Initialization, dtype: torch.dtype) -> Factors:
        rng = torch.Generator().manual_seed(self._seed)
        outputs, inputs = self.layout.outputs, self.layout.inputs
        if not self.method.singular_values:
            # The buffers hold PEFT's own initialisation; direct factors live in them, without a copy.
            alias = not self.method.hypernetwork and dtype == outputs[0].buffer.dtype
            p = [c.buffer if alias else c.buffer.to(dtype, copy=True) for c in outputs]
            q = [c.buffer if alias and not self.method.truncated else c.buffer.to(dtype, copy=True) for c in inputs]
            return Factors(p, None, q)

        def directions(members: int, dim: int, device: torch.device) -> Tensor:
            normal = torch.empty(members, dim, self.layout.rank).normal_(generator=rng).to(dtype)
            start = torch.linalg.qr(normal).Q if initialization == "orthonormal" else normal * 0.02
            return start.to(device).contiguous()  # qr returns columns one after another

        p = [directions(len(c.members), c.dim, c.buffer.device) for c in outputs]
        if self.fused:
            return Factors(p, None, [torch.zeros_like(c.buffer, dtype=dtype) for c in inputs])
        q = [directions(len(c.members), c.dim, c.buffer.device).transpose(1, 2).contiguous() for c in inputs]
        return Factors(p, torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device), q)

    def _build_source(self, initial: Factors) -> FactorSource:
        if self.hypernetwork is None:
            return DirectFactors(initial, self._adam_settings, self.direction)
        networks = build_networks(self.layout, self.hypernetwork, start=self._start(), rule=self.rule, seed=self._seed)
        live = self._live_tokens()
        with self._exactly():
            return GeneratedFactors(initial, networks, self.rule, self._adam_settings, live, self.direction)

    def _start(self) -> tuple[float, float | None, float]:
        """Norm of generated columns of P, of λ (None: no H_Λ) and of generated rows of Q or S under ``generate``."""
        if not self.method.singular_values:
            return 0.0, None, 1.0
        return (1.0, None, 0.0) if self.fused else (1.0, 0.0, 1.0)

    def _allocate_gradients(self, dtype: torch.dtype, device: torch.device) -> None:
        """One flat buffer: B by class, A by class, other parameters, and room for the caller's metrics."""
        self._metric_slots = 4
        tensors = [c.buffer for c in [*self.layout.outputs, *self.layout.inputs]] + list(self._adam_other._tensors)
        sizes = [t.numel() for t in tensors]
        self._flat = torch.zeros(sum(sizes) + self._metric_slots, dtype=dtype, device=device)
        pieces = self._flat[: sum(sizes)].split(sizes)
        views = [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]
        n = len(self.layout.outputs)
        k = len(self.layout.classes)
        self._grad_b, self._grad_a, self._grad_other = views[:n], views[n:k], views[k:]

    def _build_smoothed(self) -> Smoothed | None:
        self._score = self._pruning_score()
        factors = self.source.factors
        values = torch.zeros(self.mask.shape, dtype=self._flat.dtype, device=self.mask.device)
        self._sensitivity = values if self._score == "sensitivity" and self.method.singular_values else None
        if self._score == "sensitivity":
            return None
        followed = [values] if self._score == "smoothed" else [*factors.p, values, *factors.q]
        return Smoothed(followed, self._pruning.beta1, self._pruning.beta2)

    def _pruning_score(self) -> str:
        self._pruning = self.plan._pruning
        return self._pruning.score if self.plan.events else "sensitivity"

    def _install_hooks(self, model: nn.Module) -> None:
        """A saved state has tensors of its own; DyLoRA trains truncated weights, and evaluation and saving see all."""
        # What others wrapped around it before has state_dict() of its own, which asks this one.
        model = next((m for m in model.modules() if hasattr(m, "get_base_model")), model)
        inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if inner not in _STACKED:
            _STACKED.add(inner)
            inner.register_state_dict_post_hook(_own_tensors)
        if not self.method.truncated:
            return
        for module in {id(m): m for m in (model, inner)}.values():
            _TRUNCATING[module] = ref(self)
            module.register_forward_pre_hook(_match_mode)
            module.register_state_dict_pre_hook(_show_all)

    def show(self, truncated: bool) -> None:
        """DyLoRA: have the weights hold the directions that the next step trains, or all of them."""
        if truncated != self._truncated_written and not self._changed():
            self._write(truncated)

    # ---------------------------------------------------------------- the step

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, metrics: Tensor | None = None
    ) -> float | None:
        """One optimizer step from the gradients that the backward pass left on lora_A, lora_B and other parameters.

        Args:
            closure: re-evaluates the model and returns the loss, as for any torch optimizer.
            metrics: up to four numbers (1-d) that travel with the gradients: averaged over the workers into
                ``stats["metrics"]``. If one of them or any gradient is not finite on any worker, the step changes
                neither parameters nor moments, and ``stats["found_inf"]`` is 1; a pruning event that is due goes by the
                scores of the step before.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: more than four metrics.
            RuntimeError: no parameter of the adapter has a gradient, or after the optimizer was built the model was
                moved to another device or other weights were loaded into its adapter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), self._exactly():
            self._step(metrics)
        return loss

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """What is computed in here has the precision of the factors, wherever the caller's loop calls it."""
        device = self.mask.device.type
        # A model that is only measured computes nothing.
        plain = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        with plain, products("ieee"):
            yield

    def _step(self, metrics: Tensor | None) -> None:
        if self._changed():
            raise RuntimeError(
                "the adapter's weights were changed after the optimizer was built, and a step would overwrite them: "
                "load the optimizer's own state as well, or build it after loading; processes of "
                "DistributedDataParallel need one seed"
            )
        self._collect(metrics)
        norm, found_inf = self._norm_and_clip()
        if metrics is None:
            self._warn_of_skipped(found_inf)
        factors = self.source.factors
        zeroed: Tensor | None = None
        written = self._truncation() if self.method.truncated else self.mask.to(self._flat.dtype)
        gradients = self.layout.gradients(factors, written, self._grad_b, self._grad_a)
        self.stats |= {"grad_norm": norm, "found_inf": found_inf}

        if factors.lam is None and (self.fused or self.method.truncated):
            gradients = Factors(gradients.p, None, self._scale_rows(gradients.q, written))
        if self.method.singular_values:
            # The published sensitivity is that of the whole objective (eq. 4 and 8), the penalty's gradient included.
            if self.gamma:
                self._add_penalty(factors, gradients)
            score = self._importance(factors, gradients, found_inf)
            self.stats["importance"] = score
            zeroed = self._prune(score)

        factor_group, trunk_group, output_group, other_group = self.param_groups
        rates = LearningRates(factor_group["lr"], trunk_group["lr"], output_group["lr"], self._lambda_ratio)
        pruned = self.steps_done + 1 in self.plan.events
        self.source.advance(gradients, rates, found_inf, self._live_tokens(), pruned=pruned)
        if zeroed is not None:
            self._zero(factors, zeroed)
        self._adam_other.step(self._grad_other, other_group["lr"], found_inf)
        self.steps_done += 1
        if not self._agreed or (self._process_group is not None and self.steps_done % AGREE == 0):
            self._agree()
        self._write()

    def _collect(self, metrics: Tensor | None) -> None:
        """Gradients of all parameters into the flat buffer, averaged over the process group."""
        if metrics is not None and metrics.numel() > self._metric_slots:
            raise ValueError(f"at most {self._metric_slots} metrics travel with a step, got {metrics.numel()}")
        if all(w.grad is None for c in self.layout.classes for w in c.weights):
            raise RuntimeError("no parameter of the adapter has a gradient: was loss.backward() called on this model?")
        for shape_class, view in zip(self.layout.classes, [*self._grad_b, *self._grad_a], strict=True):
            grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in shape_class.weights]
            if view.dtype == grads[0].dtype:
                torch.stack(grads, out=view)
            else:
                view.copy_(torch.stack(grads))
        if self._other:
            torch._foreach_copy_(
                self._grad_other, [torch.zeros_like(p) if p.grad is None else p.grad for p in self._other]
            )
        self.stats.pop("metrics", None)  # of an earlier step
        if metrics is not None:
            self._flat[-self._metric_slots :][: metrics.numel()].copy_(metrics)
        if self._process_group is not None:
            dist.all_reduce(self._flat, group=self._process_group)
            self._flat.div_(dist.get_world_size(self._process_group))
        if metrics is not None:
            self.stats["metrics"] = self._flat[-self._metric_slots :][: metrics.numel()].clone()

    def _agree(self) -> None:
        """Take over the state of the group's first process.

        Averaged gradients are the same everywhere, but processors of two kinds round products otherwise, and where a
        gradient is nothing but rounding, as the penalty's of P and Q that start orthonormal, Adam's step is not small.
        """
        assert self._process_group is not None
        for tensor in self._tensors().values():
            if tensor.device == self.mask.device:  # a count of steps is the host's
                self._first_has(tensor)
        self.source.restored(self._live_tokens())
        self._agreed = True

    def _first_has(self, tensor: Tensor) -> None:
        """What the group's first process has in ``tensor``, in all of them."""
        if self._process_group is not None:
            data = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            dist.broadcast(data, group=self._process_group, group_src=0)

    def _norm_and_clip(self) -> tuple[Tensor, Tensor]:
        gradients = self._flat[: -self._metric_slots]
        norm = torch.linalg.vector_norm(gradients)
        finite = torch.isfinite(norm)
        if "metrics" in self.stats:
            finite = finite & torch.isfinite(self.stats["metrics"]).all()
        if self._max_grad_norm is not None:
            gradients.mul_((self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        # A skipped step multiplies its changes by zero, which does not make NaN go away.
        gradients.masked_fill_(~finite, 0.0)
        return norm, (~finite).to(torch.float32)

    def _warn_of_skipped(self, found_inf: Tensor) -> None:
        """Say now and then that steps are skipped, which callers without metrics of their own would not notice.

        The count arrives from the device by the next time that somebody looks: nothing waits for it.
        """
        self._skipped += found_inf
        if (self.steps_done + 1) % LOOK:
            return
        if self._skipped_seen > self._skipped_told:
            self._skipped_told = int(self._skipped_seen)
            warnings.warn(
                f"{self._skipped_told} steps so far changed nothing: their gradients were not finite",
                stacklevel=4,
            )
        self._skipped_seen.copy_(self._skipped, non_blocking=True)

    def _importance(self, factors: Factors, gradients: Factors, found_inf: Tensor) -> Tensor:
        """Score (M, r) of every direction: |λ·∂L/∂λ|, its smoothed form, or AdaLoRA's over the triplet.

        A step that is skipped keeps the score of the step before, so that a pruning event on it does not follow noise.
        """
        sensitivity = self._lambda_sensitivity(factors, gradients)
        if self._smoothed is None:
            assert self._sensitivity is not None
            self._sensitivity = torch.where(found_inf > 0, self._sensitivity, sensitivity)
            return self._sensitivity
        if self._score == "smoothed":
            return self._smoothed.update([sensitivity], found_inf)[0]
        products = [f * g for f, g in zip([*factors.p, *factors.q], [*gradients.p, *gradients.q], strict=True)]
        torch._foreach_abs_(products)
        n = len(factors.p)
        smooth = self._smoothed.update([*products[:n], sensitivity, *products[n:]], found_inf)
        score = smooth[n]
        for shape_class, p in zip(self.layout.outputs, smooth[:n], strict=True):
            score.index_add_(0, shape_class.index, p.mean(1))
        for shape_class, q in zip(self.layout.inputs, smooth[n + 1 :], strict=True):
            score.index_add_(0, shape_class.index, q.mean(2))
        return score

    def _lambda_sensitivity(self, factors: Factors, gradients: Factors) -> Tensor:
        """|λ·∂L/∂λ| (M, r); with S = diag(λ)Q it is |⟨S_k, ∂L/∂S_k⟩|, since λ scales S_k."""
        if factors.lam is not None and gradients.lam is not None:
            return (factors.lam * gradients.lam).abs()
        sensitivity = torch.empty(self.mask.shape, dtype=self._flat.dtype, device=self.mask.device)
        for shape_class, s, g in zip(self.layout.inputs, factors.q, gradients.q, strict=True):
            sensitivity.index_copy_(0, shape_class.index, (s * g).sum(-1).abs_())
        return sensitivity

    def _add_penalty(self, factors: Factors, gradients: Factors) -> None:
        """Add γ·∂R/∂P and γ·∂R/∂Q to the gradients of the loss."""
        n = len(factors.p)
        directions, lengths = factors.q, []
        if self.fused:
            lengths = [torch.linalg.vector_norm(s, dim=-1, keepdim=True) for s in factors.q]
            directions = [torch.where(d > 0, s / d, 0.0) for s, d in zip(factors.q, lengths, strict=True)]
        rows = [*(p.transpose(1, 2) for p in factors.p), *directions]
        live = self.mask.to(self._flat.dtype)
        masks = [live.index_select(0, c.index) for c in self.layout.classes]
        value, slopes = orthogonality.penalty(rows, masks, len(self.layout.modules))
        if self.fused:
            # R depends on S through Q = S/‖S‖ alone: what lies along Q changes no direction.
            parts = zip(slopes[n:], directions, lengths, strict=True)
            slopes[n:] = [torch.where(d > 0, (g - (g * q).sum(-1, keepdim=True) * q) / d, 0.0) for g, q, d in parts]
        slopes = [s.transpose(1, 2) if i < n else s for i, s in enumerate(slopes)]
        torch._foreach_add_([*gradients.p, *gradients.q], slopes, alpha=self.gamma)
        self.stats["penalty"] = value

    def _prune(self, score: Tensor) -> Tensor | None:
        """Update the mask if an event is due; returns the λ (M, r) to zero once where they may grow again."""
        budget = self.plan.events.get(self.steps_done + 1)
        if budget is None:
            return None
        before = self.plan.initial if self._pruning.reactivation else self.live
        kept = prune_to(self.mask, score, before, budget).contiguous()
        self._first_has(kept)
        self.live = min(self.live, budget)
        if self._pruning.reactivation and self.steps_done + 1 < self.plan.last:
            return ~kept
        self.mask.copy_(kept)
        return None

    def _zero(self, factors: Factors, zeroed: Tensor) -> None:
        """Set the λ of directions (M, r) to zero."""
        if factors.lam is not None:
            factors.lam.masked_fill_(zeroed, 0.0)
            return
        for shape_class, s in zip(self.layout.inputs, factors.q, strict=True):
            s.masked_fill_(zeroed.index_select(0, shape_class.index).unsqueeze(-1), 0.0)

    def _truncation(self) -> Tensor:
        """DyLoRA's mask (M, r) of the step at hand: the first b directions, b uniform in 1..r."""
        kept = random.Random(f"{self._seed}:{self.steps_done}").randint(1, self.layout.rank)
        leading = torch.arange(self.layout.rank, device=self._flat.device) < kept
        return leading.to(self._flat.dtype).expand(self.mask.shape)

    def _scale_rows(self, rows: list[Tensor], gain: Tensor) -> list[Tensor]:
        classes = zip(self.layout.inputs, rows, strict=True)
        return [q * gain.index_select(0, c.index).unsqueeze(-1) for c, q in classes]

    def _live_tokens(self) -> list[Tensor]:
        """Live directions as the hypernetworks see them: P's classes, λ (M, r), Q's classes; (m, r) bool each."""
        by_class = [self.mask.index_select(0, c.index) for c in self.layout.classes]
        n = len(self.layout.outputs)
        return [*by_class[:n], self.mask, *by_class[n:]]

    @torch.no_grad()
    def _write(self, truncated: bool = False) -> None:
        """Put the factors into lora_A and lora_B: all of them, or as DyLoRA's forward pass of training sees them."""
        for shape_class in self.layout.classes:
            if not shape_class.attached():
                shape_class.attach()
        factors = self.source.factors
        gain = None
        if factors.lam is not None:
            gain = factors.lam * self.mask
        elif self.fused:
            gain = self.mask.to(self._flat.dtype)
        elif truncated:
            gain = self._truncation()
        self._truncated_written = truncated
        self.layout.write(factors, gain)
        self._versions = self.layout.versions()

    @torch.no_grad()
    def _changed(self) -> bool:
        """Whether somebody gave the adapter other weights than the factors make, which the next write would lose.

        What changes nothing does not count, as DistributedDataParallel's broadcast of equal weights, or a cast. What is
        written through ``.data`` is not seen.
        """
        classes = self.layout.classes
        if self._versions == self.layout.versions() and all(c.attached() for c in classes):
            return False
        found = [torch.stack([w.detach() for w in c.weights]) for c in classes]
        dtypes = [c.buffer.dtype for c in classes]
        self._write(self._truncated_written)
        for shape_class, weights, dtype in zip(classes, found, dtypes, strict=True):
            ours = shape_class.buffer
            # A cast may have rounded what the factors hold in full, and another processor's kernels round otherwise.
            allowed = (UNLIKE if weights.dtype == dtype else ROUNDING) * ours.abs().max().item()
            if (weights - ours).abs().max().item() > allowed:
                for changed, values in zip(classes, found, strict=True):
                    changed.buffer.copy_(values)
                self._versions = []  # asked again, the answer is the same
                return True
        return False

    # ---------------------------------------------------------------- hypernetworks of an earlier run

    def take_networks(self, values: Mapping[str, Tensor], frozen: Collection[str] = ()) -> None:
        """Give parameters of the hypernetworks other values before the first step, and keep some as they are.

        Reading them from an earlier run is :func:`hyperlora.start_from`'s part.

        Args:
            values: new values by the names that ``source.networks.named_parameters()`` gives; the others stay.
            frozen: names of the parameters that do not learn: they get neither gradients nor optimizer state.

        Raises:
            ValueError: the method has no hypernetworks, a step was taken, a name or shape is not theirs, or the update
                rule cannot work with frozen output maps.
        """
        if not isinstance(self.source, GeneratedFactors):
            raise ValueError(f"method {self.method_name!r} has no hypernetworks")
        if self.steps_done:
            raise ValueError(f"{self.steps_done} steps are done; hypernetworks are taken over before the first one")
        ours = {name: p.detach() for name, p in self.source.networks.named_parameters()}
        unknown = sorted({*values, *frozen} - ours.keys())
        if unknown:
            raise ValueError(f"the hypernetworks have no {', '.join(unknown)}; they have {', '.join(ours)}")
        self._freeze(frozen)
        copy_state({name: ours[name] for name in values}, values)
        with self._exactly():
            self.source.restored(self._live_tokens())
        self._write()

    def _freeze(self, names: Collection[str]) -> None:
        assert isinstance(self.source, GeneratedFactors)
        with self._exactly():
            self.source.freeze(names, self._live_tokens())
        networks = self.source.networks
        for group, parameters in zip(
            self.param_groups[1:3], (networks.trunk_parameters(), networks.output_parameters()), strict=True
        ):
            group["params"] = [p for p in parameters if p.requires_grad]

    # ---------------------------------------------------------------- what others ask

    def ranks(self) -> dict[str, int]:
        """Live rank of every adapted module by name (reads the mask back from the device)."""
        counts = self.mask.sum(1).tolist()
        return {m.name: int(n) for m, n in zip(self.layout.modules, counts, strict=True)}

    @property
    def trainable_parameters(self) -> int:
        """Numbers that AdamW moves: direct factors, hypernetworks, and other trainable parameters."""
        return sum(t.numel() for t in self.source.optimized()) + sum(p.numel() for p in self._other)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state beside the weights that it optimizes: moments, importance, masks."""
        return sum(
            t.numel() * t.element_size()
            for name, t in self._tensors().items()
            if name.startswith(("adam.", "importance.", "mask"))
        )

    @property
    def owned_bytes(self) -> int:
        """Bytes of everything that the optimizer holds beside the model: state, factors, gradient buffer."""
        tensors = [*self._tensors().values(), self._flat]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, live."""
        named = {"mask": self.mask} | self.source.state() | self._adam_other.state("adam.other")
        if self._sensitivity is not None:
            named["importance.sensitivity"] = self._sensitivity
        if self._smoothed is not None:
            named |= {f"importance.mean.{n}": t for n, t in enumerate(self._smoothed.mean)}
            named |= {f"importance.uncertainty.{n}": t for n, t in enumerate(self._smoothed.uncertainty)}
        return named

    def state_dict(self) -> dict[str, Any]:
        """Whole state: named tensors under ``state``, rates under ``param_groups``, the rest as plain numbers.

        Other trainable parameters themselves (heads, magnitudes) belong to the model's state, as with any optimizer.
        """
        groups = [{k: v for k, v in g.items() if k != "params"} | {"params": []} for g in self.param_groups]
        return {
            "state": self._tensors(),
            "param_groups": groups,
            "method": self.method_name,
            "update_rule": self.rule.name if self.method.hypernetwork else None,
            "scale": self.layout.modules[0].scaling,
            "steps_done": self.steps_done,
            "live": self.live,
            "modules": [m.name for m in self.layout.modules],
            "hypernetwork": None if self.hypernetwork is None else asdict(self.hypernetwork),
            "frozen": self.source.frozen if isinstance(self.source, GeneratedFactors) else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave and write the adapter weights.

        Raises:
            ValueError: the state is of another optimizer, method, update rule or scale, of other modules or shapes.
        """
        ours = self.state_dict()
        if missing := sorted(ours.keys() - state_dict.keys()):
            raise ValueError(f"no state of this optimizer: it has no {', '.join(missing)}")
        for name in ("method", "update_rule", "scale"):
            if state_dict[name] != ours[name]:
                what = f"{name.replace('_', ' ')} {state_dict[name]!r}, this run's is {ours[name]!r}"
                raise ValueError(f"the state is of {what}")
        if list(state_dict["modules"]) != ours["modules"]:
            raise ValueError("the state is of a model with other adapted modules")
        if isinstance(self.source, GeneratedFactors) and state_dict["frozen"] != self.source.frozen:
            self._freeze(state_dict["frozen"])
        # Its own tensors, as accelerate's prepare() gives them back: weights that were loaded before are not touched.
        mask = state_dict["state"].get("mask")
        own = mask is not None and mask.data_ptr() == self.mask.data_ptr()
        if not own:
            copy_state(self._tensors(), state_dict["state"])
        self.steps_done, self.live = int(state_dict["steps_done"]), int(state_dict["live"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
        if not own:
            with self._exactly():
                self.source.restored(self._live_tokens())
            self._write()
