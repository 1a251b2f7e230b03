"""Loads the tokenizer, always from `tokenizer.json` and never from remote code, and applies it."""

import os
from collections.abc import Mapping, Sequence
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

_DEFAULTS = {
    "bos_token": ("<s>",),
    "eos_token": ("</s>",),
    "unk_token": ("<unk>", "[UNK]"),
    "sep_token": ("</s>", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]"),
    "cls_token": ("<s>", "[CLS]"),
    "mask_token": ("<mask>", "[MASK]"),
}
"""Special tokens by their part, of XLM-R and of BERT, each taken where the vocabulary holds it."""

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")
"""Classes of tokenizer_config.json that have no settings of their own."""

_BERT_FIELDS = (
    ("do_lower_case", "lowercase", True),
    ("strip_accents", "strip_accents", None),
    ("tokenize_chinese_chars", "handle_chinese_chars", True),
)
"""Field of tokenizer_config.json, attribute of the normaliser, and default where BERT's class is
named, as in transformers."""


def load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """Loads the tokenizer of a checkpoint directory.

    It is that of tokenizer.json. The special tokens and the limit are those of
    tokenizer_config.json and special_tokens_map.json, by the rules of transformers; no token is
    added to the vocabulary. It may pad with another id than a BERT's configuration names, on which
    nothing depends there.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        CheckpointError: the file is damaged, or is not the model's tokenizer (more pieces than the
            vocabulary, another padding id), or a special token is not in its vocabulary.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no tokenizer.json; the tokenizer is needed to embed text")
    settings_path = directory / "tokenizer_config.json"
    settings, special_path = _read_if_there(settings_path), directory / "special_tokens_map.json"
    limit = settings.get("model_max_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 2):
        raise CheckpointError(f"{settings_path}: model_max_length must be a number of at least 2, not {limit!r}")
    # transformers reads the other file only where this one does not list the added tokens.
    named = settings if "added_tokens_decoder" in settings else settings | _read_if_there(special_path)
    try:
        tokenizer = _fast_tokenizer_class()(tokenizer_file=str(path), model_max_length=limit)
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{path} is damaged or not a tokenizer: {error}") from error
    try:
        _obey_settings(tokenizer.backend_tokenizer, settings)
        special = _special_tokens(named, tokenizer.backend_tokenizer, directory)
        _mark_special(tokenizer.backend_tokenizer, [token for part, token in special.items() if named.get(part)])
    except (TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{directory}: a setting of the tokenizer has a value of the wrong type: {error}") from error
    for part, token in special.items():
        setattr(tokenizer, part, token)
    pieces = max(tokenizer.get_vocab().values()) + 1
    if pieces > config.vocab_size:
        raise CheckpointError(f"{path} has {pieces} pieces, the model {config.vocab_size}: it is another model's tokenizer")
    if tokenizer.pad_token_id is None or (tokenizer.pad_token_id != config.pad_id and not config.is_bert):
        raise CheckpointError(f"{path} pads with id {tokenizer.pad_token_id}, the model with {config.pad_id}")
    return tokenizer


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _obey_settings(backend: "tokenizers.Tokenizer", settings: Mapping[str, Any]) -> None:
    """Changes a tokenizer to what tokenizer_config.json says of its added tokens, and of BERT's
    normaliser."""
    import tokenizers

    listed = (settings.get("added_tokens_decoder") or {}).values()
    flags = [{key: value for key, value in token.items() if key != "__type"} for token in listed]
    # Only with other flags, such as lstrip: the ids stay.
    backend.add_tokens([tokenizers.AddedToken(**f) for f in flags if backend.token_to_id(f["content"]) is not None])
    kind, normalizer = settings.get("tokenizer_class"), backend.normalizer
    if not isinstance(normalizer, tokenizers.normalizers.BertNormalizer) or kind in _GENERIC:
        return
    for field, attribute, default in _BERT_FIELDS:
        if kind or field in settings:
            setattr(normalizer, attribute, settings.get(field, default))
    backend.normalizer = normalizer


def _special_tokens(named: Mapping[str, Any], backend: "tokenizers.Tokenizer", directory: Path) -> dict[str, str]:
    """Special tokens by their part: those named, else the usual ones, where the vocabulary has
    them."""
    special = {}
    padding = backend.padding or {}
    for part, usual in _DEFAULTS.items():
        token = _content(named.get(part)) or (padding.get("pad_token") if part == "pad_token" else None)
        if token is not None and backend.token_to_id(token) is None:
            raise CheckpointError(f"{directory} names the {part} {token!r}, which tokenizer.json does not hold")
        held = [each for each in ([*usual] if token is None else [token]) if backend.token_to_id(each) is not None]
        special |= {part: held[0]} if held else {}
    return special


def _mark_special(backend: "tokenizers.Tokenizer", tokens: Sequence[str]) -> None:
    """Has pieces of the vocabulary that a file names as special tokens cut out of texts whole, as
    transformers does; those that are listed as such keep their flags."""
    listed = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([token for token in tokens if token not in listed])


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


def limit_tokens(tokenizer: Tokenizer, limit: int) -> None:
    """Lowers the limit of a tokenizer to `limit` tokens; it keeps that when it is saved."""
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)


def lower_case(tokenizer: Tokenizer) -> None:
    """Has a tokenizer lower-case texts before anything else, and keep that when it is saved.

    As in sentence-transformers, special tokens are found before, and one that has such a step
    already is left as it is.
    """
    from tokenizers import normalizers

    if not lower_cases(tokenizer):
        before = tokenizer.backend_tokenizer.normalizer
        steps = [normalizers.Lowercase()] if before is None else [normalizers.Lowercase(), before]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)


def lower_cases(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a step that lower-cases texts, as `lower_case` puts it in."""
    from tokenizers import normalizers

    normalizer: Any = tokenizer.backend_tokenizer.normalizer
    steps = normalizer if isinstance(normalizer, normalizers.Sequence) else [normalizer]
    return any(isinstance(step, normalizers.Lowercase) for step in steps)


def private_backend(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """Returns a copy of the Rust tokenizer that neither truncates nor pads.

    A user's tokenizer keeps its settings, and what it is used for meanwhile changes nothing here.
    """
    return _copied(tokenizer.backend_tokenizer)


def without_limits(tokenizer: "Tokenizer | tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Returns the Rust tokenizer, or a copy where it truncates or pads."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return backend if backend.truncation is None and backend.padding is None else _copied(backend)


def _copied(backend: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    import tokenizers

    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


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
