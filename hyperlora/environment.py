"""Variables of this process's environment: those that hold for a while, and those that a job was given."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

#: Where Ray's own commands for jobs look for the dashboard of their cluster.
ADDRESS = "RAY_API_SERVER_ADDRESS"
#: The variables that a job is given, as JSON beside the packages in its working directory.
GIVEN = "job-environment.json"


@contextmanager
def changed(values: Mapping[str, str]) -> Iterator[None]:
    """Variables with these values, and afterwards as they were before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def take_given() -> None:
    """Set the variables that the job of this process was given, if it is one's: its driver, and each of its workers."""
    with suppress(FileNotFoundError):
        os.environ.update(json.loads(Path(__file__).parents[1].joinpath(GIVEN).read_text(encoding="utf-8")))
