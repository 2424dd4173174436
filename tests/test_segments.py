"""Segments: nested ones lose the least, prompts find their group, channels are those that make the segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign import kway, nested_segments, normalized_cut, prompt_scores, rbf_affinity, segment_channels


@pytest.fixture(scope="module")
def x():
    centers = np.array([[0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 9, 6], [0, 0, 12]], np.float32)
    noise = np.random.default_rng(0).normal(size=(75, 3)).astype(np.float32)
    return centers[np.arange(75) % 5] + noise


@pytest.fixture(scope="module")
def cut(x):
    return normalized_cut(x, 6, density=0.3)


def test_every_part_lies_in_one_part_before(cut):
    levels = np.asarray(nested_segments(cut))
    assert levels.shape == (6, 75)
    np.testing.assert_array_equal(levels[0], 0)
    for k in range(1, 6):
        assert set(levels[k]) <= set(range(k + 1))
        new = levels[k] == k
        np.testing.assert_array_equal(levels[k][~new], levels[k - 1][~new])  # the other parts keep their labels
        assert len(set(levels[k - 1][new])) <= 1


def test_the_finest_are_those_of_kway(cut):
    finest, expected = np.asarray(nested_segments(cut, 5)[-1]), np.asarray(kway(cut, 5))
    assert len({(a, b) for a, b in zip(finest, expected, strict=True)}) == 5
    np.testing.assert_array_equal(np.unique(finest), np.arange(5))


def test_each_merge_loses_the_least_association(cut):
    """By brute force over all pairs, from the affinity of the eigenvectors."""
    v, w, d = (np.asarray(a, np.float64) for a in (cut.eigenvectors, cut.eigenvalues, cut.degrees))
    affinity = np.sqrt(d)[:, None] * (v * w) @ v.T * np.sqrt(d)[None]

    def association(labels):
        parts = [labels == k for k in set(labels)]
        return sum(affinity[np.ix_(part, part)].sum() / d[part].sum() for part in parts)

    levels = np.asarray(nested_segments(cut))
    for k in range(5, 0, -1):
        fine = levels[k]
        merged = [np.where(fine == b, a, fine) for a in set(fine) for b in set(fine) if a < b]
        assert association(levels[k - 1]) > max(map(association, merged)) - 1e-5


def test_masked_samples_have_no_part(x):
    masked = normalized_cut(x, 3, density=0.3, mask=np.arange(75) < 60)
    levels = np.asarray(nested_segments(masked))
    np.testing.assert_array_equal(levels[:, 60:], -1)
    assert (levels[:, :60] >= 0).all()
    np.testing.assert_array_equal(prompt_scores(masked, 0)[60:], 0)


def test_parts_that_kway_does_not_find_are_empty():
    affinity = jnp.kron(jnp.eye(2), jnp.ones((3, 3)))
    levels = nested_segments(normalized_cut(affinity, 4))
    assert set(np.asarray(levels[1]).tolist()) == {0, 1}
    assert len(set(np.asarray(levels[1])[:3])) == 1  # of two unconnected groups, finer parts join first


def test_it_can_be_compiled(cut):
    compiled = jax.jit(nested_segments, static_argnums=1)
    np.testing.assert_array_equal(compiled(cut, 4), nested_segments(cut, 4))


def test_points_find_their_group(cut, x):
    groups = np.arange(75) % 5
    np.testing.assert_array_equal(prompt_scores(cut, 0, [1, 2, 3, 4]) > 0, groups == 0)
    np.testing.assert_array_equal(prompt_scores(cut, [0, 1], [2, 3, 4]) > 0, groups < 2)
    np.testing.assert_array_equal(prompt_scores(cut, 2) > 0, groups == 2)
    new = prompt_scores(cut, 0, [1, 2, 3, 4], rows=cut.transform(x + 0.1))
    np.testing.assert_array_equal(new > 0, groups == 0)
    np.testing.assert_allclose(prompt_scores(cut, 0, 1), -prompt_scores(cut, 1, 0), atol=1e-6)


@pytest.mark.slow
def test_points_in_one_network_find_the_group_in_another(x):
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0].astype(np.float32)
    alignment = jaxalign.align({"a": x, "b": 7 * x @ turn}, landmarks=30)
    joint = normalized_cut(alignment, 6, bandwidth="per_row")
    groups = np.arange(75) % 5
    score = prompt_scores(joint, np.flatnonzero(groups == 0)[:4], np.flatnonzero(groups != 0)[:16])
    np.testing.assert_array_equal(score[75:] > 0, groups == 0)


@pytest.mark.slow
def test_channels_are_derivatives_of_the_association(x, x64, rng):
    labels = np.arange(75) % 5

    def association(scale):
        a = np.asarray(rbf_affinity(x.astype(np.float64) * scale, density=0.05))
        return np.array([a[np.ix_(labels == k, labels == k)].sum() / a[labels == k].sum() for k in range(5)])

    found = np.asarray(segment_channels(x.astype(np.float64), labels))
    step = 1e-5
    for channel in range(3):
        change = step * np.eye(3)[channel]
        slope = (association(1 + change) - association(1 - change)) / (2 * step)
        np.testing.assert_allclose(found[:, channel], slope, atol=1e-6)
    tiled = segment_channels(x.astype(np.float64), labels, plan=jaxalign.Plan(16))
    np.testing.assert_allclose(tiled, found, atol=1e-8)
    # A common scale of all channels changes nothing: sigma follows.
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-8)


def test_bad_input(cut, x, unchecked_types):
    with pytest.raises(TypeError, match="must be a NormalizedCut"):
        nested_segments(cut.eigenvectors)
    with pytest.raises(ValueError, match="only 6 eigenvectors"):
        nested_segments(cut, 7)
    with pytest.raises(ValueError, match="inside"):
        prompt_scores(cut, 75)
    with pytest.raises(ValueError, match=r"rows must have shape \(m, 6\)"):
        prompt_scores(cut, 0, rows=x)
    with pytest.raises(ValueError, match="one integer per sample"):
        segment_channels(x, np.zeros(5, int))
    with pytest.raises(ValueError, match="nan or inf in 1 row"):
        segment_channels(np.where(np.arange(75)[:, None] == 3, np.nan, x).astype(np.float32), np.arange(75) % 5)
    with pytest.raises(ValueError, match="duplicates"):
        segment_channels(np.repeat(x[:3], 25, 0), np.arange(75) % 5)
    with pytest.raises(TypeError, match="must not be traced"):
        jax.jit(lambda labels: segment_channels(x, labels))(np.arange(75) % 5)
    with pytest.raises(TypeError, match="must be a NormalizedCut"):
        prompt_scores(cut.eigenvectors, 3)
    with pytest.raises(ValueError, match="has no points"):
        prompt_scores(cut, np.zeros(0, int))
    with pytest.raises(ValueError, match="outside: sample 70 is masked or isolated"):
        prompt_scores(normalized_cut(x, 3, density=0.3, mask=np.arange(75) < 60), 1, [2, 70])
    with pytest.raises(ValueError, match="rows has nan or inf"):
        prompt_scores(cut, 0, rows=np.full((4, 6), np.nan, np.float32))


def test_a_label_that_no_sample_has_is_driven_by_no_channel(x):
    found = np.asarray(segment_channels(x, np.where(np.arange(75) % 5 == 0, 2, -1)))
    assert found.shape == (3, 3)
    assert not found[:2].any()
    assert found[2].any()
