"""A new adapter on a finished model, from your own labelled texts: nothing of this run is in the paper.

    python -m train.prepare records tickets.jsonl --kind labelled_text --out datasets/tickets
    python -m train configs/add_adapter.py --workdir runs/tickets --set stages.0.adapters="('tickets',)"

Hardware: one GPU or TPU chip; on a CPU, hours. The other adapters and the base stay as they are, bit for bit, and the result is
one model with six tasks: `Embedder.load("runs/tickets/model").encode(texts, task="tickets")`.
Sizes are those of the paper's classification adapter, with fewer steps.
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="jinaai/jina-embeddings-v3"),
        stages=(
            Stage(
                name="add_adapter",
                objective="classification",
                adapters=("tickets",),
                datasets=(DatasetConfig("datasets/tickets/record_files/1.0.0", "labelled_text"),),
                steps=1000,
                warmup_steps=50,
                batch_size=64,
                max_length=192,
                row_length=384,
                learning_rate=5e-4,
                temperature=0.02,
                dims=(32, 64, 128, 256, 512, 768, 1024),
                num_negatives=7,
                encode_chunk_rows=16,
                remat="except_attention",
            ),
        ),
    )
