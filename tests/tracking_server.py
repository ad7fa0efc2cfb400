"""A real MLflow server, as a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from s3 import free_port


class Server:
    """An ``mlflow server`` on SQLite that can be stopped and started again.

    Args:
        folder: of the database.
        artifacts: where the server, through which all of them go, keeps artifacts; ``None`` is in ``folder``.
    """

    def __init__(self, folder: Path, artifacts: str | None = None) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder, self._artifacts = folder, artifacts or str(folder / "artifacts")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Unless it runs."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", self._artifacts]
        # Nothing here has MLflow run jobs of its own, for which it starts eight more processes.
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1)
