"""The calls themselves: one name, order and default for one thing, and no option without effect."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign import alignment, kernels, losses, measures, sharding, streaming
from jaxalign.measures import REGISTRY

RNG = np.random.default_rng(0)
X, NOISE = (RNG.normal(size=(24, 6)).astype(np.float32) for _ in "xy")
Y = np.tanh(X[:, :5]) + 0.5 * NOISE[:, :5]
MASK = np.arange(24) < 22
KEY = jax.random.key(1)

FUNCTIONS = {
    **{name: value for name, value in vars(jaxalign).items() if inspect.isfunction(value)},
    **{name: value for name, value in vars(measures).items() if inspect.isfunction(value)},
    "alignment_loss": losses.alignment_loss,
    "multi_layer_loss": losses.multi_layer_loss,
    "token_loss": losses.token_loss,
    "decorrelation_loss": losses.decorrelation_loss,
    "stop_schedule": losses.stop_schedule,
    "gradient_cosine": losses.gradient_cosine,
    "monitor": losses.monitor,
    "farthest_points": alignment.farthest_points,
    "streaming.solve_sigma": streaming.solve_sigma,
    "streaming.mean_density": streaming.mean_density,
    "data_mesh": sharding.data_mesh,
    "shard_rows": sharding.shard_rows,
}
# What visits pairs of samples, in tiles and over devices.
VISITS_PAIRS = {
    "solve_sigma", "mean_density", "affinity_operator", "reduce_pairs", "normalized_cut", "compare_grid",
    "alignment_loss", "token_loss", "scaling_curve",
    "streaming.solve_sigma", "streaming.mean_density", "cka", "hsic", "rsa", "distance_correlation",
    "affinity_distance",
    "mutual_knn", "jaccard", "cknna", "nearest_neighbors", "segment_channels",
}  # fmt: skip
# Other words for what has a name of its own: the name.
SYNONYMS = {
    "components": "num_components", "n_components": "num_components", "rdm": "metric", "dissimilarity": "metric",
    "distance": "metric", "compare": "comparison", "memory": "queue", "rate": "gamma", "n_landmarks": "landmarks",
    "weights_mask": "mask", "valid": "mask", "rng": "key", "random_state": "key", "tol": "rtol",
}  # fmt: skip
# Defaults that differ, and why.
DEFAULTS = {
    "density": {"align": "tuned for decorrelated rows", "match": "tuned for kernel CCA"},
    "kernel": {"minibatch_cka": "a bandwidth per batch would differ from batch to batch"},
    "landmarks": {"color_images": "all patches would take n^2"},
    "measure": {"noise_ceiling": "named after the representational similarity of subjects"},
    "metric": {
        "correspondence": "rows of affinities are compared by their shape",
        "rdm": "as published", "rsa": "as published",
    },
    "num_components": {"rgb": "the leading ones of a cut", "fit_colors": "the leading ones of a cut",
                       "color_images": "fine grids show details", "svcca": "a fraction of the variance"},
    "result": {
        "shape_distance": "as published", "affinity_distance": "two norms", "procrustes": "two norms",
        "cca": "of correlations", "svcca": "of correlations",
    },
    "method": {"normalized_cut": "by size", "rgb": "of colors", "fit_colors": "of colors", "color_images": "of colors",
               "match": "of assignments"},
    "alpha": {"shape_distance": "as published"},
    "key": {"permutation_test": "is required", "bootstrap": "is required", "paired_difference": "is required",
            "scaling_curve": "is required"},
}  # fmt: skip


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("name", FUNCTIONS)
def test_at_most_three_arguments_by_position(name):
    by_position = [p for p in parameters(FUNCTIONS[name]).values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(by_position) <= 3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_option_says_how_pairs_are_visited(name):
    names = set(parameters(FUNCTIONS[name]))
    assert ("plan" in names) == (name in VISITS_PAIRS)
    if name not in ("data_mesh", "shard_rows"):
        assert not names & {"tile_size", "mesh", "axis_name"}


@pytest.mark.parametrize("name", REGISTRY)
def test_measures_agree_on_their_arguments(name):
    names = list(parameters(REGISTRY[name].function))
    last = ["mask", "missing", "plan"] if name in VISITS_PAIRS else ["mask", "missing"]
    assert names[:2] == ["x", "y"]
    assert names[-len(last) :] == last


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_word_for_one_thing(name):
    for option in parameters(FUNCTIONS[name]):
        assert option not in SYNONYMS, f"{option} is called {SYNONYMS[option]}"


def test_one_default_for_one_option():
    for option in {option for function in FUNCTIONS.values() for option in parameters(function)}:
        found = {
            name: parameters(function)[option].default
            for name, function in FUNCTIONS.items()
            if option in parameters(function) and parameters(function)[option].kind is inspect.Parameter.KEYWORD_ONLY
        }
        known = DEFAULTS.get(option, {}) | {"data_mesh": "makes one", "shard_rows": "names one"}
        values = {repr(value) for name, value in found.items() if name not in known and value is not inspect._empty}
        assert len(values) <= 1, (option, found)


# --- every option does something -------------------------------------------------------------------------------------


def sums(result):
    """A few numbers that tell two results apart."""
    return [float(np.sum(np.asarray(leaf, np.float64) * np.cos(np.arange(np.size(leaf)).reshape(np.shape(leaf)))))
            for leaf in jax.tree.leaves(result) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.number)]  # fmt: skip


def differ(a, b):
    a, b = sums(a), sums(b)
    return len(a) != len(b) or not np.allclose(a, b, rtol=1e-6, atol=1e-7)


RBF = kernels.RBF
# Of each function: a call, and for every option of its signature another value. What only says how a value is computed
# (plan, precision, rtol, throw, missing, progress) has tests of its own.
HOW = {"plan", "precision", "rtol", "throw", "missing", "positions"}
PAIRS = {
    "rbf_affinity": (
        lambda **kw: jaxalign.rbf_affinity(X, **kw),
        {"y": X[:9], "sigma": 2.0, "density": 0.2, "diagonal": "exclude", "bandwidth": "per_row",
         "zero_diagonal": True, "mask": MASK},
    ),
    "solve_sigma": (
        lambda **kw: jaxalign.solve_sigma(X, **kw).sigma,
        {"y": X[:9], "density": 0.2, "diagonal": "exclude", "bandwidth": "per_row", "mask": MASK},
    ),
    "mean_density": (
        lambda **kw: jaxalign.mean_density(X, **{"sigma": 2.0, **kw}),
        {"y": X[:9], "sigma": 3.0, "diagonal": "exclude", "mask": MASK},
    ),
    "affinity_operator": (
        lambda **kw: jaxalign.affinity_operator(X, **kw).sum(-1),
        {"y": X[:9], "sigma": 2.0, "density": 0.2, "diagonal": "exclude", "bandwidth": "per_row",
         "zero_diagonal": True, "mask": MASK},
    ),
    "reduce_pairs": (
        lambda **kw: jaxalign.reduce_pairs(jnp.sqrt, X, **kw),
        {"y": X[:9], "values": X[:, 0], "per_row": True, "self_pairs": True, "mask": MASK},
    ),
    "squared_distances": (lambda **kw: jaxalign.squared_distances(X, **kw), {"y": X[:9]}),
    "align": (
        lambda **kw: jaxalign.align({"x": X}, **{"landmarks": 9, **kw}).features,
        {"landmarks": 8, "key": KEY, "density": 0.5, "diagonal": "exclude", "channels": "whiten", "decorrelate": 0.3,
         "standardize": False},
    ),
    "joint_affinity": (
        lambda **kw: jaxalign.joint_affinity([X, X + NOISE], **kw),
        {"density": 0.2, "diagonal": "exclude", "bandwidth": "per_row"},
    ),
    "correspondence": (
        lambda **kw: jaxalign.correspondence(X, X + NOISE, **kw).rank, {"metric": "euclidean", "csls": 3},
    ),
    "normalized_cut": (
        lambda **kw: jaxalign.normalized_cut(X, **{"num_components": 3, "density": 0.2, **kw}).eigenvectors,
        {"num_components": 4, "density": 0.3, "diagonal": "exclude", "bandwidth": "per_row", "mask": MASK,
         "method": "nystroem"},
    ),
    "rgb": (
        lambda **kw: jaxalign.rgb(X, **kw), {"num_components": 3, "like": X[:, ::-1], "quantile": 0.1},
    ),
    "alignment_loss": (
        lambda **kw: losses.alignment_loss(X, Y, **kw),
        {"measure": "affinity", "kernel": RBF(density=0.3), "mask": MASK,
         "queue": losses.FeatureQueue.empty(9, 6, 5).push(NOISE[:9], Y[:9])},
    ),
    "alignment_loss infonce": (
        lambda **kw: losses.alignment_loss(X, Y, "infonce", **kw),
        {"kernel": RBF(3.0), "landmarks": 9, "temperature": 0.3, "reduction": "sum", "mask": MASK},
    ),
    "alignment_loss gradients": (
        lambda **kw: jax.grad(lambda both: losses.alignment_loss(*both, **kw))((X, Y)),
        {"stop_gradient_target": False, "stop_gradient_sigma": True},
    ),
    "cka": (
        lambda **kw: measures.cka(X, Y, **kw),
        {"kernel": "linear", "estimator": "biased", "result": "angular", "mask": MASK},
    ),
    "cka of channels": (lambda **kw: measures.cka(X, Y, **{"kernel": "linear", **kw}), {"sampled_channels": True}),
    "kernels.RBF": (
        lambda **kw: measures.cka(X, Y, RBF(**kw)), {"sigma": 3.0, "density": 0.2, "diagonal": "include"},
    ),
    "kernels.Laplacian": (
        lambda **kw: measures.cka(X, Y, kernels.Laplacian(**kw)),
        {"sigma": 3.0, "density": 0.2, "diagonal": "include"},
    ),
    "hsic": (lambda **kw: measures.hsic(X, Y, **kw), {"kernel": "laplacian", "estimator": "lange", "mask": MASK}),
    "rsa": (
        lambda **kw: measures.rsa(X, Y, **kw), {"metric": RBF(3.0), "comparison": "cosine", "mask": MASK},
    ),
    "rdm": (lambda **kw: measures.rdm(X, **kw), {"metric": "rbf", "mask": MASK}),
    "distance_correlation": (
        lambda **kw: measures.distance_correlation(X, Y, **kw),
        {"estimator": "biased", "squared": True, "mask": MASK},
    ),
    "affinity_distance": (
        lambda **kw: measures.affinity_distance(X, Y, **kw),
        {"kernel": "laplacian", "result": "rows", "mask": MASK},
    ),
    "mutual_knn": (
        lambda **kw: measures.mutual_knn(X, Y, **kw), {"k": 3, "metric": "euclidean", "mask": MASK},
    ),
    "jaccard": (lambda **kw: measures.jaccard(X, Y, **kw), {"k": 3, "metric": "euclidean", "mask": MASK}),
    "cknna": (lambda **kw: measures.cknna(X, Y, **kw), {"k": 3, "mask": MASK}),
    "nearest_neighbors": (
        lambda **kw: measures.nearest_neighbors(X, **kw), {"k": 3, "metric": "euclidean", "mask": MASK},
    ),
    "procrustes": (
        lambda **kw: measures.procrustes(X, Y, **kw), {"result": "angular", "normalize": False, "mask": MASK},
    ),
    "shape_distance": (
        lambda **kw: measures.shape_distance(X, Y, **kw), {"alpha": 0.5, "result": "distance", "mask": MASK},
    ),
    "shape_distance not angular": (
        lambda **kw: measures.shape_distance(X, Y, **{"result": "distance", **kw}), {"normalize": False},
    ),
    "cca": (lambda **kw: measures.cca(X, Y, **kw), {"result": "mean_squared", "mask": MASK}),
    "pwcca": (lambda **kw: measures.pwcca(X, Y, **kw), {"mask": MASK}),
    "svcca": (lambda **kw: measures.svcca(X, Y, **kw), {"num_components": 2, "result": "mean_squared", "mask": MASK}),
    "linear_predictivity": (
        lambda **kw: measures.linear_predictivity(X, Y, **kw), {"folds": 3, "strengths": (1.0,), "mask": MASK},
    ),
    "minibatch_cka": (lambda **kw: measures.minibatch_cka([(X, Y)], **kw), {"kernel": "rbf"}),
}  # fmt: skip
# Options that need another to have an effect, and the row of `PAIRS` that has it; or where they are tested.
ELSEWHERE = {
    ("rbf_affinity", "mask_y"), ("solve_sigma", "mask_y"), ("mean_density", "mask_y"), ("affinity_operator", "mask_y"),
    ("reduce_pairs", "mask_y"), ("mean_density", "bandwidth"), ("align", "bandwidth"),
    ("normalized_cut", "kind"), ("normalized_cut", "sigma"), ("normalized_cut", "landmarks"), ("normalized_cut", "key"),
    ("normalized_cut", "repulsion"), ("rgb", "method"), ("rgb", "seed"),
}  # fmt: skip
DATA = {"x", "y", "features", "fn", "a", "b", "alignment", "embedding", "batches"}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, (_, others) in PAIRS.items() for option in others]
)
def test_an_option_changes_the_result(name, option):
    call, others = PAIRS[name]
    if (name, option) == ("reduce_pairs", "self_pairs"):  # sqrt(0) = 0: of another function
        cauchy = lambda d: 1 / (1 + d)  # noqa: E731
        both = [jaxalign.reduce_pairs(cauchy, X, self_pairs=own) for own in (True, False)]
    else:
        both = [call(), call(**{option: others[option]})]
    assert differ(*both)


def test_every_option_has_a_row():
    covered = {(name.split()[0], option) for name, (_, others) in PAIRS.items() for option in others}
    for name in {name.split()[0] for name in PAIRS} - {"kernels.RBF", "kernels.Laplacian"}:
        for option in parameters(FUNCTIONS[name]):
            if option not in HOW | (DATA - {"y"} if (name, "y") in covered else DATA):
                assert (name, option) in covered | ELSEWHERE, f"{option} of {name} is not in the table"
