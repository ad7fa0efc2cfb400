"""Ray's token, before Ray is imported: it reads its settings once."""

from __future__ import annotations

import os
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

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
    """What is to be said of a dashboard on another machine that asks for no token: anybody may run any code there."""
    url = address if "://" in address else f"http://{address}"
    if not elsewhere(address) or not url.startswith(("http://", "https://")):
        return None
    try:
        # Without the token that is known here.
        with urlopen(f"{url.rstrip('/')}/api/jobs/", timeout=10):
            return open_to_all(address)
    except (OSError, HTTPException, ValueError):
        return None  # it asks for one, or is no dashboard, which is found out when it is used


def elsewhere(address: str) -> bool:
    """Whether an address is of another machine."""
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    except ValueError:
        return False  # refused as no address
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return host not in ("", "localhost", "auto")


def open_to_all(address: str) -> str:
    """The warning about a cluster that asks for no token."""
    where = address.rpartition("@")[2]
    return f"{where} is another machine and asks for no token: whoever reaches it can run any code there"
