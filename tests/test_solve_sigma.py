"""solve_sigma: the sigma at which mean(exp(-||x_i - y_j||^2 / (2 sigma^2))) equals a density."""

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
from jaxalign import Plan, Status
from jaxalign.core.bandwidth import _series_root

ROWS, OTHER_ROWS, WIDTH, MASK = helpers.ROWS, helpers.OTHER_ROWS, helpers.WIDTH, helpers.MASK
seeds = st.integers(0, 2**32 - 1)
# How far between the share of coincident pairs and 1.
LEVELS = (0.001, 0.03, 0.3, 0.9, 0.999)


def assert_solves(x, options, density, dtype, bandwidth="global", rtol_sigma=None):
    """The defining equation in float64 at the sigma found, and the sigma of the reference."""
    found = jaxalign.solve_sigma(x, **options, density=density, bandwidth=bandwidth)
    assert found.sigma.dtype == found.density.dtype == dtype
    real = options.get("mask", np.ones(len(x), bool)) if bandwidth == "per_row" else True
    np.testing.assert_array_equal(np.asarray(found.status), 0)
    wanted = np.where(real, float(np.asarray(density, dtype)), np.nan)
    allowed = helpers.tolerance(dtype)
    reached = helpers.density_reached(x, options, found.sigma, bandwidth)
    assert helpers.relative_error(reached, wanted) < allowed.density
    assert helpers.relative_error(found.density, wanted) < allowed.density
    if dtype == np.float64:
        x, options = helpers.in_float64(x, options)
        expected = reference.solve_sigma(x, **options, density=density, bandwidth=bandwidth)
        assert helpers.relative_error(found.sigma, expected) < (rtol_sigma or allowed.sigma)
    return found


# --- the defining equation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "bandwidth"),
    [(setting, "global") for setting in helpers.SETTINGS]
    + [(setting, "per_row") for setting in ("include", "masked exclude", "rectangular")],
)
def test_reaches_the_density(setting, bandwidth, dtype, rng):
    for name, features in helpers.FEATURES.items():
        if name == "one_feature":
            continue  # another shape: below
        x, options = helpers.problem(setting, features(rng), dtype)
        floor = helpers.share_of_coincident_pairs(x, options, bandwidth)
        # In clusters the levels are those of the pairs within one, so that sigma lies inside: it could not be found
        # on distances that do not resolve the cluster.
        top = helpers.share_of_pairs_in_a_cluster(options, bandwidth) if "clusters" in name else 1.0
        if top <= floor:  # a row without a partner in its cluster
            top = 1.0
        for level in LEVELS if bandwidth == "global" else (0.03, 0.9):
            try:
                assert_solves(x, options, floor + level * (top - floor), dtype, bandwidth)
            except AssertionError as error:
                raise AssertionError(f"{name}, level {level}: {error}") from error


def test_one_feature(dtype, rng):
    x, options = helpers.problem("include", helpers.one_feature(rng), dtype)
    for density in (0.05, 0.4, 0.999):
        assert_solves(x, options, density, dtype)


@pytest.mark.parametrize(("diagonal", "densities"), [("include", (0.501, 0.7, 0.999)), ("exclude", (0.01, 0.5, 0.999))])
def test_two_rows_have_a_closed_form(diagonal, densities, dtype, rng):
    x = rng.normal(size=(2, WIDTH)).astype(dtype)
    squared = reference.squared_distances(x)[0, 1]
    for density in densities:
        found = assert_solves(x, {"diagonal": diagonal}, density, dtype)
        off_diagonal = density if diagonal == "exclude" else 2 * density - 1
        expected = np.sqrt(squared / (-2 * np.log(off_diagonal)))
        # Next to its floor sigma moves c / (c - 1/2) = 500 times as much as the density, over 2 ln(1 / 0.002) = 12.
        assert helpers.relative_error(found.sigma, expected) < 100 * helpers.tolerance(dtype).density


@pytest.mark.parametrize("distance", [3.0, 10.0, 30.0, 60.0, 100.0, 300.0, 1e4])
def test_two_close_rows_and_one_far_away(distance, dtype):
    # One pair makes the density: no mean over pairs hides the error of its distance.
    rng = np.random.default_rng(0)
    for _ in range(40):
        x = (rng.normal(size=(3, 3)) + np.array([[0.0], [0.0], [distance]])).astype(dtype)
        assert_solves(x, {"diagonal": "exclude"}, 0.15, dtype)


@given(seed=seeds, level=st.floats(1e-3, 0.999), tail=st.sampled_from([0.7, 1.0, 2.0, 30.0]))
def test_any_features_and_any_density(dtype, seed, level, tail):
    x = np.random.default_rng(seed).standard_t(tail, (ROWS, WIDTH)).astype(dtype)
    assert_solves(x, {}, 1 / ROWS + level * (1 - 1 / ROWS), dtype)


@given(seed=seeds, log_scale=st.floats(-18, 18))
def test_any_unit_of_the_features(dtype, seed, log_scale):
    x = (10**log_scale * np.random.default_rng(seed).normal(size=(ROWS, WIDTH))).astype(dtype)
    assert_solves(x, {}, 0.1, dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_whose_square_float32_cannot_hold(scale, rng):
    x = (scale * rng.normal(size=(ROWS, WIDTH))).astype(np.float32)
    sigma = jaxalign.solve_sigma(x, density=0.1).sigma
    expected = reference.solve_sigma(x, density=0.1)
    assert helpers.relative_error(sigma, expected) < helpers.tolerance(np.float32).density


@pytest.mark.parametrize("excess", [1.001, 1.01, 1.1])
def test_just_above_the_floor_of_the_diagonal(excess, dtype, rng):
    x, options = helpers.problem("include", helpers.gaussian(rng), dtype)
    assert_solves(x, options, excess / ROWS, dtype)


def test_half_precision_features_are_solved_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.bfloat16)
    found = jaxalign.solve_sigma(x, density=0.1)
    rounded = np.asarray(x.astype(jnp.float32))
    assert found.sigma.dtype == np.float32
    assert float(found.sigma) == float(jaxalign.solve_sigma(rounded, density=0.1).sigma)


def test_rtol_bounds_the_error_of_the_density(dtype, rng):
    x, options = helpers.problem("include", helpers.cauchy(rng), dtype)
    found = jaxalign.solve_sigma(x, density=0.2, rtol=1e-3)
    assert helpers.relative_error(helpers.density_reached(x, options, found.sigma), 0.2) < 1e-3
    assert found.passes <= jaxalign.solve_sigma(x, density=0.2).passes


@pytest.mark.usefixtures("x64")
def test_converges_everywhere_next_to_the_floor(rng):
    # Here a few close pairs make the density: its series in the rate is poor, and may have no root at all.
    x = np.concatenate([rng.standard_t(tail, (500, ROWS, WIDTH)) for tail in (1.0, 2.0, 30.0)])
    density = 1 / ROWS + 10 ** rng.uniform(-4, -1, len(x))
    found = jax.jit(jax.vmap(lambda x, c: jaxalign.solve_sigma(x, density=c)))(x, density)
    assert np.all(np.asarray(found.status) == Status.CONVERGED)
    for i in range(0, len(x), 25):
        reached = helpers.density_reached(x[i], {}, found.sigma[i])
        assert helpers.relative_error(reached, density[i]) < helpers.tolerance(np.float64).density


# --- more rows than the first estimate looks at ---------------------------------------------------------------------

LARGE = 1100  # more than one block of rows, with a remainder, and a subsample of every second row and column


def misleading(name, rng):
    """Sets of which every second row tells another story than the whole, and densities in all the places."""
    x = rng.normal(size=(LARGE, WIDTH))
    if name == "normal":
        return x, (1.001 / LARGE, 0.05, 0.999)
    if name == "every second row in one tight cluster":
        x[::2] *= 1e-6
        return x, (0.1, 0.3, 0.9)
    if name == "every second row the same":
        x[::2] = x[0]
        return x, (0.26, 0.5)
    if name == "every second row far out":
        x[::2] *= 1e5
        return x, (0.05, 0.5)
    assert name == "every second row in another place"
    x[::2] = 1e-3 * x[::2] + 1e3
    return x, (0.01, 0.4, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "every second row in one tight cluster",
        "every second row the same",
        "every second row far out",
        "every second row in another place",
    ],
)
def test_a_subsample_that_misleads_does_no_harm(name, dtype, rng):
    features, densities = misleading(name, rng)
    x = features.astype(dtype)
    for density in densities:
        found = jaxalign.solve_sigma(x, density=density)
        assert found.status == 0
        reached = helpers.density_reached(x, {}, found.sigma)
        assert helpers.relative_error(reached, np.asarray(density, dtype)) < helpers.tolerance(dtype).density


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["per row", "masked rectangular"])
def test_more_rows_than_a_block_in_other_settings(kind, rng):
    x = rng.normal(size=(LARGE, WIDTH)).astype(np.float32)
    if kind == "per row":
        options, bandwidth = {"diagonal": "exclude"}, "per_row"
    else:
        y, mask = rng.normal(size=(LARGE - 1, WIDTH)).astype(np.float32), np.arange(LARGE) % 3 != 0
        options, bandwidth = {"y": y, "mask": mask, "mask_y": ~mask[1:]}, "global"
    found = jaxalign.solve_sigma(x, **options, density=0.03, bandwidth=bandwidth)
    reached = helpers.density_reached(x, options, found.sigma, bandwidth)
    assert helpers.relative_error(reached, np.full(np.shape(reached), 0.03)) < helpers.tolerance(np.float32).density


def test_ordinary_features_need_few_passes(dtype, rng):
    x, _ = helpers.problem("include", helpers.gaussian(rng), dtype)
    for bandwidth in helpers.BANDWIDTHS:
        assert max(int(jaxalign.solve_sigma(x, density=c, bandwidth=bandwidth).passes) for c in (0.1, 0.3, 0.9)) <= 2
    x, _ = helpers.problem("include", helpers.cauchy(rng), dtype)  # steps in log rate lead there, halving would not
    assert max(int(jaxalign.solve_sigma(x, density=c).passes) for c in (0.05, 0.3, 0.9)) <= 8
    many = rng.normal(size=(LARGE, WIDTH)).astype(dtype)
    passes = [int(jaxalign.solve_sigma(many, density=c).passes) for c in (0.01, 0.05, 0.3)]
    assert max(passes) <= (1 if dtype == np.float32 else 2)  # what a subsample leaves, one series takes away


@pytest.mark.usefixtures("x64")
def test_the_series_in_the_rate_bounds_its_own_error(rng):
    z = rng.gamma(3.0, size=200)  # rate times distance
    level = np.array([0.5, 0.8, 0.95, 1.05, 1.2, 2.0])  # wanted densities, in units of the one at this rate
    density = level * np.exp(-z).mean()
    moments = [np.mean(np.exp(-z) * z**k) / density for k in range(7)]
    s, value, slope, bound = (np.asarray(a) for a in _series_root(jnp.asarray(moments)))
    there = np.outer(1 + s, z)
    error = np.abs(np.exp(-there).mean(-1) / density - value)
    np.testing.assert_array_equal(s > 0, level < 1)
    helpers.assert_close(value, np.ones(level.shape), 1e-14)
    assert (error <= bound).all()
    assert (bound < 1e3 * error).all()
    assert (np.abs(slope - (np.exp(-there) * there).mean(-1) / density) < 20 * bound).all()


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [1e-6, 1.0, 3e4])
def test_sigma_of_a_regular_simplex(edge, dtype):
    x = reference.simplex(ROWS, edge).astype(dtype)
    for density in (0.05, 0.2, 0.9):
        sigma = jaxalign.solve_sigma(x, density=density).sigma
        expected = edge / np.sqrt(2 * np.log((1 - 1 / ROWS) / (density - 1 / ROWS)))
        assert helpers.relative_error(sigma, expected) < helpers.tolerance(dtype).sigma


def test_all_rows_of_a_simplex_have_one_sigma():
    x = reference.simplex(ROWS, 2.0).astype(np.float32)
    sigma = jaxalign.solve_sigma(x, density=0.2, bandwidth="per_row").sigma
    expected = np.full(ROWS, reference.simplex_sigma(ROWS, 2.0, 0.2))
    assert helpers.relative_error(sigma, expected) < helpers.tolerance(np.float32).sigma


@given(seed=seeds)
def test_rotation_offset_and_unit(dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, WIDTH))
    rotation, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    moved = 0.25 * x @ rotation + rng.normal(size=WIDTH)
    sigma, of_moved = (jaxalign.solve_sigma(a.astype(dtype), density=0.1).sigma for a in (x, moved))
    assert helpers.relative_error(of_moved, 0.25 * np.asarray(sigma, np.float64)) < helpers.tolerance(dtype).density


@given(seed=seeds, exponent=st.integers(-59, 59))
def test_a_power_of_two_scales_sigma_exactly(dtype, seed, exponent):
    x = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(dtype)
    sigma, of_scaled = (np.asarray(jaxalign.solve_sigma(a, density=0.1).sigma) for a in (x, np.ldexp(x, exponent)))
    assert of_scaled == np.ldexp(sigma, exponent)


@given(seed=seeds)
def test_sigma_grows_with_the_density(dtype, seed):
    x = np.random.default_rng(seed).standard_t(2, (ROWS, WIDTH)).astype(dtype)
    sigma = [float(jaxalign.solve_sigma(x, density=c).sigma) for c in np.linspace(1.01 / ROWS, 0.99, 15)]
    assert np.all(np.diff(sigma) > 0)


@given(seed=seeds)
def test_the_order_of_the_rows_does_not_matter(dtype, seed):
    rng = np.random.default_rng(seed)
    x, order = rng.normal(size=(ROWS, WIDTH)).astype(dtype), rng.permutation(ROWS)
    rtol = helpers.tolerance(dtype).density
    for bandwidth in helpers.BANDWIDTHS:
        sigma, permuted = (
            np.asarray(jaxalign.solve_sigma(a, density=0.1, bandwidth=bandwidth).sigma) for a in (x, x[order])
        )
        assert helpers.relative_error(permuted, sigma if bandwidth == "global" else sigma[order]) < rtol


def test_rows_compared_with_themselves_as_another_set(dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    found, pair = jaxalign.solve_sigma(x, density=0.1), jaxalign.solve_sigma(x, x.copy(), density=0.1)
    assert helpers.relative_error(pair.sigma, found.sigma) < helpers.tolerance(dtype).sigma


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "bandwidth"),
    [
        ("masked include", "global"),
        ("masked exclude", "global"),
        ("masked rectangular", "global"),
        ("masked exclude", "per_row"),
    ],
)
def test_a_mask_is_the_subset_whatever_masked_rows_hold(setting, bandwidth, dtype, rng):
    clean_x, clean = helpers.problem(setting, helpers.gaussian(rng), dtype)
    x, options = helpers.spoil_masked(clean_x, clean)
    assert not np.isfinite(x).all()
    found = jaxalign.solve_sigma(x, **options, density=0.2, bandwidth=bandwidth)
    subset = {"diagonal": options["diagonal"]} if "diagonal" in options else {"y": clean["y"][helpers.MASK_Y]}
    expected = reference.solve_sigma(clean_x[MASK], **subset, density=0.2, bandwidth=bandwidth)
    per_row = bandwidth == "per_row"
    sigma, reached = (np.asarray(v)[MASK] if per_row else v for v in (found.sigma, found.density))
    assert helpers.relative_error(sigma, expected) < helpers.tolerance(dtype).sigma
    assert helpers.relative_error(reached, np.full(np.shape(reached), 0.2)) < helpers.tolerance(dtype).density
    assert np.all(np.asarray(found.status) == 0)
    if per_row:
        assert np.all(np.isnan(np.asarray(found.sigma)[~MASK]))
        assert np.all(np.isnan(np.asarray(found.density)[~MASK]))


@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_ragged_sets_in_one_batch(bandwidth, rng):
    x = rng.normal(size=(4, ROWS, WIDTH)).astype(np.float32)
    sizes = np.array([24, 11, 5, 3])
    mask = np.arange(ROWS) < sizes[:, None]
    x[~mask] = np.nan
    found = jaxalign.solve_sigma(x, density=0.4, mask=mask, bandwidth=bandwidth)
    for i, size in enumerate(sizes):
        expected = reference.solve_sigma(x[i, :size], density=0.4, bandwidth=bandwidth)
        sigma = np.asarray(found.sigma[i])
        sigma = sigma[:size] if bandwidth == "per_row" else sigma
        assert helpers.relative_error(sigma, expected) < helpers.tolerance(np.float32).sigma


def test_one_mask_for_a_whole_batch(rng):
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    shared = jaxalign.solve_sigma(x, density=0.2, mask=MASK).sigma
    each = jaxalign.solve_sigma(x, density=0.2, mask=np.stack([MASK, MASK])).sigma
    assert np.array_equal(shared, each)


# --- batches, traces ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_a_batch_vmap_and_a_loop_agree(bandwidth, rng):
    dtype = np.float32
    # One set needs explicit differences, one many passes, one few: nobody waits for, or is changed by, another.
    x = np.stack([f(rng)[:ROWS] for f in (helpers.gaussian, helpers.clusters, helpers.cauchy)]).astype(dtype)
    density = np.array([0.3, 0.07, 0.9], dtype)

    def solve(x, c):
        return jaxalign.solve_sigma(x, density=c, bandwidth=bandwidth)

    batched, mapped = solve(x, density), jax.vmap(solve)(x, density)
    for i in range(3):
        alone = solve(x[i], density[i])
        assert batched.passes[i] >= 1
        for many in (batched, mapped):
            assert helpers.relative_error(many.sigma[i], alone.sigma) < helpers.tolerance(dtype).density
            assert np.array_equal(many.status[i], alone.status)
            assert helpers.relative_error(many.density[i], alone.density) < helpers.tolerance(dtype).density


def test_two_batch_dimensions(rng):
    dtype = np.float32
    x = rng.normal(size=(2, 3, ROWS, WIDTH)).astype(dtype)
    density = np.array([0.1, 0.2, 0.5], dtype)  # broadcasts against (2, 3)
    sigma = np.asarray(jaxalign.solve_sigma(x, density=density).sigma)
    expected = [[reference.solve_sigma(x[i, j], density=float(density[j])) for j in range(3)] for i in range(2)]
    assert helpers.relative_error(sigma, expected) < helpers.tolerance(dtype).sigma


@pytest.mark.slow
def test_a_density_for_every_set_of_a_batch_with_a_bandwidth_per_row(rng):
    dtype = np.float32
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(dtype)
    density = np.array([0.1, 0.5], dtype)
    sigma = np.asarray(jaxalign.solve_sigma(x, density=density, bandwidth="per_row").sigma)
    for i in range(2):
        expected = reference.solve_sigma(x[i], density=float(density[i]), bandwidth="per_row")
        assert helpers.relative_error(sigma[i], expected) < helpers.tolerance(dtype).sigma


@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_jit_equals_eager_with_a_traced_density(bandwidth, rng):
    dtype = np.float32
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    traced = jax.jit(lambda x, c: jaxalign.solve_sigma(x, density=c, bandwidth=bandwidth))
    for density in (0.05, 0.5):
        inside = traced(x, jnp.asarray(density, dtype))
        outside = jaxalign.solve_sigma(x, density=density, bandwidth=bandwidth)
        assert helpers.relative_error(inside.sigma, outside.sigma) < helpers.tolerance(dtype).density
        assert np.array_equal(inside.status, outside.status)


# --- what cannot be solved, under a trace ---------------------------------------------------------------------------


def test_status_says_why_there_is_no_sigma_under_jit(dtype, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    same = np.repeat(x[:3], 8, 0)  # a third of all pairs coincide
    with_nan, with_inf = x.copy(), x.copy()
    with_nan[5, 2], with_inf[7, 0] = np.nan, -np.inf
    solve = jax.jit(lambda x, c: jaxalign.solve_sigma(x, density=c))
    for features, density, status in [
        (x, 0.2, Status.CONVERGED),
        (same, 0.2, Status.INFEASIBLE),
        (same, 0.4, Status.CONVERGED),
        (np.ones_like(x), 0.5, Status.INFEASIBLE),
        (with_nan, 0.2, Status.NON_FINITE),
        (with_inf, 0.2, Status.NON_FINITE),
        (x, 1.2, Status.BAD_DENSITY),
        (x, 1.0, Status.BAD_DENSITY),
        (x, 0.0, Status.BAD_DENSITY),
        (x, -0.1, Status.BAD_DENSITY),
        (x, np.nan, Status.BAD_DENSITY),
        (x, 0.9 / ROWS, Status.INFEASIBLE),
        (with_nan, np.nan, Status.NON_FINITE),
    ]:
        found = solve(features, jnp.asarray(density, dtype))
        assert int(found.status) == status
        assert bool(jnp.isnan(found.sigma)) == (status != Status.CONVERGED)
        if status == Status.CONVERGED:
            assert found.raise_if_failed() is found
        else:
            with pytest.raises(ValueError, match="no sigma found"):
                found.raise_if_failed()


def test_status_of_an_empty_mask_under_jit(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    for diagonal in ("include", "exclude"):
        solve = jax.jit(lambda x, mask, d=diagonal: jaxalign.solve_sigma(x, density=0.2, mask=mask, diagonal=d))
        found = solve(x, np.zeros(ROWS, bool))
        assert int(found.status) == Status.NO_SAMPLES
        assert np.isnan(found.sigma)
        assert int(solve(x, MASK).status) == Status.CONVERGED
    # One real row has no pair with another: nothing to scale.
    found = solve(x, np.arange(ROWS) == 3)
    assert int(found.status) == Status.NO_SAMPLES


def test_one_set_without_a_sigma_leaves_the_others_alone(rng):
    dtype = np.float32
    x = rng.normal(size=(3, ROWS, WIDTH)).astype(dtype)
    x[1] = 1.0
    found = jax.jit(lambda x: jaxalign.solve_sigma(x, density=0.2))(x)
    assert found.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.CONVERGED]
    assert np.isnan(found.sigma).tolist() == [False, True, False]
    expected = [reference.solve_sigma(x[i], density=0.2) for i in (0, 2)]
    assert helpers.relative_error(found.sigma[np.array([0, 2])], expected) < helpers.tolerance(dtype).sigma


def test_one_row_without_a_sigma_leaves_the_others_alone(rng):
    dtype = np.float32
    x = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    x[:6] = x[0]  # these rows have a quarter of their pairs at distance 0
    found = jax.jit(lambda x: jaxalign.solve_sigma(x, density=0.2, bandwidth="per_row"))(x)
    assert np.array_equal(np.asarray(found.status), np.where(np.arange(ROWS) < 6, Status.INFEASIBLE, Status.CONVERGED))
    assert np.array_equal(np.isnan(np.asarray(found.sigma)), np.arange(ROWS) < 6)


@pytest.mark.parametrize("tile_size", [None, 64])
def test_few_pairs_that_bear_the_density_are_accurate_in_float32(tile_size):
    # Rounding of distances does not average out over a handful of pairs.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8))
    x[1:8:2] = x[0:8:2] + 0.07 * rng.normal(size=(4, 8))
    x = x.astype(np.float32)
    density = 0.6 * 8 / (200 * 199)
    found = jaxalign.solve_sigma(x, density=density, diagonal="exclude", plan=Plan(tile_size)).sigma
    expected = reference.solve_sigma(x.astype(float), density=density, diagonal="exclude")
    assert helpers.relative_error(found, expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("tile_size", [None, 64])
def test_rows_of_heavy_tails_are_accurate_in_float32(tile_size):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(150, 3)) * np.exp(2 * rng.normal(size=(150, 1)))).astype(np.float32)
    found = jaxalign.solve_sigma(x, density=0.3, bandwidth="per_row", plan=Plan(tile_size)).sigma
    expected = reference.solve_sigma(x.astype(float), density=0.3, bandwidth="per_row")
    assert helpers.relative_error(found, expected) < 2e-6  # the largest of 150 errors


@pytest.mark.parametrize("width", [1e-15, 1e-17, 1e-30])
def test_a_search_on_explicit_distances_has_as_many_passes_as_the_first(width):
    rng = np.random.default_rng(0)
    x = np.concatenate([width * rng.normal(size=(50, 3)), 1 + rng.normal(size=(50, 3))])
    with jax.enable_x64():
        stored = jaxalign.solve_sigma(x, density=0.05, plan=Plan(None))
        tiled = jaxalign.solve_sigma(x, density=0.05, plan=Plan(30))
    helpers.assert_close(
        stored.sigma, tiled.sigma, 1e-11
    )  # the solver's tolerance of 1e-13, by the slope of the density


# --- status -----------------------------------------------------------------------------------------------------------


def test_every_status_has_a_message():
    assert [status.name for status in Status] == [
        "CONVERGED", "NOT_CONVERGED", "INFEASIBLE", "NON_FINITE", "BAD_DENSITY", "NO_SAMPLES"
    ]  # fmt: skip
    assert [int(status) for status in Status] == list(range(6))
    for status in Status:
        assert status.message[0].isupper()
        assert status.message.endswith(".")
        assert status is Status.CONVERGED or status.message.count(".") >= 2  # what is wrong, and a way out


def test_a_status_is_compared_under_jit(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)

    @jax.jit
    def is_infeasible(x):
        solution = jaxalign.solve_sigma(x, density=0.2)
        return solution.status == Status.INFEASIBLE, jnp.where(solution.status == Status.CONVERGED, solution.sigma, 0)

    assert not is_infeasible(x)[0]
    assert is_infeasible(np.ones_like(x))[0]
    assert is_infeasible(np.ones_like(x))[1] == 0


# --- without a look at the status -------------------------------------------------------------------------------------

WITHOUT_THROW = {
    "solve_sigma": lambda x, **options: jaxalign.solve_sigma(x, throw=False, **options).sigma,
    "rbf_affinity": lambda x, **options: jaxalign.rbf_affinity(x, throw=False, **options),
    "affinity_operator": lambda x, **options: jaxalign.affinity_operator(x, throw=False, **options).sum(),
}


@pytest.mark.parametrize("name", WITHOUT_THROW)
def test_without_throw_nothing_is_read(name, rng, monkeypatch):
    def fail(*args):
        raise AssertionError("read from a device")

    x = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    options = {"density": jnp.float32(0.2), "mask": jnp.asarray(MASK)}
    expected = WITHOUT_THROW[name](x, **options)
    monkeypatch.setattr(jaxalign._arrays, "on_host", fail)
    monkeypatch.setattr(jaxalign._arrays, "read_on_host", fail)
    np.testing.assert_array_equal(WITHOUT_THROW[name](x, **options), expected)
    if name != "solve_sigma":
        assert np.isfinite(WITHOUT_THROW[name](x, sigma=jnp.float32(2.0))).all()
        assert np.isfinite(
            WITHOUT_THROW[name](x, sigma=jnp.ones(ROWS), bandwidth="per_row", mask=options["mask"])
        ).all()


@pytest.mark.parametrize("name", WITHOUT_THROW)
def test_without_throw_a_failure_is_nan(name, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    with_nan = np.where(np.arange(ROWS)[:, None] == 3, np.nan, x)
    for features, options in (
        (np.ones_like(x), {"density": 0.2}),
        (with_nan, {"density": 0.2}),
        (x, {"density": jnp.float32(1.5)}),
        (x, {"density": jnp.float32(0.2), "mask": jnp.zeros(ROWS, bool)}),
    ):
        found = WITHOUT_THROW[name](jnp.asarray(features), **options)
        masked = "mask" in options and name != "solve_sigma"  # pairs of masked samples are 0, whatever sigma is
        assert masked or np.isnan(found).all()
    if name != "solve_sigma":
        assert np.isnan(WITHOUT_THROW[name](jnp.asarray(with_nan), sigma=2.0)).all()
        assert np.isnan(WITHOUT_THROW[name](jnp.asarray(x), sigma=jnp.float32(-1.0))).all()
    with pytest.raises(ValueError, match="cannot be reached"):  # shapes and a number tell
        WITHOUT_THROW[name](x, density=0.01)
    solution = jaxalign.solve_sigma(jnp.asarray(x), density=0.2, mask=jnp.zeros(ROWS, bool), throw=False)
    assert int(solution.status) == Status.NO_SAMPLES
