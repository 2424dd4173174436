"""`jaxalign grid`: all layers of any number of models, as values, p-values, intervals, tables, figures and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import io, sharding
from jaxalign.files.storage import json_value, read_json, replace_file
from jaxalign.grid import ComparisonGrid, compare_grid
from jaxalign.measures._registry import find
from jaxalign.plan import Plan
from jaxalign.report import commands, words
from jaxalign.report.exports import file_parts, tables
from jaxalign.report.grid_figures import colors_of_best, figures, shortened
from jaxalign.report.html import page
from jaxalign.report.models import (
    Model,
    all_layers,
    best_matches,
    describe_pairs,
    matrix,
    model_pairs,
    read_models,
)
from jaxalign.report.statistics import Intervals, Tested, check_null, describe, run_intervals, run_test
from jaxalign.report.tables import format_table


def grid_files(options: dict[str, Any]) -> commands.Result:
    """Compare all layers of all models: values, p-values, intervals, tables, figures and a report page."""
    models = read_models(options["inputs"], options["positions"])
    named = {f"{model.path}: {name}": rows for model in models for name, rows in model.inputs.rows.items()}
    if len(models) == 2:  # which may be the same
        sides = zip("xy", models, strict=True)
        named = {f"{side} {m.path}: {name}": rows for side, m in sides for name, rows in m.inputs.rows.items()}
    n = commands.same_samples(named)
    images = commands.read_images(options["images"])
    if images is not None:
        arrays = {f"{m.path}: {name}": a for m in models for name, a in m.inputs.arrays.items()}
        commands.check_images(images, arrays)
    if options["permutations"] or options["resamples"]:
        check_null(_all_arrays(models), options)
    inputs = [model.inputs for model in models]
    measure_options = commands.measure_options(options)
    job = commands.provenance(options, *inputs)
    if images is not None:
        job["images sha256"] = images.sha256
    paths = commands.input_paths(options, *inputs)
    with commands.output_folder(options["out"], paths, force=options["force"], resumable=options["resume"]) as out:
        data = _finished(out, job) if options["resume"] else None
        if data is None:
            data = _report(models, images, n, job, out, options, measure_options)
    return commands.Result(data, commands.with_notes(_text(data, out), tuple(job["notes"])))


def _report(
    models: Sequence[Model],
    images: commands.Images | None,
    n: int,
    job: Mapping[str, Any],
    out: Path,
    options: Mapping[str, Any],
    measure_options: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare, draw and write; returns the content of grid.json."""
    rows, columns = _sides(models, "rows")
    compared = _compare(rows, columns, job, out, options, measure_options)
    tested = _test(models, options, measure_options)
    intervals, problem = _intervals(models, options, measure_options)
    best = find(options["measure"]).best_with(dict(compared.settings))
    pairs = describe_pairs(models, compared, tested, intervals)
    statistics = None if tested is None else {
        **tested.summary(), **tested.values(), "words": describe(tested.summary(), n),
    }  # fmt: skip
    data: dict[str, Any] = {
        **json.loads(compared.to_json()),
        "samples": n,
        "density reached": commands.densities([*rows.values(), *(columns or {}).values()], compared, options),
        "models": [
            {"name": m.name, "path": str(m.path), "layers": list(m.layers), "start": m.start} for m in models
        ],
        "label": words.measure_name(options["measure"]),
        "best": best if np.isfinite(best) else None,
        "pairs": pairs,
        "similarities": matrix(pairs, len(models), best).tolist(),
        "best matches": best_matches(models, compared, statistics),
        "statistics": statistics,
        "intervals": problem if intervals is None else {
            "level": intervals.found[0].level, "resamples": options["resamples"], "samples": intervals.samples,
            "groups": intervals.groups, "what": intervals.what,
        },
        "provenance": job,
    }  # fmt: skip
    data["words"] = _words(data, options, measure_options)
    data = json_value(data)
    file_names = file_parts([model.name for model in models])
    contents = tables(data, file_names)
    contents |= figures(models, compared, None if tested is None else tested.test, data, intervals, file_names)
    if images is not None:
        contents |= colors_of_best(models, data, images, options["seed"])
    shown = {name: contents[f"{name}.png"] for name in ("models", "layers", "colors") if f"{name}.png" in contents}
    contents["report.html"] = page(data, shown, list(contents)).encode(errors="backslashreplace")
    for name, content in contents.items():
        replace_file(out / name, content)
    data["files"] = list(contents)
    commands.write_manifest(out / _GRID, data, (out / name for name in contents))
    (out / _VALUES).unlink(missing_ok=True)
    return data


def _sides(models: Sequence[Model], part: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rows and columns of the grid; no columns if they are the rows, of one model or of more than two."""
    if len(models) > 2:
        return all_layers(models, part), None
    first, *second = (dict(getattr(model.inputs, part)) for model in models)
    return first, second[0] if second else None


def _test(models: Sequence[Model], options: Mapping[str, Any], measure_options: Mapping[str, Any]) -> Tested | None:
    if not options["permutations"]:
        return None
    rows, columns = _sides(models, "rows")
    return run_test(rows, columns or rows, _all_arrays(models), options, measure_options)


def _intervals(
    models: Sequence[Model], options: Mapping[str, Any], measure_options: Mapping[str, Any]
) -> tuple[Intervals | None, dict[str, str] | None]:
    """Intervals of the similarities of models, or why there are none."""
    if len(models) < 2 or not options["resamples"]:
        return None, None
    pairs = ((a.inputs.rows, b.inputs.rows) for a, b in model_pairs(models))
    try:
        return run_intervals(pairs, _all_arrays(models), options, measure_options), None
    except ValueError as error:  # a measure without a bootstrap, or few groups
        return None, {"problem": str(error).partition(". ")[0].removesuffix(".")}


def _all_arrays(models: Sequence[Model]) -> dict[str, io.FeatureSet]:
    return {f"{k}: {name}": a for k, model in enumerate(models) for name, a in model.inputs.arrays.items()}


def _words(data: Mapping[str, Any], options: Mapping[str, Any], measure_options: Mapping[str, Any]) -> dict[str, str]:
    """The sentences of the report."""
    samples, intervals, several = data["samples"], data["intervals"], len(data["models"]) > 2
    ellipses = intervals is not None and "problem" not in intervals
    comparisons = len(data["rows"]) * len(data["columns"])
    return {
        "measure": words.measure_words(options["measure"], measure_options),
        "null": words.null_words(data["statistics"], samples, comparisons, len(data["pairs"])),
        "similarity": words.similarity_words(data["direction"]) if data["pairs"] else "",
        "intervals": words.interval_words(intervals, samples),
        "map": words.map_words(data["direction"], ellipses) if several and data["best"] is not None else "",
    }


def _text(data: Mapping[str, Any], out: Path) -> str:
    """The best matches or the similarities of models as a table, and the path of the report."""
    several = len(data["models"]) > 2
    text = format_table(*(_similarity_table(data) if several else _match_table(data)))
    text += f"\n\n{data['samples']} samples, {len(data['rows']) * len(data['columns'])} comparisons. "
    text += f"Report: {commands.shown_path(out)}report.html"
    if data["statistics"] is not None:
        text += f"\n{data['statistics']['words']}"
    if len(data["models"]) == 2:
        for name, found in data["pairs"][0]["aggregates"].items():
            calibrated, p_value = commands.number_cell(found["calibrated"]), found["p_value"]
            text += f"\n{name.replace('_', ' ')}: {found['value']:.4f}, calibrated {calibrated}, p = {p_value:.4g}"
    if data["words"]["intervals"]:
        text += f"\n{data['words']['intervals']}"
    return text


def _match_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The best match of each layer of the first model."""
    names = [shortened(model["name"]) for model in data["models"]]
    other = "best match" if data["itself"] else f"best match in {names[1]}"
    header = [f"layer of {names[0]}", other, data["measure"]]
    matches = [match for match in data["best matches"] if match["model"] == 0]
    rows = [[io.printable(m["layer"]), io.printable(m["match"]), f"{m['value']:.4f}"] for m in matches]
    if data["statistics"] is not None:
        header += ["calibrated", "p, corrected"]
        for cells, match in zip(rows, matches, strict=True):
            cells += [commands.number_cell(match["calibrated"]), f"{match['corrected']:.4g}"]
    return header, rows


def _similarity_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The similarity of each pair of models, from the most to the least similar."""
    names = [shortened(model["name"]) for model in data["models"]]
    header, rows = ["model", "model", data["direction"], "95% interval", "calibrated", "p"], []
    sign = -1 if data["direction"] == "similarity" else 1
    for pair in sorted(data["pairs"], key=lambda pair: sign * pair["similarity"]):
        null = pair["aggregates"].get("symmetric_best")
        interval = "-" if pair["low"] is None else f"{pair['low']:.4f} to {pair['high']:.4f}"
        p_value = "-" if null is None else f"{null['p_value']:.4g}"
        calibrated = "-" if null is None else commands.number_cell(null["calibrated"])
        rows.append([*(names[k] for k in pair["models"]), f"{pair['similarity']:.4f}", interval, calibrated, p_value])
    return header, rows


# --- an interrupted run -----------------------------------------------------------------------------------------------


# The state of a grid: while it compares, between its comparisons and its report, and at the end.
_CHECKPOINT, _VALUES, _GRID = "checkpoint.npz", "values.json", "grid.json"


def _finished(out: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of a complete run of the same job whose files are unchanged; None if there are none."""
    data = _earlier(out / _GRID, job)
    if data is None or (out / _VALUES).exists():
        return None
    options, written = data["provenance"]["options"], data["written"]
    same_report = all(options.get(name) == job["options"].get(name) for name in _REPORT)
    same_images = data["provenance"].get("images sha256") == job.get("images sha256")
    complete = all(commands.is_unchanged(out / name, written) for name in written)
    return data if same_report and same_images and written and complete else None


def _earlier(path: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a file of an earlier run of the same job; None if the file does not exist."""
    if not path.exists():
        return None
    try:
        data = read_json(path)
        same = _identity(data["provenance"]) == _identity(job)
        ComparisonGrid.from_json(path)
        if path.name == _GRID:
            data["written"] = dict(data["written"])
            _text(data, path.parent)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(
            f"--resume: {path} is damaged, or not from `jaxalign grid`. Delete it to continue without it, or use "
            "--force to start over."
        ) from None
    if not same:
        raise ValueError(f"--resume: {path} is from other options or inputs. Name another folder, or use --force.")
    return data


def _compare(
    rows: Mapping[str, Any],
    columns: Mapping[str, Any] | None,
    job: Mapping[str, Any],
    out: Path,
    options: Mapping[str, Any],
    measure_options: Mapping[str, Any],
) -> ComparisonGrid:
    """The grid; from its file if a run of the same job computed it already."""
    values, checkpoint = out / _VALUES, out / _CHECKPOINT
    if options["resume"]:
        for path in (values, out / _GRID):
            if _earlier(path, job) is not None:
                return ComparisonGrid.from_json(path)
        unknown = [name for name in commands.contents_of(out) if not name.startswith(_CHECKPOINT)]
        if unknown and not checkpoint.exists():
            raise FileExistsError(
                f"--resume: --out {out} holds {unknown[0]!r} but no run to continue: name another folder, or use "
                "--force."
            )
    else:  # also the checkpoint of an interrupted search for sigma
        for path in (values, checkpoint, checkpoint.with_name(f"{_CHECKPOINT}.sigma")):
            path.unlink(missing_ok=True)
    layers = [dict(part) for part in (rows, columns) if part is not None]
    how: dict[str, Any] = {"checkpoint": checkpoint, "plan": Plan(options["tile_size"])}
    if options["devices"] > 1:
        how = {"plan": Plan(options["tile_size"], sharding.data_mesh(options["devices"]))}
        layers = [{name: np.asarray(values) for name, values in part.items()} for part in layers]
    compared = compare_grid(
        layers[0], layers[1] if columns is not None else None, options["measure"],
        progress=_progress(options["quiet"]), **how, **measure_options,
    )  # fmt: skip
    commands.write_json(values, {**json.loads(compared.to_json()), "provenance": job})
    return compared


def _progress(quiet: bool) -> bool:
    """Whether to show a progress bar, on stderr."""
    return not quiet and find_spec("tqdm") is not None


# Options of the report alone, and all options that do not change the values of a grid.
_REPORT = ("permutations", "resamples", "groups", "null", "seed", "images")
_HOW = ("quiet", "json", "resume", "force", "out", "devices", "tile_size", *_REPORT)


def _identity(job: Mapping[str, Any]) -> Any:
    """The options, inputs and version that the values of a grid depend on."""
    kept = {name: value for name, value in job["options"].items() if name not in _HOW}
    return [kept, sorted(job["sha256"].values()), job["versions"]["jaxalign"]]
