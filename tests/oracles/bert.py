"""Small random BERT checkpoints, and the tokenizers that such models come with."""

import string
from pathlib import Path
from typing import Any, Literal

import tokenizers
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from .checkpoints import TOKENIZER, copy_tokenizer, generator, randomise, read_json, replace, write_json, write_modules
from .original import State

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=72
)
HEADS = {"none": BertModel, "mlm": BertForMaskedLM, "pretraining": BertForPreTraining}


def word_pieces(directory: Path, mask: bool = True) -> int:
    """Writes a lower-casing WordPiece tokenizer of letters and a few words; returns its size."""
    special = SPECIAL if mask else SPECIAL[:-1]
    words = ["a", "editor", "image", "text", "word", "for", "##s", "##er", "##ing"]
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase + string.digits]
    pieces = list(dict.fromkeys([*special, *words, *letters, *string.punctuation]))
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    backend.add_special_tokens(special)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    parts = zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=False)
    write_json(directory / "tokenizer_config.json", {**dict(parts), "tokenizer_class": "BertTokenizer"})
    return len(pieces)


def write_bert(
    directory: Path,
    *,
    pieces: Literal["words", "sentences"] = "words",
    head: Literal["none", "mlm", "pretraining"] = "none",
    prefix: str | None = None,
    seed: int = 0,
    **fields: Any,
) -> tuple[State, dict]:
    """Writes a BERT with sentence-transformers' files.

    Args:
        pieces: "sentences" is the tokenizer of multilingual-e5-small, which pads with another id
            than its config names.
        head: of the class that writes it.
        prefix: of the encoder's names; None = as the class writes them.
        fields: of its config.

    Returns:
        (tensors of the file, config).
    """
    if pieces == "words":
        vocab = word_pieces(directory)
    else:
        copy_tokenizer(TOKENIZER, directory)
        vocab = 16_000
    config = BertConfig(**({"vocab_size": vocab} | SIZES | fields))
    model = HEADS[head](config)
    randomise(model, generator(seed))
    model.save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    if prefix is not None:
        state = {name if name.startswith("cls.") else prefix + name.removeprefix("bert."): t for name, t in state.items()}
        replace(directory / "model.safetensors", state)
    write_modules(directory, config.max_position_embeddings, config.hidden_size)
    return state, read_json(directory / "config.json")
