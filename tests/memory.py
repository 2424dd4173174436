"""Memory of the process that runs the tests, in MB; 0 where the system does not report it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest

STATUS, MAPS = Path("/proc/self/status"), Path("/proc/self/maps")


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


# MB: what is compiled is dropped beyond the first, and the session fails beyond the second.
PLENTY, TOO_MUCH = 1300, 2400
# MB that have to come on top of what the last time left, or each test would drop the programs of the test before.
MORE = 200
# A compiled program maps a few pieces of memory, of which Linux lets a process have 65530 by default; with more of them
# the compiler crashes.
MANY_MAPS = 30_000


class Watch:
    """A plugin that keeps the memory of a process of tests, doctests included, in bounds, and fails where it cannot.

    Compiled programs are what accumulates: about 5 MB with each test. They are dropped all at once, and only when there
    are many, as tests share them.
    """

    def __init__(self) -> None:
        self.highest = (0.0, "no test")
        self.grown: Counter[str] = Counter()
        self.before = self.left = resident()
        self.complaints: list[str] = []

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        module, now = nodeid.partition("::")[0], resident()
        self.grown[module] += int(now - self.before)
        self.highest = max(self.highest, (now, module))
        self.before = self.drop_programs()

    def drop_programs(self, *, more: float | None = None) -> float:
        """Drop what is compiled if there is much of it; tests that compile hundreds of programs ask for it themselves.

        They say how many MB more than the last time left they stand, whatever the process holds in all. Returns what it
        holds then.
        """
        now = resident()
        limit = max(PLENTY, self.left + MORE) if more is None else self.left + more
        if now > limit or count_maps() > MANY_MAPS:
            jax.clear_caches()
            now = self.left = resident_after_trimming()
        return now

    def complaint(self) -> str | None:
        """What to say at the end of the session, if anything."""
        most, module = self.highest
        if most <= TOO_MUCH:
            return None
        largest, growth = self.grown.most_common(1)[0]
        return (
            f"a process of tests held {most / 1e3:.1f} GB after {module}, more than {TOO_MUCH / 1e3:g} GB; most was "
            f"added by {largest}: {growth / 1e3:.1f} GB"
        )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        found = self.complaint()
        if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: the process that started it fails
            session.config.workeroutput["memory"] = found
        elif found is not None:
            self.complaints.append(found)
        if self.complaints and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        found = getattr(node, "workeroutput", {}).get("memory")
        if found is not None:
            self.complaints.append(f"{node.gateway.id}: {found}")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for found in self.complaints:
            terminalreporter.write_line(f"MEMORY {found}", red=True)


# The watch over this process.
WATCH = Watch()


def count_maps() -> int:
    """Pieces of memory that are mapped; 0 where there is no /proc."""
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0
