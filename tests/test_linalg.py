"""Unit vectors and powers of two: lengths, scales at the ends of the range, zeros, nan, derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign import _linalg


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [-1, -2, (-2, -1)])
def test_unit_vectors_are_the_vectors_over_their_length(axis, rng):
    x = rng.normal(size=(3, 5, 4))
    length = np.sqrt((x * x).sum(axis, keepdims=True))
    # A sum of up to 20 squares, a root and a division.
    np.testing.assert_allclose(_linalg.unit(jnp.asarray(x), axis), x / length, rtol=20 * np.finfo(float).eps)


@pytest.mark.parametrize("power", [-120, -66, 66, 120])
def test_unit_vectors_do_not_depend_on_the_scale(power, rng):
    x = jnp.asarray(rng.normal(size=(6, 4)).astype(np.float32))
    np.testing.assert_array_equal(_linalg.unit(x * jnp.float32(2.0**power)), _linalg.unit(x))


def test_a_vector_of_zeros_is_what_is_said_and_nan_stays_nan():
    x = jnp.array([[0.0, 0.0], [jnp.nan, 1.0], [3.0, 4.0]])
    np.testing.assert_array_equal(_linalg.unit(x), np.float32([[0, 0], [np.nan, np.nan], [0.6, 0.8]]))
    np.testing.assert_array_equal(_linalg.unit(x[:1], fill=7.0), np.float32([[7, 7]]))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_unit_vectors(rng):
    x = jnp.asarray(rng.normal(size=(3, 4)))
    check_grads(jax.jit(lambda x: _linalg.unit(jnp.asarray(x))), (x,), order=2)
    # The direction of a vector does not depend on its length.
    along = jax.jvp(_linalg.unit, (x,), (x,))[1]
    np.testing.assert_allclose(along, 0, atol=4 * np.finfo(float).eps)
    np.testing.assert_array_equal(jax.jacobian(_linalg.unit)(jnp.zeros((2, 3))), 0)


@pytest.mark.parametrize("size", [2e-38, 1e-20, 0.3, 1.0, 1e20, 3e38])
def test_a_power_of_two_is_near_and_its_inverse_exact(size):
    power, inverse = _linalg.power_of_two(jnp.float32(size))
    assert 1 / 16 < size / power <= 8  # at the ends of the range the power stops before its inverse is subnormal
    assert power * inverse == 1
    assert np.frexp(power)[0] == 0.5


@pytest.mark.parametrize("size", [0.0, np.nan, np.inf])
def test_what_has_no_size_is_left_as_it_is(size):
    assert _linalg.power_of_two(jnp.float32(size)) == (1, 1)
