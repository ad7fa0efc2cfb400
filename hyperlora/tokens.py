"""Ray's token, before Ray is imported: it reads its settings once."""

from __future__ import annotations

import os
from pathlib import Path


def known() -> bool:
    """Whether a token is given by the environment or lies in the file where Ray looks for it."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()


def use() -> None:
    """Have Ray send the token that is known: it looks for one only when it is told to."""
    if known():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
