"""Losses as pure functions of arrays, usable alone: InfoNCE, CoSENT and masked language modelling.

Embeddings come raw, as pooled: each Matryoshka prefix (`dims`, weighted by `weights`, 1 each by
default) is normalised here, and its losses are summed. A zero vector has cosine 0 with everything,
and no gradient. All arithmetic is in float32.

Inside `shard_map(check_vma=False)`, `axis_name` names the axes over which the rows are split. The
result is then **this shard's share: the shares add up to the loss of all rows**. Differentiate the
share and add up the gradients; a psum before the gradient would multiply it, for without vma types
the transpose of psum is psum.

Bad arguments raise ValueError. Sections are those of the jina-embeddings-v3 paper (arXiv
2409.10173).
"""

from .cosent import cosent as cosent
from .info_nce import info_nce as info_nce
from .masked_lm import MaskedLMHead as MaskedLMHead
from .masked_lm import masked_lm as masked_lm
