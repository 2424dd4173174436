"""What the mathematics says of measures: invariances, ranges, metrics, no bias; the table in docs/pages/measures.md.

`python tests/test_measures_facts.py` writes the table anew, from what is measured here.
"""

from __future__ import annotations

from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

from jaxalign import measures
from jaxalign.kernels import RBF
from jaxalign.measures import REGISTRY

DOC = Path(__file__).parent.parent / "docs" / "pages" / "measures.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->"

N, WIDTH = 24, 5
OPTIONS = {name: {"kernel": RBF(density=0.3)} if "kernel" in entry.options else {} for name, entry in REGISTRY.items()}
# Options that change what a measure is invariant to: rows of the table of their own.
VARIANTS = {"procrustes": {"normalize": False}}


def sets(seed=0, noise=0.5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, WIDTH)) * np.arange(1, WIDTH + 1)
    return x, x @ rng.normal(size=(WIDTH, WIDTH)) + noise * 10 * rng.normal(size=(N, WIDTH)) + 2


def value(name, x, y, **options):
    return float(getattr(measures, name)(x, y, **OPTIONS[name], **options))


def mapped(invariance, x):
    """x after a map of its features."""
    rng = np.random.default_rng(7)
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    return {
        "orthogonal": lambda: x @ turn,
        "shift": lambda: x + 10 * rng.normal(size=WIDTH),
        "scale": lambda: 3.7 * x,
        "channel scale": lambda: x * [0.2, 3.0, 1.0, 5.0, 0.7],
        "affine": lambda: x @ rng.normal(size=(WIDTH, WIDTH)) + 1,
    }[invariance]()


INVARIANCES = ("orthogonal", "shift", "scale", "channel scale", "affine")


def is_invariant(name, invariance, **options):
    """Whether the value stays when either set is mapped; None where it is neither equal nor clearly different."""
    x, y = sets()
    before = value(name, x, y, **options)
    after = [value(name, mapped(invariance, x), y, **options), value(name, x, mapped(invariance, y), **options)]
    changes = [abs(changed - before) for changed in after]
    size = max(1.0, abs(before))
    if max(changes) < 1e-9 * size:
        return True
    return False if max(changes) > 1e-3 * size else None


def is_symmetric(name, **options):
    x, y = sets()
    there, back = value(name, x, y, **options), value(name, y, x, **options)
    return abs(there - back) < 1e-9 * max(1.0, abs(there))


def rows():
    """A label, a measure and its options, for each row of the table."""
    for name in REGISTRY:
        yield f"`{name}`", name, {}
        if name in VARIANTS:
            options = ", ".join(f"{option}={value}" for option, value in VARIANTS[name].items())
            yield f"`{name}`, `{options}`", name, VARIANTS[name]


def table():
    """Rows of a Markdown table, each invariance as it was found."""

    def number(end):
        return {float("inf"): "∞", -float("inf"): "-∞", 2**0.5: "√2", np.pi / 2: "π/2"}.get(end, f"{end:g}")

    head = ["measure", "direction", "range", "invariant to", "symmetric", "differentiable", "source"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for label, name, options in rows():
        entry = REGISTRY[name]
        found = ", ".join(invariance for invariance in INVARIANCES if is_invariant(name, invariance, **options))
        ends = "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}".join(number(end) for end in entry.range_with(options))
        symmetric = "yes" if is_symmetric(name, **options) else ""
        cells = [label, entry.direction_with(options), ends, found, symmetric, entry.differentiable, entry.source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


every_measure = pytest.mark.parametrize("name", REGISTRY)


@pytest.mark.slow
@every_measure
@pytest.mark.parametrize("invariance", INVARIANCES)
def test_invariance_is_what_the_registry_says(x64, name, invariance):
    # hsic of the RBF kernel is auto-scaled, so it has no unit; its linear kernel has.
    assert is_invariant(name, invariance) is (invariance in REGISTRY[name].invariances)


@pytest.mark.parametrize("invariance", INVARIANCES)
@pytest.mark.parametrize("name", VARIANTS)
def test_invariance_with_other_options_is_what_the_registry_says(x64, name, invariance):
    options = VARIANTS[name]
    assert is_invariant(name, invariance, **options) is (invariance in REGISTRY[name].invariances_with(options))


def test_the_table_in_the_docs_is_what_was_found(x64):
    text = DOC.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table(), f"run python {Path(__file__).name}"


@every_measure
def test_direction_range_and_symmetry_are_what_the_registry_says(x64, name):
    entry, (x, y) = REGISTRY[name], sets()
    assert is_symmetric(name) is entry.symmetric
    near, far = value(name, x, x + 0.1 * y), value(name, x, np.random.default_rng(9).normal(size=(N, WIDTH)))
    assert (near > far) is (entry.direction == "similarity")
    for found in (near, far, value(name, x, y)):
        assert entry.range[0] - 1e-12 <= found <= entry.range[1] + 1e-12


@every_measure
def test_a_set_is_most_like_itself(x64, name):
    entry, (x, _) = REGISTRY[name], sets()
    if name == "linear_predictivity":  # of held-out samples: as good as the weakest penalty lets it be
        assert value(name, x, x) > 0.999
    elif np.isfinite(entry.best_with({})):
        # The distance of equal shapes is the rounding of a rotation.
        assert abs(value(name, x, x) - entry.best_with({})) < 1e-9


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("result", "normalize"), [("angular", True), ("distance", True), ("distance", False)])
def test_shape_distances_obey_the_triangle_inequality(x64, alpha, result, normalize):
    # Williams et al. 2021, proposition 1.
    x, y, z = np.random.default_rng(1).normal(size=(3, 40, N, WIDTH))
    y = 0.7 * x + 0.3 * y  # close to a straight line, where it is tight

    def distance(a, b):
        return np.asarray(measures.shape_distance(a, b, alpha=alpha, normalize=normalize, result=result))

    assert (distance(x, z) <= distance(x, y) + distance(y, z) + 1e-12).all()


def test_the_whitened_cosine_of_squared_distances_is_biased_linear_cka(x64):
    # Diedrichsen et al. 2021.
    x, y = sets()
    whitened = measures.rsa(x, y, comparison="whitened_cosine")
    helpers.assert_close(whitened, measures.cka(x, y, kernel="linear", estimator="biased"), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "kernel"), [(16, "linear"), (256, "linear"), (16, "rbf"), (64, "rbf")])
def test_debiased_cka_of_independent_sets_is_0_on_average(n, kernel):
    options = {"kernel": kernel}
    x, y = (np.random.default_rng(n).normal(size=(2, 200, n, 8))).astype(np.float32)
    values = np.asarray(measures.cka(x, y, **options))
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(200)  # 1 in 16 000 by chance, for this seed once and for all
    assert np.asarray(measures.cka(x, y, estimator="biased", **options)).mean() > 4 * values.std() / np.sqrt(200)


def test_biased_cka_of_few_independent_samples_is_nearly_1():
    x, y = np.random.default_rng(0).normal(size=(2, 50, 32, 64)).astype(np.float32)
    include = RBF(diagonal="include")  # as `rbf_affinity`
    assert np.mean(measures.cka(x, y, include, estimator="biased")) > 0.99
    assert np.mean(measures.cka(x, y, estimator="biased")) > 0.98
    assert abs(np.mean(measures.cka(x, y))) < 0.02


def test_canonical_correlations_of_as_many_features_as_samples_are_1(x64):
    x, y = np.random.default_rng(0).normal(size=(2, 10, 12))
    helpers.assert_close(measures.cca(x, y), 1.0, 1e-10)


def test_svcca_with_all_directions_is_cca(x64):
    x, y = sets()
    helpers.assert_close(measures.svcca(x, y, num_components=WIDTH), measures.cca(x, y), 1e-12)


def test_minibatch_cka_of_one_batch_is_cka(x64):
    x, y = sets()
    helpers.assert_close(measures.minibatch_cka([(x, y)]), measures.cka(x, y, kernel="linear"), 1e-12)


@pytest.mark.parametrize("k", [3, 10])
def test_neighbours_of_independent_sets_are_shared_by_chance(k):
    x, y = np.random.default_rng(k).normal(size=(2, 40, 50, 6)).astype(np.float32)
    values = np.asarray(measures.mutual_knn(x, y, k))
    assert abs(values.mean() - k / 49) < 4 * values.std() / np.sqrt(40)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    text = DOC.read_text()
    DOC.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table() + text[text.index(END) :])
