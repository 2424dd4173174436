"""The same colors for the same parts: three kinds of networks on the same photographs, before and after alignment.

The networks are a text-boundary detector (PP-OCRv4), a vision transformer trained without labels (ViT-S/14, as DINOv2)
and a convolutional network trained with labels (EfficientNet-Lite0). Their features ship with the library. Before
alignment each network is cut and colored separately. After alignment the relative features of all networks are cut
together, so one map from rows to colors holds for all. The agreement of colors, over patches that are not landmarks, is
1 if the same patch has the same color in two networks, and 0 if its color is no closer than that of any other patch of
the image.

    python examples/case_study.py                # prints tables, writes case_study/*.png, in under a minute
    python examples/case_study.py --out elsewhere
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from color_agreement import Agreement, agreement, pairs_of_networks, variance_scaled_colors

import jaxalign
from jaxalign.alignment import PUBLISHED
from jaxalign.report.coloring import Colors, joint_colors, joint_cut, separate_colors
from jaxalign.report.demo import network_of
from jaxalign.report.tables import format_table

NETWORKS = {
    "vit-s14 layer 8": "ViT-S/14\nself-supervised",
    "efficientnet-lite0 block 10": "EfficientNet\nsupervised",
    "pp-ocrv4 stride 16": "PP-OCRv4\ntext detector",
}
POSITION = "position only"


def main(out: Path) -> dict[str, Agreement]:
    """Compute, print and draw; returns the agreement of every method."""
    data = jaxalign.datasets.load_patch_features()
    landmarks = np.flatnonzero(data.positions.sum(-1) % 2 == 0)  # a checkerboard
    queries = np.setdiff1d(np.arange(len(data.positions)), landmarks)
    features = {name: data.features[name] for name in NETWORKS}
    pairs = pairs_of_networks(list(NETWORKS))

    def score(colors: Colors, between: list[tuple[str, str]] = pairs) -> Agreement:
        held_out = {name: values[queries] for name, values in colors.items()}
        return agreement(held_out, between, data.picture_index[queries], data.positions[queries])

    colors = {
        "before: each network separately": separate_colors(features),
        "variance-scaled rows, cut together": variance_scaled_colors(features, landmarks),
        "auto-scaled rows (as published), cut together": joint_colors(features, landmarks, PUBLISHED),
        "after: decorrelated rows, cut together": joint_colors(features, landmarks),
        "after, colors by t-SNE": joint_colors(features, landmarks, method="tsne"),
    }
    agreements = {name: score(of_method) for name, of_method in colors.items()}
    controls = {
        POSITION: (data.positions - data.positions.mean(0)).astype(np.float32),
        data.controls[0]: data.features[data.controls[0]],
    }
    for name, x in controls.items():
        together = joint_colors({**features, name: x}, landmarks)
        pairs_with_control = [(name, network) for network in NETWORKS]
        agreements[f"control: {name}, with the networks"] = score(together, pairs_with_control)
    print(f"{len(queries)} held-out patches of three photographs, {len(NETWORKS)} networks, all pairs\n")
    rows = [(name, f"{result.value:.3f}", f"{result.p_value:.3f}") for name, result in agreements.items()]
    print(format_table(("colors of the same patch in two networks", "agreement", "p"), rows))

    trained = [name for name in data.features if name not in data.controls]
    names, values = layer_agreement(data, trained, landmarks, queries)
    layer_rows = [
        (name, *(f"{v:.2f}" if np.isfinite(v) else "" for v in row)) for name, row in zip(names, values, strict=True)
    ]
    print("\nevery layer with every layer of another network, each pair aligned separately\n")
    print(format_table(("agreement", *(str(k + 1) for k in range(len(names)))), layer_rows))

    out.mkdir(parents=True, exist_ok=True)
    before, _, _, after, tsne = colors.values()
    scores = [result.value for result in agreements.values()]
    save = {"before": (before, scores[0]), "after": (after, scores[3])}
    panels(data, save).savefig(out / "before_after.png", dpi=150)
    panels(data, {**save, "after, t-SNE": (tsne, scores[4])}, pictures=[0]).savefig(out / "face.png", dpi=200)
    panels(data, {"variance-scaled": (colors["variance-scaled rows, cut together"], scores[1]),
                  "as published": (colors["auto-scaled rows (as published), cut together"], scores[2]),
                  "recommended": (after, scores[3])},
           pictures=[0, 2]).savefig(out / "methods.png", dpi=130)  # fmt: skip
    figure, ax = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
    jaxalign._draw.heat_map(values, names, names, "color agreement", ax=ax)
    figure.savefig(out / "layers.png", dpi=130)
    segmented(data, features, landmarks).savefig(out / "segments.png", dpi=130)
    plt.close("all")
    print(f"\nfigures in {out}/: {', '.join(sorted(path.name for path in out.glob('*.png')))}")
    return agreements


def maps(data: Any, colors: Colors, pictures: list[int]) -> dict[str, np.ndarray]:
    """Colors as maps, {network: (pictures, 16, 16, 3)}."""
    shape = (len(data.picture_names), *data.grid, 3)
    return {NETWORKS[name]: values.reshape(shape)[pictures] for name, values in colors.items()}


def panels(data: Any, groups: dict[str, tuple[Colors, float]], pictures: list[int] | None = None) -> Any:
    """Photographs, and below them the colors of every network, group by group."""
    pictures = list(range(len(data.picture_names))) if pictures is None else pictures
    return jaxalign.plots.color_panels(
        {name: maps(data, colors, pictures) for name, (colors, _) in groups.items()},
        data.pictures[pictures],
        scores={name: f"agreement {value:.2f}" for name, (_, value) in groups.items()},
    )


def layer_agreement(
    data: Any, names: list[str], landmarks: np.ndarray, queries: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Agreement of each pair of layers of different networks, aligned and cut as a pair."""
    values = np.full((len(names), len(names)), np.nan)
    for a, b in pairs_of_networks(names):
        colors = joint_colors({name: data.features[name] for name in (a, b)}, landmarks)
        held_out = {name: x[queries] for name, x in colors.items()}
        result = agreement(held_out, [(a, b)], data.picture_index[queries], data.positions[queries])
        i, j = names.index(a), names.index(b)
        values[i, j] = values[j, i] = result.value
    return names, values


def segmented(data: Any, features: dict[str, np.ndarray], landmarks: np.ndarray) -> Any:
    """The joint cut as segments, numbered the same in all networks and images."""
    labels = np.asarray(jaxalign.kway(joint_cut(features, landmarks)))
    labels = labels.reshape(len(features), len(data.picture_names), *data.grid)
    figure, axes = plt.subplots(*labels.shape[:2], figsize=(5.4, 5.4), layout="constrained")
    for line, (name, of_network) in enumerate(zip(features, labels, strict=True)):
        for column, of_picture in enumerate(of_network):
            jaxalign.plots.segments(of_picture, data.pictures[column], ax=axes[line, column])
        axes[line, 0].set_title(network_of(name), fontsize=8, loc="left")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Colors of three networks before and after alignment.")
    parser.add_argument("--out", type=Path, default=Path("case_study"))
    main(parser.parse_args().out)
