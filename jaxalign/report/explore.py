"""`jaxalign explore`: one self-contained page to explore the patches of images in several networks.

The page holds compressed rows (see `compression`) of each network by itself, and of the relative features of all
networks. From these its script computes the affinity of every patch to the one that is selected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import permutations
from math import isqrt
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxalign import images, io
from jaxalign.alignment import align
from jaxalign.colors import rgb
from jaxalign.files.storage import replace_file
from jaxalign.matching import match
from jaxalign.report import commands
from jaxalign.report.baselines import standardized
from jaxalign.report.coloring import COMPONENTS, Features, checkerboard, checkerboard_landmarks
from jaxalign.report.compression import CompressedRows, Error, compress, compression_error
from jaxalign.report.explore_page import page
from jaxalign.segments import nested_segments

# Bytes of the compressed codes of all samples. In base64 they take a third more.
_BYTES_AFTER, _BYTES_BEFORE = 3_400_000, 1_700_000
# Sides of the grid, at least: half of the positions are the landmarks of `match`.
_LEAST_SIDE = 4

Grid = tuple[int, int]


@dataclass(frozen=True)
class Side:
    """What the page shows before or after alignment. Samples are stacked network after network.

    Attributes:
        rows: compressed rows of each network (before), or of all networks together (after).
        colors: red, green and blue from 0 to 255.
        segments: labels of k = 1, 2, ... segments, each nested in those before.
        error: of the affinities of `rows`; before alignment on average over the networks.
    """

    rows: tuple[CompressedRows, ...]
    colors: UInt8[np.ndarray, "n 3"]
    segments: UInt8[np.ndarray, "segments n"]
    error: Error


@dataclass(frozen=True)
class Matches:
    """The match of every patch among the patches of the same image in every other network.

    Attributes:
        partner: its position in the image, -1 where there is none.
        confidence: percent.
    """

    partner: Int[np.ndarray, "networks networks n"]
    confidence: UInt8[np.ndarray, "networks networks n"]


def explore_files(options: dict[str, Any]) -> commands.Result:
    """Write the page for maps of the same images in several networks."""
    inputs = read_networks(options["inputs"], options["layer"])
    photos = commands.read_images(options["images"], None)
    assert photos is not None
    maps = {name: as_maps(stored, inputs.rows[name]) for name, stored in inputs.arrays.items()}
    for name, x in maps.items():
        if len(x) != photos.number:
            raise ValueError(
                f"--images {options['images']}: {photos.number} images, but {io.printable(name)} has maps of {len(x)}."
            )
    out = options["out"]
    _check_output(out, [*map(Path, inputs.hashes), options["images"]], force=options["force"])
    maps, resized = on_one_grid(maps)
    grid = next(iter(maps.values())).shape[1:3]
    features = {name: x.reshape(-1, x.shape[-1]) for name, x in maps.items()}
    before, after = separate_side(features, options), joint_side(features, grid, photos.number, options)
    matches, unmatched = find_matches(features, grid)
    notes = (*inputs.notes, *resized, *unmatched)
    errors = {"before": before.error._asdict(), "after": after.error._asdict()}
    data = {
        "networks": [io.printable(name) for name in features], "grid": grid, "density": options["density"],
        "error": errors, "notes": notes,
        "provenance": {**commands.provenance(options, inputs), "images sha256": photos.sha256},
    }  # fmt: skip
    content = page(data, photos.shown, {"before": before, "after": after}, matches).encode()
    replace_file(out, content)
    h, w = grid
    text = (
        f"{io.printable(str(out))}, {len(content) / 1e6:.1f} MB: {len(features)} network(s), {photos.number} images of "
        f"{h} x {w} patches\nAffinities on the page differ from the exact ones by {after.error.mean:.4f} on average "
        f"after alignment (those above 0.2 by {after.error.strong:.3f}), and by {before.error.mean:.4f} before it "
        f"({before.error.strong:.3f})."
    )
    return commands.Result({**data, "files": [out.name], "bytes": len(content)}, commands.with_notes(text, notes))


# --- from files to maps on one grid ----------------------------------------------------------------------------------


def read_networks(paths: Sequence[Path], layer: str | None) -> commands.Input:
    """One layer of each input, named after the input: the last one whose name matches `layer`."""
    names = [path.name if path.is_dir() else path.stem for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    entries: list[tuple[Path, str, io.FeatureSet]] = []
    notes: list[str] = []
    for path, name in zip(paths, names, strict=True):
        layers = io.read_features(path)
        chosen = [key for key in layers if layer is None or fnmatchcase(key, layer)]
        if not chosen:
            known = ", ".join(io.printable(key) for key in layers)
            raise ValueError(f"--layer {layer}: no layer of {path} has such a name; its layers are {known}.")
        entries.append((path, name, layers[chosen[-1]]))
        if len(chosen) > 1:
            last = io.printable(chosen[-1])
            notes.append(f"{io.printable(name)}: {last}, the last of {len(chosen)} layers (see --layer)")
        notes += commands.channels_first(name, layers[chosen[-1]].values)
    return replace(commands.check_entries(entries, "samples"), notes=tuple(notes))


def as_maps(stored: io.FeatureSet, rows: Any) -> Float[np.ndarray, "images h w d"]:
    """The rows of maps, or of tokens on a square grid, as maps."""
    shape = stored.values.shape
    if len(shape) == 3 and isqrt(shape[1]) ** 2 == shape[1]:
        shape = (shape[0], isqrt(shape[1]), isqrt(shape[1]), shape[2])
    if len(shape) != 4:
        way_out = "" if len(shape) == 2 else f" If the first of its {shape[1]} tokens are no patches, leave these out."
        raise ValueError(
            f"{stored.path}: patches need maps of shape (n, h, w, d), or a square number of tokens, (n, tokens, d); "
            f"{io.printable(stored.name)} has shape {shape}.{way_out}"
        )
    (values,) = commands.in_memory({stored.name: rows}).values()
    return values.reshape(shape)


def on_one_grid(maps: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Maps resized to one grid, and notes on which were."""
    found = {name: np.asarray(x) for name, x in images.on_one_grid(maps).items()}
    h, w = next(iter(found.values())).shape[1:3]
    if min(h, w) < _LEAST_SIDE:
        raise ValueError(
            f"the maps have at most {h} x {w} positions, at least {_LEAST_SIDE} x {_LEAST_SIDE} are needed: choose an "
            "earlier layer with --layer."
        )
    sizes = {name: " x ".join(map(str, x.shape[1:3])) for name, x in maps.items() if x.shape[1:3] != (h, w)}
    return found, [f"{io.printable(name)}: maps of {size} were resized to {h} x {w}" for name, size in sizes.items()]


def _check_output(out: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Raise unless the page can be written to `out`."""
    if out.is_dir():
        raise FileExistsError(f"--out {out} is a folder: name a file, such as {out / 'explore.html'}.")
    if out.exists() and (not force or out.resolve() in [path.resolve() for path in inputs]):
        raise FileExistsError(f"--out {out} exists: name another file, or use --force to overwrite an earlier page.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}. Make it, or name another file.")


# --- before and after alignment --------------------------------------------------------------------------------------


def separate_side(features: Features, options: Mapping[str, Any]) -> Side:
    """Before alignment: each network by itself, with standardized channels."""
    num_bytes = _BYTES_BEFORE // len(features)
    sides = [_side(name, standardized(x).astype(np.float32), num_bytes, options) for name, x in features.items()]
    mean, strong, largest = zip(*(side.error for side in sides), strict=True)
    return Side(
        tuple(rows for side in sides for rows in side.rows),
        np.concatenate([side.colors for side in sides]),
        np.concatenate([side.segments for side in sides], 1),
        Error(float(np.mean(mean)), float(np.mean(strong)), max(largest)),
    )


def joint_side(features: Features, grid: Grid, number_of_images: int, options: Mapping[str, Any]) -> Side:
    """After alignment: the relative features of all networks together."""
    landmarks = checkerboard_landmarks(number_of_images, grid, options["landmarks"], options["seed"])
    stacked = np.asarray(align(features, landmarks=landmarks).stacked, np.float32)
    return _side("relative features", stacked, _BYTES_AFTER, options)


def _side(name: str, x: Float[np.ndarray, "n d"], num_bytes: int, options: Mapping[str, Any]) -> Side:
    density, number, seed = options["density"], options["segments"], options["seed"]
    try:
        rows = compress(x, num_bytes, density)
    except ValueError as error:  # equal patches, as in images without content
        raise ValueError(f"{io.printable(name)}: {error}") from error
    cut = images.cut_rows(x, max(number, COMPONENTS), density=density, key=jax.random.key(seed))
    colors = np.round(255 * np.asarray(rgb(cut, num_components=COMPONENTS))).astype(np.uint8)
    segments = np.asarray(nested_segments(cut, number)).astype(np.uint8)
    return Side((rows,), colors, segments, compression_error(x, rows, density, seed))


# --- matches ---------------------------------------------------------------------------------------------------------


def find_matches(features: Features, grid: Grid) -> tuple[Matches, list[str]]:
    """The match of every patch, image by image, and notes on images without any.

    The patches of the networks are the same samples. Each half of a checkerboard is matched with the other half known.
    """
    size, names = grid[0] * grid[1], list(features)
    shape = (len(names), len(names), len(features[names[0]]))
    partner, confidence, notes = np.full(shape, -1), np.zeros(shape, np.uint8), []
    known = checkerboard(grid)
    for start in range(0, shape[2], size) if len(names) > 1 else ():
        patches = {name: x[start : start + size] for name, x in features.items()}
        for half in (known, ~known):
            try:
                matching = match(patches, landmarks=np.flatnonzero(half), rounds=0)
            except ValueError as error:  # an image without content has equal patches
                notes.append(f"image {start // size + 1} has no matches: {error}")
                break
            queries = np.flatnonzero(~half)
            for a, b in permutations(range(len(names)), 2):
                pair = names[a], names[b]
                partner[a, b, start + queries] = matching.candidate[pair][queries]
                confidence[a, b, start + queries] = np.round(100 * matching.confidence[pair][queries])
    return Matches(partner, confidence), notes
