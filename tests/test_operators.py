"""AffinityOperator: what a matrix of `rbf_affinity` gives, without the matrix."""

from __future__ import annotations

import re
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as P

import jaxalign
from jaxalign import Plan
from jaxalign.sharding import data_mesh, shard_rows

ROWS, OTHER_ROWS, WIDTH, MASK = helpers.ROWS, helpers.OTHER_ROWS, helpers.WIDTH, helpers.MASK
ODD = ROWS - 1
BY_ROW = np.linspace(0.8, 3, ODD).astype(np.float32)
# The entries agree to 2e-6 (helpers.tolerance); sums over a row of them, against the largest sum, do too.
RTOL = helpers.tolerance(np.float32).value

# setting of helpers; how sigma comes about; how pairs are visited. All of 23 rows.
OPERATORS = {
    "density": ("include", {"density": 0.2}, {"plan": Plan(4)}),
    "given sigma, all at once": ("include", {"sigma": 1.5}, {"plan": Plan(None)}),
    "density by row, zero diagonal": (
        "masked exclude",
        {"density": 0.2, "bandwidth": "per_row", "zero_diagonal": True},
        {"plan": Plan(7)},
    ),
    "rectangular by row": ("masked rectangular", {"sigma": BY_ROW, "bandwidth": "per_row"}, {"plan": Plan(4)}),
    "rectangular by row, 8 devices": ("masked rectangular", {"sigma": BY_ROW, "bandwidth": "per_row"}, {"devices": 8}),
    "masked zero diagonal, 3 devices": (
        "masked include",
        {"sigma": 1.5, "zero_diagonal": True},
        {"devices": 3},
    ),
    "batch": ("batch", {"sigma": np.array([1.0, 2.0], np.float32)}, {"plan": Plan(8)}),
}


def operator_of(name, rng):
    """The operator, the matrix from its definition (at the operator's sigma), and the pairs that count."""
    setting, of_sigma, visit = OPERATORS[name]
    x, options = helpers.problem("include" if setting == "batch" else setting, helpers.gaussian(rng), np.float32)
    x = np.stack([x[:ODD], x[1:]]) if setting == "batch" else x[:ODD]
    if "mask" in options:
        options["mask"] = MASK[:ODD]
    if "devices" in visit:
        visit = {"plan": Plan(mesh=data_mesh(visit["devices"]))}
    a = jaxalign.affinity_operator(x, **options, **of_sigma, **visit)
    options.pop("diagonal", None)
    zero = of_sigma.get("zero_diagonal", False)
    sets = zip(x, np.asarray(a.sigma), strict=True) if setting == "batch" else [(x, np.asarray(a.sigma))]
    dense = [reference.rbf_affinity(x, sigma=sigma, zero_diagonal=zero, **options) for x, sigma in sets]
    rows = options.get("mask", np.ones(ODD, bool))
    counted = np.outer(rows, options.get("mask_y", np.ones(OTHER_ROWS, bool)) if "y" in options else rows)
    if zero:
        counted &= ~np.eye(ODD, dtype=bool)
    return a, np.stack(dense) if setting == "batch" else dense[0], counted


def each(*names):
    return pytest.mark.parametrize("name", names or list(OPERATORS))


# --- a matrix that is not there -------------------------------------------------------------------------------------


@pytest.mark.slow
@each()
def test_products_sums_and_means_are_those_of_the_matrix(name, rng):
    a, dense, _ = operator_of(name, rng)
    assert a.shape == dense.shape
    assert a.T.shape == (*dense.shape[:-2], *dense.shape[:-3:-1])
    assert a.ndim == dense.ndim
    assert a.dtype == np.float32
    v, w = (rng.normal(size=size).astype(np.float32) for size in dense.shape[:-3:-1])
    helpers.assert_close(a @ v, dense @ v, RTOL, np.abs(dense).sum(-1).max())
    helpers.assert_close(a.T @ w, w @ dense, RTOL, np.abs(dense).sum(-2).max())
    assert np.array_equal(w @ a, a.T @ w)
    assert np.array_equal(a.T.T @ v, a @ v)

    helpers.assert_close(a.sum(), dense.sum((-2, -1)), RTOL)
    for axis in (-1, -2):
        helpers.assert_close(a.sum(axis), dense.sum(axis), RTOL)
        assert np.array_equal(a.sum(axis), a.sum(axis + dense.ndim))
        assert np.array_equal(a.T.sum(axis), a.sum(-3 - axis))


@pytest.mark.slow
@each("density by row, zero diagonal", "rectangular by row", "masked zero diagonal, 3 devices")
def test_means_are_over_the_pairs_that_count(name, rng):
    a, dense, counted = operator_of(name, rng)
    helpers.assert_close(a.mean(), dense.sum() / counted.sum(), RTOL)
    for axis in (-1, -2):
        helpers.assert_close(a.mean(axis), dense.sum(axis) / np.maximum(counted.sum(axis), 1), RTOL)


@pytest.mark.slow
@each()
def test_the_stored_matrix_and_its_diagonal(name, rng):
    a, dense, _ = operator_of(name, rng)
    helpers.assert_close(a.todense(), dense, RTOL)
    helpers.assert_close(a.T.todense(), np.swapaxes(dense, -1, -2), RTOL)
    if a.y is None:
        helpers.assert_close(a.diagonal(), np.diagonal(dense, axis1=-2, axis2=-1), RTOL, 1)


@each("batch")
def test_products_with_matrices(name, rng):
    a, dense, _ = operator_of(name, rng)
    n, m = dense.shape[-2:]
    for batch in ((), dense.shape[:-2]):
        v, w = rng.normal(size=(*batch, m, 2)).astype(np.float32), rng.normal(size=(*batch, 2, n)).astype(np.float32)
        helpers.assert_close(a @ v, dense @ v, RTOL, dense.sum(-1).max())
        helpers.assert_close(w @ a, w @ dense, RTOL, dense.sum(-2).max())


@each("density by row, zero diagonal", "rectangular by row")
def test_selected_rows_are_those_of_the_matrix(name, rng):
    a, dense, _ = operator_of(name, rng)
    index = np.array([3, 0, 3, -1])
    helpers.assert_close(a.rows(index), dense[..., index, :], RTOL, 1)
    helpers.assert_close(a.T.rows(index), np.swapaxes(dense, -1, -2)[..., index, :], RTOL, 1)


def normalised(dense):
    def root(degrees):
        return np.where(degrees > 0, 1 / np.sqrt(np.where(degrees > 0, degrees, 1)), 0)

    return root(dense.sum(-1))[..., :, None] * dense * root(dense.sum(-2))[..., None, :]


@pytest.mark.slow
@each("rectangular by row", "masked zero diagonal, 3 devices")
def test_degree_normalized_is_the_matrix_over_the_roots_of_its_sums(name, rng):
    a, dense, _ = operator_of(name, rng)
    expected = normalised(dense.astype(np.float64))
    normal = a.degree_normalized()
    v, w = (rng.normal(size=size).astype(np.float32) for size in dense.shape[::-1])
    helpers.assert_close(normal @ v, expected @ v, 2 * RTOL, expected.sum(-1).max())
    helpers.assert_close(normal.T @ w, w @ expected, 2 * RTOL, expected.sum(-2).max())
    helpers.assert_close(normal.todense(), expected, 2 * RTOL)
    helpers.assert_close(normal.T.todense(), expected.T, 2 * RTOL)
    if name == "rectangular by row":
        helpers.assert_close(normal.rows(np.array([2, 0])), expected[[2, 0]], 2 * RTOL)
        helpers.assert_close(normal.T.rows(np.array([2, 0])), expected.T[[2, 0]], 2 * RTOL)
    if a.y is None:
        helpers.assert_close(normal.diagonal(), np.diagonal(expected), 2 * RTOL, 1)


def test_the_root_of_the_degrees_is_the_first_eigenvector_of_a_degree_normalized_operator(rng):
    x = rng.normal(size=(ODD, WIDTH)).astype(np.float32)
    a = jaxalign.affinity_operator(x, density=0.2, plan=Plan(4))
    root = jnp.sqrt(a.sum(-1))
    helpers.assert_close(a.degree_normalized() @ root, root, 2 * RTOL)


@each("density", "density by row, zero diagonal")
def test_sigma_is_that_of_solve_sigma(name, rng):
    setting, of_sigma, visit = OPERATORS[name]
    a, _, _ = operator_of(name, rng)
    options = {key: value for key, value in of_sigma.items() if key != "zero_diagonal"}
    if "mask" in helpers.SETTINGS[setting]:
        options["mask"] = MASK[:ODD]
    expected = jaxalign.solve_sigma(a.x, diagonal=helpers.SETTINGS[setting]["diagonal"], **options, **visit).sigma
    assert np.array_equal(a.sigma, expected, equal_nan=True)


def test_the_mean_is_the_density_that_was_asked_for(rng):
    a, _, _ = operator_of("density", rng)
    assert helpers.relative_error(a.mean(), np.asarray(0.2)) < helpers.tolerance(np.float32).density


def test_tight_clusters_far_apart(rng):
    x = helpers.clusters(rng)[:ODD].astype(np.float32)
    expected = reference.rbf_affinity(x, sigma=2.0)
    a = jaxalign.affinity_operator(x, sigma=2.0, plan=Plan(4))
    helpers.assert_close(a.sum(-1), expected.sum(-1), 1e-5)
    helpers.assert_close(a.rows(np.arange(3)), expected[:3], 1e-5)


def test_a_row_of_small_sigma_far_away_does_not_blur_the_distances_of_others():
    x = np.array([[-1000.1, 3.3], [1000.1, -7.7], [1001.37, -6.3], [1003.7, -9.1]], np.float32)
    sigma = np.array([1e-3, 2, 2, 2], np.float32)
    expected = reference.rbf_affinity(x, sigma=sigma)
    a = jaxalign.affinity_operator(x, sigma=sigma, bandwidth="per_row")
    helpers.assert_close(a.rows(np.arange(4)), expected, 1e-5)
    helpers.assert_close(a @ np.ones(4, np.float32), expected.sum(-1), 1e-5)
    helpers.assert_close(a.T @ np.ones(4, np.float32), expected.sum(-2), 1e-5)


# --- over devices ---------------------------------------------------------------------------------------------------


def test_rows_that_are_spread_already_give_products_that_are_spread(rng):
    x, v = rng.normal(size=(ROWS, WIDTH)).astype(np.float32), rng.normal(size=ROWS).astype(np.float32)
    a = jaxalign.affinity_operator(shard_rows(x, data_mesh()), sigma=1.5)
    product = a @ v
    helpers.assert_close(product, reference.rbf_affinity(x, sigma=1.5) @ v, RTOL, 3)
    assert {s.data.shape for s in product.addressable_shards} == {(ROWS // 8,)}


def inside_shard_map(local, x, *out_specs):
    return jax.jit(jax.shard_map(local, mesh=data_mesh(), in_specs=P("data"), out_specs=out_specs))(x)


def test_inside_shard_map_vectors_are_this_devices_rows(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)

    def local(x):
        a = jaxalign.affinity_operator(x, sigma=1.5, plan=Plan(axis_name="data"))
        return a @ x[:, 0], a.diagonal()

    dense = reference.rbf_affinity(x, sigma=1.5)
    product, diagonal = inside_shard_map(local, x, P("data"), P("data"))
    helpers.assert_close(product, dense @ x[:, 0], RTOL, 3)
    np.testing.assert_array_equal(diagonal, 1)


@pytest.mark.slow
def test_inside_shard_map_sums_and_means_are_those_of_all_devices(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)

    def local(x):
        a = jaxalign.affinity_operator(x, sigma=1.5, plan=Plan(axis_name="data"))
        return a.sum(), a.mean(), a.sum(-1)

    dense = reference.rbf_affinity(x, sigma=1.5)
    expected = dense.sum(), dense.mean(), dense.sum(-1)
    for found, value in zip(inside_shard_map(local, x, P(), P(), P("data")), expected, strict=True):
        helpers.assert_close(found, value, RTOL)


# --- transformations ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_operator_is_a_pytree(rng):
    v = rng.normal(size=ODD).astype(np.float32)
    a = operator_of("density", rng)[0].degree_normalized()
    leaves, structure = jax.tree.flatten(a)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert again.shape == a.shape
    assert np.array_equal(again @ v, a @ v)
    returned = jax.jit(lambda a: a.T)(a)
    assert returned.transposed
    assert returned.plan == a.plan
    helpers.assert_close(returned @ v, a @ v, 2 * RTOL, 3)  # symmetric


@pytest.mark.slow
def test_jit_and_vmap_give_what_a_loop_gives(rng):
    x, v = rng.normal(size=(2, ODD, WIDTH)).astype(np.float32), rng.normal(size=(2, ODD)).astype(np.float32)

    def product(x, v):
        return jaxalign.affinity_operator(x, sigma=1.5, plan=Plan(4)) @ v

    found = jax.jit(jax.vmap(product))(x, v)
    for i in range(2):
        expected = reference.rbf_affinity(x[i], sigma=1.5) @ v[i]
        helpers.assert_close(found[i], expected, RTOL, 10)
    batch = jaxalign.affinity_operator(x, sigma=np.array([1.0, 2.0], np.float32), plan=Plan(8))
    helpers.assert_close(jax.vmap(lambda a, v: a @ v)(batch, v), (batch @ v[..., None])[..., 0], RTOL, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiles", "transposed, 3 devices"])
@pytest.mark.usefixtures("x64")
def test_first_and_second_derivatives_are_those_of_the_matrix(name, rng):
    transposed = name != "tiles"
    x, options = helpers.problem(
        "rectangular" if transposed else "masked include", rng.normal(size=(33, 5)), np.float64
    )
    args = {"x": x[:ODD], "w": rng.normal(size=ODD)}
    if transposed:
        args |= {"y": options.pop("y"), "sigma": np.linspace(0.8, 3, ODD), "v": rng.normal(size=OTHER_ROWS)}
        options["bandwidth"] = "per_row"
    else:
        options = {"mask": MASK[:ODD]}
        args |= {"sigma": np.asarray(1.5), "v": rng.normal(size=ODD)}
    u = helpers.direction(rng, args)

    def of_matrix(args):
        args = dict(args)
        v, w = args.pop("v"), args.pop("w")
        return w @ jaxalign.rbf_affinity(**args, **options) @ v

    def of_operator(args):
        args = dict(args)
        v, w = args.pop("v"), args.pop("w")
        visit = {"plan": Plan(mesh=data_mesh(3))} if transposed else {"plan": Plan(4)}
        a = jaxalign.affinity_operator(**args, **options, **visit)
        return v @ (a.T @ w) if transposed else w @ (a @ v)

    def derivatives(fn):
        return jax.jit(lambda args, u: jax.jvp(jax.grad(fn), (args,), (u,)))(args, u)

    for found, expected in zip(derivatives(of_operator), derivatives(of_matrix), strict=True):
        for key in args:
            helpers.assert_close(found[key], expected[key], 1e-11)


def test_conjugate_gradients_take_the_operator_as_it_is(rng):
    x, b = rng.normal(size=(ODD, WIDTH)).astype(np.float32), rng.normal(size=ODD).astype(np.float32)
    a = jaxalign.affinity_operator(x, sigma=0.7, plan=Plan(4))  # next to the identity: well conditioned
    z, _ = jax.scipy.sparse.linalg.cg(a, jnp.asarray(b), tol=1e-6)
    helpers.assert_close(z, np.linalg.solve(reference.rbf_affinity(x, sigma=0.7), b), 1e-4)


def test_nan_in_the_features_of_a_trace_makes_every_product_nan(rng):
    x = rng.normal(size=(ODD, WIDTH)).astype(np.float32)
    x[7, 2] = np.nan
    product = jax.jit(lambda x: jaxalign.affinity_operator(x, sigma=1.5, plan=Plan(None)).sum(-1))(x)
    assert np.all(np.isnan(product))


# --- what is refused ------------------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(ODD, WIDTH)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(OTHER_ROWS, WIDTH)).astype(np.float32)


def refused(error, *words):
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


@pytest.fixture
def square():
    return jaxalign.affinity_operator(X, sigma=1.5)


@pytest.fixture
def rectangular():
    return jaxalign.affinity_operator(X, Y, sigma=1.5)


def test_a_vector_of_the_wrong_length(rectangular):
    with refused(ValueError, "v has 23 rows in shape (23, 1), the operator (23, 9) has 9 columns"):
        rectangular @ np.ones(ODD, np.float32)
    with refused(ValueError, "v has 9 rows in shape (9, 2), the operator (9, 23) has 23 columns"):
        np.ones((2, OTHER_ROWS), np.float32) @ rectangular
    with refused(ValueError, "v has 1 rows in shape (1, 2)"):
        rectangular @ np.ones((1, 2), np.float32)


def test_a_vector_that_is_none(square):
    for v in (2.0, np.ones(ODD, np.complex64)):
        with refused(TypeError, "v must be a real vector or matrix"):
            square @ v
        with refused(TypeError, "v must be a real vector or matrix"):
            v @ square


def test_rows_that_are_not_there(square, rectangular):
    for index in ([0, ODD], [-ODD - 1, 2]):
        with refused(ValueError, f"index ranges from {min(index)} to {max(index)}, but there are 23 rows"):
            square.rows(np.array(index))
    with refused(ValueError, "there are 9 rows"):
        rectangular.T.rows(np.array([OTHER_ROWS]))


def test_rows_that_are_spread_over_devices_cannot_be_selected():
    a = jaxalign.affinity_operator(X, sigma=1.5, plan=Plan(mesh=data_mesh()))
    with refused(NotImplementedError, "rows() of an operator whose rows are sharded over devices", "(a.T @ e).T"):
        a.rows(np.array([0]))


def test_a_matrix_inside_shard_map():
    def local(x):
        return jaxalign.affinity_operator(x, sigma=1.5, plan=Plan(axis_name="data")).todense()

    with refused(ValueError, "todense() inside shard_map", "only its own rows"):
        jax.vmap(local, axis_name="data")(X[None])


def test_a_diagonal_needs_one_side(rectangular):
    with refused(ValueError, "diagonal() has no meaning with y"):
        rectangular.diagonal()
    with refused(ValueError, "zero_diagonal=True has no meaning with y"):
        jaxalign.affinity_operator(X, Y, sigma=1.5, zero_diagonal=True)


@pytest.mark.parametrize("axis", [2, -3, 7])
def test_an_axis_that_is_not_there(square, axis):
    for method in (square.sum, square.mean):
        with refused(ValueError, "axis must be None, -1 (each row) or -2 (each column)"):
            method(axis)


def test_degrees_are_normalised_once(square):
    with refused(ValueError, "the operator is already scaled"):
        square.degree_normalized().degree_normalized()


@pytest.mark.usefixtures("unchecked_types")
def test_features_sigma_and_options_are_checked_as_everywhere():
    build = partial(jaxalign.affinity_operator, X)
    for options, error, words in (
        ({"sigma": -1.0}, ValueError, "sigma must be finite and above 0"),
        ({"sigma": np.ones(3, np.float32)}, ValueError, "sigma of shape (3,) does not broadcast"),
        ({"density": 1.5}, ValueError, "density must lie strictly between 0 and 1"),
        ({"density": 0.01}, ValueError, "density = 0.01 cannot be reached with n = 23 samples"),
        ({"bandwidth": "row"}, ValueError, "bandwidth must be one of"),
        ({"mask": np.ones(3, bool)}, ValueError, "mask has shape (3,), expected (23,)"),
        ({"mask_y": MASK}, ValueError, "mask_y needs y"),
    ):
        with refused(error, words):
            build(**options)
    x = X.copy()
    x[7, 2] = np.nan
    for options in ({"density": 0.2}, {"sigma": 1.5}):
        with refused(ValueError, "x has nan or inf in 1 row(s), the first is row 7"):
            jaxalign.affinity_operator(x, **options)


@pytest.mark.usefixtures("unchecked_types")
def test_rows_are_selected_by_number(square):
    assert square.rows(np.array([], int)).shape == (0, square.shape[-1])
    with pytest.raises(TypeError, match="flatnonzero"):
        square.rows(np.ones(square.shape[-1], bool))
    with pytest.raises(TypeError, match=r"shape \(k,\)"):
        square.rows(3)
