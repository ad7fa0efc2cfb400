"""Size, sharing and masking of the networks, and the scale of what they move."""

from __future__ import annotations

import math

import pytest
import torch
from models import build_llama
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hyperlora.factors import FactorLayout, adapted_modules
from hyperlora.hypernetworks import Hypernetwork
from hyperlora.settings import HypernetworkSpec, UpdateRule
from hyperlora.update_rules import build_networks

KINDS = ("attention", "mlp", "cnn")
DIMS, COUNTS, RANK = (6, 10), (4, 2), 5


def network(spec: HypernetworkSpec, groups: int = 1, std: float = 1.0) -> Hypernetwork:
    rng = torch.Generator().manual_seed(0)
    return Hypernetwork(spec, DIMS, COUNTS, RANK, groups, [std] * len(DIMS), rng).double()


def small(kind: str, **changes) -> HypernetworkSpec:
    return HypernetworkSpec(**{"kind": kind, "hidden_size": 24, "heads": 2, **changes})


def tokens(seed: int = 1) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(m, RANK, d, generator=rng, dtype=torch.float64) for m, d in zip(COUNTS, DIMS, strict=True)]


def all_live() -> list[Tensor]:
    return [torch.ones(m, RANK, dtype=torch.bool) for m in COUNTS]


@pytest.mark.parametrize("hidden", [24, 96, 312])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_trunks_of_all_kinds_have_the_attention_layers_size(kind: str, layers: int, hidden: int) -> None:
    spec = small(kind, hidden_size=hidden, layers=layers)
    built = sum(p.numel() for p in network(spec).trunk.parameters())
    assert built == spec.trunk_parameters
    goal = small("attention", hidden_size=hidden, layers=layers).trunk_parameters
    assert abs(built - goal) / goal < 0.02


def test_the_default_layer_is_tinyberts() -> None:
    # h = 312, 12 heads, FFN 1200 (arXiv 1909.10351): 4 h² + 4h, two FFN maps with biases, two norms.
    spec = HypernetworkSpec()
    assert (spec.hidden_size, spec.heads, spec.inner) == (312, 12, 1200)
    assert spec.trunk_parameters == 4 * 312**2 + 4 * 312 + 2 * 312 * 1200 + 1200 + 312 + 4 * 312


def seven_billion(targets: list[str] | str, rank: int = 8) -> FactorLayout:
    """LoRA on the shapes of LLaMA-7B, without memory."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=rank, target_modules=targets))
        return FactorLayout(adapted_modules(model))


def test_parameters_on_a_7b_model() -> None:
    layout = seven_billion("all-linear")
    with torch.device("cpu"):
        triple = build_networks(layout, HypernetworkSpec(), start=(1.0, 0.0, 1.0), rule=UpdateRule(), seed=0)
    assert triple.lam is not None
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in triple.named_children()}
    # P and Q: maps from and to h for the widths 4096 and 11008, the trunk, embeddings of 224 modules and 8 directions,
    # and the norm of their sum. λ has width 1.
    trunk, embeddings = HypernetworkSpec().trunk_parameters, (224 + 8 + 2) * 312
    matrix = 2 * 312 * (4096 + 11008) + trunk + embeddings
    assert sizes == {"p": matrix, "lam": 2 * 312 + trunk + embeddings, "q": matrix}
    assert sum(sizes.values()) == 22_495_992


@pytest.mark.parametrize("kind", KINDS)
def test_dead_tokens_do_not_influence_live_ones(kind: str) -> None:
    net, live = network(small(kind)), all_live()
    live[0][1] = torch.tensor([True, False, True, True, False])
    live[1][0] = torch.tensor([False, True, True, False, True])
    first = tokens()
    changed = [torch.where(alive.unsqueeze(-1), t, 7.0 * t + 3.0) for t, alive in zip(first, live, strict=True)]
    for a, b, alive in zip(net(first, live), net(changed, live), live, strict=True):
        torch.testing.assert_close(a[alive], b[alive], rtol=1e-12, atol=1e-14)
        assert not torch.allclose(a[~alive], b[~alive])


@pytest.mark.parametrize("kind", ["attention", "cnn"])
def test_live_tokens_of_a_matrix_influence_each_other_and_no_other_matrix(kind: str) -> None:
    net, live = network(small(kind)), all_live()
    first, second = tokens(), tokens()
    second[0][1, 2] += 1.0
    a, b = net(first, live), net(second, live)
    assert not torch.allclose(a[0][1, 1], b[0][1, 1])
    assert torch.equal(a[0][[0, 2, 3]], b[0][[0, 2, 3]])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_without_live_tokens_stays_finite(kind: str) -> None:
    net, live = network(small(kind)), all_live()
    live[0][2] = False
    out = net(tokens(), live)
    assert all(o.isfinite().all() for o in out)
    gradients = torch.autograd.grad([o.sum() for o in out], list(net.parameters()), allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokens_in_other_places_give_other_outputs(kind: str) -> None:
    """Singular values all start at zero; without position embeddings they would stay equal for ever."""
    net = network(small(kind))
    out = net([torch.zeros(m, RANK, d, dtype=torch.float64) for m, d in zip(COUNTS, DIMS, strict=True)], all_live())
    flat = out[0].flatten(0, 1)
    assert torch.pdist(flat).min() > 1e-3 * flat.abs().max()


def test_networks_of_layers_are_separate() -> None:
    net = network(small("attention"), groups=2)
    shared = network(small("attention"))
    own = lambda n: sum(p.numel() for name, p in n.named_parameters() if name != "module_embedding")  # noqa: E731
    assert own(net) == 2 * own(shared)
    assert net.module_embedding.numel() == shared.module_embedding.numel()
    before = net(tokens(), all_live())
    with torch.no_grad():
        for p in net.parameters():
            p[0] += 0.1
    after = net(tokens(), all_live())
    for a, b in zip(before, after, strict=True):
        half = len(a) // 2
        assert not torch.allclose(a[:half], b[:half])
        assert torch.equal(a[half:], b[half:])


def test_a_group_computes_what_a_network_of_its_own_does() -> None:
    net = network(small("attention"), groups=2)
    alone = Hypernetwork(
        small("attention"), DIMS, [n // 2 for n in COUNTS], RANK, 1, [1.0, 1.0], torch.Generator()
    ).double()
    with torch.no_grad():
        for mine, theirs in zip(alone.parameters(), net.parameters(), strict=True):
            mine.copy_(theirs[1:])
    parts = [t[len(t) // 2 :] for t in tokens()]
    wanted = alone(parts, [m[len(m) // 2 :] for m in all_live()])
    for a, b in zip(net(tokens(), all_live()), wanted, strict=True):
        torch.testing.assert_close(a[len(a) // 2 :], b, rtol=1e-12, atol=1e-14)


def test_one_step_of_the_output_maps_moves_outputs_alike_for_every_hidden_size() -> None:
    def movement(hidden: int) -> float:
        net = network(small("attention", hidden_size=hidden), std=0.0)
        before = net(tokens(), all_live())
        gradients = torch.autograd.grad([o.sum() for o in before], list(net.output_maps))
        with torch.no_grad():
            for weight, gradient in zip(net.output_maps, gradients, strict=True):
                weight -= 0.01 * gradient.sign()  # Adam's first step
        moved = net(tokens(), all_live())
        return float(torch.cat([(a - b).flatten() for a, b in zip(moved, before, strict=True)]).abs().mean())

    sizes = [movement(h) for h in (24, 96, 384)]
    assert max(sizes) / min(sizes) < 1.5
    assert 0.001 < sizes[0] < 0.01  # lr times a mean over unit entries


@pytest.mark.parametrize("hidden", [24, 384])
def test_outputs_start_at_the_given_size(hidden: int) -> None:
    out = network(small("attention", hidden_size=hidden), std=0.5)(tokens(), all_live())
    assert float(torch.cat([o.flatten() for o in out]).std()) == pytest.approx(0.5, rel=0.25)


def test_generate_starts_with_unit_norm_directions_and_no_change_of_the_model() -> None:
    layout = FactorLayout(adapted_modules(build_llama()))
    triple = build_networks(layout, small("attention"), start=(1.0, 0.0, 1.0), rule=UpdateRule("generate"), seed=0)
    assert triple.lam is not None
    shapes = [(len(c.members), RANK - 1, c.dim) for c in layout.inputs]
    live = [torch.ones(s[:2], dtype=torch.bool) for s in shapes]
    q = triple.q([torch.randn(s, dtype=torch.float64) / math.sqrt(s[-1]) for s in shapes], live)
    norms = torch.cat([x.norm(dim=-1).flatten() for x in q])
    assert 0.5 < float(norms.mean()) < 1.5
    assert all((w == 0).all() for w in triple.lam.output_maps)


def test_same_seed_same_network() -> None:
    layout = FactorLayout(adapted_modules(build_llama()))
    a, b, c = (
        build_networks(layout, small("mlp"), start=(1.0, 0.0, 1.0), rule=UpdateRule("generate"), seed=s)
        for s in (1, 1, 2)
    )
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="heads=5 must divide hidden_size=24"):
        network(small("attention", heads=5))
    network(small("mlp", heads=5))


@pytest.mark.parametrize(
    "targets",
    [
        r".*(layers\.0\.self_attn\.q_proj|layers\.[01]\.mlp\.up_proj)",
        # Two modules of one shape for each layer, but not two of each.
        r".*(layers\.0\.self_attn\.[qkv]_proj|layers\.1\.self_attn\.q_proj)",
    ],
)
def test_layers_that_differ_cannot_have_their_own_networks(targets: str) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    lora = LoraConfig(r=2, target_modules=targets)
    layout = FactorLayout(adapted_modules(get_peft_model(model, lora)))
    with pytest.raises(ValueError, match="same modules in every layer"):
        build_networks(layout, small("mlp", per_layer=True), start=(1.0, 0.0, 1.0), rule=UpdateRule(), seed=0)


def test_sizes_that_cannot_be() -> None:
    for changes in ({"heads": 0}, {"layers": 0}, {"hidden_size": 0}):
        ((name, value),) = changes.items()
        with pytest.raises(ValueError, match=f"hypernetwork {name}={value}; allowed: 1 or more"):
            HypernetworkSpec("mlp", **changes)
    with pytest.raises(ValueError, match="reanchor_every=0: at least 1 step"):
        UpdateRule("reanchored", reanchor_every=0)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"'transformer' is unknown; allowed: attention, mlp, cnn"):
        small("transformer")
