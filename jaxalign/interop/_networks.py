"""Framework-specific code that records the outputs of layers of torch, Flax and Equinox models.

Each function `_of_...` returns a `Network`. A framework is used only if the caller has imported it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._repr import shown
from jaxalign.io import natural

Run = Callable[[Any], dict[str, np.ndarray]]  # from a batch to the output of each recorded layer


@dataclass(frozen=True)
class Network:
    """The names of the layers, the channel axis of maps, and a context in which layers are recorded."""

    names: Sequence[str]
    channel_axis: str
    recording: Callable[[tuple[str, ...]], AbstractContextManager[Run]]


def network_of(model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    """The `Network` of a model of any supported framework."""
    for framework, kind, make in (
        ("torch", lambda module: module.nn.Module, _of_torch),
        ("flax.nnx", lambda module: module.Module, _of_nnx),
        ("flax.linen", lambda module: module.Module, _of_linen),
        ("equinox", lambda module: module.Module, _of_equinox),
    ):
        # The framework of a model is imported before the model is made.
        module = sys.modules.get(framework)
        if module is not None and isinstance(model, kind(module)):
            return make(module, model, output, forward)
    raise TypeError(
        "model must be a torch.nn.Module, a flax.nnx.Module, a bound flax.linen.Module or an equinox.Module; got "
        f"{type(model).__module__}.{type(model).__qualname__}."
    )


def on_host(value: Any) -> np.ndarray:
    """A tensor or array of any framework as a numpy array; half precision becomes float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
        return value.numpy()
    array = np.asarray(value)
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) and array.itemsize < 4 else array


def _select_tensor(layer: str, value: Any, output: Any, is_tensor: Callable[[Any], bool]) -> Any:
    """The tensor to record from the output of a layer."""
    if callable(output):
        value = output(value)
    elif output is not None:
        try:
            value = value[output]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"layer {layer!r} has no part {shown(output)} in its output, {_describe(value)} ({error}): "
                "choose another part with output=."
            ) from None
    if isinstance(value, Mapping):  # includes the outputs of transformers
        tensors = {key: part for key, part in value.items() if is_tensor(part)}
        if "last_hidden_state" not in tensors and len(tensors) != 1:
            raise ValueError(f"layer {layer!r} returns {_describe(value)}: choose a part with output=.")
        value = tensors.get("last_hidden_state", next(iter(tensors.values())))
    elif isinstance(value, (tuple, list)):
        value = next((part for part in value if is_tensor(part)), value)
    if not is_tensor(value):
        raise TypeError(
            f"layer {layer!r} returns {_describe(value)}, not a floating-point tensor: choose another layer, or a part "
            "of the output with output=."
        )
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(f'{key!r}: {_describe(part)}' for key, part in value.items())}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(map(_describe, value))})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _forward(forward: Callable[[Any, Any], Any] | None, model: Callable[..., Any], batch: Any) -> Any:
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, tuple):
        return model(batch)
    try:
        return model(*batch)
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        raise TypeError(
            f"the model was called with all {len(batch)} parts of a batch ({error}). If the second is a label, pass "
            "forward=lambda model, batch: model(batch[0])."
        ) from error


class _Record:
    """The output of each layer in one forward pass, and its number of calls."""

    def __init__(self, layers: Sequence[str], choose: Callable[[str, Any], Any]) -> None:
        self.layers, self.choose = layers, choose
        self.calls: Counter[str] = Counter()
        self.outputs: dict[str, Any] = {}

    def add(self, layer: str, value: Any) -> None:
        self.calls[layer] += 1
        self.outputs[layer] = self.choose(layer, value)

    def result(self) -> dict[str, Any]:
        """The outputs; raises unless each layer was called once."""
        for layer in self.layers:
            if self.calls[layer] == 0:
                raise ValueError(
                    f"layer {layer!r} exists, but the forward pass did not call it (it may be a container, compiled, "
                    "scanned over, or not used for these inputs): choose a layer around it, or call the model in "
                    "another way with forward=."
                )
            if self.calls[layer] > 1:
                raise ValueError(
                    f"layer {layer!r} is called {self.calls[layer]} times in one forward pass, so it has no single "
                    "output: choose a layer around it."
                )
        return self.outputs


# --- torch -----------------------------------------------------------------------------------------------------------


def _of_torch(torch: Any, model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "layers of a TorchScript model cannot be recorded: pass the torch.nn.Module that it was made from."
        )
    # Modules that can be called: no ModuleList or ModuleDict. Compiled modules have `forward` as an instance attribute.
    unimplemented = torch.nn.Module.forward
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if "forward" in vars(module) or type(module).forward is not unimplemented
    }

    def is_tensor(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    def to_device(batch: Any) -> Any:
        device = next((p.device for p in [*model.parameters(), *model.buffers()]), torch.device("cpu"))

        def move(value: Any) -> Any:
            if isinstance(value, (np.ndarray, jax.Array)):
                value = torch.from_numpy(np.array(value))
            return value.to(device) if isinstance(value, torch.Tensor) else value

        if isinstance(batch, Mapping):
            return {key: move(value) for key, value in batch.items()}
        return tuple(map(move, batch)) if isinstance(batch, tuple) else move(batch)

    @contextmanager
    def recording(layers: tuple[str, ...]) -> Generator[Run, None, None]:
        records: list[_Record] = []
        hooks = []
        training = [(module, module.training) for module in model.modules()]

        def add_hook(layer: str) -> None:
            def hook(module: Any, args: Any, value: Any) -> None:
                if records:
                    records[-1].add(layer, value)

            hooks.append(modules[layer].register_forward_hook(hook))

        def run(batch: Any) -> dict[str, np.ndarray]:
            # Copied at once, as a later layer may write into the tensor in place.
            def choose(layer: str, value: Any) -> np.ndarray:
                return on_host(_select_tensor(layer, value, output, is_tensor)).copy()

            record = _Record(layers, choose)
            records[:] = [record]
            with torch.no_grad():
                _forward(forward, model, to_device(batch))
            return record.result()

        try:
            # Not model.eval(), which some models override to change their weights.
            for module, _ in training:
                module.training = False
            for layer in layers:
                add_hook(layer)
            yield run
        finally:
            for hook in hooks:
                hook.remove()
            for module, is_training in training:
                module.training = is_training

    return Network(list(modules), "first", recording)


# --- jax -------------------------------------------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)


def _of_jax(
    names: Sequence[str], weights: Any, run_recorded: Callable[..., None], output: Any, channel_axis: str = "last"
) -> Network:
    """A network of a JAX framework, whose compiled forward pass returns the recorded outputs.

    `run_recorded(weights, layers, record, batch)` runs the network; weights are arguments, as constants compile slowly.
    """

    @contextmanager
    def recording(layers: tuple[str, ...]) -> Generator[Run, None, None]:
        @partial(jax.jit, static_argnums=(2, 3))
        def compiled(weights: Any, arrays: list[Any], structure: Any, rest: tuple[Any, ...]) -> dict[str, jax.Array]:
            record = _Record(layers, lambda layer, value: _select_tensor(layer, value, output, _is_array))
            remaining = iter(arrays)
            leaves = [next(remaining) if constant is None else constant[0] for constant in rest]
            run_recorded(weights, layers, record, jax.tree.unflatten(structure, leaves))
            return record.result()

        def run(batch: Any) -> dict[str, np.ndarray]:
            leaves, structure = jax.tree.flatten(dict(batch) if isinstance(batch, Mapping) else batch)
            leaves = [on_host(leaf) if hasattr(leaf, "detach") else leaf for leaf in leaves]
            arrays = [leaf for leaf in leaves if hasattr(leaf, "shape")]
            rest = tuple(None if hasattr(leaf, "shape") else (leaf,) for leaf in leaves)  # such as flags
            try:
                outputs = compiled(weights, arrays, structure, rest)
            except jax.errors.UnexpectedTracerError:
                raise ValueError(
                    f"one of the layers {', '.join(map(repr, layers))} is called inside a transformation (vmap, remat, "
                    "scan, jit), where its output cannot be recorded: choose layers around it."
                ) from None
            return {layer: on_host(value) for layer, value in outputs.items()}

        yield run

    return Network(names, channel_axis, recording)


@contextmanager
def _wrapped_classes(modules: Mapping[str, Any], record: _Record) -> Generator[None, None, None]:
    """A context that records calls of these modules, by wrapping `__call__` of their classes."""
    layers: dict[int, list[str]] = {}
    for layer, module in modules.items():
        layers.setdefault(id(module), []).append(layer)
    kinds = {type(module) for module in modules.values()}
    # Collected before any class is wrapped, as one may inherit from another.
    calls = {kind: call for kind in kinds if callable(call := getattr(kind, "__call__", None))}  # noqa: B004
    originals = {kind: kind.__dict__.get("__call__") for kind in calls}
    running: set[int] = set()

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) in running:  # the call of a parent class, from the call of its subclass
                return call(self, *args, **kwargs)
            running.add(id(self))
            try:
                value = call(self, *args, **kwargs)
            finally:
                running.discard(id(self))
            for layer in layers.get(id(self), ()):
                record.add(layer, value)
            return value

        return recorded

    try:
        for kind, call in calls.items():
            kind.__call__ = wrap(call)
        yield
    finally:
        for kind, call in originals.items():
            if call is None:
                del kind.__call__  # type: ignore[attr-defined]  # it was inherited
            else:
                kind.__call__ = call


def _of_nnx(nnx: Any, model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    def modules_of(root: Any) -> dict[str, Any]:
        paths = nnx.iter_modules(root)
        return {".".join(map(str, path)): module for path, module in paths if callable(module)}

    graph, state = nnx.split(model)
    names = sorted(modules_of(model), key=natural)

    def run_recorded(state: Any, layers: tuple[str, ...], record: _Record, batch: Any) -> None:
        # A copy for this trace, so that changes of the state (running means) are dropped.
        copy = nnx.merge(graph, state)
        copy.eval()
        modules = modules_of(copy)
        with _wrapped_classes({layer: modules[layer] for layer in layers}, record):
            _forward(forward, copy, batch)

    return _of_jax(names, state, run_recorded, output)


def _of_equinox(equinox: Any, model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    arrays, rest = equinox.partition(equinox.nn.inference_mode(model), equinox.is_array)

    def run_recorded(arrays: Any, layers: tuple[str, ...], record: _Record, batch: Any) -> None:
        module = equinox.combine(arrays, rest)
        modules = dict(_equinox_modules(equinox, module, ""))

        leaves, structure = jax.tree.flatten(batch)
        mapped = [jnp.ndim(leaf) > 0 for leaf in leaves]  # scalars are shared by all samples

        def run_sample(sample: list[Any]) -> dict[str, Any]:
            sample_record = _Record(layers, record.choose)
            remaining = iter(sample)
            inputs = [next(remaining) if is_mapped else leaf for is_mapped, leaf in zip(mapped, leaves, strict=True)]
            with _wrapped_classes({layer: modules[layer] for layer in layers}, sample_record):
                _forward(forward, module, jax.tree.unflatten(structure, inputs))
            return sample_record.result()

        samples = [leaf for is_mapped, leaf in zip(mapped, leaves, strict=True) if is_mapped]
        for layer, value in jax.vmap(run_sample)(samples).items():
            record.add(layer, value)

    names = [name for name, _ in _equinox_modules(equinox, model, "")]
    return _of_jax(names, arrays, run_recorded, output, "first")  # the channel axis of its convolutions


def _equinox_modules(equinox: Any, node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, equinox.Module) and callable(node):
        yield name, node
    if is_dataclass(node) and not isinstance(node, type):
        parts = [(field.name, getattr(node, field.name, None)) for field in fields(node)]
    elif isinstance(node, Mapping):
        parts = list(node.items())
    else:
        parts = list(enumerate(node)) if isinstance(node, (tuple, list)) else []
    for key, part in parts:
        yield from _equinox_modules(equinox, part, f"{name}.{key}" if name else str(key))


def _of_linen(linen: Any, model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    if model.scope is None:
        raise TypeError("a Linen module does not hold its parameters: pass module.bind(variables).")
    module, variables = model.unbind()

    def run_recorded(variables: Any, layers: tuple[str, ...], record: _Record, batch: Any) -> None:
        def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            value = call(*args, **kwargs)
            layer = ".".join(context.module.path)
            if context.method_name == "__call__" and layer in layers:
                record.add(layer, value)
            return value

        # Mutable, so that running means can change, in a copy that is dropped.
        bound = module.bind(variables, mutable=True)
        with linen.intercept_methods(interceptor):
            _forward(forward, bound, batch)

    # Layers are found by their parameters, so layers without parameters have no name.
    names = {""}
    for path, _ in jax.tree_util.tree_flatten_with_path(dict(variables))[0]:
        parts = [str(getattr(key, "key", key)) for key in path[1:-1]]
        names |= {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
    return _of_jax(sorted(names, key=natural), variables, run_recorded, output)
