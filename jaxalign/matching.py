"""Matching: which samples of different networks are the same, from a few known pairs.

`match` starts from landmarks, scores all pairs by the evidence of `_evidence`, takes other networks as bridges, and
repeats with the pairs it is confident of as further landmarks. No map is trained, and samples need not be in the same
order or of the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxalign import _arrays, _candidates, _checks, _evidence, _features, _memory, _rounds
from jaxalign._channels import Channels, map_channels
from jaxalign._known_pairs import Names, both_directions, known_pairs, refuse_contradictions, same_size
from jaxalign._repr import short_repr, shown
from jaxalign._typing import AnyArray, Data, Mask, Numbers
from jaxalign.affinity import rbf_affinity
from jaxalign.alignment import Alignment, draw_landmarks
from jaxalign.bandwidth import solve_sigma

Method = Literal["search", "one_to_one"]
Landmarks = int | Sequence[int] | Int[AnyArray, "m *k"] | Mapping[Names, Any]

# Rounds of rounds="auto", at most, and the rounds without a rise of the mean confidence after which they stop.
_MOST_ROUNDS, _PATIENCE, _RISE = 40, 2, 1e-3
# They also stop when this fraction of the candidates is that of the round before.
_SETTLED = 0.999
# Samples of a network and known pairs of two networks, at least.
_LEAST_SAMPLES, _LEAST_LANDMARKS = 4, 4  # three landmarks cannot be told from chance
# Held-out landmarks must be found again by this many standard errors better than chance, or their networks count as
# unrelated (one pair in 740 by chance).
_RELATED = 3.0
# The kernel is expanded over this many samples for each component.
_INDUCING = 4


class MatchScore(NamedTuple):
    """How well a matching agrees with the truth, on the samples that are not landmarks and have a partner.

    Attributes:
        top1: fraction whose best candidate is the true partner.
        recall: fraction matched, above the threshold, to their true partner.
        precision: fraction of the matches above the threshold that are right, also counting samples without a partner;
            nan if there are none.
    """

    top1: float
    recall: float
    precision: float


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("candidate", "confidence", "landmarks", "landmark_rank", "history"),
    meta_fields=("min_confidence",),
)
@dataclass(frozen=True, repr=False)
class Matching:
    """The samples that are the same in several networks, the result of `match`.

    Dictionaries are indexed by ordered pairs of names (a, b).

    Attributes:
        candidate: index in b of the most probable partner of each sample of a, shape (n_a,); -1: none.
        confidence: probability that the candidate is the partner, on average over bridges, shape (n_a,), 0 to 1; 1 for
            landmarks.
        landmarks: the known pairs, shape (m, 2).
        landmark_rank: mean rank of held-out landmarks among all samples of the other network, 0 (best) to 1; 0.5 by
            chance. Networks whose landmarks are not found again get no matches from each other.
        history: mean confidence over all pairs of networks after each round, shape (rounds + 1,).
        min_confidence: the confidence from which a mutual candidate counts as a match.
    """

    candidate: dict[Names, Int[np.ndarray, " n_a"]]
    confidence: dict[Names, Float[np.ndarray, " n_a"]]
    landmarks: dict[Names, Int[np.ndarray, "m 2"]]
    landmark_rank: dict[Names, float]
    history: Float[np.ndarray, " rounds"]
    min_confidence: float

    def __repr__(self) -> str:
        matched = {pair: len(self.pairs(*pair)) for pair in combinations(self.names, 2)}
        return short_repr(self, omit=("candidate", "landmarks", "confidence"), matched=shown(matched))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the networks."""
        return tuple(dict.fromkeys(a for a, _ in self.candidate))

    @property
    def mutual(self) -> dict[Names, Bool[np.ndarray, " n_a"]]:
        """Whether the candidate's own candidate in a is the sample itself, shape (n_a,), by ordered pair of names."""
        return {pair: self._is_mutual(*pair) for pair in self.candidate}

    @property
    def rounds(self) -> int:
        """Number of rounds of self-training."""
        return len(self.history) - 1

    def partners(self, a: str, b: str) -> Int[np.ndarray, " n_a"]:
        """The partner in b of each sample of a, or -1 where no candidate is mutual and above the threshold."""
        pair = self._checked(a, b)
        matched = self._is_mutual(a, b) & (self.confidence[pair] >= self.min_confidence)
        return np.where(matched, self.candidate[pair], -1)

    def pairs(self, a: str, b: str) -> Int[np.ndarray, "k 2"]:
        """The matches as indices into the samples of a and of b, landmarks included, in the order of a."""
        partners = self.partners(a, b)
        matched = np.flatnonzero(partners >= 0)
        return np.stack([matched, partners[matched]], 1)

    def tracks(self) -> Int[np.ndarray, "t k"]:
        """Samples followed through all networks, consistent across them.

        Matches are joined in the order of their confidence; one that would put two samples of the same network into a
        track is left out.

        Returns:
            Sample indices, shape (number of tracks, number of networks), in the order of `names`; -1 where a track has
            no sample. Every track has at least two.
        """
        edges = [
            (-self.confidence[a, b][i], (a, int(i)), (b, int(j)))
            for a, b in combinations(self.names, 2)
            for i, j in self.pairs(a, b)
        ]
        track_of: dict[tuple[str, int], dict[str, int]] = {}  # of each sample: the sample of each network
        for _, *nodes in sorted(edges, key=lambda edge: edge[0]):
            first, second = (track_of.setdefault(node, dict([node])) for node in nodes)
            if set(first).isdisjoint(second):
                first.update(second)
                track_of.update(dict.fromkeys(second.items(), first))
        tracks = {id(track): track for track in track_of.values() if len(track) > 1}.values()
        rows = sorted([track.get(name, -1) for name in self.names] for track in tracks)
        return np.asarray(rows, np.int64).reshape(-1, len(self.names))

    def score(self, truth: Landmarks | None = None) -> MatchScore:
        """Compare with known partners, on average over all ordered pairs of networks where a fraction is not nan.

        Samples that were masked count as not found: leave them out of the truth.

        Args:
            truth: the true pairs, indices or a mapping as `match` accepts for landmarks. None: sample i is the same in
                all networks.

        Returns:
            `MatchScore`; see `scores` for each pair of networks.
        """
        parts = np.asarray(list(self.scores(truth).values())).T
        return MatchScore(*(_mean(part[~np.isnan(part)]) for part in parts))

    def scores(self, truth: Landmarks | None = None) -> dict[Names, MatchScore]:
        """`score` for each ordered pair of networks that has landmarks or true pairs."""
        sizes = {name: len(self.candidate[name, other]) for name in self.names for other in self.names if name != other}
        if truth is None:
            truth = np.arange(same_size(sizes, "truth=None"))
        scores = {}
        for (a, b), pairs in both_directions(known_pairs("truth", truth, sizes, least=1)).items():
            partner = np.full(sizes[a], -1)
            partner[pairs[:, 0]] = pairs[:, 1]
            queries = ~self._is_landmark(a, b)
            has_partner, matched = queries & (partner >= 0), self.partners(a, b)
            right = matched == partner
            scores[a, b] = MatchScore(
                _mean((self.candidate[a, b] == partner)[has_partner]),
                _mean(right[has_partner]),
                _mean(right[queries & (matched >= 0)]),
            )
        return scores

    def to_pandas(self) -> Any:
        """A table with a row for each sample of each ordered pair of networks; needs pandas."""
        pd = _arrays.pandas()

        parts = []
        for (a, b), candidate in self.candidate.items():
            parts.append(
                pd.DataFrame(
                    {
                        "a": [a] * len(candidate),
                        "b": [b] * len(candidate),
                        "sample": np.arange(len(candidate)),
                        "candidate": candidate,
                        "confidence": self.confidence[a, b],
                        "mutual": self._is_mutual(a, b),
                        "matched": self.partners(a, b) >= 0,
                        "landmark": self._is_landmark(a, b),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def _is_mutual(self, a: str, b: str) -> np.ndarray:
        """Whether each sample of a is the candidate of its candidate in b."""
        forward, back = self.candidate[a, b], self.candidate[b, a]
        return (forward >= 0) & (back[forward] == np.arange(len(forward)))

    def _is_landmark(self, a: str, b: str) -> np.ndarray:
        """Whether the partner in b of each sample of a was known."""
        known = np.zeros(len(self.candidate[a, b]), bool)
        if (a, b) in self.landmarks:
            known[self.landmarks[a, b][:, 0]] = True
        return known

    def _checked(self, a: str, b: str) -> Names:
        if (a, b) not in self.candidate:
            raise KeyError(f"there is no pair of networks {(a, b)!r}; the names are {shown(self.names)}.")
        return a, b


def match(
    features: Mapping[str, Numbers[Data, "_ _"]] | Alignment,
    *,
    landmarks: Landmarks | None = None,
    method: Method = "search",
    bridges: bool = True,
    rounds: int | Literal["auto"] = "auto",
    mask: Mapping[str, Mask[Data, " _"]] | None = None,
    key: Array | None = None,
    min_confidence: float = 0.75,
    prior: float = 0.9,
    density: float = 0.93,
    ridge: float = 0.02,
    channels: Channels | None = "standardize",
    num_components: int = 256,
) -> Matching:
    """Find the same samples in several networks, from a few known pairs.

    The evidence for a pair is a log-likelihood ratio under regularized kernel CCA on the known pairs (Bach and Jordan,
    2005; see docs/pages/matching.md). Each sample keeps its 32 best candidates, and Sinkhorn iterations with a dustbin
    turn their evidence into probabilities of a partial one-to-one assignment. Every other network is a bridge: a pair
    is also supported by P_ac P_cb. Pairs that are each other's best candidate then count as known pairs, weighted by
    their probability, and the next round starts; a pair is never scored by a model that contains it. Time is quadratic
    in the number of samples, memory is linear.

    Args:
        features: features by network name, shape (n_k, d_k). Samples may differ in number and order. An `Alignment`:
            its relative features and landmarks.
        landmarks: the known pairs. Indices, shape (m,): samples that are the same in all networks; shape
            (m, number of networks): the index of the same sample in each network; a mapping from (a, b) to indices of
            shape (m, 2): known pairs of each pair of networks, of which some may be missing. A number: this many random
            samples, if sample i is the same in all networks. At least 4 per pair; 15 or more are advisable.
        method: "search": every sample gets its most probable partner. "one_to_one": linear assignment on the same
            probabilities, so that no partner is used twice and some samples stay without one.
        bridges: use other networks as bridges.
        rounds: number of rounds of self-training; "auto": until the mean confidence stops rising or
            candidates stop changing.
        mask: valid samples by network name, shape (n_k,); others get no partner, and landmarks among them are left out.
            Networks may be missing.
        key: a `jax.random.key` for the division of known pairs into folds, and for a number of random landmarks. None:
            `jax.random.key(0)`.
        min_confidence: the confidence from which a mutual candidate counts as a match, 0 to 1.
        prior: prior probability that a sample has a partner, 0 < prior < 1.
        density: the mean affinity of different samples of a network, see `solve_sigma`: how wide the kernel is.
        ridge: lambda > 0, added to the diagonal of the covariances.
        channels: see `align`.
        num_components: rank of the kernel features.

    Returns:
        `Matching` with `.pairs(a, b)`, `.tracks()`, `.score(truth)` and `.to_pandas()`.

    Raises:
        TypeError, ValueError: fewer than two networks, nan or inf in valid rows, landmarks that are out of range,
            repeated, contradictory or fewer than 4.
        MemoryError: kernel features and candidates do not fit into memory.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (200, 8))
        >>> shuffled = 3 * x[::-1, ::-1] + 1
        >>> known = {("a", "b"): [(i, 199 - i) for i in range(20)]}
        >>> matching = jaxalign.match({"a": x, "b": shuffled}, landmarks=known)
        >>> matching.pairs("a", "b")[100].tolist()
        [100, 99]
    """
    _checks.choice("method", method, ("search", "one_to_one"))
    _checks.choice("channels", channels, (None, "standardize", "whiten"))
    _checks.choice("bridges", bridges, (True, False))
    if rounds != "auto":
        _checks.whole("rounds", rounds, 0, otherwise=', or "auto"')
    if key is not None:
        _checks.random_key(key)
    for name, value in {"min_confidence": min_confidence, "prior": prior, "density": density}.items():
        _checks.parameter(name, value, jnp.float32, (), "one number")
        if not 0 <= float(value) <= 1 or (name != "min_confidence" and float(value) in (0, 1)):
            raise ValueError(f"{name} must be a number between 0 and 1; got {shown(value)}.")
    _checks.positive("ridge", _checks.parameter("ridge", ridge, jnp.float32, (), "one number"))
    key = jax.random.key(0) if key is None else key
    if isinstance(features, Alignment):
        landmarks = np.asarray(features.landmarks) if landmarks is None else landmarks
        features = features.features
    networks = _check_networks(features, mask)
    sizes = {name: network.size for name, network in networks.items()}
    if isinstance(landmarks, (int, np.integer)) and not isinstance(landmarks, bool):
        n = same_size(sizes, "a number of landmarks")
        landmarks = draw_landmarks(key, n, _checks.whole("landmarks", landmarks, _LEAST_LANDMARKS, n, most_is="n = "))
    known = known_pairs("landmarks", landmarks, sizes, least=_LEAST_LANDMARKS)
    refuse_contradictions(known)
    known = {ab: _valid_pairs(networks, ab, pairs) for ab, pairs in known.items()}
    num_components = _checks.whole("num_components", num_components, 1)
    _check_memory(networks, num_components)
    problem = _set_up(networks, known, bridges, prior, density, ridge, channels, num_components)
    problem, ranks = _drop_unrelated(problem, key)
    proposals, history = _run(problem, rounds, key)
    known_ranks = [rank for rank, ab in zip(ranks, combinations(networks, 2), strict=True) if ab in known]
    if not np.isfinite([*history, *known_ranks]).all():
        raise ValueError(
            f"ridge = {shown(ridge)} is too small for covariances in {problem.phi.dtype}; use a larger one."
        )
    if method == "one_to_one":
        proposals = assign(problem, proposals)
    return _collect(networks, known, ranks, proposals, history, float(min_confidence))


class _Network(NamedTuple):
    """The valid samples of a network, in an order that does not depend on that of the user."""

    x: Array  # (number of valid samples, d)
    order: np.ndarray  # their indices
    size: int  # number of samples, valid or not


def _check_networks(features: Any, mask: Any) -> dict[str, _Network]:
    if not isinstance(features, Mapping):
        raise TypeError(f"features must be a mapping from names to arrays; got {type(features).__name__}.")
    if len(features) < 2:
        raise ValueError(f"at least two networks are needed; got {shown(tuple(features))}.")
    if mask is not None and not isinstance(mask, Mapping):
        raise TypeError(f"mask must be a mapping from names to arrays; got {shown(mask)}.")
    for name in mask or {}:
        if name not in features:
            raise ValueError(f"mask has the name {name!r}; the names of the networks are {shown(tuple(features))}.")
    networks = {}
    for name, value in features.items():
        label = f"features[{name!r}]"
        array = _arrays.numbers(label, value)
        if not _arrays.is_concrete(array):
            raise TypeError(f"{label} must not be traced: match decides on the host when to stop. Call it outside jit.")
        if array.ndim != 2:
            raise ValueError(f"{label} must have shape (n, d); got {array.shape}.")
        rows = np.ascontiguousarray(_arrays.on_host(array))
        valid = _features.row_mask(f"mask[{name!r}]", (mask or {}).get(name), rows.shape[:1])
        valid = np.ones(len(rows), bool) if valid is None else np.asarray(valid)
        if len(rows) >= _LEAST_SAMPLES > valid.sum():
            raise ValueError(f"mask[{name!r}] leaves {valid.sum()} sample(s), at least {_LEAST_SAMPLES} are needed.")
        # Sorting by content makes the result independent of the order of the samples, to the last digit.
        order = np.flatnonzero(valid)
        if rows.shape[1]:
            content = rows[order].view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
            order = order[np.argsort(content, kind="stable")]
        x = _features.features(label, rows[order], min_rows=_LEAST_SAMPLES, center=True)
        _features.finite_rows(label, x, way_out="Leave these samples out with a mask.", differences=True)
        networks[name] = _Network(x, order, len(rows))
    return networks


def _check_memory(networks: Mapping[str, _Network], num_components: int) -> None:
    n, number = max(len(network.order) for network in networks.values()), len(networks)
    # Kernel features, gathered by fold for one pair of networks at a time; columns and values of candidates, of all
    # ordered pairs, in a round and after it; tiles of evidence.
    numbers = n * ((number + 8) * num_components + 8 * number**2 * _candidates.CANDIDATES + 4 * _evidence.TILE)
    _memory.check_bytes(
        f"match keeps {_candidates.CANDIDATES} candidates of {n} samples for {number} x {number} networks, "
        f"{4 * numbers / 1e9:.3g} GB",
        4 * numbers,
        "Match a part of the samples, or fewer networks at a time.",
    )


def _set_up(
    networks: Mapping[str, _Network],
    known: Mapping[Names, np.ndarray],
    bridges: bool,
    prior: float,
    density: float,
    ridge: float,
    channels: Channels | None,
    num_components: int,
) -> _rounds.Problem:
    sizes = [len(network.order) for network in networks.values()]
    n, rank = _evidence.padded_size(max(sizes)), min(num_components, max(sizes))
    phi = [_kernel_features(name, network.x, channels, density, rank) for name, network in networks.items()]
    # Features that are 0 change no evidence.
    phi = [jnp.pad(part, ((0, n - part.shape[0]), (0, rank - part.shape[1]))) for part in phi]
    names, dtype = list(networks), phi[0].dtype
    shape = (len(names), len(names), n)
    partner, weight = np.zeros(shape, np.int32), np.zeros(shape, dtype)
    for (a, b), table in both_directions(known).items():
        i, j = (_places(networks[name])[table[:, k]] for k, name in enumerate((a, b)))
        partner[names.index(a), names.index(b), i], weight[names.index(a), names.index(b), i] = j, 1
    pairs = list(combinations(range(len(names)), 2))
    others = [[c for c in range(len(names)) if c not in pair] if bridges else [] for pair in pairs]
    return _rounds.Problem(
        jnp.stack(phi),
        jnp.asarray(np.arange(n)[None] < np.asarray(sizes)[:, None]),
        _evidence.Pairs(jnp.asarray(partner), jnp.asarray(weight)),
        jnp.asarray(pairs, jnp.int32),
        jnp.asarray(np.asarray(others, np.int32).reshape(len(pairs), -1)),
        jnp.ones(len(pairs), dtype),
        jnp.asarray(ridge, dtype),
        jnp.asarray(prior, dtype),
    )


def _places(network: _Network) -> np.ndarray:
    """The position of each sample in the order of the network, -1 for samples that are not valid."""
    places = np.full(network.size, -1)
    places[network.order] = np.arange(len(network.order))
    return places


def _valid_pairs(networks: Mapping[str, _Network], ab: Names, pairs: np.ndarray) -> np.ndarray:
    """The known pairs of two networks without those of samples that are not valid."""
    valid = pairs[np.all([_places(networks[name])[pairs[:, k]] >= 0 for k, name in enumerate(ab)], 0)]
    if len(valid) < _LEAST_LANDMARKS:
        raise ValueError(
            f"mask leaves {len(valid)} landmarks of {ab!r}, at least {_LEAST_LANDMARKS} are needed. Add valid pairs, "
            "or pass a mapping without an entry for this pair of networks."
        )
    return valid


def _kernel_features(name: str, x: Array, channels: Channels | None, density: float, rank: int) -> Array:
    """Kernel features of a network, (n, rank) or (n, n), from a kernel of solved bandwidth on the inducing samples."""
    n = x.shape[0]
    rank = min(rank, n)
    number = min(n, _INDUCING * rank)
    chosen = jnp.asarray(np.linspace(0, n - 1, number).round().astype(np.int32))
    _, x, inducing = map_channels(x, chosen, channels)
    try:
        sigma = solve_sigma(inducing, density=density, diagonal="exclude").sigma
        block, rows = rbf_affinity(inducing, sigma=sigma), rbf_affinity(x, inducing, sigma)
    except (ValueError, TypeError) as error:
        raise type(error)(f"features[{name!r}]: {error}") from error
    return _evidence.kernel_features(block, rows, rank)


def _drop_unrelated(problem: _rounds.Problem, key: Array) -> tuple[_rounds.Problem, np.ndarray]:
    """The problem without the evidence of networks whose held-out landmarks are found no better than by chance."""
    a, b = np.asarray(problem.network).T
    number = np.asarray(jnp.sum(problem.landmarks.weight > 0, -1))[a, b]
    ranks = np.asarray(_rounds.landmark_ranks(problem, key, int(number.max())))
    # A rank is uniform on 0 .. 1 by chance, with variance 1 / 12.
    related = (number == 0) | ((0.5 - ranks) * np.sqrt(12 * number) >= _RELATED)
    return problem._replace(related=jnp.asarray(related, problem.phi.dtype)), np.where(number > 0, ranks, np.nan)


def _run(problem: _rounds.Problem, rounds: int | Literal["auto"], key: Array) -> tuple[_rounds.Proposals, np.ndarray]:
    """The proposals of the last round, or of the best one, and the mean confidence after each."""
    pairs, history, best, result = problem.landmarks, [], 0, None
    a, b = problem.network.T
    for number in range((_MOST_ROUNDS if rounds == "auto" else rounds) + 1):
        proposals = _rounds.run_round(problem, pairs, jax.random.fold_in(key, number))
        history.append(float(jnp.mean(proposals.confidence[a, b, :, 0], where=problem.valid[a])))
        if rounds != "auto" or result is None or history[-1] > history[best] + _RISE:
            result, best = proposals, number
        same = jnp.mean(proposals.column[a, b, :, 0] == pairs.partner[a, b], where=problem.valid[a])
        if rounds == "auto" and (number - best >= _PATIENCE or float(same) > _SETTLED):
            break
        pairs = _rounds.next_pairs(problem.landmarks, proposals)
    assert result is not None
    return result, np.asarray(history[: best + 1])


def assign(problem: _rounds.Problem, proposals: _rounds.Proposals) -> _rounds.Proposals:
    """The partial assignment with the largest sum of weights, for every pair of networks, as first proposals."""
    column, weight, confidence = (np.array(values) for values in proposals)
    sizes = np.asarray(jnp.sum(problem.valid, 1)).tolist()
    for a, b in np.asarray(problem.network).tolist():
        (i, k), (j, m) = np.nonzero(weight[a, b] > 0), np.nonzero(weight[b, a] > 0)
        ends = np.concatenate([[i, column[a, b, i, k]], [column[b, a, j, m], j]], 1)
        gain, probability = (np.concatenate([v[a, b, i, k], v[b, a, j, m]]) for v in (weight, confidence))
        (i, j), once = np.unique(ends, return_index=True, axis=1)
        chosen = _assignment(i, j, gain[once], sizes[a], sizes[b])
        for pair, first, second in (((a, b), i[chosen], j[chosen]), ((b, a), j[chosen], i[chosen])):
            confidence[pair][:, 0] = 0
            column[pair][first, 0], confidence[pair][first, 0] = second, probability[once][chosen]
    return _rounds.Proposals(*map(jnp.asarray, (column, weight, confidence)))


def _assignment(i: np.ndarray, j: np.ndarray, gain: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which of the edges (i, j) are in the matching with the largest sum of gains > 0."""
    from scipy import sparse  # comes with jax, but importing it takes time
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    # Every row and column may stay alone with a stand-in of its own, and the stand-ins of a pair take each other. All
    # costs are 1 more than they should be, as scipy takes a cost of 0 for no edge.
    n, alone_i, alone_j = rows + columns, np.arange(rows), np.arange(columns)
    first = np.concatenate([i, alone_i, rows + alone_j, rows + j])
    second = np.concatenate([j, columns + alone_i, alone_j, columns + i])
    cost = np.concatenate([2 - gain.astype(np.float64), np.full(n, 1.5), np.ones(len(i))])
    _, chosen = min_weight_full_bipartite_matching(sparse.csr_array((cost, (first, second)), (n, n)))
    return np.flatnonzero(chosen[i] == j)


def _collect(
    networks: Mapping[str, _Network],
    known: Mapping[Names, np.ndarray],
    ranks: np.ndarray,
    proposals: _rounds.Proposals,
    history: np.ndarray,
    min_confidence: float,
) -> Matching:
    """The result, in the user's order of samples."""
    column, confidence = (np.asarray(values[..., 0]) for values in (proposals.column, proposals.confidence))
    number = {name: k for k, name in enumerate(networks)}
    best, rank = {}, {}
    for a, b in permutations(networks, 2):
        ends = number[a], number[b]
        best[a, b] = _in_user_order(networks[a], networks[b], column[ends], confidence[ends])
    for (a, b), value in zip(combinations(networks, 2), ranks.tolist(), strict=True):
        rank[a, b] = rank[b, a] = value
    return Matching(
        candidate={pair: first for pair, (first, _) in best.items()},
        confidence={pair: values for pair, (_, values) in best.items()},
        landmarks=both_directions(known),
        landmark_rank=rank,
        history=history,
        min_confidence=min_confidence,
    )


def _in_user_order(
    a: _Network, b: _Network, partner: np.ndarray, probability: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and confidences of the samples of a, in the order and with the indices of the user."""
    partner, probability = partner[: len(a.order)], np.clip(probability[: len(a.order)], 0, 1)
    found = (partner >= 0) & (partner < len(b.order)) & (probability > 0)
    candidate, confidence = np.full(a.size, -1), np.zeros(a.size)
    candidate[a.order] = np.where(found, b.order[np.where(found, partner, 0)], -1)
    confidence[a.order] = np.where(found, probability, 0)
    return candidate, confidence


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
