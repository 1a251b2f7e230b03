"""The separation adapter, for clustering and reranking.

Section 4.3 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/separation.py --workdir runs/separation

Hardware: one device in the paper, 12,500 steps of 512.
Data: labelled texts for the CoSENT variant, and pairs of the contrastive stage, which the paper
found to help.

From the paper: batch, length, steps, rate and temperature; the base is frozen; rank 4.
Chosen here: see `configs/_common.py`; the paper's equation (5) has pairs of one class alone, here
each text has a partner of its class (grade 1) and one of another (grade 0); pairs and labelled
texts come in equal shares.

Expected: 0.8 hours on v5e-16, estimated (docs/scaling.md); result not measured here; paper: 45.27
on MTEB's English clustering, 58.13 on its reranking (table 4).
"""

from configs._common import ADAPTER_START, PAPER_DIMS
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(**ADAPTER_START),
        stages=(
            Stage(
                name="separation",
                objective="separation",
                adapters=("separation",),
                datasets=(
                    DatasetConfig("datasets/labelled/record_files/1.0.0", "labelled_text"),
                    DatasetConfig("datasets/pairs/record_files/1.0.0", "pair"),
                ),
                steps=12_500,
                warmup_steps=125,
                batch_size=512,
                max_length=192,
                row_length=384,
                learning_rate=5e-5,
                temperature=0.02,
                dims=PAPER_DIMS,
            ),
        ),
    )
