"""Floating-point operations of a step, and what a device can do: for the share of the peak in the metrics."""

from typing import Any

from jina_jax.config import ModelConfig

from ..config import Stage

PEAKS = {  # bfloat16 operations per second of one device, from the makers' data sheets
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: Any, count: int) -> float | None:
    """Of so many devices of a kind, per second; None for kinds without an entry, such as CPUs."""
    peak = PEAKS.get(device.device_kind)
    return None if peak is None else peak * count


def training_flops(config: ModelConfig, stage: Stage) -> float:
    """Operations per token of forward and backward pass, at full texts; what is computed twice to save memory counts once.

    The layers' products cost 2 operations per parameter forward, twice that backward, half of the latter where only adapters
    are trained; attention costs 4 d operations per token and key.
    """
    d = config.hidden_size
    layer = 2 * (4 * d * d + 2 * d * config.mlp_size) + 4 * d * stage.length
    forward = config.num_layers * layer
    if stage.objective == "mlm":
        forward += stage.mask_rate * 2 * d * (config.vocab_size + d)
    return forward * (2 if stage.adapters else 3)
