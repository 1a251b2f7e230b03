"""A corpus small enough for a program to run from end to end."""

import json
import lzma
from pathlib import Path

import pytest

from train.data.corpus import BUNDLED, SPLITS


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory) -> Path:
    """Sixty packages of each split that have tags."""
    left = dict.fromkeys(SPLITS, 60)
    file = tmp_path_factory.mktemp("corpus") / "packages.jsonl"
    with lzma.open(BUNDLED, "rt", encoding="utf-8") as lines, file.open("w", encoding="utf-8") as kept:
        for line in lines:
            package = json.loads(line)
            if package["tags"] and left[package["split"]]:
                left[package["split"]] -= 1
                kept.write(line)
    return file
