"""Permutations, resamples and ceilings: exact where mathematics says so, uniform under the null, covering elsewhere."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_measures as reference
import scipy.stats

import jaxalign
from jaxalign import bootstrap, compare, noise_ceiling, paired_difference, permutation_test
from jaxalign.inference import _permuted_products
from jaxalign.measures._centering import CENTERINGS

KEY = jax.random.key(0)


def sets(n=40, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    return x, x[:, :4] + noise * rng.normal(size=(n, 4)), rng.normal(size=(n, 3))


PRODUCTS = {
    "cka": {},
    "cka biased": {"estimator": "biased", "kernel": "linear"},
    "hsic": {"kernel": "linear", "estimator": "lange"},
    "rsa": {},
    "rsa whitened": {"comparison": "whitened_pearson"},
    "rsa cosine": {"comparison": "cosine", "metric": "rbf"},
    "distance_correlation": {},
}
OTHERS = {"affinity_distance": {}, "mutual_knn": {"k": 4}, "procrustes": {}, "rsa spearman": {"comparison": "spearman"}}


@pytest.mark.parametrize("case", [*PRODUCTS, *OTHERS])
def test_values_of_permutations_are_those_of_shuffled_samples(x64, case):
    name, options = case.split()[0], {**PRODUCTS, **OTHERS}[case]
    x, y, _ = sets()
    test = permutation_test(x, y, name, key=KEY, permutations=3, **options)
    helpers.assert_close(test.value, compare(x, y, name, **options), 1e-11)
    if case in PRODUCTS:  # the table of 2 permutations of x and 2 of y: what is shuffled shows in it
        table, choice = jax.random.split(KEY)
        first, second = jax.random.split(table)
        p, s = (np.asarray(jax.random.permutation(jax.random.split(k, 1)[0], 40)) for k in (second, first))
        shuffled = [(x, y[p]), (x[s], y), (x[s], y[p])]
        shuffled = [shuffled[k] for k in np.asarray(jax.random.permutation(choice, 3))]
    else:
        shuffled = [(x, y[np.asarray(jax.random.permutation(k, 40))]) for k in jax.random.split(KEY, 3)]
    expected = [compare(a, b, name, **options) for a, b in shuffled]
    helpers.assert_close(test.null, np.asarray(expected), 1e-11)


def test_the_table_of_permutations_in_pieces(x64, monkeypatch):
    x, y, _ = sets()
    matrices = jnp.asarray(np.stack([reference.kernel_matrix(a, "linear") for a in (x, y)]))
    whole = _permuted_products(matrices[:1], matrices[1:], KEY, 3)
    monkeypatch.setattr(jaxalign.inference, "_GATHERED", 7 * 3 * 2 * 40)
    _permuted_products.clear_cache()
    helpers.assert_close(_permuted_products(matrices[:1], matrices[1:], KEY, 3), whole, 1e-12)


@pytest.mark.slow
def test_p_values_count_what_is_at_least_as_extreme(x64):
    x, y, z = sets()
    test = permutation_test(x, z, key=KEY, permutations=99)
    counted = (np.sum(np.asarray(test.null) >= float(test.value)) + 1) / 100
    helpers.assert_close(test.p_value, counted, 1e-15)  # a compiled division by 100 is a product
    helpers.assert_close(test.null_mean, np.mean(test.null), 1e-12)
    helpers.assert_close(test.score, (test.value - np.mean(test.null)) / np.std(test.null), 1e-10)
    assert float(permutation_test(x, y, key=KEY, permutations=99).p_value) == 0.01
    distance = permutation_test(x, z, "procrustes", key=KEY, permutations=99)
    counted = (np.sum(np.asarray(distance.null) <= float(distance.value)) + 1) / 100
    helpers.assert_close(distance.p_value, counted, 1e-15)


@pytest.mark.slow
def test_equal_sets_have_a_calibrated_score_of_1_and_chance_0(x64):
    x, _, z = sets()
    assert abs(float(permutation_test(x, 2 * x, key=KEY, permutations=50).calibrated) - 1) < 1e-10
    assert abs(float(permutation_test(x, z, key=KEY, permutations=500).calibrated)) < 0.1
    assert np.isnan(permutation_test(x, z, "hsic", key=KEY, permutations=10).calibrated)


def test_permutations_that_change_nothing_count(x64):
    # Two samples of each kind: every value of a permutation within kinds equals the observed one, up to rounding.
    x = np.repeat(np.array([[0.0], [1.0]]), 2, 0)
    test = permutation_test(x, x, "rsa", key=KEY, permutations=400)
    # 4! = 24 permutations, of which 8 keep or swap the two pairs.
    assert abs(float(test.p_value) - 1 / 3) < 4 * np.sqrt(2 / 9 / 400)


@pytest.mark.slow
@pytest.mark.parametrize("permutations", [19, 99])
def test_p_values_are_uniform_under_the_null(permutations):
    rng = np.random.default_rng(permutations)
    x, y = rng.normal(size=(2, 300, 16, 3)).astype(np.float32)
    values = [
        float(permutation_test(a, b, "rsa", key=jax.random.key(k), permutations=permutations).p_value)
        for k, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    # p takes the values 1 / (m + 1), ... 1: spread evenly over the step below each, it is uniform on (0, 1).
    spread = np.asarray(values) - rng.uniform(size=300) / (permutations + 1)
    assert scipy.stats.kstest(spread, "uniform").pvalue > 0.01


@pytest.mark.slow
def test_a_grid_is_corrected_for_its_size(x64):
    x, y, z = sets(30)
    rng = np.random.default_rng(4)
    first = {"x": x, **{f"noise {k}": rng.normal(size=(30, 3)) for k in range(3)}}
    test = permutation_test(first, {"y": y, "z": z}, key=KEY, permutations=199)
    assert test.p_value.shape == (4, 2)
    assert (test.rows, test.columns) == (tuple(first), ("y", "z"))
    assert (np.asarray(test.corrected) >= np.asarray(test.p_value) - 1e-12).all()
    assert float(test.corrected[0, 0]) < 0.05 < float(np.min(np.delete(np.ravel(test.corrected), 0)))
    alone = permutation_test(x, y, key=KEY, permutations=199)
    helpers.assert_close(test.value[0, 0], alone.value, 1e-12)


@pytest.mark.slow
def test_max_statistic_keeps_the_error_of_the_family():
    rng = np.random.default_rng(0)
    found = 0
    for k in range(100):
        names = {str(j): rng.normal(size=(12, 2)).astype(np.float32) for j in range(6)}
        test = permutation_test(
            names, {"y": rng.normal(size=(12, 2)).astype(np.float32)}, "rsa", key=jax.random.key(k), permutations=39
        )
        found += bool((np.asarray(test.corrected) <= 0.1).any())
    assert found <= scipy.stats.binom.ppf(0.999, 100, 0.1)


# --- resampling -----------------------------------------------------------------------------------------------------


def test_weighted_products_are_means_over_different_samples(x64):
    x, y, _ = sets(7)
    f, g = (reference.kernel_matrix(a, "linear") * (1 - np.eye(7)) for a in (x, y))
    for w in ([1.0, 2, 0, 1, 3, 0, 1], [1.0] * 7, [2.0, 1, 1, 1, 1, 1, 0]):
        found = CENTERINGS["debiased"].bootstrap(jnp.asarray(f), jnp.asarray(g), jnp.asarray([w]))[0] / (7 * 4)
        helpers.assert_close(found, reference.hsic_by_counting(f, g, np.asarray(w)), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cka", "hsic", "rsa", "distance_correlation"])
@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_intervals_hold_the_value(x64, name, method):
    x, y, _ = sets(60)
    found = bootstrap(x, y, name, key=KEY, resamples=200, method=method)
    helpers.assert_close(found.value, compare(x, y, name), 1e-11)
    assert found.low < found.value < found.high
    again = bootstrap(x, y, name, key=KEY, resamples=200, method=method)
    np.testing.assert_array_equal(again.resampled, found.resampled)
    if method == "percentile":
        helpers.assert_close([found.low, found.high], np.quantile(found.resampled, [0.025, 0.975]), 1e-12)


@pytest.mark.slow
def test_bca_agrees_with_scipy(x64):
    # Pearson RSA has no counterpart there, so scipy is given the weighted statistic with the same resamples' formula.
    x, y, _ = sets(25)
    found = bootstrap(x, y, "rsa", key=KEY, resamples=400)
    f, g = (reference.sq_distances(a) for a in (x, y))

    def statistic(index):
        i, j = np.triu_indices(len(index), 1)
        different = index[i] != index[j]
        a, b = index[i][different], index[j][different]
        return np.corrcoef(f[a, b], g[a, b])[0, 1]

    theirs = scipy.stats.bootstrap(
        (np.arange(25),), statistic, n_resamples=400, vectorized=False, method="BCa", rng=np.random.default_rng(0)
    )
    spread = theirs.standard_error
    low, high = theirs.confidence_interval
    assert abs(found.low - low) < 0.5 * spread  # ends of 400 resamples: the 10th smallest, give or take 3
    assert abs(found.high - high) < 0.5 * spread


@pytest.mark.slow
def test_coverage_is_within_its_binomial_error():
    rng = np.random.default_rng(0)
    truth_sets = rng.normal(size=(2, 4000, 3)).astype(np.float32)
    truth = float(compare(truth_sets[0], truth_sets[0] + truth_sets[1], "rsa"))
    hits = 0
    for k in range(150):
        a, b = rng.normal(size=(2, 50, 3)).astype(np.float32)
        found = bootstrap(a, a + b, "rsa", key=jax.random.key(k), resamples=200, level=0.9)
        hits += bool(found.low <= truth <= found.high)
    # 90 % of 150, less what small samples cost bootstrap intervals (Efron 1987: of order 1 / n), within 3 errors.
    assert scipy.stats.binom.ppf(0.001, 150, 0.85) <= hits


@pytest.mark.slow
def test_differences_are_of_the_same_resamples(x64):
    x, y, z = sets(80)
    same = paired_difference((x, y), (x, 2 * y), "rsa", key=KEY, resamples=50)
    assert float(np.abs(same.resampled).max()) < 1e-10
    found = paired_difference((x, y), (x, z), "rsa", key=KEY, resamples=200)
    helpers.assert_close(found.value, compare(x, y, "rsa") - compare(x, z, "rsa"), 1e-11)
    assert found.low > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("rsa", {}), ("cka", {"kernel": "linear"}), ("distance_correlation", {})]
)
def test_noise_ceiling_by_hand(x64, name, options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 4))
    subjects = [x + 0.7 * rng.normal(size=x.shape) for _ in range(4)]
    found = noise_ceiling(subjects, name, **options)
    if name == "rsa":
        first, second = np.triu_indices(20, 1)
        vectors = np.stack([reference.sq_distances(s)[first, second] for s in subjects])
        vectors -= vectors.mean(1, keepdims=True)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        lower = np.mean([np.corrcoef(v, np.delete(vectors, k, 0).mean(0))[0, 1] for k, v in enumerate(vectors)])
        upper = np.mean([np.corrcoef(v, vectors.mean(0))[0, 1] for v in vectors])
        helpers.assert_close([found.lower, found.upper], [lower, upper], 1e-10)
    assert 0 < found.lower < found.upper < 1
    helpers.assert_close(found.lower, np.mean(found.each), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cka", "rsa", "distance_correlation"])
def test_noise_ceiling_of_a_traced_subject(x64, name):
    x, y, z = sets()
    ceiling = jax.jit(lambda scale: noise_ceiling([x, y, scale * z], name))
    expected, found = noise_ceiling([x, y, 2 * z], name), ceiling(2.0)
    helpers.assert_close([found.lower, found.upper], [expected.lower, expected.upper], 1e-11)
    # What does not vary has no ceiling: a ValueError if that is seen, else nan.
    assert np.isnan([ceiling(0.0).lower, ceiling(0.0).upper]).all()


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(x64):
    x, y, _ = sets()
    bad = [
        (lambda: permutation_test(x, y, key=KEY, permutations=0), "permutations must be a whole number"),
        (lambda: permutation_test(x, y[:10], key=KEY), "40 and 10 rows"),
        (lambda: permutation_test({}, y, key=KEY), "x is empty"),
        (lambda: permutation_test(x, y, "kca", key=KEY), "Did you mean 'cka'"),
        (lambda: permutation_test(x, y, key=KEY, n_permutations=9), "Did you mean the argument 'permutations'"),
        (lambda: permutation_test(x[:3], y[:3], key=KEY), "cka needs at least 4 samples"),
        (lambda: permutation_test(x[None], y, key=KEY), r"x must have shape \(n, d\)"),
        (lambda: bootstrap(x, y, key=KEY, level=1.0), "level must lie strictly"),
        (lambda: bootstrap(x, y, key=KEY, method="normal"), "method must be one of"),
        (lambda: bootstrap(x, y, "mutual_knn", key=KEY), "has no bootstrap"),
        (lambda: bootstrap(x, y, estimator="biased", key=KEY), "has no bootstrap"),
        (lambda: paired_difference(x, y, key=KEY), "first must be a pair"),
        (lambda: noise_ceiling([x]), "at least two"),
        (lambda: noise_ceiling([x, y], "procrustes"), "not a normalized inner product"),
    ]
    for call, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            call()


# --- what once went wrong -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_similarity_of_a_distance_is_one(x64):
    x, y, _ = sets()
    test = permutation_test(x, y, "procrustes", result="similarity", key=KEY, permutations=99)
    assert test.direction == "similarity"
    assert float(test.p_value) == 0.01
    assert float(test.score) > 3
    equal = permutation_test(x, 2 * x, "procrustes", result="similarity", key=KEY, permutations=9)
    assert abs(float(equal.calibrated) - 1) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cka", "mutual_knn", "affinity_distance"])
def test_nan_is_propagated_to_what_holds_it_and_no_further(x64, measure):
    x, y, z = sets()
    hole = x.copy()
    hole[3, 1] = np.nan
    options = {"key": KEY, "permutations": 19, "missing": "propagate"}
    both = permutation_test({"whole": x, "hole": hole}, {"y": y}, measure, **options)
    alone = permutation_test({"whole": x}, {"y": y}, measure, **options)
    for name in ("value", "p_value", "corrected", "null_mean", "score"):
        assert np.isnan(getattr(both, name)[1, 0])
        assert np.isfinite(getattr(both, name)[0, 0])
    helpers.assert_close(both.value[0], alone.value[0], 1e-12)
    if measure == "cka":
        found = bootstrap(hole, y, key=KEY, resamples=20, missing="propagate")
        assert np.isnan([found.value, found.low, found.high]).all()
        assert np.isnan(noise_ceiling([hole, y, z], "cka", missing="propagate").lower)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e9, 1e18])
def test_statistics_have_no_unit(scale):
    x, y, z = (np.float32(a) for a in sets())
    options = {"kernel": "linear", "key": KEY}
    large = tuple(np.float32(scale) * a for a in (x, y, z))
    for a, b in ((0, 1), (0, 2)):
        one, two = (permutation_test(s[a], s[b], permutations=49, **options) for s in ((x, y, z), large))
        assert abs(one.value - two.value) < 1e-5
        assert one.p_value == two.p_value
    one, two = (bootstrap(s[0], s[1], resamples=30, **options) for s in ((x, y, z), large))
    helpers.assert_close([two.low, two.value, two.high], [one.low, one.value, one.high], 1e-4)
    one, two = (noise_ceiling(list(s)) for s in ((x, y, z), large))
    helpers.assert_close([two.lower, two.upper], [one.lower, one.upper], 1e-4)


@pytest.mark.slow
def test_few_permutations_keep_the_error_of_the_family():
    # Observed and permuted scores have to be standardised alike: this failed half of the time at m = 19.
    rng, m, trials = np.random.default_rng(1), 19, 120
    found = 0
    for k in range(trials):
        first, second = ({str(j): rng.normal(size=(12, 2)).astype(np.float32) for j in range(6)} for _ in range(2))
        test = permutation_test(first, second, "rsa", key=jax.random.key(k), permutations=m)
        found += bool((np.asarray(test.corrected) <= 0.05).any())
    assert found <= scipy.stats.binom.ppf(0.999, trials, 0.05)


@pytest.mark.slow
def test_measures_of_sets_compile_once():
    x, y, _ = (np.float32(a) for a in sets())
    permutation_test(x, y, "jaccard", key=KEY, permutations=5, k=3)
    before = jaxalign.inference._recomputed_summaries._cache_size()
    permutation_test(y, x[:, :4], "jaccard", key=jax.random.key(1), permutations=5, k=3)
    permutation_test(x, y, "jaccard", key=jax.random.key(2), permutations=5, k=3)
    assert jaxalign.inference._recomputed_summaries._cache_size() <= before + 1  # the second has other widths


@pytest.mark.usefixtures("unchecked_types")
def test_more_bad_input(x64):
    x, y, _ = sets()
    bad = [
        (lambda: permutation_test(x, y, key=0), "key must be a single key, such as jax.random.key"),
        (lambda: bootstrap(x, y, key=KEY, level="a"), "level must lie strictly"),
        (lambda: bootstrap(x, y, key=KEY, resamples=1), "resamples must be a whole number, at least 2"),
        (lambda: bootstrap(x[:9], y[:9], key=KEY), "at least 10 samples; got 9"),
        (lambda: bootstrap({"a": x}, y, key=KEY), "x must be one array"),
        (lambda: noise_ceiling({"a": x, "b": y}), "subjects must be a list"),
    ]
    for call, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            call()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")
def test_sets_in_files(tmp_path):
    sets = {f"layer{k}": np.random.default_rng(k).normal(size=(30, 4)).astype(np.float32) for k in (10, 9)}
    for name, x in sets.items():
        np.save(tmp_path / f"{name}.npy", x)
    expected = jaxalign.permutation_test(sets, sets, key=jax.random.key(0), permutations=19)
    found = jaxalign.permutation_test(tmp_path, str(tmp_path), key=jax.random.key(0), permutations=19)
    assert found.rows == ("layer9", "layer10")  # numbers in names are in the order of numbers
    assert expected.rows == ("layer10", "layer9")
    np.testing.assert_allclose(found.value, np.asarray(expected.value)[::-1, ::-1], rtol=1e-6)
