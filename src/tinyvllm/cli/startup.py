"""What the start of a command took, up to its own work: for `--stats`.

This is the first module of the command line that is imported, and it imports next to nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds: of Python itself, until it came here, where the system tells; of imports since then.
seconds: dict[str, float] = {}


def process_age() -> float | None:
    """Seconds since this process began; None where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:  # noqa: PTH123
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


@contextmanager
def importing() -> Iterator[None]:
    """Counts the time of its block as one of imports."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds["imports"] = seconds.get("imports", 0.0) + time.perf_counter() - began


_age = process_age()
if _age is not None:
    seconds["interpreter"] = _age
