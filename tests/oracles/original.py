"""The forward pass of the original jina-embeddings-v3 layout in plain torch, over a state dict.

Adapters are applied in weight space: the adapter's delta is added to each weight and the base model
is run. Padding must be on the right.
Shapes: b texts, t tokens, d model, n heads, h head dim, v vocab, k tasks, r rank, l layers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
ORIGINAL, LORA_A, LORA_B = (f".parametrizations.weight.{part}" for part in ("original", "0.lora_A", "0.lora_B"))


def strip(state: State) -> State:
    """Removes the optional `roberta.` prefix of names."""
    return {name.removeprefix("roberta."): tensor for name, tensor in state.items()}


def merged(state: State, config: dict, adapter: int = -1, dtype: torch.dtype = torch.float32) -> State:
    """The weights of one adapter (-1 = the base model) under plain `.weight` names, in `dtype`."""
    state = {name: tensor.to(dtype) for name, tensor in strip(state).items()}
    plain = {name: tensor for name, tensor in state.items() if ".parametrizations." not in name}
    for name in state:
        if name.endswith(ORIGINAL):
            module = name.removesuffix(ORIGINAL)
            plain[module + ".weight"] = state[name] + (delta(state, module, config, adapter) if adapter >= 0 else 0)
    return plain


def delta(state: State, module: str, config: dict, adapter: int) -> Tensor:
    """alpha / rank * B A for a linear module [out, in], A B for an embedding [v, d]."""
    a, b = state[module + LORA_A][adapter], state[module + LORA_B][adapter]
    if "embeddings" in module:
        return config["lora_alpha"] / a.shape[1] * (a @ b)  # [v, r] [r, d]
    return config["lora_alpha"] / a.shape[0] * (b @ a)  # [out, r] [r, in]


def hidden_states(
    state: State,
    config: dict,
    input_ids: Tensor,
    attention_mask: Tensor,
    adapters: Tensor,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Token states of texts, each under its adapter.

    Args:
        input_ids, attention_mask: [b, t].
        adapters: adapter of each text [b]; -1 = the base model.

    Returns:
        l + 1 states [b, t, d]: embeddings, then each layer.
    """
    out: list[Tensor] = []
    for adapter in adapters.unique().tolist():
        rows = adapters == adapter
        part = encode(merged(state, config, adapter, dtype), config, input_ids[rows], attention_mask[rows])
        out = out or [s.new_zeros(*input_ids.shape, s.shape[-1]) for s in part]
        for whole, some in zip(out, part, strict=True):
            whole[rows] = some
    return out


def encode(w: State, config: dict, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Runs the base model with plain weights: post-norm, rotary, exact GELU."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], config["layer_norm_eps"])

    def attention(x: Tensor, name: str) -> Tensor:
        # [b, t, 3, n, h]
        heads = linear(x, name + ".Wqkv").unflatten(-1, (3, config["num_attention_heads"], -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [b, n, t, h]
        q, k = (rotate(y, config["rotary_emb_base"]) for y in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask.bool()[:, None, None, :])
        return linear(mixed.transpose(1, 2).flatten(2), name + ".out_proj")

    word, token_type = (w[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "token_type"))
    x = norm(word[input_ids] + token_type[0], "emb_ln")
    states = [x]
    for layer in (f"encoder.layers.{i}" for i in range(config["num_hidden_layers"])):
        x = norm(x + attention(x, layer + ".mixer"), layer + ".norm1")
        x = norm(x + linear(F.gelu(linear(x, layer + ".mlp.fc1")), layer + ".mlp.fc2"), layer + ".norm2")
        states.append(x)
    return states


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotates the halves of [..., t, h] for positions 0..t-1, with angles in the dtype of x."""
    t, h = x.shape[-2:]
    frequencies = 1.0 / base ** (torch.arange(0, h, 2, dtype=x.dtype) / h)
    angles = torch.outer(torch.arange(t, dtype=x.dtype), frequencies)  # [t, h / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def pool(states: Tensor, attention_mask: Tensor, truncate_dim: int | None = None, normalize: bool = True) -> Tensor:
    """Mean of the token states [b, t, d] of each text, cut, then normalised: [b, truncate_dim]."""
    mask = attention_mask[..., None].float()
    mean = (states.float() * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    cut = mean[:, :truncate_dim]
    return F.normalize(cut, dim=-1) if normalize else cut


def embed(
    state: State,
    config: dict,
    input_ids: Tensor,
    attention_mask: Tensor,
    adapters: Tensor,
    truncate_dim: int | None = None,
    normalize: bool = True,
) -> Tensor:
    """The embedding of each text: [b, truncate_dim]."""
    last = hidden_states(state, config, input_ids, attention_mask, adapters)[-1]
    return pool(last, attention_mask, truncate_dim, normalize)
