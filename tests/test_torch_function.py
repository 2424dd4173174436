"""Functions of jax as functions of torch: values, gradients of first and second order, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign.interop import torch_function, torch_losses
from jaxalign.kernels import RBF

torch = pytest.importorskip("torch")


def tensors(*shape, count=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(count)]
    return made[0] if count == 1 else made


affinity = torch_function(jaxalign.rbf_affinity)


def test_values_are_those_of_jax():
    x = tensors(30, 4, dtype=torch.float32)
    found = affinity(x, density=0.1)
    assert found.dtype == torch.float32
    assert found.requires_grad
    # Compiled as part of another program, sigma may end elsewhere within the tolerance of the density, 1e-6.
    expected = jaxalign.rbf_affinity(x.detach().numpy(), density=0.1)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5)
    assert not affinity(x.detach(), density=0.1).requires_grad
    with torch.no_grad():
        assert not affinity(x, density=0.1).requires_grad


@pytest.mark.slow
def test_gradients_of_first_and_second_order(x64):
    x = tensors(8, 3)
    options = {"density": 0.3}
    assert torch.autograd.gradcheck(lambda x: affinity(x, **options), (x,))
    assert torch.autograd.gradgradcheck(lambda x: affinity(x, **options).sum(1), (x,))


# The losses themselves are differentiated in test_losses; here one of each kind, of a number and of numbers by sample.
@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cka", "infonce"])
def test_losses_of_first_and_second_order(x64, measure):
    x, y = tensors(8, 2, count=2)

    def loss(x, y):
        return torch_losses.alignment_loss(x, y, measure=measure, kernel=RBF(density=0.4), stop_gradient_target=False)

    assert torch.autograd.gradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(loss, (x, y))


@pytest.mark.slow
def test_gradients_are_those_of_jax():
    x, y = tensors(24, 5, count=2, dtype=torch.float32)
    torch_losses.alignment_loss(x, y, kernel=RBF(density=0.2)).backward()
    total, each = torch_losses.multi_layer_loss({"a": x, "b": x[:, :2]}, {"a": y, "b": y}, weights={"a": 1.0, "b": 3.0})
    assert torch.isclose(total, each["a"] / 4 + 3 * each["b"] / 4)
    expected = jax.grad(lambda x, y: jaxalign.losses.alignment_loss(x, y, kernel=RBF(density=0.2)))(
        x.detach().numpy(), y.detach().numpy()
    )
    # Not bit by bit: the two are compiled as different programs, which may round sums in another order.
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=0, atol=3e-7 * np.abs(expected).max())
    assert y.grad is None or (y.grad == 0).all()


def test_pytrees_integers_and_masks_pass():
    @torch_function
    def fn(both, number, *, mask, scale):
        product = jnp.where(mask, both["a"] * both["b"], 0)
        return {"sum": scale * jnp.sum(product), "count": jnp.sum(mask, dtype=number.dtype) + number}

    a, b = tensors(5, count=2, dtype=torch.float32)
    mask = torch.tensor([True, True, False, True, True])
    out = fn({"a": a, "b": b}, torch.tensor(3, dtype=torch.int32), mask=mask, scale=2.0)
    assert int(out["count"]) == 7
    assert not out["count"].requires_grad
    (first,) = torch.autograd.grad(out["sum"], a, create_graph=True)
    torch.testing.assert_close(first, 2 * b * mask)
    (second,) = torch.autograd.grad(first.square().sum(), b)
    torch.testing.assert_close(second, 8 * b * mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = tensors(24, 5, dtype=torch.float32).detach().to(dtype).requires_grad_()
    found = affinity(x, density=0.2)
    assert found.dtype == torch.float32
    found.square().sum().backward()
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()


def test_any_strides_will_do():
    x = tensors(5, 24, dtype=torch.float32)
    affinity(x.T, density=0.2).square().sum().backward()
    first = x.grad.clone()
    z = x.detach().T.contiguous().requires_grad_()
    affinity(z, density=0.2).square().sum().backward()
    torch.testing.assert_close(first, z.grad.T)
    w = tensors(48, 10, dtype=torch.float32)
    affinity(w[::2, ::2], density=0.2).square().sum().backward()
    assert (w.grad[1::2] == 0).all()
    assert (w.grad[::2, ::2] != 0).any()


def test_what_is_written_to_in_between_is_noticed():
    x = tensors(24, 5, dtype=torch.float32)
    for changed in ("input", "output"):
        y = x * 1
        out = affinity(y, density=0.2)
        with torch.no_grad():
            (y if changed == "input" else out).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    y = x * 1
    total = affinity(y, density=0.2).sum()
    total.backward()
    with torch.no_grad():
        y.mul_(2)  # afterwards is fine


def test_a_step_of_torch_lowers_the_loss_and_compiles_once():
    traces = []

    @torch_function
    def loss(x, y):
        traces.append(1)
        return jaxalign.losses.alignment_loss(x, y, kernel=RBF(density=0.2))

    torch.manual_seed(0)
    x, y = (a.detach() for a in tensors(32, 5, count=2, dtype=torch.float32))
    net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    values = []
    for _ in range(80):
        optimiser.zero_grad()
        value = loss(net(x), y)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]
    assert len(traces) == 1


def test_memory_goes_from_step_to_step():
    x, y = (a.detach() for a in tensors(8, 5, count=2, dtype=torch.float32))
    queue = torch_losses.empty_queue(32, 5, 5)
    for _ in range(4):
        queue = torch_losses.push(queue, x, y)
    assert queue.valid.all()
    x.requires_grad_()
    torch_losses.alignment_loss(x, y, queue=queue).backward()
    assert torch.isfinite(x.grad).all()


def test_results_outlive_what_they_came_from():
    found = [affinity(tensors(24, 5, dtype=torch.float32, seed=k), density=0.2).detach() for k in range(20)]
    for k, a in enumerate(found):
        again = affinity(tensors(24, 5, dtype=torch.float32, seed=k), density=0.2)
        torch.testing.assert_close(a, again.detach(), rtol=0, atol=0)


@pytest.mark.usefixtures("unchecked_types")
def test_what_is_refused():
    x = tensors(24, 5, dtype=torch.float32)
    cases = [
        (lambda: affinity(x.double()), TypeError, "32 bits"),
        (lambda: affinity(torch.complex(x, x)), TypeError, "complex"),
        (lambda: affinity(x, torch.ones(4, 5, device="meta")), TypeError, "different devices"),
        (lambda: affinity(x, density=0.01), ValueError, "cannot be reached"),
        (lambda: affinity(x, np.ones((4, 5), np.float32)), TypeError, "among torch tensors"),
        (lambda: affinity(x, density={0.1}), TypeError, "hashable"),
        (lambda: affinity(x[0]), ValueError, r"\(..., n, d\)"),
        (lambda: torch.func.vmap(lambda a: affinity(a, density=0.2))(x[None]), RuntimeError, "torch.func"),
        (lambda: torch.func.grad(lambda a: affinity(a, density=0.2).sum())(x), RuntimeError, "torch.func"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()


def test_importing_them_imports_no_torch_and_calling_them_no_compiler():
    code = """if True:
        import sys
        sys.modules["torch"] = None  # an import of it raises
        from jaxalign.interop import torch_losses
        del sys.modules["torch"]
        import torch
        torch_losses.alignment_loss(*torch.randn(2, 8, 3)).item()
        assert "torch._dynamo" not in sys.modules  # a second of the first step
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_gradient_of_a_number_is_computed_with_it_and_only_where_it_is_needed():
    calls = []

    def loss(x, y):
        calls.append(1)  # when it is traced
        return jnp.sum(jnp.tanh(x) * y)

    of_tensors = torch_function(loss)
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    value = of_tensors(x, y)
    expected = (1 - torch.tanh(x.detach()) ** 2) * y
    for scale in (1.0, -2.5, 1.0):  # the second and third time, it is computed again
        (found,) = torch.autograd.grad(scale * value, x, retain_graph=True)
        torch.testing.assert_close(found, scale * expected)
        found.zero_()  # the tensor is the caller's
    assert len(calls) == 1
    assert y.grad is None
    both = x.detach().clone().requires_grad_(), y.clone().requires_grad_()
    of_tensors(*both).backward()
    torch.testing.assert_close(both[0].grad, expected)
    torch.testing.assert_close(both[1].grad, torch.tanh(x.detach()))


@pytest.mark.slow
def test_torch_compile_leaves_it_out_of_its_graphs():
    # In a process of its own: torch would look into the run-time type checks of this one.
    code = """if True:
        import torch, jaxalign
        affinity = jaxalign.interop.torch_function(jaxalign.rbf_affinity)
        def penalty(x):
            return affinity(torch.sin(x), density=0.1).square().sum()
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (found,) = torch.autograd.grad(torch.compile(penalty, backend="eager")(x), x)
        torch.testing.assert_close(found, torch.autograd.grad(penalty(x), x)[0])
        torch._dynamo.reset()
        try:
            torch.compile(penalty, backend="eager", fullgraph=True)(x)
        except torch._dynamo.exc.Unsupported as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a function of jax, by jaxalign.interop.torch_function" in done.stdout
    assert "UserWarning" not in done.stderr
