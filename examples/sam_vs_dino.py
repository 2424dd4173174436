"""SAM and DINO on the same images: the same colors for the same parts, and the best match of each patch.

    python examples/sam_vs_dino.py               # shipped features: a text detector and a ViT trained as DINOv2
    python examples/sam_vs_dino.py --pretrained  # SAM ViT-B and DINOv2 ViT-S, from the Hugging Face hub
    python examples/sam_vs_dino.py --pretrained --images portrait.jpg street.jpg

--pretrained needs pip install "jaxalign[networks]" and, for the first run, a connection to download the weights. For
patches that are not landmarks, the script prints how often their best match in the other network is the same patch, and
how well the colors of the two networks agree. It writes sam_vs_dino/colors.png and matches.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from color_agreement import agreement

import jaxalign
from jaxalign.report.coloring import joint_colors, separate_colors

GRID = (16, 16)
SAM, DINO = "facebook/sam-vit-base", "facebook/dinov2-small"


class Patches(NamedTuple):
    """Features of two networks for the patches of images."""

    features: dict[str, np.ndarray]  # (images * 256, d)
    pictures: np.ndarray  # (images, h, w, 3)


def shipped() -> Patches:
    """Shipped features of two similar networks: a detector of text boundaries and a vision transformer."""
    data = jaxalign.datasets.load_patch_features()
    names = {"text detector": "pp-ocrv4 stride 16", "ViT-S/14": "vit-s14 layer 8"}
    return Patches({name: data.features[key] for name, key in names.items()}, np.asarray(data.pictures))


def pretrained(paths: list[Path]) -> Patches:
    """Features of the published SAM and DINOv2, on images from files or on the shipped ones."""
    from transformers import AutoImageProcessor, AutoModel, SamModel, SamProcessor

    if paths:
        from PIL import Image

        images = [Image.open(path).convert("RGB") for path in paths]
    else:
        images = list(np.asarray(jaxalign.datasets.load_patch_features().pictures))
    return extract(
        images,
        (SamModel.from_pretrained(SAM).vision_encoder, SamProcessor.from_pretrained(SAM).image_processor),
        (AutoModel.from_pretrained(DINO), AutoImageProcessor.from_pretrained(DINO)),
    )


def extract(images: list[Any], sam: tuple[Any, Any], dino: tuple[Any, Any]) -> Patches:
    """Features of two models, each with its processor, on one grid of patches."""
    squares = [square(np.asarray(image)) for image in images]
    pixels = [processor(images=squares, return_tensors="pt")["pixel_values"] for _, processor in (sam, dino)]
    features = {
        # SAM's neck is the input of its decoder; DINOv2 has a class token before its patches.
        "SAM": jaxalign.interop.capture_features(sam[0], pixels[0], layers="neck", grid=GRID, batch_size=1)["neck"],
        "DINOv2": jaxalign.interop.capture_features(
            dino[0], pixels[1], layers="layernorm", prefix_tokens=1, grid=GRID, batch_size=1
        )["layernorm"],
    }
    return Patches({name: x.reshape(-1, x.shape[-1]) for name, x in features.items()}, np.stack(squares))


def square(image: np.ndarray, pixels: int = 224) -> np.ndarray:
    """The center square of an image, resized, so that both networks see the same pixels."""
    side = min(image.shape[:2])
    top, left = ((size - side) // 2 for size in image.shape[:2])
    cut = np.asarray(image[top : top + side, left : left + side], np.float32)
    resized = jax.image.resize(cut, (pixels, pixels, 3), "bilinear", antialias=True)
    return np.clip(np.asarray(resized).round(), 0, 255).astype(np.uint8)


def main(patches: Patches, out: Path) -> dict[str, float]:
    """Align, print and draw; return the scores."""
    number = len(patches.pictures)
    cells = np.argwhere(np.ones(GRID))
    positions, image = np.tile(cells, (number, 1)), np.repeat(np.arange(number), len(cells))
    landmarks = np.flatnonzero(positions.sum(1) % 2 == 0)
    queries = np.flatnonzero(positions.sum(1) % 2 == 1)
    a, b = patches.features

    alignment = jaxalign.align(patches.features, landmarks=landmarks)
    rows = {name: np.asarray(x) for name, x in alignment.features.items()}
    queries_of = [queries[image[queries] == k] for k in range(number)]
    matches = [jaxalign.correspondence(rows[a][subset], rows[b][subset]) for subset in queries_of]
    top1 = float(np.mean([match.top1 for match in matches]))
    colors = {"before": separate_colors(patches.features), "after": joint_colors(patches.features, landmarks)}
    scores = {
        when: agreement(
            {name: x[queries] for name, x in by_network.items()}, [(a, b)], image[queries], positions[queries]
        )
        for when, by_network in colors.items()
    }
    print(f"{a} and {b}: {len(queries)} held-out patches of {number} images")
    print(f"  matched with themselves, among the {len(queries) // number} of their image: {top1:.1%}")
    for when, score in scores.items():
        print(f"  color agreement {when} alignment: {score.value:.3f} (p = {score.p_value:.3f})")

    out.mkdir(parents=True, exist_ok=True)
    shape = (number, *GRID, 3)
    groups = {when: {name: x.reshape(shape) for name, x in parts.items()} for when, parts in colors.items()}
    captions = {when: f"agreement {score.value:.2f}" for when, score in scores.items()}
    jaxalign.plots.color_panels(groups, patches.pictures, scores=captions).savefig(out / "colors.png", dpi=150)
    figure = plt.figure(figsize=(7, 3.4 * number), layout="constrained")
    for k, (axes, match) in enumerate(zip(np.atleast_2d(figure.subplots(number, 2)), matches, strict=True)):
        jaxalign.plots.matches(*[patches.pictures[k]] * 2, positions[queries_of[k]], match.index, GRID, axes=axes)
        for ax, name in zip(axes, (a, b), strict=True):
            ax.set_title(name, fontsize=10)
    jaxalign.plots.match_legend(figure)
    figure.savefig(out / "matches.png", dpi=110)
    plt.close("all")
    print(f"figures: {out}/colors.png, {out}/matches.png")
    return {"top1": top1, **{when: score.value for when, score in scores.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="SAM against DINO, before and after alignment.")
    parser.add_argument("--pretrained", action="store_true", help="SAM and DINOv2 from the Hugging Face hub")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="image files, with --pretrained")
    parser.add_argument("--out", type=Path, default=Path("sam_vs_dino"))
    options = parser.parse_args()
    if options.images and not options.pretrained:
        parser.error("--images needs --pretrained: the shipped features belong to the shipped images")
    main(pretrained(options.images) if options.pretrained else shipped(), options.out)
