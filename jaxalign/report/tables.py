"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

from jaxalign.report.demo import (
    MATCH_ROUNDS,
    POSITION,
    SEARCH,
    DigitReport,
    MatchReport,
    PatchReport,
    Score,
    network_of,
)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned left and whose other columns are aligned right."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def demo_text(digits: DigitReport, patches: PatchReport, matches: MatchReport) -> str:
    """All tables of the demo, each with an explanation."""
    of_digits, of_patches = digits.rows, patches.rows[0]
    parts = (
        f"Four networks, 1000 handwritten digits: {len(of_digits.landmarks)} are random landmarks, the other "
        f"{len(of_digits.queries)} are matched between networks.\nMean over the six pairs of networks, in both "
        "directions. Only the ridge map is fitted to a pair of networks.",
        digit_table(digits),
        f"Four networks, three photographs, each separately: {len(of_patches.landmarks)} patches are landmarks (a "
        f"checkerboard), {len(of_patches.queries)} are matched.\nPosition alone already matches patches well. Two "
        "controls are therefore matched with the four networks too:\nrow and column as features, and an untrained "
        "network.",
        patch_table(patches),
        "Sigma of the landmarks at a mean affinity of 0.05; for patches also the top-1 with all layers of other "
        "networks,\ndecorrelated.",
        digit_sigmas(digits),
        patch_sigmas(patches),
        match_heading(matches),
        match_table(matches),
    )
    return "\n\n".join(parts)


def digit_table(report: DigitReport) -> str:
    """Every method's scores on the digits, and chance."""
    n = len(report.rows.queries)
    rows = [(method, *_cells(score)) for method, score in report.scores.items()]
    return format_table(
        ("digits, without positions", "top-1", "top-5", "MRR"), [*rows, ("chance", *_cells(_chance(n)))]
    )


def patch_table(report: PatchReport) -> str:
    """Every method's scores on the patches, the controls' top-1, and chance."""
    controls = list(report.controls)
    header = ("patches of one photograph", "top-1", "top-5", "MRR", *(f"{_short(name)}: top-1" for name in controls))
    rows = [
        (method, *_cells(score), *(f"{report.controls[control][method][0]:.3f}" for control in controls))
        for method, score in report.scores.items()
    ]
    chance = _chance(len(report.rows[0].queries))
    return format_table(header, [*rows, ("chance", *_cells(chance), *(f"{chance[0]:.3f}" for _ in controls))])


def match_heading(report: MatchReport) -> str:
    """What the numbers of `match_table` are."""
    threshold = next(iter(report.matchings.values()))[SEARCH].min_confidence
    return (
        "The same digits, in a random order in each network: which are the same is found from a few random landmarks.\n"
        f"Top-1 of the other digits; precision and recall of the matches with a confidence of {threshold:g} or more.\n"
        f"Rounds are limited to {MATCH_ROUNDS} to save time; without a limit top-1 is 0.03 higher from 30 landmarks."
    )


def match_table(report: MatchReport) -> str:
    """Top-1 of `match` for each number of landmarks, and how far its confidence can be trusted."""
    columns = list(next(iter(report.matchings.values())))
    rows = []
    for number, scores in report.scores.items():
        sure = scores[SEARCH].precision, scores[SEARCH].recall
        rows.append((str(number), *(f"{value:.3f}" for value in (*(scores[name].top1 for name in columns), *sure))))
    return format_table(("landmarks", *columns, "precision", "recall"), rows)


def digit_sigmas(report: DigitReport) -> str:
    """Width and sigma of every network's features of the digits."""
    rows = [
        (name, str(report.data.features[name].shape[1]), f"{sigma:.4g}") for name, sigma in report.rows.sigma.items()
    ]
    return format_table(("digits", "width", "sigma"), rows)


def patch_sigmas(report: PatchReport) -> str:
    """Width of every layer, its sigma on each image, and its mean top-1 with the layers of other networks."""
    images = report.data.picture_names
    rows = []
    for name, score in report.layers.items():
        width = report.data.features[name].shape[1] if name in report.data.features else 2
        rows.append((name, str(width), *(f"{rows.sigma[name]:.4g}" for rows in report.rows), f"{score[0]:.3f}"))
    return format_table(("patches", "width", *(f"sigma, {name}" for name in images), "top-1"), rows)


def _cells(score: Score) -> tuple[str, str, str]:
    return f"{score[0]:.3f}", f"{score[1]:.3f}", f"{score[2]:.3f}"


def _chance(n: int) -> Score:
    return 1 / n, 5 / n, sum(1 / k for k in range(1, n + 1)) / n


def _short(name: str) -> str:
    return network_of(name) if name != POSITION else name
