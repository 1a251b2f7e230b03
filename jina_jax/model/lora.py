"""Dense and embedding layers that carry low-rank adapters for several tasks.

Adapters are parameters of the layer, stacked over tasks. The shape letters are those of
`model/encoder.py`; here `i` and `o` are a layer's inputs and outputs, and `c` the number of
down-projections of the fused projection: 1 where q, k and v share one (the original model), 3 where
each has one (PEFT). Section 2.2 of the jina-embeddings-v3 paper.

A layer takes its `adapter_ids` in one of three forms:
  * None: the base model;
  * one index for the whole batch, [], -1 = none: the adapter is folded into the kernel, in float32,
    and the matmul is the base model's;
  * an index for each token, [b, t], -1 = none: `[x, z]` times the kernel and all adapters' b, where
    z = x @ a holds the down-projections of all adapters with the foreign ones masked. The mix of
    tasks in a batch changes no shape, so nothing is recompiled.

Adapters are trained above a frozen base in a form of its own, `frozen_base.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..config import ModelConfig
from .matmul import add_bias, matmul, matmul_with_lora

AdapterIds = Int[Array, ""] | Int[Array, "b t"] | None


class AdapterParam(nnx.Variable[Array]):
    """Trained adapter array, with `task_axis` in its metadata.

    It is not an `nnx.Param`, so that base and adapters are told apart by type.
    """


class AdapterScale(nnx.Variable[Array]):
    """Scale of each task's update, alpha / rank. Not trained."""


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Number of tasks, rank and alpha of fresh adapters.

    `separate_qkv` gives q, k and v a down-projection each.
    """

    tasks: int
    rank: int
    alpha: float
    separate_qkv: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig) -> "AdapterSpec | None":
        if not config.tasks:
            return None
        return cls(len(config.tasks), config.lora_rank, config.lora_alpha, config.separate_qkv_adapters)


class AdaptedDense(nnx.Module):
    """Dense layer with adapters: y = x @ (kernel + scale_k a_k b_k) + bias.

    kernel [i, o], bias [o], a [i, k, r], b [k, r, o], scale [k]. With `features` (3, o) it is the
    fused projection of q, k and v: kernel [i, 3, o], bias [3, o], a [i, c, k, r], b [k, r, 3, o],
    scale [c, k]. Without adapters the last three are None.
    """

    def __init__(
        self,
        inputs: int,
        features: tuple[int, ...],
        adapters: AdapterSpec | None,
        *,
        stddev: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), (inputs, *features), param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.a: AdapterParam | None = nnx.data(None)
        self.b: AdapterParam | None = nnx.data(None)
        self.scale: AdapterScale | None = nnx.data(None)
        if adapters is None:
            return
        k, r = adapters.tasks, adapters.rank
        c = () if len(features) == 1 else (3,) if adapters.separate_qkv else (1,)
        bound = 1 / math.sqrt(inputs)  # Kaiming uniform with a = sqrt 5, as the original
        a = jax.random.uniform(rngs.params(), (inputs, *c, k, r), param_dtype, -bound, bound)
        self.a = AdapterParam(a, task_axis=-2)
        self.b = AdapterParam(jnp.zeros((k, r, *features), param_dtype), task_axis=-2 - len(features))
        self.scale = AdapterScale(jnp.full((*c, k), adapters.alpha / r, jnp.float32), task_axis=-1)

    def __call__(self, x: Float[Array, "b t i"], adapter_ids: AdapterIds = None) -> Float[Array, "b t *o"]:
        if self.a is None or adapter_ids is None:
            y = matmul(x, self.kernel[...])
        elif adapter_ids.ndim == 0:
            y = matmul(x, self.folded_kernel(adapter_ids))
        else:
            z, rows = self._adapter_rows(x, adapter_ids)
            y = matmul_with_lora(x, z, self.kernel[...], rows)
        bias = self.bias[...].astype(jnp.float32)
        return add_bias(y, bias, self.dtype) if bias.ndim > 1 else (y + bias[None, None]).astype(self.dtype)

    def folded_kernel(self, adapter_ids: Int[Array, ""]) -> Array:
        """Returns kernel + scale a b of one task, computed in float32, in the kernel's dtype.

        Without adapters it returns the kernel.
        """
        kernel = self.kernel[...]
        if self.a is None:
            return kernel
        a, b, scale = self._by_part()
        scale = jnp.where(adapter_ids < 0, 0, jnp.take(scale, jnp.maximum(adapter_ids, 0), axis=1))
        a, b = (jnp.take(array, jnp.maximum(adapter_ids, 0), axis).astype(jnp.float32) for array, axis in ((a, 2), (b, 0)))
        a = jnp.broadcast_to(a * scale[None, :, None], (a.shape[0], b.shape[1], a.shape[2]))
        update = jnp.einsum("icr,rco->ico", a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + update.reshape(kernel.shape)).astype(kernel.dtype)

    def adapter(self, index: int) -> tuple[Float[Array, "i cr"], Float[Array, "cr *o"]]:
        """Returns one adapter's a, times its scale, and its b; their product is the update.

        Where q, k and v have a down-projection each, cr is three times the rank, and b is
        block-diagonal: the rows of each reach that output alone.
        """
        a, b, scale = self._by_part()
        i, c, _, r = a.shape
        a = a[:, :, index] * scale[None, :, index, None]
        b = b[index, None] if c == 1 else jnp.eye(c, dtype=b.dtype)[:, None, :, None] * b[index, None]
        return a.reshape(i, c * r), b.reshape(c * r, *self.kernel[...].shape[1:])

    def _adapter_rows(self, x: Array, adapter_ids: Int[Array, "b t"]) -> tuple[Array, Array]:
        """Returns z and b: the adapters of all tasks as further rows of one contraction."""
        a, b, scale = self._by_part()
        i, c, k, r = a.shape
        n, o = b.shape[2:]
        z = matmul(x, a)  # [b, t, c, k, r]
        # [b, t, c, k]
        gate = jnp.where(adapter_ids[..., None, None] == jnp.arange(k)[None, None, None], scale[None, None], 0)
        z = (z * gate[..., None]).astype(self.dtype).reshape(*x.shape[:2], c * k * r)
        if c == 1:
            rows = b.reshape(k * r, n, o)
        else:  # the z of each of q, k and v reaches that output alone: a block-diagonal b
            own = jnp.eye(n, dtype=b.dtype)[:, None, None, :, None]
            rows = (own * b[None]).reshape(c * k * r, n, o)
        kernel = self.kernel[...]
        return z, rows.reshape(-1, *kernel.shape[1:]).astype(kernel.dtype)

    def _by_part(self) -> tuple[Array, Array, Array]:
        """Returns a [i, c, k, r], b [k, r, n, o] and scale [c, k] for both kinds of layer.

        n is the number of outputs, 3 for the fused projection. A plain layer has c = n = 1.
        """
        assert self.a is not None and self.b is not None and self.scale is not None
        a, b, scale = self.a[...], self.b[...], self.scale[...]
        k, r = a.shape[-2:]
        return a.reshape(a.shape[0], -1, k, r), b.reshape(k, r, -1, b.shape[-1]), scale.reshape(-1, k)


class AdaptedEmbed(nnx.Module):
    """Embedding table with adapters: table[token] + scale_k a[token, k] b_k.

    table [v, d], a [v, k, r], b [k, r, d], scale [k]. The update gathers a few elements for each
    token; the [v, d] update of the table is never built. A fresh adapter has a = 0 and random b,
    the reverse of a dense layer.
    """

    def __init__(
        self,
        entries: int,
        features: int,
        adapters: AdapterSpec | None,
        *,
        stddev: float,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.table = nnx.Param(stddev * jax.random.normal(rngs.params(), (entries, features), param_dtype))
        self.a: AdapterParam | None = nnx.data(None)
        self.b: AdapterParam | None = nnx.data(None)
        self.scale: AdapterScale | None = nnx.data(None)
        if adapters is None:
            return
        k, r = adapters.tasks, adapters.rank
        self.a = AdapterParam(jnp.zeros((entries, k, r), param_dtype), task_axis=-2)
        self.b = AdapterParam(jax.random.normal(rngs.params(), (k, r, features), param_dtype), task_axis=-3)
        self.scale = AdapterScale(jnp.full(k, adapters.alpha / r, jnp.float32), task_axis=-1)

    def __call__(self, token: Int[Array, "b t"], adapter_ids: AdapterIds = None) -> Float[Array, "b t d"]:
        """Looks up embeddings with the adapters' updates; returns float32."""
        return self.adapted(self.rows(token), token, adapter_ids)

    def rows(self, token: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Looks up rows of the table; returns float32 [b, t, d]."""
        return jnp.take(self.table[...], token, axis=0).astype(jnp.float32)

    def adapted(self, rows: Float[Array, "b t d"], token: Int[Array, "b t"], adapter_ids: AdapterIds) -> Float[Array, "b t d"]:
        """Adds the adapters' updates to rows of the table."""
        if adapter_ids is None or self.a is None or self.b is None or self.scale is None:
            return rows
        a, b, scale = self.a[...], self.b[...].astype(jnp.float32), self.scale[...]
        if adapter_ids.ndim == 0:
            scale = jnp.where(adapter_ids < 0, 0, jnp.take(scale, jnp.maximum(adapter_ids, 0)))
            a, b = jnp.take(a, jnp.maximum(adapter_ids, 0), axis=1), jnp.take(b, jnp.maximum(adapter_ids, 0), axis=0)
            z = jnp.take(a, token, axis=0).astype(jnp.float32) * scale
        else:
            k, r, d = b.shape
            gate = jnp.where(adapter_ids[..., None] == jnp.arange(k)[None, None], scale[None, None], 0)
            z = (jnp.take(a, token, axis=0).astype(jnp.float32) * gate[..., None]).reshape(*token.shape, k * r)
            b = b.reshape(k * r, d)
        return rows + matmul(z, b)
