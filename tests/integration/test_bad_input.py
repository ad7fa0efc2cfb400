"""Recipes and overrides: every problem at once, before anything starts, with exit status 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import Refused

from pipelines.cli import main


def test_all_problems_at_once(recipe_file: Path, refused: Refused) -> None:
    bad = ["metod=lora", "method=lara", "adapter.rank=-1", "adapter.rnk=3", "optimizer.lr=fast", "ray.num_workers=3"]
    message = refused("train", recipe_file, *bad)
    assert "7 problems" in message
    assert "metod: got 'lora'; unknown key; did you mean method?" in message
    assert "method: got 'lara'; allowed: 'lora', 'dora'" in message
    assert "adapter.rank: got -1; input should be greater than 0" in message
    assert "adapter.rnk: got 3; unknown key; did you mean rank?" in message
    assert "optimizer.lr: got 'fast'; input should be a valid number" in message
    assert "training.batch_size: got 8; must be a multiple of ray.num_workers" in message


def test_a_schedule_that_cannot_be_is_told_with_the_rest(recipe_file: Path, refused: Refused) -> None:
    message = refused("train", recipe_file, "pruning.start=19", "hypernetwork.heads=5")
    assert "2 problems" in message
    assert "hypernetwork.heads: got 5" in message
    assert "pruning: got {'schedule': 'interval'" in message


# ---------------------------------------------------------------- single fields and their combinations


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["training.epochs=2"], "training.steps: got 20; give training.steps or training.epochs"),
        (["training.steps=null"], "give training.steps or training.epochs"),
        (["adapter.target_rank=5"], "adapter.target_rank: got 5.0; at most adapter.rank = 4"),
        (["adapter.target_rank=0"], "adapter.target_rank: got 0; input should be greater than 0"),
        (["hypernetwork.heads=5"], "hypernetwork.heads: got 5; must divide hypernetwork.hidden_size = 24"),
        (["hypernetwork.hidden_size=100000"], "hypernetwork.hidden_size: got 100000; input should be less than"),
        (["ray.num_workers=2"], "ray.num_workers: got 2; ray.backend=local runs one worker"),
        (["ray.num_workers=[2,1]"], "ray.num_workers: got [2, 1]; allowed: a number of at least 1, or [few"),
        (["ray.num_workers=[0,2]"], "ray.num_workers: got [0, 2]; allowed: a number of at least 1, or [few"),
        (["ray.num_workers=two"], "ray.num_workers: got 'two'; allowed: a number of at least 1, or [few"),
        (
            ["ray.num_workers=[1,2]", "ray.placement=STRICT_PACK", "ray.backend=ray"],
            "1 problem: ray.num_workers: got (1, 2); one number for ray.placement=STRICT_PACK; PACK or SPREAD for a",
        ),
        # Of a range of one Ray counts the room in the same way.
        (
            ["ray.num_workers=[1,1]", "ray.placement=STRICT_SPREAD"],
            "1 problem: ray.num_workers: got (1, 1); one num",
        ),
        (
            ["ray.gpus_per_worker=1.5"],
            "1 problem: ray.gpus_per_worker: got 1.5; allowed: at most 1: a worker computes on one GPU; use more work",
        ),
        (["ray.gpus_per_worker=2"], "1 problem: ray.gpus_per_worker: got 2; allowed: at most 1: a worker computes on"),
        (["cluster.gpus_per_worker=2"], "cluster.gpus_per_worker: got 2; allowed: at most 1: a worker computes on"),
        (["cluster.num_workers=0"], "cluster.num_workers: got 0; allowed: a number of at least 1"),
        (["cluster.placement=CLOSE"], "cluster.placement: got 'CLOSE'; allowed: 'PACK', 'SPREAD'"),
        (["pruning.count=1", "pruning.interval=5"], "use count >= 10"),
        (["pruning.count=1", "pruning.schedule=cubic"], "pruning.count: got 1; null for pruning.schedule=cubic"),
        (["method=lora", "pruning.count=1", "pruning.schedule=cubic"], "pruning.count: got 1; null for pruning.sched"),
        (["optimizer.lambda_ratio=2"], "optimizer.lambda_ratio: got 2.0; 1 where no λ is updated for itself"),
        (["pruning.start=19"], "no pruning event fits"),
        (["5=1"], "5: got 1; unknown key; allowed: name, description"),
        (["mlflow.experiment=''"], "mlflow.experiment: got ''; string should have at least 1 character"),
        # What is no number, or another one than it looks like, in one YAML or the other.
        (["training.steps=012"], "training.steps: got '012'; input should be a valid integer"),
        (["training.steps=1:30"], "training.steps: got '1:30'; input should be a valid integer"),
        (["storage.uri=memory://x"], "storage.uri: got 'memory://x'; allowed: a path, or a URI that starts with s3://"),
        (["storage.uri=out::v2"], "storage.uri: got 'out::v2'; allowed: a path or one URI, no chain of them"),
        (["task.prompt_format=Q"], "must contain {prompt}"),
        (["task.kind=classification"], "data.source=word-problems has rows for generation"),
        (["task.max_length=5"], "task.max_new_tokens: got 8; less than task.max_length = 5"),
        (["data.source=files"], "data.root: got None; required for data.source=files"),
        (["training.batch_size=128"], "training.batch_size: got 128; at most the 64 training rows"),
        (["data.train_rows=100001"], "data.train_rows: got 100001; n is 100001, allowed: 0 to 100,000 train rows"),
        (["data.eval_rows=20000"], "data.eval_rows: got 20000; n is 20000, allowed: 0 to 10,000 heldout rows"),
        (["data.labels=[a,a]"], "data.labels: got ('a', 'a'); two labels or more, each once"),
        (["data.labels=[0,1]"], "data.labels.0: got 0; input should be a valid string (class labels in order"),
        (["data.encoding=klingon"], "data.encoding: got 'klingon'; an encoding of text that Python knows"),
        (["data.encoding=base64"], "data.encoding: got 'base64'; an encoding of text"),
        (["data.template='{prompt'"], "data.template: got '{prompt'; text with {prompt}, {completion}"),
        (["data.template='{prompt.__class__}'"], "without formats, indices and attributes"),
        (["data.template='{prompt:>9999999999}'"], "without formats, indices and attributes"),
        (["data.template=fixed"], "data.template: got 'fixed'"),
        (["name=../up"], "name: got '../up'; string should match pattern '^[A-Za-z0-9]"),
        (["name=a/b"], "(of the run's folder: letters, digits"),
        ([f"name={'x' * 101}"], "string should have at most 100 characters"),
        (["name="], "name: got None; input should be a valid string"),
        (["seed=9999999999999999999"], "seed: got 9999999999999999999; input should be less than or equal to"),
        (["training.steps=1e30"], "training.steps: got 1e+30; input should be a valid integer"),
        (["adapter=3"], "adapter: got 3; allowed: a section of key: value lines"),
        (["adapter=null"], "adapter: got None; allowed: a section"),
        (
            ["adapter.target_modules=3"],
            "1 problem: adapter.target_modules: got 3; input should be a valid string (all-l",
        ),
        (["adapter.target_modules=[]"], "adapter.target_modules: got (); all-linear, or one name or more"),
        (["adapter.target_modules=("], "adapter.target_modules: got '('; a regular expression (missing )"),
        (["optimizer.betas=[0.9]"], "optimizer.betas.1: got [0.9]; field required (decay of the moments)"),
        (["ray.address=nonsense", "ray.backend=ray"], "ray.address: got 'nonsense'; HOST:PORT or ray://HOST:PORT"),
        (["ray.address=127.0.0.1:1", "ray.backend=ray"], "ray.address: got '127.0.0.1:1'; HOST:PORT"),
    ],
)
def test_values(recipe_file: Path, refused: Refused, changes: list[str], expected: str) -> None:
    assert expected in refused("train", recipe_file, *changes)


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.lr=.nan",
        "optimizer.lr=1e400",
        "optimizer.weight_decay=.inf",
        "optimizer.max_grad_norm=.inf",
        "optimizer.eps=-.inf",
        "adapter.alpha=.inf",
        "adapter.rank=.nan",
        "adapter.target_rank=.inf",
        "gamma=.inf",
        "hypernetwork.scale=.inf",
        "monitors.stall_slowdown=.inf",
        "monitors.gradient_factor=.inf",
        "ray.cpus_per_worker=.inf",
        "ray.gpus_per_worker=.nan",
        "training.epochs=.inf",
        "adapter.rank=true",
        "adapter.rank='8'",
        "adapter.rank=2.5",
        "adapter.rank=null",
        "adapter.rank=[8]",
        "adapter.dropout='0.1'",
        "optimizer.warmup=false",
        "model.trust_remote_code=1",
        "model.dtype=int8",
        "description=[1]",
        "data.seed=-1",
    ],
)
def test_wrong_types_and_numbers_that_are_none(recipe_file: Path, refused: Refused, change: str) -> None:
    assert f"1 problem: {change.partition('=')[0]}: got " in refused("train", recipe_file, change)


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer", "optimizer: got 'optimizer'; allowed: key.sub=value"),
        ("=3", "allowed: key.sub=value"),
        ("a..b=1", "a..b=1: got 'a..b=1'; allowed: key.sub=value"),
        ("name.x=1", "name is a value, not a section"),
        ("optimizer.lr=[1", "optimizer.lr: got '[1'; allowed: a YAML value"),
        ("adapter.rank=!!python/name:os.system", "adapter.rank: got '!!python/name:os.system'; allowed: a YAML value"),
        ("adapter.rank=*a", "adapter.rank: got '*a'; allowed: a YAML value"),
        ("adapter.rank=" + "9" * 5000, "allowed: a YAML value"),
        ("model.config={a: 1, a: 2}", "allowed: a YAML value"),
    ],
)
def test_overrides(recipe_file: Path, refused: Refused, override: str, expected: str) -> None:
    assert expected in refused("train", recipe_file, override)


# ---------------------------------------------------------------- files that are no recipe


def bomb() -> str:
    """A kilobyte that stands for 9^10 texts."""
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        levels.append(f"{name}: &{name} [{', '.join(['*' + before] * 9)}]")
    return "\n".join(levels)


GOOD = "name: small\nmodel: {path: none}\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "got 'an empty file'; allowed: a mapping of sections"),
        (b"# nothing\n", "got 'an empty file'"),
        (b"- 1\n", "got 'list'; allowed: a mapping of sections"),
        (b"hello", "got 'str'; allowed: a mapping of sections"),
        (b"a: [1\n", "line 2, column 1: expected ',' or ']'"),
        (b"a:\n\tb: 1\n", "line 2, column 1: found character '\\t'"),
        (b"name: \xff\xfe\n", "invalid start byte at byte 6'; allowed: UTF-8"),
        (GOOD.encode("utf-16"), "invalid start byte at byte 0'; allowed: UTF-8"),
        (b"name: a\0b\n", "special characters are not allowed (U+0000)"),
        (f"{GOOD}x: !!python/object/apply:os.mkdir [pwned]\n".encode(), "python/object/apply:os.mkdir; remove it"),
        (f"{GOOD}x: !secret 3\n".encode(), "line 3, column 4: the tag !secret; remove it"),
        (f"{GOOD}name: other\n".encode(), "line 3, column 1: 'name' is given twice"),
        (b"adapter: {rank: 4, alpha: 8, rank: 2}\n", "line 1, column 30: 'rank' is given twice"),
        (f"{GOOD}---\n{GOOD}".encode(), "found another document"),
        (bomb().encode(), "line 2, column 8: an alias; write the value out"),
        (b"a: &a {b: *a}\n", "line 1, column 11: an alias"),
        (b"base: &base {rank: 4}\nadapter: {<<: *base}\n", "an alias"),
        (b"1: 2\n", "the key '1' is no text"),
        (b"? [1, 2]\n: 3\n", "the key a sequence is no text"),
        (b"a: " + b"[" * 50_000, "line 1, column 23: more than 20 levels"),
        (b"#" * 300_000, "got '300,000 bytes'; allowed: at most 262,144"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, refused: Refused, content: bytes, expected: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    message = refused("train", "bad.yaml")
    assert message.startswith("1 problem: bad.yaml: got ")
    assert expected in message


@pytest.mark.parametrize("name", ["quickstar", "", "missing.yaml", ".", "x" * 5000, "a\0b"])
def test_no_such_recipe(refused: Refused, name: str) -> None:
    assert "a YAML file or one of: deberta-v3-base-rte" in refused("train", name)


# ---------------------------------------------------------------- the command line


def test_unknown_option(recipe_file: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", str(recipe_file), "--resum"])
    assert end.value.code == 2


@pytest.mark.parametrize("target", ["runs", "small.yaml/summary.json", "x" * 300])
def test_a_summary_that_cannot_be_written_is_told_before_training(
    recipe_file: Path, tmp_path: Path, refused: Refused, target: str
) -> None:
    (tmp_path / "runs").mkdir()
    assert "; a writable file" in refused("train", recipe_file, "--json", target)


def test_workers_of_a_run_do_not_share_a_gpu(recipe_file: Path, refused: Refused) -> None:
    message = refused("train", recipe_file, "ray.backend=ray", "ray.num_workers=2", "ray.gpus_per_worker=0.25")
    assert "ray.gpus_per_worker: got 0.25; above 0.5 for 2 workers" in message
