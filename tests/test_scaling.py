"""Measures of subsamples: values, intervals that cover, groups, files, and what the number of samples changes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.stats

from jaxalign import compare, scaling, scaling_curve

KEY = jax.random.key(0)


def sets(n=300, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    return x, (x + noise * rng.normal(size=(n, 4))).astype(np.float32)


def test_the_last_value_is_that_of_all_samples_and_the_others_are_means():
    x, y = sets(256)
    curve = scaling_curve(x, y, kernel="linear", key=KEY)
    assert curve.sizes.tolist() == [64, 128, 256]
    np.testing.assert_allclose(curve.value[-1], compare(x, y, kernel="linear"), rtol=1e-6)
    assert np.isfinite(curve.each).sum(1).tolist() == [4, 2, 1]
    np.testing.assert_allclose(curve.value[0], curve.each[0].mean(), rtol=1e-12)
    ends = scipy.stats.t.interval(0.95, 3, curve.each[0].mean(), scipy.stats.sem(curve.each[0]))
    np.testing.assert_allclose([curve.low[0], curve.high[0]], ends, rtol=1e-9)
    assert np.isnan([curve.low[-1], curve.high[-1]]).all()
    assert curve.to_pandas().subsamples.tolist() == [4, 2, 1]
    again = scaling_curve(x, y, kernel="linear", key=KEY, sizes=[128, 64], max_subsamples=2)
    np.testing.assert_array_equal(again.each, curve.each[:2, :2])


def test_subsamples_are_disjoint():
    x = np.arange(100.0, dtype=np.float32)[:, None]
    seen = []

    def record(rows, subsample, *rest):
        seen.append(subsample)
        return 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "_value", record)
        scaling_curve(x, x, key=KEY, sizes=[20], mask=np.arange(100) % 10 > 0)
    assert [len(part) for part in seen] == [20] * 4
    together = np.concatenate(seen)
    assert len(set(together)) == 80
    assert (together % 10 > 0).all()


def test_one_sample_of_each_group():
    x, y = sets(120)
    captions = np.repeat(np.arange(40), 3)
    curve = scaling_curve(x, y, kernel="linear", key=KEY, groups=captions)
    assert curve.sizes.tolist() == [40]
    chosen = scaling._random_members({"x": x}, captions, None, None, KEY, 120)
    assert sorted(captions[chosen]) == list(range(40))
    assert len(set(chosen % 3)) == 3
    rows = np.sort(chosen)
    np.testing.assert_allclose(curve.value[0], compare(x[rows], y[rows], kernel="linear"), rtol=1e-6)
    maps = scaling_curve(x.reshape(40, 3, 4), y.reshape(40, 3, 4), kernel="linear", key=KEY, positions="samples")
    np.testing.assert_allclose(maps.value, curve.value, rtol=1e-6)


@pytest.mark.parametrize("measure", ["mutual_knn", "cka"])
def test_files_are_not_copied_to_memory(measure, tmp_path, monkeypatch):
    x, y = sets(130)
    for name, value in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", value)
    expected = scaling_curve(x, y, measure, key=KEY)
    assert expected.sizes.tolist() == [65, 130]
    monkeypatch.setattr(scaling, "_COPIED", 0)
    monkeypatch.setattr(scaling, "compare", None)  # rows are read block by block
    found = scaling_curve(tmp_path / "x.npy", np.load(tmp_path / "y.npy", mmap_mode="r"), measure, key=KEY)
    np.testing.assert_allclose(found.each, expected.each, rtol=2e-5)


def test_neighbors_of_few_samples_agree_by_what_is_coarse():
    # Clusters are the same in both networks, what is within a cluster is not: with many samples of each cluster all
    # neighbors are in the own cluster, where they agree by chance.
    rng = np.random.default_rng(0)
    cluster = rng.integers(25, size=1600)
    x, y = (6 * rng.normal(size=(25, 5))[cluster] + rng.normal(size=(1600, 5)) for _ in "xy")
    curve = scaling_curve(
        x.astype(np.float32), y.astype(np.float32), "mutual_knn", k=5, key=KEY, sizes=[100, 400, 1600]
    )
    chance = 5 / 63  # of 64 samples in a cluster
    assert (np.diff(curve.value) < 0).all()
    assert curve.low[0] > 2 * curve.value[-1]
    assert abs(curve.value[-1] - chance) < 0.04
    whole = scaling_curve(x.astype(np.float32), y.astype(np.float32), kernel="linear", key=KEY, sizes=[100, 400])
    assert whole.low[0] < whole.value[1] < whole.high[0]  # debiased CKA does not depend on the number of samples


def test_a_size_with_a_subsample_without_value_has_none(monkeypatch):
    x, y = sets(40)
    values = iter([np.nan, 0.5, 0.7, 0.1])
    monkeypatch.setattr(scaling, "_value", lambda *args: next(values))
    curve = scaling_curve(x, y, key=KEY, sizes=(size for size in (20, 13)), max_subsamples=2)
    np.testing.assert_array_equal(curve.sizes, [13, 20])
    assert np.isnan([curve.value[0], curve.low[0]]).all()
    np.testing.assert_allclose(curve.value[1], 0.4)
    values = iter([0.3])
    assert scaling_curve(x, y, key=KEY, sizes=40).value.tolist() == [0.3]


@pytest.mark.slow
def test_intervals_hold_the_expected_value():
    truth = scaling_curve(*sets(40 * 400, 99), kernel="linear", key=KEY, sizes=[40], max_subsamples=400).value[0]
    hits = 0
    for k in range(100):
        curve = scaling_curve(*sets(200, k), kernel="linear", key=KEY, sizes=[40], level=0.9)
        hits += bool(curve.low[0] < truth < curve.high[0])
    assert scipy.stats.binom.ppf(0.001, 100, 0.9) <= hits <= scipy.stats.binom.ppf(0.999, 100, 0.9)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(tmp_path):
    x, y = sets(40)
    np.savez(tmp_path / "two.npz", a=x, b=y)
    bad = [
        (lambda: scaling_curve(x, y, key=KEY, sizes=[41]), "at most the number of samples or groups, 40; got 41"),
        (lambda: scaling_curve(x, y, key=KEY, sizes=[]), "sizes is empty"),
        (lambda: scaling_curve(x, y, key=KEY, sizes=[1, 20]), "sizes must be a whole number, at least 2"),
        (lambda: scaling_curve(x, y, key=KEY, sizes=[2, 20]), "cka needs at least 4 samples"),
        (lambda: scaling_curve(x, y[:30], key=KEY), "the same samples, row by row: 40 and 30"),
        (lambda: scaling_curve(x, y, key=KEY, groups=np.arange(30)), "groups must have shape"),
        (lambda: scaling_curve(x, y, key=KEY, groups=np.zeros(40)), "at least 2 samples or groups; 1 groups"),
        (lambda: scaling_curve(x, y, key=KEY, mask=np.zeros(40, bool)), "at least 2 samples or groups; 0 samples"),
        (lambda: jax.jit(lambda x: scaling_curve(x, y, key=KEY))(x), "call it outside of jit"),
        (lambda: scaling_curve(x, y, key=KEY, mask=np.ones(40)), "mask must be boolean"),
        (lambda: scaling_curve(x, y, key=KEY, level=1), "level must lie strictly"),
        (lambda: scaling_curve(x, y, key=1), "key must be a single key"),
        (lambda: scaling_curve(x, y, "mutual_nn", key=KEY), "Did you mean 'mutual_knn'"),
        (lambda: scaling_curve(tmp_path / "two.npz", y, key=KEY), "holds 2 representations"),
        (lambda: scaling_curve(x[None], y[None], key=KEY), r"x must have shape \(n, d\)"),
    ]
    for call, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            call()
