"""Peaks of memory on the device, each in a process of its own, against what the result and the tiles need.

python -m tests.benchmarks.device.memory affinity|sigma|gradient|loss|grid n d      prints peak and expected MB
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

import jaxalign
from jaxalign.losses import alignment_loss

from ..timing import Result
from .speed import COMPILED

TILE_BYTES = 4 * 4096**2


def run(cases: tuple[tuple[str, int, int], ...]) -> Iterator[Result | str]:
    """Results; a peak is beyond the features and is compared with a bound that does not grow with n x n."""

    def measured(case: tuple[str, int, int]) -> Result | str:
        what, n, d = case
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.device.memory", what, str(n), str(d)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        if done.returncode:
            raise RuntimeError(f"{what}: {done.stderr[-500:]}")
        words = done.stdout.split()
        if words[0] == "unknown":
            return f"{what}, n = {n}: this device does not tell its peak"
        peak, expected = (float(word) for word in words)
        return Result(f"peak beyond the features: {what}, n = {n}, d = {d}", peak, "MB", peak, peak, "<=", expected)

    yield COMPILED  # each process for itself
    free_torch_memory()
    with ThreadPoolExecutor(len(cases)) as pool:
        yield from pool.map(measured, cases)


def free_torch_memory() -> None:
    """Give back what torch keeps of the device's memory: jax holds a part of it already."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def expected_bytes(what: str, n: int, d: int) -> float:
    """The formula: n x n results, twice as much while they are made, or a dozen tiles; and a few times the features."""
    features = 4.0 * n * d
    tiles = 12 * min(TILE_BYTES, 4 * n * n)
    return {
        "affinity": 3 * 4.0 * n * n + features,
        "sigma": tiles + 3 * features,
        "gradient": 2 * tiles + 8 * features,
        "loss": 12 * 4.0 * n * n + 4 * features,
        "grid": tiles * 2 + 2 * 4 * features,
    }[what]


def call(what: str, x: jax.Array) -> Any:
    """What is measured."""
    if what == "affinity":
        return jaxalign.rbf_affinity(x)
    if what == "sigma":
        return jaxalign.solve_sigma(x).sigma
    if what == "gradient":
        return jax.jit(jax.grad(lambda x: jaxalign.solve_sigma(x).sigma))(x)
    if what == "loss":
        return jax.jit(jax.value_and_grad(alignment_loss))(x, x[::-1])
    layers = {str(k): x + k for k in range(4)}
    return jaxalign.compare_grid(layers).values


def main(what: str, n: int, d: int) -> None:
    """Print the peak beyond the features in MB, and the formula's."""
    x = jax.block_until_ready(jax.random.normal(jax.random.key(0), (n, d)))
    device = jax.local_devices()[0]
    before = (device.memory_stats() or {}).get("bytes_in_use")
    jax.block_until_ready(call(what, x))
    if before is None:
        print("unknown")
        return
    print((device.memory_stats()["peak_bytes_in_use"] - before) / 1e6, expected_bytes(what, n, d) / 1e6)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
