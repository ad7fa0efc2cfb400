"""Whole training states under a URI: safetensors and JSON, no pickle, the manifest last.

A checkpoint is a folder ``checkpoints/step-00000100-00000003-5f2c9a`` of a run: optimizer step, number of its writer's
claim (see ownership.py), and a token of that writer, so that no file is ever written by two. It holds

    adapter_model.safetensors, adapter_config.json   the adapter as it stands, loadable by plain PEFT
    state.safetensors                                every tensor of the optimizer and the other trained weights
    trainer.json                                     step, data position, rates, seeds, tracking run, resolved recipe
    COMMIT                                           the manifest: sizes and SHA-256 of the files above

Readers accept only folders whose COMMIT is there and whose files match it. docs/durability.md has the whole protocol.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hyperlora import storage
from hyperlora.storage import PATIENCE, StorageError, pack_json, patiently

T = TypeVar("T")
FORMAT = 3
COMMIT = "COMMIT"
FOLDER = re.compile(r"^step-(\d{8,})(?:-(\d{8})-[0-9a-f]+)?$")
FILE = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
SHA256 = re.compile(r"^[0-9a-f]{64}$")


class RefusedError(ValueError):
    """A checkpoint that is not complete or not what was written; names the file and the reason.

    Attributes:
        uri: of the checkpoint.
    """

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(reason)
        self.uri, self.reason = uri, reason

    def __reduce__(self) -> tuple[type[RefusedError], tuple[str, str]]:
        return type(self), (self.uri, self.reason)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    uri: str
    tensors: dict[str, Tensor]
    trainer: dict[str, Any]
    files: dict[str, bytes]


def pack(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as safetensors bytes (copied to the CPU, contiguous)."""
    return save_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, metadata)


def identities(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of files by name."""
    return {n: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in files.items()}


def content(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a checkpoint, without its manifest."""
    # On one line: it has a number of every step, and lines of their own take several times as long.
    return {**files, "state.safetensors": pack(tensors), "trainer.json": pack_json(trainer, indent=None)}


# ---------------------------------------------------------------- writing


def write(
    run_uri: str,
    step: int,
    files: Mapping[str, bytes],
    *,
    writer: str | None = None,
    patience: float = PATIENCE,
    give_up: threading.Event | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> str:
    """Write one checkpoint of a run; returns its URI.

    Args:
        run_uri: the run's folder.
        step: optimizer steps done.
        files: content by name.
        writer: number and token of the writer; None where no two ever write into the run.
        patience: seconds that sending each file is tried again, and then sending the manifest.
        give_up: once set, the next error is the last.
        before_commit: raises when this process must not commit any more.

    Raises:
        StorageError: it is not committed; what was written is an orphan.
        FileExistsError: another process committed this step under the same name.
    """

    def tried(action: Callable[..., T], *arguments: Any) -> T:
        return patiently(action, *arguments, patience=patience, give_up=give_up)

    folder = f"{run_uri}/checkpoints/step-{step:08d}" + ("" if writer is None else f"-{writer}")
    unsent: dict[str, bytes] = {}

    def arrive() -> None:
        for name, data in unsent.items():
            storage.write(f"{folder}/{name}", data)
        there = storage.tree(folder)
        unsent.clear()
        unsent.update({name: data for name, data in files.items() if there.get(name) != len(data)})
        for name, data in unsent.items():
            reason = f"{len(data)} bytes were sent, the store has {there.get(name)}"
            raise StorageError(f"{folder}/{name}", reason, transient=True)

    try:
        for name, data in files.items():
            tried(storage.write, f"{folder}/{name}", data)
        tried(arrive)
    except StorageError:
        if storage.is_local(folder):  # its disk may be full, and needs the room
            with suppress(StorageError):
                storage.remove_tree(folder)
        raise
    manifest = {
        "format": FORMAT,
        "step": step,
        "files": identities(files),
    }
    before_commit()
    tried(storage.create, f"{folder}/{COMMIT}", pack_json(manifest))
    return folder


def save(run_uri: str, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any], files: dict[str, bytes]) -> str:
    """Write the only checkpoint of this step in a run that nobody else writes; returns its URI."""
    return write(run_uri, step, content(tensors, trainer, files))


def prune(run_uri: str, keep: int, refused: Collection[str] = (), number: int | None = None) -> None:
    """Keep the newest checkpoints and delete everything else, of each folder the manifest first.

    Folders that have no manifest, or did not verify, do not count and go too: only the run's writer, and only while it
    writes nothing, may call this.

    Args:
        run_uri: the run's folder.
        keep: how many checkpoints.
        refused: URIs of checkpoints that did not verify.
        number: of the writer's claim; what higher ones have written is left alone, as they may be at it.

    Raises:
        StorageError: something could not be listed or deleted; doing it again goes on.
    """
    folders = _folders(run_uri)
    good = [name for name in folders if COMMIT in folders[name] and f"{run_uri}/checkpoints/{name}" not in refused]
    kept = set(good[-keep:])
    for name, files in folders.items():
        if name in kept or (number is not None and _age(name)[0] > number):
            continue
        for file in sorted(files, key=lambda f: f != COMMIT):
            storage.remove(f"{run_uri}/checkpoints/{name}/{file}")


# ---------------------------------------------------------------- reading


def _folders(run_uri: str) -> dict[str, set[str]]:
    """Names of the checkpoint folders of a run, by writer and then step, and the files in each."""
    found: dict[str, set[str]] = {}
    for path in patiently(storage.tree, f"{run_uri}/checkpoints"):
        name, _, file = path.partition("/")
        if FOLDER.match(name):
            found.setdefault(name, set()).add(file)
    return {name: found[name] for name in sorted(found, key=_age)}


def _age(name: str) -> tuple[int, int]:
    match = FOLDER.match(name)
    assert match is not None
    return int(match[2] or 0), int(match[1])


def step_of(uri: str) -> int:
    """Optimizer steps that a checkpoint's folder is named for."""
    return _age(uri.rsplit("/", 1)[1])[1]


def committed(run_uri: str) -> list[str]:
    """URIs of the committed checkpoints of a run, oldest first: by the number of their writer, then by step."""
    return [f"{run_uri}/checkpoints/{name}" for name, files in _folders(run_uri).items() if COMMIT in files]


def load(uri: str) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        RefusedError: the folder has no manifest, or a file does not match it; names the file and the reason.
        StorageError: the store does not answer.
    """
    try:
        manifest = patiently(storage.read, f"{uri}/{COMMIT}")
    except FileNotFoundError:
        raise RefusedError(uri, f"{uri} is no complete checkpoint: {COMMIT} is missing") from None
    files = {name: verified(uri, name, *expected, COMMIT) for name, expected in _expected(uri, manifest).items()}
    for name in ("state.safetensors", "trainer.json"):
        if name not in files:
            raise RefusedError(uri, f"{uri}/{COMMIT} names no {name}")
    try:
        tensors = load_tensors(files["state.safetensors"])
    except SafetensorError as error:
        raise RefusedError(uri, f"{uri}/state.safetensors is no safetensors file ({error})") from error
    try:
        trainer = json.loads(files["trainer.json"])
    except (ValueError, RecursionError) as error:
        raise RefusedError(uri, f"{uri}/trainer.json is no JSON ({error})") from error
    if not isinstance(trainer, dict):
        raise RefusedError(uri, f"{uri}/trainer.json is no JSON object")
    return Checkpoint(uri, tensors, trainer, files)


def _expected(uri: str, manifest: bytes) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file that a manifest names."""
    where = f"{uri}/{COMMIT}"
    try:
        found = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise RefusedError(uri, f"{where} is no JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise RefusedError(uri, f"{where} is no manifest: it has no table of files")
    if found.get("format") != FORMAT:
        raise RefusedError(uri, f"{where} has format {found.get('format')}, this version reads {FORMAT}")
    expected = {}
    for name, facts in found["files"].items():
        if not FILE.match(name):
            raise RefusedError(uri, f"{where} names a file outside its folder: {name!r}")
        size, digest = (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        if not isinstance(size, int) or not isinstance(digest, str) or not SHA256.match(digest):
            raise RefusedError(uri, f"{where} has no size and SHA-256 of {name}")
        expected[name] = (size, digest)
    return expected


def verified(uri: str, name: str, size: int, digest: str, manifest: str) -> bytes:
    """The bytes of one file, read once more if they are not what the manifest says: the way here may be at fault.

    Raises:
        RefusedError: it is missing, or not what was written; names the file and the reason.
        StorageError: the store does not answer.
    """
    for _ in range(2):
        try:
            data = patiently(storage.read, f"{uri}/{name}")
        except FileNotFoundError:
            raise RefusedError(uri, f"{uri}/{name} is missing") from None
        if len(data) != size:
            reason = f"{uri}/{name} has {len(data)} bytes, {manifest} says {size}"
        elif hashlib.sha256(data).hexdigest() != digest:
            reason = f"{uri}/{name} does not match the SHA-256 in {manifest}"
        else:
            return data
    raise RefusedError(uri, reason)


def load_latest(run_uri: str) -> tuple[Checkpoint | None, list[RefusedError]]:
    """The newest checkpoint of a run that verifies, and why newer ones were refused.

    Raises:
        StorageError: the store does not answer, so that nobody knows what verifies.
    """
    refused: list[RefusedError] = []
    for uri in reversed(committed(run_uri)):
        try:
            return load(uri), refused
        except RefusedError as error:
            refused.append(error)
    return None, refused
