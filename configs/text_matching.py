"""The text-matching adapter.

Section 4.3 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/text_matching.py --workdir runs/text_matching

Hardware: one device in the paper, 15,000 steps of 256.
Data: graded pairs (STS12, SICK and their translations) for CoSENT, and triplets of natural-language
inference for InfoNCE; each step has one of them and its loss.

From the paper: batch, length, steps, rate and temperature; the base is frozen; rank 4.
Chosen here: see `configs/_common.py`; a triplet has one negative.

Expected: 0.5 hours on v5e-16, estimated (docs/scaling.md); result not measured here; paper: 85.80
on MTEB's English STS (table 4), 70.39 on LongEmbed (table 5).
"""

from configs._common import ADAPTER_START, PAPER_DIMS
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(**ADAPTER_START),
        stages=(
            Stage(
                name="text_matching",
                objective="text_matching",
                adapters=("text-matching",),
                datasets=(
                    DatasetConfig("datasets/sts12/record_files/1.0.0", "scored_pair"),
                    DatasetConfig("datasets/sick/record_files/1.0.0", "scored_pair"),
                    DatasetConfig("datasets/nli/record_files/1.0.0", "triplet"),
                ),
                steps=15_000,
                warmup_steps=150,
                batch_size=256,
                max_length=192,
                row_length=384,
                learning_rate=1e-4,
                temperature=0.05,
                dims=PAPER_DIMS,
                num_negatives=1,
            ),
        ),
    )
