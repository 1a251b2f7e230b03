"""What the processes that share a batch agree on: its number of rows, and the numbers of groups.

Every process reads only its share of the examples. It sends hashes of what its texts and groups are
to the main process, which links them across the batch and answers each with its numbers: a batch is
the same however many processes share it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jina_jax.parallel.processes import Answers

from .examples import Example
from .groups import count_contradictions, group_links, group_numbers

Ask = Callable[[int, bytes, Answers], bytes]
"""As `jina_jax.parallel.processes.asking_main` returns it."""


class Agreed(NamedTuple):
    """What holds for a batch."""

    rows: Int[np.ndarray, " parts"]
    """Most rows of each part that a device of any process needs."""
    groups: Int32[np.ndarray, "n numbers"]
    """Numbers of the groups of this process's examples, as `TrainBatch` has them."""


def agree_on(
    rows: Int[np.ndarray, " parts"],
    examples: Sequence[Example],
    ask: Callable[[bytes, Answers], bytes],
    tell: Callable[[int], None],
) -> Agreed:
    """Returns what holds for all processes.

    Args:
        rows: most rows of each part that a device of this process needs.
        examples: this process's share of the batch.
        ask: takes the value of this process to the main process.
        tell: called in the main process if examples of the batch contradict themselves, with their
            number.
    """
    links = group_links(examples)
    head = np.array([*rows, count_contradictions(examples)], np.uint64)

    def answers(shares: list[bytes]) -> list[bytes]:
        table = np.stack([np.frombuffer(share, np.uint64) for share in shares])
        most, contradictions = table[:, : len(rows)].max(axis=0), int(table[:, len(rows)].sum())
        if contradictions:
            tell(contradictions)
        numbers = group_numbers(table[:, len(head) :].reshape(-1, *links.shape[1:])).reshape(len(shares), -1)
        return [np.append(most.astype(np.int32), share).tobytes() for share in numbers]

    answer = np.frombuffer(ask(np.concatenate([head, links.reshape(-1)]).tobytes(), answers), np.int32)
    return Agreed(answer[: len(rows)], answer[len(rows) :].reshape(len(examples), -1))


def ask_nobody(_: int, value: bytes, answers: Answers) -> bytes:
    """Is `Ask` in a program of one process."""
    return answers([value])[0]


agree_alone = partial(agree_on, ask=partial(ask_nobody, 0), tell=lambda count: None)
"""`agree_on` for a process that has the whole batch."""
