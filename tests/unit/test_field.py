"""Which trials a comparison wants, and what its contestants are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trials
import yaml

from hyperlora.adapters import load_tokenizer
from hyperlora.config import Recipe, RecipeError, parse
from hyperlora.field import EXTENSIONS, Entry, planned, read_field, resolve, search
from hyperlora.preflight import meta_model
from hyperlora.tasks import build_task
from hyperlora.training import World, build_optimizer
from pipelines.common import load_recipe, shipped

RATES = [1e-3, 2e-3, 4e-3]


def tuned(contestant: str, losses: dict[float, float | None]) -> list[dict]:
    """Records of finished tuning trials with a constant loss; None failed."""
    return [
        trials.record(contestant, None if loss is None else [loss] * 20, lr=lr, seed=0, stage="tune")
        for lr, loss in losses.items()
    ]


def base(**adapter: float) -> Recipe:
    content = load_recipe("quickstart", []).model_dump(mode="json")
    return parse(content | {"adapter": content["adapter"] | adapter, "ray": {"backend": "local"}})


def write(folder: Path, content: object) -> Path:
    path = folder / "field.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_search_waits_for_every_rate() -> None:
    state = search(tuned("a", {1e-3: 0.5, 4e-3: 0.4}), "a", RATES)
    assert (state.rates, state.over, state.best) == (tuple(RATES), False, None)


def test_a_search_ends_with_the_best_inside() -> None:
    state = search(tuned("a", {1e-3: 0.5, 2e-3: 0.3, 4e-3: None}), "a", RATES)
    assert (state.rates, state.over, state.best) == (tuple(RATES), True, 2e-3)


@pytest.mark.parametrize(
    ("losses", "added"),
    [
        ({1e-3: 0.3, 2e-3: 0.4, 4e-3: 0.5}, 5e-4),
        ({1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.3}, 8e-3),
        ({1e-3: None, 2e-3: None, 4e-3: None}, 5e-4),
    ],
)
def test_a_search_goes_beyond_the_edge(losses: dict[float, float | None], added: float) -> None:
    state = search(tuned("a", losses), "a", RATES)
    assert set(state.rates) - set(RATES) == {added}
    assert not state.over


def test_a_search_goes_on_a_limited_number_of_times() -> None:
    """Ever better upwards: four more rates, then the last one is taken."""
    losses = dict.fromkeys(RATES, 1.0)
    for turn in range(EXTENSIONS + 1):
        state = search(tuned("a", {lr: 1 - 10 * lr for lr in losses}), "a", RATES)
        assert state.over == (turn == EXTENSIONS)
        losses |= dict.fromkeys(state.rates, 1.0)
    assert state.best == pytest.approx(4e-3 * 2**EXTENSIONS)
    assert len(state.rates) == len(RATES) + EXTENSIONS


def test_everything_failed_so_there_is_nothing_to_report() -> None:
    losses: dict[float, float | None] = dict.fromkeys(RATES)
    for _ in range(EXTENSIONS):
        losses |= dict.fromkeys(search(tuned("a", losses), "a", RATES).rates)
    state = search(tuned("a", losses), "a", RATES)
    assert (state.over, state.best) == (True, None)
    entries, later = planned(["a"], RATES, [1, 2], tuned("a", losses))
    assert ({e.stage for e in entries}, later) == ({"tune"}, 0)


def test_the_order_of_trials() -> None:
    """Rates first, contestants by turns; what can be reported already waits behind all tuning."""
    known = tuned("a", {1e-3: 0.5, 2e-3: 0.3, 4e-3: 0.4}) + tuned("b", {1e-3: 0.5})
    entries, later = planned(["a", "b"], RATES, [1, 2], known)
    tuning = [Entry(name, lr, 0) for lr in RATES for name in ("a", "b")]
    assert entries == [*tuning, Entry("a", 2e-3, 1), Entry("a", 2e-3, 2)]
    assert later == 2
    both, later = planned(["a", "b"], RATES, [1, 2], known + tuned("b", {2e-3: 0.4, 4e-3: 0.6}))
    assert [e.name for e in both[-4:]] == [f"{c}-lr0.002-seed{s}" for s in (1, 2) for c in ("a", "b")]
    assert later == 0


@pytest.mark.parametrize("name", shipped("fields"))
def test_shipped_fields_fit_the_quickstart(name: str) -> None:
    field = read_field(shipped("fields")[name])
    found = {c.name: c for c in resolve(field, base())}
    assert field.baseline in found
    assert len({c.recipe.optimizer.other_lr for c in found.values()}) == 1


BENCHMARKS = {p.stem: p for p in sorted((Path(__file__).parents[2] / "benchmarks/recipes").glob("*.yaml"))}


@pytest.mark.parametrize("recipe", [*shipped(), *BENCHMARKS])
@pytest.mark.parametrize("name", shipped("fields"))
def test_shipped_fields_resolve_with_every_recipe(name: str, recipe: str) -> None:
    content = load_recipe(str(BENCHMARKS.get(recipe, recipe)), []).model_dump(mode="json")
    alone = parse(content | {"ray": {"backend": "local"}})
    field = read_field(shipped("fields")[name])
    assert [c.name for c in resolve(field, alone)] == [c.name for c in field.contestants]


def test_the_ablations_networks_are_of_one_size() -> None:
    """Kinds to 0.1 %, per-layer networks to 1 %: counted on the model that ships with the package."""
    contestants = {c.name: c.recipe for c in resolve(read_field(shipped("fields")["ablation"]), base())}
    task = build_task(contestants["adalora"], load_tokenizer(contestants["adalora"].model))

    def count(name: str) -> int:
        recipe = contestants[name]
        model = meta_model(recipe, task, 120)
        optimizer = build_optimizer(recipe, model, 120, World(device=torch.device("meta")))
        return sum(p.numel() for p in optimizer.source.networks.parameters())  # type: ignore[union-attr]

    attention = dict.fromkeys(["hyperadalora", "generate", "residual", "friction", "anchored", "reanchored"], 421_794)
    kinds = {"mlp": 421_798, "cnn": 421_432, "per-layer": 424_464}
    expected = attention | kinds | {f"anchored-{name}": count for name, count in kinds.items()}
    # λ is one output for each direction of all modules, so that H_Λ is no small part.
    expected |= dict.fromkeys(["triplet-gamma0", "triplet-gamma0.1", "generate-triplet-gamma0.1"], 534_579)
    assert {name: count(name) for name in expected} == expected


def test_relative_paths_of_a_contestant_hold_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = {"method": "hyperlora", "hypernetwork.init_from": "runs/earlier", "hypernetwork.freeze": "trunk"}
    content = {"baseline": "a", "contestants": [{"name": "a"}, {"name": "w", "set": warm}]}
    field = read_field(write(tmp_path, content))
    monkeypatch.chdir(tmp_path)
    _, contestant = resolve(field, base())
    h = contestant.recipe.hypernetwork
    assert (h.init_from, h.freeze) == (str(tmp_path / "runs/earlier"), "trunk")


def test_a_warm_start_is_for_hypernetworks(tmp_path: Path) -> None:
    contestants = [
        {"name": "a", "set": {"method": "adalora", "hypernetwork.init_from": "x", "hypernetwork.freeze": "trunk"}},
        {"name": "b", "set": {"hypernetwork.update": "anchored", "hypernetwork.freeze": "all"}},
    ]
    with pytest.raises(RecipeError) as error:
        resolve(read_field(write(tmp_path, {"baseline": "a", "contestants": contestants})), base())
    text = str(error.value)
    assert "a: hypernetwork.init_from: got 'x'; null for method=adalora, which has no hypernetworks" in text
    assert "a: hypernetwork.freeze: got 'trunk'; none for method=adalora" in text
    assert "b: hypernetwork.freeze: got 'all'; none or trunk for hypernetwork.update=anchored" in text
    assert "b: hypernetwork.freeze: got 'all'; none or trunk without hypernetwork.init_from" in text


def test_final_rank_keeps_the_scale(tmp_path: Path) -> None:
    content = {
        "baseline": "a",
        "contestants": [
            {"name": "a", "set": {"method": "adalora"}},
            {"name": "l", "set": {"method": "lora"}, "rank": "final"},
        ],
    }
    field = read_field(write(tmp_path, content))
    for recipe, rank, alpha in ((base(rank=8, target_rank=2, alpha=16), 2, 4), (base(rank=6, alpha=9), 4, 6)):
        a, lora = (c.recipe.adapter for c in resolve(field, recipe))
        assert (lora.rank, lora.alpha) == (rank, alpha)
        assert lora.alpha / lora.rank == a.alpha / a.rank
    with pytest.raises(RecipeError, match=r"l: adapter.rank: got 1.5"):
        resolve(field, base(rank=4, target_rank=1.5))


def test_other_rate_is_the_recipes_own_and_does_not_follow_the_search(tmp_path: Path) -> None:
    field = read_field(write(tmp_path, {"baseline": "a", "contestants": [{"name": "a"}]}))
    (a,) = resolve(field, base())
    assert base().optimizer.other_lr is None
    assert a.recipe.optimizer.other_lr == base().optimizer.lr


def test_all_that_is_wrong_with_a_field_file(tmp_path: Path) -> None:
    contestants = [{"name": "A b"}, {"name": "b", "sett": {}, "rank": "low"}, {"label": "c"}]
    with pytest.raises(RecipeError) as error:
        read_field(write(tmp_path, {"contestants": contestants}))
    text = str(error.value)
    for expected in (
        "contestants.0.name: got 'A b'",
        "contestants.1.sett: got {}; unknown key; allowed: name, label, set, rank",
        "contestants.1.rank: got 'low'",
        "contestants.2.name",
        "baseline",
    ):
        assert expected in text


def test_what_is_equal_for_all_cannot_be_set(tmp_path: Path) -> None:
    keys = {"seed": 3, "training.steps": 5, "optimizer.lr": 0.1}
    content = {"baseline": "z", "contestants": [{"name": "a", "set": keys}, {"name": "a"}]}
    with pytest.raises(RecipeError) as error:
        read_field(write(tmp_path, content))
    text = str(error.value)
    for key in keys:
        assert f"a: {key}: got" in text
    assert "baseline: got 'z'; allowed: a" in text
    assert "contestants: got 'a'; each name once" in text


def test_problems_of_all_contestants_at_once(tmp_path: Path) -> None:
    contestants = [{"name": "a", "set": {"metod": "lora"}}, {"name": "b", "set": {"adapter.rank": 0}}]
    field = read_field(write(tmp_path, {"baseline": "a", "contestants": contestants}))
    with pytest.raises(RecipeError) as error:
        resolve(field, base(), ["c"])
    assert "--only: got 'c'; allowed: a, b" in str(error.value)
    assert "a: metod: got 'lora'; unknown key; did you mean method?" in str(error.value)
    with pytest.raises(RecipeError, match=r"b: adapter.rank: got 0"):
        resolve(field, base())
