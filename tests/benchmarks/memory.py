"""Peak memory of one call: python -m tests.benchmarks.memory solve|gradient|loss|cut|affinity n d. Linux only.

Also torch-affinity|ncut-affinity n d and grid|grid-alone|torch-grid n d layers. Prints the growth of the resident set
to its peak, in MB, in the first call and in the second, and the seconds of that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign

from . import rivals
from .similarity import make_layers


def resident(key: str) -> float:
    """VmRSS or VmHWM (its peak), in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


def grown(call: Callable[[], object]) -> tuple[float, float]:
    """By how many MB the resident set grew at its peak, and the seconds that the call took."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before, start = resident("VmRSS"), time.perf_counter()
    jax.block_until_ready(call())
    return resident("VmHWM") - before, time.perf_counter() - start


def grid(what: str, n: int, d: int, layers: int) -> Callable[[], object]:
    """A comparison of so many layers of one model with as many of another, or with each other, by CKA."""
    first, second = make_layers(layers, n, d)
    if what == "torch-grid":
        import torch

        tensors = [[torch.from_numpy(x) for x in model] for model in (first, second)]
        return lambda: rivals.cka_grid_cached(*tensors, [[10.0 * d**0.5] * layers] * 2)
    sets = [{str(k): jnp.asarray(x) for k, x in enumerate(model)} for model in (first, second)]
    return lambda: jaxalign.compare_grid(sets[0], sets[1] if what == "grid" else None).values


def main(what: str, n: int, d: int, layers: int = 0) -> None:
    """Measure and print."""
    if layers:
        call = grid(what, n, d, layers)
        compiling, _ = grown(call)
        print(compiling, *grown(call))
        return
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    if what in ("torch-affinity", "ncut-affinity"):
        import torch

        tx = torch.from_numpy(x)
        stored = {"torch-affinity": rivals.careful_auto, "ncut-affinity": partial(rivals.ncut, samples=n)}[what]
        first, _ = grown(lambda: stored(tx, 0.05))
        print(first, *grown(lambda: stored(tx, 0.05)))
        return
    loss = {
        "affinity": jaxalign.rbf_affinity,
        "cut": lambda x: jaxalign.normalized_cut(x, 20, method="lobpcg").eigenvectors,
        "solve": lambda x: jaxalign.solve_sigma(x).sigma,
        "gradient": jax.value_and_grad(lambda x: jaxalign.solve_sigma(x).sigma),
        "loss": jax.value_and_grad(lambda x: jnp.mean((jaxalign.affinity_operator(x) @ x[:, :8]) ** 2)),
    }[what]
    call = loss if what == "cut" else jax.jit(loss)
    jx = jnp.asarray(x)
    compiling, _ = grown(lambda: call(jx))
    again, took = grown(lambda: call(jx))
    print(compiling, again, took)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
