"""Derivatives of solve_sigma, by the implicit function theorem: d sigma / d D_ij = sigma A_ij / (2 sum A D)."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxalign

ROWS, OTHER_ROWS, WIDTH, MASK, MASK_Y = (
    helpers.ROWS,
    helpers.OTHER_ROWS,
    helpers.WIDTH,
    helpers.MASK,
    helpers.MASK_Y,
)
SMALL = (6, 3)
seeds = st.integers(0, 2**32 - 1)


@jax.jit
def gradient(x, density):
    return jax.grad(lambda x: jaxalign.solve_sigma(x, density=density).sigma)(x)


def allowed(x, sigma, dtype):
    """The relative error of the gradient where features are much larger than sigma.

    In reverse mode x_i - x_j comes from sums over features that were centred once for all: an error of eps |x| in what
    is of size sigma. (The values take explicit differences there, and are as good as ever.)
    """
    x = np.asarray(x, np.float64)
    far = np.linalg.norm(x - x.mean(0), axis=-1).max() / sigma
    return helpers.tolerance(dtype).gradient + np.finfo(dtype).eps * far


# --- against the analytic gradient ----------------------------------------------------------------------------------


@settings(max_examples=10)
@given(seed=seeds, density=st.floats(0.06, 0.95), tail=st.sampled_from([1.0, 3.0, 30.0]))
def test_equals_the_analytic_gradient(dtype, seed, density, tail):
    x = np.random.default_rng(seed).standard_t(tail, (ROWS, WIDTH)).astype(dtype)
    helpers.assert_close(
        gradient(x, density), reference.sigma_gradient(x, density=density), helpers.tolerance(dtype).gradient
    )


def test_equals_the_analytic_gradient_without_the_diagonal(dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    actual = jax.grad(lambda x: jaxalign.solve_sigma(x, density=0.02, diagonal="exclude").sigma)(x)
    expected = reference.sigma_gradient(x, density=0.02, diagonal="exclude")
    helpers.assert_close(actual, expected, helpers.tolerance(dtype).gradient)


@pytest.mark.parametrize("separation", [1e2, 1e4, 1e6])
def test_is_right_where_clusters_need_explicit_differences(separation, dtype, rng):
    x, options = helpers.problem("include", helpers.clusters(rng, separation), dtype)
    floor, top = helpers.share_of_coincident_pairs(x, options), helpers.share_of_pairs_in_a_cluster(options)
    density = (floor + top) / 2
    sigma = float(jaxalign.solve_sigma(x, density=density).sigma)
    expected = reference.sigma_gradient(x, density=density)
    helpers.assert_close(gradient(x, density), expected, allowed(x, sigma, dtype))


@pytest.mark.usefixtures("x64")
def test_the_reference_gradient_is_that_of_finite_differences(rng):
    x = rng.normal(size=SMALL)
    actual = jax.grad(lambda x: jaxalign.solve_sigma(x, density=0.4).sigma)(x)
    expected = reference.sigma_gradient_finite_differences(x, density=0.4)
    helpers.assert_close(actual, expected, helpers.tolerance(np.float64).difference)


# --- against finite differences -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("setting", "bandwidth"),
    [
        ("include", "global"),
        ("masked exclude", "global"),
        ("masked rectangular", "global"),
        ("masked include", "per_row"),
        ("rectangular", "per_row"),
    ],
)
def test_first_and_second_derivatives_equal_finite_differences(setting, bandwidth, rng):
    x, options = helpers.problem(setting, helpers.gaussian(rng), np.float64)
    args = {"x": x, "density": np.asarray(0.2)} | ({"y": options.pop("y")} if "y" in options else {})
    weights = rng.uniform(1, 2, (ROWS,) if bandwidth == "per_row" else ())
    real = options.get("mask", np.ones(ROWS, bool)) if bandwidth == "per_row" else True

    def weighted(args):
        sigma = jaxalign.solve_sigma(**args, **options, bandwidth=bandwidth).sigma
        return jnp.sum(jnp.where(real, weights * sigma, 0))

    helpers.check_derivatives(weighted, args, rng)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_forward_and_reverse_jacobians_agree_and_the_hessian_is_symmetric(rng):
    x = rng.normal(size=SMALL)

    def rows(x):
        return jaxalign.solve_sigma(x, density=0.4, bandwidth="per_row").sigma

    helpers.assert_close(jax.jit(jax.jacfwd(rows))(x), jax.jit(jax.jacrev(rows))(x), 1e-12)

    def one(x):
        return jaxalign.solve_sigma(x, density=0.4).sigma

    hessian = np.asarray(jax.jit(jax.hessian(one))(x)).reshape(18, 18)
    helpers.assert_close(hessian, hessian.T, 1e-12)
    # sigma is homogeneous of degree 1, so its gradient is of degree 0: the Hessian takes x to 0.
    helpers.assert_close(hessian @ x.ravel(), np.zeros(18), 1e-11, scale=float(np.abs(hessian).max()))


@pytest.mark.usefixtures("x64")
def test_derivative_by_the_density_is_that_of_a_simplex():
    # sigma = d / sqrt(2 ln r), r = (1 - 1/n) / (c - 1/n), so d sigma / dc = sigma / (2 ln r (c - 1/n)).
    n, c = 6, 0.4
    x = reference.simplex(n, 2.0)
    sigma, slope = jax.value_and_grad(lambda c: jaxalign.solve_sigma(x, density=c).sigma)(c)
    expected = sigma / (2 * np.log((1 - 1 / n) / (c - 1 / n)) * (c - 1 / n))
    assert helpers.relative_error(slope, expected) < helpers.tolerance(np.float64).gradient


# --- identities -----------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(seed=seeds, density=st.floats(0.06, 0.9))
def test_sigma_is_homogeneous_and_does_not_feel_a_shift(dtype, seed, density):
    x = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(dtype)
    sigma = jaxalign.solve_sigma(x, density=density).sigma
    slope = np.asarray(gradient(x, density), np.float64)
    rtol = helpers.tolerance(dtype).gradient
    assert helpers.relative_error(np.sum(x * slope), sigma) < rtol  # Euler, for degree 1
    helpers.assert_close(np.sum(slope, 0), np.zeros(WIDTH), rtol, scale=float(np.abs(slope).sum()))


@pytest.mark.usefixtures("x64")
def test_the_density_at_the_solved_sigma_has_no_gradient(rng):
    dtype = np.float64
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)

    def density(x, sigma_of):
        return jaxalign.mean_density(x, sigma=sigma_of(jaxalign.solve_sigma(x, density=0.1).sigma))

    total = jax.jit(jax.grad(lambda x: density(x, lambda sigma: sigma)))(x)
    at_fixed_sigma = jax.jit(jax.grad(lambda x: density(x, jax.lax.stop_gradient)))(x)
    scale = float(np.abs(at_fixed_sigma).max())
    assert scale > 1e-4  # what has to cancel is not 0 to begin with
    helpers.assert_close(total, np.zeros(x.shape), helpers.tolerance(dtype).gradient, scale=scale)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradient_does_not_depend_on_the_unit(scale, dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH))
    expected = reference.sigma_gradient((scale * x).astype(dtype), density=0.1)
    helpers.assert_close(gradient((scale * x).astype(dtype), 0.1), expected, helpers.tolerance(dtype).gradient)


# --- masks, degenerate sets -----------------------------------------------------------------------------------------


def test_masked_rows_get_no_gradient_whatever_they_hold(rng):
    clean_x, clean = helpers.problem("masked rectangular", helpers.gaussian(rng), np.float32)
    x, dirty = helpers.spoil_masked(clean_x, clean)

    @jax.jit
    def slopes(x, y):
        def total(x, y):
            found = jaxalign.solve_sigma(x, y, density=0.2, mask=MASK, mask_y=MASK_Y)
            return found.sigma

        return jax.grad(total, (0, 1))(x, y)

    actual, expected = slopes(x, dirty["y"]), slopes(clean_x, clean["y"])
    for side, other, mask in zip(actual, expected, (MASK, MASK_Y), strict=True):
        assert np.all(np.asarray(side)[~mask] == 0)
        assert np.all(np.isfinite(side))
        assert np.any(np.asarray(side)[mask] != 0)
        helpers.assert_close(side, other, helpers.tolerance(np.float32).gradient)


@pytest.mark.parametrize("name", [name for name in helpers.FEATURES if name != "one_feature"])
def test_is_finite_and_right_for_degenerate_sets(name, dtype, rng):
    x, options = helpers.problem("include", helpers.FEATURES[name](rng), dtype)
    floor = helpers.share_of_coincident_pairs(x, options)
    density = floor + 0.5 * (1 - floor)
    actual, sigma = gradient(x, density), float(jaxalign.solve_sigma(x, density=density).sigma)
    assert np.all(np.isfinite(actual))
    expected = reference.sigma_gradient(x, density=density)
    helpers.assert_close(actual, expected, 2 * allowed(x, sigma, dtype))


@pytest.mark.usefixtures("x64")
def test_two_rows(rng):
    dtype = np.float64
    # sigma is the distance over a constant: its gradient is the unit vector between the rows over that constant.
    x = rng.normal(size=(2, WIDTH)).astype(dtype)
    actual = jax.grad(lambda x: jaxalign.solve_sigma(x, density=0.7).sigma)(x)
    unit = (x[0] - x[1]).astype(np.float64)
    unit /= np.linalg.norm(unit) * np.sqrt(-2 * np.log(0.4))
    helpers.assert_close(actual, np.stack([unit, -unit]), helpers.tolerance(dtype).gradient)


# --- transforms -----------------------------------------------------------------------------------------------------


def test_vmap_and_a_batch_equal_a_loop_and_an_infeasible_set_leaves_the_others_alone(rng):
    x = np.stack([f(rng)[:ROWS] for f in (helpers.gaussian, helpers.clusters, helpers.cauchy)]).astype(np.float32)
    x[1] = 1.0

    def total(x):
        return jnp.sum(jax.jit(lambda x: jaxalign.solve_sigma(x, density=0.1).sigma)(x))

    mapped, batched = np.asarray(jax.jit(jax.vmap(jax.grad(total)))(x)), np.asarray(jax.jit(jax.grad(total))(x))
    assert np.all(np.isnan(mapped[1]))
    assert np.all(np.isnan(batched[1]))
    for i in (0, 2):
        expected = reference.sigma_gradient(x[i], density=0.1)
        helpers.assert_close(mapped[i], expected, helpers.tolerance(np.float32).gradient)
        helpers.assert_close(batched[i], expected, helpers.tolerance(np.float32).gradient)
