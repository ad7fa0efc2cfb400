"""URIs as a recipe may name them, and as anybody may see them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from fsspec.registry import known_implementations

_WORDS = "key|secret|token|passw|credential|signature"
_SECRET = re.compile(rf"{_WORDS}|^sig$|^sas$|^pwd$", re.IGNORECASE)
# A password may hold slashes that should have been escaped; digits before a slash are a port.
_PASSWORD = re.compile(r"://[^/@\s'\"]*:(?!\d+/)[^@\s'\"]*@")
_OPTION = re.compile(rf"([?&](?:[\w-]*(?:{_WORDS})[\w-]*|sig|sas|pwd)=)[^&\s'\"]+", re.IGNORECASE)
# Options within the value of one, as ODBC has them.
_INNER = re.compile(r"(?:^|[;{\s])\s*(?:pwd|\w*(?:passw|secret|token|key)\w*)\s*=", re.IGNORECASE)
#: Characters of one name in a path, as file systems have it.
LONGEST_NAME = 255
#: Schemes whose account, without a password, is a name.
_NAMED = ("az", "abfs", "postgresql", "mysql", "mssql")
WITHOUT_CREDENTIALS = "allowed: a URI without credentials; they come from the environment (docs/security.md)"
#: How URIs of the kinds of stores begin.
S3, GCS, AZURE = ("s3://", "s3a://"), ("gs://", "gcs://"), ("az://", "abfs://", "abfss://")
#: Kind of store to the package that speaks its protocol and what installs that.
_STORES = {S3: ("s3fs", "hyperadalora"), GCS: ("gcsfs", "hyperadalora[gs]"), AZURE: ("adlfs", "hyperadalora[az]")}


def absolute(uri: str) -> str:
    """A path or URI that means the same from any working directory."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())


def redacted(uri: str) -> str:
    """The URI without passwords and the values of secret options."""
    if "::" in uri and "://" in uri:
        return "::".join(redacted(part) for part in uri.split("::"))
    if "://" not in uri:
        return uri
    uri = _PASSWORD.sub("://***@", uri)
    try:
        parts = urlsplit(uri)
    except ValueError:  # no URI: what is secret in it cannot be told
        return f"{uri.partition('://')[0]}://***"
    account, at, host = parts.netloc.rpartition("@")
    netloc = f"***@{host}" if at and _secret_account(parts.scheme, account) else parts.netloc
    options = parse_qsl(parts.query, keep_blank_values=True)
    query = urlencode([(k, "***" if _secret_option(k, v) else v) for k, v in options], safe="*:/")
    # Not urlunsplit of everything: it drops the empty host of sqlite:///file.
    return f"{parts.scheme}://{netloc}{parts.path}" + urlunsplit(("", "", "", query, ""))


def without_secrets(text: str) -> str:
    """A text in which passwords and secret options of URIs are replaced."""
    return _OPTION.sub(r"\1***", _PASSWORD.sub("://***@", text))


def secret_problem(uri: str) -> str | None:
    """What is allowed instead of what can be no path or URI, or has a password or a secret option in it; else None."""
    if not uri.strip() or "\0" in uri or any(len(part) > LONGEST_NAME for part in uri.split("/")):
        return "allowed: a path or a URI"
    if "://" not in uri:
        return None
    if _PASSWORD.search(uri):
        return WITHOUT_CREDENTIALS
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        return f"allowed: a URI ({error})"
    account, at, _ = parts.netloc.rpartition("@")
    named = any(_secret_option(key, value) for key, value in parse_qsl(parts.query, keep_blank_values=True))
    return WITHOUT_CREDENTIALS if named or (at and _secret_account(parts.scheme, account)) else None


def _secret_option(key: str, value: str) -> bool:
    return bool(_SECRET.search(key) or _INNER.search(value))


def _secret_account(scheme: str, account: str) -> bool:
    # abfs://CONTAINER@ACCOUNT.dfs.core.windows.net names no secret; https://TOKEN@host does.
    return ":" in account or not scheme.startswith(_NAMED)


def problem(uri: str, written: bool = False) -> str | None:
    """What is allowed instead of a path or URI that cannot be used; None for a good one. Asks no server.

    Args:
        uri: path or URI.
        written: something is to be written there, and to be there afterwards.
    """
    chain = uri.split("::")  # fsspec takes a path apart at these, too
    for part in chain:
        if (secret := secret_problem(part)) is not None:
            return secret
    if len(chain) > 1:
        return "allowed: a path or one URI, no chain of them"
    if "://" not in uri:
        return None
    protocol = uri.partition("://")[0]
    store = next((kind for kind in _STORES if uri.startswith(kind)), None)
    if protocol not in known_implementations or (written and store is None and protocol not in ("file", "local")):
        return "allowed: a path, or a URI that starts with s3://, gs:// or az://"
    if store is not None:
        package, extra = _STORES[store]
        if importlib.util.find_spec(package) is None:
            return f"{protocol}:// needs the package {package}: pip install '{extra}'"
        if not urlsplit(uri).netloc:
            return f"allowed: {protocol}://BUCKET/PATH; the bucket is missing"
    return None
