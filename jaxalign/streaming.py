"""Features that do not fit in memory: the same sigma and density, from blocks of rows read one after another.

Blocks of rows come from a file, a memory map or anything that yields arrays by number. Two blocks at a time are in
memory, and the next one is read while the pairs of these are visited. What has been summed up is written to a
checkpoint after every pair of blocks, so that a job that was killed goes on where it was.
"""

from __future__ import annotations

import json
import operator
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxalign import _checks
from jaxalign._files import check_regular, read_json, replace_file
from jaxalign._linalg import power_of_two
from jaxalign._plan import TileSize, check_tile_size, choose_tiles, usual_block_rows
from jaxalign._rate import (
    MAX_PASSES,
    SUBSAMPLE,
    Search,
    advance,
    begin,
    finish,
    guess_from,
    series_moments,
    sums_over,
)
from jaxalign._saved import WAY_OUT, checkpoint_of_one_job, damaged
from jaxalign._version import __version__
from jaxalign.bandwidth import (
    CONVERGED,
    INFEASIBLE,
    NOT_CONVERGED,
    Diagonal,
    SigmaSolution,
    check_rtol,
    raise_if_failed,
    rate_of,
    sigma_of,
)
from jaxalign.distances import Frame
from jaxalign.pairs import Pairs, Tile, half_ring, kernel_terms

Rows = Any  # a path to a .npy file, an array or memory map (n, d), or a sequence of arrays (n_i, d)
Progress = bool | Callable[[Any, int, int], None]


def solve_sigma(
    x: Rows,
    y: Rows | None = None,
    *,
    density: ArrayLike = 0.05,
    diagonal: Diagonal = "include",
    mask: np.ndarray | None = None,
    mask_y: np.ndarray | None = None,
    rtol: float | None = None,
    block_rows: int | None = None,
    tile_size: TileSize = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = False,
) -> SigmaSolution:
    """`jaxalign.solve_sigma` for features that are read block by block: one sigma, the same to rounding.

    Args:
        x: a path to a .npy file with an (n, d) array, such an array or memory map, or a sequence of arrays (n_i, d):
            anything with len() and [i]; each is read once more for its shape. What it gives for a number must not
            change while the function runs.
        y: the same, or None to compare x with itself.
        density: the wanted mean c of the affinity, 0 < c < 1: one number.
        diagonal: whether the n ones on the diagonal count in it, "include" or "exclude". Only for y = None.
        mask: shape (n,), True = a real sample.
        mask_y: the same for y.
        rtol: relative error allowed in the density; None: 1e-6 in float32, 1e-13 in float64.
        block_rows: rows in a block, of which three are in memory; None: 256 MB, 65536 rows at most. A sequence has its
            own blocks.
        tile_size: of the tiles within a pair of blocks, see `jaxalign.solve_sigma`.
        checkpoint: a file to write progress to, and to go on from if it is there. Removed at the end. One that was
            written for other features or options is refused.
        progress: True shows a bar (needs tqdm); or a function of (pass, block pairs done, block pairs in a pass).

    Returns:
        `SigmaSolution` of scalars. Not differentiable.

    Raises:
        TypeError, ValueError: see `jaxalign.solve_sigma`; also nan or inf (the row is named), a checkpoint that is
            truncated or belongs to something else, density out of reach.
        OSError: a file cannot be read or written.

    Example:
        >>> import numpy as np, jaxalign
        >>> x = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
        >>> streamed = jaxalign.streaming.solve_sigma(x, block_rows=100)
        >>> float(abs(streamed.sigma / jaxalign.solve_sigma(x).sigma - 1)) < 1e-5
        True
    """
    wanted = _number("density", density)
    _checks.density_value(wanted)
    job = open_rows(x, y, mask, mask_y, diagonal, block_rows, tile_size)
    with checkpoint_of_one_job(checkpoint):
        return solve_rows(job, wanted, rtol, checkpoint, progress)


def solve_rows(
    job: Job,
    density: float,
    rtol: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = False,
    *,
    rooted: bool = False,
) -> SigmaSolution:
    """`solve_sigma` of rows that are open; `rooted`: of the Laplacian kernel."""
    floor = job.own / job.total
    if density <= floor:
        raise ValueError(
            f"density = {density} cannot be reached with n = {job.own:.0f} samples: the ones on the diagonal "
            f'alone give {floor:.4g}. Ask for a density above that, or leave the diagonal out with diagonal="exclude".'
        )
    rtol = check_rtol(rtol, job.dtype)
    wanted = density * job.total
    task = {"task": "solve_sigma", "density": density, "rtol": rtol, "rooted": rooted}
    saved = _Checkpoint.open(checkpoint, {**job.identity, **task})
    if saved.search is None:
        start = _first_rate(job, (wanted - job.own) / (job.total - job.own), rooted)
        search = begin(start, jnp.zeros((), bool))
    else:
        search = _search_from(saved.search, job.dtype)
    while not bool(search.done) and int(search.passes) < MAX_PASSES:
        saved = replace(saved, search=_search_to(search))
        sums = _visit(job, series_moments, search.rate, saved, int(search.passes) + 1, progress, rooted)
        search = _advance(search, jnp.asarray(sums / wanted, job.dtype), rtol)
        saved = saved.next_pass(_search_to(search))
    root = finish(search)
    status = CONVERGED if bool(root.converged) else INFEASIBLE if bool(root.infeasible) else NOT_CONVERGED
    saved.remove()
    raise_if_failed(jnp.asarray(status))
    sigma = sigma_of(root.rate, job.scale[0, 0], rooted=rooted)
    return SigmaSolution(sigma, root.density * jnp.asarray(density, job.dtype), root.passes, jnp.asarray(status))


def mean_density(
    x: Rows,
    y: Rows | None = None,
    *,
    sigma: ArrayLike,
    diagonal: Diagonal = "include",
    mask: np.ndarray | None = None,
    mask_y: np.ndarray | None = None,
    block_rows: int | None = None,
    tile_size: TileSize = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = False,
) -> Array:
    """`jaxalign.mean_density` for features that are read block by block, at one sigma: a scalar.

    Arguments and errors are those of `solve_sigma` here; sigma is in units of the features, > 0.

    Example:
        >>> import numpy as np, jaxalign
        >>> x = np.array([[0.0], [1.0], [2.0]], np.float32)
        >>> float(jaxalign.streaming.mean_density(x, sigma=1.0, block_rows=2))  # (3 + 4 exp(-1/2) + 2 exp(-2)) / 9
        0.63297...
    """
    sigma = _number("sigma", sigma)
    _checks.positive("sigma", sigma)
    job = open_rows(x, y, mask, mask_y, diagonal, block_rows, tile_size)
    with checkpoint_of_one_job(checkpoint):
        saved = _Checkpoint.open(checkpoint, {**job.identity, "task": "mean_density", "sigma": sigma})
        frame = job.frame_of((jnp.asarray(job.sample[0]), None), (None, None))
        rate = rate_of(jnp.full((1, 1), sigma, job.dtype), frame)[0, 0]
        sums = _visit(job, _kernel_alone, rate, saved, 1, progress)
        saved.remove()
    return jnp.asarray(sums[0] / job.total, job.dtype)


def _number(name: str, value: Any) -> float:
    """One number as a float of Python, as a checkpoint holds it."""
    _checks.parameter(name, value, np.float32, (), "one number")
    return float(value)


_advance = jax.jit(advance, static_argnames="rtol")


def _kernel_alone(tile: Tile) -> tuple[Array]:
    return (kernel_terms(tile),)


# --- rows in blocks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Rows that are read block by block."""

    name: str
    read: Callable[[int], np.ndarray]
    sizes: tuple[int, ...]
    mask: np.ndarray | None
    width: int
    stored: Any  # dtype of the blocks
    dtype: Any  # and of the computation

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(self.sizes)

    def start(self, i: int) -> int:
        """The number of the first row of a block."""
        return sum(self.sizes[:i])

    def block(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows and mask of a block, in the dtype of the computation."""
        rows = np.asarray(self.read(i))
        if rows.dtype != self.stored:
            raise TypeError(f"block {i} of {self.name} has dtype {rows.dtype}, the first one {self.stored}.")
        if rows.shape != (self.sizes[i], self.width):
            raise ValueError(
                f"block {i} of {self.name} has shape {rows.shape}, it had {(self.sizes[i], self.width)} before."
            )
        start = self.start(i)
        mask = None if self.mask is None else self.mask[start : start + self.sizes[i]]
        rows = rows.astype(self.dtype)
        return (rows if mask is None else np.where(mask[:, None], rows, 0)), mask


def check_block_rows(block_rows: Any) -> None:
    """Raise unless it is a number of rows, or None."""
    if block_rows is not None:
        _checks.whole("block_rows", block_rows, of=" of rows")


_HEAD = 64  # rows by which a message judges how to convert all


def _blocks(name: str, rows: Rows, mask: np.ndarray | None, block_rows: int | None, least: int) -> Blocks:
    code = name  # of what has a dtype, for a message that says how to convert it
    if isinstance(rows, (str, os.PathLike)):
        check_regular(Path(rows))
        code = f"np.load({str(rows)!r})"
        try:
            rows = np.load(rows, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{name}: {rows} is not a complete .npy file of numbers ({error}).") from None
    check_block_rows(block_rows)
    if isinstance(rows, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost: give {name}.data, and mask=.")
    if isinstance(rows, (np.ndarray, jax.Array)):
        if rows.ndim != 2 or 0 in rows.shape:
            raise ValueError(f"{name} must have shape (n, d), both at least 1; got {rows.shape}.")
        head = np.asarray(rows[:_HEAD])
        size = usual_block_rows(rows.shape[1] * max(4, head.dtype.itemsize)) if block_rows is None else int(block_rows)
        n, array = rows.shape[0], rows
        sizes = tuple(min(size, n - start) for start in range(0, n, size))

        def read(i: int) -> np.ndarray:
            return np.asarray(array[i * size : i * size + sizes[i]])

    elif hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and not isinstance(rows, Mapping) and len(rows) > 0:
        if block_rows is not None:
            raise ValueError(f"block_rows={block_rows} with a sequence of blocks: {name} has blocks of its own.")
        sequence, code = rows, f"{name}[0]"
        shapes = [np.shape(sequence[i]) for i in range(len(sequence))]
        if any(len(shape) != 2 or 0 in shape or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"the blocks of {name} must have shapes (n_i, d) with the same d; got {shapes[:5]} ...")
        head = np.asarray(sequence[0][:_HEAD])
        sizes = tuple(shape[0] for shape in shapes)

        def read(i: int) -> np.ndarray:
            return np.asarray(sequence[i])

    else:
        raise TypeError(
            f"{name} must be a path to a .npy file, an array or memory map (n, d), or a sequence of arrays (n_i, d); "
            f"got {type(rows).__name__}."
        )
    native = head.astype(head.dtype.newbyteorder("="))
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != (sum(sizes),):
            raise ValueError(
                f"the mask of {name} must be boolean of shape {(sum(sizes),)}; got {mask.dtype} {mask.shape}."
            )
        if mask.sum() < least:
            raise ValueError(f"the mask of {name} leaves {int(mask.sum())} real sample(s), at least {least} needed.")
    return Blocks(name, read, sizes, mask, head.shape[1], head.dtype, _checks.features(code, native).dtype)


# --- the job ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """All that one reading of the rows tells."""

    x: Blocks
    y: Blocks | None
    centre: Array  # (1, d)
    scale: Array  # (1, 1)
    inverse: Array
    sample: tuple[np.ndarray, np.ndarray]  # some rows of x, and of y
    total: float  # weight of all pairs that count
    own: float  # of those of a sample with itself, where they count
    skip_self: bool
    tile_size: int | None
    identity: dict[str, Any]

    @property
    def dtype(self) -> Any:
        """Of the computation."""
        return self.x.dtype

    def frame_of(self, sides: tuple[Any, Any], masks: tuple[Any, Any]) -> Frame:
        """The frame of some rows against some others, None: against themselves."""
        return Frame(*sides, *masks, self.centre, self.scale, self.inverse, jnp.ones((), bool))


class _Summary(NamedTuple):
    number: int
    total: np.ndarray
    least: np.ndarray
    most: np.ndarray
    check: int
    sample: np.ndarray


def _summarise(blocks: Blocks) -> _Summary:
    """One reading: sums, extremes and a checksum of the rows, some rows for a first estimate; nan and inf are named."""
    count, check = 0, 0
    total = np.zeros(blocks.width)
    least, most = np.full(blocks.width, np.inf), np.full(blocks.width, -np.inf)
    step = max(1, (blocks.rows if blocks.mask is None else int(blocks.mask.sum())) // SUBSAMPLE)
    sample = []
    for i in range(len(blocks.sizes)):
        rows, mask = blocks.block(i)
        check = zlib.crc32(np.ascontiguousarray(rows).tobytes(), check)
        if mask is not None:
            check = zlib.crc32(np.packbits(mask).tobytes(), check)
        here = np.arange(len(rows)) + blocks.start(i)
        kept = rows
        if mask is not None:
            here, kept = here[mask], rows[mask]
        sample.append(kept[(count + np.arange(len(kept))) % step == 0])
        bad = ~np.isfinite(kept).all(1)
        if bad.any():
            raise ValueError(
                f"{blocks.name} has nan or inf in row {here[bad][0]} (block {i}). "
                "Remove these samples, or exclude them with mask=."
            )
        if len(kept):
            count += len(kept)
            total += kept.sum(0, dtype=np.float64)
            least, most = np.minimum(least, kept.min(0)), np.maximum(most, kept.max(0))
    return _Summary(count, total, least, most, check, np.concatenate(sample))


def open_rows(
    x: Rows,
    y: Rows | None,
    mask: np.ndarray | None,
    mask_y: np.ndarray | None,
    diagonal: Any,
    block_rows: int | None,
    tile_size: Any,
    name: str = "x",
) -> Job:
    """Read all rows once, for what every later visit needs to know; refuses nan and inf."""
    _checks.choice("diagonal", diagonal, ("include", "exclude"))
    if y is None and mask_y is not None:
        raise ValueError("mask_y is given without y; mask serves both sides when y is None.")
    if y is not None and diagonal != "include":
        raise ValueError(f"diagonal={diagonal!r} has no meaning with y: all n m pairs count.")
    ours = _blocks(name, x, mask, block_rows, 2 if y is None else 1)
    theirs = None if y is None else _blocks("y", y, mask_y, block_rows, 1)
    if theirs is not None and (theirs.width != ours.width or theirs.dtype != ours.dtype):
        raise ValueError(
            f"x and y must have the same number of features and dtype: {ours.width} of {ours.dtype}, "
            f"{theirs.width} of {theirs.dtype}."
        )
    if theirs is None and ours.rows < 2:
        raise ValueError(f"{name} has n = {ours.rows} sample(s); at least 2 are needed.")
    sides = [ours] if theirs is None else [ours, theirs]
    facts = [_summarise(side) for side in sides]
    count = sum(fact.number for fact in facts)
    centre = sum(fact.total for fact in facts) / count
    top = max(float(np.max(np.maximum(fact.most - centre, centre - fact.least))) for fact in facts)
    scale, inverse = power_of_two(jnp.full((1, 1), top, ours.dtype))
    n, m = facts[0].number, facts[-1].number
    skip_self = diagonal == "exclude"
    largest = max(max(side.sizes) for side in sides)
    check_tile_size(tile_size)
    _, tile = choose_tiles(tile_size, largest, largest, 1, ours.dtype.itemsize, may_store=False, by_memory=False)
    identity = {
        "version": __version__,
        "rows": [side.rows for side in sides],
        "width": ours.width,
        "dtype": str(ours.dtype),
        "checksums": [fact.check for fact in facts],
        "blocks": [list(side.sizes) for side in sides],
        "diagonal": diagonal,
        "tile_size": tile,
    }
    return Job(
        x=ours,
        y=theirs,
        centre=jnp.asarray(centre, ours.dtype)[None],
        scale=scale,
        inverse=inverse,
        sample=(facts[0].sample, facts[-1].sample),
        total=float(n) * (n - 1) if skip_self else float(n) * m,
        own=float(n) if theirs is None and not skip_self else 0.0,
        skip_self=skip_self,
        tile_size=tile,
        identity=identity,
    )


def _first_rate(job: Job, off_density: float, rooted: bool) -> Array:
    x, y = (jnp.asarray(side) for side in job.sample)
    frame = job.frame_of((x, None if job.y is None else y), (None, None))
    return _guess(frame, jnp.asarray(off_density, x.dtype), rooted)


@partial(jax.jit, static_argnames="rooted")
def _guess(frame: Frame, off_density: Array, rooted: bool) -> Array:
    pairs = Pairs((frame,), skip_self=frame.raw_y is None, rooted=rooted).stored()
    return guess_from(pairs, off_density, jnp.zeros((), bool), by_row=False)


@partial(jax.jit, static_argnames=("terms", "skip_self", "tile_size", "rooted"))
def _block_sums(terms: Any, frame: Frame, rate: Array, skip_self: bool, tile_size: int | None, rooted: bool) -> Array:
    pairs = Pairs((frame,), None, skip_self, tile_size, fixed=True, rooted=rooted)
    return sums_over(terms, pairs, rate, by_row=False)


def _visit(
    job: Job,
    terms: Any,
    rate: Array,
    saved: _Checkpoint,
    number: int,
    progress: Progress,
    rooted: bool = False,
) -> np.ndarray:
    """Sums over all pairs of rows, block pair by block pair, in float64."""
    itself = job.y is None
    others = job.x if job.y is None else job.y
    if itself:
        plan = [(i, j, mirror) for i, j, mirror in half_ring(len(job.x.sizes))]
    else:
        plan = [(i, j, False) for i in range(len(job.x.sizes)) for j in range(len(others.sizes))]
    done, sums = saved.done, saved.sums
    if done or sums:
        frame = job.frame_of((jnp.asarray(job.sample[0]), None), (None, None))
        part = partial(_block_sums, terms, skip_self=False, tile_size=job.tile_size, rooted=rooted)
        if not 0 < done <= len(plan) or (len(sums),) != jax.eval_shape(part, frame=frame, rate=rate).shape:
            raise damaged(saved.path)
    report = reporter(progress, number, len(plan), f"pass {number}")
    report(done)
    held: tuple[int, Any] | None = None
    with ThreadPoolExecutor(1) as pool:
        coming = read_ahead(pool, others, [j for _, j, _ in plan[done:]])
        for i, j, mirror in plan[done:]:
            y, mask_y = next(coming)
            if held is None or held[0] != i:
                held = (i, (y, mask_y) if itself and i == j else on_device(job.x.block(i)))
            x, mask = held[1]
            alone = itself and i == j
            frame = job.frame_of((x, None if alone else y), (mask, None if alone else mask_y))
            part = _block_sums(terms, frame, rate, job.skip_self and alone, job.tile_size, rooted)
            done, sums = done + 1, _added(sums, np.asarray(part, np.float64) * (2 if mirror else 1))
            replace(saved, done=done, sums=sums).write()
            report(done)
    report(-1)
    return np.array([value + rest for value, rest in sums])


def _added(sums: tuple[tuple[float, float], ...], part: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Compensated sums (Neumaier 1974): each with what rounding took from it so far."""
    added = []
    for (value, rest), new in zip(sums or ((0.0, 0.0),) * len(part), part.tolist(), strict=True):
        total = value + new
        rest += (value - total) + new if abs(value) >= abs(new) else (new - total) + value
        added.append((total, rest))
    return tuple(added)


def read_ahead(pool: ThreadPoolExecutor, blocks: Blocks, order: list[int]) -> Iterator[Any]:
    """Blocks in an order, on the device, the next one being read meanwhile."""
    coming: Future[Any] | None = None
    for k in range(len(order)):
        now = coming if coming is not None else pool.submit(blocks.block, order[k])
        coming = pool.submit(blocks.block, order[k + 1]) if k + 1 < len(order) else None
        yield on_device(now.result())  # not in the other thread: jax.enable_x64 and the like hold for one thread


def on_device(block: tuple[np.ndarray, np.ndarray | None]) -> tuple[Array, Array | None]:
    """A block as arrays of jax."""
    rows, mask = block
    return jnp.asarray(rows), None if mask is None else jnp.asarray(mask)


def reporter(
    progress: Progress, stage: Any, total: int, label: str | None = None, unit: str = "block pair"
) -> Callable[[int], None]:
    """A function of how many are done; -1 at the end of a stage."""
    if progress is False:
        return lambda done: None
    if callable(progress):
        tell = progress
        return lambda done: None if done < 0 else tell(stage, done, total)
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            'progress=True needs tqdm: pip install "jaxalign[cli]", or give a function of (stage, done, total).'
        ) from None
    bar = tqdm(total=total, desc=label or str(stage), unit=unit)

    def show(done: int) -> None:
        if done < 0:
            bar.close()
        else:
            bar.update(done - bar.n)

    return show


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Checkpoint:
    """Where a job stands: the search before the pass at hand, and the sums of the block pairs done in it."""

    path: Path | None
    identity: dict[str, Any]
    search: dict[str, Any] | None = None
    done: int = 0  # block pairs
    sums: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def open(path: str | os.PathLike[str] | None, identity: dict[str, Any]) -> _Checkpoint:
        """What a checkpoint holds, if there is one; refused where it does not belong to this job."""
        if path is None:
            return _Checkpoint(None, identity)
        path = Path(path)
        if not path.exists():
            return _Checkpoint(path, identity)
        check_regular(path)
        try:
            content = read_json(path)
            state = content["state"]
            whole = content["check"] == zlib.crc32(json.dumps(state, sort_keys=True).encode())
            found = dict(state["identity"])
        except (ValueError, KeyError, TypeError):
            raise damaged(path) from None
        if not whole:
            raise ValueError(f"checkpoint {path} is damaged: its checksum is wrong. {WAY_OUT}")
        identity = json.loads(json.dumps(identity))
        different = [key for key in {**identity, **found} if identity.get(key) != found.get(key)]
        if different:
            told = ", ".join(f"{key} (there {found.get(key)!r}, here {identity.get(key)!r})" for key in different)
            raise ValueError(f"checkpoint {path} belongs to another job; what differs: {told}. {WAY_OUT}")
        try:
            search, sums = state["search"], tuple((float(value), float(rest)) for value, rest in state["sums"])
            if search is not None:
                search = {name: float(search[name]) for name in Search._fields}
            return _Checkpoint(path, identity, search, operator.index(state["done"]), sums)
        except (ValueError, KeyError, TypeError):
            raise damaged(path) from None

    def next_pass(self, search: dict[str, Any]) -> _Checkpoint:
        """After a pass."""
        after = _Checkpoint(self.path, self.identity, search)
        after.write()
        return after

    def write(self) -> None:
        """Replace the file in one step, so that a kill leaves the old one or the new one."""
        if self.path is None:
            return
        state = {"identity": self.identity, "search": self.search, "done": self.done, "sums": self.sums}
        body = json.dumps(state, sort_keys=True)
        content = json.dumps({"check": zlib.crc32(body.encode()), "state": state}, sort_keys=True)
        replace_file(self.path, content.encode())

    def remove(self) -> None:
        """The job is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _search_to(search: Search) -> dict[str, Any]:
    return {name: float(value) for name, value in search._asdict().items()}  # a double holds a float and a bool exactly


def _search_from(saved: dict[str, Any], dtype: Any) -> Search:
    kinds = {"done": bool, "converged": bool, "passes": jnp.int32}
    return Search(**{name: jnp.asarray(value, kinds.get(name, dtype)) for name, value in saved.items()})
