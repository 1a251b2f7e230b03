"""A new adapter on a finished model, from your own labelled texts.

    python -m train.prepare records tickets.jsonl --kind labelled_text --out datasets/tickets
    python -m train configs/add_adapter.py --workdir runs/tickets \\
        --set stages.0.adapters="('tickets',)"

Hardware: one GPU or TPU chip.
Data: your texts with their labels. The other adapters and the base stay the same, bit for bit, and
the result is one model with six tasks:
`Embedder.load("runs/tickets/model").encode(texts, task="tickets")`.

From the paper: nothing of this run; length, rate, temperature and negatives are those of its
classification adapter.
Chosen here: 1,000 steps of 64, the first 50 of them warm-up, and otherwise as in
`configs/_common.py`.

Expected: not measured.
"""

from configs._common import PAPER_DIMS
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
                dims=PAPER_DIMS,
                num_negatives=7,
            ),
        ),
    )
