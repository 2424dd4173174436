"""The measures once more, in float64 numpy and scipy, as their papers define them: plain rather than fast."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.stats


def sq_distances(x: np.ndarray) -> np.ndarray:
    """||x_i - x_j||^2 from explicit differences."""
    return ((x[:, None] - x[None]) ** 2).sum(-1)


def solve_rate(values: np.ndarray, density: float, diagonal: str) -> float:
    """t with mean(exp(-t values)) = density."""
    counted = values[~np.eye(len(values), dtype=bool)] if diagonal == "exclude" else values.ravel()
    unit = counted.mean()
    counted = counted / unit
    root = scipy.optimize.brentq(lambda u: np.exp(-np.exp(u) * counted).mean() - density, -60, 60, xtol=1e-15)
    return np.exp(root) / unit


def kernel_matrix(
    x: np.ndarray, kernel: Any = "rbf", sigma: Any = None, density: float = 0.05, diagonal: str = "exclude"
) -> np.ndarray:
    """K."""
    d2 = sq_distances(x)
    if callable(kernel):
        return np.asarray(kernel(d2))
    if kernel == "linear":
        centred = x - x.mean(0)
        return centred @ centred.T
    values = d2 if kernel == "rbf" else np.sqrt(d2)
    rate = solve_rate(values, density, diagonal) if sigma is None else 1 / (2 * sigma**2 if kernel == "rbf" else sigma)
    return np.exp(-rate * values)


def hsic_of(k: np.ndarray, m: np.ndarray, estimator: str) -> float:
    """HSIC of two kernel matrices."""
    n = len(k)
    h = np.eye(n) - 1 / n
    if estimator == "biased":  # Gretton et al. 2005, eq. 9
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2
    if estimator == "lange":  # Lange et al. 2023
        return 2 / (n * (n - 3)) * np.sum(np.triu(h @ k @ h, 1) * np.triu(h @ m @ h, 1))
    k, m, one = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)  # Song et al. 2012, eq. 5
    terms = (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return terms / (n * (n - 3))


def hsic_by_counting(k: np.ndarray, m: np.ndarray, w: np.ndarray | None = None) -> float:
    """The mean of K_ij L_ij - 2 K_ij L_ik + K_ij L_kl over different i, j, k, l, each of weight w_i w_j w_k w_l."""
    w = np.ones(len(k)) if w is None else w
    total = weights = 0.0
    for i, j, a, b in itertools.permutations(range(len(k)), 4):
        weight = w[i] * w[j] * w[a] * w[b]
        total += weight * (k[i, j] * m[i, j] - 2 * k[i, j] * m[i, a] + k[i, j] * m[a, b])
        weights += weight
    return total / weights


def hsic(x: np.ndarray, y: np.ndarray, *, sigma: Any = None, estimator: str = "debiased", **kernel: Any) -> float:
    """HSIC."""
    sigmas = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    return hsic_of(kernel_matrix(x, sigma=sigmas[0], **kernel), kernel_matrix(y, sigma=sigmas[1], **kernel), estimator)


def cka(x: np.ndarray, y: np.ndarray, *, sigma: Any = None, estimator: str = "debiased", **kernel: Any) -> float:
    """CKA."""
    sigmas = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    k, m = (kernel_matrix(a, sigma=s, **kernel) for a, s in zip((x, y), sigmas, strict=True))
    return hsic_of(k, m, estimator) / np.sqrt(hsic_of(k, k, estimator) * hsic_of(m, m, estimator))


def cka_of_sampled_channels(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA whose <K, K> is a mean over pairs of different channels (Chun et al. 2025), channel by channel."""

    def self_product(x: np.ndarray) -> float:
        kernels = [np.outer(z, z) for z in (x - x.mean(0)).T]
        d = len(kernels)
        pairs = [(q, r) for q in range(d) for r in range(d) if q != r]
        return sum(hsic_of(kernels[q], kernels[r], "debiased") for q, r in pairs) * d / (d - 1)

    cross = hsic_of(x @ x.T, y @ y.T, "debiased")
    return cross / np.sqrt(self_product(x) * self_product(y))


def rdm(x: np.ndarray, metric: str, density: float = 0.05, diagonal: str = "exclude") -> np.ndarray:
    """Dissimilarities."""
    if metric == "sqeuclidean":
        return sq_distances(x)
    if metric == "euclidean":
        return np.sqrt(sq_distances(x))
    if metric in ("correlation", "cosine"):
        x = x - x.mean(1, keepdims=True) if metric == "correlation" else x
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        return sq_distances(unit) / 2  # 1 - cos, where 1 - u.v would lose half of the digits
    if metric == "minus rbf":
        return -kernel_matrix(x, "rbf", None, density, diagonal)
    return 1 - kernel_matrix(x, "rbf", None, density, diagonal)


def rsa(x: np.ndarray, y: np.ndarray, *, metric: str, comparison: str, **options: Any) -> float:
    """The comparison of two RDMs over i < j."""
    n = len(x)
    first, second = np.triu_indices(n, 1)
    if metric == "rbf" and comparison in ("spearman", "kendall"):
        metric = "minus rbf"  # the same order, where 1 - A of far pairs is rounded to 1
    a, b = (rdm(z, metric, **options)[first, second] for z in (x, y))
    if comparison == "pearson":
        return np.corrcoef(a, b)[0, 1]
    if comparison == "spearman":
        return scipy.stats.spearmanr(a, b)[0]
    if comparison == "kendall":
        return scipy.stats.kendalltau(a, b)[0]
    if comparison == "cosine":
        return a @ b / np.sqrt(a @ a * (b @ b))
    if comparison == "whitened_pearson":
        a, b = a - a.mean(), b - b.mean()
    contrasts = np.eye(n)[first] - np.eye(n)[second]  # Diedrichsen et al. 2021: V_(ij)(kl) = (c_ij . c_kl)^2
    white = np.linalg.inv((contrasts @ contrasts.T) ** 2)
    return a @ white @ b / np.sqrt(a @ white @ a * (b @ white @ b))


def distance_correlation(x: np.ndarray, y: np.ndarray, *, estimator: str, squared: bool) -> float:
    """Székely, Rizzo & Bakirov 2007, eq. 2.8; Székely & Rizzo 2014 by U-centring."""
    a, b = (np.sqrt(sq_distances(z)) for z in (x, y))
    n = len(a)

    def centred(d: np.ndarray) -> np.ndarray:
        if estimator == "biased":
            return d - d.mean(0) - d.mean(1)[:, None] + d.mean()
        rows = d.sum(1) / (n - 2)
        u = d - rows - rows[:, None] + d.sum() / ((n - 1) * (n - 2))
        return u - np.diag(np.diag(u))

    a, b = centred(a), centred(b)
    square = np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
    return square if squared else np.sign(square) * np.sqrt(abs(square))


def neighbors(x: np.ndarray, k: int, metric: str) -> np.ndarray:
    """The k nearest others."""
    d = rdm(x, "sqeuclidean" if metric == "euclidean" else metric)
    np.fill_diagonal(d, np.inf)
    return np.argsort(d, 1, kind="stable")[:, :k]


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int, metric: str = "cosine") -> float:
    """Huh et al. 2024, eq. 11."""
    pairs = zip(neighbors(x, k, metric), neighbors(y, k, metric), strict=True)
    return float(np.mean([len(set(a) & set(b)) / k for a, b in pairs]))


def jaccard(x: np.ndarray, y: np.ndarray, k: int, metric: str = "cosine") -> float:
    """Shared neighbours over all."""
    pairs = zip(neighbors(x, k, metric), neighbors(y, k, metric), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in pairs]))


def cknna(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Huh et al. 2024, appendix A."""

    def parts(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kernel = -rdm(z, "cosine")  # u.v - 1
        near = np.zeros_like(kernel)
        np.put_along_axis(near, neighbors(z, k, "cosine"), 1, 1)
        return kernel - kernel.mean(1, keepdims=True), near

    (kx, ax), (ky, ay) = parts(x), parts(y)
    return np.sum(ax * ay * kx * ky) / np.sqrt(np.sum(ax * kx * kx) * np.sum(ay * ky * ky))


def _unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(0)
    return x / np.linalg.norm(x)


def shape_distance(
    x: np.ndarray, y: np.ndarray, *, alpha: float = 1.0, normalize: bool = True, result: str = "angular"
) -> float:
    """Williams et al. 2021, by an explicit alignment of the sets padded to one width."""

    def part(z: np.ndarray) -> np.ndarray:
        z = z - z.mean(0)
        size = np.linalg.norm(z)
        z = _unit(z) if normalize else z
        u, s, vt = np.linalg.svd(z, full_matrices=False)
        kept = s > len(z) * np.finfo(float).eps * s[0]
        mixed = _unit(alpha * z + (1 - alpha) * (u[:, kept] @ vt[kept]))
        return mixed if normalize else size * mixed

    a, b = part(x), part(y)
    width = max(a.shape[1], b.shape[1])
    a, b = (np.pad(z, ((0, 0), (0, width - z.shape[1]))) for z in (a, b))
    turn, similarity = scipy.linalg.orthogonal_procrustes(b, a)
    if result == "similarity":
        return similarity
    distance = np.linalg.norm(a - b @ turn)
    return distance if result == "distance" else np.arccos(min(1, similarity))


def _basis(x: np.ndarray, components: float | None = None) -> np.ndarray:
    x = x - x.mean(0)
    x = x - x.mean(0)  # or the rounding of a large mean counts as a direction
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    u, s = (part[..., s > max(x.shape) * np.finfo(float).eps * s[0]] for part in (u, s))
    if isinstance(components, int):
        u = u[:, :components]
    elif components is not None:
        share = np.cumsum(s**2) / np.sum(s**2)
        u = u[:, : int(np.argmax(share >= components)) + 1]
    return u


def canonical_correlations(x: np.ndarray, y: np.ndarray, components: float | None = None) -> np.ndarray:
    """Singular values between the two bases."""
    return np.linalg.svd(_basis(x, components).T @ _basis(y, components), compute_uv=False)


def pwcca(x: np.ndarray, y: np.ndarray) -> float:
    """Morcos et al. 2018, eq. 2-3."""
    u = _basis(x)
    left, correlations, _ = np.linalg.svd(u.T @ _basis(y), full_matrices=False)
    weights = np.abs((u @ left).T @ (x - x.mean(0))).sum(1)
    return np.sum(weights * correlations) / np.sum(weights)


def linear_predictivity(x: np.ndarray, y: np.ndarray, *, folds: int, strengths: tuple[float, ...]) -> float:
    """Ridge with the strength of least leave-one-out error, each sample left out by fitting anew."""
    n, errors, deviations = len(x), 0.0, 0.0

    def fit(a: np.ndarray, b: np.ndarray, penalty: float) -> Any:
        mean_a, mean_b = a.mean(0), b.mean(0)
        a, b = a - mean_a, b - mean_b
        w = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ b)
        return lambda new: (new - mean_a) @ w + mean_b

    for fold in range(folds):
        test = np.arange(n) % folds == fold
        a, b = x[~test], y[~test]
        size = np.linalg.norm(a - a.mean(0)) ** 2 / min(a.shape)
        left_out = []
        for strength in strengths:
            error = 0.0
            for i in range(len(a)):
                others = np.arange(len(a)) != i
                # The shortcut keeps the penalty and the penalised mean-free columns of all samples.
                error += np.sum((fit(a[others], b[others], strength * size)(a[i]) - b[i]) ** 2)
            left_out.append(error)
        predict = fit(a, b, strengths[int(np.argmin(left_out))] * size)
        errors += np.sum((predict(x[test]) - y[test]) ** 2)
        deviations += np.sum((y[test] - b.mean(0)) ** 2)
    return 1 - errors / deviations


def affinity_distance(x: np.ndarray, y: np.ndarray, *, result: str, **options: Any) -> float:
    """Between auto-scaled affinities."""
    difference = kernel_matrix(x, **options) - kernel_matrix(y, **options)
    if result == "frobenius":
        return np.sqrt(np.mean(difference**2))
    return float(np.mean(np.sqrt(np.mean(difference**2, 1))))


def minibatch_cka(batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Nguyen et al. 2021, eq. 2."""
    pairs = [(kernel_matrix(x, "linear"), kernel_matrix(y, "linear")) for x, y in batches]
    xy, xx, yy = (np.mean([hsic_of(p[a], p[b], "debiased") for p in pairs]) for a, b in ((0, 1), (0, 0), (1, 1)))
    return xy / np.sqrt(xx * yy)
