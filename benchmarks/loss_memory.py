"""Memory of the pair loss, by the compiler's analysis; nothing is run.

    python -m benchmarks.loss_memory --json benchmarks/results/loss_memory.json

The loss and its gradient at the published width of 1,024, with all seven Matryoshka dimensions and
both directions, in float32: 1,024 rows of logits at a time, compared with all rows at once.
"""

import json
from datetime import date
from functools import partial
from pathlib import Path

import click
import jax
import jax.numpy as jnp

from jina_jax.losses import info_nce

from .machine import machine, versions

WIDTH, DIMS, CHUNK = 1024, (32, 64, 128, 256, 512, 768, 1024), 1024
PAIRS = (2048, 4096, 8192, 16_384)


@click.command()
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(out: Path | None) -> None:
    """Compile the loss at several batch sizes, print a table, and write the numbers as JSON."""
    jax.config.update("jax_platforms", "cpu")
    results = [{"pairs": n, "chunk_mib": _temporaries(n, CHUNK), "whole_mib": _temporaries(n, None)} for n in PAIRS]
    lines = ["| pairs | in chunks of 1,024 rows, MiB | all rows at once, MiB |", "|---|---|---|"]
    lines += [f"| {r['pairs']:,} | {r['chunk_mib']:,.0f} | {r['whole_mib']:,.0f} |" for r in results]
    click.echo("\n".join(lines))
    if out:
        report = {"machine": machine(), "date": str(date.today()), "versions": versions(("jax", "jaxlib")), "results": results}
        out.write_text(json.dumps(report, indent=2) + "\n")


def _temporaries(pairs: int, chunk: int | None) -> float:
    """MiB that the compiled loss and gradient need beside their arguments and results."""
    loss = partial(info_nce, temperature=0.05, dims=DIMS, chunk=chunk)
    embeddings = jax.ShapeDtypeStruct((pairs, WIDTH), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(embeddings, embeddings).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes / 2**20


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.loss_memory")
