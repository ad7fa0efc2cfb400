"""Large files go to and from S3 in parts that are small, whatever the file's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hyperlora import storage

#: Of s3fs's in memory at a time, unless it is told otherwise; what S3 takes at least, and parts of a file at most.
AT_ONCE, LEAST, PARTS = 10, 5 * 2**20, 10_000


class Store:
    """Notes the options of a transfer."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def put_file(self, source: str, target: str, **options: Any) -> None:
        self.options.append(options)

    get_file = put_file


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    monkeypatch.setattr(storage, "filesystem", lambda uri: (found, "bucket/file"))
    return found


@pytest.mark.parametrize("size", [0, 2**20, 2**30, 2**37])
@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_memory_does_not_grow_with_the_file(scheme: str, size: int, store: Store, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    storage.upload(tmp_path / "file", f"{scheme}://bucket/file")
    storage.download(f"{scheme}://bucket/file", tmp_path / "back")
    for options in store.options:
        assert options["chunksize"] >= LEAST
        assert AT_ONCE * options["chunksize"] <= 2**28
    assert len(store.options) == 2
    assert size / store.options[0]["chunksize"] <= PARTS


@pytest.mark.parametrize("uri", ["gs://bucket/file", "az://bucket/file"])
def test_other_stores_take_their_own_parts(uri: str, store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    storage.upload(tmp_path / "file", uri)
    storage.download(uri, tmp_path / "back")
    assert store.options == [{}, {}]
