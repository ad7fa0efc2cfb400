"""Training on a real file system of a few megabytes that runs full, in a mount namespace of its own.

Run as a program this file is what happens in the namespace: mount, train, fill, make room, keep the runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def mounts() -> bool:
    """Whether this machine lets a user mount."""
    return shutil.which("unshare") is not None and not subprocess.run([*UNSHARE, "true"], check=False).returncode


def train(
    recipe: Path, folder: Path, *options: str, room: int, after: float | None, until: str
) -> subprocess.CompletedProcess[str]:
    """``hyperlora train`` with its store on the small disk; what it stored is in ``folder/out`` afterwards.

    Args:
        recipe: to train.
        folder: an empty one.
        options: of the command.
        room: bytes that stay free when the disk is full.
        after: seconds from the run's first file until the disk fills; ``None``: full before the command starts.
        until: seconds that it stays full, ``warning`` (until the first checkpoint was not written) or ``never``.
    """
    (folder / "disk").mkdir()
    command = [sys.executable, "-m", "pipelines.cli", "train", str(recipe), *options]
    command.append(f"storage.uri={folder / 'disk/runs'}")
    words = [str(Path(__file__).resolve()), str(folder), str(room), str(after), until, *command]
    environment = os.environ | {"XDG_STATE_HOME": str(folder / "state"), "COLUMNS": "1000"}
    return subprocess.run(
        [*UNSHARE, sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def main() -> int:
    folder, room, after, until, *command = sys.argv[1:]
    disk = Path(folder, "disk")
    filler = disk / "filler"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], check=True)

    def fill() -> None:
        found = os.statvfs(disk)
        filler.write_bytes(b"x" * max(0, found.f_bavail * found.f_frsize - int(room)))

    def fill_later() -> None:
        while not list(disk.glob("runs/*/run.json")):
            time.sleep(0.1)
        time.sleep(float(after))
        fill()
        time.sleep(float(until))
        filler.unlink()

    if after == "None":
        fill()
    else:
        threading.Thread(target=fill_later, daemon=True).start()
    training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert training.stdout is not None
    for line in training.stdout:
        print(line, end="")
        if "was not written" in line and until == "warning":
            filler.unlink(missing_ok=True)
    shutil.copytree(disk / "runs", Path(folder, "out"))
    return training.wait()


if __name__ == "__main__":
    sys.exit(main())
