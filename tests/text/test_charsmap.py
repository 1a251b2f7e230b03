"""SentencePiece's table of replaced characters: tokenizers reads from it what was put in."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax.text.charsmap import canonical_pairs, precompiled_charsmap

normalizers = pytest.importorskip("tokenizers").normalizers

# Neighbours of these do not join in a grapheme; of one to four bytes, with common beginnings.
CHARS = st.one_of(
    st.sampled_from("abc019\u00e4\u00e5\u0101\u0410\u0411\u2190\u2191\u2200\u4e00\u4e01\u5000\U0001d400\U0001d401\U00020000"),
    st.characters(categories=["Lu", "Ll", "Nd", "Sm"]),
)


@given(st.dictionaries(CHARS, st.text(CHARS, max_size=3), min_size=1), st.data())
def test_every_character_of_the_table_is_replaced_and_no_other(replacements, data):
    text = data.draw(st.text(st.one_of(st.sampled_from(sorted(replacements)), CHARS)))
    normalizer = normalizers.Precompiled(precompiled_charsmap(replacements))
    assert normalizer.normalize_str(text) == "".join(replacements.get(char, char) for char in text)


def test_a_table_of_thousands_of_entries_holds_each():
    rng = np.random.default_rng(0)
    chars = [chr(code) for code in rng.choice(np.arange(0x3400, 0x9FFF), 8000, replace=False)]
    replacements = {char: f"{number}" for number, char in enumerate(chars)}
    normalizer = normalizers.Precompiled(precompiled_charsmap(replacements))
    assert [normalizer.normalize_str(char) for char in chars] == list(replacements.values())


def test_letters_and_marks_are_composed_as_in_unicode():
    normalizer = normalizers.Precompiled(precompiled_charsmap(canonical_pairs({"\u0341": "\u0301"})))
    for text in ("e\u0301", "A\u030a", "\u03b1\u0301", "\u0438\u0306", "\u22b5\u0338", "e\u0341"):
        assert normalizer.normalize_str(text) == unicodedata.normalize("NFC", text)
        assert len(normalizer.normalize_str(text)) == 1
    # Not from the start of the text alone, nor from each letter.
    assert normalizer.normalize_str("cafe\u0301s, q\u0301") == "caf\u00e9s, q\u0301"


def test_no_pair_begins_with_a_character_that_has_an_entry():
    assert "e\u0301" in canonical_pairs({})
    assert not [pair for pair in canonical_pairs({"e": "E"}) if pair[0] == "e"]
