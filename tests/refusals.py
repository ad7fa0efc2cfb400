"""What every test of bad input asks: status 2, one clear message, and nothing written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.cli import main

Refused = Callable[..., str]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with what identifies its content, and every folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = f"{digest} {path.stat().st_mtime_ns if path.is_file() else ''}"
    return found


def checker(folder: Path, capfd: pytest.CaptureFixture) -> Refused:
    """Runs a command that has to be refused without touching ``folder``; returns its message in one line."""

    def refused(*arguments: object) -> str:
        before = contents(folder)
        capfd.readouterr()
        assert main([str(a) for a in arguments]) == 2
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert len(error) < 3000
        assert contents(folder) == before
        return " ".join(error.split())

    return refused
