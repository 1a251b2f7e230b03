"""The classification adapter.

Section 4.3 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/classification.py --workdir runs/classification

Hardware: one device in the paper, 11,500 steps of 256.
Data: labelled texts of sentiment, intent and topic. A record becomes a tuple of two texts of its
class and seven of others, after Gecko (Lee et al., 2024).

From the paper: batch, length, steps, rate and temperature; the base is frozen; rank 4; a unique id
ends all texts of a tuple, so that other tuples of its class do no harm.
Chosen here: see `configs/_common.py`; the id is a number of nine random digits.

Expected: 1.3 hours on v5e-16, estimated (docs/scaling.md); result not measured here; paper: 82.58
on MTEB's English classification, 84.01 on its pair classification (table 4).
"""

from configs._common import ADAPTER_START, PAPER_DIMS
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(**ADAPTER_START),
        stages=(
            Stage(
                name="classification",
                objective="classification",
                adapters=("classification",),
                datasets=(
                    DatasetConfig("datasets/sentiment/record_files/1.0.0", "labelled_text"),
                    DatasetConfig("datasets/intent/record_files/1.0.0", "labelled_text"),
                    DatasetConfig("datasets/topic/record_files/1.0.0", "labelled_text"),
                ),
                steps=11_500,
                warmup_steps=115,
                batch_size=256,
                max_length=192,
                row_length=384,
                learning_rate=5e-4,
                temperature=0.02,
                dims=PAPER_DIMS,
                num_negatives=7,
            ),
        ),
    )
