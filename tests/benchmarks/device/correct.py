"""Numbers of the device against float64 numpy: relative errors, each with the largest that is right."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign import Plan, measures
from jaxalign.losses import alignment_loss
from tests import reference
from tests import reference_measures as expected

from ..cases import density_reached
from ..rivals import density_in_chunks
from ..timing import Result

# float32 rounds to 6e-8. The error of a distance is a few times that of |x|^2, and an exponent of 10 makes it ten times
# as large in the affinity. TF32 has 1e-3 of rounding and fails every one of these.
AFFINITY, SIGMA, DERIVATIVE, MEASURE = 1e-5, 3e-6, 5e-5, 1e-5
DENSITY = 0.05
Check = tuple[str, Callable[[], float], float]


def run(n: int, large: tuple[int, int], tiled: tuple[int, int]) -> Iterator[Result | str]:
    """Results as they come in. Checks run side by side, as most of their time is compiling."""
    checks = [*affinities(n), *derivatives(n), *similarities(n), *spectra(n), *degenerate(n)]
    checks += [("a large affinity: density reached, float64", partial(large_density, *large), 2e-6)]
    checks += [("a large affinity, entry by entry", partial(large_entries, *large), AFFINITY)]
    checks += [(f"sigma without n x n, n = {tiled[0]}: density, float64", partial(tiled_density, *tiled), 2e-6)]

    def measured(check: Check) -> Result | str:
        name, error, tolerance = check
        try:
            value = float(error())
        except Exception as reason:  # a check that cannot run is one that fails
            return Result(name, np.inf, "", np.inf, np.inf, "<=", tolerance, f"{type(reason).__name__}: {reason}"[:300])
        return Result(name, value if value == value else np.inf, "", value, value, "<=", tolerance)

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(measured, checks)


def features(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Correlated features with an offset, float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(min(d, 24), d)) / np.arange(1, min(d, 24) + 1)[:, None] ** 0.5
    return (rng.normal(size=(n, len(mix))) @ mix + 0.3 * rng.normal(size=(n, d)) + 30).astype(np.float32)


def largest(actual: Any, wanted: Any) -> float:
    """The largest difference, in units of the largest wanted entry."""
    wanted = np.asarray(wanted, np.float64)
    return float(np.max(np.abs(np.asarray(actual, np.float64) - wanted)) / np.max(np.abs(wanted)))


def apart(x: Any, wanted: float, **options: Any) -> float:
    """How far the solved sigma is from the wanted one, relatively."""
    return abs(float(jaxalign.solve_sigma(x, **options).sigma) / wanted - 1)


def affinities(n: int) -> Iterator[Check]:
    """The affinity, sigma, and products with it."""
    x, y = features(n, 48), features(n // 2 + 1, 48, 1)
    pairs: tuple[tuple[str, tuple[np.ndarray, ...], dict[str, Any]], ...] = (
        ("sigma given", (x,), {"sigma": 4.0}),
        ("auto-scaled", (x,), {}),
        ("with other samples", (x, y), {}),
        ("one sigma per row", (x,), {"bandwidth": "per_row"}),
        ("masked", (x,), {"mask": np.arange(n) % 5 > 0}),
    )
    for name, sides, options in pairs:
        wanted = reference.rbf_affinity(*(side.astype(np.float64) for side in sides), **options)
        ours = partial(jaxalign.rbf_affinity, *sides, **options)
        yield f"affinity, {name}", lambda ours=ours, wanted=wanted: largest(ours(), wanted), AFFINITY

    x64 = x.astype(np.float64)
    sigma = reference.solve_sigma(x64)
    yield "sigma", partial(apart, x, sigma), SIGMA
    yield "sigma in tiles", partial(apart, x, sigma, plan=Plan(n // 3)), SIGMA
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jnp.asarray(x - 30, dtype)
        yield f"sigma of {half.dtype}", partial(apart, half, reference.solve_sigma(np.asarray(half, np.float64))), SIGMA
    for unit in (1e-20, 1e20):
        scaled = (unit * (x - 30)).astype(np.float32)
        yield (
            f"sigma in units of {unit}",
            partial(apart, scaled, reference.solve_sigma(scaled.astype(np.float64))),
            SIGMA,
        )
    double = np.concatenate([x, x[: n // 4]])
    yield "sigma with duplicates", partial(apart, double, reference.solve_sigma(double.astype(np.float64))), SIGMA
    tight = clusters(n)
    sigma = reference.solve_sigma(tight.astype(np.float64), density=0.02)
    yield "sigma of tight clusters far apart", partial(apart, tight, sigma, density=0.02), 1e-5
    in_tiles = partial(apart, tight, sigma, density=0.02, plan=Plan(n // 3))
    yield "sigma of tight clusters far apart, in tiles", in_tiles, 1e-5
    v = np.random.default_rng(2).normal(size=(n, 3)).astype(np.float32)
    product = lambda: jaxalign.affinity_operator(x, plan=Plan(n // 3)) @ v  # noqa: E731
    yield "operator times vectors", lambda: largest(product(), reference.rbf_affinity(x64) @ v), AFFINITY


def clusters(n: int) -> np.ndarray:
    """Eight clusters of unit width, 10^4 apart."""
    rng = np.random.default_rng(3)
    return (1e4 * rng.normal(size=(8, 16))[rng.integers(8, size=n)] + rng.normal(size=(n, 16))).astype(np.float32)


def derivatives(n: int) -> Iterator[Check]:
    """First and second derivatives, stored and in tiles."""
    n = min(n, 96)
    x = features(n, 12) - 30
    x64 = x.astype(np.float64)
    v = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    first = reference.sigma_gradient(x64)
    step = 1e-4
    second = (reference.sigma_gradient(x64 + step * v) - reference.sigma_gradient(x64 - step * v)) / (2 * step)
    for name, size in (("stored", None), ("in tiles", n // 3)):
        gradient = jax.grad(lambda x, size=size: jaxalign.solve_sigma(x, plan=Plan(size)).sigma)
        yield f"gradient of sigma, {name}", lambda g=gradient: largest(jax.jit(g)(x), first), DERIVATIVE
        yield (
            f"Hessian of sigma times a vector, {name}",
            lambda g=gradient: largest(jax.jit(lambda x: jax.jvp(g, (x,), (v,))[1])(x), second),
            DERIVATIVE,
        )
    y = np.tanh(features(n, 8, 5) - 30)

    def loss(x: np.ndarray) -> float:
        return 1 - expected.cka(x, y.astype(np.float64))

    slope = (loss(x64 + step * v) - loss(x64 - step * v)) / (2 * step)
    yield "alignment loss", lambda: abs(float(alignment_loss(x, y)) - loss(x64)), MEASURE
    yield (
        "gradient of the alignment loss along a direction",
        lambda: abs(float(jnp.vdot(jax.jit(jax.grad(alignment_loss))(jnp.asarray(x), y), v)) / slope - 1),
        10 * DERIVATIVE,
    )


def similarities(n: int) -> Iterator[Check]:
    """Measures and their permutations."""
    x = features(n, 32)
    y = np.tanh(x[:, :20] - 30) + 0.3 * features(n, 20, 6) - 9
    pair, pair64 = (x, y.astype(np.float32)), (x.astype(np.float64), y.astype(np.float32).astype(np.float64))
    linear = {"kernel": "linear", "estimator": "biased"}
    squared = {"metric": "sqeuclidean"}
    similarity = {"result": "similarity"}
    cases: tuple[tuple[str, Callable[..., Any], dict[str, Any], Callable[..., Any], dict[str, Any]], ...] = (
        ("CKA", measures.cka, {}, expected.cka, {}),
        ("CKA, linear, biased", measures.cka, linear, expected.cka, linear),
        ("CKA in tiles", measures.cka, {"plan": Plan(n // 3)}, expected.cka, {}),
        ("RSA, Pearson", measures.rsa, {}, expected.rsa, {**squared, "comparison": "pearson"}),
        (
            "RSA, Spearman",
            measures.rsa,
            {"comparison": "spearman"},
            expected.rsa,
            {**squared, "comparison": "spearman"},
        ),
        (
            "distance correlation",
            measures.distance_correlation,
            {"estimator": "biased"},
            expected.distance_correlation,
            {"estimator": "biased", "squared": False},
        ),
        ("mutual nearest neighbors", measures.mutual_knn, {"k": 5}, expected.mutual_knn, {"k": 5}),
        ("Procrustes", measures.procrustes, similarity, expected.shape_distance, similarity),
    )
    for name, measure, options, right, other in cases:
        yield name, lambda m=measure, o=options, r=right, p=other: abs(float(m(*pair, **o)) - r(*pair64, **p)), MEASURE

    def null() -> jax.Array:
        return jaxalign.permutation_test(*pair, key=jax.random.key(0), permutations=64).null

    def on_cpu() -> np.ndarray:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(null())

    yield (
        "CKA of 64 permutations against a CPU's",
        lambda: float(np.max(np.abs(np.asarray(null()) - on_cpu()))),
        MEASURE,
    )


def spectra(n: int) -> Iterator[Check]:
    """The normalized cut."""
    x = features(n, 16) - 30
    a = reference.rbf_affinity(x.astype(np.float64))
    root = 1 / np.sqrt(a.sum(1))
    values = np.linalg.eigvalsh(root[:, None] * a * root)[::-1][:6]
    for method in ("dense", "lobpcg"):
        yield (
            f"eigenvalues of the normalized cut, {method}",
            lambda m=method: largest(jaxalign.normalized_cut(x, 6, method=m).eigenvalues, values),
            AFFINITY,
        )


def degenerate(n: int) -> Iterator[Check]:
    """What has no answer says so, and constants have the one they are promised: 0 for right, 1 for wrong."""
    x = features(n, 8)
    broken = np.where(np.arange(n)[:, None] == 3, np.nan, x).astype(np.float32)

    def refused(call: Callable[[], Any], *words: str) -> float:
        try:
            jax.block_until_ready(call())
        except ValueError as error:
            return float(not all(word in str(error) for word in words))
        return 1.0

    yield "nan is rejected", lambda: refused(lambda: jaxalign.rbf_affinity(broken), "nan", "3"), 0.0
    alike = np.ones((n, 4), np.float32)
    yield "duplicates are rejected", lambda: refused(lambda: jaxalign.solve_sigma(alike), "duplicates"), 0.0
    yield (
        "nan under jit is nan, with a status",
        lambda: float(int(jax.jit(lambda x: jaxalign.solve_sigma(x).status)(broken)) == 0),
        0.0,
    )
    yield "linear CKA of a constant is 0", lambda: abs(float(measures.cka(x, alike, kernel="linear"))), 0.0
    yield (
        "one feature",
        lambda: abs(
            float(jaxalign.solve_sigma(x[:, :1]).sigma) / reference.solve_sigma(x[:, :1].astype(np.float64)) - 1
        ),
        SIGMA,
    )


def large_density(n: int, d: int) -> float:
    """How far the density at the solved sigma is from the wanted one, in float64, relatively."""
    x = features(n, d)
    sigma = float(jaxalign.solve_sigma(x, density=DENSITY, plan=Plan(None)).sigma)
    return abs(density_reached(x, sigma) / DENSITY - 1)


def large_entries(n: int, d: int) -> float:
    """The largest error of an entry, at a given sigma."""
    x, sigma = features(n, d), 0.6 * d**0.5
    return largest(jaxalign.rbf_affinity(x, sigma=sigma), np.exp(-distances64(x) / (2 * sigma * sigma)))


def distances64(x: np.ndarray) -> np.ndarray:
    """Squared distances by products in float64, centred: right to 1e-13 of the largest."""
    x = x.astype(np.float64)
    x -= x.mean(0)
    squares = np.sum(x * x, 1)
    d2 = np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0)
    np.fill_diagonal(d2, 0)
    return d2


def tiled_density(n: int, d: int) -> float:
    """The same where n x n is not stored, by torch in float64 on the device if it is there."""
    x = features(n, d)
    sigma = float(jaxalign.solve_sigma(x, density=DENSITY, plan=Plan(min(4096, n // 3))).sigma)
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            x64 = torch.from_numpy(x.astype(np.float64) - x.mean(0, dtype=np.float64)).cuda()
            return abs(density_in_chunks(x64, sigma) / DENSITY - 1)
    return abs(density_reached(x, sigma) / DENSITY - 1)
