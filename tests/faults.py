"""Faults at random moments of real runs on a real S3 endpoint, drawn from a seed: nothing may be lost or wrongly read.

    python -m tests.faults --injections 50 --seed 0 [--ray-share 0.2] [--store rclone] [--json FILE]

A run of the small recipe is trained without faults; then the same run again and again, with faults until the wanted
number has been injected. Whatever happens, every run has to end with the same bytes in its adapter, to lose no
checkpoint that was committed, to say by name which file it refused, and to end with a status that says what happened.

    kill           SIGKILL of the driver and all that it started
    worker         SIGKILL of one Ray worker (runs with Ray only); it is started again
    head           SIGKILL of the head's control service (runs with Ray only), with which the Ray cluster ends
    term           SIGTERM: a checkpoint of the step at hand, status 143
    outage         the endpoint's process dies of a request and comes back after a while
    restart        the store's own process dies while it is asked and comes back with what its disk has (rclone only)
    error          the endpoint answers 500 or 503 a few times
    slow           it takes its time for a few requests
    half           it sends half of a body and hangs up
    truncated      killed, and the newest checkpoint loses the end of a file
    flipped        killed, and a bit of the newest checkpoint changes
    second         another driver is told to go on with the run while the first is at work
    disk           a run of its own on a small local disk, which runs full for a while (where a user may mount)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "integration"))

import processes
import s3
import small_disk
from conftest import small_recipe

from hyperlora import checkpoint, storage
from hyperlora.storage import patiently

STORE = "s3://faults/runs"
KINDS = ("kill", "term", "outage", "error", "slow", "half", "truncated", "flipped", "second")
#: Faults of one run at most; then it may end.
PER_RUN = 4
#: Of all runs.
DISK_SHARE = 0.1
#: What a driver is told that wants a run which another one has, or had.
REFUSALS = ("belongs to a command that is running", "is claimed by several", "this run is finished")
#: How a driver ends when the endpoint was away for too long.
AWAY = ("the store does not answer", "could not be stored")


@dataclass
class Harness:
    """The endpoint, the recipe, and what has happened."""

    proxy: s3.Proxy
    store: s3.Server
    recipe: Path
    draw: random.Random
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    expected: dict[str, bytes] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    #: Of the command, for the run at hand.
    options: tuple[str, ...] = ()
    #: File of a checkpoint that this run has to refuse by its name.
    damaged: str | None = None
    #: What runs with Ray have to end with, once one has run without faults.
    expected_of_two: tuple[dict[str, bytes], list[float]] | None = None
    #: Times of the steps up to the newest checkpoint that was seen: a run that goes on from it ends with them.
    kept: list[float] = field(default_factory=list)
    #: What happened to the run at hand, for whoever has to find out why it failed.
    story: list[str] = field(default_factory=list)

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "train", str(self.recipe), *more],
            env=os.environ | {"AWS_ENDPOINT_URL": self.proxy.url},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def folder(self) -> str | None:
        """The run's folder, once it is there."""
        found = patiently(storage.glob, STORE, "*/run.json")
        assert len(found) <= 1, f"one command, several runs: {found}"
        return f"{STORE}/{found[0].removesuffix('/run.json')}" if found else None

    def reference(self, *options: str) -> tuple[dict[str, bytes], list[float], float]:
        """The run without faults: what every other has to end with, and its seconds."""
        began = time.monotonic()
        process = self.start(*options)
        message = process.communicate(timeout=600)[1]
        assert process.returncode == 0, message
        seconds = time.monotonic() - began
        found = self.outcome()
        patiently(storage.remove_tree, STORE)
        return *found, seconds

    def outcome(self) -> tuple[dict[str, bytes], list[float]]:
        folder = self.folder()
        assert folder is not None
        result = json.loads(patiently(storage.read, f"{folder}/result.json"))
        names = ("adapter_model.safetensors", "adapter_config.json")
        return {n: patiently(storage.read, f"{folder}/adapter/{n}") for n in names}, result["losses"]

    # ------------------------------------------------------------ faults

    def inject(self, kind: str, process: subprocess.Popen[str]) -> bool | None:
        """Whether the process has to be started again; None if nothing happened, for want of a thing to hit."""
        return getattr(self, f"_{kind}")(process)

    def _kill(self, process: subprocess.Popen[str]) -> bool:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        os.killpg(process.pid, signal.SIGKILL)
        processes.kill(family)
        process.communicate()
        return True

    def _worker(self, process: subprocess.Popen[str]) -> bool | None:
        # They take half of a small run to come up, and come up one by one.
        moment = self.draw.uniform(0, 0.5 * self.seconds)
        while process.poll() is None:
            workers = processes.below(process.pid, "RayTrainWorker")
            if workers and moment <= 0:
                self.draw.choice(workers).kill()
                return False
            moment -= 0.1 if workers else 0
            time.sleep(0.1)
        return None

    def _head(self, process: subprocess.Popen[str]) -> bool | None:
        family = psutil.Process(process.pid).children(recursive=True)
        heads = processes.below(process.pid, "gcs_server")
        if not heads:
            return None
        processes.kill(heads)
        process.communicate(timeout=300)
        # What Ray leaves behind when it ends like that must not write into the run.
        processes.kill(family)
        return process.returncode != 0

    def _term(self, process: subprocess.Popen[str]) -> bool | None:
        os.kill(process.pid, signal.SIGTERM)
        message = process.communicate(timeout=300)[1]
        assert process.returncode in (0, 143, -signal.SIGTERM), message
        if process.returncode == 143 and self.folder() is not None and "the last checkpoint is" in message:
            newest = checkpoint.load(checkpoint.committed(str(self.folder()))[-1])
            assert f"after step {newest.trainer['step']} of" in " ".join(message.split()), message
        return None if process.returncode == 0 else True  # the run had ended before

    def _outage(self, process: subprocess.Popen[str]) -> bool | None:
        # What dies of a request has left it without an answer; those that follow are refused.
        self.proxy.faults({"kind": "death"})
        while not self.proxy.ended():
            if process.poll() is not None and not self.proxy.ended():
                self.proxy.faults()
                return None
            time.sleep(0.05)
        time.sleep(self.draw.uniform(0.5, 4))
        self.proxy.start()
        return False

    def _restart(self, process: subprocess.Popen[str]) -> bool | None:
        before = len(self.proxy.happened())
        self.store.stop()
        while len(self.proxy.happened()) == before and process.poll() is None:
            time.sleep(0.05)
        met = len(self.proxy.happened()) > before
        time.sleep(self.draw.uniform(0.5, 4) if met else 0)
        self.store.start()
        return False if met else None

    def _error(self, process: subprocess.Popen[str]) -> bool | None:
        status, times = self.draw.choice((500, 503)), self.draw.randint(1, 4)
        return self._met(process, {"kind": "status", "status": status, "times": times})

    def _slow(self, process: subprocess.Popen[str]) -> bool | None:
        seconds, times = self.draw.uniform(0.5, 3), self.draw.randint(1, 4)
        return self._met(process, {"kind": "slow", "seconds": seconds, "times": times})

    def _half(self, process: subprocess.Popen[str]) -> bool | None:
        return self._met(process, {"kind": "half", "method": "GET", "times": self.draw.randint(1, 3)})

    def _met(self, process: subprocess.Popen[str], fault: dict[str, Any]) -> bool | None:
        """Have the proxy get something wrong, and wait until a request of the run has met it."""
        before = len(self.proxy.happened())
        self.proxy.faults(fault)
        while process.poll() is None:
            if len(self.proxy.happened()) > before:
                return False
            time.sleep(0.05)
        return None

    def _truncated(self, process: subprocess.Popen[str]) -> bool | None:
        return self._damage(process, lambda data: data[: self.draw.randrange(len(data))])

    def _flipped(self, process: subprocess.Popen[str]) -> bool | None:
        def flip(data: bytes) -> bytes:
            place = self.draw.randrange(len(data))
            return data[:place] + bytes([data[place] ^ (1 << self.draw.randrange(8))]) + data[place + 1 :]

        return self._damage(process, flip)

    def _damage(self, process: subprocess.Popen[str], change: Callable[[bytes], bytes]) -> bool | None:
        # With a single checkpoint the run is rightly refused: there is nothing to fall back to.
        deadline = time.monotonic() + 60 + self.seconds
        while len(self._good()) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        if process.poll() is not None:
            return None
        self._kill(process)
        good = self._good()
        # The end of a run that finished meanwhile reads no checkpoint any more.
        if len(good) > 1 and not patiently(storage.exists, f"{self.folder()}/result.json"):
            file = f"{good[-1]}/{self.draw.choice(('state.safetensors', 'trainer.json', 'adapter_model.safetensors'))}"
            patiently(storage.write, file, change(patiently(storage.read, file)))
            self.damaged = file
        self._look()
        return True

    def _second(self, process: subprocess.Popen[str]) -> bool | None:
        if self.folder() is None:
            return None
        other = self.start(*self.options, "--resume")
        message = " ".join(other.communicate(timeout=600)[1].split())
        if other.returncode == 0:
            # It was quicker than the claim of the first, which must then have kept away.
            first = " ".join(process.communicate(timeout=300)[1].split())
            assert process.returncode != 0, "two drivers say that they have finished one run"
            assert any(r in first for r in (*REFUSALS, *AWAY)), first
            return True
        assert other.returncode == 2, message
        assert any(r in message for r in REFUSALS), message
        return False

    # ------------------------------------------------------------ one run

    def run(self, kinds: list[str], *options: str) -> None:
        """One run from its start to its end, with these faults."""
        self.proxy.faults()
        expected, expected_losses = self._expected(*options)
        self.options = options
        resume: tuple[str, ...] = ()
        waiting = list(kinds)
        while True:
            newest = self._newest()
            self.story.append(f"started with {self._committed()}")
            process = self.start(*options, *resume)
            again = contested = False
            while waiting and not again:
                # Starting takes most of a small run: moments are drawn from the time after it as well.
                time.sleep(self.draw.uniform(0.3, 1) * self.seconds * self.draw.uniform(0.3, 1))
                if process.poll() is not None:
                    break
                kind = waiting.pop(0)
                self._look()
                step, damaged = self._newest(), self.damaged
                happened = self.inject(kind, process)
                self.story.append(f"{kind}: {happened}, {self._committed()}, damaged {self.damaged}")
                again = bool(happened)
                contested |= kind == "second"
                if self.damaged != damaged:
                    newest = self._newest()  # what we have damaged is not missed
                elif kind in ("truncated", "flipped"):
                    kind = "kill"  # there was nothing to damage, or nobody to read it
                if happened is not None:
                    self.log.append({"kind": kind, "committed_before": step, "restart": again})
            if not again:
                message = process.communicate(timeout=600)[1]
                self.story.append(f"status {process.returncode}: {message}")
                # Killed between its last file and its end, a run has lost nothing.
                if process.returncode == 0 or "this run is finished" in " ".join(message.split()):
                    break
                told = " ".join(message.split())
                allowed = (*AWAY, *(REFUSALS if contested else ()))
                assert any(reason in told for reason in allowed), message
            resume = ("--resume",) if self.folder() is not None else ()
            self._check_nothing_is_gone(newest)
        self.proxy.faults()
        adapter, losses = self.outcome()
        assert losses == expected_losses, "the same losses"
        assert adapter == expected, "the same adapter, to the byte"
        times = json.loads(patiently(storage.read, f"{self.folder()}/result.json"))["step_seconds"]
        assert times[: len(self.kept)] == self.kept, "steps of a committed checkpoint were taken again"
        self.kept = []
        self._check_warning()
        patiently(storage.remove_tree, STORE)

    def run_on_a_full_disk(self) -> None:
        """One run on a small disk that runs full at a random moment after the run's first file."""
        after, until = self.draw.uniform(0, 0.5 * self.seconds), self.draw.uniform(1, 6)
        with tempfile.TemporaryDirectory() as folder:
            done = small_disk.train(
                self.recipe, Path(folder), room=self.draw.randint(0, 300_000), after=after, until=str(until)
            )
            said = done.stdout + done.stderr
            (run,) = Path(folder, "out").glob("*-*")
            kept = Path(folder, "state/hyperlora", run.name)
            if done.returncode:
                # Full to the end: the command fails, and says where the end of the run is.
                assert done.returncode == 1, said
                assert "could not be stored" in " ".join(said.split()), said
                assert str(kept) in said, said
                saved, _ = checkpoint.load_latest(str(kept))
                assert saved is not None
                losses = saved.trainer["losses"]
            else:
                losses = json.loads((run / "result.json").read_text())["losses"]
            assert losses == self.losses, "the same losses"
            for name, expected in self.expected.items():
                found = (kept if done.returncode else run) / "adapter" / name
                assert found.read_bytes() == expected, "the same adapter, to the byte"
            for uri in checkpoint.committed(str(run)):
                checkpoint.load(uri)
        # Full between two checkpoints, it has met nothing.
        if "No space left on device" in said:
            entry = {"kind": "disk", "after_seconds": after, "full_seconds": until, "status": done.returncode}
            self.log.append(entry)

    def _expected(self, *options: str) -> tuple[dict[str, bytes], list[float]]:
        if not options:
            return self.expected, self.losses
        if self.expected_of_two is None:
            self.expected_of_two = self.reference(*options)[:2]
            assert self.expected_of_two[1] == pytest.approx(self.losses, abs=1e-6)
        return self.expected_of_two

    def _look(self) -> None:
        """See how far the newest good checkpoint is: the run has to end with the times of its steps."""
        folder = self.folder()
        saved = None if folder is None else checkpoint.load_latest(folder)[0]
        now = [] if saved is None else saved.trainer["step_seconds"]
        both = min(len(now), len(self.kept))
        assert now[:both] == self.kept[:both], "steps of a committed checkpoint were taken again"
        self.kept = now

    def _good(self) -> list[str]:
        """URIs of the committed checkpoints that verify, oldest first."""
        found = []
        for uri in self._committed():
            with suppress(checkpoint.RefusedError):  # damaged by us, or just deleted by the run
                checkpoint.load(uri)
                found.append(uri)
        return found

    def _newest(self) -> int:
        return max(map(checkpoint.step_of, self._good()), default=0)

    def _committed(self) -> list[str]:
        folder = self.folder()
        return [] if folder is None else checkpoint.committed(folder)

    def _check_nothing_is_gone(self, before: int) -> None:
        now = self._newest()
        assert now >= before, f"step {before} was committed, the newest checkpoint is of step {now}"

    def _check_warning(self) -> None:
        """A damaged file was refused by its name."""
        if self.damaged is None:
            return
        result = json.loads(patiently(storage.read, f"{self.folder()}/result.json"))
        told = " ".join(w["message"] for w in result["warnings"])
        assert self.damaged in told, (self.damaged, told)
        self.damaged = None


def harness(
    folder: Path, seed: int, injections: int, ray_share: float = 0.0, store: Literal["moto", "rclone"] = "moto"
) -> dict[str, Any]:
    """Inject faults until there were so many; returns what happened.

    Args:
        folder: for the recipe, and for the objects of rclone.
        seed: of every draw.
        injections: that were met by something.
        ray_share: share of the runs that train with Ray, two workers each.
        store: moto holds objects in memory and knows conditional writes, rclone holds files and does not.

    Raises:
        AssertionError: something was lost, wrongly read, or ended without saying why.
    """
    # One thread each: the bits of a sum depend on how many threads made it, and two processes share the machine.
    os.environ.update(s3.ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    content = small_recipe(folder)
    content["training"] |= {"steps": 150, "checkpoint_every": 5, "eval_before": False}
    content["storage"] = {"uri": STORE, "retry_seconds": 20, "final_retry_seconds": 60}
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    draw = random.Random(seed)
    runs = 0
    (folder / "objects").mkdir()
    server = s3.moto() if store == "moto" else s3.rclone(folder / "objects")
    kinds = KINDS if store == "moto" else (*KINDS, "restart")
    with s3.running(server), s3.running(s3.Proxy(server)) as proxy:
        assert isinstance(proxy, s3.Proxy)
        # What this process asks goes past the proxy, and meets none of its faults.
        os.environ["AWS_ENDPOINT_URL"] = server.url
        type(storage.filesystem(STORE)[0]).clear_instance_cache()
        storage.filesystem(STORE)[0].mkdir("faults")
        state = Harness(proxy, server, recipe, draw)
        state.expected, state.losses, state.seconds = state.reference()
        decks: dict[bool, list[str]] = {False: [], True: []}

        def next_kind(with_ray: bool) -> str:
            """Every kind once, in a drawn order, before any comes again; those of Ray first."""
            if not decks[with_ray]:
                decks[with_ray] = [*draw.sample(kinds, len(kinds)), *(("head", "worker") if with_ray else ())]
            return decks[with_ray].pop()

        while len(state.log) < injections:
            left = injections - len(state.log)
            runs += 1
            if draw.random() < DISK_SHARE and small_disk.mounts():
                state.run_on_a_full_disk()
                print(f"{len(state.log)}/{injections} faults in {runs} runs: disk", flush=True)
                continue
            with_ray = draw.random() < ray_share
            chosen = [next_kind(with_ray) for _ in range(min(left, draw.randint(1, PER_RUN)))]
            state.story = [f"with {'Ray' if with_ray else 'no Ray'}: {' '.join(chosen)}"]
            try:
                state.run(chosen, *(("ray.backend=ray", "ray.num_workers=2") if with_ray else ()))
            except AssertionError as error:
                error.add_note("\n".join(state.story))
                raise
            print(f"{len(state.log)}/{injections} faults in {runs} runs: {' '.join(chosen)}", flush=True)
    counts = Counter(entry["kind"] for entry in state.log)
    found = {"seed": seed, "store": store, "ray_share": ray_share, "injections": len(state.log), "runs": runs}
    return found | {"kinds": dict(counts), "log": state.log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--injections", type=int, default=50)
    parser.add_argument("--ray-share", type=float, default=0.2)
    parser.add_argument("--store", choices=("moto", "rclone"), default="moto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = harness(Path(folder), arguments.seed, arguments.injections, arguments.ray_share, arguments.store)
    print(f"{result['injections']} faults in {result['runs']} runs: every run ended with the same adapter")
    if arguments.json:
        from benchmarks.common import provenance, write_json

        command = "python -m tests.faults " + shlex.join(sys.argv[1:])
        write_json(arguments.json, {"command": command, "provenance": provenance()} | result)


if __name__ == "__main__":
    main()
