"""Masked language modelling (MLM) on short texts.

Section 4.1 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/mlm_short.py --workdir runs/mlm_short

Hardware: 8 devices in the paper, 128 texts on each; 100,000 steps are up to 52 billion tokens.
Data: CulturaX, 89 languages, English about a fifth of it, one language to a batch: texts with
`language`, made by `python -m train.prepare records FILES --kind text --out datasets/culturax`.

From the paper: XLM-RoBERTa's weights under rotary positions of base 10,000, whole-word masking,
batch, length, steps and rate.
Chosen here: see `configs/_common.py`; masking 30 % (of the jina-embeddings-v2 paper).

Expected: 23.3 hours on v5e-16, estimated (docs/scaling.md); result not measured.
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(
            source="FacebookAI/xlm-roberta-large", position_type="rope", rope_theta=10_000.0, max_position_embeddings=8194
        ),
        stages=(
            Stage(
                name="mlm_short",
                objective="mlm",
                datasets=(DatasetConfig("datasets/culturax/record_files/1.0.0", "text", by_language=True),),
                steps=100_000,
                warmup_steps=1000,
                batch_size=8 * 128,
                max_length=512,
                row_length=512,
                learning_rate=1e-4,
                encode_chunk_rows=32,
                logit_chunk=2048,
                remat="except_attention",
            ),
        ),
    )
