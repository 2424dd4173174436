"""Every measure against an independent float64 reference and against published packages."""

from __future__ import annotations

from functools import partial

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
import scipy.stats

import jaxalign
from jaxalign import Plan, measures
from jaxalign.core.features import center_features
from jaxalign.core.resolved import exact_distances
from jaxalign.kernels import RBF, Laplacian
from jaxalign.measures import _rsa

N = 24


def sets(seed=0, n=N, widths=(5, 7)):
    """Two related sets of features, float64."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, widths[0]))
    y = np.tanh(x @ rng.normal(size=widths)) + 0.5 * rng.normal(size=(n, widths[1])) + 3
    return x, y


def rational(d2):
    """A kernel of the user's own."""
    return 1 / (1 + d2)


KERNELS = {"kernel": ["rbf", "laplacian", "linear", rational], "estimator": ["debiased", "biased", "lange"]}
METRICS = ("euclidean", "cosine", "correlation")
RESULTS = ("angular", "distance", "similarity")
DISSIMILARITIES = ("sqeuclidean", "euclidean", "correlation", "cosine", "rbf")
COMPARISONS = ("pearson", "spearman", "kendall", "cosine", "whitened_cosine", "whitened_pearson")
CASES = [
    *(("hsic", {"kernel": k, "estimator": e}) for k in KERNELS["kernel"] for e in KERNELS["estimator"]),
    *(("cka", {"kernel": k, "estimator": e}) for k in KERNELS["kernel"] for e in KERNELS["estimator"]),
    ("cka", {"kernel": RBF(density=0.2, diagonal="include")}),
    ("cka", {"kernel": RBF((2.0, 3.0))}),
    ("cka", {"kernel": Laplacian(2.5)}),
    *(("rsa", {"metric": r, "comparison": c}) for r in DISSIMILARITIES for c in COMPARISONS),
    *(("distance_correlation", {"estimator": e, "squared": s}) for e in ("biased", "debiased") for s in (True, False)),
    *((name, {"k": 5, "metric": m}) for name in ("mutual_knn", "jaccard") for m in METRICS),
    ("cknna", {"k": 5}),
    *(("shape_distance", {"alpha": a, "result": r}) for a in (0.0, 0.5, 1.0) for r in RESULTS),
    *(("shape_distance", {"alpha": a, "normalize": False, "result": "distance"}) for a in (0.0, 0.5, 1.0)),
    ("linear_predictivity", {"folds": 4, "strengths": (1e-3, 1e-1, 1e1)}),
    *(("affinity_distance", {"result": r}) for r in ("frobenius", "rows")),
    ("pwcca", {}),
]
# One of each kind once more in float32, as compiling takes most of the time.
IN_FLOAT32 = [
    ("cka", {"kernel": "laplacian", "estimator": "debiased"}),
    ("cka", {"kernel": "rbf", "estimator": "biased"}),
    ("hsic", {"kernel": "linear", "estimator": "lange"}),
    *(("rsa", {"metric": "rbf", "comparison": c}) for c in ("pearson", "spearman", "whitened_cosine")),
    ("distance_correlation", {"estimator": "debiased", "squared": False}),
    ("cknna", {"k": 5}),
    ("shape_distance", {"alpha": 0.5, "result": "distance"}),
    ("shape_distance", {"alpha": 0.5, "normalize": False, "result": "distance"}),
    ("linear_predictivity", {"folds": 4, "strengths": (1e-3, 1e-1, 1e1)}),
    ("affinity_distance", {"result": "rows"}),
    ("pwcca", {}),
]


def named(case):
    return case[0] + "-" + "-".join(str(getattr(value, "__name__", value)) for value in case[1].values())


def agree(case, dtype, allowed):
    name, options = case
    x, y = (a.astype(dtype) for a in sets())
    value = getattr(measures, name)(x, y, **options)
    assert value.dtype == dtype
    expected = getattr(reference, name)(x.astype(float), y.astype(float), **helpers.spelled_out(options))
    helpers.assert_close(value, expected, allowed, scale=max(1.0, abs(expected)) if dtype == np.float32 else None)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_measure_agrees_with_the_reference(case, x64):
    agree(case, np.float64, 1e-9)  # leave-one-out by the shortcut and the like: a few thousand roundings


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_FLOAT32, ids=named)
def test_measure_agrees_with_the_reference_in_float32(case):
    agree(case, np.float32, 1e-5)  # a hundred roundings of eps = 1.2e-7, of numbers of about 1


@pytest.mark.parametrize("widths", [(5, 7), (7, 5), (40, 5), (40, 50)], ids=str)
@pytest.mark.parametrize("components", [None, 2, 0.9], ids=str)
def test_canonical_correlations_agree_with_the_reference(x64, widths, components):
    x, y = sets(1, widths=widths)
    expected = reference.canonical_correlations(x, y, components)
    if components is None:
        helpers.assert_close(measures.cca(x, y), expected.mean(), 1e-10)
        helpers.assert_close(measures.cca(x, y, result="mean_squared"), (expected**2).mean(), 1e-10)
    else:
        helpers.assert_close(measures.svcca(x, y, num_components=components), expected.mean(), 1e-10)
        squared = measures.svcca(x, y, num_components=components, result="mean_squared")
        helpers.assert_close(squared, (expected**2).mean(), 1e-10)


@pytest.mark.parametrize("result", ["distance", "angular", "similarity"])
def test_procrustes_agrees_with_the_reference(x64, result):
    for widths in ((5, 7), (7, 5), (5, 5), (40, 30)):
        x, y = sets(2, widths=widths)
        expected = reference.shape_distance(x, y, result=result)
        helpers.assert_close(measures.procrustes(x, y, result=result), expected, 1e-10)


def unscaled(x, y):
    """min_Q ||x - y Q||_F of centered x and y, from an explicit Q."""
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(z - z.mean(0), ((0, 0), (0, width - z.shape[1]))) for z in (x, y))
    return np.linalg.norm(x - y @ scipy.linalg.orthogonal_procrustes(y, x)[0])


@pytest.mark.parametrize("widths", [(5, 7), (7, 5), (5, 5), (40, 30)], ids=str)
def test_procrustes_without_normalization_has_the_unit_of_the_features(x64, widths):
    x, y = sets(2, widths=widths)
    expected = unscaled(x, y)
    assert abs(expected - reference.shape_distance(x, y, normalize=False, result="distance")) < 1e-10 * expected
    for unit in (1.0, 2.0**100, 1e-30):
        value = measures.procrustes(unit * x + unit, unit * y, normalize=False)
        helpers.assert_close(value, unit * expected, 1e-10)
        value = measures.shape_distance(unit * x, unit * y, normalize=False, result="distance")
        helpers.assert_close(value, unit * expected, 1e-10)


def test_procrustes_without_normalization_of_float32_far_from_0():
    for offset, unit in ((1e5, 1.0), (1e3, 2.0**118), (0.0, 2.0**-100)):
        x, y = (np.float32(unit * (offset + z)) for z in sets(2))
        expected = unscaled(x.astype(float), y.astype(float))
        helpers.assert_close(measures.procrustes(x, y, normalize=False), expected, 1e-6)


def test_procrustes_without_normalization_of_masked_samples_and_batches(x64):
    x, y = np.stack([sets(2)[0], 3 * sets(3)[0]]), np.stack([sets(2)[1], sets(3)[1]])
    mask = np.arange(N) % 5 != 2
    dirty = np.where(mask[:, None], x, np.nan)
    for alpha in (0.5, 1.0):
        options = {"alpha": alpha, "normalize": False, "result": "distance"}
        expected = [reference.shape_distance(a[mask], b[mask], **options) for a, b in zip(x, y, strict=True)]
        helpers.assert_close(measures.shape_distance(dirty, y, mask=mask, **options), expected, 1e-10)
        helpers.assert_close(
            jax.vmap(lambda a, b: measures.shape_distance(a, b, **options))(x, y)[0],  # noqa: B023
            reference.shape_distance(x[0], y[0], **options),
            1e-10,
        )


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_gradients_of_the_distance_without_normalization(x64, alpha):
    (x, y), rng, step = sets(4), np.random.default_rng(0), 1e-6
    options = {"alpha": alpha, "normalize": False, "result": "distance"}
    gradients = jax.grad(lambda a, b: measures.shape_distance(a, b, **options), (0, 1))(x, y)
    directions = [rng.normal(size=z.shape) for z in (x, y)]
    above, below = (
        reference.shape_distance(x + s * directions[0], y + s * directions[1], **options) for s in (step, -step)
    )
    slope = sum(float(np.sum(g * u)) for g, u in zip(gradients, directions, strict=True))
    helpers.assert_close(slope, (above - below) / (2 * step), 1e-7)


def test_distance_without_normalization_of_equal_and_of_constant_sets(x64):
    x, y = sets(4)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    unscaled_procrustes = partial(measures.procrustes, normalize=False)
    value, slope = jax.value_and_grad(unscaled_procrustes)(x, x @ turn + 3)
    assert value < 1e-13 * np.linalg.norm(x)
    assert not slope.any()  # there is no direction to move in
    value, slope = jax.value_and_grad(unscaled_procrustes)(x, np.full_like(y, 3.3))
    size = np.linalg.norm(x - x.mean(0))
    helpers.assert_close(value, size, 1e-12)
    helpers.assert_close(slope, (x - x.mean(0)) / size, 1e-12)
    assert unscaled_procrustes(np.ones_like(x), np.ones_like(y)) == 0


@pytest.mark.parametrize("result", ["angular", "similarity"])
def test_results_that_need_normalization_are_refused_without_it(result):
    x, y = (z.astype(np.float32) for z in sets(4))
    for call in (
        lambda: measures.procrustes(x, y, normalize=False, result=result),
        lambda: measures.shape_distance(x, y, alpha=0.5, normalize=False, result=result),
        lambda: jaxalign.compare(x, y, "procrustes", normalize=False, result=result),
    ):
        with pytest.raises(ValueError, match=f'result={result!r} .*pass result="distance"'):
            call()


@pytest.mark.usefixtures("unchecked_types")
def test_whether_to_normalize_is_true_or_false():
    x, y = (z.astype(np.float32) for z in sets(4))
    with pytest.raises(ValueError, match="normalize must be one of True, False; got 'no'"):
        measures.procrustes(x, y, normalize="no")


def few_channels(rng, n=24):
    z = rng.normal(size=(n, 3))
    return (z @ rng.normal(size=(3, d)) + 0.3 * rng.normal(size=(n, d)) + 5 for d in (7, 6))


def test_cka_of_sampled_channels_agrees_with_the_reference(x64, rng):
    x, y = few_channels(rng)
    sampled = partial(jaxalign.measures.cka, kernel="linear", sampled_channels=True)
    expected = reference.cka_of_sampled_channels(x, y)
    plan = jaxalign.Plan(5)
    mask = np.arange(24) % 6 > 0
    helpers.assert_close(sampled(x, y), expected, 1e-10)
    helpers.assert_close(sampled(x, y, plan=plan), expected, 1e-10)
    helpers.assert_close(sampled(np.stack([x, x]), np.stack([y, y])), [expected] * 2, 1e-10)
    helpers.assert_close(sampled(x, y, mask=mask), reference.cka_of_sampled_channels(x[mask], y[mask]), 1e-10)
    options = {"kernel": "linear", "sampled_channels": True}
    grid = jaxalign.compare_grid({"a": x, "b": y[:, :4]}, {"y": y}, **options)
    helpers.assert_close(grid.values[0, 0], expected, 1e-10)
    mesh = jaxalign.Plan(mesh=jaxalign.sharding.data_mesh(4))
    rows = (jaxalign.sharding.shard_rows(a, mesh.mesh) for a in (x, y))
    helpers.assert_close(sampled(*rows, plan=mesh), expected, 1e-10)


def test_few_channels_lower_cka_and_the_correction_undoes_it():
    features = jaxalign.datasets.load_digit_features().features
    x, y = (features[name][:300] for name in ("vit-s14 layer 8", "mobilenet-v2 block 13"))
    rng = np.random.default_rng(0)
    draws = [(rng.permutation(x.shape[1])[:48], rng.permutation(y.shape[1])[:48]) for _ in range(40)]
    parts = [np.stack(part) for part in zip(*((x[:, p], y[:, q]) for p, q in draws), strict=True)]
    plain, corrected = (
        np.asarray(jaxalign.measures.cka(*parts, kernel="linear", sampled_channels=sampled))
        for sampled in (False, True)
    )
    whole = float(jaxalign.measures.cka(x, y, "linear", sampled_channels=True))
    error = corrected.std() / np.sqrt(40)
    assert plain.mean() < whole - 10 * error
    # The ratio of unbiased estimates has a bias itself, but a small one.
    assert abs(corrected.mean() - whole) < (whole - plain.mean()) / 4


def test_channels_too_few_for_an_estimate_give_nan(rng):
    x, y = rng.normal(size=(2, 40, 2)).astype(np.float32)  # two independent channels: <k_1, k_2> is 0 on average
    values = [jaxalign.measures.cka(x[k:], y[k:], "linear", sampled_channels=True) for k in range(20)]
    assert np.isnan(values).any()
    with pytest.raises(ValueError, match="needs at least 2 channels; x has 1"):
        jaxalign.measures.cka(x[:, :1], y, "linear", sampled_channels=True)
    for options in ({"kernel": "rbf"}, {"estimator": "biased"}, {"result": "angular"}):
        with pytest.raises(ValueError, match='needs kernel="linear", estimator="debiased" and result="similarity"'):
            jaxalign.measures.cka(x, y, **{"kernel": "linear", **options}, sampled_channels=True)
    with pytest.raises(ValueError, match="needs features in memory"):
        jaxalign.compare_grid({"x": x, "y": y}, kernel="linear", sampled_channels=True, block_rows=10)


def test_minibatch_cka_agrees_with_the_reference(x64):
    batches = [sets(seed, n) for seed, n in enumerate((24, 24, 10))]
    helpers.assert_close(measures.minibatch_cka(batches), reference.minibatch_cka(batches), 1e-10)


@pytest.mark.parametrize("kind", ["sqeuclidean", "euclidean", "correlation", "cosine", "rbf"])
def test_rdm_agrees_with_the_reference(dtype, kind):
    x = sets()[0].astype(dtype)
    matrix = measures.rdm(x, kind)
    helpers.assert_close(matrix, reference.rdm(x.astype(float), kind), 1e-10 if dtype == np.float64 else 3e-6)
    assert (np.diagonal(matrix) == 0).all()
    np.testing.assert_array_equal(matrix, np.asarray(matrix).T)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "correlation"])
@pytest.mark.parametrize("tile_size", [None, 7])
def test_nearest_neighbors_agree_with_the_reference(x64, metric, tile_size):
    x = sets(3, n=23)[0]
    found = measures.nearest_neighbors(x, 4, metric, plan=Plan(tile_size))
    np.testing.assert_array_equal(found, reference.neighbors(x, 4, metric))


@pytest.mark.parametrize("tile_size", [None, 5])
def test_neighbors_at_equal_distances_come_in_order(x64, tile_size):
    x = np.arange(12.0)[:, None] % 3
    np.testing.assert_array_equal(
        measures.nearest_neighbors(x, 5, "euclidean", plan=Plan(tile_size)), reference.neighbors(x, 5, "euclidean")
    )


def test_the_debiased_estimator_is_the_mean_over_quadruples(x64):
    x, y = sets(4, n=6)
    k, m = reference.kernel_matrix(x, "linear"), reference.kernel_matrix(y, "linear")
    helpers.assert_close(measures.hsic(x, y, kernel="linear"), reference.hsic_by_counting(k, m), 1e-10)


# --- published packages; what they call by the same name, and where they differ, stands in docs/pages/measures.md -----


@pytest.mark.parametrize("seed", range(3))
def test_distance_correlation_agrees_with_dcor(x64, seed):
    x, y = sets(seed)
    ours = measures.distance_correlation
    helpers.assert_close(ours(x, y, estimator="biased"), dcor.distance_correlation(x, y), 1e-10)
    expected = dcor.u_distance_correlation_sqr(x, y)
    helpers.assert_close(ours(x, y, squared=True), expected, 1e-10)


RSATOOLBOX = {
    "pearson": "corr", "spearman": "spearman", "kendall": "kendall", "cosine": "cosine",
    "whitened_cosine": "cosine_cov", "whitened_pearson": "corr_cov",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("compare", RSATOOLBOX)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_rsa_agrees_with_rsatoolbox(x64, compare):
    x, y = sets(5)
    for ours, theirs in (("sqeuclidean", "euclidean"), ("correlation", "correlation")):
        rdms = [rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(z), method=theirs) for z in (x, y)]
        expected = rsatoolbox.rdm.compare(*rdms, method=RSATOOLBOX[compare])[0, 0]
        # Their whitened comparisons solve with V iteratively.
        allowed = 1e-5 if compare.startswith("whitened") else 1e-10
        helpers.assert_close(measures.rsa(x, y, metric=ours, comparison=compare), expected, allowed)


@pytest.mark.parametrize("widths", [(5, 5), (5, 7)], ids=str)
def test_procrustes_agrees_with_qc_procrustes(x64, widths):
    x, y = sets(6, widths=widths)
    found = qc_procrustes.orthogonal(x, y, pad=True, translate=True, scale=True)
    helpers.assert_close(measures.procrustes(x, y) ** 2, found.error, 1e-10)


# --- compare and the registry ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", measures.REGISTRY)
def test_compare_finds_every_measure_by_name(x64, name):
    x, y = sets()
    np.testing.assert_array_equal(jaxalign.compare(x, y, name), getattr(measures, name)(x, y))


def test_half_precision_is_computed_in_float32():
    x, y = (jnp.asarray(a, jnp.bfloat16) for a in sets())
    value = measures.cka(x, y)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, measures.cka(x.astype(jnp.float32), y.astype(jnp.float32)))


def test_minibatch_cka_has_no_unit_and_no_order():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 30, 6)).astype(np.float32)
    y = x + 0.5 * rng.normal(size=x.shape).astype(np.float32)
    expected = float(measures.minibatch_cka(zip(x, y, strict=True)))
    for scale in np.float32([1e-18, 1e-5, 1e6, 1e18]):
        assert abs(measures.minibatch_cka(zip(scale * x, y / scale, strict=True)) - expected) < 1e-5
    x[0] = 1  # constant in one batch
    there, back = (float(measures.minibatch_cka(zip(x[::k], 100 * y[::k], strict=True))) for k in (1, -1))
    assert abs(there - back) < 1e-5
    assert 0 < there < expected


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [30.0, 1e3, 1e5])
@pytest.mark.parametrize("kernel", [RBF, Laplacian])
def test_a_sigma_far_above_the_distances_keeps_its_digits(sigma, kernel):
    x, y = (a.astype(np.float32) for a in sets())
    # exp(-z) = 1 - z there, and cka sees neither the 1 nor the scale.
    limit = measures.cka(x, y, kernel=(lambda d: -d) if kernel is RBF else lambda d: -jnp.sqrt(d))
    assert abs(measures.cka(x, y, kernel=kernel(sigma)) - limit) < 40 / sigma + 1e-5
    assert abs(measures.cka(x, y, kernel=kernel(sigma), estimator="biased")) > 0.1


def test_folds_go_by_the_number_of_the_real_sample(x64):
    x, y = sets(n=50)
    mask = np.arange(50) % 5 != 0
    for options in ({"mask": mask}, {"mask": np.arange(50) % 2 == 0}):
        expected = measures.linear_predictivity(x[options["mask"]], y[options["mask"]])
        helpers.assert_close(measures.linear_predictivity(x, y, **options), expected, 1e-10)


def test_the_penalty_is_the_one_of_least_leave_one_out_error(x64):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(N, 5)) * np.array([3.0, 1.0, 1.0, 0.3, 0.1])
    y = x @ rng.normal(size=(5, 3))
    noise = rng.normal(size=y.shape)
    options = {"folds": 4, "strengths": (1e-3, 1e-1, 1e1)}
    for level in (0.01, 1.0, 10.0):  # the weakest, now this and now that, the strongest
        expected = reference.linear_predictivity(x, y + level * noise, **options)
        helpers.assert_close(measures.linear_predictivity(x, y + level * noise, **options), expected, 1e-9)


def test_linear_predictivity_has_no_unit():
    x, y = (a.astype(np.float32) for a in sets())
    options = {"folds": 4, "strengths": (1e-3, 1e-1, 1e1)}
    expected = measures.linear_predictivity(x, y, **options)
    for scale in np.float32([1e-25, 1e25]):  # float32 does not hold their squares
        helpers.assert_close(measures.linear_predictivity(scale * x, y / scale, **options), expected, 1e-5)


def test_every_set_of_a_batch_has_its_own_sigma(x64):
    x, y = sets()
    xs, ys = np.stack([x, 2 * x, x + x**2]), np.stack([y, 3 * y, y])
    a, b = np.array([1.0, 2.0, 3.0]), np.array([4.0, 2.5, 1.5])
    expected = [reference.cka(*both, sigma=sigma) for *both, sigma in zip(xs, ys, zip(a, b, strict=True), strict=True)]
    helpers.assert_close(measures.cka(xs, ys, kernel=RBF((a, b))), expected, 1e-9)


@pytest.mark.parametrize("metric", ["cosine", "correlation"])
def test_a_row_without_a_direction_is_named(metric):
    x, y = (a.astype(np.float32) for a in sets(widths=(5, 5)))
    x[3] = y[7] = y[9] = 0.0 if metric == "cosine" else 1.5
    what = rf"{'is 0' if metric == 'cosine' else 'has the same value'} everywhere, so its {metric} with other rows"
    for call, message in (
        (lambda: measures.rsa(x, y, metric=metric), rf"^x: row 3 {what} .*\(1 such rows\)"),
        (lambda: measures.rsa(x, y, metric=metric, mask=np.arange(N) != 3), rf"^y: row 7 {what} .*\(2 such rows\)"),
        (lambda: measures.nearest_neighbors(np.stack([x, y]), 3, metric), rf"^x: row 3 {what} .*\(3 such rows\)"),
        (lambda: measures.rsa(x[:, :1], y, metric="correlation"), "^x has one feature"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    at = np.ones(N, bool)
    at[[3, 7, 9]] = False
    assert np.isfinite(measures.rsa(x, y, metric=metric, mask=at))


@pytest.mark.usefixtures("unchecked_types")
def test_options_are_refused_by_name():
    x, y = (a.astype(np.float32) for a in sets())
    bad = [
        (lambda: measures.cka(x, y, kernel=["rbf"]), "kernel must be one of"),
        (lambda: measures.cka(x, y, kernel=RBF(2.0, density=0.2)), "density and diagonal have no effect"),
        (lambda: measures.cka(x, y, kernel=RBF), "pass an object"),
        (lambda: measures.cka(x, y, kernel=RBF(np.array([1.0, 2.0]))), "a tuple for one sigma per representation"),
        (lambda: measures.cka(x, y, kernel=RBF(density=0.0)), r"got 0\.0\.$"),
        (lambda: measures.mutual_knn(x, y, k=jnp.array(3)), "k must be a whole number"),
        (lambda: measures.mutual_knn(x, y, k=N), f"mutual_knn with k = {N} needs at least {N + 1} samples"),
        (lambda: measures.linear_predictivity(x, y, folds=20), "folds = 20 needs at least 40"),
        (lambda: measures.linear_predictivity(x, y, strengths=1.0), "strengths must be a tuple"),
        (lambda: measures.shape_distance(x, y, alpha=2), "alpha must be a number from 0"),
        (lambda: jaxalign.compare(np.ma.masked_invalid(x), y), "x is a masked array"),
    ]
    for call, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    assert measures.shape_distance(x, y, alpha=np.float32(0.5)) == measures.shape_distance(x, y, alpha=0.5)
    assert measures.cka(x.astype(">f4"), y) == measures.cka(x, y)


@pytest.mark.slow
def test_rows_that_do_not_count_share_no_neighbours():
    """Checked operation by operation: what is wrong there may be hidden once it is compiled."""
    x, y = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)
    mask = np.arange(12) < 9
    with jax.disable_jit():
        found = measures.jaccard(x, y, k=2, mask=mask)
    helpers.assert_close(found, measures.jaccard(x[:9], y[:9], k=2), 1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("values", [2, 7, 1000])
def test_correlations_of_ranks_with_ties(x64, dtype, values):
    """Signs, both zeros, values that are left out (inf), and numbers of values of which only the latter has no ties."""
    rng = np.random.default_rng(values)
    x, y = (rng.integers(-(values // 2), values, size=300).astype(dtype) for _ in range(2))
    x[x == 0] *= rng.choice([-1, 1], size=int((x == 0).sum()))
    y = (y + x).astype(dtype)
    left_out = rng.random(300) < 0.2
    in_x, in_y = (np.asarray(_rsa.ordered_integers(jnp.asarray(a))) for a in (x, y))
    x, y = x[~left_out], y[~left_out]
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    in_x, in_y = (jnp.asarray(np.where(left_out, np.iinfo(a.dtype).max, a)) for a in (in_x, in_y))
    assert abs(float(_rsa.spearman(in_x, in_y)) - scipy.stats.spearmanr(x, y)[0]) < tolerance
    assert abs(float(_rsa.kendall(in_x, in_y)) - scipy.stats.kendalltau(x, y)[0]) < tolerance


# --- values at the ends of their range --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["debiased", "biased", "lange"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_no_value_leaves_its_range(kernel, estimator):
    """Rounding gave 1.0000001, whose arccos is nan."""
    for seed in range(20):
        x, y = (a.astype(np.float32) for a in sets(seed))
        for z in (x, -3 * x[:, ::-1], x + 1e-4 * y[:, :5]):
            value = float(measures.cka(x, z, kernel=kernel, estimator=estimator))
            assert -1 <= value <= 1
            assert 0 <= float(measures.cka(x, z, kernel=kernel, estimator=estimator, result="angular")) <= np.pi


@pytest.mark.slow
def test_the_angle_of_cka_is_its_arccos_and_a_distance(x64):
    x, y = sets(n=40)
    value, angle = (measures.cka(x, y, result=result) for result in ("similarity", "angular"))
    helpers.assert_close(angle, np.arccos(value), 1e-14)
    grid = jaxalign.compare_grid({"x": x, "y": y, "near": x + 0.1 * y[:, :5]}, measure="cka", result="angular")
    assert grid.direction == "distance"
    assert grid.best_match()["x"][0] == "near"
    test = jaxalign.permutation_test(x, x + 0.1 * y[:, :5], result="angular", key=jax.random.key(0), permutations=99)
    assert test.p_value == 0.01


def test_the_angle_of_biased_cka_obeys_the_triangle_inequality(x64):
    # Williams et al. 2021: centered kernel matrices of unit norm are points on a sphere.
    x, y, z = np.random.default_rng(1).normal(size=(3, 40, N, 5))
    y = 0.7 * x + 0.3 * z  # close to a straight line, where it is tight

    def distance(a, b):
        return np.asarray(measures.cka(a, b, kernel="linear", estimator="biased", result="angular"))

    assert (distance(x, z) <= distance(x, y) + distance(y, z) + 1e-12).all()


def test_the_derivative_of_the_angle(x64):
    (x, y), u, step = sets(), np.random.default_rng(2).normal(size=(N, 5)), 1e-6
    angle = lambda a: measures.cka(a, y, result="angular")  # noqa: E731
    slope = (angle(x + step * u) - angle(x - step * u)) / (2 * step)
    helpers.assert_close(np.sum(jax.grad(angle)(x) * u), slope, 1e-6, scale=1.0)
    assert (jax.grad(lambda a: measures.cka(a, x, result="angular"))(x) == 0).all()  # infinite, taken as 0


# --- kernels of one's own -------------------------------------------------------------------------------------------


def test_a_kernel_with_a_cusp_has_finite_gradients_at_duplicates(x64):
    x, y = sets()
    x[4] = x[3]
    laplacian = lambda d: jnp.exp(-jnp.sqrt(d) / 3)  # noqa: E731
    own, named = (lambda a, k=k: measures.cka(a, y, **k) for k in ({"kernel": laplacian}, {"kernel": Laplacian(3.0)}))
    helpers.assert_close(jax.grad(own)(x), jax.grad(named)(x), 1e-9)
    helpers.assert_close(jax.jvp(own, (x,), (y[:, :5],))[1], jax.jvp(named, (x,), (y[:, :5],))[1], 1e-9)


def test_a_smooth_kernel_keeps_its_second_derivatives_at_duplicates(x64):
    x, y = sets()
    x[4] = x[3]
    helpers.check_derivatives(lambda a: measures.cka(a, y, kernel=rational), x, np.random.default_rng(3))


# --- distances that are returned or ranked ----------------------------------------------------------------------------


def tight_clusters():
    """Two representations of four clusters, 1e5 standard deviations apart."""
    rng = np.random.default_rng(1)
    centers = 1e5 * rng.normal(size=(4, 8))
    return (np.float32(np.repeat(c, 15, 0) + rng.normal(size=(60, 8))) for c in (centers, centers[::-1]))


def test_distances_within_tight_clusters():
    x, y = tight_clusters()
    expected = reference.sq_distances(x.astype(float))
    for found in (measures.rdm(x), jaxalign.squared_distances(x), measures.rdm(x, "euclidean") ** 2):
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6)
    for compare in ("spearman", "kendall"):
        expected = reference.rsa(x.astype(float), y.astype(float), metric="sqeuclidean", comparison=compare)
        # Between clusters the distances differ by less than float32 holds of each.
        assert abs(float(measures.rsa(x, y, comparison=compare)) - expected) < 1e-6


@pytest.mark.parametrize("compare", ["spearman", "kendall"])
def test_equal_distances_of_whole_numbers_tie(compare):
    x = np.random.default_rng(0).integers(0, 3, (N, 6)).astype(np.float32)  # rounding would put them in some order
    y = x + np.random.default_rng(1).integers(0, 2, (N, 6)).astype(np.float32)
    expected = reference.rsa(x.astype(float), y.astype(float), metric="sqeuclidean", comparison=compare)
    assert abs(float(measures.rsa(x, y, comparison=compare)) - expected) < 1e-6
    for offset in (1e3, 1e6):
        assert abs(float(measures.rsa(x + np.float32(offset), y, comparison=compare)) - expected) < 1e-6


@pytest.mark.parametrize("tile_size", [None, 7])
def test_neighbors_at_equal_distances_of_whole_numbers_come_in_order(tile_size):
    x = np.random.default_rng(0).integers(0, 2, (N, 12)).astype(np.float32)
    found = measures.nearest_neighbors(x + np.float32(0.25), 5, "euclidean", plan=Plan(tile_size))
    np.testing.assert_array_equal(found, reference.neighbors(x.astype(float), 5, "euclidean"))


def test_exact_sums_of_squares_have_more_digits_than_the_dtype():
    x = np.float32(np.random.default_rng(0).normal(size=(40, 33)) + 1e4)
    features = center_features(jnp.asarray(x))
    high, low = jax.jit(exact_distances)(features)
    found = (np.asarray(high, float) + np.asarray(low, float)) * float(features.scale) ** 2
    off = ~np.eye(40, dtype=bool)
    np.testing.assert_allclose(found[off], reference.sq_distances(x.astype(float))[off], rtol=1e-10)


@pytest.mark.usefixtures("unchecked_types")
def test_an_affinity_at_a_given_sigma_may_be_ranked():
    x, y = (a.astype(np.float32) for a in sets())
    expected = measures.rsa(x, y, comparison="spearman")  # the order is that of the distances at any sigma
    assert measures.rsa(x, y, metric=RBF(1.0), comparison="spearman") == expected
    with pytest.raises(ValueError, match="metric must be one of"):
        measures.rsa(x, y, metric=Laplacian(1.0), comparison="spearman")
    with pytest.raises(ValueError, match="sigma must be finite and above 0"):
        measures.rsa(x, y, metric=RBF(-1.0), comparison="spearman")
    assert np.isnan(jax.jit(lambda s: measures.rsa(x, y, metric=RBF(s), comparison="spearman"))(-1.0))


# --- batches of minibatch_cka -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")  # which look at a random item
@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            lambda x, y: (x[:3], y[:3]),
            ValueError,
            "needs at least 4 samples in every batch; batch 1 has 3.*drop_last=True",
        ),
        (lambda x, y: (x[:, :4], y), ValueError, "x of batch 1 has 4 channels, that of batch 0 5"),
        (lambda x, y: (x.reshape(4, 6, 5), y), ValueError, r"x of batch 1 must have shape \(n, d\); got \(4, 6, 5\)"),
        (
            lambda x, y: (np.where(x > 2, np.nan, x), y),
            ValueError,
            "batch 1: x has nan or inf in .*Leave such samples out",
        ),
        (lambda x, y: (x, y[:9]), ValueError, "batch 1: x and batch 1: y must hold the same samples"),
        (lambda x, y: x, TypeError, r"batch 1 must be a pair \(x, y\)"),
    ],
)
def test_what_is_wrong_with_a_batch_is_named(batch, error, message):
    x, y = (a.astype(np.float32) for a in sets())
    with pytest.raises(error, match=message):
        measures.minibatch_cka([(x, y), batch(x, y)])


def test_maps_may_be_batches_once_their_positions_are_channels():
    x = np.random.default_rng(0).normal(size=(2, 16, 8, 4, 4)).astype(np.float32)
    value = measures.minibatch_cka([(a.reshape(16, -1), 2 * a.reshape(16, -1)) for a in x])
    assert value.shape == ()
    assert abs(float(value) - 1) < 1e-6


# --- numbers too small to compute with --------------------------------------------------------------------------------


def test_features_that_are_rounded_to_0_are_named():
    x, y = (a.astype(np.float32) for a in sets())
    tiny = x * np.float32(1e-38)
    expected = measures.cka(x, y, kernel="linear")
    for call in (
        lambda x: measures.cka(x, y, kernel="linear"),
        lambda x: measures.procrustes(x, y),
        lambda x: jaxalign.rbf_affinity(x, density=0.1),
    ):
        with pytest.raises(ValueError, match=r"x has no entry above 1e-35.*np.asarray\(x\) \* 2.0\*\*64"):
            call(tiny)
    assert abs(float(measures.cka(np.asarray(tiny) * 2.0**64, y, kernel="linear") - expected)) < 1e-3  # digits are lost
    assert measures.procrustes(np.zeros_like(x), y) == np.float32(2**0.5)  # all 0 is no unit


@pytest.mark.parametrize("clusters_first", [True, False])
def test_representations_that_share_a_search_have_the_bandwidths_they_have_alone(clusters_first):
    """Of 60 samples both are searched together: one needs explicit distances, several passes, and is narrower."""
    rng = np.random.default_rng(4)
    clusters = np.concatenate([rng.normal(size=(30, 5)) * 1e-4, 100 + rng.normal(size=(30, 5)) * 1e-4])
    pair = [clusters.astype(np.float32), rng.normal(size=(60, 40)).astype(np.float32)]
    pair = pair if clusters_first else pair[::-1]
    options = {"density": 0.2, "diagonal": "exclude"}  # half of the pairs are within a cluster: so is the bandwidth
    value = measures.cka(*pair, kernel=RBF(**options))
    alone = tuple(jaxalign.solve_sigma(x, **options).sigma for x in pair)
    helpers.assert_close(value, measures.cka(*pair, kernel=RBF(alone)), 1e-5)
    expected = reference.cka(*(x.astype(float) for x in pair), kernel="rbf", **options)
    helpers.assert_close(value, expected, 1e-5)
