"""The normalised cut: its defining equation, agreement of methods and inputs, derivatives, and what is refused."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxalign
from jaxalign import Plan, affinity_operator, kway, normalized_cut, rbf_affinity


def features(n=90, d=5, groups=3, apart=8.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + apart * (np.arange(n) % groups)[:, None]


def matrix_of(a):
    a = np.asarray(a, np.float64)
    root = 1 / np.sqrt(a.sum(1))
    return root[:, None] * a * root


def same_vectors(found, expected, tolerance):
    """Up to the sign."""
    overlap = np.sum(np.asarray(found) * np.asarray(expected), 0)
    np.testing.assert_allclose(np.asarray(found) * np.sign(overlap), expected, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "lobpcg"])
def test_defining_equation(method, x64):
    x = features()
    cut = normalized_cut(x, 4, method=method, density=0.3)
    m = matrix_of(rbf_affinity(x, density=0.3))
    np.testing.assert_allclose(m @ cut.eigenvectors, cut.eigenvectors * cut.eigenvalues[None], atol=1e-8)
    np.testing.assert_allclose(cut.eigenvectors.T @ cut.eigenvectors, np.eye(4), atol=1e-8)
    np.testing.assert_allclose(cut.eigenvalues, np.linalg.eigvalsh(m)[::-1][:4], atol=1e-12)
    np.testing.assert_allclose(cut.degrees, rbf_affinity(x, density=0.3).sum(1), rtol=1e-10)
    assert np.max(cut.residual) < 1e-8
    # The first is D^1/2 1, so its embedding is constant: 1.
    np.testing.assert_allclose(cut.embedding[:, 0], 1, atol=1e-7)
    # Of the largest entry the sign is positive.
    largest = np.take_along_axis(np.asarray(cut.eigenvectors), np.abs(cut.eigenvectors).argmax(0)[None], 0)
    assert (largest > 0).all()


def test_every_input_and_method_is_one_cut():
    x = jnp.asarray(features(), jnp.float32)
    expected = normalized_cut(x, 4, density=0.3)
    operator = affinity_operator(x, density=0.3, plan=Plan(32))
    for source, options in (
        (rbf_affinity(x, density=0.3), {}),
        (operator, {}),
        (operator, {"method": "dense"}),
        (x, {"method": "lobpcg", "density": 0.3, "plan": Plan(32)}),
        (x, {"method": "lobpcg", "density": 0.3}),  # of the stored matrix
        (x, {"sigma": expected.sigma}),
    ):
        cut = normalized_cut(source, 4, **options)
        np.testing.assert_allclose(cut.eigenvalues, expected.eigenvalues, atol=1e-5)
        same_vectors(cut.eigenvectors, expected.eigenvectors, 2e-4)  # 1e-5 of residual over the gap of 0.1


def test_scikit_learn_embeds_alike(x64):
    manifold = pytest.importorskip("sklearn.manifold")
    a = rbf_affinity(features(apart=3.0), density=0.3, zero_diagonal=True)  # theirs leaves the diagonal out
    cut = normalized_cut(a, 4)
    expected = manifold.spectral_embedding(np.asarray(a), n_components=4, drop_first=False, random_state=0)
    # Theirs has another length a column.
    scaled = expected / np.linalg.norm(expected, axis=0) * np.linalg.norm(cut.embedding, axis=0)
    same_vectors(scaled, cut.embedding, 1e-6)


@pytest.mark.slow
def test_landmarks_approach_the_exact_cut(x64):
    x = features(n=300, d=3, apart=2.0)
    exact = normalized_cut(x, 4, sigma=2.0)
    errors = []
    for landmarks in (30, 100, 300):
        cut = normalized_cut(x, 4, sigma=2.0, method="nystroem", landmarks=landmarks)
        errors.append(float(np.abs(cut.eigenvalues - exact.eigenvalues).max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9  # all samples are landmarks
    same_vectors(cut.eigenvectors, exact.eigenvectors, 1e-6)
    np.testing.assert_allclose(cut.transform(x), cut.eigenvectors, atol=1e-9)


@pytest.mark.slow
def test_sigma_from_landmarks_aims_at_the_density_of_all():
    x = jnp.asarray(features(n=2000, d=3), jnp.float32)
    cut = normalized_cut(x, 3, method="nystroem", landmarks=400)
    np.testing.assert_allclose(jaxalign.mean_density(x, sigma=cut.sigma), 0.05, rtol=0.1)  # 400 samples' spread


@pytest.mark.slow
def test_transform_gives_samples_their_own_rows(x64):
    x = features()
    mask = np.arange(90) < 80
    for options in ({}, {"mask": mask}):
        cut = normalized_cut(x, 4, density=0.3, **options)
        np.testing.assert_allclose(cut.transform(x[:80]), cut.eigenvectors[:80], atol=1e-9)
        new = cut.transform(x[:80] + 1e-9)
        np.testing.assert_allclose(new, cut.eigenvectors[:80], atol=1e-6)
    assert not np.any(cut.eigenvectors[80:])
    assert not np.any(cut.transform(x[:2] + 1e6))  # no affinity to anything
    padded = normalized_cut(x[:80], 4, density=0.3)
    np.testing.assert_allclose(padded.eigenvalues, cut.eigenvalues, atol=1e-10)


@pytest.mark.slow
def test_a_sigma_a_row_is_cut_in_its_symmetric_part(x64):
    x = features()
    a = np.asarray(rbf_affinity(x, density=0.2, bandwidth="per_row"))
    expected = np.linalg.eigvalsh(matrix_of((a + a.T) / 2))[::-1][:4]
    for method in ("dense", "lobpcg"):
        cut = normalized_cut(x, 4, density=0.2, bandwidth="per_row", method=method, plan=Plan(32))
        np.testing.assert_allclose(cut.eigenvalues, expected, atol=1e-9)
    sigma = jaxalign.solve_sigma(x, density=0.2, bandwidth="per_row").sigma
    given = normalized_cut(x, 4, sigma=sigma, bandwidth="per_row", method="dense")
    np.testing.assert_allclose(given.eigenvalues, expected, atol=1e-9)
    with pytest.raises(ValueError, match="transform needs features, but this cut is of an affinity, or at given"):
        given.transform(x)


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", ["include", "exclude"])
def test_transform_with_a_sigma_a_row_gives_samples_their_own_rows(diagonal, x64):
    x = features()
    mask = np.arange(90) < 80
    for options in ({}, {"mask": mask}):
        cut = normalized_cut(x, 4, density=0.3, bandwidth="per_row", diagonal=diagonal, **options)
        np.testing.assert_allclose(cut.transform(x[:80]), cut.eigenvectors[:80], atol=1e-7)
    # A new sample has the sigma at which its mean affinity to the 80 others is the density: near the cut of all 90.
    new = cut.transform(x[80:])
    together = normalized_cut(x, 4, density=0.3, bandwidth="per_row", diagonal=diagonal).eigenvectors[80:]
    for j in range(2):
        assert abs(np.corrcoef(new[:, j], together[:, j])[0, 1]) > 0.9


@pytest.mark.slow
def test_all_landmarks_give_the_exact_cut_of_a_sigma_a_row(x64):
    x = features()
    exact = normalized_cut(x, 3, density=0.3, bandwidth="per_row", method="dense")
    cut = normalized_cut(x, 3, density=0.3, bandwidth="per_row", method="nystroem", landmarks=np.arange(90))
    # Only the negative eigenvalues of (A + A') / 2 are left out of its inverse root.
    np.testing.assert_allclose(cut.eigenvalues, exact.eigenvalues, atol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(cut.eigenvectors * exact.eigenvectors, 0)), 1, atol=1e-6)
    np.testing.assert_allclose(cut.transform(x), cut.eigenvectors, atol=1e-8)
    tiled = normalized_cut(
        x, 3, density=0.3, bandwidth="per_row", method="nystroem", landmarks=np.arange(90), plan=Plan(32)
    )
    np.testing.assert_allclose(tiled.eigenvalues, cut.eigenvalues, atol=1e-9)
    with pytest.raises(ValueError, match="solves for one sigma per row"):
        normalized_cut(x, 3, sigma=np.ones(90), bandwidth="per_row", method="nystroem")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "lobpcg"])
def test_repulsion_is_the_equation_of_yu_and_shi(method, x64, rng):
    a = np.asarray(rbf_affinity(features(), density=0.2))
    r = rng.uniform(size=a.shape)
    r = 0.1 * (r + r.T)
    d = (a + r).sum(1)
    signed = (a - r + np.diag(r.sum(1))) / np.sqrt(d[:, None] * d[None])
    expected = np.linalg.eigvalsh(signed)[::-1][:3]
    cut = normalized_cut(a, 3, repulsion=r, method=method)
    np.testing.assert_allclose(cut.eigenvalues, expected, atol=1e-8)
    np.testing.assert_allclose(cut.degrees, d, rtol=1e-10)
    np.testing.assert_allclose(signed @ cut.eigenvectors, cut.eigenvectors * cut.eigenvalues[None], atol=1e-6)
    operator = normalized_cut(affinity_operator(features(), density=0.2), 3, repulsion=r, method=method)
    np.testing.assert_allclose(operator.eigenvalues, expected, atol=1e-8)
    nothing = normalized_cut(a, 3, repulsion=0 * r, method=method)
    np.testing.assert_allclose(nothing.eigenvalues, normalized_cut(a, 3, method=method).eigenvalues, atol=1e-9)

    def second(r):
        return normalized_cut(a, 2, repulsion=(r + r.T) / 2, method=method).eigenvalues[1]

    helpers.check_derivatives(second, r, rng)


def test_repulsion_separates_what_attraction_joins():
    a = np.ones((6, 6), np.float32)
    r = np.zeros((6, 6), np.float32)
    r[:3, 3:] = r[3:, :3] = 0.5
    assert kway(normalized_cut(a, 2, repulsion=r)).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.slow
def test_networks_of_an_alignment_are_cut_together():
    key = jax.random.key(0)
    x = jax.random.normal(key, (60, 6))
    alignment = helpers.align({"a": x, "b": 3 - 2 * x[:, ::-1]}, landmarks=30, key=key)
    cut = normalized_cut(alignment, 4, density=0.2)
    assert cut.eigenvectors.shape == (120, 4)
    # The second is the first, turned and scaled: the same relative features, so the same rows.
    np.testing.assert_allclose(cut.eigenvectors[:60], cut.eigenvectors[60:], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "lobpcg"])
def test_derivatives(method, x64):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))

    def of(x):  # the other method with a given sigma, which takes less compiling
        options = {"density": 0.3, "plan": Plan(32)} if method == "lobpcg" else {"sigma": 1.5}
        cut = normalized_cut(x, 3, method=method, **options)
        return jnp.sum(weights * cut.eigenvectors**3) + jnp.sum(weights[0] * cut.eigenvalues)

    check_grads(jax.jit(of), (x,), 1, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_second_derivative_of_an_eigenvalue(x64):
    x = np.random.default_rng(0).normal(size=(20, 2))

    def second(x):
        affinity = jnp.exp(-jnp.sum((x[:, None] - x[None]) ** 2, -1))
        return normalized_cut(affinity, 2, kind="affinity").eigenvalues[1]

    check_grads(second, (x,), 2, modes=("rev",), rtol=1e-4)


def test_equal_eigenvalues_leave_derivatives_finite(x64):
    affinity = jnp.kron(jnp.eye(3), jnp.ones((4, 4))) * 0.5 + 0.1  # of three equal groups

    def projected(a):  # does not depend on a rotation within the two equal ones
        v = normalized_cut(a, 3, kind="affinity").eigenvectors
        return jnp.sum((v @ v.T) ** 2 * jnp.arange(144.0).reshape(12, 12))

    gradient = jax.grad(projected)(affinity)
    assert np.isfinite(gradient).all()
    step = np.random.default_rng(0).normal(size=(12, 12)) * 1e-6
    step = step + step.T
    difference = projected(affinity + step) - projected(affinity - step)
    np.testing.assert_allclose(np.sum(gradient * step) * 2, difference, rtol=1e-4)


def test_jit_and_vmap():
    x = jnp.asarray(np.stack([features(seed=k, n=40) for k in range(3)]), jnp.float32)

    def values(x):
        return normalized_cut(x, 3, kind="features", density=0.3).eigenvalues

    np.testing.assert_allclose(jax.jit(jax.vmap(values))(x), [values(one) for one in x], atol=1e-5)


@pytest.mark.slow
def test_rows_over_devices():
    x = jnp.asarray(features(n=96), jnp.float32)
    mesh = jaxalign.sharding.data_mesh()
    cut = normalized_cut(x, 3, density=0.3, method="lobpcg", plan=Plan(mesh=mesh))
    np.testing.assert_allclose(cut.eigenvalues, normalized_cut(x, 3, density=0.3).eigenvalues, atol=1e-5)


@pytest.mark.slow
def test_segments_are_the_groups():
    x = jnp.asarray(features(), jnp.float32)
    np.testing.assert_array_equal(kway(normalized_cut(x, 5, density=0.3), 3), np.arange(90) % 3)
    mask = np.arange(90) < 60
    np.testing.assert_array_equal(
        kway(normalized_cut(x, 3, density=0.3, mask=mask)), np.where(mask, np.arange(90) % 3, -1)
    )
    # Any rotation of the eigenvectors has the same segments.
    vectors = np.asarray(normalized_cut(x, 3, density=0.3).eigenvectors)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0].astype(np.float32)
    np.testing.assert_array_equal(kway(vectors @ turn), np.arange(90) % 3)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones((5, 4), np.float32), {"num_components": 6}, "only n = 5 samples"),
        (np.arange(16, dtype=np.float32).reshape(4, 4), {"num_components": 2}, 'not symmetric.*kind="features"'),
        (-np.eye(4, dtype=np.float32), {"num_components": 2}, "has negative entries"),
        (np.eye(4, dtype=np.float32) * np.nan, {"num_components": 2}, "nan or inf in 4 row"),
        (np.eye(4, dtype=np.float32), {"num_components": 2, "sigma": 1.0}, "leave them out for an affinity"),
        (np.ones((5, 4), np.float32), {"num_components": 2, "kind": "affinity"}, "must be square"),
        (np.ones((9, 4), np.float32), {"num_components": 2, "method": "lobpcg"}, "fewer than n / 5"),
        (
            np.ones((9, 4), np.float32),
            {"num_components": 2, "landmarks": 3},
            'landmarks are an option of method="nystroem"',
        ),
        (np.eye(9, dtype=np.float32), {"num_components": 2, "method": "nystroem"}, '"nystroem" needs features'),
        (np.ones((9, 4), np.float32), {"num_components": 4, "method": "nystroem", "landmarks": 3}, "only 3 landmarks"),
        (np.ones((9, 4), np.float32), {"num_components": 2, "method": "svd"}, "method must be one of"),
        (np.ones((2, 9, 4), np.float32), {"num_components": 2}, "jax.vmap for a batch"),
        (np.ones((9, 4), np.float32), {"num_components": 2, "repulsion": np.ones((9, 9))}, "option of an affinity"),
        (np.eye(9, dtype=np.float32), {"num_components": 2, "repulsion": np.ones((4, 4))}, "shape of the affinity"),
        (np.eye(4, dtype=np.float32), {"num_components": 2, "repulsion": -np.ones((4, 4))}, "repulsion has negative"),
        (np.eye(4, dtype=np.float32), {"num_components": 2, "repulsion": np.triu(np.ones((4, 4)))}, "is not symmetric"),
        (np.ones((9, 4), np.float32), {"num_components": 2, "method": "nystroem", "diagonal": "exclude"}, "no effect"),
    ],
)
def test_bad_input(x, options, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        normalized_cut(x, **options)


def test_other_bad_input():
    x = jnp.asarray(features(), jnp.float32)
    with pytest.raises(ValueError, match="n samples with themselves"):
        normalized_cut(affinity_operator(x, x[:5], density=0.3), 2)
    with pytest.raises(ValueError, match=r"must have shape \(q, 5\)"):
        normalized_cut(x, 2).transform(x[:, :3])
    with pytest.raises(ValueError, match="pass kind="):
        jax.jit(lambda x: normalized_cut(x, 2).eigenvalues)(x[:5])
    with pytest.raises(ValueError, match="only 3 eigenvectors"):
        kway(x[:, :3], 4)


def test_ncut_pytorch_finds_the_same_vectors():
    torch = pytest.importorskip("torch")
    ncut = pytest.importorskip("ncut_pytorch")
    x = features(n=200, apart=2.0).astype(np.float32)
    cut = normalized_cut(x, 4, sigma=2.0)
    vectors, values = ncut.ncut_fn(torch.from_numpy(x), n_eig=4, sigma=2.0)
    # Its leading vectors come from a randomised decomposition.
    np.testing.assert_allclose(values.numpy(), cut.eigenvalues, atol=2e-3)
    unit = vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=0)
    assert np.abs(np.sum(unit[:, :3] * np.asarray(cut.eigenvectors)[:, :3], 0)).min() > 0.99


def test_ncut_pytorch_finds_nearly_the_same_segments_and_repels_by_the_same_matrix():
    torch = pytest.importorskip("torch")
    ncut = pytest.importorskip("ncut_pytorch")
    pytest.importorskip("fpsample", reason="ncut-pytorch needs it for segments")
    from ncut_pytorch.ncuts.ncut_nystrom import ncut_with_repulsion
    from ncut_pytorch.utils.math import cosine_affinity

    x = jaxalign.datasets.load_patch_features().features["vit-s14 layer 8"][:256]
    a = np.asarray(rbf_affinity(x))
    vectors = normalized_cut(a, 5, kind="affinity").eigenvectors
    theirs = ncut.kway_ncut(torch.from_numpy(np.array(vectors)), n_clusters=5).argmax(1).numpy()

    def association(labels):
        return sum(a[np.ix_(labels == k, labels == k)].sum() / a[labels == k].sum() for k in np.unique(labels))

    assert association(np.asarray(kway(vectors))) > association(theirs) - 0.01
    # It takes singular vectors of the unsymmetric D^-1 (A - R + D_R), whose eigenvalues are those here.
    tx = torch.from_numpy(x)
    attraction = cosine_affinity(tx, sigma=0.4).numpy()
    repulsion = 0.2 * cosine_affinity(tx, sigma=0.3, repulse=True).numpy()
    cut = normalized_cut(attraction, 4, kind="affinity", repulsion=repulsion)
    _, values = ncut_with_repulsion(tx, 4, 0.4, 0.3, 0.2, cosine_affinity)
    np.testing.assert_allclose(values.numpy(), cut.eigenvalues, atol=0.02)


def test_masked_rows_are_no_landmarks():
    x = features(n=120, d=3).astype(np.float32)
    mask = np.arange(120) < 100
    other = np.where(mask[:, None], x, np.float32(50))
    found = [normalized_cut(one, 3, method="nystroem", mask=mask, sigma=2.0).eigenvalues for one in (x, other)]
    np.testing.assert_array_equal(found[0], found[1])
    with pytest.raises(ValueError, match="sample 110 is masked"):
        normalized_cut(x, 2, method="nystroem", mask=mask, landmarks=np.array([1, 2, 110]))
    with pytest.raises(ValueError, match="only 100 valid samples"):
        normalized_cut(x, 2, method="nystroem", mask=mask, landmarks=110)


def test_columns_of_rounding_are_not_given_to_new_samples():
    x = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    cut = normalized_cut(x, 40, density=0.5)
    error = np.abs(np.asarray(cut.transform(x)) - np.asarray(cut.eigenvectors))
    assert np.nanmax(error) < 2e-3
    assert np.isnan(error[:, -1]).all()
    assert not np.isnan(error[:, :15]).any()


def test_separate_groups_are_never_isolated_samples():
    groups = np.repeat(np.arange(5), 20)
    rng = np.random.default_rng(0)
    x = (100 * rng.normal(size=(5, 4))[groups] + rng.normal(size=(100, 4))).astype(np.float32)
    labels = np.asarray(kway(normalized_cut(x, 5, density=0.15), 3))
    assert labels.min() == 0
    assert all(len(np.unique(labels[groups == k])) == 1 for k in range(5))


def test_kway_of_nan_is_refused_and_labels_nothing_under_a_trace():
    vectors = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    for bad in (np.nan, np.inf):
        hole = vectors.copy()
        hole[4, 1] = bad
        with pytest.raises(ValueError, match="cut has nan or inf in 1 row"):
            jaxalign.kway(hole)
        assert (jax.jit(jaxalign.kway)(hole) == -1).all()
