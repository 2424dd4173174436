"""What the library refuses, and whether the message says what to do. Run-time type checks are off, as for users."""

from __future__ import annotations

import re
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxalign
from jaxalign import Plan
from jaxalign.kernels import RBF, Laplacian

ROWS, WIDTH, MASK = helpers.ROWS, helpers.WIDTH, helpers.MASK

pytestmark = pytest.mark.usefixtures("unchecked_types")

X = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(helpers.OTHER_ROWS, WIDTH)).astype(np.float32)

FUNCTIONS = {
    "squared_distances": jaxalign.squared_distances,
    "mean_density": lambda x, y=None, **kw: jaxalign.mean_density(x, y, sigma=1.0, **kw),
    "solve_sigma": lambda x, y=None, **kw: jaxalign.solve_sigma(x, y, density=0.2, **kw),
    "rbf_affinity": lambda x, y=None, **kw: jaxalign.rbf_affinity(x, y, density=0.2, **kw),
    "rbf_affinity at sigma": lambda x, y=None, **kw: jaxalign.rbf_affinity(x, y, sigma=1.0, **kw),
}
WITH_MASK = [name for name in FUNCTIONS if name != "squared_distances"]
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
every_function_with_a_mask = pytest.mark.parametrize("function", [FUNCTIONS[k] for k in WITH_MASK], ids=WITH_MASK)
both_solvers = pytest.mark.parametrize("solve", [jaxalign.solve_sigma, jaxalign.rbf_affinity])


def refused(error, *words):
    """pytest.raises with a message that contains all of these, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


# --- features -------------------------------------------------------------------------------------------------------

BAD_FEATURES = {
    "one axis": (X[0], ValueError, ("x must have shape (..., n, d)", "got shape (5,)", "x[None, :]", "x[:, None]")),
    "no axis": (np.array(1.0, np.float32), ValueError, ("x must have shape (..., n, d)", "()")),
    "no rows": (X[:0], ValueError, ("x is empty", "(0, 5)")),
    "no features": (X[:, :0], ValueError, ("x is empty", "(24, 0)")),
    "empty batch": (np.zeros((0, 4, 2), np.float32), ValueError, ("x is empty", "(0, 4, 2)")),
    "complex": (X.astype(np.complex64), TypeError, ("x is complex (complex64)", "x.real, x.imag")),
    "ragged list": ([[1.0, 2.0], [3.0]], TypeError, ("x must hold rows of one length; got [[1.0, 2.0], [3.0]]",)),
    "list of numbers": (X[0].tolist(), ValueError, ("x must have shape (..., n, d)", "np.asarray(x)[:, None]")),
    "dict": ({"a": X}, TypeError, ("x must be an array of numbers; got dict", "compare_grid")),
    "string": (
        "features",
        TypeError,
        ("x must be an array of numbers; got str", "jaxalign.io.read_features('features')"),
    ),
    "none": (None, TypeError, ("x must be an array of numbers; got NoneType",)),
    "strings": (np.array([["a", "b"]]), TypeError, ("x must hold real numbers", "<U1", "Its entries are not numbers")),
    "objects": (X.astype(object), TypeError, ("x must hold real numbers", "object", "astype(np.float64)")),
    "keys": (jax.random.split(jax.random.key(0), (4, 2)), TypeError, ("x must hold real numbers; got dtype key<fry>",)),
    "times": (X.astype("M8[s]"), TypeError, ("x must hold real numbers", "datetime64[s]", "astype(np.float64)")),
    "beyond float32": (
        1e300 * X.astype(np.float64),
        ValueError,
        ("x holds numbers up to", "e+300", "beyond the range of float32", "np.asarray(x) / np.abs(np.asarray(x))"),
    ),
    "below float32": (1e-300 * X.astype(np.float64), ValueError, ("x holds numbers up to", "e-300", "range of")),
}


@every_function
@pytest.mark.parametrize("kind", BAD_FEATURES)
def test_features(function, kind):
    value, error, words = BAD_FEATURES[kind]
    with refused(error, *words):
        function(value)


@every_function
@pytest.mark.parametrize("kind", ["one axis", "no rows", "strings", "ragged list", "objects"])
def test_features_of_the_other_side(function, kind):
    value, error, words = BAD_FEATURES[kind]
    words = [re.sub(r"\bx\b", "y", word) for word in words]
    with refused(error, *words):
        function(X, value)


@every_function
def test_a_torch_tensor_is_told_how_to_become_an_array(function):
    torch = pytest.importorskip("torch", reason="torch is not installed: no tensor to hand in")
    tensor = torch.from_numpy(X)
    with refused(TypeError, "x is a torch tensor", "jaxalign.interop.from_torch(x)", "x.detach().cpu().numpy()"):
        function(tensor)
    with refused(TypeError, "y is a torch tensor"):
        function(X, tensor)


@pytest.mark.parametrize("name", WITH_MASK)
def test_one_row_has_no_pair_with_another(name):
    with refused(ValueError, "n = 1", "(1, 5)", "at least 2"):
        FUNCTIONS[name](X[:1])


def test_one_row_is_enough_against_others():
    affinity = jaxalign.rbf_affinity(X[:1], Y, density=0.2)
    assert float(jnp.mean(affinity)) == pytest.approx(0.2, rel=helpers.tolerance(np.float32).density)


@every_function
def test_sides_of_different_width_are_told_about_affinities(function):
    with refused(ValueError, "same number of features", "(24, 5)", "(9, 3)", "compare their affinities"):
        function(X, Y[:, :3])


@every_function
def test_batches_that_do_not_broadcast(function):
    with refused(ValueError, "batch dimensions of x, (2,), and of y, (3,), do not broadcast"):
        function(np.stack([X] * 2), np.stack([Y] * 3))


NOT_FINITE = [name for name in FUNCTIONS if name != "squared_distances"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_name_the_row(name, value):
    x, y, batch = X.copy(), Y.copy(), np.stack([X, X])
    x[[7, 9], 2], y[4, 0], batch[1, 3, 1] = value, value, value
    with refused(ValueError, "x has nan or inf in 2 row(s), the first is row 7", "exclude them with mask="):
        FUNCTIONS[name](x)
    with refused(ValueError, "y has nan or inf in 1 row(s), the first is row 4"):
        FUNCTIONS[name](X, y)
    with refused(ValueError, "x has nan or inf in 1 row(s), the first is row 3 of batch element (1,)"):
        FUNCTIONS[name](batch)
    # The advice helps.
    mask = np.ones(ROWS, bool)
    mask[[7, 9]] = False
    FUNCTIONS[name](x, mask=mask)
    # ... and a mask that covers another row does not.
    with refused(ValueError, "1 row(s), the first is row 9"):
        FUNCTIONS[name](x, mask=np.arange(ROWS) != 7)


def test_distances_carry_nan_through():
    x = X.copy()
    x[7, 2] = np.nan
    distances = np.asarray(jaxalign.squared_distances(x))
    others = np.delete(np.arange(ROWS), 7)
    assert np.all(np.isnan(distances[7, others]))


# --- density --------------------------------------------------------------------------------------------------------


@both_solvers
@pytest.mark.parametrize("density", [0.0, 1.0, -0.1, 1.5, 5, np.nan, np.inf, np.float32(2)])
def test_density_outside_0_and_1(solve, density):
    with refused(ValueError, "density must lie strictly between 0 and 1", "mean of the affinity", "got"):
        solve(X, density=density)


@both_solvers
@pytest.mark.parametrize("density", ["0.05", 0.1 + 0j, True, None, np.array(True), object()])
def test_density_that_is_no_real_number(solve, density):
    with refused(TypeError, "density must be a real number or a real array; got"):
        solve(X, density=density)


@both_solvers
def test_density_of_the_wrong_shape(solve):
    with refused(ValueError, "density of shape (3,) does not broadcast to (), the batch dimensions"):
        solve(X, density=np.array([0.1, 0.2, 0.3], np.float32))
    with refused(ValueError, "density of shape (3,) does not broadcast to (2,), the batch dimensions"):
        solve(np.stack([X, X]), density=np.array([0.1, 0.2, 0.3], np.float32))
    with refused(ValueError, "density of shape (24,)"):  # not one a row, either
        solve(X, density=np.full(ROWS, 0.2, np.float32), bandwidth="per_row")


@both_solvers
def test_density_may_be_a_list_over_the_batch(solve):
    batch = np.stack([X, X])
    a, b = (jax.tree.leaves(solve(batch, density=d))[0] for d in ([0.1, 0.2], np.array([0.1, 0.2], np.float32)))
    assert np.array_equal(a, b)


# --- densities that no sigma reaches --------------------------------------------------------------------------------


@both_solvers
@pytest.mark.parametrize("transform", ["eager", "jit", "vmap", "grad"])
@pytest.mark.parametrize("bandwidth", helpers.BANDWIDTHS)
def test_a_density_below_that_of_the_diagonal(solve, transform, bandwidth):
    # Only shapes and a Python number decide, so this is said also under a trace.
    def call(x):
        return jax.tree.leaves(solve(x, density=0.04, bandwidth=bandwidth))[0]

    calls = {
        "eager": lambda: call(X),
        "jit": lambda: jax.jit(call)(X),
        "vmap": lambda: jax.vmap(call)(np.stack([X, X])),
        "grad": lambda: jax.grad(lambda x: jnp.sum(call(x)))(X),
    }
    with refused(ValueError, "density = 0.04", "n = 24", "1/n = 0.04167", "above that", 'diagonal="exclude"'):
        calls[transform]()


@both_solvers
def test_both_ways_out_of_a_density_below_that_of_the_diagonal(solve):
    solve(X, density=0.042)
    solve(X, density=0.04, diagonal="exclude")


@both_solvers
def test_a_density_equal_to_that_of_the_diagonal_is_refused_too(solve):
    with refused(ValueError, "density = 0.25", "n = 4"):
        solve(X[:4], density=0.25)


@both_solvers
def test_the_mask_counts_for_n(solve):
    with refused(ValueError, "density = 0.05", "n = 18"):
        solve(X, density=0.05, mask=MASK)
    ragged = np.stack([np.arange(ROWS) < 24, np.arange(ROWS) < 7])
    with refused(ValueError, "n = 7", "1/n = 0.1429"):
        solve(np.stack([X, X]), density=0.1, mask=ragged)


@both_solvers  # under jit: test_solve_sigma, test_rbf_affinity
@pytest.mark.parametrize("features", ["constant", "duplicates"])
def test_coincident_samples(solve, features):
    x = np.ones_like(X) if features == "constant" else np.repeat(X[:3], 8, 0)
    with refused(ValueError, "no sigma found", "samples are duplicates", "Remove duplicate samples", "larger density"):
        solve(x, density=0.2)


def test_coincident_samples_name_the_batch_element_and_the_row():
    with refused(ValueError, "no sigma found (at index (1,) of (2,))", "duplicates"):
        jaxalign.solve_sigma(np.stack([X, np.ones_like(X)]), density=0.2)
    x = X.copy()
    x[3:12] = x[3]
    with refused(ValueError, "no sigma found (at index (3,) of (24,))", "duplicates"):
        jaxalign.solve_sigma(x, density=0.2, bandwidth="per_row")


# --- sigma ----------------------------------------------------------------------------------------------------------

GIVEN = {
    "mean_density": lambda sigma, x=X, **kw: jaxalign.mean_density(x, sigma=sigma, **kw),
    "rbf_affinity": lambda sigma, x=X, **kw: jaxalign.rbf_affinity(x, sigma=sigma, **kw),
}
at_sigma = pytest.mark.parametrize("function", GIVEN.values(), ids=GIVEN.keys())


@at_sigma
@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf, 0])
def test_sigma_that_is_not_above_0(function, sigma):
    with refused(ValueError, "sigma must be finite and above 0; got"):
        function(sigma)


@at_sigma
def test_one_bad_sigma_of_many(function):
    sigma = np.ones(ROWS, np.float32)
    sigma[4] = -1
    with refused(ValueError, "sigma must be finite and above 0"):
        function(sigma, bandwidth="per_row")
    valid = np.arange(ROWS) != 4
    assert np.all(np.isfinite(function(sigma, bandwidth="per_row", mask=valid)))  # of a row that is not there


@at_sigma
@pytest.mark.parametrize("sigma", ["1", 1j, True])
def test_sigma_that_is_no_real_number(function, sigma):
    with refused(TypeError, "sigma must be a real number or a real array"):
        function(sigma)


@at_sigma
def test_sigma_of_the_wrong_shape(function):
    with refused(ValueError, "sigma of shape (3,) does not broadcast"):
        function(np.ones(3, np.float32))
    with refused(ValueError, "sigma of shape (24,) does not broadcast", 'One sigma per row needs bandwidth="per_row"'):
        function(np.ones(ROWS, np.float32))
    with refused(ValueError, "sigma of shape (3,)", "one sigma per row of x has shape (2, 24)"):
        function(np.ones(3, np.float32), x=np.stack([X, X]), bandwidth="per_row")
    with refused(ValueError, 'bandwidth="per_row" with sigma of shape ()', "Leave bandwidth out"):
        function(2.0, bandwidth="per_row")
    with refused(ValueError, "sigma of shape (24, 1)"):
        function(np.ones((ROWS, 1), np.float32))


# --- masks ----------------------------------------------------------------------------------------------------------


@every_function_with_a_mask
def test_mask_of_the_wrong_dtype(function):
    for dtype in (np.int32, np.float32):
        with refused(TypeError, "mask must be boolean", np.dtype(dtype).name, "mask.astype(bool)"):
            function(X, mask=MASK.astype(dtype))
        with refused(TypeError, "mask_y must be boolean", "mask_y.astype(bool)"):
            function(X, Y, mask_y=helpers.MASK_Y.astype(dtype))


@every_function_with_a_mask
@pytest.mark.parametrize("shape", [(), (23,), (24, 1), (1, 24), (1,)])
def test_mask_of_the_wrong_shape(function, shape):
    with refused(ValueError, f"mask has shape {shape}", "expected (24,)", "one entry per sample"):
        function(X, mask=np.ones(shape, bool))


@every_function_with_a_mask
def test_mask_of_the_wrong_batch(function):
    with refused(ValueError, "mask has shape (3, 24), expected (2, 24)"):
        function(np.stack([X, X]), mask=np.ones((3, ROWS), bool))


@every_function_with_a_mask
def test_mask_that_leaves_too_few(function):
    with refused(ValueError, "mask leaves 0 valid sample(s), at least 2 needed", "True marks a valid sample"):
        function(X, mask=np.zeros(ROWS, bool))
    with refused(ValueError, "mask leaves 1 valid sample(s), at least 2 needed"):
        function(X, mask=np.arange(ROWS) == 3)
    with refused(ValueError, "mask_y leaves 0 valid sample(s), at least 1 needed"):
        function(X, Y, mask_y=np.zeros(len(Y), bool))
    one_of_two = np.stack([MASK, np.zeros(ROWS, bool)])
    with refused(ValueError, "mask leaves 0 valid sample(s)"):
        function(np.stack([X, X]), mask=one_of_two)


@every_function_with_a_mask
def test_a_mask_of_the_other_side_needs_another_side(function):
    with refused(ValueError, "mask_y needs y"):
        function(X, mask_y=MASK)


# --- options --------------------------------------------------------------------------------------------------------


@every_function_with_a_mask
def test_a_diagonal_needs_one_side(function):
    with refused(ValueError, "diagonal='exclude' has no meaning with y", "Leave diagonal out"):
        function(X, Y, diagonal="exclude")


@every_function_with_a_mask
@pytest.mark.parametrize("diagonal", ["Include", "none", None, True])
def test_unknown_diagonal(function, diagonal):
    with refused(ValueError, "diagonal must be one of 'include', 'exclude'; got", repr(diagonal)):
        function(X, diagonal=diagonal)


@both_solvers
@pytest.mark.parametrize("bandwidth", ["row", "Global", None, 1])
def test_unknown_bandwidth(solve, bandwidth):
    with refused(ValueError, "bandwidth must be one of 'global', 'per_row'; got", repr(bandwidth)):
        solve(X, density=0.2, bandwidth=bandwidth)
    with refused(ValueError, "got 0.5. A number is passed as sigma."):
        solve(X, density=0.2, bandwidth=0.5)


def test_a_zero_diagonal_needs_one_side():
    for options in ({"sigma": 1.0}, {"density": 0.2}):
        with refused(ValueError, "zero_diagonal=True has no meaning with y"):
            jaxalign.rbf_affinity(X, Y, **options, zero_diagonal=True)


@pytest.mark.parametrize("rtol", [0.0, -1e-6, 1e-9, 1.0, 2.0, np.nan])
def test_rtol_out_of_range(rtol):
    with refused(ValueError, "rtol must lie between 4.8e-07", "float32", "and 1; got"):
        jaxalign.solve_sigma(X, density=0.2, rtol=rtol)


@pytest.mark.usefixtures("x64")
def test_rtol_of_float64():
    with refused(ValueError, "rtol must lie between 8.9e-16", "float64"):
        jaxalign.solve_sigma(X.astype(np.float64), density=0.2, rtol=1e-16)


# Options that are whole numbers, as functions of them.
WHOLE = {
    "csls": lambda k: jaxalign.correspondence(X, X + 1, csls=k).rank,
    "landmarks of infonce": lambda k: jaxalign.losses.alignment_loss(
        X, X[::-1], "infonce", landmarks=k, kernel=RBF(density=0.5)
    ),
    "k of mutual_knn": lambda k: jaxalign.measures.mutual_knn(X, X[::-1], k),
    "k of jaccard": lambda k: jaxalign.measures.jaccard(X, X[::-1], k),
    "k of cknna": lambda k: jaxalign.measures.cknna(X, X[::-1], k),
    "k of nearest_neighbors": lambda k: jaxalign.measures.nearest_neighbors(X, k),
    "folds": lambda k: jaxalign.measures.linear_predictivity(X, X[::-1], folds=k),
    "num_components of svcca": lambda k: jaxalign.measures.svcca(X, X[::-1], num_components=k),
    "tile_size": lambda k: jaxalign.solve_sigma(X, density=0.2, plan=Plan(k)).sigma,
    "num_components": lambda k: jaxalign.normalized_cut(X, k, density=0.2).eigenvalues,
    "landmarks of align": lambda k: helpers.align({"a": X}, landmarks=k, density=0.5).landmarks,
}


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_may_be_numpy_s_and_nothing_else(name):
    function = WHOLE[name]
    np.testing.assert_array_equal(function(np.int64(3)), function(3))
    np.testing.assert_array_equal(function(np.uint8(3)), function(3))
    for bad in (True, 3.0, np.float32(3), "3", 0, -1):
        if name == "landmarks of align" and type(bad) is not int:
            continue  # a vector of indices, badly written
        with pytest.raises((ValueError, TypeError), match=rf"^{name.split()[0]} must be .*got {re.escape(repr(bad))}"):
            function(bad)


# --- errors out of compiled code ------------------------------------------------------------------------------------


def test_checkify_turns_nan_into_an_error_as_the_docstring_of_solve_sigma_says():
    solve = jax.jit(checkify.checkify(lambda x: jaxalign.solve_sigma(x, density=0.2), errors=checkify.float_checks))
    x = X.copy()
    x[3, 2] = np.nan
    for bad in (x, np.repeat(X[:3], 8, 0), np.ones_like(X)):
        error, found = solve(bad)
        assert np.isnan(found.sigma)
        with pytest.raises(checkify.JaxRuntimeError, match=r"nan|division by zero"):
            error.throw()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["include", "masked include"])
def test_checkify_raises_no_false_alarm(setting):
    bandwidth = "global" if setting == "include" else "per_row"
    rng = np.random.default_rng(0)
    problems = {
        name: helpers.problem(setting, features(rng), np.float32)
        for name, features in helpers.FEATURES.items()
        if name != "one_feature"
    }
    options = problems["gaussian"][1]
    solve = jax.jit(
        checkify.checkify(
            lambda x, c: jaxalign.rbf_affinity(x, density=c, bandwidth=bandwidth, **options),
            errors=checkify.float_checks,
        )
    )
    for name, (x, _) in problems.items():
        floor = helpers.share_of_coincident_pairs(x, options, bandwidth)
        for level in (0.01, 0.03, 0.5, 0.999):
            error, affinity = solve(x, np.float32(floor + level * (1 - floor)))
            assert error.get() is None, (name, level)
            assert np.all(np.isfinite(affinity))


# --- under a trace, where values cannot raise: nan, never a number that looks like one --------------------------------


COINCIDENT = np.concatenate([np.repeat(X[:1], 18, 0), X[:6]])  # 18 of 24 alike: no sigma brings the mean to 0.05
OTHER = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)
WITH_SIGMA = {
    "hsic": lambda x, y, **kw: jaxalign.measures.hsic(x, y, RBF(**kw)),
    "cka": lambda x, y, **kw: jaxalign.measures.cka(x, y, RBF(**kw)),
    "cka laplacian": lambda x, y, **kw: jaxalign.measures.cka(x, y, Laplacian(**kw)),
    "rsa": lambda x, y, **kw: jaxalign.measures.rsa(x, y, RBF(**kw)),
    "affinity_distance": lambda x, y, **kw: jaxalign.measures.affinity_distance(x, y, RBF(**kw)),
    "affinity_distance rows": lambda x, y, **kw: jaxalign.measures.affinity_distance(x, y, RBF(**kw), result="rows"),
    **{
        f"loss {measure}": partial(
            lambda x, y, measure, **kw: jaxalign.losses.alignment_loss(x, y, measure, kernel=RBF(**kw)), measure=measure
        )
        for measure in ("cka", "affinity", "kl", "infonce")
    },
}
every_function_with_sigma = pytest.mark.parametrize("name", WITH_SIGMA)


@pytest.mark.slow
@every_function_with_sigma
def test_a_traced_sigma_that_is_none_gives_nan(name):
    call = jax.jit(lambda sigma: WITH_SIGMA[name](X, OTHER, sigma=sigma))
    assert np.isfinite(call(2.0))
    for sigma in (-1.0, 0.0, np.nan, np.inf):
        assert np.isnan(call(sigma)), sigma


@pytest.mark.slow
@every_function_with_sigma
def test_where_a_trace_finds_no_sigma_the_value_is_nan(name):
    def call(x, density):
        return WITH_SIGMA[name](x, OTHER, density=density)

    assert np.isfinite(jax.jit(call)(X, 0.2))
    if name.startswith("loss"):  # there all samples count as alike, so that a training goes on
        assert np.isfinite(jax.jit(call)(COINCIDENT, 0.2))
    else:
        assert np.isnan(jax.jit(call)(COINCIDENT, 0.2))
        with_diagonal = jax.jit(lambda x, density: WITH_SIGMA[name](x, OTHER, density=density, diagonal="include"))
        assert np.isnan(with_diagonal(X, 0.001))  # the diagonal alone gives 1 / n
        with refused(ValueError, "x", "duplicates"):
            call(jnp.asarray(COINCIDENT), 0.2)
    assert np.isnan(jax.jit(call)(X, 1.5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jaxalign.measures.cka(X, OTHER, RBF(2.0, density=0.2)), ("density and diagonal have no effect",)),
        (lambda: jaxalign.measures.rdm(X, RBF(7.0, diagonal="include")), ("density and diagonal have no effect",)),
        (lambda: jaxalign.rbf_affinity(X, sigma=2.0, density=0.1), ("density=0.1 has no effect with sigma=2.0",)),
        (lambda: jaxalign.rbf_affinity(X, sigma=2.0, diagonal="exclude"), ("diagonal='exclude' has no effect",)),
        (lambda: jaxalign.affinity_operator(X, sigma=2.0, density=0.1), ("density=0.1 has no effect",)),
        (lambda: jaxalign.normalized_cut(X, 2, sigma=2.0, density=0.1), ("density=0.1 has no effect",)),
        (lambda: jaxalign.losses.alignment_loss(X, OTHER, temperature=0.2), ("temperature=0.2 is an option of",)),
        (
            lambda: jaxalign.losses.alignment_loss(X, OTHER, kernel=RBF(2.0), stop_gradient_sigma=True),
            ("stop_gradient_sigma=True has no effect",),
        ),
    ],
)
def test_an_option_without_effect(call, words):
    with refused(ValueError, *words):
        call()


def test_ways_to_compute_that_a_measure_does_not_have():
    mesh = jaxalign.sharding.data_mesh(2)
    with refused(TypeError, "measure 'cca' is computed on one device", "leave out plan="):
        jaxalign.compare(X, OTHER, "cca", plan=Plan(mesh=mesh))
    with refused(TypeError, "measure 'cca' is computed on one device", "leave out plan="):
        jaxalign.compare_grid({"a": X, "b": OTHER}, measure="cca", plan=Plan(mesh=mesh))
    for comparison in ("spearman", "kendall"):
        with refused(ValueError, "rsa sorts the values of all pairs on a single device", "pearson"):
            jaxalign.compare_grid({"a": X, "b": OTHER}, measure="rsa", comparison=comparison, plan=Plan(mesh=mesh))
        with refused(ValueError, "rsa sorts the values of all pairs on a single device", "pearson"):
            of_parts = partial(jaxalign.measures.rsa, comparison=comparison, plan=Plan(axis_name="data"))
            jax.vmap(of_parts, axis_name="data")(X.reshape(2, 12, -1), OTHER.reshape(2, 12, -1))


@pytest.mark.parametrize("sigma", [1e300, 1e-300])
def test_a_number_that_the_dtype_of_the_features_cannot_hold_is_refused(sigma):
    x = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match=re.escape(f"sigma = {sigma} is beyond the range of float32")):
        jaxalign.mean_density(x, sigma=sigma)
