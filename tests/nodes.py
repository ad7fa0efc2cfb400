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
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import processes
import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
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
        grows: groups of nodes that an autoscaler starts on this machine besides, as ``available_node_types``; of the
            head alone.
    """

    def __init__(self, cpus: int, head: str | None = None, grows: dict[str, Any] | None = None) -> None:
        for left in reversed(range(3)):
            if self._start(cpus, head, grows):
                return
            said = self._said.read_text()[-2000:]
            self.kill()
            # Somebody else may have taken one of its ports meanwhile.
            assert left, f"a node ended when it started: {said}"

    def _start(self, cpus: int, head: str | None, grows: dict[str, Any] | None) -> bool:
        """Whether it came up; False when it ended."""
        self.folder = tempfile.mkdtemp(prefix="hl", dir="/tmp")  # sockets' paths may have 107 characters
        # Another Ray on this machine must not share these ports.
        ports = {name: free_port() for name in PORTS}
        self.address, self.dashboard = head, 0
        if head is None:
            ports |= {"port": free_port(), "dashboard-port": free_port()}
            self.address, self.dashboard = f"127.0.0.1:{ports['port']}", ports["dashboard-port"]
        env = os.environ | TOKEN | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
        env["HYPERLORA_CACHE"] = f"{self.folder}/cache"
        # Ray Train plans with a node that has just died, and then waits a minute for its place.
        env["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"
        if grows is not None:
            env |= _autoscaler(self.folder, f"{self.address}", grows)
        command = [str(BIN / "ray"), "start", "--head" if head is None else f"--address={head}", "--block"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        if grows is not None:
            command += [f"--autoscaling-config={self.folder}/ray_bootstrap_config.yaml"]
        command += [f"--num-cpus={cpus}", "--disable-usage-stats", f"--temp-dir={self.folder}"]
        # Nodes that all believe to have the machine's memory would share it out several times over.
        command += ["--object-store-memory=200000000"]
        self._said = Path(self.folder, "said")
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT)
        needed = [ports[PORTS[0]], *([self.dashboard] if self.dashboard else [])]
        wait_until(lambda: self._process.poll() is not None or all(map(_answers, needed)), 120)
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """The node's processes, those of its workers among them."""
        found = {}
        first = [psutil.Process(self._process.pid)] if self._process.poll() is None else []
        for process in [*first, *_with(self.folder)]:
            with suppress(psutil.NoSuchProcess):  # it ended while it was looked at
                for one in [process, *process.children(recursive=True)]:
                    found[one.pid] = one
        return list(found.values())

    def drain(self) -> None:
        """As if its cloud had announced to take the machine back."""
        words: list[str] = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                words += process.cmdline()
        name = next(word.removeprefix("--node_id=") for word in words if word.startswith("--node_id="))
        command = [BIN / "ray", "drain-node", "--address", str(self.address), "--node-id", name]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
        subprocess.run([*command, "--deadline-remaining-seconds", "60"], env=os.environ | TOKEN, check=True)

    def kill(self) -> None:
        """As if its machine had lost its power."""
        processes.kill(self.processes())
        self._process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)


def _autoscaler(home: str, address: str, groups: dict[str, Any]) -> dict[str, str]:
    """Write what ``ray up`` leaves in the head's home, for nodes on this machine; returns the head's environment."""
    head = "ray.head.default"
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "disable_launch_config_check": True,
        "disable_node_updaters": True,
    }
    groups = {k: {"node_config": {}, "min_workers": 0} | v for k, v in groups.items()}
    commands = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    config = {
        "cluster_name": "test",
        "max_workers": 8,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1,
        "provider": provider,
        "head_node_type": head,
        "available_node_types": groups | {head: {"resources": {}, "node_config": {}, "max_workers": 0}},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
    }
    config |= {f"{name}_commands": [] for name in commands}
    Path(home, "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    return {
        "HOME": home,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_NODE_TYPE_NAME": head,
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }


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
        grows: groups of nodes that an autoscaler may add.
    """

    def __init__(self, head: int, *nodes: int, grows: dict[str, Any] | None = None) -> None:
        self.head = Node(head, grows=grows)
        self.nodes = [Node(cpus, self.head.address) for cpus in nodes]
        self.url = f"http://127.0.0.1:{self.head.dashboard}"

    def kill(self) -> None:
        for node in [*self.nodes, self.head]:
            node.kill()


class Line:
    """A way to a port of this machine that can be cut.

    Args:
        port: where it ends.
        delay: seconds that everything needs on its way there.
        lose: the first connection on which this is sent is ended when its answer comes, which is lost.
    """

    def __init__(self, port: int, delay: float = 0.0, lose: bytes | None = None) -> None:
        self._there, self._here, self._delay, self._lose = port, free_port(), delay, lose
        self._doomed: set[socket.socket] = set()
        self.lost = 0
        self.url = f"http://127.0.0.1:{self._here}"
        self._open: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        """Let connections through again."""
        self._listener = socket.create_server(("127.0.0.1", self._here))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """End all connections, and refuse new ones."""
        for one in [self._listener, *self._open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # cut
            while True:
                near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", self._there))
                self._open += [near, far]
                for way in ((near, far, self._delay), (far, near, 0.0)):
                    threading.Thread(target=self._carry, args=way, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, delay: float) -> None:
        with suppress(OSError):  # cut
            while data := source.recv(65536):
                time.sleep(delay)
                if self._lose is not None and self._lose in data:
                    self._lose = None
                    self._doomed.add(target)
                if source in self._doomed:
                    self.lost += 1
                    target.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


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
