"""Every measure on hard data against the float64 reference: offsets, units, ranks, wide features, duplicates.

The reference sees the same float32 numbers. All data of one shape run through one compiled program.
"""

from __future__ import annotations

import helpers
import jax
import numpy as np
import pytest
import reference_measures as reference

import jaxalign
from jaxalign import measures
from jaxalign.kernels import RBF, Laplacian
from jaxalign.measures import REGISTRY

# Of numbers of about 1: a hundred roundings of eps = 1.2e-7.
TOLERANCE = 1e-5
SEED = 7  # of data in which no two dissimilarities tie but for rounding
SHAPES = {"tall": (24, 5, 7), "wide": (12, 20, 30)}
KERNEL = {"kernel": RBF(density=0.3)}
OPTIONS = {
    "cka": KERNEL, "hsic": KERNEL, "affinity_distance": KERNEL,
    "mutual_knn": {"k": 3}, "jaccard": {"k": 3}, "cknna": {"k": 3},
    "linear_predictivity": {"folds": 2, "strengths": (1e-6, 1e-1)},
}  # fmt: skip
REFERENCES = {
    "cka": reference.cka,
    "hsic": reference.hsic,
    "rsa": lambda x, y: reference.rsa(x, y, metric="sqeuclidean", comparison="pearson"),
    "distance_correlation": lambda x, y: reference.distance_correlation(x, y, estimator="debiased", squared=False),
    "mutual_knn": reference.mutual_knn,
    "jaccard": reference.jaccard,
    "cknna": reference.cknna,
    "procrustes": lambda x, y: reference.shape_distance(x, y, result="distance"),
    "shape_distance": reference.shape_distance,
    "cca": lambda x, y: reference.canonical_correlations(x, y).mean(),
    "svcca": lambda x, y: reference.canonical_correlations(x, y, 0.99).mean(),
    "pwcca": reference.pwcca,
    "linear_predictivity": reference.linear_predictivity,
    "affinity_distance": lambda x, y, **options: reference.affinity_distance(x, y, result="frobenius", **options),
}
# Beside the defaults: everything that sorts, or takes unit rows, or another estimator.
MORE = {
    **{
        f"rsa {rdm} {compare}": ("rsa", {"metric": rdm, "comparison": compare}, {"metric": rdm, "comparison": compare})
        for rdm, compare in (
            ("sqeuclidean", "spearman"),
            ("euclidean", "kendall"),
            ("cosine", "pearson"),
            ("correlation", "spearman"),
            ("sqeuclidean", "whitened_pearson"),
        )
    },
    "cka linear biased": ("cka", {"kernel": "linear", "estimator": "biased"}, None),
    "mutual_knn correlation": ("mutual_knn", {"k": 3, "metric": "correlation"}, None),
    "shape_distance partly whitened": ("shape_distance", {"alpha": 0.5}, None),
}


def related(seed, n, d, e):
    """Two related representations, float64."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, max(d, e)))
    return z[:, :d], z[:, :e] + 0.5 * rng.normal(size=(n, e))


def hard(n, d, e):
    """Names of data sets, and the two representations, float32."""
    x, y = related(SEED, n, d, e)
    for offset in (0.0, 1e3, 1e5):
        yield f"offset {offset:g}", offset + x, offset + y
    for unit in (2.0**-100, 2.0**60, 2.0**123):  # 8e-31, 1e18, 1e37
        yield f"unit {unit:g}", unit * x, unit * y
    yield "offset and unit", 2.0**90 * (1e5 + x), 2.0**-90 * (y - 1e5)
    copies = np.arange(n) - (np.arange(n) % 4 == 3)  # every fourth sample is a copy of the one before it
    yield "duplicates", x[copies], y[copies]
    yield "a constant channel", np.c_[x[:, 1:], np.full(n, 3e5)], y
    # Whole numbers, which float32 holds at any rank.
    rng = np.random.default_rng(1)
    low_x, low_y = (rng.integers(-200, 200, (n, 3)) @ rng.integers(-3, 4, (3, width)) for width in (d, e))
    yield "rank 3", low_x, low_y + low_x[:, :1]
    yield "rank 3 and offset", low_x + 2.0**23, low_y + low_x[:, :1] - 2.0**22


CASES = {name: (name, OPTIONS.get(name, {}), None) for name in REGISTRY} | MORE


# Only these do something else where features outnumber samples.
WIDE = (
    "procrustes",
    "shape_distance",
    "cca",
    "svcca",
    "pwcca",
    "linear_predictivity",
    "cka",
    "rsa sqeuclidean spearman",
)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "shape"), [(c, "tall") for c in CASES] + [(c, "wide") for c in WIDE])
def test_hard_data(case, shape):
    name, options, in_reference = CASES[case]
    function = getattr(reference, name) if case in MORE else REFERENCES[name]
    if name == "shape_distance":
        function = reference.shape_distance
    wrong = {}
    for label, *both in hard(*SHAPES[shape]):
        x, y = (a.astype(np.float32) for a in both)
        in_reference = helpers.spelled_out(options) if in_reference is None else in_reference
        expected = function(x.astype(float), y.astype(float), **in_reference)
        value = float(getattr(measures, name)(x, y, **options))
        if not abs(value - expected) < TOLERANCE:
            wrong[label] = (value, expected)
    assert not wrong


@pytest.mark.parametrize("name", ["procrustes", "cca", "linear_predictivity", "distance_correlation", "cka"])
def test_an_offset_of_ten_million_standard_deviations(name):
    """Features are then whole numbers, so the order of distances is full of ties, and left out."""
    x, y = (np.float32(1e7 + a) for a in related(1, 200, 16, 8))
    options = {"folds": 5, "strengths": (1e-4, 1e-2)} if name == "linear_predictivity" else {}
    expected = REFERENCES[name](x.astype(float), y.astype(float), **helpers.spelled_out(options))
    assert abs(float(getattr(measures, name)(x, y, **options)) - expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cka", "procrustes", "linear_predictivity", "rsa cosine pearson", "cknna"])
def test_masked_rows_hide_no_offset(case):
    name, options, _ = CASES[case]
    x, y = (np.float32(1e5 + a) for a in related(SEED, 24, 5, 7))
    valid = np.arange(24) < 18  # the last ones, as folds go by the number of the sample
    expected = float(getattr(measures, name)(x[valid], y[valid], **options))
    x[~valid], y[~valid] = 0, np.nan
    assert abs(float(getattr(measures, name)(x, y, mask=valid, **options)) - expected) < TOLERANCE
    if name != "linear_predictivity":  # whose folds go by the order of the samples
        turned = float(getattr(measures, name)(x[::-1], y[::-1], mask=valid[::-1], **options))
        assert abs(turned - expected) < TOLERANCE


def test_correlations_do_not_see_the_scale_of_a_row():
    x, y = (a.astype(np.float32) for a in related(SEED, 24, 8, 7))
    for scales in (1e3 ** (np.arange(24) == 3), 1e8 ** (np.arange(24) == 3), np.exp(np.linspace(-9, 9, 24))):
        z = x * scales[:, None].astype(np.float32)
        for rdm in ("correlation", "cosine"):
            expected = reference.rdm(z.astype(float), rdm)
            np.testing.assert_allclose(np.asarray(measures.rdm(z, rdm)), expected, atol=2e-6)
        expected = reference.mutual_knn(z.astype(float), y.astype(float), 3, "correlation")
        assert abs(float(measures.mutual_knn(z, y, 3, metric="correlation")) - expected) < 1e-6


@pytest.mark.slow
def test_ties_are_seen_behind_a_masked_row():
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 4, (24, 5)).astype(np.float32) for _ in range(2))
    valid = np.arange(24) > 0
    for compare in ("spearman", "kendall"):
        expected = measures.rsa(x[valid], y[valid], comparison=compare)
        found = measures.rsa(x + np.float32(100.1), y, comparison=compare, mask=valid)
        assert abs(float(found) - float(expected)) < 1e-6
    expected = reference.mutual_knn(x[valid].astype(float), y[valid].astype(float), 3, "euclidean")
    found = measures.mutual_knn(x + np.float32(100.25), y, 3, metric="euclidean", mask=valid)
    assert abs(float(found) - expected) < 1e-6


@pytest.mark.slow
def test_a_penalty_of_nothing_is_the_shortest_solution():
    x, y = (a.astype(np.float32) for a in related(SEED, 30, 4, 2))
    x = np.c_[x, x[:, :1]]  # linearly dependent
    expected = float(measures.linear_predictivity(x, y, strengths=(1e-12,)))
    for strengths in ((1e-30,), (1e-42,), (1e-50,), (1e-50, 1e-12)):
        assert abs(float(measures.linear_predictivity(x, y, strengths=strengths)) - expected) < TOLERANCE
        slopes = jax.grad(measures.linear_predictivity, 1)(x, y, strengths=strengths)
        assert np.isfinite(slopes).all()


# --- representations that do not vary --------------------------------------------------------------------------------

CONSTANT = {
    "mutual_knn": None, "jaccard": None,  # equal distances: neighbors are in the order of their numbers
    "procrustes": 2**0.5, "shape_distance": np.pi / 2, "affinity_distance": None,
}  # fmt: skip
CONSTANT_CASES = {
    **{name: (name, {}) for name in REGISTRY if CONSTANT.get(name, 0) is not None and name not in ("cka", "hsic")},
    **{f"rsa {c}": ("rsa", {"comparison": c}) for c in ("spearman", "kendall", "whitened_cosine", "whitened_pearson")},
    **{f"rsa {r}": ("rsa", {"metric": r}) for r in ("euclidean", "cosine")},
    "rsa affinity": ("rsa", {"metric": RBF(2.0)}),
    "distance_correlation biased": ("distance_correlation", {"estimator": "biased"}),
    **{f"cka linear {e}": ("cka", {"kernel": "linear", "estimator": e}) for e in ("debiased", "biased", "lange")},
    **{f"cka {k}": ("cka", {"kernel": k}) for k in (RBF(1.0), Laplacian(1.0))},
    "cka angular": ("cka", {"kernel": "linear", "result": "angular"}),
    "hsic": ("hsic", {"kernel": "linear"}),
    "procrustes angular": ("procrustes", {"result": "angular"}),
    "procrustes similarity": ("procrustes", {"result": "similarity"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CONSTANT_CASES)
def test_one_or_both_do_not_vary(case):
    name, options = CONSTANT_CASES[case]
    n = 24
    x = related(2, n, 5, 5)[0].astype(np.float32)
    constant = np.broadcast_to(np.float32([3.3, -1e5, 7e-9, 0.1, 1.7]), x.shape)
    expected = CONSTANT.get(name, 0.0)
    if options.get("result") == "angular":
        expected = np.pi / 2
    elif options.get("result") == "similarity":
        expected = 0.0
    for a, b in ((x, constant), (constant, x), (constant, constant)):
        assert abs(float(getattr(measures, name)(a, b, **options)) - expected) < 1e-6
    if name != "hsic":
        grid = jaxalign.compare_grid({"x": x, "constant": constant}, measure=name, **options)
        np.testing.assert_allclose(np.asarray(grid.values)[[0, 1, 1], [1, 0, 1]], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cka", {"kernel": "linear"}),
        ("cka", {"kernel": RBF(density=0.2)}),
        ("distance_correlation", {}),
        ("rsa", {}),
        ("rsa", {"metric": "cosine", "comparison": "spearman"}),
        ("cknna", {"k": 3}),
    ],
)
def test_equidistant_samples_are_like_nothing(name, options):
    """The centered matrix is rounding, and permutations of rounding are no evidence."""
    x = np.eye(12, dtype=np.float32)
    y = related(3, 12, 4, 4)[0].astype(np.float32)
    if name != "cknna":  # the directions of the samples are known by their order
        assert float(jaxalign.compare(x, y, name, **options)) == 0
    if options == {"kernel": "linear"}:
        test = jaxalign.permutation_test(x, y, name, key=jax.random.key(0), permutations=99, **options)
        assert (float(test.value), float(test.p_value)) == (0, 1)
        with pytest.raises(ValueError, match="all samples of x are equal or equidistant"):
            jaxalign.bootstrap(x, y, name, key=jax.random.key(0), resamples=20, **options)
