"""rbf_affinity: A_ij = exp(-||x_i - y_j||^2 / (2 sigma^2)), sigma given or such that mean(A) = density."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import jaxalign
from jaxalign import Status

ROWS, OTHER_ROWS, WIDTH, MASK, MASK_Y = (
    helpers.ROWS,
    helpers.OTHER_ROWS,
    helpers.WIDTH,
    helpers.MASK,
    helpers.MASK_Y,
)
seeds = st.integers(0, 2**32 - 1)


# --- at a given sigma -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["include", "masked rectangular"])
@pytest.mark.parametrize("per_row", [False, True])
def test_equals_the_definition_at_a_given_sigma(setting, per_row, dtype, rng):
    for features in (helpers.gaussian, helpers.cauchy, helpers.duplicates, helpers.offset, helpers.all_but_two_equal):
        x, options = helpers.problem(setting, features(rng), dtype)
        sigma = rng.uniform(0.3, 3.0, ROWS if per_row else ()).astype(dtype)
        options.pop("diagonal", None)  # of a mean that is not taken
        bandwidth = "per_row" if per_row else "global"
        actual = jaxalign.rbf_affinity(x, **options, sigma=sigma, bandwidth=bandwidth)
        assert actual.dtype == dtype
        clean, clean_options = helpers.in_float64(x, options)
        expected = reference.rbf_affinity(clean, **clean_options, sigma=sigma)
        # An error of eps of the distances, times the exponent, which is at most 14 where A is 1e-6.
        helpers.assert_close(actual, expected, 10 * helpers.tolerance(dtype).value, scale=1.0)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_equals_the_published_formula(sigma, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    try:
        import torch
    except ImportError:
        expected = np.exp(-((reference.squared_distances(x) ** 0.5) ** 2) / (2 * sigma**2))
    else:
        z = torch.from_numpy(x).double()
        expected = torch.exp(-(torch.cdist(z, z) ** 2) / (2 * sigma**2)).numpy()
    helpers.assert_close(jaxalign.rbf_affinity(x, sigma=sigma), expected, 1e-6)


def test_clusters_far_apart_are_resolved_at_a_sigma_inside_them(dtype, rng):
    x, _ = helpers.problem("include", helpers.clusters(rng), dtype)
    expected = reference.rbf_affinity(x, sigma=1.0)
    helpers.assert_close(jaxalign.rbf_affinity(x, sigma=1.0), expected, 10 * helpers.tolerance(dtype).value)


@pytest.mark.parametrize("shape", [(), (2,), (ROWS,), (2, ROWS)])
def test_shapes_of_sigma(shape, rng):
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    sigma = rng.uniform(0.5, 2.0, shape).astype(np.float32)
    bandwidth = "per_row" if shape[-1:] == (ROWS,) else "global"
    actual = jaxalign.rbf_affinity(x, sigma=sigma, bandwidth=bandwidth)
    rows = np.broadcast_to(sigma[:, None] if shape == (2,) else sigma, (2, ROWS))
    expected = np.stack([reference.rbf_affinity(x[i], sigma=rows[i]) for i in range(2)])
    helpers.assert_close(actual, expected, 10 * helpers.tolerance(np.float32).value)


def test_sigma_may_be_given_by_position_and_traced(rng):
    x, y = (rng.normal(size=(rows, WIDTH)).astype(np.float32) for rows in (ROWS, OTHER_ROWS))
    expected = jaxalign.rbf_affinity(x, y, sigma=0.8)
    assert np.array_equal(jaxalign.rbf_affinity(x, y, 0.8), expected)
    traced = jax.jit(lambda s: jaxalign.rbf_affinity(x, y, s))(0.8)
    helpers.assert_close(traced, expected, helpers.tolerance(np.float32).value)


@pytest.mark.parametrize("sigma", [1e-38, 1e-25, 1e-12])
def test_a_tiny_sigma_gives_the_identity(sigma, dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    assert np.array_equal(jaxalign.rbf_affinity(x, sigma=sigma), np.eye(ROWS))


@pytest.mark.parametrize("sigma", [1e12, 1e25, 1e38])
def test_a_huge_sigma_gives_ones(sigma, dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    assert np.array_equal(jaxalign.rbf_affinity(x, sigma=sigma), np.ones((ROWS, ROWS)))


# --- at a density ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "bandwidth"), [("exclude", "global"), ("masked include", "per_row"), ("masked rectangular", "global")]
)
def test_is_the_affinity_at_the_sigma_that_reaches_the_density(setting, bandwidth, dtype, rng):
    for features in (helpers.gaussian, helpers.cauchy, helpers.offset):
        clean_x, clean = helpers.problem(setting, features(rng), dtype)
        x, options = helpers.spoil_masked(clean_x, clean)
        affinity = np.asarray(jaxalign.rbf_affinity(x, **options, density=0.2, bandwidth=bandwidth), np.float64)
        reference_x, reference_options = helpers.in_float64(clean_x, clean)
        expected = reference.rbf_affinity(reference_x, **reference_options, density=0.2, bandwidth=bandwidth)
        expected = np.nan_to_num(expected)  # masked rows have no sigma; they are 0
        helpers.assert_close(affinity, expected, max(helpers.tolerance(dtype).density, 1e-10))
        counted = helpers.counted(options)
        if bandwidth == "global":
            means = np.mean(affinity[counted])
        else:
            real = counted.any(1)
            means = np.sum(affinity * counted, 1)[real] / np.sum(counted, 1)[real]
        assert helpers.relative_error(means, np.full(means.shape, 0.2)) < helpers.tolerance(dtype).density


@given(seed=seeds, tail=st.sampled_from([1.0, 2.0, 30.0]), density=st.floats(0.05, 0.95))
def test_global_affinity_is_symmetric_with_ones_on_the_diagonal(dtype, seed, tail, density):
    x = np.random.default_rng(seed).standard_t(tail, (ROWS, WIDTH)).astype(dtype)
    affinity = np.asarray(jaxalign.rbf_affinity(x, density=density))
    assert np.array_equal(affinity, affinity.T)
    assert np.all(np.diag(affinity) == 1)
    assert np.all((affinity >= 0) & (affinity <= 1))
    assert helpers.relative_error(affinity.mean(dtype=np.float64), density) < helpers.tolerance(dtype).density


def test_the_default_is_the_published_one(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    assert np.array_equal(
        jaxalign.rbf_affinity(x), jaxalign.rbf_affinity(x, density=0.05, diagonal="include", bandwidth="global")
    )
    assert float(jaxalign.rbf_affinity(x).mean()) == pytest.approx(0.05, rel=1e-5)


def test_zero_diagonal_is_set_after_sigma_is_found(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    full, without = (jaxalign.rbf_affinity(x, density=0.1, zero_diagonal=zero) for zero in (False, True))
    assert np.array_equal(np.asarray(without), np.asarray(full) * (1 - np.eye(ROWS)))
    at_sigma = jaxalign.rbf_affinity(x, sigma=1.0, zero_diagonal=True)
    assert np.all(np.diag(np.asarray(at_sigma)) == 0)
    assert np.sum(np.asarray(at_sigma) == 0) == ROWS


def test_masked_rows_and_columns_are_exactly_zero(dtype, rng):
    for setting, pairs in (("masked include", np.outer(MASK, MASK)), ("masked rectangular", np.outer(MASK, MASK_Y))):
        x, options = helpers.spoil_masked(*helpers.problem(setting, helpers.gaussian(rng), dtype))
        affinity = np.asarray(jaxalign.rbf_affinity(x, **options, density=0.2))
        assert np.all(affinity[~pairs] == 0)
        assert np.all(affinity[pairs] > 0)


@given(seed=seeds, exponent=st.integers(-59, 59))
def test_a_power_of_two_changes_nothing_at_all(dtype, seed, exponent):
    x = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(dtype)
    affinity, of_scaled = (np.asarray(jaxalign.rbf_affinity(a, density=0.1)) for a in (x, np.ldexp(x, exponent)))
    assert np.array_equal(of_scaled, affinity)


@given(seed=seeds, log_scale=st.floats(-18, 18))
def test_the_unit_does_not_matter(dtype, seed, log_scale):
    x = np.random.default_rng(seed).normal(size=(ROWS, WIDTH))
    affinity, of_scaled = (jaxalign.rbf_affinity(a.astype(dtype), density=0.1) for a in (x, 10.0**log_scale * x))
    helpers.assert_close(of_scaled, affinity, helpers.tolerance(dtype).density)


@given(seed=seeds)
def test_rotation_offset_and_padding_with_zeros_do_not_matter(dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, WIDTH))
    rotation, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    affinity, of_moved = (
        jaxalign.rbf_affinity(a.astype(dtype), density=0.1) for a in (x, 0.25 * x @ rotation + rng.normal(size=WIDTH))
    )
    helpers.assert_close(of_moved, affinity, helpers.tolerance(dtype).density)


def test_half_precision_features(rng):
    x = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.bfloat16)
    affinity = jaxalign.rbf_affinity(x, density=0.1)
    assert affinity.dtype == np.float32
    expected = reference.rbf_affinity(np.asarray(x.astype(jnp.float32)), density=0.1)
    helpers.assert_close(affinity, expected, helpers.tolerance(np.float32).density)


def test_a_batch_with_densities_equals_a_loop(rng):
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    density = np.array([0.1, 0.5], np.float32)
    batched = jaxalign.rbf_affinity(x, density=density)
    for i in range(2):
        alone = jaxalign.rbf_affinity(x[i], density=float(density[i]))
        helpers.assert_close(batched[i], alone, helpers.tolerance(np.float32).density)


def test_matches_solve_sigma_and_mean_density(dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    sigma = jaxalign.solve_sigma(x, density=0.1).sigma
    affinity = jaxalign.rbf_affinity(x, density=0.1)
    helpers.assert_close(jaxalign.rbf_affinity(x, sigma=sigma), affinity, helpers.tolerance(dtype).density)
    assert helpers.relative_error(jaxalign.mean_density(x, sigma=sigma), np.mean(np.asarray(affinity, np.float64))) < (
        helpers.tolerance(dtype).density
    )


# --- nothing silently wrong -----------------------------------------------------------------------------------------


def test_is_nan_under_jit_where_solve_sigma_has_no_sigma(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    with_nan, with_inf = x.copy(), x.copy()
    with_nan[5, 2], with_inf[7, 0] = np.nan, np.inf
    affinity = jax.jit(lambda x, c: jaxalign.rbf_affinity(x, density=c))
    solve = jax.jit(lambda x, c: jaxalign.solve_sigma(x, density=c))
    for features, density, status in [
        (x, 0.2, Status.CONVERGED),
        (np.repeat(x[:3], 8, 0), 0.2, Status.INFEASIBLE),
        (x, 0.9 / ROWS, Status.INFEASIBLE),
        (with_nan, 0.2, Status.NON_FINITE),
        (with_inf, 0.2, Status.NON_FINITE),
        (x, 1.5, Status.BAD_DENSITY),
        (x, -0.5, Status.BAD_DENSITY),
        (x, np.nan, Status.BAD_DENSITY),
    ]:
        assert int(solve(features, density).status) == status
        result = np.asarray(affinity(features, density))
        # Not a few nans that a mean over the rest would hide: every entry.
        assert np.all(np.isnan(result) == (status != Status.CONVERGED))


def test_is_nan_under_jit_at_a_given_sigma_where_features_are_not_finite(rng):
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    x[1, 5, 2] = np.inf
    result = np.asarray(jax.jit(lambda x: jaxalign.rbf_affinity(x, sigma=1.0))(x))
    assert np.all(np.isfinite(result[0]))
    assert np.all(np.isnan(result[1]))


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.inf, np.nan])
def test_is_nan_under_jit_at_a_sigma_that_is_none(sigma, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    assert np.all(np.isnan(jax.jit(lambda s: jaxalign.rbf_affinity(x, sigma=s))(sigma)))
    assert np.isnan(jax.jit(lambda s: jaxalign.mean_density(x, sigma=s))(sigma))
