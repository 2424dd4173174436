"""Sizes at which n x n is better not stored: tiles against one bare pass, torch in chunks of rows, and KeOps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxalign

from . import floor, rivals
from .timing import Result, compare

DENSITY = 0.05
BARE_TILE = 1024
BARE_MOMENTS = 5


@jax.jit
def bare_pass(x: jax.Array, rate: jax.Array) -> jax.Array:
    """One pass over the upper triangle of tiles that sums five moments, and nothing else: no masks, no accuracy check.

    The floor for a solver that needs one pass. n must be a multiple of the tile.
    """
    n, d = x.shape
    first, second = np.triu_indices(n // BARE_TILE)
    squares = jnp.sum(x * x, -1).reshape(-1, BARE_TILE)
    tiles = x.reshape(-1, BARE_TILE, d)

    def visit(sums: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, j = pair
        product = jnp.matmul(tiles[i], tiles[j].T, precision=lax.Precision.HIGHEST)
        z = rate * jnp.maximum(squares[i][:, None] + squares[j][None, :] - 2 * product, 0)
        terms = [jnp.exp(-z) * jnp.where(i == j, 1.0, 2.0)]
        for _ in range(BARE_MOMENTS - 1):
            terms.append(terms[-1] * z)
        return sums + jnp.stack([jnp.sum(jnp.sum(term, -1)) for term in terms]), None

    return lax.scan(visit, jnp.zeros(BARE_MOMENTS), (jnp.asarray(first), jnp.asarray(second)))[0]


def run(n: int, widths: tuple[int, ...], rounds: int) -> Iterator[Result | str]:
    """Results as they are measured; a string is a remark to print."""
    for d in widths:
        x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
        jx = jnp.asarray(x)
        solution = jaxalign.solve_sigma(jx, density=DENSITY)
        sigma = float(solution.sigma)
        rate = jnp.float32(0.5 / sigma**2)
        label = f"n = {n}, d = {d}"
        own = ("solve_sigma", lambda jx=jx: jaxalign.solve_sigma(jx, density=DENSITY).sigma)
        work = floor.solve(n, d)
        bare = ("bare pass", lambda jx=jx, rate=rate: bare_pass(jx, rate))
        yield compare(
            f"{label}: solve_sigma / one bare pass", own, bare, rounds, bound="<=", target=1.25, work=floor.solve(n, d)
        )
        yield f"{label}: passes over all pairs: {int(solution.passes)}"
        if find_spec("torch") is None:
            yield "torch is missing, comparisons with it are left out"
            continue
        import torch

        tx = torch.from_numpy(x)
        chunks = ("torch", lambda tx=tx, sigma=sigma: rivals.density_in_chunks(tx, sigma))
        case = f"{label}: times faster than one density by torch chunks"
        yield compare(case, own, chunks, max(2, rounds // 2), bound=">=", target=5.0, inverse=True)
        if find_spec("pykeops") is None:
            yield "pykeops is missing, comparisons with it are left out: python -m pip install pykeops"
        else:
            keops = ("KeOps", lambda tx=tx, sigma=sigma: rivals.density_by_keops(tx, sigma))
            case = f"{label}: times faster than one density by KeOps"
            yield compare(case, own, keops, 2, bound=">=", target=15.0, inverse=True)
        gradient = jax.jit(jax.value_and_grad(lambda x: jaxalign.solve_sigma(x, density=DENSITY).sigma))
        names = ("value and gradient", lambda jx=jx, f=gradient: f(jx)), own
        case, work = f"{label}: sigma, value and gradient / value", floor.solve_and_gradient(n, d)
        yield compare(case, *names, rounds, bound="<=", target=4.0, work=work)
        loss = lambda x: jnp.mean((jaxalign.affinity_operator(x, density=DENSITY) @ x[:, :8]) ** 2)  # noqa: E731
        value, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
        names = ("both", lambda jx=jx, f=both: f(jx)), ("value", lambda jx=jx, f=value: f(jx))
        yield compare(f"{label}: mean((A x)^2), value and gradient / value", *names, rounds, bound="<=", target=4.0)


def memory(cases: tuple[tuple[str, tuple[int, ...], float | None], ...]) -> Iterator[Result]:
    """Peak growth of memory in a process of its own, beyond the features, in a call that compiles nothing."""
    for what, sizes, target in cases:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.memory", what, *map(str, sizes)],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        compiling, again, took = (float(word) for word in done.stdout.split())
        detail = f"the first call, with compiling: {compiling:.0f} MB; second call {took:.3g} s"
        n, d, *layers = sizes
        case = f"n = {n}, d = {d}: peak growth, {what}" + "".join(f" of {k} layers" for k in layers)
        yield Result(case, again, "MB", again, again, None if target is None else "<=", target, detail)
