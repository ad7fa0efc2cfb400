"""The harness of tests/faults.py counts what was met, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3
from faults import Harness

REQUESTS = """
import sys, time, urllib.request
for _ in range(int(sys.argv[2])):
    try:
        urllib.request.urlopen(sys.argv[1])
    except OSError:
        pass
time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def proxy() -> Iterator[s3.Proxy]:
    """Nobody is behind it: it answers 503."""
    with s3.running(s3.Proxy(SimpleNamespace(port=s3.free_port()))) as proxy:  # type: ignore[arg-type]
        assert isinstance(proxy, s3.Proxy)
        yield proxy


@pytest.mark.parametrize("requests", [0, 1])
def test_an_outage_that_no_request_met_has_not_happened(proxy: s3.Proxy, requests: int) -> None:
    draw: Any = SimpleNamespace(uniform=lambda low, high: 0.0)
    harness, first = Harness(proxy, proxy, Path(), draw), proxy._process
    words = [proxy.url, str(requests), "60" if requests else "0"]
    with subprocess.Popen([sys.executable, "-c", REQUESTS, *words]) as process:
        assert harness._outage(process) is (False if requests else None)
        process.kill()
    assert (proxy._process is first) == (not requests)
    with pytest.raises(urllib.error.HTTPError, match="503"):  # it is there and does nothing wrong
        urllib.request.urlopen(proxy.url)
