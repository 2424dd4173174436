"""Sums over pairs of blocks, for density, sigma and grids.

Two blocks are on the device, and the next one is read while their pairs are visited. The sums are saved after every
pair of blocks, so a job that was killed resumes from there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.ring import half_ring_of_blocks
from jaxalign.files.checkpoint import Checkpoint, State
from jaxalign.files.sources import Block, Source, load_block, to_device

Progress = bool | Callable[[Any, int, int], None]
Reporting = Callable[[int], AbstractContextManager[Callable[[int], Any]]]  # `reporting`, as a function of the total


class BlockSums(NamedTuple):
    """Sums over the pairs of two blocks x and y, or of a block with itself."""

    totals: Any  # (k,), over all pairs
    rows: Any = 0  # (rows of x, r), over the pairs of each row of x
    columns: Any = 0  # (rows of y, r), over the pairs of each row of y


def zero_sums(num_totals: int, num_rows: int = 0, width: int = 0) -> State:
    """The state of a visit before its first pair of blocks: float64 `totals` and `rows` as in `BlockSums`.

    `done` counts pairs of blocks; `lost` compensates the rounding of the totals.
    """
    totals = np.zeros(num_totals)
    return {"done": np.asarray(0), "totals": totals, "lost": totals, "rows": np.zeros((num_rows, width))}


def add_sums(state: State, sums: BlockSums, rows: slice, mirrored: slice | None) -> State:
    """Add the sums over a pair of blocks, and over its mirror image, to the state; updates `rows` in place."""
    new = np.asarray(sums.totals, np.float64) * (1 if mirrored is None else 2)
    old, total = state["totals"], state["totals"] + new
    # Compensated sums (Neumaier 1974).
    lost = np.where(np.abs(old) >= np.abs(new), (old - total) + new, (new - total) + old)
    state["rows"][rows] += np.asarray(sums.rows, np.float64)
    if mirrored is not None:
        state["rows"][mirrored] += np.asarray(sums.columns, np.float64)
    return {**state, "done": np.asarray(state["done"] + 1), "totals": total, "lost": state["lost"] + lost}


def visit(
    sum_pairs: Callable[[Block, Block | None], BlockSums],
    x: Sequence[Source],
    y: Sequence[Source] | None,
    state: State,
    checkpoint: Checkpoint,
    report: Reporting,
    add: Callable[[State, BlockSums, slice, slice | None], State] = add_sums,
) -> State:
    """Add the sums over the pairs of blocks that are not in `state` yet.

    Args:
        sum_pairs: sums over the pairs of a block of x with a block of y, or with itself (None).
        x: representations of the same samples.
        y: the other side of the pairs; None: x, where each pair of blocks also counts for its mirror image.
        state: `zero_sums`, or the state of an interrupted job; other entries are kept and saved.
        checkpoint: where the state is saved.
        report: `reporting`, as a function of the number of pairs of blocks.
        add: (state, sums, rows of x, rows of y if the pair stands for its mirror image) -> the state with them, and one
            more pair done.
    """
    columns, blocks = x if y is None else y, range(len(x[0].sizes))
    rectangle = ((i, j, False) for i in blocks for j in range(len(columns[0].sizes)))
    plan = half_ring_of_blocks(len(blocks)) if y is None else rectangle
    plan, done = list(plan), int(state["done"])
    if not 0 <= done <= len(plan):
        raise checkpoint.damaged()
    column_blocks = read_ahead(columns, [j for _, j, _ in plan[done:]])
    row: tuple[int, Block] | None = None
    with report(len(plan)) as show, closing(column_blocks):
        show(done)
        for (i, j, is_mirrored), column in zip(plan[done:], column_blocks, strict=True):
            on_diagonal = y is None and i == j
            if row is None or row[0] != i:
                row = i, column if on_diagonal else to_device(x, i, load_block(x, i))
            sums = sum_pairs(row[1], None if on_diagonal else column)
            state = add(state, sums, row[1].rows, column.rows if is_mirrored else None)
            checkpoint.save(state)
            show(int(state["done"]))
    return state


def read_ahead(sources: Sequence[Source], order: Sequence[int]) -> Generator[Block, None, None]:
    """Blocks in a given order; another thread reads the next one."""
    with ThreadPoolExecutor(1) as pool:
        reading = [pool.submit(load_block, sources, i) for i in order[:1]]
        for k, i in enumerate(order):
            loaded = reading.pop().result()
            reading = [pool.submit(load_block, sources, following) for following in order[k + 1 : k + 2]]
            yield to_device(sources, i, loaded)


def totals_of(state: State) -> np.ndarray:
    """The totals of a visit, (k,)."""
    return state["totals"] + state["lost"]


@contextmanager
def reporting(
    progress: Progress, stage: Any, total: int, *, label: str | None = None, unit: str = "block pair"
) -> Generator[Callable[[int], Any], None, None]:
    """Yield a function that reports the number of finished units of a stage."""
    if progress is False:
        yield lambda done: None
    elif callable(progress):
        yield lambda done: progress(stage, done, total)
    else:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError(
                'progress=True needs tqdm: pip install "jaxalign[cli]", or pass a function of (stage, done, total).'
            ) from None
        with tqdm(total=total, desc=label or str(stage), unit=unit) as bar:
            yield lambda done: bar.update(done - bar.n)
