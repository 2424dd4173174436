"""Random input for all that is public: a documented error or the right answer, and nothing else.

Shapes come from a short list, as each is compiled; values, layouts, scales, masks, densities and what is wrong with
them do not. JAXALIGN_FUZZ=20000 in the environment tries so many cases in all instead of 400.
"""

from __future__ import annotations

import collections
import functools
import os
from typing import NamedTuple

import helpers
import hypothesis
import jax
import jax.numpy as jnp
import memory
import numpy as np
import pytest
import reference
import reference_measures
from hypothesis import strategies as st

import jaxalign
from jaxalign.kernels import RBF

pytestmark = pytest.mark.usefixtures("unchecked_types", "usual_promotion")
GROUPS = 5
CASES = max(1, int(os.environ.get("JAXALIGN_FUZZ", "200")) // GROUPS)
fuzz = hypothesis.settings(max_examples=CASES, parent=hypothesis.settings.get_profile("jaxalign"))

ROWS, WIDTHS = (2, 12), (1, 7)
REFUSALS = (ValueError, TypeError)


def normal(rng, n, d):
    return rng.normal(size=(n, d))


def heavy(rng, n, d):
    return rng.standard_cauchy(size=(n, d)).clip(-1e4, 1e4)


def clusters(rng, n, d):
    return 1e3 * rng.normal(size=(3, d))[rng.integers(3, size=n)] + rng.normal(size=(n, d))


def duplicates(rng, n, d):
    return rng.normal(size=(max(n // 2, 1), d))[rng.integers(max(n // 2, 1), size=n)]


def constant(rng, n, d):
    return np.broadcast_to(rng.normal(size=(1, d)), (n, d)).copy()


def integers(rng, n, d):
    return rng.integers(-2, 3, size=(n, d)).astype(float)


LAYOUTS = {
    "C": lambda x: np.ascontiguousarray(x),
    "Fortran": lambda x: np.asfortranarray(x),
    "every second row": lambda x: np.repeat(x, 2, 0)[::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "read-only": lambda x: np.frombuffer(np.ascontiguousarray(x).tobytes(), x.dtype).reshape(x.shape),
    "jax": jnp.asarray,
}


ANY = (normal, normal, heavy, clusters, duplicates, constant, integers)
VARIED = tuple(make for make in ANY if make is not constant)


@st.composite
def features(draw, n=None, finite=False, makes=ANY):
    """Features of any kind; if finite, of numbers that their dtype can hold."""
    memory.WATCH.drop_programs()  # a case may compile some dozens
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.sampled_from(ROWS)) if n is None else n
    make = draw(st.sampled_from(makes))
    x = make(rng, n, draw(st.sampled_from(WIDTHS)))
    dtype = draw(st.sampled_from((np.float32, np.float32, np.float32, np.float16)))
    # Powers of two: what was equal stays equal.
    x = x * 2.0 ** draw(st.integers(-8, 2) if finite and dtype == np.float16 else st.integers(-60, 60))
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if not finite and draw(st.integers(0, 9)) == 0:
        x[rng.integers(n), rng.integers(x.shape[1])] = draw(st.sampled_from((np.nan, np.inf, -np.inf)))
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)


class Options(NamedTuple):
    """Of an affinity."""

    density: float
    diagonal: str
    bandwidth: str
    mask: np.ndarray | None


@st.composite
def options(draw, n):
    share = st.floats(0.01, 0.99)
    density = draw(st.one_of(share, share, share, st.sampled_from((0.0, 1.0, -0.5, 2.0, np.nan, 0.05, 0.5))))
    mask = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))) if draw(st.integers(0, 3)) == 0 else None
    return Options(
        density, draw(st.sampled_from(("include", "exclude"))), draw(st.sampled_from(("global", "per_row"))), mask
    )


def exactly(x):
    return np.asarray(x).astype(np.float64)


def usable(x, mask):
    rows = exactly(x)
    return bool(np.isfinite(rows if mask is None else rows[mask]).all())


def reference_sigma(x, choice):
    """In float64; a ValueError where there is none."""
    if not usable(x, choice.mask) or (choice.mask is not None and choice.mask.sum() < 2):
        raise ValueError("nan, or too few real samples")
    rows = np.where(np.isfinite(exactly(x)), exactly(x), 0)
    return reference.solve_sigma(rows, **choice._asdict())


def near_the_floor(x, choice):
    """Whether rounding decides if there is a sigma: the density is all but the share of coincident pairs."""
    rows = np.where(np.isfinite(exactly(x)), exactly(x), 0)
    per_row = choice.bandwidth == "per_row"
    floors = np.atleast_1d(reference.floor(rows, diagonal=choice.diagonal, mask=choice.mask, per_row=per_row))
    return any(abs(floor - choice.density) < 1e-4 * max(choice.density, 1e-9) for floor in floors)


@pytest.mark.slow
@fuzz
@hypothesis.given(st.data())
def test_sigma_and_affinity(data):
    x = data.draw(features())
    choice = data.draw(options(x.shape[0]))
    hypothesis.assume(not near_the_floor(x, choice))
    try:
        expected = reference_sigma(x, choice)
    except (ValueError, FloatingPointError):
        with pytest.raises(REFUSALS):
            jaxalign.solve_sigma(x, **choice._asdict())
        with pytest.raises(REFUSALS):
            jaxalign.rbf_affinity(x, **choice._asdict())
        return
    solution = jaxalign.solve_sigma(x, **choice._asdict())
    affinity = np.asarray(jaxalign.rbf_affinity(x, **choice._asdict()), np.float64)
    rows = np.where(np.isfinite(exactly(x)), exactly(x), 0)
    # The density that the sigma found has in float64, rather than sigma itself: where few pairs bear the density sigma
    # is loose and the density is not.
    reached = reference.mean_density(
        rows, sigma=np.asarray(solution.sigma, np.float64), diagonal=choice.diagonal, mask=choice.mask
    )
    np.testing.assert_allclose(reached, choice.density, rtol=2e-4)
    np.testing.assert_allclose(
        affinity, reference.rbf_affinity(rows, sigma=np.nan_to_num(expected, nan=1.0), mask=choice.mask), atol=2e-3
    )
    assert (np.asarray(solution.status) == 0).all() or choice.mask is not None
    assert np.isfinite(affinity).all()


@pytest.mark.slow
@fuzz
@hypothesis.given(st.data())
def test_between_two_sets(data):
    x, y = data.draw(features()), data.draw(features())
    sigma = data.draw(st.one_of(st.floats(1e-3, 1e3), st.sampled_from((0.0, -1.0, np.nan, np.inf))))
    scale = float(np.nanmax(np.abs(exactly(x)), initial=0, where=np.isfinite(exactly(x)))) or 1.0
    valid = x.shape[1] == y.shape[1] and usable(x, None) and usable(y, None)
    with np.errstate(all="ignore"):
        single = np.float32(sigma * scale)
    if not valid or not np.isfinite(single) or single <= 0:
        with pytest.raises(REFUSALS):
            jaxalign.rbf_affinity(x, y, single)
        return
    found = jaxalign.rbf_affinity(x, y, single)
    expected = reference.rbf_affinity(exactly(x), exactly(y), sigma=float(single))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(jaxalign.affinity_operator(x, y, single).sum(-1), expected.sum(1), atol=5e-2)
    np.testing.assert_allclose(jaxalign.mean_density(x, y, sigma=single), expected.mean(), atol=2e-3)


MEASURES = {
    "cka": ({"kernel": RBF(density=0.5)}, lambda x, y: reference_measures.cka(x, y, kernel="rbf", density=0.5)),
    "rsa": ({}, lambda x, y: reference_measures.rsa(x, y, metric="sqeuclidean", comparison="pearson")),
    "distance_correlation": (
        {"estimator": "biased", "squared": False},
        lambda x, y: reference_measures.distance_correlation(x, y, estimator="biased", squared=False),
    ),
}


def varies(x):
    """Whether the distances between samples differ, beyond rounding: what all measures need."""
    distances = reference.squared_distances(exactly(x))
    return np.ptp(distances[~np.eye(len(x), dtype=bool)]) >= 1e-6 * distances.max()


@pytest.mark.slow
def test_measures():
    reached = collections.Counter()

    @fuzz
    @hypothesis.given(st.data())
    def compare_with_the_reference(data):
        x, y = (data.draw(features(12, finite=True, makes=VARIED)) for _ in "xy")
        name = data.draw(st.sampled_from(sorted(MEASURES)))
        chosen, of = MEASURES[name]
        reached["tried"] += 1
        if not (varies(x) and varies(y)):
            return
        expected = of(*(exactly(one) / np.abs(exactly(one)).max() for one in (x, y)))
        found = float(jaxalign.compare(x, y, name, **chosen))
        assert -1.001 <= found <= 1.001
        np.testing.assert_allclose(found, expected, atol=5e-3)
        reached[name] += 1

    compare_with_the_reference()
    compared = sum(reached[name] for name in MEASURES)
    assert compared >= 0.9 * reached["tried"], reached
    assert min(reached[name] for name in MEASURES) >= 0.2 * compared, reached


@pytest.mark.slow
@fuzz
@hypothesis.given(st.data())
def test_measures_of_features_without_variation(data):
    x, y = data.draw(features(12, finite=True, makes=(constant,))), data.draw(features(12, finite=True))
    if data.draw(st.booleans()):
        x, y = y, x
    for name in ("rsa", "distance_correlation"):
        assert float(jaxalign.compare(x, y, name, **MEASURES[name][0])) == 0
    assert float(jaxalign.compare(x, y, "cka", kernel="linear")) == 0
    with pytest.raises(ValueError, match="duplicates"):  # no sigma gives the density
        jaxalign.compare(x, y, "cka", kernel=RBF(density=0.5))


@fuzz
@hypothesis.given(st.data())
def test_measures_refuse_what_they_cannot_compare(data):
    wrong = data.draw(st.sampled_from(("missing", "other samples", "few samples")))
    n = 2 if wrong == "few samples" else 12
    x, y = (data.draw(features(n, finite=True, makes=VARIED)) for _ in "xy")
    if wrong == "missing":
        y = np.array(y)
        y[data.draw(st.integers(0, n - 1)), -1] = data.draw(st.sampled_from((np.nan, np.inf, -np.inf)))
    if wrong == "other samples":
        y = y[: data.draw(st.integers(4, n - 1))]
    names = ("cka", "rsa") if wrong == "few samples" else sorted(MEASURES)
    name = data.draw(st.sampled_from(names))
    if data.draw(st.booleans()):
        x, y = y, x
    with pytest.raises(REFUSALS):
        jaxalign.compare(x, y, name, **MEASURES[name][0])


@functools.cache
def gradient_of_loss(measure):
    """By the first set, of features of float32; compiled once for each shape, whatever the density."""

    def loss(x, y, density):
        return jaxalign.losses.alignment_loss(x, y, measure=measure, kernel=RBF(density=density))

    return jax.jit(jax.grad(loss))


@pytest.mark.slow
@hypothesis.settings(max_examples=30, parent=hypothesis.settings.get_profile("jaxalign"))  # they take longest
@hypothesis.given(st.data())
def test_losses_and_their_gradients_are_finite(data):
    n = data.draw(st.sampled_from((5, 12)))
    x, y = data.draw(features(n)), data.draw(features(n))
    measure = data.draw(st.sampled_from(("cka", "kl")))
    density = 0.3

    if not (usable(x, None) and usable(y, None)):
        with pytest.raises(REFUSALS):
            jaxalign.losses.alignment_loss(x, y, measure=measure, kernel=RBF(density=density))
        return
    value = jaxalign.losses.alignment_loss(x, y, measure=measure, kernel=RBF(density=density))
    assert np.isfinite(value)
    gradient = gradient_of_loss(measure)(*(np.asarray(one).astype(np.float32) for one in (x, y)), density)
    # Its unit is one over that of x.
    scale = np.float32(max(np.abs(exactly(x)).max(), 1e-30))
    assert np.isfinite(np.asarray(gradient) * scale).all()


@pytest.mark.slow
@fuzz
@hypothesis.given(st.data())
def test_alignment_and_cuts(data):
    n = 12
    x, y = data.draw(features(n)), data.draw(features(n))
    count = data.draw(st.sampled_from((6, n)))
    try:
        alignment = helpers.align({"x": x, "y": y}, landmarks=np.arange(count), density=0.5, channels="standardize")
    except REFUSALS as error:
        if usable(x, None) and usable(y, None) and "duplicates" not in str(error):
            raise
        return
    for name, rows in (("x", x), ("y", y)):
        aligned = np.asarray(alignment.features[name])
        assert aligned.shape == (n, count)
        assert np.isfinite(aligned).all()
        assert aligned.min() >= 0
        assert aligned.max() <= 1 + 1e-6
        np.testing.assert_allclose(alignment.transform(name, np.asarray(rows)), aligned, atol=1e-4)
    cut = jaxalign.normalized_cut(alignment, 3, density=0.5)
    assert np.isfinite(cut.eigenvectors).all()
    assert np.asarray(cut.eigenvalues).max() <= 1 + 1e-4
    np.testing.assert_allclose(cut.eigenvectors.T @ cut.eigenvectors, np.eye(3), atol=1e-3)
    colours = np.asarray(jaxalign.rgb(cut))
    assert ((colours >= 0) & (colours <= 1)).all()
    labels = np.asarray(jaxalign.kway(cut))
    assert ((labels >= 0) & (labels < 3)).all()
