"""align and Alignment: agreement with the reference, invariances, transforms, derivatives, and what is refused."""

from __future__ import annotations

import inspect
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxalign

N, M = 20, 8
WIDTHS = {"clip": 4, "dino": 6}
LANDMARKS = np.array([17, 3, 8, 0, 12, 5, 19, 10])  # in no order
OTHERS = np.setdiff1d(np.arange(N), LANDMARKS)
DENSITY = 0.3  # 8 landmarks alone give 1/8

OPTIONS = [
    {"channels": channels, "bandwidth": bandwidth, "decorrelate": decorrelate, "standardize": standardize}
    for channels, bandwidth, decorrelate, standardize in itertools.product(
        (None, "standardize", "whiten"), ("global", "per_row"), (None, 0.1), (False, True)
    )
    if not (bandwidth == "per_row" and decorrelate is not None)
]
SOME_OPTIONS = {
    "plain": {},
    "per row": {"bandwidth": "per_row"},
    "recommended": {"channels": "standardize", "decorrelate": 0.1, "standardize": True},
    "whitened": {"channels": "whiten", "standardize": True},
}
some_options = pytest.mark.parametrize("options", SOME_OPTIONS.values(), ids=SOME_OPTIONS.keys())

# float64: the solver stops at a relative error of 1e-13 in the density; solving with (A_LL + 0.1 I), whose condition is
# at most 81, and dividing by the deviations of columns, a few hundredths, leaves 1e-10.
CLOSE = 1e-10


def describe(options):
    return ", ".join(f"{key}={value}" for key, value in options.items())


@pytest.fixture
def features(rng):
    """Two networks' features: offset, with channels of different size, correlated."""
    return {
        name: 3 + rng.normal(size=(N, width)) @ rng.normal(size=(width, width)) * np.geomspace(0.2, 5, width)
        for name, width in WIDTHS.items()
    }


def assert_same_features(actual, expected, rtol=CLOSE, rows=slice(None), columns=slice(None)):
    assert actual.names == expected.names
    for name in expected.names:
        wanted = np.asarray(expected.features[name])[rows][:, columns]
        helpers.assert_close(actual.features[name], wanted, rtol)


# --- sets of options --------------------------------------------------------------------------------------------------


def test_default_and_published_options_are_complete_and_cannot_be_changed():
    signature = inspect.signature(jaxalign.align).parameters
    default = {name: signature[name].default for name in helpers.PLAIN}
    assert default == {"channels": "standardize", "decorrelate": 0.1, "density": 0.7, "standardize": True}
    assert dict(jaxalign.alignment.PUBLISHED) == {**helpers.PLAIN, "standardize": True}
    with pytest.raises(TypeError):
        jaxalign.alignment.PUBLISHED["density"] = 0.7


# --- agreement with the reference ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_features_sigma_and_transform_agree_with_the_reference(options, features, rng):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    expected = reference.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    for name, x in features.items():
        helpers.assert_close(alignment.features[name], expected["features"][name], CLOSE)
        helpers.assert_close(alignment.sigma[name], expected["sigma"][name], CLOSE)
        x_new = x[:5] + rng.normal(size=(5, x.shape[1]))
        helpers.assert_close(alignment.transform(name, x_new), expected["transform"](name, x_new), CLOSE)


@pytest.mark.usefixtures("x64")
def test_the_diagonal_left_out_of_the_mean_agrees_with_the_reference(features):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=0.1, diagonal="exclude")
    expected = reference.align(features, landmarks=LANDMARKS, density=0.1, diagonal="exclude")
    for name in features:
        helpers.assert_close(alignment.features[name], expected["features"][name], CLOSE)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, SOME_OPTIONS["recommended"]], ids=["plain", "recommended"])
@pytest.mark.parametrize("landmarks", ["random", "default", "all"])
def test_the_reference_agrees_on_the_landmarks_that_were_chosen(landmarks, options, features):
    chosen = {"random": {"landmarks": M, "key": jax.random.key(3)}, "default": {"landmarks": M}, "all": {}}
    alignment = helpers.align(features, density=DENSITY, **chosen[landmarks], **options)
    indices = np.asarray(alignment.landmarks)
    expected = reference.align(features, landmarks=indices, density=DENSITY, **options)
    assert len(indices) == (N if landmarks == "all" else M)
    for name in features:
        helpers.assert_close(alignment.features[name], expected["features"][name], CLOSE)


@pytest.mark.slow
def test_features_in_float32_agree_with_the_reference_to_single_precision(features):
    options = SOME_OPTIONS["recommended"]
    features = {name: x.astype(np.float32) for name, x in features.items()}
    alignment = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    expected = reference.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    for name in features:
        assert alignment.features[name].dtype == np.float32
        # Affinities are good to 1e-6; the inverse of (A_LL + 0.1 I) and dividing by the deviation cost a hundredfold.
        helpers.assert_close(alignment.features[name], expected["features"][name], 1e-4)


def test_half_precision_features_are_aligned_in_float32(features):
    alignment = helpers.align({"half": features["clip"].astype(np.float16)}, landmarks=LANDMARKS, density=DENSITY)
    rounded = features["clip"].astype(np.float16).astype(np.float32)
    expected = helpers.align({"half": rounded}, landmarks=LANDMARKS, density=DENSITY)
    assert alignment.features["half"].dtype == np.float32
    np.testing.assert_array_equal(alignment.features["half"], expected.features["half"])


# --- which samples are landmarks -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("number", [4, M, N])
def test_farthest_points_are_those_of_the_reference_on_the_sum_of_scaled_distances(number, features):
    landmarks = jaxalign.alignment.farthest_points(features, number)
    joint = 0
    for x in features.values():
        distances = reference.squared_distances(x)
        joint = joint + distances / distances.mean()
    np.testing.assert_array_equal(landmarks, reference.farthest_point_sampling(joint, number))


@pytest.mark.slow
def test_farthest_points_are_all_different_even_among_duplicates():
    x = np.repeat(np.eye(4, dtype=np.float32), 5, 0)
    chosen = np.asarray(jaxalign.alignment.farthest_points({"a": x}, 10))
    assert len(set(chosen)) == 10
    assert set(chosen[:4] // 5) == {0, 1, 2, 3}  # one of each before any repeats


@pytest.mark.slow
def test_random_landmarks_are_sorted_distinct_and_a_function_of_the_key(features):
    features = {name: x.astype(np.float32) for name, x in features.items()}
    draws = [
        np.asarray(helpers.align(features, landmarks=M, key=jax.random.key(seed), density=DENSITY).landmarks)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    assert (np.diff(draws[0]) > 0).all()
    assert draws[0].min() >= 0
    assert draws[0].max() < N


def test_every_sample_is_a_landmark_when_none_are_named(features):
    alignment = helpers.align({"a": features["clip"].astype(np.float32)}, density=DENSITY)
    np.testing.assert_array_equal(alignment.landmarks, np.arange(N))
    assert alignment.queries.shape == (0,)


@pytest.mark.parametrize("landmarks", [LANDMARKS.tolist(), tuple(LANDMARKS.tolist()), LANDMARKS.astype(np.int32)])
def test_landmarks_keep_the_order_in_which_they_are_given(landmarks, features):
    alignment = helpers.align({"a": features["clip"].astype(np.float32)}, landmarks=landmarks, density=DENSITY)
    np.testing.assert_array_equal(alignment.landmarks, LANDMARKS)
    np.testing.assert_array_equal(alignment.queries, OTHERS)


def test_a_landmark_has_an_affinity_of_exactly_one_with_itself(features):
    alignment = helpers.align(
        {"a": 1e3 + features["clip"].astype(np.float32)}, landmarks=LANDMARKS, density=DENSITY, bandwidth="per_row"
    )
    np.testing.assert_array_equal(np.asarray(alignment.features["a"])[LANDMARKS, np.arange(M)], 1)


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_landmark_block_has_the_density_and_every_row_has_it_with_a_bandwidth_per_row(features):
    block = helpers.align(features, landmarks=LANDMARKS, density=DENSITY)
    rows = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, bandwidth="per_row")
    for name in features:
        np.testing.assert_allclose(np.mean(block.features[name][LANDMARKS]), DENSITY, rtol=1e-12)
        np.testing.assert_allclose(np.mean(rows.features[name], 1), DENSITY, rtol=1e-12)
        assert rows.sigma[name].shape == (N,)
        assert block.sigma[name].shape == ()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, {"bandwidth": "per_row"}, {"channels": "whiten", "decorrelate": 0.1}])
def test_standardized_columns_have_mean_zero_and_deviation_one_over_the_samples_that_are_not_landmarks(
    options, features
):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, standardize=True, **options)
    everyone = helpers.align(features, density=DENSITY, standardize=True, **options)
    for name in features:
        scored = np.asarray(alignment.features[name])[OTHERS]
        np.testing.assert_allclose(scored.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(scored.std(0), 1, rtol=1e-12)
        np.testing.assert_allclose(np.mean(everyone.features[name], 0), 0, atol=1e-12)
        np.testing.assert_allclose(np.std(everyone.features[name], 0), 1, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_the_fitted_samples_are_transformed_to_their_features_landmarks_included(options, features):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    for name, x in features.items():
        helpers.assert_close(alignment.transform(name, x), alignment.features[name], CLOSE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options", [{"bandwidth": "per_row"}, SOME_OPTIONS["recommended"]], ids=["per row", "recommended"]
)
def test_samples_are_transformed_one_by_one_as_they_are_together(options, features):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    x_new = features["dino"][:3] + 0.1
    together = alignment.transform("dino", x_new)
    for k in range(3):
        helpers.assert_close(alignment.transform("dino", x_new[k : k + 1]), together[k : k + 1], CLOSE)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("channels", [None, "whiten"])
@pytest.mark.parametrize(
    "rest", [{}, {"bandwidth": "per_row"}, {"decorrelate": 0.1, "standardize": True}], ids=describe
)
def test_orthogonal_maps_shifts_and_scales_leave_the_features_unchanged(channels, rest, features, rng):
    moved = {}
    for name, x in features.items():
        rotation = np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))[0]
        moved[name] = 0.037 * x @ rotation + 10 * rng.normal(size=x.shape[1])
    options = {"landmarks": LANDMARKS, "density": DENSITY, "channels": channels, **rest}
    # The offset is about a hundred times the spread now: 1e-10 times that at most.
    assert_same_features(helpers.align(moved, **options), helpers.align(features, **options), 100 * CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [None, "standardize", "whiten"])
@pytest.mark.parametrize("power", [-100, -66, 66, 120])
def test_features_may_be_of_any_size(channels, power, features, rng):
    small = {name: x.astype(np.float32) for name, x in features.items()}
    large = {name: np.ldexp(x, power) for name, x in small.items()}
    options = {"landmarks": M, "channels": channels, "density": DENSITY, "decorrelate": 0.1, "standardize": True}
    expected, found = (helpers.align(x, **options) for x in (small, large))
    # A power of two changes no digit.
    np.testing.assert_array_equal(found.landmarks, expected.landmarks)
    for name, x in small.items():
        np.testing.assert_array_equal(found.features[name], expected.features[name])
        new = x + rng.normal(size=x.shape).astype(np.float32)
        np.testing.assert_array_equal(found.transform(name, np.ldexp(new, power)), expected.transform(name, new))
        # In the channels' own unit, if they were given one.
        assert found.sigma[name] == (expected.sigma[name] if channels else np.ldexp(expected.sigma[name], power))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("landmarks", [LANDMARKS, M])
@pytest.mark.parametrize("rest", [{}, {"decorrelate": 0.1, "standardize": True}], ids=describe)
def test_standardized_channels_may_each_have_their_own_unit_sign_and_offset(landmarks, rest, features, rng):
    changed = {
        name: (x * np.geomspace(1e-3, 1e3, x.shape[1]) * rng.choice([-1, 1], x.shape[1]) + 5)[:, ::-1]
        for name, x in features.items()
    }
    options = {"landmarks": landmarks, "density": DENSITY, "channels": "standardize", **rest}
    before, after = helpers.align(features, **options), helpers.align(changed, **options)
    np.testing.assert_array_equal(after.landmarks, before.landmarks)
    # An offset of a few thousand deviations of the smallest channel costs that many digits of it.
    assert_same_features(after, before, 1e-8)


@pytest.mark.usefixtures("x64")
def test_whitening_is_shrunk_so_a_stretch_is_undone_in_part_only(features):
    options = {"landmarks": LANDMARKS, "density": DENSITY}

    def change(channels):
        before = helpers.align(features, channels=channels, **options)
        stretched = {name: x * np.geomspace(1, 30, x.shape[1])[::-1] for name, x in features.items()}
        after = helpers.align(stretched, channels=channels, **options)
        return max(float(jnp.max(jnp.abs(after.features[k] - before.features[k]))) for k in features)

    assert change("whiten") > 1e-3
    assert change("standardize") < 1e-9


@pytest.mark.usefixtures("x64")
@some_options
def test_permuting_the_samples_permutes_the_rows(options, features, rng):
    order = rng.permutation(N)
    permuted = {name: x[order] for name, x in features.items()}
    landmarks = np.argsort(order)[LANDMARKS]
    before = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    after = helpers.align(permuted, landmarks=landmarks, density=DENSITY, **options)
    assert_same_features(after, before, rows=order)


@pytest.mark.usefixtures("x64")
@some_options
def test_permuting_the_landmarks_permutes_the_columns(options, features, rng):
    order = rng.permutation(M)
    before = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    after = helpers.align(features, landmarks=LANDMARKS[order], density=DENSITY, **options)
    assert_same_features(after, before, columns=order)


@pytest.mark.usefixtures("x64")
@some_options
def test_a_network_is_aligned_as_it_would_be_alone(options, features):
    both = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, **options)
    for name in features:
        alone = helpers.align({name: features[name]}, landmarks=LANDMARKS, density=DENSITY, **options)
        np.testing.assert_array_equal(alone.features[name], both.features[name])


@pytest.mark.slow
def test_a_constant_channel_changes_nothing_once_channels_are_standardized(features):
    x = features["clip"].astype(np.float32)
    padded = np.concatenate([x, np.full((N, 1), 7.3, np.float32)], 1)
    options = {"landmarks": LANDMARKS, "density": DENSITY, "channels": "standardize"}
    before, after = helpers.align({"a": x}, **options), helpers.align({"a": padded}, **options)
    # float32: the constant channel is left with the rounding of its mean, a few 1e-7, the same for all samples.
    helpers.assert_close(after.features["a"], before.features["a"], 1e-5)


# --- transformations of JAX ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("landmarks", "standardize"),
    [(LANDMARKS, True), (M, True), (None, True), (None, False)],
    ids=["given", "farthest points", "all", "all, not standardized"],
)
def test_align_gives_the_same_under_jit(landmarks, standardize, features):
    def align(x):
        return helpers.align({"dino": x}, landmarks=landmarks, density=DENSITY, standardize=standardize)

    plain, compiled = align(features["dino"]), jax.jit(align)(features["dino"])
    np.testing.assert_array_equal(compiled.landmarks, plain.landmarks)
    assert_same_features(compiled, plain)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@some_options
def test_gradients_through_align_are_finite_and_equal_to_finite_differences(options, features, rng):
    weights = jnp.asarray(rng.normal(size=(N, M)))

    def loss(x):
        rows = helpers.align({"dino": x}, landmarks=LANDMARKS, density=DENSITY, **options).features["dino"]
        return jnp.sum(weights * rows)

    x, along, step = features["dino"], rng.normal(size=features["dino"].shape), 1e-5
    gradient = np.asarray(jax.jit(jax.grad(loss))(x))
    assert np.isfinite(gradient).all()
    slope = (loss(x + step * along) - loss(x - step * along)) / (2 * step)
    # Central differences are off by h^2 times a third derivative, and by the rounding of the loss, 1e-13, over h.
    size = np.linalg.norm(gradient) * np.linalg.norm(along)
    assert abs(slope - np.sum(gradient * along)) < 1e-6 * size


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_stay_finite_where_samples_and_eigenvalues_coincide():
    x = np.repeat(np.eye(5), 4, 0)  # every sample four times; all eigenvalues of the covariance but one are equal

    def loss(x):
        options = {"landmarks": LANDMARKS, "density": 0.5, "channels": "whiten", "standardize": True}
        return jnp.sum(helpers.align({"a": x}, **options).features["a"] ** 3)

    assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_an_alignment_is_a_pytree_that_goes_through_jit_and_tree_map(features):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=DENSITY, **SOME_OPTIONS["recommended"])
    doubled = jax.tree.map(lambda leaf: 2 * leaf, alignment)
    assert isinstance(doubled, jaxalign.Alignment)
    np.testing.assert_array_equal(doubled.features["dino"], 2 * alignment.features["dino"])
    through = jax.jit(lambda a: a)(alignment)
    assert jax.tree.structure(through) == jax.tree.structure(alignment)
    x_new = features["clip"] + 1
    helpers.assert_close(
        jax.jit(lambda a, x: a.transform("clip", x))(alignment, x_new), alignment.transform("clip", x_new), CLOSE
    )
    compiled = jax.jit(lambda a: a.correspondence("clip", "dino"))(alignment)
    expected = alignment.correspondence("clip", "dino")
    np.testing.assert_array_equal(compiled.rank, expected.rank)


# --- correspondence of an alignment ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("metric", ["correlation", "cosine", "euclidean"])
def test_only_the_samples_that_are_not_landmarks_are_scored(metric, features):
    alignment = helpers.align(features, landmarks=LANDMARKS, density=DENSITY)
    found = alignment.correspondence("clip", "dino", metric=metric, csls=3)
    rows = [np.asarray(alignment.features[name])[OTHERS] for name in ("clip", "dino")]
    expected = reference.correspondence(*rows, metric=metric, csls=3)
    assert found.rank.shape == (N - M,)
    np.testing.assert_array_equal(found.rank, expected["rank"])
    np.testing.assert_array_equal(found.index, expected["index"])


@pytest.mark.slow
def test_a_copy_of_a_network_that_is_moved_corresponds_in_every_sample(features):
    x = features["clip"].astype(np.float32)
    alignment = helpers.align({"a": x, "b": 4 - 0.5 * x[:, ::-1]}, landmarks=LANDMARKS, density=DENSITY)
    assert alignment.correspondence("a", "b").top1 == 1


@pytest.mark.slow
def test_a_sample_that_coincides_with_a_landmark_is_scored_like_any_other(features):
    features = {name: x.astype(np.float32) for name, x in features.items()}
    for x in features.values():
        x[OTHERS[0]] = x[LANDMARKS[0]]
    alignment = helpers.align(features, landmarks=LANDMARKS, density=DENSITY)
    assert alignment.correspondence("clip", "dino").rank.shape == (N - M,)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 1])
def test_too_few_samples_beside_the_landmarks_are_refused(left, features):
    alignment = helpers.align({"a": features["clip"].astype(np.float32)}, landmarks=np.arange(left, N), density=DENSITY)
    with pytest.raises(ValueError, match=rf"^{left} sample\(s\) are not landmarks.*Fit with fewer landmarks"):
        alignment.correspondence("a", "a")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(features):
    return {name: x.astype(np.float32) for name, x in features.items()}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("given", "kind"), [([np.eye(4)], "list"), (np.eye(4), "ndarray"), (None, "NoneType")])
def test_features_that_are_not_a_mapping_are_refused(given, kind):
    with pytest.raises(TypeError, match=rf"^features must be a mapping from names to arrays; got {kind}\."):
        helpers.align(given)


def test_an_empty_mapping_is_refused():
    with pytest.raises(
        ValueError, match=r"^features is empty: pass the features of at least one network, \{name: array\}\.$"
    ):
        helpers.align({})


def test_networks_with_different_numbers_of_samples_are_refused_with_their_numbers(small):
    small["dino"] = small["dino"][:-1]
    with pytest.raises(ValueError, match=r"same samples in the same order; got n = \{'clip': 20, 'dino': 19\}"):
        helpers.align(small, density=DENSITY)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.ones((2, N, 3), np.float32), ValueError, r"features\['bad'\] must have shape \(n, d\); got \(2, 20, 3\)"),
        (np.ones(N, np.float32), ValueError, r"features\['bad'\] must have shape"),
        (np.ones((1, 3), np.float32), ValueError, r"features\['bad'\] has n = 1 sample"),
        (np.ones((N, 0), np.float32), ValueError, r"features\['bad'\] is empty"),
        (np.full((N, 3), "a"), TypeError, r"features\['bad'\] must hold real numbers; got dtype <U1"),
        ([[1.0, 2.0], [1.0]], TypeError, r"features\['bad'\] must hold rows of one length"),
        (None, TypeError, r"features\['bad'\] must be an array of numbers; got NoneType"),
    ],
)
def test_a_bad_array_is_refused_with_the_name_of_its_network(bad, error, message, small):
    with pytest.raises(error, match=message):
        helpers.align({**small, "bad": bad}, density=DENSITY)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("landmarks", "error", "message"),
    [
        (0, ValueError, r"^landmarks must be a whole number from 1 to n = 20; got 0\.$"),
        (N + 1, ValueError, r"^landmarks must be a whole number from 1 to n = 20; got 21\.$"),
        (-1, ValueError, r"^landmarks must be a whole number from 1 to n = 20; got -1\.$"),
        (True, TypeError, r"^landmarks must be None, a number or a vector of indices"),
        (0.5, TypeError, r"^landmarks must be None, a number or a vector of indices"),
        ([0.0, 1.0], TypeError, r"a vector of indices; got shape \(2,\), dtype float64"),
        ([], TypeError, r"got shape \(0,\)"),
        ([[0, 1], [2, 3]], TypeError, r"got shape \(2, 2\)"),
        (np.arange(N) < 5, TypeError, r"dtype bool\. For a mask write np\.flatnonzero\(landmarks\)\.$"),
        ([0, N], ValueError, r"^landmarks must be indices from 0 to 19; got 0 \.\. 20\.$"),
        ([-1, 3], ValueError, r"^landmarks must be indices from 0 to 19; got -1 \.\. 3\.$"),
        ([4, 7, 4, 2], ValueError, r"^landmarks must be distinct: sample 4 occurs 2 times\.$"),
        ([2, 2, 7, 7, 7], ValueError, r"^landmarks must be distinct: sample 2 occurs 2 times\.$"),
    ],
)
def test_bad_landmarks_are_refused(landmarks, error, message, small):
    with pytest.raises(error, match=message):
        helpers.align(small, landmarks=landmarks, density=0.5)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decorrelate": 0.1, "bandwidth": "per_row"}, "needs decorrelate=None"),
        ({"decorrelate": 0}, "^decorrelate must be finite and above 0; got 0"),
        ({"decorrelate": -1.0}, r"^decorrelate must be finite and above 0; got -1\."),
        ({"decorrelate": np.inf}, "^decorrelate must be finite and above 0; got inf"),
        ({"channels": "pca"}, "^channels must be one of None, 'standardize', 'whiten'; got 'pca'"),
        ({"bandwidth": "local"}, "^bandwidth must be one of 'global', 'per_row'; got 'local'"),
        ({"diagonal": "keep"}, "diagonal must be one of 'include', 'exclude'; got 'keep'"),
        ({"density": 1.5}, "density must lie strictly between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(options, message, small):
    with pytest.raises(ValueError, match=message):
        helpers.align(small, landmarks=LANDMARKS, **{"density": DENSITY, **options})


@pytest.mark.parametrize("where", ["a landmark", "not a landmark"])
@pytest.mark.parametrize("options", [{}, {"bandwidth": "per_row"}, {"channels": "standardize"}], ids=describe)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused_with_the_network_and_the_row(value, options, where, small):
    row = LANDMARKS[1] if where == "a landmark" else OTHERS[2]
    small["dino"][row, 1] = value
    with pytest.raises(
        ValueError, match=rf"^features\['dino'\] has nan or inf in 1 row\(s\), the first is row {row}\b"
    ):
        helpers.align(small, landmarks=LANDMARKS, density=DENSITY, **options)


def test_a_density_that_few_landmarks_cannot_reach_is_refused_with_the_network(small):
    with pytest.raises(ValueError, match=r"features\['clip'\].*density = 0\.05 cannot be reached with n = 8 samples"):
        helpers.align(small, landmarks=LANDMARKS)


@pytest.mark.parametrize("density", [1 / M, np.float32(1 / M), 0.05])
@pytest.mark.parametrize("transform", ["eager", "jit"])
def test_with_a_bandwidth_per_row_a_density_of_one_over_m_is_refused(density, transform, small):
    def fit(features):
        return helpers.align(features, landmarks=M, density=density, bandwidth="per_row").features

    least = 9 if density > 0.1 else 21
    message = (
        rf"^features\['clip'\]: density = 0\.\d+ cannot be reached with {M} landmarks and bandwidth=\"per_row\".*"
        rf"1/m = 0\.125.*at least {least} landmarks"
    )
    with pytest.raises(ValueError, match=message):
        (jax.jit(fit) if transform == "jit" else fit)(small)


def test_with_a_bandwidth_per_row_a_density_above_one_over_m_is_reached(small):
    found = helpers.align(small, landmarks=M, density=0.15, bandwidth="per_row")
    for rows in found.features.values():
        np.testing.assert_allclose(rows.mean(1), 0.15, rtol=1e-5)


def test_landmarks_that_coincide_are_refused_with_the_network(small):
    small["dino"][LANDMARKS[1:]] = small["dino"][LANDMARKS[0]]
    with pytest.raises(ValueError, match=r"features\['dino'\].*too many samples are duplicates"):
        helpers.align(small, landmarks=LANDMARKS, density=DENSITY)


def test_unknown_names_are_refused_with_those_there_are(small):
    alignment = helpers.align(small, landmarks=LANDMARKS, density=DENSITY)
    for call in (
        lambda: alignment.transform("mae", small["clip"]),
        lambda: alignment.correspondence("mae", "clip"),
        lambda: alignment.correspondence("clip", "mae"),
    ):
        with pytest.raises(KeyError, match="there is no network 'mae'; the names are 'clip', 'dino'"):
            call()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("x_new", "error", "message"),
    [
        (np.ones((3, 5), np.float32), ValueError, r"x_new must have shape \(k, 4\) for 'clip'; got \(3, 5\)"),
        (np.ones((2, 3, 4), np.float32), ValueError, r"x_new must have shape \(k, 4\) for 'clip'; got \(2, 3, 4\)"),
        (np.ones(4, np.float32), ValueError, "x_new must have shape"),
        (np.full((3, 4), "a"), TypeError, "x_new must hold real numbers"),
        (np.full((3, 4), np.nan, np.float32), ValueError, "has nan or inf in 3 row"),
    ],
)
def test_new_samples_of_another_width_or_kind_are_refused(x_new, error, message, small):
    alignment = helpers.align(small, landmarks=LANDMARKS, density=DENSITY)
    with pytest.raises(error, match=message):
        alignment.transform("clip", x_new)


# --- offsets and units ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("channels", [None, "standardize", "whiten"])
def test_offsets_and_units_of_channels(channels):
    """Against float64 of the same float32 numbers; 1e-5: a hundred roundings of rows of about 1."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 6))
    options = {"landmarks": np.arange(0, 60, 3), "density": 0.3, "channels": channels}
    for offset, unit in ((0.0, 1.0), (1e5, 1.0), (1e7, 1.0), (0.0, 1e-30), (0.0, 1e36), (np.r_[3e6, np.zeros(5)], 1.0)):
        x = np.float32(unit * (z * (np.asarray(offset) < 3e6) + offset) if np.ndim(offset) else unit * (z + offset))
        found = helpers.align({"x": x}, **options)
        with jax.enable_x64(True):
            expected = helpers.align({"x": x.astype(float)}, **options)
        helpers.assert_close(found.features["x"], expected.features["x"], 1e-5)
        helpers.assert_close(found.transform("x", x[:5]), found.features["x"][:5], 1e-5)
