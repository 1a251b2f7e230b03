"""Estimated cycles of the encoder on several TPUs, beside a naive port.

    python -m benchmarks.tpu_estimate --json benchmarks/results/tpu_estimate.json

Needs no TPU: the programs are compiled ahead of time, and their cycles are the TPU compiler's
estimates, with loops counted once per iteration, and the schedules of the Pallas kernels
(`train.aot.compiler`). Nothing is run, so waits for memory inside a kernel and stalls of the matrix
unit are not seen. `mcycles` are the estimates; `bundles`, in millions too, what the final schedules
of all instructions issue: a lower bound, and closer on v6e, whose products the estimates take for
twice as long as they are scheduled. The naive port has the same matmuls and the same mask, in
bfloat16 and in a loop over layers: separate q, k and v, XLA's attention, rotation by halves, a
float32 residual stream, LayerNorm in two passes, and `jax.nn.gelu`.
Needs libtpu: pip install -e '.[train,tpu]'
"""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jina_jax import Encoder, ModelConfig
from jina_jax.model.adapters import fold_adapter
from jina_jax.model.attention import attention
from jina_jax.model.rotary import RotaryTables, rotary_tables
from jina_jax.text.packing import max_texts
from train.aot.compiler import Slice, load_topology, measure

from .machine import versions

PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1")
CONFIG = ModelConfig()
TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
KERNEL_ROWS = 16

Program = tuple[Callable[..., Any], tuple[Any, ...]]
"""Function, and the shapes of its arguments."""


@click.command()
@click.option("--topology", "names", multiple=True, default=TOPOLOGIES, show_default=True)
@click.option("--program", "chosen", multiple=True, help="These alone; other results in the JSON file stay.")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], chosen: tuple[str, ...], out: Path | None) -> None:
    """Compile every program for one device of each topology.

    Print a table, and write the numbers as JSON.
    """
    programs = {
        "forward 16 x 512": forward(16, 512),
        "naive port 16 x 512": naive_forward(16, 512),
        "forward 16 x 512, an adapter folded": folded_forward(16, 512),
        "forward 16 x 512, mixed adapters": mixed_forward(16, 512),
        "forward 16 x 512, mixed adapters, unrolled": mixed_forward(16, 512, unroll=True),
        "forward 1 x 8192": forward(1, 8192),
        "attention, gradient, T = 384": attention_gradient(384),
        "attention, gradient, T = 512": attention_gradient(512),
        "attention, gradient, T = 8192": attention_gradient(8192),
    }
    if unknown := set(chosen) - programs.keys():
        raise click.UsageError(f"there are no programs {sorted(unknown)}; there are {list(programs)}")
    found = {}
    if chosen and out and out.exists():
        found = {(each["topology"], each["program"]): each for each in json.loads(out.read_text("utf-8"))["results"]}
    for name in names:
        part = load_topology(name)
        for label in chosen or programs:
            found[name, label] = {"topology": name, "program": label, **_estimate(programs[label], part)}
            cycles, bundles = found[name, label]["mcycles"], found[name, label]["bundles"]
            click.echo(f"{name:10} {label:30} {cycles:9.2f} Mcycles {bundles:9.2f} million bundles", err=True)
    results = [found[name, label] for name in names for label in programs if (name, label) in found]
    click.echo(_table(results))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {"date": str(date.today()), "versions": versions(PACKAGES), "results": results}
        out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def _estimate(program: Program, part: Slice) -> dict[str, Any]:
    """Cycles of one run on one device, by kind of work, and of each call of a kernel."""
    mesh = Mesh(np.array(part.devices)[:1], ("data",))
    function, shapes = program
    # Inside a shard_map, the mesh determines the device that the program is compiled for.
    whole = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    found = measure(jax.jit(whole), arguments, part.topology)
    return {
        "mcycles": sum(found.cycles.values()) / 1e6,
        "bundles": found.bundles / 1e6,
        "mcycles_by_kind": {kind: cycles / 1e6 for kind, cycles in found.cycles.items()},
        "kernels": found.kernels,
        "temporary_bytes": found.memory["temporaries"],
        "compile_seconds": round(found.compile_seconds, 1),
    }


def _table(results: list[dict[str, Any]]) -> str:
    """Table of Mcycles and millions of bundles of each program; of attention alone, of cycles and
    bundles per row and head."""
    measured = {(each["program"], each["topology"]): (each["mcycles"], each["bundles"]) for each in results}
    topologies = list(dict.fromkeys(each["topology"] for each in results))
    lines = [f"{'':55}" + "".join(f"{name:>18}" for name in topologies)]
    for program in dict.fromkeys(each["program"] for each in results):
        kernel = program.startswith("attention")
        scale, unit = (1e6 / KERNEL_ROWS / CONFIG.num_heads, "per row and head") if kernel else (1.0, "millions")
        pairs = ([f"{value * scale:.{0 if kernel else 1}f}" for value in measured[program, name]] for name in topologies)
        cells = (f"{cycles} / {bundles}".rjust(18) for cycles, bundles in pairs)
        lines.append(f"{program + ', ' + unit:55}" + "".join(cells))
    return "\n".join(lines)


# ---- the programs


def forward(b: int, t: int) -> Program:
    """The encoder in bfloat16, without adapters."""
    return _program(_encoder, b, t)


def folded_forward(b: int, t: int) -> Program:
    """The encoder with one task's adapter folded into the kernels; the table's stays beside it."""
    one = jax.ShapeDtypeStruct((), jnp.int32)
    return _program(lambda: fold_adapter(_encoder(tasks=TASKS), TASKS[0]), b, t, one)


def mixed_forward(b: int, t: int, *, unroll: bool = False) -> Program:
    """The encoder with adapters of five tasks, any of them for each text of a row."""
    return _program(lambda: _encoder(unroll=unroll, tasks=TASKS), b, t, jax.ShapeDtypeStruct((b, max_texts(t)), jnp.int32))


def _encoder(**fields: Any) -> Encoder:
    return Encoder(replace(CONFIG, **fields), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


def _program(make: Callable[[], Encoder], b: int, t: int, *tasks: jax.ShapeDtypeStruct) -> Program:
    graphdef, state = nnx.split(nnx.eval_shape(make))
    ids = jax.ShapeDtypeStruct((b, t), jnp.int32)
    return lambda state, *inputs: nnx.merge(graphdef, state)(*inputs), (state, ids, ids, ids, *tasks)


def attention_gradient(t: int) -> Program:
    """Attention of 16 rows, forward and backward, from the fused projection to its gradient."""
    shape = jax.ShapeDtypeStruct((3, KERNEL_ROWS, t, CONFIG.hidden_size), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((KERNEL_ROWS, t), jnp.int32)
    d_out = jax.ShapeDtypeStruct(shape.shape[1:], jnp.bfloat16)

    def gradient(qkv: Array, segment_ids: Array, positions: Array, d_out: Array) -> Array:
        tables = rotary_tables(positions, CONFIG.head_dim, CONFIG.rope_theta)
        return jax.vjp(lambda qkv: attention(qkv, segment_ids, tables, num_heads=CONFIG.num_heads), qkv)[1](d_out)[0]

    return gradient, (shape, ids, ids, d_out)


def naive_forward(b: int, t: int) -> Program:
    """The layers alone, as a direct port of the PyTorch model."""
    d, f = CONFIG.hidden_size, CONFIG.mlp_size
    kernels = {"q": (d, d), "k": (d, d), "v": (d, d), "out": (d, d), "up": (d, f), "down": (f, d)}
    vectors = {f"{name}_bias": shape[1:] for name, shape in kernels.items()} | {
        f"norm{i}_{part}": (d,) for i in (1, 2) for part in ("scale", "bias")
    }
    layers = {
        name: jax.ShapeDtypeStruct((CONFIG.num_layers, *shape), jnp.bfloat16) for name, shape in (kernels | vectors).items()
    }
    ids = jax.ShapeDtypeStruct((b, t), jnp.int32)

    def run(layers: dict[str, Array], x: Array, segment_ids: Array, positions: Array) -> Array:
        tables = rotary_tables(positions, CONFIG.head_dim, CONFIG.rope_theta)
        return jax.lax.scan(lambda x, layer: (_naive_layer(layer, x, segment_ids, tables), None), x, layers)[0]

    return run, (layers, jax.ShapeDtypeStruct((b, t, d), jnp.float32), ids, ids)


def _naive_layer(layer: dict[str, Array], x: Array, segment_ids: Array, tables: RotaryTables) -> Array:
    def dense(name: str, x: Array) -> Array:
        product = jnp.matmul(x.astype(jnp.bfloat16), layer[name], preferred_element_type=jnp.float32)
        return product + layer[f"{name}_bias"].astype(jnp.float32)

    def norm(i: int, x: Array) -> Array:
        y = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + CONFIG.layer_norm_eps)
        return y * layer[f"norm{i}_scale"].astype(jnp.float32) + layer[f"norm{i}_bias"].astype(jnp.float32)

    heads = (*x.shape[:2], CONFIG.num_heads, CONFIG.head_dim)
    q, k, v = (dense(name, x).astype(jnp.bfloat16).reshape(heads) for name in "qkv")
    q, k = _naive_rotation(q, tables), _naive_rotation(k, tables)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * CONFIG.head_dim**-0.5
    scores = jnp.where(segment_ids[:, None, :, None] == segment_ids[:, None, None, :], scores, -1e30)
    weights = jax.nn.softmax(scores, -1).astype(jnp.bfloat16)
    attended = jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(x.shape)
    x = norm(1, x + dense("out", attended))
    return norm(2, x + dense("down", jax.nn.gelu(dense("up", x), approximate=False)))


def _naive_rotation(x: Array, tables: RotaryTables) -> Array:
    cos, sin = (jnp.concatenate([table, table], -1)[:, :, None] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (x.astype(jnp.float32) * cos + jnp.concatenate([-second, first], -1) * sin).astype(x.dtype)


if __name__ == "__main__":
    main()
