"""Free memory, and the error for a result that does not fit into it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Array

from jaxalign import _arrays

# Smaller arrays are allocated without a check.
_UNCHECKED_BYTES = 2**28
# Peak memory while an array is computed, as a multiple of its size (1.6 was measured for the affinity).
_PEAK_FACTOR = 1.5


def check_stored(what: str, x: Array, y: Array | None) -> None:
    """Raise a MemoryError if a value for each pair does not fit into memory."""
    shape = (*x.shape[:-1], (x if y is None else y).shape[-2])
    way_out = "solve_sigma, affinity_operator, compare, compare_grid and streaming store nothing of that size."
    check_room(what, shape, x, way_out)


def check_room(what: str, shape: Sequence[int], x: Array, way_out: str) -> None:
    """Raise a MemoryError if computing an array takes more memory than is free.

    Checked on CPUs only, where JAX would hang or the system would kill the process; other devices raise by themselves.
    """
    needed = _PEAK_FACTOR * math.prod(shape) * x.dtype.itemsize
    if needed < _UNCHECKED_BYTES or not _arrays.is_concrete(x):
        return
    if any(device.platform != "cpu" for device in x.devices()):
        return
    check_bytes(f"{what} of shape {tuple(shape)} takes {needed / 1e9:.3g} GB while it is computed", needed, way_out)


def check_bytes(claim: str, needed: int | float, way_out: str) -> None:
    """Raise a MemoryError that starts with `claim` if `needed` bytes are not free."""
    if needed < _UNCHECKED_BYTES:
        return
    room = _room()
    if needed > room:
        raise MemoryError(f"{claim}, but only {max(room, 0) / 1e9:.3g} GB are free. {way_out}")


def _room() -> float:
    """Bytes that this process can still allocate, within its limits, caches and swap included; inf if unknown."""
    room = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        room = 1024.0 * sum(int(words[1]) for words in lines if words[0] in ("MemAvailable:", "SwapFree:"))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        room = min(room, float(limit) - float(used)) if limit.strip() != "max" else room
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = min(room, limit - pages * resource.getpagesize()) if limit != resource.RLIM_INFINITY else room
    return room


def free_memory(device: Any) -> float:
    """Free bytes of the device; inf if it does not report them."""
    if device.platform == "cpu":
        return _room()
    stats = device.memory_stats() or {}
    return float(stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0))
