"""S3 endpoints as separate processes: moto, rclone, and a proxy in front that injects faults.

Run as a program this file is the proxy. Faults are set with PUT /_faults and a JSON list; each entry is

    {"kind": "status", "status": 503, "method": "PUT", "match": "state.safetensors", "times": 2}

kind: status (answer this, forward nothing), slow (wait ``seconds`` first), half (forward, then answer with half the
body and hang up), cut (forward half the request's body as if it were all), unconditional (501 for If-None-Match), deaf
(forward without If-None-Match), death (the proxy is killed and answers nothing). method and match (a part of the path)
are optional; times is how often it happens. GET /_faults gives the list of requests that met one,
and of those (away) to which the server behind gave no answer.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

KEY, SECRET = "test-access-key", "test-secret-key"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    """A port that nobody listens on, and that no connection gets for its own end before somebody does.

    Between those of Ray's workers (to 19999) and those that Linux gives to connections (from 32768).
    """
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port


class Server:
    """A server process on a port of its own that can be killed and started again.

    Args:
        command: arguments, in which ``{port}`` stands for the port.
        environment: more of it.
    """

    def __init__(self, *command: str, environment: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self._command = [part.format(port=self.port) for part in command]
        self._environment = os.environ | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while True:
            assert self._process.poll() is None, f"{self._command} ended with {self._process.returncode}"
            assert time.monotonic() < deadline, f"{self._command} does not answer"
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
            else:
                return

    def ended(self) -> bool:
        """Whether it has died since it was started."""
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """As if its machine had lost its power."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


def moto() -> Server:
    """Holds objects in memory; knows conditional writes."""
    return Server(str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", "{port}")


def rclone(folder: Path) -> Server:
    """Serves a folder, so that its objects outlive it; passes over conditions of writes in silence."""
    options = ["--addr", "127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off"]
    return Server(str(Path(sys.executable).with_name("rclone")), "serve", "s3", str(folder), *options)


class Proxy(Server):
    """Forwards to an S3 server and does what it is told to get wrong."""

    def __init__(self, backend: Server) -> None:
        super().__init__(sys.executable, str(Path(__file__)), "{port}", str(backend.port))

    def faults(self, *faults: dict[str, Any]) -> None:
        """Replace the faults that are waiting to happen."""
        request = urllib.request.Request(f"{self.url}/_faults", json.dumps(faults).encode(), method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def happened(self) -> list[str]:
        """KIND METHOD PATH of every fault since the proxy started."""
        with urllib.request.urlopen(f"{self.url}/_faults", timeout=10) as answer:
            return json.load(answer)


# ---------------------------------------------------------------- the proxy's own process


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    backend = 0
    lock = threading.Lock()
    waiting: ClassVar[list[dict[str, Any]]] = []
    log: ClassVar[list[str]] = []

    def log_message(self, *arguments: Any) -> None:
        pass

    def _take(self) -> dict[str, Any]:
        """The fault that this request meets, if any."""
        with self.lock:
            for fault in self.waiting:
                fits = fault.get("method", self.command) == self.command and fault.get("match", "") in self.path
                if fault["kind"] in ("unconditional", "deaf"):
                    fits &= "If-None-Match" in self.headers
                if fits and fault.get("times", 1) > 0:
                    fault["times"] = fault.get("times", 1) - 1
                    self.log.append(f"{fault['kind']} {self.command} {self.path}")
                    return fault
        return {"kind": "none"}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int) -> None:
        code = {403: "AccessDenied", 500: "InternalError", 501: "NotImplemented", 503: "SlowDown"}.get(status, "Error")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {status}</Message></Error>"
        self._answer(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else body.encode())

    def handle_request(self) -> None:
        body = self._body()
        if self.path == "/_faults":
            if self.command == "PUT":
                Handler.waiting = json.loads(body)
            self._answer(200, [], json.dumps(self.log).encode())
            return
        fault = self._take()
        kind = fault["kind"]
        if kind == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind in ("status", "unconditional"):
            self._error(501 if kind == "unconditional" else fault["status"])
            return
        if kind == "slow":
            time.sleep(fault["seconds"])
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
        if kind == "deaf":
            headers.pop("If-None-Match")
        if kind == "cut":
            body = body[: len(body) // 2]
            headers.pop("x-amz-checksum-crc32", None)
        headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self.log.append(f"away {self.command} {self.path}")
            self._error(503)
            return
        finally:
            connection.close()
        length = int(answer.headers.get("Content-Length", 0)) if self.command == "HEAD" else len(data)
        if kind == "half":
            self._answer(answer.status, answer.getheaders(), data[: len(data) // 2], length)
            self.close_connection = True
            return
        self._answer(answer.status, answer.getheaders(), data, length)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request  # noqa: N815


if __name__ == "__main__":
    Handler.backend = int(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
