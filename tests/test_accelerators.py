"""What is done only on a GPU gives the same numbers: traced as if there were one, run on the CPU.

Shapes here occur in no other test, as a program that was traced for a CPU would be used again.
"""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxalign
from jaxalign import Plan, _linalg, plan
from jaxalign.core import reduce as reduce_module

N, WIDTH = 167, 7


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def features(kind: str, n: int = N) -> np.ndarray:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(n, WIDTH))
    if kind == "tight clusters":  # which fast distances cannot resolve
        x += 1e4 * rng.normal(size=(9, WIDTH))[rng.integers(9, size=n)]
    if kind == "duplicates":
        x[n // 2 :] = x[: n - n // 2]
    return x.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "tight clusters", "duplicates"])
@pytest.mark.parametrize("bandwidth", ["global", "per_row"])
@pytest.mark.parametrize("tile_size", [None, 61])
def test_sigma(kind, bandwidth, tile_size):
    x = features(kind)
    solution = jaxalign.solve_sigma(x, bandwidth=bandwidth, plan=Plan(tile_size))
    expected = reference.solve_sigma(x.astype(np.float64), bandwidth=bandwidth)
    # Sigma follows the density by its slope: up to ten times the relative error that the solver allows, 1e-6.
    assert helpers.relative_error(solution.sigma, expected) < 1e-5


def test_tiles_are_looked_at_where_distances_may_be_coarse_and_not_where_they_are_not(monkeypatch):
    seen = []
    visit = reduce_module.visit_tiles

    def counted(reduction, pairs, tile, **options):
        seen.append(pairs.fast_only)
        return visit(reduction, pairs, tile, **options)

    monkeypatch.setattr(reduce_module, "visit_tiles", counted)
    jaxalign.solve_sigma(features("normal", 171), plan=Plan(61))
    assert True in seen  # the quick visit
    assert False in seen  # the careful one


def test_rows_that_are_spread():
    x = features("tight clusters", 164)
    sigma = jaxalign.solve_sigma(x, plan=Plan(tile_size=23, mesh=jaxalign.sharding.data_mesh(4))).sigma
    assert helpers.relative_error(sigma, reference.solve_sigma(x.astype(np.float64))) < 1e-5


def test_masked_rows_do_not_count():
    x, mask = features("normal", 173), np.arange(173) % 4 > 0
    sigma = jaxalign.solve_sigma(x, mask=mask, plan=Plan(61)).sigma
    assert helpers.relative_error(sigma, reference.solve_sigma(x[mask].astype(np.float64))) < 1e-5


def test_derivatives_in_tiles():
    x = features("normal", 179)
    gradient = jax.grad(lambda x: jaxalign.solve_sigma(x, plan=Plan(61)).sigma)(x)
    helpers.assert_close(gradient, reference.sigma_gradient(x.astype(np.float64)), 1e-5)


@pytest.fixture
def halving(monkeypatch):
    """Products of few rows are halved already, twice."""
    monkeypatch.setattr(_linalg, "_HALVED_ROWS", (50, 10_000))
    monkeypatch.setattr(_linalg, "_HALVED_WIDTH", 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("halving")
@pytest.mark.parametrize("shape", [(101, 5), (2, 3, 64, 4)])
def test_halved_products_are_those_of_whole_rows(rng, shape):
    x = rng.normal(size=shape).astype(np.float32)
    ready = jnp.asarray(x)
    found = np.asarray(_linalg.products(ready, ready))
    expected = x.astype(np.float64) @ np.swapaxes(x.astype(np.float64), -1, -2)
    helpers.assert_close(found, expected, 1e-6)
    np.testing.assert_array_equal(found, np.swapaxes(found, -1, -2))  # one half is the other, turned


@pytest.mark.usefixtures("halving")
def test_halved_products_in_an_affinity_and_its_gradient(rng):
    x = features("normal", 181)
    x64 = x.astype(np.float64)
    helpers.assert_close(jaxalign.rbf_affinity(x), reference.rbf_affinity(x64), 1e-5)
    helpers.assert_close(jaxalign.rbf_affinity(x, sigma=2.0), reference.rbf_affinity(x64, sigma=2.0), 1e-5)
    weights = rng.normal(size=(181, 181))
    with jax.enable_x64():
        helpers.check_derivatives(lambda x: jnp.sum(weights * jaxalign.rbf_affinity(x)), jnp.asarray(x64), rng)


def test_more_is_stored_and_tiles_of_many_sets_are_larger():
    assert plan.choose_tile_size("auto", 8192, 8192, 1, 4, may_store=True, by_memory=False) is None
    assert plan.choose_tile_size("auto", 4096, 4096, 4, 4, may_store=True, by_memory=False) is None
    assert plan.choose_tile_size("auto", 8193, 8193, 1, 4, may_store=True, by_memory=False) == 4096
    size = plan.choose_tile_size("auto", 10_000, 10_000, 24, 4, may_store=True, by_memory=False)
    assert 24 * size**2 <= 2**26 < 24 * (size + 1) ** 2


def test_less_is_stored_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device: 2.0**30)
    arrays, share = plan._TILE_ARRAYS, plan._TILE_SHARE
    assert plan.choose_tile_size("auto", 2048, 2048, 1, 4, may_store=True) is None  # 16 MB
    size = plan.choose_tile_size("auto", 8192, 8192, 1, 4, may_store=True)
    assert size is not None
    assert size**2 * 4 * arrays <= share * 2**30
