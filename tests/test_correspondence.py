"""correspondence: agreement with the reference, what it does not depend on, ties, batches, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxalign

N, M = 20, 8
METRICS = ("correlation", "cosine", "euclidean")
every_metric = pytest.mark.parametrize("metric", METRICS)
every_csls = pytest.mark.parametrize("csls", [None, 1, 5, N])


@pytest.fixture
def rows(rng):
    """Rows of a, and rows of b that are like them but noisy: some find their partner, some do not."""
    a = rng.normal(size=(N, M))
    return a, a + rng.normal(size=(N, M))


def assert_same(found, expected, dtype=np.float64):
    np.testing.assert_array_equal(found.rank, expected["rank"])
    np.testing.assert_array_equal(found.index, expected["index"])
    for name in ("top1", "top5", "mrr"):
        # Means of n numbers of at most 1: n roundings at most.
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=N * np.finfo(dtype).eps)


@pytest.mark.usefixtures("x64")
@every_metric
@every_csls
def test_ranks_and_shares_agree_with_the_reference(metric, csls, rows):
    expected = reference.correspondence(*rows, metric=metric, csls=csls)
    assert 0 < expected["top1"] < 1  # otherwise little is tested
    assert_same(jaxalign.correspondence(*rows, metric=metric, csls=csls), expected)


@every_metric
def test_float32_gives_the_ranks_of_float64_where_similarities_differ(metric, rows):
    a, b = (r.astype(np.float32) for r in rows)
    found = jaxalign.correspondence(a, b, metric=metric, csls=5)
    assert found.top1.dtype == np.float32
    assert_same(found, reference.correspondence(a, b, metric=metric, csls=5), np.float32)


@every_metric
def test_identical_features_all_find_themselves(metric, rows):
    a = rows[0].astype(np.float32)
    found = jaxalign.correspondence(a, a, metric=metric)
    assert (found.top1, found.top5, found.mrr) == (1, 1, 1)
    np.testing.assert_array_equal(found.index, np.arange(N))


@pytest.mark.slow
@every_metric
@pytest.mark.parametrize("csls", [None, 3])  # a mean over 3 is rounded, which once broke ties
@pytest.mark.parametrize("shape", [(N, M), (33, 17)])
def test_ties_count_against_so_that_collapsed_features_score_nothing(shape, metric, csls, rng):
    collapsed = np.tile(rng.random(shape[1]).astype(np.float32), (shape[0], 1))
    found = jaxalign.correspondence(collapsed, collapsed, metric=metric, csls=csls)
    assert (found.top1, found.top5) == (0, 0)
    np.testing.assert_array_equal(found.rank, shape[0] - 1)


@pytest.mark.parametrize("csls", [None, 3])
def test_constant_rows_have_correlation_0_with_all_others_whatever_the_rounding_of_their_mean(csls, rng):
    a = np.repeat(rng.random((33, 1)).astype(np.float32), 17, 1)  # means of 17 equal numbers are rounded
    found = jaxalign.correspondence(a, a, csls=csls)
    np.testing.assert_array_equal(found.rank, 32)


@pytest.mark.parametrize("metric", ["correlation", "cosine"])
def test_a_zero_row_has_similarity_0_and_no_nan(metric, rows):
    a, b = (r.astype(np.float32) for r in rows)
    a[4], b[4] = 0, 0
    found = jaxalign.correspondence(a, b, metric=metric)
    assert_same(found, reference.correspondence(a, b, metric=metric), np.float32)
    np.testing.assert_array_equal(found.rank[4], N - 1)  # all similarities of row 4 are 0: all tie with the true one


@every_metric
def test_features_that_have_nothing_to_do_with_each_other_score_about_chance(metric, rng):
    n = 400
    a, b = rng.normal(size=(2, n, 10)).astype(np.float32)
    found = jaxalign.correspondence(a, b, metric=metric)
    # Shares of n nearly independent trials: within five standard deviations of 1/n and 5/n.
    for share, chance in ((found.top1, 1 / n), (found.top5, 5 / n)):
        assert abs(share - chance) < 5 * np.sqrt(chance / n)
    assert abs(np.mean(found.rank) - (n - 1) / 2) < 5 * n / np.sqrt(12 * n)


@every_metric
def test_a_permuted_b_is_found_where_it_went(metric, rows, rng):
    a = rows[0].astype(np.float32)
    order = rng.permutation(N)
    found = jaxalign.correspondence(a, a[order], metric=metric)
    np.testing.assert_array_equal(found.index, np.argsort(order))
    assert found.top1 == np.mean(order == np.arange(N))


@every_metric
@every_csls
def test_relabelling_the_samples_in_both_relabels_the_ranks(metric, csls, rows, rng):
    a, b = (r.astype(np.float32) for r in rows)
    order = rng.permutation(N)
    before = jaxalign.correspondence(a, b, metric=metric, csls=csls)
    after = jaxalign.correspondence(a[order], b[order], metric=metric, csls=csls)
    np.testing.assert_array_equal(after.rank, np.asarray(before.rank)[order])
    np.testing.assert_array_equal(order[np.asarray(after.index)], np.asarray(before.index)[order])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("metric", "change"),
    [
        ("correlation", lambda rows, size, shift: size[:, None] * rows + shift[:, None]),
        ("cosine", lambda rows, size, shift: size[:, None] * rows),
        ("euclidean", lambda rows, size, shift: size[0] * rows + shift[:M]),
    ],
)
def test_each_metric_ignores_its_own_changes_of_the_rows(metric, change, rows, rng):
    """correlation: rows scaled and shifted each on its own; cosine: scaled; euclidean: all in the same way."""
    a, b = rows
    size, shift = np.exp(rng.normal(size=N)), rng.normal(size=N)
    before = jaxalign.correspondence(a, b, metric=metric, csls=3)
    if metric == "euclidean":
        after = jaxalign.correspondence(change(a, size, shift), change(b, size, shift), metric=metric, csls=3)
    else:
        after = jaxalign.correspondence(
            change(a, size, shift), change(b, size[::-1], shift[::-1]), metric=metric, csls=3
        )
    np.testing.assert_array_equal(after.rank, before.rank)
    np.testing.assert_array_equal(after.index, before.index)


@pytest.mark.usefixtures("x64")
def test_csls_takes_a_hub_down(rng):
    # The last row of b is the mean direction: near to every row of a. Without the correction it is often the answer.
    common = 2 * rng.normal(size=M)
    a = common + rng.normal(size=(N, M))
    b = a + 0.8 * rng.normal(size=(N, M))
    b[-1] = common
    plain = jaxalign.correspondence(a, b, metric="cosine")
    corrected = jaxalign.correspondence(a, b, metric="cosine", csls=5)
    assert np.sum(np.asarray(plain.index) == N - 1) > np.sum(np.asarray(corrected.index) == N - 1)


@every_metric
@pytest.mark.parametrize("csls", [None, 5])
def test_a_batch_gives_what_a_loop_gives(metric, csls, rng):
    a = rng.normal(size=(2, 3, N, M)).astype(np.float32)
    b = a + 0.7 * rng.normal(size=a.shape).astype(np.float32)
    together = jaxalign.correspondence(a, b, metric=metric, csls=csls)
    assert together.rank.shape == (2, 3, N)
    assert together.top1.shape == (2, 3)
    for i in np.ndindex(2, 3):
        alone = jaxalign.correspondence(a[i], b[i], metric=metric, csls=csls)
        for name in ("rank", "index", "top1", "top5", "mrr"):
            np.testing.assert_array_equal(getattr(together, name)[i], getattr(alone, name))


def test_it_works_under_jit_and_vmap_and_its_result_is_a_pytree(rows):
    a, b = (jnp.asarray(r, jnp.float32) for r in rows)
    plain = jaxalign.correspondence(a, b)
    compiled = jax.jit(jaxalign.correspondence)(a, b)
    mapped = jax.vmap(jaxalign.correspondence)(a[None], b[None])
    assert isinstance(compiled, jaxalign.Correspondence)
    for name in ("rank", "index"):
        np.testing.assert_array_equal(getattr(compiled, name), getattr(plain, name))
        np.testing.assert_array_equal(getattr(mapped, name)[0], getattr(plain, name))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, plain)
    assert doubled.mrr == 2 * plain.mrr
    assert len(jax.tree.leaves(plain)) == 5


@pytest.mark.slow
@every_metric
@pytest.mark.parametrize("csls", [None, 5])
def test_under_a_trace_nan_and_inf_score_nothing_in_their_batch_element_alone(metric, csls, rng):
    a, b = rng.normal(size=(2, 3, N, M)).astype(np.float32)
    score = jax.jit(lambda a, b: jaxalign.correspondence(a, b, metric=metric, csls=csls))
    clean = score(a, b)
    for value in (np.nan, np.inf, -np.inf):
        dirty = a.copy()
        dirty[1, 4, 2] = value
        for found in (score(dirty, b), score(b, dirty)):
            for share in (found.top1, found.top5, found.mrr):
                np.testing.assert_array_equal(np.isnan(share), [False, True, False])
            np.testing.assert_array_equal(found.rank[1], N)
            np.testing.assert_array_equal(found.index[1], -1)
        for name in ("rank", "index", "top1", "mrr"):
            np.testing.assert_array_equal(getattr(score(dirty, b), name)[::2], getattr(clean, name)[::2])


@every_metric
@pytest.mark.parametrize("csls", [None, 5])
@pytest.mark.parametrize("power", [-120, -66, 66, 100])
def test_rows_may_be_of_any_size(metric, csls, power, rows):
    a, b = (r.astype(np.float32) for r in rows)
    expected = jaxalign.correspondence(a, b, metric=metric, csls=csls)
    assert 0 < expected.top1 < 1
    large = np.ldexp(a, power), np.ldexp(b, power) if metric == "euclidean" else b
    found = jaxalign.correspondence(*large, metric=metric, csls=csls)
    # A power of two changes no digit.
    for name in ("index", "rank", "top1", "top5", "mrr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_the_scores_are_counts_of_the_ranks(rows):
    found = jaxalign.correspondence(*(r.astype(np.float32) for r in rows))
    rank = np.asarray(found.rank)
    np.testing.assert_allclose(found.top1, np.mean(rank == 0), rtol=1e-6)  # float32 means
    np.testing.assert_allclose(found.top5, np.mean(rank < 5), rtol=1e-6)
    np.testing.assert_allclose(found.mrr, np.mean(1 / (1 + rank)), rtol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_rows_of_landmarks_are_refused(rng):
    x = rng.normal(size=(N, 4)).astype(np.float32)
    a, b = (jaxalign.rbf_affinity(s * x, s * x[[7, 2]], s * 1.0) for s in (1, 2))
    a, b = (r.at[jnp.array([7, 2]), jnp.array([0, 1])].set(1) for r in (a, b))
    with pytest.raises(ValueError, match=r"^row 2 is 1 in column 1 in both a and b: the affinity of a landmark to it"):
        jaxalign.correspondence(a, b)
    keep = np.setdiff1d(np.arange(N), [2, 7])
    assert jaxalign.correspondence(a[keep], b[keep]).rank.shape == (N - 2,)


def test_ones_in_different_places_or_among_larger_numbers_are_not_landmarks():
    a = np.full((3, 4), 0.5, np.float32)
    b = a.copy()
    a[0, 1], b[0, 2] = 1, 1
    assert jaxalign.correspondence(a, b).rank.shape == (3,)
    a[0, 1], b[0, 1], a[2, 2] = 1, 1, 3
    assert jaxalign.correspondence(a, b).rank.shape == (3,)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("csls", [0, -1, N + 1, True, 2.0, "10"])
def test_a_bad_number_of_neighbours_is_refused(csls, rows):
    a, b = (r.astype(np.float32) for r in rows)
    with pytest.raises(ValueError, match=r"^csls must be a whole number of neighbors from 1 to n = 20, or None; got "):
        jaxalign.correspondence(a, b, csls=csls)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (np.ones((4, 3)), np.ones((5, 3)), ValueError, r"a and b must have the same shape.*got \(4, 3\) and \(5, 3\)"),
        (np.ones((4, 3)), np.ones((4, 2)), ValueError, r"a and b must have the same shape.*got \(4, 3\) and \(4, 2\)"),
        (np.ones((2, 4, 3)), np.ones((4, 3)), ValueError, "a and b must have the same shape"),
        (np.ones((1, 3)), np.ones((1, 3)), ValueError, r"^a has n = 1 sample"),
        (np.ones(3), np.ones((4, 3)), ValueError, r"^a must have shape \(..., n, d\)"),
        (np.ones((4, 3)), np.full((4, 3), "a"), TypeError, "^b must hold real numbers"),
        (np.full((4, 3), np.nan), np.ones((4, 3)), ValueError, r"^a has nan or inf in 4 row\(s\), the first is row 0"),
        (np.ones((4, 3)), np.full((4, 3), np.inf), ValueError, "^b has nan or inf"),
    ],
)
def test_bad_rows_are_refused(a, b, error, message):
    a, b = (r.astype(np.float32) if r.dtype == np.float64 else r for r in (a, b))
    with pytest.raises(error, match=message):
        jaxalign.correspondence(a, b)


@pytest.mark.usefixtures("unchecked_types")
def test_an_unknown_metric_is_refused(rows):
    a, b = (r.astype(np.float32) for r in rows)
    with pytest.raises(ValueError, match=r"^metric must be one of 'correlation', 'cosine', 'euclidean'; got 'l1'"):
        jaxalign.correspondence(a, b, metric="l1")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, jaxalign.alignment.PUBLISHED], ids=["default", "published"])
def test_rows_of_landmarks_are_told_by_their_pattern(options):
    """Of unrelated sets nothing corresponds, but landmarks find themselves."""
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(300, d)).astype(np.float32) for name, d in (("a", 16), ("b", 20))}
    found = jaxalign.align(features, landmarks=100, key=jax.random.key(0), **options)
    a, b = found.features.values()
    with pytest.warns(UserWarning, match="landmarks, whose entries for themselves reveal their matches"):
        assert jaxalign.correspondence(a, b).top1 > 0.25
    rest = np.asarray(found.queries)
    assert jaxalign.correspondence(a[rest], b[rest]).top1 < 0.05  # nor is there a warning, which would be an error
    assert found.correspondence("a", "b").top1 < 0.05
    assert jaxalign.correspondence(a[rest], 2 * a[rest]).top1 == 1
    x = rng.normal(size=(10_000, 40)).astype(np.float32)  # every column has a largest row of its own
    assert jaxalign.correspondence(x[:3000], 3 * x[:3000]).top1 == 1


def test_landmarks_must_be_known_before_a_trace():
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    with pytest.raises(TypeError, match="landmarks must not be traced"):
        jax.jit(lambda x: jaxalign.align({"a": x}, landmarks=jnp.arange(5), density=0.5).features["a"])(x)
