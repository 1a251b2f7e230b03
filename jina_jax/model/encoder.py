"""The encoder: XLM-RoBERTa with rotary (or absolute) positions and task adapters, read from top to bottom.

Letters of all shapes, in docstrings and einsum strings:

    b rows   t tokens of a row   d model   n heads   h head dim   f mlp   k tasks (adapters)   r LoRA rank
    g texts of a row   v vocabulary   l layers

A row holds several texts (`packing.py`). The code is local: it knows no mesh. How it is spread over devices is decided outside.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..config import ModelConfig, Remat
from . import gradient_sums
from .attention import RotaryTables, attention, rotary_tables
from .kernels.tpu import ATTENDED
from .lora import AdaptedDense, AdaptedEmbed, AdapterSpec, Task, contract_table


def gelu(x: Array) -> Array:
    """Exact GELU in float32. Written with erf: `jax.nn.gelu(approximate=False)` goes through erfc, far slower on TPU."""
    x = x.astype(jnp.float32)
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


class Normalised(NamedTuple):
    """A LayerNorm that has its statistics and is still to be applied, by whoever reads it.

    Between two layers this saves TPUs a pass over the states: the statistics are sums that the product before accumulates, and
    the rest is computed as the products behind load their operand. Its reader also has the whole gradient, through the
    statistics too: so a layer that is computed again for the gradient stops before its last product, of which the reader has
    the result.
    """

    x: Float[Array, "*b d"]
    mean: Float[Array, "*b 1"]
    factor: Float[Array, "*b 1"]
    scale: Float[Array, " d"]
    bias: Float[Array, " d"]
    share: Float[Array, ""]
    """Of each number in the statistics of its row: 1 / d; 0 where x is taken as it is."""

    @classmethod
    def of(cls, x: Float[Array, "*b d"]) -> "Normalised":
        """x as it is."""
        one, d = jnp.ones((*x.shape[:-1], 1), jnp.float32), x.shape[-1]
        return cls(x, 0 * one, one, jnp.ones(d, jnp.float32), jnp.zeros(d, jnp.float32), jnp.zeros((), jnp.float32))

    def value(self) -> Float[Array, "*b d"]:
        """In float32."""
        return _value(self)


@jax.custom_vjp
def _value(normalised: Normalised) -> Array:
    x, mean, factor, scale, bias, _ = normalised
    scale, bias = (array.reshape((1,) * (x.ndim - 1) + (-1,)) for array in (scale, bias))
    return (x.astype(jnp.float32) - mean) * (factor * scale) + bias


def _value_forward(normalised: Normalised) -> tuple[Array, Normalised]:
    return _value(normalised), normalised


def _value_backward(normalised: Normalised, d_y: Array) -> tuple[Normalised]:
    x, mean, factor, scale, bias, share = normalised
    every_row = tuple(range(x.ndim - 1))
    unit = (x.astype(jnp.float32) - mean) * factor
    d_unit = d_y * scale.reshape((1,) * len(every_row) + (-1,))
    through_statistics = d_unit.sum(-1, keepdims=True) + unit * (d_unit * unit).sum(-1, keepdims=True)
    d_x = factor * (d_unit - share * through_statistics)
    nothing = jnp.zeros_like(mean)
    d_scale, d_bias = (d_y * unit).sum(every_row), d_y.sum(every_row)
    return (Normalised(d_x.astype(x.dtype), nothing, nothing, d_scale, d_bias, jnp.zeros_like(share)),)


_value.defvjp(_value_forward, _value_backward)


class LayerNorm(nnx.Module):
    """Normalises the last axis, with float32 statistics from one pass over x: E[x^2] - E[x]^2, clamped at 0."""

    def __init__(self, features: int, *, epsilon: float, param_dtype: DTypeLike):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Result in float32."""
        return self.deferred(x).value()

    def deferred(self, x: Float[Array, "*b d"]) -> Normalised:
        y = jax.lax.stop_gradient(x.astype(jnp.float32))  # the statistics' gradient is in that of the value
        mean = y.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean), 0)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return Normalised(x, mean, jax.lax.rsqrt(variance + self.epsilon), scale, bias, jnp.float32(1 / x.shape[-1]))


class Layer(nnx.Module):
    """One post-norm transformer layer. In the encoder every parameter has a leading layer axis [l]."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.mlp_size
        self.num_heads = config.num_heads

        def dense(inputs: int, *features: int) -> AdaptedDense:
            adapters, stddev = AdapterSpec.of(config), config.initializer_range
            return AdaptedDense(inputs, features, adapters, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.qkv = dense(d, 3, d)
        self.out = dense(d, d)
        self.attention_norm = LayerNorm(d, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        self.up = dense(d, f)
        self.down = dense(f, d)
        self.mlp_norm = LayerNorm(d, epsilon=config.layer_norm_eps, param_dtype=param_dtype)

    def __call__(self, before: Normalised, segments: Int[Array, "b t"], tables: RotaryTables | None, task: Task) -> Normalised:
        x = before.value().astype(before.x.dtype)
        qkv = jnp.moveaxis(self.qkv(x, task), 2, 0)
        attended = attention(qkv, segments, tables, num_heads=self.num_heads)
        x = self.attention_norm(x + self.out(attended, task)).astype(x.dtype)
        # The barrier keeps TPU v6e from fusing both products and the GELU into one slow loop.
        hidden = jax.lax.optimization_barrier(gelu(self.up(x, task)).astype(x.dtype))
        return self.mlp_norm.deferred(x + self.down(hidden, task))


Gather = Callable[[Layer], Layer]


class MLMHead(nnx.Module):
    """Masked-language head: dense, GELU, LayerNorm, then the transposed embedding table and a bias."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        d = config.hidden_size
        self.dense = AdaptedDense(
            d, (d,), None, stddev=config.initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.norm = LayerNorm(d, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, param_dtype))

    def __call__(self, states: Float[Array, "b t d"], table: Float[Array, "v d"]) -> Float[Array, "b t v"]:
        """Logits of every position in float32. `losses.masked_lm` computes those of masked positions alone."""
        logits = contract_table(self.transform(states), table)
        return logits + self.bias[...].astype(jnp.float32)[None, None]

    def transform(self, states: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.norm(gelu(self.dense(states))).astype(states.dtype)


class Encoder(nnx.Module):
    """Packed rows of tokens to token states.

    Parameters are stored in `param_dtype` and computed with in `dtype`; LayerNorm, softmax, rotary angles and pooling are in
    float32 whatever the dtype. A model without tasks has no adapter parameters at all. `layers` is one layer whose parameters
    have a leading layer axis, or a list of layers (`inference.layers_apart`).
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
        d, stddev, adapters = config.hidden_size, config.initializer_range, AdapterSpec.of(config)

        def embed(entries: int, adapters: AdapterSpec | None) -> AdaptedEmbed:
            return AdaptedEmbed(entries, d, adapters, stddev=stddev, param_dtype=param_dtype, rngs=rngs)

        self.tokens = embed(config.vocab_size, adapters)
        self.token_types = embed(config.type_vocab_size, adapters)
        absolute = config.position_type == "absolute"
        self.positions = nnx.data(embed(config.max_position_embeddings, None) if absolute else None)
        self.embed_norm = LayerNorm(d, epsilon=config.layer_norm_eps, param_dtype=param_dtype)

        def layer(key: Array) -> Layer:
            return Layer(config, dtype=self.dtype, param_dtype=param_dtype, rngs=nnx.Rngs(key))

        self.layers: Layer | nnx.List[Layer] = jax.vmap(layer)(jax.random.split(rngs.params(), config.num_layers))
        pooler = config.pooler and AdaptedDense(
            d, (d,), adapters, stddev=stddev, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.pooler = nnx.data(pooler or None)
        head = config.mlm_head and MLMHead(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlm_head = nnx.data(head or None)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        tasks: Int[Array, "b g"] | Int[Array, ""] | None = None,
        *,
        gather: Gather | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "b t d"]:
        """Token states in the compute dtype; those of padding mean nothing.

        Args:
            tokens, segments, positions: packed rows, see `packing.Rows`.
            tasks: adapter of each text of a row [b, g], -1 = the base model; or one index [] for the whole batch, which costs
                next to nothing where [b, g] costs a quarter; or None for the base model.
            gather: makes a layer's parameters whole before they are used, inside the loop over layers. For parameters that
                are spread over devices.
            remat: what of a layer a gradient computes again, in place of keeping it, see `config.Remat`.
        """
        task = task_of(tasks, segments)
        run = self._layer_function(segments, positions, task, gather, remat)
        x = Normalised.of(self.embed(self.tokens.rows(tokens), tokens, positions, task))
        if isinstance(self.layers, Layer):
            x, _ = jax.lax.scan(lambda x, layer: (run(layer, x), None), x, self.layers, unroll=self.config.unroll or 1)
        else:
            for layer in self.layers:
                x = jax.lax.optimization_barrier(run(layer, x))  # without it each layer has memory of its own
        return x.value().astype(self.dtype)

    def in_chunks(
        self,
        sums: "Sums",
        tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        tasks: Int[Array, "b g"] | Int[Array, ""] | None = None,
        *,
        gather: Gather | None = None,
        remat: Remat = "none",
    ) -> "tuple[Float[Array, 'b t d'], Sums]":
        """`__call__` inside a loop over chunks of a batch: the gradients of the large parameters arrive at `sums` and are added
        up there. Returns the states, and the sums for the next chunk; they begin as `Sums.of(encoder)`."""
        task = task_of(tasks, segments)
        run = self._layer_function(segments, positions, task, gather, remat)
        table = self.tokens.table[...]
        if gather:
            table = table.astype(self.dtype)  # as it came from the other devices; XLA would write it out in float32
        rows, of_table = gradient_sums.rows(table, sums.table, tokens)

        def step(carry: tuple[Normalised, Layer], inputs: tuple[Layer, Array]) -> tuple[tuple[Normalised, Layer], None]:
            (x, totals), (layer, i) = carry, inputs
            leaves, structure = jax.tree.flatten(layer)
            pairs = [gradient_sums.part(x_i, total, i) for x_i, total in zip(leaves, jax.tree.leaves(totals), strict=True)]
            layer, totals = (jax.tree.unflatten(structure, column) for column in zip(*pairs, strict=True))
            return (run(layer, x), totals), None

        first = Normalised.of(self.embed(rows.astype(jnp.float32), tokens, positions, task))
        numbered = jax.lax.stop_gradient(self.stack), jnp.arange(self.config.num_layers)
        (last, layers), _ = jax.lax.scan(step, (first, sums.layers), numbered, unroll=self.config.unroll or 1)
        return last.value().astype(self.dtype), Sums(layers, of_table)

    @property
    def stack(self) -> Layer:
        """All layers as one, with a leading layer axis; a TypeError where they are a list."""
        if not isinstance(self.layers, Layer):
            raise TypeError("the layers of this encoder lie apart, for inference; gradients need them in one stack")
        return self.layers

    def _layer_function(
        self, segments: Array, positions: Array, task: Task, gather: Gather | None, remat: Remat
    ) -> Callable[[Layer, Normalised], Normalised]:
        tables = self.rotary_tables(positions)

        def run(layer: Layer, x: Normalised) -> Normalised:
            return (gather(layer) if gather else layer)(x, segments, tables, task)

        if remat == "none":
            return run
        policy = jax.checkpoint_policies.save_only_these_names(ATTENDED) if remat == "except_attention" else None
        return jax.checkpoint(run, prevent_cse=False, policy=policy)  # in a scan nothing can be merged with the first pass

    def embed(
        self, rows: Float[Array, "b t d"], tokens: Int[Array, "b t"], positions: Int[Array, "b t"], task: Task
    ) -> Float[Array, "b t d"]:
        """Input of the first layer, given the tokens' rows of the table in float32."""
        x = self.tokens.adapted(rows, tokens, task) + self.token_types(jnp.zeros_like(tokens), task)
        if self.positions is not None:
            # XLM-RoBERTa counts positions from behind the padding id.
            x += self.positions(positions + self.config.pad_id + 1)
        return self.embed_norm(x).astype(self.dtype)

    def rotary_tables(self, positions: Int[Array, "b t"]) -> RotaryTables | None:
        if self.config.position_type == "absolute":
            return None
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta)


class Sums(NamedTuple):
    """The large parameters of an encoder, as the sums of `accumulate`."""

    layers: Layer
    table: Float[Array, "v d"]

    @classmethod
    def of(cls, encoder: Encoder) -> "Sums":
        return cls(encoder.stack, encoder.tokens.table[...])


def task_of(tasks: Int[Array, "b g"] | Int[Array, ""] | None, segments: Int[Array, "b t"]) -> Task:
    """The encoder's tasks as its layers take them."""
    return tasks if tasks is None or tasks.ndim == 0 else task_of_tokens(tasks, segments)


def task_of_tokens(tasks: Int[Array, "b g"], segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Adapter of each token; padding has none."""
    padded = jnp.pad(tasks, ((0, 0), (1, 0)), constant_values=-1)
    return jnp.take_along_axis(padded, segments, axis=1)


def pool(states: Float[Array, "b t d"], segments: Int[Array, "b t"], texts: int) -> Float[Array, "b g d"]:
    """Mean of each text's token states in float32, [b, g, d] with g = `texts`; zeros where a row has no such text."""
    member = segments[:, None, :] == jnp.arange(1, texts + 1)[None, :, None]
    total = jnp.einsum(
        "bgt,btd->bgd",
        member.astype(jnp.float32),
        states.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return total / jnp.maximum(member.sum(-1, keepdims=True), 1).astype(jnp.float32)


def abstract_variables(config: ModelConfig) -> dict[str, nnx.Variable]:
    """Every variable of a model by its path ("layers.qkv.kernel"), with shapes and without arrays."""
    return _by_path(nnx.state(_abstract(config, jnp.float32)))


def variables(encoder: Encoder) -> dict[str, nnx.Variable]:
    """Every variable of an encoder by its path."""
    return _by_path(nnx.state(encoder))


def from_arrays(config: ModelConfig, arrays: Mapping[str, Array], *, dtype: DTypeLike) -> Encoder:
    """An encoder made of given arrays by path; `dtype` is that of the computation."""
    for path, variable in abstract_variables(config).items():
        if variable.shape != arrays[path].shape:
            raise ValueError(f"{path} is {arrays[path].shape}, should be {variable.shape}")
    return from_parts(config, arrays, dtype=dtype)


def from_parts(config: ModelConfig, arrays: Mapping[str, Array], *, dtype: DTypeLike) -> Encoder:
    """`from_arrays` for arrays whose shapes may differ: a device's parts of them, or a padded vocabulary."""
    graphdef, state = nnx.split(_abstract(config, dtype))
    for path, variable in _by_path(state).items():
        variable.set_value(arrays[path])
    return nnx.merge(graphdef, state)


def _abstract(config: ModelConfig, dtype: DTypeLike) -> Encoder:
    return nnx.eval_shape(lambda: Encoder(config, dtype=dtype, rngs=nnx.Rngs(0)))


def _by_path(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
