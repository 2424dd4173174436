"""Colors of images in several networks: one call is the steps by hand, and new images are colored as the old ones."""

import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import color_images

NETWORKS = ("vit-s14 layer 8", "efficientnet-lite0 block 10")


@pytest.fixture(scope="module")
def data():
    return jaxalign.datasets.load_part_features()


@pytest.fixture(scope="module")
def maps(data):
    return {name: data.maps(name)[:, 1::2, 1::2] for name in NETWORKS}


@pytest.fixture(scope="module")
def colored(maps, data):
    return color_images({name: a[:2] for name, a in maps.items()}, data.images[:2], landmarks=128, num_components=8)


def test_one_call_is_the_steps_by_hand(colored, maps):
    rows = {name: a[:2].reshape(512, -1) for name, a in maps.items()}
    alignment = jaxalign.align(rows, landmarks=128, key=jax.random.key(0))
    cut = jaxalign.normalized_cut(alignment, 8, bandwidth="per_row")
    by_hand = np.asarray(jaxalign.rgb(cut)).reshape(2, 2, 16, 16, 3)
    for name, colors in zip(NETWORKS, by_hand, strict=True):
        np.testing.assert_allclose(colored.colors[name], colors, atol=1e-4)


def test_old_images_keep_their_colors_and_new_ones_get_those_of_their_parts(colored, maps, data):
    again = colored.transform({name: a[:2] for name, a in maps.items()})
    for name in NETWORKS:
        # Rows from the extension are those of the eigenvectors, up to the residual of LOBPCG over the eigenvalue.
        np.testing.assert_allclose(again[name], colored.colors[name], atol=5e-3)
    new = np.asarray(colored.transform({NETWORKS[0]: maps[NETWORKS[0]][3:]})[NETWORKS[0]])
    assert new.shape == (1, 16, 16, 3)
    # The hair of the whole photograph has the color of the hair of the portrait, not that of its background.
    part = data.part_index.reshape(4, 32, 32)[:, 1::2, 1::2]
    hair, background = (data.part_names.index(name) for name in ("hair", "background"))
    portrait = np.asarray(colored.colors[NETWORKS[0]][0])
    of_new = new[0][part[3] == hair].mean(0)
    distance = {k: np.linalg.norm(of_new - portrait[part[0] == k].mean(0)) for k in (hair, background)}
    assert distance[hair] < distance[background]


def test_parts_have_one_color_in_both_networks(colored, data):
    """The same part in two networks is closer than another part, unlike in colors of each network alone."""
    part = data.part_index.reshape(4, 32, 32)[0, 1::2, 1::2]
    a, b = (np.asarray(colors[0]) for colors in colored.colors.values())
    means = [[colors[part == k].mean(0) for k in np.unique(part[part >= 0])] for colors in (a, b)]
    distances = np.linalg.norm(np.array(means[0])[:, None] - np.array(means[1])[None], axis=-1)
    assert np.diagonal(distances).mean() < 0.4 * distances[~np.eye(len(distances), dtype=bool)].mean()


def test_segments_are_numbered_alike_and_nested(colored):
    four, five = colored.segments(4), colored.segments(5)
    for name in NETWORKS:
        assert four[name].shape == (2, 16, 16)
        new = np.asarray(five[name]) == 4
        np.testing.assert_array_equal(np.asarray(five[name])[~new], np.asarray(four[name])[~new])


@pytest.mark.slow
def test_landmarks_may_be_chosen_and_offsets_cost_nothing(maps):
    one = {name: a[:1] for name, a in maps.items()}
    chosen = np.flatnonzero(np.indices((16, 16)).sum(0).ravel() % 2 == 0)
    found = color_images(one, landmarks=chosen, num_components=4)
    np.testing.assert_array_equal(found.alignment.landmarks, chosen)
    far = {name: a.astype(np.float64) + 1e4 for name, a in one.items()}
    same = color_images(far, landmarks=chosen, num_components=4)
    for name in NETWORKS:
        np.testing.assert_allclose(same.colors[name], found.colors[name], atol=2e-3)
        np.testing.assert_allclose(same.transform({name: far[name]})[name], found.colors[name], atol=5e-3)


def test_it_is_a_pytree(colored, maps):
    new = jax.jit(lambda c, a: c.transform({NETWORKS[0]: a})[NETWORKS[0]])
    again = jax.tree.map(lambda a: a, colored)
    for one in (colored, again):
        np.testing.assert_allclose(new(one, maps[NETWORKS[0]][:2]), colored.colors[NETWORKS[0]], atol=5e-3)


@pytest.mark.slow
def test_coarser_grids_are_resized_to_the_finest(maps):
    mixed = {NETWORKS[0]: maps[NETWORKS[0]][:1], NETWORKS[1]: maps[NETWORKS[1]][:1, ::2, ::2]}
    found = color_images(mixed, landmarks=64, num_components=4)
    assert {colors.shape for colors in found.colors.values()} == {(1, 16, 16, 3)}


@pytest.mark.slow
def test_an_approximate_cut_has_the_colors_of_the_exact_one(maps, monkeypatch):
    exact = color_images(maps, landmarks=256, num_components=8)
    monkeypatch.setattr(jaxalign.images, "_EXACT", 0)
    near = color_images(maps, landmarks=256, num_components=8)
    a, b = (np.asarray(found.cut.eigenvectors)[:, :3] for found in (exact, near))
    # Cosines of principal angles between the leading vectors; the fourth and fifth eigenvalue are close.
    assert np.linalg.svd(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0], compute_uv=False).min() > 0.95


@pytest.mark.slow
def test_the_figure_shows_every_image_in_every_network(colored):
    pytest.importorskip("matplotlib").use("agg")
    figure = colored.figure()
    assert len(figure.axes) == 2 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[0], r"must have shape \(images, h, w, d\)"),
        (lambda a: a[:1], "same images in the same order"),
        (lambda a: np.where(a == a.max(), np.nan, a), "nan or inf"),
    ],
)
def test_bad_maps(maps, change, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        color_images({NETWORKS[0]: maps[NETWORKS[0]], NETWORKS[1]: change(maps[NETWORKS[1]])})


def test_other_bad_input(maps, colored, unchecked_types):
    with pytest.raises(TypeError, match="maps must be a mapping"):
        color_images([maps[NETWORKS[0]]])
    with pytest.raises(TypeError, match="at least one network"):
        color_images({})
    with pytest.raises(ValueError, match="colors last"):
        color_images({NETWORKS[0]: maps[NETWORKS[0]]}, np.zeros((4, 3, 8, 8)))
    with pytest.raises(ValueError, match="from 0 to 1"):
        color_images({NETWORKS[0]: maps[NETWORKS[0]]}, np.full((4, 8, 8, 3), 255.0))
    with pytest.raises(ValueError, match=r"x_new.*Leave such samples out"):
        colored.transform({NETWORKS[0]: np.full((1, 4, 4, 384), np.nan, np.float32)})
    with pytest.raises(KeyError, match="clip"):
        colored.transform({"clip": maps[NETWORKS[0]]})
    with pytest.raises(ValueError, match="tsne"):
        color_images({NETWORKS[0]: maps[NETWORKS[0]][:1]}, method="tsne", landmarks=64)
