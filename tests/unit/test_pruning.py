"""Masks, schedules and scores against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from models import build_llama, build_optimizer, train_steps

from hyperlora.masks import Smoothed, prune_to
from hyperlora.pruning import BudgetPlan, Pruning


def alive(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def test_the_smallest_scores_go() -> None:
    mask = alive([[1, 1, 1], [1, 1, 1]])
    score = torch.tensor([[5.0, 1.0, 4.0], [2.0, 6.0, 3.0]])
    assert prune_to(mask, score, 6, 3).tolist() == alive([[1, 0, 1], [0, 1, 0]]).tolist()


def test_dead_directions_stay_dead_whatever_their_score() -> None:
    mask = alive([[0, 1], [1, 1]])
    score = torch.tensor([[9.0, 1.0], [2.0, 3.0]])
    assert prune_to(mask, score, 3, 2).tolist() == alive([[0, 0], [1, 1]]).tolist()


def test_ties_thin_all_modules_from_their_last_direction() -> None:
    mask = torch.ones(3, 2, dtype=torch.bool)
    equal = torch.zeros(3, 2)
    assert prune_to(mask, equal, 6, 4).tolist() == alive([[1, 0], [1, 0], [1, 1]]).tolist()
    assert prune_to(mask, equal, 6, 3).tolist() == alive([[1, 0], [1, 0], [1, 0]]).tolist()


@pytest.mark.parametrize("budget", [6, 7])
def test_nothing_to_prune(budget: int) -> None:
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert torch.equal(prune_to(mask, torch.zeros(3, 2), 6, budget), mask)


def test_everything_can_go_and_a_module_can_reach_rank_zero() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert prune_to(mask, score, 4, 2).sum(1).tolist() == [0, 2]
    assert prune_to(mask, score, 4, 0).sum().item() == 0


def test_interval_schedule_spreads_the_excess() -> None:
    plan = BudgetPlan(Pruning(interval=5, start=10, final=10), initial=20, target=8, total_steps=40)
    # Events at 10, 15, 20, 25, 30: 12 to go, so k = 3 and the last event has nothing left.
    assert plan.events == {10: 17, 15: 14, 20: 11, 25: 8}
    assert [plan.budget(s) for s in (0, 9, 10, 24, 25, 40)] == [20, 20, 17, 11, 8, 8]


def test_interval_schedule_with_a_given_count_stops_at_the_target() -> None:
    plan = BudgetPlan(Pruning(interval=5, start=10, final=10, count=7), initial=20, target=8, total_steps=40)
    assert plan.events == {10: 13, 15: 8}


def test_count_larger_than_what_lives() -> None:
    plan = BudgetPlan(Pruning(interval=5, start=10, final=10, count=100), initial=20, target=0, total_steps=40)
    assert plan.events == {10: 0}


def test_count_too_small_names_what_is_needed() -> None:
    with pytest.raises(ValueError, match="count >= 3"):
        BudgetPlan(Pruning(interval=5, start=10, final=10, count=2), initial=20, target=8, total_steps=40)


def test_count_zero_cannot_reach_a_lower_target_and_serves_an_equal_one() -> None:
    never = Pruning(interval=5, start=10, final=10, count=0)
    assert BudgetPlan(never, initial=20, target=20, total_steps=40).events == {}
    with pytest.raises(ValueError, match="count=0"):
        BudgetPlan(never, initial=20, target=19, total_steps=40)


def test_cubic_schedule_is_the_papers_formula() -> None:
    # arXiv 2303.10512, eq. 12: b = target + (initial - target)(1 - (t - t_i)/(T - t_i - t_f))^3.
    plan = BudgetPlan(
        Pruning(schedule="cubic", interval=10, start=10, final=20), initial=100, target=20, total_steps=70
    )
    expected = {t: 20 + int(80 * (1 - (t - 10) / 40) ** 3) for t in (10, 20, 30, 40)} | {50: 20}
    assert plan.events == expected == {10: 100, 20: 53, 30: 30, 40: 21, 50: 20}


def test_cubic_schedule_reaches_the_target_when_the_interval_does_not_divide() -> None:
    plan = BudgetPlan(Pruning(schedule="cubic", interval=7, start=10, final=20), initial=100, target=20, total_steps=70)
    assert plan.events[50] == 20


def test_the_cubic_schedule_has_no_count() -> None:
    with pytest.raises(ValueError, match="count=3; allowed: None for schedule='cubic'"):
        Pruning("cubic", count=3)


def test_no_event_fits() -> None:
    with pytest.raises(ValueError, match="no pruning event fits"):
        BudgetPlan(Pruning(start=30, final=20), initial=4, target=2, total_steps=40)


@pytest.mark.parametrize("target", [-1, 21])
def test_target_outside_the_budget(target: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.20"):
        BudgetPlan(Pruning(), initial=20, target=target, total_steps=40)


def test_smoothed_score_by_hand() -> None:
    smoothed, taken = Smoothed([torch.zeros(2)], beta1=0.5, beta2=0.75), torch.zeros(())
    first = smoothed.update([torch.tensor([4.0, 0.0])], taken)[0]
    # mean 2, deviation |4 - 2| = 2, uncertainty 0.25 * 2 = 0.5, score 1.
    assert first.tolist() == [1.0, 0.0]
    second = smoothed.update([torch.tensor([0.0, 8.0])], taken)[0]
    # mean 1, deviation 1, uncertainty 0.375 + 0.25; mean 4, deviation 4, uncertainty 1.
    assert second.tolist() == [0.625, 4.0]
    assert smoothed.update([torch.tensor([5.0, 5.0])], torch.ones(()))[0].tolist() == [0.625, 4.0]
    third = smoothed.update([torch.tensor([1.0, 4.0])], taken)[0]
    # mean 1, deviation 0, uncertainty 0.75 * 0.625; mean 4, deviation 0, uncertainty 0.75.
    assert third.tolist() == [0.46875, 3.0]


@pytest.mark.parametrize("schedule", ["interval", "cubic"])
@pytest.mark.parametrize("score", ["sensitivity", "smoothed", "adalora"])
def test_training_follows_the_plan(schedule: str, score: str) -> None:
    model = build_llama()
    pruning = Pruning(schedule=schedule, score=score, interval=4, start=8, final=16)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, "adalora", pruning=pruning)
    for step in range(1, 41):
        train_steps(model, optimizer, 1)
        assert optimizer.live == optimizer.plan.budget(step) == int(optimizer.mask.sum())
    assert optimizer.live == 2 * len(optimizer.layout.modules)
    assert sum(optimizer.ranks().values()) == optimizer.live


def test_the_pruned_are_the_least_important() -> None:
    model = build_llama()
    pruning = Pruning(score="sensitivity", interval=50, start=10, final=0)
    optimizer = build_optimizer(model, "adalora", pruning=pruning)
    train_steps(model, optimizer, 9)
    assert optimizer.mask.all()
    train_steps(model, optimizer, 1)
    score = optimizer.stats["importance"]
    assert score[optimizer.mask].min() >= score[~optimizer.mask].max()


def test_pruned_directions_are_zero_in_the_model() -> None:
    model = build_llama()
    optimizer = build_optimizer(model)
    train_steps(model, optimizer, 30)
    for index, module in enumerate(optimizer.layout.modules):
        norms = module.a.detach().norm(dim=1)
        assert (norms[~optimizer.mask[index]] == 0).all()
        assert (norms[optimizer.mask[index]] > 0).all()
