"""Tokenised rows are built once, shared through the storage, verified, and mapped into memory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import s3
import yaml
from conftest import small_recipe
from processes import FORKSERVER

from hyperlora import storage, tasks
from hyperlora.adapters import load_tokenizer
from hyperlora.config import Recipe, RecipeError, parse
from hyperlora.distributed import share_rows
from hyperlora.storage import StorageError
from hyperlora.tasks import Task, build_task
from pipelines.cli import main

STORE = "s3://bucket/runs"
CLASSES = {
    "data": {"source": "entailment", "text": "sentence1", "text_pair": "sentence2"},
    "task": {"kind": "classification"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "here"))
    return tmp_path / "here/rows"


def recipe(folder: Path, **changes: Any) -> Recipe:
    content = small_recipe(folder)
    for section, values in changes.items():
        content[section] |= values
    return parse(content)


def task(given: Recipe, **how: Any) -> Task:
    return build_task(given, load_tokenizer(given.model), **how)


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "there") -> Path:
    """From here on as on another machine, without the cache of the first."""
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / name))
    return tmp_path / name / "rows"


def test_rows_are_built_once_and_mapped(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = task(recipe(tmp_path))
    (file,) = first.train.cache_files
    assert file["filename"] == str(cache / first.packed.fingerprint / "train.arrow")
    monkeypatch.setattr("hyperlora.tasks.write", None)  # whoever builds again, fails
    again = task(recipe(tmp_path))
    assert again.packed.fingerprint == first.packed.fingerprint
    assert again.train[:] == first.train[:]
    assert again.held_out[:] == first.held_out[:]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"seed": 1}},
        {"data": {"train_rows": 65}},
        {"task": {"max_length": 30}},
        {"task": {"prompt_format": "Q: {prompt} A:"}},
        CLASSES,
    ],
)
def test_what_changes_the_tokens_changes_the_fingerprint(tmp_path: Path, changes: dict[str, Any]) -> None:
    before, after = task(recipe(tmp_path)), task(recipe(tmp_path, **changes))
    assert before.packed.fingerprint != after.packed.fingerprint
    assert before.train[:] != after.train[:]


def test_what_does_not_change_the_tokens_does_not(tmp_path: Path) -> None:
    changed = recipe(tmp_path, training={"steps": 10}, adapter={"rank": 6}, storage={"uri": str(tmp_path / "other")})
    assert task(changed).packed.fingerprint == task(recipe(tmp_path)).packed.fingerprint


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"question": "a b", "answer": "#### 1"}\n' * 8)
    given = recipe(tmp_path, data={"source": "files", "root": str(tmp_path), "train": "t.jsonl", "eval": "t.jsonl"})
    before = task(given)
    (tmp_path / "t.jsonl").write_text('{"question": "a c", "answer": "#### 1"}\n' * 8)
    assert task(given).train[0]["input_ids"] != before.train[0]["input_ids"]


def test_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    found = task(recipe(tmp_path, task={"max_length": 40}))
    for part, rows in (("train", found.train), ("eval", found.held_out)):
        ids, weights = rows["input_ids"], rows["weight"]
        counted = {name: found.packed.count(part, name) for name in ("rows", "longest", "largest", "targets", "empty")}
        assert counted == {
            "rows": len(rows),
            "longest": max(map(len, ids)),
            "largest": max(map(max, ids)),
            "targets": sum(weights),
            "empty": sum(weight == 0 for weight in weights),
        }


def test_a_damaged_cache_is_built_again(cache: Path, tmp_path: Path) -> None:
    first = task(recipe(tmp_path))
    whole, file = first.train[:], cache / first.packed.fingerprint / "train.arrow"
    content = file.read_bytes()
    flipped = bytes([*content[:-2000], content[-2000] ^ 1, *content[-1999:]])
    del first
    for damaged in (content[:-100], flipped):
        file.unlink()  # not in place: rows of the first task are mapped
        file.write_bytes(damaged)
        assert task(recipe(tmp_path)).train[:] == whole
        assert file.read_bytes() == content


def test_a_cache_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(RecipeError, match="a folder with room for the tokenised rows in HYPERLORA_CACHE"):
        task(recipe(tmp_path))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Any:
    with s3.running(s3.moto()) as endpoint:
        for name, value in (s3.ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint.url}).items():
            monkeypatch.setenv(name, value)
        type(storage.filesystem(STORE)[0]).clear_instance_cache()
        storage.filesystem(STORE)[0].mkdir("bucket")
        yield STORE


def test_another_machine_gets_them_from_the_storage(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = recipe(tmp_path, storage={"uri": bucket}, **CLASSES)
    built = task(given)
    rows = share_rows(given)
    assert rows == built.packed.fingerprint
    assert set(storage.tree(f"{bucket}/rows/{rows}")) >= {"train.arrow", "eval.arrow", "rows.json"}

    there = elsewhere(monkeypatch, tmp_path)
    original = tasks.survey
    monkeypatch.setattr("hyperlora.tasks.survey", None)  # the data itself is not read
    fetched = task(given, rows=rows)
    assert fetched.train[:] == built.train[:]
    assert fetched.labels == built.labels
    assert (there / rows / "train.arrow").is_file()

    # A bit flips on the store: refused by name, and nothing of it stays.
    uri = f"{bucket}/rows/{rows}/train.arrow"
    content = bytearray(storage.read(uri))
    content[len(content) // 2] ^= 1
    storage.write(uri, bytes(content))
    third = elsewhere(monkeypatch, tmp_path, "third")
    with pytest.raises(StorageError, match=r"train\.arrow: is damaged"):
        task(given, rows=rows)
    assert not (third / rows).exists()
    # Whoever has the data builds them again.
    with monkeypatch.context() as context:
        context.setattr("hyperlora.tasks.survey", original)
        assert task(given).train[:] == built.train[:]

    # The next job finds the damage, of a bit, of the end or of the manifest, and publishes the rows again.
    arrow, manifest = storage.read(f"{bucket}/rows/{rows}/eval.arrow"), f"{bucket}/rows/{rows}/rows.json"
    for damaged, data in ((uri, None), (f"{bucket}/rows/{rows}/eval.arrow", arrow[:-9]), (manifest, b'{"files": ')):
        if data is not None:
            storage.write(damaged, data)
        elsewhere(monkeypatch, tmp_path)
        with monkeypatch.context() as context:
            context.setattr("hyperlora.tasks.survey", original)
            caplog.clear()
            assert share_rows(given) == rows
            assert f"rows are published again: {damaged}" in caplog.text
            share_rows(given)
        elsewhere(monkeypatch, tmp_path, f"after-{damaged.rsplit('/', 1)[1]}")
        assert task(given, rows=rows).train[:] == built.train[:]

    elsewhere(monkeypatch, tmp_path, "fifth")
    storage.write(f"{bucket}/rows/{rows}/rows.json", b'{"files": {"../../x": {}}, "parts": {}, "labels": []}')
    with pytest.raises(StorageError, match=r"names '\.\./\.\./x', which is no file's name"):
        task(given, rows=rows)


def job(environment: dict[str, str], rounds: list[tuple[Recipe, str]], start: Any, told: Any) -> None:
    """What the drivers of jobs do, one after the other, each with its cache; tells of what it does, and of the rows."""
    os.environ.update(environment)
    doing: list[Any] = []

    def counted(name: str, call: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            told.put((*doing, name, os.getpid()))
            time.sleep(0.5)  # so that the others come meanwhile
            return call(*arguments)

        return counting

    tasks.write = counted("write", tasks.write)
    storage.upload = counted("upload", storage.upload)
    for number, (given, cache) in enumerate(rounds):
        os.environ["HYPERLORA_CACHE"] = cache
        doing[:] = [number]
        start.wait(300)
        told.put((number, "rows", share_rows(given)))


def test_jobs_that_start_together_build_and_share_once(bucket: str, tmp_path: Path) -> None:
    """In processes of their own: first on one machine, then on a machine each."""
    start, told = FORKSERVER.Barrier(3), FORKSERVER.SimpleQueue()
    one, each = (recipe(tmp_path, storage={"uri": f"{bucket}/{name}"}) for name in ("one", "each"))
    rounds = [[(one, f"{tmp_path}/one"), (each, f"{tmp_path}/{n}")] for n in range(3)]
    processes = [FORKSERVER.Process(target=job, args=(dict(os.environ), r, start, told)) for r in rounds]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = []
    while not told.empty():
        found.append(told.get())
    for number, machines in ((0, 1), (1, 3)):
        rows, written, uploaded = (
            [what for *where, what in found if where == [number, name]] for name in ("rows", "write", "upload")
        )
        assert len(rows) == 3
        assert len(set(rows)) == 1
        assert len(written) == len(set(written)) == machines, "tokenised once on a machine"
        assert len(uploaded) == 2, "two parts, once"
        assert len(set(uploaded)) == 1, "by one of them"


def test_training_under_ray_leaves_them_below_the_storage(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    content = small_recipe(tmp_path)
    content["ray"] = {"num_workers": 1}
    content["training"]["steps"] = 2
    content["adapter"]["target_rank"] = 4
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"
    assert main(["train", str(path)]) == 0, capfd.readouterr().err
    (manifest,) = (tmp_path / "runs/rows").glob("*/rows.json")
    assert json.loads(manifest.read_text())["parts"]["train"]["rows"] == 64
