"""The separation adapter, for clustering and reranking: section 4.3 and table A1 of the jina-embeddings-v3 paper.

    python -m train configs/separation.py --workdir runs/separation

Hardware: one device in the paper, 12,500 steps of 512. Data: labelled texts for the CoSENT variant, and
pairs of the contrastive stage, which the paper found to help.

From the paper: batch, length, steps, rate and temperature; the base is frozen; rank 4. The rotary base is the one of serving,
20,000. Chosen here: warm-up of 1 % of the steps, AdamW with decay 0.01 and betas (0.9, 0.98), clipping at 1, Matryoshka terms
that weigh the same.
The paper's equation (5) has pairs of one class alone; here each text has a partner of its class (grade 1) and one of another
(grade 0). Pairs and labelled texts come in equal shares.
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/pairs_long/model", rope_theta=20_000.0, lora_rank=4, lora_alpha=1.0),
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
                dims=(32, 64, 128, 256, 512, 768, 1024),
                encode_chunk_rows=32,
                remat="except_attention",
            ),
        ),
    )
