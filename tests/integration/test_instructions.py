"""Instructions and replies without final answers, as plain text and through a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import small_recipe

from hyperlora.adapters import load_tokenizer
from pipelines.cli import main
from pipelines.common import load_recipe

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("chat", [False, True])
def test_instructions_without_final_answers_are_trained(tmp_path: Path, chat: bool) -> None:
    tokenizer = load_tokenizer(load_recipe("quickstart", []).model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"question": f"Say {n}.", "answer": f"It is {n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = small_recipe(tmp_path)
    recipe["model"] |= {"tokenizer": str(tmp_path / "tokenizer")}
    recipe["task"] = {"kind": "completion", "max_length": 64, "chat": chat}
    recipe["data"] = {"source": "files", "root": str(tmp_path), "train": "rows.jsonl", "eval": "rows.jsonl"}
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(recipe))
    summary = tmp_path / "summary.json"
    assert main(["train", str(tmp_path / "chat.yaml"), "--json", str(summary)]) == 0
    result = json.loads(summary.read_text())
    assert result["metric"] == "held_out_loss"
    assert result["metric_after"] < result["metric_before"]
