"""Every function under vmap, jit, scan, checkpoint, eval_shape; and compiled once for each shape."""

from __future__ import annotations

import inspect
from functools import partial

import chex
import helpers
import jax
import jax.numpy as jnp
import memory
import numpy as np
import pytest

import jaxalign
from jaxalign.kernels import RBF

ROWS, OTHER_ROWS, WIDTH = helpers.ROWS, helpers.OTHER_ROWS, helpers.WIDTH
RTOL = helpers.tolerance(np.float32).density


def cauchy(distances):
    return 1 / (1 + distances)


# Everything as a function of (x, y) and of one number.
PAIR = {
    "squared_distances": lambda x, y, s: jaxalign.squared_distances(x, y) * s,
    "mean_density": lambda x, y, s: jaxalign.mean_density(x, y, sigma=s),
    "solve_sigma": lambda x, y, s: jaxalign.solve_sigma(x, y, density=0.1 * s).sigma,
    "rbf_affinity": lambda x, y, s: jaxalign.rbf_affinity(x, y, density=0.1 * s),
    "rbf_affinity at sigma": lambda x, y, s: jaxalign.rbf_affinity(x, y, sigma=s),
    "reduce_pairs": lambda x, y, s: jaxalign.reduce_pairs(cauchy, x, y, per_row=True) * s,
}
SHAPES = {
    "squared_distances": (ROWS, OTHER_ROWS),
    "mean_density": (),
    "solve_sigma": (),
    "rbf_affinity": (ROWS, OTHER_ROWS),
    "rbf_affinity at sigma": (ROWS, OTHER_ROWS),
    "reduce_pairs": (ROWS,),
}
NUMBERS = np.array([0.5, 1.0, 1.5], np.float32)


@pytest.fixture
def batch(rng):
    return tuple(rng.normal(size=(3, rows, WIDTH)).astype(np.float32) for rows in (ROWS, OTHER_ROWS))


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("in_axes", [(0, 0, 0), (None, 1, 0)])
def test_vmap_equals_a_loop(name, in_axes, batch):
    x, y = batch
    args = [x, y, NUMBERS]
    for k, axis in enumerate(in_axes):
        if axis is None:
            args[k] = args[k][0]
        elif axis == 1:
            args[k] = np.moveaxis(args[k], 0, 1)
    mapped = jax.vmap(PAIR[name], in_axes)(*args)
    for i in range(3):
        one = [a if axis is None else np.take(a, i, axis) for a, axis in zip(args, in_axes, strict=True)]
        helpers.assert_close(mapped[i], PAIR[name](*one), RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIR)
def test_jit_scan_and_checkpoint_change_nothing(name, batch):
    function, (x, y) = PAIR[name], batch
    expected = [function(x[i], y[i], NUMBERS[i]) for i in range(3)]
    _, scanned = jax.lax.scan(lambda carry, args: (carry, function(*args)), 0, (x, y, NUMBERS))
    for i in range(3):
        helpers.assert_close(scanned[i], expected[i], RTOL)
    value = jax.jit(jax.checkpoint(function))(x[0], y[0], NUMBERS[0])
    helpers.assert_close(value, expected[0], RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["solve_sigma", "rbf_affinity"])
def test_gradient_through_checkpoint_scan_and_value_and_grad(name, batch):
    function, (x, y) = PAIR[name], batch

    def total(x, scan):
        if not scan:
            return sum(jnp.sum(function(x, y[i], NUMBERS[i]) ** 2) for i in range(3))
        step = jax.checkpoint(lambda sum_, args: (sum_ + jnp.sum(function(x, *args) ** 2), None))
        return jax.lax.scan(step, jnp.zeros((), jnp.float32), (y, NUMBERS))[0]

    plain, scanned = (jax.jit(jax.value_and_grad(total), static_argnums=1)(x[0], scan) for scan in (False, True))
    helpers.assert_close(scanned[0], plain[0], RTOL)
    helpers.assert_close(scanned[1], plain[1], helpers.tolerance(np.float32).gradient)


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("batch_shape", [(), (2, 3)])
def test_shapes_and_dtypes_are_known_without_computing(name, batch_shape):
    x, y = (jax.ShapeDtypeStruct((*batch_shape, rows, WIDTH), jnp.float32) for rows in (ROWS, OTHER_ROWS))
    out = jax.eval_shape(PAIR[name], x, y, 1.0)
    assert (out.shape, out.dtype) == ((*batch_shape, *SHAPES[name]), jnp.float32)


@pytest.mark.usefixtures("unchecked_types")  # eval_shape fills the pytree with shapes, which are no arrays
@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_the_solution_is_a_pytree(bandwidth, rng):
    x = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    shapes = jax.eval_shape(lambda x: jaxalign.solve_sigma(x, density=0.1, bandwidth=bandwidth), x)
    rows = (2, ROWS) if bandwidth == "per_row" else (2,)
    assert (shapes.sigma.shape, shapes.density.shape, shapes.status.shape) == (rows, rows, rows)
    assert shapes.passes.shape == (2,)
    assert (shapes.status.dtype, shapes.passes.dtype) == (jnp.int32, jnp.int32)
    solution = jaxalign.solve_sigma(x, density=0.1, bandwidth=bandwidth)
    first = jax.tree.map(lambda leaf: leaf[0], solution)
    assert isinstance(first, jaxalign.SigmaSolution)
    assert np.array_equal(first.sigma, solution.sigma[0])


@pytest.mark.slow
@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_vmap_over_a_mask(bandwidth, rng):
    x = rng.normal(size=(3, ROWS, WIDTH)).astype(np.float32)
    mask = np.arange(ROWS) < np.array([24, 15, 4])[:, None]

    def affinity(x, mask):
        return jaxalign.rbf_affinity(x, mask=mask, density=0.5, bandwidth=bandwidth)

    mapped = jax.vmap(affinity)(x, mask)
    for i in range(3):
        helpers.assert_close(mapped[i], affinity(x[i], mask[i]), RTOL)


# --- compiled once --------------------------------------------------------------------------------------------------

compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")  # a check may import parts of jax, after which everything is traced anew
@pytest.mark.parametrize("name", PAIR)
def test_new_values_of_the_same_shape_compile_nothing(name, rng):
    # Eager calls: a shape nobody else uses, so that the first call does compile and the listener is seen to work.
    def call(number):
        x, y = rng.normal(size=(13, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
        jax.block_until_ready(PAIR[name](x, y, np.float32(number)))

    before = len(compilations)
    call(0.5)
    first = len(compilations)
    assert first > before
    call(1.5)
    assert len(compilations) == first


def test_a_new_density_does_not_compile_again(rng):
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    jaxalign.solve_sigma(x, density=0.1), jaxalign.rbf_affinity(x, density=0.1)
    before = len(compilations)
    for density in (0.2, 0.3, 0.9):
        jaxalign.solve_sigma(x, density=density)
        jaxalign.rbf_affinity(x, density=density)
    assert len(compilations) == before


def test_jit_traces_once(rng):
    chex.clear_trace_counter()
    function = jax.jit(chex.assert_max_traces(PAIR["rbf_affinity"], n=1))
    for seed in range(3):
        rows = np.random.default_rng(seed).normal(size=(ROWS + OTHER_ROWS, WIDTH)).astype(np.float32)
        function(rows[:ROWS], rows[ROWS:], np.float32(1 + 0.1 * seed))


# --- arrays that a jitted function closes over ------------------------------------------------------------------------

# Their values are known inside the trace, where operations on them are not: checks must look at them all the same.
X, Y = (np.random.default_rng(k).normal(size=(24, 6)).astype(np.float32) for k in range(2))
MEASURE_OPTIONS = {"k": 5, "kernel": RBF(density=0.3)}


def measure(name, **more):
    known = jaxalign.measures.REGISTRY[name].options
    options = {key: value for key, value in MEASURE_OPTIONS.items() if key in known} | more
    return lambda x, y: getattr(jaxalign.measures, name)(x, y, **options)


KEY = jax.random.key(0)
TWO_ARRAYS = {
    "squared_distances": jaxalign.squared_distances,
    "mean_density": lambda x, y: jaxalign.mean_density(x, y, sigma=2.0),
    "solve_sigma": lambda x, y: jaxalign.solve_sigma(x, y, density=0.3).sigma,
    "rbf_affinity": lambda x, y: jaxalign.rbf_affinity(x, y, density=0.3),
    "affinity_operator": lambda x, y: jaxalign.affinity_operator(x, y, density=0.3).sum(),
    "reduce_pairs": lambda x, y: jaxalign.reduce_pairs(cauchy, x, y),
    "align": lambda x, y: helpers.align({"x": x, "y": y}, landmarks=9, density=0.5, standardize=True).features,
    "joint_affinity": lambda x, y: jaxalign.joint_affinity([x, y], density=0.3),
    "correspondence": jaxalign.correspondence,
    "Alignment.correspondence": lambda x, y: helpers.align({"x": x, "y": y}, landmarks=9, density=0.5).correspondence(
        "x", "y"
    ),
    "rgb": lambda x, y: jaxalign.rgb(x, like=y),
    "fit_colors": lambda x, y: jaxalign.fit_colors(x)(y),
    "compare": jaxalign.compare,
    "permutation_test": lambda x, y: jaxalign.permutation_test(x, y, key=KEY, permutations=19).value,
    "permutation_test of groups": lambda x, y: (
        jaxalign.permutation_test(x, y, key=KEY, permutations=19, groups=np.arange(24) // 3).p_value
    ),
    "calibrate": lambda x, y: (
        jaxalign.calibrate(jaxalign.permutation_test(x, y, key=KEY, permutations=19), alpha=0.2).calibrated
    ),
    "permutation_test of neighbours": lambda x, y: (
        jaxalign.permutation_test(x, y, "mutual_knn", key=KEY, permutations=19, k=3).value
    ),
    "bootstrap": lambda x, y: jaxalign.bootstrap(x, y, key=KEY, resamples=5).resampled,
    "paired_difference": lambda x, y: jaxalign.paired_difference((x, y), (x, x + y), key=KEY, resamples=5).value,
    "noise_ceiling": lambda x, y: jaxalign.noise_ceiling([x, y]),
    "alignment_loss": jaxalign.losses.alignment_loss,
    "alignment_loss infonce": lambda x, y: jaxalign.losses.alignment_loss(x, y, "infonce", kernel=RBF(density=0.3)),
    **{
        f"alignment_loss {measure}": partial(jaxalign.losses.alignment_loss, measure=measure)
        for measure in ("gram", "distances", "angles", "procrustes")
    },
    "token_loss": lambda x, y: jaxalign.losses.token_loss(
        x.reshape(2, 12, 6), y.reshape(2, 12, 6), relations="both", spatial_norm=True, kernel=RBF(density=0.3)
    ),
    "decorrelation_loss": lambda x, y: jaxalign.losses.decorrelation_loss(x),
    "multi_layer_loss": lambda x, y: jaxalign.losses.multi_layer_loss({"a": x}, {"a": y})[0],
    "push": lambda x, y: jaxalign.losses.FeatureQueue.empty(40, 6, 6).push(x, y),
    **{name: measure(name) for name in jaxalign.measures.REGISTRY},
    "rsa of cosines": measure("rsa", metric="cosine"),
    "rsa by spearman": measure("rsa", comparison="spearman"),
    "rsa by kendall": measure("rsa", comparison="kendall"),
    "cka of linear kernels": measure("cka", kernel="linear"),
    "cka of sampled channels": lambda x, y: jaxalign.measures.cka(
        jnp.tile(x, (1, 3)), jnp.tile(y, (1, 3)), "linear", sampled_channels=True
    ),
    "angular cka": measure("cka", result="angular"),
    "rsa of correlations": measure("rsa", metric="correlation"),
    "minibatch_cka": lambda x, y: jaxalign.measures.minibatch_cka([(x, y)]),
}
AFFINITY = np.exp(-((X[:, None] - X[None]) ** 2).sum(-1) / 8)
ONE_ARRAY = {
    "rbf_affinity": lambda x: jaxalign.rbf_affinity(x, density=0.3),
    "solve_sigma": lambda x: jaxalign.solve_sigma(x, density=0.3).sigma,
    "solve_sigma of some": lambda x: jaxalign.solve_sigma(x, density=0.3, mask=jnp.arange(24) < 20).sigma,
    "affinity_operator": lambda x: jaxalign.affinity_operator(x, density=0.3).rows(np.arange(3)),
    "normalized_cut": lambda x: jaxalign.normalized_cut(x, 3, density=0.3).eigenvalues,
    "kway": lambda x: jaxalign.kway(x[:, :3]),
    "nested_segments": lambda x: jaxalign.nested_segments(jaxalign.normalized_cut(x, 3, density=0.3)),
    "prompt_scores": lambda x: jaxalign.prompt_scores(jaxalign.normalized_cut(x, 3, density=0.3), [0, 3], 2),
    "segment_channels": lambda x: jaxalign.segment_channels(x, np.arange(24) // 12, density=0.3),
    "rgb": jaxalign.rgb,
    "align": lambda x: helpers.align({"x": x}, landmarks=9, density=0.5, channels="whiten").features["x"],
    "nearest_neighbors": lambda x: jaxalign.measures.nearest_neighbors(x, 3),
    "rdm": jaxalign.measures.rdm,
    "rdm of cosines": lambda x: jaxalign.measures.rdm(x, "cosine"),
}
ON_HOST = {"compare_grid", "match", "scaling_curve"}  # their values are numpy's
OF_THESE = {"color_images"}  # align, normalized_cut and rgb


def test_every_public_function_is_in_the_tables():
    public = {name for name, value in vars(jaxalign).items() if inspect.isfunction(value)}
    assert public - ON_HOST - OF_THESE <= TWO_ARRAYS.keys() | ONE_ARRAY.keys()


# The compiled program may add in another order; eigenvalues and shares of float32 are good to 1e-5.
def assert_same(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


EVERYTHING = {
    **{name: (function, (X, Y)) for name, function in TWO_ARRAYS.items()},
    **{f"{name}, one array": (function, (X,)) for name, function in ONE_ARRAY.items()},
}

# The others take the steps of these: without jit, which takes long, these are enough.
WITHOUT_JIT = {
    "rbf_affinity", "solve_sigma", "affinity_operator", "reduce_pairs", "align", "normalized_cut, one array", "rgb",
    "permutation_test", "bootstrap", "alignment_loss", "alignment_loss infonce", "cka", "mutual_knn", "procrustes",
    "cca", "linear_predictivity", "rsa by spearman",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYTHING)
def test_arrays_may_be_closed_over_and_nothing_needs_jit(name):
    memory.WATCH.drop_programs(more=300)  # without jit every operation is a program, which the next case shares
    function, arrays = EVERYTHING[name]
    *first, last = (jnp.asarray(array) for array in arrays)
    # What jax can check beside ranks and dtypes, which are strict in all tests.
    with jax.debug_nans(True), jax.enable_checks(True):
        expected = function(*first, last)
        assert_same(jax.jit(lambda *first: function(*first, last))(*first), expected)
    if name not in WITHOUT_JIT:
        return
    with jax.disable_jit():
        found = function(*first, last)
    assert_same(found, expected)


# Of everything that shares its derivatives one: the others are tried without debug_nans in the tests of gradients.
DERIVATIVES = (
    "rbf_affinity", "align", "alignment_loss", "alignment_loss infonce", "alignment_loss gram",
    "alignment_loss distances", "alignment_loss angles", "token_loss", "decorrelation_loss", "cka of linear kernels",
    "angular cka", "rsa", "distance_correlation", "cknna", "procrustes", "cca", "linear_predictivity",
    "affinity_distance",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVATIVES)
def test_gradients_hold_no_nan(name):
    def total(x, y):
        leaves = jax.tree.leaves(TWO_ARRAYS[name](x, y))
        return sum(jnp.sum(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))

    with jax.debug_nans(True):
        assert all(np.isfinite(slope).all() for slope in jax.grad(total, (0, 1))(jnp.asarray(X), jnp.asarray(Y)))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_matrix_and_row_numbers_may_be_closed_over(kind):
    affinity, index, beyond = kind(AFFINITY), kind(np.array([3, -1])), kind(np.array([3, 24]))
    assert_same(
        jax.jit(lambda: jaxalign.normalized_cut(affinity, 3).eigenvalues)(),
        jaxalign.normalized_cut(affinity, 3).eigenvalues,
    )
    operator = jaxalign.affinity_operator(X, density=0.3)
    assert_same(jax.jit(lambda: operator.rows(index))(), operator.rows(index))
    with pytest.raises(ValueError, match="index ranges from 3 to 24"):
        jax.jit(lambda: operator.rows(beyond))()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_what_is_closed_over_is_checked(kind):
    flat = kind(np.where(np.arange(24)[:, None] == 3, 0, Y))
    with pytest.raises(ValueError, match="row 3 is 0 everywhere"):
        jax.jit(lambda x: jaxalign.measures.mutual_knn(x, flat))(X)
    own = kind(np.asarray(jaxalign.rbf_affinity(X, density=0.3)))
    with pytest.raises(ValueError, match="the affinity of a landmark to itself"):
        jax.jit(lambda: jaxalign.correspondence(own, own))()
    hole = kind(np.where(np.arange(24)[:, None] == 3, np.nan, Y))
    with pytest.raises(ValueError, match=r"y has nan or inf in 1 row"):
        jax.jit(lambda x: jaxalign.measures.cka(x, hole))(X)
