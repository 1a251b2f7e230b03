"""The compiled forward passes of the embedder: packed rows to token states, and to one vector a
text or a chunk."""

from collections.abc import Callable, Sequence
from functools import cache, partial, update_wrapper
from typing import Any

import jax
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from ..model.device import compiler_options
from ..model.encoder import Encoder, pool
from ..parallel.mesh import AXES, BATCH
from ..text.packing import max_texts


class ForwardPass:
    """A function of an encoder under `jax.jit`, with the compiler's options for the kind of device
    that the encoder is on."""

    def __init__(self, function: Callable[..., Any], static_argnames: Sequence[str]):
        @cache
        def jitted(kind: str | None) -> Any:
            return jax.jit(function, static_argnames=static_argnames, compiler_options=compiler_options(kind))

        self._jitted = jitted
        update_wrapper(self, function)

    def __call__(self, encoder: Encoder, *inputs: Any, **static: Any) -> Any:
        return self._jitted(_kind(encoder))(encoder, *inputs, **static)

    def lower(self, encoder: Encoder, *inputs: Any, **static: Any) -> Any:
        """Lowers as the function under `jax.jit` does; an encoder of shapes needs shardings."""
        return self._jitted(_kind(encoder)).lower(encoder, *inputs, **static)

    def programs(self, encoder: Encoder) -> int:
        """Returns the number of programs compiled for the kind of device of an encoder."""
        return self._jitted(_kind(encoder))._cache_size()


@partial(ForwardPass, static_argnames=("mesh",))
def token_states(
    encoder: Encoder,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "b t d"]:
    """Token states of packed rows; one program for each shape. Over a mesh every process gets all
    of them.

    Args:
        encoder: replicated over the mesh.
        tokens, segment_ids, positions: packed rows, see `packing.PackedBatch`.
        adapter_ids: as the encoder takes them.
        mesh: the devices that the rows are split over; None = one device.
    """
    return _over_mesh(_encode, mesh)(encoder, tokens, segment_ids, positions, adapter_ids)


@partial(ForwardPass, static_argnames=("mesh",))
def text_embeddings(
    encoder: Encoder,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None,
    pool_ids: Int[Array, "b t"] | None = None,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "b g d"]:
    """Means of token states, before normalisation: of the tokens of equal `pool_ids` in a row.

    Args:
        pool_ids: 1..g = the mean that a token belongs to, 0 = none; None = `segment_ids`, a mean
            for each text.

    The others are those of `token_states`.
    """
    pool_ids = segment_ids if pool_ids is None else pool_ids
    return _over_mesh(_embed, mesh)(encoder, tokens, segment_ids, positions, adapter_ids, pool_ids)


@partial(ForwardPass, static_argnames=("means", "mesh"))
def chunk_means(
    encoder: Encoder,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None,
    pool_ids: Int[Array, "b t"],
    *,
    means: int,
    mesh: Mesh | None = None,
) -> Float[Array, "b _ d"]:
    """As `text_embeddings`, with `means` of them a row, of which a text may have several."""
    return _over_mesh(partial(_embed, means=means), mesh)(encoder, tokens, segment_ids, positions, adapter_ids, pool_ids)


@partial(ForwardPass, static_argnames=("mesh",))
def embeddings_and_states(
    encoder: Encoder,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None,
    pool_ids: Int[Array, "b t"],
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "b g d"], Float[Array, "b t d"]]:
    """What `text_embeddings` and `token_states` return, of one pass: a program for either wish."""
    return _over_mesh(_embed_and_encode, mesh)(encoder, tokens, segment_ids, positions, adapter_ids, pool_ids)


def _embed(
    encoder: Encoder,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    adapter_ids: Any,
    pool_ids: Array,
    means: int | None = None,
) -> Array:
    pooled, _ = _embed_and_encode(encoder, tokens, segment_ids, positions, adapter_ids, pool_ids, means)
    return pooled


def _embed_and_encode(
    encoder: Encoder,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    adapter_ids: Any,
    pool_ids: Array,
    means: int | None = None,
) -> tuple[Array, Array]:
    states = _encode(encoder, tokens, segment_ids, positions, adapter_ids)
    return pool(states, pool_ids, means or max_texts(tokens.shape[1])), states


def _encode(encoder: Encoder, *inputs: Any) -> Array:
    return encoder(*inputs)


def _kind(encoder: Encoder) -> str | None:
    """Kind of the devices of an encoder; None inside another program, and of shapes without
    devices."""
    table = encoder.tokens.table.get_value()
    sharding = None if isinstance(table, Tracer) else getattr(table, "sharding", None)
    return None if sharding is None else next(iter(sharding.device_set)).device_kind


def _over_mesh(compute: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`compute` with rows split over a mesh, and all parameters on every device: in half precision
    the published model has 1.1 GB."""
    if mesh is None:
        return compute

    def local(encoder: Encoder, *inputs: Any) -> Any:
        result = compute(encoder, *inputs)
        return jax.lax.all_gather(result, AXES, tiled=True) if mesh.is_multi_process else result

    def over_mesh(encoder: Encoder, *inputs: Any) -> Any:
        in_specs = tuple(BATCH if x is not None and x.ndim else PartitionSpec() for x in inputs)
        out_specs = PartitionSpec() if mesh.is_multi_process else BATCH
        split = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), *in_specs), out_specs=out_specs, check_vma=False)
        return split(encoder, *inputs)

    return over_mesh
