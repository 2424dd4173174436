"""What relative features are compared with: usual alternatives, on the same landmarks and queries; plain numpy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from jaxalign.affinity import rbf_affinity
from jaxalign.alignment import correspondence

# Strengths of the ridge, relative to the mean eigenvalue of the landmarks' covariance.
RIDGE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)

Indices = Int[np.ndarray, " k"]


def standardized(x: Float[np.ndarray, "n d"], over: Indices | slice = slice(None)) -> Float[np.ndarray, "n d"]:
    """Columns minus their mean, over their standard deviation, both taken over some of the rows."""
    part = x[over]
    spread = part.std(0)
    return (x - part.mean(0)) / np.where(spread > 0, spread, 1)


def variance_scaled_rows(x: Float[np.ndarray, "n d"], landmarks: Indices, queries: Indices) -> Float[np.ndarray, "q m"]:
    """Affinities to the landmarks with sigma^2 = total variance of the features, standardised over the queries."""
    return standardized(np.asarray(rbf_affinity(x, x[landmarks], variance_sigma(x)))[queries])


def variance_sigma(x: Float[np.ndarray, "n d"]) -> float:
    """The root of the total variance: a usual bandwidth, which fixes mean(D) / sigma^2 and not the density."""
    return float(np.sqrt(x.var(0).sum()))


def ridge_rows(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "n e"],
    landmarks: Indices,
    queries: Indices,
    strength: float,
) -> tuple[Float[np.ndarray, "q e"], Float[np.ndarray, "q e"]]:
    """The supervised yardstick: x mapped onto y by a ridge regression fitted on the landmark pairs.

    Channels are standardised over the landmarks. Returns the queries of x after the map, and the queries of y.
    """
    x, y = standardized(x, landmarks), standardized(y, landmarks)
    known = x[landmarks]
    ridge = strength * np.sum(known * known) / known.shape[1]
    # The dual form: m x m whatever the number of channels.
    kernel = known @ known.T + ridge * np.eye(len(landmarks), dtype=x.dtype)
    return x[queries] @ (known.T @ np.linalg.solve(kernel, y[landmarks])), y[queries]


def best_ridge(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "n e"],
    landmarks: Indices,
    queries: Indices,
    *,
    csls: int | None = None,
) -> tuple[float, float, float]:
    """Top-1, top-5 and mean reciprocal rank of the ridge map, at the strength that does best on the queries themselves.

    Choosing the strength on the answers flatters the ridge: no other method here chooses anything by them.
    """
    scores = [
        correspondence(*ridge_rows(x, y, landmarks, queries, strength), csls=csls) for strength in RIDGE_STRENGTHS
    ]
    best = max(scores, key=lambda score: float(score.top1))
    return float(best.top1), float(best.top5), float(best.mrr)
