"""Plans: whether pairs are stored or visited in tiles, the tile size and the devices, all fixed before tracing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array

from jaxalign import _arrays, _checks
from jaxalign._memory import free_memory
from jaxalign._repr import shown

TileSize = int | Literal["auto"] | None

# Up to this many distances, 16 MB in float32, are stored: later passes need no matrix product. On accelerators 256 MB
# are stored where memory permits.
_STORED_PAIRS = 2**22
_MAX_STORED_PAIRS = {"cpu": _STORED_PAIRS, "other": 2**26}
# Pairs per tile: a tile fits into the cache of a CPU, and keeps all cores of an accelerator busy.
# (docs/pages/performance.md)
_TILE_PAIRS = {"cpu": 2**20, "other": 2**24}
# Each representation has its own tile. The minimum keeps matrix products fast; the maximum limits all tiles together.
_MIN_TILE_PAIRS = {"cpu": 2**18, "other": 2**22}
_MAX_TOTAL_TILE_PAIRS = {"cpu": 2**24, "other": 2**26}
# Processing a tile or stored distances takes about this many arrays of their size, and may use this share of the free
# memory.
_TILE_ARRAYS = 12
_TILE_SHARE = 0.25
_MIN_TILE_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """How the pairs of samples are visited: it affects memory, time and devices, but not results.

    Every function that visits pairs accepts `plan=`. A plan is hashable: pass it as a static argument or close over it.

    Attributes:
        tile_size: the largest number of rows and columns of a tile. Distances are computed tile by tile, and again for
            a gradient, so memory is a few tiles plus the features. None stores all n x m distances; "auto" stores them
            if there are few, and otherwise chooses a size from the device and its free memory.
        mesh: a `jax.sharding.Mesh`: rows of x and of y are sharded along one of its axes, whose size need not divide
            n. Rows that are already sharded need no mesh.
        axis_name: with `mesh`, the axis to use; None: the only axis, or "data". Without `mesh`, an axis that is bound
            inside `jax.shard_map`, `jax.pmap` or `jax.vmap(axis_name=...)`: x, y and masks are then the rows of this
            device, and all devices together hold the representation.

    Raises:
        TypeError: mesh is not a mesh, or axis_name not a string. ValueError: tile_size is not a positive integer,
            "auto" or None.

    Examples:
        >>> import jax, jaxalign
        >>> x = jax.random.normal(jax.random.key(0), (300, 8))
        >>> tiled = jaxalign.solve_sigma(x, plan=jaxalign.Plan(tile_size=128))
        >>> bool(abs(tiled.sigma / jaxalign.solve_sigma(x).sigma - 1) < 1e-5)
        True
    """

    tile_size: TileSize = "auto"
    mesh: Mesh | AbstractMesh | None = None
    axis_name: str | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        size, mesh, axis_name = self.tile_size, self.mesh, self.axis_name
        if not (size is None or (isinstance(size, str) and size == "auto")):
            rows = _checks.whole("tile_size", size, of=" of rows", otherwise=", 'auto', or None for all pairs at once")
            object.__setattr__(self, "tile_size", rows)
        if axis_name is not None and not isinstance(axis_name, str):
            raise TypeError(f"axis_name must be the name of one axis; got {shown(axis_name)}.")
        if mesh is not None and not isinstance(mesh, (Mesh, AbstractMesh)):
            raise TypeError(
                f"mesh must be a jax.sharding.Mesh, not traced; got {type(mesh).__name__}. "
                "jaxalign.sharding.data_mesh() makes a mesh of all devices."
            )

    @property
    def stored(self) -> bool:
        """Whether all distances are stored; for resolved plans."""
        return self.tile_size is None and self.axis_name is None

    @property
    def tile_rows(self) -> int | None:
        """The largest number of rows of a tile, None for a single tile; for resolved plans."""
        assert not isinstance(self.tile_size, str)
        return self.tile_size

    @property
    def rows_are_local(self) -> bool:
        """Whether features are the rows of one device: inside `jax.shard_map` or similar."""
        return self.mesh is None and self.axis_name is not None

    def total_rows(self, n: int) -> int:
        """The number of rows on all devices, if the caller passes n."""
        return n * lax.axis_size(self.axis_name) if self.rows_are_local else n


AUTO = Plan()
STORED = Plan(tile_size=None)


def check_plan(plan: Any, *, local_rows: bool = True) -> Plan:
    """The checked plan; None is the default. Without `local_rows`, reject plans for the rows of a single device."""
    if plan is None:
        return AUTO
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a jaxalign.Plan, such as jaxalign.Plan(tile_size=1024); got {shown(plan)}.")
    if plan.rows_are_local and not local_rows:
        raise ValueError(
            f"Plan(axis_name={plan.axis_name!r}) without a mesh is not supported by this function: call it outside "
            "jax.shard_map with plan=Plan(mesh=...)."
        )
    return plan


def check_single_device(plan: Plan, reason: str, advice: str = "") -> None:
    """Raise if the plan shards rows over devices."""
    if plan.mesh is not None or plan.axis_name is not None:
        raise ValueError(f"{reason}: leave mesh and axis_name out of the plan{', ' + advice if advice else ''}.")


def resolve_plan(plan: Plan, x: Array, y: Array | None, representations: int = 1) -> Plan:
    """The plan with mesh, axis and tile size chosen; `representations` is the number that are visited together."""
    mesh, axis_name, devices = _find_mesh(x, y, plan.mesh, plan.axis_name)
    n, m = x.shape[-2], (x if y is None else y).shape[-2]
    for name, rows in (("x", n), ("y", m)):
        if mesh is not None and rows < devices:
            raise ValueError(
                f"{name} has {rows} rows, fewer than the {devices} devices along axis {axis_name!r} of the mesh: "
                "use a smaller mesh, or no mesh."
            )
    if mesh is not None:
        n, m = -(-n // devices), -(-m // devices)
    elif devices * n < 2 and y is None:
        raise ValueError(f"x has n = {n} sample(s) on the only device of axis {axis_name!r}; at least 2 are needed.")
    representations *= math.prod(x.shape[:-2])
    tile_size = choose_tile_size(plan.tile_size, n, m, representations, x.dtype.itemsize, may_store=axis_name is None)
    return Plan(tile_size, mesh, axis_name)


def choose_tile_size(
    tile_size: TileSize, n: int, m: int, representations: int, itemsize: int, *, may_store: bool, by_memory: bool = True
) -> int | None:
    """The tile size for n x m distances; None: a single tile. `by_memory`: limited by free memory."""
    if not isinstance(tile_size, str):
        return tile_size
    pairs = n * m * representations
    if may_store and pairs <= _STORED_PAIRS:
        return None
    # All processes must choose the same size, so with several processes it must not depend on free memory.
    by_memory = by_memory and jax.process_count() == 1
    free = free_memory(jax.local_devices()[0]) if by_memory else math.inf
    max_pairs = _TILE_SHARE * free / (itemsize * _TILE_ARRAYS)
    if may_store and pairs <= min(_for_backend(_MAX_STORED_PAIRS), max_pairs):
        return None
    return min(_auto_tile_size(representations, max_pairs), max(n, m))


def _find_mesh(
    x: Array, y: Array | None, mesh: Any, axis_name: Any
) -> tuple[Mesh | AbstractMesh | None, str | None, int]:
    """The mesh, the axis and its size, from the options or from the sharding of x and y."""
    if mesh is None and axis_name is not None:
        if not _is_bound(axis_name):
            raise ValueError(
                f"axis_name={axis_name!r} is not bound here: call this inside jax.shard_map, jax.pmap or "
                "jax.vmap(axis_name=...), or give Plan a mesh as well."
            )
        return None, axis_name, lax.axis_size(axis_name)
    if mesh is None:
        shardings = [_row_sharding(x), None if y is None else _row_sharding(y)]
        shardings = [sharding for sharding in shardings if sharding is not None]
        if not shardings:
            return None, None, 1
        if shardings[0] != shardings[-1]:
            raise ValueError(
                f"the rows of x and y are sharded over different devices: {shardings[0]} and {shardings[-1]}. "
                "Put both on one mesh with jaxalign.sharding.shard_rows, or pass plan=Plan(mesh=...)."
            )
        mesh, axis_name = shardings[0]
        return mesh, axis_name, mesh.shape[axis_name]
    names = mesh.axis_names
    if isinstance(mesh, AbstractMesh) and jax.sharding.get_abstract_mesh().empty and _arrays.is_concrete(x):
        raise ValueError(
            "mesh is an AbstractMesh, which has no devices: pass a jax.sharding.Mesh (jaxalign.sharding.data_mesh()), "
            "or call within jax.set_mesh."
        )
    if axis_name is None:
        axis_name = default_axis(mesh)
    if axis_name not in names:
        raise ValueError(
            f"mesh has no axis {axis_name!r}, its axes are {names}. Pass the axis over which rows are sharded as "
            "axis_name=."
        )
    if _is_bound(axis_name):
        raise ValueError(
            f"the axis {axis_name!r} is bound by jax.shard_map or similar, so x holds the rows of one device: "
            f"use Plan(axis_name={axis_name!r}) without a mesh."
        )
    return mesh, axis_name, mesh.shape[axis_name]


def default_axis(mesh: Mesh | AbstractMesh) -> str:
    """The axis over which rows are sharded by default: the only axis, or "data"."""
    return mesh.axis_names[0] if len(mesh.axis_names) == 1 else "data"


def _is_bound(axis_name: str) -> bool:
    try:
        lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def _row_sharding(a: Array) -> tuple[Mesh | AbstractMesh, str] | None:
    """The mesh and axis over which the rows of an array are already sharded, if known."""
    sharding = a.sharding if _arrays.is_concrete(a) else jax.typeof(a).sharding
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) < a.ndim - 1:
        return None
    axis = sharding.spec[a.ndim - 2]
    if isinstance(axis, tuple) and len(axis) == 1:
        axis = axis[0]
    if not isinstance(axis, str) or sharding.mesh.shape[axis] == 1:
        return None
    return sharding.mesh, axis


def _for_backend(numbers: dict[str, int]) -> int:
    return numbers.get(jax.default_backend(), numbers["other"])


def _auto_tile_size(representations: int, max_pairs: float) -> int:
    """The fastest tile size with no more than `max_pairs` in all tiles together."""
    min_pairs = min(_for_backend(_MIN_TILE_PAIRS), _for_backend(_MAX_TOTAL_TILE_PAIRS) // representations)
    size = max(_MIN_TILE_ROWS, math.isqrt(max(_for_backend(_TILE_PAIRS) // representations, min_pairs)))
    while size > _MIN_TILE_ROWS and size * size * representations > max_pairs:
        size //= 2
    return size


def default_block_rows(row_bytes: int) -> int:
    """Rows per block read from files: 256 MB or 2^16 rows, so that a few blocks fit into memory.

    Independent of free memory, because a job that resumes from a checkpoint must use the same blocks.
    """
    return max(_MIN_TILE_ROWS, min(2**16, 2**28 // row_bytes))
