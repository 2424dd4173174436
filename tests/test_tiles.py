"""Pairs visited tile by tile give what all pairs at once give, to rounding, and are never stored.

A tile size is chosen for each setting so that odd and even numbers of tiles, tiles that divide the rows and tiles that
do not, one row a tile and one tile for all appear somewhere; a full table of them would compile for minutes.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import jaxalign
from jaxalign import Plan
from jaxalign.core import reduce as reduce_module
from jaxalign.core.features import center_features
from jaxalign.core.reduce import reduce_pairs
from jaxalign.core.ring import half_ring_of_blocks, pairwise_sum, split_rows
from jaxalign.core.tiles import Pairs, Reduction, kernel, kernel_terms, over_all, over_rows

ROWS, OTHER_ROWS, WIDTH = helpers.ROWS, helpers.OTHER_ROWS, helpers.WIDTH
ODD = ROWS - 1
F32, F64 = "float32", "float64"
# float32: 8 units in the last place of a sum that is taken in another order; float64: its solver stops within 1e-13.
SAME = {F32: 1e-6, F64: 1e-12}


class Case(NamedTuple):
    setting: str
    bandwidth: str
    rows: int
    tile_size: int
    dtype: str
    batch: int | None = None

    def __str__(self):
        sets = "" if self.batch is None else f"{self.batch} sets, "
        return f"{self.setting}, {self.bandwidth}, {sets}{self.rows} rows, tiles of {self.tile_size}, {self.dtype}"


def cases(*rows):
    return pytest.mark.parametrize("case", [Case(*row) for row in rows], ids=str)


def cut(options, rows):
    """The options of a setting for its first rows alone."""
    return options | {"mask": options["mask"][:rows]} if "mask" in options else options


def problem_of(case, rng, features=helpers.gaussian):
    """x and options; in a batch no two sets, and no two masks, are the same."""
    if case.batch is None:
        x, options = helpers.problem(case.setting, features(rng), case.dtype)
        return x[: case.rows], cut(options, case.rows)
    sets = [problem_of(case._replace(batch=None), rng, features) for _ in range(case.batch)]
    _, options = sets[0]
    options = dict(options)
    if "y" in options:
        options["y"] = np.stack([each["y"] for _, each in sets])
    if "mask" in options:
        options["mask"] = np.stack([np.roll(options["mask"], k) for k in range(case.batch)])
    return np.stack([x for x, _ in sets]), options


def x64_for(dtype):
    return jax.enable_x64(dtype == F64)


# --- the same numbers -----------------------------------------------------------------------------------------------


@cases(
    ("include", "global", ODD, 1, F32),  # 23 tiles
    ("include", "global", ROWS, 8, F32),  # 3 that divide the rows
    ("masked include", "global", ROWS, 12, F64),  # 2 would be even: 3 of 8 rows
    ("exclude", "global", ODD, 4, F64),  # 7 tiles of 4, the last one empty but for padding
    ("masked exclude", "global", ROWS, 5, F32),
    ("masked rectangular", "global", ODD, 4, F32),
    ("include", "per_row", ROWS, 8, F32),
    ("masked exclude", "per_row", ODD, 4, F64),
    ("masked rectangular", "per_row", ROWS, 7, F64),
    ("masked include", "global", ODD, 4, F64, 3),
)
def test_sigma_of_tiles_is_that_of_all_pairs_at_once(case, rng):
    with x64_for(case.dtype):
        x, options = problem_of(case, rng)

        def solve(tile_size):
            return jaxalign.solve_sigma(x, **options, density=0.2, bandwidth=case.bandwidth, plan=Plan(tile_size))

        dense, tiled = solve(None), solve(case.tile_size)
        assert tiled.sigma.dtype == tiled.density.dtype == case.dtype
        assert helpers.relative_error(tiled.sigma, dense.sigma) < SAME[case.dtype]
        assert helpers.relative_error(tiled.density, dense.density) < SAME[case.dtype]
        np.testing.assert_array_equal(tiled.status, dense.status)
        np.testing.assert_array_equal(tiled.status, 0)


@pytest.mark.slow
@cases(
    ("include", "global", ODD, 1, F32),
    ("masked exclude", "global", ODD, 100, F64),
    ("masked rectangular", "global", ROWS, 6, F64),  # 4 x 2 tiles: even numbers where no ring is closed
    ("masked exclude", "per_row", ROWS, 7, F64),
    ("rectangular", "per_row", ODD, 4, F64, 2),
    ("rectangular", "global", ROWS, 8, F64),  # tiles of 8 rows, and of 5 columns with one of padding
)
def test_density_of_tiles_is_that_of_all_pairs_at_once(case, rng):
    with x64_for(case.dtype):
        x, options = problem_of(case, rng)
        shape = x.shape[:-1] if case.bandwidth == "per_row" else x.shape[:-2]
        sigma = rng.uniform(0.5, 3, shape).astype(case.dtype)
        if case.bandwidth == "per_row" and "mask" in options:
            sigma[..., ~options["mask"]] = np.nan  # of rows that are not there
        dense, tiled = (
            jaxalign.mean_density(x, **options, sigma=sigma, bandwidth=case.bandwidth, plan=Plan(tile_size))
            for tile_size in (None, case.tile_size)
        )
        assert tiled.dtype == case.dtype
        assert helpers.relative_error(tiled, dense) < SAME[case.dtype]


@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
@pytest.mark.parametrize("name", ["coincident samples", "nan"])
def test_tiles_fail_for_the_reason_that_all_pairs_at_once_fail_for(name, bandwidth, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    if name == "nan":
        x[7, 2] = np.nan
    else:
        x[3:15] = x[3]
    reasons = []
    for tile_size in (None, 8):
        with pytest.raises(ValueError, match=r"duplicates|nan or inf") as error:
            jaxalign.solve_sigma(x, density=0.2, bandwidth=bandwidth, plan=Plan(tile_size))
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
@pytest.mark.parametrize("separation", [1e2, 1e4, 1e6])
def test_tiles_resolve_tight_clusters_far_apart(separation, bandwidth, rng):
    # Between clusters |a|^2 + |b|^2 - 2 a.b is rounding alone: the tiles within them need explicit differences.
    x = helpers.clusters(rng, separation)[:ROWS].astype(np.float32)
    top = helpers.share_of_pairs_in_a_cluster({}, bandwidth)
    for level in (0.3, 0.9):
        density = 1 / ROWS + level * (top - 1 / ROWS)
        found = jaxalign.solve_sigma(x, density=density, bandwidth=bandwidth, plan=Plan(8))
        reached = helpers.density_reached(x, {}, found.sigma, bandwidth)
        assert helpers.relative_error(reached, np.full(np.shape(reached), np.float32(density))) < 1e-5
        expected = reference.solve_sigma(x, density=float(np.float32(density)), bandwidth=bandwidth)
        assert helpers.relative_error(found.sigma, expected) < helpers.tolerance(np.float32).sigma


@pytest.mark.parametrize("narrow", [2.0, 1e-3, 1e-6])
@pytest.mark.parametrize("tile_size", [2, None])
def test_a_row_of_small_sigma_far_away_does_not_blur_the_distances_of_others(narrow, tile_size):
    # The first row alone could do with the fast formula. Whether the others, close to each other and far from the
    # centre, can does not depend on it.
    x = np.array([[-1000.1, 3.3], [1000.1, -7.7], [1001.37, -6.3], [1003.7, -9.1]], np.float32)
    sigma = np.array([narrow, 2, 2, 2], np.float32)
    density = jaxalign.mean_density(x, sigma=sigma, bandwidth="per_row", plan=Plan(tile_size))
    assert helpers.relative_error(density, reference.mean_density(x, sigma=sigma)) < 1e-5


# --- the same derivatives -------------------------------------------------------------------------------------------


def scalar_of_sigma(setting, bandwidth):
    """A scalar function of features (and the density, or sigma) with a tile size, and its arguments."""

    def make(rng):
        x, options = helpers.problem(setting, helpers.gaussian(rng), np.float64)
        x, options = x[:ODD], cut(options, ODD)
        weights = rng.normal(size=ODD if bandwidth == "per_row" else ())
        args = {"x": x, "density": np.asarray(0.2)} | ({"y": options.pop("y")} if "y" in options else {})

        def fn(args, tile_size):
            found = jaxalign.solve_sigma(**args, **options, bandwidth=bandwidth, plan=Plan(tile_size))
            return jnp.sum(weights * found.sigma)

        return fn, args

    return make


# Name: the function, and whether reverse mode is taken of forward mode as well (that compiles for seconds).
DIFFERENTIATED = {
    "sigma of rows with themselves": (scalar_of_sigma("masked exclude", "global"), True),
    "sigma of rows with others": (scalar_of_sigma("masked rectangular", "global"), True),
    "sigma by row": (scalar_of_sigma("include", "per_row"), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIATED)
@pytest.mark.usefixtures("x64")
def test_first_and_second_derivatives_of_tiles_are_those_of_all_pairs_at_once(name, rng):
    make, both_ways = DIFFERENTIATED[name]
    fn, args = make(rng)
    u = helpers.direction(rng, args)

    def forward_over_reverse(tile_size):
        return jax.jit(lambda a, u: jax.jvp(jax.grad(lambda a: fn(a, tile_size)), (a,), (u,)))(args, u)

    def reverse_over_forward(tile_size):
        return jax.jit(jax.value_and_grad(lambda a, u: jax.jvp(lambda a: fn(a, tile_size), (a,), (u,))[1]))(args, u)

    gradient, products = forward_over_reverse(None)
    tiled_gradient, tiled_products = forward_over_reverse(4)
    for key in args:
        helpers.assert_close(tiled_gradient[key], gradient[key], 1e-11)
        helpers.assert_close(tiled_products[key], products[key], 1e-11)
    if both_ways:
        slope, tiled_products = reverse_over_forward(4)
        for key in args:
            helpers.assert_close(tiled_products[key], products[key], 1e-11)
        size = math.sqrt(helpers.inner(gradient, gradient) * helpers.inner(u, u))
        assert abs(float(slope) - helpers.inner(gradient, u)) < 1e-11 * size


# --- memory ---------------------------------------------------------------------------------------------------------

MANY, TILE, FEW_FEATURES = 2048, 128, 4


def elements(compiled):
    """The number of elements of every array in a compiled program."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]", compiled.as_text())
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def sigma_in_tiles(x):
    return jaxalign.solve_sigma(x, density=0.1, plan=Plan(TILE)).sigma


@pytest.mark.slow
def test_no_array_of_a_tiled_program_and_its_gradient_has_n_squared_elements():
    x = jax.ShapeDtypeStruct((MANY, FEW_FEATURES), np.float32)
    compiled = jax.jit(jax.value_and_grad(sigma_in_tiles)).lower(x).compile()
    largest = max(elements(compiled))
    assert MANY * FEW_FEATURES <= largest < MANY**2 / 4  # the text was read; a subsample of 512 x 512 pairs is fine
    assert compiled.memory_analysis().temp_size_in_bytes < MANY**2 * 4 / 2


def test_the_program_of_all_pairs_at_once_has_such_an_array():
    x = jax.ShapeDtypeStruct((MANY, FEW_FEATURES), np.float32)
    compiled = jax.jit(lambda x: jaxalign.mean_density(x, sigma=1.0, plan=Plan(None))).lower(x).compile()
    assert max(elements(compiled)) >= MANY**2


# --- how pairs of tiles meet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 14))
def test_in_half_a_ring_every_two_tiles_meet_once(count):
    met = list(half_ring_of_blocks(count))
    unordered = sorted(tuple(sorted((i, j))) for i, j, _ in met)
    assert unordered == [(i, j) for i in range(count) for j in range(i, count)]
    assert all(stands_for_both == (i != j) for i, j, stands_for_both in met)
    assert [i for i, _, _ in met] == sorted(i for i, _, _ in met)  # j varies first


@given(n=st.integers(1, 300), tile_size=st.none() | st.integers(1, 400), odd=st.booleans())
def test_tiles_hold_all_rows_and_none_is_larger_than_asked_for(n, tile_size, odd):
    count, size = split_rows(n, tile_size, odd=odd)
    assert count * size >= n
    assert 1 <= size <= (n if tile_size is None else tile_size)
    least = 1 if tile_size is None else -(-n // tile_size)
    assert count in ((least, least + 1) if odd else (least,))
    assert count % 2 == 1 or not odd or count * size == n  # even only where nothing is padded
    assert (size - 1) * count < n  # no smaller tiles would do


@given(count=st.integers(1, 17), seed=st.integers(0, 2**32 - 1))
def test_a_pairwise_sum_of_whole_numbers_is_exact(count, seed):
    a = np.random.default_rng(seed).integers(-1000, 1000, (count, 2)).astype(np.float32)
    assert np.array_equal(jax.jit(pairwise_sum)(a), a.sum(0))


def test_the_error_of_a_pairwise_sum_grows_with_the_logarithm_of_the_number_of_terms(rng):
    a = rng.uniform(1, 2, 2**16 + 3).astype(np.float32)
    exact = a.astype(np.float64).sum()
    one_by_one = np.cumsum(a)[-1]
    error = abs(float(jax.jit(pairwise_sum)(a)) / exact - 1)
    assert error < 17 * np.finfo(np.float32).eps / 2
    assert error < 0.1 * abs(one_by_one / exact - 1)


# --- any reduction --------------------------------------------------------------------------------------------------

NEAREST = 3
GAMMAS = (0.3, 0.7)
WIDER = 7


def merged(a, b):
    """The nearest of two lists (distances, indices) of neighbours; () of the mirror image that y does not have."""
    if not a:
        return a
    distances, index = (jnp.concatenate(two, -1) for two in zip(a, b, strict=True))
    negative, place = jax.lax.top_k(-distances, NEAREST)
    return -negative, jnp.take_along_axis(index, place, -1)


def nobody(like):
    """Neighbours infinitely far away."""
    if not like:
        return like
    distances, index = like
    return jnp.full_like(distances, jnp.inf), jnp.full_like(index, -1)


def nearest_in_tile(distances, tile):
    index = jnp.broadcast_to(tile.column.sample[None], distances.shape)
    shape = (*distances.shape[:-1], NEAREST)  # a tile may have fewer columns
    return (), merged((distances, index), nobody((jnp.zeros(shape, distances.dtype), jnp.zeros(shape, index.dtype))))


def distances_that_count(tile):
    return jnp.where(tile.apply_weights(jnp.ones_like(tile.distances[0])) > 0, tile.distances[0], jnp.inf)


def product_of_kernels(tile):
    return tile.apply_weights(kernel(tile.distances[0], tile.gammas[0]) * kernel(tile.distances[1], tile.gammas[1]))


def weighted_product(tile):
    """What changes when a pair is turned round: the square of the row's value times the column's."""
    values = tile.row.row_values[:, None] ** 2 * tile.column.column_values[None]
    return product_of_kernels(tile) * values


def total_and_row_sums(terms, tile):
    return over_all(terms, tile)[0], over_rows(terms, tile)[1]


REDUCTIONS = {
    "symmetric": Reduction(product_of_kernels, total_and_row_sums),
    "asymmetric": Reduction(weighted_product, total_and_row_sums, symmetric=False),
    "nearest": Reduction(distances_that_count, nearest_in_tile, combine=merged, init=nobody),
}


def reduced(x, y, mask, mask_y, values, values_y, *, stored, axis_name=None, **options):
    """Every reduction over the pairs of two feature sets: the first `WIDTH` columns and the `WIDER` others."""
    features = tuple(
        center_features(x[:, part], None if y is None else y[:, part], mask, mask_y, axis_name)
        for part in (slice(WIDTH), slice(WIDTH, None))
    )
    pairs = Pairs(features, axis_name=axis_name, **options)
    if stored:
        pairs = pairs.stored()
    gammas = tuple(gamma * part.scale**2 for gamma, part in zip(GAMMAS, features, strict=True))
    column = values if y is None else values_y
    found = {
        name: reduce_pairs(reduction, pairs, gammas=gammas, row_values=values, column_values=column)
        for name, reduction in REDUCTIONS.items()
    }
    distances, index = found["nearest"][1]
    return {
        "total": found["symmetric"][0],
        "row sums": found["symmetric"][1],
        "asymmetric total": found["asymmetric"][0],
        "asymmetric row sums": found["asymmetric"][1],
        "nearest": (distances * features[0].scale ** 2, index),
    }


def expected_of(x, y, mask, mask_y, values, values_y, skip_self):
    """The same from the definitions, in numpy."""
    y, mask_y, values_y = (x, mask, values) if y is None else (y, mask_y, values_y)
    counted = np.outer(np.ones(len(x)) if mask is None else mask, np.ones(len(y)) if mask_y is None else mask_y)
    if skip_self:
        counted = counted * (1 - np.eye(len(x)))
    first = reference.squared_distances(x[:, :WIDTH], y[:, :WIDTH])
    second = reference.squared_distances(x[:, WIDTH:], y[:, WIDTH:])
    product = counted * np.exp(-GAMMAS[0] * first - GAMMAS[1] * second)
    weighted = product * np.outer(values**2, values_y)
    away = np.where(counted > 0, first, np.inf)
    order = np.argsort(away, -1)[:, :NEAREST]
    nearest = np.take_along_axis(away, order, -1)
    return {
        "total": product.sum(),
        "row sums": product.sum(-1),
        "asymmetric total": weighted.sum(),
        "asymmetric row sums": weighted.sum(-1),
        "nearest": (nearest, order),
    }


def assert_reduced(found, expected):
    distances, index = expected.pop("nearest")
    real = np.isfinite(distances)
    found_distances, found_index = (np.asarray(a) for a in found.pop("nearest"))
    np.testing.assert_array_equal(np.isfinite(found_distances), real)
    helpers.assert_close(found_distances[real], distances[real], 1e-12)
    np.testing.assert_array_equal(found_index[real], index[real])
    for key, value in expected.items():
        helpers.assert_close(found[key], value, 1e-12)


def two_feature_sets(rng, rows, other, masked):
    x = rng.normal(size=(rows, WIDTH + WIDER))
    y = rng.normal(size=(OTHER_ROWS, WIDTH + WIDER)) if other else None
    mask = helpers.MASK[:rows] if masked else None
    mask_y = helpers.MASK_Y if masked and other else None
    return x, y, mask, mask_y, rng.normal(size=rows), rng.normal(size=OTHER_ROWS) if other else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "tile_size", "other", "masked", "skip_self"),
    [
        (ROWS, 8, False, False, True),
        (ODD, 2, False, True, True),  # tiles with fewer rows than neighbours are asked for
        (ODD, 5, True, True, False),  # 5 x 2
    ],
)
@pytest.mark.usefixtures("x64")
def test_a_reduction_over_tiles_is_its_definition(rows, tile_size, other, masked, skip_self, rng):
    problem = two_feature_sets(rng, rows, other, masked)
    fn = jax.jit(lambda *args: reduced(*args, stored=False, tile_size=tile_size, skip_self=skip_self))
    assert_reduced(fn(*problem), expected_of(*problem, skip_self))


@pytest.mark.parametrize(
    ("rows", "other", "masked", "pairs_per_block"),
    [
        (ODD, False, True, 2**20),  # one block
        (ROWS, False, False, 5 * 2 * ROWS),  # 6 blocks, each of every 6th row
        (ODD, False, True, 5 * 2 * ODD),  # 4 blocks of 5 rows and one of 3
        (ROWS, True, True, 7 * 2 * OTHER_ROWS),
    ],
)
@pytest.mark.usefixtures("x64")
def test_a_reduction_over_stored_distances_is_its_definition(rows, other, masked, pairs_per_block, rng, monkeypatch):
    monkeypatch.setattr(reduce_module, "_PAIRS_PER_BLOCK", pairs_per_block)
    problem = two_feature_sets(rng, rows, other, masked)
    fn = jax.jit(lambda *args: reduced(*args, stored=True, skip_self=not other))
    assert_reduced(fn(*problem), expected_of(*problem, not other))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "tile_size", "other"),
    [
        (2, 4, False),  # a ring of 2 x 3 tiles: opposite ones meet from both sides
        (3, None, True),
    ],
)
@pytest.mark.usefixtures("x64")
def test_a_reduction_over_a_named_axis_is_its_definition(devices, tile_size, other, rng):
    problem = two_feature_sets(rng, ROWS, other, masked=True)
    parts = [None if a is None else a.reshape(devices, -1, *a.shape[1:]) for a in problem]
    options = {"stored": False, "axis_name": "d", "tile_size": tile_size, "skip_self": not other}
    found = jax.jit(jax.vmap(lambda *args: reduced(*args, **options), axis_name="d"))(*parts)
    for key in ("total", "asymmetric total"):
        assert np.unique(found[key]).size == 1  # every device has that of all
        found[key] = found[key][0]
    found = {key: jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]) if a.ndim else a, v) for key, v in found.items()}
    assert_reduced(found, expected_of(*problem, not other))


@pytest.mark.parametrize("tile_size", [4, None])
@pytest.mark.usefixtures("x64")
def test_gammas_per_row_are_those_of_the_row_or_of_the_column(tile_size, rng):
    x = rng.normal(size=(ODD, WIDTH))
    gamma = rng.uniform(0.1, 2, ODD)
    affinity = np.exp(-gamma[:, None] * reference.squared_distances(x))

    @jax.jit
    def sums(x, gamma):
        features = center_features(x)
        pairs = Pairs((features,), tile_size=tile_size)
        pairs = pairs.stored() if tile_size is None else pairs
        reduction = Reduction(kernel_terms, over_rows, symmetric=False)
        return [
            reduce_pairs(reduction, pairs, gammas=(gamma * features.scale**2,), gamma_per=which)[1]
            for which in ("row", "column")
        ]

    per_row, per_column = sums(x, gamma)
    helpers.assert_close(per_row, affinity.sum(1), 1e-12)
    helpers.assert_close(per_column, affinity.sum(0), 1e-12)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.usefixtures("x64")
def test_a_subset_is_of_every_so_manieth_row_and_column_and_never_of_a_row_with_itself(stored, rng):
    x, y, mask = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(OTHER_ROWS, WIDTH)), helpers.MASK
    reduction = Reduction(kernel_terms, over_rows, symmetric=False)
    for size, all_rows, other in ((6, False, False), (6, True, False), (100, False, False), (4, False, True)):

        def sums(x, y, mask, size=size, all_rows=all_rows):
            features = center_features(x, y, mask)
            pairs = Pairs((features,)).stored() if stored else Pairs((features,))
            few = pairs.subset(size, all_rows=all_rows)
            return reduce_pairs(reduction, few, gammas=(GAMMAS[0] * features.scale**2,))[1]

        rows = np.arange(ROWS)[:: 1 if all_rows else max(1, ROWS // size)]
        others = y if other else x
        columns = np.arange(len(others))[:: max(1, len(others) // size)]
        counted = mask[rows, None] & (other | mask[columns % ROWS] & (rows[:, None] != columns))
        affinity = np.exp(-GAMMAS[0] * reference.squared_distances(x[rows], others[columns]))
        found = jax.jit(sums)(x, y if other else None, mask)
        helpers.assert_close(found, (counted * affinity).sum(1), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [10**5, 10**8])
@pytest.mark.usefixtures("unchecked_types")
def test_numbers_of_pairs_beyond_int32_are_traced(rows):
    # Nothing is computed: what overflows, overflows while the program is made.
    x = jax.ShapeDtypeStruct((rows, 4), np.float32)
    v = jax.ShapeDtypeStruct((rows,), np.float32)

    def everything(x, v):
        operator = jaxalign.affinity_operator(x)
        return (
            jaxalign.solve_sigma(x),
            jaxalign.solve_sigma(x[: rows // 2], x, bandwidth="per_row").sigma,
            jax.grad(lambda x: jaxalign.mean_density(x, sigma=1.0, diagonal="exclude"))(x),
            operator @ v,
            jaxalign.measures.cka(x, x),
            jaxalign.measures.distance_correlation(x, x),
        )

    assert jax.eval_shape(everything, x, v)[3].shape == (rows,)
