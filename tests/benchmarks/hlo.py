"""Counts what a compiled program does, from its text: kernels, host reads, bytes, operations, collectives.

Everything here is a function of the text of an optimized HLO module (`compiled.as_text()`); nothing is run. A loop
counts times its trips. XLA tells the trips of a `scan`; those of a `while_loop` that ends by a condition are assumed,
by a function that is given the places in the source that the loop comes from.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_ON_CHIP = "S(1)"  # in a layout: an array in the fast memory of a TPU's core
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")
# Neither a kernel nor a copy.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier"),
    *("partition-id", "replica-id", "domain", "call", "while", "conditional"),
    *("async-start", "async-update", "async-done", "copy-done", "send-done", "recv-done"),
}
_FREE_CALLS = ("AllocateBuffer", "Sharding", "annotate_device_placement", "LayoutConstraint")
# Operations without arithmetic, in a fused computation.
_NO_FLOPS = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "broadcast", "reshape", "transpose", "copy"),
    *("slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "iota", "gather", "reverse", "convert"),
    *("bitcast-convert", "fusion", "call", "while", "conditional", "custom-call"),
}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    @property
    def bytes(self) -> float:
        """Of all arrays of its result."""
        return bytes_of(self.shape)

    def called(self, key: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclass(frozen=True)
class Place:
    """A line of the source."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        """As a reader looks for it."""
        return f"{self.function} ({self.file}:{self.line})"


@dataclass(frozen=True)
class Module:
    """A program: its computations, and where they come from."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    frames: dict[int, tuple[Place, int]] = field(default_factory=dict)  # the place, and the frame of its caller

    @cached_property
    def shapes(self) -> dict[tuple[str, str], str]:
        """The shape of each instruction of each computation."""
        return {(name, one.name): one.shape for name, body in self.computations.items() for one in body}

    def places(self, one: Instruction) -> tuple[Place, ...]:
        """Where an instruction comes from, the innermost function first."""
        found = re.search(r"stack_frame_id=(\d+)", one.rest)
        frame, places = int(found[1]) if found else 0, []
        while frame in self.frames:
            place, frame = self.frames[frame]
            places.append(place)
        return tuple(places)


def bytes_of(shape: str) -> float:
    """Bytes of all arrays of a shape, which may be a tuple; without those that stay on the chip."""
    far = _SHAPE.sub(lambda found: "" if _ON_CHIP in (found[3] or "") else found[0], shape)
    return sum(_width(kind) * size for kind, size in arrays(far))


def arrays(shape: str) -> list[tuple[str, int]]:
    """Type and number of elements of each array of a shape."""
    found = _SHAPE.findall(shape)
    return [(kind, math.prod(int(size) for size in sizes.split(",") if size)) for kind, sizes, _ in found]


def _width(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    found = re.match(r"[a-z]+(\d+)", kind)
    return int(found[1]) / 8 if found else 0


# --- the text ------------------------------------------------------------------------------------------------------


def parse(text: str) -> Module:
    """The module of a text."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, name, body, table = "", None, [], None
    for line in text.splitlines():
        if name is not None:
            if line.startswith("}"):
                computations[name], name = tuple(body), None
            elif " = " in line:
                body.append(instruction(line))
        elif head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            if not line.startswith("HloModule"):
                name, body = head[2], []
                entry = name if head[1] else entry
        elif re.fullmatch(r"FileNames|FunctionNames|FileLocations|StackFrames", line):
            table = tables.setdefault(line, {})
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
    return Module(computations, entry, _frames(tables))


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[Place, int]]:
    def fields(row: str) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}

    files, functions, locations, frames = (
        tables.get(name, {}) for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    )
    found = {}
    for number, row in frames.items():
        frame = fields(row)
        location = fields(locations.get(frame.get("file_location_id", 0), ""))
        function = functions.get(location.get("function_name_id", 0), '"?"').strip('"')
        file = files.get(location.get("file_name_id", 0), '"?"').strip('"').rsplit("/", 1)[-1]
        # The caller is stored with 1 added, and 1 stands for none.
        found[number] = Place(function, file, location.get("line", 0)), frame.get("parent_frame_id", 1) - 1
    return found


def instruction(line: str) -> Instruction:
    """An instruction of a line of text."""
    left, right = line.strip().split(" = ", 1)
    shape, right = _shape_and_rest(right)
    opcode, right = right.split("(", 1)
    inside, rest = _closed(right)
    name = left.removeprefix("ROOT ").lstrip("%")
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, opcode, operands, inside + rest if opcode == "constant" else rest, "ROOT " in left)


def _shape_and_rest(text: str) -> tuple[str, str]:
    if text.startswith("("):
        inside, rest = _closed(text[1:])
        return f"({inside})", rest.lstrip()
    shape, rest = text.split(" ", 1)
    return shape, rest


def _closed(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and after it."""
    depth = 1
    for k, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:k], text[k + 1 :]
    return text, ""


# --- counts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What some instructions do."""

    launches: float = 0  # kernels and copies on the device
    reads: float = 0  # of a loop's condition, by the host, which waits for them
    bytes: float = 0  # read and written by kernels
    flops: float = 0
    products: float = 0  # of matrices
    sent: Counter[str] = field(default_factory=Counter)  # bytes of results of collectives, by kind
    collectives: Counter[str] = field(default_factory=Counter)  # their number

    def __add__(self, other: Cost) -> Cost:
        """Both."""
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, times: float) -> Cost:
        """So many times."""

        def scaled(value: float | Counter[str]) -> float | Counter[str]:
            if isinstance(value, Counter):
                return Counter({key: times * number for key, number in value.items()})
            return times * value

        return Cost(*(scaled(getattr(self, name)) for name in self.__dataclass_fields__))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Loop:
    """A loop, or a branch: what one trip does, and the loops inside."""

    name: str
    places: tuple[Place, ...]
    trips: int
    known: bool  # XLA tells the trips
    told: bool  # the assumption was made for this loop
    once: bool  # it ends after one trip at the latest
    each: Cost  # of one trip, with the loops inside
    condition: Cost
    block: Block

    @property
    def total(self) -> Cost:
        """Of all trips. The host reads the condition of a loop of unknown length once more than there are trips."""
        if self.known:
            return self.each * self.trips
        return self.each * self.trips + self.condition * (self.trips + 1)


@dataclass(frozen=True)
class Block:
    """What stands in a computation: its own kernels by what they are and where they come from, and loops."""

    own: Cost = field(default_factory=Cost)
    kernels: Counter[str] = field(default_factory=Counter)
    loops: tuple[Loop, ...] = ()

    def __add__(self, other: Block) -> Block:
        """Both."""
        return Block(self.own + other.own, self.kernels + other.kernels, self.loops + other.loops)

    @property
    def total(self) -> Cost:
        """With the loops."""
        return sum((loop.total for loop in self.loops), self.own)


Trips = Callable[[tuple[Place, ...], bool], int | None]


def count(module: Module, trips: Trips = lambda places, once: None) -> Block:
    """What a program does.

    Args:
        module: the program.
        trips: how often a loop runs whose length XLA does not know, by where it comes from and by whether it ends
            after one trip at the latest, a branch in disguise; None: once, and the loop says that nobody told.
    """
    return _block(module, module.entry, trips)


def _block(module: Module, name: str, trips: Trips) -> Block:
    total = Block()
    for one in module.computations[name]:
        total += _of_instruction(module, name, one, trips)
    return total


def _of_instruction(module: Module, inside: str, one: Instruction, trips: Trips) -> Block:
    if one.opcode == "while":
        return Block(loops=(_loop(module, one, trips),))
    if one.opcode == "conditional":
        return Block(loops=(_branch(module, one, trips),))
    if one.opcode in ("call", "async-start"):
        called = one.called("to_apply") or one.called("calls") or one.called("called_computation")
        if called in module.computations:
            return _block(module, called, trips)
    own = Cost(flops=flops(module, inside, one), products=products(module, inside, one)) + _collective(module, one)
    if launches(one):
        own += Cost(launches=1, bytes=moved(module, inside, one))
        return Block(own, Counter({_title(module, one): 1}))
    return Block(own)


def _loop(module: Module, one: Instruction, trips: Trips) -> Loop:
    body, condition = one.called("body"), one.called("condition")
    assert body is not None
    assert condition is not None
    places, known = module.places(one), known_trips(module, one)
    once = ends_after_one(module, one)
    told = known if known is not None else trips(places, once)
    block = _block(module, body, trips)
    asked = _block(module, condition, trips).total + Cost(reads=1)
    number = 1 if told is None else told
    return Loop(one.name, places, number, known is not None, told is not None, once, block.total, asked, block)


def ends_after_one(module: Module, one: Instruction) -> bool:
    """Whether the condition of a `while` is a part of its state that the body sets to False."""
    condition, body = (module.computations[one.called(key) or ""] for key in ("condition", "body"))
    asked = next((part for part in condition if part.root), condition[-1])
    found = re.search(r"index=(\d+)", asked.rest)
    by_name, after = {part.name: part for part in body}, next((part for part in body if part.root), body[-1])
    if asked.opcode != "get-tuple-element" or not found or after.opcode != "tuple":
        return False
    part = by_name[after.operands[int(found[1])]]
    while part.opcode in ("copy", "bitcast", "broadcast", "fusion") and len(part.operands) == 1:
        part = by_name[part.operands[0]]
    return part.opcode == "constant" and part.rest.startswith("false")


def known_trips(module: Module, one: Instruction) -> int | None:
    """How often the body of a `while` runs: told by XLA (GPU), or a counter that is compared with a constant (TPU)."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest):
        return int(found[1])
    body = module.computations[one.called("condition") or ""]
    root, by_name = body[-1], {part.name: part for part in body}
    operands = [by_name.get(name) for name in root.operands]
    if root.opcode == "compare" and "direction=LT" in root.rest and operands[-1] and operands[-1].opcode == "constant":
        found = re.match(r"\d+", operands[-1].rest)
        return int(found[0]) if found else None
    return None


def _branch(module: Module, one: Instruction, trips: Trips) -> Loop:
    """The branch that launches most; the host reads which one."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
    names = re.findall(r"[\w.\-]+", listed[1].replace("%", "")) if listed else []
    names += [name for key in ("true_computation", "false_computation") if (name := one.called(key))]
    blocks = [_block(module, name, trips) for name in names]
    block = max(blocks, key=lambda b: (b.total.launches, b.total.bytes), default=Block())
    each = block.total + Cost(reads=1)
    return Loop(one.name, module.places(one), 1, True, True, True, each, Cost(), block)


def launches(one: Instruction) -> bool:
    """Whether an instruction is a kernel, or a copy, of its own."""
    if one.opcode == "custom-call":
        return not any(name in one.rest for name in _FREE_CALLS)
    return one.opcode not in _FREE and not one.opcode.endswith("-done")


def _title(module: Module, one: Instruction) -> str:
    """What a kernel is and where it comes from."""
    what = re.sub(r"[._\d]+(clone)?$", "", one.name)
    if one.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', one.rest)
        what = target[1] if target else what
    places = module.places(one)
    every = arrays(one.shape)[:1] if one.opcode == "custom-call" else arrays(one.shape)  # the rest is room to work in
    kind, size = max(every, key=lambda array: array[1], default=("", 0))
    return f"{what} {kind}[{size}]" + (f" of {places[0]}" if places else "")


def products(module: Module, inside: str, one: Instruction) -> int:
    """Products of matrices in an instruction."""
    if one.opcode == "fusion":
        called = one.called("calls")
        return sum(products(module, called or "", part) for part in module.computations.get(called or "", ()))
    return int(
        one.opcode in ("dot", "convolution") or "matmul" in one.rest.split("metadata", 1)[0] or "gemm" in one.rest[:200]
    )


def flops(module: Module, inside: str, one: Instruction) -> float:
    """Operations of an instruction; one for each element of the result of elementwise ones."""
    if one.opcode == "fusion":
        called = one.called("calls") or ""
        return sum(flops(module, called, part) for part in module.computations.get(called, ()))
    if one.opcode == "dot" or (one.opcode == "custom-call" and "lhs_contracting" in one.rest):
        listed = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', one.rest)
        axes = [int(axis) for axis in re.findall(r"\d+", listed[1])] if listed else []
        left = _SHAPE.search(module.shapes.get((inside, one.operands[0]), ""))
        sizes = [int(size) for size in left[2].split(",") if size] if left else []
        return 2 * arrays(one.shape)[0][1] * math.prod(sizes[axis] for axis in axes)
    if one.opcode == "convolution":  # a TPU's product: the features of its left side are summed over
        labels = re.search(r"dim_labels=(\w+)_", one.rest)
        left = _SHAPE.search(module.shapes.get((inside, one.operands[0]), ""))
        sizes = left[2].split(",") if left else []
        return 2 * arrays(one.shape)[0][1] * int(sizes[labels[1].index("f")]) if labels and sizes else 0
    if one.opcode in _NO_FLOPS or one.opcode in _FREE or one.opcode.startswith(_COLLECTIVES):
        return 0
    if one.opcode == "reduce":
        return sum(sum(size for _, size in arrays(module.shapes.get((inside, name), ""))) for name in one.operands)
    return sum(size for _, size in arrays(one.shape))


def moved(module: Module, inside: str, one: Instruction) -> float:
    """Bytes that a kernel reads and writes; of what it slices or updates only that part."""
    if one.opcode in ("fusion", "fusion-start") and (called := one.called("calls")) in module.computations:
        return _moved_by_fusion(module, called)
    read = [bytes_of(module.shapes.get((inside, name), "")) for name in one.operands]
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * one.bytes
    if one.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if one.opcode == "copy-start":
        return 2 * sum(read)
    if one.opcode == "custom-call" and "matmul" in one.rest:  # beside the product it has room to work in
        kind, size = arrays(one.shape)[0]
        return sum(read) + _width(kind) * size
    return sum(read) + one.bytes


def _moved_by_fusion(module: Module, called: str) -> float:
    body = module.computations[called]
    by_name = {one.name: one for one in body}

    def origin(name: str) -> str:
        while name in by_name and by_name[name].opcode in ("bitcast", "reshape", "convert", "copy"):
            name = by_name[name].operands[0]
        return name

    users: dict[str, list[tuple[Instruction, int]]] = {}
    for one in body:
        if one.opcode in ("bitcast", "reshape", "convert", "copy") and not one.root:
            continue
        for k, operand in enumerate(one.operands):
            users.setdefault(origin(operand), []).append((one, k))

    def read(one: Instruction) -> float:
        parts = 0.0
        for user, k in users.get(one.name, ()):
            if k == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
                parts += user.bytes
            elif not (k == 0 and user.opcode == "dynamic-update-slice"):
                return one.bytes
        return min(parts, one.bytes)

    def written(name: str) -> float:
        one = by_name[name]
        if one.opcode == "tuple":
            return sum(written(operand) for operand in one.operands)
        update = by_name.get(origin(name), one)
        if update.opcode == "dynamic-update-slice":
            return by_name[update.operands[1]].bytes
        return one.bytes

    roots = [one.name for one in body if one.root]
    return sum(read(one) for one in body if one.opcode == "parameter") + sum(written(name) for name in roots)


def _collective(module: Module, one: Instruction) -> Cost:
    """A collective, also inside a fusion."""
    if one.opcode == "fusion":
        parts = module.computations.get(one.called("calls") or "", ())
        return sum((_collective(module, part) for part in parts if part.opcode != "fusion"), Cost())
    kind = one.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return Cost()
    return Cost(sent=Counter({kind: result_bytes(one)}), collectives=Counter({kind: 1}))


def result_bytes(one: Instruction) -> float:
    """Bytes of the result of a collective. One that is started holds what it reads too."""
    each = [_width(kind) * size for kind, size in arrays(one.shape)]
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        return sum(each[len(one.operands) : 2 * len(one.operands)])
    return sum(each)


def gathered(module: Module) -> float:
    """Bytes of the largest result of a collective that gives all devices the same."""
    kinds = ("all-gather", "all-gather-start", "all-reduce", "all-reduce-start")
    return max((result_bytes(one) for one in every(module) if one.opcode in kinds), default=0)


def largest(module: Module) -> int:
    """Elements of the largest array that is stored."""
    fused = {one.called("calls") for one in every(module) if one.opcode == "fusion"}
    stored = (one for name, body in module.computations.items() if name not in fused for one in body)
    return max((size for one in stored for _, size in arrays(one.shape)), default=0)


def every(module: Module) -> Iterator[Instruction]:
    """All instructions of all computations."""
    for body in module.computations.values():
        yield from body


def has_type(module: Module, kind: str) -> bool:
    """Whether any array has this type."""
    return any(found == kind for one in every(module) for found, _ in arrays(one.shape))


# --- to read -------------------------------------------------------------------------------------------------------


def breakdown(block: Block, indent: str = "  ", least: int = 1) -> list[str]:
    """Lines that say what a block launches itself, and then of each loop."""
    lines = [f"{indent}{number:4g} {title}" for title, number in block.kernels.most_common() if number >= least]
    for loop in block.loops:
        trips = "known" if loop.known else "assumed" if loop.told else "NOT IN THE TABLE of assumptions"
        total, each, own = loop.total, loop.each, loop.block.own
        lines += [
            f"{indent}loop {loop.name} of {' < '.join(map(str, loop.places[:3]))}",
            f"{indent}  {loop.trips} trips ({trips}), each {each.launches:g} launches ({own.launches:g} its own, "
            f"{loop.condition.launches:g} for the condition) and {each.bytes / 1e9:.3g} GB; "
            f"in all {total.launches:g} launches, {total.reads:g} host reads, {total.bytes / 1e9:.3g} GB",
            *breakdown(loop.block, indent + "    ", least),
        ]
    return lines
