"""The two retrieval adapters, trained jointly.

Section 4.3 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/retrieval.py --workdir runs/retrieval

Hardware: one device in the paper, 20,000 steps of 128.
Data: triplets with 7 negatives; MS MARCO and NQ bring theirs, `python -m train.mine` finds some for
other pairs.

From the paper: batch, length, steps, rate and temperature; the base is frozen; rank 4; the
instructions of the two tasks are put before the texts.
Chosen here: see `configs/_common.py`.

Expected: 3.2 hours on v5e-16, estimated (docs/scaling.md); result not measured here; paper: 53.87
on MTEB's English retrieval, with the text-matching adapter on ArguAna, CQADupstack and Quora (table
4); nDCG@10 of 45.78 (misleading syntax), 98.78 (named entities) and 47.62 (polar questions) on
synthetic failure cases (table 6).
"""

from configs._common import ADAPTER_START, PAPER_DIMS
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(**ADAPTER_START),
        stages=(
            Stage(
                name="retrieval",
                objective="retrieval",
                adapters=("retrieval.query", "retrieval.passage"),
                datasets=(
                    DatasetConfig("datasets/msmarco/record_files/1.0.0", "triplet"),
                    DatasetConfig("datasets/nq/record_files/1.0.0", "triplet"),
                    DatasetConfig("datasets/mined/record_files/1.0.0", "triplet"),
                ),
                steps=20_000,
                warmup_steps=200,
                batch_size=128,
                max_length=512,
                row_length=512,
                learning_rate=5e-4,
                temperature=0.05,
                dims=PAPER_DIMS,
                num_negatives=7,
            ),
        ),
    )
