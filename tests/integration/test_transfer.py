"""Runs that start from the hypernetworks of earlier ones: train, resume, several workers, compare."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from conftest import small_recipe
from processes import FORKSERVER
from test_resume import adapters_equal, kill_after_a_checkpoint, run

from hyperlora import checkpoint
from hyperlora.config import Problem, RecipeError, parse
from hyperlora.training import RunInfo, Silent, Trainer, World, train
from pipelines.cli import main


def source_run(folder: Path, **changes: Any) -> str:
    """A short finished run with hyperlora; its URI."""
    content = small_recipe(folder) | {"name": "source", "method": "hyperlora"} | changes
    content["training"] = content["training"] | {"steps": 10}
    uri = str(folder / "runs/source")
    train(parse(content), RunInfo(uri))
    return uri


def networks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "optimizer.hypernetwork."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def test_a_run_starts_where_the_source_ended_and_says_so(tmp_path: Path) -> None:
    uri = source_run(tmp_path)
    saved, _ = checkpoint.load_latest(uri)
    assert saved is not None
    content = small_recipe(tmp_path) | {"method": "hyperdora", "seed": 4}
    content["hypernetwork"] = content["hypernetwork"] | {"init_from": uri, "freeze": "trunk"}
    phases: list[str] = []

    class Phases(Silent):
        def phase(self, name: str) -> None:
            phases.append(name)

    trainer = Trainer(parse(content), RunInfo(str(tmp_path / "runs/target")), World(), Phases())
    rows = [trainer.task.train[n] for n in range(4)]
    batch = trainer.task.collate(rows, trainer.world.device)
    cold = trainer.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    trainer.start()
    warm = trainer.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    assert not torch.allclose(cold, warm), "the model computes with what the taken networks generate"
    ours = dict(trainer.optimizer.source.networks.named_parameters())  # type: ignore[union-attr]
    theirs = networks(saved.tensors)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    told = next(p for p in phases if p.startswith("hypernetworks from"))
    assert f"{saved.uri.removeprefix('file://')} (hyperlora, step 10); taken: H_P, H_Q; frozen:" in told

    outcome = train(parse(content), RunInfo(str(tmp_path / "runs/target")))
    assert outcome["warm_start"]["taken"] == ("H_P", "H_Q")
    assert outcome["warm_start"]["source"] == saved.uri
    ended, _ = checkpoint.load_latest(str(tmp_path / "runs/target"))
    assert ended is not None
    same = {name for name, t in networks(ended.tensors).items() if t.equal(theirs[name])}
    # H_P's input maps start from B = 0 and have no gradient here.
    assert same == {n for n in theirs if "q.embed." not in n and "output_maps" not in n}


def test_killed_run_resumes_exactly_without_its_source(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    changes = ["method=hyperdora", "seed=4", "hypernetwork.update=anchored", "hypernetwork.freeze=trunk"]
    changes += [f"hypernetwork.init_from={Path(source).relative_to(tmp_path)}"]
    whole = run(recipe_file, *changes)
    assert whole["warm_start"]["frozen_parameters"] > 0
    kill_after_a_checkpoint(recipe_file, *changes)
    shutil.rmtree(source)
    resumed = run(recipe_file, *changes, "--resume")
    assert resumed["adapter"] != whole["adapter"]
    assert (resumed["loss_last"], resumed["metric_after"]) == (whole["loss_last"], whole["metric_after"])
    assert resumed["warm_start"] == whole["warm_start"]
    assert resumed["optimizer_state_bytes"] == whole["optimizer_state_bytes"]
    assert adapters_equal(whole["adapter"], resumed["adapter"])


def test_what_does_not_fit_is_told_before_anything_starts(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    def refused(*changes: str) -> str:
        assert main(["train", str(recipe_file), *changes]) == 2
        return " ".join(capfd.readouterr().err.split())

    source = source_run(tmp_path)
    before = set((tmp_path / "runs").iterdir())
    message = refused(f"hypernetwork.init_from={source}", "hypernetwork.kind=cnn", "hypernetwork.layers=2")
    assert "2 problems" in message
    assert "hypernetwork.kind: got 'cnn'; attention, as in" in message
    assert "hypernetwork.layers: got 2; 1, as in" in message
    message = refused("hypernetwork.init_from=nowhere", "model.init=pretrained", "model.path=./no")
    assert "hypernetwork.init_from: got" in message
    assert "a run, checkpoint or trial folder with a whole checkpoint" in message
    assert "model.path: got './no'" in message
    message = refused("method=lora", f"hypernetwork.init_from={source}", "hypernetwork.freeze=most")
    assert "hypernetwork.init_from: got" in message
    assert "null for method=lora, which has no hypernetworks" in message
    assert "hypernetwork.freeze: got 'most'; allowed: 'none', 'trunk' or 'all'" in message
    assert set((tmp_path / "runs").iterdir()) == before


def _ask(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, dist.group.WORLD, torch.device("cpu"))
    told = world.first(lambda: {"from": rank, "t": torch.full((2,), float(rank))})

    def fail() -> None:
        raise RecipeError([Problem("a.b", rank, "nothing")])

    try:
        world.first(fail)
        problem = None
    except RecipeError as error:
        problem = str(error.problems[0])
    answer = {"from": told["from"], "t": told["t"].tolist(), "problem": problem}
    Path(folder, f"{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
    dist.destroy_process_group()


def test_every_worker_has_what_the_first_one_read(tmp_path: Path) -> None:
    mp.start_processes(_ask, (str(tmp_path),), nprocs=2, start_method=FORKSERVER.get_start_method())
    for rank in (0, 1):
        answer = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answer == {"from": 0, "t": [0.0, 0.0], "problem": "a.b: got 0; nothing"}


def test_a_comparison_starts_from_a_trial_of_another(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    recipe["training"] |= {"steps": 12, "eval_before": False}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def compare(out: str, *contestants: dict[str, Any]) -> Path:
        field = {"baseline": contestants[0]["name"], "contestants": list(contestants)}
        (tmp_path / "field.yaml").write_text(yaml.safe_dump(field), encoding="utf-8")
        command = ["compare", str(tmp_path / "small.yaml"), "--field", str(tmp_path / "field.yaml"), "--lrs", "0.02"]
        assert main([*command, "--seeds", "1", "--out", str(tmp_path / out)]) == 0
        return tmp_path / out / "trials"

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        earlier = compare("first", {"name": "lora", "set": {"method": "hyperlora"}})
        trial = next(earlier.glob("lora-*-seed1"))
        assert not (trial / "checkpoints").exists()
        warm = {"method": "hyperdylora", "hypernetwork.init_from": str(trial), "hypernetwork.freeze": "trunk"}
        later = compare("second", {"name": "cold", "set": {"method": "hyperdylora"}}, {"name": "warm", "set": warm})
    finally:
        ray.shutdown()
    for path in later.glob("*/result.json"):
        started = json.loads(path.read_text())["warm_start"]
        if path.parent.name.startswith("cold"):
            assert started is None
        else:
            assert started["source"].startswith(f"{trial}/hypernetworks/checkpoints/step-")
            assert started["taken"] == ["H_P", "H_Q"]
            assert started["frozen_parameters"] > 0
