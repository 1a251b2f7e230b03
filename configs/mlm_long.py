"""Masked language modelling (MLM) on long texts.

Section 4.1 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/mlm_long.py --workdir runs/mlm_long

Hardware: 8 devices in the paper, 8 texts on each; 60,000 steps are up to 31 billion tokens.
Data: as for `mlm_short`.

From the paper: batch, length, steps and rate; rotary base 10,000.
Chosen here: as in `mlm_short`; one row at a time.

Expected: 25.0 hours on v5e-16, estimated (docs/scaling.md); result not measured here; paper: after
1,000 steps on pairs this base averages 67.12 on multilingual and 76.05 on English tasks,
XLM-RoBERTa 66.62 and 73.38 (table 3).
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/mlm_short/model"),
        stages=(
            Stage(
                name="mlm_long",
                objective="mlm",
                datasets=(DatasetConfig("datasets/culturax/record_files/1.0.0", "text", by_language=True),),
                steps=60_000,
                warmup_steps=600,
                batch_size=8 * 8,
                max_length=8192,
                row_length=8192,
                learning_rate=5e-5,
                encode_chunk_rows=1,
                logit_chunk=2048,
                remat="except_attention",
            ),
        ),
    )
