"""from_torch and to_torch: values, dtypes, shared memory, pytrees, what is refused; what the rest says to tensors."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign.interop import from_torch, to_torch

if importlib.util.find_spec("torch") is None and sys.version_info[:2] == (3, 11) and os.environ.get("CI"):
    raise ImportError("torch is missing: CI tests the bridge on Python 3.11, install jaxalign[test]")

torch = pytest.importorskip("torch", reason='torch is missing: python -m pip install "jaxalign[torch]"')

FLOATS = ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "complex64"]
NARROW = [*FLOATS, "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool"]
WIDE = {"float64": "float()", "complex128": "to(torch.complex64)", "int64": "int()", "uint64": "to(torch.uint32)"}


def values(dtype):
    """Twelve values that every dtype holds exactly, as a tensor of shape (3, 4)."""
    return (torch.arange(12).reshape(3, 4) % 5).to(getattr(torch, dtype))


def aligned(*shape):
    """A float32 tensor whose memory starts at a multiple of 64 bytes."""
    number = int(np.prod(shape))
    raw = torch.arange(number + 16, dtype=torch.float32)
    start = -raw.data_ptr() % 64 // 4
    return raw[start : start + number].reshape(shape)


def as_float(array):
    return np.asarray(array).astype(np.complex128 if np.iscomplexobj(array) else np.float64)


# --- values, shapes and dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_every_dtype_goes_there_and_back(dtype, copy):
    tensor = values(dtype)
    array = from_torch(tensor, copy=copy)
    back = to_torch(array, copy=copy)
    assert isinstance(array, jax.Array)
    assert array.dtype.name == dtype
    assert array.shape == (3, 4)
    assert back.dtype == tensor.dtype
    np.testing.assert_array_equal(as_float(array), tensor.to(torch.complex128).numpy())
    assert torch.equal(back.to(torch.complex64), tensor.to(torch.complex64))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", WIDE)
def test_wide_dtypes_go_there_and_back_once_jax_is_set_to_64_bits(dtype):
    tensor = values(dtype)
    array = from_torch(tensor)
    assert array.dtype.name == dtype
    assert to_torch(array).dtype == tensor.dtype
    np.testing.assert_array_equal(np.asarray(array), tensor.numpy())


@pytest.mark.parametrize("dtype", WIDE)
def test_wide_dtypes_are_refused_while_jax_is_set_to_32_bits(dtype):
    message = rf"^the tensor is torch\.{dtype}, but JAX uses 32 bits .*jax_enable_x64.*or tensor\."
    with pytest.raises(TypeError, match=message) as caught:
        from_torch(values(dtype))
    assert str(caught.value).endswith(f"tensor.{WIDE[dtype]}.")
    narrowed = eval(f"tensor.{WIDE[dtype]}", {"tensor": values(dtype), "torch": torch})
    assert from_torch(narrowed).shape == (3, 4)  # what the message says works


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2), (1,), (2, 3, 4, 5)])
def test_every_shape_goes_there_and_back(shape):
    tensor = torch.ones(shape)
    assert from_torch(tensor).shape == shape
    assert to_torch(from_torch(tensor)).shape == shape
    assert to_torch(jnp.ones(shape)).shape == shape


def test_nan_inf_and_minus_zero_survive():
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    array = from_torch(tensor)
    np.testing.assert_array_equal(array, tensor.numpy())
    assert np.signbit(np.asarray(array)[3])


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, 1::2],
        lambda t: t[::2],
        lambda t: t.flip(0),
        lambda t: t[:1].expand(5, 4),
        lambda t: t.permute(1, 0)[None],
    ],
    ids=["transposed", "every second column", "every second row", "flipped", "expanded", "permuted"],
)
def test_views_that_are_not_contiguous_have_the_values_of_the_view(view):
    tensor = view(values("float32"))
    np.testing.assert_array_equal(from_torch(tensor), tensor.numpy())


def test_lazily_conjugated_and_negated_views_are_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    assert tensor.conj().is_conj()
    np.testing.assert_array_equal(from_torch(tensor.conj()), [1 - 2j, 3 + 4j])
    assert tensor.conj().imag.is_neg()
    np.testing.assert_array_equal(from_torch(tensor.conj().imag), [-2, 4])


def test_tensors_that_require_gradients_are_detached():
    leaf = torch.ones(3, requires_grad=True)
    for tensor in (leaf, 2 * leaf, torch.nn.Parameter(torch.ones(3))):
        np.testing.assert_array_equal(from_torch(tensor), tensor.detach().numpy())
        assert not to_torch(from_torch(tensor)).requires_grad


def test_subclasses_of_tensors_are_tensors():
    class Marked(torch.Tensor):
        pass

    array = from_torch({"a": torch.ones(2).as_subclass(Marked)})["a"]
    assert isinstance(array, jax.Array)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_aligned_memory_is_shared_both_ways():
    tensor = aligned(8, 8)
    assert from_torch(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
    array = jnp.arange(64.0)
    assert to_torch(array).data_ptr() == array.unsafe_buffer_pointer()
    assert to_torch(from_torch(tensor)).data_ptr() == tensor.data_ptr()


def test_memory_that_is_not_aligned_is_copied_with_the_right_values():
    tensor = aligned(65)[1:]
    array = from_torch(tensor)
    assert array.unsafe_buffer_pointer() != tensor.data_ptr()
    np.testing.assert_array_equal(array, tensor.numpy())


def test_a_copy_is_independent_of_what_it_was_copied_from():
    tensor = aligned(1000)
    expected = tensor.clone()
    array = from_torch(tensor, copy=True)
    tensor.zero_()
    np.testing.assert_array_equal(array, expected.numpy())

    array = jnp.arange(1000.0)
    copied = to_torch(array, copy=True)
    assert copied.data_ptr() != array.unsafe_buffer_pointer()
    copied.zero_()
    np.testing.assert_array_equal(array, np.arange(1000))


def test_shared_memory_outlives_the_side_that_made_it():
    tensor = aligned(1000)
    expected = tensor.numpy().copy()
    array = from_torch(tensor)
    del tensor
    gc.collect()
    junk = [torch.full((1000,), -1.0) for _ in range(50)]
    np.testing.assert_array_equal(array, expected)
    back = to_torch(array)
    del array
    gc.collect()
    junk += [torch.full((1000,), -1.0) for _ in range(50)]
    np.testing.assert_array_equal(back.numpy(), expected)


def test_results_still_being_computed_are_waited_for():
    ones = jnp.ones((300, 300))
    power = jax.jit(lambda x: x @ x @ x)(ones)
    assert torch.all(to_torch(power) == 90000)


# --- pytrees ---------------------------------------------------------------------------------------------------------


def test_containers_keep_their_shape_and_other_leaves():
    tree = {"a": [torch.ones(2), (torch.zeros(3), "text")], "b": None, "c": 3.5, "d": np.ones(2)}
    arrays = from_torch(tree)
    assert isinstance(arrays["a"], list)
    assert isinstance(arrays["a"][1], tuple)
    assert isinstance(arrays["a"][1][0], jax.Array)
    assert (arrays["a"][1][1], arrays["b"], arrays["c"], arrays["d"]) == ("text", None, 3.5, tree["d"])
    back = to_torch(arrays)
    assert torch.equal(back["a"][0], tree["a"][0])
    assert back["d"] is tree["d"]


def test_state_dicts_of_modules_convert():
    module = torch.nn.Linear(3, 2)
    arrays = from_torch(dict(module.state_dict()), copy=True)
    np.testing.assert_array_equal(arrays["weight"], module.weight.detach().numpy())


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")  # the fields are declared as jax arrays
def test_results_become_the_same_objects_with_tensors():
    x = from_torch(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    alignment = helpers.align({"a": x, "b": -x}, landmarks=8, density=0.3)
    solution = jaxalign.solve_sigma(x, density=0.3)
    found = alignment.correspondence("a", "b")
    for result, field in ((solution, "sigma"), (found, "top1"), (found, "rank"), (alignment, "landmarks")):
        converted = to_torch(result)
        assert type(converted) is type(result)
        assert isinstance(getattr(converted, field), torch.Tensor)
        np.testing.assert_array_equal(getattr(converted, field).numpy(), getattr(result, field))
    assert isinstance(to_torch(alignment).features["b"], torch.Tensor)
    back = from_torch(to_torch(solution))
    assert jax.tree.structure(back) == jax.tree.structure(solution)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.eye(2).to_sparse(), r"layout torch\.sparse_coo, dtype torch\.float32 on cpu"),
        (lambda: torch.ones(2, device="meta"), r"layout torch\.strided, dtype torch\.float32 on meta"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_without_dense_values_are_refused(make, what):
    with pytest.raises(TypeError, match=rf"^only dense tensors convert; got {what}\. Write tensor\.to_dense\(\)"):
        from_torch([make()])


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates quantized tensors
def test_quantized_tensors_are_refused():
    quantized = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"^only dense tensors convert; .*tensor\.dequantize\(\)"):
        from_torch(quantized)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap], ids=["jit", "grad", "vmap"])
def test_traced_arrays_are_refused(transform):
    with pytest.raises(
        TypeError, match=r"^a traced array has no values yet: .*\. Convert outside jit, grad and vmap\."
    ):
        transform(lambda x: to_torch(jnp.sum(x)))(jnp.ones(3))


def test_arrays_on_several_devices_are_refused_and_the_advice_works():
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device only: jax.config.update('jax_num_cpu_devices', 2) makes more")
    mesh = jax.sharding.Mesh(np.array(devices[:2]), "rows")
    spread = jax.device_put(jnp.arange(4.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))
    with pytest.raises(TypeError, match=r"^the array is spread over 2 devices; gather it first: jax\.device_put\("):
        to_torch(spread)
    assert to_torch(jax.device_put(spread, jax.devices()[0])).tolist() == [0, 1, 2, 3]


def test_dtypes_that_torch_does_not_have_are_refused():
    for array in (jnp.zeros(2, "int4"), jax.random.key(0)):
        with pytest.raises(TypeError, match=r"^torch cannot convert an array of dtype (int4|key<fry>) on "):
            to_torch(array)


def test_a_missing_torch_is_named_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for convert in (from_torch, to_torch):
        with pytest.raises(ImportError, match=r"^jaxalign\.interop needs torch: python -m pip install torch$"):
            convert(None)


# --- tensors handed to the rest of the library -----------------------------------------------------------------------


class Marked(torch.Tensor):
    """A subclass defined elsewhere than in torch."""


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3, 2), torch.nn.Parameter(torch.ones(3, 2)), torch.ones(3, 2).as_subclass(Marked)],
    ids=["tensor", "parameter", "subclass"],
)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: jaxalign.rbf_affinity(t), "x"),
        (lambda t: jaxalign.rbf_affinity(np.ones((3, 2), np.float32), t), "y"),
        (lambda t: jaxalign.rbf_affinity(np.ones((3, 2), np.float32), sigma=t), "sigma"),
        (lambda t: jaxalign.rbf_affinity(np.ones((3, 2), np.float32), density=t), "density"),
        (lambda t: jaxalign.rbf_affinity(np.ones((3, 2), np.float32), mask=t), "mask"),
        (lambda t: jaxalign.solve_sigma(t), "x"),
        (lambda t: jaxalign.squared_distances(t), "x"),
        (lambda t: helpers.align({"dino": t}), r"features\['dino'\]"),
        (lambda t: jaxalign.correspondence(t, t), "a"),
        (lambda t: jaxalign.joint_affinity([t]), r"alignment\[0\]"),
    ],
)
def test_a_tensor_is_refused_with_the_conversion_to_write(call, name, tensor):
    message = rf"^{name} is a torch tensor\. Convert it with jaxalign\.interop\.from_torch\({name}\)"
    with pytest.raises(TypeError, match=message):
        call(tensor)
