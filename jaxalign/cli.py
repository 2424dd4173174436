"""The command line: demo, info, compare, align, match, grid, ncut, explore. Needs the extra [cli]; figures need [viz].

This module defines the options and the exit codes: 0 success, 1 could not write, 2 invalid input, 130 stopped by
Ctrl-C. The commands themselves are in `jaxalign.report`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from jaxalign._version import __version__

_FORMATS = """files: .npy .npz .safetensors .h5 .parquet .pt (tensors only), or a folder of them; arrays (n, d),
(n, tokens, d) or maps (n, h, w, d), channels last"""
# The advice of the library's messages, which is an option here.
_ENABLE_X64 = re.compile(r'jax\.config\.update\("jax_enable_x64", True\)( at the start of the program)?')
_IMAGES = "the images of the maps: a folder, or a .npy file (n, h, w, 3)"


def main(arguments: Sequence[str] | None = None, *, keep_compiled: bool = False) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: the arguments; None: those of the program.
        keep_compiled: cache compiled programs in the user's cache folder. This is a setting of the whole process.
    """
    options = vars(_parser().parse_args(arguments))
    command: Callable[[dict[str, Any]], int] = options.pop("run")
    cached = not options.pop("no_cache")
    try:
        if keep_compiled:
            _keep_compiled(enabled=cached, quiet=options["quiet"])
        return command(options)
    except KeyboardInterrupt:
        out = options.get("out")
        saved = out is not None and any((out / name).exists() for name in ("checkpoint.npz", "values.json"))
        print(f"stopped{f'; partial results are in {out}: --resume continues' if saved else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # jaxalign ... | head
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or options.get("out") or "the output"
            return _fail(f"the disk is full: {where}. No partial file was left.", 1)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            from jaxalign.files.storage import too_many_files

            return _fail(too_many_files(), 1)
        missing = isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError))
        missing = missing or error.errno == errno.ENAMETOOLONG
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(error if error.errno is None else f"{place}{error.strerror}", 2 if missing else 1)
    except (ValueError, TypeError, ImportError, OverflowError) as error:
        return _fail(error, 2)
    except (MemoryError, RuntimeError) as error:  # jax raises a RuntimeError when memory runs out
        return _fail(str(error).splitlines()[0] if str(error) else "out of memory", 1)


def entry() -> None:
    """The program. Ctrl-C ends it at once, even while compiler threads run."""
    _open_many_files()
    if isinstance(sys.stdout, TextIOWrapper):  # names may have characters that the terminal cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: Any = main(keep_compiled=True)
    except SystemExit as stopped:  # --help, or options that argparse rejects
        code = stopped.code
    for stream in (sys.stdout, sys.stderr):
        code = _flush(stream, code)
    if code == 130:
        os._exit(code)
    sys.exit(code)


def _open_many_files() -> None:
    """Raise the limit of open files as far as the system allows: the .npy files of all layers stay open."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if resource.RLIM_INFINITY != soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _keep_compiled(*, enabled: bool, quiet: bool) -> None:
    from jaxalign.report import cache

    problem = cache.keep_compiled(enabled=enabled)
    if problem is not None and not quiet:
        print(f"jaxalign: {problem}", file=sys.stderr)


def _flush(stream: Any, code: Any) -> Any:
    """Flush a stream. If its reader is gone, discard the rest, which Python would otherwise report at exit."""
    if stream is None:  # closed before the program started
        return code
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return code or 1
    return code


def _fail(error: Any, code: int) -> int:
    from jaxalign.io import printable

    message = " ".join(map(printable, str(error).splitlines()))
    message = _ENABLE_X64.sub("--x64", message)
    print(f"jaxalign: {message}", file=sys.stderr)
    return code


# --- options ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxalign", description="Compare and align representations of neural networks."
    )
    parser.add_argument("--version", action="version", version=f"jaxalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: Any, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"{_FORMATS}\n\nexamples:\n{examples}" if name != "demo" else f"example: {examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--quiet", action="store_true", help="no progress bar")
        command.add_argument("--no-cache", action="store_true", help="compile everything anew, without a cache")
        return command

    demo = add(
        "demo", _command("show_demo"),
        "align real networks on the shipped features",
        "Align four real networks on digits and on photographs (their features ship with the library), and match\n"
        "shuffled digits from a few known ones. Print how well held-out samples correspond, and draw figures.\n"
        "About a minute on two cores, longer with more numbers of landmarks.",
        "jaxalign demo --out figures",
    )  # fmt: skip
    demo.add_argument(
        "--landmarks", type=_demo_landmarks, nargs="+", default=[30], metavar="NUMBER",
        help="match the shuffled digits from these numbers of known ones (default: 30)",
    )  # fmt: skip
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the figures (default: ./demo)")
    demo.add_argument("--force", action="store_true", help="overwrite the files of an earlier run")

    info = add(
        "info", _command("info"), "shapes, missing values and sigma of the representations in files",
        "Print shapes, dtypes, rows with nan or inf, and the sigma at which the mean affinity is the density.",
        "  jaxalign info features/\n  jaxalign info clip.npy dino.safetensors --density 0.1",
    )  # fmt: skip
    info.add_argument("inputs", nargs="+", type=Path, help="files or folders")
    info.add_argument("--rows", type=_count, default=10_000, help="use this many rows for sigma (default: 10000)")
    _add_common_options(info)

    compare = add(
        "compare", _command("compare_files"), "compare two representations of the same samples",
        "Compute a measure of two representations, by default debiased CKA, and its permutation p-value.",
        "  jaxalign compare clip.npy dino.npy\n"
        "  jaxalign compare clip.npy dino.npy --measure rsa --permutations 9999 --json",
    )  # fmt: skip
    compare.add_argument("x", type=Path, help="a file with one representation")
    compare.add_argument("y", type=Path, help="a file with another representation of the same samples")
    _add_measure_options(compare, 999)
    _add_common_options(compare)

    align = add(
        "align", _command("align_files"), "relative features over shared landmarks",
        "Write the relative features (n, landmarks) of each representation to a .npy file, and alignment.json.\n"
        "By default channels are standardized, rows are decorrelated, and the density is 0.7.",
        "  jaxalign align clip.npy dino.npy --landmarks 300 --out aligned/\n"
        "  jaxalign align features/ --published --density 0.05 --out aligned/",
    )  # fmt: skip
    align.add_argument("inputs", nargs="+", type=Path, help="files or folders with representations of the same samples")
    align.add_argument(
        "--landmarks", type=_count, help="number of random landmarks (default: 300, at most half of the samples)"
    )
    align.add_argument(
        "--bandwidth", choices=("global", "per_row"), default="global",
        help="one sigma per representation, or one per row (default: global)",
    )  # fmt: skip
    align.add_argument(
        "--published", action="store_true", help="the published method: plain auto-scaled rows, density 0.05"
    )
    _add_common_options(align, None, default="0.7, or 0.05 with --published", tiles=False)
    _add_output_options(align)

    match = add(
        "match", _command("match_files", "matches"), "the same samples in several representations, from known pairs",
        "Find the same samples in representations whose samples may differ in order and number, from a few known\n"
        "pairs. Write matches.csv (candidates and confidences), tracks.csv (samples through all representations) and\n"
        "match.json. The file of landmarks has a row per known sample: its index, from 0, in each input.",
        "  jaxalign match clip.npy dino.npy sam.npy --landmarks pairs.csv --out matches/\n"
        "  jaxalign match clip.npy dino.npy --landmarks pairs.csv --method one_to_one --out matches/",
    )  # fmt: skip
    match.add_argument("inputs", nargs="+", type=Path, help="files or folders")
    match.add_argument(
        "--landmarks", required=True, metavar="FILE|NUMBER",
        help="a .csv file of known pairs, or a number of random landmarks if all representations hold the same samples",
    )  # fmt: skip
    match.add_argument(
        "--method", choices=("search", "one_to_one"), default="search",
        help="each sample by itself, or no partner used twice (default: search)",
    )  # fmt: skip
    match.add_argument(
        "--rounds", type=_rounds, help="rounds of self-training (default: until confidence stops rising)"
    )
    match.add_argument(
        "--min-confidence", type=_probability, default=0.75, help="confidence of a match, 0 to 1 (default: 0.75)"
    )
    _add_common_options(match, 0.93, default="0.93", tiles=False)
    _add_output_options(match)

    grid = add(
        "grid", _command("grid_files", "grids"),
        "compare all layers of any number of models: JSON, tables, figures, a report page",
        "Compare the layers of one model with each other, or every layer with those of all other models. Write\n"
        "grid.json, tables as CSV and LaTeX, figures as PNG and PDF, and a self-contained report.html. More than two\n"
        "models also get a map of their similarities. After a kill, --resume continues.",
        "  jaxalign grid modelA/ modelB/ --out report/\n"
        "  jaxalign grid modelA/ --measure mutual_knn --out report/\n"
        "  jaxalign grid models/ --out report/  # each subfolder is a model\n"
        "  jaxalign grid modelA/ modelB/ --out report/ --resume\n"
        "  jaxalign grid vit/ sam/ --images photos/ --out report/",
    )  # fmt: skip
    grid.add_argument(
        "inputs", nargs="+", type=Path, metavar="model",
        help="a folder of layers, or a file with several representations, of the same samples; or one folder of models",
    )  # fmt: skip
    grid.add_argument(
        "--resamples", type=_resamples, default=500,
        help="bootstrap resamples for intervals of the similarities of models; 0: no intervals (default: 500)",
    )  # fmt: skip
    grid.add_argument("--devices", type=_devices, default=1, help="spread rows over this many devices (not resumable)")
    grid.add_argument("--resume", action="store_true", help="continue an interrupted run in --out")
    grid.add_argument("--images", type=Path, help=_IMAGES)
    _add_measure_options(grid, 999)
    _add_common_options(grid)
    _add_output_options(grid)

    ncut = add(
        "ncut", _command("cut_files"), "colors and segments from the normalized cut",
        "Write eigenvectors, colors and segments of every sample (every position of maps and tokens). Several\n"
        "representations of the same samples are aligned and cut together: they share colors and segments.",
        "  jaxalign ncut dino.npy --out cut/\n"
        "  jaxalign ncut dino.npy sam.npy --images photos/ --colors tsne --out cut/",
    )  # fmt: skip
    ncut.add_argument("inputs", nargs="+", type=Path, help="files or folders")
    ncut.add_argument("--num-components", type=_count, default=8, help="number of eigenvectors (default: 8)")
    ncut.add_argument(
        "--segments", type=_count, default=8, help="number of segments, at most --num-components (default: 8)"
    )
    ncut.add_argument(
        "--colors", choices=("rotate", "umap", "tsne"), default="rotate",
        help="how eigenvectors become colors (default: rotate)",
    )  # fmt: skip
    ncut.add_argument(
        "--landmarks", type=_count, default=512, help="landmarks that align several representations (default: 512)"
    )
    ncut.add_argument(
        "--bandwidth", choices=("global", "per_row"), default="per_row",
        help="one sigma per representation, or one per row (default: per_row)",
    )  # fmt: skip
    ncut.add_argument("--images", type=Path, help=_IMAGES)
    _add_common_options(ncut)
    _add_output_options(ncut)

    explore = add(
        "explore", _command("explore_files", "explore"), "a page to explore patches of images in several networks",
        "Write a self-contained page: select a patch of any image in any network, and see its affinity to all others\n"
        "in every network, before and after alignment; colors, segments, and matches. Each input is a network. Maps\n"
        "of different sizes are resized to the largest.",
        "  jaxalign explore vit/ sam/ --images photos/ --out explore.html\n"
        "  jaxalign explore vit/ sam/ --layer '*block8*' --images photos.npy --out explore.html",
    )  # fmt: skip
    explore.add_argument("inputs", nargs="+", type=Path, help="files or folders, one for each network")
    explore.add_argument("--images", type=Path, required=True, help=_IMAGES)
    explore.add_argument(
        "--layer", metavar="PATTERN", help="the layer of inputs with several, such as 'block8*' (default: the last)"
    )
    explore.add_argument("--segments", type=_segments, default=8, help="segments at most, 1 to 12 (default: 8)")
    explore.add_argument("--landmarks", type=_count, default=512, help="landmarks of the alignment (default: 512)")
    _add_common_options(explore, tiles=False, positions=False)
    _add_output_options(explore, "the page, an .html file", "overwrite an earlier page")
    return parser


def _add_common_options(
    parser: argparse.ArgumentParser, density: float | None = 0.05, *, default: str = "0.05", tiles: bool = True,
    positions: bool = True,
) -> None:  # fmt: skip
    parser.add_argument("--density", type=_density, default=density, help=f"target mean affinity (default: {default})")
    if positions:
        parser.add_argument(
            "--positions", choices=("samples", "channels", "mean"), default="samples",
            help="positions of tokens and maps are samples (default), channels of their sample, or averaged",
        )  # fmt: skip
    if tiles:
        parser.add_argument("--tile-size", type=_count, help="rows and columns of a tile (default: set by memory)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of random choices (default: 0)")
    parser.add_argument("--x64", action="store_true", help="compute in float64")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_measure_options(parser: argparse.ArgumentParser, permutations: int) -> None:
    parser.add_argument("--measure", default="cka", help="cka, rsa, mutual_knn, procrustes, ... (default: cka)")
    parser.add_argument(
        "--option", type=_option, action="append", default=[], metavar="NAME=VALUE",
        help="an option of the measure, such as kernel=linear, estimator=biased or k=20; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--permutations",
        type=_number_of_permutations,
        default=permutations,
        help=f"permutations for p-values; 0: no p-values (default: {permutations})",
    )
    parser.add_argument(
        "--null", choices=("groups", "grid"), default="groups",
        help="exchange samples or groups (default), or flip and rotate the grid of each image of maps",
    )  # fmt: skip
    parser.add_argument(
        "--groups", type=Path, metavar="FILE",
        help="labels of dependent samples, which permutations keep together: a .npy file, or a text file with a label "
        "per line (default: the images or texts of maps and tokens)",
    )  # fmt: skip


def _add_output_options(
    parser: argparse.ArgumentParser, out: str = "output folder", force: str = "overwrite the files of an earlier run"
) -> None:
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--force", action="store_true", help=force)


def _number(text: str, kind: type, valid: Callable[[Any], bool], meaning: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
    return value


def _option(text: str) -> tuple[str, Any]:
    """An option of a measure: a Python literal if it parses as one, else a string."""
    name, equal, value = text.partition("=")
    if not equal or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")


def _number_of_permutations(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value <= 10**7, "a whole number from 0 to 10 million")


def _resamples(text: str) -> int:
    return _number(text, int, lambda value: value == 0 or 2 <= value <= 10**5, "0, or a whole number from 2 to 100,000")


def _devices(text: str) -> int:
    return _number(text, int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024")


def _count(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number, 1 or more")


def _segments(text: str) -> int:
    # The page has a color for each.
    return _number(text, int, lambda value: 1 <= value <= 12, "a whole number from 1 to 12")


def _rounds(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more")


def _demo_landmarks(text: str) -> int:
    # `match` needs 4 known digits, and some of the 1000 are left to find.
    return _number(text, int, lambda value: 4 <= value <= 900, "a whole number from 4 to 900")


def _probability(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _density(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


# --- running ---------------------------------------------------------------------------------------------------------


def _command(name: str, module: str = "commands") -> Callable[[dict[str, Any]], int]:
    """A command of a module of `jaxalign.report`, followed by printing its result."""

    def run(options: dict[str, Any]) -> int:
        import jax

        if options.get("devices", 1) > 1:  # without this there is one CPU device
            jax.config.update("jax_num_cpu_devices", options["devices"])
        options["tile_size"] = options.get("tile_size") or "auto"
        if options.get("x64"):
            jax.config.update("jax_enable_x64", True)
        from jaxalign.files.storage import json_value

        commands = importlib.import_module(f"jaxalign.report.{module}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # from plotting libraries
            result = getattr(commands, name)(options)
        print(json.dumps(json_value(result.data), indent=1) if options.get("json") else result.text)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where errors are reported
        return 0

    return run


if __name__ == "__main__":
    entry()
