"""Five adapters above multilingual-e5-small, trained on the corpus in minutes on two CPU cores.

`make quickstart` runs it; by itself, once that has written the model and the data:

    python -m train configs/quickstart.py --workdir runs/mine
    python -m train configs/quickstart.py:retrieval --workdir runs/retrieval    # one stage alone

Hardware: two CPU cores.
Data: the bundled corpus, as `train/quickstart.py` prepares it.

From the paper: the losses, a frozen base under the adapters, query and passage trained jointly, the
stages side by side.
Chosen here: sizes, steps and rates, for minutes.

Expected: 9 minutes, of which 0.6 are compiling; nDCG@10 of 87.8 from English titles to their bodies
and 80.3 from German ones, where the base has 85.8 and 75.5 (docs/quickstart.md).
"""

from train.config import DatasetConfig, InitialModel, Stage, TrainConfig

DATASETS = "runs/quickstart/datasets/debian_packages"
DIMS = (48, 96, 192, 384)


def get_config() -> TrainConfig:
    return _run(_retrieval(), _text_matching(), _classification(), _separation())


def retrieval() -> TrainConfig:
    return _run(_retrieval())


def text_matching() -> TrainConfig:
    return _run(_text_matching())


def classification() -> TrainConfig:
    return _run(_classification())


def separation() -> TrainConfig:
    return _run(_separation())


def _run(*stages: Stage) -> TrainConfig:
    return TrainConfig(
        start=InitialModel(source="runs/quickstart/e5-small", lora_rank=16, lora_alpha=16.0, matryoshka_dims=DIMS),
        checkpoint_every=20,
        stages=stages,
    )


def _retrieval() -> Stage:
    return Stage(
        name="retrieval",
        objective="retrieval",
        adapters=("retrieval.query", "retrieval.passage"),
        # Without hard negatives: more steps are the better use of the minutes (docs/quickstart.md).
        datasets=(DatasetConfig(f"{DATASETS}/searches/1.0.0", "pair"),),
        temperature=0.02,
        dim_weights=(2.0, 1.0, 1.0, 1.0),
        **_sizes(steps=100, batch_size=32),
    )


def _text_matching() -> Stage:
    return Stage(
        name="text_matching",
        objective="text_matching",
        adapters=("text-matching",),
        datasets=(DatasetConfig(f"{DATASETS}/scored/1.0.0", "scored_pair"),),
        temperature=0.05,
        **_sizes(steps=20, batch_size=24),
    )


def _classification() -> Stage:
    return Stage(
        name="classification",
        objective="classification",
        adapters=("classification",),
        datasets=(DatasetConfig(f"{DATASETS}/labelled/1.0.0", "labelled_text"),),
        num_negatives=1,
        same_class="excluded",  # in so few steps the model would learn to read the numbers and nothing else
        temperature=0.05,
        **_sizes(steps=20, batch_size=16),
    )


def _separation() -> Stage:
    return Stage(
        name="separation",
        objective="separation",
        adapters=("separation",),
        datasets=(DatasetConfig(f"{DATASETS}/labelled/1.0.0", "labelled_text"),),
        temperature=0.05,
        **_sizes(steps=20, batch_size=16),
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
