"""Loads the tokenizer, always from `tokenizer.json` and never from remote code, and applies it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelConfig
from ..errors import CheckpointError
from ..files import read_json
from .unicode import lone_surrogate

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Tokenizer = Any  # transformers is imported at first use: it takes longer than all others

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_XLM_R_SPECIAL = dict(zip(_SPECIAL, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True))


def load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """Loads the tokenizer of a checkpoint directory.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        CheckpointError: the file is damaged, or is not the model's tokenizer (more pieces than the
            vocabulary, another padding id).
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no tokenizer.json; the tokenizer is needed to embed text")
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    limit = settings.get("model_max_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 2):
        raise CheckpointError(f"{settings_path}: model_max_length must be a number of at least 2, not {limit!r}")
    special = {name: _content(settings.get(name)) or default for name, default in _XLM_R_SPECIAL.items()}
    try:
        tokenizer = _fast_tokenizer_class()(tokenizer_file=str(path), model_max_length=limit, **special)
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{path} is damaged or not a tokenizer: {error}") from error
    pieces = max(tokenizer.get_vocab().values()) + 1
    if pieces > config.vocab_size:
        raise CheckpointError(f"{path} has {pieces} pieces, the model {config.vocab_size}: it is another model's tokenizer")
    if tokenizer.pad_token_id != config.pad_id:
        raise CheckpointError(f"{path} pads with id {tokenizer.pad_token_id}, the model with {config.pad_id}")
    return tokenizer


def _fast_tokenizer_class() -> type["Tokenizer"]:
    """Imports transformers' class without its advice to install PyTorch."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before
    return PreTrainedTokenizerFast


def max_tokens(tokenizer: Tokenizer, config: ModelConfig) -> int:
    """Maximum number of tokens of a text, special tokens included.

    It is the lower of the limits of the tokenizer and of the positions.
    """
    return min(int(tokenizer.model_max_length), config.max_tokens)


def private_backend(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """Returns a copy of the Rust tokenizer that neither truncates nor pads.

    A user's tokenizer keeps its settings, and what it is used for meanwhile changes nothing here.
    """
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenize(backend: "tokenizers.Tokenizer", texts: Sequence[str], limit: int) -> tuple[list[list[int]], list[bool]]:
    """Returns the token ids of each text with its special tokens, and whether it was cut.

    Args:
        backend: from `private_backend`; any number of threads may use it.
        texts: to tokenise.
        limit: tokens of a text that are kept, the last special token among them.
    """
    ids = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
    cut = [len(text) > limit for text in ids]
    return [text[: limit - 1] + text[-1:] if is_cut else text for text, is_cut in zip(ids, cut, strict=True)], cut


def check_unicode(texts: Sequence[str]) -> None:
    """Raises ValueError with the index of a text that holds a lone surrogate.

    Such a text is not valid Unicode.
    """
    for index, text in enumerate(texts):
        if (position := lone_surrogate(text)) is not None:
            raise ValueError(
                f"text {index} is not valid Unicode: a lone surrogate at position {position}; replace or remove it"
            )


def _content(token: Any) -> str | None:
    """String of a special token, which is written as a string or as an object with its content."""
    return token.get("content") if isinstance(token, dict) else token
