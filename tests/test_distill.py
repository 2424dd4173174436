"""The distillation examples, in JAX and in torch, learn what they say."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.usefixtures("usual_promotion")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_student_learns_neighbourhoods_and_the_same_again_from_a_seed(tmp_path):
    pytest.importorskip("matplotlib", reason='the example draws: python -m pip install "jaxalign[viz]"')
    example = load("distill")
    pixels, teacher = example.load("mobilenet-v2 block 13")
    run = example.train(0, partial(example.aligned, "cka"), pixels, teacher, steps=100)
    (_, first), *_, (_, last) = run.scores
    assert last.neighbours > first.neighbours + 0.05
    assert last.cka > first.cka + 0.1
    again = example.train(0, partial(example.aligned, "cka"), pixels, teacher, steps=1)
    assert again.losses[0] == run.losses[0]
    example.draw({"aligned": [run], "again": [run]}).savefig(tmp_path / "curves.png")
    with pytest.raises(ValueError, match="teacher must be one of"):
        example.load("resnet")


def test_a_torch_student_learns(capsys):
    pytest.importorskip("torch", reason='torch is missing: python -m pip install "jaxalign[torch]"')
    before, after = load("torch_training").main(steps=60)
    assert after.cka > before.cka + 0.05
    assert "shared neighbours" in capsys.readouterr().out
