"""Operations on the adapters of a model: add, drop, extract, replace, merge and fold.

Those that return an encoder return a new one, which shares the arrays that they did not change. An
adapter outside a model is a mapping of paths to arrays with one task: `extract_adapter` returns it
and `add_adapter` takes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Int

from ..config import ModelConfig
from .encoder import Encoder
from .lora import AdaptedDense, AdaptedEmbed, AdapterParam, AdapterScale
from .parameters import abstract_variables, from_arrays, variables

Adapter = Mapping[str, Array]


def add_adapter(
    encoder: Encoder,
    task: str,
    adapter: Adapter | None = None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    instruction: str = "",
    rngs: nnx.Rngs | None = None,
) -> Encoder:
    """Adds a task behind the tasks that the model has.

    Args:
        encoder: a model with or without adapters.
        task: a name that the model does not have yet.
        adapter: arrays from `extract_adapter`; None for a fresh adapter, which changes nothing
            until it is trained.
        rank: of a fresh adapter; None = that of the configuration. Adapters of different ranks are
            padded to the largest, exactly.
        alpha: LoRA's alpha of a fresh adapter; None = that of the configuration.
        instruction: text put before the inputs of this task.
        rngs: random keys, needed for a fresh adapter only.

    Returns:
        A new encoder with one more task.

    Raises:
        ValueError: the task exists, the adapter does not fit this model, or a fresh adapter has no
            rngs.
    """
    config = encoder.config
    if task in config.tasks:
        raise ValueError(f"the model has a task {task!r} already; its tasks are {list(config.tasks)}")
    if adapter is None:
        if rngs is None:
            raise ValueError("a fresh adapter needs rngs")
        adapter = _fresh_adapter(encoder, {"lora_rank": rank, "lora_alpha": alpha}, rngs)
    old = extract_adapters(encoder)
    ranks = (array.shape[-1] for path, array in (*old.items(), *adapter.items()) if path.endswith(".a"))
    parts = (arrays["layers.qkv.a"].shape[-3] for arrays in (old, adapter) if "layers.qkv.a" in arrays)
    new_config = replace(
        config,
        tasks=(*config.tasks, task),
        lora_rank=max(ranks, default=config.lora_rank),
        separate_qkv_adapters=max(parts, default=1) == 3,
        prompts=(*(item for item in config.prompts if item[0] != task), (task, instruction)),
    )
    expected = abstract_variables(_with_one_task(new_config, task))
    adapted = {path for path, variable in expected.items() if _is_adapter(variable)}
    if adapted != adapter.keys():
        raise ValueError(f"not an adapter of this model: missing or unexpected {sorted(adapted ^ adapter.keys())}")
    arrays = {}
    for path in adapted:
        pieces = [_widened(path, array, expected[path]) for array in (old.get(path), adapter[path]) if array is not None]
        arrays[path] = jnp.concatenate(pieces, expected[path].get_metadata("task_axis"))
    return _with_adapters(encoder, new_config, arrays)


def drop_adapter(encoder: Encoder, task: str) -> Encoder:
    """Drops one task; without its last task the model has no adapter parameters at all."""
    config, index = encoder.config, encoder.config.task_index(task)
    others = jnp.array([i for i in range(len(config.tasks)) if i != index], jnp.int32)
    arrays = _select_tasks(encoder, others) if len(others) else {}
    tasks = tuple(name for name in config.tasks if name != task)
    return _with_adapters(
        encoder, replace(config, tasks=tasks, prompts=tuple(item for item in config.prompts if item[0] != task)), arrays
    )


def extract_adapter(encoder: Encoder, task: str) -> dict[str, Array]:
    """Adapter of one task, as arrays by path."""
    return _select_tasks(encoder, jnp.array([encoder.config.task_index(task)], jnp.int32))


def extract_adapters(encoder: Encoder, tasks: Sequence[str] | None = None) -> dict[str, Array]:
    """Adapter arrays by path: those of the given tasks, in that order, or of all tasks."""
    if tasks is not None:
        return _select_tasks(encoder, jnp.array([encoder.config.task_index(task) for task in tasks], jnp.int32))
    return {path: variable.get_value() for path, variable in variables(encoder).items() if _is_adapter(variable)}


def replace_adapters(encoder: Encoder, tasks: Sequence[str], adapters: Adapter) -> Encoder:
    """Replaces the arrays of some tasks; the inverse of `extract_adapters(encoder, tasks)`."""
    indices = jnp.array([encoder.config.task_index(task) for task in tasks], jnp.int32)
    arrays = extract_adapters(encoder)
    for path, variable in abstract_variables(encoder.config).items():
        if path in adapters:
            axis = variable.get_metadata("task_axis")
            moved = jnp.moveaxis(arrays[path], axis, 0).at[indices].set(jnp.moveaxis(adapters[path], axis, 0))
            arrays[path] = jnp.moveaxis(moved, 0, axis)
    return _with_adapters(encoder, encoder.config, arrays)


def base_arrays(encoder: Encoder) -> dict[str, Array]:
    """Arrays of the base model, by path: all those that belong to no adapter."""
    return {path: variable.get_value() for path, variable in variables(encoder).items() if not _is_adapter(variable)}


def merge_adapter(encoder: Encoder, task: str) -> Encoder:
    """Merges the adapter of one task into the base weights, in float32, and drops all adapters.

    The other tasks are left out, since their adapters were trained beside the old base.
    """
    index = jnp.asarray(encoder.config.task_index(task), jnp.int32)
    arrays = base_arrays(encoder) | _folded_kernels(encoder, index)
    arrays["tokens.table"] = _folded_table(encoder.tokens, index)
    arrays["token_types.table"] = _folded_table(encoder.token_types, index)
    return from_arrays(replace(encoder.config, tasks=()), arrays, dtype=encoder.dtype)


def fold_adapter(encoder: Encoder, task: str) -> Encoder:
    """Folds the adapter of one task into the dense kernels, for inference.

    The embedding tables stay unchanged and are shared with `encoder`; their adapter is kept beside
    them. The only task of the result has index 0 and the name "folded", whichever task it was, so
    that all tasks share their compiled programs.
    """
    index = jnp.asarray(encoder.config.task_index(task), jnp.int32)
    folded = nnx.eval_shape(lambda: Encoder(_with_one_task(encoder.config, "folded"), dtype=encoder.dtype, rngs=nnx.Rngs(0)))
    for module in _dense_modules(folded).values():
        module.a = module.b = module.scale = nnx.data(None)
    arrays = base_arrays(encoder) | _select_tasks(encoder, index[None]) | _folded_kernels(encoder, index)
    graphdef, state = nnx.split(folded)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(arrays[".".join(map(str, path))])
    return nnx.merge(graphdef, state)


def _fresh_adapter(encoder: Encoder, sizes: Mapping[str, Any], rngs: nnx.Rngs) -> Adapter:
    given = {name: size for name, size in sizes.items() if size is not None}
    config = replace(encoder.config, tasks=("fresh",), **given)
    param_dtype = encoder.tokens.table.get_value().dtype

    @jax.jit  # so that the base parameters made beside the adapter are never computed
    def initialise(key: Array) -> dict[str, Array]:
        return extract_adapters(Encoder(config, param_dtype=param_dtype, rngs=nnx.Rngs(key)))

    return initialise(rngs.params())


def _widened(path: str, array: Array, expected: nnx.Variable) -> Array:
    """Pads an adapter array to the model's rank with zeros.

    A shared down-projection of q, k and v is repeated for each where the model has separate ones.
    """
    task_axis = expected.get_metadata("task_axis") % len(expected.shape)
    if path in ("layers.qkv.a", "layers.qkv.scale") and array.shape[task_axis - 1] < expected.shape[task_axis - 1]:
        array = jnp.repeat(array, expected.shape[task_axis - 1], axis=task_axis - 1)
    padding = [0] * array.ndim
    if not path.endswith(".scale"):
        padding[task_axis + 1] = expected.shape[task_axis + 1] - array.shape[task_axis + 1]
    shape = tuple(size + more for size, more in zip(array.shape, padding, strict=True))
    if shape[:task_axis] + shape[task_axis + 1 :] != expected.shape[:task_axis] + expected.shape[task_axis + 1 :]:
        raise ValueError(f"not an adapter of this model: {path} is {array.shape}, should be like {expected.shape}")
    return jnp.pad(array, [(0, more) for more in padding])


def _with_adapters(encoder: Encoder, config: ModelConfig, arrays: Mapping[str, Array]) -> Encoder:
    return from_arrays(config, base_arrays(encoder) | dict(arrays), dtype=encoder.dtype)


def _select_tasks(encoder: Encoder, tasks: Int[Array, " k"]) -> dict[str, Array]:
    return {
        path: jnp.take(variable.get_value(), tasks, axis=variable.get_metadata("task_axis"))
        for path, variable in variables(encoder).items()
        if _is_adapter(variable)
    }


def _is_adapter(variable: nnx.Variable) -> bool:
    return isinstance(variable, AdapterParam | AdapterScale)


def _dense_modules(encoder: Encoder) -> dict[str, AdaptedDense]:
    """Dense modules that can have adapters, by path."""
    layers = {f"layers.{name}": getattr(encoder.layers, name) for name in ("qkv", "out", "up", "down")}
    return layers | ({} if encoder.pooler is None else {"pooler": encoder.pooler})


def _folded_kernels(encoder: Encoder, task: Int[Array, ""]) -> dict[str, Array]:
    return {
        f"{path}.kernel": (_fold_layers if path.startswith("layers.") else _fold)(module, task)
        for path, module in _dense_modules(encoder).items()
    }


@jax.jit
def _fold(module: AdaptedDense, task: Int[Array, ""]) -> Array:
    return module.folded_kernel(task)


@jax.jit
def _fold_layers(module: AdaptedDense, task: Int[Array, ""]) -> Array:
    # One layer's float32 update at a time.
    return jax.lax.map(lambda layer: layer.folded_kernel(task), module)


@jax.jit
def _folded_table(module: AdaptedEmbed, task: Int[Array, ""]) -> Array:
    entries = jnp.arange(module.table.get_value().shape[0])[None]
    return module(entries, task)[0].astype(module.table.get_value().dtype)


def _with_one_task(config: ModelConfig, task: str) -> ModelConfig:
    return replace(config, tasks=(task,))
