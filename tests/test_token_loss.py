"""Losses of tokens, decorrelation, schedules and the monitor: formulas, gradients, grids, masks, bad input."""

from __future__ import annotations

from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import losses, measures, plots
from jaxalign.kernels import RBF
from jaxalign.losses import GradientAgreement, Projector, alignment_loss, decorrelation_loss, token_loss

KEY = jax.random.key(0)


def tokens(batch=3, student=(16, 5), teacher=(16, 7), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, *student))
    y = np.tanh(x @ rng.normal(size=(student[1], teacher[1]))) if student[0] == teacher[0] else None
    return x, rng.normal(size=(batch, *teacher)) if y is None else y + 0.3 * rng.normal(size=y.shape)


# --- relations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["cka", "gram"])
def test_relations_are_those_of_images_or_of_the_batch(x64, measure):
    x, y = tokens()
    kernel = {"kernel": RBF(density=0.2)} if measure == "cka" else {}
    each = np.array([alignment_loss(a, b, measure, **kernel) for a, b in zip(x, y, strict=True)])
    flat = alignment_loss(x.reshape(-1, 5), y.reshape(-1, 7), measure, **kernel)
    helpers.assert_close(token_loss(x, y, measure, reduction="none", **kernel), each, 1e-11)
    helpers.assert_close(token_loss(x, y, measure, **kernel), each.mean(), 1e-11)
    helpers.assert_close(token_loss(x, y, measure, relations="across", **kernel), flat, 1e-11)
    helpers.assert_close(token_loss(x, y, measure, relations="both", **kernel), (each.mean() + flat) / 2, 1e-11)


def test_tokens_maps_and_prefixes_are_the_same(x64):
    x, y = tokens()
    expected = token_loss(x, y, "gram")
    helpers.assert_close(token_loss(x.reshape(3, 4, 4, 5), y, "gram"), expected, 1e-13)
    helpers.assert_close(token_loss(x.reshape(3, 4, 4, 5), y.reshape(3, 4, 4, 7), "gram"), expected, 1e-13)
    prefixed = np.concatenate([np.full((3, 5, 7), 9.0), y], 1)
    helpers.assert_close(token_loss(x, prefixed, "gram", teacher_prefix=5), expected, 1e-13)


def test_the_finer_grid_is_averaged_onto_the_coarser(x64):
    # Each position of the coarse grid is four equal positions of the fine one, smoothed by the triangle of the resize.
    coarse = np.random.default_rng(0).normal(size=(2, 4, 4, 6))
    fine = jax.image.resize(coarse, (2, 8, 8, 6), "nearest")
    resized = jax.image.resize(fine, (2, 4, 4, 6), "linear", antialias=True)
    teacher = np.random.default_rng(1).normal(size=(2, 16, 3))
    expected = token_loss(resized, teacher, "gram")
    helpers.assert_close(token_loss(fine.reshape(2, 64, 6), teacher, "gram"), expected, 1e-12)
    helpers.assert_close(token_loss(teacher, fine.reshape(2, 64, 6), "gram"), expected, 1e-12)  # the teacher is finer
    # 8 x 2 and 4 x 4: neither is finer, so both are averaged onto 4 x 2.
    assert token_loss(fine[:, :, :2], coarse, "gram") > 0
    constant = jnp.ones((2, 64, 6)) * jnp.arange(6.0)[None, None]
    assert np.isfinite(token_loss(constant, teacher, "distances"))


def test_masked_tokens_do_not_count(x64):
    x, y = tokens(batch=2)
    lengths = (16, 9)
    mask = np.arange(16)[None] < np.array(lengths)[:, None]
    each = token_loss(x, y, "gram", mask=mask, reduction="none")
    for k, length in enumerate(lengths):
        helpers.assert_close(each[k], alignment_loss(x[k, :length], y[k, :length], "gram"), 1e-12)
    flat = token_loss(x, y, "gram", relations="across", mask=mask)
    helpers.assert_close(flat, alignment_loss(x[mask], y[mask], "gram"), 1e-12)
    cosine = token_loss(x, y[..., :5], "cosine", mask=mask)
    by_hand = [
        1 - np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        for a, b in ((x[k, :n], y[k, :n, :5]) for k, n in enumerate(lengths))
    ]
    helpers.assert_close(cosine, np.mean([a.mean() for a in by_hand]), 1e-12)


def test_a_known_grid_holds_for_both(x64):
    x, y = tokens()
    expected = token_loss(x, y, "gram")
    for options in ({"student_grid": (2, 8)}, {"teacher_grid": (8, 2)}):
        helpers.assert_close(token_loss(x, y, "gram", **options, mask=np.ones((3, 16), bool)), expected, 1e-12)
    helpers.assert_close(token_loss(x.reshape(3, 8, 2, 5), y, "gram"), expected, 1e-12)


def test_tokens_without_direction_do_not_count(x64):
    x, y = tokens(batch=1)
    dead = x.copy()
    dead[0, [3, 7]] = 0
    rest = np.delete(np.arange(16), [3, 7])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: token_loss(x, y, "gram")))(dead)
    helpers.assert_close(value, alignment_loss(x[0, rest], y[0, rest], "gram"), 1e-12)
    assert np.isfinite(gradient).all()
    # Also those of a queue.
    empty = losses.FeatureQueue.empty(4, 5, 7, x.dtype)
    queued = alignment_loss(x[0], y[0], "gram", queue=empty.push(np.zeros((4, 5)), np.zeros((4, 7))))
    helpers.assert_close(queued, alignment_loss(x[0], y[0], "gram"), 1e-12)
    # Also where a whole image of the teacher is constant, and 0 after normalization.
    flat = jax.jit(jax.value_and_grad(lambda x: token_loss(x, np.ones_like(y), "gram", spatial_norm=True)))(x)
    assert all(np.isfinite(a).all() for a in flat)


def test_a_channel_that_does_not_vary_is_0_after_spatial_norm():
    x, y = (a.astype(np.float32) for a in tokens())
    expected = token_loss(x, y, "gram", spatial_norm=True)
    for value in (0.1, 0.7, 3.3, 1e4):
        dead = np.full((*y.shape[:2], 20), value, np.float32)
        found = token_loss(x, np.concatenate((y, dead), -1), "gram", spatial_norm=True)
        helpers.assert_close(found, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [*losses.MEASURES, "cosine"])
def test_masked_tokens_may_hold_anything(x64, measure):
    x, y = tokens(batch=2, teacher=(16, 5))
    mask = np.arange(16)[None] < np.array([[14], [16]])
    options = {"mask": mask, "measure": measure} | (
        {"kernel": RBF(density=0.3)} if measure in losses.MEASURES[:4] else {}
    )
    value = token_loss(x, y, **options)
    filled = [np.where(mask[..., None], a, np.nan) for a in (x, y)]
    found, gradient = jax.jit(jax.value_and_grad(lambda x, y: token_loss(x, y, **options)))(*filled)
    helpers.assert_close(found, value, 1e-11)
    assert np.isfinite(gradient).all()
    normalized = partial(token_loss, spatial_norm=True, **options)
    helpers.assert_close(normalized(*filled), normalized(x, y), 1e-11)


def test_spatial_norm_removes_what_all_tokens_of_an_image_share(x64):
    x, y = tokens()
    shared = 5 + 10 * np.random.default_rng(3).normal(size=(3, 1, 7))
    wide = np.geomspace(0.1, 10, 7) * y + shared
    expected = (y - y.mean(1, keepdims=True)) / y.std(1, keepdims=True)
    for relations in ("within", "across"):
        found = token_loss(x, wide, "gram", spatial_norm=True, relations=relations)
        helpers.assert_close(found, token_loss(x, expected, "gram", relations=relations), 1e-11)
    mask = np.arange(16)[None] < np.array([16, 9, 12])[:, None]
    filled = np.where(mask[..., None], wide, 1e3)
    by_image = [wide[k, :n] for k, n in enumerate((16, 9, 12))]
    expected = np.mean(
        [
            alignment_loss(x[k, : len(z)], (z - z.mean(0)) / z.std(0), "gram")
            for k, z in enumerate(by_image)
        ]
    )  # fmt: skip
    helpers.assert_close(token_loss(x, filled, "gram", spatial_norm=True, mask=mask), expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cka", "gram", "cosine", "spatial", "resized"])
def test_gradients_are_those_of_finite_differences(x64, case):
    x, y = tokens(batch=2)
    options = {"measure": "gram", "stop_gradient_target": False}
    if case in ("cka", "gram", "cosine"):
        options["measure"] = case
    if case == "cka":
        options["kernel"] = RBF(density=0.2)
    if case == "cosine":
        y = y[..., :5]
    if case == "spatial":
        options["spatial_norm"] = True
    if case == "resized":
        y = y[:, :4]
    helpers.check_derivatives(lambda both: token_loss(*both, **options), (x, y), np.random.default_rng(0))


@pytest.mark.slow
def test_torch_has_the_same(x64):
    torch = pytest.importorskip("torch")
    from jaxalign.interop import torch_losses

    x, y = tokens(teacher=(64, 7))
    tx = torch.tensor(x, requires_grad=True)
    options = {"relations": "both", "spatial_norm": True}
    value = torch_losses.token_loss(tx, torch.tensor(y), "gram", **options)
    value.backward()
    expected, gradient = jax.value_and_grad(partial(token_loss, measure="gram", **options))(x, y)
    helpers.assert_close(value.item(), expected, 1e-12)
    helpers.assert_close(tx.grad.numpy(), gradient, 1e-11)
    helpers.assert_close(torch_losses.decorrelation_loss(torch.tensor(x[0])).item(), decorrelation_loss(x[0]), 1e-12)
    a, b = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 0, 0])
    assert abs(torch_losses.gradient_cosine([a], [b.double()]).item() - 3**-0.5) < 1e-6


@pytest.mark.usefixtures("usual_promotion")
def test_a_projector_learns_the_teacher():
    x, y = (a.astype(np.float32) for a in tokens(batch=4))
    projector = Projector.init(KEY, 5, 7)
    assert repr(projector) == "Projector((5, 14) @ (14, 14) @ (14, 7))"
    assert repr(jax.tree.map(lambda a: True, projector)).startswith("Projector(")
    assert [w.shape for w in projector.weights] == [(5, 14), (14, 14), (14, 7)]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(projector, state):
        value, gradient = jax.value_and_grad(lambda p: token_loss(p(x), y, "cosine"))(projector)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(projector, updates), state, value

    state, values = optimizer.init(projector), []
    for _ in range(200):
        projector, state, value = step(projector, state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]


def test_a_batch_of_one_image_and_a_collapsed_student():
    x, y = (a.astype(np.float32) for a in tokens(batch=1))
    assert np.isfinite(token_loss(x, y))
    constant = jnp.ones_like(x)
    for relations in ("within", "across"):
        value, gradient = jax.jit(jax.value_and_grad(partial(token_loss, relations=relations)))(constant, y)
        assert value == 1
        assert (np.asarray(gradient) == 0).all()
    assert decorrelation_loss(constant[0]) > 0.9


BAD = [
    (lambda x, y: token_loss(x, y[:2]), "the same images or texts, in the same order: 3 and 2"),
    (lambda x, y: token_loss(x[0], y), r"student must have shape \(b, t, c\)"),
    (lambda x, y: token_loss(x[:, :14], y), "student has 14 tokens.*student_prefix=5 leaves out those before a grid"),
    (lambda x, y: token_loss(x, y, teacher_grid=4), "teacher_grid must be a pair"),
    (lambda x, y: token_loss(np.where(x > 2, np.nan, x), y, "cosine"), "Leave out such tokens with mask"),
    (lambda x, y: decorrelation_loss(np.where(x > 2, np.nan, x)), "Leave out such samples with mask"),
    (lambda x, y: Projector.init(KEY, 4, 7)(x), "the projector was made for 4"),
    (lambda x, y: losses.gradient_cosine([x], [y]), "gradients of the same parameters"),
    (lambda x, y: losses.monitor().update(0, x, y), "must be a batch of features"),
    (lambda x, y: losses.monitor().update(0, x[0], y[0, :9]), "16 and 9 rows"),
    (lambda x, y: jax.jit(lambda x: losses.monitor().update(0, x, x) and 0)(x[0]), "update the monitor outside of jit"),
    (lambda x, y: token_loss(x, y, teacher_grid=(3, 5)), "has 15 positions, but teacher has 16 tokens"),
    (lambda x, y: token_loss(x, y, student_prefix=16), "leaves no token of 16"),
    (lambda x, y: token_loss(x.reshape(3, 4, 4, 5), y, student_prefix=1), "are for tokens"),
    (lambda x, y: token_loss(x[:, :9], y, mask=np.ones((3, 9), bool)), "the grids differ: 9 and 16 tokens"),
    (lambda x, y: token_loss(x, y, "cosine"), "got 5 and 7 channels.*losses.Projector"),
    (lambda x, y: token_loss(x, y, "cosine", relations="across"), "have no effect on measure"),
    (lambda x, y: token_loss(x, y, reduction="none", relations="both"), 'use relations="within"'),
    (lambda x, y: token_loss(x, y, relations="between"), "relations must be one of"),
    (lambda x, y: token_loss(x, y, "ckaa"), "measure must be one of 'cka'.*'cosine'"),
    (lambda x, y: token_loss(x[:, :3], y[:, :3]), "at least 4 samples"),
    (lambda x, y: alignment_loss(x, y, "gram", kernel="linear"), "kernel='linear' has no effect on 'gram'"),
    (lambda x, y: alignment_loss(x, y, "angles", stop_gradient_sigma=True), "has no effect on 'angles'"),
    (lambda x, y: alignment_loss(x, y, "procrustes", reduction="none"), "'procrustes' is one number"),
    (lambda x, y: decorrelation_loss(x[:, :1]), "at least 2 samples"),
    (lambda x, y: decorrelation_loss(x, std=0.0), "std must be finite and above 0"),
    (lambda x, y: decorrelation_loss(x, covariance_weight=-1.0), "covariance_weight must be at least 0"),
    (lambda x, y: Projector.init(KEY, 0, 3), "width must be a whole number"),
    (lambda x, y: losses.stop_schedule(1.0, -1), "stop must be a whole number"),
    (lambda x, y: GradientAgreement.start(2.0), "threshold is a cosine"),
    (lambda x, y: GradientAgreement.start(decay=1.0), "decay must be at least 0 and below 1"),
    (lambda x, y: losses.monitor(0), "k must be a whole number"),
    (lambda x, y: losses.monitor().curve(), "the monitor has no batches yet"),
    (lambda x, y: losses.monitor(20).update(0, x[0], y[0]).curve(), "no batch has more than k = 20"),
    (lambda x, y: plots.monitor([1.0]), "curve must be the result of Monitor.curve"),
]  # fmt: skip


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("k", range(len(BAD)))
def test_bad_input(k):
    call, message = BAD[k]
    with pytest.raises((ValueError, TypeError), match=message):
        call(*(a.astype(np.float32) for a in tokens()))


# --- decorrelation ----------------------------------------------------------------------------------------------------


def test_decorrelation_is_the_formula(x64):
    x, _ = tokens()
    x = x * np.array([0.1, 0.5, 1, 2, 3])
    c = np.cov(x[0].T)
    off = c[~np.eye(5, dtype=bool)]
    expected = 2 * np.maximum(1.5 - np.sqrt(np.diag(c)), 0).mean() + 3 * (off**2).sum() / 5
    found = decorrelation_loss(x, std=1.5, variance_weight=2.0, covariance_weight=3.0)
    helpers.assert_close(found[0], expected, 1e-12)
    mask = np.arange(16) < 11
    masked = decorrelation_loss(np.where(mask[:, None], x, np.nan), std=1.5, mask=mask)
    helpers.assert_close(masked, decorrelation_loss(x[:, :11], std=1.5), 1e-12)
    helpers.check_derivatives(lambda both: decorrelation_loss(both[0]), (x[0],), np.random.default_rng(0))


# --- schedules and stopping -------------------------------------------------------------------------------------------


def test_stop_schedule():
    at_once, gradual = losses.stop_schedule(2.0, 10), losses.stop_schedule(2.0, 10, decay=4)
    assert [float(at_once(k)) for k in (0, 9, 10, 99)] == [2, 2, 0, 0]
    assert [float(gradual(k)) for k in (0, 10, 11, 14, 99)] == [2, 2, 1.5, 0, 0]
    np.testing.assert_array_equal(jax.jit(jax.vmap(gradual))(jnp.arange(20)), [float(gradual(k)) for k in range(20)])


def test_alignment_stops_for_good_when_gradients_disagree():
    first = {"w": jnp.array([1.0, 0.0]), "b": jnp.zeros(1)}

    def other(cosine):
        return {"w": jnp.stack((cosine, jnp.sqrt(1 - cosine**2))), "b": jnp.zeros(1)}

    state = GradientAgreement.start(0.1, decay=0.5, warmup=3)
    step = jax.jit(lambda state, cosine: state.update(first, other(cosine)))
    mean, weight, cosines, active = 0.0, 0.0, (0.9, -0.9, 0.6, -0.9, 0.95, 0.95), []
    for cosine in cosines:
        state = step(state, cosine)
        mean, weight = 0.5 * mean + 0.5 * cosine, 0.5 * weight + 0.5
        assert abs(float(state.cosine) - mean / weight) < 1e-6
        active.append(bool(state.active))
    # The mean is below 0.1 in the second update, before the warm-up has ended, and in the fourth.
    assert active == [True, True, True, False, False, False]
    assert isinstance(jax.tree.map(lambda a: a, state), GradientAgreement)
    lost = state.update(first, other(jnp.nan))
    assert (int(lost.steps), float(lost.cosine)) == (int(state.steps), float(state.cosine))
    tiny, huge = (jax.tree.map(lambda a, s=s: s * a, first) for s in (1e-30, 1e30))
    assert abs(float(losses.gradient_cosine(tiny, huge)) - 1) < 1e-6
    zero = jax.tree.map(jnp.zeros_like, first)
    assert float(losses.gradient_cosine(first, zero)) == 0


# --- the monitor ------------------------------------------------------------------------------------------------------


def batches(number, n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        x, noise = rng.normal(size=(2, n, 6)).astype(np.float32)
        yield x, x + 0.7 * noise


def test_the_monitor_is_minibatch_cka_and_the_mean_overlap():
    both = list(batches(7, 40))
    monitor = losses.monitor(k=5)
    for step, (x, y) in enumerate(both):
        monitor = monitor.update(step, x, y)
    assert repr(monitor) == "Monitor(7 batches, k=5)"
    curve = monitor.curve(window=3)
    assert curve.step.tolist() == [1.0, 4.5]  # three batches, and four
    for k, part in enumerate((both[:3], both[3:])):
        helpers.assert_close(curve.cka[k], measures.minibatch_cka(part), 1e-4)
        overlaps = [float(measures.mutual_knn(x, y, 5)) for x, y in part]
        helpers.assert_close(curve.overlap[k], np.mean(overlaps), 1e-5)
        helpers.assert_close(curve.overlap_error[k], np.std(overlaps, ddof=1) / np.sqrt(len(part)), 1e-4)
    helpers.assert_close(curve.chance, [5 / 39, 5 / 39], 1e-6)
    assert curve.to_pandas().shape == (2, 6)
    alone = monitor.curve(window=1)
    assert np.isnan(alone.cka_error).all()
    short = monitor.update(7, both[0][0][:3], both[0][1][:3]).update(8, both[0][0][:5], both[0][1][:5]).curve(window=9)
    assert np.isfinite([short.cka, short.cka_error, short.overlap, short.overlap_error, short.chance]).all()
    helpers.assert_close(short.overlap, monitor.curve(window=7).overlap, 1e-6)  # of at most k samples: none
    padded = losses.monitor(k=5).update(0, np.pad(both[0][0], ((0, 9), (0, 0))), np.pad(both[0][1], ((0, 9), (0, 0))),
                                        np.arange(49) < 40)  # fmt: skip
    helpers.assert_close(padded.curve().cka, alone.cka[:1], 1e-4)


@pytest.mark.slow
def test_errors_of_the_monitor_are_those_of_repetition():
    def curve(seed):
        monitor = losses.monitor(k=5)
        for step, (x, y) in enumerate(batches(12, 24, seed)):
            monitor = monitor.update(step, x, y)
        return monitor.curve(window=12)

    curves = [curve(seed) for seed in range(60)]
    for value, error in (("cka", "cka_error"), ("overlap", "overlap_error")):
        spread = np.std([getattr(c, value)[0] for c in curves])
        # A standard deviation of 60 values has an error of 9%; so has each estimate, whose mean is taken.
        assert 0.7 * spread < np.mean([getattr(c, error)[0] for c in curves]) < 1.4 * spread


def test_a_batch_in_another_order_is_at_chance():
    rng = np.random.default_rng(0)
    monitor = losses.monitor(k=5)
    for step, (x, y) in enumerate(batches(20, 40)):
        monitor = monitor.update(step, x, rng.permutation(y))
    curve = monitor.curve(window=20)
    assert abs(curve.cka[0]) < 4 * curve.cka_error[0]
    assert abs(curve.overlap[0] - curve.chance[0]) < 4 * curve.overlap_error[0]


def test_the_figure_of_the_monitor():
    pytest.importorskip("matplotlib").use("agg")
    monitor = losses.monitor(k=5)
    for step, (x, y) in enumerate(batches(6, 24)):
        monitor = monitor.update(10 * step, x, y)
    ax = plots.monitor(monitor.curve(window=2))
    assert [line.get_label() for line in ax.get_lines()] == [
        "debiased CKA", "overlap of neighbors", "overlap of unrelated networks",
    ]  # fmt: skip
    np.testing.assert_allclose(ax.get_lines()[0].get_xdata(), [5, 25, 45])
