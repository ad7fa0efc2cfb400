"""Bytes under a URI: what a URI may say, what a kill leaves behind, how long errors are borne."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec import AbstractFileSystem
from fsspec.registry import _registry

from hyperlora import storage, uris
from hyperlora.storage import StorageError, patiently


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:topsecret@bucket/runs",
        "s3://topsecret@bucket/runs",
        "gs://user:topsecret@bucket/runs",
        "az://container:topsecret@account/runs",
        "s3://bucket/runs?secret_access_key=topsecret",
        "s3://bucket/runs?AWS_SESSION_TOKEN=topsecret",
        "https://host/file?X-Amz-Signature=topsecret",
        "https://account.blob.core.windows.net/rows.jsonl?sv=1&sig=topsecret",
        "simplecache::s3://AKIA:topsecret@bucket/runs",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Dme%3BPWD%3Dtopsecret",
    ],
)
def test_a_uri_with_a_secret_is_refused_without_repeating_it(uri: str) -> None:
    allowed = uris.problem(uri)
    assert allowed is not None
    assert "without credentials" in allowed
    assert "topsecret" not in uris.redacted(uri) + allowed


@pytest.mark.parametrize(
    "uri",
    ["runs", "/tmp/a b", "file:///tmp/runs", "s3://bucket/runs", "s3://bucket", "https://host/rows.jsonl?download=1"],
)
def test_plain_uris_are_allowed_and_stay_as_they_are(uri: str) -> None:
    assert uris.problem(uri) is None
    assert uris.redacted(uri) == uri


@pytest.mark.parametrize("uri", ["memory://x", "http://host/x", "ftp://host/x"])
def test_nothing_is_written_where_it_does_not_stay(uri: str) -> None:
    assert uris.problem(uri) is None
    assert uris.problem(uri, written=True) == "allowed: a path, or a URI that starts with s3://, gs:// or az://"
    assert uris.problem("file:///tmp/runs", written=True) is None


def test_a_home_folder_is_that() -> None:
    assert uris.absolute("~/runs") == str(Path.home() / "runs")


def test_a_missing_package_is_named() -> None:
    for uri, package, extra in (("gs://b/x", "gcsfs", "hyperadalora[gs]"), ("az://b/x", "adlfs", "hyperadalora[az]")):
        assert uris.problem(uri) == f"{uri[:2]}:// needs the package {package}: pip install '{extra}'"
    # A container's account is no secret: what is missing is the package.
    assert "adlfs" in str(uris.problem("abfs://container@account.dfs.core.windows.net/runs"))


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("nope://b/x", "s3://, gs:// or az://"),
        ("s3:///x", "the bucket is missing"),
        ("out::v2", "no chain of them"),  # fsspec would write into "out"
    ],
)
def test_what_is_no_uri(uri: str, part: str) -> None:
    assert part in str(uris.problem(uri))


def test_a_folder_that_others_empty_takes_files_all_the_same(tmp_path: Path) -> None:
    """Deleting its last file deletes the folder, between the moment that it is made and that there is a file in it."""
    over = threading.Event()

    def come_and_go(name: str) -> None:
        while not over.is_set():
            storage.write(f"{tmp_path}/folder/{name}", b"x")
            storage.remove(f"{tmp_path}/folder/{name}")

    with ThreadPoolExecutor(2) as others:
        going = [others.submit(come_and_go, name) for name in ("one", "two")]
        try:
            for n in range(300):
                storage.create(f"{tmp_path}/folder/mine", b"%d" % n)
                storage.remove(f"{tmp_path}/folder/mine")
        finally:
            over.set()
    assert [thread.result() for thread in going] == [None, None]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder/file"
    storage.write(str(target), b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        storage.write(str(target), b"new and longer")
    assert not caught.value.transient
    assert target.read_bytes() == b"old"
    with pytest.raises(StorageError):
        storage.create(str(tmp_path / "folder/other"), b"new")
    assert not (tmp_path / "folder/other").exists()


def test_only_one_of_many_creates_a_file(tmp_path: Path) -> None:
    start, won = threading.Barrier(8), []

    def race(n: int) -> None:
        start.wait()
        try:
            storage.create(str(tmp_path / "one"), bytes([n]) * 1000)
        except FileExistsError:
            return
        won.append(n)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "one").read_bytes() == bytes(won) * 1000
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    storage.create(str(tmp_path / "one"), bytes(won) * 1000)  # the same again: an answer was lost


def test_listing_and_removing(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d"):
        storage.write(f"{tmp_path}/run/{name}", b"x" * len(name))
    assert storage.tree(f"{tmp_path}/run") == {"a": 1, "b/c": 3, "b/d": 3}
    assert storage.tree(f"{tmp_path}/none") == {}
    assert storage.glob(str(tmp_path), "r*/b/*") == ["run/b/c", "run/b/d"]
    for name in ("odd[ab]", "odd?", "odd*"):  # names, no patterns
        storage.write(f"{tmp_path}/{name}/run/c", b"x")
        assert storage.glob(f"{tmp_path}/{name}", "r*/c") == ["run/c"]
    storage.remove(f"{tmp_path}/run/b/c")
    assert storage.exists(f"{tmp_path}/run/b")
    storage.remove(f"{tmp_path}/run/b/d")
    storage.remove(f"{tmp_path}/run/b/d")
    assert not storage.exists(f"{tmp_path}/run/b")
    with pytest.raises(FileNotFoundError):
        storage.read(f"{tmp_path}/run/none")


class Failing:
    """Raises a number of times before it returns its argument."""

    def __init__(self, times: int, transient: bool = True) -> None:
        self.times, self.transient, self.calls = times, transient, 0

    def __call__(self, value: int) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise StorageError("s3://b/x", "slow down", self.transient)
        return value


def test_transient_errors_are_tried_again_with_growing_pauses() -> None:
    action, started = Failing(3), time.monotonic()
    assert patiently(action, 7, patience=30) == 7
    seconds = time.monotonic() - started
    assert action.calls == 4
    # 0.25 + 0.5 + 1 s, each at least half of that.
    assert seconds > 0.85


def test_patience_ends() -> None:
    action, started = Failing(10**6), time.monotonic()
    with pytest.raises(StorageError, match="s3://b/x: slow down"):
        patiently(action, 7, patience=1.0)
    assert 0.9 < time.monotonic() - started < 30
    assert action.calls > 2


def test_a_permanent_error_or_the_wish_to_give_up_ends_it_at_once() -> None:
    permanent, given_up = Failing(9, transient=False), Failing(9)
    event = threading.Event()
    event.set()
    for action in (permanent, given_up):
        with pytest.raises(StorageError):
            patiently(action, 7, patience=60, give_up=event if action is given_up else None)
        assert action.calls == 1


def test_two_may_delete_a_tree_at_once(tmp_path: Path) -> None:
    for n in range(300):
        folder = tmp_path / f"tree/{n % 7}/{n}"
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    failures: list[BaseException] = []

    def delete() -> None:
        try:
            storage.remove_tree(str(tmp_path / "tree"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=delete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not (tmp_path / "tree").exists()


def test_a_tree_is_deleted_when_the_own_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree/folder").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    storage.remove_tree(str(tmp_path / "tree"))
    assert list(tmp_path.iterdir()) == []


class Store(AbstractFileSystem):
    """Returns or raises ``answer`` as a store's package does, and ``bucket`` when it is asked for the bucket."""

    cachable = False

    def __init__(self, answer: Any, bucket: Any = None) -> None:
        super().__init__()
        self.answer, self.bucket = answer, bucket

    def _told(self, answer: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def find(self, path: str, **options: Any) -> Any:
        return self._told(self.answer)

    def glob(self, path: str, **options: Any) -> Any:
        return self._told(self.answer)

    def pipe_file(self, path: str, data: bytes, **options: Any) -> None:
        self._told(self.answer)

    def exists(self, path: str, **options: Any) -> bool:
        return False

    def info(self, path: str, **options: Any) -> Any:
        assert path == "bucket"
        return self._told(self.bucket)

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts such a store in the place of every other."""

    def use(*answers: Any) -> None:
        store = Store(*answers)
        monkeypatch.setattr(storage, "filesystem", lambda uri: (store, uri.partition("://")[2]))

    return use


@pytest.mark.parametrize(
    ("uri", "answers"),
    [
        ("s3://bucket/runs", (FileNotFoundError("The specified bucket does not exist"),)),
        ("s3://bucket/runs", ([], FileNotFoundError("bucket"))),  # a glob of s3fs
        ("gs://bucket/runs", (FileNotFoundError("b/bucket/o"),)),
        ("az://bucket/runs", ({}, FileNotFoundError(2, "No such container", "bucket"))),
    ],
)
def test_a_missing_bucket_is_named(answering: Callable[..., None], uri: str, answers: tuple[Any, ...]) -> None:
    answering(*answers)
    for look in (storage.tree, lambda uri: storage.glob(uri, "*/run.json")):
        with pytest.raises(StorageError, match=f"{uri}: there is no bucket 'bucket'") as caught:
            look(uri)
        assert not caught.value.transient


@pytest.mark.parametrize("put", [storage.write, storage.create, storage.refuses_overwriting])
def test_a_missing_bucket_is_named_by_what_is_written(
    answering: Callable[..., None], put: Callable[[str, bytes], None]
) -> None:
    answering(FileNotFoundError("https://storage.googleapis.com/upload/storage/v1/b/bucket/o"))
    with pytest.raises(StorageError, match="gs://bucket/file: there is no bucket 'bucket'") as caught:
        put("gs://bucket/file", b"x")
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("uri", "answers"),
    [
        ("s3://bucket/runs", ({}, {"name": "bucket"})),
        ("s3://bucket/runs", ({}, PermissionError("HeadBucket: Forbidden"))),  # may list, may not ask
        ("gs://bucket/runs", ({}, FileNotFoundError("bucket"))),  # who may not ask for it is told so
        ("az://bucket/runs", ({}, RuntimeError("This request is not authorized"))),
        ("https://host/runs", (FileNotFoundError("404"),)),
        ("az://bucket/runs", (["bucket/runs"],)),  # adlfs of a file
    ],
)
def test_a_missing_folder_is_an_empty_one(answering: Callable[..., None], uri: str, answers: tuple[Any, ...]) -> None:
    answering(*answers)
    assert storage.tree(uri) == {}


def error(kind: str, message: str = "", **attributes: Any) -> Exception:
    return type(kind, (Exception,), attributes)(message)


@pytest.mark.parametrize(
    ("raised", "transient"),
    [
        (OSError("Forbidden: b/bucket/o\nno storage.objects.create access"), False),  # gcsfs
        (error("HttpError", "SlowDown, 503", code=503), True),
        (error("HttpError", "Invalid Credentials, 401", code=401), True),  # the token's server was away
        (error("HttpResponseError", "AuthorizationFailure", status_code=403), False),  # Azure
        (error("ResourceNotFoundError", "The specified container does not exist.", status_code=404), False),
        (error("HttpResponseError", "ServerBusy", status_code=503), True),
        (error("ServiceRequestError", "Cannot connect to host", status_code=None), True),
    ],
)
def test_what_other_stores_raise_is_borne_or_not(
    answering: Callable[..., None], raised: Exception, transient: bool
) -> None:
    answering(raised)
    with pytest.raises(StorageError) as caught:
        storage.write("az://bucket/file", b"x")
    assert caught.value.transient is transient


def test_the_reason_of_azure_is_told_without_its_xml(answering: Callable[..., None]) -> None:
    answering(error("HttpResponseError", "The account is busy.\nErrorCode:ServerBusy\nContent: <?xml version='1.0'?>"))
    with pytest.raises(StorageError) as caught:
        storage.write("az://bucket/file", b"x")
    assert str(caught.value) == "az://bucket/file: The account is busy. ErrorCode:ServerBusy"


def test_what_wraps_an_error_is_as_transient_as_it(answering: Callable[..., None]) -> None:
    wrapped = RuntimeError("Failed to remove")
    wrapped.__cause__ = error("HttpResponseError", "AuthorizationFailure", status_code=403)
    answering(wrapped)
    with pytest.raises(StorageError) as caught:
        storage.write("az://bucket/file", b"x")
    assert not caught.value.transient


@pytest.mark.parametrize("protocol", ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"])
def test_no_store_keeps_listings_and_none_tries_again_by_itself(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """Others write, too; and pauses of the packages would outlast a claim, and the patience that a caller has."""
    calls: list[int] = []

    class Package(AbstractFileSystem):
        cachable = False

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            policy = SimpleNamespace(total_retries=3)
            self.service_client = SimpleNamespace(_config=SimpleNamespace(retry_policy=policy))
            self.retries = 5

        def once(self, number: int) -> None:
            calls.append(number)
            raise OSError("503")

        @wraps(once)
        def _request(self, number: int) -> None:
            with suppress(OSError):
                self.once(number)
            self.once(number)

    monkeypatch.setitem(_registry, protocol, Package)
    fs, _ = storage.filesystem(f"{protocol}://bucket/runs")
    assert not fs.dircache.use_listings_cache
    if protocol.startswith("s3"):
        assert fs.retries == 1
    elif protocol.startswith("g"):
        with pytest.raises(OSError, match="503"):
            fs._request(7)
        assert calls == [7]
    else:
        assert fs.service_client._config.retry_policy.total_retries == 0


def test_gcsfs_asks_no_other_service_for_the_kind_of_a_bucket() -> None:
    assert os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] == "false"
