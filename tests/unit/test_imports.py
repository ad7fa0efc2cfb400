"""The layout's rules: who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "ray": {
        "hyperlora/autoscaling.py",
        "hyperlora/distributed.py",
        "hyperlora/jobs.py",
        "hyperlora/search.py",
        "hyperlora/tuning.py",
        "pipelines/doctor.py",
        "pipelines/submit.py",
    },
    "ray.train": {"hyperlora/distributed.py"},
    "ray.tune": {"hyperlora/tuning.py"},
    "mlflow": {"hyperlora/registry.py", "hyperlora/tracking.py"},
}


#: What a file imports whose name it computes.
UNKNOWN = "?"


def called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node.func) in ("import_module", "__import__"):
            found |= {str(a.value) if isinstance(a, ast.Constant) else UNKNOWN for a in node.args[:1]}
    return found


def sources(*packages: str) -> list[tuple[str, Path]]:
    return [(str(p.relative_to(ROOT)), p) for name in packages for p in sorted((ROOT / name).rglob("*.py"))]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", ALLOWED)
def test_only_the_named_files_import(package: str) -> None:
    importers = {
        name
        for name, path in sources("hyperlora", "pipelines", "tune_spaces")
        if any(within(module, package) for module in imports(path))
    }
    assert importers <= ALLOWED[package]


def test_nothing_is_imported_by_a_name_that_is_computed() -> None:
    for name, path in sources("hyperlora", "pipelines", "tune_spaces"):
        assert UNKNOWN not in imports(path), name


def test_direction_of_imports() -> None:
    for name, path in sources("hyperlora", "tune_spaces"):
        assert not [m for m in imports(path) if within(m, "pipelines")], name
    for name, path in sources("hyperlora"):
        assert not [m for m in imports(path) if within(m, "tune_spaces")], name


def test_the_checks_see_what_they_forbid(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden.py"
    hidden.write_text("import importlib\nimportlib.import_module('ray.tune')\n__import__('mlflow')\n__import__(name)")
    assert imports(hidden) == {"importlib", "ray.tune", "mlflow", UNKNOWN}
    seen = imports(ROOT / "hyperlora/distributed.py")
    assert any(within(m, "ray.train") for m in seen)
    assert any(within(m, "mlflow") for m in imports(ROOT / "hyperlora/tracking.py"))


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_library_needs_neither_ray_nor_mlflow() -> None:
    done = python(
        "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None\n"
        "import hyperlora, hyperlora.training, hyperlora.export, hyperlora.checkpoint\n"
        "print(hyperlora.HyperAdaLoRA.__name__)"
    )
    assert done.stdout.strip() == "HyperAdaLoRA", done.stderr


def test_listing_recipes_and_refusing_one_to_train_import_nothing_that_takes_seconds() -> None:
    done = python(
        "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'datasets', 'ray', 'mlflow', 'optuna'))\n"
        "from pipelines.cli import main\n"
        "print('statuses', main(['recipes']), main(['train', 'quikstart']))"
    )
    assert done.stdout.splitlines()[-1:] == ["statuses 0 2"], done.stderr
    assert done.stderr.count("RECIPE: got 'quikstart'") == 1


@pytest.mark.parametrize(
    "command", ["jobs", "logs some", "stop some", "submit train quickstart storage.uri=/shared mlflow.enabled=false"]
)
def test_asking_a_cluster_imports_no_pytorch(command: str) -> None:
    done = python(
        "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'datasets', 'mlflow', 'optuna'))\n"
        f"from pipelines.cli import main; main('{command} --address http://127.0.0.1:1'.split())"
    )
    assert "--address: got 'http://127.0.0.1:1'" in done.stderr
