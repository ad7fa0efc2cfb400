"""The rest of the field: methods that the optimizer of factors cannot drive, in the same training loop.

``rslora`` is LoRA at the scale alpha/√r (arXiv 2312.03732) and needs no class of its own. ``eva`` (arXiv 2410.07170,
:mod:`hyperlora.eva`) ends in LoRA layers of unequal rank; ``peft-adalora`` trains PEFT's own AdaLoRA layers as PEFT
ships them. Both run under AdamW with the clipping, rates and skipped steps of :class:`hyperlora.HyperAdaLoRA`, and show
the training loop the same face. They run on one worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperlora.factors import AdaptedModule
from hyperlora.optimizer import HyperAdaLoRA
from hyperlora.settings import AdamSettings
from hyperlora.update_rules import Adam, ParameterAdam, copy_state

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.adalora import RankAllocator

ADAPTER = "default"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Budget:
    """Live directions over all modules at the start and at the end."""

    initial: int
    target: int

    def falls(self) -> list[int]:
        """Steps of known pruning events: none, since PEFT's allocator decides by itself."""
        return []


@dataclass(frozen=True)
class Layout:
    """The adapted modules; ``rank`` is the largest initial rank of one, ``parameters`` counts their adapters."""

    modules: list[AdaptedModule]
    rank: int
    parameters: int


class UnequalLoRA(torch.optim.Optimizer):
    """AdamW on LoRA layers of any ranks, with what the training loop asks of :class:`hyperlora.HyperAdaLoRA`.

    Parameter groups: ``factors`` (the adapter) and ``other`` (every other trainable parameter).

    Args:
        model: a PEFT model.
        lr: of the adapter.
        other_lr: of all other trainable parameters; ``None`` takes ``lr``.
        adam: constants of AdamW.
        max_grad_norm: clip the gradient of all of them to this norm; ``None`` does not.

    Raises:
        ValueError: the model has no adapter.
    """

    def __init__(
        self,
        model: PeftModel,
        lr: float,
        *,
        other_lr: float | None = None,
        adam: AdamSettings | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        modules = self._modules(model)
        if not modules:
            raise ValueError("the model has no adapted module")
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._adapter = {n: p for n, p in trained if ".lora_" in n}
        self._other = [p for n, p in trained if ".lora_" not in n]
        self._max_grad_norm = max_grad_norm
        ranks = [m.a.shape[0] for m in modules]
        self.layout = Layout(modules, max(ranks), sum(p.numel() for p in self._adapter.values()))
        self.plan = Budget(sum(ranks), sum(ranks))
        self.live = self.plan.initial
        self.steps_done = 0
        settings = adam or AdamSettings()
        self._adam = Adam([p.detach() for p in self._adapter.values()], settings)
        own = next(iter(self._adapter.values())).dtype
        self._dtype = own if own.itemsize >= 4 else torch.float32
        self._adam_other = ParameterAdam(self._other, settings, self._dtype)
        super().__init__(
            [
                {"params": list(self._adapter.values()), "lr": lr, "name": "factors"},
                {"params": self._other, "lr": lr if other_lr is None else other_lr, "name": "other"},
            ],
            {"lr": lr},
        )
        #: Device tensors of the last step: ``metrics``, ``grad_norm``, ``found_inf``, and ``penalty`` if there is one.
        self.stats: dict[str, Tensor] = {}

    @staticmethod
    def _modules(model: PeftModel) -> list[AdaptedModule]:
        from peft.tuners.lora import LoraLayer

        found = []
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
                a: nn.Parameter = module.lora_A[ADAPTER].weight  # type: ignore[assignment]
                b: nn.Parameter = module.lora_B[ADAPTER].weight  # type: ignore[assignment]
                found.append(AdaptedModule(name.removeprefix(PREFIX), a, b, module.scaling[ADAPTER]))
        return found

    # ---------------------------------------------------------------- the step

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, metrics: Tensor | None = None
    ) -> float | None:
        """One AdamW step; ``metrics`` as in :meth:`hyperlora.HyperAdaLoRA.step`. A non-finite step changes nothing."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.stats = {}
        self._add_to_loss()
        with torch.no_grad():
            gradients = self._gradients()
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            finite = torch.isfinite(norm)
            if metrics is not None:
                self.stats["metrics"] = metrics.detach().clone()
                finite = finite & torch.isfinite(metrics).all()
            if self._max_grad_norm is not None:
                torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            found_inf = (~finite).to(torch.float32)
            self.stats |= {"grad_norm": norm, "found_inf": found_inf}
            count, (factors, other) = len(self._adapter), self.param_groups
            self._adam.step(gradients[:count], factors["lr"], found_inf)
            self._adam_other.step([g.to(self._dtype) for g in gradients[count:]], other["lr"], found_inf)
            self.steps_done += 1
            self._after_step(found_inf)
        return loss

    def _gradients(self) -> list[Tensor]:
        """The ``grad`` tensors themselves, adapter first; a parameter without one gets zeros."""
        parameters = [*self._adapter.values(), *self._other]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in parameters if p.grad is not None]

    def _add_to_loss(self) -> None:
        """Add the gradient of what the method adds to the loss."""

    def _after_step(self, found_inf: Tensor) -> None:
        """What the method does after AdamW's step."""

    # ---------------------------------------------------------------- what others ask

    def ranks(self) -> dict[str, int]:
        """Rank of every adapted module by name."""
        return {m.name: m.a.shape[0] for m in self.layout.modules}

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Plain LoRA of every module: A (r, in) and B (out, r), live directions only, scale in B."""
        return {m.name: (m.a.detach(), m.b.detach() * m.scaling) for m in self.layout.modules}

    @property
    def trainable_parameters(self) -> int:
        """Numbers that AdamW moves."""
        return self.layout.parameters + sum(p.numel() for p in self._other)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state beside the weights that it optimizes."""
        state = self._adam.state("adam") | self._adam_other.state("other")
        return sum(t.numel() * t.element_size() for t in state.values())

    @property
    def owned_bytes(self) -> int:
        """Bytes of everything that the optimizer holds beside the model; gradients are the model's own."""
        return self.state_bytes

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"adapter.{n}": p.detach() for n, p in self._adapter.items()}
        return weights | self._adam.state("adam.adapter") | self._adam_other.state("adam.other")

    def state_dict(self) -> dict[str, Any]:
        """Whole state, in the form of :meth:`hyperlora.HyperAdaLoRA.state_dict`."""
        groups = [{k: v for k, v in g.items() if k != "params"} | {"params": []} for g in self.param_groups]
        return {
            "state": self._tensors(),
            "param_groups": groups,
            "steps_done": self.steps_done,
            "live": self.live,
            "modules": [m.name for m in self.layout.modules],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is of other modules or shapes.
        """
        if list(state_dict["modules"]) != [m.name for m in self.layout.modules]:
            raise ValueError("the state is of a model with other adapted modules")
        copy_state(self._tensors(), state_dict["state"])
        self.steps_done, self.live = int(state_dict["steps_done"]), int(state_dict["live"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})


class PeftAdaLoRA(UnequalLoRA):
    """AdaLoRA as PEFT ships it, driven as PEFT's documentation says: ``update_and_allocate`` after each AdamW step.

    PEFT adds its orthogonality term to ``outputs.loss`` alone; this loop takes its losses from logits, so the same term
    is added here, as a gradient, and the reported loss stays the task's. ``live`` and :meth:`ranks` follow PEFT's
    ``rank_pattern``: between two events PEFT lets pruned values grow again.

    Args:
        model: with PEFT's AdaLoRA layers and an :class:`peft.AdaLoraConfig` whose schedule fits the run.
        lr, other_lr, adam, max_grad_norm: as for :class:`UnequalLoRA`.
    """

    def __init__(self, model: PeftModel, lr: float, **settings: Any) -> None:
        from peft import AdaLoraConfig

        super().__init__(model, lr, **settings)
        self._model = model
        config = model.peft_config[ADAPTER]
        assert isinstance(config, AdaLoraConfig)
        self._config = config
        self._layers = {m.name: model.get_submodule(PREFIX + m.name) for m in self.layout.modules}
        self.plan = Budget(self.plan.initial, config.target_r * len(self.layout.modules))

    @staticmethod
    def _modules(model: PeftModel) -> list[AdaptedModule]:
        from peft.tuners.adalora import AdaLoraLayer

        found = []
        for name, module in model.named_modules():
            if isinstance(module, AdaLoraLayer):
                a: nn.Parameter = module.lora_A[ADAPTER]  # type: ignore[assignment]
                b: nn.Parameter = module.lora_B[ADAPTER]  # type: ignore[assignment]
                scale = module.scaling[ADAPTER] / (a.shape[0] + 1e-5)  # PEFT's, to the last digit
                found.append(AdaptedModule(name.removeprefix(PREFIX), a, b, scale))
        return found

    @property
    def _allocator(self) -> RankAllocator:
        return self._model.base_model.rankallocator  # type: ignore[return-value]

    def _add_to_loss(self) -> None:
        """PEFT's term: the mean of ‖AAᵀ - I‖_F and ‖BᵀB - I‖_F over all adapter matrices, not squared."""
        with torch.enable_grad():
            grams = [m.a @ m.a.T for m in self.layout.modules] + [m.b.T @ m.b for m in self.layout.modules]
            norms = [torch.norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device), p="fro") for g in grams]
            penalty = torch.stack(norms).mean()
            (self._config.orth_reg_weight * penalty).backward()
        self.stats["penalty"] = penalty.detach()

    def _after_step(self, found_inf: Tensor) -> None:
        if found_inf:
            return
        self._model.base_model.update_and_allocate(self.steps_done)  # type: ignore[operator]
        if self._config.rank_pattern:
            self.live = sum(self.ranks().values())

    def _live(self, name: str) -> list[bool]:
        """Which directions of a module the last allocation kept."""
        # PEFT strips the adapter's name from these keys when it saves.
        pattern = {k.replace(f".{ADAPTER}", ""): v for k, v in (self._config.rank_pattern or {}).items()}
        return pattern.get(f"{name}.lora_E", [True] * self.layout.rank)

    def ranks(self) -> dict[str, int]:
        """Rank of every adapted module by name, by PEFT's last allocation."""
        return {name: sum(self._live(name)) for name in self._layers}

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """As for LoRA, with λ in A; from the first allocation on a direction lives if its λ is not zero."""
        folded = {}
        for m in self.layout.modules:
            lam = self._layers[m.name].lora_E[ADAPTER].detach()  # type: ignore[index]
            live = lam[:, 0] != 0 if self._config.rank_pattern else torch.ones_like(lam[:, 0], dtype=torch.bool)
            folded[m.name] = ((m.a.detach() * lam)[live], m.b.detach()[:, live] * m.scaling)
        return folded

    @property
    def state_bytes(self) -> int:
        """As for LoRA, and the three tensors that PEFT's allocator keeps of every adapter weight."""
        return super().state_bytes + 3 * sum(p.numel() * p.element_size() for p in self._adapter.values())

    def _importance(self) -> dict[str, dict[str, Tensor]]:
        allocator = self._allocator
        return {k: getattr(allocator, k) for k in ("ipt", "exp_avg_ipt", "exp_avg_unc")}

    def state_dict(self) -> dict[str, Any]:
        """As for LoRA, and the allocator's importance and rank pattern, which PEFT saves nowhere."""
        state = super().state_dict()
        state["state"] |= {f"importance.{k}.{n}": t for k, d in self._importance().items() for n, t in d.items()}
        return state | {"rank_pattern": self._config.rank_pattern}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = dict(state_dict["state"])
        self._allocator.reset_ipt()
        for kind, averages in self._importance().items():
            prefix = f"importance.{kind}."
            for key in [k for k in saved if k.startswith(prefix)]:
                name = key.removeprefix(prefix)
                averages[name] = saved.pop(key).to(self._adapter[f"{PREFIX}{name}"].device)
        super().load_state_dict(state_dict | {"state": saved})
        self._config.rank_pattern = state_dict["rank_pattern"]


#: What the training loop, the estimate before a run and the export drive.
AdapterOptimizer = HyperAdaLoRA | UnequalLoRA
