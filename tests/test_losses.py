"""Alignment losses: the formulas, their gradients, every way to compute them, and batches that hold next to nothing."""

from __future__ import annotations

from functools import partial

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign import Plan, losses, measures, sharding
from jaxalign.kernels import RBF
from jaxalign.losses import FeatureQueue, alignment_loss, multi_layer_loss

N = 32
MEASURES = ("cka", "affinity", "kl", "infonce")
WITHOUT_KERNEL = ("gram", "distances", "angles", "procrustes")
every_measure = pytest.mark.parametrize("measure", MEASURES)
by_pairs = pytest.mark.parametrize("measure", MEASURES[:3])
by_sample = pytest.mark.parametrize("measure", MEASURES[1:])


def sets(n=N, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    return x, np.tanh(x @ rng.normal(size=(4, 6))) + 0.3 * rng.normal(size=(n, 6))


def loss(measure, *, sigma=None, density=0.2, diagonal="exclude", **options):
    if measure in WITHOUT_KERNEL:
        return partial(alignment_loss, measure=measure, **options)
    kernel = RBF(density=density, diagonal=diagonal) if sigma is None else RBF(sigma)
    return partial(alignment_loss, measure=measure, kernel=kernel, **options)


# Every option once or twice, as each case compiles for seconds; the reference has no fixed sigma of infonce.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "options"),
    [
        *((measure, {}) for measure in (*MEASURES, *WITHOUT_KERNEL)),
        ("cka", {"stop_gradient_sigma": True}),
        ("kl", {"diagonal": "include", "stop_gradient_sigma": True}),
        ("infonce", {"diagonal": "include"}),
    ],
    ids=str,
)
def test_values_and_gradients_agree_with_torch(x64, measure, options):
    torch = pytest.importorskip("torch")
    import reference_losses

    x, y = sets()
    fixed = {"fixed_sigma": options.get("stop_gradient_sigma", False)}
    more = {"landmarks": 12} if measure == "infonce" else {}
    tx, ty = (torch.tensor(a, requires_grad=True) for a in (x, y))
    diagonal = {key: value for key, value in options.items() if key == "diagonal"}
    each = reference_losses.loss_of(tx, ty, measure=measure, density=0.2, **diagonal, **fixed, **more)
    each.mean().backward()
    ours = loss(measure, stop_gradient_target=False, **options, **more)
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, y)
    helpers.assert_close(value, each.mean().item(), 1e-10)
    for gradient, expected in zip(gradients, (tx.grad, ty.grad), strict=True):
        helpers.assert_close(gradient, expected.numpy(), 1e-9)
    if measure not in ("cka", "procrustes"):
        found = np.asarray(jax.jit(loss(measure, reduction="none", **options, **more))(x, y))
        helpers.assert_close(found[: len(each)], each.detach().numpy(), 1e-10)
        assert (found[len(each) :] == 0).all()  # landmarks


def test_cka_and_affinity_are_those_of_the_measures(x64):
    x, y = sets()
    helpers.assert_close(loss("cka")(x, y), 1 - measures.cka(x, y, kernel=RBF(density=0.2)), 1e-12)
    helpers.assert_close(loss("affinity")(x, y), measures.affinity_distance(x, y, kernel=RBF(density=0.2)) ** 2, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [*MEASURES[:3], *WITHOUT_KERNEL])
def test_equal_geometry_costs_nothing(x64, measure):
    x, _ = sets()
    turned = 3.7 * x @ np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0] + (0 if measure == "gram" else 5)
    value, gradient = jax.jit(jax.value_and_grad(loss(measure)))(turned, x)
    assert abs(float(value)) < 1e-12
    assert float(jnp.abs(gradient).max()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("measure", [*MEASURES, *WITHOUT_KERNEL])
def test_unrelated_sets_cost_more_than_related_ones(measure):
    x, y = (a.astype(np.float32) for a in sets())
    unrelated = np.random.default_rng(5).normal(size=(N, 4)).astype(np.float32)
    of = jax.jit(loss(measure))
    assert of(unrelated, y) > of(x, y) > of(y, y) - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cka", "kl", *WITHOUT_KERNEL])
def test_tiles_and_masks_and_batches_give_the_same(x64, measure):
    x, y = sets(23)
    value, gradient = jax.jit(jax.value_and_grad(loss(measure)))(x, y)
    tiled = jax.jit(jax.value_and_grad(loss(measure, plan=Plan(6))))(x, y)
    padded = [np.concatenate([a, np.full((4, a.shape[1]), 7.0)]) for a in (x, y)]
    masked = jax.jit(jax.value_and_grad(loss(measure, mask=np.arange(27) < 23)))(*padded)
    batched = jax.jit(loss(measure))(np.stack([x, x]), np.stack([y, 2 * y]))
    for found in (tiled, (masked[0], masked[1][:23]), (batched[1], gradient)):
        helpers.assert_close(found[0], value, 1e-12)
        helpers.assert_close(found[1], gradient, 1e-11)
    assert (np.asarray(masked[1][23:]) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cka", "infonce"])
def test_devices_find_the_loss_of_the_whole_batch(x64, measure):
    x, y = sets()
    options, order = {}, np.arange(N)
    if measure == "infonce":  # each device has its landmarks last
        options = {"landmarks": 4}
        order = np.concatenate([np.arange(N).reshape(4, 8)[:, :4].ravel(), np.arange(N).reshape(4, 8)[:, 4:].ravel()])
    mesh = sharding.data_mesh(4)
    local = jax.shard_map(
        jax.value_and_grad(loss(measure, plan=Plan(axis_name="data"), **options)),
        mesh=mesh,
        in_specs=(P("data", None), P("data", None)),
        out_specs=(P(), P("data", None)),
    )
    found, gradient = jax.jit(local)(x, y)
    whole = {"landmarks": 16} if measure == "infonce" else {}
    value, expected = jax.jit(jax.value_and_grad(loss(measure, **whole)))(x[order], y[order])
    helpers.assert_close(found, value, 1e-12)
    helpers.assert_close(np.asarray(gradient)[order], expected, 1e-11)


def test_devices_have_landmarks_enough_together_for_the_density(x64):
    x, y = sets()
    devices = partial(
        alignment_loss, measure="infonce", reduction="none", kernel=RBF(diagonal="include"), plan=Plan(axis_name="data")
    )
    mesh = sharding.data_mesh(4)

    def each(x, y):
        local = jax.shard_map(devices, mesh=mesh, in_specs=(P("data", None), P("data", None)), out_specs=P("data"))
        return np.asarray(jax.jit(local)(x, y))

    assert (each(x, y).reshape(4, 8) == 0).sum(1).tolist() == [6] * 4
    each(x[:28], y[:28])
    with pytest.raises(ValueError, match=r"with 20 landmarks.* 21 landmarks: a batch of 28 valid samples"):
        each(x[:24], y[:24])


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cka"])
def test_a_mesh_finds_the_same(x64, measure):
    x, y = sets(29)
    found = jax.jit(loss(measure, plan=Plan(tile_size=4, mesh=sharding.data_mesh(4))))(x, y)
    helpers.assert_close(found, loss(measure)(x, y), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [*MEASURES[1:], *WITHOUT_KERNEL[:3]])
def test_reductions(x64, measure):
    x, y = sets()
    mask = np.arange(N) % 5 != 0
    each = np.asarray(loss(measure, reduction="none", mask=mask)(x, y))
    assert (each[~mask] == 0).all()
    real = mask & (each != 0) if measure == "infonce" else mask  # without the landmarks
    helpers.assert_close(loss(measure, mask=mask)(x, y), each[real].mean(), 1e-12)
    helpers.assert_close(loss(measure, reduction="sum", mask=mask)(x, y), each.sum(), 1e-12)


def test_the_target_stays_unless_told_otherwise(x64):
    x, y = sets()
    assert (np.asarray(jax.grad(loss("cka"), argnums=1)(x, y)) == 0).all()
    assert np.abs(jax.grad(loss("cka", stop_gradient_target=False), argnums=1)(x, y)).max() > 1e-4


@pytest.mark.slow
@by_pairs
def test_the_scale_has_no_gradient_unless_sigma_is_fixed(x64, measure):
    x, y = sets()
    both = (jax.jit(jax.value_and_grad(loss(measure, stop_gradient_sigma=fixed)))(x, y) for fixed in (False, True))
    (value, free), (same, fixed) = both
    assert abs(np.sum(free * x)) < 1e-12 < 1e-5 < abs(np.sum(fixed * x))
    helpers.assert_close(same, value, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cka", "infonce"])
def test_second_derivatives(x64, measure):
    x, y = sets(20)
    helpers.check_derivatives(
        lambda both: loss(measure, stop_gradient_target=False)(*both), (x, y), np.random.default_rng(0)
    )


# --- batches that hold next to nothing --------------------------------------------------------------------------------

CASES = {
    "constant": lambda x: np.ones_like(x),
    "four kinds": lambda x: np.repeat(x[: N // 8], 8, 0),
    "half of them equal": lambda x: np.where(np.arange(N)[:, None] < N // 2, x[:1], x),
    "tiny": lambda x: 1e-18 * x,
    "huge": lambda x: 1e15 * x + 1e16,
}


@pytest.mark.slow
@pytest.mark.parametrize("measure", [*MEASURES, *WITHOUT_KERNEL])
def test_degenerate_batches_have_finite_values_and_derivatives(measure):
    @jax.jit
    def derivatives(x, y):
        f = loss(measure, density=0.1)
        gradient = jax.grad(f)
        if measure == "procrustes":  # once differentiable
            return f(x, y), gradient(x, y)
        return f(x, y), gradient(x, y), jax.jvp(gradient, (x, y), (x, y))[1]

    for case, changed in CASES.items():
        for side in (0, 1):
            both = list(sets())
            both[side] = changed(both[side])
            for found in derivatives(*(a.astype(np.float32) for a in both)):
                assert np.isfinite(found).all(), (case, side)


@pytest.mark.slow
@every_measure
def test_where_all_samples_are_alike_nothing_moves(measure):
    _, y = (a.astype(np.float32) for a in sets())
    value, gradient = jax.jit(jax.value_and_grad(loss(measure)))(jnp.ones((N, 4)), y)
    assert (np.asarray(gradient) == 0).all()
    assert value > 0.1
    if measure == "cka":
        assert float(value) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("measure", [*MEASURES, *WITHOUT_KERNEL])
def test_a_mask_that_leaves_too_few_costs_nothing(measure):
    x, y = (a.astype(np.float32) for a in sets())
    both = jax.jit(jax.value_and_grad(lambda x, mask: loss(measure)(x, y, mask=mask)))
    for real in range(losses._alignment._MIN_SAMPLES[measure]):
        value, gradient = both(x, jnp.arange(N) < real)
        assert np.isfinite(value)
        assert float(jnp.abs(gradient).max()) < 1e-14  # the distance of two samples is their mean, but for rounding


@pytest.mark.slow
@every_measure
def test_few_samples_and_half_precision(measure):
    x, y = (jnp.asarray(a[:4], jnp.bfloat16) for a in sets())
    options = {"diagonal": "exclude", **({"landmarks": 2} if measure == "infonce" else {})}
    value, gradient = jax.jit(jax.value_and_grad(loss(measure, **options)))(x, y)
    assert np.isfinite(value)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    assert np.isfinite(gradient.astype(np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["affinity", "infonce"])
def test_padding_changes_nothing(x64, measure):
    x, y = sets(40)
    mask = np.concatenate([np.ones(13), np.zeros(5), np.ones(27), np.zeros(19)]) > 0
    padded = [np.full((len(mask), a.shape[1]), 7.0) for a in (x, y)]
    for one, real in zip(padded, (x, y), strict=True):
        one[mask] = real
    value, gradient = jax.jit(jax.value_and_grad(loss(measure, mask=mask)))(*padded)
    expected, expected_gradient = jax.jit(jax.value_and_grad(loss(measure)))(x, y)
    helpers.assert_close(value, expected, 1e-12)
    helpers.assert_close(np.asarray(gradient)[mask], expected_gradient, 1e-11)
    assert (np.asarray(gradient)[~mask] == 0).all()
    if measure != "cka":
        each = np.asarray(jax.jit(loss(measure, mask=mask, reduction="none"))(*padded))
        helpers.assert_close(each[mask], jax.jit(loss(measure, reduction="none"))(x, y), 1e-12)
        assert (each[~mask] == 0).all()


@pytest.mark.slow
def test_nan_is_not_hidden():
    x, y = (a.astype(np.float32) for a in sets())
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"x has nan or inf.*row 3.*mask="):
        loss("kl")(x, y)
    for measure in MEASURES:
        assert np.isnan(jax.jit(loss(measure))(x, y))


# --- queue -----------------------------------------------------------------------------------------------------------


def test_a_memory_keeps_the_last_samples(x64):
    queue = FeatureQueue.empty(10, 4, 6, jnp.float64)
    batches = [sets(4, seed) for seed in range(4)]
    for x, y in batches:
        queue = queue.push(x, y)
    assert queue.valid.all()
    every = np.concatenate([x for x, _ in batches])
    assert set(map(tuple, np.asarray(queue.x))) == set(map(tuple, every[-10:]))
    np.testing.assert_array_equal(np.asarray(queue.y)[np.asarray(queue.x[:, 0]) == every[-1, 0]], batches[-1][1][-1:])
    x, y = sets(23)
    queue = queue.push(x, y, np.arange(23) != 20)
    assert set(map(tuple, np.asarray(queue.x)[queue.valid])) == set(map(tuple, np.delete(x, 20, 0)[-9:]))


@pytest.mark.slow
@every_measure
def test_remembered_samples_count_but_do_not_move(x64, measure):
    (x, y), (past_x, past_y) = sets(12), sets(20, 1)
    queue = FeatureQueue.empty(25, 4, 6, jnp.float64).push(past_x, past_y)
    value, gradient = jax.jit(jax.value_and_grad(loss(measure)))(x, y, queue=queue)
    whole = np.concatenate([x, past_x]), np.concatenate([y, past_y])
    options = {"landmarks": 20} if measure == "infonce" else {}

    def expected(x):
        both = jnp.concatenate([x, past_x]), whole[1]
        if measure == "cka":
            return loss(measure)(*both)
        return jnp.mean(loss(measure, reduction="none", **options)(*both)[:12])

    of_all, slopes = jax.jit(jax.value_and_grad(expected))(x)
    helpers.assert_close(value, of_all, 1e-12)
    helpers.assert_close(gradient, slopes, 1e-11)


@pytest.mark.slow
def test_a_batch_too_small_for_a_density_with_the_diagonal_needs_a_queue():
    x, y = (a.astype(np.float32) for a in sets(16))
    include = RBF(diagonal="include")
    with pytest.raises(ValueError, match=r"n = 16.*at least 21 samples"):
        jax.jit(partial(alignment_loss, kernel=include))(x, y)
    queue = FeatureQueue.empty(64, 4, 6).push(*(a.astype(np.float32) for a in sets(40, 1)))
    value, gradient = jax.jit(jax.value_and_grad(partial(alignment_loss, kernel=include)))(x, y, queue=queue)
    assert 0 < value < 1
    assert np.abs(gradient).max() > 0
    # An empty one leaves the batch alone: no sigma, a loss that says nothing, and no step.
    step = jax.jit(jax.value_and_grad(partial(alignment_loss, kernel=include)))
    value, gradient = step(x, y, queue=FeatureQueue.empty(64, 4, 6))
    assert value == 1
    assert (np.asarray(gradient) == 0).all()
    for measure in MEASURES:  # the first step of a loop, compiled or not
        step = partial(alignment_loss, measure=measure, queue=FeatureQueue.empty(64, 4, 6))
        assert np.isfinite(step(x, y))
        np.testing.assert_allclose(step(x, y), jax.jit(step)(x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("measure", "n"), [("cka", 32), ("infonce", 23)])
def test_ordinary_batches_work_with_the_default_density(measure, n):
    x, y = (a.astype(np.float32) for a in sets(n))
    value, gradient = jax.value_and_grad(partial(alignment_loss, measure=measure))(x, y)
    assert value > 0
    assert np.abs(gradient).max() > 0


@pytest.mark.slow
@every_measure
def test_small_batches_work_without_the_diagonal(measure):
    x, y = (a.astype(np.float32) for a in sets(8))
    value, gradient = jax.jit(jax.value_and_grad(partial(alignment_loss, measure=measure)))(x, y)
    assert value > 0
    assert np.abs(gradient).max() > 0


@pytest.mark.slow
def test_infonce_takes_half_of_the_batch_as_landmarks_or_as_many_as_the_density_needs(x64):
    def count(n, density=0.05, diagonal="include", queue=None):
        least = losses._contrast._min_landmarks(jnp.zeros((n, 4)), RBF(density=density, diagonal=diagonal))
        return losses._contrast._num_landmarks(None, n, queue, least, 1)

    assert [count(n) for n in (60, 42, 41, 32, 23)] == [30, 21, 21, 21, 21]
    assert [count(n, diagonal="exclude") for n in (60, 32, 8)] == [30, 16, 4]
    assert (count(32, 0.2), count(32, 0.04)) == (16, 26)
    assert (count(32, queue=FeatureQueue.empty(8, 4, 6)), count(32, queue=FeatureQueue.empty(64, 4, 6))) == (21, 64)
    include = RBF(diagonal="include")
    each = np.asarray(alignment_loss(*sets(), measure="infonce", kernel=include, reduction="none"))
    assert ((each == 0) == (np.arange(N) >= N - 21)).all()


@pytest.mark.slow
def test_a_padded_batch_of_infonce_has_the_landmarks_of_the_batch_without_padding(x64):
    x, y = sets(27)
    padded = [np.concatenate([np.full((5, a.shape[1]), 7.0), a]) for a in (x, y)]
    found = alignment_loss(*padded, measure="infonce", mask=np.arange(32) >= 5)
    helpers.assert_close(found, alignment_loss(x, y, measure="infonce"), 1e-12)


# What is said of too few landmarks, and the ways out that it names, each of which works.
TOO_FEW = {
    "a small batch": (16, {}, 14),
    "a mask": (32, {"mask": np.arange(32) < 20}, 13),
    "landmarks": (32, {"landmarks": 8}, 8),
    "a small queue": (6, {"queue": 5}, 9),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TOO_FEW)
def test_too_few_landmarks_are_named_with_ways_out_that_work(case):
    n, options, found = TOO_FEW[case]
    x, y = (a.astype(np.float32) for a in sets(n))
    options = {"measure": "infonce", "kernel": RBF(diagonal="include"), **options}
    if "queue" in options:
        options["queue"] = FeatureQueue.empty(5, 4, 6).push(x, y)
    words = rf'density = 0\.05 cannot be reached with {found} landmarks, .*"infonce".*diagonal="exclude".* a density '
    words += r"above that, .* 21 landmarks: a batch of 23 valid samples without landmarks=, or a queue of 21\.$"
    with pytest.raises(ValueError, match=words):
        alignment_loss(x, y, **options)

    def works(n, **options):  # which is known once it is traced
        jax.eval_shape(partial(alignment_loss, **options), *(a.astype(np.float32) for a in sets(n)))

    for kernel in (RBF(), RBF(density=1.01 / found, diagonal="include")):
        works(n, **{**options, "kernel": kernel})
    whole = {name: value for name, value in options.items() if name not in ("mask", "landmarks")}
    works(23, **whole)
    works(n, **{**whole, "queue": FeatureQueue.empty(21, 4, 6)})


# --- layers, training -------------------------------------------------------------------------------------------------


def test_layers_are_weighed(x64):
    x, y = sets()
    a, b = {"one": x, "two": y}, {"one": y, "two": y}
    total, each = multi_layer_loss(a, b, loss=loss("kl"), weights={"one": 3.0, "two": 1.0})
    helpers.assert_close(each["one"], loss("kl")(x, y), 1e-12)
    helpers.assert_close(total, 0.75 * each["one"] + 0.25 * each["two"], 1e-12)
    assert list(multi_layer_loss(a, b, loss=loss("kl"), weights={"two": 1.0})[1]) == ["two"]


def test_training_aligns_and_never_compiles_again():
    x, y = (a.astype(np.float32) for a in sets(48))
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32))
    optimiser = optax.sgd(0.5, 0.9)  # adam promotes dtypes implicitly, which these tests forbid

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(weights, state, queue, x, y, mask):
        def of(weights):
            return alignment_loss(
                jnp.tanh(x @ weights), y, queue=queue, mask=mask, kernel=RBF(density=0.2, diagonal="exclude")
            )

        value, gradient = jax.value_and_grad(of)(weights)
        updates, state = optimiser.update(gradient, state)
        queue = queue.push(jnp.tanh(x @ weights), y, mask)
        return optax.apply_updates(weights, updates), state, queue, value

    state, queue, values = optimiser.init(weights), FeatureQueue.empty(32, 4, 6), []
    for k in range(60):
        rows = np.arange(k * 20, k * 20 + 20) % 48
        mask = np.arange(20) < (20 if k % 3 else 17)  # a padded batch now and then
        weights, state, queue, value = step(weights, state, queue, x[rows], y[rows], mask)
        values.append(float(value))
    assert np.mean(values[-10:]) < 0.6 * np.mean(values[:10])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input():
    x, y = (a.astype(np.float32) for a in sets())
    queue = FeatureQueue.empty(8, 4, 6)
    bad = [
        (lambda: alignment_loss(x, y, measure="ckaa"), "measure must be one of 'cka', 'affinity'"),
        (lambda: alignment_loss(x, y[:9]), "32 and 9 rows"),
        (lambda: alignment_loss(x, y, reduction="none"), "'cka' is one number"),
        (lambda: alignment_loss(x, y, reduction="avg"), "reduction must be one of"),
        (lambda: alignment_loss(x, y, kernel=RBF(density=0.01, diagonal="include")), "at least 101 samples"),
        (lambda: alignment_loss(x[:3], y[:3]), "at least 4 samples"),
        (lambda: alignment_loss(x, y, landmarks=4), 'landmarks=4 is an option of measure="infonce"'),
        (lambda: loss("infonce", landmarks=31)(x, y), "from 2 to n - 2 = 30"),
        (lambda: loss("infonce", temperature=0.0)(x, y), "temperature must be finite and above 0"),
        (lambda: loss("infonce", plan=Plan(mesh=sharding.data_mesh(2)))(x, y), "does not support a mesh"),
        (lambda: alignment_loss(y, y, queue=queue), "x has 6 features, but the queue has 4"),
        (lambda: alignment_loss(x[None], y[None], queue=queue), r"a single batch of shape \(n, d\)"),
        (lambda: alignment_loss(x.astype(str), y), "x must hold real numbers"),
        (lambda: FeatureQueue.empty(0, 4, 6), "capacity must be a whole number"),
        (lambda: queue.push(y, y), r"x must have shape \(n, 4\)"),
        (lambda: multi_layer_loss({"a": x}, {"b": y}), r"not in both: \['a', 'b'\]"),
        (lambda: multi_layer_loss({"a": x}, {"a": y}, weights={"b": 1.0}), r"x does not have: \['b'\]"),
        (lambda: multi_layer_loss({"a": x}, {"a": y}, weights={"a": 0.0}), "not all 0"),
    ]
    for call, message in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_the_memory_is_a_pytree():
    queue = FeatureQueue.empty(8, 4, 6)
    assert isinstance(jax.tree.map(lambda a: a, queue), FeatureQueue)


def test_a_batch_too_small_for_the_density_is_an_error_under_jit_and_with_a_mask():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
    loss = jax.jit(lambda x, mask: alignment_loss(x, x[:, ::-1], kernel=RBF(diagonal="include"), mask=mask))
    with pytest.raises(ValueError, match="cannot be reached with n = 16 samples"):
        loss(x, jnp.ones(16, bool))


@pytest.mark.usefixtures("unchecked_types")
def test_layers_need_names():
    x = jnp.ones((8, 3))
    with pytest.raises(TypeError, match="x must be features by name"):
        multi_layer_loss([x], [x])
