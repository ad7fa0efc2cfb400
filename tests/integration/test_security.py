"""Nothing that is read can run code, and no secret gets out."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from payload import Payload
from refusals import Refused
from test_bad_models import edit, pretrained

from hyperlora.adapters import resolve_path
from hyperlora.checkpoint import FORMAT
from hyperlora.uris import redacted, without_secrets
from pipelines.cli import main

ROOT = Path(__file__).parents[2]
HASH = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hunter2"


@pytest.fixture
def pwned(tmp_path: Path) -> Path:
    """The folder that only a payload makes; the payload is known to work."""
    trial = tmp_path / "trial"
    pickle.loads(pickle.dumps(Payload(trial)))
    assert trial.is_dir()
    trial.rmdir()
    return tmp_path / "pwned"


def poison(folder: Path, pwned: Path) -> None:
    """Every file that programs of this field unpickle, in both forms that torch writes."""
    names = ["pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "state.pkl"]
    for number, name in enumerate([*names, "training_args.bin", "consolidated.00.pth", "model.ckpt"]):
        torch.save(Payload(pwned), folder / name, _use_new_zipfile_serialization=bool(number % 2))


# ---------------------------------------------------------------- models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_path("builtin:storylm"), tmp_path / "model"))


def test_pickled_weights_are_refused_unread(recipe_file: Path, model: Path, refused: Refused, pwned: Path) -> None:
    poison(model, pwned)
    (model / "model.safetensors").unlink()
    message = refused("train", recipe_file, *pretrained(model))
    assert "pytorch_model.bin" in message
    assert "would have to be unpickled, which can run any code" in message


def test_a_pickle_that_is_called_safetensors_is_refused(
    recipe_file: Path, model: Path, refused: Refused, pwned: Path
) -> None:
    torch.save(Payload(pwned), model / "model.safetensors")
    message = refused("train", recipe_file, *pretrained(model))
    assert "model.safetensors is no whole safetensors file" in message


def test_pickles_beside_the_weights_are_left_alone(recipe_file: Path, model: Path, pwned: Path) -> None:
    poison(model, pwned)
    short = ["training.steps=3", "pruning.schedule=none", "training.eval_before=false"]
    assert main(["train", str(recipe_file), *pretrained(model), *short]) == 0
    assert not pwned.exists()


CODE = """
import os
os.mkdir({folder!r})
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def own_code(model: Path, pwned: Path, **changes: str) -> None:
    """A model folder that brings classes of its own."""
    (model / "own.py").write_text(CODE.format(folder=str(pwned)), encoding="utf-8")
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(model / "config.json", auto_map=classes, **changes)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]})


def test_code_of_a_folder_is_not_run(recipe_file: Path, model: Path, refused: Refused, pwned: Path) -> None:
    own_code(model, pwned, model_type="own")
    message = refused("train", recipe_file, *pretrained(model))
    assert "model.path: got " in message
    assert not pwned.exists()
    # Transformers has this architecture itself and needs none of the folder's code.
    own_code(model, pwned, model_type="llama")
    short = ["training.steps=3", "pruning.schedule=none", "training.eval_before=false"]
    assert main(["train", str(recipe_file), *pretrained(model), *short]) == 0
    assert not pwned.exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], "model.revision: got None; the commit whose code was read and is trusted, 40 hexadecimal digits"),
        (["model.revision=main"], "model.revision: got 'main'; the commit whose code"),
        ([f"model.revision='{HASH[:12]}'"], "model.revision: got '0123456789ab'; the commit whose code"),
        ([f"model.revision='{HASH}'", "model.path={model}"], "no revision pins the code of a local folder"),
    ],
)
def test_code_of_a_repository_needs_a_commit(
    recipe_file: Path, model: Path, refused: Refused, pwned: Path, changes: list[str], expected: str
) -> None:
    own_code(model, pwned, model_type="own")
    changes = [change.replace("{model}", str(model)) for change in changes]
    assert expected in refused("train", recipe_file, "model.trust_remote_code=true", *changes)
    assert not pwned.exists()


# ---------------------------------------------------------------- checkpoints and adapters


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    import yaml
    from conftest import small_recipe

    folder = tmp_path_factory.mktemp("trained")
    recipe = small_recipe(folder)
    recipe["training"] |= {"steps": 4, "checkpoint_every": 2, "eval_before": False}
    recipe["pruning"] = {"schedule": "none"}
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", str(folder / "small.yaml")]) == 0
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def test_pickles_in_a_run_are_left_alone(run: Path, tmp_path: Path, pwned: Path) -> None:
    for folder in (run, newest(run), run / "adapter"):
        poison(folder, pwned)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert not pwned.exists()
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def commit(folder: Path, **changes: object) -> None:
    """Files of a checkpoint with a manifest that says they are right."""
    import hashlib

    manifest = json.loads((folder / "COMMIT").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "COMMIT").write_text(json.dumps(manifest | changes))


def foreign(folder: Path) -> None:
    (folder / "trainer.json").write_text('{"recipe": {"name": "x"}, "optimizer": {"modules": []}}')
    commit(folder)


def escape(folder: Path) -> None:
    manifest = json.loads((folder / "COMMIT").read_text())
    manifest["files"]["../../run.json"] = manifest["files"]["trainer.json"]
    (folder / "COMMIT").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (lambda c: shutil.rmtree(c.parent), "it holds neither a checkpoint nor a checkpoints folder"),
        (lambda c: shutil.rmtree(c), "it holds neither a checkpoint nor a checkpoints folder"),
        (lambda c: (c / "COMMIT").unlink(), "it holds neither a checkpoint nor a checkpoints folder"),
        (lambda c: (c / "COMMIT").write_text("{"), "COMMIT"),
        (lambda c: commit(c, format=99), f"COMMIT has format 99, this version reads {FORMAT}"),
        (lambda c: (c / "state.safetensors").unlink(), "state.safetensors is missing"),
        (lambda c: (c / "state.safetensors").write_bytes(b""), "state.safetensors has 0 bytes, COMMIT says"),
        (lambda c: flip(c / "state.safetensors"), "state.safetensors does not match the SHA-256 in COMMIT"),
        (lambda c: flip(c / "trainer.json"), "trainer.json does not match the SHA-256 in COMMIT"),
        (lambda c: flip(c / "adapter_model.safetensors"), "adapter_model.safetensors does not match the SHA-256"),
        (foreign, "a checkpoint of this program and version ("),
        (escape, "COMMIT names a file outside its folder: '../../run.json'"),
    ],
)
@pytest.mark.parametrize("whole_run", [False, True])
def test_checkpoints_that_cannot_be_exported(
    run: Path, tmp_path: Path, refused: Refused, breaks: Callable[[Path], None], expected: str, whole_run: bool
) -> None:
    checkpoint = newest(run)
    (run / "result.json").unlink()  # whose adapter would be taken
    for other in (run / "checkpoints").iterdir():
        if other != checkpoint:
            shutil.rmtree(other)
    breaks(checkpoint)
    message = refused("export", run if whole_run else checkpoint, tmp_path / "out")
    assert "RUN_OR_CHECKPOINT: got " in message
    assert expected in message


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (lambda c: shutil.rmtree(c), "is no complete checkpoint: COMMIT is missing"),
        (lambda c: flip(c / "state.safetensors"), "state.safetensors does not match the SHA-256 in COMMIT"),
        (foreign, "what a method with hypernetworks has trained; "),
    ],
)
def test_checkpoints_that_cannot_be_started_from(
    run: Path, recipe_file: Path, refused: Refused, breaks: Callable[[Path], None], expected: str
) -> None:
    checkpoint = newest(run)
    breaks(checkpoint)
    message = refused("train", recipe_file, f"hypernetwork.init_from={checkpoint}")
    assert "hypernetwork.init_from: got " in message
    assert expected in message


def test_a_pickle_in_place_of_tensors_is_refused(run: Path, tmp_path: Path, refused: Refused, pwned: Path) -> None:
    for name in ("adapter_model.safetensors",):
        torch.save(Payload(pwned), newest(run) / name)
    commit(newest(run))
    assert "RUN_OR_CHECKPOINT: got " in refused("export", newest(run), tmp_path / "out")


def test_an_adapter_that_is_only_a_pickle_is_refused(tmp_path: Path, refused: Refused, pwned: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    poison(adapter, pwned)
    message = refused("export", adapter, tmp_path / "out")
    assert "it holds neither a checkpoint nor a checkpoints folder" in message


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("none", "out", "RUN_OR_CHECKPOINT: got '{root}/none'; a run's folder or a checkpoint's: it holds neither"),
        ("small.yaml", "out", "RUN_OR_CHECKPOINT: got '{root}/small.yaml'"),
        ("", "out", "RUN_OR_CHECKPOINT: got ''; allowed: a path or a URI"),
        ("nowhere://x", "s3://", "2 problems: RUN_OR_CHECKPOINT: got 'nowhere://x'; allowed: a path, or a URI"),
        ("run", "run", "DIR: got '{root}/run'; a new or an empty folder"),
        ("run", "small.yaml", "DIR: got '{root}/small.yaml'; a new or an empty folder"),
        ("run", "small.yaml/out", "DIR: got '{root}/small.yaml/out'; "),
        ("run", "/proc/out", "DIR: got '/proc/out'; a folder that can be written"),
    ],
)
@pytest.mark.usefixtures("run", "recipe_file")
def test_places_of_an_export(tmp_path: Path, refused: Refused, source: str, target: str, expected: str) -> None:
    assert expected.replace("{root}", str(tmp_path)) in refused("export", source, target)


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "change",
    [
        "mlflow.tracking_uri=http://user:hunter2@127.0.0.1:1",
        "mlflow.tracking_uri=postgresql://user:hunter2@127.0.0.1/mlflow",
        "storage.uri=s3://AKIA:hunter2@bucket/runs",
        "storage.uri=s3://AKIA:hun/hunter2@bucket/runs",
        "storage.uri=s3://bucket/runs?secret_key=hunter2",
        "storage.uri=[s3://AKIA:hunter2@bucket/runs]",
        "storage.place=s3://bucket/runs?aws_secret_access_key=hunter2&x=1",
        "data.root=https://user:hunter2@host/data",
        "monitors.baseline=https://hunter2@host/curve.json",
        "model.path=https://user:hunter2@host/model",
        "model.tokenizer=https://user:hunter2@host/model",
        "ray.address=ray://user:hunter2@host:10001",
        "model.config.token=hunter2",
        "model.config.origin=https://user:hunter2@host/model",
        "description=rows of https://user:hunter2@host/data",
        "mlflow.experiment=s3://b/x?secret_key=hunter2",
        "https://user:hunter2@host/model",
    ],
)
def test_secrets_in_a_recipe_are_refused_and_not_repeated(recipe_file: Path, refused: Refused, change: str) -> None:
    changes = ["data.source=files", "data.train=a", "data.eval=b"] if change.startswith("data.") else []
    message = refused("train", recipe_file, *changes, change)
    assert SECRET not in message
    assert "***" in message


def test_secrets_of_the_environment_stay_there(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    short = ["training.steps=3", "pruning.schedule=none", "mlflow.enabled=true", "training.eval_before=false"]
    assert main(["train", str(recipe_file), *short, "--json", str(tmp_path / "summary.json")]) == 0
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "result.json", "mlflow.db", "recipe.yaml", "summary.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("runs/here", "runs/here"),
        ("sqlite:////var/mlflow.db", "sqlite:////var/mlflow.db"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
        ("postgresql+psycopg://user:pw@host/db", "postgresql+psycopg://***@host/db"),
        ("https://token@host/x", "https://***@host/x"),
        ("s3://b/x?secret_key=a&endpoint_override=http://h:9", "s3://b/x?secret_key=***&endpoint_override=http://h:9"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("http://[bad", "http://***"),
        ("s3://AKIA:a/b+c@bucket/x", "s3://***@bucket/x"),
    ],
)
def test_redacted(uri: str, shown: str) -> None:
    assert redacted(uri) == shown


def test_secrets_within_a_text() -> None:
    text = "cannot reach 'http://u:pw@host:5000/x' or s3://b?token=abc but http://host:5000/a@b"
    assert without_secrets(text) == "cannot reach 'http://***@host:5000/x' or s3://b?token=*** but http://host:5000/a@b"
    assert without_secrets("s3://b?sig=abc&x-secret-key=d") == "s3://b?sig=***&x-secret-key=***"
    assert without_secrets("look ?design=x&sign=y") == "look ?design=x&sign=y"


# ---------------------------------------------------------------- the source


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}


def unsafe(source: str) -> list[str]:
    """What a source file does that may run code of the data it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.append(ast.unparse(node.func))
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found.append(node.arg)
    return found


def test_no_source_file_unpickles() -> None:
    assert unsafe("import torch\ntorch.load('x')\nfrom pickle import loads\n") == ["pickle", "torch.load"]
    for package in ("hyperlora", "pipelines", "tune_spaces"):
        for path in sorted((ROOT / package).rglob("*.py")):
            assert not unsafe(path.read_text(encoding="utf-8")), path
