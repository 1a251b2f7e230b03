"""Makes what `make quickstart` starts from: a small model with random weights, and the corpus' test split as lines of text.

python -m train.quickstart --workdir runs/quickstart
"""

import json
import lzma
from pathlib import Path

import click
import jax
import jax.numpy as jnp
from flax import nnx

from jina_jax.adapters import base_arrays, extract_adapters
from jina_jax.checkpoint import check_free, save_checkpoint
from jina_jax.cli import Program
from jina_jax.config import PUBLISHED_INSTRUCTIONS, ModelConfig
from jina_jax.model import Encoder, from_arrays
from jina_jax.tokenizer import load_tokenizer

DATA = Path(__file__).parents[1] / "data"
CORPUS = DATA / "debian_packages.jsonl.xz"

CONFIG = ModelConfig(
    vocab_size=16_000,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    mlp_size=1024,
    tasks=tuple(PUBLISHED_INSTRUCTIONS),
    prompts=tuple(PUBLISHED_INSTRUCTIONS.items()),
    matryoshka_dims=(32, 64, 128, 256),
    pooler=True,
)


@click.command(cls=Program)
@click.option("--workdir", type=click.Path(path_type=Path), required=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(workdir: Path, seed: int) -> None:
    """Write WORKDIR/random (a native checkpoint) and WORKDIR/test.txt (a text a line)."""
    check_free(workdir / "random")
    workdir.mkdir(parents=True, exist_ok=True)
    encoder = random_encoder(CONFIG, seed)
    save_checkpoint(workdir / "random", encoder, load_tokenizer(DATA / "tokenizer", CONFIG))
    texts = bodies("test")
    (workdir / "test.txt").write_text("".join(f"{text}\n" for text in texts), "utf-8")
    click.echo(f"{workdir}: a random model of {CONFIG.num_layers} layers, and {len(texts)} texts")


def random_encoder(config: ModelConfig, seed: int) -> Encoder:
    """A model whose adapters do something: fresh ones are the identity."""
    encoder = Encoder(config, rngs=nnx.Rngs(seed))
    adapters = extract_adapters(encoder)
    for number, path in enumerate(sorted(adapters)):
        if not path.endswith(".scale"):
            key = jax.random.fold_in(jax.random.key(seed), number)
            adapters[path] = 0.1 * jax.random.normal(key, adapters[path].shape)
    return from_arrays(config, base_arrays(encoder) | adapters, dtype=jnp.float32)


def bodies(split: str) -> list[str]:
    """Descriptions of one split in all languages, each on one line."""
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        packages = map(json.loads, file)
        texts = [text["body"] for package in packages if package["split"] == split for text in package["text"].values()]
    return [" ".join(text.split()) for text in texts]


if __name__ == "__main__":
    main(prog_name="python -m train.quickstart")
