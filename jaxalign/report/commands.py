"""The commands of the command line: from files to tables, figures and a report, with their provenance.

Every command returns its results as text and as plain data; `jaxalign.cli` prints one of the two.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import io, streaming
from jaxalign._memory import check_bytes
from jaxalign._numbers import is_wide
from jaxalign._version import __version__
from jaxalign.alignment import PUBLISHED, Alignment, align
from jaxalign.bandwidth import mean_density, solve_sigma
from jaxalign.colors import rgb
from jaxalign.files.readers import open_npy
from jaxalign.files.sources import rows_are_finite
from jaxalign.files.storage import PREFIX, hash_of, json_value, locked, read_json, replace_file
from jaxalign.grid import ComparisonGrid, compare_grid
from jaxalign.kernels import RBF, Laplacian
from jaxalign.plan import Plan
from jaxalign.report.baselines import standardized
from jaxalign.report.statistics import describe, run_test
from jaxalign.report.tables import format_table
from jaxalign.segments import kway
from jaxalign.spectral import normalized_cut

# Images shown in a report.
SHOWN_IMAGES = 6


@dataclass(frozen=True)
class Result:
    """The result of a command, as data and as text."""

    data: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Input:
    """Representations from files, checked."""

    rows: dict[str, Any]  # name: (samples, d)
    arrays: dict[str, io.FeatureSet]  # name: as stored
    notes: tuple[str, ...]
    hashes: dict[str, str]  # file: SHA-256 when it was read


def read(paths: list[Path], positions: io.Positions) -> Input:
    """Representations from files and folders, with unique names; nan and inf are rejected."""
    return check_entries(
        [(path, name, stored) for path in paths for name, stored in io.read_features(path).items()], positions
    )


def check_entries(entries: list[tuple[Path, str, io.FeatureSet]], positions: io.Positions) -> Input:
    """Representations (input, name, as stored) with unique names; nan and inf are rejected."""
    names_clash = len({name for _, name, _ in entries}) < len(entries)
    arrays: dict[str, io.FeatureSet] = {}
    for path, name, stored in entries:
        label = f"{path.name if path.is_dir() else path.parent.name}/{name}" if names_clash else name
        if label in arrays:
            raise ValueError(
                f"{arrays[label].path} and {stored.path} both hold a representation named {label!r}: rename one."
            )
        arrays[label] = stored
    rows, notes = {}, []
    for name, stored in arrays.items():
        values = stored.rows(positions)
        _reject_missing(name, stored, values)
        rows[name] = as_floats(name, stored, values)
        if stored.values.ndim > 2 and positions == "samples":
            shape = " x ".join(map(str, stored.values.shape[:-1]))
            notes.append(f"each of {shape} positions is a sample (see --positions)")
        notes += channels_first(name, stored.values)
    hashes = {str(path): hash_of(path) for path in sorted({stored.path for stored in arrays.values()})}
    return Input(rows, arrays, tuple(dict.fromkeys(notes)), hashes)


def as_floats(name: str, stored: io.FeatureSet, values: Any) -> Any:
    """Features as float32 or float64. Without --x64 the library centers float64 features before it narrows them."""
    if values.dtype == np.float64 and is_wide(values.dtype):
        largest = max(float(np.abs(part).max()) for part in np.split(values, range(65536, len(values), 65536)))
        if largest > float(np.finfo(np.float32).max):
            raise ValueError(
                f"{io.printable(name)} in {stored.path} reaches {largest:.3g}, beyond float32: --x64 computes in "
                "float64."
            )
    if values.dtype in (np.float32, np.float64):
        return values
    _check_fits(name, 4 * values.size, "Save it as float32: such .npy files are read block by block")
    return np.asarray(values, np.float32)


def channels_first(name: str, values: Any) -> list[str]:
    """A note if the channels of maps seem to come first: the last two axes are equal, as in square maps."""
    if values.ndim != 4 or not values.shape[1] != values.shape[2] == values.shape[3]:
        return []
    return [
        f"{io.printable(name)} of shape {values.shape} was read with channels last; if they are "
        "first, as in torch, write np.moveaxis(x, 1, -1)"
    ]


def _check_fits(name: str, nbytes: int, way_out: str) -> None:
    check_bytes(f"{io.printable(name)} takes {nbytes / 1e9:.3g} GB of memory", nbytes, f"{way_out}.")


def in_memory(rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Representations as arrays, not memory maps; raises if one does not fit into memory."""
    for name, values in rows.items():
        _check_fits(name, values.nbytes, "Use fewer samples; `jaxalign grid` reads .npy files block by block")
    return {name: np.asarray(values) for name, values in rows.items()}


def _reject_missing(name: str, stored: io.FeatureSet, values: Any) -> None:
    count, first = missing(values)
    if count:
        raise ValueError(
            f"{io.printable(name)} in {stored.path} has nan or inf in {count} of its {len(values)} rows, first in row "
            f"{first[0]}, feature {first[1]}. Remove these samples from all representations."
        )


def missing(values: Any) -> tuple[int, tuple[int, int]]:
    """The number of rows with nan or inf, and the first (row, feature)."""
    finite = rows_are_finite(values, 65536)
    row = int(np.argmin(finite))
    bad = ~np.isfinite(np.asarray(values[row]))
    return int((~finite).sum()), (row, int(np.argmax(bad)))


def same_samples(rows: Mapping[str, Any]) -> int:
    """The number of samples; raises if representations differ in it."""
    counts = {name: len(values) for name, values in rows.items()}
    common = max(set(counts.values()), key=list(counts.values()).count)
    differing = [f"{io.printable(name)} has {count}" for name, count in counts.items() if count != common]
    if differing:
        example = next(io.printable(name) for name, count in counts.items() if count == common)
        raise ValueError(
            f"all representations must hold the same samples, row by row: {example} has {common} rows, but "
            + ", ".join(differing[:5])
            + (f" and {len(differing) - 5} more differ" if len(differing) > 5 else "")
            + ". For maps of different sizes, --positions mean makes one row per sample."
        )
    return common


def provenance(options: Mapping[str, Any], *inputs: Input) -> dict[str, Any]:
    """Everything needed to reproduce the numbers."""
    return {
        "versions": {"jaxalign": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "python": platform.python_version(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "options": json_value(options),
        "command": shlex.join(sys.argv[1:]),
        "sha256": {path: digest for part in inputs for path, digest in part.hashes.items()},
        "notes": list(dict.fromkeys(note for part in inputs for note in part.notes)),
    }


def _landmark_densities(alignment: Alignment, rows: Mapping[str, Any], channels: str | None) -> dict[str, Any]:
    """Mean affinity of the landmarks of each representation, from which sigma is solved; None with one per row."""
    landmarks = np.asarray(alignment.landmarks)
    densities: dict[str, Any] = {}
    for name, sigma in alignment.sigma.items():
        densities[name] = None
        if np.ndim(sigma) == 0:
            x = np.asarray(rows[name])
            x = (x if channels is None else standardized(x))[landmarks]
            densities[name] = float(mean_density(x, sigma=float(sigma)))
    return densities


def densities(representations: list[Any], compared: ComparisonGrid, options: Mapping[str, Any]) -> list[float | None]:
    """Mean affinity of each representation at its sigma; None if the kernel of the measure is not RBF."""
    sigmas, kernel = np.asarray(compared.sigma, np.float64), measure_options(options).get("kernel")
    if not np.isfinite(sigmas).all() or not isinstance(kernel, RBF):
        return [None for _ in representations]
    how: dict[str, Any] = {"diagonal": kernel.diagonal, "plan": Plan(options["tile_size"])}
    reached = []
    for x, sigma in zip(representations, sigmas, strict=True):
        density_of = streaming.mean_density if isinstance(x, np.memmap) else mean_density
        reached.append(float(density_of(x, sigma=float(sigma), **how)))
    return reached


# --- output folders --------------------------------------------------------------------------------------------------


# The files of each command, by its manifest. --force removes no other names, whatever a manifest lists.
_WRITTEN = {
    "alignment.json": ("*.npy",),
    "cut.json": ("*.colors.npy", "*.segments.npy", "eigenvectors.npy", "colors.png"),
    "grid.json": (
        "grid.*",
        "grid_*.png",
        "grid_*.pdf",
        "grid_*.tex",
        "best_matches.*",
        "layers.*",
        "models.*",
        "colors.*",
        "report.html",
    ),
}


@contextmanager
def output_folder(
    out: Path, inputs: Iterable[str | Path], *, force: bool, resumable: bool = False
) -> Generator[Path, None, None]:
    """A folder to write to, locked for this run. It must not hold inputs, nor files unless `force` or `resumable`."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file: name a folder.")
    for path in map(Path, inputs):
        if out.resolve() in (path.resolve(), path.resolve().parent):
            raise FileExistsError(f"--out {out} holds the input {path}: name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if contents_of(out) and not force and not resumable:
            raise FileExistsError(
                f"--out {out} exists and is not empty: --force overwrites the files of an earlier run, and `jaxalign "
                "grid --resume` continues it."
            )
        if force:
            for manifest in _WRITTEN:
                _remove_written(out / manifest)
        yield out


def contents_of(out: Path) -> list[str]:
    """Names of the files in a folder, without the lock of this run."""
    return sorted(path.name for path in out.iterdir() if not path.name.startswith(PREFIX))


def _remove_written(manifest: Path) -> None:
    """Remove the unchanged files of an earlier run, and the manifest that lists them."""
    try:
        written = dict(read_json(manifest)["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    for path in (manifest.parent / Path(name).name for name in written):
        if any(fnmatchcase(path.name, pattern) for pattern in _WRITTEN[manifest.name]) and is_unchanged(path, written):
            path.unlink()
    manifest.unlink()


def is_unchanged(path: Path, written: Mapping[str, Any]) -> bool:
    """Whether a file has the hash that the manifest lists."""
    return path.is_file() and not path.is_symlink() and hash_of(path) == written.get(path.name)


def write_manifest(path: Path, data: Mapping[str, Any], files: Iterable[Path]) -> Path:
    """Write the data of a command, with the files that it wrote and their SHA-256."""
    return write_json(path, {**data, "written": {file.name: hash_of(file) for file in files}})


def write_json(path: Path, content: Any) -> Path:
    """Write plain data as JSON, atomically; nan becomes null."""
    replace_file(path, json.dumps(json_value(content), indent=1, allow_nan=False).encode())
    return path


def write_array(path: Path, array: Any) -> Path:
    """Write an array as .npy, atomically."""
    content = BytesIO()
    np.save(content, np.asarray(array), allow_pickle=False)
    replace_file(path, content.getvalue())
    return path


def write_figure(path: Path, figure: Any, dpi: int = 150) -> Path:
    """Write a figure as .png, atomically."""
    replace_file(path, png_of(figure, dpi))
    return path


def png_of(figure: Any, dpi: int) -> bytes:
    """A figure as PNG."""
    import matplotlib.pyplot as plt

    content = BytesIO()
    figure.savefig(content, dpi=dpi, format="png", bbox_inches="tight")  # names may be wider than the axes
    plt.close(figure)
    return content.getvalue()


# --- commands --------------------------------------------------------------------------------------------------------


def show_demo(options: dict[str, Any]) -> Result:
    """How well held-out samples of real networks correspond, on the shipped features, as tables and figures."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f'{error}. The demo needs the extra: python -m pip install "jaxalign[demo]"') from error
    from jaxalign.report import demo, figures, tables

    start = time.perf_counter()
    with (
        output_folder(options["out"], (), force=options["force"]) as out,
        tqdm(
            total=demo.steps(options["landmarks"]) + 1, disable=options["quiet"], unit="step", dynamic_ncols=True
        ) as bar,
    ):

        def tick(text: str) -> None:
            bar.set_description(text)
            bar.update()

        # In two threads: most of the time is compilation, which uses one core. Matches take longest.
        with ThreadPoolExecutor(2) as pool:
            of_matches = pool.submit(demo.report_matches, options["landmarks"], tick)
            of_digits, of_patches = pool.submit(demo.report_digits, tick), pool.submit(demo.report_patches, tick)
            digits, patches, matches = of_digits.result(), of_patches.result(), of_matches.result()
        tick("figures")
        paths = figures.save_all(digits, patches, matches, out)
        bar.set_description("done")
    scores = {
        "digits": digits.scores, "patches": patches.scores, "controls": patches.controls, "matches": matches.scores,
    }  # fmt: skip
    text = f"\n{tables.demo_text(digits, patches, matches)}\n\n{time.perf_counter() - start:.0f} s. Figures:"
    return Result({"scores": scores, "files": [path.name for path in paths]}, "\n  ".join([text, *map(str, paths)]))


def info(options: dict[str, Any]) -> Result:
    """Shapes, dtypes, missing values and sigma of the representations in files."""
    rows, data = [], []
    notes: list[str] = []
    hashes: dict[str, str] = {}
    for path in options["inputs"]:
        for name, stored in io.read_features(path).items():
            if str(stored.path) not in hashes:
                hashes[str(stored.path)] = hash_of(stored.path)
            values = stored.rows(options["positions"])
            count, first = missing(values)
            sigma = problem = None
            if not count:
                x = np.asarray(values[: options["rows"]])
                try:
                    sigma = float(solve_sigma(x, density=options["density"], plan=Plan(options["tile_size"])).sigma)
                except ValueError as error:
                    problem = str(error)
            dtype = str(stored.values.dtype)
            data.append({
                "name": name, "file": str(stored.path), "shape": list(stored.values.shape), "dtype": dtype,
                "rows with nan or inf": count, "first nan or inf": list(first) if count else None,
                "sigma": sigma, "rows used for sigma": min(len(values), options["rows"]), "sigma error": problem,
                "sha256": hashes[str(stored.path)],
            })  # fmt: skip
            notes += channels_first(name, stored.values)
            shape = " x ".join(map(str, stored.values.shape))
            sigma_cell = f"{sigma:.5g}" if sigma is not None else "nan or inf" if count else "none"
            missing_cell = f"{count} (row {first[0]}, feature {first[1]})" if count else "0"
            rows.append((io.printable(name), shape, dtype, missing_cell, sigma_cell))
    header = ("name", "shape", "dtype", "rows with nan or inf", f"sigma at density {options['density']:g}")
    text = format_table(header, rows)
    text += f"\n\nsigma from at most the first {max(part['rows used for sigma'] for part in data)} rows"
    text += "".join(f"\n{note}." for note in notes)
    for part in data:
        if part["sigma error"]:
            text += f"\n{io.printable(part['name'])}: {part['sigma error']}"
    record = provenance(options, Input({}, {}, tuple(notes), hashes))
    return Result({"representations": data, "provenance": record}, text)


def compare_files(options: dict[str, Any]) -> Result:
    """The value of a measure for two representations, and its p-value."""
    inputs = [read([path], options["positions"]) for path in (options["x"], options["y"])]
    for part, path in zip(inputs, (options["x"], options["y"]), strict=True):
        if len(part.rows) != 1:
            names = ", ".join(map(repr, part.rows))
            raise ValueError(
                f"{path} holds {len(part.rows)} representations, {names}: `jaxalign compare` accepts one per file, "
                "`jaxalign grid` compares all."
            )
    (x,), (y,) = (part.rows.values() for part in inputs)
    names = [io.printable(name) for part in inputs for name in part.rows]
    same_samples({"x": x, "y": y})
    chosen = measure_options(options)
    first, second = (in_memory({name: rows}) for name, rows in zip(names, (x, y), strict=True))
    compared = compare_grid(first, second, options["measure"], plan=Plan(options["tile_size"]), **chosen)
    value = float(np.asarray(compared.values)[0, 0])
    data: dict[str, Any] = {"x": names[0], "y": names[1], "measure": options["measure"], "value": value, "n": len(x)}
    data |= {"sigma": compared.sigma, "density reached": densities([x, y], compared, options)}
    text = f"{options['measure']} of {names[0]} with {names[1]}, {len(x)} samples: {value:.6g}"
    if options["permutations"]:
        arrays = {f"{k}: {name}": a for k, part in enumerate(inputs) for name, a in part.arrays.items()}
        tested = run_test({"x": x}, {"y": y}, arrays, options, chosen)
        statistics = {name: np.asarray(value)[0, 0] for name, value in tested.values().items()}
        data |= {name: float(statistics[name]) for name in ("p_value", "null_mean", "threshold", "calibrated")}
        data["test"] = tested.summary()
        text += f"\ncalibrated {number_cell(data['calibrated'])}, p = {data['p_value']:.4g}"
        text += f"\n{describe(tested.summary(), len(x))}"
    data["provenance"] = provenance(options, *inputs)
    return Result(data, with_notes(text, tuple(data["provenance"]["notes"])))


def align_files(options: dict[str, Any]) -> Result:
    """Relative features of several representations over shared landmarks, and how well they correspond."""
    inputs = read(options["inputs"], options["positions"])
    n = same_samples(inputs.rows)
    with output_folder(options["out"], inputs.hashes, force=options["force"]) as out:
        return _align(inputs, n, out, options)


def _align(inputs: Input, n: int, out: Path, options: Mapping[str, Any]) -> Result:
    how: dict[str, Any] = {**(PUBLISHED if options["published"] else {"channels": "standardize"})}
    if options["density"] is not None:
        how["density"] = options["density"]
    if options["bandwidth"] == "per_row":
        how["decorrelate"] = None  # decorrelation needs one sigma
    alignment = align(
        in_memory(inputs.rows),
        landmarks=max(1, min(300, n // 2)) if options["landmarks"] is None else options["landmarks"],
        key=jax.random.key(options["seed"]), bandwidth=options["bandwidth"],
        **how,
    )  # fmt: skip
    names = list(inputs.rows)
    file_names = io.file_names(names)
    files = [write_array(out / f"{file_names[name]}.npy", alignment.features[name]) for name in names]
    landmarks = np.asarray(alignment.landmarks)
    held_out = n - len(landmarks)
    pairs = {}
    if held_out >= 2:
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                score = alignment.correspondence(a, b)
                pairs[f"{a} | {b}"] = {"top1": float(score.top1), "top5": float(score.top5), "mrr": float(score.mrr)}
    sigma = {
        name: float(value) if np.ndim(value) == 0 else {"median": np.nanmedian(value), "shape": np.shape(value)}
        for name, value in alignment.sigma.items()
    }
    data = {
        "samples": n, "landmarks": landmarks, "sigma": sigma,
        "density reached": _landmark_densities(alignment, inputs.rows, how["channels"]),
        "files": {name: path.name for name, path in zip(names, files, strict=True)},
        "correspondence of held-out samples": pairs, "provenance": provenance({**options, **how}, inputs),
    }  # fmt: skip
    write_manifest(out / "alignment.json", data, files)
    counts = f"{len(names)} representations, {n} samples, {len(landmarks)} landmarks"
    text = f"{counts}: relative features in {shown_path(out)}\n"
    if pairs:
        rows = [(io.printable(name), *(f"{v:.3f}" for v in scores.values())) for name, scores in pairs.items()]
        text += "\n" + format_table((f"{held_out} held-out samples", "top-1", "top-5", "MRR"), rows)
    return Result(data, with_notes(text, inputs.notes))


def cut_files(options: dict[str, Any]) -> Result:
    """Colors and segments of one representation, or of several for the same samples, cut together."""
    inputs = read(options["inputs"], options["positions"])
    images = read_images(options["images"])
    if images is not None:
        check_images(images, inputs.arrays if options["positions"] == "samples" else {})
    with output_folder(options["out"], input_paths(options, inputs), force=options["force"]) as out:
        return _cut(inputs, images, out, options)


def _cut(inputs: Input, images: Images | None, out: Path, options: Mapping[str, Any]) -> Result:
    names = list(inputs.rows)
    each_position = options["positions"] == "samples"
    shapes = {
        name: inputs.arrays[name].values.shape[:-1] if each_position else (len(rows),)
        for name, rows in inputs.rows.items()
    }
    k = options["num_components"]
    if len(names) == 1:
        (x,) = in_memory(inputs.rows).values()
        n = len(x)
        method: dict[str, Any] = {"method": "nystroem"} if n > 200_000 else {"bandwidth": options["bandwidth"]}
        cut = normalized_cut(
            x, k, kind="features", density=options["density"], plan=Plan(options["tile_size"]), **method
        )
    else:
        n = same_samples(inputs.rows)
        num_landmarks = min(options["landmarks"], n // 2)
        alignment = align(in_memory(inputs.rows), landmarks=num_landmarks, key=jax.random.key(options["seed"]))
        cut = normalized_cut(
            alignment, k, density=options["density"], bandwidth=options["bandwidth"], plan=Plan(options["tile_size"])
        )
    colors = np.asarray(rgb(cut, options["colors"], num_components=min(k, 8), seed=options["seed"]))
    labels = np.asarray(kway(cut, min(options["segments"], k)))
    files = []
    file_names = io.file_names(names)
    parts = zip(names, np.split(colors, len(names)), np.split(labels, len(names)), strict=True)
    maps = {}
    for name, color, label in parts:
        files.append(write_array(out / f"{file_names[name]}.colors.npy", color.reshape(*shapes[name], 3)))
        files.append(write_array(out / f"{file_names[name]}.segments.npy", label.reshape(shapes[name])))
        if len(shapes[name]) == 3:
            maps[name] = color.reshape(*shapes[name], 3)
    if len(maps) == len(names) and len({x.shape for x in maps.values()}) == 1:
        from jaxalign import plots

        shown = {io.printable(name): x[:SHOWN_IMAGES] for name, x in maps.items()}
        figure = plots.color_panels({"colors": shown}, None if images is None else images.shown)
        files.append(write_figure(out / "colors.png", figure))
    files.append(write_array(out / "eigenvectors.npy", cut.eigenvectors))
    data = {
        "samples": n, "eigenvalues": cut.eigenvalues, "residual": cut.residual,
        "sigma": None if cut.sigma is None or cut.sigma.ndim else float(cut.sigma),
        "density reached": float(jnp.sum(cut.degrees)) / len(labels) ** 2,
        "files": [path.name for path in files], "provenance": provenance(options, inputs),
    }  # fmt: skip
    files.append(write_manifest(out / "cut.json", data, files))
    values = " ".join(f"{v:.3f}" for v in np.asarray(cut.eigenvalues)[:10])
    text = f"{len(names)} representation(s) of {n} samples, {k} eigenvectors; eigenvalues {values}\n"
    text += f"{len(files)} files in {shown_path(out)}"
    return Result(data, with_notes(text, inputs.notes))


def number_cell(value: float | None) -> str:
    """Four digits, or a dash for a measure without such a value."""
    return "-" if value is None or np.isnan(value) else f"{value:.4f}"


def measure_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the measure, from --option. --density, sigma and diagonal become options of its kernel."""
    from jaxalign.measures._registry import find

    known, passed = find(options["measure"]).options, dict(options["option"])
    name = "kernel" if "kernel" in known else "metric"
    kernel = {"rbf": RBF, "laplacian": Laplacian}.get(str(passed.get(name, known.get(name))))
    if kernel is None:
        return passed
    kernel_options = {option: passed.pop(option) for option in ("sigma", "diagonal") if option in passed}
    if "sigma" not in kernel_options:
        kernel_options["density"] = options["density"]
    return {**passed, name: kernel(**kernel_options)}


def shown_path(out: Path) -> str:
    """The output folder as text."""
    return f"{io.printable(str(out))}/"


def with_notes(text: str, notes: tuple[str, ...]) -> str:
    """The text of a result with the first notes on its inputs."""
    lines = [*notes[:3], *([f"{len(notes) - 3} more like these"] if len(notes) > 3 else [])]
    return text + "".join(f"\nnote: {note}" for note in lines)


@dataclass(frozen=True)
class Images:
    """The images that maps belong to."""

    number: int
    shown: np.ndarray  # the first of them, (k, h, w, 3)
    sha256: list[str]


def read_images(path: Path | None, most: int | None = SHOWN_IMAGES) -> Images | None:
    """Images from a .npy file (n, h, w, 3), or from a folder of image files, sorted by name; the first `most` shown."""
    if path is None:
        return None
    if path.suffix.lower() == ".npy":
        try:
            images = open_npy(path)
        except (ValueError, EOFError) as error:
            raise ValueError(f"--images {path}: {error}") from None
        shape, hashes = images.shape, [hash_of(path)]
        shown = np.asarray(images[:most] if shape else images)
    else:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError('--images needs pillow: python -m pip install "jaxalign[viz]"') from error
        suffixes = (".png", ".jpg", ".jpeg", ".webp")
        files = [file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file()]
        files.sort(key=io.natural)
        if not files:
            raise ValueError(f"--images {path}: the folder holds no .png, .jpg or .webp.")
        try:
            opened = [Image.open(file).convert("RGB") for file in files[:most]]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"--images {path}: an image cannot be read ({error}).") from None
        shown = np.stack([np.asarray(image.resize(opened[0].size)) for image in opened])
        shape, hashes = (len(files), *shown.shape[1:]), [hash_of(file) for file in files]
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape or shown.dtype.kind not in "uif":
        raise ValueError(
            f"--images {path}: expected numbers of shape (n, h, w, 3); got {shown.dtype} of shape {shape}."
        )
    if shown.dtype.kind == "f" and shown.max() > 1:  # floating point from 0 to 255
        shown = np.clip(shown, 0, 255).astype(np.uint8)
    return Images(shape[0], shown, hashes)


def input_paths(options: Mapping[str, Any], *inputs: Input) -> list[str]:
    """Paths of all inputs of a command."""
    images = [] if options["images"] is None else [str(options["images"])]
    return [*images, *(path for part in inputs for path in part.hashes)]


def check_images(images: Images, arrays: Mapping[str, io.FeatureSet]) -> None:
    """Raise unless all representations are maps of these images, with one h x w."""
    wrong = [
        f"{io.printable(stored.name)} has shape {stored.values.shape}"
        for stored in arrays.values()
        if stored.grid is None or len(stored.values) != images.number
    ]
    if wrong or not arrays or len({stored.grid for stored in arrays.values()}) != 1:
        problem = ", ".join(wrong[:3]) or "h x w differ, or --positions is not samples"
        n = images.number
        raise ValueError(f"--images: {n} images need maps of shape ({n}, h, w, d) with one h x w; {problem}.")
