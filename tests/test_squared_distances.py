"""squared_distances: D_ij = ||x_i - y_j||^2."""

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

ROWS, OTHER_ROWS, WIDTH = helpers.ROWS, helpers.OTHER_ROWS, helpers.WIDTH
seeds = st.integers(0, 2**32 - 1)


def spread(*sides):
    """The largest squared distance from the common mean: what the error of a distance is measured against."""
    rows = np.concatenate([np.asarray(side, np.float64) for side in sides])
    return float(np.max(np.sum((rows - rows.mean(0)) ** 2, -1)))


@pytest.mark.parametrize("name", helpers.FEATURES)
@pytest.mark.parametrize("rectangular", [False, True])
def test_equals_the_explicit_differences(name, rectangular, dtype, rng):
    features = helpers.FEATURES[name](rng).astype(dtype)
    x, y = features[:ROWS], features[ROWS:] if rectangular else None
    actual = jaxalign.squared_distances(x, y)
    assert actual.dtype == dtype
    expected = reference.squared_distances(x, y)
    sides = (x, y) if rectangular else (x,)
    helpers.assert_close(actual, expected, helpers.tolerance(dtype).value, scale=spread(*sides))


@given(seed=seeds, log_scale=st.floats(-15, 15), shift=st.floats(-100, 100))
def test_diagonal_is_zero_and_the_matrix_symmetric_and_not_negative(dtype, seed, log_scale, shift):
    rng = np.random.default_rng(seed)
    x = (10**log_scale * (rng.standard_t(2, (ROWS, WIDTH)) + shift)).astype(dtype)
    x[5] = x[6]
    distances = np.asarray(jaxalign.squared_distances(x))
    assert np.all(np.diag(distances) == 0)
    assert np.array_equal(distances, distances.T)
    assert np.all(distances >= 0)


@given(seed=seeds, shift=st.sampled_from([30.0, -30.0, 1e4]))
def test_an_offset_costs_no_digits(dtype, seed, shift):
    # |a|^2 + |b|^2 - 2ab of the features as they are would be off by eps shift^2: all digits in float32 at 1e4.
    x = (np.random.default_rng(seed).normal(size=(ROWS, WIDTH)) + shift).astype(dtype)
    helpers.assert_close(
        jaxalign.squared_distances(x), reference.squared_distances(x), helpers.tolerance(dtype).value, scale=spread(x)
    )


@given(seed=seeds, exponent=st.integers(-50, 50))
def test_a_power_of_two_scales_exactly(dtype, seed, exponent):
    x = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(dtype)
    scaled = np.asarray(jaxalign.squared_distances(np.ldexp(x, exponent)))
    assert np.array_equal(scaled, np.ldexp(np.asarray(jaxalign.squared_distances(x)), 2 * exponent))


@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e10, 1e18])
def test_any_unit_of_the_features_that_the_result_can_hold(scale, dtype, rng):
    x = (scale * rng.normal(size=(ROWS, WIDTH))).astype(dtype)
    expected = reference.squared_distances(x)
    assert np.all(np.isfinite(expected.astype(dtype)))
    helpers.assert_close(jaxalign.squared_distances(x), expected, helpers.tolerance(dtype).value, scale=spread(x))


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_half_precision_features_are_accumulated_in_float32(half, rng):
    x = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), half)
    distances = jaxalign.squared_distances(x)
    assert distances.dtype == jnp.float32
    rounded = np.asarray(x.astype(jnp.float32))
    helpers.assert_close(
        distances, reference.squared_distances(rounded), helpers.tolerance(np.float32).value, scale=spread(rounded)
    )


@pytest.mark.usefixtures("x64")
def test_two_dtypes_are_promoted(rng):
    x, y = rng.normal(size=(ROWS, WIDTH)).astype(np.float32), rng.normal(size=(OTHER_ROWS, WIDTH))
    distances = jaxalign.squared_distances(x, y)
    assert distances.dtype == np.float64
    helpers.assert_close(
        distances, reference.squared_distances(x, y), helpers.tolerance(np.float64).value, scale=spread(x, y)
    )


def test_a_batch_equals_a_loop(dtype, rng):
    x, y = (rng.normal(size=(2, 3, rows, WIDTH)).astype(dtype) for rows in (ROWS, OTHER_ROWS))
    rtol = helpers.tolerance(dtype).value
    batched, batched_pair = jaxalign.squared_distances(x), jaxalign.squared_distances(x, y)
    for i, j in np.ndindex(2, 3):
        helpers.assert_close(batched[i, j], jaxalign.squared_distances(x[i, j]), rtol)
        helpers.assert_close(batched_pair[i, j], jaxalign.squared_distances(x[i, j], y[i, j]), rtol)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_x", "batch_y"), [((3,), ()), ((), (3,)), ((2, 1), (3,)), ((2, 3), (1, 3))])
def test_batch_dimensions_broadcast(batch_x, batch_y, rng):
    x = rng.normal(size=(*batch_x, ROWS, WIDTH)).astype(np.float32)
    y = rng.normal(size=(*batch_y, OTHER_ROWS, WIDTH)).astype(np.float32)
    batch = np.broadcast_shapes(batch_x, batch_y)
    expected = np.stack(
        [
            reference.squared_distances(a, b)
            for a, b in zip(
                np.broadcast_to(x, (*batch, ROWS, WIDTH)).reshape(-1, ROWS, WIDTH),
                np.broadcast_to(y, (*batch, OTHER_ROWS, WIDTH)).reshape(-1, OTHER_ROWS, WIDTH),
                strict=True,
            )
        ]
    ).reshape(*batch, ROWS, OTHER_ROWS)
    helpers.assert_close(jaxalign.squared_distances(x, y), expected, helpers.tolerance(np.float32).value)


def test_one_row_and_one_feature_are_enough():
    assert jaxalign.squared_distances(np.zeros((1, 1), np.float32)).tolist() == [[0.0]]
    y = np.array([[3.0], [-2.0]], np.float32)
    # Not to the last bit: the centre, 2/3, is rounded, and so are the differences from it.
    np.testing.assert_allclose(jaxalign.squared_distances(np.ones((1, 1), np.float32), y), [[4.0, 9.0]], rtol=5e-7)


@pytest.mark.parametrize("precision", ["default", "high", "highest", jax.lax.Precision.DEFAULT])
def test_precision_is_accepted_and_on_a_cpu_changes_nothing_much(precision, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    # 2^-7: even bfloat16, where the default means that, keeps eight bits.
    helpers.assert_close(
        jaxalign.squared_distances(x, precision=precision), reference.squared_distances(x), 2**-7, scale=spread(x)
    )


# --- derivatives ----------------------------------------------------------------------------------------------------


def test_gradient_is_twice_the_difference(dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    weights = rng.normal(size=(ROWS, ROWS)).astype(dtype)
    gradient = jax.grad(lambda x: jnp.sum(weights * jaxalign.squared_distances(x)))(x)
    x, weights = x.astype(np.float64), weights.astype(np.float64)
    both = weights + weights.T
    expected = 2 * np.einsum("ij,ijd->id", both, x[:, None] - x[None])
    helpers.assert_close(gradient, expected, helpers.tolerance(dtype).gradient)


def test_gradient_of_two_sides_is_twice_the_difference(dtype, rng):
    x, y = (rng.normal(size=(rows, WIDTH)).astype(dtype) for rows in (ROWS, OTHER_ROWS))
    weights = rng.normal(size=(ROWS, OTHER_ROWS)).astype(dtype)
    to_x, to_y = jax.grad(lambda x, y: jnp.sum(weights * jaxalign.squared_distances(x, y)), (0, 1))(x, y)
    difference = x[:, None].astype(np.float64) - y[None]
    rtol = helpers.tolerance(dtype).gradient
    helpers.assert_close(to_x, 2 * np.einsum("ij,ijd->id", weights.astype(np.float64), difference), rtol)
    helpers.assert_close(to_y, -2 * np.einsum("ij,ijd->jd", weights.astype(np.float64), difference), rtol)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rectangular", [False, True])
def test_derivatives_equal_finite_differences(rectangular, rng):
    x, y = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(OTHER_ROWS, WIDTH))
    if rectangular:
        helpers.check_derivatives(lambda args: jnp.sum(jaxalign.squared_distances(*args) ** 2), (x, y), rng)
    else:
        helpers.check_derivatives(lambda x: jnp.sum(jaxalign.squared_distances(x) ** 2), x, rng)


@pytest.mark.usefixtures("x64")
def test_second_derivative_of_a_distance_is_constant(rng):
    x = rng.normal(size=(4, 2))
    hessian = jax.hessian(lambda x: jaxalign.squared_distances(x)[0, 1])(x)
    expected = np.zeros((4, 2, 4, 2))
    for k in range(2):
        expected[0, k, 0, k] = expected[1, k, 1, k] = 2
        expected[0, k, 1, k] = expected[1, k, 0, k] = -2
    helpers.assert_close(hessian, expected, 1e-14)


def test_gradient_is_zero_at_coincident_points(dtype, rng):
    x = np.repeat(rng.normal(size=(1, WIDTH)), ROWS, 0).astype(dtype) + 3
    jacobian = np.asarray(jax.jacrev(lambda x: jaxalign.squared_distances(x)[0])(x))
    assert np.all(np.abs(jacobian) <= 16 * np.finfo(dtype).eps * np.abs(x).max())
