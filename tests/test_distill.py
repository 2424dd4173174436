"""The distillation examples, in JAX and in torch, learn what they say."""

from __future__ import annotations

from functools import partial

import helpers
import pytest

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
