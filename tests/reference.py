"""Independent float64 reference in plain numpy and scipy, written straight from the definitions.

Clarity and correctness come before speed: distances are explicit differences (never the Gram
trick), bandwidths come from a bracketing root finder, and loops are used freely. Nothing here
imports the library under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.intp]
Diagonal = Literal["include", "exclude"]
Bandwidth = Literal["global", "per_row"]
Channels = Literal["standardize", "whiten"]
Metric = Literal["correlation", "cosine", "euclidean"]
ChannelMap = Callable[[ArrayLike], Array]


# --------------------------------------------------------------------------------------------
# Distances, mean density and bandwidth
# --------------------------------------------------------------------------------------------


def squared_distances(x: ArrayLike, y: ArrayLike | None = None) -> Array:
    """D_ij = ||x_i - y_j||^2 by explicit differences (y = x when y is None)."""
    x = _matrix(x)
    y = x if y is None else _matrix(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} columns and y has {y.shape[1]}")
    distances = np.empty((len(x), len(y)))
    for i, row in enumerate(x):
        distances[i] = np.sum((row - y) ** 2, axis=1)
    return distances


def mean_density(
    x: ArrayLike,
    y: ArrayLike | None = None,
    *,
    sigma: ArrayLike,
    diagonal: Diagonal = "include",
    mask: ArrayLike | None = None,
    mask_y: ArrayLike | None = None,
    per_row: bool = False,
) -> float | Array:
    """Mean of A_ij = exp(-D_ij / (2 sigma_i^2)) over the pairs that count.

    Pairs count when both samples are real (mask True); diagonal="exclude" leaves out i == j.
    With per_row the mean of each row, nan for masked rows.
    """
    distances = squared_distances(x, y)
    counted = _counted_pairs(distances.shape, y is None, diagonal, mask, mask_y)
    return _mean_over(_kernel(distances, sigma), counted, per_row)


def floor(
    x: ArrayLike,
    y: ArrayLike | None = None,
    *,
    diagonal: Diagonal = "include",
    mask: ArrayLike | None = None,
    mask_y: ArrayLike | None = None,
    per_row: bool = False,
) -> float | Array:
    """Share of coincident pairs (D_ij == 0) among those that count, the limit for sigma -> 0."""
    distances = squared_distances(x, y)
    counted = _counted_pairs(distances.shape, y is None, diagonal, mask, mask_y)
    return _mean_over((distances == 0.0).astype(np.float64), counted, per_row)


def solve_sigma(
    x: ArrayLike,
    y: ArrayLike | None = None,
    *,
    density: float = 0.05,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
    mask: ArrayLike | None = None,
    mask_y: ArrayLike | None = None,
) -> float | Array:
    """The sigma at which the mean density equals `density`.

    A scalar for bandwidth="global"; for "per_row" one value per row, nan for masked rows.
    ValueError where the floor is not below the density.
    """
    _check(bandwidth, ("global", "per_row"), "bandwidth")
    distances = squared_distances(x, y)
    counted = _counted_pairs(distances.shape, y is None, diagonal, mask, mask_y)
    if bandwidth == "global":
        return _root(distances[counted], density)
    real, _ = _masks(distances.shape, y is None, mask, mask_y)
    sigma = np.full(len(distances), np.nan)
    for i in np.flatnonzero(real):
        sigma[i] = _root(distances[i, counted[i]], density)
    return sigma


def rbf_affinity(
    x: ArrayLike,
    y: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    *,
    density: float = 0.05,
    diagonal: Diagonal = "include",
    bandwidth: Bandwidth = "global",
    zero_diagonal: bool = False,
    mask: ArrayLike | None = None,
    mask_y: ArrayLike | None = None,
) -> Array:
    """A_ij = exp(-D_ij / (2 sigma_i^2)), with sigma solved from the density when not given.

    Masked rows and columns are 0; zero_diagonal sets A_ii = 0 after everything.
    """
    if zero_diagonal and y is not None:
        raise ValueError("zero_diagonal needs y=None")
    if sigma is None:
        sigma = solve_sigma(
            x,
            y,
            density=density,
            diagonal=diagonal,
            bandwidth=bandwidth,
            mask=mask,
            mask_y=mask_y,
        )
    distances = squared_distances(x, y)
    rows, columns = _masks(distances.shape, y is None, mask, mask_y)
    affinity = np.where(np.outer(rows, columns), _kernel(distances, sigma), 0.0)
    if zero_diagonal:
        np.fill_diagonal(affinity, 0.0)
    return affinity


def sigma_gradient(x: ArrayLike, density: float = 0.05, diagonal: Diagonal = "include") -> Array:
    """Analytic d sigma / d x, shape (n, d), for one global sigma and y None.

    From the implicit function theorem d sigma / d D_ij = sigma A_ij / (2 sum_kl A_kl D_kl); the
    sum runs over the pairs that count, and the diagonal contributes nothing to it (D_kk = 0).
    """
    x = _matrix(x)
    sigma = solve_sigma(x, density=density, diagonal=diagonal)
    distances = squared_distances(x)
    counted = _counted_pairs(distances.shape, True, diagonal, None, None)
    affinity = np.where(counted, _kernel(distances, sigma), 0.0)
    wrt_distances = sigma * affinity / (2.0 * np.sum(affinity * distances))
    gradient = np.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            # D_ij = ||x_i - x_j||^2 moves with both of its ends.
            pull = wrt_distances[i, j] * 2.0 * (x[i] - x[j])
            gradient[i] += pull
            gradient[j] -= pull
    return gradient


def sigma_gradient_finite_differences(
    x: ArrayLike, density: float = 0.05, diagonal: Diagonal = "include", step: float = 1e-5
) -> Array:
    """Central differences (sigma(x + h) - sigma(x - h)) / (2 h) of the solver, shape (n, d)."""
    x = _matrix(x)
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        rise = solve_sigma(above, density=density, diagonal=diagonal) - solve_sigma(
            below, density=density, diagonal=diagonal
        )
        gradient[index] = rise / (above[index] - below[index])
    return gradient


# --------------------------------------------------------------------------------------------
# Alignment through landmarks
# --------------------------------------------------------------------------------------------


def align(
    features: Mapping[str, ArrayLike],
    *,
    landmarks: ArrayLike,
    density: float = 0.05,
    bandwidth: Bandwidth = "global",
    diagonal: Diagonal = "include",
    channels: Channels | None = None,
    decorrelate: float | None = None,
    standardize: bool = False,
) -> dict[str, Any]:
    """Every sample of every feature set described by its affinities to the landmarks.

    Returns {"features": {name: (n, m)}, "sigma": {name: scalar or (n,)}, "transform": function},
    where transform(name, x_new) maps new samples with everything as it was fitted. In order:

    1. channels: per feature set, statistics over all n fitted samples (see `_channel_map`).
    2. bandwidth: "global" is the sigma with mean(A(x_L, x_L)) = density, `diagonal` as given;
       "per_row" gives each row of A(x, x_L) its own sigma, the mean over all m columns being
       the density (new rows solve for their own).
    3. rows: R = A(x, x_L).
    4. decorrelate=lam (global only): R <- R (A_LL + lam I)^-1, A_LL with its diagonal of ones.
    5. standardize: each column minus its mean over its standard deviation (ddof=0, a zero one
       counts as 1), from the fitted samples that are not landmarks (from all if none is left).
    """
    _check(bandwidth, ("global", "per_row"), "bandwidth")
    _check(diagonal, ("include", "exclude"), "diagonal")
    if decorrelate is not None and bandwidth != "global":
        raise ValueError("decorrelate needs bandwidth='global'")
    chosen = np.asarray(landmarks, dtype=np.intp)
    aligned: dict[str, Array] = {}
    sigmas: dict[str, float | Array] = {}
    transforms: dict[str, Callable[[ArrayLike], Array]] = {}
    for name, values in features.items():
        aligned[name], sigmas[name], transforms[name] = _align_one(
            _matrix(values),
            chosen,
            density,
            bandwidth,
            diagonal,
            channels,
            decorrelate,
            standardize,
        )

    def transform(name: str, x_new: ArrayLike) -> Array:
        """Aligned rows of new samples of the feature set called `name`."""
        return transforms[name](x_new)

    return {"features": aligned, "sigma": sigmas, "transform": transform}


def joint_affinity(aligned: Sequence[ArrayLike], density: float = 0.05, diagonal: Diagonal = "include") -> Array:
    """The M sets of aligned rows stacked to (M n, m), and their auto-scaled RBF affinity."""
    stacked = np.concatenate([_matrix(rows) for rows in aligned], axis=0)
    return rbf_affinity(stacked, density=density, diagonal=diagonal)


# --------------------------------------------------------------------------------------------
# Correspondence
# --------------------------------------------------------------------------------------------


def similarity(a: ArrayLike, b: ArrayLike, metric: Metric = "correlation") -> Array:
    """S_ij between row i of a and row j of b.

    Pearson correlation, cosine, or minus the squared distance. For the first two, a row of zero
    norm (for correlation: a constant row) has similarity 0 to everything.
    """
    _check(metric, ("correlation", "cosine", "euclidean"), "metric")
    a, b = _matrix(a), _matrix(b)
    if metric == "euclidean":
        return -squared_distances(a, b)
    a, b = _unit_rows(a, metric == "correlation"), _unit_rows(b, metric == "correlation")
    # Row by row rather than by a matrix product, so that equal rows give exactly equal values.
    return np.stack([np.sum(row * b, axis=1) for row in a])


def csls_similarity(scores: ArrayLike, k: int) -> Array:
    """S'_ij = 2 S_ij - r_i - q_j, r and q the means of the k largest of row i and of column j."""
    scores = _matrix(scores)
    if not 1 <= k <= min(scores.shape):
        raise ValueError(f"csls must be between 1 and {min(scores.shape)}, got {k}")
    row_means = np.array([np.mean(np.sort(row)[-k:]) for row in scores])
    column_means = np.array([np.mean(np.sort(column)[-k:]) for column in scores.T])
    return 2.0 * scores - row_means[:, None] - column_means[None, :]


def correspondence(
    a: ArrayLike, b: ArrayLike, *, metric: Metric = "correlation", csls: int | None = None
) -> dict[str, Any]:
    """How well the rows of a find their true partners (same index) among the rows of b.

    index_i = argmax_j S_ij (first on ties), rank_i = number of j != i with S_ij >= S_ii,
    top1 = mean(rank == 0), top5 = mean(rank < 5), mrr = mean(1 / (rank + 1)).
    """
    scores = similarity(a, b, metric)
    if scores.shape[0] != scores.shape[1]:
        raise ValueError(f"a and b need equally many rows, got {scores.shape}")
    if csls is not None:
        scores = csls_similarity(scores, csls)
    n = len(scores)
    rank = np.zeros(n, dtype=np.intp)
    for i in range(n):
        rank[i] = sum(scores[i, j] >= scores[i, i] for j in range(n) if j != i)
    return {
        "index": np.argmax(scores, axis=1),
        "rank": rank,
        "top1": float(np.mean(rank == 0)),
        "top5": float(np.mean(rank < 5)),
        "mrr": float(np.mean(1.0 / (rank + 1.0))),
    }


def ridge_map_top1(a: ArrayLike, b: ArrayLike, landmarks: ArrayLike, strengths: Sequence[float]) -> float:
    """Best top-1, over the strengths, of a ridge map a -> b fitted on the landmarks.

    Channels of a and of b are standardised with their landmark means and deviations, which also
    carries the intercept. With X, Y the standardised landmarks and
    lam = strength * trace(X^T X) / d the map is W = (X^T X + lam I)^-1 X^T Y, or in the dual
    (d > m) W = X^T (X X^T + lam I)^-1 Y. The queries are the samples that are not landmarks:
    each prediction is compared by correlation, over the standardised channels of b, with the
    queries' rows of b.
    """
    a, b = _matrix(a), _matrix(b)
    if len(a) != len(b):
        raise ValueError(f"a and b need equally many rows, got {len(a)} and {len(b)}")
    chosen = np.asarray(landmarks, dtype=np.intp)
    queries = np.setdiff1d(np.arange(len(a)), chosen)
    if len(queries) == 0:
        raise ValueError("every sample is a landmark: no query is left")
    a = (a - np.mean(a[chosen], axis=0)) / _deviation(a[chosen])
    b = (b - np.mean(b[chosen], axis=0)) / _deviation(b[chosen])
    x, y = a[chosen], b[chosen]
    m, d = x.shape
    best = 0.0
    for strength in strengths:
        lam = strength * np.sum(x**2) / d
        if d > m:
            weights = x.T @ np.linalg.solve(x @ x.T + lam * np.eye(m), y)
        else:
            weights = np.linalg.solve(x.T @ x + lam * np.eye(d), x.T @ y)
        best = max(best, correspondence(a[queries] @ weights, b[queries])["top1"])
    return best


# --------------------------------------------------------------------------------------------
# Landmark choice and known cases
# --------------------------------------------------------------------------------------------


def farthest_point_sampling(distances: ArrayLike, m: int) -> IntArray:
    """Indices of m samples in the order chosen, from an (n, n) matrix of distances.

    The first has the smallest sum of distances; each next one, among those not yet chosen, the
    largest minimum distance to those chosen. The first index wins on ties.
    """
    distances = _matrix(distances)
    n = len(distances)
    if distances.shape != (n, n) or not 1 <= m <= n:
        raise ValueError(f"need a square matrix and 1 <= m <= n, got {distances.shape} and {m}")
    chosen = [int(np.argmin([np.sum(row) for row in distances]))]
    while len(chosen) < m:
        best, best_distance = -1, -np.inf
        for i in range(n):
            if i not in chosen:
                nearest = min(distances[i, j] for j in chosen)
                if nearest > best_distance:
                    best, best_distance = i, nearest
        chosen.append(best)
    return np.array(chosen, dtype=np.intp)


def simplex(n: int, edge: float) -> Array:
    """The n points edge / sqrt(2) e_i: a regular simplex in n dimensions, every D_ij = edge^2."""
    return edge / np.sqrt(2.0) * np.eye(n)


def simplex_sigma(n: int, edge: float, c: float) -> float:
    """sigma at density c, diagonal included: 1/n + (1 - 1/n) exp(-edge^2 / (2 sigma^2)) = c."""
    return float(edge / np.sqrt(2.0 * np.log((1.0 - 1.0 / n) / (c - 1.0 / n))))


# --------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------


def _matrix(values: ArrayLike) -> Array:
    """The values as a two-dimensional float64 array."""
    result = np.asarray(values, dtype=np.float64)
    if result.ndim != 2:
        raise ValueError(f"expected a two-dimensional array, got shape {result.shape}")
    return result


def _check(value: object, allowed: tuple[object, ...], name: str) -> None:
    """ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _masks(
    shape: tuple[int, ...], square: bool, mask: ArrayLike | None, mask_y: ArrayLike | None
) -> tuple[BoolArray, BoolArray]:
    """Which rows and which columns are real; with y None (square) the mask serves both."""
    if square and mask_y is not None:
        raise ValueError("mask_y needs y")
    rows = np.ones(shape[0], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if square:
        columns = rows
    elif mask_y is None:
        columns = np.ones(shape[1], dtype=bool)
    else:
        columns = np.asarray(mask_y, dtype=bool)
    if (rows.shape, columns.shape) != ((shape[0],), (shape[1],)):
        raise ValueError(f"masks {rows.shape} and {columns.shape} do not fit {shape}")
    return rows, columns


def _counted_pairs(
    shape: tuple[int, ...],
    square: bool,
    diagonal: Diagonal,
    mask: ArrayLike | None,
    mask_y: ArrayLike | None,
) -> BoolArray:
    """True for the pairs that count: both real and, for diagonal="exclude", i != j."""
    _check(diagonal, ("include", "exclude"), "diagonal")
    if diagonal == "exclude" and not square:
        raise ValueError("diagonal='exclude' needs y=None")
    counted = np.outer(*_masks(shape, square, mask, mask_y))
    if diagonal == "exclude":
        np.fill_diagonal(counted, False)
    return counted


def _kernel(distances: Array, sigma: ArrayLike) -> Array:
    """exp(-D_ij / (2 sigma_i^2)) for a scalar sigma or one sigma per row."""
    sigma = np.asarray(sigma, dtype=np.float64)
    if sigma.shape not in ((), (len(distances),)):
        raise ValueError(f"sigma must be a scalar or ({len(distances)},), got {sigma.shape}")
    per_row = np.broadcast_to(sigma, (len(distances),))
    return np.exp(-distances / (2.0 * per_row[:, None] ** 2))


def _mean_over(values: Array, counted: BoolArray, per_row: bool) -> float | Array:
    """Mean of the values that count, or of each row of them; nan where none counts."""
    if not per_row:
        return float(np.mean(values[counted])) if counted.any() else float("nan")
    means = np.full(len(values), np.nan)
    for i in range(len(values)):
        if counted[i].any():
            means[i] = np.mean(values[i, counted[i]])
    return means


def _root(distances: Array, density: float) -> float:
    """The sigma with mean(exp(-D / (2 sigma^2))) = density over a flat list of distances."""
    if not 0.0 < density < 1.0:
        raise ValueError(f"density must lie strictly between 0 and 1, got {density}")
    if distances.size == 0:
        raise ValueError("no pair counts")
    lowest = float(np.mean(distances == 0.0))
    if lowest >= density:
        raise ValueError(f"the floor {lowest} is not below the density {density}")

    def excess(log_sigma: float) -> float:
        return float(np.mean(np.exp(-0.5 * distances * np.exp(-2.0 * log_sigma)))) - density

    start = 0.5 * float(np.log(np.median(distances[distances > 0.0])))
    low, high = start - 1.0, start + 1.0
    while excess(low) >= 0.0:
        low -= 1.0
    while excess(high) <= 0.0:
        high += 1.0
    return float(np.exp(brentq(excess, low, high, xtol=1e-15, rtol=4.0 * np.finfo(float).eps)))


def _deviation(values: Array) -> Array:
    """Standard deviation of each column (ddof=0), with 1 in place of a zero one.

    A column of equal values counts as zero even where rounding of its mean would say otherwise.
    """
    deviation = np.std(values, axis=0)
    constant = np.all(values == values[:1], axis=0)
    return np.where(constant | (deviation == 0.0), 1.0, deviation)


def _unit_rows(values: Array, centre: bool) -> Array:
    """Rows scaled to unit norm, after subtracting each row's mean if `centre`.

    Rows of zero norm become zero; with `centre` so do constant rows, whatever the rounding.
    """
    result = np.zeros_like(values)
    for i, row in enumerate(values):
        if centre:
            row = np.zeros_like(row) if np.all(row == row[0]) else row - np.mean(row)
        norm = np.sqrt(np.sum(row**2))
        if norm > 0.0:
            result[i] = row / norm
    return result


def _channel_map(x: Array, channels: Channels | None) -> ChannelMap:
    """The map of channels fitted on x.

    None: unchanged. "standardize": (x - mean) / std, ddof=0, a zero std counts as 1.
    "whiten": (x - mean) V diag(1 / sqrt(l + mean(l))) V^T with C = V diag(l) V^T the covariance
    (1/n); if every channel is constant, only the mean is subtracted.
    """
    _check(channels, (None, "standardize", "whiten"), "channels")
    if channels is None:
        return _matrix
    mean = np.mean(x, axis=0)
    if channels == "standardize":
        deviation = _deviation(x)
        return lambda values: (_matrix(values) - mean) / deviation
    centred = x - mean
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    if np.all(x == x[:1]):
        return lambda values: _matrix(values) - mean
    shrunk = eigenvalues + np.mean(eigenvalues)
    whitening = vectors @ np.diag(1.0 / np.sqrt(shrunk)) @ vectors.T
    return lambda values: (_matrix(values) - mean) @ whitening


def _align_one(
    x: Array,
    landmarks: IntArray,
    density: float,
    bandwidth: Bandwidth,
    diagonal: Diagonal,
    channels: Channels | None,
    decorrelate: float | None,
    standardize: bool,
) -> tuple[Array, float | Array, Callable[[ArrayLike], Array]]:
    """Aligned rows, sigma and transform of one feature set (see `align`)."""
    channel_map = _channel_map(x, channels)
    mapped = channel_map(x)
    anchors = mapped[landmarks]
    sigma: float | Array
    if bandwidth == "global":
        sigma = solve_sigma(anchors, density=density, diagonal=diagonal)
    else:
        sigma = solve_sigma(mapped, anchors, density=density, bandwidth="per_row")

    def rows(values: Array) -> Array:
        """Rows before standardisation; new rows solve for their own sigma under per_row."""
        if bandwidth == "per_row":
            return rbf_affinity(values, anchors, density=density, bandwidth="per_row")
        result = rbf_affinity(values, anchors, sigma)
        if decorrelate is not None:
            between = rbf_affinity(anchors, sigma=sigma) + decorrelate * np.eye(len(anchors))
            # R B^-1 = (B^-T R^T)^T, and B is symmetric.
            result = np.linalg.solve(between, result.T).T
        return result

    fitted = rows(mapped)
    mean, deviation = np.zeros(len(anchors)), np.ones(len(anchors))
    if standardize:
        others = np.setdiff1d(np.arange(len(x)), landmarks)
        basis = fitted[others] if len(others) else fitted
        mean, deviation = np.mean(basis, axis=0), _deviation(basis)

    def transform(x_new: ArrayLike) -> Array:
        """Aligned rows of new samples."""
        return (rows(channel_map(x_new)) - mean) / deviation

    return (fitted - mean) / deviation, sigma, transform
