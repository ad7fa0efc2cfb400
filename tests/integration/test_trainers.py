"""The optimizer inside transformers.Trainer and TRL's SFTTrainer: nothing but ``optimizers=(optimizer, scheduler)``."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hyperlora import HyperAdaLoRA, HypernetworkSpec, Pruning
from hyperlora.adapters import resolve_path
from hyperlora.tasks.generated import word_problems

STEPS = 24
BASE = resolve_path("builtin:storylm")


def model_and_optimizer(seed: int = 0) -> tuple[PeftModel, HyperAdaLoRA, LambdaLR]:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = HyperAdaLoRA(
        model,
        lr=5e-3,
        total_steps=STEPS,
        target_rank=2,
        pruning=Pruning(interval=2, start=4, final=8),
        hypernetwork=HypernetworkSpec(hidden_size=24, heads=2),
    )
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def rows(count: int = 96) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [f"{r['question']} {r['answer']}" for r in word_problems(count, 0, "train")]
    ids = [tokenizer(t)["input_ids"][:64] for t in texts]
    width = max(len(i) for i in ids)
    padded = [{"input_ids": i + [0] * (width - len(i)), "labels": i + [-100] * (width - len(i))} for i in ids]
    return Dataset.from_list(padded)


def test_the_code_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model that ships, and fewer steps."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## In your own training loop\n+```python\n(.*?)```", readme, re.DOTALL)
    assert len(code.strip().splitlines()) <= 10, "ten lines"
    for there, here in (
        ('"Qwen/Qwen2.5-7B", dtype="bfloat16", device_map="cuda"', repr(BASE)),
        ("1000", "20"),
        ("start=100, final=400", "start=2, final=8"),
    ):
        assert there in code
        code = code.replace(there, here)
    monkeypatch.chdir(tmp_path)
    Path("readme.py").write_text(code, encoding="utf-8")
    runpy.run_path("readme.py", {"data": rows()})
    weights = load_file("adapter/adapter_model.safetensors")
    pairs = [(a, weights[name.replace("lora_A", "lora_B")]) for name, a in weights.items() if "lora_A" in name]
    assert len(pairs) == 28
    live = sum(int(torch.linalg.matrix_rank(b @ a)) for a, b in pairs)
    assert live == 8 * len(pairs), "ranks went from 16 to 8 on average"


def arguments(folder: Path, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 10,
        "report_to": [],
        "use_cpu": True,
        "seed": 1,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_transformers_trainer_accumulates_prunes_saves_and_resumes(tmp_path: Path) -> None:
    data = rows()
    model, optimizer, scheduler = model_and_optimizer()
    trainer = Trainer(model, arguments(tmp_path / "run"), train_dataset=data, optimizers=(optimizer, scheduler))
    trainer.train()
    whole = losses(trainer)
    assert whole[STEPS] < whole[1] - 0.3
    assert optimizer.steps_done == STEPS
    modules = len(optimizer.layout.modules)
    assert optimizer.live == 2 * modules
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    live = [int((t.abs().sum(1) > 0).sum()) for n, t in saved.items() if "lora_A" in n]
    assert sum(live) == 2 * modules, "the saved adapter itself has the target rank"

    # A new process would start like this: everything anew, then the checkpoint.
    again, optimizer, scheduler = model_and_optimizer(seed=7)
    resumed = Trainer(again, arguments(tmp_path / "run"), train_dataset=data, optimizers=(optimizer, scheduler))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"))
    assert losses(resumed) == whole
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_checkpoint_without_the_optimizers_state_is_refused(tmp_path: Path) -> None:
    model, optimizer, scheduler = model_and_optimizer()
    settings = arguments(tmp_path, save_only_model=True, max_steps=10)
    Trainer(model, settings, train_dataset=rows(), optimizers=(optimizer, scheduler)).train()
    again, optimizer, scheduler = model_and_optimizer()
    settings = arguments(tmp_path, save_only_model=True)
    resumed = Trainer(again, settings, train_dataset=rows(), optimizers=(optimizer, scheduler))
    with pytest.raises(RuntimeError, match="weights were changed after the optimizer was built"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_accelerate_saves_and_loads(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler = model_and_optimizer()
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    batch = {k: torch.tensor(rows(4)[k]) for k in ("input_ids", "labels")}

    def steps(count: int) -> list[float]:
        seen = []
        for _ in range(count):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    steps(6)
    accelerator.save_state(str(tmp_path / "state"))
    wanted = steps(4)
    accelerator.load_state(str(tmp_path / "state"))
    assert steps(4) == wanted


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    """Two backward passes of 4 rows give what one of 8 gives."""
    ends = []
    for size, parts in ((8, 1), (4, 2)):
        model, optimizer, scheduler = model_and_optimizer()
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 6}
        trainer = Trainer(
            model,
            arguments(tmp_path / str(parts), save_strategy="no", **changes),
            train_dataset=rows(),
            optimizers=(optimizer, scheduler),
        )
        trainer.train()
        ends.append(losses(trainer)[6])
    assert ends[0] == pytest.approx(ends[1], abs=1e-3)


def test_trl_sft_trainer(tmp_path: Path) -> None:
    model, optimizer, scheduler = model_and_optimizer()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [{"text": f"{r['question']} {r['answer']}"} for r in word_problems(96, 0, "train")]
    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=64,
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    seen = losses(trainer)
    assert seen[STEPS] < seen[1] - 0.3
    assert optimizer.live == 2 * len(optimizer.layout.modules)
