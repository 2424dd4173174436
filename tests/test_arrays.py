"""Every form in which numbers are handed in: what it becomes, and that distances lose nothing. Types are unchecked."""

from __future__ import annotations

import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype.door import is_bearable

import jaxalign
from jaxalign import _typing, measures
from jaxalign.kernels import RBF

pytestmark = pytest.mark.usefixtures("unchecked_types")

ROWS, WIDTH, MASK = helpers.ROWS, helpers.WIDTH, helpers.MASK
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, ROWS, WIDTH))
FAR = 1e9  # float32 has a spacing of 64 here, float64 one of 1e-7
WHOLE = 1_700_000_000_000 + RNG.integers(0, 5000, (ROWS, WIDTH))  # time stamps in milliseconds
# Of float32 distances between rows that are centered, relative to the largest; the spacing of float64 at FAR adds 1e-7.
ERROR = 2e-6


class ArrayLike:
    """Nothing but __array__."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


class OnlyDlpack:
    """Nothing but dlpack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def frame(array):
    return pytest.importorskip("pandas").DataFrame(array)


FORMS = {
    "float64": lambda x: x,
    "float32": lambda x: x.astype(np.float32),
    "longdouble": lambda x: x.astype(np.longdouble),
    "big-endian": lambda x: x.astype(">f8"),
    "Fortran order": np.asfortranarray,
    "read-only": lambda x: np.broadcast_to(x, x.shape),
    "lists": lambda x: x.tolist(),
    "a list of arrays": list,
    "a tuple of lists": lambda x: tuple(x.tolist()),
    "a list of jax arrays": lambda x: [jnp.asarray(row, jnp.float32) for row in x],
    "a table": frame,
    "a table of columns that may hold missing values": lambda x: frame(x).astype("Float64"),
    "jax": lambda x: jnp.asarray(x, jnp.float32),
    "__array__": ArrayLike,
    "dlpack": lambda x: OnlyDlpack(x.astype(np.float32)),
}


def distances(x, y=None):
    y = x if y is None else y
    return ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_same_numbers(form):
    found = jaxalign.squared_distances(FORMS[form](X))
    assert found.dtype == jnp.float32
    helpers.assert_close(found, distances(X), ERROR)


@pytest.mark.parametrize(
    "numbers", [np.round(9 * X).astype(np.int8), np.round(99 * X).astype(np.int64), X > 0, X.astype(np.float16)],
    ids=lambda x: x.dtype.name,
)  # fmt: skip
@pytest.mark.parametrize("form", ["as it is", "lists", "jax"])
def test_dtypes(numbers, form):
    value = {"as it is": lambda x: x, "lists": lambda x: x.tolist(), "jax": jnp.asarray}[form](numbers)
    helpers.assert_close(jaxalign.squared_distances(value), distances(numbers.astype(np.float64)), ERROR)


@pytest.mark.parametrize("form", ["float64", "longdouble", "big-endian", "lists", "a table", "__array__"])
def test_an_offset_costs_distances_nothing(form):
    helpers.assert_close(jaxalign.squared_distances(FORMS[form](X + FAR)), distances(X), ERROR)


def test_whole_numbers_that_float32_does_not_hold():
    expected = distances((WHOLE - WHOLE[0]).astype(np.float64))
    for value in (WHOLE, WHOLE.tolist(), frame(WHOLE)):
        helpers.assert_close(jaxalign.squared_distances(value), expected, ERROR)
    small = (WHOLE - WHOLE.min() + 2**30).astype(np.int32)
    helpers.assert_close(jaxalign.squared_distances(jnp.asarray(small)), expected, ERROR)


def test_two_sides_are_shifted_alike():
    expected = distances(X, Y[:9])
    for x, y in (
        (X + FAR, Y[:9] + FAR),
        ((X + FAR).tolist(), frame(Y[:9] + FAR)),
        (np.stack([X + FAR]), Y[:9] + FAR),
        (X + FAR, np.stack([Y[:9] + FAR])),
    ):
        helpers.assert_close(np.squeeze(jaxalign.squared_distances(x, y)), expected, ERROR)
    # One in float32 too, which has rounded it already, so that it must be near 0.
    helpers.assert_close(jaxalign.squared_distances(X + 100, (Y[:9] + 100).astype(np.float32)), expected, 1e-4)
    helpers.assert_close(jaxalign.squared_distances(X, jnp.asarray(Y[:9], jnp.float32)), expected, ERROR)
    helpers.assert_close(jaxalign.squared_distances(jnp.asarray(X, jnp.float32), Y[:9]), expected, ERROR)


def test_each_representation_of_a_batch_is_shifted_by_its_own_mean():
    batch = np.stack([X + FAR, Y - 2 * FAR])
    helpers.assert_close(jaxalign.squared_distances(batch), distances(np.stack([X, Y])), ERROR)


@pytest.mark.parametrize("rest", [1e30, 1e300, np.nan, np.inf])
def test_what_masked_rows_hold_does_not_count(rest):
    expected = jaxalign.solve_sigma(X[MASK].astype(np.float32), density=0.2).sigma
    x = np.where(MASK[:, None], X + FAR, rest)
    for mask in (MASK, MASK.tolist(), jnp.asarray(MASK)):
        helpers.assert_close(jaxalign.solve_sigma(x, density=0.2, mask=mask).sigma, expected, 1e-5)
    sigmas = jaxalign.solve_sigma(np.stack([x, x]), density=0.2, mask=np.stack([MASK, MASK & (np.arange(ROWS) < 20)]))
    helpers.assert_close(sigmas.sigma[0], expected, 1e-5)
    shared = jaxalign.solve_sigma(x, density=0.2, mask=MASK, diagonal="exclude").sigma
    assert np.isfinite(shared)


def test_a_traced_mask_leaves_offsets_alone_and_says_so():
    solve = jax.jit(lambda mask: jaxalign.solve_sigma(X, density=0.2, mask=mask).sigma)
    expected = jaxalign.solve_sigma(X.astype(np.float32), density=0.2, mask=MASK).sigma
    helpers.assert_close(solve(MASK), expected, 1e-5)
    with pytest.raises(ValueError, match="x is float64 and far from 0"):
        jax.jit(lambda mask: jaxalign.solve_sigma(X + FAR, density=0.2, mask=mask).sigma)(MASK)


def test_inside_a_trace():
    inside = jax.jit(lambda scale: jaxalign.squared_distances(X + FAR) * scale)(1.0)
    helpers.assert_close(inside, distances(X), ERROR)
    rows = jax.jit(lambda x: jaxalign.squared_distances([x[k] for k in range(ROWS)]))(X.astype(np.float32))
    helpers.assert_close(rows, distances(X), ERROR)
    whole = jax.jit(jaxalign.squared_distances)(np.round(99 * X).astype(np.int32))
    helpers.assert_close(whole, distances(np.round(99 * X)), ERROR)


@pytest.mark.usefixtures("x64")
def test_with_64_bits_float64_stays_as_it_is():
    found = jaxalign.squared_distances(X + FAR)
    assert found.dtype == jnp.float64
    helpers.assert_close(found, distances(X + FAR), 1e-13)
    for value in (WHOLE, WHOLE.tolist()):
        helpers.assert_close(jaxalign.squared_distances(value), distances(WHOLE.astype(np.float64)), 1e-13)
    assert jaxalign.squared_distances(X.astype(np.float32)).dtype == jnp.float32
    assert jaxalign.squared_distances(X.astype(np.longdouble)).dtype == jnp.float64


# --- where rows mean something relative to the origin -----------------------------------------------------------------


def test_directions_are_not_shifted():
    x, y = X + 3, Y + 3
    for metric in ("cosine", "correlation"):
        found, expected = (
            measures.mutual_knn(a, b, 5, metric=metric)
            for a, b in ((x, y), (x.astype(np.float32), y.astype(np.float32)))
        )
        assert found == expected
    expected = measures.rsa(x.astype(np.float32), y.astype(np.float32), metric="cosine")
    helpers.assert_close(measures.rsa(x, y, metric="cosine"), expected, 1e-6)
    with pytest.raises(ValueError, match=re.escape("x is float64 and far from 0: float32 would round away")):
        measures.mutual_knn(X + FAR, Y, 5)
    assert measures.mutual_knn(X + FAR, Y - FAR, 5, metric="euclidean") == measures.mutual_knn(
        X, Y, 5, metric="euclidean"
    )


KERNEL = RBF(density=0.2)
MEASURES = {
    "cka": {"kernel": KERNEL}, "hsic": {"kernel": KERNEL}, "rsa": {}, "distance_correlation": {}, "procrustes": {},
    "shape_distance": {}, "cca": {}, "pwcca": {}, "svcca": {}, "linear_predictivity": {},
    "affinity_distance": {"kernel": KERNEL},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_differences_are_shifted(name):
    # A distance of nearly equal shapes is a difference of nearly equal numbers: an absolute error.
    found = jaxalign.compare(frame(X + FAR), (Y - FAR).tolist(), name, **MEASURES[name])
    expected = jaxalign.compare(X.astype(np.float32), Y.astype(np.float32), name, **MEASURES[name])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_losses_are_shifted_unless_a_queue_holds_other_samples():
    loss = jaxalign.losses.alignment_loss
    x, y = X.astype(np.float32), Y.astype(np.float32)
    helpers.assert_close(loss(X + FAR, Y), loss(x, y), 1e-5)
    queue = jaxalign.losses.FeatureQueue.empty(8, WIDTH, WIDTH).push(X[:8].tolist(), Y[:8])
    found, expected = (loss(a, b, queue=queue) for a, b in ((X, Y), (x, y)))
    helpers.assert_close(found, expected, 1e-6)
    with pytest.raises(ValueError, match="x is float64 and far from 0"):
        loss(X + FAR, Y, queue=queue)


# --- what is fitted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, "standardize"])
def test_new_samples_of_an_alignment_are_shifted_as_the_fitted_ones(channels):
    options = {"landmarks": np.arange(0, ROWS, 2), "density": 0.3, "channels": channels}
    near = jaxalign.align({"a": X.astype(np.float32)}, **options)
    far = jaxalign.align({"a": frame(X + FAR)}, **options)
    helpers.assert_close(far.features["a"], near.features["a"], 1e-5)
    for new in (X[:5] + FAR, (X[:5] + FAR).tolist()):
        helpers.assert_close(far.transform("a", new), near.features["a"][:5], 1e-5)
    # An alignment that has been through a program, and samples of jax, where the fitted ones were shifted a little.
    shifted = jax.tree.map(lambda a: a, jaxalign.align({"a": X + 8}, **options))
    inside = jax.jit(lambda alignment, x: alignment.transform("a", x))(shifted, (X[:5] + 8).astype(np.float32))
    helpers.assert_close(inside, near.features["a"][:5], 1e-4)
    helpers.assert_close(near.transform("a", X[:5]), near.features["a"][:5], 1e-5)


def test_new_samples_of_a_cut_are_shifted_as_the_fitted_ones():
    near = jaxalign.normalized_cut(X.astype(np.float32), 3, density=0.3)
    far = jaxalign.normalized_cut(X + FAR, 3, density=0.3)
    helpers.assert_close(far.eigenvectors, near.eigenvectors, 1e-4)
    helpers.assert_close(far.transform(X[:5] + FAR), near.eigenvectors[:5], 1e-4)
    masked = jaxalign.normalized_cut(np.where(MASK[:, None], X + FAR, 1e30), 3, density=0.3, mask=MASK.tolist())
    assert np.isfinite(masked.transform(X[:5] + FAR)).all()


def test_an_affinity_is_not_shifted():
    affinity = np.asarray(jaxalign.rbf_affinity(X, density=0.3), np.float64)
    found, expected = (jaxalign.normalized_cut(a, 3) for a in (affinity, affinity.astype(np.float32)))
    np.testing.assert_array_equal(found.eigenvalues, expected.eigenvalues)


# --- grids and files --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grids_of_tables_and_of_files(tmp_path):
    np.save(tmp_path / "b.npy", Y + FAR)
    small = {"a": X.astype(np.float32), "b": Y.astype(np.float32)}
    for measure, options in (("cka", {"kernel": KERNEL}), ("procrustes", {})):
        expected = jaxalign.compare_grid(small, measure=measure, **options).values
        for features in ({"a": frame(X - FAR), "b": (Y + FAR).tolist()}, {"a": X, "b": tmp_path / "b.npy"}):
            found = jaxalign.compare_grid(features, measure=measure, **options)
            np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=2e-3 if measure != "cka" else 1e-5)
    with pytest.raises(ValueError, match="float64 and far from 0"):
        jaxalign.compare_grid({"b": tmp_path / "b.npy"}, measure="rsa", metric="cosine")


def test_resampling_takes_tables_and_lists():
    x, y = frame(X + FAR), (X + 0.5 * Y - FAR).tolist()
    test = jaxalign.permutation_test(x, y, key=jax.random.key(0), permutations=19, kernel="linear")
    assert test.p_value == 0.05
    same = jaxalign.noise_ceiling([x, y, X], "rsa")
    assert 0 < same.lower < same.upper < 1


# --- on devices -------------------------------------------------------------------------------------------------------


def test_whole_numbers_over_devices():
    mesh = jaxalign.sharding.data_mesh(2)
    small = np.round(99 * X).astype(np.int32)
    found = jaxalign.solve_sigma(jaxalign.sharding.shard_rows(small, mesh), density=0.2)
    helpers.assert_close(found.sigma, jaxalign.solve_sigma(small, density=0.2).sigma, 1e-5)
    with pytest.raises(ValueError, match=r"x is int32 and reaches 1.07e\+09, where float32 rounds integers"):
        jaxalign.solve_sigma(jaxalign.sharding.shard_rows(small + 2**30, mesh), density=0.2)


def test_rows_are_spread_in_the_dtype_of_the_computation():
    mesh = jaxalign.sharding.data_mesh(2)
    assert jaxalign.sharding.shard_rows(frame(X), mesh).dtype == jnp.float32
    assert jaxalign.sharding.shard_rows(X.astype(np.float16), mesh).dtype == jnp.float16
    with pytest.raises(ValueError, match="x is float64 and far from 0"):
        jaxalign.sharding.shard_rows(X + FAR, mesh)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks():
    pd = pytest.importorskip("pandas")
    expected = jaxalign.solve_sigma(X, density=0.2, mask=MASK).sigma
    for mask in (MASK.tolist(), tuple(MASK), pd.Series(MASK), pd.Series(MASK).astype("boolean"), jnp.asarray(MASK)):
        assert jaxalign.solve_sigma(X, density=0.2, mask=mask).sigma == expected
        assert np.isfinite(measures.cka(X, Y, mask=mask))
    missing = pd.Series(MASK).astype("boolean").where(MASK)
    for mask in (MASK.astype(int), MASK.astype(int).tolist(), missing):
        with pytest.raises(TypeError, match="mask must be boolean"):
            jaxalign.solve_sigma(X, density=0.2, mask=mask)


# --- what is refused of tables ----------------------------------------------------------------------------------------


def test_columns_without_numbers_are_named():
    pd = pytest.importorskip("pandas")
    table = frame(X).rename(columns=str)
    for more, words in (
        ({"name": "a"}, "column 'name' of"),
        ({"day": pd.Timestamp("2024-01-01")}, "column 'day' of datetime64"),
        ({"z": 1j}, "complex"),
        ({f"c{k}": "a" for k in range(9)}, ", and 3 more"),
        ({"k": pd.array([1, None] * 12, dtype="Int64")}, "missing values. x.to_numpy"),
    ):
        with pytest.raises(TypeError, match=re.escape(words)):
            jaxalign.solve_sigma(table.assign(**more), density=0.2)
    assert jaxalign.solve_sigma(table.assign(flag=X[:, 0] > 0), density=0.2).sigma > 0


# --- types that are checked at run time -------------------------------------------------------------------------------


def test_annotations_let_through_what_is_converted():
    for kind in (_typing.Numbers[_typing.Data, "n d"], _typing.Mask[_typing.Data, "n d"]):
        for value in ([[1.0]], (1, 2), frame(X), ArrayLike(X)):
            assert is_bearable(value, kind)
        for value in (X[0], X + 1j, {"a": 1}, "a", None):
            assert not is_bearable(value, kind)
    assert is_bearable(X, _typing.Numbers[_typing.Data, "n d"])
    assert is_bearable(X > 0, _typing.Mask[_typing.Data, "n d"])
    assert not is_bearable(X, _typing.Mask[_typing.Data, "n d"])
