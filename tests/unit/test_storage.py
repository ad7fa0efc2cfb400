"""Bytes under a URI: what a URI may say, what a kill leaves behind, how long errors are borne."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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
    assert storage.absolute("~/runs") == str(Path.home() / "runs")


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
