"""Five adapters above multilingual-e5-small, trained on the corpus in minutes on two CPU cores.

`make quickstart` runs it; by itself, once that has written the model and the data:

    python -m train configs/quickstart.py --workdir runs/mine

Hardware: two CPU cores.
Data: the bundled corpus, as `train/quickstart.py` prepares it.

From the paper: the losses, a frozen base under the adapters, query and passage trained jointly, the
stages side by side.
Chosen here: sizes, steps and rates, for minutes.
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig

DATASETS = "runs/quickstart/datasets/debian_packages"
DIMS = (48, 96, 192, 384)


def get_config() -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/quickstart/e5-small", lora_rank=16, lora_alpha=16.0, matryoshka_dims=DIMS),
        checkpoint_every=20,
        stages=(
            Stage(
                name="retrieval",
                objective="retrieval",
                adapters=("retrieval.query", "retrieval.passage"),
                datasets=(DatasetConfig(f"{DATASETS}/searches/1.0.0", "pair"),),
                temperature=0.02,
                dim_weights=(2.0, 1.0, 1.0, 1.0),
                **_sizes(steps=60, batch_size=32),
            ),
            Stage(
                name="text_matching",
                objective="text_matching",
                temperature=0.05,
                adapters=("text-matching",),
                datasets=(DatasetConfig(f"{DATASETS}/scored/1.0.0", "scored_pair"),),
                **_sizes(steps=20, batch_size=24),
            ),
            Stage(
                name="classification",
                objective="classification",
                temperature=0.05,
                adapters=("classification",),
                datasets=(DatasetConfig(f"{DATASETS}/labelled/1.0.0", "labelled_text"),),
                num_negatives=1,
                same_class="excluded",  # in so few steps the model would learn to read the numbers and nothing else
                **_sizes(steps=20, batch_size=16),
            ),
            Stage(
                name="separation",
                objective="separation",
                temperature=0.05,
                adapters=("separation",),
                datasets=(DatasetConfig(f"{DATASETS}/labelled/1.0.0", "labelled_text"),),
                **_sizes(steps=20, batch_size=16),
            ),
        ),
    )


def _sizes(steps: int, batch_size: int) -> dict:
    return {
        "steps": steps,
        "warmup_steps": steps // 10,
        "batch_size": batch_size,
        # Most of what a description says is in its first sentences.
        "max_length": 64,
        "row_length": 192,
        "num_row_counts": 2,  # each that occurs is compiled, and compiling is a good part of minutes
        "learning_rate": 1e-3,
        "dims": DIMS,
    }
