"""The distillation examples, in JAX and in torch, learn what they say."""

from __future__ import annotations

import json
import sys
from functools import partial

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.mark.slow
def test_a_student_learns_neighbourhoods_and_the_same_again_from_a_seed(tmp_path):
    pytest.importorskip("matplotlib", reason='the example draws: python -m pip install "jaxalign[viz]"')
    with helpers.example("distill") as example:
        pixels, teacher = example.load("mobilenet-v2 block 13")
        run = example.train(0, partial(example.aligned, "cka"), pixels, teacher, steps=100)
        (_, first), *_, (_, last) = run.scores
        assert last.neighbors > first.neighbors + 0.05
        assert last.cka > first.cka + 0.1
        again = example.train(0, partial(example.aligned, "cka"), pixels, teacher, steps=1)
        assert again.losses[0] == run.losses[0]
        example.draw({"aligned": [run], "again": [run]}).savefig(tmp_path / "curves.png")
        with pytest.raises(ValueError, match="teacher must be one of"):
            example.load("resnet")


@pytest.mark.slow
def test_a_torch_student_learns(capsys):
    pytest.importorskip("torch", reason='torch is missing: python -m pip install "jaxalign[torch]"')
    with helpers.example("torch_training") as example:
        before, after = example.main(steps=60)
    assert after.cka > before.cka + 0.05
    assert "shared neighbors" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("usual_promotion")
def test_a_flax_student_learns_in_one_compiled_step(capsys):
    pytest.importorskip("flax", reason='flax is missing: python -m pip install "jaxalign[flax]"')
    with helpers.example("flax_training") as example:
        before, after = example.main(epochs=6)
        assert example.step.jitted_fn._cache_size() == 1  # the padded last batch included
    assert after[0] > before[0] + 0.05
    assert "debiased CKA of the student's layers" in capsys.readouterr().out


@pytest.mark.slow
def test_relations_keep_neighbors_where_a_projector_learns_them_itself():
    with helpers.example("what_losses_preserve") as example:
        features = np.asarray(jaxalign.datasets.load_digit_features().features[example.TEACHER][:128], np.float32)
        teacher = jnp.asarray((features - features.mean(0)) / features.std())
        found = {}
        for name in ('"distances"', "projector, MSE"):
            student, value, _ = example.fit(example.LOSSES[name], teacher, 32, 600)
            assert value < 0.1
            found[name] = example.preserved(np.asarray(student), np.asarray(teacher))
    assert found['"distances"'][1] > 0.7 > 0.3 > found["projector, MSE"][1]  # neighbors in common


@pytest.mark.slow
def test_a_generative_model_is_trained_with_every_loss(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    with helpers.example("flow_matching") as example:
        for name, value in (("EVERY", 3), ("GENERATED", 40), ("EULER", 3)):
            monkeypatch.setattr(example, name, value)
        monkeypatch.setattr(sys, "argv", ["flow_matching", "--seeds", "1", "--steps", "6", "--out", str(tmp_path)])
        example.main()
        assert (tmp_path / "flow_matching.png").stat().st_size > 10_000
        runs = json.loads((tmp_path / "runs.json").read_text())
        assert [rows["method"] for rows in runs] == list(example.METHODS)
        assert all(np.isfinite(rows["frechet"]).all() for rows in runs)
        assert runs[0]["frechet"] != runs[1]["frechet"]  # the added loss has a gradient
        assert "| relational |" in capsys.readouterr().out
        x, y = np.random.default_rng(0).normal(size=(2, 4000, 3)) * np.array([1.0, 2, 3])
        assert example.frechet(x, y) < 0.05
        assert abs(example.frechet(x, 2 * x + 1) - (3 + 14)) < 0.5  # |shift|^2 and sum (s - 2 s)^2
