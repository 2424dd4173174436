"""The command line as it is used: what it prints, writes, refuses, and how it ends."""

from __future__ import annotations

import csv
import errno
import hashlib
import html.parser
import io as stdio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import _memory, cli
from jaxalign._groups import check_groups
from jaxalign.files import storage
from jaxalign.kernels import RBF
from jaxalign.report import cache, commands, grid_figures, grids, statistics

pytest.importorskip("matplotlib", reason='figures: python -m pip install "jaxalign[viz]"')
pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture
def models(tmp_path):
    """Two folders of three layers, 60 samples, the layers of one close to those of the other."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(60, 5))
    for model in "ab":
        (tmp_path / model).mkdir()
        for k in (2, 9, 10):
            x = shared @ rng.normal(size=(5, 7)) + 0.1 * k * rng.normal(size=(60, 7))
            np.save(tmp_path / model / f"layer{k}.npy", x.astype(np.float32))
    return tmp_path


def run(*arguments):
    return cli.main([str(one) for one in (*arguments, "--quiet")])


def test_compare(models, capsys):
    x, y = models / "a" / "layer2.npy", models / "b" / "layer2.npy"
    assert run("compare", x, y, "--permutations", 99, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] == pytest.approx(float(jaxalign.compare(np.load(x), np.load(y))), rel=1e-6)
    assert found["p_value"] == pytest.approx(0.01)
    np.testing.assert_allclose(found["density reached"], 0.05, rtol=1e-4)
    assert found["provenance"]["versions"]["jaxalign"] == jaxalign.__version__
    assert set(found["provenance"]["sha256"]) == {str(x), str(y)}
    assert run("compare", x, y, "--measure", "procrustes", "--permutations", 0) == 0
    assert re.search(r"procrustes of layer2 with layer2, 60 samples: 0\.\d+", capsys.readouterr().out)
    assert run("compare", models / "a", y) == 2
    assert "holds 3 representations, 'layer2', 'layer9', 'layer10'" in capsys.readouterr().err


def test_info(models, capsys):
    x = np.load(models / "a" / "layer9.npy")
    x[[4, 7], [3, 1]] = np.nan
    np.save(models / "a" / "layer9.npy", x)
    assert run("info", models / "a", "--json") == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["representations"]}
    assert list(found) == ["layer2", "layer9", "layer10"]
    assert found["layer9"]["rows with nan or inf"] == 2
    assert found["layer9"]["first nan or inf"] == [4, 3]
    expected = jaxalign.solve_sigma(np.load(models / "a" / "layer2.npy")).sigma
    assert found["layer2"]["sigma"] == pytest.approx(float(expected), rel=1e-5)
    assert run("info", models / "a") == 0
    assert "2 (row 4, feature 3)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["samples", "channels", "mean"])
def test_maps_with_their_channels_first_are_noticed(tmp_path, capsys, positions):
    shapes = {
        "wide": (6, 8, 3, 3),
        "narrow": (6, 2, 3, 3),
        "last": (6, 3, 3, 8),
        "long": (6, 2, 3, 8),
        "tokens": (6, 4, 3),
    }
    for name, shape in shapes.items():
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    for notes in (commands.read([tmp_path], positions).notes, run_info(capsys, tmp_path, positions)):
        noticed = {note.split()[0] for note in notes if note.endswith("write np.moveaxis(x, 1, -1)")}
        assert noticed == {"wide", "narrow"}


def run_info(capsys, folder, positions):
    """The lines that it prints."""
    assert run("info", folder, "--density", "0.5", "--positions", positions, "--rows", "6") == 0
    return [line.removesuffix(".") for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def shuffled(models):
    """Two files of the samples of a layer, the second in reverse order, and a table of known pairs."""
    np.save(models / "b.npy", np.load(models / "b" / "layer2.npy")[::-1])
    (models / "pairs.csv").write_text("b, layer2\n" + "".join(f"{59 - i},{i}\n" for i in range(20)))
    return models


def test_match(shuffled, capsys):
    out = shuffled / "matches"
    inputs = shuffled / "a" / "layer2.npy", shuffled / "b.npy"
    assert run("match", *inputs, "--landmarks", shuffled / "pairs.csv", "--rounds", 1, "--out", out) == 0
    assert "layer2 | b" in capsys.readouterr().out
    a, b = map(np.load, inputs)
    known = np.stack([np.arange(20), 59 - np.arange(20)], 1)
    expected = jaxalign.match({"layer2": a, "b": b}, landmarks=known, rounds=1)
    with (out / "matches.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["a"] == "layer2"]
    np.testing.assert_array_equal([int(row["candidate"]) for row in rows], expected.candidate["layer2", "b"])
    np.testing.assert_allclose(
        [float(row["confidence"]) for row in rows], expected.confidence["layer2", "b"], atol=1e-4
    )
    tracks = np.loadtxt(out / "tracks.csv", delimiter=",", skiprows=1, dtype=int)
    np.testing.assert_array_equal(tracks, expected.tracks())
    record = json.loads((out / "match.json").read_text())
    assert record["pairs"]["layer2 | b"]["matches"] == len(expected.pairs("layer2", "b")) >= 20
    assert run("match", *inputs, "--landmarks", "20", "--rounds", "0", "--force", "--out", out) == 0


@pytest.mark.slow
def test_layers_of_a_model_share_the_samples_of_their_landmarks(models):
    (models / "pairs.csv").write_text("".join(f"{i},{i}\n" for i in range(20)))
    both = models / "a", models / "b"
    assert run("match", *both, "--landmarks", models / "pairs.csv", "--rounds", 0, "--out", models / "out") == 0
    record = json.loads((models / "out" / "match.json").read_text())
    assert len(record["pairs"]) == 15  # of six layers
    assert {facts["landmarks"] for facts in record["pairs"].values()} == {20}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0,1,2\n", "sample 1 is '0,1,2'"),
        ("0,1\n2,-1\n", "sample 2 is '2,-1'"),
        ("x,b\n0,1\n", "expected layer2, b"),
        ("0,0\n1,1\n", "2 pairs, at least 4"),
        ("0,0\n1,1\n2,2\n60,3\n", "0 to 59"),
    ],
)
def test_a_table_of_landmarks_that_does_not_fit(content, message, shuffled, capsys):
    (shuffled / "pairs.csv").write_text(content)
    inputs = shuffled / "a" / "layer2.npy", shuffled / "b.npy"
    assert run("match", *inputs, "--landmarks", shuffled / "pairs.csv", "--out", shuffled / "out") == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_align(models, capsys):
    out = models / "aligned"
    sets = models / "a" / "layer2.npy", models / "b" / "layer9.npy"
    assert run("align", *sets, "--landmarks", 40, "--out", out) == 0
    assert "20 held-out samples" in capsys.readouterr().out
    told = json.loads((out / "alignment.json").read_text())
    rows = np.load(out / "layer2.npy")
    assert rows.shape == (60, 40)
    expected = jaxalign.align(
        {path.stem: np.load(path) for path in sets},
        landmarks=np.array(told["landmarks"]),
    )
    np.testing.assert_allclose(rows, expected.features["layer2"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(list(told["density reached"].values()), 0.7, rtol=1e-4)
    assert run("align", *sets, "--out", models / "half") == 0  # of 60 samples
    assert len(json.loads((models / "half" / "alignment.json").read_text())["landmarks"]) == 30
    assert "30 held-out samples" in capsys.readouterr().out
    assert run("align", *sets, "--landmarks", 61, "--out", models / "more") == 2
    assert "landmarks must be a whole number from 1 to n = 60" in capsys.readouterr().err
    # Sets of one name are told apart by their folders.
    assert run("align", models / "a", models / "b", "--landmarks", 40, "--published", "--out", models / "both") == 0
    assert (models / "both" / "b%2flayer10.npy").exists()


@pytest.mark.slow
def test_maps_with_their_channels_first_are_pointed_out(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(6, 8, 4, 4)).astype(np.float32))
    assert run("compare", tmp_path / "a.npy", tmp_path / "b.npy", "--permutations", 0) == 0
    printed = capsys.readouterr().out
    assert "np.moveaxis(x, 1, -1)" in printed
    assert "positions is a sample (see --positions)" in printed


@pytest.mark.slow
def test_p_values_keep_images_together(tmp_path, capsys):
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(4, 5, 5, 3)).astype(np.float32)
    for name, x in (("a", maps), ("b", maps + 0.5 * rng.normal(size=maps.shape).astype(np.float32))):
        np.save(tmp_path / f"{name}.npy", x)
    both = (tmp_path / "a.npy", tmp_path / "b.npy", "--density", 0.2, "--permutations", 199, "--json")

    def told(*more):
        assert run("compare", *both, *more) == 0
        return json.loads(capsys.readouterr().out)

    images = told()
    assert images["test"]["groups"] == 4
    assert images["test"]["permutations"] == 23
    assert images["p_value"] == images["test"]["smallest_p_value"] == pytest.approx(1 / 24)
    assert 0 < images["calibrated"] < 1
    (tmp_path / "rows.txt").write_text("\n".join(str(k // 5) for k in range(100)))
    np.save(tmp_path / "pairs.npy", [0, 0, 1, 1])
    assert told("--groups", tmp_path / "rows.txt")["p_value"] == 1 / 200
    pairs = told("--groups", tmp_path / "pairs.npy")  # one label an image
    assert (pairs["test"]["groups"], pairs["p_value"]) == (2, 0.5)
    assert pairs["calibrated"] is None  # one permutation has no threshold of 5%
    moved = told("--null", "grid")
    assert moved["test"]["what"] == "images that are flipped and rotated"
    assert moved["p_value"] == 1 / 200
    assert run("compare", *both[:-1]) == 0
    assert "p-values from 23 permutations of 4 images or texts; none can be below 0.0417" in capsys.readouterr().out
    for options, message in (
        (("--groups", tmp_path / "none.txt"), "none.txt"),
        (("--groups", tmp_path / "a.npy"), "groups must have shape (100,) or (4,)"),
        (("--null", "grid", "--positions", "mean"), "--null grid needs maps"),
    ):
        assert run("compare", *both, *options) == 2
        assert message in capsys.readouterr().err


def test_a_test_of_many_samples_is_of_whole_groups_or_the_same_places_of_each():
    assert len(statistics._subset(400, None)) == 400
    assert len(statistics._subset(3000, None)) == 1000
    images = check_groups(np.repeat(np.arange(40), 256), {"x": np.zeros((40 * 256, 1))}, None)
    subset = statistics._subset(40 * 256, images)
    assert len(subset) == 1000
    places = subset.reshape(40, 25) % 256
    assert (places == places[0]).all()
    few = check_groups(np.arange(5000) // 5, {"x": np.zeros((5000, 1))}, None)
    assert len(statistics._subset(5000, few)) == 1000  # one sample of each of a thousand groups
    alone = check_groups(np.arange(3000), {"x": np.zeros((3000, 1))}, None)
    assert len(statistics._subset(3000, alone)) == 1000


@pytest.mark.slow
def test_grid(models, capsys):
    out = models / "report"
    assert run("grid", models / "a", models / "b", "--permutations", 99, "--density", 0.2, "--out", out) == 0
    names = {f"{name}.{kind}" for name in ("grid", "layers") for kind in ("png", "pdf")}
    names |= {f"{name}.{kind}" for name in ("grid", "best_matches", "models") for kind in ("csv", "tex")}
    assert {path.name for path in out.iterdir()} == {"grid.json", "report.html", *names}
    told = json.loads((out / "grid.json").read_text())
    expected = jaxalign.compare_grid(models / "a", models / "b", kernel=RBF(density=0.2))
    assert told["rows"] == ["layer2", "layer9", "layer10"]
    np.testing.assert_allclose(told["values"], expected.values, rtol=1e-4)
    assert list(expected.rows) == told["rows"]  # numbers in names are numbers in both
    np.testing.assert_allclose(told["density reached"], 0.2, rtol=1e-4)
    assert told["statistics"]["corrected"][0][0] == pytest.approx(0.01)
    assert len(told["provenance"]["sha256"]) == 6
    assert jaxalign.ComparisonGrid.from_json(out / "grid.json").columns == tuple(told["columns"])
    printed = capsys.readouterr().out
    assert "layer of a" in printed
    assert "best match in b" in printed
    assert run("grid", models / "a", models / "b", "--out", out) == 2
    assert "--force overwrites the files of an earlier run" in capsys.readouterr().err
    assert run("grid", models / "a", "--measure", "rsa", "--permutations", 0, "--out", out, "--force") == 0
    assert json.loads((out / "grid.json").read_text())["itself"]


@pytest.mark.slow
def test_options_of_the_measure(models, capsys):
    sets = models / "a" / "layer2.npy", models / "b" / "layer9.npy"
    chosen = "--option", "kernel=linear", "--option", "estimator=biased"
    assert run("compare", *sets, *chosen, "--permutations", 0, "--json") == 0
    x, y = (np.load(path).astype(np.float64) for path in sets)
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.sum((x.T @ y) ** 2) / np.sqrt(
        np.sum((x.T @ x) ** 2) * np.sum((y.T @ y) ** 2)
    )  # Kornblith et al. 2019
    assert json.loads(capsys.readouterr().out)["value"] == pytest.approx(expected, rel=1e-4)
    for chosen, reached in ((("--option", "diagonal=exclude"), 0.05), (("--option", "kernel=laplacian"), None)):
        assert run("compare", *sets, *chosen, "--permutations", 0, "--json") == 0
        found = json.loads(capsys.readouterr().out)["density reached"]
        assert found == [reached and pytest.approx(reached, rel=1e-4)] * 2
    assert run("compare", *sets, "--measure", "mutual_knn", "--option", "k=5", "--permutations", 0) == 0
    assert run("compare", *sets, "--option", "kernels=linear") == 2
    assert "kernels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("compare", *sets, "--option", "kernel")
    assert "'kernel' is not NAME=VALUE" in capsys.readouterr().err


@pytest.mark.slow
def test_maps_are_colored_over_their_images(tmp_path, capsys):
    data = jaxalign.datasets.load_patch_features()
    for name in ("vit-s14 layer 8", "efficientnet-lite0 block 10"):
        np.save(tmp_path / f"{name}.npy", data.features[name].reshape(3, 16, 16, -1)[:2])
    np.save(tmp_path / "photos.npy", data.pictures[:2])
    files = sorted(tmp_path.glob("*t*-*.npy"))
    assert len(files) == 2
    photos = ("--images", tmp_path / "photos.npy")
    assert run("ncut", *files, *photos, "--landmarks", 128, "--out", tmp_path / "cut") == 0
    colors = np.load(tmp_path / "cut" / "vit-s14 layer 8.colors.npy")
    assert colors.shape == (2, 16, 16, 3)
    assert np.load(tmp_path / "cut" / "vit-s14 layer 8.segments.npy").shape == (2, 16, 16)
    assert (tmp_path / "cut" / "colors.png").stat().st_size > 10_000
    assert "2 representation(s) of 512 samples" in capsys.readouterr().out
    out = tmp_path / "report"
    assert run("grid", files[0], files[1], *photos, "--permutations", 0, "--out", out) == 0
    assert (out / "colors.png").exists()
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 1
    np.save(tmp_path / "photos.npy", data.pictures)
    assert run("grid", files[0], files[1], *photos, "--out", out, "--force") == 2
    assert "3 images need maps" in capsys.readouterr().err


class Page(html.parser.HTMLParser):
    """The scripts, links and image sources of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)


@pytest.mark.slow
def test_names_with_html_shell_and_terminal_characters(tmp_path, capsys):
    rng = np.random.default_rng(0)
    name = "</script><img src=x onerror=alert(1)>; rm -rf $HOME `id` \x1b[2J$x_1$"
    np.savez(
        tmp_path / "x.npz", **{name.replace("/", "|"): rng.normal(size=(40, 3)), "b <b>": rng.normal(size=(40, 3))}
    )
    out = tmp_path / "out & <out>"
    assert run("grid", tmp_path / "x.npz", "--permutations", 9, "--x64", "--out", out) == 0
    page = Page((out / "report.html").read_text())
    assert [tag for tag, _ in page.tags].count("script") == 2
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    assert all(source.startswith("data:image/png") for source in sources)
    assert json.loads(page.scripts[0])["rows"] == json.loads((out / "grid.json").read_text())["rows"]
    assert "\x1b" not in capsys.readouterr().out
    assert run("align", tmp_path / "x.npz", "--x64", "--landmarks", 20, "--out", tmp_path / "al") == 0
    assert all(re.fullmatch(r"[\w .%+-]+", path.name) for path in (tmp_path / "al").iterdir())


@pytest.fixture(autouse=True)
def width_as_it_was():
    """--x64 is for the process, which here is that of the other tests too."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


def test_sets_of_different_samples_are_named(models, capsys):
    np.save(models / "b" / "layer9.npy", np.ones((59, 7), np.float32))
    assert run("grid", models / "a", models / "b", "--out", models / "out") == 2
    assert f"{models / 'b'}: layer9 has 59" in capsys.readouterr().err
    assert not (models / "out").exists()


def test_nan_is_counted_and_placed(models, capsys):
    x = np.load(models / "a" / "layer9.npy")
    x[[5, 8], 2] = np.inf
    np.save(models / "a" / "layer9.npy", x)
    assert run("grid", models / "a", "--out", models / "out") == 2
    assert "nan or inf in 2 of its 60 rows, first in row 5, feature 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grid", "none", "--out", "out"), "no file or folder none"),
        (("grid", "a", "--measure", "ckaa", "--out", "out"), "Did you mean 'cka'"),
        (("compare", "a/layer2.npy", "objects.npy"), "never unpickled"),
        (("align", "a", "--out", "a/layer2.npy"), "is a file: name a folder"),
        (("ncut", "a", "--images", "a", "--out", "out"), "holds no .png"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(models, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(models)
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def without_tqdm(monkeypatch, out):
    monkeypatch.setitem(sys.modules, "tqdm", None)


def a_file_in_the_way(monkeypatch, out):
    out.write_text("")


def no_permission(monkeypatch, out):
    def refuse(path, **how):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(out), "mkdir", refuse)


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (without_tqdm, 2, 'python -m pip install "jaxalign[demo]"'),
        (a_file_in_the_way, 2, "out is a file: name a folder"),
        (no_permission, 1, "out: Permission denied"),
    ],
)
def test_the_demo_ends_as_the_other_commands_do(spoil, code, message, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    spoil(monkeypatch, out)
    assert run("demo", "--out", out) == code
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("jaxalign: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("option", [("--density", "1.5"), ("--landmarks", "0"), ("--seed", "99999999999999999999")])
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("align", "x", "--out", "y", *option)
    assert stopped.value.code == 2
    assert f"{option[1]!r} is not a" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(models, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run("align", models / "a", "--landmarks", 30, "--out", models / "out") == 1
    assert "the disk is full" in capsys.readouterr().err
    assert not list((models / "out").iterdir())


def test_ctrl_c_is_one_line_and_130(models, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        kwargs["checkpoint"].write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(grids, "compare_grid", interrupted)
    assert run("grid", models / "a", "--out", models / "out") == 130
    said = capsys.readouterr().err
    assert "--resume continues" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_killed_grid_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for k in range(6):
        np.save(tmp_path / "a" / f"layer{k}.npy", rng.normal(size=(1500, 8)).astype(np.float32))
    command = [sys.executable, "-m", "jaxalign.cli", "grid", "a", "--permutations", "0", "--out", "out"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen([*command, "--quiet"], cwd=tmp_path, env=environment)
    checkpoint = tmp_path / "out" / "checkpoint.npz"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert checkpoint.exists()
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "grid.json").read_text())
    expected = jaxalign.compare_grid(tmp_path / "a")
    np.testing.assert_allclose(told["values"], expected.values, rtol=1e-3, atol=1e-5)
    assert not checkpoint.exists()


def test_help_has_examples(capsys):
    for command in ("info", "compare", "align", "match", "grid", "ncut", "explore"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert f"jaxalign {command} " in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.slow
def test_names_that_become_one_file_stay_two(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    np.savez(tmp_path / "x.npz", **{"a": x, "a.": x[:, :3], " A": x[:, 1:], "b" * 300: x[:, 2:]})
    assert run("align", tmp_path / "x.npz", "--landmarks", 20, "--out", tmp_path / "out") == 0
    told = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert len({name.lower() for name in told["files"].values()}) == 4
    assert len(list((tmp_path / "out").glob("*.npy"))) == 4


def test_the_input_is_never_written_over(models, capsys):
    before = {path: path.read_bytes() for path in (models / "a").iterdir()}
    assert run("align", models / "a", "--landmarks", 30, "--out", models / "a", "--force") == 2
    assert "holds the input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (models / "a").iterdir()} == before


def test_resume_goes_on_with_nothing_but_the_same_job(models, capsys, monkeypatch):
    out = models / "report"
    grid = ("grid", models / "a", "--measure", "procrustes", "--permutations", 0, "--out", out)
    assert run(*grid) == 0
    printed = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(grids, "compare_grid", lambda *args, **kwargs: 1 / 0)
        patched.setattr(grids, "run_test", lambda *args, **kwargs: 1 / 0)
        patched.setattr(grid_figures, "files_of", lambda *args, **kwargs: 1 / 0)
        assert run(*grid, "--resume") == 0  # finished: nothing is computed again
        assert capsys.readouterr().out == printed
        assert run(*grid, "--resume", "--json") == 0
        assert json.loads(capsys.readouterr().out) == json.loads((out / "grid.json").read_text())
        with pytest.raises(ZeroDivisionError):  # another report of the same grid
            run(*grid, "--permutations", 9, "--resume")
        (out / "report.html").write_text("changed since")
        with pytest.raises(ZeroDivisionError):
            run(*grid, "--resume")
    assert run(*grid, "--measure", "rsa", "--resume") == 2
    assert "from other options or inputs" in capsys.readouterr().err
    (models / "thesis").mkdir()
    (models / "thesis" / "report.html").write_text("mine")
    assert run("grid", models / "a", "--permutations", 0, "--out", models / "thesis", "--resume") == 2
    assert (models / "thesis" / "report.html").read_text() == "mine"


@pytest.mark.slow
def test_what_is_computed_outlives_a_failing_report(models, monkeypatch):
    out = models / "report"
    grid = ("grid", models / "a", "--permutations", 9, "--density", 0.2, "--out", out)
    with monkeypatch.context() as patched:
        patched.setattr(grids, "run_test", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*grid)
        patched.undo()
        patched.setattr(grids, "compare_grid", lambda *args, **kwargs: 1 / 0)
        assert run(*grid, "--resume") == 0
    assert not (out / "values.json").exists()


@pytest.mark.slow
def test_a_model_with_itself_and_devices(models, capsys):
    assert run("grid", models / "a", models / "a", "--permutations", 19, "--density", 0.2, "--out", models / "r") == 0
    told = json.loads((models / "r" / "grid.json").read_text())
    np.testing.assert_allclose(np.diag(told["values"]), 1, atol=1e-5)
    assert told["statistics"]["p_value"][0][0] == 1 / 20  # exactly, so that 0.05 is not beyond 0.05
    assert run(
        "grid", models / "a", "--permutations", 0, "--density", 0.2, "--devices", 8, "--out", models / "d"
    ) == 0  # fmt: skip
    spread = json.loads((models / "d" / "grid.json").read_text())
    np.testing.assert_allclose(spread["values"], told["values"], atol=1e-5)


@pytest.mark.slow
def test_measures_without_a_sigma_tell_none(models, capsys):
    x = np.load(models / "a" / "layer2.npy")[:15]  # too few for a density of 0.05
    np.save(models / "few.npy", x)
    assert run("compare", models / "few.npy", models / "few.npy", "--measure", "rsa", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sigma"] == [None, None]


@pytest.mark.slow
def test_byte_order_and_width(models, capsys):
    x = np.load(models / "a" / "layer2.npy").astype(np.float64) * 1.1
    np.save(models / "little.npy", x)
    np.save(models / "big.npy", x.astype(">f8"))
    found = []
    for name in ("little", "big"):
        pair = models / f"{name}.npy", models / "b" / "layer2.npy"
        assert run("compare", *pair, "--permutations", 0, "--x64", "--json") == 0
        found.append(json.loads(capsys.readouterr().out)["value"])
    assert found[0] == found[1]
    jax.config.update("jax_enable_x64", False)
    np.save(models / "wide.npy", x * 1e200)
    assert run("compare", models / "wide.npy", models / "wide.npy") == 2
    assert "beyond float32: --x64 computes in float64" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "grid", "align", "ncut", "info"])
def test_offsets_in_float64_files_cost_no_digits(command, models, capsys):
    x, y = (np.load(models / "a" / name).astype(np.float64) for name in ("layer2.npy", "layer9.npy"))
    numbers = []
    for folder, offset in (("plain", 0), ("shifted", 1e8)):
        (models / folder).mkdir()
        paths = [models / folder / "x.npy", models / folder / "y.npy"]
        for path, values in zip(paths, (x, y), strict=True):
            np.save(path, values + offset)
        out = models / f"{command} {folder}"
        more = {"align": ("--landmarks", 30, "--out", out), "grid": ("--out", out), "ncut": ("--out", out)}
        inputs = [models / folder] if command == "grid" else paths
        assert run(command, *inputs, "--density", 0.2, "--json", *more.get(command, ())) == 0
        data = json.loads(capsys.readouterr().out)
        found = {
            "compare": lambda data: [data["value"], data["p_value"], *data["density reached"]],
            "grid": lambda data: [*np.ravel(data["values"]), *np.ravel(data["statistics"]["p_value"])],
            "align": lambda data: [*data["sigma"].values(), *data["density reached"].values()],
            "ncut": lambda data: data["eigenvalues"],
            "info": lambda data: [part["sigma"] for part in data["representations"]],
        }
        numbers.append(found[command](data))
    np.testing.assert_allclose(numbers[1], numbers[0], rtol=1e-4)


def test_offsets_that_float32_cannot_hold_need_x64(models, capsys):
    x = np.load(models / "a" / "layer2.npy").astype(np.float64) + 1e8
    np.save(models / "x.npy", x)  # mutual_knn uses angles, so its features cannot be centered
    assert run("compare", models / "x.npy", models / "x.npy", "--measure", "mutual_knn") == 2
    assert re.search(r"is float64 and far from 0.*: --x64\.$", capsys.readouterr().err)
    assert run("compare", models / "x.npy", models / "x.npy", "--measure", "mutual_knn", "--x64") == 0


def test_pictures_that_do_not_belong_are_refused_before_the_work(models, monkeypatch, capsys):
    np.save(models / "photos.npy", np.zeros((3, 8, 8, 3), np.uint8))
    monkeypatch.setattr(grids, "compare_grid", lambda *args, **kwargs: 1 / 0)
    images = ("--images", models / "photos.npy")
    assert run("grid", models / "a", *images, "--out", models / "out") == 2
    assert "3 images need maps" in capsys.readouterr().err
    assert run("ncut", models / "a" / "layer2.npy", *images, "--out", models / "out") == 2
    assert not (models / "out").exists()


@pytest.mark.parametrize("name", ["values.json", "grid.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"provenance": 3}', b'{"provenance": {"options": [], "sha256": {}, "versions": {}}}', b"\xff",
     b"[" * 100_000],
    ids=["empty", "list", "object", "number", "lists", "bytes", "nested"],
)  # fmt: skip
def test_damaged_results_are_one_line(name, content, models, monkeypatch, capsys):
    monkeypatch.setattr(grids, "compare_grid", lambda *args, **kwargs: 1 / 0)
    (models / "out").mkdir()
    (models / "out" / name).write_bytes(content)
    assert run("grid", models / "a", "--permutations", 0, "--out", models / "out", "--resume") == 2
    said = capsys.readouterr().err
    assert re.search(rf"--resume: .*{name} is damaged, or not from `jaxalign grid`. Delete it", said)
    assert said.count("\n") == 1
    assert (models / "out" / name).read_bytes() == content


def test_a_result_with_parts_missing_is_damaged(models, capsys):
    out = models / "out"
    grid = ("grid", models / "a", "--measure", "procrustes", "--permutations", 0, "--out", out)
    assert run(*grid) == 0
    whole = json.loads((out / "grid.json").read_text())
    capsys.readouterr()
    changes = {
        "values": [[1.0]],
        "sigma": 3,
        "models": [],
        "best matches": [{"layer": 1}],
        "direction": "up",
        "written": 1,
    }
    for name, value in changes.items():
        (out / "grid.json").write_text(json.dumps({**whole, name: value}))
        assert run(*grid, "--resume") == 2
        assert "grid.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["grid", "align", "ncut", "demo"])
def test_one_run_at_a_time_writes_to_a_folder(command, models, capsys):
    out = models / "out"
    out.mkdir()
    inputs = [] if command == "demo" else [models / "a"]
    more = ["--resume"] if command == "grid" else ["--force"]
    with storage.locked(out):
        assert run(command, *inputs, *more, "--out", out) == 1
    said = capsys.readouterr().err
    assert f"{out}: another job is using it" in said
    assert said.count("\n") == 1
    assert list(out.iterdir()) == []


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_force_removes_only_what_a_command_wrote(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    content = {name: name.encode() for name in ("keep.txt", "old.npy", "weights.npy", "grid.png", "link.npy")}
    for name, text in content.items():
        (out / name).write_bytes(text)
    (tmp_path / "outside.npy").write_bytes(b"outside")
    (out / "link.npy").unlink()
    (out / "link.npy").symlink_to(tmp_path / "outside.npy")
    written = {name: sha256(text) for name, text in content.items()}
    written |= {"weights.npy": sha256(b"before"), "link.npy": sha256(b"outside"), "../outside.npy": sha256(b"outside")}
    listed = {"files": list(written), "written": written}
    (out / "grid.json").write_text(json.dumps({**listed, "written": {"keep.txt": written["keep.txt"], "": ""}}))
    (out / "alignment.json").write_text(json.dumps(listed))
    (out / "cut.json").write_text(json.dumps({"files": ["keep.txt", "weights.npy"]}))  # not as it is written
    with commands.output_folder(out, (), force=True):
        assert commands.contents_of(out) == ["cut.json", "grid.png", "keep.txt", "link.npy", "weights.npy"]
    assert (tmp_path / "outside.npy").read_bytes() == b"outside"
    # And all of what was written, by its own manifest.
    commands.write_manifest(out / "alignment.json", {}, [commands.write_array(out / "a.npy", np.ones(3))])
    with commands.output_folder(out, (), force=True):
        assert not (out / "a.npy").exists()
        assert not (out / "alignment.json").exists()


def test_pictures_are_inputs_too(models, capsys):
    np.save(models / "a" / "photos.npy", np.zeros((60, 2, 2, 3), np.uint8))
    np.save(models / "maps.npy", np.ones((60, 2, 2, 3), np.float32))
    images = ("--images", models / "a" / "photos.npy")
    assert run("ncut", models / "maps.npy", *images, "--out", models / "a", "--force") == 2
    assert "holds the input" in capsys.readouterr().err


@pytest.mark.parametrize("content", [np.zeros(()), np.zeros((0, 2, 2, 3)), np.full((2, 2, 2, 3), "a"), None])
def test_pictures_that_are_none(content, models, capsys):
    np.save(models / "photos.npy", np.zeros(1) if content is None else content)
    if content is None:
        (models / "photos.npy").write_bytes(b"")
    assert run("grid", models / "a", "--images", models / "photos.npy", "--out", models / "out") == 2
    assert re.search(r"--images .*photos\.npy: (expected|it does not start)", capsys.readouterr().err)


def test_the_demo_keeps_what_is_there(tmp_path, capsys):
    (tmp_path / "affinities.png").write_text("mine")
    assert run("demo", "--out", tmp_path) == 2
    assert "--force overwrites" in capsys.readouterr().err
    assert (tmp_path / "affinities.png").read_text() == "mine"


@pytest.mark.parametrize("arguments", [["info", "x.npy"], ["info", "--help"]])
def test_closed_output_ends_in_silence(arguments, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(commands, "info", lambda options: commands.Result({}, "text"))
    monkeypatch.setattr(sys, "argv", ["jaxalign", *arguments])
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            cli.entry()
        assert ended.value.code == 1
        stream.flush()  # as Python does at its end: it would report what goes wrong


def test_output_that_is_not_there(monkeypatch):
    monkeypatch.setattr(commands, "info", lambda options: commands.Result({}, "text"))
    monkeypatch.setattr(sys, "stdout", None)  # jaxalign ... >&-
    monkeypatch.setattr(sys, "argv", ["jaxalign", "info", "x.npy"])
    with pytest.raises(SystemExit) as ended:
        cli.entry()
    assert not ended.value.code


def test_names_that_the_terminal_cannot_show(monkeypatch):
    raw = stdio.BytesIO()
    monkeypatch.setattr(sys, "stdout", stdio.TextIOWrapper(raw, "ascii"))
    monkeypatch.setattr(commands, "info", lambda options: commands.Result({}, "couche é"))
    monkeypatch.setattr(sys, "argv", ["jaxalign", "info", "x.npy"])
    with pytest.raises(SystemExit):
        cli.entry()
    assert raw.getvalue() == b"couche \\xe9\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), "jaxalign: Input/output error\n"),
        (OSError(errno.EMFILE, "Too many open files"), "jaxalign: the limit of open files"),
    ],
)
def test_errors_without_a_file_name_nothing(error, message, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setattr(commands, "info", fail)
    assert run("info", "x.npy") == 1
    assert capsys.readouterr().err.startswith(message)


def test_the_program_opens_as_many_files_as_it_may():
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
        cli._open_many_files()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_sets_larger_than_the_memory_are_refused_before_the_work(models, monkeypatch, capsys):
    for module, name in ((commands, "align"), (grids, "compare_grid"), (commands, "normalized_cut")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(_memory, "_UNCHECKED_BYTES", 0)
    monkeypatch.setattr(_memory, "_room", lambda: 100.0)
    x = models / "a" / "layer2.npy"
    out = ("--out", models / "out")
    np.save(models / "half.npy", np.load(x).astype(np.float16))
    for arguments in (("compare", x, x), ("align", x, *out), ("ncut", x, *out), ("grid", models / "half.npy", *out)):
        assert run(*arguments) == 1
        words = r"(layer2|half) takes 1\.68e-06 GB of memory, but only 1e-07 GB are free"
        assert re.search(words, capsys.readouterr().err)


# --- the compilation cache -------------------------------------------------------------------------------------------


class Config(SimpleNamespace):
    """Of jax, as a user has it who has set nothing."""

    jax_enable_compilation_cache = True
    jax_compilation_cache_dir = None

    def update(self, name, value):
        setattr(self, name, value)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Settings of jax, and a cache folder, that are not those of the tests."""
    config = Config()
    monkeypatch.setattr(cache, "jax", SimpleNamespace(config=config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    return config


@pytest.mark.slow
def test_programs_are_kept_for_the_next_run(models):
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(models / "cache")}
    environment |= {"LOCALAPPDATA": str(models / "cache"), "HOME": str(models / "cache")}
    command = [sys.executable, "-m", "jaxalign.cli", "info", str(models / "a" / "layer2.npy"), "--quiet"]

    def kept():
        return {path for path in (models / "cache").rglob("*") if path.is_file()}

    def output(*options):
        done = subprocess.run([*command, *options], env=environment, check=True, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout

    expected = output("--no-cache")
    assert not kept()
    assert output() == expected
    first = kept()
    assert first
    assert all("jaxalign" in path.parts for path in first)
    assert output() == expected
    assert kept() == first  # all were found
    environment["JAX_COMPILATION_CACHE_DIR"] = str(models / "own")
    assert output() == expected
    assert kept() == first


@pytest.mark.parametrize(
    ("name", "value"), [("jax_compilation_cache_dir", "own"), ("jax_enable_compilation_cache", False)]
)
def test_a_cache_that_the_user_has_set_is_respected(name, value, config, tmp_path):
    config.update(name, value)
    before = dict(vars(config))
    assert cache.keep_compiled() is None
    assert vars(config) == before
    assert not list(tmp_path.iterdir())


def test_without_a_cache_nothing_is_set_but_that(config, tmp_path):
    assert cache.keep_compiled(enabled=False) is None
    assert vars(config) == {"jax_enable_compilation_cache": False}
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions of POSIX")
def test_a_cache_folder_is_private(config, tmp_path):
    assert cache.keep_compiled() is None
    folder = Path(config.jax_compilation_cache_dir)
    assert folder.parent == tmp_path / "jaxalign"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    config.jax_compilation_cache_dir = None
    assert "is writable by other users" in cache.keep_compiled()
    assert config.jax_compilation_cache_dir is None


def test_a_cache_folder_that_cannot_be_made_breaks_nothing(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "jaxalign").write_text("in the way")
    monkeypatch.setattr(commands, "info", lambda options: commands.Result({}, "text"))
    for quiet, lines in ((["--quiet"], 0), ([], 1)):
        assert cli.main(["info", "x.npy", *quiet], keep_compiled=True) == 0
        printed = capsys.readouterr()
        assert printed.out == "text\n"
        assert printed.err.count("\n") == lines
    assert printed.err.startswith("jaxalign: compiled programs are not cached for the next run: ")
    assert config.jax_compilation_cache_dir is None

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setattr(cache, "user_folder", no_home)
    assert "no home" in cache.keep_compiled()


@pytest.mark.parametrize(
    ("system", "environment", "expected"),
    [
        ("linux", {}, ".cache/jaxalign"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, ".cache/jaxalign"),
        ("darwin", {}, "Library/Caches/jaxalign"),
        ("win32", {}, "AppData/Local/jaxalign"),
        ("win32", {"LOCALAPPDATA": "/home/someone/local"}, "local/jaxalign"),
    ],
)
def test_the_cache_is_where_the_system_keeps_such_files(system, environment, expected, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    assert cache.user_folder() == Path("/home/someone") / expected


def test_the_oldest_programs_are_removed_where_there_are_too_many(tmp_path):
    for k in range(6):
        (tmp_path / str(k)).write_bytes(bytes(100))
        os.utime(tmp_path / str(k), (k, k))
    cache.trim(tmp_path, above=600, to=250)
    assert len(list(tmp_path.iterdir())) == 6
    cache.trim(tmp_path, above=599, to=250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_the_library_sets_no_cache():
    code = "import jax, jaxalign, jaxalign.report.commands; print(jax.config.jax_compilation_cache_dir)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "None\n"
