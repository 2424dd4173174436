"""How results print: a few lines, never an array, also of traced, batched, spread and deleted arrays."""

from __future__ import annotations

from dataclasses import is_dataclass

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign import Status, _repr, io

X, Y = np.random.default_rng(0).normal(size=(2, helpers.ROWS, helpers.WIDTH)).astype(np.float32)
KEY = jax.random.key(0)


def solve(x, **options):
    return jaxalign.solve_sigma(x, density=0.2, **options)


RESULTS = {
    "SigmaSolution": lambda: solve(X),
    "Alignment": lambda: jaxalign.align({f"network {k}": X for k in range(9)}, density=0.2),
    "Correspondence": lambda: jaxalign.correspondence(X, Y),
    "Matching": lambda: jaxalign.match({f"network {k}": X for k in range(4)}, landmarks=5, rounds=0),
    "ComparisonGrid": lambda: jaxalign.compare_grid({f"layer {k}": X for k in range(9)}, kernel="linear"),
    "PermutationTest": lambda: jaxalign.permutation_test(X, Y, kernel="linear", permutations=9, key=KEY),
    "Interval": lambda: jaxalign.bootstrap(X, Y, kernel="linear", resamples=19, key=KEY),
    "NoiseCeiling": lambda: jaxalign.noise_ceiling([X, Y, X + Y], key=KEY, resamples=19),
    "Calibration": lambda: jaxalign.calibrate(
        jaxalign.permutation_test(X, Y, kernel="linear", permutations=19, key=KEY)
    ),
    "ScalingCurve": lambda: jaxalign.scaling_curve(X, Y, kernel="linear", key=KEY),
    "NormalizedCut": lambda: jaxalign.normalized_cut(X, 2, density=0.2),
    "ColorMap": lambda: jaxalign.fit_colors(X),
    "ColoredImages": lambda: jaxalign.color_images({"a": X[:, :3].reshape(1, -1, 2, 3)}, num_components=3),
    "AffinityOperator": lambda: jaxalign.affinity_operator(X, density=0.2).degree_normalized(),
    "Projector": lambda: jaxalign.losses.Projector.init(KEY, 8, 9),
    "GradientAgreement": jaxalign.losses.GradientAgreement.start,
    "Monitor": lambda: jaxalign.losses.monitor(k=3).update(0, X, Y),
    "MonitorCurve": lambda: jaxalign.losses.monitor(k=3).update(0, X, Y).curve(),
    "FeatureQueue": lambda: jaxalign.losses.FeatureQueue.empty(8, 2, 3),
    "Plan": lambda: jaxalign.Plan(1024),
    "PatchFeatures": jaxalign.datasets.load_patch_features,
    "PartFeatures": jaxalign.datasets.load_part_features,
    "DigitFeatures": jaxalign.datasets.load_digit_features,
    "FeatureSet": lambda: io.FeatureSet("x", X, "x.npy"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", RESULTS)
def test_results_print_in_a_few_lines(name):
    text = repr(RESULTS[name]())
    assert text.startswith(f"{name}(")
    assert len(text.splitlines()) <= 6
    assert len(text) < 700
    assert "array" not in text
    assert text == str(RESULTS[name]())


def test_every_public_result_has_one():
    public = [value for value in vars(jaxalign).values() if isinstance(value, type) and is_dataclass(value)]
    assert {cls.__name__ for cls in public} <= set(RESULTS)


def test_numbers_have_four_digits_and_arrays_their_range():
    solution = solve(X)
    assert f"sigma={float(solution.sigma):.4g}, density=0.2, passes={int(solution.passes)}, status=CONVERGED" in repr(
        solution
    )
    several = solve(np.stack([X, 2 * X]))
    assert f"sigma=float32[2] {float(several.sigma.min()):.4g} to {float(several.sigma.max()):.4g}" in repr(several)


def test_a_status_prints_by_name():
    x = np.stack([X, np.ones_like(X), np.ones_like(X)])
    found = jax.jit(solve)(x)
    assert "status=1 CONVERGED and 2 INFEASIBLE" in repr(found)
    assert "sigma=float32[3]" in repr(found)
    assert ", 2 nan" in repr(found)
    assert "status=INFEASIBLE" in repr(jax.tree.map(lambda a: a[1], found))


def test_under_a_trace_shapes_are_all_there_is():
    seen = []

    def traced(x):
        solution = solve(x)
        seen.extend([repr(solution), repr(jaxalign.affinity_operator(x, sigma=1.0))])
        return solution.sigma

    jax.jit(jax.vmap(traced))(np.stack([X, Y]))
    assert seen[0] == "SigmaSolution(sigma=float32[], density=float32[], passes=int32[], status=int32[])"
    assert seen[1].startswith("AffinityOperator(shape=(24, 24), dtype=float32, sigma=")


@pytest.mark.usefixtures("unchecked_types")
def test_what_jax_puts_into_a_pytree_prints():
    shapes = jax.eval_shape(solve, X)
    assert "sigma=float32[]" in repr(shapes)
    for result in (solve(X), jaxalign.affinity_operator(X, density=0.2)):
        assert repr(jax.tree.map(lambda leaf: object(), result))


def test_arrays_over_devices_are_not_gathered():
    mesh = jaxalign.sharding.data_mesh(2)
    rows = jaxalign.sharding.shard_rows(X, mesh)
    assert _repr.describe(rows) == "float32[24,5]"
    operator = jaxalign.affinity_operator(rows, density=0.2)
    assert "shape=(24, 24)" in repr(operator)


def test_a_deleted_array_prints():
    array = jnp.ones(3)
    array.delete()
    assert _repr.describe(array) == "float32[3]"


def test_large_arrays_are_not_read():
    assert _repr.describe(np.zeros((2**9, 2**9), np.float32)) == "float32[512,512]"


def test_descriptions():
    for value, text in (
        (0.123456, "0.1235"), (3, "3"), (None, "None"), ("a", "'a'"), (True, "True"), (np.float32(1 / 3), "0.3333"),
        (np.array([True, False]), "bool[2] with 1 True"), (np.arange(4), "int64[4] 0 to 3"),
        (np.zeros(3), "float64[3] 0"),
        (np.array([np.nan, 1.0]), "float64[2] 1, 1 nan"), (np.full(2, np.nan), "float64[2] all nan"),
        (np.zeros((0, 3)), "float64[0,3]"), (jnp.ones(2, jnp.bfloat16), "bfloat16[2] 1"), (("a",), "('a',)"),
        (list(range(9)), "[0, 1, 2, 3, ... 9 in all]"), ({"a": np.arange(2)}, "{'a': int64[2] 0 to 1}"),
        (jax.random.key(0), "key<fry>[]"), (np.array(["a", "b"]), "<U1[2]"),
    ):  # fmt: skip
        assert _repr.describe(value) == text
    assert _repr.describe_codes(np.array([0, 3, 3]), Status) == "1 CONVERGED and 2 NON_FINITE"
