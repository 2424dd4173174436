"""How time grows with n, d, the number of layers, and the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

import jaxalign

from . import floor, processes
from .similarity import make_layers
from .timing import Result, milliseconds


def run(
    samples: tuple[int, ...], widths: tuple[int, ...], layers: tuple[int, ...], process_n: int, rounds: int
) -> Iterator[Result | str]:
    """Results as they are measured."""
    base_n, base_d = samples[len(samples) // 2], widths[0]
    sizes = [(n, base_d) for n in samples] + [(base_n, d) for d in widths[1:]]
    for n, d in sizes:
        x = jnp.asarray(np.random.default_rng(0).normal(size=(n, d)).astype(np.float32))
        call = lambda x=x: jaxalign.solve_sigma(x).sigma  # noqa: E731
        yield milliseconds(f"solve_sigma, n = {n}, d = {d}", call, rounds, work=floor.solve(n, d))
    n, d = base_n // 4, 4 * base_d
    for number in layers:
        sets = [{str(k): jnp.asarray(x) for k, x in enumerate(model)} for model in make_layers(number, n, d)]
        call = lambda sets=sets: jaxalign.compare_grid(*sets, "cka").values  # noqa: E731
        case = f"compare_grid, {number} x {number} layers, n = {n}, d = {d}"
        yield milliseconds(case, call, rounds, work=floor.grid(number, n, d))
    if process_n:
        alone, both = processes.main(process_n, base_d)
        case = f"solve_sigma, n = {process_n}, d = {base_d}: two one-core processes, times as fast as one"
        detail = f"one {alone * 1e3:.4g} ms, two {both * 1e3:.4g} ms"
        yield Result(case, alone / both, "x", alone / both, alone / both, ">=", 1.7, detail)
