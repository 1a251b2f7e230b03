"""Builds XLM-RoBERTa's tokenizer, which multilingual-E5 has, from its pieces and tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .charsmap import canonical_pairs, precompiled_charsmap

if TYPE_CHECKING:
    import tokenizers

SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
"""Special tokens by their part."""


def xlmr_tokenizer(pieces: Sequence[str], scores: Sequence[float], replacements: Mapping[str, str]) -> "tokenizers.Tokenizer":
    """Builds the tokenizer: it neither truncates nor pads.

    Args:
        pieces: the vocabulary in the order of the ids, special tokens included.
        scores: log-probability of each piece.
        replacements: single characters and what replaces them. Letters and marks that Unicode
            composes are composed without being listed, as in SentencePiece's nmt_nfkc.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {piece: index for index, piece in enumerate(pieces) if piece in SPECIAL.values()}
    vocabulary = list(zip(pieces, scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=ids[SPECIAL["unk_token"]], byte_fallback=False))
    charsmap = precompiled_charsmap({**canonical_pairs(replacements), **replacements})
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    begin, end = SPECIAL["bos_token"], SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, end, "$B:0", end],
        special_tokens=[(token, ids[token]) for token in (begin, end)],
    )
    tokenizer.add_special_tokens([*ids])
    return tokenizer
