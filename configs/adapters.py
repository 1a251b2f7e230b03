"""All five adapters in one run.

    python -m train configs/adapters.py --workdir runs/adapters

The four runs `retrieval`, `text_matching`, `classification` and `separation`, side by side. The
base is in memory once. A step trains one of the four; each has its own data, optimizer and
schedule, so the adapters come out as in four separate runs, in one model.

Hardware, data, from the paper, chosen here: as in the four.

Expected: 5.8 hours on v5e-16, the sum of the four, estimated (docs/scaling.md); result not
measured here; paper: 65.52 averaged over MTEB's English tasks (table 4).
"""

from configs import classification, retrieval, separation, text_matching
from train.config import TrainConfig


def get_config() -> TrainConfig:
    configs = [preset.get_config() for preset in (retrieval, text_matching, classification, separation)]
    return TrainConfig(start=configs[0].start, stages=tuple(stage for config in configs for stage in config.stages))
