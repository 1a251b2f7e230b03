"""Checks on eight devices that losses of rows split over shards equal those of all rows.

Values and gradients are compared.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jina_jax import ModelConfig
from jina_jax.losses import cosent, info_nce, masked_lm
from jina_jax.model.encoder import MLMHead

N, M, D, DIMS, WEIGHTS = 24, 2, 16, (4, 16), (1.0, 0.5)
AXES = ("data", "fsdp")
rng = np.random.default_rng(0)


def array(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def sharded(loss, arrays: dict, axes: tuple[str, ...], *, replicated: tuple[str, ...] = ()):
    """Returns a jitted function over the mesh, and its arguments: the float arrays and the others.

    The function returns the sum of the local losses, and the gradients of the float arrays: those
    of each shard's local rows, or summed over shards where an array is replicated.
    """
    floats = {name for name, x in arrays.items() if jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating)}
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    axis_name = axes if len(axes) > 1 else axes[0]

    def share(trained: dict, fixed: dict):
        return loss(**trained, **fixed, axis_name=axis_name)

    def step(trained: dict, fixed: dict):
        value, grads = jax.value_and_grad(share)(trained, fixed)
        return jax.lax.psum(value, axes), {k: jax.lax.psum(g, axes) if k in replicated else g for k, g in grads.items()}

    trained = {name: arrays[name] for name in floats}
    fixed = {name: x for name, x in arrays.items() if name not in floats}
    specs = {name: P() if name in replicated else P(axes) for name in arrays}
    of_trained, of_fixed = {k: specs[k] for k in trained}, {k: specs[k] for k in fixed}
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(of_trained, of_fixed), out_specs=(P(), of_trained), check_vma=False)
    return jax.jit(mapped), trained, fixed


def check(loss, arrays: dict, axes: tuple[str, ...] = AXES, **options) -> None:
    step, trained, fixed = sharded(loss, arrays, axes, **options)
    value, grads = step(trained, fixed)
    want, want_grads = jax.jit(jax.value_and_grad(lambda trained: loss(**trained, **fixed)))(trained)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


# Some shards have no valid rows, and some have all.
valid = jnp.asarray(rng.random(N) < 0.6).at[:6].set(False).at[6:12].set(True)
group = jnp.asarray(rng.integers(0, 9, N), jnp.int32)
pairs = {"q": array(N, D), "p": array(N, D)}
masks = {"valid": valid, "group": group}
contrast = partial(info_nce, temperature=0.1, dims=DIMS, weights=WEIGHTS)
check(contrast, pairs)
check(contrast, pairs | {"valid": jnp.zeros(N, bool)})
negatives = {"negatives": array(N, M, D), "negative_group": jnp.asarray(rng.integers(0, 9, (N, M)), jnp.int32)}
for axes in (AXES, ("fsdp",)):
    check(partial(contrast, chunk=2), pairs | negatives | masks, axes)

score = jnp.asarray(rng.integers(0, 4, N), jnp.float32)
ordered = partial(cosent, temperature=0.1, dims=DIMS, weights=WEIGHTS)
scored = {"a": array(N, D), "b": array(N, D), "score": score}
check(ordered, scored, ("fsdp",))
check(ordered, scored | {"valid": valid})

config = ModelConfig(vocab_size=30, hidden_size=D, num_heads=2)
head = MLMHead(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
labels = jnp.where(jnp.asarray(rng.random((N, 5)) < 0.3), jnp.asarray(rng.integers(0, 30, (N, 5))), -1).at[:3].set(-1)
texts = {"states": array(N, 5, D), "labels": labels, "embedding": array(30, D), "head": head}
check(partial(masked_lm, max_masked=N * 5, chunk=4), texts, replicated=("embedding", "head"))

# Half-precision embeddings are gathered, and their gradients reduced, in float32, once: not again
# for each chunk.
jax.config.update("jax_disable_most_optimizations", False)  # as in a user's program
halves = {name: x.astype(jnp.bfloat16) for name, x in pairs.items()}
step, trained, fixed = sharded(partial(contrast, chunk=1), halves, AXES)
text = step.lower(trained, fixed).compile().as_text()
collectives = re.findall(r"= (\S+) (all-gather|reduce-scatter|all-reduce)(?:-start)?\(", text)
assert collectives and not [shape for shape, _ in collectives if shape.startswith("bf16")], collectives
inside = [line for line in text.split("\n") if re.search(r" (all-gather|reduce-scatter)\(", line) and "/while/" in line]
assert not inside, inside
# Gathered are q, p, valid and group.
assert len([1 for _, kind in collectives if kind == "all-gather"]) <= 4, collectives
print("equal")
