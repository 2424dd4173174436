"""Baselines for relative features: common alternatives, on the same landmarks and queries."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxalign._typing import AnyArray
from jaxalign.affinity import rbf_affinity
from jaxalign.alignment import Correspondence, correspondence

# Strengths of the ridge, relative to the mean eigenvalue of the landmarks' covariance.
RIDGE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)

Indices = Int[np.ndarray, " k"]


@partial(jax.jit, static_argnames="csls")
def compiled_correspondence(
    a: Float[AnyArray, "q m"], b: Float[AnyArray, "q m"], csls: int | None = None
) -> Correspondence:
    """`jaxalign.correspondence` as one compiled program; rows must be finite."""
    return correspondence(a, b, csls=csls)


compiled_affinity = jax.jit(rbf_affinity)
"""`jaxalign.rbf_affinity` as one compiled program; features must be finite and vary."""


def standardized(x: Float[np.ndarray, "n d"], rows: Indices | slice = slice(None)) -> Float[np.ndarray, "n d"]:
    """Columns minus their mean, divided by their standard deviation; both are computed over `rows`."""
    subset = x[rows]
    spread = subset.std(0)
    return (x - subset.mean(0)) / np.where(spread > 0, spread, 1)


def padded(x: Float[np.ndarray, "n d"], width: int) -> Float[np.ndarray, "n width"]:
    """Features with columns of zeros appended, up to a width."""
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


def variance_scaled_rows(x: Float[np.ndarray, "n d"], landmarks: Indices, queries: Indices) -> Float[np.ndarray, "q m"]:
    """Affinities to the landmarks with sigma^2 = total variance of the features, standardized over the queries."""
    return standardized(np.asarray(compiled_affinity(x, x[landmarks], variance_sigma(x)))[queries])


def variance_sigma(x: Float[np.ndarray, "n d"]) -> float:
    """The root of the total variance: a common bandwidth, which fixes mean(D) / sigma^2 but not the density."""
    return float(np.sqrt(x.var(0).sum()))


class Ridge(NamedTuple):
    """The parts of ridge regressions from and to a representation that do not depend on the strength."""

    fitted: jax.Array  # (m, d): landmarks, standardized over the landmarks
    queries: jax.Array  # (q, d): queries, standardized over the landmarks
    channels: jax.Array  # d, without the columns of zeros
    projected: jax.Array  # (q, m): queries times landmarks, in the eigenbasis of landmarks times landmarks
    vectors: jax.Array  # (m, m)
    values: jax.Array  # (m,)


def prepare_ridge(x: Float[np.ndarray, "n d"], landmarks: Indices, queries: Indices, width: int) -> Ridge:
    """Standardize channels over the landmarks, add columns of zeros up to a width, and decompose once."""
    rows = padded(standardized(x, landmarks), width)
    return _decompose(rows[landmarks], rows[queries], x.shape[1])


@jax.jit
def _decompose(fitted: Float[AnyArray, "m d"], queries: Float[AnyArray, "q d"], channels: int) -> Ridge:
    with jax.default_matmul_precision("highest"):
        values, vectors = jnp.linalg.eigh(fitted @ fitted.T)
        projected = queries @ (fitted.T @ vectors)
    return Ridge(jnp.asarray(fitted), jnp.asarray(queries), jnp.asarray(channels), projected, vectors, values)


def best_ridge(x: Ridge, y: Ridge, csls: int | None = None) -> tuple[float, float, float]:
    """A supervised reference: x mapped onto y by a ridge regression fitted on the landmark pairs.

    Returns top-1, top-5 and mean reciprocal rank at the strength that is best on the queries. This favors the ridge
    regression: no other method here tunes anything on the queries.
    """
    scores = np.asarray(_ridge_scores(x, y, csls))
    top1, top5, mrr = scores[:, np.argmax(scores[0])].tolist()
    return top1, top5, mrr


@partial(jax.jit, static_argnames="csls")
def _ridge_scores(x: Ridge, y: Ridge, csls: int | None) -> Float[jax.Array, "3 strengths"]:
    """Top-1, top-5 and mean reciprocal rank at each strength."""
    unit = jnp.sum(x.fitted * x.fitted) / x.channels
    is_channel = jnp.arange(y.fitted.shape[1])[None] < y.channels

    def centered(rows: jax.Array) -> jax.Array:
        # Columns of zeros do not change the correlation of rows whose mean is zero.
        return jnp.where(is_channel, rows - jnp.sum(rows, 1, keepdims=True) / y.channels, 0)

    def scores_at(strength: jax.Array) -> jax.Array:
        # The dual form: m x m for any number of channels.
        mapped = (x.projected / (x.values + strength * unit)[None]) @ (x.vectors.T @ y.fitted)
        score = correspondence(centered(mapped), centered(y.queries), csls=csls)
        return jnp.stack([score.top1, score.top5, score.mrr])

    with jax.default_matmul_precision("highest"):
        # Sequential, because batched products are slow on a CPU.
        return jax.lax.map(scores_at, jnp.asarray(RIDGE_STRENGTHS, x.fitted.dtype)).T
