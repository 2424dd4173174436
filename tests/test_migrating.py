"""docs/pages/migrating.md: the right-hand side of each row is run, and compared with what the left-hand side computes.

Packages of the test extra are called. The others are restated in numpy, as their papers or documentation define them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dcor
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import procrustes as qc_procrustes
import pytest
import reference_measures as reference
import rsatoolbox
import scipy.linalg
import scipy.spatial
import scipy.stats

import jaxalign
from jaxalign import measures

PAGE = Path(__file__).parent.parent / "docs" / "pages" / "migrating.md"
N, D1, D2 = 24, 5, 7
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D1)) + 0.3
Y = np.tanh(X @ RNG.normal(size=(D1, D2))) + 0.5 * RNG.normal(size=(N, D2)) - 2
NARROW_Y = Y[:, :D1]  # where both representations must have one width
K, G, S = 3, 0.1, 1.7


# --- what other packages compute --------------------------------------------------------------------------------------


def centered(x):
    return x - x.mean(0)


def pair_distances(x):
    return np.sqrt(reference.sq_distances(x)[np.triu_indices(len(x), 1)])


def linear(estimator):
    return lambda x, y: reference.cka(x, y, kernel="linear", estimator=estimator)


def aligned(x, y):
    """y padded and rotated onto x, padded."""
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(z, ((0, 0), (0, width - z.shape[1]))) for z in (x, y))
    return x, y @ scipy.linalg.orthogonal_procrustes(y, x)[0]


def euclidean(x, y):
    """The distance of two arrays after the best rotation."""
    x, y = aligned(x, y)
    return np.linalg.norm(x - y)


def angle(x, y):
    """The angle between two arrays after the best rotation."""
    x, y = aligned(x, y)
    return np.arccos(np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y)))


def cosine_of(k, m):
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def partly_whitened(x, alpha):
    """Williams et al. 2021, eq. 10, in the unit of the features and of their norm."""
    x = centered(x)
    white = alpha * x + (1 - alpha) * x @ np.linalg.inv(scipy.linalg.sqrtm(x.T @ x).real)
    return white * np.linalg.norm(x) / np.linalg.norm(white)


def shape(score, alpha):
    return lambda x, y: score(partly_whitened(x, alpha), partly_whitened(y, alpha))


def correlations(x, y):
    return reference.canonical_correlations(x, y)


def gram_angle(function, *, diagonal):
    """arccos of the cosine of two centered kernel matrices, with or without their diagonals (Lange et al. 2023)."""

    def value(x, y):
        h = np.eye(len(x)) - 1 / len(x)
        k, m = (h @ function(z) @ h for z in (x, y))
        keep = np.ones_like(k) if diagonal else 1 - np.eye(len(k))
        return np.arccos(cosine_of(k * keep, m * keep))

    return value


def projection(x):
    x = centered(x)
    return x @ np.linalg.pinv(x)


def rsa(method, comparison):
    """rsatoolbox's comparison of two RDMs."""

    def value(x, y):
        rdms = [rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(z), method=method) for z in (x, y)]
        return rsatoolbox.rdm.compare(*rdms, method=comparison)[0, 0]

    return value


def rank_correlation(x, y):
    """Spearman's correlation of 1 - r."""
    first, second = np.triu_indices(len(x), 1)
    return scipy.stats.spearmanr(*((1 - np.corrcoef(z))[first, second] for z in (x, y)))[0]


def pearson_correlation(x, y):
    first, second = np.triu_indices(len(x), 1)
    return np.corrcoef(*((1 - np.corrcoef(z))[first, second] for z in (x, y)))[0, 1]


def normalized_eigenvalues(x, number):
    affinity = np.exp(-reference.sq_distances(x) / (2 * S**2))
    degree = np.sqrt(affinity.sum(1))
    return np.linalg.eigvalsh(affinity / degree[:, None] / degree)[::-1][:number]


def sigma_of_mean(x, mean):
    return (2 * reference.solve_rate(reference.sq_distances(x), mean, "include")) ** -0.5


def gaussian_rdm(x, y):
    del y
    d = reference.sq_distances(x)
    return 1 - np.exp(-d / d.mean())


def of_x(fn):
    """A function of the first representation alone."""
    return lambda x, y: fn(x)


def scikit_learn(call):
    """A value of scikit-learn, imported when needed."""

    def value(x, y):
        pytest.importorskip("sklearn")
        from sklearn import cross_decomposition, metrics, neighbors

        return call(SimpleNamespace(pairwise=metrics.pairwise, cca=cross_decomposition.CCA, nn=neighbors), x, y)

    return value


def learned_correlations(sk, x, y):
    model = sk.cca(D1, max_iter=100_000, tol=1e-14).fit(x, y)
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*(z.T for z in model.transform(x, y)), strict=True)])


# --- the tables -------------------------------------------------------------------------------------------------------

Value = Callable[[np.ndarray, np.ndarray], Any]
BIASED, DEBIASED, LANGE = linear("biased"), linear("debiased"), linear("lange")
BIASED_ANGLE = gram_angle(lambda x: x @ x.T, diagonal=True)
MEDIANS = tuple(float(np.median(pair_distances(z))) for z in (X, Y))

# {section: {left-hand side: what it computes}}
EXPECTED: dict[str, dict[str, Value]] = {
    "scikit-learn": {
        "rbf_kernel(x, gamma=g)": scikit_learn(lambda sk, x, y: sk.pairwise.rbf_kernel(x, gamma=G)),
        "euclidean_distances(x, squared=True)": scikit_learn(
            lambda sk, x, y: sk.pairwise.euclidean_distances(x, squared=True)
        ),
        "pairwise_distances(x)": scikit_learn(lambda sk, x, y: sk.pairwise.pairwise_distances(x)),
        'pairwise_distances(x, metric="cosine")': scikit_learn(
            lambda sk, x, y: sk.pairwise.pairwise_distances(x, metric="cosine")
        ),
        'pairwise_distances(x, metric="correlation")': scikit_learn(
            lambda sk, x, y: sk.pairwise.pairwise_distances(x, metric="correlation")
        ),
        "NearestNeighbors(n_neighbors=k), kneighbors()": scikit_learn(
            lambda sk, x, y: sk.nn.NearestNeighbors(n_neighbors=K).fit(x).kneighbors(return_distance=False)
        ),
        "CCA(min(d1, d2)), mean correlation": scikit_learn(learned_correlations),
    },
    "netrep": {
        "LinearMetric(alpha=1)": shape(angle, 1),
        "LinearMetric(alpha=0)": shape(angle, 0),
        'LinearMetric(alpha=1, score_method="euclidean")': shape(euclidean, 1),
        'LinearMetric(alpha=a, score_method="euclidean")': shape(euclidean, 0.5),
        "LinearCKA()": BIASED_ANGLE,
    },
    "repsim 0.1.5": {
        'cka(kernel_type="linear")': BIASED,
        "cka()": lambda x, y: reference.cka(x, y, kernel="rbf", sigma=MEDIANS, estimator="biased"),
        'hsic(kernel_type="linear", estimator="gretton")': lambda x, y: reference.hsic(
            x, y, kernel="linear", estimator="biased"
        ),
        'the same, estimator="song"': lambda x, y: reference.hsic(x, y, kernel="linear"),
        'the same, estimator="lange"': lambda x, y: reference.hsic(x, y, kernel="linear", estimator="lange"),
        'cca(summary_type="yanai")': lambda x, y: np.mean(correlations(x, y) ** 2),
        'cca(summary_type="pillai")': lambda x, y: np.mean(correlations(x, y)),
        "pwcca()": lambda x, y: (reference.pwcca(x, y) + reference.pwcca(y, x)) / 2,
    },
    "repsim (Lange": {
        '"angular_cka"': gram_angle(lambda x: x @ x.T, diagonal=False),
        '"angular_cka", use_unbiased_hsic=False': BIASED_ANGLE,
        '"angular_cka", kernel=SquaredExponential(s)': gram_angle(
            lambda x: np.exp(-reference.sq_distances(x) / S**2), diagonal=False
        ),
        '"angular_cka", kernel=Laplace(s)': gram_angle(
            lambda x: np.exp(-np.sqrt(reference.sq_distances(x)) / S), diagonal=False
        ),
        '"angular_shape_metric", p=p': shape(angle, 1),
        '"euclidean_shape_metric", p=p': shape(euclidean, 1),
        # Each direction of unit variance, which is x (x'x / n)^(-1/2).
        '"euclidean_shape_metric", p=d, alpha=0.0': lambda x, y: euclidean(
            *(centered(z) @ np.linalg.inv(scipy.linalg.sqrtm(np.cov(z.T, ddof=0)).real) for z in (x, y))
        ),
    },
    "resi": {
        "CKA": BIASED,
        "OrthogonalProcrustesCenteredAndNormalized": lambda x, y: euclidean(
            *(centered(z) / np.linalg.norm(centered(z)) for z in (x, y))
        ),
        "OrthogonalAngularShapeMetricCentered": shape(angle, 1),
        "ProcrustesSizeAndShapeDistance": shape(euclidean, 1),
        "SVCCA": lambda x, y: reference.canonical_correlations(x, y, 1).mean(),
        "DistanceCorrelation": dcor.distance_correlation,
        "RSA": rank_correlation,
        "JaccardSimilarity": lambda x, y: reference.jaccard(x, y, 10),
        # ||P_x - P_y||_F^2, P projects on the span of centered features.
        "Gulp": lambda x, y: np.sum((projection(x) - projection(y)) ** 2),
        "EigenspaceOverlapScore": lambda x, y: np.trace(projection(x) @ projection(y)) / max(D1, D2),
    },
    "similarity-repository": {
        "cka-kernel=linear-hsic=gretton-score": BIASED,
        "cka-kernel=linear-hsic=song-score": DEBIASED,
        "cka-kernel=linear-hsic=lange-score": LANGE,
        "cka-kernel=linear-hsic=gretton-distance=angular": BIASED_ANGLE,
        "procrustes-distance=angular": shape(angle, 1),
        "procrustes-distance=euclidean": shape(euclidean, 1),
        "procrustes-distance=squared_euclidean": lambda x, y: euclidean(centered(x), centered(y)) ** 2,
        "nbs-score": lambda x, y: np.cos(angle(centered(x), centered(y))),
        "rsa-rdm=squared_euclidean-compare=pearson": rsa("euclidean", "corr"),
        "rsa-rdm=correlation-compare=spearman": rank_correlation,
    },
    "thingsvision": {
        'get_cka("numpy", m=n).compare(x, y)': BIASED,
        "the same, unbiased=True": DEBIASED,
        'the same, kernel="rbf", sigma=s': lambda x, y: reference.cka(x, y, sigma=S, estimator="biased"),
        'compute_rdm(x, "correlation")': of_x(lambda x: 1 - np.corrcoef(x)),
        'compute_rdm(x, "cosine")': of_x(lambda x: reference.rdm(x, "cosine")),
        'compute_rdm(x, "euclidean")': of_x(lambda x: reference.rdm(x, "euclidean")),
        'compute_rdm(x, "gaussian")': gaussian_rdm,
        "correlate_rdms(rdm_x, rdm_y)": pearson_correlation,
        'the same, correlation="spearman"': rank_correlation,
    },
    "rsatoolbox": {
        'calc_rdm(Dataset(x), method="euclidean")': of_x(
            lambda x: rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(x), method="euclidean").get_matrices()[0]
        ),
        'calc_rdm(Dataset(x), method="correlation")': of_x(
            lambda x: rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(x), method="correlation").get_matrices()[0]
        ),
        'compare(rdm_x, rdm_y, method="corr")': rsa("euclidean", "corr"),
        'method="spearman"': rsa("euclidean", "spearman"),
        'method="kendall"': rsa("euclidean", "kendall"),
        'method="cosine"': rsa("euclidean", "cosine"),
        'method="cosine_cov"': rsa("euclidean", "cosine_cov"),
        'method="corr_cov"': rsa("euclidean", "corr_cov"),
    },
    "dcor": {
        "dcor.distance_correlation(x, y)": dcor.distance_correlation,
        "dcor.u_distance_correlation_sqr(x, y)": dcor.u_distance_correlation_sqr,
        "procrustes.orthogonal(x, y, pad=True, translate=True, scale=True).error": lambda x, y: (
            qc_procrustes.orthogonal(x, y, pad=True, translate=True, scale=True).error
        ),
        "procrustes.orthogonal(x, y, pad=True, translate=True).error": lambda x, y: (
            qc_procrustes.orthogonal(x, y, pad=True, translate=True).error
        ),
        "scipy.spatial.procrustes(x, y)[2]": lambda x, y: scipy.spatial.procrustes(x, y)[2],
    },
    "ncut-pytorch": {
        "rbf_affinity(x, sigma=s)": of_x(lambda x: np.exp(-reference.sq_distances(x) / (2 * S**2))),
        "find_sigma(x, A_degree=c)": of_x(lambda x: sigma_of_mean(x, 0.2)),
        "ncut_fn(x, n_eig=k, sigma=s)": of_x(lambda x: normalized_eigenvalues(x, K)),
    },
}
EXPECTED["CKA packages"] = {
    "linear CKA, biased": BIASED,
    "linear CKA, unbiased (Nguyen et al. 2021)": DEBIASED,
}
# Rows that hold for representations of one width.
ONE_WIDTH = {
    'LinearMetric(alpha=a, score_method="euclidean")',
    '"euclidean_shape_metric", p=d, alpha=0.0',
    "scipy.spatial.procrustes(x, y)[2]",
}
ITERATIVE = {'method="cosine_cov"': 1e-5, 'method="corr_cov"': 1e-5, "CCA(min(d1, d2)), mean correlation": 1e-6}
# Kernels of a bandwidth, as functions of squared distances: the first table.
KERNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gamma=g: exp(-g D)": lambda d: np.exp(-G * d),
    "scikit-learn's default, gamma = 1 / d": lambda d: np.exp(-d / D1),
    "ncut-pytorch 3 sigma=s": lambda d: np.exp(-0.5 * d / S**2),
    "thingsvision sigma=s": lambda d: np.exp(-0.5 * d / S**2),
    "GPyTorch, tinygp lengthscale=s": lambda d: np.exp(-0.5 * d / S**2),
    "exp(-D / t)": lambda d: np.exp(-d / 3.1),
    "exp(-D / s^2)": lambda d: np.exp(-d / S**2),
    "Kornblith et al. 2019, threshold=h": lambda d: np.exp(-d / (2 * 0.4**2 * np.median(d))),
}
SLOW = {"rsatoolbox", "repsim (Lange"}  # four seconds of compiling each
# Rows of which no value is compared: statistics with random numbers, pictures, and what runs a network.
NOT_COMPARED = {
    "pairwise_distances(train_data)", "get_extractor(...).extract_features(...)", "perm_fn= of blocks",
    'calibrate_layers(xs, ys, sim, agg="max")',
    "eval_bootstrap_pattern, eval_fixed", "cv_noise_ceiling, boot_noise_ceiling", "find_sigma(x)",
    "Ncut(k).fit(x).transform(new)", "kway_ncut(eigvec)", "tsne_color(eigvec), umap_color(eigvec)",
    "the same over minibatches", "CKA(model1, model2, layers...) with hooks", "a mean affinity of m",
    "scipy.linalg.orthogonal_procrustes(x, y)[1]",
}  # fmt: skip
CALIBRATION = (
    "calibrate(x, y, sim, K=m), p-value",
    "its threshold tau, alpha=a",
    "its calibrated score",
)


def rows():
    """The section, the left-hand and the right-hand side of each row of the page, without the marks of code."""
    section = ""
    for line in PAGE.read_text().splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        cells = [cell.strip().replace("`", "") for cell in line.strip("| ").split(" | ")]
        if line.startswith("| ") and cells[0] != "---" and cells[1] not in ("here", "sigma here"):
            yield section, *cells


ROWS = list(rows())


NAMES: dict[str, Any] = {"measures": measures, "kernels": jaxalign.kernels}
NAMES |= {name: value for name, value in vars(jaxalign).items() if callable(value)} | {
    "jnp": jnp, "math": math, "n": N, "d": D1, "d1": D1, "d2": D2, "k": K, "g": G, "s": S, "t": 3.1, "h": 0.4, "a": 0.5,
    "c": 0.2, "median_x": MEDIANS[0], "median_y": MEDIANS[1], "mean_D": reference.sq_distances(X).mean(),
    "median_D": float(np.median(reference.sq_distances(X))), "key": jax.random.key(0), "m": 99,
}  # fmt: skip
EVALUATED: dict[tuple[str, bool], Any] = {}  # the same call stands in several tables


def evaluate(code, one_width=False):
    if (code, one_width) not in EVALUATED:
        value = eval(code, NAMES | {"x": X, "y": NARROW_Y if one_width else Y})
        EVALUATED[code, one_width] = value.eigenvalues if isinstance(value, jaxalign.NormalizedCut) else value
    return EVALUATED[code, one_width]


def test_every_row_is_known_here():
    compared = {(title, left) for title, table in EXPECTED.items() for left in table}
    on_page = {(title, left) for section, left, _ in ROWS for title in EXPECTED if section.startswith(title)}
    assert compared - on_page == set()
    known = {left for _, left in compared} | {*NOT_COMPARED, *CALIBRATION, *KERNELS}
    assert {left for _, left, _ in ROWS} - known == set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("title", [pytest.param(t, marks=pytest.mark.slow if t in SLOW else ()) for t in EXPECTED])
def test_both_sides_of_a_row_agree(x64, title):
    for section, left, right in ROWS:
        if section.startswith(title) and left in EXPECTED[title]:
            one_width = left in ONE_WIDTH
            expected = EXPECTED[title][left](X, NARROW_Y if one_width else Y)
            error = np.abs(np.asarray(evaluate(right, one_width)) - np.asarray(expected)).max()
            assert error < ITERATIVE.get(left, 1e-9) * max(1.0, np.abs(expected).max()), (left, right, error)


def test_bandwidths():
    d = reference.sq_distances(X)
    for section, left, right in ROWS:
        if section == "Bandwidths" and left in KERNELS:
            helpers.assert_close(np.exp(-d / (2 * eval(right, NAMES) ** 2)), KERNELS[left](d), 1e-12)


def test_calibration(x64):
    """Gröger, Wen & Brbić 2026, algorithm 1, of the null that permutation_test draws."""
    right = {left: code for _, left, code in ROWS if left in CALIBRATION}
    test = jaxalign.permutation_test(X, Y, key=NAMES["key"], permutations=NAMES["m"])
    null, value, a = np.asarray(test.null), float(test.value), NAMES["a"]
    p_value, tau, score = (right[left] for left in CALIBRATION)
    assert evaluate(p_value) == (1 + np.sum(null >= value)) / (len(null) + 1)
    threshold = np.quantile([*null, value], 1 - a, method="inverted_cdf")
    names = NAMES | {"test": test}
    assert float(eval(tau, names)) == threshold
    helpers.assert_close(eval(score, names), max(0, (value - threshold) / (1 - threshold)), 1e-12)


@pytest.mark.usefixtures("usual_promotion")
def test_the_code_between_the_tables():
    embed = pytest.importorskip("sklearn.manifold").SpectralEmbedding
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    x = np.asarray(names["x"], float)
    expected = embed(3, affinity="rbf", gamma=0.1, eigen_solver="arpack", random_state=0).fit_transform(x)
    found = np.asarray(names["embedding"])
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-3 * np.abs(expected).max())
    # ncut-pytorch 3.0 and 3.1: a quantile of the degrees at a first sigma is the mean that is solved for.
    d, first = reference.sq_distances(x), x.std(0, ddof=1).sum()
    mean = np.quantile(np.exp(-d / (2 * first**2)).mean(1), 0.25)
    assert abs(names["sigma"] / sigma_of_mean(x, mean) - 1) < 1e-3
