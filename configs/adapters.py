"""All five adapters in one run: the four runs `retrieval`, `text_matching`, `classification` and `separation`, side by side.

    python -m train configs/adapters.py --workdir runs/adapters

The base is in memory once. A step trains one of the four; each has its own data, optimizer and schedule, so the adapters come
out as in four runs of their own, in one model.
"""

from configs import classification, retrieval, separation, text_matching
from train.config import TrainConfig


def get_config() -> TrainConfig:
    configs = [preset.get_config() for preset in (retrieval, text_matching, classification, separation)]
    return TrainConfig(start=configs[0].start, stages=tuple(stage for config in configs for stage in config.stages))
