"""A small multilingual model through all stages of the paper, in minutes on two CPU cores.

`make pretrain` runs all of it; one stage by itself:

    python -m train configs/pretrain.py:mlm --workdir runs/pretrain/mlm
    python -m train configs/pretrain.py:pairs --workdir runs/pretrain/pairs
    python -m train configs/pretrain.py:adapters --workdir runs/pretrain/adapters

Hardware: two CPU cores.
Data: the bundled corpus, as `train/pretrain.py` prepares it.

From the paper: the order of the stages, the losses, rotary base 10,000 in training and 20,000 in
serving (here from the adapters on), a frozen base under the adapters, query and passage trained
jointly.
Chosen here: sizes, steps and rates, for a model this small.

Expected: 15 minutes with evaluation, of which MLM takes 1, pairs 4 and adapters 5.5; nDCG@10 of
61.7 from English titles to their bodies, measured on two cores of an AMD EPYC, 2026-11-26
(docs/pretraining.md).
"""

from jina_jax.config import ModelConfig
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig

DATASETS = "runs/pretrain/datasets/debian_packages"
DIMS = (32, 64, 128, 256)
DIM_WEIGHTS = (3.0, 1.0, 1.0, 1.0)

MODEL = ModelConfig(
    vocab_size=16_000,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    mlp_size=1024,
    rope_theta=10_000.0,
    matryoshka_dims=DIMS,
    unroll=True,
)


def mlm() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(model=MODEL, tokenizer="data/tokenizer"),
        checkpoint_every=50,
        stages=(
            Stage(
                name="mlm",
                objective="mlm",
                datasets=(DatasetConfig(f"{DATASETS}/texts/1.0.0", "text"),),
                steps=80,
                warmup_steps=25,
                batch_size=64,
                max_length=128,
                row_length=128,
                num_row_counts=4,
                learning_rate=2e-3,
            ),
        ),
    )


def pairs() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/pretrain/mlm/model"),
        checkpoint_every=50,
        stages=(
            Stage(
                name="pairs",
                objective="pairs",
                datasets=(
                    DatasetConfig(f"{DATASETS}/pairs/1.0.0", "pair", by_language=True, language_exponent=0.5),
                    DatasetConfig(f"{DATASETS}/translations/1.0.0", "pair", by_language=True, language_exponent=0.5),
                ),
                steps=480,
                warmup_steps=50,
                batch_size=128,
                max_length=64,
                row_length=128,
                num_row_counts=6,
                learning_rate=1.5e-3,
                temperature=0.05,
                dims=DIMS,
                dim_weights=DIM_WEIGHTS,
            ),
        ),
    )


def adapters() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(
            source="runs/pretrain/pairs/model",
            rope_theta=20_000.0,
            # The published rank of 4 leaves words nowhere to go in a run this short.
            lora_rank=32,
            lora_alpha=2.0,
            # Titles have five tokens: the published instructions, of ten, would be most of a
            # query's mean.
            instructions=(("retrieval.query", ""), ("retrieval.passage", "")),
        ),
        checkpoint_every=50,
        stages=(
            Stage(
                name="retrieval",
                objective="retrieval",
                adapters=("retrieval.query", "retrieval.passage"),
                # Without mined negatives: many of them answer the title as well, and the adapters
                # fell behind the base.
                datasets=(DatasetConfig(f"{DATASETS}/searches/1.0.0", "pair"),),
                temperature=0.05,
                **_sizes(steps=180, batch_size=128, max_length=96),
            ),
            Stage(
                name="text_matching",
                objective="text_matching",
                adapters=("text-matching",),
                datasets=(DatasetConfig(f"{DATASETS}/scored/1.0.0", "scored_pair", by_language=True),),
                temperature=1.0,
                **_sizes(steps=50, batch_size=64, max_length=96),
            ),
            Stage(
                name="classification",
                objective="classification",
                adapters=("classification",),
                datasets=(DatasetConfig(f"{DATASETS}/labelled/1.0.0", "labelled_text", by_language=True),),
                num_negatives=1,
                same_class="excluded",  # in so few steps the model would learn to read the numbers and nothing else
                temperature=0.05,
                **_sizes(steps=70, batch_size=64, max_length=96),
            ),
            Stage(
                name="separation",
                objective="separation",
                adapters=("separation",),
                datasets=(DatasetConfig(f"{DATASETS}/labelled/1.0.0", "labelled_text", by_language=True),),
                temperature=0.3,
                **_sizes(steps=50, batch_size=48, max_length=96),
            ),
        ),
    )


def _sizes(steps: int, batch_size: int, max_length: int) -> dict:
    return {
        "steps": steps,
        "warmup_steps": steps // 10,
        "batch_size": batch_size,
        "max_length": max_length,
        "row_length": 192,
        "num_row_counts": 6,
        "learning_rate": 4e-3,
        "dims": DIMS,
    }
