"""Chunks of tokens and of sentences: slices that join to the text, each with a token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from uniseg.sentencebreak import sentences as unicode_sentences

from helpers.tokenizer_files import FILES, tokenizer_file
from jina_jax.text.chunking import by_sentences, by_tokens

TEXTS = (
    "An image editor. It opens many files!\n\nAnd prints them (“all of them.”) Does it? ",
    "画像を編集します。写真を開いて、印刷します。「はい！」そう？",
    "สวัสดีครับ ผมชื่อ สมชาย\nและผมอยู่ที่นี่",
    "यह एक संपादक है। यह फ़ाइलें खोलता है॥ هل هذا محرر؟ نعم.",
    "🦊 emoji 👩‍👩‍👧 flags 🇩🇪🇯🇵 and 1️⃣",
)
letters = st.text(st.sampled_from("aAb1 .!?”)(,:\n\r\u2028\u00a0\u200b\u0301日本。、！ก้ำ॥🦊👩\u200d🇩"), max_size=40)


@pytest.fixture(scope="module", params=[*FILES])
def any_tokenizer(request) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file(request.param)))
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def offsets(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[int, int]]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets


def first_visible(text: str, start: int, end: int) -> int | None:
    return next((place for place in range(start, end) if not text[place].isspace()), None)


@given(text=letters, size=st.integers(1, 9))
def test_slices_join_to_the_text_and_each_has_a_token(any_tokenizer, text, size):
    firsts = {first_visible(text, *span) for span in offsets(any_tokenizer, text)} - {None}
    for cut in (by_tokens, by_sentences):
        slices, end = cut(text, size, any_tokenizer), 0
        assert "".join(slices) == (text if firsts else "") and bool(slices) == bool(firsts)
        for each in slices:
            begin, end = end, end + len(each)
            assert firsts & {*range(begin, end)} and each.strip()


@pytest.mark.parametrize("size", [1, 4, 16, 1000])
def test_slices_are_as_long_as_asked_for(any_tokenizer, size):
    for text in TEXTS:
        firsts = [first for span in offsets(any_tokenizer, text) if (first := first_visible(text, *span)) is not None]
        most = max(size, *(firsts.count(first) for first in firsts))  # a character is not cut, whatever its tokens
        slices, end, counts = by_tokens(text, size, any_tokenizer), 0, []
        for each in slices:
            begin, end = end, end + len(each)
            counts.append(sum(begin <= first < end for first in firsts))
        assert sum(counts) == len(firsts) and max(counts) <= most
        assert all(before + after > size - 1 for before, after in zip(counts, counts[1:], strict=False))
    assert by_tokens("a b c d e f g", 3, any_tokenizer) == ["a b c ", "d e f ", "g"]


@given(text=st.text(st.sampled_from("aAb1 .!?”),:\n\r\u2028\u00a0\u200b\u0301日本。、！ก้ำ॥🦊👩\u200d🇩"), max_size=40))
def test_sentences_are_unicodes(tokenizer, text):
    """Two tokens are of one slice exactly if they are of one sentence."""
    slice_of = [number for number, each in enumerate(by_sentences(text, 1, tokenizer)) for _ in each]
    sentence_of = [number for number, each in enumerate(unicode_sentences(text) if text else ()) for _ in each]
    covered, pairs = 0, set()
    for start, end in offsets(tokenizer, text):
        first = first_visible(text, start, end)
        if first is not None and first >= covered:
            pairs.add((slice_of[first], sentence_of[first]))
        covered = max(covered, end)
    assert len(pairs) == len({number for number, _ in pairs}) == len({number for _, number in pairs})


def test_sentences_of_all_scripts(tokenizer):
    assert by_sentences(TEXTS[0], 1, tokenizer) == [
        "An image editor. ",
        "It opens many files!\n\n",
        "And prints them (“all of them.”) ",
        "Does it? ",
    ]
    assert by_sentences(TEXTS[1], 1, tokenizer) == ["画像を編集します。", "写真を開いて、印刷します。", "「はい！」", "そう？"]
    assert by_sentences(TEXTS[1], 3, tokenizer) == ["画像を編集します。写真を開いて、印刷します。「はい！」", "そう？"]
    assert by_sentences(TEXTS[2], 1, tokenizer) == ["สวัสดีครับ ผมชื่อ สมชาย\n", "และผมอยู่ที่นี่"]
    assert len(by_sentences(TEXTS[3], 1, tokenizer)) == 4
    assert by_sentences("Version 3.5 e.g. this is one.", 1, tokenizer) == ["Version 3.5 e.g. this is one."]


def test_a_text_without_a_token_has_no_chunks(any_tokenizer):
    for cut in (by_tokens, by_sentences):
        assert [cut(text, 2, any_tokenizer) for text in ("", " \n\t ", "\u2028\u3000")] == [[], [], []]
    assert by_tokens("  a  ", 2, any_tokenizer) == ["  a  "] and by_sentences("\n\na\n\n", 2, any_tokenizer) == ["\n\na\n\n"]


def test_a_tokenizer_that_truncates_is_not_obeyed_and_not_changed():
    backend = Tokenizer.from_file(str(tokenizer_file("ours")))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    assert by_tokens("a b c d e f g h", 2, backend) == ["a b ", "c d ", "e f ", "g h"]
    assert backend.truncation["max_length"] == 4 and backend.padding["length"] == 16


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [0, -3, 1.5, True, None])
def test_a_size_must_be_an_integer_of_at_least_1(tokenizer, size):
    with pytest.raises(ValueError, match=f"tokens must be an integer of at least 1, not {size!r}"):
        by_tokens("a", size, tokenizer)
    with pytest.raises(ValueError, match=f"sentences must be an integer of at least 1, not {size!r}"):
        by_sentences("a", size, tokenizer)
