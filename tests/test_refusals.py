"""What measures, grids, losses, cuts, pictures and files refuse, with the words that say what to do.

Features, masks, sigma and density, which all functions share: test_bad_input. Run-time type checks are off, as for
users.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign import Plan, inference, io, losses, measures, plots
from jaxalign._repr import shown
from jaxalign.interop import capture_features
from jaxalign.interop._networks import _describe
from jaxalign.kernels import RBF

pytestmark = pytest.mark.usefixtures("unchecked_types")

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 12, 3)).astype(np.float32)
MASK = np.arange(12) < 9
AFFINITY = np.asarray(np.exp(-np.abs(np.subtract.outer(np.arange(12), np.arange(12)))), np.float32)


def grid(**more):
    return jaxalign.compare_grid({"a": X, "b": Y}, kernel="linear", **more)


def two_grids():
    return jaxalign.compare_grid({"a": X}, {"b": Y}, kernel="linear")


REFUSED = {
    "batches": (
        lambda: measures.cka(np.stack([X] * 2), np.stack([Y] * 3)),
        ValueError, "batch dimensions do not broadcast: x (2, 12, 3), y (3, 12, 3)",
    ),
    "sigmas": (
        lambda: measures.cka(X, Y, RBF((1.0, 2.0, 3.0))),
        ValueError, "one for each of the 2 representations; got 3",
    ),
    "no batches": (lambda: measures.minibatch_cka([]), ValueError, "batches is empty"),
    "k": (lambda: measures.mutual_knn(X, Y, k=0), ValueError, "k must be"),
    "folds": (
        lambda: measures.linear_predictivity(X, Y, folds=1), ValueError, "folds must be a whole number, at least 2",
    ),
    "components": (lambda: measures.svcca(X, Y, num_components=1.5), ValueError, "components must be a whole number"),
    "rows of a queue": (
        lambda: losses.FeatureQueue.empty(8, 3, 3).push(X, Y[:5]), ValueError, "12 and 5 rows",
    ),
    "layers": (lambda: losses.multi_layer_loss([X], [Y]), TypeError, "x must be features by name"),
    "no devices": (lambda: jaxalign.sharding.data_mesh([]), ValueError, "devices is empty"),
    "devices": (lambda: jaxalign.sharding.data_mesh("2"), ValueError, "devices must be"),
    "rows to be spread": (
        lambda: jaxalign.sharding.shard_rows({"a": X}, jaxalign.sharding.data_mesh(2)), TypeError, "got dict",
    ),
    "a vector to be spread": (
        lambda: jaxalign.sharding.shard_rows(X[0], jaxalign.sharding.data_mesh(2)), TypeError, "got shape (3,)",
    ),
    "a directed affinity": (
        lambda: jaxalign.normalized_cut(np.triu(AFFINITY), 2, kind="affinity"), ValueError, "is not symmetric",
    ),
    "a signed affinity": (
        lambda: jaxalign.normalized_cut(-AFFINITY, 2, kind="affinity"), ValueError, "has negative entries",
    ),
    "nystroem at given sigmas": (
        lambda: jaxalign.normalized_cut(X, 2, method="nystroem", bandwidth="per_row", sigma=np.ones(len(X))),
        ValueError, 'or bandwidth="per_row"',
    ),
    "nystroem under a trace": (
        lambda: jax.jit(lambda mask: jaxalign.normalized_cut(X, 2, method="nystroem", density=0.2, mask=mask))(MASK),
        ValueError, "mask= must not be traced",
    ),
    "dense on a mesh": (
        lambda: jaxalign.normalized_cut(X, 2, method="dense", plan=Plan(mesh=jaxalign.sharding.data_mesh(2))),
        ValueError, 'or use "lobpcg" or "nystroem"',
    ),
    "segments of a vector": (lambda: jaxalign.kway(X[None]), ValueError, "eigenvectors must have shape (n, k)"),
    "rows to colour": (lambda: jaxalign.rgb(X[:3], method="tsne"), ValueError, "at least 4 rows"),
    "a test of another grid": (
        lambda: plots.grid(
            grid(),
            test=jaxalign.permutation_test({"c": X}, {"d": Y}, key=jax.random.key(0), permutations=9),
        ),
        ValueError, "the test is of ('c',) with ('d',)",
    ),
    "models of two grids": (lambda: plots.models(two_grids()), ValueError, "needs all models in one grid"),
    "a constant subject": (
        lambda: inference.noise_ceiling([X, np.ones_like(X), Y]), ValueError, "subjects[1] does not vary",
    ),
    "a patch grid": (
        lambda: capture_features(torch_model(), [], layers=["0"], grid=(4, 4, 4)), ValueError, "grid must be (rows",
    ),
}  # fmt: skip


def torch_model():
    torch = pytest.importorskip("torch")
    return torch.nn.Sequential(torch.nn.Linear(3, 3))


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, words = REFUSED[case]
    if case in ("a test of another grid", "models of two grids"):
        pytest.importorskip("matplotlib").use("agg")
    if case == "rows to colour":
        pytest.importorskip("sklearn")
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_a_device_with_one_row_needs_others():
    with pytest.raises(ValueError, match=r"1 sample.*only device"):
        jax.vmap(lambda x: jaxalign.solve_sigma(x, plan=Plan(axis_name="data")).sigma, axis_name="data")(X[None, :1])


def test_sets_in_files_of_different_dtype_or_too_few_samples(x64, tmp_path):
    np.save(tmp_path / "single.npy", X)
    np.save(tmp_path / "double.npy", Y.astype(np.float64))
    with pytest.raises(ValueError, match="same dtype"):
        jaxalign.compare_grid({name: tmp_path / f"{name}.npy" for name in ("single", "double")}, kernel="linear")
    with pytest.raises(ValueError, match="needs at least 4 samples; 3 are left"):
        jaxalign.compare_grid({"a": tmp_path / "single.npy"}, kernel="linear", mask=np.arange(12) < 3)
    np.save(tmp_path / "alike.npy", np.ones_like(X))
    with pytest.raises(ValueError, match=r"b.*duplicates"):
        jaxalign.compare_grid({"a": tmp_path / "single.npy", "b": tmp_path / "alike.npy"}, kernel=RBF(density=0.5))


def test_sets_in_files_that_all_hold_nan_are_nan(tmp_path):
    np.save(tmp_path / "a.npy", np.where(X > 1, np.nan, X))
    found = jaxalign.compare_grid({"a": tmp_path / "a.npy"}, kernel="linear", missing="propagate")
    assert np.isnan(found.values).all()


def test_lists_of_different_length_in_a_table(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": pa.array([[1.0, 2.0], [3.0]])}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"column 'x' holds lists of different lengths: \[1, 2\]"):
        io.read_features(tmp_path / "x.parquet")


def test_tensors_in_nested_lists(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"layers": [torch.ones(4, 2), (torch.zeros(4, 3),)], "epoch": 3}, tmp_path / "x.pt")
    assert {name: one.values.shape for name, one in io.read_features(tmp_path / "x.pt").items()} == {
        "layers.0": (4, 2),
        "layers.1.0": (4, 3),
    }


def test_an_error_that_is_not_about_arguments_is_the_models_own():
    torch = pytest.importorskip("torch")

    class Wrong(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = torch.nn.Linear(3, 3)

        def forward(self, x, y):
            raise TypeError("of its own")

    with pytest.raises(TypeError, match=r"^of its own$"):
        capture_features(Wrong(), [(torch.ones(4, 3), torch.ones(4, 3))], layers=["part"])


def test_what_a_layer_gave_is_told():
    told = _describe({"hidden": (X, None), "more": SimpleNamespace()})
    assert told == ("a dict of 'hidden': a tuple of (float32 of shape (12, 3), a NoneType), 'more': a SimpleNamespace")


# --- what a message shows -------------------------------------------------------------------------------------------

WITH_A_KEY = {
    "align": lambda key: helpers.align({"a": X}, landmarks=9, density=0.5, key=key),
    "align without landmarks": lambda key: helpers.align({"a": X}, density=0.5, key=key),
    "permutation_test": lambda key: jaxalign.permutation_test(X, Y, kernel="linear", permutations=9, key=key),
    "bootstrap": lambda key: jaxalign.bootstrap(X, Y, kernel="linear", resamples=9, key=key),
    "paired_difference": lambda key: jaxalign.paired_difference((X, Y), (Y, X), kernel="linear", resamples=9, key=key),
    "normalized_cut": lambda key: jaxalign.normalized_cut(X, 2, density=0.5, key=key),
}


@pytest.mark.parametrize("name", WITH_A_KEY)
def test_a_key_is_one_of_jax_random(name):
    several = jax.random.split(jax.random.key(0), 3)
    for bad, words in ((0, "0"), ("0", "'0'"), (np.zeros(2), "array([0., 0.])"), (several, "key<fry> array of shape")):
        with pytest.raises(TypeError, match=re.escape(f"such as jax.random.key(0); got {words}")):
            WITH_A_KEY[name](bad)


LARGE = np.random.default_rng(1).normal(size=(2000, 50))
SHOWS = {
    "sets without names": (lambda: jaxalign.compare_grid([LARGE, LARGE]), "float64 array of shape (2000, 50)"),
    "sets of jax without names": (
        lambda: jaxalign.compare_grid([jnp.ones((99, 3))] * 9), "got [float32 array of shape (99, 3), float32",
    ),
    "a name": (lambda: jaxalign.compare_grid([(LARGE, LARGE)]), "names must be strings; got float64 array of shape"),
    "a choice": (lambda: jaxalign.solve_sigma(X, diagonal=LARGE), "got float64 array of shape (2000, 50)"),
    "a choice in a list": (lambda: jaxalign.solve_sigma(X, bandwidth=[LARGE]), "got [float64 array of shape"),
    "a number": (lambda: jaxalign.measures.mutual_knn(X, Y, k=LARGE), "k must be a whole number"),
    "a key": (lambda: jaxalign.permutation_test(X, Y, key=LARGE), "got float64 array of shape (2000, 50)"),
    "a measure": (lambda: jaxalign.compare(X, Y, LARGE), "got float64 array of shape (2000, 50)"),
    "texts": (lambda: jaxalign.solve_sigma(X, density="x" * 10**5), "density must be a real number"),
    "objects": (lambda: jaxalign.solve_sigma(X, density=[list(range(10**5)), []]), "density must be a number or"),
    "a density": (lambda: jaxalign.rbf_affinity(X, sigma=2, density=LARGE), "float64 array of shape (2000, 50)"),
    "a level": (lambda: jaxalign.bootstrap(X, Y, key=jax.random.key(0), level=LARGE), "level must lie"),
    "alpha": (lambda: measures.shape_distance(X, Y, alpha=LARGE), "alpha must be a number"),
    "strengths": (lambda: measures.linear_predictivity(X, Y, strengths=LARGE), "strengths must be"),
    "weights": (
        lambda: losses.multi_layer_loss({"a": X}, {"a": Y}, weights=dict.fromkeys(map(str, range(999)), 1)),
        "weights has layers that x does not have: ['0', '1', '10'",
    ),
    "layers": (
        lambda: losses.multi_layer_loss({"a": X}, dict.fromkeys(map(str, range(999)), Y)),
        "not in both: ['0', '1', '10'",
    ),
    "densities": (
        lambda: jaxalign.solve_sigma(np.stack([X] * 9), density=np.where(np.arange(9) == 7, 2.0, 0.5)),
        "got 2.0 at index 7",
    ),
    "sigmas": (lambda: jaxalign.mean_density(X, sigma=np.arange(-3, 9.0), bandwidth="per_row"), "got -3.0 at index 0"),
    "sigmas of valid rows": (
        lambda: jaxalign.mean_density(X[None], sigma=np.arange(12.0)[::-1], bandwidth="per_row", mask=~MASK[None]),
        "got 0.0 at index (0, 11)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHOWS)
def test_a_message_shows_what_it_got_in_short(case):
    call, words = SHOWS[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)) as caught:
        call()
    assert len(str(caught.value)) < 700


def test_a_short_value_is_shown_as_it_is():
    frame = pytest.importorskip("pandas").DataFrame(LARGE)
    for value, words in (
        (3, "3"), (None, "None"), ("a", "'a'"), (np.float32(3), "np.float32(3.0)"), (np.array(0.5), "0.5"),
        ([1, "b"], "[1, 'b']"), (np.arange(3), "array([0, 1, 2])"), ({"a": X}, "{'a': float32 array of shape (12, 3)}"),
        (frame, "DataFrame of shape (2000, 50)"), (list(range(99)), "[0, 1, 2, 3, 4, 5, ...]"),
    ):  # fmt: skip
        assert shown(value) == words


# --- masks: as if the others were not there ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("comparison", ["spearman", "kendall"])
@pytest.mark.parametrize("dissimilarity", ["sqeuclidean", "correlation", "rbf"])
def test_comparisons_of_order_with_a_mask(comparison, dissimilarity):
    options = {"metric": dissimilarity, "comparison": comparison}
    found = measures.rsa(np.where(MASK[:, None], X, np.nan), Y, mask=MASK, **options)
    helpers.assert_close(found, measures.rsa(X[MASK], Y[MASK], **options), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dissimilarity", ["euclidean", "cosine", "rbf"])
def test_dissimilarities_with_a_mask(dissimilarity):
    found = np.asarray(measures.rdm(X, dissimilarity, mask=MASK))
    helpers.assert_close(found[:9, :9], measures.rdm(X[MASK], dissimilarity), 1e-6)
    assert (found[9:] == 0).all()
    assert (found[:, 9:] == 0).all()


def test_a_cut_by_row_with_a_mask():
    options = {"density": 0.3, "bandwidth": "per_row", "method": "dense"}
    found = jaxalign.normalized_cut(X, 3, mask=MASK, **options)
    expected = jaxalign.normalized_cut(X[MASK], 3, **options)
    helpers.assert_close(found.eigenvalues, expected.eigenvalues, 1e-5)
    assert (np.asarray(found.eigenvectors)[9:] == 0).all()


def test_bootstrap_and_ceiling_leave_out_what_is_masked():
    found = inference.noise_ceiling([X, Y, X + Y], mask=MASK)
    expected = inference.noise_ceiling([X[MASK], Y[MASK], (X + Y)[MASK]])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        helpers.assert_close(one, other, 1e-5)


def test_an_operator_of_several_sets_has_a_transpose():
    operator = jaxalign.affinity_operator(X, Y, density=0.2)
    v = jnp.arange(12.0)
    helpers.assert_close(operator.T @ v, operator.todense().T @ v, 1e-5)
