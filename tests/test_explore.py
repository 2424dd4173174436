"""The page of `jaxalign explore`: its numbers, what it shows in a browser, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest

import jaxalign
from jaxalign import cli
from jaxalign.report import compression, explore, explore_page
from jaxalign.report.baselines import standardized
from jaxalign.report.coloring import checkerboard, joint_cut

pytest.importorskip("PIL", reason='images: python -m pip install "jaxalign[viz]"')
pytestmark = pytest.mark.usefixtures("usual_promotion")
NETWORKS = ("mobilenet-v2 block 13", "pp-ocrv4 stride 16")  # of one width, so that they share programs
OPTIONS = {"density": 0.05, "segments": 4, "landmarks": 64, "seed": 0}


def run(*arguments):
    return cli.main([str(argument) for argument in (*arguments, "--quiet")])


@pytest.fixture
def features():
    """Patches of two small images in two networks."""
    data = jaxalign.datasets.load_patch_features()
    return {name: data.features[name].reshape(3, 16, 16, -1)[:2, :6, :6].reshape(72, -1) for name in NETWORKS}


def test_affinities_of_compressed_rows_are_close_to_the_exact_ones():
    x = standardized(jaxalign.datasets.load_patch_features().features[NETWORKS[0]])
    exact = np.asarray(jaxalign.rbf_affinity(x, bandwidth="per_row"))[::10]
    errors = []
    for num_bytes in (10_000, 20_000, 50_000):
        rows = compression.compress(x, num_bytes, 0.05)
        assert len(zlib.compress(compression.packed(rows.codes))) < num_bytes
        affinity = np.stack([rows.affinity(i) for i in range(0, 768, 10)])
        # With the affinity 1 of a sample to itself, which the solver did not see, the mean is the density up to 1 / n.
        np.testing.assert_allclose(affinity.mean(1), 0.05, atol=1 / 768)
        errors.append(np.abs(affinity - exact).mean())
        assert compression.compression_error(x, rows, 0.05).mean == pytest.approx(errors[-1], rel=0.5)
    assert errors[0] < 0.02
    assert errors[1] < 0.004
    assert errors[2] < 0.001


def test_constant_rows_have_no_step_of_zero():
    rows = compression.compress(np.repeat(np.eye(2, dtype=np.float32), 20, 0), 1000, 0.6)
    assert rows.step > 0
    np.testing.assert_allclose(rows.affinity(0)[:20], 1, atol=1e-4)


def test_both_sides(features):
    before = explore.separate_side(features, OPTIONS)
    after = explore.joint_side(features, (6, 6), 2, OPTIONS)
    assert len(before.rows) == 2
    assert len(after.rows) == 1
    for side in (before, after):
        assert sum(len(rows.codes) for rows in side.rows) == len(side.colors) == side.segments.shape[1] == 144
        assert side.error.mean < 0.001
        assert [len(np.unique(labels)) for labels in side.segments] == [1, 2, 3, 4]
    # 36 of the 72 samples are candidates for landmarks: the cut is the joint one over them.
    landmarks = np.flatnonzero(np.tile(checkerboard((6, 6)), 2))
    expected = jaxalign.rgb(joint_cut(features, landmarks))
    np.testing.assert_allclose(after.colors, 255 * np.asarray(expected), atol=3)
    alignment = jaxalign.align(features, landmarks=landmarks)
    exact = np.asarray(jaxalign.joint_affinity(alignment, bandwidth="per_row"))
    np.testing.assert_allclose(after.rows[0].affinity(3), exact[3], atol=0.05)


def test_matches(features):
    matches, notes = explore.find_matches(features, (6, 6))
    assert notes == []
    partner = matches.partner[0, 1]
    assert partner.min() >= -1
    assert partner.max() < 36
    # The patches are the same samples, and half of them are known.
    assert (partner == np.tile(np.arange(36), 2)).mean() > 0.5
    assert matches.confidence.max() <= 100
    assert (matches.partner[[0, 1], [0, 1]] == -1).all()
    blank = {name: np.concatenate([x[:36], np.zeros_like(x[36:])]) for name, x in features.items()}
    matches, notes = explore.find_matches(blank, (6, 6))
    assert (matches.partner[..., 36:] == -1).all()
    assert (matches.partner[0, 1, :36] >= 0).any()
    assert len(notes) == 1
    assert notes[0].startswith("image 2 has no matches")


def test_maps_are_resized_to_the_finest_grid():
    rng = np.random.default_rng(0)
    maps = {"a": rng.normal(size=(2, 4, 6, 3)).astype(np.float32), "b": np.ones((2, 2, 3, 5), np.float32)}
    maps["b"][:, 1] = 3
    resized, notes = explore.on_one_grid(maps)
    assert resized["b"].shape == (2, 4, 6, 5)
    np.testing.assert_array_equal(resized["a"], maps["a"])
    np.testing.assert_allclose(resized["b"][0, :, 0, 0], [-1, -0.5, 0.5, 1], atol=1e-6)
    assert notes == ["b: maps of 2 x 3 were resized to 4 x 6"]


@pytest.fixture
def folder(tmp_path):
    """A folder of layers, a file of tokens and their images."""
    rng = np.random.default_rng(0)
    (tmp_path / "cnn").mkdir()
    for name, side in (("block2", 8), ("block10", 4)):
        np.save(tmp_path / "cnn" / f"{name}.npy", rng.normal(size=(2, side, side, 5)).astype(np.float32))
    np.save(tmp_path / "vit.npy", rng.normal(size=(2, 16, 6)).astype(np.float32))
    np.save(tmp_path / "photos.npy", rng.integers(0, 255, (2, 20, 30, 3), np.uint8))
    return tmp_path


def test_layers_are_chosen_by_name(folder):
    inputs = explore.read_networks([folder / "cnn", folder / "vit.npy"], None)
    assert list(inputs.arrays) == ["cnn", "vit"]
    assert inputs.arrays["cnn"].name == "block10"
    assert inputs.notes == ("cnn: block10, the last of 2 layers (see --layer)",)
    assert explore.as_maps(inputs.arrays["vit"], inputs.rows["vit"]).shape == (2, 4, 4, 6)
    inputs = explore.read_networks([folder / "cnn"], "*2")
    assert inputs.arrays["cnn"].name == "block2"
    assert inputs.notes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cnn", "--layer", "stage*"),
            "--layer stage*: no layer of cnn has such a name; its layers are block2, block10",
        ),
        (("cnn", "--images", "three.npy"), "--images three.npy: 3 images, but cnn has maps of 2"),
        (("class.npy",), "class has shape (2, 17, 6). If the first of its 17 tokens are no patches, leave these out"),
        (("coarse.npy",), "at most 2 x 2 positions, at least 4 x 4 are needed: choose an earlier layer with --layer"),
        (("equal.npy",), "equal: no sigma found"),
        (("cnn", "--out", "cnn"), "--out cnn is a folder: name a file, such as cnn/explore.html"),
        (("cnn", "--out", "photos.npy", "--force"), "--out photos.npy exists: name another file"),
        (("cnn", "--out", "none/page.html"), "there is no folder none. Make it, or name another file"),
    ],
)
def test_refusals(folder, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    np.save("three.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.save("class.npy", np.ones((2, 17, 6), np.float32))
    np.save("equal.npy", np.ones((2, 4, 4, 6), np.float32))
    np.save("coarse.npy", np.ones((2, 2, 2, 6), np.float32))
    images = [] if "--images" in arguments else ["--images", "photos.npy"]
    out = [] if "--out" in arguments else ["--out", "page.html"]
    assert run("explore", *arguments, *images, *out) == 2
    assert message in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------------------------


def content_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def decoded(stored):
    return np.frombuffer(zlib.decompress(base64.b64decode(stored["bytes"])), stored["dtype"])


def test_arrays_are_stored_without_loss():
    for values in (np.arange(6, dtype=np.int8).reshape(2, 3).T, np.linspace(0, 1, 5, dtype=np.float32)):
        np.testing.assert_array_equal(decoded(explore_page.array(values)), values.ravel())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of three photographs in two networks."""
    folder = tmp_path_factory.mktemp("explore")
    data = jaxalign.datasets.load_patch_features()
    for name in NETWORKS:
        np.save(folder / f"{name}.npy", data.features[name].reshape(3, 16, 16, -1))
    np.save(folder / "photos.npy", data.pictures)
    files = [folder / f"{name}.npy" for name in NETWORKS]
    options = ("--segments", 4, "--images", folder / "photos.npy", "--out", folder / "page.html")
    assert run("explore", *files, *options) == 0
    return folder / "page.html"


@pytest.mark.slow
def test_the_page_is_self_contained(page):
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|https?://(?!www\.w3\.org)|@@", text)
    assert len(text) < 1_500_000
    content = content_of(text)
    assert content["networks"] == list(NETWORKS)
    for error in content["error"].values():
        assert error["mean"] < 0.001
        assert error["strong"] < 0.01
    assert content["provenance"]["versions"]["jaxalign"] == jaxalign.__version__


# A window of Chromium is not as narrow as a phone, but a frame may be.
FRAME = """<iframe src="driven.html" width="380" height="800"></iframe><pre id="results"></pre>
<script>onmessage = event => { document.getElementById("results").textContent = event.data; };</script>"""
# What a reader does: select a patch, switch, move by keys.
ACTIONS = """<script>
const event = (Kind, type, options) => new Kind(type, {bubbles: true, cancelable: true, ...options});
function click(panel, x, y) {
  const {left, top, width, height} = panel.element.getBoundingClientRect();
  const clientX = left + x * width, clientY = top + y * height;
  panel.element.dispatchEvent(event(MouseEvent, "click", {clientX, clientY}));
}
function press(panel, ...keys) {
  panel.element.focus();
  for (const key of keys) panel.element.dispatchEvent(event(KeyboardEvent, "keydown", {key}));
}
const choose = value => document.querySelector(`input[value=${value}]`).click();
function act() {
  const results = {}, text = id => document.getElementById(id).textContent;
  click(panels[4], (7 + .5) / 16, (3 + .2) / 16);
  Object.assign(results, {clicked: {...state}, after: [...values]});
  results.marks = document.querySelectorAll(".mark.match").length;
  press(panels[0], "ArrowRight", "ArrowDown");
  results.moved = text("readout");
  choose("before");
  Object.assign(results, {before: [...values], explanation: text("explanation")});
  press(panels[0], "ArrowRight", "Enter");
  results.selected = {...state};
  choose("segments"); choose("after");
  const slider = document.getElementById("segments");
  slider.value = 3; slider.dispatchEvent(new Event("input"));
  const pixel = panels[2].canvas.getContext("2d").getImageData(3, 6, 1, 1).data;
  Object.assign(results, {pixel: [...pixel].slice(0, 3), color: PALETTE[label(panels[2].start + 6 * width + 3)]});
  Object.assign(results, {readout: text("readout"), hash: location.hash});
  results.overflow = document.documentElement.scrollWidth - innerWidth;
  results.tabs = panels.filter(p => p.element.tabIndex === 0 && p.element.getAttribute("aria-label")).length;
  parent.postMessage(JSON.stringify(results), "*");
}
const waiting = setInterval(() => {
  if (document.getElementById("grid").getAttribute("aria-busy") === "false") { clearInterval(waiting); act(); }
}, 10);
</script></body>"""


@pytest.fixture(scope="module")
def results(page):
    """What the page shows in Chromium after a few clicks and keys, at the width of a phone."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    page.with_name("driven.html").write_text(page.read_text().replace("</body>", ACTIONS))
    page.with_name("frame.html").write_text(FRAME)
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.with_name("frame.html").as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return json.loads(re.search(r'<pre id="results">(.*?)</pre>', dumped)[1].replace("&amp;", "&"))


def stored_rows(page, side):
    """The compressed rows on a page."""
    for rows in content_of(page.read_text())["sides"][side]["rows"]:
        rest, sigma = decoded(rows["rest"]), decoded(rows["sigma"])
        codes = decoded(rows["codes"]).reshape(-1, len(rest)).T
        yield compression.CompressedRows(codes, rows["step"], rest, sigma)


@pytest.mark.slow
def test_the_browser_shows_what_python_computes(page, results):
    # Panel 4 of 2 x 3: the second image in the second network; row 3, column 7.
    assert (results["clicked"]["network"], results["clicked"]["image"], results["clicked"]["patch"]) == (1, 1, 55)
    (joint,) = stored_rows(page, "after")
    np.testing.assert_allclose(results["after"], joint.affinity(768 + 256 + 55), rtol=1e-12)
    own = np.concatenate([rows.affinity(256 + 55) for rows in stored_rows(page, "before")])
    np.testing.assert_allclose(results["before"], own, rtol=1e-12)
    # The keys moved from row 3, column 7 to row 4, column 8, counted from 0, in the first image of the first network.
    value = joint.affinity(768 + 256 + 55)[4 * 16 + 8]
    assert results["moved"] == f"{NETWORKS[0]}, image 1, row 5, column 9, affinity {value:.3f}"


@pytest.mark.slow
def test_the_page_is_used_by_keys(results):
    assert results["explanation"].startswith("Before alignment there are only distances within a network")
    assert (results["selected"]["network"], results["selected"]["image"], results["selected"]["patch"]) == (
        0,
        0,
        4 * 16 + 9,
    )
    assert results["tabs"] == 6
    assert results["marks"] == 1
    assert "view=segments" in results["hash"]
    assert "segments=3" in results["hash"]
    assert "of 3" in results["readout"]
    np.testing.assert_allclose(results["pixel"], results["color"], atol=2)


@pytest.mark.slow
def test_the_page_fits_a_phone(results):
    assert results["overflow"] <= 0
