"""Sums over pairs of any function are those of numpy on all pairs, whatever the visit, and so are their derivatives."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxalign
from jaxalign import Plan

N, M, WIDTH = 41, 29, 5


def cauchy(distances):
    return 1 / (1 + distances)


def both(distances):
    return {"cauchy": cauchy(distances), "root": jnp.sqrt(distances)}


@pytest.fixture
def problem(rng):
    x, y = rng.normal(size=(N, WIDTH)), rng.normal(size=(M, WIDTH)) + 0.5
    x[7] = x[3]  # duplicates, where a square root has no derivative
    return x, y


@pytest.mark.parametrize("tile_size", [None, 8])
@pytest.mark.usefixtures("x64")
def test_totals_rows_and_products_are_those_of_all_pairs(tile_size, problem, rng):
    x, y = problem
    values = rng.normal(size=(M, 3))
    kernel = cauchy(reference.squared_distances(x, y))
    helpers.assert_close(jaxalign.reduce_pairs(cauchy, x, y, plan=Plan(tile_size)), kernel.sum(), 1e-12)
    helpers.assert_close(jaxalign.reduce_pairs(cauchy, x, y, per_row=True, plan=Plan(tile_size)), kernel.sum(1), 1e-12)
    product = jaxalign.reduce_pairs(cauchy, x, y, values=values, plan=Plan(tile_size))
    helpers.assert_close(product, kernel @ values, 1e-12)
    vector = jaxalign.reduce_pairs(cauchy, x, y, values=values[:, 0], plan=Plan(tile_size))
    helpers.assert_close(vector, kernel @ values[:, 0], 1e-12)
    own = jaxalign.reduce_pairs(both, x, self_pairs=False, plan=Plan(tile_size))
    distances = reference.squared_distances(x)
    helpers.assert_close(own["cauchy"], cauchy(distances).sum() - N, 1e-12)
    helpers.assert_close(own["root"], np.sqrt(distances).sum(), 1e-12)


@pytest.mark.parametrize("tile_size", [None, 8])
@pytest.mark.usefixtures("x64")
def test_masked_samples_do_not_count_whatever_they_hold(tile_size, problem, rng):
    x, y = problem
    mask, mask_y = rng.random(N) < 0.7, rng.random(M) < 0.7
    values = rng.normal(size=M)
    kernel = cauchy(reference.squared_distances(x, y)) * np.outer(mask, mask_y)
    expected = kernel @ values
    x[~mask], y[~mask_y], values[~mask_y] = np.nan, np.inf, np.nan
    options = {"mask": mask, "mask_y": mask_y, "plan": Plan(tile_size)}
    helpers.assert_close(jaxalign.reduce_pairs(cauchy, x, y, values=values, **options), expected, 1e-12)
    helpers.assert_close(jaxalign.reduce_pairs(cauchy, x, y, per_row=True, **options), kernel.sum(1), 1e-12)
    # A function that is infinite at distance 0, which padded pairs have.
    inverse = jaxalign.reduce_pairs(lambda d: 1 / d, x, mask=mask & (np.arange(N) != 7), self_pairs=False, plan=Plan(8))
    assert np.isfinite(inverse)


@pytest.mark.slow
@pytest.mark.parametrize("tile_size", [None, 8])
@pytest.mark.usefixtures("x64")
def test_derivatives_are_those_of_finite_differences(tile_size, problem, rng):
    x, y = problem
    values, temperature = rng.normal(size=M), np.asarray(0.7)

    def total(args):
        product = jaxalign.reduce_pairs(
            lambda d: jnp.exp(-d / args["temperature"]), args["x"], y, values=args["values"], plan=Plan(tile_size)
        )
        return jnp.sum(product**2)

    args = {"x": x, "values": values, "temperature": temperature}
    gradient, u = jax.grad(total)(args), helpers.direction(rng, args)

    def along(t):
        return total(jax.tree.map(lambda a, b: a + t * b, args, u))

    step = 1e-5  # central differences err by step^2, and by rounding 1e-16 / step
    difference = (along(step) - along(-step)) / (2 * step)
    assert abs(float(difference) - helpers.inner(gradient, u)) < 1e-8 * abs(float(difference))
    # Duplicates: the distance between them is at its minimum.
    slopes = jax.grad(lambda x: jaxalign.reduce_pairs(jnp.sqrt, x, plan=Plan(tile_size)))(x)
    apart = np.sqrt(reference.squared_distances(x))
    weights = np.where(apart > 0, 1 / np.where(apart > 0, apart, 1), 0)
    helpers.assert_close(slopes, 2 * (weights.sum(1)[:, None] * x - weights @ x), 1e-10)


@pytest.mark.usefixtures("x64")
def test_batches_devices_and_jit_give_the_same(problem, rng):
    x = rng.normal(size=(2, 40, WIDTH))
    values = rng.normal(size=(40, 2))
    expected = np.stack([cauchy(reference.squared_distances(part)) @ values for part in x])
    helpers.assert_close(jaxalign.reduce_pairs(cauchy, x, values=values), expected, 1e-12)
    mesh = jaxalign.sharding.data_mesh(4)
    helpers.assert_close(
        jaxalign.reduce_pairs(cauchy, x, values=values, plan=Plan(tile_size=4, mesh=mesh)), expected, 1e-12
    )
    helpers.assert_close(
        jax.jit(jax.vmap(lambda x: jaxalign.reduce_pairs(cauchy, x, values=values)))(x), expected, 1e-12
    )


def test_close_pairs_keep_their_digits_far_from_the_others(rng):
    # Two tight clusters: within them the fast formula of float32 knows nothing.
    x = (1e-3 * rng.normal(size=(64, WIDTH)) + 100 * (np.arange(64) % 2)[:, None]).astype(np.float32)
    expected = np.exp(-1e5 * reference.squared_distances(x)).sum(1)
    for tile_size in (None, 16):
        found = jaxalign.reduce_pairs(lambda d: jnp.exp(-1e5 * d), x, per_row=True, plan=Plan(tile_size))
        np.testing.assert_allclose(found, expected, rtol=1e-4)  # x is rounded by 4e-6 of 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fn": "rbf"}, "fn must be a function"),
        ({"fn": np.sqrt}, "use the function 'sqrt' of jax.numpy"),
        ({"fn": lambda d: jnp.sum(d)}, "elementwise"),
        ({"y": np.ones((3, WIDTH), np.float32), "self_pairs": False}, "self_pairs=False has no meaning"),
        ({"values": np.ones(N), "per_row": True}, "per_row=True has no effect"),
        ({"values": np.ones(N + 1)}, r"expected \(..., 41\) or \(..., 41, k\) for 41 columns"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_makes_no_sense_is_refused(options, message, rng):
    x = rng.normal(size=(N, WIDTH)).astype(np.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        jaxalign.reduce_pairs(options.pop("fn", cauchy), x, options.pop("y", None), **options)
