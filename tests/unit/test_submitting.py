"""What is checked before a job is sent."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import dashboard
import pytest
from nodes import wait_until
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.exceptions import GetTimeoutError, RayError
from ray.job_submission import JobDetails, JobStatus, JobType
from ray.runtime_env import RuntimeEnv
from rich.console import Console

from hyperlora import autoscaling, capacity, distributed, jobs, tokens
from hyperlora.capacity import Node
from hyperlora.config import RecipeError
from hyperlora.diagnosis import Check
from hyperlora.environment import GIVEN
from pipelines import doctor, submit, train
from pipelines.cli import main, parse_arguments
from pipelines.common import command_line, load_recipe, shipped

THERE = ["storage.uri=s3://bucket/runs", "mlflow.tracking_uri=http://mlflow:5000"]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_shipped_recipes_can_be_sent(name: str) -> None:
    recipe = load_recipe(name, THERE)
    files = ["data.root=s3://bucket/data"] if recipe.data.source == "files" else []
    assert submit.unreachable(load_recipe(name, [*THERE, *files])) == []


def test_relative_places_are_refused() -> None:
    places = {"data.root": "data", "data.source": "files", "monitors.baseline": "a.json"}
    recipe = load_recipe(
        "quickstart", [*THERE, *(f"{k}={v}" for k, v in places.items()), "data.train=a", "data.eval=b"]
    )
    assert {p.field for p in submit.unreachable(recipe)} == {"data.root", "monitors.baseline"}


def sent(*words: str) -> Any:
    """What ``hyperlora submit`` makes of a job's words."""
    args = Namespace(words=list(words), env=[], address="http://head:8265", install=False, verbose=False)
    return submit._job(args, parse_arguments(words))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages beside each other, as in a clone of the repository, and an empty folder ``packed``."""
    for name in jobs.PACKAGES:
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep/code.py").write_text("x = 1\n")
    (tmp_path / "packed").mkdir()
    monkeypatch.setattr(jobs.resources, "files", lambda name: tmp_path / name)
    return tmp_path


def packed(checkout: Path, **files: Path) -> set[str]:
    """What travels of a checkout, beside the code that always does."""
    size = jobs.pack(jobs.Job(["train"], files), checkout / "packed")
    found = [p for p in (checkout / "packed").rglob("*") if p.is_file()]
    assert size == sum(p.stat().st_size for p in found)
    names = {p.relative_to(checkout / "packed").as_posix() for p in found}
    always = {f"{name}/deep/code.py" for name in jobs.PACKAGES}
    assert always <= names
    return names - always


def test_what_a_checkout_ignores_does_not_travel(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".gitignore").write_text("*.bin\n!kept.bin\n/hyperlora/build/\n/deep\nmine.yaml\n")
    (checkout / ".rayignore").write_text("secret*\n")
    (checkout / "hyperlora/build").mkdir()
    for name in ("a.bin", "kept.bin", "build/b.py", "deep/secret.py", "c.py", ".hidden"):
        (checkout / "hyperlora" / name).write_text("x")
    with (checkout / "hyperlora/large.bin").open("wb") as file:
        file.truncate(jobs.LARGEST)  # nor does it count
    (checkout / "mine.yaml").write_text("name: mine\n")
    expected = {"hyperlora/kept.bin", "hyperlora/c.py", "mine.yaml"}
    assert packed(checkout, **{"mine.yaml": checkout / "mine.yaml"}) == expected, "the file that a command names goes"

    # Ray's own switch, for one who needs what git is not to have.
    (checkout / "hyperlora/large.bin").unlink()
    shutil.rmtree(checkout / "packed")
    (checkout / "packed").mkdir()
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert packed(checkout) == expected - {"mine.yaml"} | {"hyperlora/a.bin", "hyperlora/build/b.py"}


@pytest.mark.parametrize("more", [0, 1])
def test_a_working_directory_has_a_largest_size(checkout: Path, more: int) -> None:
    code = sum(p.stat().st_size for p in checkout.rglob("*") if p.is_file())
    assert jobs.LARGEST == 64 * 2**20
    with (checkout / "large.py").open("wb") as file:
        file.truncate(jobs.LARGEST - code + more)
    if not more:
        assert packed(checkout, **{"space.py": checkout / "large.py"}) == {"space.py"}
        return
    with pytest.raises(RecipeError, match=r"files of the job: got '64 MiB \(.*/large\.py\)'; at most 64 MiB"):
        packed(checkout, **{"space.py": checkout / "large.py"})


@pytest.mark.parametrize("install", [[], ["--install"]])
def test_what_is_installed_here_travels_as_pinned_requirements(
    install: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    class Client:
        def submit_job(self, **options: Any) -> None:
            # As Ray checks it; the working directory is gone afterwards.
            sent.append(options | {"runtime_env": RuntimeEnv(**options["runtime_env"]).to_dict()})
            assert (Path(options["runtime_env"]["working_dir"]) / "pipelines/cli.py").is_file()

    monkeypatch.setattr(jobs, "connect", lambda address: Client())
    monkeypatch.setattr(jobs, "nodes", lambda address: [Node({"CPU": 8})])
    monkeypatch.setattr(tokens, "use", lambda: None)
    monkeypatch.setattr(tokens, "warning", lambda address: None)
    command = ["submit", "train", "quickstart", *THERE, "--address", "http://head:8265", "--no-follow"]
    assert main([*command, *install]) == 0
    (job,) = sent
    assert job["entrypoint"].startswith("python -m pipelines.cli train quickstart ")
    assert "--install" not in job["entrypoint"]
    if not install:
        assert "pip" not in job["runtime_env"]
        return
    packages = job["runtime_env"]["pip"]["packages"]
    assert packages == jobs.pinned()
    assert all(re.fullmatch(r"[a-z0-9-]+(\[[a-z0-9,_-]+\])?==[^+\s]+", package) for package in packages)
    versions = {p.partition("==")[0].partition("[")[0]: p.partition("==")[2] for p in packages}
    for name in ("torch", "transformers", "peft", "ray", "mlflow", "datasets"):
        assert versions[name] == jobs.metadata.version(name).partition("+")[0]


def test_variables_travel_as_a_file_that_command_and_workers_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray logs those of a runtime environment, and tells them to whoever asks for the job."""
    monkeypatch.setenv("STORE_KEY", "top secret €")
    job = jobs.Job(["train"], {}, env=["STORE_KEY"])
    jobs.pack(job, tmp_path)
    runtime = jobs._runtime(job, tmp_path)
    assert "secret" not in str(runtime)
    given = tmp_path / GIVEN
    assert json.loads(given.read_text(encoding="utf-8")) == {"STORE_KEY": "top secret €"}
    assert given.stat().st_mode & 0o777 == 0o600
    monkeypatch.delenv("STORE_KEY")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module, _, hook = runtime["worker_process_setup_hook"].rpartition(".")
    main = "from contextlib import suppress\nfrom pipelines.cli import main\nwith suppress(SystemExit): main(['-h'])"
    for code in (main, f"from {module} import {hook}\n{hook}()"):
        code += "\nimport os; print(ascii(os.environ['STORE_KEY']))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.endswith(ascii("top secret €") + "\n"), done


def test_a_job_without_variables_has_no_such_file(tmp_path: Path) -> None:
    job = jobs.Job(["train"], {})
    jobs.pack(job, tmp_path)
    assert not (tmp_path / GIVEN).exists()
    assert "worker_process_setup_hook" not in jobs._runtime(job, tmp_path)


@pytest.mark.parametrize("out", [None, "here", "s3://bucket/out", "/shared/out"])
def test_a_search_needs_a_folder_that_all_nodes_share(out: str | None) -> None:
    words = ["tune", "quickstart", *THERE, *([] if out is None else ["--out", out])]
    if out == "here":
        with pytest.raises(RecipeError, match="--out: got 'here'; an absolute path that every node shares"):
            sent(*words)
    else:  # without it, below storage.uri
        assert sent(*words)[1].words[:2] == ["tune", "quickstart"]


@pytest.mark.parametrize(
    ("command", "option", "workers"),
    [
        ("train", [], 2),
        ("tune", ["--workers", "4"], 4),
        ("tune", ["--concurrency", "3"], 1),
        ("study", ["--concurrency", "3"], 3),
        ("compare", ["--concurrency", "3"], 3),
    ],
)
def test_the_cluster_has_to_hold_what_is_at_work_at_a_time(command: str, option: list[str], workers: int) -> None:
    assert sent(command, "quickstart", *THERE, *option)[0].num_workers == workers


@pytest.mark.parametrize("placement", ["STRICT_PACK", "STRICT_SPREAD"])
@pytest.mark.parametrize("command", ["train", "tune", "study", "compare"])
def test_where_workers_have_to_be_is_nothing_to_trials_of_one_process(command: str, placement: str) -> None:
    """Two trials at a time, on one node and on nodes of which none holds two."""
    nodes = [Node({"CPU": 2})] if placement == "STRICT_SPREAD" else [Node({"CPU": 1}), Node({"CPU": 1})]
    words = ["quickstart", *THERE, f"ray.placement={placement}", *(["--workers", "2"] if command == "tune" else [])]
    found = capacity.problems(sent(command, *words)[0], nodes)
    assert [p.field for p in found] == (["ray.placement"] if command in ("train", "tune") else [])


@pytest.mark.parametrize(
    ("command", "refused"), [("train", True), ("tune --workers 2", True), ("tune", False), ("study", False)]
)
def test_workers_of_one_run_do_not_share_a_gpu_and_trials_may(command: str, refused: bool) -> None:
    name, *more = command.split()
    words = [name, "quickstart", *THERE, "ray.num_workers=2", "ray.gpus_per_worker=0.25", *more]
    if not refused:
        sent(*words)
        return
    with pytest.raises(RecipeError) as caught:
        sent(*words)
    assert [str(p) for p in caught.value.problems] == [
        "ray.gpus_per_worker: got 0.25; above 0.5 for 2 workers: NCCL refuses two of a run on one GPU"
    ]


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("tune", ["--trials", "0", "--sampler", "x"], ["--trials", "--sampler"]),
        ("study", ["--space", "x", "--design", "x"], ["--space", "--design"]),
        ("compare", ["--lrs", "x", "--field", "x"], ["--lrs", "--field"]),
    ],
)
def test_a_search_is_refused_here_with_all_that_is_wrong_with_it(
    command: str, options: list[str], named: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        sent(command, "quickstart", *THERE, "gamma=-1", *options)
    assert sorted(p.field for p in caught.value.problems) == sorted(["gamma", *named])


def test_following_ends_when_the_cluster_answers_errors_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(address: str) -> Any:
        raise RuntimeError("Request failed with status code 500: job 404 is odd.")

    monkeypatch.setattr(jobs, "connect", broken)
    monkeypatch.setattr(jobs, "RETRY", 0.01)
    monkeypatch.setattr(jobs, "LOST", 0.1)
    told: list[str] = []
    with pytest.raises(RecipeError, match="a cluster that answers"):
        jobs.follow("http://head:8265", "job", lambda text: None, told.append)
    assert len(told) == 1, "said once"


class Shown(list[str]):
    """What was shown."""

    def __call__(self, text: str) -> None:
        self.append(text)


def following(url: str, shown: Shown, lost: Shown) -> Callable[[], JobDetails]:
    """Follow in the background; returns what waits for the end."""
    ends: list[JobDetails] = []
    thread = threading.Thread(target=lambda: ends.append(jobs.follow(url, "job", shown, lost)), daemon=True)
    thread.start()

    def end() -> JobDetails:
        thread.join(30)
        assert ends, "it still follows"
        return ends[0]

    return end


def test_a_job_that_is_silent_for_long_is_followed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is how long the cluster has not answered, not when the job last said something."""
    monkeypatch.setattr(jobs, "RETRY", 0.2)
    monkeypatch.setattr(jobs, "LOST", 0.5)
    with dashboard.running() as there:
        there.text = "one\n"
        shown, lost = Shown(), Shown()
        follower = following(there.url, shown, lost)
        wait_until(lambda: shown == ["one\n"], 20)
        time.sleep(1)
        there.failing = 500
        there.cut()
        wait_until(lambda: lost, 20)
        there.failing = 0
        there.text, there.status = "one\ntwo\n", "SUCCEEDED"
        assert follower().status == JobStatus.SUCCEEDED
    assert "".join(shown) == "one\ntwo\n"
    assert len(lost) == 1


def test_a_connection_that_brings_nothing_more_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a router has forgotten: the job ends, and this end would never hear of it."""
    monkeypatch.setattr(jobs, "QUIET", 0.5)
    monkeypatch.setattr(jobs, "RETRY", 0.2)
    with dashboard.running() as there:
        there.text, there.quiet = "one\n", True
        shown, lost = Shown(), Shown()
        follower = following(there.url, shown, lost)
        wait_until(lambda: shown, 20)
        there.text, there.status = "one\ntwo\n", "FAILED"
        assert follower().status == JobStatus.FAILED
    assert "".join(shown) == "one\ntwo\n"
    assert not lost, "nothing was lost"


def test_a_job_is_followed_where_no_websocket_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind many proxies: its output is asked for again and again."""
    monkeypatch.setattr(jobs, "RETRY", 0.2)
    with dashboard.running() as there:
        there.text, there.sockets = "one\n", False
        shown, lost = Shown(), Shown()
        follower = following(there.url, shown, lost)
        wait_until(lambda: shown == ["one\n"], 20)
        there.text = "one\ntwo\n"
        wait_until(lambda: shown == ["one\n", "two\n"], 20)
        there.text, there.status = "one\ntwo\nthree\n", "SUCCEEDED"
        assert follower().status == JobStatus.SUCCEEDED
    assert shown == ["one\n", "two\n", "three\n"]
    assert not lost, "nothing was lost"


@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_following_ends_where_only_the_output_cannot_be_had(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RETRY", 0.05)
    monkeypatch.setattr(jobs, "LOST", 0.5)
    shown, lost = Shown(), Shown()
    with dashboard.running() as there:
        there.hidden, there.status = 500, status
        if status == "RUNNING":
            with pytest.raises(RecipeError, match=r"a cluster that answers; .* the log is gone"):
                jobs.follow(there.url, "job", shown, lost)
        else:
            assert jobs.follow(there.url, "job", shown, lost).status == JobStatus.FAILED
    (told,) = lost
    assert "the log is gone" in told
    assert ("the job goes on" in told) == (status == "RUNNING")
    assert not shown


def test_a_follower_ends_when_it_is_told_to() -> None:
    with dashboard.running() as there:
        there.text = "one\n"
        command = [sys.executable, "-m", "pipelines.cli", "logs", "job", "--follow", "--address", there.url]
        follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert follower.stdout is not None
        assert follower.stdout.readline() == "one\n"
        follower.terminate()
        said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 143
    assert "the job goes on" in said
    assert "connection lost" not in said


@pytest.mark.parametrize("command", [["logs", "job"], ["logs", "job", "--follow"], ["stop", "job"]])
def test_what_is_no_submitted_job_is_refused(command: list[str], capfd: pytest.CaptureFixture) -> None:
    with dashboard.running() as there:
        there.kind = "DRIVER"
        assert main([*command, "--address", there.url]) == 2
        assert "ID: got 'job'; a job that was submitted; this one is a command" in capfd.readouterr().err
        there.kind, there.failing = "SUBMISSION", 404
        assert main([*command, "--address", there.url]) == 2
        assert "hyperlora jobs lists them" in " ".join(capfd.readouterr().err.split())
        assert not there.stops
        if "--follow" not in command:  # which would wait for it
            there.failing = 500
            assert main([*command, "--address", there.url]) == 1
            assert "the agent is gone" in capfd.readouterr().err


@pytest.mark.parametrize(("ends", "status"), [("STOPPED", 0), ("SUCCEEDED", 0), ("FAILED", 1)])
def test_a_job_that_comes_to_its_end_while_it_is_stopped(ends: str, status: int) -> None:
    with dashboard.running() as there:
        there.status = ends
        assert main(["stop", "job", "--address", there.url]) == status
        assert there.stops == 1


@pytest.mark.parametrize("command", [["logs", "job"], ["logs", "job", "--follow"], ["submit"]])
def test_a_job_whose_output_does_not_say_why_it_failed_is_explained(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its working directory or what it installs could not be prepared, say: there is no output at all."""
    monkeypatch.setattr(jobs, "nodes", lambda address: [Node({"CPU": 8})])
    monkeypatch.setattr(submit, "send", lambda *arguments: ("job", 1))
    summary = tmp_path / "summary.json"
    words = command if command[0] == "logs" else ["submit", "train", "quickstart", *THERE]
    expected = 0 if command == ["logs", "job"] else 1
    reason = "runtime_env setup failed: pip does not know\n  nonsense==1.0"
    with dashboard.running() as there:
        there.status, there.message = "FAILED", f"{reason}\n"
        assert main([*words, "--address", there.url, "--json", str(summary)]) == expected
        assert reason in capfd.readouterr().out
        assert json.loads(summary.read_text())["reason"] == reason
        # Ray has the last lines of the output for a reason as well.
        there.text, there.message, there.exit_code = "no such file\n", "failed with exit code 2:\nno such file", 2
        assert main([*words, "--address", there.url, "--json", str(summary)]) == expected
        assert capfd.readouterr().out.count("no such file") == 1
        assert json.loads(summary.read_text())["reason"] is None
        # What is killed says nothing.
        there.message, there.exit_code = "failed with exit code -9", -9
        assert main([*words, "--address", there.url, "--json", str(summary)]) == expected
        told = "its command was ended by signal 9 (SIGKILL); the head may be out of memory"
        assert told in capfd.readouterr().out
        assert json.loads(summary.read_text())["reason"] == told


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-9, "its command was ended by signal 9 (SIGKILL); the head may be out of memory"),
        (137, "its command was ended by signal 9 (SIGKILL); the head may be out of memory"),
        (139, "its command was ended by signal 11 (SIGSEGV)"),
        (-15, "its command was ended by signal 15 (SIGTERM)"),
        (143, None),
        (255, None),
        (128, None),
        (1, None),
    ],
)
def test_a_command_that_a_signal_has_ended_did_not_say_why(code: int, reason: str | None) -> None:
    told: dict[str, Any] = {"message": f"failed with exit code {code}", "entrypoint": "python"}
    for status, expected in ((JobStatus.FAILED, reason), (JobStatus.STOPPED, None)):
        assert (
            jobs.reason(JobDetails(type=JobType.SUBMISSION, status=status, driver_exit_code=code, **told)) == expected
        )


@pytest.mark.parametrize("command", ["study", "compare", "train"])
@pytest.mark.parametrize("grows", [False, True])
def test_trials_at_a_time_that_a_cluster_does_not_hold_are_named_as_they_are_typed(
    command: str, grows: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Nobody has typed how many workers; a run of two has."""
    labels = {capacity.GROUP: "gpu"} if grows else {}
    growth = capacity.Growth([capacity.Group("gpu", {"CPU": 8, "GPU": 1}, 1)])
    monkeypatch.setattr(jobs, "connect", lambda address: None)
    monkeypatch.setattr(jobs, "nodes", lambda address: [Node({"CPU": 8, "GPU": 1}, labels)])
    monkeypatch.setattr(jobs, "growth", lambda *arguments: growth)
    monkeypatch.setattr(tokens, "warning", lambda address: None)
    words = ["submit", command, "quickstart", *THERE, "ray.num_workers=2", "ray.gpus_per_worker=1"]
    assert main([*words, "--address", "http://head:8265"]) == 2
    told = " ".join(capfd.readouterr().err.split())
    room = f"2 workers need 2 GPUs, the cluster {'can have' if grows else 'has'} 1"
    if command == "train":
        assert f"ray.gpus_per_worker: got 1.0; {room}" in told
    else:
        assert f"--concurrency: got 2; the number of trials at a time, one worker each: {room}" in told


class SmallJob:
    """A cluster's client; what becomes of the job that asks for the autoscaler."""

    def __init__(self, status: JobStatus, message: str, logs: str) -> None:
        self._told = JobDetails(type=JobType.SUBMISSION, status=status, message=message, entrypoint="python")
        self._logs = logs
        self.sent: list[dict[str, Any]] = []
        self.stopped: list[str] = []

    def submit_job(self, **options: Any) -> None:
        self.sent.append(options)

    def get_job_info(self, job: str) -> JobDetails:
        return self._told

    def get_job_logs(self, job: str) -> str:
        return self._logs

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


def test_why_the_small_job_failed_that_asks_for_the_autoscaler(checkout: Path) -> None:
    client: Any = SmallJob(JobStatus.FAILED, "runtime_env setup failed:\nthe disk is full", "")
    with pytest.raises(RecipeError, match="the one that asks for its autoscaler failed: the disk is full"):
        jobs.growth(client, jobs.Job(["train"], {}))
    assert not client.stopped


def test_what_the_small_job_waits_for(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOST", 0.1)
    client: Any = SmallJob(JobStatus.PENDING, "It may be waiting for the runtime environment to be set up.", "")
    with pytest.raises(RecipeError, match="its autoscaler is still pending: It may be waiting for the runtime"):
        jobs.growth(client, jobs.Job(["train"], {}))
    assert client.stopped == [client.sent[0]["submission_id"]]


@pytest.mark.parametrize("install", [False, True])
def test_the_small_job_does_not_install_what_it_does_without(install: bool, checkout: Path) -> None:
    """Else the answer would take minutes, or be given up before."""
    client: Any = SmallJob(JobStatus.SUCCEEDED, "", autoscaling.write(None))
    assert jobs.growth(client, jobs.Job(["train"], {}, install=install)) is None
    (job,) = client.sent
    needs = ["fsspec"] if install else []
    assert [pin.partition("==")[0] for pin in job["runtime_env"].get("pip", [])] == needs
    module = shlex.split(job["entrypoint"])[-1]
    # A head that takes jobs has what ray[default] needs. Ray brings psutil and colorama itself.
    there = {canonicalize_name(name) for name in ("ray", "psutil", "colorama", "hyperadalora", *needs, *of_ray())}
    brought = metadata.packages_distributions()
    lacking = [name for name, of in brought.items() if not there & set(map(canonicalize_name, of))]
    code = f"import sys\nsys.modules.update(dict.fromkeys({lacking}))\nimport {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ("fsspec" in done.stderr) is not install
    assert (done.returncode == 0) is install, done.stderr


def of_ray() -> set[str]:
    """Distributions that ``ray[default]`` needs, and those that these need."""
    found: set[str] = set()
    waiting = [Requirement("ray[default]")]
    while waiting:
        of = waiting.pop()
        for need in map(Requirement, metadata.requires(of.name) or []):
            asked = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *of.extras})
            if asked and need.name not in found:
                found.add(need.name)
                waiting.append(need)
    return found


def test_the_doctor_installs_on_the_nodes_where_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    sent: list[dict[str, Any]] = []

    class Client:
        def submit_job(self, **options: Any) -> None:
            sent.append(options)
            raise RuntimeError("enough")

    monkeypatch.setattr(jobs, "connect", lambda address: Client())
    monkeypatch.setattr(jobs, "nodes", lambda address: [Node({"CPU": 8})])
    monkeypatch.setattr(tokens, "use", lambda: None)
    monkeypatch.setattr(tokens, "warning", lambda address: None)
    monkeypatch.setattr(doctor, "_here", lambda *arguments: iter(()))
    command = ["doctor", "quickstart", *THERE, "--address", "http://head:8265"]
    assert main(command) == main([*command, "--install"]) == 2
    without, with_pip = sent
    assert "pip" not in without["runtime_env"]
    assert with_pip["runtime_env"]["pip"] == jobs.pinned()
    assert [s["entrypoint"].endswith(" --install") for s in sent] == [False, True], "there it waits for that"
    capfd.readouterr()
    assert main(["doctor", "quickstart", "--install"]) == 2
    assert "--install: got True; with --address" in capfd.readouterr().err


def told_inside(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> list[Check]:
    """What the doctor makes of the answers of a cluster's nodes."""
    nodes = [{"NodeManagerAddress": f"10.0.0.{n}", "Resources": {"GPU": 1}} for n in range(len(answers))]
    told = [(node, answer, 0.0, 0.0) for node, answer in zip(nodes, answers, strict=True)]
    monkeypatch.setattr(jobs, "each_node", lambda *arguments, **options: iter(told))
    monkeypatch.setattr(doctor.diagnosis, "store", lambda uri: iter(()))
    monkeypatch.setattr(doctor.diagnosis, "tracking", lambda config: Check("MLflow", "ok", ""))
    monkeypatch.setattr(distributed, "living", lambda: [])
    return list(doctor._inside(load_recipe("quickstart", []), {}, False))


def test_a_node_that_is_slow_is_told_from_one_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    _, slow, broken = told_inside(monkeypatch, GetTimeoutError("Get timed out"), RayError("no module named peft"))
    assert (slow.name, slow.state, slow.found) == ("node 10.0.0.0", "fail", "no answer in 120 s")
    assert "load" in slow.advice
    assert "installed" not in slow.advice
    assert "installed" in broken.advice


@pytest.mark.parametrize("reason", [None, "10.0.0.2: process 1 of 2: unhandled system error"])
def test_the_gpus_of_several_nodes_are_tried_together(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def apart(backend: str, nodes: list[dict[str, Any]]) -> str | None:
        asked.append((backend, [n["NodeManagerAddress"] for n in nodes]))
        return reason

    monkeypatch.setattr(jobs, "apart", apart)
    with_one = {"host": "x", "versions": {}, "gpus": 1, "time": [0.0, 0.0], "checks": []}
    # The last one is another node of the first one's machine, and has its GPUs.
    answers = [with_one, with_one | {"host": "y", "gpus": 0}, with_one | {"host": "z"}, with_one]
    found = {c.name: c for c in told_inside(monkeypatch, *answers)}
    assert asked == [("nccl", ["10.0.0.3", "10.0.0.2"])]
    check = found["GPUs across nodes"]
    assert check.state == ("ok" if reason is None else "fail")
    assert (reason or "joined by NCCL") in check.found
    assert ("NCCL_SOCKET_IFNAME" in check.advice) == (reason is not None)
    assert "GPUs across nodes" not in {c.name for c in told_inside(monkeypatch, with_one, with_one)}, "one machine"


def test_a_job_tells_commands_as_they_were_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, space = tmp_path / "mine.yaml", tmp_path / "space.yaml"
    shutil.copy(shipped()["quickstart"], recipe)
    space.write_text("name: mine\nparameters:\n- {key: gamma, low: 0.1, high: 0.3, levels: 3}\n")
    for command, added in (["train"], 2), (["tune", "--space", str(space), "--out", "s3://bucket/tuned"], 1):
        words = [command[0], str(recipe), "seed=3", *THERE, *command[1:]]
        _, job, _ = sent(*words)
        assert len(job.more) == added
        inside = parse_arguments([*job.words, *job.more])
        options = [o for o in ("space", "out") if command[1:]]
        monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
        assert command_line(inside, *options).startswith(f"hyperlora {command[0]} file0-mine.yaml ")
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        typed = [word.removeprefix(f"{tmp_path}/") for word in words]
        assert command_line(inside, *options) == shlex.join(["hyperlora", "submit", *typed])


@pytest.mark.parametrize("verbose", [[], ["-v"]])
def test_a_verbose_command_has_a_verbose_job(verbose: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def send(client: Any, job: jobs.Job, console: Console) -> None:
        sent.append(job)
        raise RuntimeError("enough")

    monkeypatch.setattr(jobs, "connect", lambda address: None)
    monkeypatch.setattr(jobs, "nodes", lambda address: [Node({"CPU": 8})])
    monkeypatch.setattr(tokens, "warning", lambda address: None)
    monkeypatch.setattr(doctor, "_here", lambda *arguments: iter(()))
    monkeypatch.setattr(submit, "send", send)
    monkeypatch.setattr(doctor, "send", send)
    monkeypatch.setattr("pipelines.cli._quiet", lambda verbose: None)
    to = ["--address", "http://head:8265", *verbose]
    for words in (["submit", "train"], ["submit", "study"], ["doctor"]):
        with pytest.raises(RuntimeError) if verbose else nullcontext():
            main([*words, "quickstart", *THERE, *to])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for job in sent:
        inside = parse_arguments([*job.words, *job.more])
        assert inside.verbose is bool(verbose)
        assert "-v" not in command_line(inside)
    assert len(sent) == 3


@pytest.mark.parametrize("at", ["main", "elsewhere"])
def test_who_sends_mlflow_what_a_job_has_missed(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads it is seldom on the machine that keeps it."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setattr(train.tracking, "finished", lambda *arguments: None)
    monkeypatch.setattr(train.os, "uname", lambda: Namespace(nodename=at))
    output = StringIO()
    recipe = load_recipe("quickstart", THERE)
    train._leave_to_deliver(recipe, "1", "s3://bucket/runs/1", Console(file=output))
    assert "is finished; hyperlora deliver sends what" in output.getvalue()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    train._leave_to_deliver(recipe, "1", "s3://bucket/runs/1", Console(file=output))
    told = f"the next run on this cluster that goes to this server, or hyperlora deliver on {at}, sends what MLflow"
    assert told in output.getvalue()


def test_what_is_not_installed_cannot_say_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise jobs.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(jobs.metadata, "version", version)
    with pytest.raises(RecipeError, match="--install: got 'hyperadalora'; a package that is installed here"):
        jobs.pinned()


def test_the_doctor_reads_what_its_job_has_shown() -> None:
    checks = [
        Check("storage", "ok", "s3://bucket/runs: written and read in 0.1 s"),
        Check("node 1, clock", "warn", "its clock differs by 100 s", "set it: with chrony, say"),
        Check("node 2", "fail", "no module named: peft", "install it there"),
    ]
    output = StringIO()
    console = Console(file=output, width=20)
    for check in checks:
        doctor._show(check, console)
    text = f"INFO job_manager.py: Runtime env: setting up.\nRunning entrypoint: python\n{output.getvalue()}ok then\n"
    assert doctor.shown(text) == checks


def test_a_password_in_the_address_is_refused_and_not_shown(capfd: pytest.CaptureFixture) -> None:
    for command in (["jobs"], ["logs", "job"], ["stop", "job"], ["submit", "train", "quickstart", *THERE]):
        assert main([*command, "--address", "http://me:hunter2@head:8265"]) == 2
        told = "".join(capfd.readouterr())
        assert "--address: got 'http://***@head:8265'" in told
        assert "hunter2" not in told


def test_what_is_typed_counts_more_than_the_cluster_part() -> None:
    part = ["cluster.num_workers=4", "cluster.storage_uri=s3://other/runs"]
    recipe, changes = submit.on_cluster("quickstart", [*THERE, *part, "ray={num_workers: 8}"])
    assert recipe.ray.num_workers == 8
    assert changes == []
    recipe, changes = submit.on_cluster("quickstart", [*part, "ray.cpus_per_worker=2"])
    assert (recipe.ray.num_workers, recipe.storage.uri) == (4, "s3://other/runs")


def test_a_recipe_named_like_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_text("name: x\n")
    words, files = submit.with_files(["train", "train", "--json", "x"], ["train"])
    assert words == ["train", "file0-train", "--json", "x"]
    assert files == {"file0-train": Path("train")}


@pytest.mark.parametrize(
    ("address", "elsewhere"),
    [
        ("http://head:8265", True),
        ("head:6379", True),
        ("ray://10.0.0.1:10001", True),
        ("http://localhost:8265", False),
        ("127.0.0.1:6379", False),
        ("http://[::1]:8265", False),
        ("http://[::1:8265", False),
        ("auto", False),
    ],
)
def test_which_addresses_are_of_another_machine(address: str, elsewhere: bool) -> None:
    assert tokens.elsewhere(address) == elsewhere


@pytest.mark.parametrize("token", ["", "x"])
def test_a_cluster_elsewhere_that_asks_for_no_token_is_warned_of(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever token is known here: Ray makes one for every user of a local cluster."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with dashboard.running() as there:
        assert tokens.warning(there.url) is None, "this machine"
        monkeypatch.setattr(tokens, "elsewhere", lambda address: True)
        told = tokens.warning(there.url)
        assert told is not None
        assert f"{there.url} is another machine and asks for no token" in told
        there.token = "secret"
        assert tokens.warning(there.url) is None
    assert tokens.warning(there.url) is None, "nobody there"
