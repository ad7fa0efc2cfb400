"""The optimizer as a whole: every method trains, state comes back exactly, bad steps change nothing."""

from __future__ import annotations

import copy
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import RULES, VARIANTS, build_batch, build_llama, build_optimizer, train_steps
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from processes import FORKSERVER
from safetensors.torch import load_file, load_model, save_model
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hyperlora import METHODS, HyperAdaLoRA, Pruning, orthogonality, update_rules
from hyperlora.masks import prune_to
from hyperlora.optimizer import LOOK
from hyperlora.polar import polar
from hyperlora.settings import HypernetworkSpec
from hyperlora.update_rules import LearningRates

STEPS = 30


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def no_gradients(optimizer: HyperAdaLoRA) -> None:
    """Gradients of A and B that are zero."""
    for module in optimizer.layout.modules:
        module.a.grad, module.b.grad = torch.zeros_like(module.a), torch.zeros_like(module.b)


@pytest.mark.parametrize(("method", "rule"), VARIANTS)
def test_every_method_trains_to_its_budget(method: str, rule: str) -> None:
    model = build_llama(dora=METHODS[method].dora)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    optimizer = build_optimizer(model, method, rule, lr=3e-3)
    losses = train_steps(model, optimizer, STEPS)
    assert losses[-1] < losses[0] - 0.02
    assert all(math.isfinite(loss) for loss in losses)
    ranks = list(optimizer.ranks().values())
    if METHODS[method].singular_values:
        assert sum(ranks) == optimizer.live == 2 * len(ranks)
        for module, rank in zip(optimizer.layout.modules, ranks, strict=True):
            assert int((module.a.detach().abs().sum(1) > 0).sum()) == rank, "the model's own weights have that rank"
    else:
        assert set(ranks) == {optimizer.layout.rank}
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize(("method", "rule"), VARIANTS)
def test_state_comes_back_bit_by_bit(method: str, rule: str) -> None:
    def fresh():
        model = build_llama(dora=METHODS[method].dora)
        return model, build_optimizer(model, method, rule)

    model, optimizer = fresh()
    train_steps(model, optimizer, 9)
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    whole = train_steps(model, optimizer, 9)

    model, optimizer = fresh()
    train_steps(model, optimizer, 3, build_batch(seed=8))
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    assert train_steps(model, optimizer, 9) == whole


def test_state_of_another_run_is_refused() -> None:
    state = build_optimizer(build_llama(), "adalora").state_dict()
    without_mask = {name: tensor for name, tensor in state["state"].items() if name != "mask"}
    with pytest.raises(ValueError, match="the state is of method 'adalora', this run's is 'lora'"):
        build_optimizer(build_llama(), "lora").load_state_dict(state)
    generated = build_optimizer(build_llama(), "hyperadalora", "anchored").state_dict()
    with pytest.raises(ValueError, match="the state is of update rule 'anchored', this run's is 'hybrid'"):
        build_optimizer(build_llama(), "hyperadalora", "hybrid").load_state_dict(generated)
    with pytest.raises(ValueError, match=r"the state is of scale 2\.0, this run's is 4\.0"):
        build_optimizer(build_llama(alpha=16), "adalora").load_state_dict(state)
    with pytest.raises(ValueError, match="no state of this optimizer: it has no frozen, hypernetwork, live, method"):
        build_optimizer(build_llama(), "adalora").load_state_dict(torch.optim.AdamW([torch.zeros(1)]).state_dict())
    with pytest.raises(ValueError, match="does not fit this model and method: mask is missing"):
        build_optimizer(build_llama(), "adalora").load_state_dict({**state, "state": without_mask})
    with pytest.raises(ValueError, match="other adapted modules"):
        build_optimizer(build_llama(layers=1), "adalora").load_state_dict(state)
    with pytest.raises(ValueError, match=r"does not fit this model and method: .*shape"):
        build_optimizer(build_llama(rank=2, alpha=4), "adalora", target_rank=1).load_state_dict(state)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_and_dora_are_adamw_on_their_parameters(method: str) -> None:
    ours, theirs = (build_llama(dora=METHODS[method].dora) for _ in range(2))
    optimizer = build_optimizer(ours, method, lr=1e-2)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    ids, losses = build_batch(), []
    for _ in range(12):
        loss = theirs(input_ids=ids, labels=ids).loss
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert train_steps(ours, optimizer, 12) == pytest.approx(losses, rel=1e-10)
    mine = adapter(ours)
    for name, wanted in adapter(theirs).items():
        torch.testing.assert_close(mine[name], wanted, rtol=1e-8, atol=1e-10)


def test_initial_model_is_the_base_model() -> None:
    ids = build_batch()
    for method, rule in VARIANTS:
        model = build_llama(dora=METHODS[method].dora)
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        build_optimizer(model, method, rule)
        torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=1e-9, atol=1e-9)


def test_dora_magnitudes_move() -> None:
    model = build_llama(dora=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n}
    train_steps(model, build_optimizer(model, "hyperdora"), 5)
    assert before
    for name, parameter in model.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("method", ["dylora", "hyperdylora"])
def test_dylora_trains_truncated_and_shows_the_full_rank(method: str) -> None:
    model = build_llama()
    optimizer = build_optimizer(model, method)
    ids = build_batch()
    seen = set()
    for _ in range(24):
        model.train()
        model(input_ids=ids)
        seen |= {int((m.a.detach().abs().sum(1) > 0).sum()) for m in optimizer.layout.modules}
        train_steps(model, optimizer, 1)
    assert seen == {1, 2, 3, 4}
    model.eval()
    with torch.no_grad():
        evaluated = model(input_ids=ids).logits
    assert all((m.a.detach().abs().sum(1) > 0).all() for m in optimizer.layout.modules)
    model.train()
    model(input_ids=ids)
    saved = model.state_dict()
    other = build_llama()
    other.load_state_dict(saved)
    torch.testing.assert_close(other.eval()(input_ids=ids).logits, evaluated)


@pytest.mark.parametrize("method", ["dylora", "hyperdylora"])
def test_dylora_merges_all_directions(method: str) -> None:
    model = build_llama()
    optimizer = build_optimizer(model, method)
    train_steps(model, optimizer, 3)
    ids = build_batch()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, expected)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter.detach(), before[name])


def test_a_copy_of_what_dylora_trains_leaves_the_original_alone() -> None:
    model = build_llama()
    optimizer = build_optimizer(model, "dylora")
    ids = build_batch()
    train_steps(model, optimizer, 3)
    while (wanted := int(optimizer._truncation()[0].sum())) == optimizer.layout.rank:
        train_steps(model, optimizer, 1)
    copied = copy.deepcopy(model).eval()
    model.train()
    model(input_ids=ids)
    copied(input_ids=ids)
    copied.state_dict()
    assert {int((m.a.detach().abs().sum(1) > 0).sum()) for m in optimizer.layout.modules} == {wanted}


# ---------------------------------------------------------------- steps that must not be taken


@pytest.mark.parametrize("where", ["gradient", "metric"])
@pytest.mark.parametrize(("method", "rule"), VARIANTS)
def test_a_non_finite_step_changes_nothing(method: str, rule: str, where: str) -> None:
    model = build_llama(dora=METHODS[method].dora)
    # At the schedule of build_optimizer, step 12 prunes.
    optimizer = build_optimizer(model, method, rule, pruning=Pruning(interval=100, start=6, final=10))
    train_steps(model, optimizer, 6)
    before = {k: v.clone() for k, v in optimizer.state_dict()["state"].items() if k != "rule_step"}
    weights = adapter(model)
    ids = build_batch()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    metric = loss.detach().reshape(1)
    if where == "gradient":
        optimizer.layout.modules[3].b.grad[0, 0] = float("nan")
    else:
        metric = metric * float("inf")
    optimizer.step(metrics=metric)
    assert optimizer.stats["found_inf"].item() == 1
    for name, tensor in optimizer.state_dict()["state"].items():
        if name in before:
            assert torch.equal(tensor, before[name]), name
    if not METHODS[method].truncated:
        for name, tensor in adapter(model).items():
            assert torch.equal(tensor, weights[name]), name
    optimizer.zero_grad()
    losses = train_steps(model, optimizer, 3)
    assert all(math.isfinite(x) for x in losses)
    assert optimizer.stats["found_inf"].item() == 0


@pytest.mark.parametrize("method", ["hyperadalora", "adalora"])
def test_a_pruning_event_on_a_non_finite_step_goes_by_the_scores_before(method: str) -> None:
    model = build_llama()
    optimizer = build_optimizer(model, method, pruning=Pruning(interval=100, start=7, final=10))
    train_steps(model, optimizer, 6)
    wanted = prune_to(optimizer.mask, optimizer.stats["importance"], optimizer.live, optimizer.plan.events[7])
    moments = {k: v.clone() for k, v in optimizer.state_dict()["state"].items() if k.startswith("adam.")}
    ids = build_batch()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.layout.modules[3].b.grad[0, 0] = float("nan")
    optimizer.step()
    assert wanted.sum() < wanted.numel()
    assert torch.equal(optimizer.mask, wanted)
    assert all(torch.equal(optimizer.state_dict()["state"][k], v) for k, v in moments.items())


def test_clipping_bounds_the_norm_and_nothing_else() -> None:
    """Adam is blind to the size of all gradients, not to one step's: clip one step of three, then compare."""
    losses = []
    for limit in (None, 1e9, 1e-3):
        model = build_llama()
        optimizer = build_optimizer(model, "adalora", max_grad_norm=limit, gamma=0.0)
        losses.append(train_steps(model, optimizer, 3))
        assert optimizer.stats["grad_norm"].item() > 1e-3
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


# ---------------------------------------------------------------- several workers


def worker(rank: int, folder: str, method: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = build_llama()
    optimizer = build_optimizer(model, method, process_group=dist.group.WORLD)
    ids = build_batch().chunk(2)[rank]
    losses = []
    reduce, reductions = dist.all_reduce, []

    def counted(tensor: torch.Tensor, **options: Any) -> None:
        reductions.append(tensor.dim())
        reduce(tensor, **options)

    dist.all_reduce = counted
    for step in range(14):
        loss = model(input_ids=ids, labels=ids).loss
        if step == 10 and rank == 1:
            loss = loss * float("nan")
        loss.backward()
        optimizer.step(metrics=loss.detach().reshape(1))
        optimizer.zero_grad()
        losses.append(optimizer.stats["metrics"].item())
    torch.save({"losses": losses, "adapter": adapter(model), "reductions": reductions}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["hyperadalora", "adalora"])
def test_two_processes_are_one_and_a_bad_step_of_one_is_skipped_by_both(method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (folder, method), nprocs=2, start_method=FORKSERVER.get_start_method())
        one, two = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    for name, tensor in one["adapter"].items():
        assert torch.equal(tensor, two["adapter"][name]), name
    assert one["reductions"] == [1] * 14, "one flat all-reduce a step"
    model = build_llama()
    optimizer = build_optimizer(model, method)
    alone = train_steps(model, optimizer, 10)
    # transformers computes the loss in float32, whatever the model's dtype.
    assert one["losses"][:10] == pytest.approx(alone, abs=2e-6)
    assert math.isnan(one["losses"][10])
    assert one["losses"][11] == pytest.approx(train_steps(model, optimizer, 1)[0], abs=2e-6)


def rounding(rank: int, folder: str, method: str) -> None:
    """Of two processes the second rounds products otherwise, as another kind of processor does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    if rank == 1:
        exact, product = orthogonality.penalty, update_rules.polar
        rng = torch.Generator().manual_seed(0)

        def near(x: torch.Tensor) -> torch.Tensor:
            return x + 1e-8 * torch.empty_like(x).normal_(generator=rng)

        def penalty(*given: Any) -> Any:
            value, slopes = exact(*given)
            return value, [near(s) for s in slopes]

        orthogonality.penalty = penalty
        update_rules.polar = lambda rows: [near(x) for x in product(rows)]
    model = build_llama(dtype=torch.float32)
    optimizer = build_optimizer(model, method, process_group=dist.group.WORLD)
    ids = build_batch().chunk(2)[rank]
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"adapter": adapter(model), "mask": optimizer.mask}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["adalora", "hyperadalora"])
def test_processors_that_round_otherwise_train_one_model(method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rounding, (folder, method), nprocs=2, start_method=FORKSERVER.get_start_method())
        one, two = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one["mask"], two["mask"])
    for name, tensor in one["adapter"].items():
        assert (tensor - two["adapter"][name]).abs().max() < 1e-4, name


def test_the_state_of_the_first_process_is_taken_over_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            model = build_llama()
            optimizer = build_optimizer(model, process_group=dist.group.WORLD)
            agreed: list[int] = []
            monkeypatch.setattr(optimizer, "_first_has", lambda tensor: agreed.append(optimizer.steps_done))
            monkeypatch.setattr("hyperlora.optimizer.AGREE", 5)
            train_steps(model, optimizer, 12)
        finally:
            dist.destroy_process_group()
    # At pruning events of the mask alone, before the step counts.
    events = {step - 1 for step in optimizer.plan.events if step <= 12}
    assert {1, 5, 10} <= set(agreed) <= {1, 5, 10} | events
    assert all(agreed.count(step) > 10 for step in (1, 5, 10))


@pytest.mark.parametrize("method", ["lora", "adalora", "hyperadalora"])
def test_the_programs_default_device_does_not_matter(method: str) -> None:
    model = build_llama()
    wanted = adapter_of(build_optimizer(build_llama(), method))
    torch.set_default_device("meta")
    try:
        found = adapter_of(build_optimizer(model, method))
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def adapter_of(optimizer: HyperAdaLoRA) -> list[torch.Tensor]:
    return [t.detach().clone() for m in optimizer.layout.modules for t in (m.a, m.b)]


def test_pruning_without_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="needs target_rank"):
        build_optimizer(build_llama(), target_rank=None)
    assert build_optimizer(build_llama(), target_rank=None, pruning=Pruning(schedule="none")).plan.events == {}
    assert build_optimizer(build_llama(), target_rank=None, pruning=None).plan.events == {}


def cast_worker(rank: int, folder: str, method: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = build_llama(dtype=torch.float32)
    optimizer = build_optimizer(model, method)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    parallel = DistributedDataParallel(model)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate's prepare() does
    ids = build_batch().chunk(2)[rank]
    for _ in range(4):
        parallel(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(adapter(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["hyperadalora", "lora"])
def test_weights_that_are_cast_before_ddp_keep_their_gradients_averaged(method: str) -> None:
    """TRL's trainers cast what is trainable in a quantized model to bfloat16, after the optimizer was built."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(cast_worker, (folder, method), nprocs=2, start_method=FORKSERVER.get_start_method())
        one, two = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    assert {t.dtype for t in one.values()} == {torch.bfloat16}
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


# ---------------------------------------------------------------- a model that others load, save, wrap


def test_weights_that_are_loaded_afterwards_are_not_overwritten() -> None:
    trained = build_llama()
    first = build_optimizer(trained, "adalora")
    train_steps(trained, first, 3)
    weights, wanted = get_peft_model_state_dict(trained), adapter(trained)

    model = build_llama()
    optimizer = build_optimizer(model, "adalora")
    set_peft_model_state_dict(model, weights)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate's prepare() does
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"weights were changed after the .*own state as well"):
            train_steps(model, optimizer, 1)
        optimizer.zero_grad()
        assert optimizer.steps_done == 0
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in adapter(model).items())
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train_steps(model, optimizer, 4) == train_steps(trained, first, 4)

    # Without singular values the weights are what is trained.
    model = build_llama()
    optimizer = build_optimizer(model, "lora")
    set_peft_model_state_dict(model, weights)
    train_steps(model, optimizer, 1)


@pytest.mark.parametrize("method", ["dylora", "hyperdylora"])
def test_weights_that_are_loaded_at_the_end_are_evaluated_and_saved(method: str) -> None:
    """As ``load_best_model_at_end`` does."""
    model = build_llama()
    optimizer = build_optimizer(model, method)
    train_steps(model, optimizer, 3)
    best = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}
    train_steps(model, optimizer, 3)
    set_peft_model_state_dict(model, best)
    model.eval()
    model(input_ids=build_batch())
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, best[name]), name


def test_a_saved_model_is_whole(tmp_path: Path) -> None:
    model = build_llama()
    train_steps(model, build_optimizer(model), 3)
    save_model(model, str(tmp_path / "model.safetensors"))
    again = build_llama()
    build_optimizer(again)
    load_model(again, str(tmp_path / "model.safetensors"))
    wanted = adapter(model)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in adapter(again).items())
    live = dict(model.named_parameters(remove_duplicate=False))
    assert all(t is live[n] for n, t in model.state_dict(keep_vars=True).items() if n in live)


@pytest.mark.parametrize("method", ["hyperadalora", "dylora"])
def test_a_model_with_an_optimizer_is_pickled_copied_and_wrapped(tmp_path: Path, method: str) -> None:
    model = build_llama()
    wrapper = torch.nn.ModuleDict({"module": model})
    build_optimizer(wrapper, method)
    torch.save(model, tmp_path / "model.pt")
    # Built over a wrapper, the model itself can be saved as well.
    save_model(model, str(tmp_path / "model.safetensors"))
    assert len([n for n in load_file(tmp_path / "model.safetensors") if ".lora_" in n]) == len(adapter(model))
    # An average of weights that is kept in a copy is written through its state.
    average = copy.deepcopy(model)
    for tensor in average.state_dict().values():
        tensor.fill_(0.5)
    assert all(torch.equal(t, torch.full_like(t, 0.5)) for t in adapter(average).values())


@pytest.mark.parametrize(("by", "refused"), [(1 + 1e-7, False), (1.01, True)])
def test_what_another_processor_rounds_otherwise_is_no_change(by: float, refused: bool) -> None:
    model = build_llama()
    optimizer = build_optimizer(model, "adalora")
    with torch.no_grad():
        optimizer.layout.modules[0].b.mul_(by)
    no_gradients(optimizer)
    with pytest.raises(RuntimeError, match="weights were changed") if refused else nullcontext():
        optimizer.step()


def test_a_step_within_autocast_is_as_precise() -> None:
    ends = []
    for enabled in (False, True):
        model = build_llama(dtype=torch.float32)
        optimizer = build_optimizer(model, "adalora")
        for n in range(4):
            for module in optimizer.layout.modules:
                module.a.grad = torch.full_like(module.a, 0.01 * n)
                module.b.grad = torch.linspace(-1, 1, module.b.numel()).view_as(module.b)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        ends.append(adapter(model))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_into_a_head_stays(dtype: torch.dtype) -> None:
    """As DistributedDataParallel does, which gives all processes the first one's, and as weights are loaded."""
    model = build_llama(dtype=torch.float32)
    head = model.base_model.model.lm_head.weight  # type: ignore[union-attr]
    head.data = head.data.to(dtype)
    head.requires_grad_(True)
    optimizer = build_optimizer(model, "adalora", lr=1e-3)
    assert [p is head for p in optimizer.param_groups[3]["params"]] == [True]

    def step() -> None:
        no_gradients(optimizer)
        head.grad = torch.ones_like(head)
        optimizer.step()

    step()
    with torch.no_grad():
        head.fill_(0.5)
    step()
    torch.testing.assert_close(head.float(), torch.full(head.shape, 0.499), atol=2e-3, rtol=0)
    # The bits that a rounded head has lost come back with the optimizer's state, in either order.
    saved, rounded = copy.deepcopy(optimizer.state_dict()), head.detach().clone()
    step()
    after = head.detach().clone()
    for optimizer_first in (True, False):
        if optimizer_first:
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            head.copy_(rounded)
        if not optimizer_first:
            optimizer.load_state_dict(saved)
        step()
        assert torch.equal(head, after)


def test_factors_move_in_full_precision_whatever_the_program_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tf32=True`` of transformers, say: of a rounded Gram matrix the polar factor's iteration diverges."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    seen = []

    def watched(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append([b.fp32_precision for b in backends])
        return polar(rows)

    monkeypatch.setattr(update_rules, "polar", watched)
    model = build_llama(dtype=torch.float32)
    optimizer = build_optimizer(model)
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = [b.fp32_precision for b in backends]
        train_steps(model, optimizer, 2)
        assert seen == [["ieee", "ieee"]] * 2
        assert [b.fp32_precision for b in backends] == allowed == ["tf32", "bf16"], "outside nothing changes"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_state_fits_with_and_without_a_wrapper() -> None:
    model = build_llama()
    names = build_optimizer(model).state_dict()["modules"]
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert build_optimizer(torch.compile(build_llama())).state_dict()["modules"] == names
    assert build_optimizer(torch.nn.ModuleDict({"module": build_llama()})).state_dict()["modules"] == names


def test_groups_are_fixed() -> None:
    with pytest.raises(ValueError, match="the parameter groups are fixed"):
        build_optimizer(build_llama()).add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def test_skipped_steps_are_told_of(recwarn: pytest.WarningsRecorder) -> None:
    model = build_llama()
    optimizer = build_optimizer(model)
    for n in range(4 * LOOK):
        no_gradients(optimizer)
        if n in (3, 5, LOOK + 2):
            optimizer.layout.modules[0].b.grad.fill_(float("nan"))
        optimizer.step()
    told = [str(w.message) for w in recwarn if "changed nothing" in str(w.message)]
    assert [t.split(":")[0] for t in told] == [f"{count} steps so far changed nothing" for count in (2, 3)]


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "qlora"}, "method 'qlora' is unknown; allowed: lora, dora"),
        ({"initialization": "zeros"}, "initialization 'zeros' is unknown; allowed: orthonormal, gaussian"),
        ({"method": "dora"}, "method 'dora' needs DoRA layers"),
        ({"target_rank": 5}, "target_rank=5; allowed: above 0, up to the initial rank 4"),
        ({"target_rank": 0}, "target_rank=0; allowed: above 0"),
        ({"total_steps": None}, "target_rank needs total_steps"),
        ({"adapter_name": "other"}, "no linear LoRA layer with an adapter named 'other'"),
        ({"hypernetwork": HypernetworkSpec(hidden_size=10, heads=3)}, "heads=3 must divide hidden_size=10"),
    ],
)
def test_arguments(changes: dict, message: str) -> None:
    arguments = {"method": "hyperadalora", "total_steps": 40, "target_rank": 2, **changes}
    with pytest.raises(ValueError, match=message):
        HyperAdaLoRA(build_llama(), **arguments)


@pytest.mark.parametrize(
    ("method", "rule"), [("hyperadalora", "hybrid"), ("adalora", "direct"), ("hyperlora", "generate")]
)
def test_an_update_is_not_overwritten(method: str, rule: str, tmp_path: Path) -> None:
    trained = build_llama()
    train_steps(trained, build_optimizer(trained, "lora"), 2)
    trained.save_pretrained(tmp_path)
    ids = build_batch()
    wanted = trained(input_ids=ids).logits
    model = PeftModel.from_pretrained(build_llama().unload(), tmp_path, is_trainable=True).double()
    with pytest.raises(
        ValueError,
        match=rf"an update, which method '{method}' .*: B A is not zero in model.layers.0.self_attn.q_proj, .* and 11 "
        r"more; allowed: a new adapter .*merge_and_unload.*replace=True",
    ):
        build_optimizer(model, method, rule)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)

    build_optimizer(model, "lora")
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    # Merged into the base, it is where a new adapter starts.
    merged = get_peft_model(model.merge_and_unload(), LoraConfig(r=4, target_modules="all-linear")).double()
    build_optimizer(merged, method, rule)
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-6, atol=1e-6)


def test_an_update_is_overwritten_where_a_state_follows() -> None:
    model = build_llama()
    optimizer = build_optimizer(model, "adalora")
    train_steps(model, optimizer, 3)
    state, weights = copy.deepcopy(optimizer.state_dict()), adapter(model)
    with pytest.raises(ValueError, match="B A is not zero"):
        build_optimizer(model, "adalora")
    again = build_optimizer(model, "adalora", replace=True)
    assert not any(m.a.any() for m in again.layout.modules)
    again.load_state_dict(state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapter(model).items())


@pytest.mark.parametrize("initialization", ["orthogonal", "gaussian", "olora", "pissa"])
def test_of_pefts_initializations_those_that_hold_no_update_are_taken(initialization: str) -> None:
    base = build_llama().unload()
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=initialization)  # type: ignore[arg-type]
    model = get_peft_model(base.float(), config)
    build_optimizer(model, "hyperlora")
    if initialization in ("orthogonal", "gaussian"):
        build_optimizer(model)
        return
    with pytest.raises(ValueError, match="not 'pissa' or 'olora'"):
        build_optimizer(model)


def test_a_step_without_gradients() -> None:
    model = build_llama()
    head = model.get_base_model().lm_head.weight.requires_grad_()
    optimizer = build_optimizer(model)
    head.grad = torch.ones_like(head)
    with pytest.raises(RuntimeError, match=r"no parameter of the adapter has a gradient: was loss.backward\(\) called"):
        optimizer.step()
    assert optimizer.steps_done == 0
    module = optimizer.layout.modules[3]
    before = module.b.detach().clone()
    module.b.grad = torch.ones_like(module.b)
    optimizer.step()
    assert optimizer.steps_done == 1
    assert not torch.equal(module.b, before)


def test_too_many_metrics() -> None:
    model = build_llama()
    optimizer = build_optimizer(model)
    with pytest.raises(ValueError, match="at most 4 metrics travel with a step, got 5"):
        optimizer.step(metrics=torch.zeros(5))


def test_a_model_whose_weights_were_replaced_is_found_again() -> None:
    """Casting a model to its own dtype or reloading weights by assignment detaches them from the stacked buffers."""
    model = build_llama()
    optimizer = build_optimizer(model)
    train_steps(model, optimizer, 2)
    for module in optimizer.layout.modules:
        module.a.data = module.a.data.clone()
    losses = train_steps(model, optimizer, 6)
    assert losses[-1] < losses[0]
    assert all(c.attached() for c in optimizer.layout.classes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["hyperdora", "dora"])
def test_a_model_that_is_cast_afterwards_trains_all_that_it_has(method: str, dtype: torch.dtype) -> None:
    """As ``model.double()`` does, and TRL's trainers with what is trainable in a quantized model."""
    model = build_llama(dora=True, dtype=torch.float32)
    model.get_base_model().lm_head.weight.requires_grad_()
    optimizer = build_optimizer(model, method)
    train_steps(model, optimizer, 2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.to(dtype)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in named} == {"default", "lm_head"}
    before = {n: p.detach().clone() for n, p in named.items()}
    train_steps(model, optimizer, 1)
    train_steps(model, optimizer, 1)
    for name, parameter in named.items():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.dtype == dtype, name


def test_bfloat16_adapters_keep_float32_factors() -> None:
    model = build_llama(dtype=torch.bfloat16)
    optimizer = build_optimizer(model, "hyperadalora", lr=3e-3)
    losses = train_steps(model, optimizer, STEPS)
    assert losses[-1] < losses[0] - 0.02
    assert {t.dtype for t in optimizer.source.factors.tensors()} == {torch.float32}
    assert optimizer.layout.modules[0].a.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["hyperadalora", "adalora", "lora"])
def test_small_steps_of_a_bfloat16_head_add_up(method: str) -> None:
    model = build_llama(dtype=torch.bfloat16)
    head = model.get_base_model().lm_head.weight.requires_grad_()
    head.data.fill_(1.0)
    optimizer = build_optimizer(model, method, other_lr=1e-4)
    for _ in range(STEPS):
        no_gradients(optimizer)
        head.grad = torch.ones_like(head)
        optimizer.step()
        optimizer.zero_grad()
    # Between 1 and a half bfloat16 numbers are 1/256 apart: no step alone reaches the next one.
    assert torch.equal(head, torch.full_like(head, 1 - 1e-4 * STEPS))
    # The same goes on from its state.
    model.get_base_model().lm_head.weight.data.fill_(1.0)
    again = build_optimizer(model, method, other_lr=1e-4)
    again.load_state_dict(optimizer.state_dict())
    for _ in range(STEPS):
        no_gradients(again)
        head.grad = torch.ones_like(head)
        again.step()
    assert torch.equal(head, torch.full_like(head, 1 - 2e-4 * STEPS))


def test_without_a_schedule_pruning_waits_for_scores() -> None:
    model = build_llama()
    optimizer = build_optimizer(model, "hyperadalora", pruning=None, total_steps=100)
    assert min(optimizer.plan.falls()) == 10
    assert optimizer.plan.last <= 60
    for steps in (2, 5, 19):
        short = build_optimizer(build_llama(), "hyperadalora", pruning=None, total_steps=steps)
        assert min(short.plan.falls()) == 2, "λ is zero at the first step"


def test_a_scheduler_drives_all_rates() -> None:
    optimizer = build_optimizer(build_llama(), trunk_lr=1e-3, output_lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rates = [g["lr"] for g in optimizer.param_groups]
    assert rates == [1e-2, 1e-3, 2e-3, 1e-2]
    no_gradients(optimizer)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [r / 2 for r in rates]


def test_rules_differ_in_what_they_learn() -> None:
    """No two rules are the same by mistake."""
    ends = []
    for rule in RULES:
        model = build_llama()
        ends.append(round(train_steps(model, build_optimizer(model, "hyperadalora", rule), STEPS)[-1], 9))
    assert len(set(ends)) == len(RULES)


@pytest.mark.parametrize("initialization", ["orthonormal", "gaussian"])
@pytest.mark.parametrize("rule", ["direct", *RULES])
def test_adam_moves_every_entry_of_p_against_its_own_gradient(initialization: str, rule: str) -> None:
    """Adam's first step is the sign of the gradient; a factor stored column by column once got others' signs."""
    model = build_llama()
    method = "adalora" if rule == "direct" else "hyperadalora"
    optimizer = build_optimizer(model, method, rule, initialization=initialization, gamma=0.0, direction="adam")
    assert all(t.is_contiguous() for t in optimizer.source.factors.tensors())
    if rule not in ("direct", "hybrid"):
        return
    source = optimizer.source
    factors = source.factors if rule == "direct" else source._base
    before = [t.clone() for t in factors.tensors()]
    rng = torch.Generator().manual_seed(1)
    gradients = factors.like([torch.randn(t.shape, generator=rng, dtype=t.dtype) for t in before])
    rates = LearningRates(1e-2, 1e-2, 1e-2)
    source.advance(gradients, rates, torch.zeros(()), optimizer._live_tokens())
    for old, new, gradient in zip(before, factors.tensors(), gradients.tensors(), strict=True):
        assert torch.allclose(new - old, -1e-2 * gradient.sign(), atol=1e-6)


def test_layers_that_hold_their_weight_transposed() -> None:
    """GPT-2's Conv1D: A and B are what they are anywhere else."""
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **quiet)
    targets = ["c_attn", "c_proj", "c_fc"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(GPT2LMHeadModel(config).double(), lora).double()
    optimizer = build_optimizer(model)
    losses = train_steps(model, optimizer, 40)
    assert losses[-1] < losses[0] - 0.5
    assert optimizer.live == 2 * len(optimizer.layout.modules) == 16
