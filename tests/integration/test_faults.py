"""A short, seeded part of the fault harness; all of it is ``python -m tests.faults``."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import harness

from hyperlora import storage


@pytest.fixture(autouse=True)
def other_endpoints_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # put back afterwards
    type(storage.filesystem("s3://any")[0]).clear_instance_cache()


def test_runs_survive_random_faults(tmp_path: Path) -> None:
    result = harness(tmp_path, seed=7, injections=3)
    assert result["injections"] == 3
