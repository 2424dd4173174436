"""What one would otherwise take: scikit-learn, rsatoolbox, ckatorch, TorchDR, each as its documentation calls it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign

from . import floor
from .similarity import make_layers
from .timing import Result, compare

# What every one of these figures is: how many times faster ours is, at least as fast being the target.
faster = partial(compare, bound=">=", target=1.0, inverse=True)


def run(n: int, d: int, conditions: int, rounds: int) -> Iterator[Result | str]:
    """Results as they are measured; a string is a remark to print."""
    first, second = (x[0] for x in make_layers(1, n, d))
    few, other = first[:conditions], second[:conditions]
    peers = (
        ("sklearn", "scikit-learn", lambda: scikit_learn(first, rounds)),
        ("torchdr", "torchdr", lambda: torchdr(few, min(rounds, 2))),
        ("ckatorch", "ckatorch", lambda: ckatorch(first, second, rounds)),
        ("rsatoolbox", "rsatoolbox", lambda: rsatoolbox(few, other, rounds)),
    )
    for package, install, measured in peers:
        if find_spec(package) is None:
            yield f"{install} is missing, the comparison with it is left out: python -m pip install {install}"
        else:
            yield from measured()


def scikit_learn(x: np.ndarray, rounds: int) -> Iterator[Result | str]:
    """rbf_kernel at a given bandwidth, and spectral_embedding of a stored affinity."""
    from sklearn.manifold import spectral_embedding
    from sklearn.metrics.pairwise import rbf_kernel

    n, d = x.shape
    jx = jnp.asarray(x)
    sigma = float(jaxalign.solve_sigma(jx).sigma)
    yield faster(
        f"affinity at a given sigma, n = {n}, d = {d}: times faster than scikit-learn's rbf_kernel",
        ("jaxalign", lambda: jaxalign.rbf_affinity(jx, sigma=sigma)),
        ("scikit-learn", lambda: rbf_kernel(x, gamma=0.5 / sigma**2)),
        rounds,
        work=floor.affinity(n, d),
    )
    ja = jaxalign.rbf_affinity(jx, sigma=sigma, zero_diagonal=True)
    a = np.asarray(ja)

    def embedding() -> np.ndarray:
        return spectral_embedding(a, n_components=20, drop_first=False, random_state=0)

    yield faster(
        f"20 eigenvectors of a stored affinity, n = {n}: times faster than scikit-learn's spectral_embedding",
        ("jaxalign", lambda: jaxalign.normalized_cut(ja, 20, kind="affinity").eigenvectors),
        ("scikit-learn", embedding),
        rounds,
    )


def torchdr(x: np.ndarray, rounds: int) -> Iterator[Result | str]:
    """A bandwidth for each row: theirs for an entropy (perplexity), ours for a density."""
    import torch
    from torchdr import EntropicAffinity

    n, d = x.shape
    jx, tx = jnp.asarray(x), torch.from_numpy(x)
    theirs = EntropicAffinity(perplexity=0.05 * n)
    yield faster(
        f"a bandwidth per row, n = {n}, d = {d}: times faster than TorchDR's EntropicAffinity (perplexity n / 20)",
        ("jaxalign", lambda: jaxalign.rbf_affinity(jx, bandwidth="per_row")),
        ("TorchDR", lambda: theirs(tx)),
        rounds,
        work=floor.affinity(n, d),
    )


def ckatorch(x: np.ndarray, y: np.ndarray, rounds: int) -> Iterator[Result | str]:
    """Linear CKA, debiased, of two layers."""
    import torch
    from ckatorch.core import cka_base

    n, d = x.shape
    jx, jy, tx, ty = jnp.asarray(x), jnp.asarray(y), torch.from_numpy(x), torch.from_numpy(y)
    ours = jax.jit(lambda x, y: jaxalign.measures.cka(x, y, kernel="linear"))
    theirs = cka_base(tx, ty, unbiased=True)
    yield faster(
        f"linear CKA, debiased, n = {n}, d = {d}: times faster than ckatorch",
        ("jaxalign", lambda: ours(jx, jy)),
        ("ckatorch", lambda: cka_base(tx, ty, unbiased=True)),
        rounds,
        work=floor.Work(2.0 * n * d * (3 * d)),  # with n > d by products of features: x'x, y'y, x'y
    )
    yield f"linear CKA, debiased: jaxalign {float(ours(jx, jy)):.7f}, ckatorch (in float64) {float(theirs):.7f}"


def rsatoolbox(x: np.ndarray, y: np.ndarray, rounds: int) -> Iterator[Result | str]:
    """RDMs of squared distances, and their correlation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rsatoolbox.data import Dataset
        from rsatoolbox.rdm import calc_rdm
        from rsatoolbox.rdm import compare as compare_rdms

    n, d = x.shape
    jx, jy = jnp.asarray(x), jnp.asarray(y)
    for method in ("pearson", "spearman"):
        name = {"pearson": "corr", "spearman": "spearman"}[method]

        def theirs(name: str = name) -> np.ndarray:
            return compare_rdms(*(calc_rdm(Dataset(z), method="euclidean") for z in (x, y)), method=name)

        ours = jax.jit(lambda x, y, m=method: jaxalign.measures.rsa(x, y, metric="sqeuclidean", comparison=m))
        yield faster(
            f"RSA, {method}, {n} conditions, d = {d}: times faster than rsatoolbox",
            ("jaxalign", lambda f=ours: f(jx, jy)),
            ("rsatoolbox", theirs),
            rounds,
            work=floor.Work(2.0 * n * n * d),
        )
        yield f"RSA, {method}: jaxalign {float(ours(jx, jy)):.7f}, rsatoolbox {float(theirs().item()):.7f}"
