"""Each rule against its definition, computed from the networks by hand."""

from __future__ import annotations

import pytest
import torch
from models import RULES, build_llama
from torch import Tensor

from hyperlora.factors import FactorLayout, Factors, adapted_modules
from hyperlora.settings import HypernetworkSpec
from hyperlora.update_rules import (
    Adam,
    AdamSettings,
    DirectFactors,
    GeneratedFactors,
    LearningRates,
    ParameterAdam,
    UpdateRule,
    build_networks,
    copy_state,
)

RATES = LearningRates(factors=0.02, trunk=0.005, output=0.01)
TAKEN, SKIPPED = torch.zeros(()), torch.ones(())
SCALE = 0.5


class Bench:
    """A source of factors with random gradients, and H evaluated by hand."""

    def __init__(
        self, name: str, *, every: int = 2, friction: float = 0.25, singular_values: bool = True, period: int = 1
    ) -> None:
        layout = FactorLayout(adapted_modules(build_llama(layers=1)))
        rng = torch.Generator().manual_seed(0)
        self.live = [torch.ones(len(c.members), layout.rank, dtype=torch.bool) for c in layout.classes]
        if singular_values:
            self.live.insert(len(layout.outputs), torch.ones(len(layout.modules), layout.rank, dtype=torch.bool))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.start = Factors(
            [normal(*c.buffer.shape) for c in layout.outputs],
            normal(len(layout.modules), layout.rank) if singular_values else None,
            [normal(*c.buffer.shape) for c in layout.inputs],
        )
        rule = UpdateRule(name, scale=SCALE, friction=friction, reanchor_every=every, every=period)  # type: ignore[arg-type]
        start = (1.0, 0.0, 1.0) if singular_values else (0.0, None, 1.0)
        networks = build_networks(layout, HypernetworkSpec(hidden_size=24, heads=2), start=start, rule=rule, seed=0)
        self.source = GeneratedFactors(
            self.start.like([t.clone() for t in self.start.tensors()]), networks, rule, AdamSettings(), self.live
        )
        self.rng = rng

    def gradients(self) -> Factors:
        shapes = [t.shape for t in self.start.tensors()]
        return self.start.like([torch.randn(s, generator=self.rng, dtype=torch.float64) for s in shapes])

    def advance(self, gradients: Factors | None = None, found_inf: Tensor = TAKEN, *, pruned: bool = True) -> Factors:
        self.source.advance(gradients or self.gradients(), RATES, found_inf, self.live, pruned=pruned)
        return self.source.factors

    @torch.no_grad()
    def h(self, theta: Factors) -> list[Tensor]:
        n, networks = len(theta.p), self.source.networks
        out = [t.transpose(1, 2) for t in networks.p([t.transpose(1, 2) for t in theta.p], self.live[:n])]
        if theta.lam is not None:
            assert networks.lam is not None
            out.append(networks.lam([theta.lam.unsqueeze(-1)], [self.live[n]])[0].squeeze(-1))
            n += 1
        return out + networks.q(theta.q, self.live[n:])


def assert_equal(found: Factors, wanted: list[Tensor], tolerance: float = 1e-13) -> None:
    for a, b in zip(found.tensors(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def plus(base: Factors, correction: list[Tensor]) -> list[Tensor]:
    return [b + SCALE * c for b, c in zip(base.tensors(), correction, strict=True)]


def moved(a: Factors, b: Factors) -> bool:
    return any(not torch.allclose(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("rule", [r for r in RULES if r != "generate"])
def test_training_starts_from_the_initial_factors(rule: str) -> None:
    bench = Bench(rule)
    assert_equal(bench.source.factors, bench.start.tensors(), 0)


def test_generate_starts_at_the_networks_output_with_singular_values_at_zero() -> None:
    bench = Bench("generate")
    assert_equal(bench.source.factors, bench.h(bench.start))
    assert bench.source.factors.lam is not None
    assert (bench.source.factors.lam == 0).all()
    assert all(0.3 < t.norm(dim=1).mean() < 3 for t in bench.source.factors.p)


def test_generate_without_singular_values_starts_with_no_change_of_the_model() -> None:
    bench = Bench("generate", singular_values=False)
    assert all((t == 0).all() for t in bench.source.factors.p)
    assert all(t.abs().max() > 0 for t in bench.source.factors.q)


def test_generate_is_the_network_of_the_last_factors() -> None:
    bench = Bench("generate")
    for _ in range(3):
        before = bench.source.factors
        after = bench.advance()
        assert_equal(after, bench.h(before))
        assert moved(before, after)


@pytest.mark.parametrize("rule", ["residual", "friction"])
def test_residual_adds_to_the_last_factors(rule: str) -> None:
    bench = Bench(rule)
    for _ in range(3):
        before = bench.source.factors
        after = bench.advance()
        assert_equal(after, plus(before, bench.h(before)))
        assert moved(before, after)


def test_friction_shrinks_the_output_maps_after_each_step() -> None:
    with_friction, without = Bench("friction", friction=0.25), Bench("residual")
    gradients = without.gradients()
    for bench in (with_friction, without):
        bench.advance(gradients)
    networks = with_friction.source.networks, without.source.networks
    for a, b in zip(networks[0].output_parameters(), networks[1].output_parameters(), strict=True):
        torch.testing.assert_close(a, 0.75 * b, rtol=1e-14, atol=0)
        assert b.abs().max() > 0
    for a, b in zip(networks[0].trunk_parameters(), networks[1].trunk_parameters(), strict=True):
        assert torch.equal(a, b)


def test_anchored_adds_to_the_first_factors() -> None:
    bench = Bench("anchored")
    for _ in range(3):
        before = bench.source.factors
        after = bench.advance()
        assert_equal(after, plus(bench.start, bench.h(bench.start)))
        assert moved(before, after)


def test_reanchored_moves_the_anchor_without_moving_the_factors() -> None:
    bench, twin = Bench("reanchored", every=3), Bench("anchored")
    for _ in range(2):
        gradients = twin.gradients()
        assert_equal(bench.advance(gradients), twin.advance(gradients).tensors(), 0)
    gradients = twin.gradients()
    anchor = bench.advance(gradients)
    # The third step is taken before the anchor moves to where it led.
    assert_equal(anchor, twin.advance(gradients).tensors(), 0)
    assert all((w == 0).all() for w in bench.source.networks.output_parameters())
    after = bench.advance()
    assert_equal(after, plus(anchor, bench.h(anchor)))
    assert moved(anchor, after)


def test_hybrid_is_adam_on_direct_parameters_plus_a_correction() -> None:
    bench = Bench("hybrid")
    direct = [torch.nn.Parameter(t.clone()) for t in bench.start.tensors()]
    adam = torch.optim.AdamW(direct, lr=RATES.factors, weight_decay=0.0)
    for _ in range(3):
        gradients = bench.gradients()
        for parameter, gradient in zip(direct, gradients.tensors(), strict=True):
            parameter.grad = gradient.clone()
        adam.step()
        after = bench.advance(gradients)
        base = bench.start.like([p.detach() for p in direct])
        assert_equal(after, plus(base, bench.h(bench.start)), 1e-12)
        assert moved(after, base)


def test_hybrids_hypernetworks_move_at_every_kth_step_by_its_gradient() -> None:
    bench, always = Bench("hybrid", period=3), Bench("hybrid")
    start = [p.detach().clone() for p in bench.source.phi]
    gradients = [bench.gradients() for _ in range(3)]
    for n, gradient in enumerate(gradients, 1):
        before = bench.source.factors
        after = bench.advance(gradient, pruned=False)
        assert moved(before, after)
        base = after.like(list(bench.source._base.tensors()))
        assert_equal(after, plus(base, bench.h(bench.start)))
        assert all(map(torch.equal, bench.source.phi, start)) == (n < 3)
    always.advance(gradients[2])
    for mine, theirs in zip(bench.source.phi, always.source.phi, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_between_two_steps_of_the_hypernetworks_a_pruning_event_and_a_restart_give_the_same_factors() -> None:
    bench = Bench("hybrid", period=4)
    for _ in range(4):
        bench.advance(pruned=False)
    full = bench.h(bench.start)
    for mask in bench.live:
        mask[:, -1] = False  # seen by no other direction from here on
    after = bench.advance(pruned=True)
    assert_equal(after, plus(after.like(list(bench.source._base.tensors())), bench.h(bench.start)))
    assert moved(after.like(full), after.like(bench.h(bench.start))), "H sees the event"
    bench.source.restored(bench.live)
    assert_equal(bench.source.factors, after.tensors(), 0)


@pytest.mark.parametrize("rule", RULES)
def test_trunk_and_output_maps_have_their_own_rates(rule: str) -> None:
    bench = Bench(rule)
    before = {n: p.detach().clone() for n, p in bench.source.networks.named_parameters()}
    bench.source.advance(bench.gradients(), LearningRates(0.0, 0.0, 0.01), TAKEN, bench.live)
    changed = {n for n, p in bench.source.networks.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "output_maps" in n}


@pytest.mark.parametrize("rule", RULES)
def test_a_skipped_step_changes_nothing(rule: str) -> None:
    # The third step would move the anchor of `reanchored`.
    bench = Bench(rule, every=3)
    for _ in range(2):
        bench.advance()
    state = {n: t.clone() for n, t in bench.source.state().items() if n != "rule_step"}
    factors = [t.clone() for t in bench.source.factors.tensors()]
    bench.advance(found_inf=SKIPPED)
    for name, tensor in state.items():
        assert torch.equal(bench.source.state()[name], tensor), name
    assert_equal(bench.source.factors, factors, 0)
    bench.advance()
    assert moved(bench.source.factors, bench.start.like(factors))


def test_a_skipped_step_changes_no_direct_factors() -> None:
    start = Factors([torch.ones(1, 3, 2)], None, [torch.ones(1, 2, 3)])
    source = DirectFactors(start, AdamSettings(weight_decay=0.1))
    source.advance(start.like([torch.ones_like(t) for t in start.tensors()]), RATES, SKIPPED, [])
    assert all((t == 1).all() for t in source.factors.tensors())
    assert all((t == 0).all() for n, t in source.state().items() if n.startswith("adam"))


def test_adam_is_torchs_adamw() -> None:
    settings = AdamSettings(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    mine, theirs = torch.linspace(-1, 1, 6).double(), torch.nn.Parameter(torch.linspace(-1, 1, 6).double())
    adam, reference = (
        Adam([mine], settings),
        torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    )
    for step in range(4):
        gradient = torch.cos(torch.arange(6).double() + step)
        adam.step([gradient], 0.1, TAKEN)
        theirs.grad = gradient.clone()
        reference.step()
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
def test_a_parameter_whose_data_was_replaced_goes_on_from_there(start: torch.dtype, cast: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3, dtype=start))
    adam = ParameterAdam([parameter], AdamSettings(), torch.float32)
    adam.step([torch.ones(2, 3)], 0.125, TAKEN)
    # Transposed, so that the new data is not contiguous either.
    parameter.data = torch.full((3, 2), 3.0, dtype=cast).T
    adam.step([torch.ones(2, 3)], 0.125, TAKEN)
    assert parameter.dtype == cast
    torch.testing.assert_close(parameter.detach(), torch.full((2, 3), 2.875, dtype=cast), rtol=1e-6, atol=0)
    state = adam.state("adam")
    assert state["adam.steps.0"] == 2
    parameter.data = parameter.data.to(cast).contiguous()
    assert ("adam.value.0" in adam.state("adam")) == (cast != torch.float32)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_optimized(rule: str) -> None:
    bench = Bench(rule)
    networks = sum(p.numel() for p in bench.source.networks.parameters())
    direct = sum(t.numel() for t in bench.start.tensors()) if rule == "hybrid" else 0
    assert sum(t.numel() for t in bench.source.optimized()) == networks + direct


def test_state_of_other_names_or_shapes() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"a has shape \(3,\), expected \(2,\); b is missing; c is unknown"):
        copy_state(target, {"a": torch.zeros(3), "c": torch.zeros(1)})
    many = {f"t{n}": torch.zeros(1) for n in range(10)}
    with pytest.raises(ValueError, match="and 2 more"):
        copy_state(many, {})
    assert (target["a"] == 0).all()


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="'momentum' is unknown; allowed: generate, residual, friction"):
        UpdateRule("momentum")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [*RULES, "direct"])
def test_singular_values_have_a_rate_of_their_own(rule: str) -> None:
    """With the ratio at zero λ stays, and P and Q move as they do without it."""
    if rule == "direct":
        start = Factors([torch.ones(1, 3, 2)], torch.ones(1, 2), [torch.ones(1, 2, 3)])
        sources = [DirectFactors(start.like([t.clone() for t in start.tensors()]), AdamSettings()) for _ in range(2)]
        gradients, live = start, []
    else:
        benches = [Bench(rule), Bench(rule)]
        sources = [b.source for b in benches]  # type: ignore[misc]
        gradients, live = benches[0].gradients(), benches[0].live
    before = sources[0].factors.lam.clone()
    sources[0].advance(gradients, LearningRates(0.02, 0.005, 0.01, 0.0), TAKEN, live)
    sources[1].advance(gradients, LearningRates(0.02, 0.005, 0.01, 1.0), TAKEN, live)
    if rule != "generate":  # whose first λ is no output of a step
        assert torch.equal(sources[0].factors.lam, before)
    assert not torch.equal(sources[1].factors.lam, before)
    for a, b in zip(sources[0].factors.p, sources[1].factors.p, strict=True):
        assert torch.equal(a, b)
