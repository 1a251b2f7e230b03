"""Contrastive training on a billion pairs.

Section 4.2 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/pairs_short.py --workdir runs/pairs_short

Hardware: 8 devices in the paper, 2,048 pairs on each; 60,000 steps are 983 million pairs.
Data: pairs of many sources, one source and one language to a batch; the paper drops pairs whose
texts say the same words:
`python -m train.prepare records FILES --kind pair --drop-overlapping --out datasets/pairs`.
Give each source a dataset here.

From the paper: the loss in both directions, temperature, batch, length, steps and rate; Matryoshka
dimensions.
Chosen here: see `configs/_common.py`; gradient caching in chunks of 32 rows of 384 tokens, two
texts of full length to a row. 256 chips have 64 rows each and need none:
`--set stages.0.encode_chunk_rows=None` saves 11 % of a step on v5e-256 and 13 % on v6e-256,
estimated.

Expected: 137.2 hours on v5e-16, estimated (docs/scaling.md); result not measured.
"""

from configs._common import PAPER_DIMS
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/mlm_long/model", matryoshka_dims=PAPER_DIMS),
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
                dims=PAPER_DIMS,
                encode_chunk_rows=32,
                logit_chunk=1024,
                remat="except_attention",
            ),
        ),
    )
