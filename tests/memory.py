"""Memory of the process that runs the tests, in MB; 0 where the system does not report it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident(which: str = "VmRSS") -> float:
    """Resident memory now ("VmRSS"), or the most there has been ("VmHWM"); 0 where there is no /proc."""
    if not STATUS.exists():
        return 0.0
    lines = STATUS.read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{which}:")), 0) / 1e3


def resident_after_trimming() -> float:
    """Resident memory once all that was freed has gone back to the system, which the allocator would keep for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not the C library of GNU
        ctypes.CDLL(None).malloc_trim(0)
    return resident()
