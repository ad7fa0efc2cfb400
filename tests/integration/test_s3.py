"""Runs whose folder is on an S3 endpoint, a server process of its own that fails as servers do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import s3
import yaml
from conftest import small_recipe
from safetensors.torch import load

from hyperlora import checkpoint, ownership, runs, storage
from hyperlora.config import Recipe, parse
from hyperlora.ownership import Lease, ReplacedError
from hyperlora.training import RunInfo, Silent, train
from hyperlora.uploads import Snapshot, Uploader
from pipelines.cli import main

STORE = "s3://bucket/runs"


@pytest.fixture(scope="module")
def moto() -> Iterator[s3.Server]:
    with s3.running(s3.moto()) as server:
        yield server


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[s3.Server], None]:
    def use(server: s3.Server) -> None:
        for name, value in {**s3.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        # Clients keep the endpoint that they were made with.
        type(storage.filesystem(STORE)[0]).clear_instance_cache()

    return use


def make_bucket() -> None:
    """An empty one, whatever an earlier test has left."""
    fs = storage.filesystem(STORE)[0]
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")


@pytest.fixture
def proxy(moto: s3.Server, endpoint: Callable[[s3.Server], None]) -> Iterator[s3.Proxy]:
    """An endpoint with conditional writes, and an empty bucket."""
    with s3.running(s3.Proxy(moto)) as server:
        assert isinstance(server, s3.Proxy)
        endpoint(server)
        make_bucket()
        yield server
        if server._process is None:
            server.start()
        server.faults()
        storage.filesystem(STORE)[0].rm("bucket", recursive=True)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    content = small_recipe(tmp_path)
    content["storage"] = {"uri": STORE, "retry_seconds": 5, "final_retry_seconds": 5}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def run(recipe: Path, *more: str) -> dict[str, Any]:
    summary = recipe.parent / "summary.json"
    assert main(["train", str(recipe), *more, "--json", str(summary)]) == 0
    return json.loads(summary.read_text())


def process(recipe: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "train", str(recipe), *more],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], Any], running: subprocess.Popen[str] | None = None) -> Any:
    deadline = time.monotonic() + 300
    while not (found := condition()):
        assert running is None or running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline, "not within five minutes"
        time.sleep(0.02)
    return found


def kill(running: subprocess.Popen[str]) -> None:
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()


def adapter(summary: dict[str, Any]) -> dict[str, bytes]:
    tensors = load(storage.read(f"{summary['adapter']}/adapter_model.safetensors"))
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def folder() -> str:
    """The only run of the bucket."""
    (found,) = storage.glob(STORE, "*/run.json")
    return f"{STORE}/{found.removesuffix('/run.json')}"


def recipe(recipe_file: Path, **training: Any) -> Recipe:
    content = yaml.safe_load(recipe_file.read_text())
    return parse(content | {"training": content["training"] | training})


LONG = ("training.steps=60", "training.checkpoint_every=40")


def warnings(result: dict[str, Any]) -> list[str]:
    return [w["message"] for w in result["warnings"] if w["monitor"] == "checkpoint"]


@pytest.mark.parametrize("store", ["conditional", "unconditional", "deaf", "rclone"])
def test_killed_within_an_upload_the_run_resumes_to_the_same_adapter(
    moto: s3.Server, endpoint: Callable[[s3.Server], None], recipe_file: Path, tmp_path: Path, store: str
) -> None:
    """On stores with conditional writes, that refuse them, and that pass over the condition."""
    (tmp_path / "disk").mkdir()
    server = s3.running(s3.rclone(tmp_path / "disk")) if store == "rclone" else nullcontext(moto)
    with server as backend, s3.running(s3.Proxy(backend)) as proxy:
        assert isinstance(proxy, s3.Proxy)
        endpoint(proxy)
        make_bucket()
        always = [{"kind": store, "times": 10**6}] if store in ("unconditional", "deaf") else []
        proxy.faults(*always)
        whole = run(recipe_file, *LONG)
        expected = adapter(whole)
        storage.remove_tree(STORE)
        # The last checkpoint's tensors are on their way when everything dies; none before it waits and is replaced.
        proxy.faults({"kind": "slow", "seconds": 600, "match": "step-00000060", "method": "PUT"}, *always)
        running = process(recipe_file, *LONG)
        wait_for(lambda: any(line.startswith("slow") for line in proxy.happened()), running)
        kill(running)
        proxy.stop()
        proxy.start()
        proxy.faults(*always)
        saved, refused = checkpoint.load_latest(folder())
        assert saved is not None
        assert (saved.trainer["step"], refused) == (40, [])
        resumed = run(recipe_file, *LONG, "--resume")
        if always:
            assert any(line.startswith(store) for line in proxy.happened()), "the store was never asked"
        assert adapter(resumed) == expected
        assert (resumed["loss_last"], resumed["ranks"]) == (whole["loss_last"], whole["ranks"])
        assert warnings(resumed) == []
        left = {path.split("/")[0] for path in storage.tree(f"{folder()}/checkpoints")}
        assert len(left) == 2, "what the killed process left behind is collected"
        storage.remove_tree("s3://bucket")


def test_damaged_objects_are_refused_by_name_and_the_run_falls_back(
    proxy: s3.Proxy, recipe_file: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = run(recipe_file, "training.steps=60")
    uri = whole["adapter"].removesuffix("/adapter")
    storage.remove(f"{uri}/result.json")
    earlier, newest = checkpoint.committed(uri)
    file = f"{newest}/state.safetensors"
    data = bytearray(storage.read(file))
    data[len(data) // 2] ^= 4
    storage.write(file, bytes(data))
    capsys.readouterr()
    resumed = run(recipe_file, "training.steps=60", "--resume")
    (message,) = warnings(resumed)
    # Which one is before it depends on the store's pace: a checkpoint that waits gives way to a newer one.
    before = checkpoint.step_of(earlier)
    assert f"{file} does not match the SHA-256 in COMMIT; going on from step {before}" in message
    assert file in capsys.readouterr().out.replace("\n", "")
    assert adapter(resumed) == adapter(whole)
    # Nothing good is left: that is told, and nothing is trained.
    storage.remove(f"{uri}/result.json")
    for name in checkpoint.committed(uri):
        storage.write(f"{name}/trainer.json", storage.read(f"{name}/trainer.json")[:-7])
    assert main(["train", str(recipe_file), "training.steps=60", "--resume"]) == 2
    assert earlier != newest


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500, "times": 3},
        {"kind": "status", "status": 503, "times": 3},
        {"kind": "slow", "seconds": 1, "times": 3},
        {"kind": "cut", "method": "PUT", "match": "state.safetensors", "times": 2},
        {"kind": "half", "method": "GET", "times": 3},
    ],
    ids=["500", "503", "slow", "half a body sent", "half a body received"],
)
def test_transient_faults_cost_nothing_but_time(proxy: s3.Proxy, recipe_file: Path, fault: dict[str, Any]) -> None:
    proxy.faults(fault)
    result = run(recipe_file)
    assert len(proxy.happened()) == fault["times"], "the fault happened"
    assert warnings(result) == []
    saved, refused = checkpoint.load_latest(result["adapter"].removesuffix("/adapter"))
    assert saved is not None
    assert (saved.trainer["step"], refused) == (20, [])


class Outage(Silent):
    """Stops the server after one step and starts it after another, when what is due by then has failed."""

    def __init__(self, server: s3.Server, run: str, stop: int, start: int) -> None:
        self._server, self._run, self._stop, self._start = server, run, stop, start
        self.failed: list[int] = []
        self.over: list[int] = []
        self.warnings: list[tuple[int, str]] = []
        self.metrics: dict[str, list[float]] = {}

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note the steps of checkpoints whose last attempt failed, and of uploads that are over."""
        write, upload = checkpoint.write, Uploader._upload

        def noted(run_uri: str, step: int, *arguments: Any, **options: Any) -> str:
            try:
                return write(run_uri, step, *arguments, **options)
            except storage.StorageError:
                self.failed.append(step)
                raise

        def whole(uploads: Uploader, snapshot: Snapshot) -> None:
            upload(uploads, snapshot)
            self.over.append(snapshot.step)

        monkeypatch.setattr(checkpoint, "write", noted)
        monkeypatch.setattr(Uploader, "_upload", whole)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)
        last = step - step % 5
        if step == self._stop:
            self._arrived(last)
            self._server.stop()
        if step in (self._stop + 4, self._start):
            wait_for(lambda: last in self.failed and last in self.over)
        if step == self._start:
            self._server.start()
        if step == self._start + 4:
            self._arrived(last)

    def _arrived(self, step: int) -> None:
        """Wait until the checkpoint of a step is committed, and what came of it will be told."""
        wait_for(lambda: step in self.over)
        assert step in map(checkpoint.step_of, checkpoint.committed(self._run))

    def warning(self, monitor: str, step: int, message: str) -> None:
        self.warnings.append((step, message))


def test_training_goes_on_while_the_server_is_away(
    proxy: s3.Proxy, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe(recipe_file, steps=40)
    content = content.model_copy(update={"storage": content.storage.model_copy(update={"retry_seconds": 0.2})})
    sink = Outage(proxy, f"{STORE}/away", 12, 33)
    sink.watch(monkeypatch)
    outcome = train(content, RunInfo(f"{STORE}/away"), sink=sink)
    assert outcome["steps"] == 40
    ((step, message),) = sink.warnings
    assert step == 15
    assert "the checkpoint of step 15 was not written" in message
    assert "training goes on, the next one tries again" in message
    assert "step-00000010" in message
    failed, written = sink.metrics["checkpoint/failed_step"], sink.metrics["checkpoint/committed_step"]
    assert failed[0] == 15
    assert failed[-1] == 30
    assert failed == sorted(failed)
    assert written[-1] == 35, "a checkpoint after the outage"
    assert [w["message"] for w in outcome["warnings"]] == [message]
    saved, _ = checkpoint.load_latest(f"{STORE}/away")
    assert saved is not None
    assert saved.trainer["step"] == 40


@pytest.mark.parametrize(("fault", "has"), [(None, True), ("unconditional", False), ("deaf", False)])
def test_the_doctor_asks_the_store_itself_for_a_conditional_write(
    proxy: s3.Proxy, fault: str | None, has: bool
) -> None:
    storage.write(f"{STORE}/probe", b"one")
    if fault is not None:
        proxy.faults({"kind": fault, "times": 9})
    assert storage.refuses_overwriting(f"{STORE}/probe", b"two") is has
    assert storage.read(f"{STORE}/probe") == (b"two" if fault == "deaf" else b"one")


def test_an_end_that_cannot_be_stored_is_kept_here(
    proxy: s3.Proxy, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    proxy.faults({"kind": "status", "status": 503, "match": "step-00000020", "times": 10**6})
    assert main(["train", str(recipe_file)]) == 1
    uri = folder()
    message = " ".join(capfd.readouterr().err.split())
    kept = tmp_path / "state/hyperlora" / uri.rsplit("/", 1)[1]
    assert f"a local copy of checkpoint and adapter is kept in {kept}" in message
    # Of the checkpoints before it some may have been left out: one that waits gives way to a newer one.
    assert f"the newest checkpoint in the store: {checkpoint.committed(uri)[-1]}" in message
    assert runs.result(uri) is None
    saved, _ = checkpoint.load_latest(str(kept))
    assert saved is not None
    assert saved.trainer["step"] == 20
    assert (kept / "adapter/adapter_model.safetensors").is_file()
    # The store is back: what was kept can be put there, and the run ends from it.
    proxy.faults()
    (local,) = (kept / "checkpoints").iterdir()
    newest = checkpoint.committed(uri)[-1]
    number = newest.rsplit("/", 1)[1].split("-")[2]
    for file in local.iterdir():
        storage.write(f"{uri}/checkpoints/step-00000020-{number}-abcdef/{file.name}", file.read_bytes())
    resumed = run(recipe_file, "--resume")
    theirs = load(storage.read(f"{resumed['adapter']}/adapter_model.safetensors"))
    ours = load((kept / "adapter/adapter_model.safetensors").read_bytes())
    assert all(theirs[name].equal(tensor) for name, tensor in ours.items())


def test_a_second_command_on_the_same_run_is_refused(
    proxy: s3.Proxy, recipe_file: Path, capfd: pytest.CaptureFixture
) -> None:
    proxy.faults({"kind": "slow", "seconds": 600, "match": "step-00000005", "method": "PUT"})
    first = process(recipe_file)
    try:
        wait_for(lambda: proxy.happened(), first)
        assert main(["train", str(recipe_file), "--resume"]) == 2
        assert "belongs to a command that is running" in " ".join(capfd.readouterr().err.split())
    finally:
        kill(first)


class TakenOver(Silent):
    """Somebody else claims the run after a step, once a checkpoint of it is committed."""

    def __init__(self, uri: str, step: int) -> None:
        self._uri, self._step = uri, step

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if step == self._step:
            wait_for(lambda: checkpoint.committed(self._uri))
            number = max(ownership.number(name) for name in ownership._claims(self._uri)) + 1
            storage.write(f"{self._uri}/owners/{number:08d}-00c0ffee.json", storage.pack_json({"released": False}))


@pytest.mark.usefixtures("proxy")
def test_whoever_was_replaced_commits_nothing_more(recipe_file: Path) -> None:
    uri = f"{STORE}/fenced"
    with pytest.raises(ReplacedError, match="taken over by another process"):
        train(recipe(recipe_file, steps=200), RunInfo(uri), sink=TakenOver(uri, 8))
    assert [u.rsplit("/", 1)[1].split("-")[1] for u in checkpoint.committed(uri)] == ["00000005"]
    assert runs.result(uri) is None


@pytest.mark.usefixtures("proxy")
def test_data_baseline_and_export_are_uris_too(recipe_file: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"label": "ab"[n % 2], "sentence": f"row {n}"}) + "\n" for n in range(16))
    storage.write("s3://bucket/data/rows.jsonl", rows.encode())
    storage.write("s3://bucket/baseline.json", json.dumps([3.0 - n / 10 for n in range(20)]).encode())
    changes = ["data.source=files", "data.root=s3://bucket/data", "data.train=rows.jsonl", "data.eval=rows.jsonl"]
    changes += ["task.kind=classification", "adapter.modules_to_save=[score]", "training.steps=8"]
    result = run(recipe_file, *changes, "monitors.baseline=s3://bucket/baseline.json")
    source = result["adapter"].removesuffix("/adapter")
    assert main(["export", source, "s3://bucket/exported"]) == 0
    assert main(["export", source, str(tmp_path / "exported")]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert storage.read(f"s3://bucket/exported/{name}") == (tmp_path / "exported" / name).read_bytes()
    assert main(["export", source, "s3://bucket/exported"]) == 2


def test_what_is_wrong_with_a_store_is_told_before_training(
    proxy: s3.Proxy, recipe_file: Path, capfd: pytest.CaptureFixture
) -> None:
    def refused(*changes: str) -> str:
        assert main(["train", str(recipe_file), *changes]) == 2
        return " ".join(capfd.readouterr().err.split())

    assert "s3://none/runs" in refused("storage.uri=s3://none/runs")
    message = refused("storage.uri=s3://key:topsecret@bucket/runs", "data.source=files", "data.root=gs://bucket/x")
    assert "storage.uri" in message
    assert "without credentials" in message
    assert "topsecret" not in message
    assert "data.root: got 'gs://bucket/x'; gs:// needs the package gcsfs: pip install 'hyperadalora[gs]'" in message
    proxy.stop()
    assert "storage.uri: got 's3://bucket/runs'; a writable folder or URI" in refused()


@pytest.mark.usefixtures("proxy")
def test_sigterm_saves_within_a_step_and_the_run_resumes_to_the_same_adapter(recipe_file: Path) -> None:
    changes = ("training.steps=160", "training.checkpoint_every=90", "training.eval_every=7")
    whole = run(recipe_file, *changes)
    expected = adapter(whole)
    storage.remove_tree(STORE)
    running = process(recipe_file, *changes)
    wait_for(lambda: storage.glob(STORE, "*/checkpoints/*/COMMIT"), running)
    os.kill(running.pid, signal.SIGTERM)
    _, message = running.communicate(timeout=300)
    assert running.returncode == 128 + signal.SIGTERM, message
    newest = checkpoint.load(checkpoint.committed(folder())[-1])
    step = newest.trainer["step"]
    assert f"told to stop after step {step} of 160; the last checkpoint is {newest.uri}" in " ".join(message.split())
    assert len(newest.trainer["losses"]) == step
    assert step > 90, "not the one that was due anyway"
    resumed = run(recipe_file, *changes, "--resume")
    assert adapter(resumed) == expected
    one, two = (json.loads(storage.read(f"{folder()}/result.json")), whole)
    assert one["losses"][-1] == two["loss_last"]
    assert [e["step"] for e in one["evaluations"]] == [0, *range(7, 160, 7), 160]


@pytest.mark.usefixtures("proxy")
def test_two_ray_workers_write_what_one_process_writes(recipe_file: Path) -> None:
    alone = run(recipe_file)
    two = run(recipe_file, "ray.backend=ray", "ray.num_workers=2")
    assert two["ranks"] == alone["ranks"]
    assert two["loss_last"] == pytest.approx(alone["loss_last"], abs=1e-6)
    uri = two["adapter"].removesuffix("/adapter")
    assert checkpoint.load(two["checkpoint"]).trainer["step"] == 20
    assert not storage.tree(f"{uri}/ray"), "Ray's own records are gone"


def test_two_leases_on_a_store(proxy: s3.Proxy) -> None:
    with Lease(f"{STORE}/x") as lease:
        proxy.faults({"kind": "status", "status": 503, "times": 2})
        ownership.check(f"{STORE}/x", lease.owner)
        with pytest.raises(ownership.OwnedElsewhereError):
            Lease(f"{STORE}/x")
