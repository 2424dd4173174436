"""Paired timing: what is compared runs in turns in one process, so that a busy machine slows both."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from .floor import Work


@dataclass(frozen=True)
class Result:
    """One line of the table: a measured number next to its target.

    Attributes:
        case: what was measured.
        value: the ratio, or the number of `unit`.
        unit: "x" for a ratio, or a unit of time.
        low: first quartile of the rounds.
        high: third quartile.
        bound: whether the target is an upper or a lower bound; None: for information only.
        target: the target, in the same unit.
        detail: the times behind a ratio, and remarks.
        own: milliseconds of what is measured, the first side of a ratio; None where it is not a time.
        work: the least that it needs, to be set against the machine's rates.
    """

    case: str
    value: float
    unit: str
    low: float
    high: float
    bound: Literal["<=", ">="] | None = None
    target: float | None = None
    detail: str = ""
    own: float | None = None
    work: Work | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.bound is None or self.target is None:
            return None
        return bool(self.value <= self.target if self.bound == "<=" else self.value >= self.target)


def seconds(call: Callable[[], Any]) -> float:
    """Time of one call, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())  # what is not a jax array is ready
    return time.perf_counter() - start


def compare(
    case: str,
    ours: tuple[str, Callable[[], Any]],
    other: tuple[str, Callable[[], Any]],
    rounds: int,
    *,
    bound: Literal["<=", ">="] | None = None,
    target: float | None = None,
    inverse: bool = False,
    work: Work | None = None,
) -> Result:
    """Time two calls in turns, and the ratio of each pair.

    Args:
        case: what the ratio says.
        ours: a name and a call.
        other: a name and a call.
        rounds: pairs that count, after one of each that compiles and warms up.
        bound: of the target.
        target: of the ratio.
        inverse: False: time of ours over that of the other (lower is better). True: the other way round, how many
            times faster ours is.
        work: the least that ours needs.
    """
    for _, call in (ours, other):
        seconds(call)
    pairs = []
    for turn in range(rounds):  # A B, B A, A B, ...: neither always has the caches that the other leaves
        if turn % 2:
            second, first = seconds(other[1]), seconds(ours[1])
        else:
            first, second = seconds(ours[1]), seconds(other[1])
        pairs.append((first, second))
    times = np.array(pairs)
    ratios = times[:, 1] / times[:, 0] if inverse else times[:, 0] / times[:, 1]
    medians = np.median(times, 0) * 1e3
    low, high = np.quantile(ratios, [0.25, 0.75])
    detail = f"{ours[0]} {medians[0]:.4g} ms, {other[0]} {medians[1]:.4g} ms"
    value, own = float(np.median(ratios)), float(medians[0])
    return Result(case, value, "x", float(low), float(high), bound, target, detail, own, work)


def milliseconds(
    case: str, call: Callable[[], Any], rounds: int, *, target: float | None = None, work: Work | None = None
) -> Result:
    """Median time of a call that is compiled already."""
    seconds(call)
    times = 1e3 * np.array([seconds(call) for _ in range(rounds)])
    low, high = np.quantile(times, [0.25, 0.75])
    median, bound = float(np.median(times)), None if target is None else "<="
    return Result(case, median, "ms", float(low), float(high), bound, target, own=median, work=work)


def import_seconds(rounds: int, *, target: float) -> Result:
    """What `import jaxalign` costs beyond `import jax`, in fresh processes, in turns."""

    def fresh(module: str) -> float:
        code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        return float(done.stdout)

    fresh("jaxalign")  # writes byte code, fills the disk's cache
    pairs = np.array([(fresh("jaxalign"), fresh("jax")) for _ in range(rounds)])
    both, alone = np.median(pairs, 0)
    low, high = np.quantile(pairs[:, 0] - pairs[:, 1], [0.25, 0.75])
    detail = f"jaxalign {both:.3g} s, jax alone {alone:.3g} s, medians of {rounds}"
    return Result(
        "import jaxalign - import jax", float(both - alone), "s", float(low), float(high), "<=", target, detail
    )
