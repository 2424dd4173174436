"""joint_affinity: one auto-scaled affinity over the samples of all networks."""

from __future__ import annotations

import helpers
import jax
import numpy as np
import pytest
import reference

import jaxalign

N, M = 20, 8
LANDMARKS = np.arange(0, 16, 2)


@pytest.fixture
def features(rng):
    return {"clip": rng.normal(size=(N, 4)), "dino": 5 + 3 * rng.normal(size=(N, 6))}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("diagonal", ["include", "exclude"])
def test_it_is_the_affinity_of_the_stacked_rows_in_the_order_of_the_names(diagonal, features):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=0.3)
    joint = jaxalign.joint_affinity(alignment, density=0.1, diagonal=diagonal)
    rows = [np.asarray(alignment.features[name]) for name in ("clip", "dino")]
    # The solver stops within 1e-13 of the density; sigma and exponents carry some ten times that.
    helpers.assert_close(joint, reference.joint_affinity(rows, 0.1, diagonal), 1e-11)


@pytest.mark.usefixtures("x64")
def test_every_row_has_the_density_with_a_bandwidth_per_row(features):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=0.3)
    joint = jaxalign.joint_affinity(alignment, density=0.1, bandwidth="per_row")
    np.testing.assert_allclose(np.mean(joint, 1), 0.1, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_blocks_of_a_network_and_its_moved_copy_are_equal(features):
    x = features["clip"]
    alignment = helpers.align({"a": x, "b": 3 - 2 * x[:, ::-1]}, landmarks=LANDMARKS, density=0.3)
    joint = np.asarray(jaxalign.joint_affinity(alignment, density=0.1))
    for block in (joint[:N, N:], joint[N:, :N], joint[N:, N:]):
        helpers.assert_close(block, joint[:N, :N], 1e-11)


def test_rows_may_come_as_a_sequence_of_sets_of_different_size(rng):
    parts = [rng.normal(size=(n, M)).astype(np.float32) for n in (5, 9, 12)]
    joint = jaxalign.joint_affinity(parts, density=0.2)
    assert joint.shape == (26, 26)
    np.testing.assert_array_equal(joint, jaxalign.rbf_affinity(np.concatenate(parts), density=0.2))


@pytest.mark.slow
def test_it_works_on_an_alignment_under_jit(features):
    features = {name: x.astype(np.float32) for name, x in features.items()}
    alignment = helpers.align(features, landmarks=LANDMARKS, density=0.3)
    compiled = jax.jit(lambda a: jaxalign.joint_affinity(a, density=0.1))(alignment)
    helpers.assert_close(compiled, jaxalign.joint_affinity(alignment, density=0.1), 1e-5)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(5, 8), (5, 7)], r"^alignment must hold arrays \(n_k, m\) .* got \[\(5, 8\), \(5, 7\)\]"),
        ([(2, 5, 8), (2, 5, 8)], r"^alignment must hold arrays \(n_k, m\)"),
        ([], r"^alignment must hold arrays \(n_k, m\)"),
        ([(5, 8), (8,)], r"^alignment\[1\] must have shape"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        jaxalign.joint_affinity([np.ones(shape, np.float32) for shape in shapes])


def test_nan_is_refused_with_its_row_in_the_stack(rng):
    parts = [rng.normal(size=(5, M)).astype(np.float32) for _ in range(2)]
    parts[1][3] = np.nan
    with pytest.raises(ValueError, match=r"has nan or inf in 1 row\(s\), the first is row 8"):
        jaxalign.joint_affinity(parts, density=0.3)
