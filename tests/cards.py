"""The Python of a model card, run as its reader would."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def run_card(folder: Path) -> dict[str, Any]:
    """Run it from the adapter's own folder; returns what it defines."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(code, found)
    finally:
        os.chdir(before)
    return found
