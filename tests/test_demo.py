"""The demo's matches: how digits are shuffled, the table, the figure, and the option that sets their landmarks."""

from __future__ import annotations

import re
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from jaxalign import cli
from jaxalign.datasets import DigitFeatures, load_digit_features
from jaxalign.matching import Matching
from jaxalign.report import demo, figures, tables

NAMES = ("a block 1", "b block 2", "c")
KNOWN = 5


@pytest.fixture
def data(rng):
    """Digits of made-up features: 60 samples in three networks."""
    images = rng.integers(0, 17, (60, 8, 8)).astype(np.uint8)
    features = {name: rng.normal(size=(60, 4)).astype(np.float32) for name in NAMES}
    return DigitFeatures(features, images, np.arange(60) % 10, {}, {})


@pytest.fixture
def report(data, rng):
    """Matchings that are right for most digits, and wrong or missing for others."""
    places = demo.shuffled(data.features, rng)[1]
    return demo.MatchReport(
        data, places, {m: {name: matching_of(places, m, rng) for name in demo.MATCHINGS} for m in (2 * KNOWN, KNOWN)}
    )


def matching_of(places, known, rng):
    columns = dict(zip(NAMES, places.T, strict=True))
    candidate, confidence, landmarks = {}, {}, {}
    for a, b in permutations(NAMES, 2):
        found = np.arange(60)
        wrong = rng.choice(np.arange(known, 60), 30, replace=False)
        found[wrong] = np.concatenate([rng.integers(0, 60, 15), (wrong[15:25] + 10) % 60, np.full(5, -1)])
        candidate[a, b], confidence[a, b] = np.empty(60, int), np.empty(60)
        candidate[a, b][columns[a]] = np.where(found >= 0, columns[b][found], -1)
        confidence[a, b][columns[a]] = np.where(found >= 0, rng.uniform(0.5, 1, 60), 0)
        landmarks[a, b] = np.stack([columns[a][:known], columns[b][:known]], 1)
    return Matching(candidate, confidence, landmarks, dict.fromkeys(candidate, 0.0), np.ones(1), 0.75)


def test_each_network_has_an_order_of_its_own(data, rng):
    features, places = demo.shuffled(data.features, rng)
    for (name, x), place in zip(data.features.items(), places.T, strict=True):
        np.testing.assert_array_equal(features[name][place], x)
    orders = [*places.T, np.arange(60)]
    assert max(np.mean(a == b) for a, b in permutations(orders, 2)) < 0.3


def test_landmarks_are_the_same_digits_in_all_networks_and_every_run_is_a_tick(data, report, monkeypatch):
    calls, ticks = [], []
    matching = report.matchings[KNOWN][demo.SEARCH]

    def match(features, *, landmarks, **how):
        calls.append((landmarks, how))
        for known, (name, x) in zip(landmarks.T, data.features.items(), strict=True):
            digits = [np.flatnonzero((x == row).all(1)).item() for row in features[name][known]]
            assert digits == drawn.setdefault(len(known), digits)
        return matching

    drawn = {}
    monkeypatch.setattr(demo, "load_digit_features", lambda: data)
    monkeypatch.setattr(demo, "match", match)
    found = demo.report_matches([20, 10, 20], ticks.append)
    assert list(found.matchings) == [20, 10]
    assert [len(landmarks) for landmarks, _ in calls] == [20] * 3 + [10] * 3
    assert [how for _, how in calls] == [*demo.MATCHINGS.values()] * 2
    assert drawn[10] == drawn[20][:10]
    assert len(set(drawn[20])) == 20
    assert drawn[20] != sorted(drawn[20])
    assert len(ticks) == demo.steps([20, 10, 20]) - demo.steps([])


def test_the_table_has_the_scores_of_the_matchings(report):
    header, _, *lines = tables.match_table(report).splitlines()
    assert re.split(r" {2,}", header) == ["landmarks", *demo.MATCHINGS, "precision", "recall"]
    assert len(lines) == len(report.matchings)
    for line, (known, matchings) in zip(lines, report.matchings.items(), strict=True):
        scores = {name: matching.score(report.places) for name, matching in matchings.items()}
        search = scores[demo.SEARCH]
        expected = [*(score.top1 for score in scores.values()), search.precision, search.recall]
        assert line.split() == [str(known), *(f"{value:.3f}" for value in expected)]
        assert expected[0] != search.precision != search.recall


def test_the_heading_names_the_threshold_and_the_limit_of_rounds(report):
    heading = tables.match_heading(report)
    assert "confidence of 0.75 or more" in heading
    assert re.search(rf"limited to {demo.MATCH_ROUNDS} ", heading)


def test_the_figure_shows_the_matches_of_the_fewest_landmarks(report):
    axes = np.array(figures.matched_networks(report, number=12).axes).reshape(len(NAMES), 12)
    matching, labels = report.matchings[KNOWN][demo.SEARCH], report.data.labels
    columns = dict(zip(NAMES, report.places.T, strict=True))
    # Digit i is of class i % 10. The first are landmarks, so classes 0 to 4 start with the second of their digits.
    shown = [10, 11, 12, 13, 14, 5, 6, 7, 8, 9, 20, 21]
    seen = set()
    for k, query in enumerate(shown):
        np.testing.assert_array_equal(axes[0, k].images[0].get_array(), report.data.images[query])
        for ax, b in zip(axes[1:, k], NAMES[1:], strict=True):
            sample = columns[NAMES[0]][query]
            candidate = matching.candidate[NAMES[0], b][sample]
            assert ax.get_xlabel() == f"{matching.confidence[NAMES[0], b][sample]:.2f}"
            color, image = figures._NONE, np.zeros((8, 8))
            if candidate >= 0:
                digit = np.flatnonzero(columns[b] == candidate).item()
                image = report.data.images[digit]
                same_class = labels[digit] == labels[query]
                color = figures.RIGHT if digit == query else figures.NEAR if same_class else figures.WRONG
            np.testing.assert_array_equal(ax.images[0].get_array(), image)
            assert {spine.get_edgecolor() for spine in ax.spines.values()} == {to_rgba(color)}
            seen.add(color)
    assert seen == {figures.RIGHT, figures.NEAR, figures.WRONG, figures._NONE}
    assert axes[1, 0].get_ylabel().startswith("b\nblock 2\ntop-1 0.")


def test_landmarks_of_the_command_reach_the_report_its_text_and_the_figures(report, monkeypatch, tmp_path, capsys):
    def report_matches(numbers, tick):
        given.extend(numbers)
        return report

    def save_all(digits, patches, matches, out):
        assert matches is report
        return [out / "figure.png"]

    given = []
    monkeypatch.setattr(demo, "report_matches", report_matches)
    monkeypatch.setattr(demo, "report_digits", lambda tick: SimpleNamespace(scores={}))
    monkeypatch.setattr(demo, "report_patches", lambda tick: SimpleNamespace(scores={}, controls={}))
    monkeypatch.setattr(figures, "save_all", save_all)
    monkeypatch.setattr(tables, "demo_text", lambda digits, patches, matches: tables.match_table(matches))
    assert cli.main(["demo", "--landmarks", "300", "30", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert given == [300, 30]
    assert tables.match_table(report) in capsys.readouterr().out


def test_the_demo_matches_from_thirty_landmarks_unless_told():
    assert cli._parser().parse_args(["demo"]).landmarks == [30]


@pytest.mark.parametrize("number", ["3", "901", "many"])
def test_landmarks_out_of_range(number, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--landmarks", "30", number])
    assert stopped.value.code == 2
    assert f"{number!r} is not a whole number from 4 to 900" in capsys.readouterr().err


@pytest.mark.slow
def test_some_of_the_digits_are_matched(monkeypatch):
    data, few = load_digit_features(), slice(0, 120)
    features = {name: x[few] for name, x in data.features.items()}
    part = DigitFeatures(features, data.images[few], data.labels[few], {}, {})
    monkeypatch.setattr(demo, "load_digit_features", lambda: part)
    monkeypatch.setitem(demo.MATCHINGS, demo.SEARCH, {"rounds": 2})
    scores = demo.report_matches([60], lambda text: None).scores[60]
    alone, _, search = (score.top1 for score in scores.values())
    assert search > alone > 10 / 60  # ten times chance
    assert scores[demo.SEARCH].precision > 0.9
