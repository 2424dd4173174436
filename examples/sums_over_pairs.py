"""Three sums over all pairs with `jaxalign.reduce_pairs`: a custom kernel, an energy distance, a soft nearest neighbor.

python examples/sums_over_pairs.py
python examples/sums_over_pairs.py --keops          # compare with pykeops, if installed
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign


def cauchy_kernel(distances: jax.Array) -> jax.Array:
    """1 / (1 + D): a kernel with heavy tails."""
    return 1 / (1 + distances)


def custom_kernel(x: Any, y: Any, values: Any) -> jax.Array:
    """The product of the kernel matrix with values, (n,)."""
    return jaxalign.reduce_pairs(cauchy_kernel, x, y, values=values)


def energy_distance(x: Any, y: Any) -> jax.Array:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely & Rizzo 2013): 0 in the limit for samples of one distribution."""
    n, m = len(x), len(y)
    between = jaxalign.reduce_pairs(jnp.sqrt, x, y) / n / m
    return 2 * between - jaxalign.reduce_pairs(jnp.sqrt, x) / n**2 - jaxalign.reduce_pairs(jnp.sqrt, y) / m**2


def gaussian(distances: jax.Array) -> jax.Array:
    """exp(-D)."""
    return jnp.exp(-distances)


def soft_nearest_neighbor(x: Any, labels: Any) -> jax.Array:
    """-mean log share of each sample's neighbors with its label (Frosst et al. 2019), temperature 1."""
    by_label = jaxalign.reduce_pairs(gaussian, x, values=jax.nn.one_hot(labels, 10), self_pairs=False)
    same = jnp.take_along_axis(by_label, labels[:, None], 1)[:, 0]
    return -jnp.mean(jnp.log(same / by_label.sum(1)))


def with_keops(x: np.ndarray, y: np.ndarray, values: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same in pykeops."""
    from pykeops.numpy import LazyTensor  # pyright: ignore[reportMissingImports]

    def squared(a: np.ndarray, b: np.ndarray) -> Any:
        return ((LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])) ** 2).sum(-1)

    def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(squared(a, b).sqrt().sum(1).astype(np.float64).sum() / len(a) / len(b))

    def soft() -> Any:
        one_hot = np.eye(10, dtype=x.dtype)[labels]
        by_label = (-squared(x, x)).exp() @ one_hot - one_hot
        return -np.log(by_label[np.arange(len(x)), labels] / by_label.sum(1)).mean()

    return {
        "custom kernel": lambda: ((1 / (1 + squared(x, y))) @ values[:, None])[:, 0],
        "energy distance": lambda: 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y),
        "soft nearest neighbor": soft,
    }


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """The time of the best of three calls after the first, and the result."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        result = np.asarray(call())
        times.append(time.perf_counter() - start)
    return min(times[1:]), result


def main() -> None:
    """Print each sum and its time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--channels", type=int, nargs="+", default=[3, 64])
    parser.add_argument("--keops", action="store_true")
    args = parser.parse_args()
    for width in args.channels:
        rng = np.random.default_rng(0)
        # Distances do not grow with the width, so that the Gaussian kernel does not vanish.
        x, y = (rng.normal(size=(2, args.samples, width)) / np.sqrt(width)).astype(np.float32)
        y, values, labels = y + np.float32(1 / width), rng.normal(size=len(x)).astype(np.float32), (x[:, 0] > 0) * 1
        on_device = [jax.device_put(a) for a in (x, y, values, labels)]
        calls: dict[str, Callable[[], Any]] = {
            "custom kernel": lambda a=on_device: custom_kernel(*a[:3]),
            "energy distance": lambda a=on_device: energy_distance(*a[:2]),
            "soft nearest neighbor": lambda a=on_device: soft_nearest_neighbor(a[0], a[3]),
        }
        keops_calls = with_keops(x, y, values, labels) if args.keops else {}
        for name, call in calls.items():
            time_jaxalign, value = seconds(call)
            line = f"n = {len(x)}, d = {width}, {name}: {np.ravel(value)[0]:.6f} in {time_jaxalign:.2f} s"
            if name in keops_calls:
                time_keops, expected = seconds(keops_calls[name])
                difference = np.max(np.abs(value - expected)) / np.max(np.abs(expected))
                line += (
                    f"; KeOps {np.ravel(expected)[0]:.6f} in {time_keops:.2f} s, relative difference {difference:.0e}"
                )
            print(line)


if __name__ == "__main__":
    main()
