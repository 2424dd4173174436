"""Hair, eyes, nose and mouth in the same color in three networks: before and after alignment, with controls.

Four crops of photographs, 32 x 32 patches each, in a vision transformer trained without labels (ViT-S/14, as DINOv2), a
convolutional network trained with labels (EfficientNet-Lite0) and a text-boundary detector (PP-OCRv4); their features
ship with the library. Before alignment each network is cut and colored by itself, after it all are cut together.

The consistency of parts is 1 - (mean color distance of the same part in two networks) / (that of different parts of an
image), for parts in boxes drawn by hand, over patches that are not landmarks: 1 if a part has one color in all
networks, 0 if its color tells nothing. The p-value is the share of assignments of the parts of one network to those of
the other, image by image, that are at least as consistent. Last, a new image is compared with one of the images that
its colors are from.

    python examples/parts_of_images.py                # prints tables, writes parts_of_images/*.png, in about a minute
    python examples/parts_of_images.py --out elsewhere
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from case_study import NETWORKS

import jaxalign
from jaxalign.datasets import PartFeatures
from jaxalign.images import ColoredImages
from jaxalign.report.coloring import separate_colors
from jaxalign.report.tables import format_table

Colors = Mapping[str, np.ndarray]  # {network: (images, 32, 32, 3)}
DRAWS = 10_000


@dataclass(frozen=True)
class Consistency:
    """How consistent the colors of parts are, and the share of random assignments that are at least as consistent."""

    value: float
    p_value: float


def main(out: Path) -> dict[str, Consistency]:
    """Compute, print and draw; returns the consistency of every method and control."""
    data = jaxalign.datasets.load_part_features()
    maps = {name: data.maps(name) for name in NETWORKS}
    position = np.tile(np.stack(np.indices(data.grid), -1), (len(data.images), 1, 1, 1)).astype(np.float32)
    controls = {"position only": position, data.controls[0]: data.maps(data.controls[0])}

    before = as_maps(separate_colors({name: data.features[name] for name in NETWORKS}), data)
    after = jaxalign.color_images(maps, data.images)
    distances = jaxalign.color_images(maps, data.images, method="distances")
    held_out = np.asarray(after.alignment.queries)
    pairs = list(itertools.combinations(NETWORKS, 2))
    found = {
        "before: each network by itself": consistency(before, pairs, data, held_out),
        "after: aligned and cut together": consistency(after.colors, pairs, data, held_out),
        "after, colors that keep distances": consistency(distances.colors, pairs, data, held_out),
    }
    for a, b in pairs:
        found[f"after: {a}, {b}"] = consistency(after.colors, [(a, b)], data, held_out)
    for name, control in controls.items():
        with_control = jaxalign.color_images({**maps, name: control})
        mixed = [(name, network) for network in NETWORKS]
        found[f"control: {name}, with the networks"] = consistency(with_control.colors, mixed, data, held_out)
    new, of_new = new_images(data, maps)
    found |= of_new
    rows = [(name, f"{result.value:.3f}", f"{result.p_value:.4f}") for name, result in found.items()]
    print(f"{len(held_out)} patches that are not landmarks, of {len(data.images)} images in {len(NETWORKS)} networks\n")
    print(format_table(("colors of the same part in two networks, or images", "consistency", "p"), rows))

    out.mkdir(parents=True, exist_ok=True)
    scores = [f"consistency {result.value:.2f}" for result in list(found.values())[:2]]
    groups = {"before": titled(before), "after": titled(after.colors)}
    captions = dict(zip(groups, scores, strict=True))
    figure = jaxalign.plots.color_panels(groups, data.images, scores=captions, smooth=True)
    figure.savefig(out / "before_after.png", dpi=150)
    new.savefig(out / "new_images.png", dpi=150)
    nested(after, data).savefig(out / "nested.png", dpi=120)
    prompted(after, data).savefig(out / "prompts.png", dpi=130)
    plt.close("all")
    print(f"\nfigures in {out}/: {', '.join(sorted(path.name for path in out.glob('*.png')))}")
    return found


def as_maps(colors: Colors, data: PartFeatures) -> Colors:
    """Colors of patches as maps."""
    return {name: values.reshape(len(data.images), *data.grid, 3) for name, values in colors.items()}


def titled(colors: Colors) -> Colors:
    """Colors under the names of figures."""
    return {NETWORKS[name]: np.asarray(values) for name, values in colors.items()}


def consistency(colors: Colors, pairs: list[tuple[str, str]], data: PartFeatures, patches: np.ndarray) -> Consistency:
    """The consistency of parts over pairs of networks, on some patches."""
    tables = []
    for image in range(len(data.images)):
        parts = parts_of(image, data, patches)
        own = {name: np.asarray(colors[name][image], np.float64) for name in {name for pair in pairs for name in pair}}
        tables.append(np.mean([part_distances(own[a], own[b], parts, parts) for a, b in pairs], 0))
    return of_tables(tables)


def parts_of(image: int, data: PartFeatures, patches: np.ndarray | None = None) -> dict[int, np.ndarray]:
    """The patches of every part of an image, counted within the image; of these patches only, if given."""
    size = data.grid[0] * data.grid[1]
    labels = data.part_index[image * size : (image + 1) * size]
    kept = np.arange(size) if patches is None else patches[patches // size == image] % size
    return {part: kept[labels[kept] == part] for part in np.unique(labels[kept]) if part >= 0}


def part_distances(
    a: np.ndarray, b: np.ndarray, parts: dict[int, np.ndarray], others: dict[int, np.ndarray]
) -> np.ndarray:
    """Mean color distances between parts of two maps of colors, (parts, parts), for the parts that both have."""
    a, b = a.reshape(-1, 3), b.reshape(-1, 3)
    both = [part for part in parts if part in others]
    return np.array(
        [[np.linalg.norm(a[parts[i]][:, None] - b[others[j]][None], axis=-1).mean() for j in both] for i in both]
    )


def of_tables(tables: list[np.ndarray]) -> Consistency:
    """The consistency from distances between parts, and its p-value."""
    other = np.concatenate([table[~np.eye(len(table), dtype=bool)] for table in tables]).mean()
    same = np.concatenate([np.diagonal(table) for table in tables]).mean()
    rng, number = np.random.default_rng(0), sum(map(len, tables))
    drawn = np.zeros(DRAWS)
    for table in tables:
        orders = rng.permuted(np.tile(np.arange(len(table)), (DRAWS, 1)), axis=1)
        drawn += table[np.arange(len(table)), orders].sum(1) / number
    return Consistency(float(1 - same / other), float((1 + np.sum(drawn <= same)) / (1 + DRAWS)))


def new_images(data: PartFeatures, maps: Colors) -> tuple[plt.Figure, dict[str, Consistency]]:
    """Two images determine landmarks, cut and colors; the others are colored by them: does the close-up look alike?"""
    old, new = [0, 2], [1, 3]
    colored = jaxalign.color_images({name: a[old] for name, a in maps.items()})
    of_new = colored.transform({name: a[new] for name, a in maps.items()})
    found = {}
    for name in NETWORKS:
        portrait, close_up = (np.asarray(colors[name][0], np.float64) for colors in (colored.colors, of_new))
        table = part_distances(portrait, close_up, parts_of(0, data), parts_of(1, data))
        found[f"portrait and the new close-up: {name}"] = of_tables([table])
    stacked = {NETWORKS[name]: np.concatenate([colored.colors[name], of_new[name]]) for name in NETWORKS}
    title = "two images that were cut together, and two new ones in their colors"
    return jaxalign.plots.color_panels({title: stacked}, data.images[old + new], smooth=True), found


def nested(colored: ColoredImages, data: PartFeatures) -> plt.Figure:
    """Segments of the first image in every network, from coarse to fine."""
    numbers = (2, 3, 4, 6, 8, 12)
    figure, axes = plt.subplots(len(NETWORKS), len(numbers), figsize=(8, 4.2), layout="constrained")
    for column, number in enumerate(numbers):
        labels = colored.segments(number)
        for line, name in enumerate(NETWORKS):
            jaxalign.plots.segments(np.asarray(labels[name][0]), data.images[0], ax=axes[line, column])
        axes[0, column].set_title(f"{number} segments", fontsize=9)
    for line, label in enumerate(NETWORKS.values()):
        axes[line, 0].text(-0.05, 0.5, label, transform=axes[line, 0].transAxes, ha="right", va="center", fontsize=8)
    return figure


def prompted(colored: ColoredImages, data: PartFeatures) -> plt.Figure:
    """Points on the hair of the first image in the first network, and its segment in all images and networks."""
    inside, outside = [(6, 16), (11, 24), (12, 7)], [(2, 2), (17, 15), (30, 15)]
    rows = [[r * data.grid[1] + c for r, c in points] for points in (inside, outside)]
    shape = (len(NETWORKS), len(data.images), *data.grid)
    scores = np.asarray(jaxalign.prompt_scores(colored.cut, *rows)).reshape(shape)
    figure, axes = plt.subplots(*shape[:2], figsize=(6.6, 5), layout="constrained")
    height, width = data.grid
    for line, label in enumerate(NETWORKS.values()):
        for column, ax in enumerate(axes[line]):
            ax.imshow(data.images[column], extent=(0, width, height, 0))
            shade = np.zeros((*data.grid, 4))
            shade[..., 3] = np.where(scores[line, column] > 0, 0, 0.75)
            ax.imshow(shade, extent=(0, width, height, 0), interpolation="nearest")
            ax.set_axis_off()
        axes[line, 0].text(-0.05, 0.5, label, transform=axes[line, 0].transAxes, ha="right", va="center", fontsize=8)
    for points, mark, color in ((inside, "o", "lime"), (outside, "X", "red")):
        y, x = np.array(points).T + 0.5
        axes[0, 0].scatter(x, y, marker=mark, c=color, s=26, edgecolors="black", linewidths=0.5)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Parts of images in three networks, before and after alignment.")
    parser.add_argument("--out", type=Path, default=Path("parts_of_images"))
    main(parser.parse_args().out)
