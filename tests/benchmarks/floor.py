"""What this machine could do at best: its measured rates, and the least work that a result needs.

The floor of a case is the larger of its arithmetic (products, then exponentials, which a core does in turn) and the
bytes it must move, each at the rate measured here in the same run. No library reaches it; how many times it one takes
says how much there is to gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    """What this machine does in a second; `products` are those of other precisions than float32."""

    flops: float
    exps: float
    bytes: float
    products: dict[str, float] = field(default_factory=dict)

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


def measured(size: int = 3072, rounds: int = 5, *, in_cache: int = 1 << 17, copied: int = 1 << 26) -> Rates:
    """The best of some rounds of each: products of `size`, exponentials of numbers in cache, copies out of cache."""
    a = jax.random.normal(jax.random.key(0), (size, size))

    def product(precision: lax.Precision, dtype: Any = jnp.float32) -> float:
        multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
        operand = a.astype(dtype)
        return 2 * size**3 / _best(lambda: multiply(operand), rounds)

    small = jax.random.uniform(jax.random.key(1), (in_cache,))
    repeats, in_a_row = 25, 8  # some in a row, so that launches on a GPU do not count

    @jax.jit
    def exponentials(x: jax.Array) -> jax.Array:
        def some(_: int, x: jax.Array) -> jax.Array:
            for _ in range(in_a_row):
                x = jnp.exp(-x)
            return x

        return lax.fori_loop(0, repeats, some, x)

    large = jnp.zeros(copied)
    copy = jax.jit(lambda x: x + 1)
    return Rates(
        flops=product(lax.Precision.HIGHEST),
        exps=repeats * in_a_row * small.size / _best(lambda: exponentials(small), rounds),
        bytes=8 * large.size / _best(lambda: copy(large), rounds),
        products={
            name: product(precision, dtype)
            for name, precision, dtype in (
                ("TF32", lax.Precision.DEFAULT, jnp.float32),
                ("bfloat16", lax.Precision.DEFAULT, jnp.bfloat16),
            )
            if jax.default_backend() != "cpu"
        },
    )


def _best(call: Callable[[], jax.Array], rounds: int) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)
