"""Every command that trains on ``ray.address`` gives the token there; a stand-in for the head, no Ray is started."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray._raylet import AuthenticationTokenLoader, Config
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)

from hyperlora import distributed
from pipelines.cli import main

TOKEN = "the-right-token"
COMMANDS = {
    "train": ["ray.backend=ray"],
    "tune": ["--trials", "2"],
    "study": ["--points", "2", "--design", "sobol", "--seeds", "1", "--lora-lrs", "none"],
    "compare": ["--only", "lora", "--lrs", "1e-3", "--seeds", "1"],
}


class Head(NodeInfoGcsServiceServicer):
    """Lets in who has the token.

    Attributes:
        address: HOST:PORT.
        given: tokens of the questions so far.
    """

    def __init__(self, server: grpc.Server) -> None:
        self.given: list[str | None] = []
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        add_NodeInfoGcsServiceServicer_to_server(self, server)

    def CheckAlive(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.given.append(dict(context.invocation_metadata()).get("authorization"))
        if self.given[-1] != f"Bearer {TOKEN}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return CheckAliveReply()


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    def refuse(address: str, **options: Any) -> None:
        raise ConnectionError(f"let in to {address}")

    server = grpc.server(ThreadPoolExecutor(2))
    found = Head(server)
    server.start()
    with monkeypatch.context() as patch:
        patch.setattr(distributed.ray, "init", refuse)
        patch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(name, "")
            patch.delenv(name)
        yield found
    server.stop(None)
    # What Ray has read belongs to this test.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@pytest.mark.parametrize("token", [TOKEN, "another"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_gives_the_token_to_its_cluster(
    command: str, token: str, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    AuthenticationTokenLoader.instance().reset_cache()
    rows = ["data.train_rows=64", "data.eval_rows=8", f"storage.uri={tmp_path}", "mlflow.enabled=false"]
    assert main([command, "quickstart", *rows, f"ray.address={head.address}", *COMMANDS[command]]) == 2
    told = " ".join(capfd.readouterr().err.split())
    assert told.startswith(f"1 problem: ray.address: got '{head.address}'; ")
    assert head.given == [f"Bearer {token}"]
    assert (f"let in to {head.address}" in told) == (token == TOKEN)
    assert ("a cluster that lets this user in: give its token in RAY_AUTH_TOKEN" in told) == (token != TOKEN)
