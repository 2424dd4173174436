"""SAM and DINO on the same images: the same colors for the same parts, and the best match of each patch.

    python examples/sam_vs_dino.py               # shipped features: a text detector and a ViT trained as DINOv2
    python examples/sam_vs_dino.py --pretrained  # SAM ViT-B and DINOv2 ViT-S, from the Hugging Face hub
    python examples/sam_vs_dino.py --pretrained --models sam dinov3 clip sd --images portrait.jpg street.jpg

--pretrained needs pip install "jaxalign[networks]" and, for the first run, a connection to download the weights; the
networks are defined in pretrained.py. For patches that are not landmarks, the script prints how often their best match
in another network is the same patch, and how well the colors of the networks agree. It writes sam_vs_dino/colors.png
and, for the first two networks, matches.png.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pretrained
from color_agreement import agreement
from matplotlib.figure import Figure

import jaxalign
from jaxalign.report.coloring import joint_colors, separate_colors


class Patches(NamedTuple):
    """Features of networks for the patches of images."""

    features: dict[str, np.ndarray]  # (images * rows * columns, d)
    pictures: np.ndarray  # (images, h, w, 3)
    grid: tuple[int, int]  # (rows, columns)


def shipped() -> Patches:
    """Shipped features of two similar networks: a detector of text boundaries and a vision transformer."""
    data = jaxalign.datasets.load_patch_features()
    names = {"text detector": "pp-ocrv4 stride 16", "ViT-S/14": "vit-s14 layer 8"}
    features = {name: data.features[key] for name, key in names.items()}
    return Patches(features, np.asarray(data.pictures), (16, 16))


def from_hub(models: list[str], paths: list[Path], grid: tuple[int, int]) -> Patches:
    """Features of published networks, on images from files or on the shipped ones."""
    images = [read(path) for path in paths] or list(np.asarray(jaxalign.datasets.load_patch_features().pictures))
    features = {}
    for network in (pretrained.NETWORKS[model] for model in models):
        print(f"features of {network.name}, {network.hub}")
        features[network.name] = pretrained.features(network, images, grid)
    return Patches(features, np.stack([pretrained.square(image, 448) for image in images]), grid)


def read(path: Path) -> np.ndarray:
    """The pixels of an image file, turned as the camera was held."""
    try:
        from PIL import Image, ImageOps

        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except ImportError:
        raise SystemExit('--images needs Pillow: pip install "jaxalign[networks]"') from None
    except OSError as error:
        raise SystemExit(f"--images: {path} cannot be read ({error}); use JPEG or PNG files.") from error


def main(patches: Patches, out: Path) -> dict[str, float]:
    """Align, print and draw; return the scores."""
    number = len(patches.pictures)
    cells = np.argwhere(np.ones(patches.grid))
    positions, image = np.tile(cells, (number, 1)), np.repeat(np.arange(number), len(cells))
    landmarks = np.flatnonzero(positions.sum(1) % 2 == 0)
    queries = np.flatnonzero(positions.sum(1) % 2 == 1)
    pairs = list(itertools.combinations(patches.features, 2))

    alignment = jaxalign.align(patches.features, landmarks=landmarks)
    rows = {name: np.asarray(x) for name, x in alignment.features.items()}
    queries_of = [queries[image[queries] == k] for k in range(number)]
    matches = {(a, b): [jaxalign.correspondence(rows[a][q], rows[b][q]) for q in queries_of] for a, b in pairs}
    top1 = {pair: float(np.mean([match.top1 for match in found])) for pair, found in matches.items()}
    colors = {"before": separate_colors(patches.features), "after": joint_colors(patches.features, landmarks)}
    scores = {
        when: agreement({name: x[queries] for name, x in by_network.items()}, pairs, image[queries], positions[queries])
        for when, by_network in colors.items()
    }
    print(f"{' and '.join(patches.features)}: {len(queries)} held-out patches of {number} images")
    for (a, b), share in top1.items():
        print(f"  {a} to {b}: {share:.1%} matched with themselves, among the {len(queries) // number} of their image")
    for when, score in scores.items():
        print(f"  color agreement {when} alignment: {score.value:.3f} (p = {score.p_value:.3g})")

    out.mkdir(parents=True, exist_ok=True)
    shape = (number, *patches.grid, 3)
    panels = {when: {name: x.reshape(shape) for name, x in parts.items()} for when, parts in colors.items()}
    captions = {when: f"agreement {score.value:.2f}" for when, score in scores.items()}
    jaxalign.plots.color_panels(panels, patches.pictures, scores=captions).savefig(out / "colors.png", dpi=150)
    indices = [np.asarray(match.index) for match in matches[pairs[0]]]
    draw_matches(patches, pairs[0], [positions[q] for q in queries_of], indices).savefig(out / "matches.png", dpi=110)
    plt.close("all")
    print(f"figures: {out}/colors.png, {out}/matches.png")
    return {"top1": float(np.mean(list(top1.values()))), **{when: score.value for when, score in scores.items()}}


def draw_matches(
    patches: Patches, names: tuple[str, str], positions: list[np.ndarray], indices: list[np.ndarray]
) -> Figure:
    """The matches of two networks, one row per image."""
    number = len(patches.pictures)
    figure = plt.figure(figsize=(7, 3.4 * number), layout="constrained")
    for k, axes in enumerate(np.atleast_2d(figure.subplots(number, 2))):
        picture = patches.pictures[k]
        jaxalign.plots.matches(picture, picture, positions[k], indices[k], patches.grid, axes=axes)
        for ax, name in zip(axes, names, strict=True):
            ax.set_title(name, fontsize=10)
    jaxalign.plots.match_legend(figure)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="SAM against DINO, before and after alignment.")
    parser.add_argument("--pretrained", action="store_true", help="networks from the Hugging Face hub")
    parser.add_argument(
        "--models", nargs="+", choices=pretrained.NETWORKS, default=["sam", "dinov2"], help="with --pretrained"
    )
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="image files, with --pretrained")
    parser.add_argument("--grid", type=int, default=16, help="rows of patches, with --pretrained; 32 takes minutes")
    parser.add_argument("--out", type=Path, default=Path("sam_vs_dino"))
    options = parser.parse_args(arguments)
    options.models = list(dict.fromkeys(options.models))
    if options.images and not options.pretrained:
        parser.error("--images needs --pretrained: the shipped features belong to the shipped images")
    if len(options.models) < 2:
        parser.error("--models needs two or more different networks, as in --models sam dinov2")
    if not 2 <= options.grid <= 64:
        parser.error(f"--grid must be from 2 to 64; got {options.grid}")
    return options


if __name__ == "__main__":
    options = parse()
    grid = (options.grid, options.grid)
    main(from_hub(options.models, options.images, grid) if options.pretrained else shipped(), options.out)
