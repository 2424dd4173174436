"""How pairs are visited: stored or in tiles of which size, on which devices. Decided before anything is traced."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxalign import _checks

TileSize = int | Literal["auto"] | None

# Up to this many pairs, 16 MB of float32 (64 on an accelerator), are stored: a second pass needs no second product.
_STORED_PAIRS = {"cpu": 2**22, "other": 2**24}
# Pairs in a tile: on a CPU it stays in cache, on an accelerator it keeps all cores busy. (docs/pages/performance.md)
_TILE_PAIRS = {"cpu": 2**20, "other": 2**24}
# Of several sets each has a tile; smaller ones than this make products slow, as long as all of them are not too many.
_TILE_PAIRS_OF_A_SET = {"cpu": 2**18, "other": 2**22}
_TILE_PAIRS_OF_ALL = {"cpu": 2**24, "other": 2**26}
# Bytes that are not asked for before they are taken.
_SURELY_THERE = 2**28
# What a stored array takes while it is made, in its own size (1.6 times were measured for the affinity).
_ON_THE_WAY = 1.5
# A tile needs about this many arrays of its size, and may take this share of the free memory.
_TILE_ARRAYS = 12
_TILE_SHARE = 0.25
_LEAST_TILE = 64

# Which axis of a result holds the rows.
NO_ROWS = 0
ROWS_LAST = -1
ROWS_SECOND_LAST = -2

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How all pairs are visited.

    Attributes:
        stored: the distances are stored, all of them.
        tile_size: rows and columns of a tile at most; None: one tile.
        axis_name: the named axis over whose devices rows are spread.
        mesh: the mesh with that axis; None where the caller is inside `jax.shard_map` or the like already.
        fixed: nothing will be differentiated, which saves memory and time.
    """

    stored: bool = True
    tile_size: int | None = None
    axis_name: str | None = None
    mesh: Mesh | AbstractMesh | None = None
    fixed: bool = False

    @property
    def shared(self) -> bool:
        """Whether the caller holds the rows of one device, and others hold more of the set."""
        return is_shared(self.mesh, self.axis_name)

    def rows_of_all(self, n: int) -> int:
        """Rows on all devices, where the caller holds n of them on each."""
        return n * lax.axis_size(self.axis_name) if self.shared else n


def is_shared(mesh: Any, axis_name: Any) -> bool:
    """Whether what is handed in with these is one device's rows of a set: inside `jax.shard_map` and the like."""
    return mesh is None and axis_name is not None


STORED = Plan()


def make_plan(x: Array, y: Array | None, tile_size: Any, mesh: Any, axis_name: Any, sets: int = 1) -> Plan:
    """Check tile_size, mesh and axis_name, and decide what was left open; `sets` are visited together."""
    check_tile_size(tile_size)
    mesh, axis_name, devices = _where(x, y, mesh, axis_name)
    n, m = x.shape[-2], (x if y is None else y).shape[-2]
    for name, rows in (("x", n), ("y", m)):
        if mesh is not None and rows < devices:
            raise ValueError(
                f"{name} has {rows} rows, fewer than the {devices} devices along axis {axis_name!r} of the mesh: "
                "use a smaller mesh, or none."
            )
    if mesh is not None:
        n, m = -(-n // devices), -(-m // devices)
    elif devices * n < 2 and y is None:
        raise ValueError(f"x has n = {n} sample(s) on the only device of axis {axis_name!r}; at least 2 are needed.")
    sets *= math.prod(x.shape[:-2])
    stored, tile_size = choose_tiles(tile_size, n, m, sets, x.dtype.itemsize, may_store=axis_name is None)
    return Plan(stored, tile_size, axis_name, mesh)


def check_tile_size(tile_size: Any) -> None:
    """Raise unless it is a number of rows, "auto" or None."""
    if tile_size is None or (isinstance(tile_size, str) and tile_size == "auto"):
        return
    _checks.whole("tile_size", tile_size, of=" of rows", otherwise=", 'auto', or None for all pairs at once")


def choose_tiles(
    tile_size: Any, n: int, m: int, sets: int, itemsize: int, *, may_store: bool, by_memory: bool = True
) -> tuple[bool, int | None]:
    """Whether n x m distances are stored, and the size of a tile (None: one tile), by the free memory if told so."""
    if tile_size is None:
        return may_store, None
    if tile_size != "auto":
        return False, int(tile_size)
    stored = may_store and n * m * sets <= _of_backend(_STORED_PAIRS)
    return stored, None if stored else _tile_size(max(n, m), sets, itemsize, by_memory)


def _where(x: Array, y: Array | None, mesh: Any, axis_name: Any) -> tuple[Mesh | AbstractMesh | None, str | None, int]:
    """The mesh, the axis and its size."""
    if axis_name is not None and not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be the name of one axis; got {_checks.shown(axis_name)}.")
    if mesh is None and axis_name is not None:
        if not _is_bound(axis_name):
            raise ValueError(
                f"axis_name={axis_name!r} is not bound here: call this inside jax.shard_map, jax.pmap or "
                "jax.vmap(axis_name=...), or give mesh= as well."
            )
        return None, axis_name, lax.axis_size(axis_name)
    if mesh is None:
        found = [side for side in (_spread(x), None if y is None else _spread(y)) if side is not None]
        if not found:
            return None, None, 1
        if any(side != found[0] for side in found):
            raise ValueError(
                f"the rows of x and y are spread over different devices: {found[0]} and {found[-1]}. "
                "Put both on one mesh with jaxalign.sharding.shard_rows, or give mesh=."
            )
        mesh, axis_name = found[0]
        return mesh, axis_name, mesh.shape[axis_name]
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, known before anything is traced; got {type(mesh).__name__}. "
            "jaxalign.sharding.data_mesh() makes one of all devices."
        )
    names = mesh.axis_names
    if isinstance(mesh, AbstractMesh) and jax.sharding.get_abstract_mesh().empty and _checks.is_concrete(x):
        raise ValueError(
            "mesh is an AbstractMesh, which has no devices: give a jax.sharding.Mesh (jaxalign.sharding.data_mesh()), "
            "or call within jax.set_mesh."
        )
    if axis_name is None:
        axis_name = default_axis(mesh)
    if axis_name not in names:
        raise ValueError(
            f"mesh has no axis {axis_name!r}, its axes are {names}. Name the one over which rows are spread with "
            "axis_name=."
        )
    if _is_bound(axis_name):
        raise ValueError(
            f"the axis {axis_name!r} is bound here, inside jax.shard_map or the like, where x is one device's rows: "
            f"give axis_name={axis_name!r} without mesh=."
        )
    return mesh, axis_name, mesh.shape[axis_name]


def default_axis(mesh: Mesh | AbstractMesh) -> str:
    """The axis over which rows are spread unless another is named: the only one, or "data"."""
    return mesh.axis_names[0] if len(mesh.axis_names) == 1 else "data"


def _is_bound(axis_name: str) -> bool:
    try:
        lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def _spread(a: Array) -> tuple[Mesh | AbstractMesh, str] | None:
    """The mesh and the axis over which the rows of an array are spread already, if that is known."""
    sharding = a.sharding if _checks.is_concrete(a) else jax.typeof(a).sharding
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) < a.ndim - 1:
        return None
    axis = sharding.spec[a.ndim - 2]
    if isinstance(axis, tuple) and len(axis) == 1:
        axis = axis[0]
    if not isinstance(axis, str) or sharding.mesh.shape[axis] == 1:
        return None
    return sharding.mesh, axis


def _of_backend(numbers: dict[str, int]) -> int:
    return numbers.get(jax.default_backend(), numbers["other"])


def _tile_size(rows: int, sets: int, itemsize: int, by_memory: bool) -> int:
    """The fastest size that the memory at hand allows."""
    device = jax.local_devices()[0]
    pairs = _of_backend(_TILE_PAIRS)
    each = max(pairs // sets, min(_of_backend(_TILE_PAIRS_OF_A_SET), _of_backend(_TILE_PAIRS_OF_ALL) // sets))
    size = max(_LEAST_TILE, math.isqrt(each))
    free = _free_memory(device) if by_memory and jax.process_count() == 1 else math.inf  # processes must choose alike
    while size > _LEAST_TILE and size * size * sets * itemsize * _TILE_ARRAYS > _TILE_SHARE * free:
        size //= 2
    return min(size, rows)


def usual_block_rows(row_bytes: int) -> int:
    """Rows of a block of which a few are to be in memory at once: 256 MB, 2^16 rows at most.

    Not by the free memory: a job that goes on from a checkpoint has to have the same blocks.
    """
    return max(_LEAST_TILE, min(2**16, 2**28 // row_bytes))


def check_room(what: str, shape: Sequence[int], x: Array, way_out: str) -> None:
    """Raise a MemoryError where an array that is to be stored, with what it is made of, is larger than the memory.

    Only of a CPU, where jax would wait for ever or the system would end the process; other devices raise by themselves.
    """
    needed = _ON_THE_WAY * math.prod(shape) * x.dtype.itemsize
    if needed < _SURELY_THERE or not _checks.is_concrete(x) or any(one.platform != "cpu" for one in x.devices()):
        return
    check_bytes(f"{what} of shape {tuple(shape)} would take {needed / 1e9:.3g} GB while made", needed, way_out)


def check_bytes(claim: str, needed: int | float, way_out: str) -> None:
    """Raise a MemoryError, which begins with the claim, where so many bytes are more than the memory left."""
    if needed < _SURELY_THERE:
        return
    room = _room()
    if needed > room:
        raise MemoryError(f"{claim}, and there are {max(room, 0) / 1e9:.3g} GB. {way_out}")


def _room() -> float:
    """Bytes that this process may still have: free, or in caches and swap, within its limits; infinite if unknown."""
    room = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        room = 1024.0 * sum(int(words[1]) for words in lines if words[0] in ("MemAvailable:", "SwapFree:"))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        room = min(room, float(limit) - float(used)) if limit.strip() != "max" else room
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = min(room, limit - pages * resource.getpagesize()) if limit != resource.RLIM_INFINITY else room
    return room


def _free_memory(device: Any) -> float:
    """Bytes that the device has left; infinite where it does not tell."""
    if device.platform == "cpu":
        return _room()
    stats = device.memory_stats() or {}
    return float(stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0))


def on_mesh(
    local: Callable[..., T],
    plan: Plan,
    sides: tuple[Array, Array | None, Array | None, Array | None],
    others: Any = (),
    other_rows: Any = (),
    result_rows: Any = (),
) -> T:
    """local(x, y, mask, mask_y, *others), on every device of the mesh with its own rows; just called without a mesh.

    Args:
        local: what is called; it finds the rows of the other devices over `plan.axis_name`.
        plan: with the mesh.
        sides: x, y, mask, mask_y.
        others: more arguments, a tuple of pytrees.
        other_rows: for each of them the axis that holds rows of x or y: NO_ROWS, ROWS_LAST or ROWS_SECOND_LAST.
        result_rows: the same for the result, a prefix of its pytree; rows of x.
    """
    x, y, mask, mask_y = sides
    if plan.mesh is None:
        if plan.axis_name is not None:
            return local(x, y, mask, mask_y, *others)
        return in_auto_mode(local, x, y, mask, mask_y, *others, result_rows=result_rows)
    assert plan.axis_name is not None
    n, devices, batch = x.shape[-2], plan.mesh.shape[plan.axis_name], x.ndim - 2
    x, mask = _padded(x, mask, devices)
    y, mask_y = (None, None) if y is None else _padded(y, mask_y, devices)

    def spec(rows: int) -> P:
        if rows == NO_ROWS:
            return P()
        return P(*[None] * batch, plan.axis_name, *[None] * (-1 - rows))

    def fill(a: Array, rows: int) -> Array:
        missing = 0 if rows == NO_ROWS else -a.shape[rows] % devices
        if not missing:
            return a
        width = [(0, 0)] * a.ndim
        width[rows] = (0, missing)
        return jnp.pad(a, width, mode="edge")  # not 0: a sigma of a row that does not count

    def cut(a: Array, rows: int) -> Array:
        # Rows that are left out cannot be sliced off an axis that is typed as spread.
        return a if rows == NO_ROWS or n % devices == 0 else lax.slice_in_dim(gathered(a), 0, n, axis=rows)

    side_specs = [None if a is None else spec(rows) for a, rows in ((x, -2), (y, -2), (mask, -1), (mask_y, -1))]
    others = tuple(jax.tree.map(lambda a, r=r: fill(a, r), other) for other, r in zip(others, other_rows, strict=True))

    def put(a: Array, where: P) -> Array:
        return jax.sharding.reshard(a, NamedSharding(mesh, where)) if _is_explicit(mesh) else a

    mesh = plan.mesh
    x, y, mask, mask_y = (
        None if a is None or where is None else put(a, where)
        for a, where in zip((x, y, mask, mask_y), side_specs, strict=True)
    )
    others = tuple(
        jax.tree.map(lambda a, r=r: put(a, spec(r)), other) for other, r in zip(others, other_rows, strict=True)
    )
    result = jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(*side_specs, *map(spec, other_rows)),
        out_specs=jax.tree.map(spec, result_rows),
        axis_names={plan.axis_name},
    )(x, y, mask, mask_y, *others)
    return jax.tree.map(lambda rows, part: jax.tree.map(lambda a: cut(a, rows), part), result_rows, result)


def in_auto_mode(fn: Callable[..., Any], x: Array, *args: Any, result_rows: Any) -> Any:
    """fn(x, *args), whose arrays may be typed with explicit shardings: inside, the compiler chooses.

    Results are spread as x is; `result_rows` says which of their axes has the rows, as in `on_mesh`.
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if not _is_explicit(mesh):
        return fn(x, *args)

    def spread(rows: int) -> NamedSharding:
        batch, of_rows = sharding.spec[:-2], sharding.spec[-2:-1]
        return NamedSharding(mesh, P(*batch) if rows == NO_ROWS else P(*batch, *of_rows, *[None] * (-1 - rows)))

    out = jax.tree.map(spread, result_rows)
    return jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=out)(x, *args)


def gathered(a: Array) -> Array:
    """The same array, on every device as a whole where it is typed as spread."""
    mesh = jax.typeof(a).sharding.mesh
    return jax.sharding.reshard(a, NamedSharding(mesh, P())) if _is_explicit(mesh) else a


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _padded(a: Array, mask: Array | None, devices: int) -> tuple[Array, Array | None]:
    """Rows that divide among the devices; those added are masked out."""
    missing = -a.shape[-2] % devices
    if not missing:
        return a, mask
    if mask is None:
        mask = jnp.ones(a.shape[:-1], bool)
    return (
        jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, missing), (0, 0)]),
        jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)]),
    )
