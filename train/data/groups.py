"""Numbers of groups: a text is no negative of an anchor whose number it has.

Equal text or equal group is an equal number, and so on from one to the next: the texts and groups
of a batch are the nodes of a graph, and a number stands for one of its connected components. Nodes
are known by hashes, so that processes can compare what they hold without sending texts.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .examples import Example


def group_links(examples: Sequence[Example]) -> UInt64[np.ndarray, "n links 2"]:
    """Returns the links of each example, as pairs of nodes.

    They are the anchor with its positive, each negative with its group, and the anchor with its
    group. A node without another is linked with itself.
    """
    nodes = [node for example in examples for link in _links(example) for node in link]
    return np.frombuffer(b"".join(nodes), np.uint64).reshape(len(examples), -1, 2)


def group_numbers(links: UInt64[np.ndarray, "n links 2"]) -> Int32[np.ndarray, "n links-1"]:
    """Returns the number of each anchor and of its negatives, from the links of a complete batch.

    A number is the beginning of the least hash of its component. Two components have the same one
    in a billion, which costs a negative.
    """
    nodes, indices = np.unique(links, return_inverse=True)
    first, second = indices.reshape(-1, 2).T
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(len(nodes), len(nodes)))
    _, component = connected_components(graph, directed=False)
    _, least = np.unique(component, return_index=True)
    numbers = (nodes[least] >> np.uint64(33)).astype(np.int32)
    return numbers[component[indices.reshape(links.shape)[:, :-1, 0]]]


def count_contradictions(examples: Sequence[Example]) -> int:
    """Number of examples with their own anchor, positive or group among their negatives."""
    return sum(
        not set(example.texts[:2]).isdisjoint(example.texts[2:]) or (example.group or None) in example.negative_groups
        for example in examples
    )


def _links(example: Example) -> list[tuple[bytes, bytes]]:
    groups = [example.group, example.group, *(example.negative_groups or [""] * len(example.texts[2:]))]
    members = [_member(text, group, example.by_text) for text, group in zip(example.texts, groups, strict=False)]
    anchor, positive = members[0], members[:2][-1]
    return [(anchor[0], positive[0]), *members[2:], anchor]


def _member(text: str, group: str, by_text: bool) -> tuple[bytes, bytes]:
    """Nodes of a text and of its group."""
    of_group = _node("group", group)
    of_text = _node("text", text) if by_text else of_group
    return of_text, of_group if group else of_text


def _node(kind: str, name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8, person=kind.encode()).digest()
