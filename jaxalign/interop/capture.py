"""Features of any layer of a network, batch by batch: of torch, Flax and Equinox models.

What a framework does differently (which layers there are, how to listen to one) is in `_networks`.
"""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _checks
from jaxalign.files.storage import partial_name
from jaxalign.files.visit import Progress, reporting
from jaxalign.interop import _networks
from jaxalign.io import file_names

_BEGINNING = 256  # samples, of an order that is looked at
_TOKENS = ("all", "mean", "max", "first", "last")


def capture_features(
    model: Any,
    inputs: Any,
    *,
    layers: str | Sequence[str] | Mapping[str, str],
    batch_size: int = 32,
    tokens: Literal["all", "mean", "max", "first", "last"] = "all",
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    channel_axis: Literal["first", "last"] | None = None,
    output: int | str | Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    out: str | Path | None = None,
    to: Literal["numpy", "jax"] = "numpy",
    progress: Progress = False,
) -> dict[str, Any]:
    """Run a network over many inputs and keep what some of its layers put out.

    The network runs in evaluation mode and without gradients, and is afterwards as it was before, also when something
    raises: a torch model loses its hooks and gets its training flags back, a jax model is never changed.

    Args:
        model: a `torch.nn.Module` (timm, transformers, diffusers, your own), a `flax.nnx.Module`, a Linen module bound
            to its variables (`module.bind(variables)`), or an `equinox.Module`, which takes one sample, as usual there.
        inputs: a tensor or array with samples on its first axis, or a dict or tuple of such, which the model gets as
            keywords or positions; or an iterable of batches of this form (a DataLoader, not one that shuffles: every
            network must see the same samples in the same order). Sent to the model's device.
        layers: names, or patterns in which `*` stands for any text without a dot and `**` for any text; `""` is what
            the model itself returns. A dict {name in the result: layer} renames.
        batch_size: samples at a time, of `inputs` that are not batches already.
        tokens: what to keep of the positions (tokens of a sequence, pixels of a map): "all", their "mean" or "max", the
            "first" (a class token) or the "last" (of a causal language model). Where the inputs have an
            "attention_mask" as long as the sequence, "mean", "max", "first" and "last" regard its real tokens alone.
        prefix_tokens: leading tokens that are no patches (class token, registers). All but "first" leave them out.
        grid: (rows, columns) to which maps, and sequences of square many patches, are resampled (bilinear, smoothed
            where they shrink), so that patch k is the same place in every network. Positions run row by row.
        channel_axis: where outputs of four dimensions have their channels: "first" is (b, c, h, w), as convolutions
            have it in torch and Equinox, "last" is (b, h, w, c). Default: "first" for these, "last" for Flax.
        output: which part of a layer's output, where it is several: a position, a key, or a function of the output.
            Default: the first tensor of a tuple, and of a mapping its "last_hidden_state" or only tensor.
        forward: how to call the model, `forward(model, batch)`. Default: `model(batch)`, `model(*batch)` for a tuple,
            `model(**batch)` for a dict.
        out: a folder (made if need be) for one .npy file a layer, written batch by batch, so that memory holds one
            batch; the files get their names when all are complete. Default: in memory.
        to: "numpy" arrays (with `out`, memory maps that are read as they are used), or "jax" arrays.
        progress: True shows a bar (needs tqdm); or a function of (stage, done, total), in samples; total is -1 where
            the iterable has no length.

    Returns:
        {layer: features} in the order of the model, float32 (float64 where the layer is): (n, d) for layers without
        positions or where `tokens` makes one of them, (n, positions, d) for "all". Rows of patches are
        `features.reshape(-1, d)`. Layers whose names are numbers (of a `torch.nn.Sequential`) have the model's class
        ahead, "Sequential.0", which `layers` takes too.

    Raises:
        ValueError: a layer that does not exist (with those that do; of a Linen module those with parameters); one that
            the model does not call, or calls several times, or inside a transformation of jax; an output whose first
            axis is not the batch, of other shape from batch to batch, or of another than 2 to 4 dimensions; positions
            that are not square where a `grid` is wanted; samples of different number; a DataLoader that shuffles.
        TypeError: a model of no known framework; an output that is no floating-point tensor.
        FileExistsError: `out` holds a file of that layer already.

    Example:
        >>> import pytest; torch = pytest.importorskip("torch")
        >>> import jaxalign
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> images = torch.rand(100, 3, 16, 16)
        >>> found = jaxalign.interop.capture_features(model, images, layers=["0", "2"], tokens="mean")
        >>> {name: features.shape for name, features in found.items()}
        {'Sequential.0': (100, 8), 'Sequential.2': (100, 8)}
        >>> jaxalign.interop.capture_features(model, images, layers="*", grid=(4, 4))["Sequential.1"].shape
        (100, 16, 8)
    """
    network = _networks.network_of(model, output, forward)
    _checks.choice("tokens", tokens, _TOKENS)
    _checks.choice("channel_axis", channel_axis, (None, "first", "last"))
    _checks.choice("to", to, ("numpy", "jax"))
    _checks.whole("prefix_tokens", prefix_tokens, 0)
    if grid is not None:
        if len(grid) != 2:
            raise ValueError(f"grid must be (rows, columns); got {_checks.shown(grid)}.")
        grid = (_checks.whole("grid", grid[0]), _checks.whole("grid", grid[1]))
    wanted = _select(layers, network.names, type(model).__name__)
    batches, total = _batches(inputs, _checks.whole("batch_size", batch_size))
    channels = network.channel_axis if channel_axis is None else channel_axis
    done = 0
    with ExitStack() as stack:
        places = file_names(wanted)
        report = stack.enter_context(reporting(progress, "features", total, unit="sample"))
        kept = {name: stack.enter_context(_Kept(name, out, places[name])) for name in wanted}
        run = stack.enter_context(network.listening(tuple(dict.fromkeys(wanted.values()))))
        for batch in batches:
            count = _count(batch)
            outputs = run(batch)
            real = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            real = None if real is None or tokens == "all" else _real_tokens(_networks.on_host(real))
            for name, layer in wanted.items():
                features = _checked(layer, outputs[layer], count)
                if to == "jax" and features.dtype != jax.dtypes.canonicalize_dtype(features.dtype):
                    raise TypeError(
                        f"layer {layer!r} is {features.dtype}, but jax is set to 32 bits and would narrow it without a "
                        'word. Take to="numpy", whose arrays jaxalign takes as they are, or '
                        'jax.config.update("jax_enable_x64", True) at the start of the program.'
                    )
                kept[name].append(_positions(layer, features, tokens, prefix_tokens, grid, channels, real))
            done += count
            report(done)
        if not done:
            raise ValueError("inputs has no sample. (A generator that was gone through before has none left.)")
        for one in kept.values():
            one.complete()
    found = {name: one.result() for name, one in kept.items()}
    return {name: jnp.asarray(features) for name, features in found.items()} if to == "jax" else found


# --- which layers ----------------------------------------------------------------------------------------------------


def _select(layers: Any, names: Sequence[str], model: str) -> dict[str, str]:
    """{name in the result: layer}, in the model's order."""
    # A report that says "0 in 1" says nothing: numbers alone get the name of the model's class ahead.
    full = {f"{model}.{name}" if re.fullmatch(r"\d+(\.\d+)*", name) else name: name for name in names}
    if isinstance(layers, Mapping):
        return {str(given): _one_layer(layer, full) for given, layer in layers.items()}
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError(f"layers is empty. {_there_are(names)}")
    chosen = set(itertools.chain.from_iterable(_matching(pattern, full) for pattern in patterns))
    return {label: name for label, name in full.items() if name in chosen}


def _one_layer(layer: Any, full: Mapping[str, str]) -> str:
    found = _matching(layer, full)
    if len(found) > 1:
        raise ValueError(f"layers: {layer!r} matches {len(found)} layers; a dict of names takes one layer for each.")
    return found[0]


def _matching(pattern: Any, full: Mapping[str, str]) -> list[str]:
    """The layers that a pattern matches, by their own names or by those in results, {name in results: layer}."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"layers must be names or patterns; got {_checks.shown(pattern)} of type {type(pattern).__name__}."
        )
    names = list(full.values())
    for labels in (names, full):
        if pattern in labels:
            return [full.get(pattern, pattern)]
    parts = re.split(r"(\*\*|\*)", pattern)
    regular = "".join({"**": ".*", "*": "[^.]*"}.get(part, re.escape(part)) for part in parts)
    found = [name for label, name in full.items() if name and any(re.fullmatch(regular, s) for s in (name, label))]
    if not found:
        close = difflib.get_close_matches(pattern, names, 5)
        hint = f" Close to it: {', '.join(map(repr, close))}." if close else ""
        raise ValueError(f"layers: the model has no layer {pattern!r}.{hint} {_there_are(names)}")
    return found


def _there_are(names: Sequence[str]) -> str:
    """All layers, numbers that run through taken together: 'blocks.{0..11}.attn'."""
    numbers: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        if name:
            shape = re.sub(r"(?<![^.])\d+(?![^.])", "{}", name)
            numbers.setdefault(shape, []).append(tuple(map(int, re.findall(r"(?<![^.])\d+(?![^.])", name))))
    told = []
    for shape, found in numbers.items():
        spans = [f"{min(k)}" if min(k) == max(k) else f"{{{min(k)}..{max(k)}}}" for k in zip(*found, strict=True)]
        told.append(shape.format(*spans))
    more = f", and {len(told) - 200} more" if len(told) > 200 else ""
    return f"It has: {', '.join(told[:200])}{more}; '' is its own output."


# --- inputs, batch by batch ------------------------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")


def _is_batch(value: Any) -> bool:
    """Whether it is one batch: arrays, or a mapping or tuple of them."""
    if isinstance(value, Mapping):
        return any(map(_is_array, value.values()))
    return _is_array(value) or (isinstance(value, tuple) and any(map(_is_array, value)))


def _parts(batch: Any) -> list[Any]:
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else [batch]
    return [part for part in parts if _is_array(part) and len(part.shape)]


def _count(batch: Any) -> int:
    sizes = {int(part.shape[0]) for part in _parts(batch)}
    if len(sizes) != 1:
        raise ValueError(f"inputs must agree in the number of samples on the first axis; got {sorted(sizes)}.")
    return sizes.pop()


def _batches(inputs: Any, size: int) -> tuple[Iterator[Any], int]:
    if _is_batch(inputs):
        total = _count(inputs)

        def cut(value: Any, rows: slice) -> Any:
            return value[rows] if _is_array(value) and len(value.shape) else value

        def sliced() -> Iterator[Any]:
            for start in range(0, total, size):
                rows = slice(start, start + size)
                if isinstance(inputs, Mapping):
                    yield {key: cut(value, rows) for key, value in inputs.items()}
                else:
                    yield tuple(cut(value, rows) for value in inputs) if isinstance(inputs, tuple) else inputs[rows]

        return sliced(), total
    if not isinstance(inputs, Iterable) or isinstance(inputs, (str, bytes, Mapping)):
        raise TypeError(
            f"inputs must be a tensor, a dict or tuple of tensors, or an iterable of batches; got {type(inputs)}."
        )
    _refuse_random_order(inputs)
    # A DataLoader hands out lists where a dataset has tuples.
    batches = (tuple(batch) if isinstance(batch, list) else batch for batch in inputs)
    return _only_batches(batches), getattr(getattr(inputs, "dataset", None), "__len__", lambda: -1)()


def _refuse_random_order(inputs: Any) -> None:
    """Raise for a DataLoader of torch that shuffles: row i would be another sample for each network."""
    data = sys.modules.get("torch.utils.data")
    if data is None or not isinstance(inputs, data.DataLoader) or isinstance(inputs.dataset, data.IterableDataset):
        return
    samplers = [inputs.batch_sampler, inputs.sampler]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]  # a BatchSampler has one of its own
    random = next((sampler for sampler in samplers if sampler is not None and _is_random(data, sampler)), None)
    what = "" if random is None else f"a DataLoader that shuffles ({type(random).__name__})"
    if not what and inputs.num_workers and not getattr(inputs, "in_order", True):
        what = "a DataLoader whose workers hand out batches in any order (in_order=False)"
    if what:
        raise ValueError(
            f"inputs is {what}: row i would be another sample for each network. Make it with shuffle=False and "
            "without such a sampler; for random samples, draw them once: torch.utils.data.Subset(dataset, indices)."
        )


def _is_random(data: Any, sampler: Any) -> bool:
    """Whether a sampler draws its order anew each time, as far as can be told."""
    if isinstance(sampler, (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)):
        return True
    if isinstance(sampler, data.DistributedSampler):
        return sampler.shuffle
    if type(sampler) in (data.SequentialSampler, data.BatchSampler) or isinstance(sampler, Iterator):
        return False
    # Of another kind: whether it begins alike twice. The state of torch's random numbers is put back.
    with sys.modules["torch"].random.fork_rng(devices=[]):
        first, second = (list(map(str, itertools.islice(iter(sampler), _BEGINNING))) for _ in range(2))
    return first != second


def _only_batches(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if not _is_batch(batch):
            raise TypeError(
                f"inputs must hand out tensors, or dicts or tuples of tensors; got {type(batch).__name__}. Images and "
                "texts go through the model's own preprocessing first."
            )
        yield batch


def _real_tokens(mask: np.ndarray) -> np.ndarray:
    if mask.dtype.kind not in "biu":
        raise ValueError(
            f"attention_mask must be 1 or True where a token is real, to say which count; got {mask.dtype}. Keep all "
            'tokens with tokens="all", or pool them yourself.'
        )
    return mask.astype(bool)


# --- outputs ---------------------------------------------------------------------------------------------------------


def _checked(layer: str, features: np.ndarray, count: int) -> np.ndarray:
    if not 2 <= features.ndim <= 4 or features.shape[0] != count:
        raise ValueError(
            f"layer {layer!r} put out shape {features.shape} for {count} samples; it must be (samples, d), (samples, "
            "tokens, d) or a map of four dimensions. Name another layer (windowed attention and blocks that have the "
            "batch second do not keep samples first), or bring its output into form with output=lambda value: ..."
        )
    return features


def _positions(
    layer: str,
    features: np.ndarray,
    tokens: str,
    prefix: int,
    grid: tuple[int, int] | None,
    channels: str,
    real: np.ndarray | None,
) -> np.ndarray:
    """Features of one batch as (samples, d) or (samples, positions, d)."""
    if features.ndim == 2:
        return features
    is_map = features.ndim == 4
    if is_map:
        if channels == "first":
            features = np.moveaxis(features, 1, -1)
        shape = features.shape[1:3]
        features = features.reshape(len(features), -1, features.shape[-1])
    else:
        if tokens != "first":
            features = features[:, prefix:]
            real = None if real is None else real[:, prefix:]
        side = round(features.shape[1] ** 0.5)
        shape = (side, side)
    if grid is not None and tokens != "first":
        if shape[0] * shape[1] != features.shape[1] or not features.shape[1]:
            raise ValueError(
                f"layer {layer!r} has {features.shape[1]} tokens after {prefix} prefix tokens, not the square of a "
                "number, so which lie on a grid is not known: give prefix_tokens= (1 for a class token, more with "
                "registers)."
            )
        features = _resampled(features.reshape(len(features), *shape, -1), grid)
    if tokens == "all":
        return features
    if not features.shape[1]:
        raise ValueError(f"layer {layer!r} has no tokens beyond its {prefix} prefix tokens.")
    if real is None or real.shape != features.shape[:2] or is_map or grid is not None:
        real = np.ones(features.shape[:2], bool)
    if not real.any(1).all():
        raise ValueError(f"layer {layer!r}: attention_mask has a sample without any real token.")
    if tokens in ("first", "last"):
        first = real.argmax(1) if tokens == "first" else real.shape[1] - 1 - real[:, ::-1].argmax(1)
        return features[np.arange(len(features)), first]
    weights = real[..., None]
    if tokens == "max":
        return np.where(weights, features, -np.inf).max(1)
    total = np.sum(np.where(weights, features, 0), 1, dtype=np.float64)
    return (total / weights.sum(1)).astype(features.dtype)


def _resampled(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Maps (samples, h, w, d) on another grid, its cells row by row."""
    shape = (len(maps), *grid, maps.shape[-1])
    if maps.shape != shape:
        with jax.enable_x64(maps.dtype == np.float64):
            maps = np.asarray(jax.image.resize(maps, shape, "bilinear", antialias=True))
    return maps.reshape(len(maps), grid[0] * grid[1], -1)


class _Kept:
    """Rows that come batch by batch: in memory, or in a .npy file that has its name only once it is complete."""

    def __init__(self, name: str, folder: str | Path | None, place: str) -> None:
        self.name = name
        self.parts: list[np.ndarray] = []
        self.count = 0
        self.like: tuple[tuple[int, ...], Any] | None = None
        self.path = None if folder is None else Path(folder) / f"{place}.npy"

    def __enter__(self) -> _Kept:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                raise FileExistsError(f"{self.path} exists: remove it, or name another folder with out=.")
            self.partial = partial_name(self.path)
            self.file = self.partial.open("xb")
        return self

    def append(self, rows: np.ndarray) -> None:
        like = rows.shape[1:], rows.dtype
        if self.like is None:
            self.like = like
            if self.path is not None:
                self._header()
        elif self.like != like:
            raise ValueError(
                f"{self.name!r} has features of shape {like[0]} after ones of shape {self.like[0]}: bring all inputs "
                'to one size, or take tokens="mean" or grid=.'
            )
        self.count += len(rows)
        if self.path is None:
            self.parts.append(rows)
        else:
            self.file.write(np.ascontiguousarray(rows).tobytes())

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow: it keeps its length whatever the count.
        assert self.like is not None
        shape, dtype = self.like
        told = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.count, *shape)}
        np.lib.format.write_array_header_1_0(self.file, told)

    def complete(self) -> None:
        if self.path is not None:
            self.file.seek(0)
            self._header()
            self.file.close()
            self.partial.replace(self.path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.path is not None:
            self.file.close()
            self.partial.unlink(missing_ok=True)

    def result(self) -> np.ndarray:
        return np.concatenate(self.parts) if self.path is None else np.load(self.path, mmap_mode="r")
