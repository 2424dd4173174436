"""The training example learns what it says, and a batch spread over devices gives the same parameters."""

from __future__ import annotations

import helpers
import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    pytest.importorskip("matplotlib", reason='the example draws: python -m pip install "jaxalign[viz]"')
    with helpers.example("train_alignment_loss") as module:
        yield module


@pytest.mark.slow
def test_networks_agree_after_training_with_the_loss_and_not_without(example, tmp_path, capsys):
    alone, aligned = (runs[0] for runs in example.main(tmp_path, seeds=1, steps=120).values())
    assert alone.after.accuracy > 0.95
    assert aligned.after.accuracy > 0.95
    assert aligned.after.cka > 0.97 > alone.after.cka
    assert aligned.after.neighbors > alone.after.neighbors + 0.2
    assert aligned.losses[-1, 1] < 0.1 * alone.losses[-1, 1]
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert "labels alone" in capsys.readouterr().out


@pytest.mark.slow
def test_a_batch_over_devices_gives_the_parameters_of_one_device(example):
    one, two = (example.train(0, steps=4, devices=devices) for devices in (1, 2))
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.parameters), jax.tree.leaves(two.parameters), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)  # adam divides small gradients by their size, and so their rounding
