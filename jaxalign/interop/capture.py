"""Features of any layer of torch, Flax and Equinox models, captured batch by batch.

Framework-specific code is in `_networks`.
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
from jaxalign._repr import shown
from jaxalign.files.storage import partial_name
from jaxalign.files.visit import Progress, reporting
from jaxalign.interop import _networks
from jaxalign.io import file_names

_COMPARED = 256  # number of first samples by which two orders are compared
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
    """Run a network on inputs and return the outputs of layers as features.

    The network runs in evaluation mode and without gradients. It does not change, even if an error is raised: hooks and
    training flags of a torch model are restored, and a JAX model is never modified.

    Args:
        model: a `torch.nn.Module` (also of timm, transformers or diffusers), a `flax.nnx.Module`, a Linen module bound
            to its variables (`module.bind(variables)`), or an `equinox.Module`, which is called on single samples.
        inputs: a tensor or array with samples on its first axis; a dict or tuple of those, passed to the model as
            keyword or positional arguments; or an iterable of such batches. A DataLoader must not shuffle, as every
            network must see the same samples in the same order. Inputs are moved to the device of the model.
        layers: names, or patterns in which `*` matches any text without a dot and `**` any text; `""` is the output of
            the model. A dict {name in the result: layer} renames layers.
        batch_size: the number of samples per batch, if `inputs` is not an iterable of batches.
        tokens: how to reduce positions (tokens of a sequence, pixels of a map): keep "all", their "mean" or "max", the
            "first" (a class token) or the "last" (of a causal language model). If the inputs have an "attention_mask"
            as long as the sequence, only its nonzero tokens count, except for "all".
        prefix_tokens: the number of leading tokens that are not patches (class token, registers), which are left out
            unless tokens="first".
        grid: (rows, columns) to which maps, and sequences of a square number of patches, are resampled (bilinear, with
            antialiasing), so that patch k is at the same place in every network. Positions are in row-major order.
        channel_axis: the channel axis of outputs of four dimensions: "first" is (b, c, h, w), "last" is (b, h, w, c).
            Default: "first" for torch and Equinox, "last" for Flax.
        output: the part of a layer's output to use: an index, a key, or a function of the output. Default: the first
            tensor of a tuple; the "last_hidden_state" or the only tensor of a mapping.
        forward: a function `forward(model, batch)` that calls the model. Default: `model(batch)`, `model(*batch)` for a
            tuple, `model(**batch)` for a dict.
        out: a folder, created if necessary, for one .npy file per layer. Files are written batch by batch, so that
            memory holds one batch, and get their names once all are complete. Default: in memory.
        to: "numpy" arrays (memory maps if `out` is set), or "jax" arrays.
        progress: True shows a progress bar (needs tqdm); or a function of (stage, done, total), in samples; total is -1
            if the iterable has no length.

    Returns:
        {layer: features} in the order of the model, float32 (float64 if the output is): (n, d) for layers without
        positions or if `tokens` reduces them, (n, positions, d) for "all". `features.reshape(-1, d)` has one row per
        patch. Names of layers that are numbers (in a `torch.nn.Sequential`) are prefixed with the class of the model,
        as in "Sequential.0", which `layers` also accepts.

    Raises:
        ValueError: a layer that does not exist (the message lists all layers; for a Linen module those with
            parameters); a layer that the model does not call, calls several times, or calls inside a JAX
            transformation; an output whose first axis is not the batch, whose shape differs between batches, or without
            2 to 4 dimensions; a number of patches that is not square with `grid`; different numbers of samples; a
            DataLoader that shuffles.
        TypeError: a model of an unknown framework; an output that is not a floating-point tensor.
        FileExistsError: `out` already holds a file of that layer.

    Examples:
        >>> import pytest; torch = pytest.importorskip("torch")
        >>> import jaxalign
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> images = torch.rand(100, 3, 16, 16)
        >>> captured = jaxalign.interop.capture_features(model, images, layers=["0", "2"], tokens="mean")
        >>> {name: features.shape for name, features in captured.items()}
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
            raise ValueError(f"grid must be (rows, columns); got {shown(grid)}.")
        grid = (_checks.whole("grid", grid[0]), _checks.whole("grid", grid[1]))
    selected = _select(layers, network.names, type(model).__name__)
    batches, total = _batches(inputs, _checks.whole("batch_size", batch_size))
    channels = network.channel_axis if channel_axis is None else channel_axis
    done = 0
    with ExitStack() as stack:
        stems = file_names(selected)
        report = stack.enter_context(reporting(progress, "features", total, unit="sample"))
        writers = {name: stack.enter_context(_Writer(name, out, stems[name])) for name in selected}
        run = stack.enter_context(network.recording(tuple(dict.fromkeys(selected.values()))))
        for batch in batches:
            count = _count(batch)
            outputs = run(batch)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = None if mask is None or tokens == "all" else _token_mask(_networks.on_host(mask))
            for name, layer in selected.items():
                features = _check_shape(layer, outputs[layer], count)
                if to == "jax" and features.dtype != jax.dtypes.canonicalize_dtype(features.dtype):
                    raise TypeError(
                        f"layer {layer!r} is {features.dtype}, but JAX uses 32 bits and would narrow it silently. Use "
                        'to="numpy", as jaxalign functions also accept numpy arrays, or '
                        'jax.config.update("jax_enable_x64", True) at the start of the program.'
                    )
                writers[name].append(_positions(layer, features, tokens, prefix_tokens, grid, channels, mask))
            done += count
            report(done)
        if not done:
            raise ValueError("inputs has no samples: pass at least one. (A generator can be iterated only once.)")
        for writer in writers.values():
            writer.complete()
    captured = {name: writer.result() for name, writer in writers.items()}
    return {name: jnp.asarray(features) for name, features in captured.items()} if to == "jax" else captured


# --- selection of layers ---------------------------------------------------------------------------------------------


def _select(layers: Any, names: Sequence[str], model: str) -> dict[str, str]:
    """{name in the result: layer}, in the model's order."""
    # Numbers alone are no descriptive names in reports, so they are prefixed with the class of the model.
    full = {f"{model}.{name}" if re.fullmatch(r"\d+(\.\d+)*", name) else name: name for name in names}
    if isinstance(layers, Mapping):
        return {str(name): _one_layer(layer, full) for name, layer in layers.items()}
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError(f"layers is empty. {_list_layers(names)}")
    chosen = set(itertools.chain.from_iterable(_matching(pattern, full) for pattern in patterns))
    return {label: name for label, name in full.items() if name in chosen}


def _one_layer(layer: Any, full: Mapping[str, str]) -> str:
    matches = _matching(layer, full)
    if len(matches) > 1:
        raise ValueError(f"layers: {layer!r} matches {len(matches)} layers; a dict needs one layer per name.")
    return matches[0]


def _matching(pattern: Any, full: Mapping[str, str]) -> list[str]:
    """The layers whose name, or whose name in results, matches a pattern; `full` is {name in results: layer}."""
    if not isinstance(pattern, str):
        raise TypeError(f"layers must be names or patterns; got {shown(pattern)} of type {type(pattern).__name__}.")
    names = list(full.values())
    for labels in (names, full):
        if pattern in labels:
            return [full.get(pattern, pattern)]
    parts = re.split(r"(\*\*|\*)", pattern)
    regular = "".join({"**": ".*", "*": "[^.]*"}.get(part, re.escape(part)) for part in parts)
    matches = [name for label, name in full.items() if name and any(re.fullmatch(regular, s) for s in (name, label))]
    if not matches:
        close = difflib.get_close_matches(pattern, names, 5)
        hint = f" Close to it: {', '.join(map(repr, close))}." if close else ""
        raise ValueError(f"layers: the model has no layer {pattern!r}.{hint} {_list_layers(names)}")
    return matches


def _list_layers(names: Sequence[str]) -> str:
    """A sentence with all layers, with consecutive numbers abbreviated: 'blocks.{0..11}.attn'."""
    numbers: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        if name:
            shape = re.sub(r"(?<![^.])\d+(?![^.])", "{}", name)
            numbers.setdefault(shape, []).append(tuple(map(int, re.findall(r"(?<![^.])\d+(?![^.])", name))))
    patterns = []
    for shape, indices in numbers.items():
        spans = [f"{min(k)}" if min(k) == max(k) else f"{{{min(k)}..{max(k)}}}" for k in zip(*indices, strict=True)]
        patterns.append(shape.format(*spans))
    more = f", and {len(patterns) - 200} more" if len(patterns) > 200 else ""
    return f"Its layers are {', '.join(patterns[:200])}{more}; '' is the output of the model."


# --- inputs, batch by batch ------------------------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")


def _is_batch(value: Any) -> bool:
    """Whether a value is one batch: an array, or a mapping or tuple with arrays."""
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
    # A DataLoader returns lists for the tuples of a dataset.
    batches = (tuple(batch) if isinstance(batch, list) else batch for batch in inputs)
    return _only_batches(batches), getattr(getattr(inputs, "dataset", None), "__len__", lambda: -1)()


def _refuse_random_order(inputs: Any) -> None:
    """Raise for a torch DataLoader that shuffles: row i would be a different sample for each network."""
    data = sys.modules.get("torch.utils.data")
    if data is None or not isinstance(inputs, data.DataLoader) or isinstance(inputs.dataset, data.IterableDataset):
        return
    samplers = [inputs.batch_sampler, inputs.sampler]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]  # a BatchSampler has a sampler
    random = next((sampler for sampler in samplers if sampler is not None and _is_random(data, sampler)), None)
    defect = "" if random is None else f"a DataLoader that shuffles ({type(random).__name__})"
    if not defect and inputs.num_workers and not getattr(inputs, "in_order", True):
        defect = "a DataLoader whose workers return batches in any order (in_order=False)"
    if defect:
        raise ValueError(
            f"inputs is {defect}: row i would be a different sample for each network. Use shuffle=False and no "
            "random sampler; for random samples, draw them once: torch.utils.data.Subset(dataset, indices)."
        )


def _is_random(data: Any, sampler: Any) -> bool:
    """Whether a sampler has a different order each time, as far as that can be determined."""
    if isinstance(sampler, (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)):
        return True
    if isinstance(sampler, data.DistributedSampler):
        return sampler.shuffle
    if type(sampler) in (data.SequentialSampler, data.BatchSampler) or isinstance(sampler, Iterator):
        return False
    # Other samplers: compare the beginnings of two iterations. The random state of torch is restored.
    with sys.modules["torch"].random.fork_rng(devices=[]):
        first, second = (list(map(str, itertools.islice(iter(sampler), _COMPARED))) for _ in range(2))
    return first != second


def _only_batches(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if not _is_batch(batch):
            raise TypeError(
                f"batches of inputs must be tensors, or dicts or tuples of tensors; got {type(batch).__name__}. "
                "Preprocess images and texts for the model first."
            )
        yield batch


def _token_mask(mask: np.ndarray) -> np.ndarray:
    if mask.dtype.kind not in "biu":
        raise ValueError(
            f"attention_mask must be integer or boolean, nonzero for valid tokens; got {mask.dtype}. Keep all tokens "
            'with tokens="all", and pool them yourself.'
        )
    return mask.astype(bool)


# --- outputs ---------------------------------------------------------------------------------------------------------


def _check_shape(layer: str, features: np.ndarray, count: int) -> np.ndarray:
    if not 2 <= features.ndim <= 4 or features.shape[0] != count:
        raise ValueError(
            f"layer {layer!r} returned shape {features.shape} for {count} samples; it must be (samples, d), (samples, "
            "tokens, d) or a map of four dimensions. Choose another layer (samples are not the first axis in windowed "
            "attention, nor where the batch is the second axis), or reshape the output with output=lambda value: ..."
        )
    return features


def _positions(
    layer: str,
    features: np.ndarray,
    tokens: str,
    prefix: int,
    grid: tuple[int, int] | None,
    channels: str,
    mask: np.ndarray | None,
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
            mask = None if mask is None else mask[:, prefix:]
        side = round(features.shape[1] ** 0.5)
        shape = (side, side)
    if grid is not None and tokens != "first":
        if shape[0] * shape[1] != features.shape[1] or not features.shape[1]:
            raise ValueError(
                f"layer {layer!r} has {features.shape[1]} tokens after {prefix} prefix tokens, which is not a "
                "square number, so they do not form a grid: pass prefix_tokens= (1 for a class token, more with "
                "registers)."
            )
        features = _resampled(features.reshape(len(features), *shape, -1), grid)
    if tokens == "all":
        return features
    if not features.shape[1]:
        raise ValueError(
            f"layer {layer!r} has no tokens beyond its {prefix} prefix tokens: use a smaller prefix_tokens."
        )
    if mask is None or mask.shape != features.shape[:2] or is_map or grid is not None:
        mask = np.ones(features.shape[:2], bool)
    if not mask.any(1).all():
        raise ValueError(f"layer {layer!r}: attention_mask has a sample without any valid token.")
    if tokens in ("first", "last"):
        index = mask.argmax(1) if tokens == "first" else mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        return features[np.arange(len(features)), index]
    weights = mask[..., None]
    if tokens == "max":
        return np.where(weights, features, -np.inf).max(1)
    total = np.sum(np.where(weights, features, 0), 1, dtype=np.float64)
    return (total / weights.sum(1)).astype(features.dtype)


def _resampled(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Maps (samples, h, w, d) resampled to another grid, (samples, cells, d) in row-major order."""
    shape = (len(maps), *grid, maps.shape[-1])
    if maps.shape != shape:
        with jax.enable_x64(maps.dtype == np.float64):
            maps = np.asarray(jax.image.resize(maps, shape, "bilinear", antialias=True))
    return maps.reshape(len(maps), grid[0] * grid[1], -1)


class _Writer:
    """Collects rows batch by batch, in memory or in a .npy file that gets its name once it is complete."""

    def __init__(self, name: str, folder: str | Path | None, stem: str) -> None:
        self.name = name
        self.parts: list[np.ndarray] = []
        self.count = 0
        self.like: tuple[tuple[int, ...], Any] | None = None
        self.path = None if folder is None else Path(folder) / f"{stem}.npy"

    def __enter__(self) -> _Writer:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                raise FileExistsError(f"{self.path} exists: remove it, or pass another folder as out=.")
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
                f"{self.name!r} has features of shape {like[0]} in one batch and {self.like[0]} in others: resize all "
                'inputs to one size, or use tokens="mean" or grid=.'
            )
        self.count += len(rows)
        if self.path is None:
            self.parts.append(rows)
        else:
            self.file.write(np.ascontiguousarray(rows).tobytes())

    def _header(self) -> None:
        # The header keeps its length, as numpy reserves space for the first axis to grow.
        assert self.like is not None
        shape, dtype = self.like
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.count, *shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

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
