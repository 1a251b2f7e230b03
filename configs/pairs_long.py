"""Contrastive training on long pairs.

Section 4.2 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/pairs_long.py --workdir runs/pairs_long

Hardware: 2 devices in the paper, 512 pairs on each; 50,000 steps are 51 million pairs.
Data: the long pairs of `pairs_short`.

From the paper: batch, length, steps, rate and temperature.
Chosen here: as in `pairs_short`; chunks of 8 rows.

Expected: 44.2 hours on v5e-16, estimated (docs/scaling.md); result not measured here; paper:
nDCG@10 of 37.63 (misleading syntax), 93.04 (named entities) and 45.91 (polar questions) on
synthetic failure cases (table 6).
"""

from configs._common import PAPER_DIMS
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/pairs_short/model"),
        stages=(
            Stage(
                name="pairs_long",
                objective="pairs",
                datasets=(DatasetConfig("datasets/long_pairs/record_files/1.0.0", "pair", by_language=True),),
                steps=50_000,
                warmup_steps=500,
                batch_size=2 * 512,
                max_length=1024,
                row_length=1024,
                learning_rate=2e-5,
                temperature=0.02,
                dims=PAPER_DIMS,
                encode_chunk_rows=8,
                remat="except_attention",
            ),
        ),
    )
