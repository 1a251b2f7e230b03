"""The two retrieval adapters, trained jointly: section 4.3 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/retrieval.py --workdir runs/retrieval

Hardware: one device in the paper, 20,000 steps of 128. Data: triplets with 7 negatives; MS MARCO and NQ
bring theirs, `python -m train.mine` finds some for other pairs.

From the paper: batch, length, steps, rate and temperature; the base is frozen; rank 4. The rotary base is the one of serving,
20,000. Chosen here: warm-up of 1 % of the steps, AdamW with decay 0.01 and betas (0.9, 0.98), clipping at 1, Matryoshka terms
that weigh the same.
The instructions of the two tasks are put before the texts.
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/pairs_long/model", rope_theta=20_000.0, lora_rank=4, lora_alpha=1.0),
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
                dims=(32, 64, 128, 256, 512, 768, 1024),
                num_negatives=7,
                encode_chunk_rows=32,
                remat="except_attention",
            ),
        ),
    )
