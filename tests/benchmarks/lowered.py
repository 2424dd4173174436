"""What one device holds and sends, read from programs compiled for 2, 8 and 64 simulated devices.

python -m tests.benchmarks.lowered [n] [d]      prints the table of docs/pages/scaling.md
"""

from __future__ import annotations

import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxalign
from jaxalign import Plan

from . import hlo


def permuted_bytes(module: hlo.Module) -> float:
    """Bytes of all collective permutes in a program: what one device sends in one step of each loop."""
    kinds = ("collective-permute", "collective-permute-start")
    return sum(hlo.result_bytes(one) for one in hlo.every(module) if one.opcode in kinds)


def table(n: int, d: int) -> str:
    """Rows of a Markdown table."""
    lines = [
        "| devices | program | rows held | features held | temporaries | sent | all-gathers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for devices in (2, 8, 64):
        mesh = jaxalign.sharding.data_mesh(devices)
        rows = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))
        solve = lambda x, mesh=mesh: jaxalign.solve_sigma(x, plan=Plan(tile_size=512, mesh=mesh)).sigma  # noqa: E731
        for name, function in (("sigma", solve), ("gradient", jax.grad(solve))):
            compiled = jax.jit(function).lower(rows).compile()
            sizes, text = compiled.memory_analysis(), compiled.as_text()
            assert f"{n},{n}]" not in text, "an n x n buffer"
            lines.append(
                f"| {devices} | {name} | {n // devices} | {sizes.argument_size_in_bytes / 1e6:.2f} MB "
                f"| {sizes.temp_size_in_bytes / 1e6:.2f} MB | {permuted_bytes(hlo.parse(text)) / 1e6:.2f} MB "
                f"| {len(re.findall(r' all-gather', text))} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 64)  # not on import: pytest imports this file to look for doctests
    print(table(*map(int, sys.argv[1:3])) if len(sys.argv) > 2 else table(65536, 64))
