"""AdamW with a linear schedule."""

import jax.numpy as jnp
import optax
from jax import Array

from ..config import Stage

_DECAYED = ("kernel", "table", "a", "b")
"""Names of the parameters with weight decay: matrices. Biases and LayerNorms have none."""


def learning_rate(stage: Stage) -> optax.Schedule:
    """Schedule: linear from 0 to the peak in `warmup_steps`, then linear to 0.

    Step 0 is the first update's.
    """
    rise = optax.linear_schedule(0.0, stage.learning_rate, stage.warmup_steps)
    fall = optax.linear_schedule(stage.learning_rate, 0.0, stage.steps - stage.warmup_steps)
    first = 1 if stage.warmup_steps else 0  # an update with a rate of 0 would be lost
    return lambda step: optax.join_schedules([rise, fall], [stage.warmup_steps])(step + first)


def optimizer(stage: Stage) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2019) on a mapping of paths to arrays.

    It treats every element separately, so that arrays may be sharded; clipping, which needs the
    norm of all gradients, is in the step.
    """
    b1, b2 = stage.betas
    return optax.adamw(learning_rate(stage), b1=b1, b2=b2, eps=stage.epsilon, weight_decay=stage.weight_decay, mask=_decayed)


def clipped(gradients: dict[str, Array], norm: Array, stage: Stage) -> dict[str, Array]:
    """Scales gradients of norm `norm` so that it is at most the stage's `clip_norm`."""
    factor = jnp.minimum(1, stage.clip_norm / norm)
    return {path: x * factor for path, x in gradients.items()}


def _decayed(parameters: dict) -> dict[str, bool]:
    return {path: path.rpartition(".")[2] in _DECAYED for path in parameters}
