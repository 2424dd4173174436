"""The command line: `jaxalign demo`. Needs the extra [demo]."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxalign._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxalign", description="Relative features that can be compared across networks."
    )
    parser.add_argument("--version", action="version", version=f"jaxalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="align real networks on the features that ship with the library",
        description="Align four real networks on digits and on photographs (the features ship with the library), print "
        "how well held-out samples correspond, and draw it. About a minute on two cores.",
        epilog="example: jaxalign demo --out pictures",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: ./demo)")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    try:
        return _demo(options.out, quiet=options.quiet)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _demo(out: Path, *, quiet: bool) -> int:
    try:
        import matplotlib  # noqa: F401
        from tqdm import tqdm
    except ImportError as error:
        print(f'{error}. The demo needs the extra: python -m pip install "jaxalign[demo]"', file=sys.stderr)
        return 1
    from jaxalign.report import demo, figures, tables

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {out}: {error.strerror}. Give a folder that can be written to.", file=sys.stderr)
        return 2
    start = time.perf_counter()
    with tqdm(total=demo.steps() + 1, disable=quiet, unit="step", dynamic_ncols=True) as bar:

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
    landmarks, queries = len(digits.rows.landmarks), len(digits.rows.queries)
    print(
        f"\nFour networks, 1000 handwritten digits: {landmarks} random landmarks, {queries} others looked up, mean "
        "over the\nsix pairs of networks in both directions. Only the ridge map is fitted between two networks.\n"
    )
    print(tables.digit_table(digits))
    landmarks, queries = len(patches.rows[0].landmarks), len(patches.rows[0].queries)
    print(
        f"\nFour networks, three photographs, each by itself: {landmarks} of its patches are landmarks (a "
        f"checkerboard), {queries}\nlooked up. Position alone matches patches well, so the scores stand beside two "
        "controls, each looked up against the\nfour networks: row and column instead of a network, and a network that "
        "was never trained.\n"
    )
    print(tables.patch_table(patches))
    print(
        "\nEvery set, with the sigma of its landmarks at a mean affinity of 0.05; for patches also the top-1 against "
        "all layers\nof other networks, decorrelated.\n"
    )
    print(tables.digit_sets(digits))
    print()
    print(tables.patch_sets(patches))
    print(f"\n{time.perf_counter() - start:.0f} s. Pictures:")
    for path in paths:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
