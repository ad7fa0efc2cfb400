"""What a run needs, tried out: versions, devices, storage, tracking, disk, clocks. Each check says what to do."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hyperlora import collective, packed, storage, tokens, uris
from hyperlora.config import MLflowConfig, first_line

#: Free bytes below which a checkpoint, a model or Ray's object store may not fit.
SMALL_DISK = 10 * 2**30
#: Seconds by which clocks may differ: S3 refuses requests at 15 minutes, tokens and locks suffer earlier.
SKEW = 30.0
#: What to do when a store fails, by how its URIs start.
_STORE_ADVICE = {
    uris.S3: "check the URI, the endpoint (AWS_ENDPOINT_URL) and AWS's credentials in the environment",
    uris.GCS: "check the URI and the credentials (GOOGLE_APPLICATION_CREDENTIALS, or the machine's identity)",
    uris.AZURE: "check the URI and the credentials (AZURE_STORAGE_CONNECTION_STRING, or the account's name and key)",
}


@dataclass(frozen=True)
class Check:
    """What was tried.

    Attributes:
        name: in a word or two.
        state: fail ends runs; warn may.
        found: what was seen.
        advice: what to do about it; empty when nothing.
    """

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def devices() -> Check:
    """GPUs, and whether NCCL joins them: a sum over all of this machine, of a process for each."""
    if not torch.cuda.is_available():
        return Check("device", "ok", f"no GPU; {os.cpu_count()} CPU cores, torch {torch.__version__}")
    names = ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    if not torch.distributed.is_nccl_available():
        return Check("device", "fail", f"{names}, no NCCL", "install a build of torch for CUDA")
    nccl = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    if (reason := collective.problem("nccl", torch.cuda.device_count())) is not None:
        advice = "look at the driver, a container's shared memory (--shm-size), and what else is at work on the GPUs"
        return Check("device", "fail", f"{names}; {nccl} does not join them ({reason})", advice)
    return Check("device", "ok", f"{names}, joined by {nccl}")


def disks(temporary: str | None = None) -> list[Check]:
    """Room where Ray's temporary files go, and where tokenised rows do if that is another file system.

    Args:
        temporary: Ray's folder, where a node has told it; None: the one that Ray takes when it is started here.
    """
    wanted = Path(temporary or os.environ.get("RAY_TMPDIR") or "/tmp"), packed.cache()
    # What is not there yet will be on the disk of the nearest folder that is.
    folder, cache = (next(p for p in (path, *path.parents) if p.exists()) for path in wanted)
    checks = [_disk("disk", folder, "RAY_TMPDIR, or --temp-dir of ray start,")]
    if cache.stat().st_dev != folder.stat().st_dev:
        checks.append(_disk("disk of the cache", cache, "HYPERLORA_CACHE"))
    return checks


def _disk(name: str, folder: Path, variable: str) -> Check:
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.0f} GiB free in {folder}"
    if free < SMALL_DISK:
        return Check(name, "warn", found, f"keep {SMALL_DISK // 2**30} GiB free; {variable} names another place")
    return Check(name, "ok", found)


def _place(uri: str) -> str:
    """A file below a storage URI that nobody else has."""
    return f"{uri.rstrip('/')}/.doctor-{secrets.token_hex(6)}"


def store(uri: str) -> Iterator[Check]:
    """Write, read, conditional write and removal below a storage URI."""
    shown = uris.redacted(uri)
    if (allowed := uris.problem(uri, written=True)) is not None:
        yield Check("storage", "fail", shown, allowed)
        return
    probe = _place(uri)
    try:
        began = time.monotonic()
        storage.write(probe, b"one")
        same = storage.read(probe) == b"one"
        took = time.monotonic() - began
        if not same:
            yield Check("storage", "fail", f"{shown} gave back other bytes", "use another store")
            return
        yield Check("storage", "ok", f"{shown}: written and read in {took:.2f} s")
        if not storage.refuses_overwriting(probe, b"two") or storage.read(probe) != b"one":
            advice = "two commands on one run are told apart a little later; nothing else changes (docs/durability.md)"
            yield Check("conditional write", "warn", f"{shown} has none, or passes over the condition", advice)
        else:
            yield Check("conditional write", "ok", "a file that is there is not overwritten")
    except OSError as error:
        known = (told for start, told in _STORE_ADVICE.items() if uri.startswith(start))
        yield Check("storage", "fail", str(error), next(known, "check the path, and that this user may write there"))
    finally:
        with contextlib.suppress(OSError):
            storage.remove(probe)


def tracking(config: MLflowConfig) -> Check:
    """A run is made and deleted again."""
    from hyperlora import tracking as mlflow

    if not config.enabled:
        return Check("MLflow", "ok", "mlflow.enabled is false")
    shown = uris.redacted(config.tracking_uri)
    began = time.monotonic()
    try:
        mlflow.probe(config)
    except Exception as error:
        return Check(
            "MLflow", "fail", first_line(error), "start the server, or set mlflow.tracking_uri; MLFLOW_TRACKING_TOKEN"
        )
    return Check("MLflow", "ok", f"{shown}: a run written in {time.monotonic() - began:.1f} s")


@contextlib.contextmanager
def mark(uri: str) -> Iterator[str]:
    """A file below a storage URI whose URI it is, for others to find with :func:`sees`.

    Raises:
        StorageError: it could not be written.
    """
    place = _place(uri)
    storage.write(place, place.encode())
    try:
        yield place
    finally:
        with contextlib.suppress(OSError):
            storage.remove(place)


def sees(place: str) -> Check:
    """Whether the file that another machine wrote is there."""
    advice = "storage.uri has to be the same place from every node: an object store, or a shared folder"
    try:
        if storage.read(place) == place.encode():
            return Check("shared storage", "ok", "what the job wrote is there")
        return Check("shared storage", "fail", "what the job wrote has other content", advice)
    except OSError as error:
        return Check("shared storage", "fail", f"what the job wrote is not there ({first_line(error)})", advice)


def node(place: str | None = None, config: MLflowConfig | None = None, temporary: str | None = None) -> dict[str, Any]:
    """What another node tells of itself, as plain values.

    Args:
        place: of :func:`mark`; without one storage is not tried.
        config: of the server to try.
        temporary: folder of the node's Ray.
    """
    from hyperlora.tracking import versions

    began, checks = time.time(), [devices(), *disks(temporary)]
    if place is not None:
        checks += [sees(place), *store(place.rsplit("/", 1)[0])]
    if config is not None:
        checks.append(tracking(config))
    return {
        "host": os.uname().nodename,
        "versions": versions(),
        "gpus": torch.cuda.device_count(),
        "time": [began, time.time()],
        "checks": [(c.name, c.state, c.found, c.advice) for c in checks],
    }


def compare(
    here: Mapping[str, str], told: Mapping[str, Any], asked: float, answered: float, gpus: float
) -> Iterator[Check]:
    """How a node differs from here.

    Args:
        here: versions of this process.
        told: :func:`node` of the other.
        asked, answered: this machine's time before and after it was asked, seconds.
        gpus: that Ray gives out there.
    """
    name = f"node {told['host']}"
    # Without what says for which device it was built: a laptop's torch is another than that of a node with a GPU.
    public = {k: v.partition("+")[0] for k, v in told["versions"].items()}
    other = {k: (v, public.get(k)) for k, v in here.items() if public.get(k) != v.partition("+")[0]}
    if other:
        text = ", ".join(f"{k} {theirs} (here {mine})" for k, (mine, theirs) in other.items())
        # Only files go to the cluster, and Ray itself sees to it that its nodes have one version of Python.
        small = other.keys() == {"python"}
        advice = "what travels is source code" if small else "give all nodes the same image, or add --install"
        yield Check(name, "warn" if small else "fail", text, advice)
    else:
        yield Check(name, "ok", "the same versions as here")
    began, ended = told["time"]
    skew = max(asked - began, ended - answered, 0.0)
    if skew > SKEW:
        yield Check(name, "warn", f"its clock differs by {skew:.0f} s", "let the nodes keep time (NTP)")
    if gpus > told["gpus"]:
        advice = "show the GPUs to its container (--gpus=all); its driver has to be new enough for this build of torch"
        yield Check(name, "fail", f"Ray gives out {gpus:g} GPUs, torch sees {told['gpus']}", advice)
    for check in told["checks"]:
        yield Check(f"{name}, {check[0]}", *check[1:])


def silent(address: str, seconds: float) -> Check:
    """A node that has not answered for so many seconds."""
    advice = "look at its load, memory and disk, and at the network to it; if it is only busy, try again later"
    return Check(f"node {address}", "fail", f"no answer in {seconds:.0f} s", advice)


def joined(nodes: int, reason: str | None) -> Check:
    """Whether NCCL joins GPUs of several nodes, and why not."""
    if reason is None:
        return Check("GPUs across nodes", "ok", f"one of each of {nodes} nodes, joined by NCCL")
    advice = "let the nodes reach each other on all ports; NCCL_SOCKET_IFNAME names the interface if they have several"
    return Check("GPUs across nodes", "fail", f"NCCL does not join those of {nodes} nodes ({reason})", advice)


def absent(groups: Sequence[str]) -> Check:
    """Groups of nodes that an autoscaler starts, and of which none is there."""
    advice = "the autoscaler starts them for jobs that need them; try again while there is a node of each"
    return Check("node groups", "warn", f"not tried, as no node of them is there: {', '.join(groups)}", advice)


def token() -> Check:
    """Whether there is a token for Ray when it is asked for."""
    known = tokens.known()
    if os.environ.get("RAY_AUTH_MODE") == "token" and not known:
        advice = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, or write ~/.ray/auth_token"
        return Check("Ray token", "fail", "RAY_AUTH_MODE is token, and there is none", advice)
    return Check("Ray token", "ok", "given" if known else "none; a cluster that others reach should ask for one")
