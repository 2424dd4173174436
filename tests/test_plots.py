"""Figures: each draws the numbers it was given, its text reports them, and its marks look as they did.

Text is compared as it is drawn, string by string, and pictures are compared without text: the look and the size of
letters differ between versions of matplotlib by more than a missing number does. The images in tests/pictures are made
by `python tests/test_plots.py`, and then looked at.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import reference_measures

import jaxalign
from jaxalign import plots
from jaxalign.kernels import RBF

matplotlib = pytest.importorskip("matplotlib", reason='pictures: python -m pip install "jaxalign[viz]"')
matplotlib.use("agg")

EXPECTED = Path(__file__).parent / "pictures"
# Root mean square of 0 .. 255. Lines and points are the same to the pixel in matplotlib 3.9 to 3.11. Version 3.11
# places images differently within a pixel, by up to 19 here, so what images show is compared as numbers.
TOLERANCE = 1
TOLERANCE_OF_IMAGES = 20
WITH_IMAGES = ("affinity", "color_panels", "matches", "grid", "segments")


def sets(n=60):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(n, 6))
    noise = rng.normal(size=(4, n, 6))
    return {f"layer {k}": (shared + amount * noise[k]).astype(np.float32) for k, amount in enumerate((0, 0.5, 1, 2))}


def patches():
    rows, columns = np.indices((8, 8)) / 8
    return np.stack([np.stack([rows, columns, 1 - rows], -1), np.stack([columns, rows, 1 - columns], -1)])


def affinity_of_groups():
    x = np.repeat(4 * np.eye(3, 5, dtype=np.float32), 20, 0) + np.random.default_rng(0).normal(size=(60, 5))
    return jaxalign.rbf_affinity(x.astype(np.float32), density=0.2)


def affinity():
    return plots.affinity(affinity_of_groups(), groups=np.arange(60) // 20).figure


def color_panels():
    colours, pictures = patches(), np.kron(patches(), np.ones((8, 8, 1)))
    noise = np.random.default_rng(0).random(colours.shape)
    groups = {"before": {"vit layer 8": noise, "cnn": 1 - colours}, "after": {"vit layer 8": colours, "cnn": colours}}
    return plots.color_panels(groups, pictures, scores={"before": "agreement 0.1", "after": "agreement 1.0"})


def matched():
    index = np.arange(64)
    index[::7], index[3::9] = 63, (index[3::9] + 1) % 64
    return np.argwhere(np.ones((8, 8))), index


def matches():
    picture = np.kron(patches()[0], np.ones((8, 8, 1)))
    left, _ = plots.matches(picture, picture[::-1], *matched(), (8, 8))
    plots.match_legend(left.figure)
    return left.figure


@functools.cache
def compared_and_tested():
    test = jaxalign.permutation_test(sets(), sets(), key=jax.random.key(0), permutations=99, kernel=RBF(density=0.2))
    return jaxalign.compare_grid(sets(), kernel=RBF(density=0.2)), test


def grid():
    compared, test = compared_and_tested()
    return plots.grid(compared, test=test).figure


CURVES = {"same depth": np.linspace(0.2, 0.9, 6), "best match": np.sqrt(np.linspace(0.2, 0.9, 6))}
BAND = CURVES["same depth"] - 0.05, CURVES["same depth"] + 0.05
BLOCKS = [f"block {k}" for k in range(6)]


def layers():
    return plots.layers(CURVES, names=BLOCKS, intervals={"same depth": BAND}, label="CKA").figure


def density():
    return plots.density(sets()["layer 0"], points=15).figure


def dissimilarities():
    some = sets()
    return plots.dissimilarities(some["layer 0"], some["layer 2"], names=("dino", "clip")).figure


def models():
    return plots.models(compared_and_tested()[0], groups=["a", "a", "b", "b"]).figure


def segments():
    return plots.segments(np.arange(64).reshape(8, 8) // 16, np.kron(patches()[0], np.ones((8, 8, 1)))).figure


PICTURES = (affinity, color_panels, matches, grid, layers, density, dissimilarities, models, segments)


def save(figure, path):
    """The marks of a figure, without its text and legends."""
    from matplotlib.legend import Legend
    from matplotlib.text import Text

    figure.set_size_inches(np.ceil(figure.get_size_inches() * 60) / 60)  # whole pixels
    figure.draw_without_rendering()  # creates the tick labels
    for artist in figure.findobj(lambda artist: isinstance(artist, (Text, Legend))):
        artist.set_visible(False)
    figure.savefig(path, dpi=60, metadata={"Software": None})
    matplotlib.pyplot.close(figure)


@pytest.mark.slow
@pytest.mark.parametrize("draw", PICTURES, ids=lambda draw: draw.__name__)
def test_looks_as_it_did(draw, tmp_path):
    from matplotlib.testing.compare import compare_images

    matplotlib.rcdefaults()
    path = tmp_path / f"{draw.__name__}.png"
    save(draw(), path)
    tolerance = TOLERANCE_OF_IMAGES if draw.__name__ in WITH_IMAGES else TOLERANCE
    assert compare_images(EXPECTED / path.name, path, tolerance) is None


@pytest.mark.slow
def test_a_picture_that_differs_is_noticed(tmp_path):
    from matplotlib.testing.compare import compare_images

    matplotlib.rcdefaults()
    ax = plots.affinity(1 - np.eye(60))
    save(ax.figure, tmp_path / "affinity.png")
    assert compare_images(EXPECTED / "affinity.png", tmp_path / "affinity.png", TOLERANCE_OF_IMAGES) is not None
    figure = layers()
    figure.axes[0].lines[1].remove()
    save(figure, tmp_path / "layers.png")
    assert compare_images(EXPECTED / "layers.png", tmp_path / "layers.png", TOLERANCE) is not None


def drawn_text(figure):
    """Every piece of text that drawing a figure puts on the page, all of it inside of the page."""
    from matplotlib.text import Text

    drawn, draw = [], Text.draw

    def watch(text, renderer, *rest, **named):
        if text.get_visible() and text.get_text().strip():
            drawn.append(text.get_text())
            box, page = text.get_window_extent(renderer), figure.bbox
            # Tick labels may reach out by a letter where nothing lays the figure out.
            assert box.x0 > page.x0 - 3, text
            assert box.x1 < page.x1 + 3, text
            assert box.y0 > page.y0 - 3, text
            assert box.y1 < page.y1 + 3, text
        return draw(text, renderer, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", watch)
        figure.canvas.draw()
    return drawn


def numbers_along(axis):
    """The tick labels of an axis of numbers: at least three, and each the number of its place, in view."""
    low, high = sorted(axis.get_view_interval())
    pairs = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    labels = {place: label.get_text() for place, label in pairs if low - 1e-9 <= place <= high + 1e-9}
    assert len(labels) >= 3
    for place, label in labels.items():
        power = re.fullmatch(r"\$\\mathdefault\{10\^\{(.*)\}\}\$", label)
        number = float(label.replace("\N{MINUS SIGN}", "-")) if power is None else 10 ** float(power[1])
        np.testing.assert_allclose(number, place, atol=1e-9)
    return list(labels.values())


def check_text(figure, expected, *axes):
    """All that is drawn is the text that is expected, and the numbers along the axes named."""
    drawn = drawn_text(figure)
    assert sorted(drawn) == sorted([*map(str, expected), *(text for axis in axes for text in numbers_along(axis))])


def test_affinity_draws_its_entries():
    expected = np.asarray(affinity_of_groups())
    order = np.random.default_rng(0).permutation(60)  # the groups are sorted
    groups = (np.arange(60) // 20)[order]
    ax = plots.affinity(expected[np.ix_(order, order)], groups=groups)
    order = order[np.argsort(groups, kind="stable")]
    np.testing.assert_array_equal(ax.images[0].get_array(), expected[np.ix_(order, order)])
    assert ax.images[0].get_cmap().name == "viridis"
    np.testing.assert_allclose(ax.images[0].norm([0, 0.25, 1]), [0, 0.5, 1])
    np.testing.assert_array_equal(ax.get_xticks(), [9.5, 29.5, 49.5])
    np.testing.assert_array_equal(ax.get_yticks(), [9.5, 29.5, 49.5])
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 1], [19.5, 19.5], [0, 1], [39.5, 39.5]]
    told = [f"mean affinity {expected.mean():.3f}", "affinity (square-root scale)", *"012", *"012"]
    check_text(ax.figure, told, ax.figure.axes[1].yaxis)
    matplotlib.pyplot.close(ax.figure)


def test_color_panels_draw_the_colors_and_name_the_networks():
    figure = color_panels()
    colors, noise = patches(), np.random.default_rng(0).random(patches().shape)
    pictures = np.kron(colors, np.ones((8, 8, 1)))
    expected = [*pictures, *noise, *(1 - colors), *pictures, *colors, *colors]
    assert len(figure.axes) == len(expected)
    for ax, image in zip(figure.axes, expected, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), image)
    check_text(figure, ["before\nagreement 0.1", "after\nagreement 1.0", "vit\nlayer 8", "cnn"])
    matplotlib.pyplot.close(figure)


def test_matches_draw_lines_between_what_matches():
    from matplotlib.patches import ConnectionPatch

    figure = matches()
    left, right = figure.axes
    picture = np.kron(patches()[0], np.ones((8, 8, 1)))
    np.testing.assert_array_equal(left.images[0].get_array(), picture)
    np.testing.assert_array_equal(right.images[0].get_array(), picture[::-1])
    (where, index), shown = matched(), np.linspace(0, 63, 28).round().astype(int)
    lines = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    assert len(lines) == len(left.lines) == len(right.lines) == 28
    colors = set()
    for query, line, *points in zip(shown, lines, left.lines, right.lines, strict=True):
        off = np.abs(where[index[query]] - where[query]).max()
        color = "#0072B2" if off == 0 else "#E69F00" if off <= 2 else "#D55E00"  # blue, orange, vermilion
        colors.add(color)
        for patch, end, point in zip((query, index[query]), (line.xy1, line.xy2), points, strict=True):
            np.testing.assert_allclose(end, 8 * where[patch][::-1] + 4)
            np.testing.assert_allclose(np.ravel(point.get_data()), end)
            assert point.get_color() == color
        assert matplotlib.colors.to_hex(line.get_edgecolor()).upper() == color
    assert len(colors) == 3
    meaning = {text.get_text(): line.get_color() for text, line in zip(*legend_parts(figure.legends[0]), strict=True)}
    assert meaning == {"correct match": "#0072B2", "within 2 patches": "#E69F00", "farther off": "#D55E00"}
    check_text(figure, meaning)
    matplotlib.pyplot.close(figure)


def legend_parts(legend):
    return legend.get_texts(), legend.get_lines()


def test_a_grid_draws_its_values_with_their_numbers():
    (compared, test), figure = compared_and_tested(), grid()
    ax, bar = figure.axes
    np.testing.assert_array_equal(ax.images[0].get_array(), compared.values)
    assert ax.images[0].get_cmap().name == "viridis"
    numbers = {
        (j, i): f"{value:.2f}" if test.corrected[i, j] <= 0.05 else f"({value:.2f})"
        for (i, j), value in np.ndenumerate(np.asarray(compared.values))
    }
    assert {text.get_position(): text.get_text() for text in ax.texts} == numbers
    np.testing.assert_array_equal(ax.get_xticks(), range(4))
    np.testing.assert_array_equal(ax.get_yticks(), range(4))
    names = list(sets())
    told = [*numbers.values(), *names, *names, "cka (similarity)\n(in parentheses: p > 0.05)"]
    check_text(figure, told, bar.yaxis)
    dark = [text.get_color() for text in ax.texts if compared.values[text.get_position()[::-1]] < 0.3]
    assert set(dark) == {"white"}  # readable where the image is dark
    matplotlib.pyplot.close(figure)


def test_layers_draw_a_line_and_a_band_for_each_curve():
    figure = layers()
    (ax,) = figure.axes
    assert [line.get_label() for line in ax.lines] == list(CURVES)
    for line, values in zip(ax.lines, CURVES.values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), range(6))
        np.testing.assert_array_equal(line.get_ydata(), values)
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for k, (low, high) in enumerate(zip(*BAND, strict=True)):
        at = corners[corners[:, 0] == k, 1]
        np.testing.assert_allclose([at.min(), at.max()], [low, high])
    colors = [line.get_color() for line in ax.lines]
    assert [line.get_color() for line in ax.get_legend().get_lines()] == colors
    assert len(set(colors)) == 2
    assert matplotlib.colors.same_color(band.get_facecolor()[0][:3], colors[0])
    check_text(figure, [*CURVES, *BLOCKS, "CKA"], ax.yaxis)
    assert [label.get_text() for label in ax.get_xticklabels()] == BLOCKS
    matplotlib.pyplot.close(figure)


def test_density_draws_the_curve_and_the_solution():
    figure = density()
    (ax,) = figure.axes
    x = sets()["layer 0"].astype(np.float64)
    solved = float(reference.solve_sigma(x, density=0.05))
    curve, target, sigma, solution, diagonal = ax.lines
    sigmas, values = curve.get_data()
    np.testing.assert_allclose(sigmas, solved * np.logspace(-1.5, 1.5, 15), rtol=1e-4)
    np.testing.assert_allclose(values, [reference.mean_density(x, sigma=s) for s in sigmas], rtol=1e-4)
    np.testing.assert_allclose(np.ravel(solution.get_data()), [solved, 0.05], rtol=1e-4)
    np.testing.assert_allclose(target.get_ydata(), 0.05)
    np.testing.assert_allclose(sigma.get_xdata(), solved, rtol=1e-4)
    np.testing.assert_allclose(diagonal.get_ydata(), 1 / 60)
    told = [f"sigma = {solved:.4g} at density 0.05", "diagonal alone (1/n)"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == told
    check_text(figure, [*told, "sigma (units of the features)", "density (mean affinity)"], ax.xaxis, ax.yaxis)
    matplotlib.pyplot.close(figure)


def test_dissimilarities_draw_a_point_for_each_pair():
    figure = dissimilarities()
    (ax,) = figure.axes
    upper = np.triu_indices(60, 1)
    expected = [
        reference_measures.rdm(sets()[name].astype(np.float64), "sqeuclidean")[upper] for name in ("layer 0", "layer 2")
    ]
    np.testing.assert_allclose(ax.lines[0].get_data(), expected, atol=1e-5)
    title = f"Pearson r = {np.corrcoef(*expected)[0, 1]:.3f}, {60 * 59 // 2} pairs"
    check_text(figure, [title, "dissimilarity in dino", "dissimilarity in clip"], ax.xaxis, ax.yaxis)
    matplotlib.pyplot.close(figure)


def test_models_are_points_with_names():
    figure = models()
    (ax,) = figure.axes
    distances = np.arccos(np.clip(np.asarray(compared_and_tested()[0].values, np.float64), -1, 1))
    joined, points = ax.lines[::2], ax.lines[1::2]
    places = np.concatenate([np.transpose(line.get_data()) for line in points])
    np.testing.assert_array_equal(np.concatenate([np.transpose(line.get_data()) for line in joined]), places)
    np.testing.assert_array_equal([text.xy for text in ax.texts], places)
    assert [text.get_text() for text in ax.texts] == list(sets())
    squared = np.linalg.norm(places[:, None] - places[None], axis=-1) ** 2
    centering = np.eye(4) - 1 / 4
    share = np.linalg.eigvalsh(-centering @ distances**2 @ centering / 2)
    best = np.maximum(share[-2:], 0).sum()
    np.testing.assert_allclose(squared.sum() / (2 * 4), best, rtol=1e-5)
    title = f"classical MDS: {best / np.abs(share).sum():.0%} of squared distances"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    check_text(figure, [title, *sets(), "a", "b"])
    matplotlib.pyplot.close(figure)


def test_segments_are_drawn_over_the_picture():
    figure = segments()
    (ax,) = figure.axes
    picture, labels = ax.images
    np.testing.assert_array_equal(picture.get_array(), np.kron(patches()[0], np.ones((8, 8, 1))))
    np.testing.assert_array_equal(labels.get_array(), np.arange(64).reshape(8, 8) // 16)
    assert list(labels.get_extent()) == list(picture.get_extent())
    assert labels.get_alpha() == 0.55
    assert len(np.unique(labels.to_rgba(labels.get_array()).reshape(-1, 4), axis=0)) == 4
    check_text(figure, [])
    matplotlib.pyplot.close(figure)


@pytest.mark.slow
def test_axes_given_are_drawn_into():
    figure, axes = matplotlib.pyplot.subplots(1, 2)
    assert plots.affinity(np.eye(3), ax=axes[0]) is axes[0]
    assert plots.grid(jaxalign.compare_grid(sets(), kernel=RBF(density=0.2)), ax=axes[1]) is axes[1]
    matplotlib.pyplot.close(figure)


@pytest.mark.slow
def test_the_first_row_of_a_grid_is_on_top_as_in_the_report():
    some = sets()
    other = {name: some[name] for name in ("layer 1", "layer 3")}
    compared = jaxalign.compare_grid(some, other, kernel=RBF(density=0.2))
    ax = plots.grid(compared)
    np.testing.assert_array_equal(ax.images[0].get_array(), compared.values)
    assert ax.transData.transform((0, 0))[1] > ax.transData.transform((0, 1))[1]
    assert [text.get_text() for text in ax.get_xticklabels()] == list(other)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(some)
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (j, i): f"{value:.2f}" for (i, j), value in np.ndenumerate(np.asarray(compared.values))
    }


@pytest.mark.slow
def test_what_is_not_beyond_chance_stands_in_parentheses():
    some = {"signal": sets()["layer 0"], "noise": np.random.default_rng(5).normal(size=(60, 6)).astype(np.float32)}
    other = {"target": sets()["layer 1"]}
    test = jaxalign.permutation_test(some, other, key=jax.random.key(0), permutations=99, kernel=RBF(density=0.2))
    ax = plots.grid(jaxalign.compare_grid(some, other, kernel=RBF(density=0.2)), test=test)
    texts = [text.get_text() for text in ax.texts]
    assert not texts[0].startswith("(")
    assert texts[1].startswith("(")
    matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("how", "told"), [({}, "2 patches"), ({"near": 1.0}, "1 patch"), ({"near": 1.5}, "1.5 patches")]
)
def test_the_legend_of_matches_tells_what_is_near(how, told):
    figure = matplotlib.figure.Figure()
    plots.match_legend(figure, **how)
    assert figure.legends[0].get_texts()[1].get_text() == f"within {told}"


def test_classical_scaling_shows_a_plane_as_it_is():
    places = np.random.default_rng(0).normal(size=(6, 2))
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    ax = plots.models(distances, names=list("abcdef"))
    drawn = np.stack([text.xy for text in ax.texts])
    np.testing.assert_allclose(np.linalg.norm(drawn[:, None] - drawn[None], axis=-1), distances, atol=1e-6)
    assert ax.get_title() == "classical MDS: 100% of squared distances"
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
        (lambda: plots.layers({"a": np.ones(3), "b": np.ones(4)}), "one value per layer"),
        (lambda: plots.models(np.ones((3, 2))), "must be square"),
        (lambda: plots.models(np.full((3, 3), np.nan)), "nan or inf"),
        (lambda: plots.models(np.zeros((1, 1))), "at least two models"),
        (lambda: plots.models(np.ones((3, 3)), names=["a"]), "got 1 for 3 models"),
        (lambda: plots.layers({"a": np.ones(3)}, names=np.array(["p"])), "got 1 names for 3 layers"),
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
