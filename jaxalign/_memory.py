"""How much memory is left, and the error of a result that does not fit into it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Array

from jaxalign import _checks

# Bytes that are taken without asking whether they are there.
_SURELY_THERE = 2**28
# What a stored array takes while it is made, in its own size (1.6 times were measured for the affinity).
_WHILE_MADE = 1.5


def check_stored(what: str, x: Array, y: Array | None) -> None:
    """Raise a MemoryError where values of all pairs cannot be stored."""
    shape = (*x.shape[:-1], (x if y is None else y).shape[-2])
    way_out = "Nothing of that size is stored by solve_sigma, affinity_operator, compare, compare_grid and streaming."
    check_room(what, shape, x, way_out)


def check_room(what: str, shape: Sequence[int], x: Array, way_out: str) -> None:
    """Raise a MemoryError where an array that is to be stored, with what it is made of, is larger than the memory.

    Only of a CPU, where jax would wait for ever or the system would end the process; other devices raise by themselves.
    """
    needed = _WHILE_MADE * math.prod(shape) * x.dtype.itemsize
    if needed < _SURELY_THERE or not _checks.is_concrete(x) or any(device.platform != "cpu" for device in x.devices()):
        return
    check_bytes(f"{what} of shape {tuple(shape)} would take {needed / 1e9:.3g} GB while made", needed, way_out)


def check_bytes(claim: str, needed: int | float, way_out: str) -> None:
    """Raise a MemoryError, which begins with the claim, where so many bytes are more than the memory left."""
    if needed < _SURELY_THERE:
        return
    room = _room()
    if needed > room:
        raise MemoryError(f"{claim}, and there are {max(room, 0) / 1e9:.3g} GB. {way_out}")


def _room() -> float:
    """Bytes that this process may still have: free, or in caches and swap, within its limits; infinite if unknown."""
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
    """Bytes that the device has left; infinite where it does not report them."""
    if device.platform == "cpu":
        return _room()
    stats = device.memory_stats() or {}
    return float(stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0))
