"""The README's command: it must learn, prune, and leave an adapter that plain PEFT loads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from mlflow import MlflowClient
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperlora.adapters import resolve_path
from hyperlora.tasks.generated import word_problems


def test_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "train", "quickstart", "--json", "summary.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "quiet unless -v"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metric"] == "exact_match"
    assert summary["metric_before"] < 0.1
    assert summary["metric_after"] > 0.8
    assert summary["loss_last"] < 0.1 * summary["loss_first"]
    assert summary["workers"] == 2
    assert (summary["rank_initial"], summary["rank_final"], summary["rank_target"]) == (224, 112, 112)
    assert sum(summary["ranks"].values()) == 112
    assert len(set(summary["ranks"].values())) > 1, "rank moved to where it matters"

    base = resolve_path("builtin:storylm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), summary["adapter"]).eval()
    right = 0
    for row in word_problems(20, 0, "heldout"):
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=64, do_sample=False)
        said = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += re.findall(r"#### (\d+)", said)[:1] == re.findall(r"#### (\d+)", row["answer"])
    assert right > 16

    tracked = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(summary["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["live_rank"] == 112

    # What the screen says is what was measured.
    assert f"{100 * summary['metric_before']:.1f} % → {100 * summary['metric_after']:.1f} %" in done.stdout
    assert "224 → 112 (target 112)" in done.stdout
    for path in (summary["adapter"], summary["checkpoint"]):
        shown = Path(path).relative_to(tmp_path)
        assert str(shown) in done.stdout
    (line,) = [x for x in done.stdout.splitlines() if x.lstrip().startswith("2  ")]
    ranks = [int(n) for n in re.findall(r"\d+", line)[1:8]]
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert ranks == [summary["ranks"][f"model.layers.2.{part}"] for part in parts]
