"""Late chunking in torch, written from the paper (arXiv 2409.04701, Algorithms 1 and 2).

Token by token and list by list, over any function from token ids to states.
"""

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

States = Callable[[list[int]], Tensor]
"""Token ids -> last states [t, d]."""


def chunk_of_tokens(
    tokenizer: Tokenizer, prompt: str, chunks: Sequence[str], separator: str
) -> tuple[list[int], list[int], int]:
    """Returns token ids, the chunk of each token, and how many tokens stand before the document."""
    text, owner = prompt, [-1] * len(prompt)
    for number, chunk in enumerate(chunks):
        between = separator if number else ""
        text += between + chunk
        owner += [-1] * len(between) + [number] * len(chunk)
    encoding = tokenizer.encode(text)
    numbers, before, current, begun = [], 0, 0, False
    for (start, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        places = [] if special else [place for place in range(start, end) if owner[place] >= 0 and not text[place].isspace()]
        current = owner[places[0]] if places else current
        numbers.append(current)
        begun = begun or (not special and end > len(prompt))
        before += not begun
    return encoding.ids, numbers, before


def windowed_states(states: States, ids: list[int], limit: int, overlap: int, before: int = 0, behind: int = 0) -> Tensor:
    """States of all tokens: of windows of `limit` tokens, each later one without its first
    `overlap`.

    The first `before` tokens and the last `behind` stand around every window; their states are
    those of the first and the last.
    """
    if len(ids) <= limit:
        return states(ids)
    head, body, foot = ids[:before], ids[before : len(ids) - behind], ids[len(ids) - behind :]
    size, start, out = limit - before - behind, 0, []
    while True:
        inside = body[start : start + size]
        found = states(head + inside + foot)
        out.append(found[: before + len(inside)] if start == 0 else found[before + overlap : before + len(inside)])
        if start + size >= len(body):
            return torch.cat([*out, found[before + len(inside) :]])
        start += size - overlap


def chunk_means(states: Tensor, numbers: list[int]) -> Tensor:
    """Mean of the states of each chunk: [c, d]."""
    chunk = torch.tensor(numbers)
    return torch.stack([states[chunk == number].mean(0) for number in range(max(numbers) + 1)])
