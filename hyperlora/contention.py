"""How long a thread had to wait for a processor, which the time that it took does not tell."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

#: Of Linux: nanoseconds that a thread has run, and that it was ready to run while others did.
_SCHEDULE = Path("/proc/thread-self/schedstat")


def waited() -> float | None:
    """Seconds for which this thread has been ready to run and another had the processor; None where nobody counts."""
    with suppress(OSError, ValueError, IndexError):
        return int(_SCHEDULE.read_text(encoding="ascii").split()[1]) / 1e9
    return None
