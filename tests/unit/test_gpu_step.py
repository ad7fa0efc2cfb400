"""The GPU benchmark runs, reduced, without Ray and MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from benchmarks import gpu_step
gpu_step.main()
assert not {"ray", "mlflow"} & set(sys.modules)
"""


def test_reduced_run(tmp_path: Path) -> None:
    arguments = ["--reduced", "--repeats", "1", "--rounds", "1", "--json", str(tmp_path / "result.json")]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["methods"]) == ["lora", "peft-adalora", "adalora", "hyperadalora"]
    for row in result["methods"].values():
        assert min(row["seconds"]["total"], row["seconds"]["step_alone"]) > 0
    assert {"machine", "versions", "git"} <= result.keys()
