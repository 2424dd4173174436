"""The toy example runs, and its table says what the mathematics says."""

from __future__ import annotations

from types import ModuleType

import helpers
import numpy as np
import pytest

import jaxalign


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    """The example as a module."""
    pytest.importorskip("matplotlib", reason='the example draws: python -m pip install "jaxalign[viz]"')
    with helpers.example("toy_alignment") as module:
        yield module


@pytest.fixture(scope="module")
def scores(toy, tmp_path_factory):
    """What main returns, averaged over ten draws."""
    return toy.main(tmp_path_factory.mktemp("toy"), draws=10)


def pair(toy, name, seed=0):
    points = toy.draw_points(seed)
    return points, toy.second_sets(points, seed)[name]


@pytest.mark.slow
def test_it_prints_the_table_it_returns_and_writes_a_figure(toy, tmp_path, capsys):
    scores = toy.main(tmp_path / "new" / "folder", draws=1)
    printed = capsys.readouterr().out
    assert toy.table(scores) in printed
    assert (tmp_path / "new" / "folder" / "toy_alignment.png").read_bytes().startswith(b"\x89PNG")
    assert list(scores) == ["moved", "stretched", "flattened", "outliers", "network"]
    for by_method in scores.values():
        assert tuple(by_method) == toy.METHODS
        assert all(0 <= share <= 1 for score in by_method.values() for share in score)


def test_the_landmarks_are_half_of_each_cluster_and_the_queries_are_the_rest(toy):
    everyone = np.concatenate([toy.LANDMARKS, toy.QUERIES])
    assert sorted(everyone) == list(range(30))
    assert np.bincount(toy.CLUSTER[toy.LANDMARKS]).tolist() == [5, 5, 5]
    assert set(toy.OUTLIERS) <= set(toy.LANDMARKS)


@pytest.mark.usefixtures("x64")
def test_rotation_scale_and_shift_leave_the_affinity_as_it_was(toy):
    points, moved = pair(toy, "moved")
    first, second = (jaxalign.rbf_affinity(x, density=toy.DENSITY) for x in (points, moved))
    # Distances carry a relative rounding of a few eps of the offset: 10 / 0.25 = 40 units of the first set.
    np.testing.assert_allclose(second, first, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_rotation_scale_and_shift_keep_every_correspondence_but_that_of_the_coordinates(toy, scores):
    for method in (toy.VARIANCE, toy.AUTO, toy.PER_ROW):
        assert scores["moved"][method] == (1.0, 1.0), method
    # Coordinates do no better than guessing: within 4 standard errors of 150 guesses at 1/15.
    chance = 1 / 15
    assert abs(scores["moved"][toy.BEFORE].point - chance) < 4 * np.sqrt(chance * (1 - chance) / 150)


def test_standardizing_makes_all_axis_aligned_stretches_alike(toy):
    features = [toy.compare(*pair(toy, name))[toy.STANDARDIZED].second for name in ("moved", "stretched", "flattened")]
    # float32: the shift came before the stretch, so on every axis the offset is ten times the spread at most; rounding
    # it costs 10 eps = 1e-6 a coordinate, some ten times that an exponent.
    for other in features[1:]:
        np.testing.assert_allclose(other, features[0], atol=2e-4)


def test_auto_scaling_finds_at_least_as_many_points_as_the_variance_and_no_fewer_clusters(toy, scores):
    for name, by_method in scores.items():
        auto, variance = by_method[toy.AUTO], by_method[toy.VARIANCE]
        assert auto.point >= variance.point, name
        # Stretches leave them level on clusters. The standard error of the difference of two shares near 0.87 of 150
        # queries is 0.04; two and a half of it.
        assert auto.cluster >= variance.cluster - 0.1, name


def test_two_outliers_flatten_the_affinities_under_the_variance_but_not_under_auto_scaling(toy):
    outcomes = toy.compare(*pair(toy, "outliers"))
    ordinary = ~np.isin(toy.LANDMARKS, toy.OUTLIERS)

    def contrast(method):
        """Mean affinity within clusters less that between them, over the landmarks that stayed."""
        affinity = outcomes[method].second[:, ordinary]
        same = toy.CLUSTER[toy.QUERIES][:, None] == toy.CLUSTER[toy.LANDMARKS][ordinary]
        return affinity[same].mean() - affinity[~same].mean()

    # The variance of 13 points of spread s and 2 at distance r is about 2 13 / 15^2 r^2 >> s^2: all affinities near 1.
    assert contrast(toy.VARIANCE) < 0.2
    assert contrast(toy.AUTO) > 0.4
    assert contrast(toy.PER_ROW) > 0.4


def test_two_outliers_cost_the_variance_more_points_than_auto_scaling(toy, scores):
    outliers = scores["outliers"]
    assert outliers[toy.AUTO].cluster > 0.95
    assert outliers[toy.VARIANCE].cluster < 0.95
    assert outliers[toy.AUTO].point > 2 * outliers[toy.VARIANCE].point
