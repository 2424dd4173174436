"""What one device holds and sends, read from programs compiled for 2, 8 and 64 simulated devices.

python -m tests.benchmarks.lowered [n] [d]      prints the table of docs/pages/scaling.md
"""

from __future__ import annotations

import math
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxalign

BYTES = {"f32": 4, "s32": 4, "pred": 1, "f64": 8, "u32": 4}


def permuted_bytes(text: str) -> int:
    """Bytes of all collective permutes in a program's text: what one device sends in one step of each loop."""
    shapes = []
    for line in text.splitlines():
        found = re.search(r"=\s*(\(?[^=]*?)\s*collective-permute(?:-start)?\(", line)
        if found:
            shapes += re.findall(r"(f32|s32|pred|f64|u32)\[([\d,]*)\]", found.group(1))
    return sum(BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size) for kind, sizes in shapes)


def table(n: int, d: int) -> str:
    """Rows of a Markdown table."""
    lines = [
        "| devices | program | rows held | features held | temporaries | sent | all-gathers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for devices in (2, 8, 64):
        mesh = jaxalign.sharding.data_mesh(devices)
        rows = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))
        solve = lambda x, mesh=mesh: jaxalign.solve_sigma(x, mesh=mesh, tile_size=512).sigma  # noqa: E731
        for name, function in (("sigma", solve), ("gradient", jax.grad(solve))):
            compiled = jax.jit(function).lower(rows).compile()
            sizes, text = compiled.memory_analysis(), compiled.as_text()
            assert f"{n},{n}]" not in text, "an n x n buffer"
            lines.append(
                f"| {devices} | {name} | {n // devices} | {sizes.argument_size_in_bytes / 1e6:.2f} MB "
                f"| {sizes.temp_size_in_bytes / 1e6:.2f} MB | {permuted_bytes(text) / 1e6:.2f} MB "
                f"| {len(re.findall(r' all-gather', text))} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 64)  # not on import: pytest imports this file to look for doctests
    print(table(*map(int, sys.argv[1:3])) if len(sys.argv) > 2 else table(65536, 64))
