"""Comparison grids: the same numbers as one comparison after the other, from memory, devices and files."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import Plan, compare, compare_grid, io, measures, sharding
from jaxalign.files import neighbors, sources, visit
from jaxalign.kernels import RBF, Laplacian
from jaxalign.measures import _neighbors

N = 60


def layers(names="abc", seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 4))
    widths = [3, 3, 5]  # few shapes, as each is compiled for
    return {
        name: x @ rng.normal(size=(4, d)) + k * rng.normal(size=(N, d))
        for (k, name), d in zip(enumerate(names), widths, strict=False)
    }


def one_by_one(first, second, measure, **options):
    return np.array([[compare(x, y, measure, **options) for y in second.values()] for x in first.values()])


CASES = {
    "cka laplacian": {"kernel": "laplacian"},
    "rsa cosine": {"metric": "cosine", "comparison": "whitened_pearson"},
    "distance_correlation": {"estimator": "biased"},
    "affinity_distance rows": {"result": "rows", "kernel": RBF(2.0)},
    "rsa spearman": {"comparison": "spearman"},
    "mutual_knn": {"k": 4},
    "procrustes unscaled": {"normalize": False},
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.slow
@every_case
def test_memory_files_and_single_comparisons_agree(x64, case, tmp_path):
    measure, options = case.split()[0], CASES[case]
    first, second = layers(), layers("de", seed=1)
    expected = one_by_one(first, second, measure, **options)
    grid = compare_grid(first, second, measure, **options)
    helpers.assert_close(grid.values, expected, 1e-11)
    assert (grid.rows, grid.columns, grid.samples) == (("a", "b", "c"), ("d", "e"), N)
    for name, x in first.items():
        np.save(tmp_path / f"{name}.npy", x)
    calls = []
    files = compare_grid(
        tmp_path,
        second,
        measure,
        block_rows=20,
        checkpoint=tmp_path / "state",
        progress=lambda *a: calls.append(a),
        **options,
    )
    helpers.assert_close(files.values, expected, 1e-11)
    assert not (tmp_path / "state").exists()
    assert calls[-1][1] == calls[-1][2]


def test_all_with_all(x64):
    first = layers()
    grid = compare_grid(first, measure="cka", block_rows=20)
    helpers.assert_close(grid.values, one_by_one(first, first, "cka"), 1e-11)
    np.testing.assert_array_equal(grid.values, np.asarray(grid.values).T)
    helpers.assert_close(np.diagonal(grid.values), np.ones(3), 1e-12)
    for name, sigma in zip(grid.rows, grid.sigma, strict=True):
        helpers.assert_close(sigma, jaxalign.solve_sigma(first[name], diagonal="exclude").sigma, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cka", "mutual_knn"])
def test_devices_agree(x64, measure):
    first = layers()
    options = {"kernel": "linear"} if measure == "cka" else {}
    spread = compare_grid(
        first, measure=measure, plan=Plan(tile_size=5, mesh=sharding.data_mesh(8)), **options
    )  # 60 rows: 8 x 8
    helpers.assert_close(spread.values, compare_grid(first, measure=measure, **options).values, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["rsa", "procrustes"])
@pytest.mark.parametrize("block_rows", [None, 20])
def test_missing_samples(x64, measure, block_rows):
    first = layers()
    first["b"][7, 1] = np.nan
    how = {"block_rows": block_rows}
    with pytest.raises(ValueError, match=r"b.* nan or inf.*row 7"):
        compare_grid(first, measure=measure, **how)
    kept = np.arange(N) != 7
    grid = compare_grid(first, measure=measure, missing="omit", **how)
    helpers.assert_close(
        grid.values, compare_grid({k: v[kept] for k, v in first.items()}, measure=measure).values, 1e-11
    )
    assert grid.samples == N - 1
    told = compare_grid(first, measure=measure, missing="propagate", **how)
    whole = {k: v for k, v in first.items() if k != "b"}
    expected = np.full((3, 3), np.nan)
    expected[np.ix_([0, 2], [0, 2])] = compare_grid(whole, measure=measure).values
    helpers.assert_close(told.values, expected, 1e-11)


@pytest.mark.slow
def test_mask(x64):
    first, kept = layers(), np.arange(N) % 4 != 1
    expected = compare_grid({k: v[kept] for k, v in first.items()}, measure="rsa").values
    helpers.assert_close(compare_grid(first, measure="rsa", mask=kept).values, expected, 1e-11)
    blocks = compare_grid(first, measure="rsa", mask=kept, block_rows=17)  # the last block has 9 rows
    helpers.assert_close(blocks.values, expected, 1e-11)


# --- results --------------------------------------------------------------------------------------------------------


def test_json_and_back(x64, tmp_path):
    grid = compare_grid(layers(), layers("de", 1), "cka", kernel=Laplacian(density=0.1))
    grid.to_json(tmp_path / "grid.json")
    for source in (tmp_path / "grid.json", grid.to_json()):
        again = jaxalign.ComparisonGrid.from_json(source)
        np.testing.assert_array_equal(again.values, grid.values)
        np.testing.assert_array_equal(again.sigma, grid.sigma)
        assert again.options == grid.options
        assert again.best_match() == grid.best_match()
        assert dict(again.versions)["jaxalign"] == jaxalign.__version__
    with pytest.raises(ValueError, match="not a comparison grid"):
        jaxalign.ComparisonGrid.from_json('{"rows": []}')


def test_best_match_follows_the_direction(x64):
    near = {"a": layers()["a"] * 2 + 1, "far": np.random.default_rng(5).normal(size=(N, 3))}
    for measure in ("cka", "procrustes"):
        match, value = compare_grid({"a": layers()["a"]}, near, measure).best_match()["a"]
        assert match == "a"
        assert abs(value - (1 if measure == "cka" else 0)) < 1e-6
    assert compare_grid(layers(), measure="procrustes").best_match()["a"][0] != "a"


def test_pandas(x64):
    grid = compare_grid(layers(), layers("de", 1), "rsa")
    assert grid.to_pandas().loc["b", "e"] == np.asarray(grid.values)[1, 1]


def test_a_grid_is_a_pytree():
    grid = compare_grid({k: v.astype(np.float32) for k, v in layers().items()}, measure="rsa")
    doubled = jax.tree.map(lambda a: 2 * a, grid)
    np.testing.assert_array_equal(doubled.values, 2 * np.asarray(grid.values))


# --- interrupted ----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, os, numpy as np, jax, jaxalign
jax.config.update("jax_enable_x64", True)
folder, measure, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = []
def tell(stage, done, total):
    calls.append((stage, done))
    print(stage, done, flush=True)
    if len(calls) == stop:
        os.kill(os.getpid(), 9)
grid = jaxalign.compare_grid(folder, measure=measure, block_rows=20, checkpoint=folder + "/state", progress=tell)
grid.to_json(folder + "/grid.json")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("measure", "stop"), [("cka", 6), ("procrustes", 4)])
def test_a_killed_job_goes_on_where_it_was(measure, stop, tmp_path):
    for name, x in layers().items():
        np.save(tmp_path / f"{name}.npy", x)

    def run(stop):
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), measure, str(stop)],
            capture_output=True, text=True, timeout=300, cwd=Path(jaxalign.__file__).parent.parent,
        )  # fmt: skip

    killed = run(stop)
    assert killed.returncode == -9
    before = [line for line in killed.stdout.splitlines() if not line.startswith("sigma")]
    again = run(-1)
    assert again.returncode == 0, again.stderr
    after = [line for line in again.stdout.splitlines() if not line.startswith("sigma")]
    assert before[-1] == after[0] or int(after[0].split()[1]) == int(before[-1].split()[1]) + 1  # nothing is done twice
    with jax.enable_x64(True):
        expected = compare_grid(layers(), measure=measure).values
        helpers.assert_close(jaxalign.ComparisonGrid.from_json(tmp_path / "grid.json").values, expected, 1e-11)


@pytest.mark.parametrize("measure", ["rsa", "procrustes"])
def test_a_checkpoint_of_something_else_is_refused(x64, measure, tmp_path):
    state = tmp_path / "state"

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if done == 2:
            raise Stop

    def run(sets, **options):
        return compare_grid(sets, measure=measure, block_rows=20, checkpoint=state, **options)

    with pytest.raises(Stop):
        run(layers(), progress=stop)
    changed = layers()
    changed["b"][5, 1] += 1e-9
    for sets in (changed, layers("abd")):
        with pytest.raises(ValueError, match=r"belongs to another job.*Delete it"):
            run(sets)
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        run(layers())
    state.write_bytes(whole)
    helpers.assert_close(run(layers()).values, compare_grid(layers(), measure=measure).values, 1e-11)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(x64, tmp_path):
    sets = layers()
    np.save(tmp_path / "short.npy", np.zeros((5, 2)))
    np.save(tmp_path / "tall.npy", np.zeros((6, 2)))
    bad = [
        ({}, {}, "features is empty"),
        (sets["a"], {}, "must have names"),
        ([("a", sets["a"]), ("a", sets["b"])], {}, "the name 'a' occurs twice"),
        ({"a": sets["a"], "b": sets["b"][:10]}, {}, "a has 60 rows, b 10"),
        ({"a": sets["a"][0]}, {}, r"\(n, d\)"),
        ({3: sets["a"]}, {}, "names must be strings"),
        ({"a": "missing-folder-file.txt"}, {}, "no file or folder"),
        (tmp_path, {}, "short has 5 rows, tall 6"),
        (tmp_path / "none", {}, "no file or folder"),
        (sets, {"measure": "ckaa"}, "measure must be one of.*Did you mean 'cka'"),
        (sets, {"kernal": "linear"}, "no option 'kernal'.*Did you mean 'kernel'"),
        (sets, {"unbiased": True}, "no option 'unbiased'.*Did you mean 'estimator'"),
        (sets, {"kernel": "cubic"}, "kernel must be one of"),
        (sets, {"kernel": RBF((1.0, 2.0))}, "one for each of the 3 representations"),
        (sets, {"kernel": RBF(-1.0)}, "sigma must be finite and above 0"),
        (sets, {"measure": "mutual_knn", "k": N}, f"at least {N + 1} samples"),
        (
            sets,
            {"plan": Plan(mesh=sharding.data_mesh(2)), "block_rows": 10},
            "leave mesh and axis_name out of the plan",
        ),
        ({"same": np.ones((N, 2)), **sets}, {}, "same: no sigma found: too many samples are duplicates"),
    ]
    for features, options, message in bad:
        with pytest.raises((ValueError, TypeError, OSError), match=message):
            compare_grid(features, **options)


def test_progress_bars_can_be_seen(x64, capsys):
    compare_grid(layers(), progress=True)
    assert "sigma" in capsys.readouterr().err


# --- what once went wrong -------------------------------------------------------------------------------------------


def test_two_models_may_name_their_layers_alike(x64):
    first = layers()
    grid = compare_grid(first, {name: 2 * x + 1 for name, x in first.items()}, "rsa")
    for again in (grid, jaxalign.ComparisonGrid.from_json(grid.to_json())):
        assert {name: match for name, (match, _) in again.best_match().items()} == {"a": "a", "b": "b", "c": "c"}
        assert not again.itself


def test_a_distance_as_a_similarity(x64):
    near = {"near": 2 * layers()["a"], "far": np.random.default_rng(5).normal(size=(N, 3))}
    grid = compare_grid({"a": layers()["a"]}, near, "procrustes", result="similarity")
    assert grid.direction == "similarity"
    assert grid.best_match()["a"][0] == "near"


def stopped(run):
    """Run a job until two pieces of it are done."""

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if done == 2 and stage != "sigma":
            raise Stop

    with pytest.raises(Stop):
        run(progress=stop)


@pytest.mark.slow
def test_a_kernel_of_the_same_name_is_told_by_its_values(x64, tmp_path):
    def kernel(width):
        return lambda d2: 1 / (1 + d2 / width)

    def run(width, **how):
        return compare_grid(layers(), measure="cka", kernel=kernel(width), block_rows=20, checkpoint=state, **how)

    state = tmp_path / "state"
    stopped(lambda **how: run(5.0, **how))
    with pytest.raises(ValueError, match=r"belongs to another job.*kernels"):
        run(50.0)
    expected = compare_grid(layers(), measure="cka", kernel=kernel(5.0)).values
    helpers.assert_close(run(5.0).values, expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.float32, jax.numpy.float32])
def test_the_density_of_a_job_may_be_a_number_of_any_library(kind, tmp_path):
    sets = {name: x.astype(np.float32) for name, x in layers().items()}
    found = compare_grid(sets, kernel=RBF(density=kind(0.25)), block_rows=20, checkpoint=tmp_path / "state")
    helpers.assert_close(found.values, compare_grid(sets, kernel=RBF(density=0.25)).values, 1e-4)


@pytest.mark.parametrize("block_rows", [7, 15, 20, 59])  # nine blocks, four, three; the last of one row
@pytest.mark.parametrize("kind", ["normal", "whole numbers", "masked"])
def test_neighbors_are_found_block_by_block(x64, block_rows, kind):
    x = np.random.default_rng(0).normal(size=(60, 3))
    x = np.round(2 * x) + np.array([1, 0, 0]) * 9 if kind == "whole numbers" else x  # many ties
    mask = np.arange(60) % 4 != 1 if kind == "masked" else None
    for metric in ("euclidean", "cosine"):
        function = _neighbors._function(metric)
        source = sources.open_source("x", x, mask, block_rows, function.normalization)
        pairs = sources.open_pairs(source, None, "include", Plan(tile_size=6))
        found = neighbors.neighbors_in_blocks(pairs, 9, None, partial(visit.reporting, False, ""))
        found = np.where(found == _neighbors.NO_SAMPLE, -1, found)
        expected = measures.nearest_neighbors(x, 9, metric, mask=mask)
        if kind == "whole numbers" and metric == "cosine":  # unit rows are rounded, ties are in some order
            continue
        np.testing.assert_array_equal(found, expected)


def test_a_search_for_neighbors_goes_on(x64, tmp_path):
    x, y = layers()["a"], layers()["b"]
    stopped = []

    def stop(stage, done, total):
        if stage == "neighbors" and done == 2 and not stopped:
            stopped.append(total)
            raise KeyboardInterrupt

    options = {"measure": "mutual_knn", "k": 4, "block_rows": 20, "checkpoint": tmp_path / "state"}
    with pytest.raises(KeyboardInterrupt):
        compare_grid({"x": x}, {"y": y}, progress=stop, **options)
    assert stopped == [6]
    assert (tmp_path / "state.neighbors").exists()
    calls = []
    found = compare_grid({"x": x}, {"y": y}, progress=lambda *a: calls.append(a), **options)
    assert next(call for call in calls if call[0] == "neighbors") == ("neighbors", 2, 6)
    helpers.assert_close(found.values, [[measures.mutual_knn(x, y, 4)]], 1e-12)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["rsa", "mutual_knn"])
def test_a_job_goes_on_after_the_free_memory_has_changed(x64, measure, tmp_path, monkeypatch):
    def run(**how):
        return compare_grid(layers(), measure=measure, checkpoint=tmp_path / "state", **how)

    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    monkeypatch.setattr(jaxalign.plan, "free_memory", lambda device: 30_000.0)
    helpers.assert_close(run().values, compare_grid(layers(), measure=measure).values, 1e-11)


def test_sets_that_do_not_fit_are_looked_at_again(x64, monkeypatch):
    monkeypatch.setattr(jaxalign.files.cells, "_KEPT_BYTES", 1)
    grid = compare_grid(layers(), layers("de", 1), "procrustes")
    helpers.assert_close(grid.values, one_by_one(layers(), layers("de", 1), "procrustes"), 1e-12)


@pytest.mark.slow
def test_sigma_may_be_an_array_of_one_a_set(x64):
    sigma = [1.0, 2.0, 3.0]
    expected = compare_grid(layers(), measure="cka", kernel=RBF(tuple(sigma)))
    for how in ({}, {"block_rows": 20}):
        found = compare_grid(layers(), measure="cka", kernel=RBF(np.array(sigma)), **how)
        helpers.assert_close(found.values, expected.values, 1e-11)
        np.testing.assert_array_equal(found.sigma, sigma)
        for wrong in (sigma[:2], [*sigma, 4.0]):
            with pytest.raises(ValueError, match="one for each of the 3 representations"):
                compare_grid(layers(), measure="cka", kernel=RBF(wrong), **how)


@pytest.mark.slow
def test_files_of_the_other_byte_order(x64, tmp_path):
    for name, x in layers().items():
        np.save(tmp_path / f"{name}.npy", x.astype(">f8"))
    for measure in ("rsa", "mutual_knn"):
        helpers.assert_close(
            compare_grid(tmp_path, measure=measure).values, compare_grid(layers(), measure=measure).values, 1e-11
        )


def test_a_folder_is_read_as_the_command_line_reads_it(x64, tmp_path):
    first, second, third = layers().values()
    np.save(tmp_path / "layer2.npy", first)
    np.save(tmp_path / "._layer2.npy", np.zeros(3))  # as some systems leave beside every file
    np.savez(tmp_path / "layer10.npz", a=third)
    np.savez(tmp_path / "layer9.npz", late=third, early=second)
    sets = {"layer2": first, "layer9/early": second, "layer9/late": third, "layer10": third}
    expected = compare_grid(sets, measure="rsa")
    found = compare_grid(tmp_path, measure="rsa")
    assert found.rows == tuple(sets) == tuple(jaxalign.io.read_features(tmp_path))
    helpers.assert_close(found.values, expected.values, 1e-11)
    assert isinstance(io.named_sets("features", tmp_path)["layer2"], np.memmap)
    assert compare_grid(tmp_path / "layer9.npz", measure="rsa").rows == ("early", "late")
    one = compare_grid({"last": tmp_path / "layer10.npz"}, {"a": third}, measure="rsa")
    helpers.assert_close(one.values, np.ones((1, 1)), 1e-11)
    with pytest.raises(ValueError, match=r"features\['last'\]: .*holds 2 representations, 'early', 'late': one is"):
        compare_grid({"last": tmp_path / "layer9.npz"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"features: the folder .* holds no features"):
        compare_grid(tmp_path / "empty")


@pytest.mark.parametrize("measure", ["rsa", "procrustes"])
@pytest.mark.parametrize("block_rows", [0, -1, 2.5, True])
@pytest.mark.usefixtures("unchecked_types")
def test_block_rows_that_are_none(measure, block_rows):
    with pytest.raises(ValueError, match="block_rows must be a whole number"):
        compare_grid(layers(), measure=measure, block_rows=block_rows)


def test_checkpoints_that_are_none(x64, tmp_path):
    (tmp_path / "array").write_bytes(b"")
    with (tmp_path / "array").open("wb") as file:
        np.save(file, np.zeros(3))
    with (tmp_path / "list").open("wb") as file:
        np.savez(file, identity="[1]")
    for name, message in (("array", "truncated or not"), ("list", "truncated or not"), (".", "is a folder")):
        with pytest.raises((ValueError, OSError), match=message):
            compare_grid(layers(), measure="rsa", checkpoint=tmp_path / name)
    with pytest.raises(OSError, match="does not exist"):
        compare_grid(layers(), measure="rsa", checkpoint=tmp_path / "none" / "state")


@pytest.mark.usefixtures("unchecked_types")
def test_features_of_the_wrong_kind():
    for features in (5, ["ab", "cd"]):
        with pytest.raises(TypeError, match="must be a mapping, pairs of"):
            compare_grid(features)


@pytest.mark.usefixtures("unchecked_types")
def test_what_is_no_set_of_samples_says_the_way_out(tmp_path):
    tokens = np.ones((6, 5, 3), np.float32)
    with pytest.raises(ValueError, match=r'got \(6, 5, 3\)\. For tokens.* positions="samples" .* "channels" .* "mean"'):
        compare_grid({"a": tokens})
    np.save(tmp_path / "a.npy", np.full((6, 3), "a"))
    with pytest.raises(ValueError, match=r"a\.npy holds no features"):
        compare_grid(tmp_path)
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"from_torch\(features\['a'\]\)"):
        compare_grid({"a": torch.ones(6, 3)})


# --- tokens and maps --------------------------------------------------------------------------------------------------

TOKENS = {
    "compare": lambda x, y, **how: jaxalign.compare(x, y, kernel="linear", **how),
    "compare_grid": lambda x, y, **how: jaxalign.compare_grid({"x": x}, {"y": y}, kernel="linear", **how).values[0, 0],
    "permutation_test": lambda x, y, **how: (
        jaxalign.permutation_test(x, y, kernel="linear", key=jax.random.key(0), permutations=3, **how).value
    ),
    "permutation_test of names": lambda x, y, **how: jaxalign.permutation_test(
        {"x": x}, {"y": y}, kernel="linear", key=jax.random.key(0), permutations=3, **how
    ).value[0, 0],
    "bootstrap": lambda x, y, **how: (
        jaxalign.bootstrap(x, y, kernel="linear", key=jax.random.key(0), resamples=3, **how).value
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", TOKENS)
def test_positions_follow_one_rule(name):
    shape = (2, 2) if name == "compare" else (4,)  # maps or tokens
    x, y = np.random.default_rng(0).normal(size=(2, 12, *shape, 5)).astype(np.float32)
    y = y + x
    axes = tuple(range(1, x.ndim - 1))
    flat = {
        "samples": [a.reshape(-1, 5) for a in (x, y)],
        "channels": [a.reshape(12, -1) for a in (x, y)],
        "mean": [a.mean(axes) for a in (x, y)],
    }
    with pytest.raises(ValueError, match=r'must have shape \(n, d\); got .*positions="samples" makes each'):
        TOKENS[name](x, y)
    for positions, both in flat.items():
        value = float(TOKENS[name](x, y, positions=positions))
        assert abs(value - float(jaxalign.compare(*both, kernel="linear"))) < 1e-5
    with pytest.raises(ValueError, match=r"positions='mean' has no effect on features of shape \(n, d\)"):
        TOKENS[name](*flat["mean"], positions="mean")
    with pytest.raises(ValueError, match="positions must be one of"):
        TOKENS[name](x, y, positions="rows")
    with pytest.raises(ValueError, match="channels last"):
        TOKENS[name](x[None, None], y, positions="mean")


def test_vectors_and_maps_may_be_compared(tmp_path):
    maps = np.random.default_rng(1).normal(size=(12, 2, 2, 5)).astype(np.float32)
    pooled = maps.mean((1, 2))
    assert abs(float(jaxalign.compare(maps, pooled, kernel="linear", positions="mean")) - 1) < 1e-6
    np.save(tmp_path / "maps.npy", maps)  # read block by block
    grid = jaxalign.compare_grid(tmp_path, {"maps": maps}, kernel="linear", positions="channels")
    assert abs(grid.values[0, 0] - 1) < 1e-6


def test_the_mean_of_positions_does_not_depend_on_the_kind_of_array():
    maps = np.random.default_rng(2).normal(size=(12, 14, 14, 4))
    for scale, offset, dtype in ((1e37, 0.0, np.float32), (1.0, 1e4, np.float32), (10.0, 6e4, np.float16)):
        x = (scale * (maps + np.arange(12)[:, None, None, None] + offset / scale)).astype(dtype)
        y = x[:, 0, 0].astype(np.float32)
        ours, theirs = (compare(a, y, kernel="linear", positions="mean") for a in (x, jax.numpy.asarray(x)))
        assert abs(float(ours) - float(theirs)) < 1e-4  # means of about 10^4 are rounded to 1e-3 in either
