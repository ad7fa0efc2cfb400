"""What MLflow is told of runs that ended, were killed or went on elsewhere; the database is a real one."""

from __future__ import annotations

import datetime
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from hyperlora import spool, tracking
from hyperlora.config import Recipe, RecipeError
from hyperlora.ownership import ReplacedError
from hyperlora.tracking import Missed, MLflowSink
from pipelines.cli import main
from pipelines.common import load_recipe


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def client(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    yield MlflowClient(uri)
    assert not list(spool.folder().glob("*")), "what was delivered leaves nothing"


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run("0").info.run_id)


def recipe(uri: str) -> Recipe:
    return load_recipe("quickstart", ["mlflow.enabled=true", f"mlflow.tracking_uri={uri}"])


def losses(client: MlflowClient, run_id: str) -> list[tuple[int, float]]:
    """In the order of their times."""
    found = client.get_metric_history(run_id, "loss")
    return [(m.step, m.value) for m in sorted(found, key=lambda m: (m.timestamp, m.step))]


def report(sink: MLflowSink, first: int, last: int) -> None:
    for step in range(first, last + 1):
        sink.step(step, {"loss": 1 / step})


def leave_behind(uri: str, run_id: str, first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on this machine after a process that could not reach MLflow was killed."""
    with monkeypatch.context() as patch:
        patch.setattr(MLflowSink, "_send", lambda sink: None)
        sink = MLflowSink(uri, run_id, interval=60)
        report(sink, first, last)
        assert tracking.undelivered() == [run_id], "it lives"
        assert tracking.missed() == []
        assert main(["deliver"]) == 0
        sink._spool.close()
        sink._closed = True
        sink._wake.set()
        sink._thread.join()


def test_a_file_that_was_begun_and_holds_nothing_is_not_waited_for(
    client: MlflowClient, run_id: str, capsys: pytest.CaptureFixture
) -> None:
    path = tracking._waiting(run_id)
    path.parent.mkdir(parents=True)
    for begun in ("", '{"about": {"track'):
        path.write_text(begun)
        assert main(["deliver"]) == 0
        assert "nothing waits for MLflow on this machine" in capsys.readouterr().out
    path.unlink()


@pytest.mark.parametrize("status", ["FINISHED", None])
def test_what_a_killed_process_left_is_delivered_to_a_run_that_went_on_elsewhere(
    uri: str,
    client: MlflowClient,
    run_id: str,
    status: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    first = MLflowSink(uri, run_id)
    report(first, 1, 5)
    first.close()
    leave_behind(uri, run_id, 6, 9, monkeypatch)
    if status is not None:
        with monkeypatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
            again = MLflowSink(uri, run_id)  # from a checkpoint of step 7
            report(again, 8, 12)
            again.close()
        client.set_terminated(run_id, status)
    assert tracking.missed() == [Missed(run_id, uri)]
    assert tracking.missed("http://elsewhere") == []
    told = " ".join(capsys.readouterr().out.split())
    assert f"{run_id} has metrics waiting, which the command that is at work on it sends" in told
    assert main(["deliver"]) == 0
    assert f"{run_id} in {uri}: delivered" in " ".join(capsys.readouterr().out.split())
    assert losses(client, run_id) == [(n, 1 / n) for n in range(1, 10 if status is None else 13)]
    assert client.get_run(run_id).info.status == (status or "RUNNING")


def test_how_a_process_ended_does_not_count_once_another_has_finished_the_run(
    uri: str, client: MlflowClient, run_id: str
) -> None:
    other = str(client.create_run("0").info.run_id)
    client.set_terminated(run_id, "FINISHED")
    for known in (run_id, other):
        run = Missed(known, uri, None, "KILLED")
        tracking._remember(run)
        tracking.deliver(run, None)
    tracking.fail(recipe(uri), run_id, "FAILED")
    assert [client.get_run(known).info.status for known in (run_id, other)] == ["FINISHED", "KILLED"]


@pytest.mark.parametrize(("error", "status"), [(ReplacedError, "RUNNING"), (RuntimeError, "FAILED")])
def test_a_process_that_was_replaced_does_not_end_the_run(
    uri: str, client: MlflowClient, run_id: str, error: type[Exception], status: str
) -> None:
    try:
        raise error
    except error:
        tracking.fail(recipe(uri), run_id, "FAILED")
    assert client.get_run(run_id).info.status == status


def test_a_run_that_was_deleted_is_not_resumed(uri: str, client: MlflowClient, run_id: str) -> None:
    assert tracking.resume(recipe(uri), run_id)
    client.delete_run(run_id)
    assert not tracking.resume(recipe(uri), run_id)
    assert not tracking.resume(recipe(uri), "0" * 32)


def test_metrics_of_a_run_that_was_deleted_wait_until_it_is_restored(
    uri: str, client: MlflowClient, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    client.delete_run(run_id)
    sink = MLflowSink(uri, run_id, interval=60)
    report(sink, 1, 3)
    sink.close()
    assert f"MLflow run {run_id} is no longer there" in caplog.text
    assert "MLflow is away" not in caplog.text
    (run,) = tracking.missed()
    with pytest.raises(ValueError, match="it was deleted there; restore it"):
        tracking.deliver(run, None)
    client.restore_run(run_id)
    tracking.deliver(run, None)
    assert losses(client, run_id) == [(n, 1 / n) for n in range(1, 4)]


def test_a_record_that_is_refused_does_not_hold_up_the_others(
    uri: str, client: MlflowClient, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MLflowSink(uri, run_id, interval=60)
    for step in range(1, 100):
        sink.step(step, {"loss": 1 / step} | ({"no: such; name": 1.0} if step in (3, 60) else {}))
    sink.close()
    assert losses(client, run_id) == [(n, 1 / n) for n in range(1, 100) if n not in (3, 60)]
    (warning,) = caplog.records
    assert f"MLflow run {run_id} goes on without what it refuses: step 3: " in warning.getMessage()


def test_a_lower_bound_has_no_upper_end(uri: str, client: MlflowClient, run_id: str) -> None:
    known = {"mean": 1.2, "low": 1.1, "high": 1.3, "n": 5}
    ratios = {"steps_to_final_ratio": known | {"reached": 3}, "steps_to_90_ratio": known | {"reached": 5}}
    contestant = {"name": "lora", "summary": {"final_loss": known}, "against_baseline": ratios}
    tracking.finish_comparison(recipe(uri), run_id, {"contestants": [contestant]}, ())
    ends = {"": 1.2, "_low": 1.1, "_high": 1.3}
    final = {"": 1.2, "_low": 1.1, "_reached": 3}
    assert client.get_run(run_id).data.metrics == (
        {f"lora/final_loss{end}": value for end, value in ends.items()}
        | {f"lora/steps_to_final_ratio_against_baseline{end}": value for end, value in final.items()}
        | {f"lora/steps_to_90_ratio_against_baseline{end}": value for end, value in (ends | {"_reached": 5}).items()}
    )


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has MLflow send what it is given half a minute later."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS", "30")


@pytest.mark.usefixtures("later")
def test_what_the_environment_has_mlflow_send_later_is_sent_at_once(
    uri: str, client: MlflowClient, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    mine = recipe(uri)
    assert client.get_run(tracking.start(mine, "runs/x", "x", {"fact": 1})).data.params["resolved.fact"] == "1"
    search = tracking.start_search(mine, "searches/x", "x", {"seeds": 2}, "study")
    assert client.get_run(search).data.params == {"seeds": "2"}
    assert tracking.start_search(mine, "searches/x", "x", {"seeds": 3}, "study") == search
    assert client.get_run(search).data.tags["hyperlora.seeds"] == "3"
    # The end of a run waits for what is on its way, and does not tell that it was refused.
    bad, summary = "no: such; name", {"x": {"mean": 1.0}}
    comparison = {"contestants": [{"name": bad, "summary": summary, "against_baseline": {}}]}
    record = {"status": "stopped", "reason": "", "uri": "trials/1", "outcome": None, "reports": []}
    refused: list[Callable[[], None]] = [
        lambda: tracking.finish_search(mine, search, {bad: 0.5}, ()),
        lambda: tracking.finish_comparison(mine, search, comparison, ()),
        lambda: tracking.log_trial(mine, search, "one", {bad: 1}, record, {}),
        lambda: tracking.log_trial(mine, search, "two", {}, record | {"reports": [{"step": 4, bad: 2.0}]}, {}),
    ]
    for action in refused:
        with pytest.raises(MlflowException, match=bad):
            action()
    tracking.finish(mine, run_id, {"steps": 4, bad: 2.0, "adapter": "runs/x/adapter"})
    assert bad in caplog.text
    assert tracking.missed() == [Missed(run_id, uri, "runs/x", "FINISHED")]
    tracking._record(run_id).unlink()


@pytest.mark.usefixtures("later")
def test_metrics_that_the_environment_has_mlflow_send_later_wait_until_they_have_arrived(
    uri: str, client: MlflowClient, run_id: str
) -> None:
    sink = MLflowSink(uri, run_id, interval=60)
    report(sink, 1, 2)
    sink.flush()()
    assert losses(client, run_id) == [(1, 1.0), (2, 0.5)]
    client.delete_run(run_id)
    report(sink, 3, 4)
    sink.close()
    (run,) = tracking.missed()
    client.restore_run(run_id)
    tracking.deliver(run, None)
    assert losses(client, run_id) == [(n, 1 / n) for n in range(1, 5)]


def certificate(folder: Path) -> Path:
    """Of this machine, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "certificate.pem"
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


class Answer(BaseHTTPRequestHandler):
    """Knows every experiment."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content = json.dumps({"experiment": {"experiment_id": "7", "name": "x"}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.filterwarnings("ignore:Unverified HTTPS")
@pytest.mark.parametrize("setting", ["SERVER_CERT_PATH", "INSECURE_TLS", "CLIENT_CERT_PATH", None])
def test_a_server_whose_certificate_only_mlflow_trusts_is_one_that_answers(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    if setting == "CLIENT_CERT_PATH":
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(path)
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(path))
    if setting is not None:
        monkeypatch.setenv(f"MLFLOW_TRACKING_{setting}", "true" if setting == "INSECURE_TLS" else str(path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # of those who hang up
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"https://localhost:{server.server_address[1]}"
        try:
            tracking.answers(address)
            if setting is None:
                with pytest.raises(RecipeError, match="certificate verify failed"):
                    tracking.check(recipe(address))
            else:
                tracking.check(recipe(address))
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(RecipeError, match="refused"):
        tracking.answers(address)


def test_data_and_runs_beside_the_code_are_no_change_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.git_state() == {}
    (tmp_path / "code.py").write_text("x = 1\n")
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "code.py"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], check=True)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert tracking.git_state()["git.changed"] == "false"
    (tmp_path / "code.py").write_text("x = 2\n")
    assert tracking.git_state()["git.changed"] == "true"
