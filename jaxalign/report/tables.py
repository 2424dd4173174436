"""Plain-text tables of the demo's reports."""

from __future__ import annotations

from collections.abc import Sequence

from jaxalign.report.demo import POSITION, DigitReport, PatchReport, Score, network_of


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first to the left and the others to the right."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def demo_text(digits: DigitReport, patches: PatchReport) -> str:
    """All tables of the demo, and what they are of."""
    held_out, others = digits.rows, patches.rows[0]
    parts = (
        f"Four networks, 1000 handwritten digits: {len(held_out.landmarks)} random landmarks, {len(held_out.queries)} "
        "others looked up, mean over the\nsix pairs of networks in both directions. Only the ridge map is fitted "
        "between two networks.",
        digit_table(digits),
        f"Four networks, three photographs, each by itself: {len(others.landmarks)} of its patches are landmarks (a "
        f"checkerboard), {len(others.queries)}\nlooked up. Position alone matches patches well, so the scores stand "
        "beside two controls, each looked up against the\nfour networks: row and column instead of a network, and a "
        "network that was never trained.",
        patch_table(patches),
        "Every set, with the sigma of its landmarks at a mean affinity of 0.05; for patches also the top-1 against all "
        "layers\nof other networks, decorrelated.",
        digit_sets(digits),
        patch_sets(patches),
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
    """Every method's scores on the patches, beside the controls' top-1, and chance."""
    controls = list(report.controls)
    header = ("patches of one photograph", "top-1", "top-5", "MRR", *(f"{_short(name)}: top-1" for name in controls))
    rows = [
        (method, *_cells(score), *(f"{report.controls[control][method][0]:.3f}" for control in controls))
        for method, score in report.scores.items()
    ]
    chance = _chance(len(report.rows[0].queries))
    return format_table(header, [*rows, ("chance", *_cells(chance), *(f"{chance[0]:.3f}" for _ in controls))])


def digit_sets(report: DigitReport) -> str:
    """Width and sigma of every network's features of the digits."""
    rows = [
        (name, str(report.data.features[name].shape[1]), f"{sigma:.4g}") for name, sigma in report.rows.sigma.items()
    ]
    return format_table(("digits", "width", "sigma"), rows)


def patch_sets(report: PatchReport) -> str:
    """Width of every layer, its sigma on each picture, and how well it finds the layers of other networks."""
    pictures = report.data.picture_names
    rows = []
    for name, found in report.layers.items():
        width = report.data.features[name].shape[1] if name in report.data.features else 2
        rows.append((name, str(width), *(f"{rows.sigma[name]:.4g}" for rows in report.rows), f"{found[0]:.3f}"))
    return format_table(("patches", "width", *(f"sigma, {name}" for name in pictures), "top-1"), rows)


def _cells(score: Score) -> tuple[str, str, str]:
    return f"{score[0]:.3f}", f"{score[1]:.3f}", f"{score[2]:.3f}"


def _chance(n: int) -> Score:
    return 1 / n, 5 / n, sum(1 / k for k in range(1, n + 1)) / n


def _short(name: str) -> str:
    return network_of(name) if name != POSITION else name
