"""What two networks share, as a function of the number of samples: coarse structure looks like agreement of neighbors.

    python examples/number_of_samples.py --out number_of_samples

Both networks know the same 100 clusters (such as classes), but place samples within a cluster independently. Among a
thousand samples the ten nearest neighbors of a sample are the others of its cluster, and agree. Among many thousand
they are its nearest within the cluster, and agree by chance: 10 / (samples of a cluster). CKA, which weighs all pairs,
finds the shared clusters at any size. A second pair of networks also shares most of what is within clusters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import matplotlib
import numpy as np

import jaxalign

matplotlib.use("agg")

CLUSTERS, NEIGHBORS = 100, 10
SIZES = (250, 500, 1000, 2000, 4000, 8000, 16_000)


def networks(rng: np.random.Generator, n: int, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """Features of two networks that share clusters, and a part of what is within them."""
    cluster = rng.integers(CLUSTERS, size=n)
    centers, common = 6 * rng.normal(size=(CLUSTERS, 6)), rng.normal(size=(n, 6))
    found = []
    for _ in "xy":
        within = shared * common + np.sqrt(1 - shared**2) * rng.normal(size=(n, 6))
        rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        found.append(((centers[cluster] + within) @ rotation).astype(np.float32))
    return found[0], found[1]


def main(out: Path, sizes: tuple[int, ...] = SIZES) -> dict[str, jaxalign.ScalingCurve]:
    """Compute, print and draw the curves."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    curves = {}
    for name, shared in (("clusters alone", 0.0), ("clusters and what is within", 0.95)):
        x, y = networks(rng, max(sizes), shared)
        options = {"key": key, "sizes": sizes, "max_subsamples": 10}
        curves[f"mutual 10-NN, {name}"] = jaxalign.scaling_curve(x, y, "mutual_knn", k=NEIGHBORS, **options)
        curves[f"CKA, {name}"] = jaxalign.scaling_curve(x, y, kernel="linear", **options)
    print(f"{'samples':>8}  {'chance':>7}  " + "  ".join(f"{name:>40}" for name in curves))
    for k, size in enumerate(sizes):
        chance = NEIGHBORS / max(size / CLUSTERS, NEIGHBORS)  # of neighbors within the own cluster
        values = "  ".join(f"{curve.value[k]:>40.3f}" for curve in curves.values())
        print(f"{size:>8}  {chance:>7.3f}  {values}")
    out.mkdir(parents=True, exist_ok=True)
    ax = jaxalign.plots.scaling(curves, label="similarity")
    ax.figure.savefig(out / "scaling_curve.png", dpi=130)
    return curves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("number_of_samples"))
    main(parser.parse_args().out)
