"""The normalised cut against what one would take instead: scipy's Lanczos on the stored matrix, and ncut-pytorch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign

from .timing import Result, compare, milliseconds, seconds

COMPONENTS, DENSITY = 20, 0.05


def blobs(n: int, d: int) -> np.ndarray:
    """Thirty clusters that overlap."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, d))
    return (centres[rng.integers(30, size=n)] + 0.7 * rng.normal(size=(n, d))).astype(np.float32)


def run(n: int, d: int, rounds: int) -> Iterator[Result]:
    """Results as they are measured: from features to eigenvectors, sigma given, so that only the cut is compared."""
    import scipy.sparse.linalg

    x = blobs(n, d)
    sigma = float(jaxalign.solve_sigma(x, density=DENSITY).sigma)
    affinity = jax.jit(lambda x: jaxalign.rbf_affinity(x, sigma=sigma))

    def lanczos() -> Any:
        a = np.asarray(affinity(x))
        root = 1 / np.sqrt(a.sum(1))
        return scipy.sparse.linalg.eigsh(root[:, None] * a * root, COMPONENTS)

    case = f"cut, n = {n}, d = {d}, {COMPONENTS} eigenvectors"
    jx = jnp.asarray(x)
    for method in ("lobpcg", "dense"):
        ours = (method, lambda m=method: jaxalign.normalized_cut(jx, COMPONENTS, sigma=sigma, method=m).eigenvectors)
        yield compare(f"{case}: {method} / scipy eigsh on the stored matrix", ours, ("scipy", lanczos), rounds)
    if find_spec("ncut_pytorch"):
        import torch
        from ncut_pytorch import ncut_fn

        tx = torch.from_numpy(x)
        rival = ("ncut-pytorch", lambda: ncut_fn(tx, n_eig=COMPONENTS, sigma=sigma))
        auto = ("jaxalign", lambda: jaxalign.normalized_cut(jx, COMPONENTS, sigma=sigma, method="lobpcg").eigenvectors)
        yield compare(f"{case}: lobpcg / ncut-pytorch", auto, rival, rounds)


def images(number: int, stride: int, rounds: int) -> Iterator[Result]:
    """Cut and colors of images in three networks: the shipped maps, mirrored and with noise."""
    data, rng = jaxalign.datasets.load_part_features(), np.random.default_rng(0)
    maps = {}
    for name in data.features.keys() - set(data.controls):
        found = data.maps(name)[:, ::stride, ::stride]
        found = np.concatenate([found, found[:, ::-1], found[:, :, ::-1]])[:number]
        maps[name] = found + (0.05 * found.std() * rng.normal(size=found.shape)).astype(np.float32)
    side = data.grid[0] // stride
    case = f"color_images, {number} images of {side} x {side} patches in {len(maps)} networks"

    def call() -> Any:
        return jaxalign.color_images(maps).colors

    took = seconds(call)
    yield Result(f"{case}: first call", took, "s", took, took, "<=", 20.0)
    yield milliseconds(case, call, rounds)
