"""A sum over processes of one machine, each with a device of its own; as a program, one of them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

#: Seconds after which processes that have not come together are ended. Their imports alone may take half of it.
LIMIT = 60.0
#: Begins the line in which a process says why it ends.
REASON = "reason: "


def problem(backend: str, processes: int, limit: float = LIMIT) -> str | None:
    """Why so many processes of this machine do not come together; None when they do.

    Args:
        backend: nccl, with a GPU for each, or gloo.
        processes: at least one.
        limit: seconds.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as end:
        said = [Path(folder, f"said-{rank}") for rank in range(processes)]
        started = []
        for rank, file in enumerate(said):
            words = [
                sys.executable,
                "-m",
                "hyperlora.collective",
                backend,
                f"{folder}/store",
                str(rank),
                str(processes),
            ]
            output = end.enter_context(file.open("wb"))
            process = subprocess.Popen([*words, str(limit)], stdout=output, stderr=subprocess.STDOUT)
            started.append(end.enter_context(process))
            end.callback(process.kill)
        deadline = time.monotonic() + limit
        # One that fails leaves the others waiting for it.
        while None in (states := [process.poll() for process in started]) and not any(states):
            if time.monotonic() > deadline:
                return f"nothing after {limit:.0f} s"
            time.sleep(0.1)
        if not any(states):
            return None
        rank = next(rank for rank, state in enumerate(states) if state)
        lines = said[rank].read_text(errors="replace").strip().splitlines() or [f"exit status {states[rank]}"]
        # Libraries write more when they are unloaded.
        told = [line.removeprefix(REASON) for line in lines if line.startswith(REASON)]
        return f"process {rank} of {processes}: {[*lines, *told][-1]}"


def main(backend: str, store: str, rank: int, processes: int, limit: float) -> None:
    """One of the processes.

    Raises:
        RuntimeError: the sum is wrong, or the others do not come.
    """
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=limit)
    )
    values = torch.full((1024,), rank + 1.0, device=device)
    dist.all_reduce(values)
    if set(values.tolist()) != {processes * (processes + 1) / 2}:
        raise RuntimeError(f"the sum over {processes} processes is wrong")
    dist.destroy_process_group()


if __name__ == "__main__":
    name, store, *numbers = sys.argv[1:]
    try:
        main(name, store, int(numbers[0]), int(numbers[1]), float(numbers[2]))
    except Exception as error:  # errors of CUDA and NCCL have many lines, of which the last ones say the least
        sys.exit(f"\n{REASON}{type(error).__name__}: {' '.join(str(error).split())[:500]}")
