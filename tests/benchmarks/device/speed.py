"""Times beside a careful torch version on the same device, in turns, and beside the rates measured there."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign.kernels import RBF
from jaxalign.losses import Projector, alignment_loss, token_loss

from .. import floor, rivals
from ..cuts import blobs
from ..matching import smooth_views
from ..timing import Result, compare, milliseconds, seconds

DENSITY = 0.05
COMPILED = "compiled"
NO_TORCH = "no torch for this device: comparisons with it are left out"


def torch_array(a: Any) -> Any:
    """The same numbers as a torch tensor on the device; None without torch for it."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and jax.default_backend() != "cpu":
        return None
    return torch.from_numpy(np.array(a)).to("cuda" if cuda else "cpu")


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """A torch call that returns when the device is done."""
    import torch

    def both() -> Any:
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return both


def compile_together(*calls: Callable[[], Any]) -> None:
    """Call each once, side by side: compilers leave most cores idle."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda call: jax.block_until_ready(call()), calls))


def features(*shape: int) -> jax.Array:
    """Normal features on the device."""
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def given(x: jax.Array, sigma: float) -> jax.Array:
    """The affinity at a sigma."""
    return jaxalign.rbf_affinity(x, sigma=sigma)


def auto(x: jax.Array) -> jax.Array:
    """The auto-scaled affinity."""
    return jaxalign.rbf_affinity(x, density=DENSITY)


def affinities(sizes: tuple[int, ...], d: int, rounds: int) -> Iterator[Result | str]:
    """Sigma given and auto-scaled; called as users do, and inside a jit of their own, which checks no values."""
    sigma = 0.6 * d**0.5
    sets = {n: features(n, d) for n in sizes}
    jitted = jax.jit(given, static_argnums=1), jax.jit(auto)
    calls: list[Callable[[], Any]] = []
    for x in sets.values():
        calls += [lambda x=x: given(x, sigma), lambda x=x: auto(x)]
        calls += [lambda x=x: jitted[0](x, sigma), lambda x=x: jitted[1](x)]
    compile_together(*calls)
    yield COMPILED
    for n, x in sets.items():
        label, work = f"n = {n}, d = {d}", floor.affinity(n, d)
        ours = ("auto", lambda x=x: auto(x)), ("given", lambda x=x: given(x, sigma))
        yield compare(f"affinity, {label}: auto-scaled / sigma given", *ours, rounds, bound="<=", target=1.2, work=work)
        inside = ("auto", lambda x=x: jitted[1](x)), ("given", lambda x=x: jitted[0](x, sigma))
        yield compare(f"the same inside jit, {label}", *inside, rounds, bound="<=", target=1.2, work=work)
        tx = torch_array(x)
        if tx is None:
            yield NO_TORCH
            continue
        careful = ("torch", finished(lambda tx=tx: rivals.careful(tx, sigma)))
        case = f"affinity, {label}: sigma given / careful torch"
        yield compare(case, ours[1], careful, rounds, bound="<=", target=1.0, work=work)
        case = f"affinity, {label}: sigma given inside jit / careful torch"
        yield compare(case, inside[1], careful, rounds, bound="<=", target=1.0, work=work)
        bisection = ("torch", finished(lambda tx=tx: rivals.careful_auto(tx, DENSITY)))
        case = f"affinity, {label}: auto-scaled / torch that bisects"
        yield compare(case, ours[0], bisection, min(rounds, 5), work=work)


def sigmas(sizes: tuple[int, ...], d: int, rounds: int) -> Iterator[Result | str]:
    """Sigma where n x n is not stored, and its gradient, beside one density by torch in chunks of rows."""
    sigma = 0.6 * d**0.5
    gradient = jax.jit(jax.grad(lambda x: jaxalign.solve_sigma(x, density=DENSITY).sigma))
    sets = {n: features(n, d) for n in sizes}
    smallest = sets[min(sizes)]
    compile_together(lambda: gradient(smallest), *(lambda x=x: jaxalign.solve_sigma(x).sigma for x in sets.values()))
    yield COMPILED
    for n, x in sets.items():
        ours = ("solve_sigma", lambda x=x: jaxalign.solve_sigma(x, density=DENSITY).sigma)
        few = rounds if n < 500_000 else 1
        yield milliseconds(
            f"sigma, n = {n}, d = {d}",
            ours[1],
            few,
            target=20_000.0 if n == 1_000_000 else None,
            work=floor.solve(n, d),
        )
        yield f"n = {n}: passes over all pairs: {int(jaxalign.solve_sigma(x, density=DENSITY).passes)}"
        if x is smallest:
            case = f"sigma, n = {n}, d = {d}: value and gradient"
            yield milliseconds(case, lambda x=x: gradient(x), few, work=floor.solve_and_gradient(n, d))
        tx = torch_array(x)
        if tx is None:
            yield NO_TORCH
            continue
        count = min(n, 50_000)  # rows: each costs the same
        rows = max(1, min(n, 2**28 // n))
        chunks = finished(lambda tx=tx, c=count, r=rows: rivals.density_in_chunks(tx, sigma, r, c))
        took, theirs = seconds(ours[1]), min(seconds(chunks) for _ in range(2)) * n / count
        case = f"sigma, n = {n}, d = {d}: solve_sigma / one density by torch chunks"
        detail = f"{took * 1e3:.4g} ms, torch {theirs * 1e3:.4g} ms (from {count} rows)"
        yield Result(case, took / theirs, "x", took / theirs, took / theirs, detail=detail)


def losses(batches: tuple[int, ...], d: int, rounds: int) -> Iterator[Result | str]:
    """Value and gradient of the alignment loss inside jit, beside torch's."""
    kernel = RBF(density=DENSITY, diagonal="include")  # as the other side counts it
    step = jax.jit(jax.value_and_grad(lambda x, y: alignment_loss(x, y, kernel=kernel)))
    pairs = {}
    for n in batches:
        x = features(n, d)
        pairs[n] = x, jnp.tanh(x[:, : 3 * d // 4]) + 0.5 * features(n, 3 * d // 4)
    of_tokens = token_losses(*((64, 256, d) if max(batches) >= 1024 else (2, 16, d)), rounds)
    compile_together(*(lambda pair=pair: step(*pair) for pair in pairs.values()))
    yield next(of_tokens)  # compiled
    for n, (x, y) in pairs.items():
        label = f"loss, batch {n}, d = {d} and {y.shape[1]}"
        once = floor.affinity(n, d, sets=2)  # and a product of its cotangent with the features
        work = floor.Work(once.flops + 2 * n * n * d, once.exps)
        ours = ("jaxalign", lambda x=x, y=y: step(x, y))
        tensors = torch_array(x), torch_array(y)
        if tensors[0] is None:
            yield milliseconds(f"{label}: value and gradient", ours[1], rounds, work=work)
            yield NO_TORCH
            continue
        theirs = finished(lambda t=tensors: rivals.loss_and_gradient(*t, DENSITY))
        yield compare(f"{label}: value and gradient / torch", ours, ("torch", theirs), rounds, work=work)
        (value, slope), (torch_value, torch_slope) = step(x, y), theirs()
        apart = float(np.max(np.abs(np.asarray(slope) - torch_slope.cpu().numpy())) / float(jnp.max(jnp.abs(slope))))
        yield f"{label}: values apart by {abs(float(value) - float(torch_value)):.1e}, gradients by {apart:.1e}"

    yield from of_tokens


def token_losses(images: int, tokens: int, d: int, rounds: int) -> Iterator[Result | str]:
    """Value and gradient of losses of tokens toward a wider teacher, beside the cosine distance of a projector."""
    x, y = features(images * tokens, d), features(images * tokens, 4 * d // 3)
    student, teacher = (a.reshape(images, tokens, -1) for a in (x, y))
    projector = Projector.init(jax.random.key(0), d, teacher.shape[-1], hidden=2 * d)

    def step(measure: str) -> Callable[[], Any]:
        if measure == "cosine":
            function = jax.jit(jax.value_and_grad(lambda p, x, y: token_loss(p(x), y, "cosine"), (0, 1)))
            return lambda: function(projector, student, teacher)
        function = jax.jit(jax.value_and_grad(lambda x, y: token_loss(x, y, measure)))
        return lambda: function(student, teacher)

    measures = ("cka", "gram", "distances")
    steps = {measure: step(measure) for measure in (*measures, "cosine")}
    compile_together(*steps.values())
    yield COMPILED
    for measure in measures:
        case = f"token loss, {images} images of {tokens} tokens, d = {d} and {teacher.shape[-1]}: {measure} / projector"
        yield compare(case, (measure, steps[measure]), ("cosine", steps["cosine"]), rounds)
    if (sx := torch_array(student)) is None:
        yield NO_TORCH
        return
    from jaxalign.interop import torch_losses

    rows, target = sx[0].clone().requires_grad_(), torch_array(teacher[0])

    def torch_step(loss: Any) -> Callable[[], Any]:
        def call() -> None:
            rows.grad = None
            loss(rows, target).backward()

        return finished(call)

    ours, theirs = torch_step(torch_losses.alignment_loss), torch_step(rivals.torch_loss)
    case = f"torch, batch {tokens}, d = {d}: alignment loss / one written by hand"
    yield compare(case, ("jaxalign", ours), ("torch", theirs), rounds)


def batch(sets: int, n: int, d: int, rounds: int) -> Iterator[Result | str]:
    """Many sets in one call."""
    x = features(sets, n, d)
    ours, work = ("jaxalign", lambda: auto(x)), floor.affinity(n, d, sets)
    compile_together(ours[1])
    yield COMPILED
    tx = torch_array(x)
    if tx is None:
        yield milliseconds(f"batch of {sets} representations ({n}, {d}), auto-scaled", ours[1], rounds, work=work)
        yield NO_TORCH
        return
    for name, rival in (("all at once", rivals.careful_auto_batch), ("in a loop", rivals.loop_of_bisections)):
        few = rounds if rival is rivals.careful_auto_batch else 2
        theirs = ("torch", finished(lambda rival=rival: rival(tx, DENSITY)))
        case = f"batch of {sets} representations ({n}, {d}), auto-scaled / torch {name}"
        yield compare(case, ours, theirs, few, work=work)


def grid(layers: int, n: int, d: int, rounds: int) -> Iterator[Result | str]:
    """Debiased CKA of all pairs of layers; torch is given sigma and keeps every affinity."""
    keys = jax.random.split(jax.random.key(0), 2 * layers)
    signal = features(n, 64)
    made = [
        signal @ jax.random.normal(key, (64, d)) + (k % layers) * jax.random.normal(key, (n, d))
        for k, key in enumerate(keys)
    ]
    sets = [{str(k): x for k, x in enumerate(part)} for part in (made[:layers], made[layers:])]
    ours = ("compare_grid", lambda: jaxalign.compare_grid(*sets, "cka", kernel=RBF(density=DENSITY)).values)
    work, label = floor.grid(layers, n, d), f"{layers} x {layers} CKA grid, n = {n}, d = {d}"
    solved = jaxalign.compare_grid(*sets, "cka", kernel=RBF(density=DENSITY))
    yield COMPILED
    tensors = [[torch_array(x) for x in part.values()] for part in sets]
    if tensors[0][0] is None:
        yield milliseconds(label, ours[1], rounds, work=work)
        yield NO_TORCH
        return
    sigma = [float(s) for s in np.asarray(solved.sigma)]
    sigmas = [sigma[:layers], sigma[layers:]]
    theirs = finished(lambda: rivals.cka_grid_cached(*tensors, sigmas))
    yield compare(f"{label} / torch with every affinity kept, sigma given", ours, ("torch", theirs), rounds, work=work)
    apart = np.max(np.abs(np.asarray(solved.values) - theirs()))
    yield f"largest difference between those grids: {apart:.1e}"


def permutations(count: int, n: int, rounds: int) -> Iterator[Result | str]:
    """Permutation test of CKA from features on, beside a torch loop over stored affinities."""
    x = features(n, 64)
    y = jnp.tanh(x) + features(n, 64)[::-1]

    def own() -> jax.Array:
        return jaxalign.permutation_test(x, y, key=jax.random.key(0), permutations=count).null

    compile_together(own)
    yield COMPILED
    result = milliseconds(f"{count} permutations of CKA, n = {n}", own, rounds)
    yield result
    k, m = (torch_array(auto(z)) for z in (x, y))
    if k is None:
        yield NO_TORCH
        return
    import torch

    some = [torch.randperm(n, device=k.device) for _ in range(min(count, 200))]
    theirs = min(seconds(finished(lambda: rivals.permuted_cka_on_device(k, m, some))) for _ in range(3))
    theirs *= count / len(some)
    ratio = (result.own or 0.0) / 1e3 / theirs
    detail = f"{result.own:.4g} ms, torch {theirs * 1e3:.4g} ms (from {len(some)})"
    yield Result(f"{count} permutations of CKA / a torch loop", ratio, "x", ratio, ratio, detail=detail)


def cut(n: int, d: int, rounds: int) -> Iterator[Result | str]:
    """Twenty vectors of the normalized cut from features on, sigma given, beside torch's eigh on the stored matrix."""
    x = jnp.asarray(blobs(n, d))
    sigma = float(jaxalign.solve_sigma(x, density=DENSITY).sigma)
    ours = ("normalized_cut", lambda: jaxalign.normalized_cut(x, 20, sigma=sigma, method="lobpcg").eigenvectors)
    compile_together(ours[1])
    yield COMPILED
    tx = torch_array(x)
    if tx is None:
        yield milliseconds(f"cut, n = {n}, d = {d}, 20 vectors", ours[1], rounds)
        yield NO_TORCH
        return
    import torch

    def normalized() -> Any:
        a = rivals.careful(tx, sigma)
        root = a.sum(1).rsqrt()
        return a.mul_(root).mul_(root[:, None])

    def lobpcg() -> Any:
        return torch.lobpcg(normalized(), k=20, tol=1e-5)[1]

    for name, rival in (("eigh", lambda: torch.linalg.eigh(normalized())[1][:, -20:]), ("lobpcg", lobpcg)):
        yield compare(f"cut, n = {n}, d = {d}, 20 vectors / torch {name}", ours, ("torch", finished(rival)), rounds)


def matches(n: int, networks: int, landmarks: int) -> Iterator[Result | str]:
    """One round of `match` after the landmarks; compiled by a first call with as many samples and no rounds."""
    views = smooth_views(n, networks)

    def own(rounds: int) -> jaxalign.Matching:
        return jaxalign.match(views, landmarks=np.arange(landmarks), rounds=rounds)

    own(0)
    yield COMPILED
    times = []
    for rounds in (0, 1):
        start = time.perf_counter()
        matching = own(rounds)
        times.append(time.perf_counter() - start)
    case = f"match, {networks} networks of {n} samples, {landmarks} landmarks"
    detail = f"{times[1]:.3g} s with one round, top-1 {matching.score().top1:.4f}"
    yield Result(f"{case}: a round", times[1] - times[0], "s", times[1] - times[0], times[1] - times[0], detail=detail)


def several(n: int, d: int, rounds: int) -> Iterator[Result | str]:
    """All devices against one."""
    yield COMPILED  # with the first call: compiling for all devices beside others would wait for these
    devices = jax.device_count()
    if devices == 1:
        yield "one device only"
        return
    x = features(n, d)
    spread = jaxalign.sharding.shard_rows(x, jaxalign.sharding.data_mesh())
    one, all_of_them = (jaxalign.solve_sigma(z, density=DENSITY).sigma for z in (x, spread))
    yield f"sigma on {devices} devices and on one apart by {abs(float(one) / float(all_of_them) - 1):.1e}"
    alone = ("one", lambda: jaxalign.solve_sigma(x, density=DENSITY).sigma)
    together = ("all", lambda: jaxalign.solve_sigma(spread, density=DENSITY).sigma)
    case = f"sigma, n = {n}, d = {d}: times faster on {devices} devices than on one"
    yield compare(case, together, alone, rounds, inverse=True)
