"""The command line: demo, info, compare, align, grid, ncut. Needs the extra [cli]; pictures need [viz].

What a command does stands in `jaxalign.report.commands`; here are its options, and how it ends: 0 done, 1 it could not
write, 2 wrong input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from jaxalign._version import __version__

_FORMATS = """files: .npy .npz .safetensors .h5 .parquet .pt (tensors only), or a folder of them; arrays (n, d),
(n, tokens, d) or maps (n, h, w, d), channels last"""


def main(arguments: Sequence[str] | None = None, *, keep_compiled: bool = False) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: default: those of the program.
        keep_compiled: whether jax keeps what it compiles in the user's cache folder, which is a setting of the process.
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
        print(f"stopped{f'; what is finished is in {out}: --resume goes on' if saved else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # jaxalign ... | head
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or options.get("out") or "where the output goes"
            return _fail(f"the disk is full: {where}. Nothing half-written was left.", 1)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            from jaxalign.files.storage import too_many_files

            return _fail(too_many_files(), 1)
        missing = isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError))
        missing = missing or error.errno == errno.ENAMETOOLONG
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(error if error.errno is None else f"{place}{error.strerror}", 2 if missing else 1)
    except (ValueError, TypeError, ImportError, OverflowError) as error:
        return _fail(error, 2)
    except (MemoryError, RuntimeError) as error:  # what jax raises when memory runs out is a RuntimeError
        return _fail(str(error).splitlines()[0] if str(error) else "out of memory", 1)


def entry() -> None:
    """The program: ends at once on Ctrl-C, as threads of the compiler may still be at work."""
    _open_many_files()
    if isinstance(sys.stdout, TextIOWrapper):  # names may have letters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: Any = main(keep_compiled=True)
    except SystemExit as stopped:  # --help, and options that argparse refuses
        code = stopped.code
    for stream in (sys.stdout, sys.stderr):
        code = _flush(stream, code)
    if code == 130:
        os._exit(code)
    sys.exit(code)


def _open_many_files() -> None:
    """Raise the limit of open files as far as the system allows: every .npy file of a model's layers stays open."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if resource.RLIM_INFINITY != soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _keep_compiled(*, enabled: bool, quiet: bool) -> None:
    from jaxalign.report import cache

    why_not = cache.keep_compiled(enabled=enabled)
    if why_not is not None and not quiet:
        print(f"jaxalign: {why_not}", file=sys.stderr)


def _flush(stream: Any, code: Any) -> Any:
    """Write out a stream; where nobody reads it, what is left goes nowhere, or Python would report it while it ends."""
    if stream is None:  # closed before the program began
        return code
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return code or 1
    return code


def _fail(error: Any, code: int) -> int:
    from jaxalign.io import printable

    print(f"jaxalign: {' '.join(map(printable, str(error).splitlines()))}", file=sys.stderr)
    return code


# --- options ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxalign", description="Relative features that can be compared across networks."
    )
    parser.add_argument("--version", action="version", version=f"jaxalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: Any, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"{_FORMATS}\n\nexamples:\n{examples}" if name != "demo" else f"example: {examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(run=run)
        one.add_argument("--quiet", action="store_true", help="no progress bar")
        one.add_argument("--no-cache", action="store_true", help="compile anew what an earlier run compiled")
        return one

    demo = add(
        "demo", _command("show_demo"),
        "align real networks on the features that ship with the library",
        "Align four real networks on digits and on photographs (the features ship with the library), print\n"
        "how well held-out samples correspond, and draw it. Half a minute on two cores, less the next time.",
        "jaxalign demo --out pictures",
    )  # fmt: skip
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: ./demo)")
    demo.add_argument("--force", action="store_true", help="overwrite what --out holds")

    info = add(
        "info", _command("info"), "what files hold, what is missing in them, and the sigma of each set",
        "Shapes, dtypes, rows with nan or inf, and the sigma at which the mean affinity is the density.",
        "  jaxalign info features/\n  jaxalign info clip.npy dino.safetensors --density 0.1",
    )  # fmt: skip
    info.add_argument("inputs", nargs="+", type=Path, help="files or folders")
    info.add_argument("--rows", type=_count, default=10_000, help="rows that sigma is found from (default: 10000)")
    _common(info)

    compare = add(
        "compare", _command("compare_files"), "one number for two sets of features of the same samples",
        "A measure of two sets, debiased CKA by default, and its permutation p-value.",
        "  jaxalign compare clip.npy dino.npy\n"
        "  jaxalign compare clip.npy dino.npy --measure rsa --permutations 9999 --json",
    )  # fmt: skip
    compare.add_argument("x", type=Path, help="a file with one set")
    compare.add_argument("y", type=Path, help="a file with another, of the same samples")
    _measured(compare, 999)
    _common(compare)

    align = add(
        "align", _command("align_files"), "relative features over shared landmarks",
        "Writes one .npy of relative features (n, landmarks) a set, and alignment.json. By default the\n"
        "recommended form: standardised channels, decorrelated rows, density 0.7.",
        "  jaxalign align clip.npy dino.npy --landmarks 300 --out aligned/\n"
        "  jaxalign align features/ --published --density 0.05 --out aligned/",
    )  # fmt: skip
    align.add_argument("inputs", nargs="+", type=Path, help="files or folders with sets of the same samples")
    align.add_argument("--landmarks", type=_count, help="how many, at random (default: 300, at most half)")
    align.add_argument("--bandwidth", choices=("global", "per_row"), default="global")
    align.add_argument("--published", action="store_true", help="plain auto-scaled rows, density 0.05")
    _common(align, density=None, tiles=False)
    _written(align)

    grid = add(
        "grid", _command("grid_files"), "all layers of a model, or of two, compared: JSON, pictures, one report page",
        "Compares every set of x with every set of y (or with each other), and writes grid.json, grid.png,\n"
        "layers.png and a self-contained report.html. What is finished survives a kill: --resume.",
        "  jaxalign grid modelA/ modelB/ --out report/\n"
        "  jaxalign grid modelA/ --measure mutual_knn --out report/\n"
        "  jaxalign grid modelA/ modelB/ --out report/ --resume\n"
        "  jaxalign grid vit/ sam/ --images photos/ --out report/",
    )  # fmt: skip
    grid.add_argument("x", type=Path, help="a folder of layers, or a file with several sets")
    grid.add_argument("y", type=Path, nargs="?", help="another model's, of the same samples")
    grid.add_argument("--devices", type=_devices, default=1, help="spread rows over so many devices (not resumable)")
    grid.add_argument("--resume", action="store_true", help="go on with what --out holds")
    grid.add_argument("--images", type=Path, help="pictures that the maps are of: a folder, or .npy (n, h, w, 3)")
    _measured(grid, 999)
    _common(grid)
    _written(grid)

    ncut = add(
        "ncut", _command("cut_files"), "colours and segments from the normalised cut",
        "Leading eigenvectors, colours and segments of every sample (every position of maps and tokens). Several\n"
        "sets of the same samples are aligned and cut together, so that colours mean the same in all.",
        "  jaxalign ncut dino.npy --out cut/\n"
        "  jaxalign ncut dino.npy sam.npy --images photos/ --colors tsne --out cut/",
    )  # fmt: skip
    ncut.add_argument("inputs", nargs="+", type=Path, help="files or folders")
    ncut.add_argument("--components", type=_count, default=8, help="eigenvectors (default: 8)")
    ncut.add_argument("--segments", type=_count, default=8, help="segments, up to the components (default: 8)")
    ncut.add_argument("--colors", choices=("rotate", "umap", "tsne"), default="rotate")
    ncut.add_argument("--landmarks", type=_count, default=512, help="of several sets (default: 512)")
    ncut.add_argument("--bandwidth", choices=("global", "per_row"), default="per_row")
    ncut.add_argument("--images", type=Path, help="pictures that the maps are of: a folder, or .npy (n, h, w, 3)")
    _common(ncut)
    _written(ncut)
    return parser


def _common(parser: argparse.ArgumentParser, density: float | None = 0.05, *, tiles: bool = True) -> None:
    told = f"mean affinity (default: {density})" if density else "mean affinity (default: 0.7, or 0.05 as published)"
    parser.add_argument("--density", type=_share, default=density, help=told)
    parser.add_argument(
        "--positions", choices=("samples", "channels", "mean"), default="samples",
        help="positions of tokens and maps: each a sample (the default), channels of their sample, or averaged",
    )  # fmt: skip
    if tiles:
        parser.add_argument("--tile-size", type=_count, help="rows and columns of a tile (default: by the memory)")
    parser.add_argument("--seed", type=_seed, default=0, help="of random choices (default: 0)")
    parser.add_argument("--x64", action="store_true", help="compute in float64")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _measured(parser: argparse.ArgumentParser, permutations: int) -> None:
    parser.add_argument("--measure", default="cka", help="cka, rsa, mutual_knn, procrustes, ... (default: cka)")
    parser.add_argument(
        "--option", type=_option, action="append", default=[], metavar="NAME=VALUE",
        help="an option of the measure, as kernel=linear, estimator=biased, k=20; any number of these",
    )  # fmt: skip
    parser.add_argument(
        "--permutations", type=_many, default=permutations, help=f"for p-values, 0: none (default: {permutations})"
    )


def _written(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--force", action="store_true", help="overwrite what --out holds")


def _number(text: str, kind: type, valid: Callable[[Any], bool], meaning: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
    return value


def _option(text: str) -> tuple[str, Any]:
    """An option of a measure: a number, a truth value or None where it reads as one, else words."""
    name, equal, value = text.partition("=")
    if not equal or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")


def _many(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value <= 10**7, "a whole number from 0 to 10 million")


def _devices(text: str) -> int:
    return _number(text, int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024")


def _count(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number, 1 or more")


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


# --- running ---------------------------------------------------------------------------------------------------------


def _command(name: str) -> Callable[[dict[str, Any]], int]:
    """A command of `jaxalign.report.commands`, with what it found printed."""

    def run(options: dict[str, Any]) -> int:
        import jax

        if options.get("devices", 1) > 1:  # of CPUs there is one unless more are asked for
            jax.config.update("jax_num_cpu_devices", options["devices"])
        options["tile_size"] = options.get("tile_size") or "auto"
        if options.get("x64"):
            jax.config.update("jax_enable_x64", True)
        from jaxalign.files.storage import json_value
        from jaxalign.report import commands

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of libraries that draw and lay out
            found = getattr(commands, name)(options)
        print(json.dumps(json_value(found.data), indent=1) if options.get("json") else found.text)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error has its message
        return 0

    return run


if __name__ == "__main__":
    entry()
