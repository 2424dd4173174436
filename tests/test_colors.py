"""Colours: near rows alike, the same for the same rows, within the cube."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign import rgb


@pytest.fixture(scope="module")
def cut():
    groups = 8 * (np.arange(90) % 3)[:, None]
    x = np.random.default_rng(0).normal(size=(90, 5)) + groups
    return jaxalign.normalized_cut(x.astype(np.float32), 5, density=0.3)


@pytest.mark.slow
def test_groups_have_colours_of_their_own(cut):
    colours = np.asarray(rgb(cut, num_components=3))
    assert colours.min() == 0
    assert colours.max() == 1
    means = np.stack([colours[k::3].mean(0) for k in range(3)])
    within = max(np.linalg.norm(colours[k::3] - means[k], axis=1).mean() for k in range(3))
    between = min(np.linalg.norm(means[a] - means[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert between > 2 * within


def test_colours_depend_on_the_row_alone_once_the_map_is_fixed(cut):
    some = cut.eigenvectors[10:20]
    np.testing.assert_allclose(rgb(some, like=cut), rgb(cut)[10:20], atol=1e-5)
    order = np.random.default_rng(1).permutation(90)
    np.testing.assert_allclose(rgb(cut.eigenvectors[order]), rgb(cut)[order], atol=1e-3)


def test_length_and_unit_of_rows_do_not_matter_to_rotate(cut):
    np.testing.assert_allclose(rgb(cut.eigenvectors * jnp.linspace(1, 5, 90)[:, None]), rgb(cut), atol=1e-4)


@pytest.mark.slow
def test_masked_rows_are_black(cut):
    padded = jnp.concatenate([cut.eigenvectors, jnp.zeros((200, 5))])
    colours = rgb(padded)
    assert not np.any(colours[90:])
    np.testing.assert_allclose(colours[:90], rgb(cut), atol=1e-3)
    np.testing.assert_allclose(rgb(cut, like=padded), rgb(cut), atol=1e-3)
    np.testing.assert_allclose(rgb(cut.eigenvectors * 1e-25), rgb(cut), atol=1e-4)


def test_rotate_is_differentiable_and_can_be_compiled(cut):
    x = cut.eigenvectors
    assert np.isfinite(jax.grad(lambda x: rgb(x).sum())(x)).all()
    np.testing.assert_allclose(jax.jit(rgb)(x), rgb(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of umap's own imports
@pytest.mark.parametrize(("method", "package"), [("umap", "umap"), ("tsne", "sklearn")])
def test_layouts_of_the_usual_libraries(cut, method, package):
    pytest.importorskip(package)
    colours = rgb(cut, method)
    assert colours.shape == (90, 3)
    np.testing.assert_array_equal(colours, rgb(cut, method))  # a seed
    means = np.stack([np.asarray(colours[k::3]).mean(0) for k in range(3)])
    # t-SNE hangs on the last digit: with rows changed by 1e-7 it gave 0.29 .. 0.50. Groups at random: about 0.1.
    assert min(np.linalg.norm(means[a] - means[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.2


@pytest.mark.slow
def test_distances_of_colors_are_those_of_rows(cut):
    rows = np.asarray(cut.eigenvectors)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = np.triu_indices(90, 1)

    def stress(colors):
        d, e = (np.linalg.norm(a[pairs[0]] - a[pairs[1]], axis=1) for a in (rows, np.asarray(colors)))
        scale = (d * e).sum() / (d * d).sum()
        return np.sqrt(((e - scale * d) ** 2).sum() / ((scale * d) ** 2).sum())

    kept, turned = rgb(cut, "distances"), rgb(cut)
    assert stress(kept) < 0.8 * stress(turned)
    assert stress(kept) < 0.2
    np.testing.assert_array_equal(kept, rgb(cut, "distances"))  # a seed
    assert 0 <= np.min(kept) < 0.15 < 0.85 < np.max(kept) <= 1  # they fill the cube
    new = jaxalign.fit_colors(cut, "distances")(cut.eigenvectors[5:9])
    np.testing.assert_allclose(new, kept[5:9], atol=1e-5)
    flat = jnp.zeros((9, 3)).at[:, 0].set(1)
    assert np.isfinite(rgb(flat, "distances")).all()
    padded = jnp.concatenate([cut.eigenvectors, jnp.zeros((20, 5))])
    assert not np.any(rgb(padded, "distances")[90:])


def test_a_fitted_map_gives_the_same_colors(cut):
    colors = jaxalign.fit_colors(cut)
    np.testing.assert_allclose(colors(cut), rgb(cut), atol=1e-6)
    np.testing.assert_allclose(colors(cut.eigenvectors[3:4]), rgb(cut)[3:4], atol=1e-6)  # of one sample, too
    np.testing.assert_allclose(jax.jit(lambda c, x: c(x))(colors, cut.eigenvectors), rgb(cut), atol=1e-5)
    with pytest.raises(ValueError, match="fitted to 5 columns, embedding has 4"):
        colors(cut.eigenvectors[:, :4])
    with pytest.raises(ValueError, match="no map for new rows"):
        jaxalign.fit_colors(cut, "tsne")


def test_distances_say_what_is_missing(cut, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optax", None)
    with pytest.raises(ImportError, match=r"jaxalign\[distances\]"):
        rgb(cut, "distances")


def test_layouts_say_what_is_missing(cut, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(ImportError, match=r"jaxalign\[umap\]"):
        rgb(cut, "umap")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (np.ones((9, 2), np.float32), {}, "at least three samples and three columns"),
        (np.full((9, 3), np.nan, np.float32), {}, "nan or inf"),
        (np.ones((9, 3), np.float32), {"method": "hsv"}, "method must be one of"),
        (np.ones((9, 3), np.float32), {"quantile": 0.5}, "below 0.5"),
        (np.ones((9, 3), np.float32), {"num_components": 2}, "at least 3"),
        (np.ones((9, 3), np.float32), {"like": np.ones((9, 4), np.float32)}, "like has 4 columns"),
        (np.ones((9, 3), np.float32), {"like": np.ones((9, 3), np.float32), "method": "tsne"}, "does not have"),
    ],
)
def test_bad_input(rows, options, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        rgb(rows, **options)
