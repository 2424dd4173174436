"""Blocks that are read one after another give what all rows at once give; and a job that was killed goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import Plan, streaming
from jaxalign.files.sources import open_pairs, open_source

ROOT = Path(__file__).parent.parent
ROWS, WIDTH, MASK = helpers.ROWS, helpers.WIDTH, helpers.MASK
OTHER_ROWS = 10
MASK_Y = np.arange(OTHER_ROWS) % 3 != 2
DENSITY = 0.2
# 24 rows: four blocks, the last of three rows; ten pairs of blocks. Every new shape of a block takes time to compile:
# nearly all blocks here have seven rows or three.
BLOCK = 7

X = np.random.default_rng(0).normal(size=(ROWS, WIDTH)) + 3
Y = np.random.default_rng(1).normal(size=(OTHER_ROWS, WIDTH)) + 3
PAIRS = 10

SETTINGS = {
    "alone": {},
    "excluded diagonal": {"diagonal": "exclude"},
    "masked": {"mask": MASK},
    "others masked": {"y": Y, "mask": MASK, "mask_y": MASK_Y},
}


def refused(error, *words):
    """pytest.raises with a message that contains all of these, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


def equal(dtype):
    """Relative difference between one order of summation and another.

    The solver stops at a density within 1e-13 of the wanted one, 1e-6 in float32. Of the difference that this allows,
    float32 makes a quarter of, here. The tests' programs are compiled without optimisation and add one number after the
    other, where optimised ones add in parts and stay within 1e-6: another 1e-6 in float32.
    """
    return 2e-6 if np.dtype(dtype) == np.float32 else 1e-12


def both(x, rows=None, *, given=None, blocks=None, **options):
    """The streamed results and those of all rows at once: sigma, the density it reaches, the density at sigma = 2."""
    streamed = dict(options, **(given or {}), **(blocks or {}))
    rows = x if rows is None else rows
    ours = streaming.solve_sigma(rows, density=DENSITY, **streamed)
    theirs = jaxalign.solve_sigma(x, density=DENSITY, **options)
    assert int(ours.status) == 0
    assert ours.sigma.dtype == ours.density.dtype == theirs.sigma.dtype
    assert ours.sigma.shape == ours.density.shape == ours.passes.shape == ours.status.shape == ()
    here, there = streaming.mean_density(rows, sigma=2.0, **streamed), jaxalign.mean_density(x, sigma=2.0, **options)
    assert here.dtype == there.dtype
    assert here.shape == ()
    return np.array([ours.sigma, ours.density, here]), np.array([theirs.sigma, theirs.density, there])


# --- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.usefixtures("x64")
def test_blocks_give_what_all_rows_give(setting):
    streamed, whole = both(X, blocks={"block_rows": BLOCK}, **SETTINGS[setting])
    np.testing.assert_allclose(streamed, whole, rtol=equal(np.float64))


@pytest.mark.slow
def test_blocks_give_what_all_rows_give_in_single_precision():
    streamed, whole = both(X.astype(np.float32), blocks={"block_rows": BLOCK})
    np.testing.assert_allclose(streamed, whole, rtol=equal(np.float32))


@pytest.mark.parametrize("block_rows", [1, 23, 24, 1000, None])
def test_the_number_of_rows_in_a_block_does_not_matter(block_rows):
    x = X.astype(np.float32)
    whole = jaxalign.solve_sigma(x, density=DENSITY).sigma
    streamed = streaming.solve_sigma(x, density=DENSITY, block_rows=block_rows).sigma
    np.testing.assert_allclose(streamed, whole, rtol=equal(np.float32))


@pytest.mark.parametrize("tile_size", [3, None])
def test_nor_does_the_size_of_a_tile(tile_size):
    x = X.astype(np.float32)
    whole = streaming.mean_density(x, sigma=2.0, block_rows=BLOCK)
    tiled = streaming.mean_density(x, sigma=2.0, block_rows=ROWS, plan=Plan(tile_size))
    np.testing.assert_allclose(tiled, whole, rtol=equal(np.float32))


SOURCES = {
    "memory map": lambda x, path: np.load(path, mmap_mode="r"),
    "path": lambda x, path: path,
    "path as a string": lambda x, path: str(path),
    "jax array": lambda x, path: jax.numpy.asarray(x),
    "Fortran order": lambda x, path: np.asfortranarray(x),
    "every second row": lambda x, path: np.repeat(x, 2, 0)[::2],
}


@pytest.mark.parametrize("source", SOURCES)
def test_where_rows_come_from(source, tmp_path):
    x = X.astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    rows = SOURCES[source](x, tmp_path / "x.npy")
    expected = streaming.solve_sigma(x, density=DENSITY, block_rows=BLOCK)
    found = streaming.solve_sigma(rows, density=DENSITY, block_rows=BLOCK)
    assert found.sigma == expected.sigma  # not a bit of difference


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_sequence_of_uneven_blocks():
    streamed, whole = both(X, np.split(X, [7, 10, 17]))
    np.testing.assert_allclose(streamed, whole, rtol=equal(np.float64))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_sequences_of_uneven_blocks_on_both_sides():
    given = {"y": tuple(np.split(Y, [3]))}
    streamed, whole = both(X, tuple(np.split(X, [7, 10, 17])), given=given, y=Y, mask=MASK, mask_y=MASK_Y)
    np.testing.assert_allclose(streamed, whole, rtol=equal(np.float64))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_blocks_that_the_mask_leaves_nothing_of():
    mask = (np.arange(ROWS) < 5) | (np.arange(ROWS) == 22)
    streamed, whole = both(X, blocks={"block_rows": BLOCK}, mask=mask)
    np.testing.assert_allclose(streamed, whole, rtol=equal(np.float64))


@pytest.mark.parametrize("source", ["array", "file"])
def test_half_floats_are_summed_in_single_precision(source, tmp_path):
    x = X.astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    streamed, whole = both(x, x if source == "array" else tmp_path / "x.npy", blocks={"block_rows": BLOCK})
    assert streamed.dtype == np.float32
    np.testing.assert_allclose(streamed, whole, rtol=equal(np.float32))


@pytest.mark.parametrize("name", [name for name in helpers.FEATURES if name != "one_feature"])
@pytest.mark.usefixtures("x64")
def test_features_of_all_kinds(name):
    x = helpers.FEATURES[name](np.random.default_rng(0))[:ROWS]
    ours = streaming.solve_sigma(x, density=0.9, block_rows=BLOCK)
    theirs = jaxalign.solve_sigma(x, density=0.9)
    # The density is what the solver is held to; how far sigma moves with it depends on the features.
    tolerance = helpers.tolerance(np.float64)
    reached = jaxalign.mean_density(x, sigma=ours.sigma, plan=Plan(BLOCK))
    np.testing.assert_allclose(reached, 0.9, rtol=tolerance.density)
    np.testing.assert_allclose(ours.sigma, theirs.sigma, rtol=tolerance.sigma)


@pytest.mark.usefixtures("x64")
def test_masked_rows_may_hold_nan():
    spoilt = np.where(MASK[:, None], X, np.nan)
    clean, dirty = (streaming.solve_sigma(a, density=DENSITY, mask=MASK, block_rows=BLOCK) for a in (X, spoilt))
    assert clean.sigma == dirty.sigma


# --- progress -------------------------------------------------------------------------------------------------------


def test_progress_is_told_of_every_pair_of_blocks():
    told = []
    found = streaming.solve_sigma(
        X.astype(np.float32), density=DENSITY, block_rows=BLOCK, progress=lambda *where: told.append(where)
    )
    passes = int(found.passes)
    assert passes >= 1
    assert told == [(number, done, PAIRS) for number in range(1, passes + 1) for done in range(PAIRS + 1)]


def test_progress_with_others_counts_all_pairs_of_blocks():
    told = []
    x, y = X.astype(np.float32), Y.astype(np.float32)
    streaming.mean_density(x, y, sigma=2.0, block_rows=BLOCK, progress=lambda *where: told.append(where))
    assert told == [(1, done, 4 * 2) for done in range(9)]


def test_progress_as_a_bar(capsys):
    pytest.importorskip("tqdm", reason='the bar needs tqdm: python -m pip install "jaxalign[cli]"')
    streaming.mean_density(X.astype(np.float32), sigma=2.0, block_rows=BLOCK, progress=True)
    printed = capsys.readouterr().err
    assert "pass 1: 100%" in printed
    assert f"{PAIRS}/{PAIRS}" in printed
    streaming.mean_density(X.astype(np.float32), sigma=2.0, block_rows=BLOCK)
    assert capsys.readouterr().err == ""


def test_a_bar_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with refused(ImportError, "progress=True needs tqdm", 'pip install "jaxalign[cli]"', "a function"):
        streaming.mean_density(X.astype(np.float32), sigma=2.0, block_rows=BLOCK, progress=True)


# --- checkpoints ----------------------------------------------------------------------------------------------------

JOBS = {
    "solve_sigma": lambda x, **options: streaming.solve_sigma(x, density=DENSITY, **options).sigma,
    "mean_density": lambda x, **options: streaming.mean_density(x, sigma=2.0, **options),
}
every_job = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())


class StopError(Exception):
    """Ends a job from within."""


def stop_after(job, path, visits, x=None, **options):
    """Run a job until so many pairs of blocks are visited; False if it was done before."""
    visited, last = 0, None

    def progress(number, done, total):
        nonlocal visited, last
        visited += last == number  # the first report of a pass tells what was done before
        last = number
        if visited == visits:
            raise StopError

    x = X.astype(np.float32) if x is None else x
    try:
        job(x, checkpoint=path, progress=progress, **{"block_rows": BLOCK, **options})
    except StopError:
        return False
    return True


def resume(job, path, **options):
    """The result of a job that goes on, and how many pairs of blocks it visited."""
    visits, last = 0, None

    def progress(number, done, total):
        nonlocal visits, last
        visits += last == number
        last = number

    result = job(X.astype(np.float32), checkpoint=path, progress=progress, block_rows=BLOCK, **options)
    return result, visits


@every_job
def test_a_checkpoint_changes_nothing_and_is_gone_at_the_end(job, tmp_path):
    plain, _ = resume(job, None)
    watched, _ = resume(job, tmp_path / "job")
    assert plain == watched
    assert list(tmp_path.iterdir()) == []


@every_job
def test_a_job_goes_on_from_wherever_it_was(job, tmp_path):
    path = tmp_path / "job"
    whole, all_visits = resume(job, None)
    assert all_visits % PAIRS == 0
    for visits in range(1, all_visits + 1):
        assert not stop_after(job, path, visits)
        assert path.exists()
        result, more = resume(job, str(path))
        assert result == whole  # to the last bit
        assert more == all_visits - visits
        assert list(tmp_path.iterdir()) == []


@every_job
def test_a_job_may_be_stopped_after_every_pair(job, tmp_path):
    path = tmp_path / "job"
    whole, all_visits = resume(job, None)
    for _ in range(all_visits):
        assert not stop_after(job, path, 1)
    assert resume(job, path) == (whole, 0)


def contents(path):
    """The arrays of a checkpoint."""
    with np.load(path) as archive:
        return dict(archive)


def write(path, arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)


# A program that ends itself with the signal that cannot be caught, in the middle of its second visit after the first.
KILLED = """
import os, signal, sys
import numpy as np
from jaxalign import streaming
from jaxalign.files.sources import open_pairs, open_source
path, rows, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Rows(list):
    def __getitem__(self, i):
        if told and told[-1][1] >= kills:
            os.kill(os.getpid(), signal.SIGKILL)  # while blocks are read, in a thread of its own
        return super().__getitem__(i)

told = []
blocks = Rows(np.split(np.load(rows), [7, 14, 21]))
streaming.solve_sigma(blocks, density=0.2, checkpoint=path, progress=lambda *where: told.append(where))
"""


@pytest.mark.slow
def test_a_job_that_is_killed_visits_one_pair_again_at_most(tmp_path):
    path, rows, kills = tmp_path / "job", tmp_path / "x.npy", 4
    np.save(rows, X.astype(np.float32))
    whole, all_visits = resume(JOBS["solve_sigma"], None)
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(rows), str(kills)], env=environment, timeout=120, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert contents(path)  # whole, whenever the kill comes
    result, visits = resume(JOBS["solve_sigma"], path)
    np.testing.assert_allclose(result, whole, rtol=1e-7)  # this process has eight devices, that one had one
    # Visits of the killed job that were reported, and those of this one: no more than one pair in both.
    assert all_visits <= kills + visits <= all_visits + 1
    assert not path.exists()


def test_a_checkpoint_that_was_not_written_to_the_end_is_refused(tmp_path):
    path = tmp_path / "job"
    stop_after(JOBS["solve_sigma"], path, 3)
    whole = path.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with refused(ValueError, str(path), "truncated or not a checkpoint", "Delete it"):
            resume(JOBS["solve_sigma"], path)
        assert path.read_bytes() == whole[:cut]  # left for who wants to look at it


# The last as before sigma and grids had one format.
OTHER_FILES = [b"\x93NUMPY\xff", b"[]", b"text", b'{"check": 1, "state": {"done": 3, "sums": []}}']


@pytest.mark.parametrize("content", OTHER_FILES)
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "job"
    path.write_bytes(content)
    with refused(ValueError, str(path), "truncated or not a checkpoint", "as this version writes", "use another file"):
        resume(JOBS["solve_sigma"], path)
    assert path.read_bytes() == content


def test_a_checkpoint_with_a_changed_number_is_refused(tmp_path):
    path = tmp_path / "job"
    stop_after(JOBS["solve_sigma"], path, 3)
    content, number = path.read_bytes(), contents(path)["totals"][1].tobytes()
    assert content.count(number) == 1
    path.write_bytes(content.replace(number, number[:-1] + bytes([number[-1] ^ 1])))
    with refused(ValueError, str(path), "truncated or not a checkpoint"):
        resume(JOBS["solve_sigma"], path)


@pytest.mark.parametrize(
    "change",
    [
        {"search": np.array(3.0)},
        {"search": np.ones(7)},
        {"search": np.full(8, "x")},
        {"done": np.array("x")},
        {"done": np.array(-1)},
        {"done": np.array(1000)},
        {"done": np.array(3.0)},
        {"totals": np.array(3.0)},
        {"totals": np.ones((7, 2))},
        {"totals": np.ones(7, np.float32)},
        {"lost": np.ones(0)},
        {"more": np.ones(7)},
        {"totals": None},
    ],
    ids=lambda change: str(change).replace("\n", ""),
)
def test_a_checkpoint_of_the_same_job_with_other_contents_is_refused(change, tmp_path):
    path = tmp_path / "job"
    stop_after(JOBS["solve_sigma"], path, 3)
    write(path, {name: array for name, array in {**contents(path), **change}.items() if array is not None})
    with refused(ValueError, str(path), "truncated or not a checkpoint", "Delete it"):
        resume(JOBS["solve_sigma"], path)


FOREIGN = {
    "density": (lambda x, **kw: streaming.solve_sigma(x, density=0.3, **kw), {}, ("density", "file: 0.3", "now: 0.2")),
    "rtol": (JOBS["solve_sigma"], {"rtol": 1e-4}, ("rtol", "file: 0.0001", "now: 1e-06")),
    "task": (JOBS["mean_density"], {}, ("task", "file: 'mean_density'", "now: 'solve_sigma'")),
    "diagonal": (JOBS["solve_sigma"], {"diagonal": "exclude"}, ("diagonal", "'exclude'", "'include'")),
    "tile_size": (JOBS["solve_sigma"], {"plan": Plan(3)}, ("tile_size", "file: 3")),
    "block_rows": (JOBS["solve_sigma"], {"block_rows": 8}, ("blocks", "file: [[8, 8, 8]]", "now: [[7, 7, 7, 3]]")),
    "mask": (JOBS["solve_sigma"], {"mask": np.arange(ROWS) > 2}, ("checksums",)),
    "y": (JOBS["solve_sigma"], {"y": Y.astype(np.float32)}, ("rows", "file: [24, 10]", "now: [24]")),
    "fewer rows": (JOBS["solve_sigma"], {"x": X[:23].astype(np.float32)}, ("rows", "file: [23]", "now: [24]")),
    "width": (JOBS["solve_sigma"], {"x": X[:, :4].astype(np.float32)}, ("width", "file: 4", "now: 5")),
    "data": (JOBS["solve_sigma"], {"x": np.nextafter(X.astype(np.float32), 9)}, ("checksums",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FOREIGN)
def test_a_checkpoint_of_another_job_is_refused(what, tmp_path):
    path = tmp_path / "job"
    job, options, words = FOREIGN[what]
    assert not stop_after(job, path, 1, **options)
    before = path.read_bytes()
    with refused(ValueError, str(path), "belongs to another job", *words, "Delete it to start again"):
        resume(JOBS["solve_sigma"], path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("key", "other"), [("version", "0.0.0"), ("format", None)])
def test_a_checkpoint_of_another_version_is_refused(key, other, tmp_path):
    path = tmp_path / "job"
    stop_after(JOBS["solve_sigma"], path, 2)
    arrays = contents(path)
    identity = json.loads(str(arrays["identity"]))
    expected, identity[key] = identity[key], other
    write(path, {**arrays, "identity": json.dumps(identity)})
    with refused(ValueError, "belongs to another job", f"{key} (file: {other!r}, now: {expected!r})"):
        resume(JOBS["solve_sigma"], path)


def test_a_row_that_changes_under_a_stopped_job_is_noticed(tmp_path):
    path, rows = tmp_path / "job", tmp_path / "x.npy"
    np.save(rows, X.astype(np.float32))
    stop_after(JOBS["solve_sigma"], path, 2, x=rows)
    changed = np.load(rows, mmap_mode="r+")
    changed[20, 3] += 1
    changed.flush()
    with refused(ValueError, "belongs to another job", "checksums"):
        JOBS["solve_sigma"](rows, checkpoint=path, block_rows=BLOCK)


def test_a_checkpoint_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="no_folder"):
        resume(JOBS["solve_sigma"], tmp_path / "no_folder" / "job")


# --- what is refused ------------------------------------------------------------------------------------------------


@every_job
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_a_far_block_names_the_row(job, value, tmp_path):
    x = X.astype(np.float32)
    x[[17, 19, 22], 3] = value
    np.save(tmp_path / "x.npy", x)
    for rows in (x, tmp_path / "x.npy"):
        with refused(ValueError, "x has nan or inf in row 17 (block 2)", "mask="):
            job(rows, block_rows=BLOCK)
    with refused(ValueError, "x has nan or inf in row 19 (block 1)"):
        job(np.split(x, [18]), mask=np.arange(ROWS) != 17)
    with refused(ValueError, "y has nan or inf in row 17 (block 2)"):
        job(X.astype(np.float32), y=x, block_rows=BLOCK)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("block_rows", [0, -1, 2.0, "7", True])
@every_job
def test_bad_block_rows(job, block_rows):
    with refused(ValueError, "block_rows must be a whole number of rows, at least 1; got", repr(block_rows)):
        job(X.astype(np.float32), block_rows=block_rows)


def test_a_sequence_has_its_own_blocks():
    with refused(ValueError, "block_rows=7 has no effect with a sequence", "the arrays of x are the blocks"):
        JOBS["mean_density"](np.split(X.astype(np.float32), 2), block_rows=7)


@pytest.mark.parametrize("shape", [(), (24,), (2, 24, 5), (0, 5), (24, 0)])
@every_job
def test_bad_shapes(job, shape, tmp_path):
    x = np.zeros(shape, np.float32)
    np.save(tmp_path / "x.npy", x)
    for rows in (x, tmp_path / "x.npy"):
        with refused(ValueError, "x must have shape (n, d), both at least 1", str(shape)):
            job(rows)
    with refused(ValueError, "y must have shape (n, d)"):
        job(X.astype(np.float32), y=x)


@every_job
def test_one_row_has_no_pair_with_another(job):
    with refused(ValueError, "x has n = 1 sample(s); at least 2"):
        job(X[:1].astype(np.float32))


def test_one_row_is_enough_against_others():
    x, y = X[:1].astype(np.float32), Y.astype(np.float32)
    sigma = float(streaming.solve_sigma(x, y, density=DENSITY, block_rows=BLOCK).sigma)
    affinity = np.exp(-((X[:1] - Y) ** 2).sum(-1) / (2 * sigma**2))
    np.testing.assert_allclose(affinity.mean(), DENSITY, rtol=helpers.tolerance(np.float32).density)


def test_blocks_of_different_widths():
    blocks = [X[:4].astype(np.float32), X[4:, :3].astype(np.float32)]
    with refused(ValueError, "the blocks of x must have shapes (n_i, d) with the same d", "(4, 5)", "(20, 3)"):
        JOBS["mean_density"](blocks)
    with refused(ValueError, "the blocks of x must have shapes (n_i, d)", "(5,)"):
        JOBS["mean_density"]([X[0].astype(np.float32)])
    with refused(ValueError, "the blocks of x", "(0, 5)"):
        JOBS["mean_density"]([X.astype(np.float32), X[:0].astype(np.float32)])


def test_sides_of_different_width_or_dtype(tmp_path):
    x, y = X.astype(np.float32), Y.astype(np.float32)
    with refused(ValueError, "the same number of features and dtype", "5 of float32", "3 of float32"):
        JOBS["mean_density"](x, y=y[:, :3])
    with jax.enable_x64(True), refused(ValueError, "dtype", "5 of float32", "5 of float64"):
        JOBS["mean_density"](x, y=Y)


class Shrinking(list):
    """Blocks whose second one loses a row once it was asked for twice."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.asked = 0

    def __getitem__(self, i):
        block = super().__getitem__(i)
        self.asked += i == 1
        return block[:-1] if i == 1 and self.asked > 2 else block


def test_a_block_that_changes_its_shape_meanwhile():
    with refused(ValueError, "block 1 of x has shape (11, 5), but had (12, 5) before"):
        JOBS["solve_sigma"](Shrinking(np.split(X.astype(np.float32), 2)))


@pytest.mark.parametrize("left", [0, 10, 100, -1])
def test_a_truncated_file(left, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, X.astype(np.float32))
    path.write_bytes(path.read_bytes()[:left])
    with refused(ValueError, "x: ", str(path), "is not a complete .npy file of numbers"):
        JOBS["mean_density"](path)


def test_files_of_something_else(tmp_path):
    text, objects, strings, missing = (tmp_path / name for name in ("a.npy", "b.npy", "c.npy", "d.npy"))
    text.write_text("1, 2, 3\n")
    np.save(objects, X.astype(object), allow_pickle=True)
    np.save(strings, X.astype(str))
    for path in (text, objects):
        with refused(ValueError, str(path), "is not a complete .npy file of numbers"):
            JOBS["mean_density"](path)
    with refused(TypeError, "c.npy') must hold real numbers"):
        JOBS["mean_density"](strings)
    with pytest.raises(FileNotFoundError, match=r"d\.npy"):
        JOBS["mean_density"](missing)


@pytest.mark.parametrize("rows", [None, 3, [], {0: X}, iter([X])], ids=lambda rows: type(rows).__name__)
def test_what_is_neither_a_path_nor_an_array_nor_a_sequence(rows):
    with refused(TypeError, "x must be a path to a .npy file, an array or memory map (n, d), or a sequence"):
        JOBS["mean_density"](rows)


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_wide_numbers_are_shifted_block_by_block(offset, tmp_path):
    # Without x64: float64 at an offset where float32 would leave nothing, and whole numbers.
    np.save(tmp_path / "x.npy", X + offset)
    whole = np.round(1000 * X + offset).astype(np.int64)
    for x, rows in ((X, X + offset), (X, tmp_path / "x.npy"), (X, np.split(X + offset, 3)), (whole - offset, whole)):
        more = {} if isinstance(rows, list) else {"block_rows": 7}
        found = streaming.solve_sigma(rows, density=0.2, **more)
        helpers.assert_close(found.sigma, jaxalign.solve_sigma(x.astype(np.float32), density=0.2).sigma, 1e-5)
    with_holes = np.where(MASK[:, None], X + offset, 1e30)  # what masked rows hold does not count
    masked = streaming.solve_sigma(with_holes, density=0.2, block_rows=7, mask=MASK)
    expected = jaxalign.solve_sigma(X.astype(np.float32), density=0.2, mask=MASK)
    helpers.assert_close(masked.sigma, expected.sigma, 1e-5)
    both = streaming.mean_density(X + offset, Y + offset, sigma=2.0, block_rows=7)
    expected = jaxalign.mean_density(X.astype(np.float32), Y.astype(np.float32), sigma=2.0)
    helpers.assert_close(both, expected, 1e-5)


def test_numbers_beyond_float32_in_a_block():
    with refused(ValueError, "block 0 of x holds numbers up to", "beyond the range of float32"):
        JOBS["mean_density"](1e300 * X)


@pytest.mark.parametrize("mask", [MASK[:-1], MASK[:, None], MASK.astype(int), MASK.astype(np.float32)])
@every_job
def test_masks_of_the_wrong_shape_or_dtype(job, mask):
    with refused(ValueError, "the mask of x must be boolean of shape (24,); got", str(mask.dtype), str(mask.shape)):
        job(X.astype(np.float32), mask=mask)
    with refused(ValueError, "the mask of y must be boolean of shape (10,)"):
        job(X.astype(np.float32), y=Y.astype(np.float32), mask_y=mask)


@every_job
def test_masks_that_leave_too_few(job):
    for real in (0, 1):
        with refused(ValueError, f"the mask of x leaves {real} valid sample(s), at least 2"):
            job(X.astype(np.float32), mask=np.arange(ROWS) < real)


@pytest.mark.usefixtures("unchecked_types")
@every_job
def test_a_mask_of_the_other_side_needs_another_side(job):
    with refused(ValueError, "mask_y needs y"):
        job(X.astype(np.float32), mask_y=MASK)
    with refused(ValueError, "diagonal='exclude' has no meaning with y"):
        job(X.astype(np.float32), y=Y.astype(np.float32), diagonal="exclude")
    with refused(ValueError, "diagonal must be one of 'include', 'exclude'; got 'none'"):
        job(X.astype(np.float32), diagonal="none")


@pytest.mark.parametrize("density", [0.0, 1.0, -0.1, 1.5, np.nan])
def test_density_outside_0_and_1(density):
    with refused(ValueError, "density must lie strictly between 0 and 1", f"got {density:g}"):
        streaming.solve_sigma(X.astype(np.float32), density=density)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, lambda value: jax.numpy.asarray(value, np.float32)])
def test_density_and_sigma_may_be_a_number_of_any_library(kind, tmp_path):
    x, how = X.astype(np.float32), {"block_rows": BLOCK, "checkpoint": tmp_path / "state"}
    expected = streaming.solve_sigma(x, density=DENSITY, block_rows=BLOCK).sigma
    assert helpers.relative_error(streaming.solve_sigma(x, density=kind(DENSITY), **how).sigma, expected) < 1e-6
    expected = streaming.mean_density(x, sigma=2.0, block_rows=BLOCK)
    assert helpers.relative_error(streaming.mean_density(x, sigma=kind(2.0), **how), expected) < 1e-6


def test_several_densities_or_sigmas_are_refused():
    x = X.astype(np.float32)
    with refused(ValueError, "density of shape (2,) does not broadcast to (), one number"):
        streaming.solve_sigma(x, density=np.array([0.1, 0.2]))
    with refused(ValueError, "sigma of shape (2,) does not broadcast to (), one number"):
        streaming.mean_density(x, sigma=np.array([1.0, 2.0]))


def test_a_density_below_that_of_the_diagonal():
    x = X.astype(np.float32)
    with refused(ValueError, "density = 0.04 cannot be reached with n = 24", "0.04167", 'diagonal="exclude"'):
        streaming.solve_sigma(x, density=0.04)
    with refused(ValueError, "density = 0.05 cannot be reached with n = 18"):
        streaming.solve_sigma(x, density=0.05, mask=MASK)
    streaming.solve_sigma(x, density=0.04, diagonal="exclude", block_rows=BLOCK)


@pytest.mark.parametrize("features", ["constant", "duplicates"])
def test_coincident_samples(features, tmp_path):
    x = np.ones((ROWS, WIDTH)) if features == "constant" else np.repeat(X[:3], 8, 0)
    with refused(ValueError, "no sigma found", "samples are duplicates", "Remove duplicate samples"):
        streaming.solve_sigma(x.astype(np.float32), density=DENSITY, checkpoint=tmp_path / "job")
    assert list(tmp_path.iterdir()) == []  # nothing to go on from


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf])
def test_sigma_that_is_not_above_0(sigma):
    with refused(ValueError, "sigma must be finite and above 0; got"):
        streaming.mean_density(X.astype(np.float32), sigma=sigma)


@pytest.mark.parametrize("rtol", [0.0, 1e-9, 1.0, np.nan])
def test_rtol_out_of_range(rtol):
    with refused(ValueError, "rtol must lie between", "float32", "and 1; got"):
        streaming.solve_sigma(X.astype(np.float32), density=DENSITY, rtol=rtol)


@pytest.mark.parametrize("tile_size", [0, -3])
def test_bad_tile_size(tile_size):
    with refused(ValueError, "tile_size must be a whole number of rows, at least 1"):
        streaming.mean_density(X.astype(np.float32), sigma=2.0, plan=Plan(tile_size))


def test_a_job_does_not_depend_on_the_free_memory(monkeypatch):
    # Or it could not go on from its checkpoint after other programs have started or ended.
    x = np.zeros((70_000, 40), np.float32)
    before = open_pairs(open_source("x", x), None, "include", Plan()).identity
    monkeypatch.setattr(jaxalign.plan, "free_memory", lambda device: 30_000.0)
    assert open_pairs(open_source("x", x), None, "include", Plan()).identity == before
    assert len(before["blocks"][0]) == 2


def test_masked_arrays_are_refused():
    with pytest.raises(TypeError, match="x is a masked array"):
        streaming.solve_sigma(np.ma.masked_invalid(X))
