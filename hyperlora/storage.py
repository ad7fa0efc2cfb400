"""Bytes under a URI: local paths, s3://, gs:// and az:// through fsspec.

Credentials and endpoints come from the environment or the machine (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_CONNECTION_STRING``, roles), never from a URI.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from glob import escape
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem

from hyperlora.uris import AZURE, GCS, S3

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds until a connection is given up, and an answer.
CONNECT, ANSWER = 10, 60
# Every retry is ours, so that the pauses add up to what a caller asked for.
S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {"connect_timeout": CONNECT, "read_timeout": ANSWER, "retries": {"total_max_attempts": 1}},
}
# gcsfs would ask another service what kind of bucket it is before each operation, for a minute where that is away.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
#: Bytes of a part of a file on its way to or from S3, of which s3fs has ten in memory at a time; and parts at most.
PART, PARTS = 8 * 2**20, 10_000
#: Seconds that an operation is tried again where the caller names none.
PATIENCE = 15.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0
#: Key of a JSON object under which its own SHA-256 is.
SEAL = "sha256"
PERMANENT = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
PERMANENT_NUMBERS = FULL | {errno.ENOSYS}
PERMANENT_STATUSES = {403, 404}


class StorageError(OSError):
    """A store did not do what it was asked.

    Attributes:
        transient: whether trying again may help.
    """

    def __init__(self, uri: str, reason: str, transient: bool) -> None:
        super().__init__(f"{uri}: {reason}")
        self.uri, self.reason, self.transient = uri, reason, transient

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, bool]]:
        return type(self), (self.uri, self.reason, self.transient)


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URI and the path in it."""
    if uri.startswith(S3):
        fs, path = fsspec.core.url_to_fs(uri, **S3_OPTIONS)
        fs.retries = 1
    elif uri.startswith(GCS):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=CONNECT, sock_read=ANSWER)
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, requests_timeout=timeout)
        with suppress(AttributeError):  # no option turns its retries off
            fs._request = partial(type(fs)._request.__wrapped__, fs)
    elif uri.startswith(AZURE):
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        with suppress(AttributeError):  # no option does; its first pause is as long as a lease
            fs.service_client._config.retry_policy.total_retries = 0
    else:
        fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", "local://"))


# ---------------------------------------------------------------- trying again


def patiently(
    action: Callable[..., T], *arguments: Any, patience: float = PATIENCE, give_up: threading.Event | None = None
) -> T:
    """Do something that may be done twice, again and again while the error is transient.

    Pauses grow from a quarter of a second to 15 by factors of two, each shortened by a random part of up to a half.

    Args:
        action: what to do, with these arguments.
        patience: seconds after the first error until the last attempt starts.
        give_up: once set, the next transient error is the last.

    Raises:
        StorageError: of the last attempt.
    """
    pause, deadline = FIRST_PAUSE, None
    give_up = give_up or threading.Event()
    while True:
        try:
            return action(*arguments)
        except StorageError as error:
            now = time.monotonic()
            deadline = now + patience if deadline is None else deadline
            if not error.transient or give_up.is_set() or now >= deadline:
                raise
        give_up.wait(min(pause * random.uniform(0.5, 1), max(0.0, deadline - now)))
        pause = min(2 * pause, LONGEST_PAUSE)


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Errors of any store's library as StorageError; what is there or not there stays what it is."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except Exception as error:
        permanent = isinstance(error, PERMANENT) or getattr(error, "errno", None) in PERMANENT_NUMBERS
        transient = not permanent and _status(error) not in PERMANENT_STATUSES
        text = str(error).partition("\nContent: ")[0]  # Azure's answer as XML, once more
        raise StorageError(uri, " ".join(text.split()) or type(error).__name__, transient) from error


def _status(error: BaseException) -> int | None:
    """HTTP status behind an error of a store's library."""
    for each in (error.__cause__, error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # S3
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for name in ("status_code", "code"):  # Azure, gcsfs
            if isinstance(status := getattr(each, name, None), int):
                return status
    return 403 if str(error).startswith("Forbidden: ") else None  # all that gcsfs keeps of it


# ---------------------------------------------------------------- single operations, each safe to repeat


def pack_json(content: Any, indent: int | None = 1) -> bytes:
    return (json.dumps(content, indent=indent, sort_keys=True) + "\n").encode()


def sealed(content: Mapping[str, Any]) -> bytes:
    """A JSON object with its own SHA-256 in it."""
    return pack_json({**content, SEAL: hashlib.sha256(pack_json(content)).hexdigest()})


def unsealed(found: Any) -> dict[str, Any]:
    """What was sealed, out of the JSON that was read.

    Raises:
        ValueError: it is not what was written.
    """
    if not isinstance(found, dict) or SEAL not in found:
        raise ValueError("it lacks the SHA-256 of itself")
    content = {key: value for key, value in found.items() if key != SEAL}
    if hashlib.sha256(pack_json(content)).hexdigest() != found[SEAL]:
        raise ValueError("it does not match the SHA-256 in it")
    return content


def read(uri: str) -> bytes:
    """The bytes of one file.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it could not be read.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        data = fs.cat_file(path)
    assert isinstance(data, bytes)
    return data


def write(uri: str, data: bytes) -> None:
    """Write one file; a kill leaves the old content or the new one, never a part, and no power cut loses it.

    Raises:
        StorageError: it could not be written.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        if is_local(uri):
            new = _flushed(Path(path), data)
            new.replace(path)
            _flush_folder(Path(path).parent)
        else:
            _put(uri, fs, path, data)


def _put(uri: str, fs: AbstractFileSystem, path: str, data: bytes, **options: Any) -> None:
    try:
        fs.pipe_file(path, data, **options)
    except FileNotFoundError as error:  # nothing else can be missing
        raise _no_bucket(uri, fs, path) from error


def create(uri: str, data: bytes) -> None:
    """Write one file that is not there yet, by a conditional write where the store has it.

    Raises:
        FileExistsError: there is one with other content, which stays.
        StorageError: it could not be written.
    """
    try:
        _create(uri, data)
    except FileExistsError:
        # An answer that got lost on its way makes us meet our own file.
        if read(uri) != data:
            raise FileExistsError(f"{uri} was written by another process") from None


def _create(uri: str, data: bytes) -> None:
    with _translated(uri):
        fs, path = filesystem(uri)
        if is_local(uri):
            new = _flushed(Path(path), data)
            try:
                os.link(new, path)
            finally:
                new.unlink()
            _flush_folder(Path(path).parent)
            return
        # Some stores have no conditional writes: they say so, or pass over the condition in silence.
        if fs.exists(path):
            raise FileExistsError(uri)
        try:
            _put(uri, fs, path, data, mode="create")
        except OSError as error:
            status = _status(error)
            if status == 412:
                raise FileExistsError(uri) from error
            if status != 501:
                raise
            _put(uri, fs, path, data)


def refuses_overwriting(uri: str, data: bytes) -> bool:
    """Whether the store itself refuses a conditional write onto a file that is there.

    Raises:
        StorageError: it could not be asked.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        try:
            if is_local(uri):
                _create(uri, data)
            else:
                _put(uri, fs, path, data, mode="create")
        except FileExistsError:
            return True
        except OSError as error:
            if (status := _status(error)) in (412, 501):
                return status == 412
            raise
    return False


def _flushed(path: Path, data: bytes) -> Path:
    """A temporary file beside ``path``, on the disk with all its bytes."""
    new = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        with _opened(new) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        with suppress(OSError):
            new.unlink()  # a disk that is full needs the room
        raise
    return new


def _opened(path: Path) -> IO[bytes]:
    """A new file in a folder that is made for it, while others may delete the folder because it is empty."""
    left = 100
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("wb")
        except (FileNotFoundError, FileExistsError):  # mkdir's own, of a folder that is gone before it looks again
            left -= 1
            if not left:
                raise


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def upload(file: Path, uri: str) -> None:
    """Copy a local file of any size; nothing of it is there before all of it is.

    Raises:
        StorageError: it could not be written.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        if not is_local(uri):
            parts = {"chunksize": max(PART, -(-file.stat().st_size // PARTS))} if uri.startswith(S3) else {}
            fs.put_file(str(file), path, **parts)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f".{target.name}.{os.getpid()}.new")
        try:
            shutil.copyfile(file, new)
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
        _flush_folder(target.parent)


def download(uri: str, file: Path) -> None:
    """Copy a file of any size here.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it could not be read; or, of ``file`` and not of the URI, not be written here.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        try:
            fs.get_file(path, str(file), **({"chunksize": PART} if uri.startswith(S3) else {}))
        except OSError as error:
            # No store answers so when it is read.
            if error.errno in FULL or error.filename == str(file):
                raise StorageError(str(file), error.strerror or str(error), False) from error
            raise


def identity(uri: str) -> dict[str, Any]:
    """``sha256`` and ``size`` in bytes of a file of any size.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it could not be read.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        with fs.open(path, "rb") as stream:
            return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "size": stream.tell()}


def tree(uri: str) -> dict[str, int]:
    """Sizes in bytes of all files at any depth below a folder, by path relative to it; empty without a folder.

    Raises:
        StorageError: it could not be listed, or there is no such bucket.
    """
    root, found = _listed(uri, lambda fs, root: fs.find(root, detail=True))
    if isinstance(found, list):  # adlfs's answer where a file has that name
        return {}
    return {path[len(root) + 1 :]: int(info["size"]) for path, info in found.items() if path.startswith(f"{root}/")}


def glob(uri: str, pattern: str) -> list[str]:
    """Paths below a folder, relative to it, that match a pattern.

    Raises:
        StorageError: it could not be listed, or there is no such bucket.
    """
    root, found = _listed(uri, lambda fs, root: fs.glob(f"{escape(root)}/{pattern}"))
    return sorted(path[len(root) + 1 :] for path in found)


def _listed(uri: str, find: Callable[[AbstractFileSystem, str], Any]) -> tuple[str, Any]:
    """A folder's path and what is found there."""
    with _translated(uri):
        fs, root = filesystem(uri)
        root = root.rstrip("/")
        try:
            found = find(fs, root)
        except FileNotFoundError as error:
            if not uri.startswith(S3 + GCS + AZURE):
                return root, {}
            raise _no_bucket(uri, fs, root) from error  # without the folder alone nothing is found
        # Listings of adlfs, and s3fs's globs, pass over a missing bucket.
        if not found and uri.startswith(S3 + AZURE):
            try:
                fs.info(fs.split_path(root)[0])
            except FileNotFoundError as error:
                raise _no_bucket(uri, fs, root) from error
            except Exception as error:
                logger.debug("whether there is a bucket for %s: %s", uri, error)
    return root, found


def _no_bucket(uri: str, fs: AbstractFileSystem, root: str) -> StorageError:
    return StorageError(uri, f"there is no bucket {fs.split_path(root)[0]!r}", transient=False)


def exists(uri: str) -> bool:
    """Whether there is a file or a folder.

    Raises:
        StorageError: nobody can tell.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        return bool(fs.exists(path))


def remove(uri: str) -> None:
    """Delete one file if it is there; an empty local folder that it leaves behind goes too.

    Raises:
        StorageError: it could not be deleted.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        if not is_local(uri):
            with suppress(FileNotFoundError):
                fs.rm_file(path)
            return
        Path(path).unlink(missing_ok=True)
        try:
            Path(path).parent.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


def remove_tree(uri: str) -> None:
    """Delete a folder with all that is in it, if it is there; others may delete in it at the same time.

    Raises:
        StorageError: it could not be deleted.
    """
    with _translated(uri):
        fs, path = filesystem(uri)
        while fs.exists(path):
            # What somebody else deleted meanwhile is one file less: this ends.
            with suppress(FileNotFoundError):
                if is_local(uri):
                    shutil.rmtree(path)  # fsspec's fails when this process's own folder is gone
                else:
                    fs.rm(path, recursive=True)


def tidy(uri: str) -> None:
    """Delete a folder that nobody needs any more; where that fails it stays, with a warning."""
    try:
        patiently(remove_tree, uri)
    except StorageError as error:
        logger.warning("what is not needed any more stays: %s", error)
