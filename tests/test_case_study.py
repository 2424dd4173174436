"""Colours of the same patches: what their agreement means, and what the examples that show them reach."""

from __future__ import annotations

import helpers
import numpy as np
import pytest

import jaxalign

pytest.importorskip("matplotlib", reason='the examples draw: python -m pip install "jaxalign[viz]"')
pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture
def color_agreement():
    with helpers.example("color_agreement") as module:
        yield module


def grid_of(number, side=10):
    cells = np.argwhere(np.ones((side, side)))
    return np.repeat(np.arange(number), len(cells)), np.tile(cells, (number, 1))


def test_agreement_is_one_for_equal_colours_and_zero_for_unrelated_ones(color_agreement):
    rng = np.random.default_rng(0)
    a, places = rng.random((200, 3)), grid_of(2)
    same = color_agreement.agreement({"a": a, "b": a}, [("a", "b")], *places)
    assert same.value == 1
    assert same.p_value == 1 / 64  # eight moves of each image
    unrelated = color_agreement.agreement({"a": a, "b": rng.random((200, 3))}, [("a", "b")], *places)
    assert abs(unrelated.value) < 0.1
    assert unrelated.p_value > 0.02
    # A colour a picture tells the pictures apart, and no patch of one from another.
    flat = np.repeat(rng.random((2, 3)), 100, 0)
    noisy = color_agreement.agreement({"a": flat + 0.01 * a, "b": flat}, [("a", "b")], *places)
    assert abs(noisy.value) < 1e-9
    assert noisy.p_value == 1


def test_moves_map_what_is_held_out_to_itself(color_agreement):
    _, cells = grid_of(1, 4)
    checkerboard = cells[cells.sum(1) % 2 == 1]
    assert len(color_agreement._moves(cells)) == 8
    moves = color_agreement._moves(checkerboard)
    assert len(moves) == 4  # half a turn, and flips along both diagonals
    for move in moves:
        steps = np.abs(checkerboard[:, None] - checkerboard[None]).sum(-1)
        np.testing.assert_array_equal(steps[move][:, move], steps)
    np.testing.assert_array_equal(moves[0], np.arange(len(checkerboard)))


def test_smooth_colours_agree_no_better_than_moved(color_agreement):
    rng = np.random.default_rng(0)
    places = grid_of(3)
    found = []
    for _ in range(60):
        a, b = (np.cos(places[1] @ rng.normal(size=(2, 3)) * 0.3 + 6 * rng.random((3, 3))[places[0]]) for _ in "ab")
        found.append(color_agreement.agreement({"a": a, "b": b}, [("a", "b")], *places).p_value)
    assert 0.35 < np.mean(found) < 0.65  # uniform: 0.5 +- 0.037
    assert np.sum(np.array(found) <= 0.05) <= 9  # binomial, 3 expected


def test_many_images_have_too_many_combinations_of_moves(color_agreement):
    moved = [np.random.default_rng(k).random(4) for k in range(5)]
    exact = color_agreement._combinations(moved)
    assert exact.shape == (4**5,)
    drawn = color_agreement._combinations(moved, limit=1000)
    assert drawn.shape == (1000,)
    unmoved = np.mean([values[0] for values in moved])
    np.testing.assert_allclose([exact[0], drawn[0]], unmoved)
    np.testing.assert_allclose(drawn.mean(), exact.mean(), atol=0.02)  # about five standard errors
    places = grid_of(20, 4)
    colors = np.random.default_rng(0).random((320, 3))
    assert color_agreement.agreement({"a": colors, "b": colors}, [("a", "b")], *places).p_value == 1 / 2**16


def test_pairs_are_of_different_networks(color_agreement):
    assert color_agreement.pairs_of_networks(["vit 1", "vit 2", "cnn 1"]) == [("vit 1", "cnn 1"), ("vit 2", "cnn 1")]


@pytest.mark.slow
def test_colours_agree_after_alignment_and_not_before(tmp_path, capsys):
    with helpers.example("sam_vs_dino") as example:
        found = example.main(example.shipped(), tmp_path)
    assert abs(found["before"]) < 0.1
    assert found["after"] > 0.4
    assert found["top1"] > 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"colors.png", "matches.png"}
    assert "held-out patches" in capsys.readouterr().out


@pytest.mark.slow
def test_parts_have_consistent_colors_after_alignment_more_than_controls(tmp_path, capsys):
    with helpers.example("parts_of_images") as example:
        found = {name: result.value for name, result in example.main(tmp_path).items()}
    before, after = found["before: each network by itself"], found["after: aligned and cut together"]
    controls = [value for name, value in found.items() if name.startswith("control")]
    assert before < 0.1 < max(controls) < after - 0.1
    assert min(value for name, value in found.items() if name.startswith("portrait")) > 0.15
    assert len(controls) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "before_after.png", "new_images.png", "nested.png", "prompts.png",
    }  # fmt: skip
    assert "3584 patches that are not landmarks" in capsys.readouterr().out


def test_consistency_is_that_of_its_definition():
    with helpers.example("parts_of_images") as example:
        data = jaxalign.datasets.load_part_features()
        everywhere = np.arange(len(data.part_index))
        exact = np.eye(3)[data.part_index % 3] + data.part_index[:, None] / 20  # a color for each part
        exact = exact.reshape(4, 32, 32, 3)
        same = {"a": exact, "b": exact}
        found = example.consistency(same, [("a", "b")], data, everywhere)
        assert found.value == 1
        assert found.p_value < 0.001
        random = {name: np.random.default_rng(k).random(exact.shape) for k, name in enumerate("ab")}
        found = example.consistency(random, [("a", "b")], data, everywhere)
        assert abs(found.value) < 0.05  # parts of 15 to 150 patches
        assert found.p_value > 0.01
