"""The README's command: it must learn, prune, and leave an adapter that plain PEFT loads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from peft import PeftModel
from s3 import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperlora.adapters import resolve_path
from hyperlora.tasks.generated import word_problems
from pipelines.cli import main
from pipelines.screens import size

#: Ray's dashboard asks the machine's own metadata service which cloud this is, with its usage statistics off as well.
CLOUD = re.compile(rb"^GET http://(169\.254\.169\.254|metadata\.google\.internal)/")


class Outside:
    """Stands for the network: a proxy that keeps what it is asked for and answers nothing."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()
        url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        names = [f"{kind}_proxy" for kind in ("http", "https", "all")]
        here = {"NO_PROXY": "localhost,127.0.0.1", "no_proxy": "localhost,127.0.0.1"}
        self.environment = {name: url for lower in names for name in (lower, lower.upper())} | here

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                with connection:
                    self.asked.append(connection.recv(1024))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def outside() -> Iterator[Outside]:
    network = Outside()
    yield network
    network.close()


def test_the_stand_in_for_the_network_hears_who_asks(outside: Outside) -> None:
    ask = "from huggingface_hub import model_info; model_info('nobody/nothing', timeout=5)"
    command = [sys.executable, "-c", ask]
    assert subprocess.run(command, env=os.environ | outside.environment, capture_output=True, check=False).returncode
    assert any(b"huggingface.co" in line for line in outside.asked)


def opened(command: list[str], folder: Path, path: str) -> dict[str, Any]:
    """What MLflow's own page answers when it is started as the run says."""
    port = free_port()
    words = [sys.executable, "-m", *command, "--port", str(port)]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                return json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10))
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait()


def test_quickstart(tmp_path: Path, outside: Outside) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "train", "quickstart", "--json", "summary.json"]
    environment = os.environ | outside.environment
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "quiet unless -v"
    assert not re.search(r"pid=|INFO|WARNING|raylet|Started a local Ray", done.stdout), "no chatter of Ray"
    assert [line for line in outside.asked if not CLOUD.search(line)] == [], "no hub and no network"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metric"] == "exact_match"
    assert summary["metric_before"] < 0.1
    assert summary["metric_after"] > 0.8
    assert summary["loss_last"] < 0.1 * summary["loss_first"]
    assert summary["workers"] == 2
    assert summary["warnings"] == []
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
    assert f"{summary['loss_first']:.4f} → {summary['loss_last']:.4f} in {summary['steps']} steps" in done.stdout
    sizes = tmp_path / "adalora.json"
    assert main(["train", "quickstart", "method=adalora", "--dry-run", "--json", str(sizes)]) == 0
    adalora = json.loads(sizes.read_text())["estimate"]["sizes"]
    shown = {k: v.strip() for k, v in re.findall(r"^(trainable|optimizer state) +(.+)$", done.stdout, re.MULTILINE)}
    assert shown == {
        "trainable": f"{summary['trainable_parameters']:,} parameters; AdaLoRA {adalora['trainable']:,}",
        "optimizer state": f"{size(summary['optimizer_state_bytes'])}; AdaLoRA {size(adalora['state_bytes'])}",
    }
    assert f"{summary['mlflow_run_id']} in sqlite:///{tmp_path / 'mlflow.db'}" in done.stdout
    for path in (summary["adapter"], summary["checkpoint"]):
        shown = Path(path).relative_to(tmp_path)
        assert str(shown) in done.stdout
    (line,) = [x for x in done.stdout.splitlines() if x.lstrip().startswith("2  ")]
    ranks = [int(n) for n in re.findall(r"\d+", line)[1:8]]
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert ranks == [summary["ranks"][f"model.layers.2.{part}"] for part in parts]

    # The commands that it ends with can be typed.
    said = done.stdout.split("\nnext\n")[1].strip().splitlines()
    export, ui, baseline = (line.strip() for line in said if not line.lstrip().startswith("source "))
    assert ui == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert baseline == "hyperlora train quickstart method=adalora"
    asked = opened(shlex.split(ui), tmp_path, f"api/2.0/mlflow/runs/get?run_id={summary['mlflow_run_id']}")
    assert asked["run"]["info"]["status"] == "FINISHED"
    words = [sys.executable, "-m", "pipelines.cli", *shlex.split(export)[1:]]
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "my-adapter/adapter_config.json").read_text())["r"] == 8
