"""Matching: the evidence against independent densities, the equations of the assignment, and the result as used."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import jaxalign
from jaxalign import _candidates, _evidence, matching
from jaxalign.matching import Matching

NAMES = ("a", "b", "c")


def match(features, **options):
    return jaxalign.match(features, **{"num_components": 48, **options})


def views(rng, n=160, d=6, names=NAMES, noise=0.05):
    """The same samples in several networks: random smooth maps of a shared latent variable."""
    latent = rng.normal(size=(n, d))
    return {
        name: (np.tanh(latent @ rng.normal(size=(d, 3 * d)) / 2) + noise * rng.normal(size=(n, 3 * d))).astype(
            np.float32
        )
        for name in names
    }


def shuffle(features, rng):
    """Each network's samples in an order of its own, and the place of each sample."""
    orders = {name: rng.permutation(len(x)) for name, x in features.items()}
    return {name: x[orders[name]] for name, x in features.items()}, {k: np.argsort(v) for k, v in orders.items()}


def pairs_of(places, samples, names=NAMES):
    return {(a, b): np.stack([places[a][samples], places[b][samples]], 1) for a, b in itertools.combinations(names, 2)}


def gaussian_evidence(x, y, known, ridge, shrinkage=0.98):
    """log p(x, y) - log p(x) - log p(y) of all rows, by scipy's densities, in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    (i, j), r = known.T, x.shape[1]
    a, b, cross = x[i].T @ x[i] + ridge * np.eye(r), y[j].T @ y[j] + ridge * np.eye(r), shrinkage * x[i].T @ y[j]
    joint = np.block([[a, cross], [cross.T, b]]) / len(known)
    rows = np.concatenate([np.repeat(x, len(y), 0), np.tile(y, (len(x), 1))], 1)
    together = scipy.stats.multivariate_normal(np.zeros(2 * r), joint).logpdf(rows).reshape(len(x), len(y))
    alone = [scipy.stats.multivariate_normal(np.zeros(r), c / len(known)).logpdf(z) for c, z in ((a, x), (b, y))]
    return together - alone[0][:, None] - alone[1][None]


def paired(known, n):
    partner, weight = np.zeros(n, np.int32), np.zeros(n, np.float32)
    partner[known[:, 0]], weight[known[:, 0]] = known[:, 1], 1
    return _evidence.Pairs(jnp.asarray(partner), jnp.asarray(weight))


@pytest.mark.parametrize("number", [9, 100, 128])
def test_both_samples_of_a_known_pair_are_in_one_fold_and_folds_are_of_equal_size(number, rng):
    known = np.stack([rng.permutation(128)[:number], rng.permutation(128)[:number]], 1)
    order_a, order_b = (np.asarray(v) for v in _evidence.order_by_fold(jax.random.key(0), paired(known, 128)))
    assert sorted(order_a) == sorted(order_b) == list(range(128))
    # Known pairs come first, at the same places, in a random order.
    assert {(a, b) for a, b in zip(order_a[:number], order_b[:number], strict=True)} == set(map(tuple, known))
    assert (order_a[:number] != known[:, 0]).any()
    folds = np.asarray(_evidence.by_fold(jnp.asarray(order_a)))
    assert folds.shape == (_evidence.FOLDS, 128 // _evidence.FOLDS)
    assert (folds[3] == order_a[3 :: _evidence.FOLDS]).all()


@pytest.mark.parametrize("left_out", [0, 1])
def test_evidence_is_the_likelihood_ratio_of_a_joint_gaussian_without_the_pairs_of_a_fold(left_out, rng):
    x, y = (jnp.asarray(rng.normal(size=(128, 3)).astype(np.float32)) for _ in "xy")
    known = np.stack([rng.permutation(128)[:60], rng.permutation(128)[:60]], 1)
    pairs = paired(known, 128)
    order_a, order_b = _evidence.order_by_fold(jax.random.key(0), pairs)
    rows, columns = _evidence.by_fold(order_a), _evidence.by_fold(order_b)
    weight, one = pairs.weight[rows], jnp.float32(1)
    models = _evidence.held_out_models(x[rows], y[columns], weight, left_out * weight, jnp.float32(0.5), one)
    seen, number = _evidence.visit_evidence(lambda *tile: tile, models, x, order_a, y)
    back, number_b = _evidence.visit_evidence(lambda *tile: tile, models.reversed, y, order_b, x)
    for fold in range(_evidence.FOLDS):
        own = set(np.asarray(rows[fold]).tolist()) if left_out else set()
        expected = gaussian_evidence(x, y, np.array([pair for pair in known if pair[0] not in own]), 0.5)
        in_fold = np.isin(number, rows[fold])
        np.testing.assert_allclose(seen[in_fold], expected[np.asarray(number)[in_fold]], rtol=1e-4, atol=2e-4)
        in_fold = np.isin(number_b, columns[fold])
        np.testing.assert_allclose(back[in_fold], expected.T[np.asarray(number_b)[in_fold]], rtol=1e-4, atol=2e-4)


def test_rows_of_many_tiles_are_all_visited(monkeypatch, rng):
    monkeypatch.setattr(_evidence, "TILE", 8)
    n = _evidence.padded_size(500)
    assert n % (8 * _evidence.FOLDS) == 0
    assert 500 <= n < 640
    x = jnp.asarray(rng.normal(size=(n, 3)).astype(np.float32))
    order = jnp.asarray(rng.permutation(n))
    models = _evidence.Model(
        *(jnp.stack([k * jnp.eye(3)] * _evidence.FOLDS) for k in (1.0, 0.0, 0.0)), jnp.arange(16.0)
    )
    evidence, number = _evidence.visit_evidence(lambda *tile: tile, models, x, order, x)
    fold = np.empty(n)
    fold[order] = np.arange(n) % _evidence.FOLDS
    np.testing.assert_allclose(evidence, (x @ x.T)[number] + fold[np.asarray(number)][:, None], atol=1e-5)


@pytest.mark.parametrize("n", [1, 128, 129, 1000, 4097, 10_000, 50_000])
def test_padding_is_little_and_fits_tiles_and_buckets(n):
    size = _evidence.padded_size(n)
    assert n <= size <= max(1.1 * n, n + _candidates.BUCKETS)
    assert size % _candidates.BUCKETS == 0
    tiles = -(-size // _evidence.FOLDS // _evidence.TILE)
    assert size % (tiles * _evidence.FOLDS) == 0


def test_the_first_candidate_is_exact_and_few_others_are_missed(rng):
    scores = rng.normal(size=(50, 1280)).astype(np.float32)
    found = _candidates.largest(jnp.asarray(scores))
    np.testing.assert_array_equal(found.column[:, 0], scores.argmax(1))
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(found.column), 1), found.value)
    assert (np.diff(found.value) <= 0).all()
    best = np.argsort(-scores, 1)[:, : _candidates.CANDIDATES]
    kept = np.mean([np.isin(a, b).mean() for a, b in zip(best, np.asarray(found.column), strict=True)])
    assert 0.8 < kept < 1  # 31 / 2 / 128 of them share a bucket with a better one
    exact = _candidates.largest(jnp.asarray(scores[:, :128]))
    np.testing.assert_array_equal(exact.column, np.argsort(-scores[:, :128], 1)[:, : _candidates.CANDIDATES])


def as_candidates(matrix, k=None):
    """All entries of each row, or the k largest, in decreasing order."""
    column = np.argsort(-matrix, 1)[:, :k].astype(np.int32)
    return _candidates.Candidates(jnp.asarray(column), jnp.asarray(np.take_along_axis(matrix, column, 1)))


def test_candidates_add_compose_and_are_read_from_the_other_side(rng):
    p, q = (np.where(rng.random((20, 20)) < 0.5, rng.random((20, 20)), 0).astype(np.float32) for _ in "pq")
    steps = _candidates.STEPS
    best_p, best_q = (np.where(v >= -np.sort(-v, 1)[:, [steps - 1]], v, 0) for v in (p, q))
    product = _candidates.spread(_candidates.compose(as_candidates(p), as_candidates(q)), 20)
    np.testing.assert_allclose(product, best_p @ best_q, atol=1e-6)
    seen = _candidates.of_the_other_side(as_candidates(p), as_candidates(q))
    np.testing.assert_array_equal(seen, np.take_along_axis(q.T, np.asarray(as_candidates(p).column), 1))


NOTHING = jnp.full(12, _candidates.NEVER)


@pytest.mark.parametrize("null", [2.0, 4.0, 6.0])
def test_partial_assignment_solves_its_equations(null, rng):
    evidence = rng.normal(size=(12, 9)).astype(np.float32)
    candidates, possible = as_candidates(evidence), jnp.ones(9, bool)
    found = _candidates.partial_assignment(candidates, NOTHING, jnp.float32(null), possible)
    p = np.asarray(_candidates.spread(candidates._replace(value=found), 9), np.float64)
    # P = u exp(E) v, where u and v are what is left for the dustbins, divided by exp(null / 2).
    u, v = (1 - p.sum(1)) * np.exp(-null / 2), (1 - p.sum(0)) * np.exp(-null / 2)
    np.testing.assert_allclose(p, u[:, None] * np.exp(evidence) * v[None], rtol=2e-3)  # 15 iterations
    assert (p >= 0).all()
    assert (p.sum(1) <= 1 + 1e-6).all()
    assert (p.sum(0) <= 1 + 1e-3).all()


def test_without_a_dustbin_the_assignment_is_doubly_stochastic(rng):
    candidates = as_candidates(rng.normal(size=(12, 12)).astype(np.float32))
    p = _candidates.partial_assignment(candidates, NOTHING, jnp.float32(-40), jnp.ones(12, bool))
    np.testing.assert_allclose(_candidates.spread(candidates._replace(value=p), 12).sum(0), 1, atol=1e-3)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)


def test_what_is_not_a_candidate_counts_as_if_spread_evenly(rng):
    evidence = rng.normal(size=(200, 200)).astype(np.float32) + 8 * np.eye(200, dtype=np.float32)
    null, possible = jnp.float32(3), jnp.ones(200, bool)
    rest = jnp.full(200, _candidates.NEVER)
    whole = _candidates.partial_assignment(as_candidates(evidence), rest, null, possible)[:, :20]
    few = as_candidates(evidence, 20)
    kept = np.exp(np.asarray(few.value)).sum(1)
    part = _candidates.partial_assignment(few, jnp.log(np.exp(evidence).sum(1) - kept), null, possible)
    ignored = _candidates.partial_assignment(few, rest, null, possible)
    assert np.abs(part - whole).mean() < np.abs(ignored - whole).mean() / 3
    np.testing.assert_allclose(part[:, 0], whole[:, 0], atol=0.05)


@pytest.mark.parametrize("columns", [9, 14])
def test_one_to_one_is_the_matching_of_the_largest_sum(columns, rng):
    weight = np.where(rng.random((12, columns)) < 0.4, rng.random((12, columns)), 0)
    i, j = np.nonzero(weight)
    chosen = matching._assignment(i, j, weight[i, j], 12, columns)
    assert len(set(i[chosen])) == len(set(j[chosen])) == len(chosen)
    best = scipy.optimize.linear_sum_assignment(weight, maximize=True)
    np.testing.assert_allclose(weight[i, j][chosen].sum(), weight[best].sum(), rtol=1e-6)


def test_kernel_features_give_the_centered_kernel(rng):
    x = jnp.asarray(rng.normal(size=(30, 4)).astype(np.float32))
    kernel = jaxalign.rbf_affinity(x, density=0.5)
    phi = np.asarray(_evidence.kernel_features(kernel, kernel, 29))
    centering = np.eye(30) - 1 / 30
    np.testing.assert_allclose(phi @ phi.T, centering @ np.asarray(kernel) @ centering, atol=1e-5)


def test_the_same_samples_are_found_in_any_order_and_shuffling_changes_nothing_else(rng):
    features = views(rng)
    straight = match(features, landmarks=np.arange(20))
    assert straight.score().top1 > 0.95
    mixed, places = shuffle(features, rng)
    matching = match(mixed, landmarks=pairs_of(places, np.arange(20)))
    for a, b in straight.candidate:
        np.testing.assert_array_equal(matching.candidate[a, b][places[a]], places[b][straight.candidate[a, b]])
        np.testing.assert_array_equal(matching.confidence[a, b][places[a]], straight.confidence[a, b])
    assert matching.score(np.stack([places[name] for name in NAMES], 1)) == pytest.approx(straight.score())


def test_rounds_and_bridges_find_more(rng):
    features = views(rng, noise=0.25)
    plain, bridged, trained = (
        match(features, landmarks=np.arange(16), **options).score().top1
        for options in ({"bridges": False, "rounds": 0}, {"rounds": 0}, {})
    )
    assert plain < bridged < trained


def test_networks_of_different_size_share_what_they_share(rng):
    features = views(rng, n=200)
    part = {"a": features["a"][:150], "b": features["b"], "c": features["c"][:180]}
    matching = match(part, landmarks=np.arange(25))
    assert matching.candidate["b", "a"].shape == (200,)
    score = matching.scores({("a", "b"): np.stack([np.arange(150)] * 2, 1)})["a", "b"]
    assert score.top1 > 0.95
    assert score.precision > 0.95
    without_partner = matching.partners("b", "a")[150:]
    assert (without_partner >= 0).mean() < 0.1


def test_a_network_of_noise_and_unrelated_features_get_no_matches(rng):
    features = views(rng)
    features["c"] = rng.normal(size=features["c"].shape).astype(np.float32)
    matching = match(features, landmarks=np.arange(20))
    assert matching.score().recall > 0.3  # a and b; two of six directions
    assert matching.scores()["a", "b"].recall > 0.9
    assert len(matching.pairs("a", "c")) == len(matching.pairs("c", "b")) == 20  # the landmarks
    assert matching.landmark_rank["a", "b"] < 0.1 < 0.3 < matching.landmark_rank["a", "c"] < 0.7


def test_two_networks_meet_over_a_third_without_common_landmarks(rng):
    features, known = views(rng), np.stack([np.arange(25)] * 2, 1)
    matching = match(features, landmarks={("a", "b"): known, ("c", "b"): known[5:]})
    assert matching.scores(np.arange(160))["a", "c"].top1 > 0.9
    assert np.isnan(matching.landmark_rank["a", "c"])


def test_forms_of_landmarks_are_equivalent(rng):
    features, chosen = views(rng, n=60), np.arange(3, 23)
    forms = [
        chosen,
        list(map(int, chosen)),
        np.stack([chosen] * 3, 1),
        {
            ("b", "a"): np.stack([chosen] * 2, 1),
            ("a", "c"): np.stack([chosen] * 2, 1),
            ("b", "c"): np.stack([chosen] * 2, 1),
        },
    ]
    first, *others = (match(features, landmarks=form, rounds=1) for form in forms)
    for other in others:
        for pair, values in first.candidate.items():
            np.testing.assert_array_equal(values, other.candidate[pair])
    number = match(features, landmarks=20, rounds=0, key=jax.random.key(1))
    assert number.landmarks["a", "b"].shape == (20, 2)


def test_an_alignment_brings_its_landmarks(rng):
    alignment = jaxalign.align(views(rng), landmarks=60)
    matching = match(alignment)
    np.testing.assert_array_equal(matching.landmarks["a", "b"][:, 0], alignment.landmarks)
    assert matching.score().top1 > 0.9


def test_masked_samples_take_no_part(rng):
    features = views(rng)
    valid = np.arange(160) % 8 != 7
    masked = match(
        {**features, "a": np.where(valid[:, None], features["a"], np.nan)},
        landmarks=np.arange(7),
        mask={"a": valid},
        rounds=1,
    )
    left_out = match({**features, "a": features["a"][valid]}, landmarks=np.arange(7), rounds=1)
    assert (masked.candidate["a", "b"][~valid] == -1).all()
    assert not masked.confidence["a", "b"][~valid].any()
    np.testing.assert_array_equal(masked.candidate["a", "b"][valid], left_out.candidate["a", "b"])
    np.testing.assert_array_equal(masked.candidate["b", "a"], np.flatnonzero(valid)[left_out.candidate["b", "a"]])


def test_landmarks_are_matches_whatever_other_networks_say(rng):
    features, known = views(rng, n=60, noise=0.6), np.stack([np.arange(15)] * 2, 1)
    parts = {("a", "b"): known, ("b", "c"): known + 15, ("a", "c"): known + 30}
    for landmarks in (parts, np.arange(60)):  # the second leaves no queries
        matching = match(features, landmarks=landmarks, rounds=0, min_confidence=1.0)
        for pair, pairs in matching.landmarks.items():
            np.testing.assert_array_equal(matching.partners(*pair)[pairs[:, 0]], pairs[:, 1])


def test_landmarks_that_are_masked_are_left_out(rng):
    features, valid = views(rng, n=60), np.arange(60) >= 5
    matching = match(features, landmarks=np.arange(20), mask={"a": valid}, rounds=0)
    assert matching.landmarks["a", "b"][:, 0].tolist() == list(range(5, 20))
    assert len(matching.landmarks["b", "c"]) == 20
    with pytest.raises(ValueError, match=r"mask leaves 2 landmarks of \('a', 'b'\), at least 4"):
        match(features, landmarks=np.arange(7), mask={"a": valid})


def test_a_small_network_changes_nothing_between_others(rng):
    features, known = views(rng, n=60), np.stack([np.arange(20)] * 2, 1)
    features["c"] = features["c"][:8]
    three = match(features, landmarks={("a", "b"): known, ("b", "c"): known[:8]}, bridges=False, rounds=0)
    two = match({name: features[name] for name in "ab"}, landmarks=known, rounds=0)
    np.testing.assert_array_equal(three.candidate["a", "b"], two.candidate["a", "b"])
    np.testing.assert_allclose(three.confidence["a", "b"], two.confidence["a", "b"], atol=1e-3)


def test_history_is_the_mean_confidence_of_the_samples(rng):
    features = views(rng, n=60, names="ab")
    matching = match({**features, "a": features["a"][:20]}, landmarks=np.arange(10), rounds=0)
    assert matching.history[0] == pytest.approx(matching.confidence["a", "b"].mean(), rel=1e-5)


def test_one_to_one_uses_no_partner_twice(rng):
    features = views(rng, n=100, noise=0.7)
    matching = match({**features, "a": features["a"][:80]}, landmarks=np.arange(15), method="one_to_one", rounds=1)
    for (a, b), candidate in matching.candidate.items():
        chosen = candidate[candidate >= 0]
        assert len(chosen) == len(np.unique(chosen)) == matching.mutual[a, b].sum()
        assert len(chosen) > 0.4 * min(len(candidate), len(matching.candidate[b, a]))
    search = match({**features, "a": features["a"][:80]}, landmarks=np.arange(15), rounds=1)
    assert len(np.unique(search.candidate["b", "c"])) < 0.9 * 100
    assert len(matching.pairs("b", "c")) == len(search.pairs("b", "c"))


def test_tracks_are_consistent(rng):
    features = views(rng)
    matching = match(features, landmarks=np.arange(20))
    tracks = matching.tracks()
    assert tracks.shape[1] == 3
    assert ((tracks >= 0).sum(1) >= 2).all()
    for column in tracks.T:
        assert len(np.unique(column[column >= 0])) == (column >= 0).sum()
    complete = tracks[(tracks >= 0).all(1)]
    assert len(complete) > 120
    assert (complete == complete[:, :1]).mean() > 0.95


def by_hand(candidate, confidence, landmarks, min_confidence=0.5):
    return Matching(candidate, confidence, landmarks, {}, np.zeros(1), min_confidence)


def test_scores_count_what_they_say():
    candidate = {("a", "b"): np.array([0, 1, 3, 2, 4]), ("b", "a"): np.array([0, 1, 3, 2, 4])}
    confidence = {pair: np.array([1.0, 0.9, 0.9, 0.4, 0.3]) for pair in candidate}
    known = {pair: np.array([[0, 0]]) for pair in candidate}
    score = by_hand(candidate, confidence, known).scores()["a", "b"]
    # Queries 1 .. 4: candidates of 1 and 4 are right; above 0.5 are 1 (right) and 2 (wrong).
    assert score == (0.5, 0.25, 0.5)
    only = by_hand(candidate, confidence, known).scores({("a", "b"): np.array([[1, 1], [2, 2]])})["a", "b"]
    assert only == (0.5, 0.5, 0.5)


def test_a_pair_of_networks_without_matches_does_not_hide_the_precision_of_others():
    candidate = {("a", "b"): np.array([0, 1]), ("b", "a"): np.array([0, 1])}
    confidence = {("a", "b"): np.array([0.9, 0.9]), ("b", "a"): np.array([0.1, 0.1])}
    assert by_hand(candidate, confidence, {}).score() == (1, 0.5, 1)


def test_a_track_never_holds_two_samples_of_a_network():
    # a0 = b0 and b0 = c0, but a1 = c0 with the least confidence.
    candidate = {
        ("a", "b"): np.array([0, 1]), ("b", "a"): np.array([0, 1]), ("b", "c"): np.array([0, 1]),
        ("c", "b"): np.array([0, 1]), ("a", "c"): np.array([1, 0]), ("c", "a"): np.array([1, 0]),
    }  # fmt: skip
    confidence = {pair: np.full(2, 0.6 if "a" in pair and "c" in pair else 0.9) for pair in candidate}
    assert by_hand(candidate, confidence, {}).tracks().tolist() == [[0, 0, 0], [1, 1, 1]]


def test_the_result_prints_shortly_and_becomes_a_table(rng):
    matching = match(views(rng, n=60), landmarks=np.arange(20), rounds=0)
    assert len(repr(matching)) < 600
    assert "matched" in repr(matching)
    pandas = pytest.importorskip("pandas")
    table = matching.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert len(table) == 6 * 60
    assert table.landmark.sum() == 6 * 20
    assert (table.confidence[table.landmark] == 1).all()
    assert matching.names == NAMES
    assert matching.rounds == 0


@pytest.mark.usefixtures("unchecked_types")
def test_names_of_any_kind(rng):
    pytest.importorskip("pandas")
    x, y = views(rng, n=40, names="ab").values()
    matching = jaxalign.match({("layer", 1): x, 2: y}, landmarks=np.arange(20), rounds=0, num_components=8)
    assert "matched" in repr(matching)
    assert matching.tracks().shape[1] == 2
    assert len(matching.to_pandas()) == 80


def test_a_table_with_a_column_of_another_dtype(rng):
    pandas, features = pytest.importorskip("pandas"), views(rng, n=40, names="ab")
    table = pandas.DataFrame(features["a"]).assign(flag=np.arange(40) < 20)
    matching = match({**features, "a": table}, landmarks=np.arange(20), rounds=0, num_components=8)
    assert matching.landmark_rank["a", "b"] < 0.3


def test_nothing_is_nan_on_the_way(rng):
    features, known = views(rng, n=40), np.stack([np.arange(20)] * 2, 1)
    with jax.debug_nans(True):
        matching = match(features, landmarks={("a", "b"): known}, rounds=0, num_components=8)
    assert np.isnan(matching.landmark_rank["a", "c"])


X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
TWO = {"a": X, "b": X[:, ::-1]}


@pytest.mark.parametrize(
    ("features", "options", "error", "message"),
    [
        (TWO, {}, ValueError, "landmarks are needed"),
        (X, {"landmarks": 5}, TypeError, "mapping"),
        ({"a": X}, {"landmarks": 5}, ValueError, "at least two networks"),
        (TWO, {"landmarks": [0, 1]}, ValueError, "2 pairs, at least 4"),
        (TWO, {"landmarks": [0, 1, 2, 30]}, ValueError, "0 to 29"),
        (TWO, {"landmarks": [0, 1, 1, 2]}, ValueError, "sample 1 occurs 2 times"),
        (TWO, {"landmarks": [[0, 0], [1, 2], [3, 2], [4, 4]]}, ValueError, "one partner in each network"),
        (TWO, {"landmarks": np.eye(3)}, ValueError, r"shape \(m, 2\)"),
        (TWO, {"landmarks": {("a", "x"): [[0, 0]] * 3}}, ValueError, "use two of the names"),
        (TWO, {"landmarks": {("a", "b"): [[0, 0]]}}, ValueError, "1 pairs, at least 4"),
        (TWO, {"landmarks": 2}, ValueError, "from 4 to n = 30"),
        ({"a": X, "b": X[:20]}, {"landmarks": 5}, ValueError, "same samples in all networks"),
        ({"a": X, "b": np.where(np.arange(30)[:, None] == 4, np.nan, X)}, {"landmarks": 5}, ValueError, "with a mask"),
        (TWO, {"landmarks": 5, "mask": {"x": np.ones(30, bool)}}, ValueError, "'x'"),
        (TWO, {"landmarks": 5, "method": "greedy"}, ValueError, "one_to_one"),
        (TWO, {"landmarks": 5, "rounds": -1}, ValueError, "auto"),
        (TWO, {"landmarks": 5, "prior": 1.0}, ValueError, "prior"),
        (TWO, {"landmarks": 5, "ridge": 0}, ValueError, "ridge"),
        (TWO, {"landmarks": 5, "min_confidence": 2}, ValueError, "min_confidence"),
        (TWO, {"landmarks": 5, "num_components": 0}, ValueError, "num_components"),
        (TWO, {"landmarks": {}}, ValueError, "landmarks is empty"),
        (TWO, {"landmarks": np.arange(30) < 5}, ValueError, r"shape \(30,\), dtype bool"),
        (TWO, {"landmarks": 5, "mask": np.ones(30, bool)}, TypeError, "mask must be a mapping"),
        (TWO, {"landmarks": 5, "mask": {"a": np.arange(30) < 3}}, ValueError, r"mask\['a'\] leaves 3"),
        (TWO, {"landmarks": 5, "prior": "high"}, TypeError, "prior must be a real number"),
        (TWO, {"landmarks": 5, "density": [0.5, 0.6]}, ValueError, "density of shape"),
        (TWO, {"landmarks": 5, "bridges": "no"}, ValueError, "bridges must be one of"),
        (TWO, {"landmarks": 10, "ridge": 1e-12}, ValueError, "ridge = 1e-12 is too small"),
        ({**TWO, "a": np.ma.masked_array(X)}, {"landmarks": 5}, TypeError, "masked array"),
        (TWO, {"landmarks": 5, "key": 3}, TypeError, "jax.random.key"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(features, options, error, message):
    with pytest.raises(error, match=message):
        match(features, **options)


def test_contradictory_landmarks_are_refused():
    features, known = {**TWO, "c": X}, np.stack([np.arange(5)] * 2, 1)
    wrong = np.array([[0, 9], *known[1:]])
    with pytest.raises(ValueError, match="contradict each other: 'a' 0 = 'b' 0 = 'c' 0, but 'a' 0 = 'c' 9"):
        match(features, landmarks={("a", "b"): known, ("b", "c"): known, ("a", "c"): wrong})


def test_traced_features_are_refused():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda x: match({"a": x, "b": X}, landmarks=np.arange(5)).history)(X)


def test_an_unknown_pair_of_names():
    matching = match(TWO, landmarks=np.arange(10), rounds=0)
    with pytest.raises(KeyError, match="'a', 'b'"):
        matching.pairs("a", "z")


def test_both_dtypes(dtype, rng):
    features = {name: x.astype(dtype) for name, x in views(rng, n=80).items()}
    matching = match(features, landmarks=np.arange(20), rounds=2)
    assert matching.score().top1 > 0.9


DIGITS = jaxalign.datasets.load_digit_features().features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rounds", "method", "least"),
    [(300, 2, "one_to_one", 0.92), (30, 7, "search", 0.62)],
)
def test_digits_are_found_from_few_landmarks(number, rounds, method, least):
    landmarks = np.random.default_rng(7).permutation(1000)[:number]
    matching = jaxalign.match(DIGITS, landmarks=landmarks, method=method, rounds=rounds)
    assert matching.score().top1 > least


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["some without partner", "one of noise"])
def test_matches_are_right_at_the_default_threshold(regime, rng):
    order = rng.permutation(1000)
    chosen, rest = order[:100], order[100:]
    samples = {name: np.concatenate([chosen, rest]) for name in DIGITS}
    if regime == "some without partner":
        samples = {name: np.concatenate([chosen, rng.permutation(rest)[:630]]) for name in DIGITS}
    features = {name: DIGITS[name][index] for name, index in samples.items()}
    strangers = list(DIGITS)[:1] if regime == "one of noise" else []
    for name in strangers:
        features[name] = rng.permutation(features[name])
    matching = jaxalign.match(features, landmarks=np.arange(100), rounds=3)
    right = []
    for a, b in matching.candidate:
        i, j = matching.pairs(a, b)[100:].T  # landmarks come first
        right.append((samples[a][i] == samples[b][j]) & (not {a, b} & set(strangers)))
    right = np.concatenate(right)
    assert right.mean() >= 0.95
    assert len(right) > 1000
