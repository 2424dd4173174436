"""Pictures: each looks as it did when it was looked at, and draws what it was given.

The images in tests/pictures are made by `python tests/test_plots.py`, and then looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import plots

matplotlib = pytest.importorskip("matplotlib", reason='pictures: python -m pip install "jaxalign[viz]"')
matplotlib.use("agg")

EXPECTED = Path(__file__).parent / "pictures"
# Root mean square of 0 .. 255: fonts are drawn a little otherwise from version to version; another colour map is 40.
TOLERANCE = 12


def sets(n=60):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(n, 6))
    noise = rng.normal(size=(4, n, 6))
    return {f"layer {k}": (shared + amount * noise[k]).astype(np.float32) for k, amount in enumerate((0, 0.5, 1, 2))}


def patches():
    rows, columns = np.indices((8, 8)) / 8
    return np.stack([np.stack([rows, columns, 1 - rows], -1), np.stack([columns, rows, 1 - columns], -1)])


def affinity():
    x = np.repeat(4 * np.eye(3, 5, dtype=np.float32), 20, 0) + np.random.default_rng(0).normal(size=(60, 5))
    return plots.affinity(jaxalign.rbf_affinity(x.astype(np.float32), density=0.2), groups=np.arange(60) // 20).figure


def color_panels():
    colours, pictures = patches(), np.kron(patches(), np.ones((8, 8, 1)))
    noise = np.random.default_rng(0).random(colours.shape)
    groups = {"before": {"vit layer 8": noise, "cnn": 1 - colours}, "after": {"vit layer 8": colours, "cnn": colours}}
    return plots.color_panels(groups, pictures, scores={"before": "agreement 0.1", "after": "agreement 1.0"})


def matches():
    picture = np.kron(patches()[0], np.ones((8, 8, 1)))
    where = np.argwhere(np.ones((8, 8)))
    index = np.arange(64)
    index[::7], index[3::9] = 63, (index[3::9] + 1) % 64
    left, _ = plots.matches(picture, picture[::-1], where, index, (8, 8))
    return left.figure


def grid():
    some = sets()
    compared = jaxalign.compare_grid(some, density=0.2)
    test = jaxalign.permutation_test(some, some, key=jax.random.key(0), permutations=99, density=0.2)
    return plots.grid(compared, test=test).figure


def layers():
    values = {"same depth": np.linspace(0.2, 0.9, 6), "best match": np.sqrt(np.linspace(0.2, 0.9, 6))}
    band = {"same depth": (values["same depth"] - 0.05, values["same depth"] + 0.05)}
    return plots.layers(values, names=[f"block {k}" for k in range(6)], intervals=band, label="CKA").figure


def density():
    return plots.density(sets()["layer 0"], points=15).figure


def dissimilarities():
    some = sets()
    return plots.dissimilarities(some["layer 0"], some["layer 2"], names=("dino", "clip")).figure


def models():
    return plots.models(jaxalign.compare_grid(sets(), density=0.2), groups=["a", "a", "b", "b"]).figure


def segments():
    return plots.segments(np.arange(64).reshape(8, 8) // 16, np.kron(patches()[0], np.ones((8, 8, 1)))).figure


PICTURES = (affinity, color_panels, matches, grid, layers, density, dissimilarities, models, segments)


def save(figure, path):
    figure.savefig(path, dpi=60, metadata={"Software": None})
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("draw", PICTURES, ids=lambda draw: draw.__name__)
def test_looks_as_it_did(draw, tmp_path):
    from matplotlib.testing.compare import compare_images

    matplotlib.rcdefaults()
    path = tmp_path / f"{draw.__name__}.png"
    save(draw(), path)
    assert compare_images(EXPECTED / path.name, path, TOLERANCE) is None


def test_a_picture_that_differs_is_noticed(tmp_path):
    from matplotlib.testing.compare import compare_images

    ax = plots.affinity(1 - np.eye(60))
    save(ax.figure, tmp_path / "affinity.png")
    assert compare_images(EXPECTED / "affinity.png", tmp_path / "affinity.png", TOLERANCE) is not None


def test_axes_given_are_drawn_into():
    figure, axes = matplotlib.pyplot.subplots(1, 2)
    assert plots.affinity(np.eye(3), ax=axes[0]) is axes[0]
    assert plots.grid(jaxalign.compare_grid(sets(), density=0.2), ax=axes[1]) is axes[1]
    matplotlib.pyplot.close(figure)


def test_the_first_row_of_a_grid_is_on_top_as_in_the_report():
    some = sets()
    other = {name: some[name] for name in ("layer 1", "layer 3")}
    ax = plots.grid(jaxalign.compare_grid(some, other, density=0.2))
    assert ax.transData.transform((0, 0))[1] > ax.transData.transform((0, 1))[1]
    assert [text.get_text() for text in ax.get_xticklabels()] == list(other)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(some)


def test_what_is_not_beyond_chance_stands_in_brackets():
    some = {"signal": sets()["layer 0"], "noise": np.random.default_rng(5).normal(size=(60, 6)).astype(np.float32)}
    other = {"target": sets()["layer 1"]}
    test = jaxalign.permutation_test(some, other, key=jax.random.key(0), permutations=99, density=0.2)
    ax = plots.grid(jaxalign.compare_grid(some, other, density=0.2), test=test)
    texts = [text.get_text() for text in ax.texts]
    assert not texts[0].startswith("(")
    assert texts[1].startswith("(")
    matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("how", "told"), [({}, "two patches"), ({"near": 1.0}, "1 patch"), ({"near": 1.5}, "1.5 patches")]
)
def test_the_legend_of_matches_tells_what_is_near(how, told):
    figure = matplotlib.figure.Figure()
    plots.match_legend(figure, **how)
    assert figure.legends[0].get_texts()[1].get_text() == f"at most {told} off"


def test_classical_scaling_shows_a_plane_as_it_is():
    places = np.random.default_rng(0).normal(size=(6, 2))
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    ax = plots.models(distances, names=list("abcdef"))
    drawn = np.stack([text.xy for text in ax.texts])
    np.testing.assert_allclose(np.linalg.norm(drawn[:, None] - drawn[None], axis=-1), distances, atol=1e-6)
    assert ax.get_title().startswith("100%")
    matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.affinity(np.eye(3), groups=[1, 2]), "groups has 2 entries"),
        (lambda: plots.affinity(np.ones(3)), r"shape \(n, m\)"),
        (lambda: plots.color_panels({}), "groups is empty"),
        (lambda: plots.color_panels({"a": {"x": patches()}, "b": {"y": patches()}}), "networks of 'b'"),
        (lambda: plots.color_panels({"a": {"x": patches()[0]}}), r"\(pictures, h, w, 3\)"),
        (lambda: plots.color_panels({"a": {"x": patches()}}, patches()[:1]), "pictures are 1"),
        (lambda: plots.matches(patches()[0], patches()[0], np.ones((3, 2)), np.arange(4), (2, 2)), "for q = 4"),
        (lambda: plots.layers({"a": np.ones(3), "b": np.ones(4)}), "one value a layer"),
        (lambda: plots.models(np.ones((3, 2))), "must be square"),
        (lambda: plots.models(np.full((3, 3), np.nan)), "nan or inf"),
        (lambda: plots.models(np.zeros((1, 1))), "at least two models"),
        (lambda: plots.models(np.ones((3, 3)), names=["a"]), "names are 1, the models 3"),
        (lambda: plots.layers({"a": np.ones(3)}, names=np.array(["p"])), "names are 1, the layers 3"),
        (lambda: plots.segments(np.ones((3, 3), int), keep=np.ones((2, 3), bool)), "keep has shape"),
        (lambda: plots.segments(np.ones(3, int)), r"shape \(h, w\)"),
        (lambda: plots.dissimilarities(np.eye(5, dtype=np.float32), np.eye(4, dtype=np.float32)), "same samples"),
    ],
)
def test_bad_input(draw, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        draw()


def test_names_are_drawn_as_they_are(tmp_path):
    ax = plots.layers({"_orig_mod.0": np.ones(3), "$\\frac{$": np.zeros(3)}, names=["$a", "_b", "c"])
    assert [text.get_text().strip() for text in ax.get_legend().get_texts()] == ["_orig_mod.0", "\\$\\frac{\\$"]
    ax.figure.savefig(tmp_path / "names.png")
    matplotlib.pyplot.close(ax.figure)


def test_every_segment_has_a_colour_and_keep_may_be_of_numbers():
    picture = plots.segments(np.arange(25).reshape(5, 5)).images[-1]
    assert len(np.unique(picture.to_rgba(picture.get_array()).reshape(-1, 4), axis=0)) == 25
    kept = plots.segments(np.zeros((3, 3), int), keep=np.array([[1, 0, 0]] * 3)).images[-1].get_array()
    np.testing.assert_array_equal(kept.mask, [[False, True, True]] * 3)
    matplotlib.pyplot.close("all")


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"jaxalign\[viz\]"):
        plots.layers({"a": np.ones(3)})


if __name__ == "__main__":
    EXPECTED.mkdir(exist_ok=True)
    for draw in PICTURES:
        save(draw(), EXPECTED / f"{draw.__name__}.png")
