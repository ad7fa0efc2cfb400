"""A real MLflow server that goes away and comes back: every metric once, in order, in one run."""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError
from mlflow import MlflowClient
from tracking_server import Server

from hyperlora import spool, tracking
from hyperlora.config import MLflowConfig, Recipe
from hyperlora.ownership import Lease
from hyperlora.tracking import MLflowSink
from pipelines import screens
from pipelines.cli import main


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def server(one_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server that runs and has no run."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    one_server.start()
    client = MlflowClient(one_server.uri)
    for run in client.search_runs(["0"]):
        client.delete_run(run.info.run_id)
    return one_server


def history(server: Server, run_id: str, key: str) -> list[tuple[int, float]]:
    """Steps and values of a metric in the order of their times."""
    found = MlflowClient(server.uri).get_metric_history(run_id, key)
    return [(m.step, m.value) for m in sorted(found, key=lambda m: (m.timestamp, m.step))]


def report(sink: MLflowSink, first: int, last: int) -> None:
    for step in range(first, last + 1):
        sink.step(step, {"loss": 1 / step, "grad_norm": float(step)})
        if step % 5 == 0:
            sink.evaluation(step, {"held_out_loss": 2 / step})


def test_metrics_outlive_the_server_and_the_process(server: Server) -> None:
    client = MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    sink = MLflowSink(server.uri, run_id, interval=0.05)
    report(sink, 1, 5)
    sink.flush()()
    assert history(server, run_id, "loss") == [(n, 1 / n) for n in range(1, 6)]
    server.stop()
    report(sink, 6, 10)
    sink.warning("gradient", 9, "it explodes")
    sink.close()
    (waiting,) = spool.folder().glob("*.jsonl")
    assert len(waiting.read_text().splitlines()) == 1 + 7, "where they go, and what"
    # Another process goes on from a checkpoint of step 7 while the server is still away.
    again = MLflowSink(server.uri, run_id, interval=0.05)
    report(again, 8, 12)
    server.start()
    again.close()
    assert history(server, run_id, "loss") == [(n, 1 / n) for n in range(1, 13)]
    assert history(server, run_id, "grad_norm") == [(n, float(n)) for n in range(1, 13)]
    assert history(server, run_id, "held_out_loss") == [(5, 2 / 5), (10, 2 / 10)]
    assert client.get_run(run_id).data.tags["hyperlora.warning.gradient"] == "step 9: it explodes"
    assert not list(spool.folder().iterdir())


def test_a_process_without_the_queue_adds_nothing_twice(server: Server) -> None:
    run_id = MlflowClient(server.uri).create_run("0").info.run_id
    for first, last in ((1, 6), (4, 9)):
        sink = MLflowSink(server.uri, run_id, interval=0.05)
        report(sink, first, last)
        sink.close()
    assert history(server, run_id, "loss") == [(n, 1 / n) for n in range(1, 10)]


def test_metrics_of_a_process_that_was_killed_reach_a_run_that_finished_elsewhere(
    server: Server, capsys: pytest.CaptureFixture
) -> None:
    client = MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    sink = MLflowSink(server.uri, run_id, interval=0.05)
    report(sink, 1, 5)
    sink.flush()()
    server.stop()
    report(sink, 6, 9)
    assert main(["deliver"]) == 0
    assert f"{run_id} has metrics waiting" in " ".join(capsys.readouterr().out.split()), "its process lives"
    waiting = spool.folder() / f"mlflow-{run_id}.jsonl"
    left = waiting.read_bytes()
    sink.close()
    for path in spool.folder().iterdir():
        path.unlink()
    server.start()
    elsewhere = MLflowSink(server.uri, run_id, interval=0.05)  # from a checkpoint of step 7, to the end
    report(elsewhere, 8, 12)
    elsewhere.close()
    client.set_terminated(run_id)
    waiting.write_bytes(left)
    assert main(["deliver"]) == 0
    assert f"{run_id} in {server.uri}: delivered" in " ".join(capsys.readouterr().out.split())
    assert history(server, run_id, "loss") == [(n, 1 / n) for n in range(1, 13)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not list(spool.folder().iterdir())


def test_a_run_that_was_deleted_on_the_server_is_not_taken_for_an_outage(
    server: Server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    client = MlflowClient(server.uri)
    run_id = client.create_run("0").info.run_id
    sink = MLflowSink(server.uri, run_id, interval=0.05)
    report(sink, 1, 2)
    sink.flush()()
    client.delete_run(run_id)
    report(sink, 3, 4)
    sink.close()
    assert f"MLflow run {run_id} is no longer there" in caplog.text
    assert "MLflow is away" not in caplog.text
    assert main(["deliver"]) == 1
    assert "it was deleted there" in " ".join(capsys.readouterr().out.split())
    client.restore_run(run_id)
    assert main(["deliver"]) == 0
    assert history(server, run_id, "loss") == [(n, 1 / n) for n in range(1, 5)]


def test_a_record_that_the_server_refuses_does_not_hold_up_the_others(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = MlflowClient(server.uri).create_run("0").info.run_id
    sink = MLflowSink(server.uri, run_id, interval=60)
    for step in range(1, 9):
        sink.step(step, {"loss": 1 / step} | ({"no: such; name": 1.0} if step in (3, 6) else {}))
    sink.close()
    assert history(server, run_id, "loss") == [(n, 1 / n) for n in range(1, 9) if n not in (3, 6)]
    assert caplog.text.count("goes on without what it refuses") == 1
    assert not list(spool.folder().iterdir())


def command(recipe_file: Path, server: Server, *more: str) -> list[str]:
    changes = ["mlflow.enabled=true", f"mlflow.tracking_uri={server.uri}", "mlflow.experiment=Default"]
    return ["train", str(recipe_file), *changes, "training.steps=200", "training.checkpoint_every=50", *more]


def stop_once_a_loss_is_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> threading.Thread:
    """Stops the server in the middle of a run, which waits for that; the thread ends when it is stopped."""
    client = MlflowClient(server.uri)

    def interrupt() -> None:
        while not client.search_runs(["0"], "metrics.loss > 0"):
            time.sleep(0.05)
        server.stop()

    thread = threading.Thread(target=interrupt)
    step = MLflowSink.step

    def waiting(sink: MLflowSink, number: int, metrics: dict[str, float]) -> None:
        if number == 100:
            thread.join(120)
        step(sink, number, metrics)

    monkeypatch.setattr(MLflowSink, "step", waiting)
    thread.start()
    return thread


def gone(*arguments: object) -> None:
    raise NoCredentialsError  # of the store that a server has its clients write to


@pytest.mark.parametrize("how", ["deliver", "train"])
def test_what_a_run_that_has_ended_could_not_send_is_sent_later(
    recipe_file: Path,
    tmp_path: Path,
    server: Server,
    how: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread, summary = stop_once_a_loss_is_there(server, monkeypatch), tmp_path / "summary.json"
    assert main(command(recipe_file, server, "--json", str(summary))) == 0
    thread.join()
    assert "MLflow was away; hyperlora deliver sends what it missed" in " ".join(capsys.readouterr().out.split())
    outcome = json.loads(summary.read_text())
    run_id, result = outcome["mlflow_run_id"], Path(outcome["adapter"]).parent / "result.json"
    losses = json.loads(result.read_text())["losses"]
    assert main(["deliver"]) == 1, "it is still away"
    assert run_id in capsys.readouterr().out
    server.start()
    client = MlflowClient(server.uri)
    assert client.get_run(run_id).info.status == "RUNNING"
    assert 0 < len(history(server, run_id, "loss")) < len(losses)
    if how == "deliver":
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_figure", gone)
            assert main(["deliver"]) == 1
        assert "still waits: Unable to locate credentials" in capsys.readouterr().out
        assert main(["deliver"]) == 0
        assert "delivered" in capsys.readouterr().out
    else:
        assert main(command(recipe_file, server, "training.steps=20", "training.checkpoint_every=5")) == 0
        assert f"MLflow run {run_id} has got what it missed" in " ".join(capsys.readouterr().out.split())
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert history(server, run_id, "loss") == list(enumerate(losses, 1))
    assert [value for _, value in history(server, run_id, "summary/metric_after")] == [outcome["metric_after"]]
    assert {"loss_curve.png", "rank_heat_map.png", "result.json"} <= {a.path for a in client.list_artifacts(run_id)}
    assert main(["deliver"]) == 0
    assert "nothing waits" in capsys.readouterr().out
    assert not list(spool.folder().glob("mlflow-*"))


def test_metrics_of_a_driver_that_was_killed_are_not_passed_over(capsys: pytest.CaptureFixture) -> None:
    waiting = spool.Spool(spool.folder() / "mlflow-killed.jsonl")
    waiting.add({"kind": "step", "step": 1})
    try:
        assert main(["deliver"]) == 0
        assert "MLflow run killed has metrics waiting" in " ".join(capsys.readouterr().out.split())
    finally:
        waiting.remove(1)


def test_training_goes_on_while_the_server_is_away(
    recipe_file: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = stop_once_a_loss_is_there(server, monkeypatch)

    def bring_back() -> None:
        stopped.join()
        time.sleep(3)
        server.start()

    thread = threading.Thread(target=bring_back)
    thread.start()
    summary = tmp_path / "summary.json"
    assert main(command(recipe_file, server, "--json", str(summary))) == 0
    thread.join()
    outcome = json.loads(summary.read_text())
    run_id, (run,) = outcome["mlflow_run_id"], (tmp_path / "runs").iterdir()
    # What the end of the training could not deliver waits for the next process.
    MLflowSink(server.uri, run_id).close()
    losses = json.loads((run / "result.json").read_text())["losses"]
    assert history(server, run_id, "loss") == list(enumerate(losses, 1))


def test_an_experiment_that_another_run_makes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MLflowConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="new")
    client, looked, look = MlflowClient(config.tracking_uri), [], MlflowClient.get_experiment_by_name
    made = client.create_experiment("new")

    def late(asked: MlflowClient, name: str) -> object:
        looked.append(name)
        return None if len(looked) == 1 else look(asked, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    assert tracking.experiment(client, config) == made
    assert looked == ["new", "new"]


def interrupt(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


@pytest.mark.parametrize(("where", "killed"), [("close", False), ("log_figure", False), ("log_figure", True)])
def test_a_run_that_is_interrupted_after_its_end_is_a_finished_one(
    recipe_file: Path,
    tmp_path: Path,
    where: str,
    killed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    words = ["train", str(recipe_file), "mlflow.enabled=true"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit none
    with monkeypatch.context() as patch:
        patch.setattr(MLflowSink if where == "close" else MlflowClient, where, interrupt)
        assert main(words) == 128 + signal.SIGINT
    signal.signal(signal.SIGINT, before)
    (folder,) = (tmp_path / "runs").iterdir()
    run = screens.local(str(folder))
    told = f"the run in {run} is finished; hyperlora deliver sends what MLflow does not know of it yet"
    assert told in " ".join(capfd.readouterr().out.split())
    run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    if killed:
        kept = spool.folder() / f"mlflow-{run_id}.json"
        kept.unlink()  # SIGKILL leaves none
        with Lease(str(folder)):
            assert main([*words, "--resume"]) == 2
        assert not kept.exists(), "the process that has the run is at work on it"
        capfd.readouterr()
        assert main([*words, "--resume"]) == 2
        shown = capfd.readouterr()
        assert told in " ".join(shown.out.split())
        assert "this run is finished" in " ".join(shown.err.split())
    assert main(["deliver"]) == 0
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run, result = client.get_run(run_id), json.loads((folder / "result.json").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.metrics["summary/loss_last"] == result["loss_last"]
    assert [m.value for m in client.get_metric_history(run_id, "loss")] == result["losses"]
    assert {"loss_curve.png", "rank_heat_map.png", "result.json"} <= {a.path for a in client.list_artifacts(run_id)}
    capfd.readouterr()
    assert main([*words, "--resume"]) == 2
    assert "hyperlora deliver" not in capfd.readouterr().out
    assert not list(spool.folder().glob("mlflow-*"))


def test_the_driver_tells_what_a_worker_could_not_deliver(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    client, start = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}"), tracking.start

    def gone(recipe: Recipe, *arguments: object) -> str:
        run_id = start(recipe, *arguments)  # type: ignore[arg-type]
        client.delete_run(run_id)
        return run_id

    monkeypatch.setattr(tracking, "start", gone)
    summary = tmp_path / "summary.json"
    assert main(["train", str(recipe_file), "mlflow.enabled=true", "ray.backend=ray", "--json", str(summary)]) == 0
    run_id = json.loads(summary.read_text())["mlflow_run_id"]
    told = " ".join(capsys.readouterr().out.split())
    kept = f"records of MLflow run {run_id} wait on {platform.node()} in {spool.folder()}/mlflow-{run_id}.jsonl"
    assert f"warning (mlflow): 22 {kept}; run `hyperlora deliver` there, once it reaches sqlite:" in told
    client.restore_run(run_id)
    assert main(["deliver"]) == 0
    assert "delivered what this machine kept" in " ".join(capsys.readouterr().out.split())
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == list(range(1, 21))
