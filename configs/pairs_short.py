"""Contrastive training on a billion pairs: section 4.2 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/pairs_short.py --workdir runs/pairs_short

Hardware: 8 devices in the paper, 2,048 pairs on each; 60,000 steps are 983 million pairs.
Data: pairs of many sources, one source and one language to a batch; the paper drops pairs whose texts say the same words:
`python -m train.prepare records FILES --kind pair --drop-overlapping --out datasets/pairs`. Give each source a dataset here.

From the paper: the loss in both directions, temperature, batch, length, steps and rate; Matryoshka dimensions.
Chosen here: Matryoshka terms weigh the same, warm-up of 1 % of the steps, AdamW with decay 0.01 and betas (0.9, 0.98),
clipping at 1. Gradient caching in chunks of 32 rows of 384 tokens, two texts of full length to a row; 256 chips have 64 rows
each and need none: `--set stages.0.encode_chunk_rows=None` is a sixth faster there.
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/mlm_long/model", matryoshka_dims=(32, 64, 128, 256, 512, 768, 1024)),
        stages=(
            Stage(
                name="pairs_short",
                objective="pairs",
                datasets=(DatasetConfig("datasets/pairs/record_files/1.0.0", "pair", by_language=True),),
                steps=60_000,
                warmup_steps=600,
                batch_size=8 * 2048,
                max_length=192,
                row_length=384,
                learning_rate=3e-5,
                temperature=0.05,
                dims=(32, 64, 128, 256, 512, 768, 1024),
                encode_chunk_rows=32,
                logit_chunk=1024,
                remat="except_attention",
            ),
        ),
    )
