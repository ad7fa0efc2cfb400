"""What ``hyperlora export`` takes: which checkpoint of a run, adapters without checkpoints, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import run_card
from models import build_batch, build_llama, build_optimizer, train_steps
from peft import PeftModel
from safetensors.torch import load_file
from test_pinned_code import READ, hub  # noqa: F401
from test_pinned_code import recipe as of_hub
from torch import Tensor

from hyperlora import checkpoint, export, storage
from hyperlora.adapters import attach, build_base, load_tokenizer
from hyperlora.config import METHODS, Recipe
from pipelines.cli import main
from pipelines.common import load_recipe

FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


@pytest.fixture(scope="module")
def adapter() -> export.PlainAdapter:
    """Of a few steps, with ranks from 0 to 4."""
    model = build_llama()
    optimizer = build_optimizer(model)
    train_steps(model, optimizer, 5)
    whole = export.plain_adapter(model, optimizer)
    pairs = {name: (a[: n % 5], b[:, : n % 5]) for n, (name, (a, b)) in enumerate(whole.pairs.items())}
    return replace(whole, pairs=pairs)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("quickstart", [])


@pytest.fixture
def run(tmp_path: Path, adapter: export.PlainAdapter, recipe: Recipe) -> Path:
    """The folder of a finished run, with two checkpoints."""
    folder = tmp_path / "run"
    for step in (5, 10):
        evaluations = [{"step": 0, "exact_match": 0.0}, {"step": 5, "exact_match": 0.125}]
        trainer = {"step": step, "labels": [], "metric": "exact_match", "evaluations": evaluations}
        trainer |= {"run": {"mlflow_run_id": "1234"}, "recipe": recipe.model_dump(mode="json")}
        trainer["optimizer"] = {"modules": list(adapter.pairs)}
        last = checkpoint.save(str(folder), step, {}, trainer, export.adapter_files(adapter))
    outcome: dict[str, Any] = {"checkpoint": last, "steps": 10, "labels": [], "mlflow_run_id": "1234"}
    outcome |= {"metric": "exact_match", "metric_before": 0.0, "metric_after": 0.25}
    outcome["adapter_files"] = export.write_adapter(f"{folder}/adapter", adapter, recipe, outcome)
    (folder / "result.json").write_bytes(storage.sealed(outcome))
    return folder


@pytest.fixture
def trial(run: Path) -> Path:
    """A run as a search leaves it."""
    shutil.rmtree(run / "checkpoints")
    return run


@pytest.fixture
def pulled(trial: Path, tmp_path: Path) -> Path:
    """What ``hyperlora pull`` writes."""
    folder = Path(shutil.copytree(trial / "adapter", tmp_path / "pulled"))
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    record = {"metric": "exact_match", "value": 0.5, "metrics": {"steps": 10}, "files": digests}
    (folder / "registration.json").write_bytes(storage.sealed(record))
    return folder


def exported(source: Path, target: Path, *options: str) -> dict[str, Any]:
    summary = target.with_suffix(".json")
    assert main(["export", str(source), str(target), *options, "--json", str(summary)]) == 0
    return json.loads(summary.read_text())


def refused(source: Path, capfd: pytest.CaptureFixture) -> str:
    target = source.parent / "refused"
    assert main(["export", str(source), str(target)]) == 2
    assert not target.exists()
    return " ".join(capfd.readouterr().err.split())


def flip(file: Path) -> bytes:
    """Damage a file; returns what it was."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


@torch.no_grad()
def logits(folder: Path | None) -> Tensor:
    """Of the base model with an adapter as plain PEFT loads it."""
    base = build_llama().unload()
    model = base if folder is None else PeftModel.from_pretrained(base, str(folder))
    return model.eval()(input_ids=build_batch()).logits


def check_padded(source: Path, target: Path, told: Mapping[str, Any]) -> None:
    tensors = load_file(target / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {8}
    assert {t.shape[1] for n, t in tensors.items() if "lora_B" in n} == {8}
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
    assert set(told["ranks"].values()) == {told["uniform_rank"]} == {8}
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-12)
    assert (logits(target) - logits(None)).abs().max() > 1e-3


def test_the_step_is_told(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    newest = run / "checkpoints/step-00000010"
    for source, name in ((run, "a"), (newest, "b")):
        told = exported(source, tmp_path / name)
        assert (told["step"], told["checkpoint"], told["source"]) == (10, str(newest), str(newest))
        assert "step 10, from " in capfd.readouterr().out


def test_an_older_checkpoint_than_the_newest_is_not_taken_silently(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (run / "result.json").unlink()
    flip(run / "checkpoints/step-00000010/state.safetensors")
    told = exported(run, tmp_path / "out")
    assert (told["step"], told["checkpoint"]) == (5, str(run / "checkpoints/step-00000005"))
    out = " ".join(capfd.readouterr().out.split())
    damaged = run / "checkpoints/step-00000010/state.safetensors"
    assert f"refused: {damaged} does not match the SHA-256 in COMMIT; taking step 5" in out
    assert "step 5, from " in out


@pytest.mark.parametrize("missing", [False, True])
def test_of_a_finished_run_only_the_checkpoint_of_its_end(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture, missing: bool
) -> None:
    last, older = (run / f"checkpoints/step-{step:08d}" for step in (10, 5))
    if missing:
        shutil.rmtree(last)
    else:
        flip(last / "state.safetensors")
    message = refused(run, capfd)
    reason = "it is not there" if missing else f"{last}/state.safetensors does not match the SHA-256 in COMMIT"
    assert f"RUN_OR_CHECKPOINT: got '{run}'; a finished run with the checkpoint that its result.json names" in message
    assert f"{last} ({reason}); the newest that verifies is {older}" in message
    # As the message says.
    assert exported(older, tmp_path / "older")["step"] == 5
    assert exported(run / "adapter", tmp_path / "end")["step"] == 10


def test_a_finished_run_may_have_been_moved(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "moved")
    assert exported(moved, tmp_path / "out")["checkpoint"] == str(moved / "checkpoints/step-00000010")


@pytest.mark.parametrize("kind", ["trial", "trial/adapter", "pulled", "bare"])
def test_an_adapter_without_checkpoints(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture, request: pytest.FixtureRequest
) -> None:
    source = folder = request.getfixturevalue("pulled" if kind == "pulled" else "trial")
    if kind.startswith("trial"):
        folder = source / "adapter"
        source = folder if kind == "trial/adapter" else source
    elif kind == "bare":
        source = folder = Path(shutil.copytree(source / "adapter", tmp_path / "bare"))
        (folder / "README.md").unlink()
    capfd.readouterr()
    told = exported(source, tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} == {*FILES} - ({"README.md"} if kind == "bare" else set())
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()
    assert (told["checkpoint"], told["source"]) == (None, str(folder))
    assert told["step"] == (None if kind == "bare" else 10)
    assert ("step 10, from " in capfd.readouterr().out) is (kind != "bare")
    assert told["mlflow_run_id"] == ("1234" if kind.startswith("trial") else None)
    check_padded(folder, tmp_path / "served", exported(source, tmp_path / "served", "--uniform-rank"))
    if kind != "bare":
        card = (tmp_path / "served/README.md").read_text()
        assert card.startswith((folder / "README.md").read_text().rstrip())
        assert "Filled with zeros to rank 8 in every module" in card


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "README.md", "result.json"])
def test_a_damaged_adapter_of_a_run_is_refused(trial: Path, capfd: pytest.CaptureFixture, name: str) -> None:
    file = trial / name if name == "result.json" else trial / "adapter" / name
    flip(file)
    for source in (trial, trial / "adapter"):
        assert f"got '{file}'; the file that the run wrote" in refused(source, capfd)


def test_a_damaged_adapter_of_the_registry_is_refused(pulled: Path, capfd: pytest.CaptureFixture) -> None:
    for name in FILES:
        data = flip(pulled / name)
        assert f"{name} is not the file that was registered: SHA-256 differs" in refused(pulled, capfd)
        (pulled / name).write_bytes(data)
    record = json.loads((pulled / "registration.json").read_text())
    (pulled / "registration.json").write_text(json.dumps(record | {"value": 1.0}))
    assert "it does not match the SHA-256 in it" in refused(pulled, capfd)


def test_an_adapter_that_no_run_finished_is_no_runs_adapter(trial: Path, capfd: pytest.CaptureFixture) -> None:
    (trial / "result.json").unlink()
    assert "it holds neither a checkpoint nor a checkpoints folder, nor adapter_config.json" in refused(trial, capfd)


def test_a_checkpoint_without_its_manifest_is_no_adapter(run: Path, capfd: pytest.CaptureFixture) -> None:
    newest = run / "checkpoints/step-00000010"
    (newest / "COMMIT").unlink()
    assert "it holds neither a checkpoint nor" in refused(newest, capfd)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_alpha": 16}, "its scale alpha/r is not one in every module"),
        ({"alpha_pattern": {}}, "its scale alpha/r is not one in every module"),
        ({"use_rslora": True}, "its scale alpha/r is not one in every module"),
        ({"peft_type": "LOHA"}, "adapter_config.json is not that of a LoRA adapter"),
    ],
)
def test_adapters_of_other_programs(
    trial: Path, tmp_path: Path, capfd: pytest.CaptureFixture, changes: dict[str, Any], expected: str
) -> None:
    folder = Path(shutil.copytree(trial / "adapter", tmp_path / "foreign"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    message = refused(folder, capfd)
    assert f"RUN_OR_CHECKPOINT: got '{folder}'; an adapter of this program (ValueError: {expected})" in message


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("x.lora_A.weight",), "x has no matrices A and B of one rank"),
        (("x.lora_embedding_A", "y.lora_A.weight", "y.lora_B.weight"), "x.lora_embedding_A is neither A nor B"),
        (("x.weight",), "it adapts no module"),
        ((), "SafetensorError"),
    ],
)
def test_tensors_that_are_no_adapter(
    trial: Path, tmp_path: Path, capfd: pytest.CaptureFixture, names: tuple[str, ...], expected: str
) -> None:
    folder = Path(shutil.copytree(trial / "adapter", tmp_path / "foreign"))
    tensors = {f"{export.PREFIX}{name}": torch.ones(4, 4) for name in names}
    (folder / "adapter_model.safetensors").write_bytes(checkpoint.pack(tensors) if names else b"PK\3\4")
    assert expected in refused(folder, capfd)


@pytest.mark.parametrize(
    ("config", "others", "expected"),
    [
        ({"use_dora": True}, ("x.lora_magnitude_vector",), "DoRA's magnitudes"),
        ({"modules_to_save": ["classifier", "score"]}, (), "classifier, score"),
        ({}, ("score.weight",), "score.weight"),
    ],
)
def test_what_vllm_does_not_serve_is_not_padded(
    adapter: export.PlainAdapter, config: dict[str, Any], others: tuple[str, ...], expected: str
) -> None:
    more = replace(adapter, config=adapter.config | config, others=dict.fromkeys(others, torch.ones(2)))
    with pytest.raises(ValueError, match=f"vLLM does not serve {expected}; exported without --uniform-rank it loads"):
        more.padded()


def test_the_metric_on_a_card_is_that_of_the_adapter(run: Path, tmp_path: Path) -> None:
    def row(source: Path, target: str) -> str:
        exported(source, tmp_path / target)
        (line,) = [x for x in (tmp_path / target / "README.md").read_text().splitlines() if "held-out" in x]
        return line

    # The end of a run may be saved before it is evaluated: its result knows better.
    assert row(run, "finished") == "| held-out exact_match | 0.2500 (base model 0.0000) |"
    assert row(run / "checkpoints/step-00000005", "older") == "| held-out exact_match | 0.1250 (base model 0.0000) |"
    earlier = "| held-out exact_match at step 5 | 0.1250 (base model 0.0000) |"
    assert row(run / "checkpoints/step-00000010", "newest") == earlier
    (run / "result.json").unlink()
    assert row(run, "unfinished") == earlier


@pytest.mark.parametrize("method", METHODS)
def test_a_card_tells_of_singular_values_where_there_were_any(
    adapter: export.PlainAdapter, recipe: Recipe, method: str
) -> None:
    outcome = {"steps": 5, "labels": []}
    card = export.model_card(adapter, recipe.model_copy(update={"method": method}), outcome)
    assert f"trained by hyperlora with method `{method}`" in card
    assert ("Singular values" in card) is (method in ("adalora", "hyperadalora", "peft-adalora"))
    assert ("hyperadalora" in card) is (method == "hyperadalora")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            [],
            r"Trained on prompts `'Question: {prompt}\nAnswer:'`, each followed by a space, its completion and the "
            "tokenizer's end token.",
        ),
        (
            ['task.prompt_format="`{prompt}` | is"'],
            "Trained on prompts ``'`{prompt}` | is'``, each followed by a space",
        ),
        (
            ["task.kind=language-modeling", 'data.template="{prompt}: {completion}"'],
            "Trained on texts `'{prompt}: {completion}'`, each followed by the tokenizer's end token.",
        ),
        (
            ["task.chat=true", "model.tokenizer=some/instruct"],
            "Trained on chats: the prompt is the user's turn in the tokenizer's chat template, the completion is the "
            "reply, which ends with `'<|im_end|>'`.",
        ),
        (
            ["task.kind=completion", 'task.prompt_format="{prompt}?"'],
            "Trained on prompts `'{prompt}?'`, each followed by a space, its completion and the tokenizer's end token.",
        ),
        (
            ["task.kind=classification", "data.source=entailment", "data.text=first", "data.text_pair=second"],
            "Trained on pairs, `'first'` first and `'second'` second.",
        ),
        (["task.kind=classification", "data.source=entailment"], None),
    ],
)
def test_a_card_tells_how_the_rows_were_written(
    adapter: export.PlainAdapter, changes: list[str], expected: str | None
) -> None:
    facts = {"steps": 5, "labels": [], "reply_end": "<|im_end|>"}
    card = export.model_card(adapter, load_recipe("quickstart", changes), facts)
    found = [line for line in card.splitlines() if line.startswith("Trained on")]
    assert len(found) == (expected is not None)
    assert all(line.startswith(str(expected)) for line in found)
    assert ("| tokenizer | `some/instruct` |" in card) == ("model.tokenizer=some/instruct" in changes)


@pytest.mark.usefixtures("hub")
def test_a_card_runs_the_code_of_the_commit_that_was_trained(tmp_path: Path) -> None:
    given = of_hub(config={"rms_norm_eps": 0.5}, dtype="float64")
    model = attach(build_base(given, load_tokenizer(given.model), None), given, None, 10).double()
    optimizer = build_optimizer(model)
    train_steps(model, optimizer, 2)
    export.write_adapter(
        str(tmp_path / "mine"), export.plain_adapter(model, optimizer), given, {"steps": 2, "labels": []}
    )
    found = run_card(tmp_path / "mine")
    assert type(found["base"]).commit == type(found["base"].config).commit == READ
    with torch.no_grad():
        wanted, got = (m.eval()(input_ids=build_batch()).logits.float() for m in (model, found["model"]))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
