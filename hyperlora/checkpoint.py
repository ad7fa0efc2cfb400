"""Whole training states under a URI: safetensors and JSON, no pickle, the commit marker last.

A checkpoint is a folder ``step-00000100`` with

    adapter_model.safetensors, adapter_config.json   the adapter as it stands, loadable by plain PEFT
    state.safetensors                                every tensor of the optimizer and the other trained weights
    trainer.json                                     step, data position, rates, seeds, tracking run, resolved recipe
    COMMIT                                           sizes and SHA-256 of the files above

Readers accept only folders whose COMMIT is there and whose files match it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

FORMAT = 2
COMMIT = "COMMIT"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    uri: str
    tensors: dict[str, Tensor]
    trainer: dict[str, Any]
    files: dict[str, bytes]


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URI and the path in it."""
    return fsspec.core.url_to_fs(uri)


def pack(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as safetensors bytes (copied to the CPU, contiguous)."""
    return save_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, metadata)


def pack_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def replace_file(uri: str, name: str, data: bytes) -> None:
    """Write one file of a folder so that a kill leaves the old content or the new one, never a part of it."""
    fs, root = filesystem(uri)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/.{name}.new", data)
    fs.mv(f"{root}/.{name}.new", f"{root}/{name}")


def save(run_uri: str, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any], files: dict[str, bytes]) -> str:
    """Write one checkpoint of a run; returns its URI."""
    return write(f"{run_uri.rstrip('/')}/checkpoints/step-{step:08d}", step, tensors, trainer, files)


def write(uri: str, step: int, tensors: dict[str, Tensor], trainer: dict[str, Any], files: dict[str, bytes]) -> str:
    """Write the folder of one checkpoint, the marker last; returns its URI."""
    fs, folder = filesystem(uri)
    content = {**files, "state.safetensors": pack(tensors), "trainer.json": pack_json(trainer)}
    marker = {
        "format": FORMAT,
        "step": step,
        "files": {n: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in content.items()},
    }
    fs.makedirs(folder, exist_ok=True)
    for name, data in content.items():
        fs.pipe_file(f"{folder}/{name}", data)
    fs.pipe_file(f"{folder}/{COMMIT}", pack_json(marker))
    return fs.unstrip_protocol(folder)


def committed(run_uri: str) -> list[str]:
    """URIs of the committed checkpoints of a run, oldest first."""
    fs, root = filesystem(run_uri)
    fs.invalidate_cache()
    return [
        fs.unstrip_protocol(path.rsplit("/", 1)[0]) for path in sorted(fs.glob(f"{root}/checkpoints/step-*/{COMMIT}"))
    ]


def load(uri: str) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        ValueError: the folder has no commit marker, or a file does not match it; names the file and the reason.
    """
    fs, folder = filesystem(uri)
    if not fs.exists(f"{folder}/{COMMIT}"):
        raise ValueError(f"{uri} is no complete checkpoint: {COMMIT} is missing")
    marker = json.loads(fs.cat_file(f"{folder}/{COMMIT}"))
    if marker.get("format") != FORMAT:
        raise ValueError(f"{uri}/{COMMIT} has format {marker.get('format')}, this version reads {FORMAT}")
    files: dict[str, bytes] = {}
    for name, expected in marker["files"].items():
        if "/" in name or name.startswith("."):
            raise ValueError(f"{uri}/{COMMIT} names a file outside its folder: {name!r}")
        try:
            data = fs.cat_file(f"{folder}/{name}")
        except FileNotFoundError:
            raise ValueError(f"{uri}/{name} is missing") from None
        if len(data) != expected["bytes"]:
            raise ValueError(f"{uri}/{name} has {len(data)} bytes, {COMMIT} says {expected['bytes']}")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise ValueError(f"{uri}/{name} does not match the SHA-256 in {COMMIT}")
        files[name] = data
    return Checkpoint(uri, load_tensors(files["state.safetensors"]), json.loads(files["trainer.json"]), files)


def load_latest(run_uri: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies, and why newer ones were refused."""
    refused: list[str] = []
    for uri in reversed(committed(run_uri)):
        try:
            return load(uri), refused
        except ValueError as error:
            refused.append(str(error))
    return None, refused


def prune_old(run_uri: str, keep: int) -> None:
    """Delete all but the ``keep`` newest committed checkpoints; the marker goes first."""
    for uri in committed(run_uri)[:-keep]:
        fs, folder = filesystem(uri)
        fs.rm_file(f"{folder}/{COMMIT}")
        fs.rm(folder, recursive=True)
