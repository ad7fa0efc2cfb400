"""The loop on a GPU: the host never waits, a run goes on to the same bytes, the adapter loads in plain PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hyperlora.training import RunInfo, Silent, Trainer, World
from pipelines.cli import main
from pipelines.common import load_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = 40
CHANGES = (
    "ray.backend=local",
    "ray.num_workers=1",
    f"training.steps={STEPS}",
    "training.checkpoint_every=10",
    "training.eval_before=false",
    "data.train_rows=256",
    "data.eval_rows=32",
    "pruning.start=5",
    "pruning.final=5",
    "pruning.interval=5",
    "mlflow.enabled=false",
)


def run(folder: Path, *changes: str) -> dict[str, Any]:
    summary = folder / "summary.json"
    words = ["train", "quickstart", *CHANGES, f"storage.uri={folder / 'runs'}", *changes, "--json", str(summary)]
    assert main(words) == 0
    result = json.loads(summary.read_text())
    return result | json.loads((Path(result["adapter"]).parent / "result.json").read_text())


def weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["adapter"]) / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["hyperadalora", "adalora"])
def test_the_optimizers_step_never_waits_for_the_device(method: str, tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [*CHANGES, f"storage.uri={tmp_path}", f"method={method}"])
    trainer = Trainer(recipe, RunInfo(str(tmp_path)), World(), Silent())
    inner = trainer.optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return inner(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.optimizer.step = watched  # type: ignore[method-assign]
    live = trainer.optimizer.live
    for step in range(12):  # two pruning events among them
        trainer.train_step(list(range(step * 8, step * 8 + 8)))
    assert trainer.optimizer.live < live
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            trainer.optimizer.mask.any().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_to_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    whole = run(tmp_path, f"model.dtype={dtype}", "training.keep_checkpoints=9")
    assert whole["loss_last"] < whole["loss_first"]
    assert whole["rank_final"] == whole["rank_target"] < whole["rank_initial"]
    folder = Path(whole["adapter"]).parent
    before = weights(whole)
    # As it was after 20 steps.
    shutil.rmtree(folder / "adapter")
    (folder / "result.json").unlink()
    for committed in sorted((folder / "checkpoints").iterdir()):
        if int(committed.name.split("-")[1]) > 20:
            shutil.rmtree(committed)
    resumed = run(tmp_path, f"model.dtype={dtype}", "training.keep_checkpoints=9", "--resume")
    assert resumed["losses"] == whole["losses"]
    after = weights(resumed)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_a_ray_worker_with_a_gpu_computes_what_one_process_computes(tmp_path: Path) -> None:
    by_itself = run(tmp_path)
    under_ray = run(tmp_path, "ray.backend=ray", "ray.gpus_per_worker=1")
    assert under_ray["losses"] == pytest.approx(by_itself["losses"], rel=1e-5)
    assert under_ray["ranks"] == by_itself["ranks"]


def test_a_program_that_allows_tf32_trains_as_well(tmp_path: Path) -> None:
    """The optimizer's own products stay exact, without which the orthogonal step diverges at once."""
    for name in ("exact", "rounded"):
        (tmp_path / name).mkdir()
    exact = run(tmp_path / "exact", "training.steps=20")
    torch.set_float32_matmul_precision("high")
    try:
        rounded = run(tmp_path / "rounded", "training.steps=20")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert rounded["losses"] == pytest.approx(exact["losses"], rel=0.05)


def test_times_of_steps_are_the_devices(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert len(result["step_seconds"]) == STEPS
    assert min(result["step_seconds"]) > 0
    assert sum(result["step_seconds"]) == pytest.approx(result["training_seconds"])
    assert result["training_seconds"] < result["loop_seconds"]


def test_plain_peft_on_the_gpu_gives_the_runs_held_out_loss(tmp_path: Path) -> None:
    result = run(tmp_path)
    recipe = load_recipe("quickstart", [*CHANGES, f"storage.uri={tmp_path}"])
    trainer = Trainer(recipe, RunInfo(str(tmp_path / "other")), World(), Silent())
    base = AutoModelForCausalLM.from_pretrained(Path(__file__).parents[2] / "hyperlora/assets/storylm").cuda()
    trainer.model = PeftModel.from_pretrained(base, result["adapter"]).eval()
    plain = trainer.evaluate()
    assert plain["held_out_loss"] == pytest.approx(result["held_out_loss_after"], abs=1e-4)
    assert plain["exact_match"] == result["metric_after"]
