"""Checkpoints on a local folder: what is accepted, what is refused by name, what is kept."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora import checkpoint, storage
from hyperlora.checkpoint import FORMAT, RefusedError
from hyperlora.storage import StorageError

FIRST, SECOND = "00000001-aaaaaa", "00000002-bbbbbb"


def write(run: Path, step: int, writer: str | None = None, **more: Any) -> str:
    tensors = {"weights": torch.arange(1000.0) + step}
    return checkpoint.write(str(run), step, checkpoint.content(tensors, {"step": step}, {}), writer=writer, **more)


def steps(run: Path) -> list[int]:
    return [checkpoint.load(uri).trainer["step"] for uri in checkpoint.committed(str(run))]


def newest(run: Path) -> tuple[int | None, str]:
    found, refused = checkpoint.load_latest(str(run))
    return None if found is None else found.trainer["step"], "; ".join(map(str, refused))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    uri = write(tmp_path, 5, FIRST)
    saved = checkpoint.load(uri)
    assert saved.tensors["weights"].equal(torch.arange(1000.0) + 5)
    manifest = json.loads((Path(uri) / "COMMIT").read_text())
    assert manifest["files"]["state.safetensors"]["bytes"] == (Path(uri) / "state.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["state.safetensors", "trainer.json"])
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "missing", "empty", "longer"])
def test_damaged_files_are_refused_by_name_and_an_earlier_checkpoint_is_taken(
    tmp_path: Path, name: str, damage: str
) -> None:
    write(tmp_path, 5, FIRST)
    file = Path(write(tmp_path, 10, FIRST)) / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        damaged = {"truncated": data[:-1], "bit flipped": data, "empty": b"", "longer": data + b"\0"}[damage]
        file.write_bytes(damaged)
    reason = {"missing": "is missing", "bit flipped": "does not match the SHA-256"}.get(damage, "bytes, COMMIT says")
    step, refused = newest(tmp_path)
    assert step == 5
    assert str(file) in refused
    assert reason in refused


GOOD = {"bytes": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[]", "is no manifest"),
        (f'{{"format": {FORMAT}}}', "is no manifest"),
        (json.dumps({"format": FORMAT, "files": []}), "is no manifest"),
        ('{"format": 99, "files": {}}', f"has format 99, this version reads {FORMAT}"),
        (json.dumps({"format": FORMAT, "files": {}}), "names no state.safetensors"),
        (json.dumps({"format": FORMAT, "files": {"../../secret": GOOD}}), "outside its folder: '../../secret'"),
        (json.dumps({"format": FORMAT, "files": {"/etc/passwd": GOOD}}), "outside its folder"),
        (json.dumps({"format": FORMAT, "files": {"..": GOOD}}), "outside its folder"),
        (json.dumps({"format": FORMAT, "files": {"a\\b": GOOD}}), "outside its folder"),
        (json.dumps({"format": FORMAT, "files": {"s3://other/x": GOOD}}), "outside its folder"),
        (
            json.dumps({"format": FORMAT, "files": {"x": {"bytes": "3", "sha256": "0" * 64}}}),
            "no size and SHA-256 of x",
        ),
        (json.dumps({"format": FORMAT, "files": {"x": {"bytes": 3, "sha256": "00"}}}), "no size and SHA-256 of x"),
        (json.dumps({"format": FORMAT, "files": {"x": 3}}), "no size and SHA-256 of x"),
    ],
)
def test_malformed_manifests_are_refused(tmp_path: Path, manifest: str, reason: str) -> None:
    write(tmp_path, 5, FIRST)
    uri = write(tmp_path, 10, FIRST)
    (tmp_path / "secret").write_bytes(b"abc")
    Path(uri, "COMMIT").write_text(manifest)
    with pytest.raises(RefusedError) as caught:
        checkpoint.load(uri)
    assert f"{uri}/COMMIT" in str(caught.value)
    assert reason in str(caught.value)
    assert newest(tmp_path)[0] == 5


def test_files_that_match_their_manifest_and_are_no_tensors_or_json(tmp_path: Path) -> None:
    files = checkpoint.content({}, {"step": 1}, {})
    for step, name in ((1, "state.safetensors"), (2, "trainer.json")):
        uri = checkpoint.write(str(tmp_path), step, files | {name: b"\x80\x04cos\nsystem\n"}, writer=FIRST)
        with pytest.raises(RefusedError, match=f"{name} is no"):
            checkpoint.load(uri)


def test_a_file_that_did_not_arrive_whole_is_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = checkpoint.storage.tree
    monkeypatch.setattr(checkpoint.storage, "tree", lambda uri: {n: size - 1 for n, size in tree(uri).items()})
    with pytest.raises(StorageError, match=r"bytes were sent, the store has \d+"):
        write(tmp_path, 5, FIRST, patience=0)
    monkeypatch.undo()
    assert checkpoint.committed(str(tmp_path)) == []


def test_a_commit_is_never_overwritten(tmp_path: Path) -> None:
    uri = write(tmp_path, 5, FIRST)
    before = checkpoint.load(uri)
    with pytest.raises(FileExistsError, match="another process"):
        checkpoint.write(str(tmp_path), 5, checkpoint.content({}, {"step": 6}, {}), writer=FIRST)
    assert json.loads((Path(uri) / "COMMIT").read_text())["files"]["trainer.json"]["sha256"]
    assert before.trainer == {"step": 5}


def test_whoever_lost_the_run_commits_nothing(tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write(tmp_path, 5, FIRST, before_commit=lost)
    assert checkpoint.committed(str(tmp_path)) == []


def test_a_later_writer_counts_more_than_a_later_step(tmp_path: Path) -> None:
    write(tmp_path, 20, FIRST)
    write(tmp_path, 10, SECOND)
    write(tmp_path, 5)
    assert steps(tmp_path) == [5, 20, 10]
    assert newest(tmp_path)[0] == 10


def test_the_newest_are_kept_and_orphans_go(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step, FIRST)
    orphan = tmp_path / "checkpoints/step-00000025-00000001-aaaaaa"
    orphan.mkdir()
    (orphan / "state.safetensors").write_bytes(b"half")
    (orphan / ".trainer.json.1-1.new").write_bytes(b"half")
    (tmp_path / "checkpoints/notes.txt").write_text("mine")
    checkpoint.prune(str(tmp_path), 2)
    assert steps(tmp_path) == [15, 20]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "notes.txt",
        "step-00000015-00000001-aaaaaa",
        "step-00000020-00000001-aaaaaa",
    ]


def test_what_later_writers_are_at_is_left_alone(tmp_path: Path) -> None:
    """A process that was held up for long does not know yet that it was replaced when it clears away."""
    write(tmp_path, 5, FIRST)
    write(tmp_path, 10, FIRST)
    write(tmp_path, 10, SECOND, before_commit=lambda: checkpoint.prune(str(tmp_path), 1, number=1))
    assert newest(tmp_path) == (10, "")
    assert steps(tmp_path) == [10, 10]


def test_on_a_local_disk_nothing_is_left_of_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full needs the room."""
    write(tmp_path, 5, FIRST)
    before = sorted(tmp_path.rglob("*"))
    sync, count = os.fsync, [2]

    def full(descriptor: int) -> None:
        count[0] -= 1
        if count[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path, 10, FIRST, patience=0)
    assert sorted(tmp_path.rglob("*")) == before


def test_each_file_is_tried_again_for_as_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long upload: a fault at its start takes nothing from the time that one at its end has."""
    put, now, failed = storage.write, [0.0], set()

    def slow(uri: str, data: bytes) -> None:
        if uri not in failed:
            failed.add(uri)
            raise StorageError(uri, "503", transient=True)
        now[0] += 100
        put(uri, data)

    monkeypatch.setattr(storage, "write", slow)
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    write(tmp_path, 5, FIRST, patience=60)
    assert len(failed) > 1
    assert steps(tmp_path) == [5]


def test_what_did_not_verify_pushes_nothing_good_out(tmp_path: Path) -> None:
    write(tmp_path, 5, FIRST)
    damaged = write(tmp_path, 10, FIRST)
    (Path(damaged) / "trainer.json").write_bytes(b"")
    _, refused = checkpoint.load_latest(str(tmp_path))
    write(tmp_path, 10, SECOND)
    checkpoint.prune(str(tmp_path), 2, {error.uri for error in refused})
    assert steps(tmp_path) == [5, 10]


def test_pruning_deletes_the_manifest_before_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5, FIRST)
    write(tmp_path, 10, FIRST)
    remove, budget = checkpoint.storage.remove, [1]

    def killed(uri: str) -> None:
        if not budget[0]:
            raise KeyboardInterrupt
        budget[0] -= 1
        remove(uri)

    monkeypatch.setattr(checkpoint.storage, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(str(tmp_path), 1)
    monkeypatch.undo()
    assert steps(tmp_path) == [10], "a half-deleted checkpoint is no checkpoint"
    checkpoint.prune(str(tmp_path), 1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
