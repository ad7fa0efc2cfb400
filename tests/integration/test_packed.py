"""Tokenised rows are built once, shared through the storage, verified, and mapped into memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import s3
import torch
import yaml
from conftest import small_recipe
from processes import FORKSERVER
from small_disk import UNSHARE, mounts

from hyperlora import storage, tasks
from hyperlora.adapters import load_tokenizer
from hyperlora.config import Recipe, RecipeError, parse
from hyperlora.distributed import share_rows
from hyperlora.storage import StorageError
from hyperlora.tasks import Task, build_task
from hyperlora.tasks.data import survey
from pipelines.cli import main

STORE = "s3://bucket/runs"
CLASSES = {
    "data": {"source": "entailment", "text": "sentence1", "text_pair": "sentence2"},
    "task": {"kind": "classification"},
}
PAIRS = CLASSES["data"]
#: Row of a file.
LAST = "a b ab\tyes\n"


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


@pytest.mark.parametrize(
    "setting",
    [
        {"truncation_side": "left"},
        {"split_special_tokens": True},
        {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
        {"chat_template": "{{ messages[0]['content'] }}"},
        {"bos_token": "<pad>"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_so_does_a_setting_of_the_tokenizer(tmp_path: Path, setting: dict[str, Any]) -> None:
    folder = tmp_path / "tokenizer"
    given = recipe(tmp_path, model={"tokenizer": str(folder)}, task=CLASSES["task"] | {"max_length": 8}, data=PAIRS)
    load_tokenizer(recipe(tmp_path).model).save_pretrained(folder)
    before = task(given)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | setting))
    after = task(given)
    assert after.packed.fingerprint != before.packed.fingerprint
    if "truncation_side" in setting:
        assert [row[-1] for row in after.train["input_ids"]] != [row[-1] for row in before.train["input_ids"]]
    assert after.collate([after.train[0]], torch.device("cpu")), "has all the columns that are asked for"


def test_what_does_not_change_the_tokens_does_not(tmp_path: Path) -> None:
    changed = recipe(tmp_path, training={"steps": 10}, adapter={"rank": 6}, storage={"uri": str(tmp_path / "other")})
    assert task(changed).packed.fingerprint == task(recipe(tmp_path)).packed.fingerprint


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"question": "a b", "answer": "#### 1"}\n' * 8)
    given = recipe(tmp_path, data={"source": "files", "root": str(tmp_path), "train": "t.jsonl", "eval": "t.jsonl"})
    before = task(given)
    (tmp_path / "t.jsonl").write_text('{"question": "a c", "answer": "#### 1"}\n' * 8)
    assert task(given).train[0]["input_ids"] != before.train[0]["input_ids"]


@pytest.mark.parametrize("last", [LAST.replace("ab", "ac"), LAST.replace("yes", "maybe"), ""])
def test_a_file_that_changes_while_it_is_read_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Its tokens would be those of rows that nobody has looked at, under the fingerprint of others."""
    file, rows = tmp_path / "t.tsv", "sentence\tlabel\na a\tno\n" + "a b\tyes\n" * 8
    file.write_text(rows + LAST)
    data = {"source": "files", "root": str(tmp_path), "train": file.name, "eval": file.name, "format": "tsv"}
    given = recipe(tmp_path, data=data, task=CLASSES["task"])

    def surveyed(*arguments: Any) -> Any:
        found = survey(*arguments)
        file.write_text(rows + last)
        return found

    with monkeypatch.context() as context:
        context.setattr("hyperlora.tasks.survey", surveyed)
        with pytest.raises(RecipeError, match=r"data.train: got 't.tsv'; rows that stay as they are while they are"):
            task(given)
    assert not list(cache.glob("*/")), "nothing is kept"
    assert len(task(given).train) == 9 + bool(last)


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


#: Fetches rows onto small file systems, and tells what came of it.
FETCH = """
import json, os, subprocess, sys
from hyperlora.packed import fetch
rows, *attempts = sys.argv[1:]
told = []
for attempt in attempts:
    shared, disk, options = attempt.split()
    os.makedirs(disk)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
    os.environ["HYPERLORA_CACHE"] = disk
    try:
        told.append(fetch(rows, shared).fingerprint)
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
print(json.dumps(told))
"""


@pytest.mark.skipif(not mounts(), reason="mounts need user namespaces")
def test_a_machine_whose_disk_is_full_is_named_and_not_the_storage(bucket: str, tmp_path: Path) -> None:
    """Otherwise the run would be started again, to meet the same."""
    stores = [bucket, str(tmp_path / "runs")]
    (rows, *_) = [share_rows(recipe(tmp_path, storage={"uri": uri})) for uri in stores]
    # With room; and without any for what a file holds, for a folder, the first file and the last.
    sizes = ("8m", "16k", "8m,nr_inodes=3", "8m,nr_inodes=4", "8m,nr_inodes=6")
    rooms = [(uri, size) for uri in stores for size in sizes]
    attempts = [f"{uri}/rows {tmp_path}/disk-{n} size={room}" for n, (uri, room) in enumerate(rooms)]
    command = [*UNSHARE, sys.executable, "-c", FETCH, rows, *attempts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for n, ((uri, room), told) in enumerate(zip(rooms, json.loads(done.stdout), strict=True)):
        if room == "8m":
            assert told == rows
            continue
        said = f"RecipeError: 1 problem:\n  data: got '{tmp_path}/disk-{n}/rows'; a folder with room for the tokenised"
        assert told.startswith(said), (uri, room)
        assert "No space left on device" in told


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
