"""Every function under vmap, jit, scan, checkpoint, eval_shape; and compiled once for each shape."""

from __future__ import annotations

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign

ROWS, OTHER_ROWS, WIDTH = helpers.ROWS, helpers.OTHER_ROWS, helpers.WIDTH
RTOL = helpers.tolerance(np.float32).density

# Everything as a function of (x, y) and of one number.
PAIR = {
    "squared_distances": lambda x, y, s: jaxalign.squared_distances(x, y) * s,
    "mean_density": lambda x, y, s: jaxalign.mean_density(x, y, sigma=s),
    "solve_sigma": lambda x, y, s: jaxalign.solve_sigma(x, y, density=0.1 * s).sigma,
    "rbf_affinity": lambda x, y, s: jaxalign.rbf_affinity(x, y, density=0.1 * s),
    "rbf_affinity at sigma": lambda x, y, s: jaxalign.rbf_affinity(x, y, sigma=s),
}
SHAPES = {
    "squared_distances": (ROWS, OTHER_ROWS),
    "mean_density": (),
    "solve_sigma": (),
    "rbf_affinity": (ROWS, OTHER_ROWS),
    "rbf_affinity at sigma": (ROWS, OTHER_ROWS),
}
NUMBERS = np.array([0.5, 1.0, 1.5], np.float32)


@pytest.fixture
def batch(rng):
    return tuple(rng.normal(size=(3, rows, WIDTH)).astype(np.float32) for rows in (ROWS, OTHER_ROWS))


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("in_axes", [(0, 0, 0), (None, 1, 0)])
def test_vmap_equals_a_loop(name, in_axes, batch):
    x, y = batch
    args = [x, y, NUMBERS]
    for k, axis in enumerate(in_axes):
        if axis is None:
            args[k] = args[k][0]
        elif axis == 1:
            args[k] = np.moveaxis(args[k], 0, 1)
    mapped = jax.vmap(PAIR[name], in_axes)(*args)
    for i in range(3):
        one = [a if axis is None else np.take(a, i, axis) for a, axis in zip(args, in_axes, strict=True)]
        helpers.assert_close(mapped[i], PAIR[name](*one), RTOL)


@pytest.mark.parametrize("name", PAIR)
def test_jit_scan_and_checkpoint_change_nothing(name, batch):
    function, (x, y) = PAIR[name], batch
    expected = [function(x[i], y[i], NUMBERS[i]) for i in range(3)]
    _, scanned = jax.lax.scan(lambda carry, args: (carry, function(*args)), 0, (x, y, NUMBERS))
    for i in range(3):
        helpers.assert_close(scanned[i], expected[i], RTOL)
    value = jax.jit(jax.checkpoint(function))(x[0], y[0], NUMBERS[0])
    helpers.assert_close(value, expected[0], RTOL)


@pytest.mark.parametrize("name", ["solve_sigma", "rbf_affinity"])
def test_gradient_through_checkpoint_scan_and_value_and_grad(name, batch):
    function, (x, y) = PAIR[name], batch

    def total(x, scan):
        if not scan:
            return sum(jnp.sum(function(x, y[i], NUMBERS[i]) ** 2) for i in range(3))
        step = jax.checkpoint(lambda sum_, args: (sum_ + jnp.sum(function(x, *args) ** 2), None))
        return jax.lax.scan(step, jnp.zeros((), jnp.float32), (y, NUMBERS))[0]

    plain, scanned = (jax.jit(jax.value_and_grad(total), static_argnums=1)(x[0], scan) for scan in (False, True))
    helpers.assert_close(scanned[0], plain[0], RTOL)
    helpers.assert_close(scanned[1], plain[1], helpers.tolerance(np.float32).gradient)


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("batch_shape", [(), (2, 3)])
def test_shapes_and_dtypes_are_known_without_computing(name, batch_shape):
    x, y = (jax.ShapeDtypeStruct((*batch_shape, rows, WIDTH), jnp.float32) for rows in (ROWS, OTHER_ROWS))
    out = jax.eval_shape(PAIR[name], x, y, 1.0)
    assert (out.shape, out.dtype) == ((*batch_shape, *SHAPES[name]), jnp.float32)


@pytest.mark.usefixtures("unchecked_types")  # eval_shape fills the pytree with shapes, which are no arrays
@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_the_solution_is_a_pytree(bandwidth, rng):
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    shapes = jax.eval_shape(lambda x: jaxalign.solve_sigma(x, density=0.1, bandwidth=bandwidth), x)
    rows = (2, ROWS) if bandwidth == "per_row" else (2,)
    assert (shapes.sigma.shape, shapes.density.shape, shapes.status.shape) == (rows, rows, rows)
    assert shapes.passes.shape == (2,)
    assert (shapes.status.dtype, shapes.passes.dtype) == (jnp.int32, jnp.int32)
    solution = jaxalign.solve_sigma(x, density=0.1, bandwidth=bandwidth)
    first = jax.tree.map(lambda leaf: leaf[0], solution)
    assert isinstance(first, jaxalign.SigmaSolution)
    assert np.array_equal(first.sigma, solution.sigma[0])


@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_vmap_over_a_mask(bandwidth, rng):
    x = rng.normal(size=(3, ROWS, WIDTH)).astype(np.float32)
    mask = np.arange(ROWS) < np.array([24, 15, 4])[:, None]

    def affinity(x, mask):
        return jaxalign.rbf_affinity(x, mask=mask, density=0.5, bandwidth=bandwidth)

    mapped = jax.vmap(affinity)(x, mask)
    for i in range(3):
        helpers.assert_close(mapped[i], affinity(x[i], mask[i]), RTOL)


# --- compiled once --------------------------------------------------------------------------------------------------

compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
)


@pytest.mark.parametrize("name", PAIR)
def test_new_values_of_the_same_shape_compile_nothing(name, rng):
    # Eager calls: a shape nobody else uses, so that the first call does compile and the listener is seen to work.
    def call(number):
        x, y = rng.normal(size=(13, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
        jax.block_until_ready(PAIR[name](x, y, np.float32(number)))

    before = len(compilations)
    call(0.5)
    first = len(compilations)
    assert first > before
    call(1.5)
    assert len(compilations) == first


def test_a_new_density_does_not_compile_again(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    jaxalign.solve_sigma(x, density=0.1), jaxalign.rbf_affinity(x, density=0.1)
    before = len(compilations)
    for density in (0.2, 0.3, 0.9):
        jaxalign.solve_sigma(x, density=density)
        jaxalign.rbf_affinity(x, density=density)
    assert len(compilations) == before


def test_jit_traces_once(rng):
    chex.clear_trace_counter()
    function = jax.jit(chex.assert_max_traces(PAIR["rbf_affinity"], n=1))
    for seed in range(3):
        rows = np.random.default_rng(seed).normal(size=(ROWS + OTHER_ROWS, WIDTH)).astype(np.float32)
        function(rows[:ROWS], rows[ROWS:], np.float32(1 + 0.1 * seed))
