"""Loads models.

This is the one place that finds a source, recognises its format, and reads the encoder and its
tokenizer.
"""

from pathlib import Path
from typing import NamedTuple

from jax.typing import DTypeLike

from ..config import ModelConfig
from ..files import read_json
from ..model.encoder import Encoder
from ..text.tokenizer import Tokenizer, load_tokenizer
from .hf_config import from_hf
from .native import load_checkpoint
from .sources import checkpoint_format, find_model
from .torch_reader import read_torch_checkpoint


class LoadedModel(NamedTuple):
    """An encoder, its tokenizer, and the local directory that they were read from."""

    encoder: Encoder
    tokenizer: Tokenizer
    directory: Path


def load_encoder(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Loads a model from a directory, a remote directory or the hub, in any supported layout.

    Args:
        source: as `sources.find_model` takes it.
        dtype: compute dtype; None = that of the parameters.
        param_dtype: dtype of the parameters in memory; None = as stored.
        revision: branch, tag or commit on the hub.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors file.
        tokenizer: directory of another tokenizer.json to use; None = the source's.

    Raises:
        FileNotFoundError: the source or one of its files does not exist.
        CheckpointError, ConfigError: the source is damaged, ambiguous or not supported; the message
            says what and where.
    """
    directory = find_model(source, revision)
    if checkpoint_format(directory) == "native":
        encoder = load_checkpoint(directory, dtype=dtype, param_dtype=param_dtype)
    else:
        encoder = read_torch_checkpoint(directory, dtype=dtype, param_dtype=param_dtype, allow_pickle=allow_pickle)
    return LoadedModel(encoder, load_tokenizer(Path(tokenizer or directory), encoder.config), directory)


def load_config(directory: Path) -> ModelConfig:
    """Reads the configuration of a model in a local directory, without its weights."""
    fields = read_json(directory / "config.json")
    return ModelConfig.from_dict(fields) if checkpoint_format(directory) == "native" else from_hf(fields)
