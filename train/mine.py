"""Mines hard negatives: python -m train.mine PAIRS --out FILE.jsonl (--bm25 | --model DIR)."""

from typing import Any

import click

from jina_jax import Embedder
from jina_jax.command import Command, max_length_option, model_options
from jina_jax.files import atomic_write, check_not_input, check_output_file
from jina_jax.storage import StoragePath, as_path

from .data.hard_negatives import MiningConfig, bm25_scores, embedding_scores, mine
from .data.records import Pair, read_records, write_records


@click.command(cls=Command)
@click.argument("pairs")
@click.option("--out", required=True, help="FILE.jsonl of triplets; replaced when complete.")
@click.option("--bm25", is_flag=True, help="Search by words.")
@click.option("--model", help="Search by embeddings of this model: a directory or hub id.")
@model_options
@max_length_option
@click.option("--query-task", help="Adapter for anchors; default: retrieval.query, or the model's prompt for queries.")
@click.option("--document-task", help="Adapter for positives; default: retrieval.passage, or the prompt for documents.")
@click.option("--num-negatives", type=int, default=7, show_default=True, help="Of each anchor.")
@click.option("--range-min", type=int, default=10, show_default=True, help="Best candidates to skip.")
@click.option("--range-max", type=int, default=100, show_default=True, help="Rank of the last candidate to consider.")
@click.option("--max-score", type=float, help="Highest score of a negative.")
@click.option("--min-score", type=float, help="Lowest score of a negative.")
@click.option("--absolute-margin", type=float, help="How far below the positive's score a negative's is at least.")
@click.option("--relative-margin", type=float, help="The same as a fraction of the positive's score.")
@click.option("--sampling", type=click.Choice(["top", "random"]), default="top", show_default=True)
@click.option("--same-language", is_flag=True, help="Take negatives from pairs of the anchor's language alone.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random sampling.")
def main(
    pairs: str,
    out: str,
    bm25: bool,
    model: str | None,
    dtype: str | None,
    revision: str | None,
    max_length: int | None,
    query_task: str | None,
    document_task: str | None,
    same_language: bool,
    seed: int,
    **numbers: Any,
) -> None:
    """Write the pairs of PAIRS (.jsonl, .csv or .tsv, also as .gz or .xz, or .parquet) as triplets
    with hard negatives. Both files may be in buckets.

    Candidates are the positives of all pairs. An anchor's negatives never include its own
    positives, an equal text, or texts of its group. Triplets name the group of each negative.
    """
    config = MiningConfig(**numbers)
    target = as_path(out)
    _check_output(target)
    check_not_input(target, [pairs])
    if bm25 == (model is not None):
        raise ValueError("search with either --bm25 or --model")
    of_model = {
        "--dtype": dtype,
        "--revision": revision,
        "--max-length": max_length,
        "--query-task": query_task,
        "--document-task": document_task,
    }
    if bm25 and (given := [name for name, value in of_model.items() if value is not None]):
        raise ValueError(f"{', '.join(given)}: only with --model")
    read = [pair for pair in read_records(pairs, "pair") if isinstance(pair, Pair)]
    if not read:
        raise ValueError(f"{pairs} has no pairs")
    scorer = bm25_scores
    if model is not None:
        embedder = Embedder.load(model, dtype=dtype, revision=revision)
        scorer = embedding_scores(embedder, query_task=query_task, document_task=document_task, max_length=max_length)
    triplets = mine(read, scorer, config, same_language=same_language, seed=seed)
    if not triplets:
        raise ValueError(f"no anchor of {pairs} has {config.num_negatives} negatives; widen the ranks, scores or margins")
    with atomic_write(target) as file:
        write_records(file, iter(triplets))
    click.echo(f"{out}: {len(triplets)} of {len(read)} pairs; the others are repeated or have too few negatives", err=True)


def _check_output(out: StoragePath) -> None:
    if out.suffix != ".jsonl":
        raise ValueError(f"--out must end in .jsonl, not {str(out)!r}")
    check_output_file(out)


if __name__ == "__main__":
    main(prog_name="python -m train.mine")
