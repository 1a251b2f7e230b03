"""The text-matching adapter: section 4.3 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/text_matching.py --workdir runs/text_matching

Hardware: one device in the paper, 15,000 steps of 256. Data: graded pairs (STS12, SICK and their
translations) for CoSENT, and triplets of natural-language inference for InfoNCE; each step has one of them and its loss.

From the paper: batch, length, steps, rate and temperature; the base is frozen; rank 4. The rotary base is the one of serving,
20,000. Chosen here: warm-up of 1 % of the steps, AdamW with decay 0.01 and betas (0.9, 0.98), clipping at 1, Matryoshka terms
that weigh the same.
A triplet has one negative.
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/pairs_long/model", rope_theta=20_000.0, lora_rank=4, lora_alpha=1.0),
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
                dims=(32, 64, 128, 256, 512, 768, 1024),
                num_negatives=1,
                encode_chunk_rows=32,
                remat="except_attention",
            ),
        ),
    )
