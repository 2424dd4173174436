"""Tolerances, feature sets and settings that the tests share.

Compiling takes a second for each new shape and option, so the tests share few of both: 24 rows (18 of them real where
there is a mask) of 5 features, compared with themselves or with 9 other rows.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import reference

import jaxalign
from jaxalign.kernels import RBF, Laplacian

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS, OTHER_ROWS, WIDTH = 24, 9, 5
CLUSTERS = 10

MASK = np.arange(ROWS) % 4 != 1  # 18 real rows, and masked ones in between
MASK_Y = np.arange(OTHER_ROWS) % 3 != 2  # 6 real rows


# Options of `align` for plain rows: every step beyond the affinity is left out.
PLAIN = {"density": 0.05, "channels": None, "decorrelate": None, "standardize": False}


def align(features: Any, **options: Any) -> Any:
    """`jaxalign.align`, with the steps beyond the affinity only where options name them."""
    return jaxalign.align(features, **{**PLAIN, **options})


class Tolerance(NamedTuple):
    """Relative errors that are allowed."""

    value: float  # of an affinity or a distance, against its largest
    density: float  # of the density that a sigma reaches, evaluated in float64
    sigma: float
    gradient: float  # against the largest entry of the gradient
    difference: float  # finite differences of what is exact to `value`


def tolerance(dtype: Any) -> Tolerance:
    """The tolerances of a dtype.

    float32: eps is 1.2e-7. The solver stops at a density within 1e-6; the exponents of the affinity carry a few eps of
    error times the squared distance from the centre over sigma^2, so 1e-5 for the density of ordinary features. sigma
    moves by at most about ten times what the density does at the densities tested, less where it is not close to its
    floor. Finite differences mean nothing in float32.

    float64: eps is 2.2e-16, the solver stops within 1e-13. sigma takes a factor of up to a thousand next to the floor.
    Central differences with a step of 1e-5 are off by h^2 = 1e-10 times a third derivative, and by 1e-13 / h.
    """
    if np.dtype(dtype) == np.float32:
        return Tolerance(value=2e-6, density=1e-5, sigma=1e-4, gradient=1e-4, difference=np.nan)
    return Tolerance(value=1e-14, density=1e-12, sigma=1e-10, gradient=1e-10, difference=1e-6)


@contextlib.contextmanager
def example(name: str) -> Iterator[ModuleType]:
    """A script of examples/ as a module, which its dataclasses can find, and which finds the scripts beside it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        del sys.modules[name]


def assert_close(actual: Any, expected: Any, rtol: float, scale: float | None = None) -> None:
    """Every entry within rtol of the largest expected magnitude (or of `scale`); nan only where nan is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    if np.isnan(expected).all():
        return
    scale = float(np.nanmax(np.abs(expected))) if scale is None else scale
    np.testing.assert_array_less(np.nan_to_num(np.abs(actual - expected)), rtol * scale + np.finfo(np.float64).tiny)


def relative_error(actual: Any, expected: Any) -> float:
    """The largest relative error of an entry; nan counts as an error unless expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if np.any(np.isnan(actual) != np.isnan(expected)):
        return np.inf
    real = ~np.isnan(expected)
    return float(np.max(np.abs(actual[real] / expected[real] - 1)))


# --- feature sets: each (ROWS + OTHER_ROWS, width), float64 ---------------------------------------------------------


def gaussian(rng: np.random.Generator, width: int = WIDTH) -> np.ndarray:
    """Independent normal features."""
    return rng.normal(size=(ROWS + OTHER_ROWS, width))


def one_feature(rng: np.random.Generator) -> np.ndarray:
    """d = 1."""
    return gaussian(rng, 1)


def cauchy(rng: np.random.Generator) -> np.ndarray:
    """Tails so heavy that there is no variance."""
    return rng.standard_cauchy((ROWS + OTHER_ROWS, WIDTH))


def outliers(rng: np.random.Generator) -> np.ndarray:
    """A normal set with two rows a million times as far out."""
    x = gaussian(rng)
    x[[3, 16]] *= 1e6
    return x


def duplicates(rng: np.random.Generator) -> np.ndarray:
    """Every fourth row stands there three times."""
    x = gaussian(rng)
    x[1::4], x[2::4] = x[0::4][: len(x[1::4])], x[0::4][: len(x[2::4])]
    return x


def all_but_two_equal(rng: np.random.Generator) -> np.ndarray:
    """One point, except for four rows (two of the 24, two of the 9) that are others."""
    x = np.repeat(rng.normal(size=(1, WIDTH)), ROWS + OTHER_ROWS, 0)
    x[[4, 8, ROWS + 3, ROWS + 7]] += rng.normal(size=(4, WIDTH))
    return x


def offset(rng: np.random.Generator) -> np.ndarray:
    """A mean a hundred times as large as the spread."""
    return gaussian(rng) + 100


def cluster_of(rows: int) -> np.ndarray:
    """The cluster that each row belongs to in `clusters`."""
    return np.arange(rows) % CLUSTERS


def clusters(rng: np.random.Generator, separation: float = 1e4) -> np.ndarray:
    """Ten normal clusters of width 1 and with centres about `separation` from each other."""
    centres = separation * rng.normal(size=(CLUSTERS, WIDTH))
    return gaussian(rng) + centres[cluster_of(ROWS + OTHER_ROWS)]


def clusters_far_apart(rng: np.random.Generator) -> np.ndarray:
    """Clusters a million widths apart."""
    return clusters(rng, 1e6)


FEATURES = {
    fn.__name__: fn
    for fn in (
        gaussian,
        one_feature,
        cauchy,
        outliers,
        duplicates,
        all_but_two_equal,
        offset,
        clusters,
        clusters_far_apart,
    )
}

# --- settings: how many of the rows are compared with what ----------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "include": {"diagonal": "include"},
    "exclude": {"diagonal": "exclude"},
    "masked include": {"diagonal": "include", "mask": MASK},
    "masked exclude": {"diagonal": "exclude", "mask": MASK},
    "rectangular": {"y": True},
    "masked rectangular": {"y": True, "mask": MASK, "mask_y": MASK_Y},
}
BANDWIDTHS = ("global", "per_row")


def problem(setting: str, features: np.ndarray, dtype: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """x and the keyword arguments of a setting; y, where the setting has one, are the rows that x leaves over."""
    features = np.asarray(features, dtype)
    options = dict(SETTINGS[setting])
    if options.pop("y", False):
        options["y"] = features[ROWS:]
    return features[:ROWS], options


def spoil_masked(x: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """The same problem with nan, inf and huge numbers in the masked rows, which must make no difference."""
    options = dict(options)

    def spoil(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        junk = np.resize(np.array([np.nan, np.inf, 1e30, -np.inf], rows.dtype), rows.shape)
        return np.where(mask[:, None], rows, junk)

    if "mask" in options:
        x = spoil(x, options["mask"])
    if "mask_y" in options:
        options["y"] = spoil(options["y"], options["mask_y"])
    return x, options


def in_float64(x: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """The same numbers, for the reference."""
    return x.astype(np.float64), {k: v.astype(np.float64) if k == "y" else v for k, v in options.items()}


def density_reached(x: np.ndarray, options: dict[str, Any], sigma: Any, bandwidth: str = "global") -> Any:
    """The density at a sigma, in float64."""
    x, options = in_float64(x, options)
    return reference.mean_density(x, **options, sigma=np.asarray(sigma, np.float64), per_row=bandwidth == "per_row")


def share_of_coincident_pairs(x: np.ndarray, options: dict[str, Any], bandwidth: str = "global") -> float:
    """What the density cannot go below; the largest of any row for a bandwidth per row."""
    x, options = in_float64(x, options)
    return float(np.nanmax(reference.floor(x, **options, per_row=bandwidth == "per_row")))


def share_of_pairs_in_a_cluster(options: dict[str, Any], bandwidth: str = "global") -> float:
    """The mean density of `clusters` at a sigma between their width and their distance; the smallest of any row."""
    label = cluster_of(ROWS + OTHER_ROWS)[:, None].astype(np.float64)
    options = {k: label[ROWS:] if k == "y" else v for k, v in options.items()}
    return float(np.nanmin(reference.floor(label[:ROWS], **options, per_row=bandwidth == "per_row")))


def direction(rng: np.random.Generator, value: Any) -> Any:
    """A random tangent for every leaf."""
    return jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)).astype(np.asarray(leaf).dtype), value)


def inner(a: Any, b: Any) -> float:
    """The inner product of two pytrees, in float64."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(sum(np.sum(np.asarray(u, np.float64) * np.asarray(v, np.float64)) for u, v in pairs))


def check_derivatives(fn: Callable[[Any], jax.Array], args: Any, rng: np.random.Generator, step: float = 1e-5) -> None:
    """Forward mode, reverse mode and finite differences agree, on first and second derivatives of a scalar fn.

    Along two random directions u, v in all arguments at once; `args` is a pytree of float64 arrays.
    """
    u, v = direction(rng, args), direction(rng, args)
    forward = jax.jit(lambda args, u: jax.jvp(fn, (args,), (u,)))
    reverse = jax.jit(lambda args, u: jax.jvp(jax.grad(fn), (args,), (u,)))
    allowed = tolerance(np.float64)

    def slope(part: int, tangent: Any) -> float:
        """The central difference along a tangent of fn (part 0) or of its derivative along u (part 1)."""
        above = forward(jax.tree.map(lambda a, t: a + step * t, args, tangent), u)
        below = forward(jax.tree.map(lambda a, t: a - step * t, args, tangent), u)
        return float(above[part] - below[part]) / (2 * step)

    def size(a: Any, b: Any) -> float:
        return float(np.sqrt(inner(a, a) * inner(b, b)))  # the terms of inner(a, b) may be as large as this

    first = float(forward(args, u)[1])
    gradient, products = reverse(args, u)
    assert abs(inner(gradient, u) - first) <= allowed.gradient * size(gradient, u)
    assert abs(slope(0, u) - first) <= allowed.difference * size(gradient, u)
    second = inner(products, v)
    assert abs(inner(reverse(args, v)[1], u) - second) <= allowed.gradient * size(products, v)  # symmetric
    assert abs(slope(1, v) - second) <= allowed.difference * size(products, v)


def sides_in_float64(x: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """x and y, for the reference."""
    x, options = in_float64(x, options)
    return x, options.get("y")


def counted(options: dict[str, Any]) -> np.ndarray:
    """True for the pairs that count in the mean of a problem."""
    rows = options.get("mask", np.ones(ROWS, bool))
    columns = options.get("mask_y", np.ones(OTHER_ROWS, bool)) if "y" in options else rows
    pairs = np.outer(rows, columns)
    return pairs & ~np.eye(ROWS, dtype=bool) if options.get("diagonal") == "exclude" else pairs


def spelled_out(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a measure with a kernel object as the name and the numbers that the references take."""
    plain = {}
    for name, value in options.items():
        if isinstance(value, (RBF, Laplacian)):
            plain |= {name: type(value).__name__.lower(), "density": value.density, "diagonal": value.diagonal}
            plain |= {} if value.sigma is None else {"sigma": value.sigma}
        else:
            plain[name] = value
    return plain
