"""Comparison grids and permutations, against loops over pairs of layers in torch and over permutations in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign.kernels import RBF

from . import floor, rivals
from .timing import Result, compare, seconds

DENSITY = 0.05


def make_layers(number: int, n: int, d: int) -> tuple[np.ndarray, ...]:
    """Layers of two networks, each (number, n, d) in float32: a signal that they share, more and more noise."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(n, 64))
    made = np.empty((2, number, n, d), np.float32)
    for k in range(number):
        for model in made:
            model[k] = signal @ rng.normal(size=(64, d)) + 2.0 * k * rng.normal(size=(n, d))
    return made[0], made[1]


def run(layers: int, n: int, d: int, rounds: int, permutations: int, permuted_n: int) -> Iterator[Result | str]:
    """Results as they are measured; a string is a remark to print."""
    yield from grids(layers, n, d, rounds)
    yield from permuting(permuted_n, d, permutations, rounds)
    yield permuting_a_grid(layers, min(n, 2048), d, permutations, rounds)


def grids(layers: int, n: int, d: int, rounds: int) -> Iterator[Result | str]:
    """compare_grid, which solves for sigma too, against torch at known sigmas."""
    if find_spec("torch") is None:
        yield "torch is missing, comparisons of grids with it are left out"
        return
    import torch

    sets = [{str(k): jnp.asarray(x) for k, x in enumerate(model)} for model in make_layers(layers, n, d)]
    tensors = [[torch.from_numpy(np.array(x)) for x in model.values()] for model in sets]
    grid = jaxalign.compare_grid(*sets, "cka", kernel=RBF(density=DENSITY))
    sigma = [float(s) for s in np.asarray(grid.sigma)]
    sigmas = [sigma[:layers], sigma[layers:]]
    own = ("compare_grid", lambda: jaxalign.compare_grid(*sets, "cka", kernel=RBF(density=DENSITY)).values)
    label = f"{layers} x {layers} layers, n = {n}, d = {d}: times faster than torch"
    for what, rival, times, target in (
        ("with every affinity kept", rivals.cka_grid_cached, rounds, 1.0),
        ("pair by pair", rivals.cka_grid, 1, 10.0),
    ):
        other = ("torch", lambda rival=rival: rival(*tensors, sigmas))
        work = floor.grid(layers, n, d)
        yield compare(f"{label} {what}", own, other, times, bound=">=", target=target, inverse=True, work=work)
    difference = np.max(np.abs(np.asarray(grid.values) - rivals.cka_grid_cached(*tensors, sigmas)))
    yield f"largest difference between those grids: {difference:.1e}"


def permuting_a_grid(layers: int, n: int, d: int, permutations: int, rounds: int) -> Result:
    """permutation_test of all pairs of layers, from features to p-values, against compare_grid alone."""
    sets = [{str(k): jnp.asarray(x) for k, x in enumerate(model)} for model in make_layers(layers, n, d)]
    key = jax.random.key(0)

    def test() -> jax.Array:
        return jaxalign.permutation_test(*sets, "cka", key=key, permutations=permutations).corrected

    label = f"{permutations} permutations of {layers} x {layers} layers, n = {n}, d = {d} / the grid alone"
    grid = ("compare_grid", lambda: jaxalign.compare_grid(*sets, "cka").values)
    return compare(label, ("permutation_test", test), grid, rounds, bound="<=", target=2.0)


def permuting(n: int, d: int, permutations: int, rounds: int) -> Iterator[Result | str]:
    """permutation_test from features to p-value, against a numpy loop over stored affinities."""
    first, second = (jnp.asarray(x[0]) for x in make_layers(1, n, d))
    k, m = (np.asarray(jaxalign.rbf_affinity(x, density=DENSITY), np.float64) for x in (first, second))
    some = [np.random.default_rng(i).permutation(n) for i in range(min(permutations, 200))]

    def own() -> jax.Array:
        return jaxalign.permutation_test(first, second, "cka", key=jax.random.key(0), permutations=permutations).null

    seconds(own)
    took = np.array([seconds(own) for _ in range(max(3, rounds))])
    for name, rival, target in (
        ("numpy loop", rivals.permuted_cka, 20.0),
        ("numpy loop, centered once", rivals.permuted_cka_cached, None),
    ):
        # Each permutation costs the same, so a part of them is timed.
        theirs = seconds(lambda rival=rival: rival(k, m, some)) * permutations / len(some)
        low, median, high = np.quantile(theirs / took, [0.25, 0.5, 0.75])
        detail = f"permutation_test {np.median(took) * 1e3:.4g} ms, numpy {theirs * 1e3:.4g} ms (from {len(some)})"
        case = f"{permutations} permutations of CKA, n = {n}: times faster than a {name}"
        bound = ">=" if target else None
        yield Result(case, float(median), "x", float(low), float(high), bound, target, detail)
