"""Into MLflow's registry and back: a real database, plain PEFT, champion and challenger."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import small_recipe
from mlflow import MlflowClient
from peft import PeftModel

from hyperlora import storage
from hyperlora.adapters import build_base, load_tokenizer, resolve_path
from hyperlora.config import parse
from hyperlora.fingerprint import evaluation_fingerprint
from hyperlora.tasks import build_task
from pipelines.cli import main


def command(*words: str, folder: Path) -> dict[str, Any]:
    summary = folder / "summary.json"
    assert main([*words, "--json", str(summary)]) == 0
    return json.loads(summary.read_text())


def train(folder: Path, name: str, **changes: Any) -> str:
    """A finished run on the model that ships; its folder."""
    content = small_recipe(folder) | {"name": name, "model": {"path": "builtin:storylm"}}
    content["training"] |= {"steps": 8, "eval_before": False}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        content[section] |= {field: value}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(Path(command("train", str(folder / f"{name}.yaml"), folder=folder)["adapter"]).parent)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]], dict[str, str]]:
    """A barely trained run, a better one, one that is worse again, and one with other held-out rows."""
    folder = tmp_path_factory.mktemp("registry")
    sources = {
        "first": train(folder, "first", training__steps=2),
        "better": train(folder, "better", training__steps=8),
        "worse": train(folder, "worse", training__steps=2),
        "other": train(folder, "other", data__eval_rows=6),
    }
    found = {}
    for name, source in sources.items():
        options = ("--name", "arithmetic", "--metric", "held_out_loss")
        found[name] = command("register", source, *options, folder=folder)
    return folder, found, sources


def test_only_a_better_version_becomes_champion(registered: tuple[Path, dict[str, dict[str, Any]], Any]) -> None:
    folder, found, _ = registered
    assert {name: (r["version"], r["alias"]) for name, r in found.items()} == {
        "first": (1, "champion"),
        "better": (2, "champion"),
        "worse": (3, "challenger"),
        "other": (4, "challenger"),
    }
    assert found["better"]["value"] < found["first"]["value"]
    assert "does not beat" in found["worse"]["reason"]
    assert "on other rows" in found["other"]["reason"]
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    assert client.get_model_version_by_alias("arithmetic", "champion").version == 2
    assert client.get_model_version_by_alias("arithmetic", "challenger").version == 4
    assert "| held out loss |" in client.get_model_version("arithmetic", "2").description
    files = client.list_artifacts(found["better"]["mlflow_run_id"], "adapter")
    names = {f.path.removeprefix("adapter/") for f in files}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "registration.json"}


def test_pulled_it_is_a_plain_adapter_with_the_registered_metric(
    registered: tuple[Path, dict[str, dict[str, Any]], Any],
) -> None:
    folder, found, _ = registered
    tracking = ("--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}")
    record = command("pull", "models:/arithmetic@champion", str(folder / "pulled"), *tracking, folder=folder)
    assert record["version"] == 2
    files, digest = Path(resolve_path("builtin:storylm")), hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update(name.encode() + b"\0" + hashlib.sha256((files / name).read_bytes()).digest())
    assert record["base_model"] == {"path": "builtin:storylm", "revision": None, "sha256": digest.hexdigest()}
    recipe = parse(json.loads((folder / "pulled/registration.json").read_text())["recipe"])
    tokenizer = load_tokenizer(recipe.model)
    task = build_task(recipe, tokenizer)
    assert main(["export", str(folder / "pulled"), str(folder / "served"), "--uniform-rank"]) == 0
    base, *others = (build_base(recipe, tokenizer, None) for _ in range(3))
    places = (str(folder / name) for name in ("pulled", "served"))
    values = []
    for model in (base, *map(PeftModel.from_pretrained, others, places)):
        rows = [task.held_out[n] for n in range(len(task.held_out))]
        with torch.no_grad():
            sums = task.metric_sums(model.eval(), rows, torch.device("cpu")).tolist()
        values.append(sums[0] / sums[1])
    assert values[1] == pytest.approx(found["better"]["value"], abs=1e-5)
    assert values[2] == pytest.approx(values[1], abs=1e-5), "as vLLM wants it"
    client = MlflowClient(tracking[1])
    logged = client.get_run(found["better"]["mlflow_run_id"]).data.metrics["held_out_loss"]
    tag = json.loads(client.get_model_version("arithmetic", "2").tags["hyperlora.value"])
    assert logged == tag == record["value"] == found["better"]["value"]
    assert abs(values[0] - values[1]) > 0.01
    by_version = command("pull", "models:/arithmetic/1", str(folder / "one"), *tracking, folder=folder)
    assert by_version["value"] == found["first"]["value"]


def test_changed_files_are_refused(registered: tuple[Path, dict[str, dict[str, Any]], Any], capfd: Any) -> None:
    folder, found, _ = registered
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    run = MlflowClient(uri).get_run(found["worse"]["mlflow_run_id"])
    file = Path(run.info.artifact_uri.removeprefix("file://")) / "adapter/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    target = folder / "changed"
    assert main(["pull", "models:/arithmetic/3", str(target), "--tracking-uri", uri]) == 2
    assert "adapter_model.safetensors is not the file that was registered" in " ".join(capfd.readouterr().err.split())
    assert not target.exists()


def test_a_search_gives_its_best_trial_or_the_smallest_that_is_good_enough(
    registered: tuple[Path, Any, dict[str, str]],
) -> None:
    """A search's folder by hand: two trials, the better one larger."""
    folder, _, sources = registered
    search = folder / "search"
    (search / "trials").mkdir(parents=True)
    outcomes = {}
    for trial, source in (("t0001", "better"), ("t0002", "first")):
        (search / "trials" / trial).symlink_to(sources[source])
        outcomes[trial] = json.loads((Path(sources[source]) / "result.json").read_text())
    larger = storage.unsealed(json.loads((Path(sources["better"]) / "result.json").read_text()))
    larger["adapter_parameters_final"] = outcomes["t0002"]["adapter_parameters_final"] + 1
    (Path(sources["better"]) / "result.json").write_bytes(storage.sealed(larger))
    measured = [{"trial": t, "status": "finished"} for t in outcomes] + [{"trial": "t0003", "status": "stopped"}]
    (search / "tune.json").write_text(json.dumps({"metric": "held_out_loss", "measured": measured}))
    loss = {t: o["held_out_loss_after"] for t, o in outcomes.items()}
    gap = loss["t0002"] - loss["t0001"]
    assert gap > 0
    for margin, wanted in ((None, "t0001"), (gap * 0.9, "t0001"), (gap * 1.1, "t0002")):
        more = () if margin is None else ("--non-inferior", str(margin))
        done = command("register", str(search), "--name", "searched", *more, folder=folder)
        assert done["run"].endswith(wanted)


def test_of_a_study_the_point_and_why_it_was_chosen(
    registered: tuple[Path, Any, dict[str, str]], capsys: pytest.CaptureFixture
) -> None:
    """A study's folder by hand: two points, the better one larger, and one without finished trials."""
    folder, _, sources = registered
    study = folder / "study"
    (study / "trials").mkdir(parents=True)
    outcomes = {}
    for trial, source in (("p000-seed1", "better"), ("p001-seed1", "first"), ("p002-seed1", "worse")):
        (study / "trials" / trial).symlink_to(sources[source])
        outcomes[trial] = json.loads((Path(sources[source]) / "result.json").read_text())
    larger = storage.unsealed(outcomes["p000-seed1"])
    larger["adapter_parameters_final"] = outcomes["p001-seed1"]["adapter_parameters_final"] + 1
    (Path(sources["better"]) / "result.json").write_bytes(storage.sealed(larger))
    points = [{"point": n, "n": 1, "by_seed": {"1": 0.0}} for n in range(2)] + [{"point": 2, "n": 0, "by_seed": {}}]
    (study / "study.json").write_text(json.dumps({"metric": "held_out_loss", "points_measured": points}))
    loss = {t: o["held_out_loss_after"] for t, o in outcomes.items()}
    gap = loss["p001-seed1"] - loss["p000-seed1"]
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for margin, wanted in ((None, "p000-seed1"), (gap * 0.9, "p000-seed1"), (gap * 1.1, "p001-seed1")):
        more = () if margin is None else ("--non-inferior", str(margin))
        done = command("register", str(study), "--name", "studied", *more, folder=folder)
        assert done["run"].endswith(wanted)
        assert done["value"] == loss[wanted]
        assert done["choice"] in capsys.readouterr().out
        target = folder / f"studied-{done['version']}"
        record = command(
            "pull", f"models:/studied/{done['version']}", str(target), "--tracking-uri", uri, folder=folder
        )
        assert (record["value"], record["choice"]) == (done["value"], done["choice"])
    assert done["choice"].startswith("smallest of 2 of 2 points whose held out loss is at most")
    assert f": worse by {gap:.6g}, under too few seeds to say how sure that is" in done["choice"]
    assert done["choice"] in (target / "README.md").read_text()


@pytest.mark.parametrize("name", ["result.json", "adapter/adapter_model.safetensors", "adapter/README.md"])
def test_damaged_ends_of_runs_are_refused_by_name(
    registered: tuple[Path, Any, dict[str, str]], capfd: Any, name: str
) -> None:
    folder, _, sources = registered
    file = Path(sources["other"]) / name
    data = file.read_bytes()
    place = data.index(b'"steps": 8') + 9 if name == "result.json" else len(data) // 2
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    resume = ["train", str(folder / "other.yaml"), "--resume"]
    for words in (["register", sources["other"], "--name", "arithmetic"], resume):
        assert main(words) == 2
        message = " ".join(capfd.readouterr().err.split())
        assert f"got '{file}'; the file that the run wrote: " in message
        assert "SHA-256" in message
    if name == "adapter/adapter_model.safetensors":
        # As the message says.
        (Path(sources["other"]) / "result.json").unlink()
        assert main(resume) == 0
        assert file.read_bytes() == data
    file.write_bytes(data)


def test_a_record_that_is_none_is_named(registered: tuple[Path, Any, dict[str, str]], capfd: Any) -> None:
    _, _, sources = registered
    file = Path(sources["other"]) / "run.json"
    data = file.read_bytes()
    for content in (b"{}", b"[1]", b'{"recipe": 3}'):
        file.write_bytes(content)
        assert main(["register", sources["other"], "--name", "arithmetic"]) == 2
        assert f"got '{file}'; the record of a run, with its recipe" in " ".join(capfd.readouterr().err.split())
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "comparable"),
    [
        ({"optimizer": {"lr": 0.5}, "seed": 7}, True),
        ({"data": {"source": "word-problems", "train_rows": 64, "eval_rows": 8, "completion": "question"}}, False),
        ({"model": {"path": "builtin:storylm", "config": {"rope_theta": 5.0}}}, False),
        ({"task": {"kind": "generation", "max_length": 95, "max_new_tokens": 8}}, False),
    ],
)
def test_what_makes_two_metrics_comparable(tmp_path: Path, changes: dict[str, Any], comparable: bool) -> None:
    one = small_recipe(tmp_path) | {"model": {"path": "builtin:storylm"}}
    first, second = (evaluation_fingerprint(parse(content), {}) for content in (one, one | changes))
    assert (first == second) is comparable


def test_a_champion_that_is_older_than_a_field_of_the_task_stays_comparable(tmp_path: Path) -> None:
    recipe = parse(small_recipe(tmp_path))
    before_task_chat = "a3de09f2afd17dd9"
    assert evaluation_fingerprint(recipe, {"rows_sha256": {"train": "a", "eval": "b"}}) == before_task_chat


def test_metrics_on_rows_that_have_changed_since_are_not_compared(tmp_path: Path) -> None:
    recipe = parse(small_recipe(tmp_path) | {"model": {"path": "builtin:storylm"}})
    first, same, other = (
        evaluation_fingerprint(recipe, {"rows_sha256": {"train": train, "eval": held_out}})
        for train, held_out in (("a", "b"), ("c", "b"), ("a", "c"))
    )
    assert first == same != other


def test_all_problems_at_once(tmp_path: Path, capfd: Any) -> None:
    words = ["register", "s3://key:topsecret@host/x", "--name", "a/b", "--non-inferior", "-1"]
    assert main(words) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "3 problems" in message
    assert "topsecret" not in message
    assert main(["register", str(tmp_path), "--name", "x"]) == 2
    assert "the folder of a finished run, study or search" in " ".join(capfd.readouterr().err.split())
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert main(["pull", "models:/none/1", str(tmp_path / "x"), "--tracking-uri", f"sqlite:///{tmp_path}/no/m.db"]) == 2
    assert "there is no such file" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "no").exists()
    MlflowClient(database).search_experiments()
    for model in ("arithmetic", "models:/none@champion", "models:/none/1"):
        assert main(["pull", model, str(tmp_path / "x"), "--tracking-uri", database]) == 2
        assert f"MODEL: got '{model}'" in " ".join(capfd.readouterr().err.split())
