"""Removes from tensor names what a program that wrapped the model has put into them.

DistributedDataParallel puts `module.` before every name, torch.compile `_orig_mod.`, a state dict
of sentence-transformers `0.model.` or `0.auto_model.`, PEFT `base_model.model.`, and a class of
one's own the name of its field. None of them changes what a tensor is, so that whatever stands
before *every* name is left out. Where it stands before some names only, there is more in the file
than one encoder.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."

_AT_ANY_DEPTH = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Wrappers that can also be around a part of a model, such as each layer."""

_ENCODER = re.compile(
    r"(base_model\.model\.)?(roberta\.|bert\.)?(embeddings|emb_ln|encoder\.layers?\.\d+|layers\.\d+|pooler\.dense|lm_head|cls\.predictions)\."
)
"""Beginning of a name of an encoder, in any scheme, or of its adapter in PEFT."""


def unwrapped_names(names: Iterable[str], where: Path) -> dict[str, str]:
    """Returns each name without its wrappers, by the name as it was given.

    Args:
        names: of all tensors of a checkpoint.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a wrapper stands before some of the names only, or two names are one
            without it.
    """
    inner = {name: _AT_ANY_DEPTH.sub("", name) for name in names}
    wrapper = _wrapper(inner.values())
    if not all(name.startswith(wrapper) for name in inner.values()):
        begins = Counter(wrapper if name.startswith(wrapper) else _beginning(name) for name in inner.values())
        listed = ", ".join(f"{begin!r} ({count})" for begin, count in begins.most_common(4))
        raise CheckpointError(
            f"{where} is ambiguous: its tensor names begin with {listed}; what wrappers put before the names is left out only "
            "where it stands before all of them. Save the encoder alone, by its own save_pretrained"
        )
    plain = {name: inside.removeprefix(wrapper).removeprefix(PEFT_PREFIX) for name, inside in inner.items()}
    if len(set(plain.values())) < len(plain):
        twice = [name for name, count in Counter(plain.values()).items() if count > 1]
        raise CheckpointError(f"{where} is ambiguous: with and without the names of wrappers it holds {twice[0]} twice")
    if wrapper or inner.keys() != set(inner.values()):
        logger.info("%s: wrappers are left out of the tensor names, %r is read as %r", where, *next(iter(plain.items())))
    return plain


def _wrapper(names: Iterable[str]) -> str:
    """Returns the shortest beginning behind which the most names are those of an encoder."""
    found = Counter(begin for name in names for begin in _beginnings(name))
    return min(found, key=lambda begin: (-found[begin], len(begin)), default="")


def _beginnings(name: str) -> Iterator[str]:
    """Yields what may be a wrapper's part of a name, the shortest first."""
    for start in [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]:
        if _ENCODER.match(name, start):
            yield name[:start]


def _beginning(name: str) -> str:
    return next(_beginnings(name), "".join(name.partition(".")[:2]))
