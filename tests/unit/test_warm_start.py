"""Hypernetworks that start from those of another run: what is taken, what must fit, what stays frozen."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import build_llama, build_optimizer, train_steps
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hyperlora import HyperAdaLoRA, HypernetworkSpec, checkpoint, start_from
from hyperlora.config import RecipeError
from hyperlora.warm_start import keep_networks, read

SPEC = HypernetworkSpec(hidden_size=24, heads=2)
STEPS = 4


def build(method: str = "hyperlora", rule: str = "hybrid", *, seed: int = 3, rank: int = 4, **changes) -> HyperAdaLoRA:
    model = build_llama(dora=method == "hyperdora", rank=rank, seed=seed)
    optimizer = build_optimizer(model, method, rule, seed=seed, **{"hypernetwork": SPEC, **changes})
    optimizer.model_of_test = model  # type: ignore[attr-defined]
    return optimizer


def train(optimizer: HyperAdaLoRA, steps: int = STEPS) -> list[float]:
    return train_steps(optimizer.model_of_test, optimizer, steps)  # type: ignore[attr-defined]


def phi(optimizer: HyperAdaLoRA) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in optimizer.source.networks.named_parameters()}  # type: ignore[attr-defined]


def trained(method: str = "hyperlora", rule: str = "hybrid", **changes) -> HyperAdaLoRA:
    optimizer = build(method, rule, **changes)
    train(optimizer)
    return optimizer


def adam_bytes(optimizer: HyperAdaLoRA) -> int:
    named = optimizer.state_dict()["state"]
    return sum(t.numel() * t.element_size() for n, t in named.items() if n.startswith("adam."))


@pytest.mark.parametrize("method", ["hyperlora", "hyperdora", "hyperdylora", "hyperadalora"])
def test_a_run_starts_from_exactly_these_parameters(method: str) -> None:
    source = trained("hyperlora")
    optimizer = build(method, seed=7)
    before = [t.clone() for t in optimizer.source.factors.tensors()]
    report = start_from(optimizer, source.state_dict())
    taken, expected = phi(optimizer), phi(source)
    assert taken.keys() == expected.keys()
    assert all(taken[name].equal(expected[name]) for name in expected)
    assert (report.taken, report.new, report.left_out) == (("H_P", "H_Q"), (), ())
    assert (report.method, report.steps, report.frozen_parameters) == ("hyperlora", STEPS, 0)
    # The source's networks on this run's tokens are what is added to its initial factors, and what the model computes.
    generated = optimizer.source
    live = optimizer._live_tokens()
    n = len(generated.factors.p)
    added = source.source.networks.p([t.transpose(1, 2) for t in generated._input.p], live[:n])
    for start, out, now in zip(before, added, generated.factors.p, strict=False):
        assert torch.allclose(now, start + out.transpose(1, 2))
        assert not now.equal(start)
    for shape_class, p in zip(optimizer.layout.outputs, generated.factors.p, strict=True):
        assert shape_class.buffer.equal(p)
    assert all(not t.any() for n, t in optimizer.state_dict()["state"].items() if n.startswith("adam."))


def test_networks_without_counterpart() -> None:
    triplet = trained("hyperadalora", factorization="triplet")
    report = start_from(build("hyperdora"), triplet.state_dict())
    assert (report.taken, report.new, report.left_out) == (("H_P", "H_Q"), (), ("H_Λ",))

    optimizer = build("hyperadalora", factorization="triplet", seed=7)
    fresh = phi(optimizer)
    report = start_from(optimizer, trained("hyperlora").state_dict(), "all")
    assert (report.taken, report.new, report.left_out) == (("H_P", "H_Q"), ("H_Λ",), ())
    started = phi(optimizer)
    assert all(started[name].equal(fresh[name]) for name in fresh if name.startswith("lam."))
    # What starts anew learns even so.
    train(optimizer)
    ended = phi(optimizer)
    changed = {name for name in started if not ended[name].equal(started[name])}
    assert "lam.output_maps.0" in changed
    assert all(name.startswith("lam.") for name in changed)


def test_embeddings_of_another_rank_start_anew() -> None:
    optimizer = build(rank=6, seed=7)
    fresh = phi(optimizer)
    report = start_from(optimizer, trained().state_dict(), "trunk")
    assert report.new == ("H_P.direction_embedding", "H_Q.direction_embedding")
    assert report.left_out == ()
    assert "H_P.module_embedding" in report.taken
    started = phi(optimizer)
    assert started["p.direction_embedding"].equal(fresh["p.direction_embedding"])
    assert "p.direction_embedding" not in optimizer.source.frozen
    assert "p.module_embedding" in optimizer.source.frozen
    train(optimizer)


def test_maps_are_found_by_their_dimension() -> None:
    """The source adapts all linears (widths 16, 32, 48), the new run only those from 32 to 48."""
    source = trained()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = get_peft_model(LlamaForCausalLM(config).double(), LoraConfig(r=4, target_modules=["up_proj"])).double()
    optimizer = build_optimizer(model, "hyperlora", hypernetwork=SPEC)
    report = start_from(optimizer, source.state_dict())
    ours, theirs = phi(optimizer), phi(source)
    assert [ours["p.embed.0"].shape[1], ours["q.embed.0"].shape[1]] == [48, 32]
    assert ours["p.embed.0"].equal(theirs["p.embed.2"])
    assert ours["p.output_maps.0"].equal(theirs["p.output_maps.2"])
    assert ours["q.embed.0"].equal(theirs["q.embed.0"])
    assert "H_P.embed.0" in report.left_out
    assert report.new == ("H_P.module_embedding", "H_Q.module_embedding")


def test_all_that_does_not_fit_at_once() -> None:
    source = trained().state_dict()
    other = HypernetworkSpec("mlp", hidden_size=20, layers=2, per_layer=True)
    with pytest.raises(RecipeError) as error:
        start_from(build(hypernetwork=other), source)
    text = str(error.value)
    assert "4 problems" in text
    for expected in (
        "hypernetwork.kind: got 'mlp'; attention, as in the state_dict",
        "hypernetwork.hidden_size: got 20; 24, as in",
        "hypernetwork.layers: got 2; 1, as in",
        "hypernetwork.per_layer: got True; False, as in",
    ):
        assert expected in text
    with pytest.raises(RecipeError, match=r"hypernetwork.heads: got 4; 2, as in"):
        start_from(build(hypernetwork=HypernetworkSpec(hidden_size=24, heads=4)), source)
    with pytest.raises(RecipeError, match=r"hypernetwork.intermediate_size: got 30; 92, as in"):
        start_from(build(hypernetwork=HypernetworkSpec(hidden_size=24, heads=2, intermediate_size=30)), source)


def test_layers_and_dimensions_have_to_fit() -> None:
    each = HypernetworkSpec(hidden_size=24, heads=2, per_layer=True)
    source = trained(hypernetwork=each).state_dict()
    model = build_llama(layers=3)
    with pytest.raises(RecipeError, match=r"per_layer: got True; false: this model adapts 3 layers, .* for 2"):
        start_from(build_optimizer(model, "hyperlora", hypernetwork=each), source)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=40, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = build_optimizer(model, "hyperlora", hypernetwork=SPEC)
    before = phi(optimizer)
    with pytest.raises(RecipeError) as error:
        start_from(optimizer, trained().state_dict())
    text = str(error.value)
    assert "H_P has maps for the dimensions [40] of this model; it has them for [16, 32, 48]" in text
    assert "H_Q has maps for the dimensions [40] of this model; it has them for [32, 48]" in text
    assert all(before[name].equal(tensor) for name, tensor in phi(optimizer).items()), "nothing was taken"


@pytest.mark.parametrize("rule", ["hybrid", "anchored", "residual", "friction", "reanchored", "generate"])
def test_a_frozen_trunk_stays_bit_by_bit_without_state(rule: str) -> None:
    source = trained(rule=rule).state_dict()
    whole, optimizer = build("hyperdora", rule, seed=7), build("hyperdora", rule, seed=7)
    start_from(whole, source)
    report = start_from(optimizer, source, "trunk")
    started = phi(optimizer)
    train(optimizer, 9)
    ended = phi(optimizer)
    maps = {name for name in started if "embed." in name or "output_maps" in name}
    changed = {name for name in started if not ended[name].equal(started[name])}
    # LoRA's B starts at zero, and under these rules it is H_P's input for ever: maps from zero have no gradient.
    unmoved = {name for name in maps if name.startswith("p.embed.")} if rule in ("hybrid", "anchored") else set()
    assert changed == maps - unmoved
    frozen = started.keys() - maps
    numbers = sum(started[name].numel() for name in frozen)
    assert report.frozen_parameters == numbers > 0
    # Two moments of eight bytes each, and one step count of four for every tensor.
    assert whole.state_bytes - optimizer.state_bytes == 16 * numbers + 4 * len(frozen)
    assert whole.trainable_parameters - optimizer.trainable_parameters == numbers
    assert {id(p) for p in optimizer.param_groups[1]["params"]}.isdisjoint(
        id(p) for n, p in optimizer.source.networks.named_parameters() if n in frozen
    )


def test_wholly_frozen_networks_have_no_graph_and_the_direct_part_learns() -> None:
    optimizer = build("hyperadalora", seed=7)
    report = start_from(optimizer, trained("hyperadalora").state_dict(), "all")
    assert report.frozen_parameters == report.parameters
    started = phi(optimizer)
    assert not any(t.requires_grad for t in optimizer.source._generated)
    losses = train(optimizer, 20)
    assert losses[-1] < losses[0] - 0.02
    assert all(phi(optimizer)[name].equal(started[name]) for name in started)
    assert not any(n.startswith(("adam.trunk", "adam.output")) for n in optimizer.state_dict()["state"])
    direct = sum(t.numel() for t in optimizer.source.factors.tensors())
    assert optimizer.trainable_parameters == direct
    assert adam_bytes(optimizer) == 16 * direct + 4 * len(optimizer.source.factors.tensors())


def test_a_random_trunk_can_be_frozen_as_well() -> None:
    optimizer = build(rule="anchored")
    started = phi(optimizer)
    report = start_from(optimizer, None, "trunk")
    assert (report.source, report.taken, report.new) == (None, (), ("H_P", "H_Q"))
    train(optimizer)
    ended = phi(optimizer)
    frozen = {n for n in started if "embed." not in n and "output_maps" not in n}
    assert set(optimizer.source.frozen) == frozen
    assert all(ended[n].equal(started[n]) for n in frozen)
    assert not any(ended[n].equal(started[n]) for n in started.keys() - frozen if not n.startswith("p.embed."))


@pytest.mark.parametrize(("rule", "freeze"), [("hybrid", "all"), ("anchored", "trunk"), ("reanchored", "trunk")])
def test_frozen_parts_come_back_bit_by_bit_without_the_source(rule: str, freeze: str) -> None:
    optimizer = build("hyperdora", rule, seed=7)
    start_from(optimizer, trained(rule=rule).state_dict(), freeze)
    train(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(optimizer.model_of_test.state_dict())  # type: ignore[attr-defined]
    whole = train(optimizer, 8)

    resumed = build("hyperdora", rule, seed=7)
    resumed.model_of_test.load_state_dict(weights)  # type: ignore[attr-defined]
    resumed.load_state_dict(saved)
    assert resumed.source.frozen == optimizer.source.frozen != []
    assert train(resumed, 8) == whole
    first, second = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_what_cannot_be() -> None:
    source = trained().state_dict()
    with pytest.raises(ValueError, match="'adalora' has no hypernetworks"):
        start_from(build_optimizer(build_llama(), "adalora"), source)
    with pytest.raises(ValueError, match="'anchored' learns through its output maps"):
        start_from(build(rule="anchored"), source, "all")
    with pytest.raises(ValueError, match="freeze='all' needs a source"):
        start_from(build(), None, "all")
    with pytest.raises(ValueError, match="4 steps are done"):
        start_from(trained(), source)
    with pytest.raises(RecipeError, match=r"init_from: got 'state_dict'; .* the state_dict is of adalora"):
        start_from(build(), build_optimizer(build_llama(), "adalora").state_dict())
    with pytest.raises(ValueError, match=r"have no p\.nothing"):
        build().take_networks({"p.nothing": torch.zeros(1)})


def checkpoint_of(optimizer: HyperAdaLoRA, run: Path, step: int) -> str:
    state = optimizer.state_dict()
    tensors = {f"optimizer.{k}": v for k, v in state.pop("state").items()}
    return checkpoint.save(str(run), step, tensors, {"step": step, "optimizer": state, "recipe": {}}, {"a.bin": b"x"})


def test_runs_checkpoints_and_what_trials_keep(tmp_path: Path) -> None:
    older, newer = trained(), trained(seed=5)
    first, second = checkpoint_of(older, tmp_path, 5), checkpoint_of(newer, tmp_path, 10)

    def of(uri: str) -> dict[str, Tensor]:
        optimizer = build(seed=9)
        start_from(optimizer, uri)
        return phi(optimizer)

    def same(one: dict[str, Tensor], other: HyperAdaLoRA) -> bool:
        return all(one[name].equal(tensor) for name, tensor in phi(other).items())

    assert same(of(str(tmp_path)), newer)
    assert same(of(first), older)
    keep_networks(str(tmp_path))
    kept, _ = checkpoint.load_latest(str(tmp_path / "hypernetworks"))
    assert kept is not None
    assert {n.split(".")[1] for n in kept.tensors} == {"hypernetwork"}

    # A damaged newest checkpoint is passed over; with none left there is what was kept.
    damaged = tmp_path / "checkpoints/step-00000010/state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert same(of(str(tmp_path)), older)
    with pytest.raises(RecipeError, match=r"hypernetwork.init_from: got .*SHA-256"):
        of(second)
    for folder in ("step-00000005", "step-00000010"):
        (tmp_path / "checkpoints" / folder / "COMMIT").unlink()
    assert same(of(str(tmp_path)), newer)
    with pytest.raises(RecipeError, match=r"init_from: got '.*nowhere'; a run, checkpoint or trial folder"):
        read(str(tmp_path / "nowhere"))
