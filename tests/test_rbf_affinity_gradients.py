"""Derivatives of rbf_affinity, at a given sigma and through the solved one."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxalign

ROWS, WIDTH = helpers.ROWS, helpers.WIDTH


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sigma", ["given", "per row", "solved", "solved per row"])
def test_first_and_second_derivatives_equal_finite_differences(sigma, rng):
    setting = {"given": "rectangular", "per row": "masked include", "solved": "masked exclude"}.get(
        sigma, "masked rectangular"
    )
    x, options = helpers.problem(setting, helpers.gaussian(rng), np.float64)
    args = {"x": x} | ({"y": options.pop("y")} if "y" in options else {})
    if "solved" in sigma:
        args["density"] = np.asarray(0.2)
        options["bandwidth"] = "per_row" if sigma == "solved per row" else "global"
    else:
        args["sigma"] = rng.uniform(1, 2, ROWS if sigma == "per row" else ())
        options["bandwidth"] = "per_row" if sigma == "per row" else "global"
        options.pop("diagonal", None)  # of a mean that is not taken
    weights = rng.normal(size=(ROWS, helpers.OTHER_ROWS if "y" in args else ROWS))
    helpers.check_derivatives(lambda args: jnp.sum(weights * jaxalign.rbf_affinity(**args, **options)), args, rng)


def test_gradient_at_a_given_sigma_is_that_of_the_formula(dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    weights = rng.normal(size=(ROWS, ROWS)).astype(dtype)
    to_x, to_sigma = jax.grad(lambda x, s: jnp.sum(weights * jaxalign.rbf_affinity(x, sigma=s)), (0, 1))(
        x, jnp.asarray(1.3, dtype)
    )
    x, sigma = x.astype(np.float64), np.float64(np.asarray(1.3, dtype))
    affinity, distances = reference.rbf_affinity(x, sigma=sigma), reference.squared_distances(x)
    pull = weights * affinity
    expected = -np.einsum("ij,ijd->id", pull + pull.T, x[:, None] - x[None]) / sigma**2
    helpers.assert_close(to_x, expected, helpers.tolerance(dtype).gradient)
    helpers.assert_close(to_sigma, np.sum(pull * distances) / sigma**3, helpers.tolerance(dtype).gradient)


@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_the_mean_of_the_affinity_does_not_depend_on_the_features(bandwidth, dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    weights = np.where(np.arange(ROWS) < 12, 1.0, 0.0 if bandwidth == "per_row" else 1.0).astype(dtype)

    def mean(x, density):  # of some rows: per row, every one of them is fixed
        affinity = jaxalign.rbf_affinity(x, density=density, bandwidth=bandwidth)
        return jnp.sum(weights[:, None] * affinity) / (ROWS * jnp.sum(weights))

    to_x, to_density = jax.grad(mean, (0, 1))(x, jnp.asarray(0.1, dtype))
    rtol = helpers.tolerance(dtype).gradient
    helpers.assert_close(to_x, np.zeros(x.shape), rtol, scale=1 / ROWS)
    helpers.assert_close(to_density, 1.0, rtol)


def test_gradient_through_the_solved_sigma_does_not_depend_on_unit_or_offset(dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    weights = rng.normal(size=(ROWS, ROWS)).astype(dtype)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weights * jaxalign.rbf_affinity(x, density=0.1))))
    slope = np.asarray(gradient(x))
    rtol = helpers.tolerance(dtype).gradient
    assert np.array_equal(np.ldexp(np.asarray(gradient(np.ldexp(x, 30))), 30), slope)  # degree -1
    # Neither scaling nor shifting changes A: the gradient has no component there.
    size = float(np.sum(np.abs(x * slope)))
    helpers.assert_close(np.sum(x.astype(np.float64) * slope), 0.0, rtol, scale=size)
    helpers.assert_close(np.sum(slope, 0, np.float64), np.zeros(WIDTH), rtol, scale=size)


@jax.jit
@jax.grad
def masked_gradient(x, density, weights):
    return jnp.sum(weights * jaxalign.rbf_affinity(x, density=density, mask=helpers.MASK, zero_diagonal=True))


@pytest.mark.parametrize("name", [name for name in helpers.FEATURES if name != "one_feature"])
def test_is_finite_for_degenerate_sets_and_zero_in_masked_rows(name, rng):
    x, options = helpers.problem("masked include", helpers.FEATURES[name](rng), np.float32)
    floor = helpers.share_of_coincident_pairs(x, options)
    weights = rng.normal(size=(ROWS, ROWS)).astype(np.float32)
    density = np.float32(floor + 0.5 * (1 - floor))
    dirty, _ = helpers.spoil_masked(x, options)
    slope, clean = (
        np.asarray(masked_gradient(dirty, density, weights)),
        np.asarray(masked_gradient(x, density, weights)),
    )
    assert np.all(np.isfinite(slope))
    assert np.all(slope[~helpers.MASK] == 0)
    helpers.assert_close(slope, clean, helpers.tolerance(np.float32).gradient)


def test_zero_diagonal_has_the_gradient_of_what_it_leaves(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(ROWS, ROWS)).astype(np.float32)

    def total(x, zero_diagonal, weights):
        return jnp.sum(weights * jaxalign.rbf_affinity(x, density=0.1, zero_diagonal=zero_diagonal))

    off = weights * (1 - np.eye(ROWS, dtype=np.float32))
    gradient = jax.jit(jax.grad(total), static_argnums=1)
    helpers.assert_close(gradient(x, True, weights), gradient(x, False, off), helpers.tolerance(np.float32).gradient)


def test_a_batch_vmap_and_jit_agree(rng):
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)

    def total(x):
        return jnp.sum(jaxalign.rbf_affinity(x, density=0.1) ** 2)

    batched, mapped = jax.jit(jax.grad(total))(x), jax.vmap(jax.grad(total))(x)
    helpers.assert_close(mapped, batched, helpers.tolerance(np.float32).gradient)
