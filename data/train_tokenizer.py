"""Train the tokenizer of small models: Unigram, 16,000 pieces, XLM-R's special ids and conventions.

    python data/train_tokenizer.py

writes `data/tokenizer/` from the titles and bodies of the bundled corpus' train split, all
languages together, and prints statistics of the test split. Takes three minutes; the same corpus
and release of `tokenizers` give the same files.
"""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import click
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DATA = Path(__file__).resolve().parent
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in XLM-R; <mask> is the last id

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 8194,
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "clean_up_tokenization_spaces": False,
}


def texts(corpus: Path, split: str) -> Iterator[str]:
    with lzma.open(corpus, "rt", encoding="utf-8") as lines:
        for line in lines:
            package = json.loads(line)
            if package["split"] == split:
                for text in package["text"].values():
                    yield text["title"]
                    yield text["body"]


def unigram_tokenizer(model: models.Unigram) -> Tokenizer:
    tokenizer = Tokenizer(model)
    # The rules that XLM-R's compiled table was made from; WhitespaceSplit collapses runs of
    # whitespace.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def learn_pieces(corpus: Path, size: int) -> list[tuple[str, float]]:
    """The `size` best pieces and their log probabilities.

    They do not depend on the order of the trainer's hash tables.
    """
    draft = unigram_tokenizer(models.Unigram())
    draft.train_from_iterator(texts(corpus, "train"), trainers.UnigramTrainer(vocab_size=size))
    scores: dict[str, float] = dict(json.loads(draft.to_str())["model"]["vocab"])
    # The trainer gives the i-th of the rarest characters floor + 0.0001 i, in a hash table's order:
    # give all of them the floor.
    characters = [piece for piece in scores if len(piece) == 1]
    floor = min(scores.values())
    for character in characters:
        if scores[character] < floor + 0.0001 * len(characters):
            scores[character] = floor
    pieces = [(piece, round(score, 6)) for piece, score in scores.items()]
    return sorted(pieces, key=lambda item: (-item[1], item[0]))


def train(corpus: Path, size: int) -> Tokenizer:
    pieces = learn_pieces(corpus, size - len(SPECIAL) - 1)
    vocab = [(token, 0.0) for token in SPECIAL] + pieces + [("<mask>", 0.0)]
    tokenizer = unigram_tokenizer(models.Unigram(vocab, unk_id=SPECIAL.index("<unk>")))
    tokenizer.add_special_tokens([*SPECIAL, AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@click.command(help=__doc__)
@click.option("--corpus", type=click.Path(path_type=Path), default=DATA / "debian_packages.jsonl.xz")
@click.option("--output", type=click.Path(path_type=Path), default=DATA / "tokenizer")
@click.option("--size", default=16_000, show_default=True, help="Pieces in all, special tokens included.")
def main(corpus: Path, output: Path, size: int) -> None:
    tokenizer = train(corpus, size)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    (output / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")

    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts(corpus, "test")))]
    tokens = sum(map(len, ids))
    unknown = sum(row.count(SPECIAL.index("<unk>")) for row in ids)
    click.echo(
        f"{tokenizer.get_vocab_size()} pieces; test split: {len(ids)} texts, "
        f"{tokens / len(ids):.1f} tokens a text, {unknown / tokens:.4%} <unk>"
    )


if __name__ == "__main__":
    main()
