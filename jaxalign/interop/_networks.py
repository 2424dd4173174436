"""What a framework does differently when one listens to the layers of its networks.

Each function `_of_...` gives the same thing, a `Network`. The frameworks are imported only where a model of theirs
is at hand.
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

from jaxalign import _checks
from jaxalign.io import natural

Run = Callable[[Any], dict[str, np.ndarray]]  # from a batch to the output of each layer listened to


@dataclass(frozen=True)
class Network:
    """Its layers by name, where maps have their channels, and how to listen to some of the layers."""

    names: Sequence[str]
    channel_axis: str
    listening: Callable[[tuple[str, ...]], AbstractContextManager[Run]]


def network_of(model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    """The network that a model of any framework known here is."""
    for framework, kind, make in (
        ("torch", lambda module: module.nn.Module, _of_torch),
        ("flax.nnx", lambda module: module.Module, _of_nnx),
        ("flax.linen", lambda module: module.Module, _of_linen),
        ("equinox", lambda module: module.Module, _of_equinox),
    ):
        # A model of a framework that was never imported cannot be at hand.
        module = sys.modules.get(framework)
        if module is not None and isinstance(model, kind(module)):
            return make(module, model, output, forward)
    raise TypeError(
        "model must be a torch.nn.Module, a flax.nnx.Module, a bound flax.linen.Module or an equinox.Module; got "
        f"{type(model).__module__}.{type(model).__qualname__}."
    )


def on_host(value: Any) -> np.ndarray:
    """A tensor or array of any of the frameworks, in numpy; half precision as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
        return value.numpy()
    array = np.asarray(value)
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) and array.itemsize < 4 else array


def _chosen(layer: str, value: Any, output: Any, is_tensor: Callable[[Any], bool]) -> Any:
    """The tensor that is meant, where a layer puts out several."""
    if callable(output):
        value = output(value)
    elif output is not None:
        try:
            value = value[output]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"layer {layer!r}: there is no part {_checks.shown(output)} in its output, {_told(value)} ({error})."
            ) from None
    if isinstance(value, Mapping):  # also the outputs of transformers
        tensors = {key: part for key, part in value.items() if is_tensor(part)}
        if "last_hidden_state" not in tensors and len(tensors) != 1:
            raise ValueError(f"layer {layer!r} puts out {_told(value)}: say which with output=.")
        value = tensors.get("last_hidden_state", next(iter(tensors.values())))
    elif isinstance(value, (tuple, list)):
        value = next((part for part in value if is_tensor(part)), value)
    if not is_tensor(value):
        raise TypeError(
            f"layer {layer!r} puts out {_told(value)}, not a floating-point tensor: name another layer, or the part "
            "with output=."
        )
    return value


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(f'{key!r}: {_told(part)}' for key, part in value.items())}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(map(_told, value))})"
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
            f"the model gets all {len(batch)} parts of a batch ({error}). Where the second is a label, write "
            "forward=lambda model, batch: model(batch[0])."
        ) from error


class _Heard:
    """The output of each layer in one forward pass, and how often it was called."""

    def __init__(self, layers: Sequence[str], choose: Callable[[str, Any], Any]) -> None:
        self.layers, self.choose = layers, choose
        self.calls: Counter[str] = Counter()
        self.outputs: dict[str, Any] = {}

    def hear(self, layer: str, value: Any) -> None:
        self.calls[layer] += 1
        self.outputs[layer] = self.choose(layer, value)

    def once(self) -> dict[str, Any]:
        """The outputs; raises unless every layer was called once."""
        for layer in self.layers:
            if self.calls[layer] == 0:
                raise ValueError(
                    f"layer {layer!r} exists, but the forward pass did not call it (a container, a part that these "
                    "inputs leave out, one that is compiled or scanned over): name the layers around it, or call the "
                    "model in another way with forward=."
                )
            if self.calls[layer] > 1:
                raise ValueError(
                    f"layer {layer!r} is called {self.calls[layer]} times in one forward pass, so it has no single "
                    "output: name a layer around it."
                )
        return self.outputs


# --- torch -----------------------------------------------------------------------------------------------------------


def _of_torch(torch: Any, model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a TorchScript model cannot be listened to: give the torch.nn.Module that it was made from.")
    # Those that can be called: not the lists and dicts of modules. Of a compiled one `forward` is the instance's own.
    unimplemented = torch.nn.Module.forward
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if "forward" in vars(module) or type(module).forward is not unimplemented
    }

    def is_tensor(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    def send(batch: Any) -> Any:
        place = next((p.device for p in [*model.parameters(), *model.buffers()]), torch.device("cpu"))

        def one(value: Any) -> Any:
            if isinstance(value, (np.ndarray, jax.Array)):
                value = torch.from_numpy(np.array(value))
            return value.to(place) if isinstance(value, torch.Tensor) else value

        if isinstance(batch, Mapping):
            return {key: one(value) for key, value in batch.items()}
        return tuple(map(one, batch)) if isinstance(batch, tuple) else one(batch)

    @contextmanager
    def listening(layers: tuple[str, ...]) -> Generator[Run, None, None]:
        heard: list[_Heard] = []
        hooks = []
        training = [(module, module.training) for module in model.modules()]

        def listen(layer: str) -> None:
            def hook(module: Any, args: Any, value: Any) -> None:
                if heard:
                    heard[-1].hear(layer, value)

            hooks.append(modules[layer].register_forward_hook(hook))

        def run(batch: Any) -> dict[str, np.ndarray]:
            # Half a copy to the host at once: what a later layer writes in place must not show.
            here = _Heard(layers, lambda layer, value: on_host(_chosen(layer, value, output, is_tensor)).copy())
            heard[:] = [here]
            with torch.no_grad():
                _forward(forward, model, send(batch))
            return here.once()

        try:
            # Not model.eval(), which some models take as a sign to change their weights.
            for module, _ in training:
                module.training = False
            for layer in layers:
                listen(layer)
            yield run
        finally:
            for hook in hooks:
                hook.remove()
            for module, was in training:
                module.training = was

    return Network(list(modules), "first", listening)


# --- jax -------------------------------------------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)


def _of_jax(
    names: Sequence[str], weights: Any, listen: Callable[..., None], output: Any, channel_axis: str = "last"
) -> Network:
    """A network of a framework of jax, whose forward pass is compiled with what is heard in it as its result.

    `listen(weights, layers, heard, batch)` runs the network; weights are arguments, as constants take long to compile.
    """

    @contextmanager
    def listening(layers: tuple[str, ...]) -> Generator[Run, None, None]:
        @partial(jax.jit, static_argnums=(2, 3))
        def compiled(weights: Any, arrays: list[Any], structure: Any, rest: tuple[Any, ...]) -> dict[str, jax.Array]:
            heard = _Heard(layers, lambda layer, value: _chosen(layer, value, output, _is_array))
            given = iter(arrays)
            batch = jax.tree.unflatten(structure, [next(given) if one is None else one[0] for one in rest])
            listen(weights, layers, heard, batch)
            return heard.once()

        def run(batch: Any) -> dict[str, np.ndarray]:
            leaves, structure = jax.tree.flatten(dict(batch) if isinstance(batch, Mapping) else batch)
            leaves = [on_host(leaf) if hasattr(leaf, "detach") else leaf for leaf in leaves]
            arrays = [leaf for leaf in leaves if hasattr(leaf, "shape")]
            rest = tuple(None if hasattr(leaf, "shape") else (leaf,) for leaf in leaves)  # flags and the like
            try:
                found = compiled(weights, arrays, structure, rest)
            except jax.errors.UnexpectedTracerError:
                raise ValueError(
                    f"one of the layers {', '.join(map(repr, layers))} is called inside a transformation (vmap, remat, "
                    "scan, jit), where its output cannot be taken out: name the layers around it."
                ) from None
            return {layer: on_host(value) for layer, value in found.items()}

        yield run

    return Network(names, channel_axis, listening)


@contextmanager
def _heard_by_class(modules: Mapping[str, Any], heard: _Heard) -> Generator[None, None, None]:
    """While inside, calls of these very objects are heard: `__call__` belongs to a class, so the class is wrapped."""
    layers: dict[int, list[str]] = {}
    for layer, module in modules.items():
        layers.setdefault(id(module), []).append(layer)
    kinds = {type(module) for module in modules.values()}
    # All before any is wrapped: one may be a parent of another.
    calls = {kind: call for kind in kinds if callable(call := getattr(kind, "__call__", None))}  # noqa: B004
    own = {kind: kind.__dict__.get("__call__") for kind in calls}
    running: set[int] = set()

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def hearing(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) in running:  # its parent's, which it calls itself
                return call(self, *args, **kwargs)
            running.add(id(self))
            try:
                value = call(self, *args, **kwargs)
            finally:
                running.discard(id(self))
            for layer in layers.get(id(self), ()):
                heard.hear(layer, value)
            return value

        return hearing

    try:
        for kind, call in calls.items():
            kind.__call__ = wrapped(call)
        yield
    finally:
        for kind, call in own.items():
            if call is None:
                del kind.__call__  # type: ignore[attr-defined]  # it was a parent's
            else:
                kind.__call__ = call


def _of_nnx(nnx: Any, model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    def modules_of(root: Any) -> dict[str, Any]:
        found = nnx.iter_modules(root)
        return {".".join(map(str, path)): module for path, module in found if callable(module)}

    graph, state = nnx.split(model)
    names = sorted(modules_of(model), key=natural)

    def listen(state: Any, layers: tuple[str, ...], heard: _Heard, batch: Any) -> None:
        # A copy of this trace's own: what a layer changes in itself (running means) is dropped with it.
        own = nnx.merge(graph, state)
        own.eval()
        modules = modules_of(own)
        with _heard_by_class({layer: modules[layer] for layer in layers}, heard):
            _forward(forward, own, batch)

    return _of_jax(names, state, listen, output)


def _of_equinox(equinox: Any, model: Any, output: Any, forward: Callable[[Any, Any], Any] | None) -> Network:
    arrays, rest = equinox.partition(equinox.nn.inference_mode(model), equinox.is_array)

    def listen(arrays: Any, layers: tuple[str, ...], heard: _Heard, batch: Any) -> None:
        own = equinox.combine(arrays, rest)
        modules = dict(_equinox_modules(equinox, own, ""))

        leaves, structure = jax.tree.flatten(batch)
        mapped = [jnp.ndim(leaf) > 0 for leaf in leaves]  # the others are of all samples

        def of_one(sample: list[Any]) -> dict[str, Any]:
            here = _Heard(layers, heard.choose)
            given = iter(sample)
            whole = [next(given) if one else leaf for one, leaf in zip(mapped, leaves, strict=True)]
            with _heard_by_class({layer: modules[layer] for layer in layers}, here):
                _forward(forward, own, jax.tree.unflatten(structure, whole))
            return here.once()

        some = [leaf for one, leaf in zip(mapped, leaves, strict=True) if one]
        for layer, value in jax.vmap(of_one)(some).items():
            heard.hear(layer, value)

    names = [name for name, _ in _equinox_modules(equinox, model, "")]
    return _of_jax(names, arrays, listen, output, "first")  # as its convolutions have them


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
        raise TypeError("a Linen module has no parameters of its own: give module.bind(variables).")
    module, variables = model.unbind()

    def listen(variables: Any, layers: tuple[str, ...], heard: _Heard, batch: Any) -> None:
        def listener(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            value = call(*args, **kwargs)
            layer = ".".join(context.module.path)
            if context.method_name == "__call__" and layer in layers:
                heard.hear(layer, value)
            return value

        # Mutable, so that running means may change: in a copy that is dropped.
        own = module.bind(variables, mutable=True)
        with linen.intercept_methods(listener):
            _forward(forward, own, batch)

    # Which layers there are shows in the parameters: those without any have no name here.
    names = {""}
    for path, _ in jax.tree_util.tree_flatten_with_path(dict(variables))[0]:
        parts = [str(getattr(key, "key", key)) for key in path[1:-1]]
        names |= {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
    return _of_jax(sorted(names, key=natural), variables, listen, output)
