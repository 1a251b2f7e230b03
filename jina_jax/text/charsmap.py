"""Builds SentencePiece's table of replaced characters, in the form of tokenizers' `Precompiled`.

That normaliser goes through a text grapheme by grapheme. One of fewer than six bytes is replaced
whole by the shortest entry that it begins with. Where there is none, and in longer ones, each
character that is an entry is replaced.
"""

import struct
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

_MAX_GRAPHEME_BYTES = 5
_VALUE = 0
"""Label of a value among the children of a node; no key holds this byte."""

_WINDOW = 128
"""How far back free units are looked for: farther is slower, and saves few."""


def canonical_pairs(replacements: Mapping[str, str]) -> dict[str, str]:
    """Returns the pairs of a letter and a mark that Unicode composes, and the composed letters.

    They are those of which a table of `replacements` of single characters needs entries: the letter
    has none, which would be found first, and the pair fits into a grapheme that is looked up. A
    character that is replaced by a mark stands for it, such as U+0341 for U+0301.
    """
    variants: dict[str, list[str]] = {}
    for char, text in replacements.items():
        variants.setdefault(text, []).append(char)
    pairs = {}
    for char in map(chr, range(0x10000)):  # a letter beyond has four bytes, and a mark two or more
        pair = unicodedata.normalize("NFD", char)
        composed = unicodedata.normalize("NFC", pair)
        if len(pair) != 2 or composed == pair or pair[0] in replacements:
            continue
        spelled = [pair[0] + mark for mark in (pair[1], *variants.get(pair[1], ()))]
        pairs |= {each: composed for each in spelled if len(each.encode()) <= _MAX_GRAPHEME_BYTES}
    return pairs


def precompiled_charsmap(replacements: Mapping[str, str]) -> bytes:
    """Returns the table in its binary form.

    It is the size of a trie, the trie from UTF-8 to the place of each replacement, and the
    replacements, each ended by a zero byte.
    """
    places, texts = {}, b""
    for text in sorted(set(replacements.values())):
        places[text] = len(texts)
        texts += text.encode() + b"\0"
    units = _double_array({key.encode(): places[text] for key, text in replacements.items()})
    return struct.pack("<I", units.nbytes) + units.tobytes() + texts


def _double_array(values: Mapping[bytes, int]) -> np.ndarray:
    """Returns the trie of `values` as the uint32 units of a double array, as Darts-clone has it.

    The children of a node share a base: that with label c is unit `base ^ c`. A unit holds its
    label, its index ^ the base of its children << 10, and 256 if a value is among them; the unit
    of a value holds it and the highest bit. No two nodes have one base, so that a label tells whose
    child a unit is.
    """
    root: dict[int, Any] = {}
    for key, value in values.items():
        node = root
        for byte in key:
            node = node.setdefault(byte, {})
        node[_VALUE] = value
    units, bases, end = {0: 0}, set(), 1
    todo = [(0, root)]
    while todo:
        index, node = todo.pop()
        base = _free_base(list(node), units, bases, max(1, end - _WINDOW))
        bases.add(base)
        end = max(end, *(1 + (base ^ label) for label in node))
        units[index] |= (index ^ base) << 10 | (_VALUE in node) << 8
        for label, child in node.items():
            units[base ^ label] = label
            if label == _VALUE:
                units[base] = child | 1 << 31
            else:
                todo.append((base ^ label, child))
    array = np.zeros((max(*units, *bases) | 255) + 1, "<u4")  # base ^ c of any byte c is inside
    array[list(units)] = list(units.values())
    return array


def _free_base(labels: Sequence[int], units: Collection[int], bases: Collection[int], start: int) -> int:
    """Returns an unused base whose children at `labels` are free units, the first of them from
    `start` on."""
    while True:
        base = start ^ labels[0]
        if base not in bases and not any(base ^ label in units for label in labels):
            return base
        start += 1
