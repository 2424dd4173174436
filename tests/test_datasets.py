"""The shipped features: shapes, values, licences, size; the sets are what their names say."""

import io
import subprocess
import sys
import zipfile
from importlib import resources

import numpy as np
import pytest

from jaxalign.datasets import (
    DigitFeatures,
    PartFeatures,
    PatchFeatures,
    load_digit_features,
    load_part_features,
    load_patch_features,
)

PATCH_SETS = {
    "vit-s14 layer 5": 384,
    "vit-s14 layer 8": 384,
    "vit-s14 final norm": 384,
    "efficientnet-lite0 block 10": 112,
    "efficientnet-lite0 block 15": 320,
    "mobilenet-v2 block 13": 96,
    "pp-ocrv4 stride 16": 96,
    "pp-ocrv4 stride 8": 96,
    "untrained efficientnet-lite0 block 10": 112,
}
DIGIT_SETS = {
    "vit-s14 layer 8": 384,
    "efficientnet-lite0 block 10": 112,
    "mobilenet-v2 block 13": 96,
    "pp-ocrv4 stride 16": 96,
}
PART_SETS = {
    "vit-s14 layer 8": 384,
    "efficientnet-lite0 block 10": 112,
    "pp-ocrv4 stride 16": 96,
    "untrained efficientnet-lite0 block 10": 112,
}
FILES = ("patch_features.npz", "part_features.npz", "digit_features.npz")


@pytest.fixture(scope="module")
def patches() -> PatchFeatures:
    return load_patch_features()


@pytest.fixture(scope="module")
def digits() -> DigitFeatures:
    return load_digit_features()


@pytest.fixture(scope="module")
def parts() -> PartFeatures:
    return load_part_features()


def file_bytes(name: str) -> bytes:
    return (resources.files("jaxalign") / "data" / name).read_bytes()


def standardised(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (a - a.mean(0) for a in (x.astype(np.float64), y.astype(np.float64)))
    return float(np.sum((x.T @ y) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def test_names_and_shapes_of_the_patches(patches):
    shapes = {name: features.shape for name, features in patches.features.items()}
    assert shapes == {name: (768, channels) for name, channels in PATCH_SETS.items()}
    assert patches.pictures.shape == (3, 224, 224, 3)
    assert patches.pictures.dtype == np.uint8
    assert patches.picture_names == ("astronaut", "chelsea", "coffee")
    assert patches.grid == (16, 16)
    assert patches.controls == ("untrained efficientnet-lite0 block 10",)


def test_positions_run_over_pictures_then_rows_then_columns(patches):
    assert patches.picture_index.shape == (768,)
    assert patches.positions.shape == (768, 2)
    row_of = patches.picture_index * 256 + patches.positions[:, 0] * 16 + patches.positions[:, 1]
    np.testing.assert_array_equal(row_of, np.arange(768))


def test_names_and_shapes_of_the_parts(parts):
    shapes = {name: features.shape for name, features in parts.features.items()}
    assert shapes == {name: (4096, channels) for name, channels in PART_SETS.items()}
    assert parts.images.shape == (4, 224, 224, 3)
    assert parts.images.dtype == np.uint8
    assert parts.image_names == ("portrait", "face", "cat", "astronaut")
    row_of = parts.image_index * 1024 + parts.positions[:, 0] * 32 + parts.positions[:, 1]
    np.testing.assert_array_equal(row_of, np.arange(4096))
    np.testing.assert_array_equal(
        parts.maps("vit-s14 layer 8")[2, 5, 7], parts.features["vit-s14 layer 8"][2 * 1024 + 5 * 32 + 7]
    )
    assert parts.controls == ("untrained efficientnet-lite0 block 10",)


def test_every_image_has_parts_with_enough_patches(parts):
    assert parts.part_index.min() == -1
    assert parts.part_index.max() == len(parts.part_names) - 1
    for image in range(4):
        labels = parts.part_index[parts.image_index == image]
        counts = np.bincount(labels[labels >= 0])
        assert np.count_nonzero(counts) >= 5
        assert counts[counts > 0].min() >= 9


def test_fine_maps_are_the_coarse_ones_in_between(parts, patches):
    """The whole photograph is in both files: its 32 x 32 map, averaged over 2 x 2, is much like its 16 x 16 map."""
    for name in PART_SETS.keys() - set(parts.controls):
        coarse = parts.maps(name)[3].reshape(16, 2, 16, 2, -1).mean((1, 3)).reshape(256, -1)
        whole = patches.features[name][:256].reshape(16, 16, -1)
        right, *wrong = (
            linear_cka(coarse, turned.reshape(256, -1)) for turned in (whole, whole.transpose(1, 0, 2), whole[::-1])
        )
        assert right > 0.7, name
        assert right > max(wrong) + 0.2, name


def test_names_and_shapes_of_the_digits(digits):
    shapes = {name: features.shape for name, features in digits.features.items()}
    assert shapes == {name: (1000, channels) for name, channels in DIGIT_SETS.items()}
    assert digits.images.shape == (1000, 8, 8)
    assert digits.images.dtype == np.uint8
    assert (digits.images.min(), digits.images.max()) == (0, 16)
    assert digits.labels.shape == (1000,)
    assert np.bincount(digits.labels).min() >= 80
    assert digits.labels.max() == 9


@pytest.mark.parametrize("load", [load_patch_features, load_part_features, load_digit_features])
def test_every_set_is_finite_varies_and_says_where_it_is_from(load):
    data = load()
    for name, features in data.features.items():
        assert features.dtype == np.float32
        assert np.isfinite(features).all()
        assert (features.std(1) > 0).all(), f"{name}: a row is constant"
        assert len(np.unique(features, axis=0)) == len(features), f"{name}: two rows are the same"
        assert (features.std(0) > 0).mean() > 0.9, f"{name}: dead channels"
        assert any(licence in data.licenses[name] for licence in ("MIT", "Apache-2.0"))
        assert "tensor" in data.provenance[name]


def test_every_picture_has_a_licence(patches, digits):
    assert "public domain" in patches.licenses["astronaut"]
    assert "CC0" in patches.licenses["chelsea"]
    assert "CC0" in patches.licenses["coffee"]
    assert "CC BY 4.0" in digits.licenses["digits"]


def test_every_trained_set_lies_on_the_grid_of_the_pictures(patches):
    """A set whose rows ran in another order would correlate more with a turned or flipped grid.

    Layer 8 of the transformer is compared with brightness and contrast of the pixels, the other
    sets with that layer: deep layers see too little of the pixels.
    """
    grey = patches.pictures.astype(np.float64).mean(-1).reshape(3, 16, 14, 16, 14)
    pixels = np.stack([grey.mean((2, 4)), grey.std((2, 4))], -1)
    anchor = standardised(patches.features["vit-s14 layer 8"]).reshape(3, 16, 16, -1)
    for name, features in patches.features.items():
        if name in patches.controls:
            continue
        seen = pixels if name == "vit-s14 layer 8" else anchor
        right, *wrong = (
            linear_cka(turned.reshape(768, -1), standardised(features))
            for turned in (seen, seen.transpose(0, 2, 1, 3), seen[:, ::-1], seen[:, :, ::-1])
        )
        assert right > max(wrong) + 0.01, name


def test_the_untrained_control_differs_from_the_trained_network(patches):
    (control,) = patches.controls
    trained = patches.features["efficientnet-lite0 block 10"]
    assert linear_cka(trained, trained) == pytest.approx(1.0)
    against_control = linear_cka(trained, patches.features[control])
    against_mobilenet = linear_cka(trained, patches.features["mobilenet-v2 block 13"])
    assert against_control < against_mobilenet < 0.99


def test_digits_are_told_apart_by_their_nearest_neighbour(digits):
    for name, features in digits.features.items():
        z = standardised(features)
        similarity = z @ z.T - 0.5 * np.sum(z * z, 1)
        np.fill_diagonal(similarity, -np.inf)
        assert np.mean(digits.labels[similarity.argmax(1)] == digits.labels) > 0.8, name


def test_the_files_are_small():
    assert sum(len(file_bytes(name)) for name in FILES) <= 6_000_000


@pytest.mark.parametrize("name", FILES)
def test_no_pickles_and_no_dates(name):
    with zipfile.ZipFile(io.BytesIO(file_bytes(name))) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                assert np.lib.format.read_magic(stream) == (1, 0)
                _, _, dtype = np.lib.format.read_array_header_1_0(stream)
                assert not dtype.hasobject
            assert member.date_time == (1980, 1, 1, 0, 0, 0)


def test_each_call_returns_fresh_arrays():
    load_digit_features().features["pp-ocrv4 stride 16"][:] = 0
    assert load_digit_features().features["pp-ocrv4 stride 16"].any()


def test_the_module_itself_needs_only_numpy():
    """The package imports JAX; this module must not add to that."""
    code = (
        "import importlib.util, sys\n"
        "root = importlib.util.find_spec('jaxalign').submodule_search_locations[0]\n"
        "spec = importlib.util.spec_from_file_location('datasets', root + '/datasets.py')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['datasets'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print({'jax', 'torch', 'scipy', 'sklearn'} & set(sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
