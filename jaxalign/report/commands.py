"""What the command line does: files in, tables, pictures and a report out, each with its provenance.

Every command returns what it found as plain data, which `jaxalign.cli` prints as a table or as JSON.
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
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import io, sharding, streaming
from jaxalign._memory import check_bytes
from jaxalign._version import __version__
from jaxalign.alignment import PUBLISHED, Alignment, align
from jaxalign.bandwidth import mean_density, solve_sigma
from jaxalign.colors import rgb
from jaxalign.files.readers import open_npy
from jaxalign.files.sources import rows_are_finite
from jaxalign.files.storage import PREFIX, hash_of, json_value, locked, read_json, replace_file
from jaxalign.grid import ComparisonGrid, compare_grid
from jaxalign.inference import permutation_test
from jaxalign.kernels import RBF, Laplacian
from jaxalign.plan import Plan
from jaxalign.report.baselines import standardized
from jaxalign.report.coloring import joint_colors, own_colors
from jaxalign.report.tables import format_table
from jaxalign.spectral import kway, normalized_cut

# Samples that a permutation test looks at: its table of permutations needs n x n of every set.
TESTED = 1000
# Pictures shown in a report, and landmarks for their colours.
SHOWN, LANDMARKS = 6, 1024


@dataclass(frozen=True)
class Found:
    """What a command found: as data, and as text."""

    data: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Input:
    """Sets of features that a command was given, as samples and features, checked."""

    rows: dict[str, Any]  # name: (samples, d)
    sets: dict[str, io.FeatureSet]
    notes: tuple[str, ...]
    hashes: dict[str, str]  # SHA-256 by file, taken when they were read


def read(paths: list[Path], positions: io.Positions) -> Input:
    """Sets of features from files and folders, with one name each; nan is refused, with its first place."""
    found = [(path, name, one) for path in paths for name, one in io.read_features(path).items()]
    clash = len({name for _, name, _ in found}) < len(found)
    sets: dict[str, io.FeatureSet] = {}
    for path, name, one in found:
        label = f"{path.name if path.is_dir() else path.parent.name}/{name}" if clash else name
        if label in sets:
            raise ValueError(f"{sets[label].path} and {one.path} both hold a set named {label!r}.")
        sets[label] = one
    rows, notes = {}, []
    wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    for name, one in sets.items():
        values = one.rows(positions)
        _refuse_missing(name, one, values)
        if values.dtype == np.float64 and not wide:
            top = max(float(np.abs(part).max()) for part in np.split(values, range(65536, len(values), 65536)))
            if top > float(np.finfo(np.float32).max):
                raise ValueError(
                    f"{io.printable(name)} in {one.path} reaches {top:.3g}, beyond float32: --x64 computes in float64."
                )
            notes.append(f"{io.printable(name)} is float64 and was taken as float32; --x64 computes in float64")
        if values.dtype not in ((np.float32, np.float64) if wide else (np.float32,)):
            _check_fits(name, 4 * values.size, "Save it as float32: .npy files of that are read block by block")
            values = np.asarray(values, np.float32)
        rows[name] = values
        if one.values.ndim > 2 and positions == "samples":
            shape = " x ".join(map(str, one.values.shape[:-1]))
            notes.append(
                f"each of {shape} positions is a sample (see --positions); p-values take them for "
                "independent, which neighbours are not"
            )
        notes += channels_first(name, one.values)
    hashes = {str(path): hash_of(path) for path in sorted({one.path for one in sets.values()})}
    return Input(rows, sets, tuple(dict.fromkeys(notes)), hashes)


def channels_first(name: str, values: Any) -> list[str]:
    """A note on maps that look as if their channels came first: maps are square more often than not."""
    if values.ndim != 4 or not values.shape[1] != values.shape[2] == values.shape[3]:
        return []
    return [
        f"{io.printable(name)} of shape {values.shape} was read with its channels last; if they are "
        "first, as in torch, write np.moveaxis(x, 1, -1)"
    ]


def _check_fits(name: str, nbytes: int, way_out: str) -> None:
    check_bytes(f"{io.printable(name)} takes {nbytes / 1e9:.3g} GB of memory", nbytes, f"{way_out}.")


def _in_memory(rows: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Sets that are looked at as a whole."""
    for name, values in rows.items():
        _check_fits(name, values.nbytes, "Take fewer samples; `jaxalign grid` reads .npy files block by block")
    return {name: jnp.asarray(np.asarray(values)) for name, values in rows.items()}


def _refuse_missing(name: str, one: io.FeatureSet, values: Any) -> None:
    count, first = missing(values)
    if count:
        raise ValueError(
            f"{io.printable(name)} in {one.path} has nan or inf in {count} of its {len(values)} rows, the first is row "
            f"{first[0]}, feature {first[1]}. Remove these samples from all sets."
        )


def missing(values: Any) -> tuple[int, tuple[int, int]]:
    """How many rows hold nan or inf, and the first place."""
    finite = rows_are_finite(values, 65536)
    row = int(np.argmin(finite))
    bad = ~np.isfinite(np.asarray(values[row]))
    return int((~finite).sum()), (row, int(np.argmax(bad)))


def same_samples(rows: Mapping[str, Any]) -> int:
    """The number of samples; raises, naming the sets that differ, where it is not one."""
    names = list(rows)
    numbers = {name: len(values) for name, values in rows.items()}
    usual = max(set(numbers.values()), key=list(numbers.values()).count)
    odd = [f"{io.printable(name)} has {number}" for name, number in numbers.items() if number != usual]
    if odd:
        most = next(io.printable(name) for name in names if numbers[name] == usual)
        raise ValueError(
            f"all sets must hold the same samples, row by row: {most} has {usual}, but {', '.join(odd[:5])}"
            + (f" and {len(odd) - 5} more differ" if len(odd) > 5 else "")
            + ". Maps of different size: --positions mean takes one row a sample."
        )
    return usual


def provenance(options: Mapping[str, Any], *given: Input) -> dict[str, Any]:
    """What it takes to get the same numbers again."""
    return {
        "versions": {"jaxalign": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "python": platform.python_version(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "options": json_value(options),
        "command": shlex.join(sys.argv[1:]),
        "sha256": {path: found for one in given for path, found in one.hashes.items()},
        "notes": list(dict.fromkeys(note for one in given for note in one.notes)),
    }


def _landmark_densities(alignment: Alignment, rows: Mapping[str, Any], channels: str | None) -> dict[str, Any]:
    """Mean affinity of the landmarks of every set, of which sigma was found; None with a sigma per row."""
    chosen, found = np.asarray(alignment.landmarks), {}
    for name, sigma in alignment.sigma.items():
        found[name] = None
        if np.ndim(sigma) == 0:
            x = np.asarray(rows[name])
            block = jnp.asarray((x if channels is None else standardized(x))[chosen])
            found[name] = float(mean_density(block, sigma=float(sigma)))
    return found


def _densities(sets: list[Any], compared: ComparisonGrid, options: Mapping[str, Any]) -> list[float | None]:
    """Mean affinity of every set at its sigma; None where the measure has none, or another kernel."""
    sigmas, kernel = np.asarray(compared.sigma, np.float64), _measure_options(options).get("kernel")
    if not np.isfinite(sigmas).all() or not isinstance(kernel, RBF):
        return [None for _ in sets]
    how: dict[str, Any] = {"diagonal": kernel.diagonal, "plan": Plan(options["tile_size"])}
    densities = []
    for x, sigma in zip(sets, sigmas, strict=True):
        of = streaming.mean_density if isinstance(x, np.memmap) else mean_density  # which may be larger than the memory
        densities.append(float(of(x, sigma=float(sigma), **how)))
    return densities


# --- folders that are written to -------------------------------------------------------------------------------------


# What the commands write, by the manifest that lists it: --force takes no other name away, whatever a manifest says.
_WRITTEN = {
    "alignment.json": ("*.npy",),
    "cut.json": ("*.colors.npy", "*.segments.npy", "eigenvectors.npy", "colors.png"),
    "grid.json": ("grid.png", "layers.png", "colors.png", "report.html"),
}


@contextmanager
def output_folder(
    out: Path, inputs: Iterable[str | Path], *, force: bool, resumable: bool = False
) -> Generator[Path, None, None]:
    """A folder to write to, of one run at a time; it holds no input, and its files are kept unless said otherwise."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file: name a folder.")
    for path in map(Path, inputs):
        if out.resolve() in (path.resolve(), path.resolve().parent):
            raise FileExistsError(f"--out {out} is where the input {path} lies: name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if _contents(out) and not force and not resumable:
            raise FileExistsError(
                f"--out {out} exists and is not empty: --force overwrites what an earlier run wrote there, and of a "
                "grid --resume goes on with it."
            )
        if force:
            for manifest in _WRITTEN:
                _remove_written(out / manifest)
        yield out


def _contents(out: Path) -> list[str]:
    """Names of what a folder holds, but for the lock of this run."""
    return sorted(path.name for path in out.iterdir() if not path.name.startswith(PREFIX))


def _remove_written(manifest: Path) -> None:
    """Remove what an earlier run wrote, where it is as it was written, and the manifest that lists it."""
    try:
        written = dict(read_json(manifest)["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    for path in (manifest.parent / Path(name).name for name in written):
        if any(fnmatchcase(path.name, pattern) for pattern in _WRITTEN[manifest.name]) and _as_written(path, written):
            path.unlink()
    manifest.unlink()


def _as_written(path: Path, written: Mapping[str, Any]) -> bool:
    """Whether a file is what a manifest says of it."""
    return path.is_file() and not path.is_symlink() and hash_of(path) == written.get(path.name)


def write_manifest(path: Path, data: Mapping[str, Any], files: Iterable[Path]) -> Path:
    """What a command found, and which files of which SHA-256 it wrote."""
    return write_json(path, {**data, "written": {file.name: hash_of(file) for file in files}})


def write_json(path: Path, content: Any) -> Path:
    """Plain data as a file, in one step; nan as null."""
    replace_file(path, json.dumps(json_value(content), indent=1, allow_nan=False).encode())
    return path


def write_array(path: Path, array: Any) -> Path:
    """An array as .npy, in one step."""
    content = BytesIO()
    np.save(content, np.asarray(array), allow_pickle=False)
    replace_file(path, content.getvalue())
    return path


def write_figure(path: Path, figure: Any, dpi: int = 150) -> Path:
    """A picture as .png, in one step."""
    replace_file(path, png_of(figure, dpi))
    return path


def png_of(figure: Any, dpi: int) -> bytes:
    """A figure's picture."""
    import matplotlib.pyplot as plt

    content = BytesIO()
    figure.savefig(content, dpi=dpi, format="png", bbox_inches="tight")  # names may be wider than their place
    plt.close(figure)
    return content.getvalue()


# --- commands --------------------------------------------------------------------------------------------------------


def show_demo(options: dict[str, Any]) -> Found:
    """Real networks on the features that ship with the library: how well held-out samples correspond, and pictures."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f'{error}. The demo needs the extra: python -m pip install "jaxalign[demo]"') from error
    from jaxalign.report import demo, figures, tables

    start = time.perf_counter()
    with (
        output_folder(options["out"], (), force=options["force"]) as out,
        tqdm(total=demo.steps() + 1, disable=options["quiet"], unit="step", dynamic_ncols=True) as bar,
    ):

        def tick(text: str) -> None:
            bar.set_description(text)
            bar.update()

        # Side by side: most of the time is compilation, which keeps one core busy.
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(demo.report_digits, tick), pool.submit(demo.report_patches, tick)
            digits, patches = running[0].result(), running[1].result()
        tick("pictures")
        paths = figures.save_all(digits, patches, out)
        bar.set_description("done")
    scores = {"digits": digits.scores, "patches": patches.scores, "controls": patches.controls}
    text = f"\n{tables.demo_text(digits, patches)}\n\n{time.perf_counter() - start:.0f} s. Pictures:"
    return Found({"scores": scores, "files": [path.name for path in paths]}, "\n  ".join([text, *map(str, paths)]))


def info(options: dict[str, Any]) -> Found:
    """What files hold: shapes, what is missing, and the sigma of each set."""
    rows, data = [], []
    notes: list[str] = []
    hashes: dict[str, str] = {}
    for path in options["inputs"]:
        for name, one in io.read_features(path).items():
            if str(one.path) not in hashes:
                hashes[str(one.path)] = hash_of(one.path)
            values = one.rows(options["positions"])
            count, first = missing(values)
            sigma = status = None
            if not count:
                some = values[: options["rows"]]
                x = jnp.asarray(np.asarray(some, None if options["x64"] and some.dtype.itemsize > 2 else np.float32))
                try:
                    sigma = float(solve_sigma(x, density=options["density"], plan=Plan(options["tile_size"])).sigma)
                except ValueError as error:
                    status = str(error)
            data.append({
                "name": name, "file": str(one.path), "shape": list(one.values.shape), "dtype": str(one.values.dtype),
                "rows with nan or inf": count, "first": list(first) if count else None,
                "sigma": sigma, "of rows": min(len(values), options["rows"]), "why no sigma": status,
                "sha256": hashes[str(one.path)],
            })  # fmt: skip
            notes += channels_first(name, one.values)
            shape = " x ".join(map(str, one.values.shape))
            told = f"{sigma:.5g}" if sigma is not None else "nan in it" if count else "none"
            bad = f"{count} (row {first[0]}, feature {first[1]})" if count else "0"
            rows.append((io.printable(name), shape, str(one.values.dtype), bad, told))
    few = max(one["of rows"] for one in data)
    header = ("set", "shape", "dtype", "rows with nan or inf", f"sigma at {options['density']:g}")
    text = format_table(header, rows) + f"\n\nsigma of the first {few} rows at most"
    text += "".join(f"\n{note}." for note in notes)
    for one in data:
        if one["why no sigma"]:
            text += f"\n{io.printable(one['name'])}: {one['why no sigma']}"
    return Found({"sets": data, "provenance": provenance(options, Input({}, {}, tuple(notes), hashes))}, text)


def compare_files(options: dict[str, Any]) -> Found:
    """One number for two sets, and whether it is more than chance."""
    given = [read([path], options["positions"]) for path in (options["x"], options["y"])]
    for one, path in zip(given, (options["x"], options["y"]), strict=True):
        if len(one.rows) != 1:
            names = ", ".join(map(repr, one.rows))
            raise ValueError(f"{path} holds {len(one.rows)} sets, {names}: compare takes one; grid compares them all.")
    (x,), (y,) = (one.rows.values() for one in given)
    names = [io.printable(name) for one in given for name in one.rows]
    same_samples({"x": x, "y": y})
    measure_options = _measure_options(options)
    first, second = (_in_memory({name: rows}) for name, rows in zip(names, (x, y), strict=True))
    compared = compare_grid(first, second, options["measure"], plan=Plan(options["tile_size"]), **measure_options)
    value = float(np.asarray(compared.values)[0, 0])
    data: dict[str, Any] = {"x": names[0], "y": names[1], "measure": options["measure"], "value": value, "n": len(x)}
    data |= {"sigma": compared.sigma, "density reached": _densities([x, y], compared, options)}
    text = f"{options['measure']} of {names[0]} with {names[1]}, {len(x)} samples: {value:.6g}"
    if options["permutations"]:
        few = _some_rows(len(x))
        test = permutation_test(
            jnp.asarray(np.asarray(x)[few]), jnp.asarray(np.asarray(y)[few]), options["measure"],
            key=jax.random.key(options["seed"]), permutations=options["permutations"], **measure_options,
        )  # fmt: skip
        data |= {"p_value": _exact(test.p_value, options), "null_mean": float(test.null_mean), "tested_on": len(few)}
        text += f"\np = {float(test.p_value):.4g} by {options['permutations']} permutations"
        text += f" of {len(few)} samples" if len(few) < len(x) else ""
    data["provenance"] = provenance(options, *given)
    return Found(data, _with_notes(text, tuple(data["provenance"]["notes"])))


def align_files(options: dict[str, Any]) -> Found:
    """Relative features of several sets over shared landmarks, and how well they correspond."""
    given = read(options["inputs"], options["positions"])
    n = same_samples(given.rows)
    with output_folder(options["out"], given.hashes, force=options["force"]) as out:
        return _align(given, n, out, options)


def _align(given: Input, n: int, out: Path, options: Mapping[str, Any]) -> Found:
    how: dict[str, Any] = {**(PUBLISHED if options["published"] else {"channels": "standardize"})}
    if options["density"] is not None:
        how["density"] = options["density"]
    if options["bandwidth"] == "per_row":
        how["decorrelate"] = None  # which needs one sigma
    alignment = align(
        _in_memory(given.rows),
        landmarks=max(1, min(300, n // 2)) if options["landmarks"] is None else options["landmarks"],
        key=jax.random.key(options["seed"]), bandwidth=options["bandwidth"],
        **how,
    )  # fmt: skip
    names = list(given.rows)
    places = io.file_names(names)
    files = [write_array(out / f"{places[name]}.npy", alignment.features[name]) for name in names]
    landmarks = np.asarray(alignment.landmarks)
    held_out = n - len(landmarks)
    pairs = {}
    if held_out >= 2:
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                one = alignment.correspondence(a, b)
                pairs[f"{a} | {b}"] = {"top1": float(one.top1), "top5": float(one.top5), "mrr": float(one.mrr)}
    sigma = {
        name: float(found) if np.ndim(found) == 0 else {"median": np.nanmedian(found), "one a row": np.shape(found)}
        for name, found in alignment.sigma.items()
    }
    data = {
        "samples": n, "landmarks": landmarks, "sigma": sigma,
        "density reached": _landmark_densities(alignment, given.rows, how["channels"]),
        "files": {name: path.name for name, path in zip(names, files, strict=True)},
        "correspondence of samples that are not landmarks": pairs, "provenance": provenance({**options, **how}, given),
    }  # fmt: skip
    write_manifest(out / "alignment.json", data, files)
    text = f"{len(names)} sets, {n} samples, {len(landmarks)} landmarks: relative features (n, m) in {_place(out)}\n"
    if pairs:
        rows = [(io.printable(name), *(f"{v:.3f}" for v in one.values())) for name, one in pairs.items()]
        text += "\n" + format_table((f"{held_out} held-out samples", "top-1", "top-5", "MRR"), rows)
    return Found(data, _with_notes(text, given.notes))


def cut_files(options: dict[str, Any]) -> Found:
    """Colours and segments of one set, or of several sets of the same samples cut together."""
    given = read(options["inputs"], options["positions"])
    pictures = _pictures(options["images"])
    if pictures is not None:
        _check_pictures(pictures, given.sets if options["positions"] == "samples" else {})
    with output_folder(options["out"], _inputs(options, given), force=options["force"]) as out:
        return _cut(given, pictures, out, options)


def _cut(given: Input, pictures: Pictures | None, out: Path, options: Mapping[str, Any]) -> Found:
    names = list(given.rows)
    apart = options["positions"] == "samples"
    shapes = {name: given.sets[name].values.shape[:-1] if apart else (len(given.rows[name]),) for name in names}
    k = options["components"]
    if len(names) == 1:
        (x,) = _in_memory(given.rows).values()
        n = len(x)
        many: dict[str, Any] = {"method": "nystroem"} if n > 200_000 else {"bandwidth": options["bandwidth"]}
        cut = normalized_cut(x, k, kind="features", density=options["density"], plan=Plan(options["tile_size"]), **many)
    else:
        n = same_samples(given.rows)
        chosen = min(options["landmarks"], n // 2)
        alignment = align(
            _in_memory(given.rows), landmarks=chosen, key=jax.random.key(options["seed"]),
        )  # fmt: skip
        cut = normalized_cut(
            alignment, k, density=options["density"], bandwidth=options["bandwidth"], plan=Plan(options["tile_size"])
        )
    colours = np.asarray(rgb(cut, options["colors"], num_components=min(k, 8), seed=options["seed"]))
    labels = np.asarray(kway(cut, min(options["segments"], k)))
    files = []
    places = io.file_names(names)
    parts = zip(names, np.split(colours, len(names)), np.split(labels, len(names)), strict=True)
    maps = {}
    for name, colour, label in parts:
        files.append(write_array(out / f"{places[name]}.colors.npy", colour.reshape(*shapes[name], 3)))
        files.append(write_array(out / f"{places[name]}.segments.npy", label.reshape(shapes[name])))
        if len(shapes[name]) == 3:
            maps[name] = colour.reshape(*shapes[name], 3)
    if len(maps) == len(names) and len({one.shape for one in maps.values()}) == 1:
        from jaxalign import plots

        shown = {io.printable(name): one[:SHOWN] for name, one in maps.items()}
        figure = plots.color_panels({"colours": shown}, None if pictures is None else pictures.shown)
        files.append(write_figure(out / "colors.png", figure))
    files.append(write_array(out / "eigenvectors.npy", cut.eigenvectors))
    data = {
        "samples": n, "eigenvalues": cut.eigenvalues, "residual": cut.residual,
        "sigma": None if cut.sigma is None else float(cut.sigma),
        "density reached": float(jnp.sum(cut.degrees)) / len(labels) ** 2,
        "files": [path.name for path in files], "provenance": provenance(options, given),
    }  # fmt: skip
    files.append(write_manifest(out / "cut.json", data, files))
    values = " ".join(f"{v:.3f}" for v in np.asarray(cut.eigenvalues)[:10])
    text = f"{len(names)} set(s) of {n} samples, {k} eigenvectors; eigenvalues {values}\n"
    text += f"{len(files)} files in {_place(out)}"
    return Found(data, _with_notes(text, given.notes))


def grid_files(options: dict[str, Any]) -> Found:
    """All layers of a model, or of two, compared: numbers, p-values, pictures and a report in one page."""
    ours = read([options["x"]], options["positions"])
    theirs = None if options["y"] is None else read([options["y"]], options["positions"])
    given = (ours,) if theirs is None else (ours, theirs)
    sides = list(zip("xy", (options["x"], options["y"]), given, strict=False))
    n = same_samples({f"{side} {path}: {name}": x for side, path, one in sides for name, x in one.rows.items()})
    pictures = _pictures(options["images"])
    if pictures is not None:
        _check_pictures(pictures, {f"{side} {name}": s for side, _, one in sides for name, s in one.sets.items()})
    measure_options = _measure_options(options)
    job = provenance(options, *given)
    if pictures is not None:
        job["images sha256"] = pictures.sha256
    inputs = _inputs(options, *given)
    with output_folder(options["out"], inputs, force=options["force"], resumable=options["resume"]) as out:
        data = _finished(out, job) if options["resume"] else None
        if data is None:
            data = _grid(ours, theirs, pictures, n, job, out, options, measure_options)
    return Found(data, _with_notes(_grid_text(data, out), tuple(job["notes"])))


def _grid(
    ours: Input,
    theirs: Input | None,
    pictures: Pictures | None,
    n: int,
    job: Mapping[str, Any],
    out: Path,
    options: Mapping[str, Any],
    measure_options: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare, draw and write; returns what stands in grid.json."""
    compared = _compared(ours, theirs, job, out, options, measure_options)
    test, few = None, _some_rows(n)
    if options["permutations"]:
        x, y = ({name: np.asarray(rows[few]) for name, rows in one.rows.items()} for one in (ours, theirs or ours))
        test = permutation_test(
            x, y, options["measure"], key=jax.random.key(options["seed"]), permutations=options["permutations"],
            **measure_options,
        )  # fmt: skip
    rows = [x for one in (ours, theirs) if one is not None for x in one.rows.values()]
    data = {
        **json.loads(compared.to_json()),
        "samples": n,
        "density reached": _densities(rows, compared, options),
        "best match": {row: {"column": c, "value": v} for row, (c, v) in compared.best_match().items()},
        "statistics": None if test is None else {
            "permutations": options["permutations"], "samples": len(few), "p_value": _exact(test.p_value, options),
            "corrected": _exact(test.corrected, options), "null_mean": test.null_mean, "score": test.score,
        },
        "names": [str(options["x"]), str(options["y"] or options["x"])],
        "provenance": job,
    }  # fmt: skip
    from jaxalign import plots
    from jaxalign.report.html import page

    ax = plots.grid(_printable(compared), test=_printable(test))
    ours_name, theirs_name = (_short(path.name) for path in (options["x"], options["y"] or options["x"]))
    ax.set(ylabel=ours_name, xlabel=theirs_name)
    figures = {"grid": png_of(ax.figure, 130)}
    curves = plots.layers(_printable(compared))
    if theirs is not None:
        curves.set_xlabel(f"layer of {ours_name}")
        curves.get_legend().set_title(theirs_name, {"size": 7})
    figures["layers"] = png_of(curves.figure, 130)
    if pictures is not None:
        figures |= _colors_of_best(compared, ours, theirs, pictures, options)
    shown = {name: content for name, content in figures.items() if name != "grid"}
    contents = {f"{name}.png": content for name, content in figures.items()}
    contents["report.html"] = page(json_value(data), shown, tuple(job["notes"])).encode(errors="backslashreplace")
    for name, content in contents.items():
        replace_file(out / name, content)
    data["files"] = list(contents)
    write_manifest(out / _GRID, data, (out / name for name in contents))
    (out / _VALUES).unlink(missing_ok=True)
    return data


def _grid_text(data: Mapping[str, Any], out: Path) -> str:
    """The best matches as a table, and where the report is; of what was found, or of what grid.json holds."""
    ours, theirs = (_short(Path(name).name) for name in data["names"])
    statistics, samples = data["statistics"], data["samples"]
    of, found_in = ("", "is") if data["itself"] else (f" {ours}", f"in {theirs}")
    header = [f"best match of{of}", found_in, data["measure"]]
    rows = [
        [io.printable(row), io.printable(match["column"]), f"{match['value']:.4f}"]
        for row, match in data["best match"].items()
    ]
    if statistics is not None:
        header.append("p, corrected")
        for cells, (row, match) in zip(rows, data["best match"].items(), strict=True):
            i, j = list(data["rows"]).index(row), list(data["columns"]).index(match["column"])
            cells.append(f"{statistics['corrected'][i][j]:.4g}")
    text = format_table(header, rows)
    text += f"\n\n{samples} samples, {len(data['rows']) * len(data['columns'])} comparisons. "
    text += f"Report: {_place(out)}report.html"
    if statistics is not None and statistics["samples"] < samples:
        text += f"\np-values by {statistics['permutations']} permutations of {statistics['samples']} of the samples"
    return text


# Where a grid stands: while it compares, between its comparisons and its report, and at the end.
_CHECKPOINT, _VALUES, _GRID = "checkpoint.npz", "values.json", "grid.json"


def _finished(out: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run of the same job found that came to its end, with all that it wrote still there."""
    data = _earlier(out / _GRID, job)
    if data is None or (out / _VALUES).exists():
        return None
    options, written = data["provenance"]["options"], data["written"]
    same_report = all(options.get(name) == job["options"].get(name) for name in _REPORT)
    same_images = data["provenance"].get("images sha256") == job.get("images sha256")
    complete = all(_as_written(out / name, written) for name in written)
    return data if same_report and same_images and written and complete else None


def _earlier(path: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a file of an earlier run of the same job holds; None where there is no such file."""
    if not path.exists():
        return None
    try:
        data = read_json(path)
        same = _identity(data["provenance"]) == _identity(job)
        ComparisonGrid.from_json(path)
        if path.name == _GRID:
            data["written"] = dict(data["written"])
            _grid_text(data, path.parent)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(
            f"--resume: {path} is damaged, or not of `jaxalign grid`. Delete it to go on without it, or give --force "
            "to start again."
        ) from None
    if not same:
        raise ValueError(f"--resume: {path} is of other options or inputs. Name another folder, or give --force.")
    return data


def _compared(
    ours: Input,
    theirs: Input | None,
    job: Mapping[str, Any],
    out: Path,
    options: Mapping[str, Any],
    measure_options: Mapping[str, Any],
) -> ComparisonGrid:
    """The grid itself, which is not computed again where a run of the same job got so far."""
    values, checkpoint = out / _VALUES, out / _CHECKPOINT
    if options["resume"]:
        for path in (values, out / _GRID):
            if _earlier(path, job) is not None:
                return ComparisonGrid.from_json(path)
        others = [name for name in _contents(out) if not name.startswith(_CHECKPOINT)]
        if others and not checkpoint.exists():
            raise FileExistsError(
                f"--resume: --out {out} holds {others[0]!r} and nothing to go on with: name another folder, or --force."
            )
    else:  # also the bandwidth that a kill left half solved
        for path in (values, checkpoint, checkpoint.with_name(f"{_CHECKPOINT}.sigma")):
            path.unlink(missing_ok=True)
    sets = [dict(one.rows) for one in ((ours,) if theirs is None else (ours, theirs))]
    how: dict[str, Any] = {"checkpoint": checkpoint, "plan": Plan(options["tile_size"])}
    if options["devices"] > 1:
        how = {"plan": Plan(options["tile_size"], sharding.data_mesh(options["devices"]))}
        sets = [{name: jnp.asarray(np.array(rows)) for name, rows in one.items()} for one in sets]
    compared = compare_grid(
        sets[0], sets[1] if theirs is not None else None, options["measure"],
        progress=_progress(options["quiet"]), **how, **measure_options,
    )  # fmt: skip
    write_json(values, {**json.loads(compared.to_json()), "provenance": job})
    return compared


def _progress(quiet: bool) -> bool:
    """Whether a bar is shown, on the terminal's error stream."""
    return not quiet and find_spec("tqdm") is not None


# Options of the report alone, and those that do not change the values of a grid either.
_REPORT = ("permutations", "seed", "images")
_HOW = ("quiet", "json", "resume", "force", "out", "devices", "tile_size", *_REPORT)


def _identity(job: Mapping[str, Any]) -> Any:
    """What makes two runs the same job."""
    kept = {name: value for name, value in job["options"].items() if name not in _HOW}
    return [kept, sorted(job["sha256"].values()), job["versions"]["jaxalign"]]


def _exact(p: Any, options: Mapping[str, Any]) -> Any:
    """A p-value is a whole number of (permutations + 1)-ths, which float32 rounds."""
    whole = options["permutations"] + 1
    return (np.round(np.asarray(p, np.float64) * whole) / whole).tolist()


def _printable(named: Any) -> Any:
    """The same with names that can be drawn."""
    if named is None:
        return None
    names = {"rows": tuple(map(_short, named.rows)), "columns": tuple(map(_short, named.columns))}
    return replace(named, **names)


def _short(name: str, most: int = 40) -> str:
    plain = io.printable(name)
    return plain if len(plain) <= most else plain[: most // 2 - 1] + "\N{HORIZONTAL ELLIPSIS}" + plain[-most // 2 :]


def _measure_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the measure, from --option; --density, sigma and diagonal are those of its kernel."""
    from jaxalign.measures._registry import find

    known, given = find(options["measure"]).options, dict(options["option"])
    name = "kernel" if "kernel" in known else "metric"
    kernel = {"rbf": RBF, "laplacian": Laplacian}.get(str(given.get(name, known.get(name))))
    if kernel is None:
        return given
    of_kernel = {option: given.pop(option) for option in ("sigma", "diagonal") if option in given}
    if "sigma" not in of_kernel:
        of_kernel["density"] = options["density"]
    return {**given, name: kernel(**of_kernel)}


def _some_rows(n: int) -> np.ndarray:
    return np.arange(n) if n <= TESTED else np.sort(np.random.default_rng(0).choice(n, TESTED, replace=False))


def _place(out: Path) -> str:
    return f"{io.printable(str(out))}/"


def _with_notes(text: str, notes: tuple[str, ...]) -> str:
    few = [*notes[:3], *([f"{len(notes) - 3} more like these"] if len(notes) > 3 else [])]
    return text + "".join(f"\nnote: {note}" for note in few)


@dataclass(frozen=True)
class Pictures:
    """Images that maps are of: how many, the first of them (shown, h, w, 3), and what tells them from others."""

    number: int
    shown: np.ndarray
    sha256: list[str]


def _pictures(path: Path | None) -> Pictures | None:
    """Images from a .npy file (pictures, h, w, 3), or a folder of image files in the order of their names."""
    if path is None:
        return None
    if path.suffix.lower() == ".npy":
        try:
            images = open_npy(path)
        except (ValueError, EOFError) as error:
            raise ValueError(f"--images {path}: {error}") from None
        shape, hashes = images.shape, [hash_of(path)]
        shown = np.asarray(images[:SHOWN] if shape else images)
    else:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError('--images needs pillow: python -m pip install "jaxalign[viz]"') from error
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        every = (file for file in path.iterdir() if file.suffix.lower() in kinds and file.is_file())
        files = sorted(every, key=io.natural)
        if not files:
            raise ValueError(f"--images {path}: the folder holds no .png, .jpg or .webp.")
        try:
            opened = [Image.open(file).convert("RGB") for file in files[:SHOWN]]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"--images {path}: a picture cannot be read ({error}).") from None
        shown = np.stack([np.asarray(image.resize(opened[0].size)) for image in opened])
        shape, hashes = (len(files), *shown.shape[1:]), [hash_of(file) for file in files]
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape or shown.dtype.kind not in "uif":
        raise ValueError(
            f"--images {path}: expected numbers of shape (pictures, h, w, 3); got {shown.dtype} of shape {shape}."
        )
    if shown.dtype.kind == "f" and shown.max() > 1:  # 0 to 255, as floating point
        shown = np.clip(shown, 0, 255).astype(np.uint8)
    return Pictures(shape[0], shown, hashes)


def _inputs(options: Mapping[str, Any], *given: Input) -> list[str]:
    """Paths of all that a command reads."""
    images = [] if options["images"] is None else [str(options["images"])]
    return [*images, *(path for one in given for path in one.hashes)]


def _check_pictures(pictures: Pictures, sets: Mapping[str, io.FeatureSet]) -> None:
    """Raise unless every set is a map of these pictures, all on one grid."""
    odd = [
        f"{io.printable(one.name)} is {one.values.shape}"
        for one in sets.values()
        if one.grid is None or len(one.values) != pictures.number
    ]
    if odd or not sets or len({one.grid for one in sets.values()}) != 1:
        told = ", ".join(odd[:3]) or "these are of several grids, or --positions is not samples"
        raise ValueError(f"--images: {pictures.number} pictures go with maps (pictures, h, w, d) of one h x w; {told}.")


def _colors_of_best(
    compared: ComparisonGrid, ours: Input, theirs: Input | None, pictures: Pictures, options: Mapping[str, Any]
) -> dict[str, bytes]:
    """The best match of the grid in colours, before and after alignment, where both are maps of the pictures."""
    from jaxalign import plots

    values = np.array(compared.values, np.float64)
    if compared.itself:
        np.fill_diagonal(values, np.nan)
    if np.isnan(values).all():
        return {}
    signed = values if compared.direction == "similarity" else -values
    i, j = np.unravel_index(np.nanargmax(signed), signed.shape)
    pair = [(compared.rows[i], ours), (compared.columns[j], ours if theirs is None else theirs)]
    sets = [given.sets[name] for name, given in pair]
    number = len(pictures.shown)
    features = {
        f"{k} {io.printable(one.name)}": np.asarray(one.values[:number], np.float32).reshape(-1, one.values.shape[-1])
        for k, one in zip("AB", sets, strict=True)
    }
    where = np.argwhere(np.ones(sets[0].grid or ()))
    board = np.flatnonzero(np.tile(where.sum(1) % 2 == 0, number))
    landmarks = np.sort(np.random.default_rng(options["seed"]).permutation(board)[:LANDMARKS])
    shape = (number, *(sets[0].grid or ()), 3)
    groups = {
        when: {name: one.reshape(shape) for name, one in found.items()}
        for when, found in (("before", own_colors(features)), ("after", joint_colors(features, landmarks)))
    }
    return {"colors": png_of(plots.color_panels(groups, pictures.shown), 130)}
