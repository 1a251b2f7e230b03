"""The compiled programs of the embedder: packed rows to token states, and to one vector for each text."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from ..model.encoder import Encoder, pool
from ..parallel.mesh import AXES, BATCH
from ..text.packing import max_texts


@partial(jax.jit, static_argnames="mesh")
def token_states(
    encoder: Encoder,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None,
    mesh: Mesh | None = None,
) -> Float[Array, "b t d"]:
    """Token states of packed rows, compiled once for each shape. Over a mesh every process gets all of them."""
    return _over(mesh, _encode)(encoder, tokens, segment_ids, positions, adapter_ids)


@partial(jax.jit, static_argnames="mesh")
def text_embeddings(
    encoder: Encoder,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None,
    mesh: Mesh | None = None,
) -> Float[Array, "b g d"]:
    """Mean of each text of packed rows, before normalisation; otherwise as `token_states`."""
    return _over(mesh, _embed)(encoder, tokens, segment_ids, positions, adapter_ids)


def _over(mesh: Mesh | None, compute: Callable[..., Array]) -> Callable[..., Array]:
    """With rows split over a mesh, and parameters on every device: in half precision the published model has 1.1 GB."""
    if mesh is None:
        return compute

    def local(encoder: Encoder, *inputs: Any) -> Array:
        result = compute(encoder, *inputs)
        return jax.lax.all_gather(result, AXES, tiled=True) if mesh.is_multi_process else result

    def over_mesh(encoder: Encoder, *inputs: Any) -> Array:
        in_specs = tuple(BATCH if x is not None and x.ndim else PartitionSpec() for x in inputs)
        out_specs = PartitionSpec() if mesh.is_multi_process else BATCH
        split = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), *in_specs), out_specs=out_specs, check_vma=False)
        return split(encoder, *inputs)

    return over_mesh


def _embed(encoder: Encoder, tokens: Array, segment_ids: Array, *inputs: Any) -> Array:
    return pool(_encode(encoder, tokens, segment_ids, *inputs), segment_ids, max_texts(tokens.shape[1]))


def _encode(encoder: Encoder, *inputs: Any) -> Array:
    return encoder(*inputs)
