"""mean_density: the mean of exp(-||x_i - y_j||^2 / (2 sigma^2)) over the pairs that count."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxalign


@pytest.mark.slow
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("setting", ["exclude", "masked include", "masked rectangular"])
def test_equals_the_mean_of_the_definition(setting, per_row, dtype, rng):
    for name, features in helpers.FEATURES.items():
        if name == "one_feature":
            continue
        x, options = helpers.problem(setting, features(rng), dtype)
        sigma = rng.uniform(0.3, 3.0, helpers.ROWS if per_row else ()).astype(dtype)
        # Per row too, the density is one number: the mean over all pairs.
        distances = reference.squared_distances(*helpers.sides_in_float64(x, options))
        rows = np.broadcast_to(sigma, helpers.ROWS).astype(np.float64)[:, None]
        expected = np.mean(np.exp(-distances / (2 * rows**2))[helpers.counted(options)])
        bandwidth = "per_row" if np.ndim(sigma) else "global"
        actual = jaxalign.mean_density(x, **options, sigma=sigma, bandwidth=bandwidth)
        assert actual.dtype == dtype
        assert actual.shape == ()
        assert helpers.relative_error(actual, expected) < helpers.tolerance(dtype).density, name


@pytest.mark.parametrize("setting", ["masked include", "masked exclude", "masked rectangular"])
def test_what_masked_rows_hold_makes_no_difference(setting, dtype, rng):
    x, options = helpers.problem(setting, helpers.gaussian(rng), dtype)
    clean = jaxalign.mean_density(x, **options, sigma=1.3)
    dirty_x, dirty = helpers.spoil_masked(x, options)
    assert float(jaxalign.mean_density(dirty_x, **dirty, sigma=1.3)) == float(clean)
    # ... nor what a sigma per row holds there.
    sigma = np.where(helpers.MASK, 1.3, np.nan).astype(dtype)
    assert (
        helpers.relative_error(jaxalign.mean_density(x, **options, sigma=sigma, bandwidth="per_row"), clean)
        < 10 * np.finfo(dtype).eps
    )


def test_inverts_solve_sigma(dtype, rng):
    x = rng.normal(size=(helpers.ROWS, helpers.WIDTH)).astype(dtype)
    solution = jaxalign.solve_sigma(x, density=0.2)
    reached = jaxalign.mean_density(x, sigma=solution.sigma)
    assert helpers.relative_error(reached, 0.2) < helpers.tolerance(dtype).density


def test_a_sigma_per_batch_element_and_per_row_of_it(dtype, rng):
    x = rng.normal(size=(2, helpers.ROWS, helpers.WIDTH)).astype(dtype)
    for sigma in (
        np.asarray(0.7, dtype),
        np.array([0.7, 1.4], dtype),
        rng.uniform(0.5, 2, helpers.ROWS).astype(dtype),
        rng.uniform(0.5, 2, (2, helpers.ROWS)).astype(dtype),
    ):
        bandwidth = "per_row" if sigma.shape[-1:] == (helpers.ROWS,) else "global"
        actual = jaxalign.mean_density(x, sigma=sigma, bandwidth=bandwidth)
        rows = sigma[:, None] if sigma.shape == (2,) else sigma
        rows = np.broadcast_to(rows, (2, helpers.ROWS)).astype(np.float64)
        expected = [np.mean(reference.mean_density(x[i], sigma=rows[i], per_row=True)) for i in range(2)]
        assert helpers.relative_error(actual, expected) < helpers.tolerance(dtype).density


def test_limits_are_the_share_of_coincident_pairs_and_one(dtype, rng):
    x, options = helpers.problem("include", helpers.duplicates(rng), dtype)
    floor = helpers.share_of_coincident_pairs(x, options)
    for tiny in (1e-4, 1e-12, 1e-25, float(np.finfo(dtype).tiny)):
        # Also where sigma^2 is below the smallest number there is.
        assert helpers.relative_error(jaxalign.mean_density(x, sigma=tiny), floor) < 4 * np.finfo(dtype).eps
    for huge in (1e12, 1e30, float(np.finfo(dtype).max)):
        assert helpers.relative_error(jaxalign.mean_density(x, sigma=huge), 1.0) < 4 * np.finfo(dtype).eps


def test_gradient_is_finite_at_extreme_sigma(dtype, rng):
    x = rng.normal(size=(helpers.ROWS, helpers.WIDTH)).astype(dtype)
    slope = jax.jit(jax.grad(lambda s: jaxalign.mean_density(x, sigma=s)))
    for sigma in (1e-30, 1e-15, 1e15, 1e30):
        assert float(slope(jnp.asarray(sigma, dtype))) == pytest.approx(0, abs=1e-12)


def test_is_nan_where_the_mask_leaves_no_pair_under_jit(rng):
    x = rng.normal(size=(helpers.ROWS, helpers.WIDTH)).astype(np.float32)
    density = jax.jit(lambda x, mask: jaxalign.mean_density(x, sigma=1.0, mask=mask))
    assert np.isnan(density(x, np.zeros(helpers.ROWS, bool)))
    assert np.isfinite(density(x, helpers.MASK))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("setting", ["exclude", "masked rectangular"])
def test_derivatives_equal_finite_differences(setting, rng):
    x, options = helpers.problem(setting, helpers.gaussian(rng), np.float64)
    y = options.pop("y", None)
    args = {"x": x, "sigma": np.asarray(1.3)} | ({} if y is None else {"y": y})
    helpers.check_derivatives(lambda args: jaxalign.mean_density(**args, **options), args, rng)
