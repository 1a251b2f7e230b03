"""Loads models.

This is the one place that finds a source, recognises its format, and reads the encoder and its
tokenizer.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jax.typing import DTypeLike

from ..config import ModelConfig
from ..errors import ConfigError
from ..files import read_json
from ..model.encoder import Encoder
from ..storage import StoragePath
from ..text.tokenizer import Tokenizer, limit_tokens, load_tokenizer, lower_case
from .hf_config import from_hf
from .native import load_checkpoint
from .pipeline import sentence_settings, transformer_folder
from .published_prompts import check_prompts, with_prompts
from .settings import check_settings
from .sources import checkpoint_format, find_model, local_directory
from .torch_reader import read_torch_checkpoint


class LoadedModel(NamedTuple):
    """An encoder, its tokenizer, and the local directory that they were read from."""

    encoder: Encoder
    tokenizer: Tokenizer
    directory: Path


def load_encoder(
    source: str | StoragePath,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    tokenizer: str | Path | None = None,
    prompts: Mapping[str, str] | None = None,
    strict: bool = False,
) -> LoadedModel:
    """Loads a model from a directory, one in a bucket or the hub, in any supported layout.

    Args:
        source: as `sources.find_model` takes it.
        dtype: compute dtype; None = that of the parameters.
        param_dtype: dtype of the parameters in memory; None = as stored.
        revision: branch, tag or commit on the hub.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors file.
        tokenizer: directory of another tokenizer.json to use; None = the source's.
        prompts: texts by name, laid over the model's own, of which those of a task are its
            instruction. A model without any that is known by its hub id has the published ones.
        strict: settings beside the weights that are not known are an error, not a warning.

    Raises:
        FileNotFoundError: the source or one of its files does not exist.
        CheckpointError, ConfigError: the source is damaged, ambiguous or not supported; the message
            says what and where.
        ValueError: a prompt or its name is no string.
    """
    check_prompts(prompts)
    directory = find_model(source, revision, allow_pickle=allow_pickle)
    own = local_directory(tokenizer) if tokenizer else None
    if checkpoint_format(directory) == "native":
        encoder = load_checkpoint(directory, dtype=dtype, param_dtype=param_dtype)
        check_settings(directory, own, strict=strict)
    else:
        check_settings(directory, own, strict=strict)
        encoder = read_torch_checkpoint(directory, dtype=dtype, param_dtype=param_dtype, allow_pickle=allow_pickle)
    loaded = read_tokenizer(directory, encoder.config, own)
    # A BERT's configuration can name another padding id than its tokenizer.
    config = replace(encoder.config, pad_id=loaded.pad_token_id)
    encoder.config = with_prompts(config, source, prompts or {})
    return LoadedModel(encoder, loaded, directory)


def load_config(directory: Path) -> ModelConfig:
    """Reads the configuration of a model in a local directory, without its weights."""
    if checkpoint_format(directory) == "native":
        return ModelConfig.from_dict(read_json(directory / "config.json"))
    return from_hf(read_json(transformer_folder(directory) / "config.json"))


def read_tokenizer(directory: Path, config: ModelConfig, tokenizer: Path | None = None) -> Tokenizer:
    """Reads the tokenizer of a model in a local directory, with the limit of its settings.

    Args:
        directory: of the model.
        config: of the model.
        tokenizer: directory of another tokenizer.json to use; None = the model's.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        CheckpointError, ConfigError: it is damaged, or another model's, or a setting is wrong.
    """
    if checkpoint_format(directory) == "native":  # its tokenizer keeps what settings there were
        return load_tokenizer(tokenizer or directory, config)
    folder = transformer_folder(directory)
    loaded = load_tokenizer(tokenizer or folder, config)
    _obey_sentence_settings(folder, loaded)
    return loaded


def _obey_sentence_settings(folder: Path, tokenizer: Tokenizer) -> None:
    """Applies sentence-transformers' settings of a Transformer module to its tokenizer.

    The tokenizer keeps them, and everything that uses or saves it does so too.
    """
    path, settings = sentence_settings(folder)
    limit = settings.get("max_seq_length")
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 2:
            raise ConfigError(f"{path}: max_seq_length must be an integer of at least 2, not {limit!r}")
        limit_tokens(tokenizer, limit)
    if settings.get("do_lower_case"):
        lower_case(tokenizer)
