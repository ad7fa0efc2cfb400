"""Every problem at once, before anything starts, with exit status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cli import main


def refused(capfd: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    return " ".join(capfd.readouterr().err.split())


def test_all_problems_at_once(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    bad = ["metod=lora", "method=lara", "adapter.rank=-1", "adapter.rnk=3", "optimizer.lr=fast", "ray.num_workers=3"]
    message = refused(capfd, str(recipe_file), *bad)
    assert "7 problems" in message
    assert "metod: got 'lora'; unknown key; did you mean method?" in message
    assert "method: got 'lara'; allowed: 'lora', 'dora'" in message
    assert "adapter.rank: got -1; input should be greater than 0" in message
    assert "adapter.rnk: got 3; unknown key; did you mean rank?" in message
    assert "optimizer.lr: got 'fast'; input should be a valid number" in message
    assert "training.batch_size: got 8; must be a multiple of ray.num_workers" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["training.epochs=2"], "training.steps: got 20; give training.steps or training.epochs"),
        (["training.steps=null"], "give training.steps or training.epochs"),
        (["adapter.target_rank=5"], "adapter.target_rank: got 5.0; at most adapter.rank = 4"),
        (["adapter.target_rank=0"], "adapter.target_rank: got 0; input should be greater than 0"),
        (["hypernetwork.heads=5"], "hypernetwork.heads: got 5; must divide hypernetwork.hidden_size = 24"),
        (["ray.num_workers=2"], "ray.num_workers: got 2; ray.backend=local runs one worker"),
        (["pruning.count=1", "pruning.interval=5"], "use count >= 10"),
        (["pruning.start=19"], "no pruning event fits"),
        (["model.trust_remote_code=true"], "needs model.revision"),
        (["task.prompt_format=Q"], "must contain {prompt}"),
        (["task.kind=classification"], "data.source=word-problems has rows for generation"),
        (["data.source=files"], "data.root: got None; required for data.source=files"),
        (["training.batch_size=128"], "training.batch_size: got 128; at most the 64 training rows"),
        (["model.init=pretrained", "model.path=./no"], "model.path: got './no'; a model folder"),
        (["model.path=builtin:nothing", "model.init=pretrained"], "allowed built-in models: builtin:storylm"),
        (["adapter.target_modules=[nothing]"], "adapter.target_modules: got ('nothing',)"),
        (["adapter.rank=64", "adapter.target_rank=2"], "rank 64 exceeds a dimension"),
        (["model.architecture.num_attention_heads=5"], "hidden size (32) is not a multiple"),
        (["storage.uri=/proc/nowhere"], "storage.uri: got '/proc/nowhere'; a writable folder"),
        (["mlflow.enabled=true", "mlflow.tracking_uri=sqlite:////proc/x.db"], "mlflow.tracking_uri"),
        (["optimizer"], "optimizer: got 'optimizer'; allowed: key.sub=value"),
        (["name.x=1"], "name is a value, not a section"),
        (["optimizer.lr=[1"], "allowed: a YAML value"),
        (["name=../up"], "name: got '../up'"),
        (["optimizer.lr=.nan"], "optimizer.lr: got nan"),
    ],
)
def test_each_problem_is_named(
    recipe_file: Path, capfd: pytest.CaptureFixture, changes: list[str], expected: str
) -> None:
    message = refused(capfd, str(recipe_file), *changes)
    assert expected in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "at least one row"),
        ('{"question": "q"}\n', "row 1 lacks answer"),
        ('{"question": "q", "answer": "1"}\n{"question": \n', "line 2 is no JSON"),
        ("[1]\n", "line 1 is no JSON object"),
        (b"\xff\xfe\n", "text in data.encoding=utf-8"),
    ],
)
def test_bad_files(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture, content: str | bytes, expected: str
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "rows.jsonl").write_bytes(data)
    changes = ["data.source=files", f"data.root={tmp_path}", "data.train=rows.jsonl", "data.eval=missing.jsonl"]
    message = refused(capfd, str(recipe_file), *changes)
    assert expected in message
    assert "missing.jsonl'; allowed: an existing file" in message


def test_no_such_recipe(capfd: pytest.CaptureFixture) -> None:
    assert "RECIPE: got 'quickstar'; a YAML file or one of: " in refused(capfd, "quickstar")


def test_recipe_that_is_no_yaml(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "r.yaml").write_text("a: [1", encoding="utf-8")
    assert "r.yaml" in refused(capfd, str(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_text("- 1\n", encoding="utf-8")
    assert "a mapping of sections" in refused(capfd, str(tmp_path / "r.yaml"))


def test_unknown_option(recipe_file: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", str(recipe_file), "--resum"])
    assert end.value.code == 2
