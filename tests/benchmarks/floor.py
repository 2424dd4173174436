"""What this machine could do at best: its measured rates, and the least work that a result needs.

The floor of a case is the larger of its arithmetic (products, then exponentials, which a core does in turn) and the
bytes it must move, each at the rate measured here in the same run. No library reaches it; how many times it one takes
says how much there is to gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Work:
    """The least that a result needs: every pair once, every output written once.

    Attributes:
        flops: of float32 products, an addition and a multiplication counting as two.
        exps: exponentials.
        bytes: read and written.
    """

    flops: float
    exps: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    flops: float
    exps: float
    bytes: float

    def floor(self, work: Work) -> float:
        """Seconds below which the work cannot be done."""
        return max(work.flops / self.flops + work.exps / self.exps, work.bytes / self.bytes)


def affinity(n: int, d: int, sets: int = 1) -> Work:
    """Stored affinities of sets (n, d): symmetric, so half of the pairs are computed."""
    pairs = n * n / 2
    return Work(sets * 2 * d * pairs, sets * pairs, sets * 4 * (n * n + n * d))


def solve(n: int, d: int) -> Work:
    """Sigma for a density: one evaluation of every pair, nothing stored."""
    pairs = n * n / 2
    return Work(2 * d * pairs, pairs, 4 * n * d)


def solve_and_gradient(n: int, d: int) -> Work:
    """And its gradient: a second product of each pair for the distances, as nothing is stored, and one W X."""
    once = solve(n, d)
    return Work(2 * once.flops + 2 * n * n * d, 2 * once.exps, 2 * once.bytes)


def grid(layers: int, n: int, d: int) -> Work:
    """CKA of so many layers of one network with as many of another: affinities, then the product of every two."""
    pairs = n * n / 2
    return Work(2 * layers * 2 * d * pairs + layers**2 * 2 * pairs, 2 * layers * pairs, 2 * layers * 4 * n * d)


def measured(size: int = 3072, rounds: int = 5) -> Rates:
    """The best of some rounds of each."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=lax.Precision.HIGHEST))
    small = jax.random.uniform(jax.random.key(1), (1 << 17,))  # stays in cache
    repeats = 200

    @jax.jit
    def exponentials(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, repeats, lambda _, x: jnp.exp(-x), x)

    large = jnp.zeros(1 << 26)  # 256 MB
    copy = jax.jit(lambda x: x + 1)
    return Rates(
        flops=2 * size**3 / _best(lambda: product(a), rounds),
        exps=repeats * small.size / _best(lambda: exponentials(small), rounds),
        bytes=8 * large.size / _best(lambda: copy(large), rounds),
    )


def _best(call: Callable[[], jax.Array], rounds: int) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)
