"""Tokenised rows as Arrow files, built once by fingerprint, mapped into memory by whoever trains on them.

    <cache>/rows/<fingerprint>/train.arrow, eval.arrow    streams of record batches
                               rows.json                  counts, labels, SHA-256 and size of both; written last
    <storage.uri>/rows/<fingerprint>/                     the same, for workers on other machines

The cache is ``$HYPERLORA_CACHE``, by default ``~/.cache/hyperlora``. Rows and tokens are never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from filelock import FileLock

from hyperlora import storage, uris
from hyperlora.config import Problem, RecipeError
from hyperlora.ownership import Lease, OwnedElsewhereError
from hyperlora.storage import StorageError, patiently

logger = logging.getLogger(__name__)

#: Rows that are tokenised and written together.
BATCH = 1000
MANIFEST = "rows.json"
DAMAGED = f"is damaged: it differs from size and SHA-256 in {MANIFEST}"
#: Changes whenever what is written here does.
LAYOUT = 4
Columns = dict[str, list[Any]]
Encode = Callable[[list[dict[str, Any]]], Columns]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Packed:
    """Rows that are ready to train on.

    Attributes:
        folder: that holds them here.
        content: of ``rows.json``.
    """

    folder: Path
    content: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Of a classification, in order of their index."""
        return tuple(self.content["labels"])

    def rows(self, part: str) -> Dataset:
        """One part, mapped into memory."""
        return Dataset.from_file(str(self.folder / f"{part}.arrow"))

    def count(self, part: str, name: str) -> int:
        """Of one part.

        Args:
            part: ``train`` or ``eval``.
            name: ``rows``, ``longest`` and ``longest_prompt`` (tokens), ``largest`` (token), ``targets``, or rows that
                were ``cut``, are ``empty`` (without a target) or ``unanswered`` (without a final answer), or whose
                completion is ``long`` (more than task.max_new_tokens).
        """
        return int(self.content["parts"][part][name])

    @property
    def sha256(self) -> dict[str, str]:
        """Of the tokens of each part, in their order."""
        return {part: str(counts["sha256"]) for part, counts in self.content["parts"].items()}


def cache() -> Path:
    """The folder of packed rows on this machine."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HYPERLORA_CACHE") or f"{home}/hyperlora").expanduser().absolute() / "rows"


def check_same(uri: str, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Find out whether the rows are those that a run was made with.

    Args:
        uri: of the run, or of its checkpoint.
        then, now: SHA-256 of the tokens of ``train`` and ``eval``.

    Raises:
        RecipeError: they are not; names the part.
    """
    changed = [part for part in now if then.get(part) != now[part]]
    if changed:
        allowed = f"the rows of {uri}, SHA-256 of whose tokens"
        raise RecipeError([Problem(f"data.{p}", now[p], f"{allowed} is {then.get(p)}") for p in changed])


def obtain(fingerprint: str, build: Callable[[Path], None], shared: str | None = None) -> Packed:
    """Packed rows from this machine's cache, from where they are shared, or built; by one process at a time.

    Args:
        fingerprint: of everything that decides what is in them.
        build: writes them into a folder.
        shared: folder or URI where somebody may have put them; nothing is written there.

    Raises:
        RecipeError: there is no room for them here.
    """
    folder = cache() / fingerprint
    with _alone(folder):
        if not _complete(folder):
            _fetch_or_build(folder, build, None if shared is None else f"{shared}/{fingerprint}")
        return _open(folder)


def share(rows: Packed, shared: str) -> None:
    """Put packed rows where other machines find them; one process does it, the others wait.

    What is there is read whole, and what is damaged is replaced.

    Raises:
        StorageError: ``shared`` cannot be written.
    """
    store = f"{shared}/{rows.fingerprint}"
    while _wrong(store, rows.content) is not None:
        try:
            with Lease(store):
                if (wrong := _wrong(store, rows.content)) is None:
                    return
                if patiently(storage.exists, f"{store}/{MANIFEST}"):
                    logger.warning("rows are published again: %s", wrong)
                _publish(rows, store)
                return
        except OwnedElsewhereError:
            time.sleep(1)


def fetch(fingerprint: str, shared: str) -> Packed:
    """Packed rows that somebody else has built, once for all processes of this machine.

    Raises:
        StorageError: they are not where they are shared, or are damaged: names the file.
        RecipeError: there is no room for them here.
    """
    folder = cache() / fingerprint
    with _alone(folder):
        if not _complete(folder):
            _fetch(f"{shared}/{fingerprint}", folder)
    return _open(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise _no_room(error) from error
    try:
        yield
    finally:
        lock.release()


def _no_room(error: OSError) -> RecipeError:
    allowed = f"a folder with room for the tokenised rows in HYPERLORA_CACHE ({error})"
    return RecipeError([Problem("data", str(cache()), allowed)])


def _complete(folder: Path) -> bool:
    """Whether all files are there and are what was written; what is not, is taken away."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, file in content["files"].items() if storage.identity(str(folder / name)) != file]
        if not damaged:
            return True
        logger.warning("tokenised rows are damaged, and made again: %s", ", ".join(str(folder / n) for n in damaged))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _open(folder: Path) -> Packed:
    return Packed(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """A folder that takes its place when it is complete.

    Raises:
        RecipeError: there is no room for it.
    """
    try:
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield new
            for file in new.iterdir():
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError) and not error.uri.startswith(f"{new}/"):
            raise  # of where they come from
        raise _no_room(error) from error


def _fetch_or_build(folder: Path, build: Callable[[Path], None], store: str | None) -> None:
    try:
        if store is not None and _manifest(store) is not None:
            _fetch(store, folder)
            return
    except StorageError as error:
        logger.warning("rows are tokenised here: %s", error)
    with _new(folder) as new:
        build(new)


def write(
    folder: Path,
    parts: Mapping[str, Iterator[dict[str, Any]]],
    schema: pa.Schema,
    encode: Encode,
    labels: tuple[str, ...],
    say: Say,
) -> None:
    """Tokenise rows as they come, and write them.

    Args:
        folder: to write into.
        parts: rows of ``train`` and ``eval``.
        schema: of the tokenised rows.
        encode: tokenises some rows.
        labels: of a classification.
        say: is told how far it is.
    """
    counts, files = {}, {}
    for part, rows in parts.items():
        path = folder / f"{part}.arrow"
        counts[part] = _write_part(path, rows, schema, encode, partial(_tell, say, part))
        files[path.name] = storage.identity(str(path))
    content = {"parts": counts, "files": files, "labels": list(labels)}
    (folder / MANIFEST).write_bytes(storage.pack_json(content))


def _tell(say: Say, part: str, rows: int) -> None:
    say(f"tokenising {part}: {rows:,} rows")


def _write_part(
    path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, encode: Encode, say: Callable[[int], None]
) -> dict[str, Any]:
    names = ("rows", "longest", "longest_prompt", "largest", "targets", "cut", "empty", "unanswered", "long")
    found: dict[str, Any] = dict.fromkeys(names, 0)
    digest = hashlib.sha256()
    told = time.monotonic()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        while some := list(islice(rows, BATCH)):
            columns = encode(some)
            found["cut"] += sum(columns.pop("cut"))
            found["long"] += sum(columns.pop("long", ()))
            found["unanswered"] += sum(not answer for answer in columns.get("answer", ()))
            ids, weights = columns["input_ids"], columns["weight"]
            found["rows"] += len(some)
            found["longest"] = max(found["longest"], *map(len, ids))
            found["longest_prompt"] = max(found["longest_prompt"], *map(len, columns.get("prompt_ids", [()])))
            found["largest"] = max(found["largest"], *(max(row, default=0) for row in ids))
            found["targets"] += sum(weights)
            found["empty"] += sum(weight == 0 for weight in weights)
            batch = pa.record_batch(columns, schema=schema)
            for column in batch.columns:
                for buffer in column.buffers():
                    digest.update(b"" if buffer is None else buffer)
            stream.write_batch(batch)
            if time.monotonic() - told > 1:
                say(found["rows"])
                told = time.monotonic()
    return found | {"sha256": digest.hexdigest()}


# ---------------------------------------------------------------- where they are shared


def _manifest(store: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(patiently(storage.read, f"{store}/{MANIFEST}")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StorageError(f"{uris.redacted(store)}/{MANIFEST}", f"is damaged: {error}", False) from error


def _wrong(store: str, content: Mapping[str, Any]) -> str | None:
    """Why what is shared is not these rows; None when it is."""
    try:
        if patiently(storage.read, f"{store}/{MANIFEST}") != storage.pack_json(content):
            return f"{uris.redacted(store)}/{MANIFEST} is of other rows, or damaged"
        sizes = patiently(storage.tree, store)
        for name, expected in content["files"].items():
            if sizes.get(name) != expected["size"] or patiently(storage.identity, f"{store}/{name}") != expected:
                return f"{uris.redacted(store)}/{name} {DAMAGED}"
    except FileNotFoundError as error:
        return f"{uris.redacted(store)} lacks a file: {error}"
    return None


def _publish(rows: Packed, store: str) -> None:
    for name in rows.content["files"]:
        patiently(storage.upload, rows.folder / name, f"{store}/{name}")
    patiently(storage.write, f"{store}/{MANIFEST}", storage.pack_json(rows.content))


def _fetch(store: str, folder: Path) -> None:
    content = _manifest(store)
    if content is None:
        raise StorageError(uris.redacted(store), f"has no {MANIFEST}", False)
    with _new(folder) as new:
        for name, expected in content["files"].items():
            if Path(name).name != name:
                raise StorageError(uris.redacted(store), f"{MANIFEST} names {name!r}, which is no file's name", False)
            try:
                patiently(storage.download, f"{store}/{name}", new / name)
            except FileNotFoundError as error:
                raise StorageError(uris.redacted(store), f"lacks a file: {error}", False) from error
            if storage.identity(str(new / name)) != expected:
                raise StorageError(f"{uris.redacted(store)}/{name}", DAMAGED, False)
        (new / MANIFEST).write_bytes(storage.pack_json(content))
