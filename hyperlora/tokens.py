"""Ray's token, before Ray is imported: it reads its settings once."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

#: What a refused user can do.
HOW = "give its token in RAY_AUTH_TOKEN, in a file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"


def known() -> bool:
    """Whether a token is given by the environment or lies in the file where Ray looks for it."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()


def use() -> None:
    """Have Ray send the token that is known: it looks for one only when it is told to."""
    if known():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def warning(address: str) -> str | None:
    """What is to be said of an address on another machine when there is no token: anybody may run any code there."""
    if known() or address == "auto":
        return None
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    except ValueError:
        return None  # refused as no address
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local:
        return None
    return (
        f"{address} is another machine, and there is no token for it: if it asks for none, whoever reaches it can run "
        "any code there"
    )
