"""A Ray cluster on this machine whose nodes are processes of their own, with token authentication."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from s3 import free_port

BIN = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    """What ``condition`` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return found


def _answers(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


class Node:
    """One node; its folder is its own, since nodes that share one delete each other's packages.

    Args:
        cpus: that it offers.
        head: address of the head, HOST:PORT; None for the head itself.
    """

    def __init__(self, cpus: int, head: str | None = None) -> None:
        self.folder = tempfile.mkdtemp(prefix="hl", dir="/tmp")  # sockets' paths may have 107 characters
        # Another Ray on this machine must not share these ports.
        ports = {name: free_port() for name in PORTS}
        self.address, self.dashboard = head, 0
        if head is None:
            ports |= {"port": free_port(), "dashboard-port": free_port()}
            self.address, self.dashboard = f"127.0.0.1:{ports['port']}", ports["dashboard-port"]
        env = os.environ | TOKEN | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
        env["HYPERLORA_CACHE"] = f"{self.folder}/cache"
        command = [str(BIN / "ray"), "start", "--head" if head is None else f"--address={head}", "--block"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += [f"--num-cpus={cpus}", "--disable-usage-stats", f"--temp-dir={self.folder}"]
        # Nodes that all believe to have the machine's memory would share it out several times over.
        command += ["--object-store-memory=200000000"]
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        needed = [ports[PORTS[0]], *([self.dashboard] if self.dashboard else [])]
        wait_until(lambda: all(map(_answers, needed)), 120)

    def processes(self) -> list[psutil.Process]:
        """The node's processes, those of its workers among them."""
        found = {}
        for process in [psutil.Process(self._process.pid), *_with(self.folder)]:
            for one in [process, *process.children(recursive=True)]:
                found[one.pid] = one
        return list(found.values())

    def announce_end(self, head: Node, seconds: int) -> None:
        """Have Ray know that the machine will be taken away, as a cloud tells of a spot machine."""
        names = [w for p in _with(self.folder) for w in p.cmdline() if w.startswith("--node_id=")]
        command = [str(BIN / "ray"), "drain-node", f"--address={head.address}", "--reason-message=spot machine"]
        command += [f"--node-id={names[0].removeprefix('--node_id=')}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        command += [f"--deadline-remaining-seconds={seconds}"]
        subprocess.run(command, env=os.environ | TOKEN, check=True, capture_output=True)

    def kill(self) -> None:
        """As if its machine had lost its power."""
        if self._process.poll() is None:
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)


def _with(folder: str) -> list[psutil.Process]:
    """Processes whose command line names a node's folder."""
    named = []
    for process in psutil.process_iter(["cmdline"]):
        if any(folder in word for word in process.info["cmdline"] or []):
            named.append(process)
    return named


class Cluster:
    """A head and its nodes.

    Args:
        head: CPUs of the head.
        nodes: CPUs of each other node.
    """

    def __init__(self, head: int, *nodes: int) -> None:
        self.head = Node(head)
        self.nodes = [Node(cpus, self.head.address) for cpus in nodes]
        self.url = f"http://127.0.0.1:{self.head.dashboard}"

    def kill(self) -> None:
        for node in [*self.nodes, self.head]:
            node.kill()


def hyperlora(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user has it: Ray reads the token's settings once."""
    command = [sys.executable, "-m", "pipelines.cli", *words]
    env = os.environ | {"RAY_AUTH_TOKEN": TOKEN["RAY_AUTH_TOKEN"]} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def submit(address: str, folder: Path, *words: str, **environment: str) -> dict[str, Any]:
    """Submit a job; its summary, with the command's ``exit`` status and what it has ``shown``."""
    summary = folder / "job.json"
    summary.unlink(missing_ok=True)
    done = hyperlora("submit", *words, "--address", address, "--json", str(summary), **environment)
    assert summary.is_file(), done.stderr
    return json.loads(summary.read_text()) | {"exit": done.returncode, "shown": done.stdout}
