"""The encoder: XLM-RoBERTa with rotary (or absolute) positions and task adapters, read from top to
bottom.

Letters of all shapes, in docstrings and einsum strings:

    b rows   t tokens of a row   d model   n heads   h head dim   f mlp   k tasks (adapters)   r
    LoRA rank g texts of a row   v vocabulary   l layers

A row holds several texts (`text/packing.py`). The code is local: it knows no mesh. How it is spread
over devices is decided outside.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..config import ModelConfig, Remat
from .attention import attention
from .kernels.block_mask import ATTENTION_RESIDUALS
from .layers import DeferredLayerNorm, LayerNorm, gelu
from .lora import AdaptedDense, AdaptedEmbed, AdapterIds, AdapterSpec
from .matmul import matmul_transposed
from .rotary import RotaryTables, rotary_tables


class Layer(nnx.Module):
    """One post-norm transformer layer. In the encoder every parameter has a leading layer axis
    [l]."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.mlp_size
        self.num_heads = config.num_heads

        def dense(inputs: int, *features: int) -> AdaptedDense:
            adapters, stddev = AdapterSpec.from_config(config), config.initializer_range
            return AdaptedDense(inputs, features, adapters, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.qkv = dense(d, 3, d)
        self.out = dense(d, d)
        self.attention_norm = LayerNorm(d, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        self.up = dense(d, f)
        self.down = dense(f, d)
        self.mlp_norm = LayerNorm(d, epsilon=config.layer_norm_eps, param_dtype=param_dtype)

    def __call__(
        self, before: DeferredLayerNorm, segment_ids: Int[Array, "b t"], tables: RotaryTables | None, adapter_ids: AdapterIds
    ) -> DeferredLayerNorm:
        x = before.value().astype(before.x.dtype)
        qkv = jnp.moveaxis(checkpoint_name(self.qkv(x, adapter_ids), PRODUCTS), 2, 0)
        attended = attention(qkv, segment_ids, tables, num_heads=self.num_heads)
        x = self.attention_norm(checkpoint_name(x + self.out(attended, adapter_ids), PRODUCTS)).astype(x.dtype)
        # The barrier keeps TPU v6e from fusing both products and the GELU into one slow loop.
        hidden = jax.lax.optimization_barrier(gelu(checkpoint_name(self.up(x, adapter_ids), PRODUCTS)).astype(x.dtype))
        return self.mlp_norm.deferred(x + self.down(hidden, adapter_ids))


PRODUCTS = "products"
"""Name of the results of a layer's matmuls, for `Remat`."""

KEPT: dict[Remat, tuple[str, ...]] = {
    "except_products": (PRODUCTS, ATTENTION_RESIDUALS),
    "except_attention": (ATTENTION_RESIDUALS,),
    "full": (),
}
"""Names of what a gradient does not recompute."""

Gather = Callable[[Layer], Layer]
LayerFunction = Callable[[Layer, DeferredLayerNorm], DeferredLayerNorm]
Carried = TypeVar("Carried")


class MLMHead(nnx.Module):
    """Masked-language head: dense, GELU, LayerNorm, then the transposed embedding table and a
    bias."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        d = config.hidden_size
        self.dense = AdaptedDense(
            d, (d,), None, stddev=config.initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.norm = LayerNorm(d, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, param_dtype))

    def __call__(self, states: Float[Array, "b t d"], table: Float[Array, "v d"]) -> Float[Array, "b t v"]:
        """Logits of every position in float32; `losses.masked_lm` computes masked positions
        alone."""
        logits = matmul_transposed(self.transform(states), table)
        return logits + self.bias[...].astype(jnp.float32)[None, None]

    def transform(self, states: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns what is multiplied with the embedding table."""
        return self.norm(gelu(self.dense(states))).astype(states.dtype)


class Encoder(nnx.Module):
    """XLM-RoBERTa: packed rows of tokens to token states.

    Parameters are stored in `param_dtype` and computed with in `dtype`; LayerNorm, softmax, rotary
    angles and pooling are in float32 whatever the dtype. A model without tasks has no adapter
    parameters at all. `layers` is one layer whose parameters have a leading layer axis, or a list
    of layers (`parameters.unstack_layers`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        d, stddev, adapters = config.hidden_size, config.initializer_range, AdapterSpec.from_config(config)

        def embed(entries: int, adapters: AdapterSpec | None) -> AdaptedEmbed:
            return AdaptedEmbed(entries, d, adapters, stddev=stddev, param_dtype=param_dtype, rngs=rngs)

        self.tokens = embed(config.vocab_size, adapters)
        self.token_types = embed(config.type_vocab_size, adapters)
        absolute = config.position_type == "absolute"
        self.positions = nnx.data(embed(config.max_position_embeddings, None) if absolute else None)
        self.embed_norm = LayerNorm(d, epsilon=config.layer_norm_eps, param_dtype=param_dtype)

        # A vmap over keys makes one layer whose parameters have a leading axis [l], as the scan
        # takes it.
        def layer(key: Array) -> Layer:
            return Layer(config, dtype=self.dtype, param_dtype=param_dtype, rngs=nnx.Rngs(key))

        self.layers: Layer | nnx.List[Layer] = jax.vmap(layer)(jax.random.split(rngs.params(), config.num_layers))
        self.pooler: AdaptedDense | None = nnx.data(None)
        if config.pooler:
            self.pooler = AdaptedDense(d, (d,), adapters, stddev=stddev, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlm_head: MLMHead | None = nnx.data(None)
        if config.mlm_head:
            self.mlm_head = MLMHead(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None = None,
        *,
        gather: Gather | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "b t d"]:
        """Token states in the compute dtype; those of padding mean nothing.

        Args:
            tokens, segment_ids, positions: packed rows, see `text.packing.PackedBatch`.
            adapter_ids: adapter of each text of a row [b, g], -1 = the base model; or one index []
                for the whole batch, which costs next to nothing where [b, g] costs a quarter; or
                None for the base model.
            gather: makes the parameters of a layer that are sharded over devices complete before
                they are used, inside the loop over layers.
            remat: what of a layer a gradient recomputes instead of keeping it, see `config.Remat`.
        """
        rows = self.tokens.rows(tokens)
        apply = self.layer_function(segment_ids, positions, adapter_ids, gather, remat)
        states, _ = self.forward(rows, tokens, segment_ids, positions, adapter_ids, partial(self._apply_layers, apply))
        return states

    def forward(
        self,
        rows: Float[Array, "b t d"],
        tokens: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None,
        apply_layers: Callable[[DeferredLayerNorm], tuple[DeferredLayerNorm, Carried]],
    ) -> tuple[Float[Array, "b t d"], Carried]:
        """Embeds, applies the layers, and normalises: the one body of every forward pass.

        Args:
            rows: the tokens' rows of the embedding table, in float32.
            apply_layers: from the first layer's input to the last one's output, and what else its
                loop carries out.
        """
        x = self.embed(rows, tokens, positions, layer_adapter_ids(adapter_ids, segment_ids))
        last, carried = apply_layers(DeferredLayerNorm.identity(x))
        return last.value().astype(self.dtype), carried

    def _apply_layers(self, apply: LayerFunction, x: DeferredLayerNorm) -> tuple[DeferredLayerNorm, None]:
        if isinstance(self.layers, Layer):
            return jax.lax.scan(lambda x, layer: (apply(layer, x), None), x, self.layers, unroll=self.config.unroll or 1)
        for layer in self.layers:
            # without it each layer has memory of its own
            x = jax.lax.optimization_barrier(apply(layer, x))
        return x, None

    @property
    def stacked_layers(self) -> Layer:
        """All layers as one with a leading layer axis; TypeError where they are a list."""
        if not isinstance(self.layers, Layer):
            raise TypeError("the layers of this encoder are unstacked, for inference; gradients need them stacked")
        return self.layers

    def layer_function(
        self,
        segment_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None,
        gather: Gather | None,
        remat: Remat,
    ) -> LayerFunction:
        """What one step of the loop over layers computes: one layer, gathered and rematerialised as
        asked for."""
        tables, layer_ids = self.rotary_tables(positions), layer_adapter_ids(adapter_ids, segment_ids)

        def apply(layer: Layer, x: DeferredLayerNorm) -> DeferredLayerNorm:
            return (gather(layer) if gather else layer)(x, segment_ids, tables, layer_ids)

        if remat == "none":
            return apply
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
        # In a scan nothing can be merged with the first pass, so no barrier has to prevent it.
        return jax.checkpoint(apply, prevent_cse=False, policy=policy)

    def embed(
        self, rows: Float[Array, "b t d"], tokens: Int[Array, "b t"], positions: Int[Array, "b t"], adapter_ids: AdapterIds
    ) -> Float[Array, "b t d"]:
        """Input of the first layer, given the tokens' rows of the table in float32."""
        x = self.tokens.adapted(rows, tokens, adapter_ids) + self.token_types(jnp.zeros_like(tokens), adapter_ids)
        if self.positions is not None:
            x += self.positions(absolute_positions(tokens, positions, self.config))
        return self.embed_norm(x).astype(self.dtype)

    def rotary_tables(self, positions: Int[Array, "b t"]) -> RotaryTables | None:
        if self.config.position_type == "absolute":
            return None
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta)


def absolute_positions(tokens: Int[Array, "b t"], positions: Int[Array, "b t"], config: ModelConfig) -> Int[Array, "b t"]:
    """Returns the row of the position table for each token of a packed batch.

    BERT's is the position in the text. XLM-RoBERTa's begin behind the padding id and follow the
    tokens: one that is the padding id, which a text can spell, has position pad_id and is not
    counted.

    Args:
        tokens: their ids.
        positions: counted from 0 inside each text.
        config: of the model.
    """
    if config.is_bert:
        return positions
    pad = (tokens == config.pad_id).astype(jnp.int32)
    before = jnp.cumsum(pad, axis=1) - pad  # of the row
    at_start = jax.lax.cummax(jnp.where(positions == 0, before, 0), axis=1)  # before the token's own text
    return config.first_position + jnp.where(pad == 1, -1, positions - (before - at_start))


def layer_adapter_ids(adapter_ids: Int[Array, "b g"] | Int[Array, ""] | None, segment_ids: Int[Array, "b t"]) -> AdapterIds:
    """Returns the adapter ids of a batch as its layers take them: of each token, or one, or
    None."""
    return adapter_ids if adapter_ids is None or adapter_ids.ndim == 0 else token_adapter_ids(adapter_ids, segment_ids)


def token_adapter_ids(adapter_ids: Int[Array, "b g"], segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns the adapter of each token; padding has none (-1)."""
    padded = jnp.pad(adapter_ids, ((0, 0), (1, 0)), constant_values=-1)
    return jnp.take_along_axis(padded, segment_ids, axis=1)


def pool(states: Float[Array, "b t d"], pool_ids: Int[Array, "b t"], texts: int) -> Float[Array, "b g d"]:
    """Means of token states in float32: g = `texts` of them a row, over the tokens of equal pool
    id.

    Args:
        states: token states.
        pool_ids: 1..g = the mean that a token belongs to, 0 = none.
        texts: means of a row; zeros where no token belongs to one.
    """
    member = pool_ids[:, None, :] == jnp.arange(1, texts + 1)[None, :, None]
    total = jnp.einsum(
        "bgt,btd->bgd",
        member.astype(jnp.float32),
        states.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return total / jnp.maximum(member.sum(-1, keepdims=True), 1).astype(jnp.float32)
