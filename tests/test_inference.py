"""Permutations, resamples and ceilings: exact where mathematics says so, uniform under the null, covering elsewhere."""

from __future__ import annotations

import itertools
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_measures as reference
import scipy.stats

import jaxalign
from jaxalign import (
    _groups,
    _null,
    _permutations,
    _resampling,
    bootstrap,
    calibrate,
    compare,
    noise_ceiling,
    paired_difference,
    permutation_test,
)

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


def has_exactly(permutations, number):
    return permutations.has_more_than(number - 1) and not permutations.has_more_than(number)


@pytest.mark.parametrize("case", [*PRODUCTS, *OTHERS])
def test_values_of_permutations_are_those_of_exchanged_groups(x64, case):
    name, options = case.split()[0], {**PRODUCTS, **OTHERS}[case]
    x, y, _ = sets(30)
    groups = np.arange(30) % 3
    test = permutation_test(x, y, name, key=KEY, permutations=99, groups=groups, **options)
    helpers.assert_close(test.value, compare(x, y, name, **options), 1e-11)
    assert test.smallest_p_value == 1 / 6  # all permutations of three groups are used, once
    orders = [np.reshape(np.arange(30).reshape(10, 3)[:, list(p)], -1) for p in itertools.permutations(range(3))]
    expected = [compare(x, y[order], name, **options) for order in orders[1:]]
    helpers.assert_close(np.sort(test.null), np.sort(np.asarray(expected)), 1e-11)


@pytest.mark.parametrize(("number", "size"), [(5, 1), (6, 1), (5, 3), (6, 2)])
def test_shifts_of_groups_are_permutations_of_groups(x64, number, size, rng):
    n = number * size
    x, y = ((a + a.swapaxes(1, 2)).astype(float) for a in (rng.normal(size=(k, n, n)) for k in (2, 3)))
    groups = rng.permutation(np.repeat(np.arange(number), size))
    exchange = _permutations.GroupExchange.of(_groups._grouped(groups), n)
    assert exchange.is_regular
    assert has_exactly(exchange, math.factorial(number))
    products = np.asarray(_permutations.permuted_products(jnp.asarray(x), jnp.asarray(y), exchange, KEY, 60))
    assert products.shape == (61, 2, 3)
    helpers.assert_close(products[0], np.einsum("lij,mij->lm", x, y), 1e-12)
    orders = np.asarray(exchange.orders(KEY, 1000))
    assert has_exactly(exchange, len(np.unique(orders, axis=0)))
    np.testing.assert_array_equal(np.sort(orders, 1), np.broadcast_to(np.arange(n), orders.shape))
    # Every group moves as a whole, its samples in order.
    members = [np.flatnonzero(groups == k) for k in range(number)]
    for order in orders[:20]:
        assert {tuple(order[m]) for m in members} == {tuple(m) for m in members}
    every = np.stack([np.einsum("lij,mij->lm", x, y[:, o][:, :, o]) for o in orders])
    nearest = np.abs(products[:, None] - every[None]).max((2, 3))
    assert (nearest.min(1) < 1e-10).all()
    assert len(np.unique(nearest.argmin(1))) > 30  # of 61 draws out of 120 or 720


def test_offsets_in_pieces_add_up_to_the_same(x64, monkeypatch, rng):
    x, y = ((a + a.T)[None] for a in rng.normal(size=(2, 24, 24)))
    exchange = _permutations.GroupExchange.of(_groups._grouped(np.arange(24) // 2), 24)
    call = lambda: _permutations.permuted_products(jnp.asarray(x), jnp.asarray(y), exchange, KEY, 50)  # noqa: E731
    whole = call()
    monkeypatch.setattr(_permutations, "_GATHERED", 5 * 6 * 2 * 2 * 12)
    _permutations._products_of_shifts.clear_cache()
    helpers.assert_close(call(), whole, 1e-12)
    _permutations._products_of_shifts.clear_cache()


def test_groups_of_different_size_are_exchanged_within_a_size(x64):
    groups = np.repeat([0, 1, 2, 3, 4, 5], [2, 3, 2, 3, 2, 1])
    exchange = _permutations.GroupExchange.of(_groups._grouped(groups), 13)
    assert has_exactly(exchange, 12)
    assert not exchange.is_regular
    for number in (5, 100):
        orders = np.asarray(exchange.orders(KEY, number))
        assert len(orders) == min(number + 1, 12)
        np.testing.assert_array_equal(orders[0], np.arange(13))
        for order in orders:
            assert order[12] == 12
            assert {tuple(order[m]) for m in ([0, 1], [5, 6], [10, 11])} == {(0, 1), (5, 6), (10, 11)}
            assert {tuple(order[m]) for m in ([2, 3, 4], [7, 8, 9])} == {(2, 3, 4), (7, 8, 9)}


@pytest.mark.parametrize(("shape", "moves"), [((4, 4), 8), ((3, 5), 4), ((1, 5), 2), ((2, 2), 8)])
def test_moves_of_a_grid_keep_neighbors(shape, moves):
    grid = _permutations.GridMoves(1, *shape)
    orders = np.asarray(grid.orders(KEY, 7))
    np.testing.assert_array_equal(orders[0], np.arange(math.prod(shape)))
    assert len(orders) == moves
    assert has_exactly(grid, moves)
    number = np.arange(math.prod(shape)).reshape(shape)
    steps = [pair for a in (number, number.T) for pair in zip(np.ravel(a[:-1]), np.ravel(a[1:]), strict=True)]
    neighbors = set(map(frozenset, steps))
    for order in orders:
        assert {frozenset(order[list(pair)]) for pair in neighbors} == neighbors
    two = np.asarray(_permutations.GridMoves(5, *shape).orders(KEY, 20))[:, : 2 * math.prod(shape)]
    half = math.prod(shape)
    assert (two[:, :half] < half).all()
    assert (two[:, :half] + half != two[:, half:]).any()  # each image has a move of its own


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


def test_calibrated_scores_are_those_of_the_published_algorithm(x64):
    x, y, z = sets()
    layers = {"y": y, "z": z, "x": 2 * x}
    test = permutation_test({"x": x, "noise": z[:, ::-1] ** 2}, layers, key=KEY, permutations=59)
    for alpha in (0.05, 0.1, 0.5):
        found = calibrate(test, alpha=alpha)
        every = np.sort(np.concatenate((np.asarray(test.value)[None], test.null)), 0)
        tau = every[math.ceil((1 - alpha) * 60 - 1e-9) - 1]
        helpers.assert_close(found.threshold, tau, 1e-14)
        helpers.assert_close(found.calibrated, np.clip((np.asarray(test.value) - tau) / (1 - tau), 0, 1), 1e-12)
    helpers.assert_close(test.calibrated, calibrate(test).calibrated, 1e-14)
    assert abs(float(test.calibrated[0, 2]) - 1) < 1e-10
    null = np.asarray(test.null)
    for aggregate, rule in (
        ("max", lambda a: a.max((-2, -1))),
        ("mean", lambda a: a.mean((-2, -1))),
        ("mean_of_best", lambda a: a.max(-1).mean(-1)),
        ("symmetric_best", lambda a: (a.max(-1).mean(-1) + a.max(-2).mean(-1)) / 2),
    ):
        found = calibrate(test, aggregate=aggregate)
        value, expected = rule(np.asarray(test.value)), rule(null)
        helpers.assert_close(found.value, value, 1e-12)
        helpers.assert_close(found.p_value, (1 + (expected >= value).sum()) / 60, 1e-14)


def test_distances_are_calibrated_downward(x64):
    x, y, z = sets()
    test = permutation_test({"x": x}, {"y": y, "z": z}, "procrustes", key=KEY, permutations=39)
    assert 0 < float(test.calibrated[0, 0]) < 1
    helpers.assert_close(test.threshold[0, 0], np.sort(np.append(test.null[:, 0, 0], test.value[0, 0]))[2], 1e-14)
    assert float(calibrate(test, aggregate="max").value) == float(test.value.min())
    assert np.isnan(permutation_test(x, z, "hsic", key=KEY, permutations=19).calibrated)


def test_permutations_that_change_nothing_count(x64):
    # Two samples of each kind: every value of a permutation within kinds equals the observed one, up to rounding.
    x = np.repeat(np.array([[0.0], [1.0]]), 2, 0)
    test = permutation_test(x, x, "rsa", key=KEY, permutations=400)
    # 4! = 24 permutations, of which 8 keep or swap the two pairs.
    assert test.null.shape == (23,)
    helpers.assert_close(test.p_value, 1 / 3, 1e-12)


def blocks(rng, number, size, d=3):
    """Independent groups of dependent samples."""
    center = rng.normal(size=(number, 1, d))
    return (center + 0.3 * rng.normal(size=(number, size, d))).reshape(-1, d).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "permutations"), [((16, 1), 19), ((16, 1), 99), ((12, 3), 19), ("unequal", 19)])
def test_p_values_are_uniform_under_the_null(permutations, sizes):
    rng = np.random.default_rng(permutations)
    kept, groups = slice(None), None
    if sizes == "unequal":  # eight groups of three, eight of two
        kept, groups = (
            np.delete(np.arange(48), np.arange(24, 48, 3)),
            np.delete(np.repeat(np.arange(16), 3), np.arange(24, 48, 3)),
        )
        sizes = (16, 3)
    elif sizes[1] > 1:
        groups = np.repeat(np.arange(sizes[0]), sizes[1])
    values = [
        float(
            permutation_test(
                blocks(rng, *sizes)[kept], blocks(rng, *sizes)[kept], "rsa", key=jax.random.key(k),
                permutations=permutations, groups=groups,
            ).p_value
        )
        for k in range(300)
    ]  # fmt: skip
    # p takes the values 1 / (m + 1), ... 1: spread evenly over the step below each, it is uniform on (0, 1).
    spread = np.asarray(values) - rng.uniform(size=300) / (permutations + 1)
    assert scipy.stats.kstest(spread, "uniform").pvalue > 0.01


def test_dependent_samples_need_groups():
    rng = np.random.default_rng(0)
    pairs = [(blocks(rng, 12, 8), blocks(rng, 12, 8)) for _ in range(40)]
    options = {"key": KEY, "permutations": 19, "kernel": "linear"}
    alone = [float(permutation_test(x, y, **options).p_value) for x, y in pairs]
    together = [float(permutation_test(x, y, groups=np.arange(96) // 8, **options).p_value) for x, y in pairs]
    assert np.mean(np.asarray(alone) < 0.051) > 0.5  # float32 rounds 1 / 20 up
    assert np.sum(np.asarray(together) < 0.051) <= scipy.stats.binom.ppf(0.999, 40, 0.05)


def test_groups_are_exchanged_with_those_that_have_samples_at_the_same_places(x64):
    kept = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1], [1, 1, 1]], bool).reshape(-1)
    groups = _groups._grouped(np.repeat(np.arange(5), 3)).take(np.flatnonzero(kept))
    exchange = _permutations.GroupExchange.of(groups, int(kept.sum()))
    assert has_exactly(exchange, 4)  # the first with the third, the second with the fourth
    assert exchange.movable == 8
    # Unrelated networks that both know the place of a sample, of which each image lacks others.
    rng, found = np.random.default_rng(0), []
    for k in range(40):
        x, y = (
            rng.normal(size=(12, 1, 4)) + 1.5 * rng.normal(size=(1, 4, 4)) + 0.5 * rng.normal(size=(12, 4, 4))
            for _ in "xy"
        )
        mask = np.ones((12, 4), bool)
        mask[np.arange(12), np.arange(12) % 4] = False
        test = permutation_test(
            x, y, positions="samples", mask=mask.reshape(-1), kernel="linear", key=jax.random.key(k), permutations=19
        )
        found.append(float(test.p_value))
    assert np.sum(np.asarray(found) < 0.051) <= scipy.stats.binom.ppf(0.999, 40, 0.05)


def test_labels_of_any_kind_are_numbered_as_they_appear():
    expected = [0, 0, 1, 2, 1]
    named = {"x": np.zeros((5, 2))}
    for labels in ([3, 3, 1, 7, 1], list("bbaza"), np.array(list("bbaza"), object), np.array([9, 9, 3, 4, 3], "M8[D]")):
        found = _groups.check_groups(labels, named, None)
        assert found.number.tolist() == expected
        assert found.place.tolist() == [0, 1, 0, 0, 1]
    maps = {"x": np.zeros((2, 2, 3, 1))}
    by_position = _groups.check_groups(np.arange(12).reshape(2, 2, 3) // 3, maps, "samples")
    assert by_position.number.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for labels in ([None] * 4 + ["a"], [0.0, np.nan, 1, 2, 3], np.array(["NaT"] * 5, "M8[D]")):
        with pytest.raises(ValueError, match="groups has no label at"):
            _groups.check_groups(labels, named, None)
    with pytest.raises(TypeError, match="masked array"):
        _groups.check_groups(np.ma.array(np.arange(5), mask=True), named, None)
    with pytest.raises(TypeError, match="labels of one type"):
        _groups.check_groups(np.array([1, "a", 2, 3, 4], object), named, None)
    with pytest.raises(ValueError, match="of the same images or texts"):
        _groups.check_groups(None, {"x": np.zeros((2, 3, 1)), "y": np.zeros((3, 2, 1))}, "samples")


def test_images_are_the_groups_of_their_positions(x64):
    x, y, _ = sets(48)
    maps_x, maps_y = (a.reshape(4, 3, 4, -1) for a in (x, y))
    options = {"key": KEY, "permutations": 99}
    image = np.repeat(np.arange(4), 12)
    expected = permutation_test(x, y, groups=image, **options)
    for groups in (None, np.arange(4), list("dcba"), image):
        found = permutation_test(maps_x, maps_y, positions="samples", groups=groups, **options)
        assert found.null.shape == (23,)
        helpers.assert_close(np.sort(found.null), np.sort(expected.null), 1e-12)
    by_position = permutation_test(maps_x, maps_y, positions="samples", groups=np.arange(48), **options)
    helpers.assert_close(by_position.null, permutation_test(x, y, **options).null, 1e-12)
    many = {"key": KEY, "resamples": 20, "kernel": "linear"}
    ten = [np.concatenate([a] * 3)[:120].reshape(10, 4, 3, -1) for a in (x, y)]
    grouped = bootstrap(*(a.reshape(120, -1) for a in ten), groups=np.arange(120) // 12, **many)
    helpers.assert_close(bootstrap(*ten, positions="samples", **many).resampled, grouped.resampled, 1e-12)


def test_moves_of_grids_test_agreement_within_images(x64, rng):
    maps = rng.normal(size=(4, 4, 4, 3))
    other = maps @ rng.normal(size=(3, 5)) + 0.3 * rng.normal(size=(4, 4, 4, 5))
    options = {"key": KEY, "permutations": 99, "positions": "samples"}
    assert float(permutation_test(maps, other, null="grid", **options).p_value) == 0.01
    shuffled = maps.reshape(4, 16, 3)[:, rng.permutation(16)].reshape(maps.shape)
    assert float(permutation_test(shuffled, other, null="grid", **options).p_value) > 0.05


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


@pytest.mark.parametrize("name", ["cca", "pwcca"])
def test_a_measure_that_is_the_same_for_all_permutations_has_no_test(name, rng):
    x, y = rng.normal(size=(20, 19)), rng.normal(size=(20, 3))
    with pytest.raises(ValueError, match=f"{name} is 1 for every permutation.*20 samples of up to 19 channels"):
        permutation_test(x, y, name, key=KEY, permutations=19)
    assert permutation_test(x[:, :10], y, name, key=KEY, permutations=19).null.std() > 0


# --- resampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 1, 2, 1, 2, 2])])
def test_resampled_products_are_sums_over_pairs_of_copies(x64, groups, rng):
    f, g = (np.where(np.eye(7), 0, a + a.T) for a in rng.normal(size=(2, 7, 7)))
    labels = np.arange(7) if groups is None else groups
    drawn = rng.integers(labels.max() + 1, size=(4, labels.max() + 1))
    weights = np.stack([np.bincount(row, minlength=labels.max() + 1) for row in drawn]).astype(float)
    found = _resampling.resampled_products(
        *map(jnp.asarray, (f, g)), None if groups is None else jnp.asarray(groups), jnp.asarray(weights)
    )
    for row, value in zip(drawn, np.asarray(found), strict=True):
        copies = [(copy, i) for copy, group in enumerate(row) for i in np.flatnonzero(labels == group)]
        # All pairs but those of a copy of a group with another copy of it.
        pairs = [
            (i, j) for c, i in copies for d, j in copies if (c == d and i != j) or (c != d and labels[i] != labels[j])
        ]
        expected = np.sum([f[i, j] * g[i, j] for i, j in pairs]) * 42 / len(pairs)
        helpers.assert_close(value, expected, 1e-12)


@pytest.mark.slow
def test_intervals_of_groups_cover(x64):
    rng = np.random.default_rng(0)

    def pair(number):
        x, noise = blocks(rng, number, 4), blocks(rng, number, 4)
        return x, x + noise

    truth = float(compare(*pair(1000), kernel="linear"))
    hits = {"groups": 0, "samples": 0}
    for k in range(100):
        x, y = pair(30)
        for name, groups in (("groups", np.arange(120) // 4), ("samples", None)):
            found = bootstrap(x, y, kernel="linear", key=jax.random.key(k), resamples=200, level=0.9, groups=groups)
            hits[name] += bool(found.low <= truth <= found.high)
    assert hits["groups"] >= scipy.stats.binom.ppf(0.001, 100, 0.88)
    assert hits["samples"] < scipy.stats.binom.ppf(0.001, 100, 0.88)


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


def expanded_level(left_out, resampled, level=0.95):
    """The level of an interval of quantiles, from quantiles of t with the freedom of the variance of influences."""
    n = len(left_out)
    kurtosis = scipy.stats.kurtosis(left_out, fisher=False)
    ratio = resampled.var() / (n * left_out.var())
    freedom = np.clip((n - 1) * min(ratio, 1) ** 2 * 2 / (kurtosis - 1), 3, n - 1)
    return 2 * scipy.stats.norm.cdf(np.sqrt(n / (n - 1)) * scipy.stats.t.ppf((1 + level) / 2, freedom)) - 1


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_ends_are_quantiles_of_t(x64, method, level, rng):
    left_out, resampled = rng.gamma(2, size=20) / 20, 0.1 + 0.3 * rng.normal(size=4000)
    values = jnp.asarray(np.concatenate(([0.2], left_out, resampled)))
    found = _resampling.interval_ends(_resampling.Resampled(values, values), jnp.asarray(resampled), level, method)
    expected = expanded_level(left_out, resampled, level)
    ends = scipy.stats.norm.ppf([(1 - expected) / 2, (1 + expected) / 2])
    if method == "bca":
        bias = scipy.stats.norm.ppf(np.mean(resampled < 0.2))
        influence = left_out.mean() - left_out
        acceleration = np.sum(influence**3) / (6 * np.sum(influence**2) ** 1.5)
        ends = bias + (bias + ends) / (1 - acceleration * (bias + ends))
    helpers.assert_close(found, np.quantile(resampled, scipy.stats.norm.cdf(ends)), 5e-3)  # of t: within 1e-3


@pytest.mark.parametrize("level", [0.9, 0.999, 0.99999])
def test_intervals_of_few_and_skewed_samples_are_in_order_and_in_range(level):
    rng = np.random.default_rng(7)
    for k in range(20):
        x = rng.normal(size=(10, 6)).astype(np.float32)
        y = x + rng.normal(size=(10, 6)).astype(np.float32)
        x[0] *= 8
        for name in ("cka", "distance_correlation"):
            found = bootstrap(x, y, name, level=level, resamples=200, key=jax.random.key(k))
            assert -1 <= found.low < found.high <= 1
            assert found.resampled.min() <= found.low
            assert found.high <= found.resampled.max()


def test_an_aggregate_of_layers_has_the_interval_of_its_resamples(x64):
    x, y, z = sets()
    ours, theirs = {"a": x, "b": x[:, :2] ** 2}, {"c": y, "d": z, "e": y**2}
    how = {"kernel": "linear", "key": KEY, "resamples": 40}
    single = bootstrap(x, y, **how)
    for aggregate in ("max", "mean", "mean_of_best", "symmetric_best"):
        alone = bootstrap({"a": x}, {"c": y}, aggregate=aggregate, **how)
        for name in ("value", "low", "high", "resampled"):
            helpers.assert_close(getattr(alone, name), getattr(single, name), 1e-12)
    found = bootstrap(ours, theirs, aggregate="symmetric_best", **how)
    values = np.asarray(jaxalign.compare_grid(ours, theirs, kernel="linear").values)
    helpers.assert_close(found.value, (values.max(1).mean() + values.max(0).mean()) / 2, 1e-10)
    flipped = bootstrap(theirs, ours, aggregate="symmetric_best", **how)
    helpers.assert_close(found.resampled, flipped.resampled, 1e-12)
    assert float(found.low) < float(found.value) < float(found.high)
    with pytest.raises(ValueError, match="aggregate has no effect on a single pair"):
        bootstrap(x, y, aggregate="max", **how)


def test_what_does_not_vary_has_no_interval():
    x, y, _ = sets()
    with pytest.raises(ValueError, match="all samples of y are equal or equidistant"):
        bootstrap(x, np.ones_like(y), key=KEY, kernel="linear")
    with pytest.raises(ValueError, match=r"all samples of second\[1\] are equal"):
        paired_difference((x, y), (x, np.ones_like(y)), key=KEY, kernel="linear")


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 0.15, 1])
def test_resamples_vary_as_new_samples_do(x64, shared):
    # The sum over pairs of <z_i, z_j>, z = x y: degenerate if shared = 0, when most of the variance of influences is
    # noise of pairs.
    def statistic(rng):
        x, noise = rng.normal(size=(2, 40, 8))
        return x * (shared * x + noise)

    def resampled(z, key):
        pairs = z @ z.T * (1 - np.eye(40))
        weights = _resampling.draw_weights(key, 300, 40, jnp.float64)
        products = _resampling.resampled_products(jnp.asarray(pairs), jnp.ones((40, 40)), None, weights)
        found = _resampling.Resampled.of(lambda a: a, products)
        return float(jnp.var(found.values[41:])), float(jnp.var(_resampling.without_noise_of_pairs(found, weights)))

    rng = np.random.default_rng(0)
    truth = np.var([np.sum(np.sum(z, 0) ** 2) - np.sum(z**2) for z in (statistic(rng) for _ in range(20_000))])
    plain, mended = np.mean([resampled(statistic(rng), jax.random.key(k)) for k in range(400)], 0)
    if shared < 1:
        assert plain > (2.5 if shared == 0 else 1.5) * truth
    # Variances of products of normals have errors of some percent; shares that would be negative are 0 instead.
    assert 0.85 * truth < mended < 1.5 * truth


@pytest.mark.slow
def test_bca_agrees_with_scipy(x64):
    # scipy is given the statistic of drawn samples, whose mean over pairs is theirs, not that of all samples.
    x, y, _ = sets(25)
    found = bootstrap(x, y, "rsa", key=KEY, resamples=400, level=0.8)
    f, g = (reference.sq_distances(a) for a in (x, y))

    def statistic(index):
        i, j = np.triu_indices(len(index), 1)
        different = index[i] != index[j]
        a, b = index[i][different], index[j][different]
        return np.corrcoef(f[a, b], g[a, b])[0, 1]

    left_out = np.array([statistic(np.delete(np.arange(25), k)) for k in range(25)])
    theirs = scipy.stats.bootstrap(
        (np.arange(25),), statistic, n_resamples=400, vectorized=False, method="BCa", rng=np.random.default_rng(0),
        confidence_level=expanded_level(left_out, np.asarray(found.resampled), 0.8),
    )  # fmt: skip
    spread = theirs.standard_error
    low, high = theirs.confidence_interval
    assert abs(found.low - low) < 0.5 * spread  # ends of 400 resamples: the 30th smallest, give or take 5
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
    groups = np.arange(20) // 2
    again = noise_ceiling(subjects, name, key=KEY, resamples=50, groups=groups, **options)
    helpers.assert_close([again.lower, again.upper], [found.lower, found.upper], 1e-12)
    assert again.lower_interval.low < found.lower < again.lower_interval.high
    assert again.upper_interval.low < found.upper < again.upper_interval.high
    # Two subjects: the bounds follow from one cosine, so the resamples are those of `bootstrap`.
    if name == "cka":
        pair = noise_ceiling(subjects[:2], name, key=KEY, resamples=50, **options)
        alone = bootstrap(*subjects[:2], name, key=KEY, resamples=50, **options)
        helpers.assert_close(pair.lower_interval.resampled, alone.resampled, 1e-10)


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
        (lambda: noise_ceiling([x, y], groups=np.arange(40)), "groups has no effect without key"),
        (lambda: permutation_test(x, y, key=KEY, groups=np.arange(39)), r"groups must have shape \(40,\)"),
        (lambda: permutation_test(x, y, key=KEY, groups=np.full(40, np.nan)), "groups has no label at 0"),
        (
            lambda: permutation_test(x, y, key=KEY, groups=np.zeros(40)),
            "only 0 of 40 samples are in groups that can be exchanged",
        ),
        (lambda: permutation_test(x, y, key=KEY, null="grid"), 'null="grid" needs maps'),
        (lambda: permutation_test(x, y, key=KEY, null="samples"), "null must be one of"),
        (lambda: permutation_test(x, y, key=KEY, null="grid", groups=np.arange(40)), "groups has no effect"),
        (
            lambda: permutation_test(
                x[:32].reshape(2, 4, 4, -1), y[:32].reshape(2, 2, 8, -1), key=KEY, null="grid", positions="samples"
            ),
            "maps of one grid",
        ),
        (lambda: bootstrap(x, y, kernel="linear", sampled_channels=True, key=KEY), "use sampled_channels=False"),
        (lambda: bootstrap(x, y, key=KEY, groups=np.arange(40) // 5), "at least 10 groups; got 8"),
        (lambda: calibrate(0.5), "result of permutation_test"),
        (lambda: calibrate(permutation_test(x, y, key=KEY, permutations=9)), "needs at least 19 permutations"),
        (lambda: calibrate(permutation_test(x, y, key=KEY, permutations=19), alpha=0), "alpha must lie"),
        (lambda: calibrate(permutation_test(x, y, key=KEY, permutations=19), aggregate="max"), "no effect on a single"),
        (lambda: permutation_test(x, y, kernel="linear", sampled_channels=True, key=KEY), "p-value is the same"),
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
    equal = permutation_test(x, 2 * x, "procrustes", result="similarity", key=KEY, permutations=19)
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
    before = _null._permuted_summaries._cache_size()
    permutation_test(y, x[:, :4], "jaccard", key=jax.random.key(1), permutations=5, k=3)
    permutation_test(x, y, "jaccard", key=jax.random.key(2), permutations=5, k=3)
    assert _null._permuted_summaries._cache_size() <= before + 1  # the second has other widths


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
