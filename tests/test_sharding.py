"""Rows spread over devices give what one device gives; only rows travel, from neighbour to neighbour.

Eight CPU devices (conftest). 23 rows divide among none of the meshes; 24 rows where the caller spreads them, as JAX
wants them to divide then.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import NamedTuple

import helpers
import jax
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxalign
from jaxalign import Plan
from jaxalign.sharding import data_mesh, shard_rows

ROWS, OTHER_ROWS, WIDTH, MASK = helpers.ROWS, helpers.OTHER_ROWS, helpers.WIDTH, helpers.MASK
ODD = ROWS - 1
F32, F64 = "float32", "float64"
SAME = {F32: 1e-6, F64: 1e-12}  # see test_tiles
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(devices=8, kind="auto"):
    return Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(KINDS[kind],))


def spread(mesh, a, rows=-2):
    """An array whose rows are on the devices of a mesh."""
    return jax.device_put(a, NamedSharding(mesh, P(*[None] * (a.ndim + rows), "data", *[None] * (-1 - rows))))


def is_spread(a, rows=-2):
    """Whether no device holds more than its part of the rows."""
    return {s.data.shape[rows] for s in a.addressable_shards} == {a.shape[rows] // 8}


# --- mesh= ----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    setting: str
    bandwidth: str
    devices: int
    dtype: str
    tile_size: int | str | None = "auto"
    rows: int = ODD
    batch: int | None = None

    def __str__(self):
        return ", ".join(str(part) for part in self if part is not None)


def cases(*each):
    return pytest.mark.parametrize("case", each, ids=str)


def problem_of(case, rng):
    x, options = helpers.problem(case.setting, helpers.gaussian(rng), case.dtype)
    options = options | {"mask": MASK[: case.rows]} if "mask" in options else options
    x = x[: case.rows]
    if case.batch is not None:
        x = np.stack([x * 2.0**k + rng.normal(size=x.shape).astype(x.dtype) for k in range(case.batch)])
        if "y" in options:
            options["y"] = np.stack([options["y"]] * case.batch)
    return x, options


@cases(
    Case("include", "global", 8, F32),
    Case("include", "global", 1, F32),
    Case("masked exclude", "global", 3, F64, 2),  # a ring of 12 tiles
    Case("masked rectangular", "global", 8, F64),
    Case("masked exclude", "per_row", 3, F64),  # a ring of 3 tiles
    Case("masked include", "global", 3, F32, batch=2),
)
def test_sigma_over_a_mesh_is_that_of_one_device(case, rng):
    with jax.enable_x64(case.dtype == F64):
        x, options = problem_of(case, rng)
        solve = partial(jaxalign.solve_sigma, x, **options, density=0.2, bandwidth=case.bandwidth)
        dense, sharded = solve(), solve(plan=Plan(tile_size=case.tile_size, mesh=mesh_of(case.devices)))
        assert sharded.sigma.dtype == sharded.density.dtype == case.dtype
        assert helpers.relative_error(sharded.sigma, dense.sigma) < SAME[case.dtype]
        assert helpers.relative_error(sharded.density, dense.density) < SAME[case.dtype]
        np.testing.assert_array_equal(sharded.status, dense.status)
        np.testing.assert_array_equal(sharded.status, 0)


@cases(Case("masked rectangular", "per_row", 8, F64, 2), Case("exclude", "global", 3, F32, batch=2))
def test_density_over_a_mesh_is_that_of_one_device(case, rng):
    with jax.enable_x64(case.dtype == F64):
        x, options = problem_of(case, rng)
        shape = x.shape[:-1] if case.bandwidth == "per_row" else x.shape[:-2]
        sigma = rng.uniform(0.5, 3, shape).astype(case.dtype)
        density = partial(jaxalign.mean_density, x, **options, sigma=sigma, bandwidth=case.bandwidth)
        sharded = density(plan=Plan(tile_size=case.tile_size, mesh=mesh_of(case.devices)))
        assert helpers.relative_error(sharded, density()) < SAME[case.dtype]


@pytest.mark.slow
def test_the_axis_is_the_one_that_is_named(rng):
    x = rng.normal(size=(ODD, WIDTH)).astype(np.float32)
    devices = np.array(jax.devices())
    expected = jaxalign.mean_density(x, sigma=1.0)
    for mesh, name in (
        (Mesh(devices.reshape(2, 4), ("model", "data")), None),  # "data"
        (Mesh(devices.reshape(2, 4), ("model", "data")), "model"),
    ):
        found = jaxalign.mean_density(x, sigma=1.0, plan=Plan(mesh=mesh, axis_name=name))
        assert helpers.relative_error(found, expected) < SAME[F32]


# --- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_first_and_second_derivatives_over_a_mesh_are_those_of_one_device(rng):
    devices = 3
    x, options = problem_of(Case("masked exclude", "global", devices, F64), rng)
    args = {"x": x, "density": np.asarray(0.2)}
    u = helpers.direction(rng, args)

    def derivatives(mesh):
        def fn(args):
            return jaxalign.solve_sigma(**args, **options, plan=Plan(mesh=mesh)).sigma

        return jax.jit(lambda args, u: jax.jvp(jax.grad(fn), (args,), (u,)))(args, u)

    for found, expected in zip(derivatives(mesh_of(devices)), derivatives(None), strict=True):
        for key in args:
            helpers.assert_close(found[key], expected[key], 1e-11)


# --- rows that are spread already -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_spread_already_need_no_mesh(kind, rng):
    mesh, x = mesh_of(8, kind), rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    found = jaxalign.solve_sigma(spread(mesh, x), density=0.2, bandwidth="per_row", mask=spread(mesh, MASK, -1))
    expected = jaxalign.solve_sigma(x, density=0.2, bandwidth="per_row", mask=MASK)
    assert helpers.relative_error(found.sigma, expected.sigma) < SAME[F32]
    np.testing.assert_array_equal(found.status, 0)
    assert is_spread(found.sigma, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_spread_already_need_no_mesh_under_jit_either(kind, rng):
    mesh, features = mesh_of(8, kind), rng.normal(size=(2 * ROWS, WIDTH)).astype(np.float32)
    x, y = features[:ROWS], features[ROWS : ROWS + 16]
    fn = jax.jit(lambda x, y: (jaxalign.solve_sigma(x, density=0.2).sigma, jaxalign.mean_density(x, y, sigma=1.0)))
    sigma, density = fn(spread(mesh, x), spread(mesh, y))
    assert helpers.relative_error(sigma, jaxalign.solve_sigma(x, density=0.2).sigma) < SAME[F32]
    assert helpers.relative_error(density, reference.mean_density(x, y, sigma=1.0)) < 1e-5


def test_a_gradient_of_rows_that_are_spread_already_is_that_of_one_device_and_spread(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    # Under jit, or jax.set_mesh: jax.grad itself refuses explicit shardings elsewhere.
    gradient = jax.jit(jax.grad(lambda x: jaxalign.mean_density(x, sigma=1.5)))(spread(mesh_of(8, "explicit"), x))
    affinity = reference.rbf_affinity(x, sigma=1.5)
    expected = -2 * (affinity.sum(-1, keepdims=True) * x - affinity @ x) / (1.5 * ROWS) ** 2
    helpers.assert_close(gradient, expected, 1e-5)
    assert is_spread(gradient)


@pytest.mark.parametrize(("kind", "jit"), [("auto", False), ("explicit", True)])
def test_affinity_and_distances_of_rows_that_are_spread_stay_spread(kind, jit, rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    x_spread = spread(mesh_of(8, kind), x)
    expected = reference.squared_distances(x), reference.rbf_affinity(x, density=0.2)

    def both(x):
        return jaxalign.squared_distances(x), jaxalign.rbf_affinity(x, density=0.2)

    for found, value in zip((jax.jit(both) if jit else both)(x_spread), expected, strict=True):
        helpers.assert_close(found, value, 1e-5)
        assert is_spread(found)


# --- inside shard_map, pmap, vmap -----------------------------------------------------------------------------------


def local_sigma(x, mask=None):
    return jaxalign.solve_sigma(x, density=0.2, mask=mask, plan=Plan(axis_name="data")).sigma


def local_sigma_by_row(x):
    return jaxalign.solve_sigma(x, density=0.2, bandwidth="per_row", plan=Plan(axis_name="data")).sigma


def test_inside_shard_map_all_devices_form_the_set(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    mesh = mesh_of(8)
    rows = P("data")
    sigma = jax.jit(jax.shard_map(local_sigma, mesh=mesh, in_specs=(rows, rows), out_specs=P()))(x, MASK)
    assert helpers.relative_error(sigma, jaxalign.solve_sigma(x, density=0.2, mask=MASK).sigma) < SAME[F32]


@pytest.mark.parametrize("name", ["mask", "sigma"])
def test_inside_shard_map_a_mask_and_a_sigma_may_be_constants(name, rng):
    # The same on every device: for shard_map these do not vary over the axis, while the rows do.
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    options = {"mask": {"mask": MASK[:3], "sigma": 1.0}, "sigma": {"sigma": np.array([1, 2, 3], np.float32)}}[name]
    bandwidth = "per_row" if name == "sigma" else "global"

    def local(x):
        return jaxalign.mean_density(x, **options, bandwidth=bandwidth, plan=Plan(axis_name="data"))

    density = jax.jit(jax.shard_map(local, mesh=mesh_of(8), in_specs=P("data"), out_specs=P()))(x)
    everywhere = {key: np.tile(value, 8) if np.ndim(value) else value for key, value in options.items()}
    assert helpers.relative_error(density, reference.mean_density(x, **everywhere)) < 1e-5


def test_inside_pmap_all_devices_form_the_set(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    sigma = jax.pmap(local_sigma, axis_name="data")(x.reshape(8, -1, WIDTH))
    expected = np.repeat(jaxalign.solve_sigma(x, density=0.2).sigma, 8)
    assert helpers.relative_error(sigma, expected) < SAME[F32]


@pytest.mark.slow
def test_inside_pmap_the_gradient_is_that_of_the_whole_times_the_devices(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    gradient = jax.pmap(jax.grad(local_sigma), axis_name="data")(x.reshape(8, -1, WIDTH)).reshape(x.shape) / 8
    expected = jax.jit(jax.grad(lambda x: jaxalign.solve_sigma(x, density=0.2).sigma))(x)
    helpers.assert_close(gradient, expected, SAME[F32])  # of the largest entry


@pytest.mark.slow
def test_inside_vmap_a_sigma_by_row_belongs_to_the_rows_of_the_device(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    sigma = jax.vmap(local_sigma_by_row, axis_name="data")(x.reshape(8, -1, WIDTH))
    expected = jaxalign.solve_sigma(x, density=0.2, bandwidth="per_row").sigma
    assert helpers.relative_error(sigma.reshape(-1), expected) < SAME[F32]


def test_a_density_below_the_diagonal_counts_the_rows_of_all_devices():
    x = np.random.default_rng(0).normal(size=(8, 3, WIDTH)).astype(np.float32)
    with pytest.raises(ValueError, match=r"density = 0\.04 cannot be reached with n = 24"):
        jax.vmap(lambda x: jaxalign.solve_sigma(x, density=0.04, plan=Plan(axis_name="data")).sigma, axis_name="data")(
            x
        )


# --- what travels ---------------------------------------------------------------------------------------------------

MANY, TILE, FEW_FEATURES = 2048, 64, 4


def largest_array(text):
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]", text)
    return max(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


@pytest.mark.slow
def test_rows_travel_from_neighbour_to_neighbour_and_no_device_gathers_them():
    def sigma(x):
        return jaxalign.solve_sigma(x, density=0.1, plan=Plan(tile_size=TILE, mesh=mesh_of(8))).sigma

    x = jax.ShapeDtypeStruct((MANY, FEW_FEATURES), np.float32, sharding=NamedSharding(mesh_of(8), P("data", None)))
    compiled = jax.jit(jax.value_and_grad(sigma)).lower(x).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "collective-permute" in text
    # Neither all pairs nor a device's rows with all; a subsample of 512 x 512 pairs is fine.
    assert largest_array(text) <= 512**2 < MANY**2 / 8
    assert compiled.memory_analysis().temp_size_in_bytes < MANY**2 / 8 * 4 * 4


def test_different_sets_on_different_devices_give_what_a_loop_gives_and_stay_there(rng):
    x = rng.normal(size=(8, ROWS, WIDTH)).astype(np.float32) * 2.0 ** np.arange(8, dtype=np.float32)[:, None, None]
    where = NamedSharding(mesh_of(8), P("data", None, None))

    @jax.jit
    def solve(x):
        return jaxalign.solve_sigma(x, density=0.2).sigma

    compiled = solve.lower(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)).compile()
    assert "all-gather" not in compiled.as_text()
    sigma = compiled(jax.device_put(x, where))
    loop = np.stack([jaxalign.solve_sigma(each, density=0.2).sigma for each in x])
    assert helpers.relative_error(sigma, loop) < SAME[F32]
    assert {s.data.shape[0] for s in sigma.addressable_shards} == {1}


def test_different_sets_on_different_devices_give_what_a_loop_gives_also_with_explicit_shardings(rng):
    x = rng.normal(size=(8, ROWS, WIDTH)).astype(np.float32)
    batch = jax.device_put(x, NamedSharding(mesh_of(8, "explicit"), P("data", None, None)))
    sigma = jaxalign.solve_sigma(batch, density=0.2).sigma
    loop = np.stack([jaxalign.solve_sigma(each, density=0.2).sigma for each in x])
    assert helpers.relative_error(sigma, loop) < SAME[F32]
    assert {s.data.shape[0] for s in sigma.addressable_shards} == {1}


# --- data_mesh, shard_rows ------------------------------------------------------------------------------------------


def test_a_mesh_of_all_devices_of_so_many_or_of_these():
    every = jax.devices()
    for given, expected in ((None, every), (3, every[:3]), (every[2:4], every[2:4])):
        mesh = data_mesh(given)
        assert mesh.axis_names == ("data",)
        assert mesh.axis_types == (AxisType.Auto,)
        assert list(mesh.devices) == list(expected)
    assert data_mesh(2, axis_name="rows").axis_names == ("rows",)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("devices", [0, -1, 9, True, 2.0, "cpu", np.float32(2)])
def test_a_mesh_of_devices_that_are_not_there(devices):
    words = "devices must be a whole number from 1 to 8, the number of cpu devices, or a list of devices; got"
    with refused(ValueError, words, repr(devices)):
        data_mesh(devices)


@pytest.mark.usefixtures("unchecked_types")
def test_the_number_of_devices_may_be_one_of_numpy():
    assert data_mesh(np.int64(3)) == data_mesh(3)


def test_rows_are_spread_over_the_axis_and_nothing_else_changes(rng):
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    placed = shard_rows(x, data_mesh())
    assert np.array_equal(placed, x)
    assert is_spread(placed)
    assert placed.sharding == NamedSharding(data_mesh(), P(None, "data", None))
    two = Mesh(np.array(jax.devices()).reshape(2, 4), ("model", "data"))
    assert {s.data.shape for s in shard_rows(x, two).addressable_shards} == {(2, ROWS // 4, WIDTH)}
    named = shard_rows(x, two, axis_name="model")
    assert {s.data.shape for s in named.addressable_shards} == {(2, ROWS // 2, WIDTH)}


@pytest.mark.slow
def test_without_a_name_rows_are_spread_over_the_axis_that_mesh_takes(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    for names in (("model", "data"), ("data", "model")):
        mesh = Mesh(np.array(jax.devices()).reshape(2, 4), names)
        assert shard_rows(x, mesh).sharding.spec == P("data", None)
        sigma = jaxalign.solve_sigma(x, plan=Plan(mesh=mesh), density=0.2).sigma
        assert helpers.relative_error(sigma, jaxalign.solve_sigma(x, density=0.2).sigma) < SAME[F32]
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "model"))
    for spread_over in (lambda: shard_rows(x, mesh), lambda: jaxalign.solve_sigma(x, plan=Plan(mesh=mesh))):
        with pytest.raises(
            ValueError, match=r"mesh has no axis 'data', its axes are \('rows', 'model'\)\. Pass .* axis_name="
        ):
            spread_over()


def test_rows_that_do_not_divide_cannot_be_spread(rng):
    x = rng.normal(size=(ODD, WIDTH)).astype(np.float32)
    with pytest.raises(ValueError, match=r"x has 23 rows, not a multiple of the 8 devices.*mask=.*mesh="):
        shard_rows(x, data_mesh())
    with pytest.raises(ValueError, match=r"mesh has no axis 'rows', its axes are \('data',\)"):
        shard_rows(x, data_mesh(), axis_name="rows")


# --- what is refused ------------------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
FUNCTIONS = {
    "solve_sigma": partial(jaxalign.solve_sigma, density=0.2),
    "mean_density": partial(jaxalign.mean_density, sigma=1.0),
    "affinity_operator": partial(jaxalign.affinity_operator, sigma=1.0),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def refused(error, *words):
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


@every_function
@pytest.mark.parametrize("tile_size", [0, -3, 2.5, True, "big"], ids=str)
@pytest.mark.usefixtures("unchecked_types")
def test_a_tile_size_that_is_none(function, tile_size):
    words = "tile_size must be a whole number of rows, at least 1, 'auto', or None for all pairs at once; got"
    with refused(ValueError, words, repr(tile_size)):
        function(X, plan=Plan(tile_size))


@every_function
@pytest.mark.usefixtures("unchecked_types")
def test_a_mesh_that_is_none_or_lacks_the_axis(function):
    for mesh in (np.array(jax.devices()), jax.devices(), "data", 8):
        with refused(TypeError, "mesh must be a jax.sharding.Mesh", f"got {type(mesh).__name__}", "data_mesh()"):
            function(X, plan=Plan(mesh=mesh))
    with refused(ValueError, "mesh has no axis 'rows', its axes are ('data',)", "axis_name="):
        function(X, plan=Plan(mesh=data_mesh(), axis_name="rows"))
    two = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    with refused(ValueError, "mesh has no axis 'data', its axes are ('a', 'b')", "axis_name="):
        function(X, plan=Plan(mesh=two))
    with refused(TypeError, "axis_name must be the name of one axis; got ('a', 'b')"):
        function(X, plan=Plan(mesh=two, axis_name=("a", "b")))


@every_function
def test_a_named_axis_that_is_not_bound(function):
    with refused(ValueError, "axis_name='data' is not bound here", "jax.shard_map", "give Plan a mesh as well"):
        function(X, plan=Plan(axis_name="data"))
    with refused(ValueError, "axis_name='other' is not bound here"):
        jax.vmap(lambda x: function(x, plan=Plan(axis_name="other")), axis_name="data")(X[None])


@every_function
def test_fewer_rows_than_devices(function):
    with refused(ValueError, "x has 7 rows, fewer than the 8 devices along axis 'data'", "a smaller mesh"):
        function(X[:7], plan=Plan(mesh=data_mesh()))
    with refused(ValueError, "y has 3 rows, fewer than the 8 devices along axis 'data'"):
        function(X, X[:3], plan=Plan(mesh=data_mesh()))


@every_function
def test_sides_on_different_meshes(function):
    x, y = shard_rows(X, data_mesh()), shard_rows(X, data_mesh(4))
    with refused(ValueError, "the rows of x and y are sharded over different devices", "shard_rows", "mesh="):
        function(x, y)


@pytest.mark.parametrize("name", ["solve_sigma", "mean_density"])
def test_nan_names_its_row_also_over_a_mesh(name):
    x = X[:ODD].copy()
    x[[19, 22], 2] = np.nan
    function = FUNCTIONS[name]
    with refused(ValueError, "x has nan or inf in 2 row(s), the first is row 19", "mask="):
        function(x, plan=Plan(mesh=data_mesh()))
    if name == "solve_sigma":  # which checks after it solved: what follows would compile two more
        return
    with refused(ValueError, "x has nan or inf in 1 row(s), the first is row 22"):
        function(x, plan=Plan(mesh=data_mesh()), mask=np.arange(ODD) != 19)
    y = shard_rows(np.where(np.arange(ROWS)[:, None] == 21, np.float32(np.inf), X), data_mesh())
    with refused(ValueError, "y has nan or inf in 1 row(s), the first is row 21"):
        function(shard_rows(X, data_mesh()), y)


def test_coincident_samples_are_told_also_over_a_mesh():
    x = X[:ODD].copy()
    x[3:15] = x[3]
    with refused(ValueError, "no sigma found", "samples are duplicates"):
        jaxalign.solve_sigma(x, density=0.2, plan=Plan(mesh=data_mesh()))


# --- what once went wrong -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_row_a_device_with_a_sigma_of_its_own(x64, rng):
    x, v = rng.normal(size=(5, 2)), rng.normal(size=5)
    sigma = np.array([0.5, 1.0, 2.0, 3.0, 4.0])
    mesh = mesh_of(5)
    options = {"density": 0.6, "bandwidth": "per_row"}
    expected = jaxalign.solve_sigma(x, **options).sigma
    helpers.assert_close(jaxalign.solve_sigma(x, **options, plan=Plan(mesh=mesh)).sigma, expected, 1e-12)
    at = {"sigma": sigma, "bandwidth": "per_row"}
    a = jaxalign.rbf_affinity(x, **at)
    operator = jaxalign.affinity_operator(x, **at, plan=Plan(mesh=mesh))
    helpers.assert_close(jaxalign.mean_density(x, **at, plan=Plan(mesh=mesh)), a.mean(), 1e-12)
    helpers.assert_close(operator @ v, a @ v, 1e-12)
    helpers.assert_close(operator.T @ v, a.T @ v, 1e-12)
    alone = jax.vmap(lambda row: jaxalign.solve_sigma(row, plan=Plan(axis_name="i"), **options).sigma, axis_name="i")
    helpers.assert_close(alone(x[:, None])[:, 0], expected, 1e-12)


@pytest.mark.slow
def test_each_device_may_solve_for_a_set_of_its_own_inside_shard_map(x64, rng):
    sets = rng.normal(size=(4, ROWS, 3))

    def own(x):
        return jaxalign.solve_sigma(x, density=0.2).sigma[None], jaxalign.rbf_affinity(x, density=0.2)

    local = jax.shard_map(own, mesh=mesh_of(4), in_specs=P("data"), out_specs=(P("data"), P("data")))
    sigma, affinity = local(sets.reshape(-1, 3))
    for k, x in enumerate(sets):
        helpers.assert_close(sigma[k], jaxalign.solve_sigma(x, density=0.2).sigma, 1e-12)
        helpers.assert_close(affinity[k * ROWS : (k + 1) * ROWS], jaxalign.rbf_affinity(x, density=0.2), 1e-12)


@pytest.mark.slow
def test_rows_that_do_not_divide_over_an_explicit_mesh(x64, rng):
    x, v = rng.normal(size=(ODD, 3)), np.ones(ODD)
    mesh = mesh_of(4, "explicit")
    a = jaxalign.rbf_affinity(x, sigma=1.0)
    operator = jaxalign.affinity_operator(x, sigma=1.0, plan=Plan(mesh=mesh))
    helpers.assert_close(operator @ v, a @ v, 1e-12)
    helpers.assert_close(operator.mean(-1), a.mean(-1), 1e-12)
    options = {"density": 0.2, "bandwidth": "per_row"}
    found = jaxalign.solve_sigma(x, **options, plan=Plan(mesh=mesh)).sigma
    helpers.assert_close(found, jaxalign.solve_sigma(x, **options).sigma, 1e-12)
    spread_rows = spread(mesh, rng.normal(size=(ROWS, 3)))
    dense = jaxalign.affinity_operator(spread_rows, sigma=1.0).degree_normalized().todense()
    alone = jaxalign.affinity_operator(np.asarray(spread_rows), sigma=1.0).degree_normalized().todense()
    helpers.assert_close(dense, alone, 1e-12)


@pytest.mark.slow
def test_a_mask_of_one_device_says_nothing_of_the_others(x64, rng):
    x = rng.normal(size=(4, 6, 3))
    mask = np.arange(6) < 5
    alone = jax.vmap(
        lambda a: jaxalign.solve_sigma(a, plan=Plan(axis_name="i"), mask=mask, density=0.2).sigma, axis_name="i"
    )
    helpers.assert_close(alone(x)[0], jaxalign.solve_sigma(x[:, mask].reshape(-1, 3), density=0.2).sigma, 1e-12)


def test_a_mesh_without_devices_and_a_mesh_inside_shard_map_are_refused(rng):
    x = rng.normal(size=(ROWS, 3)).astype(np.float32)
    mesh = mesh_of(4)
    with pytest.raises(ValueError, match="mesh is an AbstractMesh"):
        jaxalign.solve_sigma(x, density=0.2, plan=Plan(mesh=mesh.abstract_mesh))
    inside = jax.shard_map(
        lambda a: jaxalign.solve_sigma(a, density=0.2, plan=Plan(mesh=mesh)).sigma,
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="'data' is bound by"):
        inside(x)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "tiles"), [(1, 5), (2, 1), (2, 2), (4, 3)])
def test_rings_of_any_length_visit_every_pair_once(x64, devices, tiles, rng):
    # Even rings have tiles opposite each other, which must not be counted from either side.
    size = 2
    x, v = rng.normal(size=(devices * tiles * size, 3)), rng.normal(size=devices * tiles * size)
    a = jaxalign.rbf_affinity(x, sigma=1.0)
    how = {"plan": Plan(size), **({"plan": Plan(mesh=mesh_of(devices))} if devices > 1 else {})}
    helpers.assert_close(jaxalign.affinity_operator(x, sigma=1.0, **how) @ v, a @ v, 1e-12)
    found, slope = jax.jit(jax.value_and_grad(lambda x: jaxalign.mean_density(x, sigma=1.0, **how)))(x)
    helpers.assert_close(found, a.mean(), 1e-12)
    expected = jax.jit(jax.grad(lambda x: jaxalign.rbf_affinity(x, sigma=1.0).mean()))(x)
    helpers.assert_close(slope, expected, 1e-11)
