"""The directory in which the blocks of the documentation are run: the files that they name.

    runs/e5-small            multilingual-e5-small, unless a block of the page writes it
    runs/quickstart/model    the same with five new adapters, named as those of jina-embeddings-v3
    jinaai/jina-embeddings-v3, intfloat/multilingual-e5-small
                             hub ids: the two, in a cache of the hub
    DIR, DIR_OR_HUB_ID, MODEL
                             the second
    texts.txt, tickets.csv, pairs.jsonl, ...
                             a few texts of the bundled corpus
    configs, data, ...       those of the checkout
    bin/                     the programs of this environment, which has all extras: pip does
                             nothing, and a new environment is an empty one that is never entered

`jina-jax serve` returns when the server is ready, and leaves it running until the page ends.
"""

import csv
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jax import numpy as jnp

from jina_jax import Embedder, add_adapter
from jina_jax.checkpoints.demo_model import write_demo_model
from jina_jax.checkpoints.torch_writer import write_transformers
from jina_jax.config import PUBLISHED_INSTRUCTIONS
from train.data.corpus import BUNDLED, read_corpus

from .blocks import ROOT, read_blocks

SERVERS = "servers.txt"
"""File with the process ids of the servers that run."""

CHECKOUT = ("configs", "convert", "data", "notebooks", "train")
STAND_INS = {"jinaai/jina-embeddings-v3": "adapted", "intfloat/multilingual-e5-small": "base"}
"""Model in place of each hub id."""

_PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && touch "$3/bin/activate" && exit; fi
exec {python} "$@"
"""

_JINA_JAX = """#!/usr/bin/env bash
if [ "$1" != serve ]; then exec {python} -m jina_jax.cli "$@"; fi
{python} -m jina_jax.cli "$@" > server.log 2>&1 &
echo $! >> {servers}
until grep -q "ready after" server.log; do
    kill -0 $! || {{ cat server.log >&2; exit 1; }}
    sleep 0.2
done
"""


def write_models(directory: Path) -> None:
    """Writes the two models that stand for all, and a cache of the hub that holds them."""
    base, adapted = directory / "base", directory / "adapted"
    write_demo_model(base)
    embedder = Embedder.load(base)
    encoder = embedder.encoder
    for seed, task in enumerate(PUBLISHED_INSTRUCTIONS):
        encoder = add_adapter(encoder, task, rank=4, rngs=nnx.Rngs(seed))
    write_transformers(adapted, encoder, embedder.tokenizer, jnp.bfloat16)  # as the weights that it stands for
    for hub_id, model in STAND_INS.items():
        cached = directory / "hub" / "hub" / f"models--{hub_id.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / ("0" * 40)).symlink_to(directory / model)


def lay_out(workplace: Path, page: Path, models: Path) -> dict[str, str]:
    """Fills a new directory for a page; returns the environment that its blocks run in."""
    code = "".join(block.code for block in read_blocks(page) if block.needs is None)
    links = {name: ROOT / name for name in CHECKOUT if (ROOT / name).exists()}
    links |= dict.fromkeys(("DIR", "DIR_OR_HUB_ID", "MODEL", "runs/quickstart/model"), models / "adapted")
    if "demo-model runs/e5-small" not in code:
        links["runs/e5-small"] = models / "base"
    for name, target in links.items():
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).symlink_to(target)
    _write_texts(workplace)
    _write_programs(workplace / "bin")
    return os.environ | {
        "PATH": f"{workplace / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(models / "hub"),
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(models / "programs"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }


def _write_programs(bin: Path) -> None:
    bin.mkdir()
    programs = {
        "jina-jax": _JINA_JAX.format(python=sys.executable, servers=SERVERS),
        "python": _PYTHON.format(python=sys.executable),
        "jupyter": f'#!/bin/sh\nexec {sys.executable} -m jupyter "$@"\n',
        "pip": "#!/bin/sh\n",
    }
    for name, program in programs.items():
        (bin / name).write_text(program)
        (bin / name).chmod(0o755)


def _write_texts(workplace: Path) -> None:
    packages = read_corpus(BUNDLED, "validation")
    games = [package for package in packages if package.section in ("games", "science")][:60]
    titles, bodies = ([package.text["en"][part] for package in games] for part in (0, 1))
    sections = [package.section for package in games]
    (workplace / "texts.txt").write_text("".join(f"{title}\n" for title in titles[:12]), "utf-8")
    for folder in ("texts", "books"):
        (workplace / folder).mkdir()
    for number in (0, 1):
        half = bodies[6 * number : 6 * number + 6]
        pq.write_table(
            pa.table({"id": [f"{number}-{i}" for i in range(6)], "text": half}), workplace / f"texts/{number}.parquet"
        )
        _write_lines(workplace / f"books/{number}.jsonl", ({"text": text} for text in half))
    _write_lines(workplace / "meetings.jsonl", ({"text": text} for text in bodies[:3]))
    labelled = [{"text": title, "label": section} for title, section in zip(titles, sections, strict=True)]
    _write_lines(workplace / "train.jsonl", labelled[:40])
    _write_lines(workplace / "test.jsonl", labelled[40:])
    _write_lines(workplace / "tickets.jsonl", labelled)
    with (workplace / "tickets.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("body", "queue"), *((row["text"], row["label"]) for row in labelled)])
    for name, (query, answer) in {"faq": ("question", "answer"), "pairs": ("anchor", "positive")}.items():
        both = zip(titles, bodies, strict=True)
        _write_lines(workplace / f"{name}.jsonl", ({query: title, answer: body[:200]} for title, body in both))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
