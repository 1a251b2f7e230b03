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
        checkpoint_every=50,
        stages=(
            Stage(
                name="retrieval",
                objective="retrieval",
                adapters=("retrieval.query", "retrieval.passage"),
                datasets=(DatasetConfig(f"{DATASETS}/searches/1.0.0", "pair"),),
                temperature=0.05,
                **_sizes(steps=120, batch_size=32, max_length=96),
            ),
            Stage(
                name="text_matching",
                objective="text_matching",
                adapters=("text-matching",),
                datasets=(DatasetConfig(f"{DATASETS}/scored/1.0.0", "scored_pair"),),
                temperature=0.05,
                **_sizes(steps=30, batch_size=24, max_length=64),
            ),
            Stage(
                name="classification",
                objective="classification",
                adapters=("classification",),
                datasets=(DatasetConfig(f"{DATASETS}/labelled/1.0.0", "labelled_text"),),
                num_negatives=1,
                same_class="excluded",
                temperature=0.05,
                **_sizes(steps=30, batch_size=16, max_length=64),
            ),
            Stage(
                name="separation",
                objective="separation",
                adapters=("separation",),
                datasets=(DatasetConfig(f"{DATASETS}/labelled/1.0.0", "labelled_text"),),
                temperature=0.05,
                **_sizes(steps=30, batch_size=24, max_length=64),
            ),
        ),
    )


def _sizes(steps: int, batch_size: int, max_length: int) -> dict:
    return {
        "steps": steps,
        "warmup_steps": steps // 10,
        "batch_size": batch_size,
        "max_length": max_length,
        "row_length": 192,
        "learning_rate": 1e-3,
        "dims": DIMS,
    }
