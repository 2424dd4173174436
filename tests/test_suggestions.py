"""Code that messages suggest: each suggestion is taken out of its message and run.

A row of the tables holds a call that is refused, and for each suggestion of its message the code that follows it. The
last test looks for code in all texts of the library: one that no row brings up has no test, and is refused here.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import jaxalign
from jaxalign import Plan, io, losses, measures, plots, streaming
from jaxalign.interop import capture_features
from jaxalign.kernels import RBF
from jaxalign.report import commands

pytestmark = pytest.mark.usefixtures("unchecked_types")

LIBRARY = Path(jaxalign.__file__).parent
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 24, 5)).astype(np.float32)
IDS = 1_700_000_000 + RNG.permutation(24)[:, None]
MASK = np.arange(24) < 20
HOLES = np.where(MASK[:, None], X, np.nan)
NAMES = {
    "np": np, "jax": jax, "jnp": jnp, "jaxalign": jaxalign, "io": io, "losses": losses, "measures": measures,
    "Plan": Plan, "RBF": RBF,
    "plots": plots, "streaming": streaming, "capture_features": capture_features, "commands": commands,
    **{name: getattr(jaxalign, name) for name in ("align", "compare_grid", "correspondence", "rbf_affinity")},
    "solve": lambda x, y=None, **more: jaxalign.solve_sigma(x, y, **{"density": 0.2, **more}),
    "X": X, "Y": Y, "x": X, "y": Y, "mask": MASK, "key": jax.random.key(0), "Path": Path,
}  # fmt: skip


class Row(NamedTuple):
    """What is refused, and {suggestion in its message: code that runs, in which {} stands for the suggestion}.

    A suggestion that is not always the same, as it holds a path, is a pattern.
    """

    call: str
    ways: dict[str | re.Pattern[str], str]
    values: Callable[[], dict[str, Any]] = dict
    error: Any = (ValueError, TypeError)


def run(row: Row, folder: Path) -> tuple[str, dict[str, Any]]:
    """The message of a row, and the names that its ways out may use."""
    names = {**NAMES, "folder": folder}
    if re.search(r"\btorch\b|capture_features", row.call):
        names["torch"] = pytest.importorskip("torch")
    names |= row.values()
    try:
        return str(eval(row.call, names)), names  # a note, no error
    except row.error as error:
        return str(error), names


MESSAGES: dict[str, str] = {}  # of the rows that were run in this process


def follow(name: str, folder: Path) -> None:
    row = ROWS[name]
    message, names = run(row, folder)
    MESSAGES[name] = message
    for suggestion, code in row.ways.items():
        found = re.search(re.escape(suggestion) if isinstance(suggestion, str) else suggestion, message)
        assert found, message
        eval(code.replace("{}", found[0]), names)


# --- conversions ------------------------------------------------------------------------------------------------------


def frame():
    return pytest.importorskip("pandas").DataFrame(X)


def tensor(array, *calls):
    made = pytest.importorskip("torch").from_numpy(np.array(array))
    for call, *args in calls:
        made = getattr(made, call)(*args)
    return made


def quantized():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.arange(48.0).reshape(24, 2), 0.5, 0, torch.qint32)


FAR = 1e9 + RNG.normal(size=(24, 5))
SMALL = RNG.integers(0, 99, (24, 5))
DAYS = np.datetime64("2024-01-01", "s") + np.arange(48).reshape(24, 2)
MASKED = np.ma.masked_array(X.astype(np.float64), np.broadcast_to(~MASK[:, None], X.shape))
COMPLEX = (X + 1j * Y).astype(np.complex128)
HOST = "x.detach().cpu().numpy()"

# {name: (features, what is suggested for them, the numbers that they are)}
CONVERSIONS = {
    "objects": (lambda: X.astype(object), "np.asarray(x).astype(np.float64)", X),
    "dates": (lambda: DAYS, "np.asarray(x).astype(np.float64)", DAYS.astype(np.float64)),
    "a table with a missing value": (
        lambda: frame().astype("Float64").shift(-1), "x.to_numpy(np.float64, na_value=np.nan)[:9]", X[1:10],
    ),
    "beyond float32": (
        lambda: 1e300 * X.astype(np.float64), "np.asarray(x) / np.abs(np.asarray(x)).max()", X,
    ),
    "complex": (lambda: COMPLEX, "np.concatenate([x.real, x.imag], -1)", np.concatenate([X, Y], -1)),
    "masked": (lambda: MASKED, "x.data", X),
    "sparse": (lambda: pytest.importorskip("scipy.sparse").csr_array(SMALL), "x.toarray()", SMALL),
    "sparse in jax": (
        lambda: pytest.importorskip("jax.experimental.sparse").BCOO.fromdense(X), "x.todense()", X,
    ),
    "a tensor": (lambda: tensor(X), "jaxalign.interop.from_torch(x)", X),
    "a tensor on the host": (lambda: tensor(X).requires_grad_(), HOST, X),
    "a tensor of float64": (lambda: tensor(FAR), HOST, FAR),
    "a tensor of integers": (lambda: tensor(SMALL), HOST, SMALL),
    "a tensor of ids": (lambda: tensor(IDS), HOST, IDS),
    "a tensor of half": (lambda: tensor(SMALL, ("bfloat16",)), "x.detach().cpu().float().numpy()", SMALL),
    "a sparse tensor": (lambda: tensor(X, ("to_sparse",)), "jaxalign.interop.from_torch(x.to_dense())", X),
    "a sparse tensor on the host": (lambda: tensor(X, ("to_sparse",)), "x.to_dense().detach().cpu().numpy()", X),
    "a quantized tensor": (
        quantized, "jaxalign.interop.from_torch(x.dequantize())", np.arange(48).reshape(24, 2),
    ),
    "tensors in a list": (lambda: list(tensor(X)), "torch.stack(x).numpy()", X),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_keeps_distances(name):
    make, code, numbers = CONVERSIONS[name]
    x, suggestion = make(), code.split("[:")[0]
    with pytest.raises((TypeError, ValueError), match=re.escape(f" {suggestion}") + r"(\.|,| turns| has the same)"):
        jaxalign.squared_distances(x)
    names = {**NAMES, "x": x} | ({"torch": pytest.importorskip("torch")} if "torch." in code else {})
    found = np.asarray(jaxalign.squared_distances(eval(code, names)))
    numbers = np.asarray(numbers, np.float64)
    expected = ((numbers[..., :, None, :] - numbers[..., None, :, :]) ** 2).sum(-1)
    np.testing.assert_allclose(found / found.max(), expected / expected.max(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "x", [None, [[1, 2], [3]], np.array([["a"]]), (k for k in X), {1}], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("wide", [False, True])
def test_what_is_no_number_gets_no_conversion(x, wide):
    words = r"(got \w+\.|Its entries are not numbers\.|rows of one length; got .*\.)$"
    with jax.enable_x64(wide), pytest.raises(TypeError, match=words):
        jaxalign.squared_distances(x)


OF_64_BITS = {
    "far from 0": (lambda x: measures.mutual_knn(x, x, 3), lambda: FAR),
    "a tensor": (jaxalign.interop.from_torch, lambda: tensor(X, ("double",))),
    "a tensor that does not fit": (jaxalign.interop.from_torch, lambda: tensor(10**4 * IDS)),
}


@pytest.mark.parametrize("name", OF_64_BITS)
def test_the_other_way_is_64_bits(name):
    call, make = OF_64_BITS[name]
    given, code = make(), 'jax.config.update("jax_enable_x64", True)'
    with pytest.raises((TypeError, ValueError), match=re.escape(code)) as caught:
        call(given)
    assert ("Its values do not fit" in str(caught.value)) == (name == "a tensor that does not fit")
    try:
        eval(code, {"jax": jax})
        call(given)
    finally:
        jax.config.update("jax_enable_x64", False)


# --- all others -------------------------------------------------------------------------------------------------------

SQUARE = np.asarray(np.abs(np.subtract.outer(np.arange(24.0), 2 * np.arange(24.0))), np.float32)
S = "solve({})"


def traced(x, **options):
    return jax.eval_shape(lambda x: losses.alignment_loss(x, x, **options), x)


def named(**more):
    return lambda: more


def mesh(*names):
    return jax.make_mesh((2,) * len(names), names, axis_types=(AxisType.Auto,) * len(names))


def save(name, value):
    """A call that writes a file first."""
    return f"(np.save(folder / '{name}.npy', {value}), "


@functools.cache
def aligned():
    x, y = (RNG.normal(size=(80, 6)).astype(np.float32) for _ in range(2))
    decorrelated = {"decorrelate": 0.1, "density": 0.7, "standardize": True}
    return {
        "features": {"a": X, "b": Y}, "number": 10, "a": "a", "b": "b", "name_a": "a", "name_b": "b", "x": Y, "y": X,
        "everything": helpers.align({"a": X, "b": Y}, density=0.2),
        "alignment": helpers.align({"a": X, "b": Y}, landmarks=10, density=0.2),
        "rows": helpers.align(
            {"a": x, "b": x + 0.1 * y}, landmarks=jaxalign.alignment.farthest_points({"a": x}, 40), **decorrelated
        ).features,
    }  # fmt: skip


def models():
    torch = pytest.importorskip("torch")
    nn, data = torch.nn, torch.utils.data

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.unused = nn.Identity(), nn.Identity()

        def forward(self, x):
            x = self.first(x)
            return {"one": x, "two": 2 * x, "label": torch.zeros(len(x), dtype=torch.int64)}

    dataset = data.TensorDataset(torch.from_numpy(X), torch.arange(24))
    tokens = torch.ones(4, 10, 6)
    return {
        "torch": torch, "nn": nn, "parts": Parts(), "identity": nn.Identity(), "x": torch.from_numpy(X),
        "dataset": dataset, "indices": [3, 1, 2], "loader": data.DataLoader(dataset, batch_size=8), "data": data,
        "tokens": tokens, "padded": {"input": tokens, "attention_mask": torch.ones(4, 10) / 2},
        "embed": lambda model, batch: model(batch["input"]), "first": lambda model, batch: model(batch[0]),
    }  # fmt: skip


def linen():
    nn = pytest.importorskip("flax.linen")
    module = nn.Dense(3)
    return {"module": module, "variables": module.init(jax.random.key(0), X)}


ROWS = {
    "axes": Row("solve(X[0])", {"x[None, :]": "rbf_affinity({}, X)", "x[:, None]": "rbf_affinity({}, sigma=1.0)"},
                named(x=X[0])),
    "widths": Row("solve(x, y[:, :3])", {"rbf_affinity(x)": "{}", "rbf_affinity(y)": "{}"}),
    "a vector": Row("solve(x)", {"np.asarray(x)[:, None]": "rbf_affinity({}, sigma=1.0)"}, named(x=X[0].tolist())),
    "far from 0": Row(
        "measures.mutual_knn(x, x, 3)", {"x - np.mean(x, -2, keepdims=True)": "measures.mutual_knn({}, {}, 3)"},
        named(x=FAR),
    ),
    "a mask of numbers": Row("solve(X, mask=mask)", {"mask.astype(bool)": "solve(X, mask={})"}, named(mask=MASK * 1)),
    "a masked array": Row(
        "solve(x)", {"mask=~np.ma.getmaskarray(x).any(-1)": "solve(x.data, {})"}, named(x=MASKED)
    ),
    "a masked array without a mask": Row(
        "solve(x)", {"x.data": S, "mask=~np.ma.getmaskarray(x).any(-1)": "solve(x.data, {})"},
        named(x=np.ma.masked_array(X)),
    ),
    "a key": Row(
        "align({'a': X}, landmarks=21, key=0)", {"jax.random.key(0)": "align({'a': X}, landmarks=21, key={})"}
    ),
    "a mask of landmarks": Row(
        "align({'a': X}, landmarks=landmarks, density=0.2)",
        {"np.flatnonzero(landmarks)": "align({'a': X}, landmarks={}, density=0.2)"}, named(landmarks=MASK),
    ),
    "a mask of known samples": Row(
        "jaxalign.match({'a': X, 'b': Y}, landmarks=landmarks)",
        {"np.flatnonzero(landmarks)": "jaxalign.match({'a': X, 'b': Y}, landmarks={}, num_components=8, rounds=0)"},
        named(landmarks=MASK),
    ),
    "nan": Row("solve(x)", {"mask=": "solve(x, {}mask)"}, named(x=HOLES)),
    "nan in a loss": Row("losses.alignment_loss(x, X)", {"mask=": "losses.alignment_loss(x, X, {}mask)"},
                         named(x=HOLES)),
    "nan in a file": Row(
        save("x", "x") + "compare_grid({'a': folder / 'x.npy'}, measure='procrustes'))",
        {'missing="omit"': "compare_grid({'a': folder / 'x.npy'}, measure='procrustes', {})"}, named(x=HOLES),
    ),
    "nan in blocks": Row(
        "streaming.solve_sigma(x, density=0.2)", {"mask=": "streaming.solve_sigma(x, density=0.2, {}mask)"},
        named(x=HOLES),
    ),
    "a masked array in blocks": Row(
        "streaming.solve_sigma(x, density=0.2)",
        {"x.data": "streaming.solve_sigma({}, density=0.2)",
         "mask=": "streaming.solve_sigma(x.data, density=0.2, {}~x.mask.any(-1))"},
        named(x=MASKED.astype(np.float32)),
    ),
    "a density in blocks": Row(
        "streaming.solve_sigma(x, density=0.04)", {'diagonal="exclude"': "streaming.solve_sigma(x, density=0.04, {})"}
    ),
    "no direction": Row(
        "measures.rsa(x, y, metric='correlation')", {"mask=": "measures.rsa(x, y, metric='correlation', {}mask)"},
        named(x=np.where(MASK[:, None], X, 1)),
    ),
    "no direction in a file": Row(
        save("x", "x") + "compare_grid({'a': folder / 'x.npy'}, measure='rsa', metric='correlation'))",
        {"mask=": "compare_grid({'a': folder / 'x.npy'}, measure='rsa', metric='correlation', {}mask)"},
        named(x=np.where(MASK[:, None], X, 1)),
    ),
    "an angle of representations of any size": Row(
        "measures.shape_distance(x, y, normalize=False)",
        {'result="distance"': "measures.shape_distance(x, y, normalize=False, {})",
         "normalize=False out": "measures.shape_distance(x, y)"},
    ),
    "sorting on a mesh": Row(
        "compare_grid({'a': x}, measure='rsa', comparison='kendall', plan=Plan(mesh=mesh))",
        {'"pearson"': "compare_grid({'a': x}, measure='rsa', comparison={}, plan=Plan(mesh=mesh))",
         "leave mesh and axis_name out of the plan": "compare_grid({'a': x}, measure='rsa', comparison='kendall')"},
        lambda: {"mesh": mesh("data")},
    ),
    "a mesh by name": Row("Plan(mesh='data')", {"jaxalign.sharding.data_mesh()": "solve(x, plan=Plan(mesh={}))"}),
    "a mesh without devices": Row(
        "solve(x, plan=Plan(mesh=AbstractMesh))", {"jaxalign.sharding.data_mesh()": "solve(x, plan=Plan(mesh={}))"},
        lambda: {"AbstractMesh": AbstractMesh((2,), ("data",))},
    ),
    "a mesh of two axes": Row(
        "solve(x, plan=Plan(mesh=mesh))", {"axis_name=": "solve(x, plan=Plan(mesh=mesh, {}'a'))"},
        lambda: {"mesh": mesh("a", "b")},
    ),
    "rows on a mesh of two axes": Row(
        "jaxalign.sharding.shard_rows(x, mesh)", {"axis_name=": "jaxalign.sharding.shard_rows(x, mesh, {}'a')"},
        lambda: {"mesh": mesh("a", "b")},
    ),
    "rows that do not divide": Row(
        "jaxalign.sharding.shard_rows(x[:23], mesh)",
        {"mask=": "solve(jaxalign.sharding.shard_rows(x, mesh), {}np.arange(24) < 23)",
         "plan=jaxalign.Plan(mesh=": "solve(x[:23], {}mesh))"},
        lambda: {"mesh": mesh("data")},
    ),
    "rows on two meshes": Row(
        "solve(jaxalign.sharding.shard_rows(x, mesh), jaxalign.sharding.shard_rows(y, other))",
        {"jaxalign.sharding.shard_rows": "solve({}(x, mesh), {}(y, mesh))", "plan=Plan(mesh=": "solve(x, y, {}mesh))"},
        lambda: {"mesh": mesh("data"), "other": mesh("rows")},
    ),
    "a mesh inside": Row(
        "jax.vmap(lambda x: solve(x, plan=Plan(mesh=mesh)).sigma, axis_name='data')(x[None])",
        {"Plan(axis_name='data')": "jax.vmap(lambda x: solve(x, plan={}).sigma, axis_name='data')(x[None])"},
        lambda: {"mesh": mesh("data")},
    ),
    "an axis outside": Row(
        "solve(x, plan=Plan(axis_name='data'))",
        {"jax.vmap(axis_name=": "jax.vmap(lambda x: solve(x, plan=Plan(axis_name='data')).sigma, "
                                "axis_name='data')(x[None])",
         "give Plan a mesh": "solve(x, plan=Plan(mesh=mesh, axis_name='data'))"},
        lambda: {"mesh": mesh("data")},
    ),
    "a density": Row(
        "solve(x, density=0.04)",
        {'diagonal="exclude"': "solve(x, density=0.04, {})",
         "at least 26 samples": "solve(np.concatenate([x, y[:2]]), density=0.04)"},
    ),
    "an affinity of a linear kernel": Row(
        "measures.affinity_distance(x, y, 'linear')", {'kernel="rbf"': "measures.affinity_distance(x, y, {})"}
    ),
    "the divergence of linear kernels": Row(
        "losses.alignment_loss(x, y, 'kl', kernel='linear')",
        {'measure="cka"': "traced(x, kernel='linear', {})"}, lambda: {"traced": traced},
    ),
    "a temperature": Row(
        "losses.alignment_loss(x, y, temperature=0.2)",
        {'measure="infonce"': "traced(x, temperature=0.2, {})"}, lambda: {"traced": traced},
    ),
    "neighbors on a device": Row(
        "jax.vmap(lambda x: measures.mutual_knn(x, x, plan=Plan(axis_name='d')), axis_name='d')(x[None])",
        {"plan=Plan(mesh=": "measures.mutual_knn(x, y, {}mesh))"}, lambda: {"mesh": mesh("data")},
    ),
    "a density and a sigma": Row(
        "rbf_affinity(x, sigma=2.0, density=0.1)", {"density=0.1": "rbf_affinity(x, {})"}
    ),
    "a density of a measure": Row(
        "jaxalign.compare(x, y, density=0.2)",
        {"kernel=jaxalign.kernels.RBF(density=": "jaxalign.compare(x, y, {}0.2))"}, error=TypeError,
    ),
    "a sigma per row": Row(
        "jaxalign.rbf_affinity(x, sigma=np.ones(24))",
        {'bandwidth="per_row"': "jaxalign.rbf_affinity(x, sigma=np.ones(24), {})"},
    ),
    "a class of kernels": Row("measures.cka(x, y, RBF)", {"RBF()": "measures.cka(x, y, {})"}, error=TypeError),
    "a plan of a number": Row(
        "solve(x, plan=1024)", {"jaxalign.Plan(tile_size=1024)": "solve(x, plan={})"}, error=TypeError
    ),
    "a density per row": Row(
        "align({'a': x}, landmarks=10, density=0.05, bandwidth='per_row', decorrelate=None)",
        {'bandwidth="global"': "align({'a': x}, landmarks=10, density=0.05, {}, diagonal='exclude')",
         "at least 21 landmarks": "align({'a': x}, landmarks=21, density=0.05, bandwidth='per_row', decorrelate=None)"},
    ),
    "decorrelated per row": Row(
        "align({'a': x}, density=0.2, decorrelate=0.1, bandwidth='per_row')",
        {"decorrelate=None": "align({'a': x}, density=0.2, {}, bandwidth='per_row')",
         'bandwidth="global"': "align({'a': x}, density=0.2, decorrelate=0.1, {})"},
    ),
    "all are landmarks": Row(
        "everything.correspondence(a, b)",
        {"landmarks=number, key=key": "align(features, density=0.2, {}).correspondence(a, b)",
         "correspondence(alignment.transform(a, x), alignment.transform(b, y))": "{}"}, aligned,
    ),
    "rows of landmarks": Row(
        "correspondence(everything.features[a], everything.features[b])",
        {"alignment.correspondence(name_a, name_b)": "{}"}, aligned,
    ),
    "standardized rows of landmarks": Row(
        "correspondence(rows[a], rows[b])", {"alignment.correspondence(name_a, name_b)": "{}"}, aligned, UserWarning
    ),
    "two columns to color": Row(
        "jaxalign.rgb(x[:, :2])", {"num_components=3": "jaxalign.rgb(jaxalign.normalized_cut(x, density=0.2, {}))"}
    ),
    "no bootstrap": Row(
        "jaxalign.bootstrap(x, y, 'cka', kernel='linear', estimator='biased', key=key)",
        {'estimator="debiased"': "jaxalign.bootstrap(x, y, 'cka', kernel='linear', {}, key=key, resamples=9)",
         'comparison="pearson"': "jaxalign.bootstrap(x, y, 'rsa', {}, key=key, resamples=9)",
         "permutation_test": "jaxalign.{}(x, y, 'cka', kernel='linear', estimator='biased', key=key, permutations=9)"},
    ),
    "a bootstrap of layers": Row(
        "jaxalign.bootstrap({'a': x}, y, kernel='linear', key=key)",
        {'aggregate="symmetric_best"': "jaxalign.bootstrap({'a': x}, y, {}, kernel='linear', key=key, resamples=9)"},
    ),
    "a value to calibrate": Row(
        "jaxalign.calibrate(0.5)", {"calibrate(permutation_test(x, y, key=key))": "{}"},
        named(calibrate=jaxalign.calibrate, permutation_test=jaxalign.permutation_test),
    ),
    "groups of subjects": Row(
        "jaxalign.noise_ceiling([x, y], groups=np.arange(24) // 2)",
        {"key=": "jaxalign.noise_ceiling([x, y], groups=np.arange(24) // 2, {}key, resamples=9)"},
    ),
    "moves of rows": Row(
        "jaxalign.permutation_test(x, y, key=key, null='grid')",
        {'positions="samples"': "jaxalign.permutation_test(maps, -maps, key=key, null='grid', {}, permutations=9)"},
        named(maps=X.reshape(4, 3, 2, 5)),
    ),
    "moves of one position": Row(
        "jaxalign.permutation_test(maps, -maps, key=key, null='grid', positions='samples')",
        {'null="groups"': "jaxalign.permutation_test(maps, -maps, key=key, {}, positions='samples', permutations=9)"},
        named(maps=X.reshape(24, 1, 1, 5)),
    ),
    "a test of sampled channels": Row(
        "jaxalign.permutation_test(x, y, key=key, kernel='linear', sampled_channels=True)",
        {'sampled_channels=False': "jaxalign.permutation_test(x, y, key=key, kernel='linear', {}, permutations=9)"},
    ),
    "a bootstrap of sampled channels": Row(
        "jaxalign.bootstrap(x, y, key=key, kernel='linear', sampled_channels=True)",
        {'sampled_channels=False': "jaxalign.bootstrap(x, y, key=key, kernel='linear', {}, resamples=9)"},
    ),
    "groups of a grid": Row(
        "jaxalign.permutation_test(x, y, key=key, groups=np.arange(24), null='grid')",
        {'null="grid"': "jaxalign.permutation_test(maps, -maps, key=key, {}, positions='samples', permutations=9)"},
        named(maps=X.reshape(4, 3, 2, 5)),
    ),
    "few groups of one size": Row(
        "jaxalign.permutation_test(x, y, key=key, groups=[0] * 10 + [1] * 14)",
        {"mask=": "jaxalign.permutation_test(x, y, key=key, groups=[0] * 10 + [1] * 14, {}np.arange(24) < 20)"},
    ),
    "sampled channels of a kernel": Row(
        "measures.cka(x, y, estimator='biased', sampled_channels=True)",
        {'kernel="linear", estimator="debiased"': "measures.cka(x, y, {}, sampled_channels=True)",
         'result="similarity"': "measures.cka(x, y, 'linear', {}, sampled_channels=True)"},
    ),
    "named subjects": Row(
        "jaxalign.noise_ceiling(subjects)", {"its values()": "jaxalign.noise_ceiling(list(subjects.values()))"},
        named(subjects={"a": X, "b": Y, "c": X + Y}),
    ),
    # Whether a loss can be computed is known once it is traced.
    "landmarks of a loss": Row(
        "losses.alignment_loss(x, y, landmarks=8)",
        {'measure="infonce"': "traced(x, landmarks=8, {})"}, lambda: {"traced": traced},
    ),
    "too few landmarks of a loss": Row(
        "losses.alignment_loss(x[:16], y[:16], 'infonce', kernel=include)",
        {'RBF(diagonal="exclude")': "traced(x[:16], measure='infonce', kernel={})",
         "a batch of 23 valid samples": "traced(x[:23], measure='infonce', kernel=include)",
         "a queue of 21":
             "traced(x[:16], measure='infonce', kernel=include, queue=losses.FeatureQueue.empty(21, 5, 5))"},
        lambda: {"traced": traced, "include": RBF(diagonal="include")},
    ),
    "infonce on a mesh": Row(
        "losses.alignment_loss(x, y, 'infonce', plan=Plan(mesh=mesh))",
        {"Plan(axis_name=": "jax.eval_shape(jax.vmap(lambda x: losses.alignment_loss(x, x, 'infonce', plan={}'a')), "
                            "axis_name='a'), x[None])"},
        lambda: {"mesh": mesh("data")},
    ),
    "a loss of samples": Row(
        "losses.alignment_loss(x, y, reduction='none')",
        {'"affinity"': "losses.alignment_loss(x, y, {}, reduction='none')"},
    ),
    "a loss of one device": Row(
        "losses.alignment_loss(x, y, 'angles', plan=Plan(mesh=mesh))",
        {"leave plan= out": "losses.alignment_loss(x, y, 'angles')"}, lambda: {"mesh": mesh("data")},
    ),
    "nan in a loss of channels": Row(
        "losses.decorrelation_loss(hole)",
        {"mask=": "losses.decorrelation_loss(hole, {}~np.isnan(hole).any(1))"},
        lambda: {"hole": np.where(X.max() - 1e-6 < X, np.nan, X)},
    ),
    "nan in tokens": Row(
        "losses.token_loss(hole, hole, 'cosine')",
        {"mask=": "losses.token_loss(hole, hole, 'cosine', {}~np.isnan(hole).any(2))"},
        lambda: {"hole": np.where(X.max() - 1e-6 < X, np.nan, X)[None]},
    ),
    "tokens of each image": Row(
        "losses.token_loss(x[None], y[None], reduction='none', relations='across')",
        {'relations="within"': "losses.token_loss(x[None], y[None], reduction='none', {})"},
    ),
    "options of a projector": Row(
        "losses.token_loss(x[None], x[None], 'cosine', relations='across')",
        {"leave them out": "losses.token_loss(x[None], x[None], 'cosine')"},
    ),
    "a monitor without batches": Row(
        "losses.monitor(k=3).curve()",
        {"monitor.update(step, x, y)": "(lambda monitor, step: {})(losses.monitor(k=3), 0).curve()"},
    ),
    "tokens for a monitor": Row(
        "losses.monitor(k=3).update(0, tokens, tokens)",
        {"x.mean(1)": "(lambda x: losses.monitor(k=3).update(0, {}, {}))(tokens)",
         "x.reshape(-1, c)": "(lambda x, c: losses.monitor(k=3).update(0, {}, {}))(tokens, 5)"},
        lambda: {"tokens": np.stack([X, X + 1], 1)},
    ),
    "a figure of numbers": Row(
        "plots.monitor([0.5])",
        {"Monitor.curve()": "plots.monitor(losses.monitor(k=3).update(0, x, y).curve())"},
        lambda: {"pyplot": pytest.importorskip("matplotlib").use("agg")}, error=TypeError,
    ),
    "a mask of rows": Row(
        "operator.rows(mask)", {"np.flatnonzero(mask)": "operator.rows({})"},
        lambda: {"operator": jaxalign.affinity_operator(X, density=0.2)},
    ),
    "a grid of two models": Row(
        "plots.models(compare_grid(ours, theirs, kernel='linear'))",
        {"compare_grid({**ours, **theirs})": "plots.models({}, ax=None)"},
        lambda: {"ours": {"a": X}, "theirs": {"b": Y}, "pyplot": pytest.importorskip("matplotlib").use("agg"),
                 "compare_grid": lambda *sets, **more: jaxalign.compare_grid(*sets, **{"kernel": "linear", **more})},
    ),
    "a square": Row(
        "jaxalign.normalized_cut(a, 2)",
        {'kind="features"': "jaxalign.normalized_cut(a, 2, density=0.2, {})",
         "(a + a.T) / 2": "jaxalign.normalized_cut({}, 2)"}, named(a=SQUARE),
    ),
    "a directed affinity": Row(
        "jaxalign.normalized_cut(a, 2, kind='affinity')",
        {"(a + a.T) / 2": "jaxalign.normalized_cut({}, 2, kind='affinity')"}, named(a=SQUARE),
    ),
    "a traced square": Row(
        "jax.jit(lambda a: jaxalign.normalized_cut(a, 2).eigenvalues)(a)",
        {'kind="features"': "jax.jit(lambda a: jaxalign.normalized_cut(a, 2, density=0.2, {}).eigenvalues)(a)"},
        named(a=SQUARE),
    ),
    "landmarks of a cut": Row(
        "jaxalign.normalized_cut(x, 2, density=0.2, landmarks=8)",
        {'method="nystroem"': "jaxalign.normalized_cut(x, 2, density=0.2, landmarks=8, {})"},
    ),
    "a dense cut on a mesh": Row(
        "jaxalign.normalized_cut(x, 2, density=0.2, method='dense', plan=Plan(mesh=mesh))",
        {'"lobpcg"': "jaxalign.normalized_cut(x, 2, density=0.2, method={}, plan=Plan(mesh=mesh))"},
        lambda: {"mesh": mesh("data")},
    ),
    "a cut with landmarks at sigmas": Row(
        "jaxalign.normalized_cut(x, 2, sigma=np.ones(24), method='nystroem', bandwidth='per_row')",
        {'bandwidth="per_row"': "jaxalign.normalized_cut(x, 2, density=0.2, method='nystroem', {})"},
    ),
    "new samples in the cut of an affinity": Row(
        "jaxalign.normalized_cut(jaxalign.rbf_affinity(x, density=0.2), 2).transform(x)",
        {'bandwidth="per_row"': "jaxalign.normalized_cut(x, 2, density=0.2, {}).transform(x)"},
    ),
    "repulsion of features": Row(
        "jaxalign.normalized_cut(x, 2, repulsion=np.ones((24, 24)))",
        {
            "rbf_affinity(x)": "jaxalign.normalized_cut(jaxalign.{}, 2, repulsion=np.ones((24, 24)))",
            'kind="affinity"': "jaxalign.normalized_cut(jaxalign.rbf_affinity(x), 2, repulsion=np.ones((24, 24)), {})",
        },
    ),
    "a traced mask of a cut": Row(
        "jax.jit(lambda mask: jaxalign.normalized_cut(x, 2, density=0.2, method='nystroem', mask=mask))(mask)",
        {"mask=": "jaxalign.normalized_cut(x, 2, density=0.2, method='nystroem', {}mask)"},
    ),
    "a path": Row(
        save("x", "x") + "solve(str(folder / 'x.npy')))",
        {re.compile(r"jaxalign\.io\.read_features\(.*\)"): "solve({}['x'].values)"},
    ),
    "maps": Row(
        "compare_grid({'a': x})",
        {'positions="samples"': "compare_grid({'a': x}, kernel='linear', {})",
         "features['a'].transpose(0, 2, 3, 1)": "{}.shape"},
        lambda: {"x": (maps := RNG.normal(size=(6, 2, 3, 5)).astype(np.float32)), "features": {"a": maps}},
    ),
    "tokens": Row(
        "jaxalign.compare(x, x)", {'positions="samples"': "jaxalign.compare(x, x, kernel='linear', {})"},
        named(x=RNG.normal(size=(6, 4, 5)).astype(np.float32)),
    ),
    "maps in batches": Row(
        "measures.minibatch_cka([(x, x)])", {"x.reshape(6, -1)": "measures.minibatch_cka([({}, {})])"},
        named(x=RNG.normal(size=(6, 2, 3, 5)).astype(np.float32)),
    ),
    "a last batch": Row(
        "measures.minibatch_cka([(X, Y), (X[:3], Y[:3])])",
        {"drop_last=True": "[batch for batch in torch.utils.data.DataLoader(torch.arange(10), 4, {})]"},
        lambda: {"torch": pytest.importorskip("torch")},
    ),
    "raw bytes of bfloat16": Row(
        "[np.save(folder / 'x.npy', x), io.read_features(folder)]",
        {"x.astype(np.float32)": "[np.save(folder / 'x.npy', {}), io.read_features(folder)]"},
        lambda: {"x": np.asarray(jnp.asarray(X, jnp.bfloat16))},
    ),
    "features that are rounded to 0": Row(
        "solve(x)", {"np.asarray(x) * 2.0**64": "solve({})"}, named(x=X * np.float32(1e-38))
    ),
    "channels first": Row(
        "commands.channels_first('x', x)", {"np.moveaxis(x, 1, -1)": "{}.reshape(24, 4, 5)"},
        named(x=np.resize(X, (24, 5, 2, 2))),
    ),
    "several tensors": Row(
        "capture_features(parts, x, layers='')", {"output=": "capture_features(parts, x, layers='', {}'one')"}, models
    ),
    "a part of an output": Row(
        "capture_features(parts, x, layers='', output='three')",
        {"output=": "capture_features(parts, x, layers='', {}'one')"}, models,
    ),
    "labels": Row(
        "capture_features(parts, x, layers='', output='label')",
        {"output=": "capture_features(parts, x, layers='', {}'two')"}, models,
    ),
    "a layer that is not called": Row(
        "capture_features(parts, x, layers='unused')",
        {"forward=": "capture_features(parts, x, layers='unused', {}lambda model, batch: model.unused(batch))"}, models,
    ),
    "labels among inputs": Row(
        "capture_features(nn.Linear(5, 2), loader, layers='')",
        {"forward=lambda model, batch: model(batch[0])": "capture_features(nn.Linear(5, 2), loader, layers='', {})"},
        models,
    ),
    "a shuffling loader": Row(
        "capture_features(identity, data.DataLoader(dataset, shuffle=True), layers='')",
        {"shuffle=False": "capture_features(identity, data.DataLoader(dataset, {}), layers='', forward=first)",
         "torch.utils.data.Subset(dataset, indices)":
         "capture_features(identity, data.DataLoader({}), layers='', forward=first)"},
        models,
    ),
    "workers in any order": Row(
        "capture_features(identity, data.DataLoader(dataset, num_workers=1, in_order=False), layers='')",
        {"in_order=False": "data.DataLoader(dataset, num_workers=1, {})"}, models,
    ),
    "a mask of weights": Row(
        "capture_features(identity, padded, layers='', tokens='mean', forward=embed)",
        {'tokens="all"': "capture_features(identity, padded, layers='', forward=embed, {})"}, models,
    ),
    "float64 as arrays of jax": Row(
        "capture_features(identity, x.double(), layers='', to='jax')",
        {'to="numpy"': "solve(capture_features(identity, x.double(), layers='', {})[''])"}, models,
    ),
    "samples not first": Row(
        "capture_features(nn.Flatten(0, 1), tokens, layers='')",
        {"output=lambda value:": "capture_features(nn.Flatten(0, 1), tokens, layers='', {} value.reshape(4, 10, 6))"},
        models,
    ),
    "tokens on no grid": Row(
        "capture_features(identity, tokens, layers='', grid=(3, 3))",
        {"prefix_tokens=": "capture_features(identity, tokens, layers='', grid=(3, 3), {}1)"}, models,
    ),
    "a file that exists": Row(
        "[capture_features(identity, x, layers='', out=folder / 'a') for _ in range(2)]",
        {"out=": "capture_features(identity, x, layers='', {}folder / 'b')"}, models, FileExistsError,
    ),
    "sizes that differ": Row(
        "capture_features(identity, [tokens, tokens[:, :9]], layers='')",
        {'tokens="mean"': "capture_features(identity, [tokens, tokens[:, :9]], layers='', {})",
         "grid=": "capture_features(identity, [tokens[:, :4], tokens[:, :9]], layers='', {}(2, 2))"}, models,
    ),
    "a Linen module": Row(
        "capture_features(module, x, layers='')",
        {"module.bind(variables)": "capture_features({}, x, layers='')"}, linen,
    ),
    "arrays among tensors": Row(
        "jaxalign.interop.torch_function(jnp.add)(x, Y)",
        {"torch.from_numpy(": "jaxalign.interop.torch_function(jnp.add)(x, {}Y))",
         "jaxalign.interop.to_torch(": "jaxalign.interop.torch_function(jnp.add)(x, {}jnp.asarray(Y)))"}, models,
    ),
    "a sparse tensor": Row(
        "jaxalign.interop.from_torch(tensor)",
        {"tensor.to_dense()": "jaxalign.interop.from_torch({})"}, lambda: {"tensor": tensor(X, ("to_sparse",))},
    ),
    "a quantized tensor": Row(
        "jaxalign.interop.from_torch(tensor)",
        {"tensor.dequantize()": "jaxalign.interop.from_torch({})"}, lambda: {"tensor": quantized()},
    ),
    "a tensor far from 0": Row(
        "jaxalign.interop.from_torch(tensor)", {"(tensor - tensor.mean(0)).float()": "jaxalign.interop.from_torch({})"},
        lambda: {"tensor": tensor(FAR)},
    ),
    "a spread array": Row(
        "jaxalign.interop.to_torch(array)",
        {"jax.device_put(array, jax.devices()[0])": "jaxalign.interop.to_torch({})"},
        lambda: {"torch": pytest.importorskip("torch"), "array": jaxalign.sharding.shard_rows(X, mesh("data"))},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_suggestion_works(name, tmp_path):
    follow(name, tmp_path)


# --- none without a row -----------------------------------------------------------------------------------------------

CODE = re.compile(r"""\.\w+\(|(?<=[\s(])\w+=["{\w]|\w+=(?=[ .,)]|$)|[\w}]\[(None|:)|\(a \+|\w\(\{""")
NO_MESSAGES = ("cli.py", "report/html.py")
WITHOUT_A_ROW = {
    "x must have the same number of rows in every process": "test_multi_process",
    "the eigenvectors did not reach rtol": "no matrix is known on which that happens within a second",
    "Write tensor.cpu() to copy it to the host": "takes a device that torch has and jax does not",
    "diagonal={} has no effect with sigma=": "to leave it out",
    'diagonal has no effect with method="nystroem"': "to leave it out",
    "Monitor({} batches": "how it prints",
    "ColorMap(method={}": "how it prints",
}


def texts(tree: ast.AST) -> list[list[str | None]]:
    """All strings but docstrings, as their parts; None where a value comes in."""
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            left_out |= {id(inner) for inner in ast.walk(node) if inner is not node and not isinstance(inner, ast.Call)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [node.value]
        else:
            continue
        if id(node) not in left_out:
            found.append(parts)
    return found


@pytest.mark.slow
def test_every_suggestion_has_a_row(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    messages = list(MESSAGES.values())
    for k, name in enumerate(ROWS.keys() - MESSAGES.keys()):
        (tmp_path / str(k)).mkdir()
        messages.append(run(ROWS[name], tmp_path / str(k))[0])
    for make, _, _ in CONVERSIONS.values():
        with pytest.raises((TypeError, ValueError)) as caught:
            jaxalign.squared_distances(make())
        messages.append(str(caught.value))
    everything, missing = "\n\n".join(messages), []
    for file in LIBRARY.rglob("*.py"):
        name = file.relative_to(LIBRARY).as_posix()
        for parts in [] if name in NO_MESSAGES else texts(ast.parse(file.read_text())):
            text = "".join("{}" if part is None else part for part in parts)
            argument = re.sub(r"^[\w.]*=\S*", "", text)  # the name of what is wrong, ahead of the message
            if " " not in text or not CODE.search(argument) or text.startswith(tuple(WITHOUT_A_ROW)):
                continue
            if not re.search(".*?".join("" if part is None else re.escape(part) for part in parts), everything):
                missing.append(f"{name}: {text}")
    assert not missing, "suggestions that no row of this file runs:\n" + "\n".join(missing)
