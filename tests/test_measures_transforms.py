"""Measures under masks, tiles, devices, batches, jit and derivatives, and of sets that have next to nothing in them."""

from __future__ import annotations

import inspect

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign import Plan, measures, sharding
from jaxalign.kernels import RBF
from jaxalign.measures import REGISTRY

N, WIDTH = 24, 5
OPTIONS = {name: {"kernel": RBF(density=0.3)} if "kernel" in entry.options else {} for name, entry in REGISTRY.items()}
for few in ("mutual_knn", "jaccard", "cknna"):
    OPTIONS[few] = {"k": 3}
OPTIONS["linear_predictivity"] = {"folds": 2}

every_measure = pytest.mark.parametrize("name", REGISTRY)
TILED = [name for name, entry in REGISTRY.items() if "plan" in inspect.signature(entry.function).parameters]


def sets(n=N, width=WIDTH):
    x, y = np.random.default_rng(n + width).normal(size=(2, n, width))
    return x, x[:, ::-1] + 0.5 * y


def measure(name, **more):
    return lambda x, y: getattr(measures, name)(x, y, **{**OPTIONS[name], **more})


@pytest.mark.slow
@every_measure
def test_batches_vmap_and_jit_give_the_same(x64, name):
    x, y = sets()
    xs, ys = np.stack([x, 2 * y]), np.stack([y, y + x**2])
    one_by_one = np.stack([measure(name)(a, b) for a, b in zip(xs, ys, strict=True)])
    helpers.assert_close(measure(name)(xs, ys), one_by_one, 1e-11)
    helpers.assert_close(jax.jit(jax.vmap(measure(name)))(xs, ys), one_by_one, 1e-11)


@pytest.mark.slow
@every_measure
def test_masked_samples_do_not_count(x64, name):
    x, y = sets()
    mask = np.arange(N) % 5 != 2
    if name == "linear_predictivity":  # its folds go by the number of the sample: leave out the last ones
        mask = np.arange(N) < 19
    dirty = np.where(mask[:, None], x, np.inf)
    helpers.assert_close(measure(name, mask=mask)(dirty, y), measure(name)(x[mask], y[mask]), 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cka", "rsa", "mutual_knn", "affinity_distance"])  # one of each kind
def test_tiles_and_devices_give_the_same(x64, name):
    x, y = sets(23)  # divides neither among the tiles nor among the devices
    expected = measure(name)(x, y)
    helpers.assert_close(measure(name, plan=Plan(7))(x, y), expected, 1e-12)
    helpers.assert_close(measure(name, plan=Plan(tile_size=2, mesh=sharding.data_mesh(8)))(x, y), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cka", "rsa"])
def test_gradients_of_tiles_and_devices_are_the_same(x64, name):
    x, y = sets(23)
    expected = jax.jit(jax.grad(measure(name)))(x, y)
    how = {"plan": Plan(7)} if name == "cka" else {"plan": Plan(tile_size=4, mesh=sharding.data_mesh(4))}
    helpers.assert_close(jax.jit(jax.grad(measure(name, **how)))(x, y), expected, 1e-10)


def test_cka_inside_shard_map(x64):
    x, y = sets()
    local = jax.shard_map(
        measure("cka", plan=Plan(axis_name="data"), kernel="linear"),
        mesh=sharding.data_mesh(4),
        in_specs=(P("data", None), P("data", None)),
        out_specs=P(),
    )
    helpers.assert_close(local(x, y), measure("cka", kernel="linear")(x, y), 1e-12)


# The strength of linear_predictivity's penalty jumps, so it is tested at one strength.
SMOOTH = [name for name, entry in REGISTRY.items() if entry.differentiable == "yes" and name != "linear_predictivity"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_to_second_order(x64, name):
    helpers.check_derivatives(lambda both: measure(name)(*both), sets(), np.random.default_rng(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n, entry in REGISTRY.items() if entry.differentiable != "no" and n not in SMOOTH]
)
def test_first_derivatives(x64, name):
    (x, y), rng = sets(), np.random.default_rng(1)
    options = {"strengths": (0.1,)} if name == "linear_predictivity" else {}
    u, step = rng.normal(size=x.shape), 1e-6
    slope = (measure(name, **options)(x + step * u, y) - measure(name, **options)(x - step * u, y)) / (2 * step)
    gradient = jax.jit(jax.grad(measure(name, **options)))(x, y)
    helpers.assert_close(np.sum(gradient * u), slope, 1e-6, scale=float(np.linalg.norm(gradient) * np.linalg.norm(u)))


def twice(a):
    return np.repeat(a[: N // 2], 2, 0)


CASES = {
    "four samples of more features": lambda: sets(4, 6),
    "one feature, and every sample twice": lambda: tuple(twice(a) for a in sets(N, 1)),
    "a constant feature": lambda: tuple(np.concatenate([twice(a), np.full((N, 1), 3.3)], 1) for a in sets()),
}


@pytest.mark.slow
@every_measure
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_finite(name, case):
    x, y = (a.astype(np.float32) for a in CASES[case]())
    value, gradient = jax.jit(jax.value_and_grad(measure(name)))(x, y)
    assert np.isfinite(value)
    if name != "pwcca" or case != "four samples of more features":  # correlations all 1: no variates of their own
        assert np.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cka", {"kernel": "linear"}, 0.0),
        ("cka", {"kernel": "linear", "estimator": "biased"}, 0.0),
        ("hsic", {"kernel": "linear"}, 0.0),
        ("rsa", {}, 0.0),
        ("rsa", {"comparison": "spearman"}, 0.0),
        ("distance_correlation", {}, 0.0),
        ("procrustes", {}, 2**0.5),
        ("cca", {}, 0.0),
        ("svcca", {}, 0.0),
        ("pwcca", {}, 0.0),
        ("linear_predictivity", {}, 0.0),
    ],
)
def test_a_set_that_does_not_vary_is_like_nothing(name, options, expected):
    x = sets()[0].astype(np.float32)
    constant = np.full_like(x, 3.3)
    both = jax.jit(jax.value_and_grad(lambda a, b: getattr(measures, name)(a, b, **options), (0, 1)))
    for a, b in ((x, constant), (constant, x)):
        value, slopes = both(a, b)
        assert abs(float(value) - expected) < 1e-6
        if name != "pwcca":  # all correlations are 0, and equal ones have no variates
            assert all(np.isfinite(slope).all() for slope in slopes)


def test_minibatch_cka_with_a_set_that_does_not_vary_is_0():
    x = sets()[0].astype(np.float32)
    constant = np.full_like(x, 3.3)
    for a, b in ((x, constant), (constant, x)):
        value, slopes = jax.value_and_grad(lambda a, b: measures.minibatch_cka([(a, b)]), (0, 1))(a, b)
        assert value == 0
        assert all(np.isfinite(slope).all() for slope in slopes)


@pytest.mark.slow
@every_measure
def test_bfloat16_is_taken(name):
    x, y = (jnp.asarray(a, jnp.bfloat16) for a in sets())
    value = measure(name)(x, y)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)


@pytest.mark.slow
@every_measure
def test_missing_samples(x64, name):
    x, y = sets()
    x[3, 1], y[20, 0] = np.nan, np.inf
    kept = np.ones(N, bool)
    kept[[3, 20]] = False
    with pytest.raises(ValueError, match=r"x has nan or inf in 1 row.*row 3.*missing=\"omit\""):
        measure(name)(x, y)
    assert np.isnan(measure(name, missing="propagate")(x, y))
    assert np.isnan(jax.jit(measure(name))(x, y))  # under a trace nothing can be raised
    helpers.assert_close(measure(name, missing="omit")(x, y), measure(name, mask=kept)(x, y), 1e-12)
