"""A sum over processes of one machine or of several, each with a device of its own; as a program, one of them."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

#: Seconds after which processes that have not come together are ended. Their imports alone may take half of it.
LIMIT = 60.0
#: Begins the line in which a process says why it ends.
REASON = "reason: "
#: Begins what is told of processes that wait for others.
NOTHING = "nothing after"


def free_address(host: str) -> str:
    """An address of this machine where the first of the processes may wait for those of other machines."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        return f"tcp://{f'[{host}]' if ':' in host else host}:{one.getsockname()[1]}"


def problem(
    backend: str, processes: int, limit: float = LIMIT, *, first: int = 0, of: int = 0, at: str | None = None
) -> str | None:
    """Why so many processes of this machine do not come together; None when they do.

    Args:
        backend: nccl, with a GPU for each, or gloo.
        processes: at least one.
        limit: seconds.
        first: the number of the first of them among those of all machines.
        of: processes of all machines; 0: these are all.
        at: of :func:`free_address` on the machine of process 0, where other machines have some.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as end:
        said = [Path(folder, f"said-{device}") for device in range(processes)]
        started = []
        for device, file in enumerate(said):
            words = [sys.executable, "-m", "hyperlora.collective", backend, at or f"file://{folder}/store"]
            words += [str(device), str(first + device), str(of or processes)]
            output = end.enter_context(file.open("wb"))
            process = subprocess.Popen([*words, str(limit)], stdout=output, stderr=subprocess.STDOUT)
            started.append(end.enter_context(process))
            end.callback(process.kill)
        deadline = time.monotonic() + limit
        # One that fails leaves the others waiting for it.
        while None in (states := [process.poll() for process in started]) and not any(states):
            if time.monotonic() > deadline:
                return f"{NOTHING} {limit:.0f} s"
            time.sleep(0.1)
        if not any(states):
            return None
        device = next(device for device, state in enumerate(states) if state)
        lines = said[device].read_text(errors="replace").strip().splitlines() or [f"exit status {states[device]}"]
        # Libraries write more when they are unloaded.
        told = [line.removeprefix(REASON) for line in lines if line.startswith(REASON)]
        return f"process {first + device} of {of or processes}: {[*lines, *told][-1]}"


def main(backend: str, at: str, number: int, rank: int, processes: int, limit: float) -> None:
    """One of the processes, with a device of its machine by its number.

    Raises:
        RuntimeError: the sum is wrong, or the others do not come.
    """
    import torch  # takes seconds, and whoever starts the processes may do without it
    import torch.distributed as dist

    device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=at, rank=rank, world_size=processes, timeout=timedelta(seconds=limit))
    values = torch.full((1024,), rank + 1.0, device=device)
    dist.all_reduce(values)
    if set(values.tolist()) != {processes * (processes + 1) / 2}:
        raise RuntimeError(f"the sum over {processes} processes is wrong")
    dist.destroy_process_group()


if __name__ == "__main__":
    name, at, *numbers, seconds = sys.argv[1:]
    try:
        number, rank, processes = map(int, numbers)
        main(name, at, number, rank, processes, float(seconds))
    except Exception as error:  # errors of CUDA and NCCL have many lines, of which the last ones say the least
        sys.exit(f"\n{REASON}{type(error).__name__}: {' '.join(str(error).split())[:500]}")
