"""The classification adapter: section 4.3 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/classification.py --workdir runs/classification

Hardware: one device in the paper, 11,500 steps of 256. Data: labelled texts of sentiment, intent and
topic. A record becomes a tuple of two texts of its class and seven of others, after Gecko (Lee et al., 2024).

From the paper: batch, length, steps, rate and temperature; the base is frozen; rank 4. The rotary base is the one of serving,
20,000. Chosen here: warm-up of 1 % of the steps, AdamW with decay 0.01 and betas (0.9, 0.98), clipping at 1, Matryoshka terms
that weigh the same.
The number that ends all texts of a tuple, so that other tuples of its class do no harm: nine random digits.
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/pairs_long/model", rope_theta=20_000.0, lora_rank=4, lora_alpha=1.0),
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
                dims=(32, 64, 128, 256, 512, 768, 1024),
                num_negatives=7,
                encode_chunk_rows=32,
                remat="except_attention",
            ),
        ),
    )
