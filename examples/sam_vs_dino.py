"""SAM and DINO on the same pictures: the same colours for the same parts, and where each patch finds itself.

    python examples/sam_vs_dino.py               # the shipped features: a boundary detector and a ViT trained as DINOv2
    python examples/sam_vs_dino.py --pretrained  # SAM ViT-B and DINOv2 ViT-S, from the Hugging Face hub
    python examples/sam_vs_dino.py --pretrained --images portrait.jpg street.jpg

--pretrained needs pip install "jaxalign[networks]" and, the first time, a connection to fetch the weights. Either way
it prints how well patches that were not landmarks find themselves in the other network, and how alike their colours
are, and writes sam_vs_dino/colors.png and matches.png.
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
from jaxalign.report.coloring import joint_colors, own_colors

GRID = (16, 16)
SAM, DINO = "facebook/sam-vit-base", "facebook/dinov2-small"


class Patches(NamedTuple):
    """Features of two networks for the patches of some pictures."""

    features: dict[str, np.ndarray]  # (pictures * 256, d)
    pictures: np.ndarray  # (pictures, h, w, 3)


def shipped() -> Patches:
    """Stand-ins that come with the library: what a detector of text boundaries and a vision transformer saw."""
    data = jaxalign.datasets.load_patch_features()
    names = {"boundary detector": "pp-ocrv4 stride 16", "ViT-S/14": "vit-s14 layer 8"}
    return Patches({name: data.features[key] for name, key in names.items()}, np.asarray(data.pictures))


def pretrained(paths: list[Path]) -> Patches:
    """SAM and DINOv2 as published, on pictures from files or on the shipped ones."""
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
    found = {
        # SAM's neck is what its decoder gets; DINOv2 has a class token ahead of its patches.
        "SAM": jaxalign.interop.capture_features(sam[0], pixels[0], layers="neck", grid=GRID, batch_size=1)["neck"],
        "DINOv2": jaxalign.interop.capture_features(
            dino[0], pixels[1], layers="layernorm", prefix_tokens=1, grid=GRID, batch_size=1
        )["layernorm"],
    }
    return Patches({name: x.reshape(-1, x.shape[-1]) for name, x in found.items()}, np.stack(squares))


def square(image: np.ndarray, pixels: int = 224) -> np.ndarray:
    """The middle of a picture, so that both networks see the same; on so many pixels."""
    side = min(image.shape[:2])
    top, left = ((size - side) // 2 for size in image.shape[:2])
    cut = np.asarray(image[top : top + side, left : left + side], np.float32)
    resized = jax.image.resize(cut, (pixels, pixels, 3), "bilinear", antialias=True)
    return np.clip(np.asarray(resized).round(), 0, 255).astype(np.uint8)


def main(patches: Patches, out: Path) -> dict[str, float]:
    """Align, print and draw; returns the scores."""
    number = len(patches.pictures)
    where = np.argwhere(np.ones(GRID))
    positions, picture = np.tile(where, (number, 1)), np.repeat(np.arange(number), len(where))
    landmarks = np.flatnonzero(positions.sum(1) % 2 == 0)
    queries = np.flatnonzero(positions.sum(1) % 2 == 1)
    a, b = patches.features

    alignment = jaxalign.align(patches.features, landmarks=landmarks)
    rows = {name: np.asarray(x) for name, x in alignment.features.items()}
    found = [
        jaxalign.correspondence(rows[a][here], rows[b][here])
        for here in (queries[picture[queries] == k] for k in range(number))
    ]
    top1 = float(np.mean([one.top1 for one in found]))
    colors = {"before": own_colors(patches.features), "after": joint_colors(patches.features, landmarks)}
    scores = {
        when: agreement({name: x[queries] for name, x in one.items()}, [(a, b)], picture[queries])
        for when, one in colors.items()
    }
    print(f"{a} and {b}: {len(queries)} held-out patches of {number} pictures")
    print(f"  find themselves among the {len(queries) // number} of their picture: {top1:.1%}")
    for when, score in scores.items():
        print(f"  colours agree {when} alignment: {score.value:.3f} (p = {score.p_value:.3f})")

    out.mkdir(parents=True, exist_ok=True)
    shape = (number, *GRID, 3)
    groups = {when: {name: x.reshape(shape) for name, x in one.items()} for when, one in colors.items()}
    told = {when: f"agreement {score.value:.2f}" for when, score in scores.items()}
    jaxalign.plots.color_panels(groups, patches.pictures, scores=told).savefig(out / "colors.png", dpi=150)
    figure = plt.figure(figsize=(7, 3.4 * number), layout="constrained")
    for k, (axes, one) in enumerate(zip(np.atleast_2d(figure.subplots(number, 2)), found, strict=True)):
        here = queries[picture[queries] == k]
        jaxalign.plots.matches(*[patches.pictures[k]] * 2, positions[here], one.index, GRID, axes=axes)
        for ax, name in zip(axes, (a, b), strict=True):
            ax.set_title(name, fontsize=10)
    jaxalign.plots.match_legend(figure)
    figure.savefig(out / "matches.png", dpi=110)
    plt.close("all")
    print(f"pictures: {out}/colors.png, {out}/matches.png")
    return {"top1": top1, **{when: score.value for when, score in scores.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="SAM against DINO, before and after alignment.")
    parser.add_argument("--pretrained", action="store_true", help="SAM and DINOv2 from the Hugging Face hub")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="pictures, with --pretrained")
    parser.add_argument("--out", type=Path, default=Path("sam_vs_dino"))
    options = parser.parse_args()
    if options.images and not options.pretrained:
        parser.error("--images needs --pretrained: the shipped features are of the shipped pictures")
    main(pretrained(options.images) if options.pretrained else shipped(), options.out)
