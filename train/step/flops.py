"""Floating-point operations of a training step, for model FLOPs utilisation (MFU)."""

from jina_jax.config import ModelConfig

from ..config import Stage


def training_flops(config: ModelConfig, stage: Stage) -> float:
    """Operations per token of forward and backward pass, for texts of full length.

    Rematerialisation does not count. The layers' matmuls cost 2 operations per parameter forward,
    twice that backward, half of the latter where only adapters are trained; attention costs 4 d
    operations per token and key.
    """
    d = config.hidden_size
    layer = 2 * (4 * d * d + 2 * d * config.mlp_size) + 4 * d * stage.max_length
    forward = config.num_layers * layer
    if stage.objective == "mlm":
        forward += stage.mask_rate * 2 * d * (config.vocab_size + d)
    return forward * (2 if stage.adapters else 3)
