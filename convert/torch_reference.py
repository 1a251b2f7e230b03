"""PyTorch side of `convert verify`: hidden states of a checkpoint by transformers' classes."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jina_jax.checkpoints.peft import adapter_folder, find_peft_adapters
from jina_jax.checkpoints.tensor_files import open_tensors
from jina_jax.checkpoints.wrappers import unwrapped_names
from jina_jax.config import ModelConfig

_NATIVE_NAMES = {
    "emb_ln": "embeddings.LayerNorm",
    "encoder.layers": "layers",
    "mixer.out_proj": "self_attn.o_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
}


class TorchReference:
    """A checkpoint as a PyTorch model in float32.

    The original's stacked adapters are folded into the weights, one task at a time.
    """

    def __init__(self, directory: Path, config: ModelConfig, *, allow_pickle: bool = False):
        self._config = config
        self._directory = directory
        adapters = find_peft_adapters(directory, (), allow_pickle=allow_pickle)
        self._folders = {adapter.task: adapter.folder.name for adapter in adapters}
        tensors = open_tensors(directory, allow_pickle=allow_pickle)
        names = unwrapped_names(tensors, directory)
        self._stacked = any(".lora_A" in name for name in tensors)
        fused = any("mixer.Wqkv" in name for name in tensors)
        plain = {name.removeprefix("roberta."): tensors[stored] for stored, name in names.items()}
        self._state = {name: _to_torch(tensor.read()) for name, tensor in plain.items()} if fused else None
        self._model = self._build()

    def hidden_states(self, tokens: Tensor, mask: Tensor, task: str | None) -> list[Tensor]:
        """Returns the input of the first layer and the output of each layer, all [b, t, d].

        Args:
            tokens, mask: [b, t]; the mask is 1 at tokens and 0 at padding.
            task: the adapter; None = the base model.
        """
        with torch.no_grad(), self._active(task) as model:
            return list(model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states)

    def _build(self) -> PreTrainedModel:
        from transformers import BertModel, JinaEmbeddingsV3Config, JinaEmbeddingsV3Model, XLMRobertaModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._state is None:
                absolute = BertModel if self._config.is_bert else XLMRobertaModel
                kind: Any = absolute if self._config.position_type == "absolute" else JinaEmbeddingsV3Model
                model, info = cast(Any, kind).from_pretrained(self._directory, dtype=torch.float32, output_loading_info=True)
                _check_read(self._directory, [name for name in info["missing_keys"] if not name.startswith("pooler.")])
            else:
                model = JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**self._hf_config()))
                self._load(model, None)
        return model.eval().float()

    def _hf_config(self) -> dict:
        """Fields of `config.json` that the class needs.

        The class ignores `rotary_emb_base`, so the rotary base is given in `rope_parameters`.
        """
        config = self._config
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.mlp_size,
            "max_position_embeddings": config.max_position_embeddings,
            "type_vocab_size": config.type_vocab_size,
            "layer_norm_eps": config.layer_norm_eps,
            "pad_token_id": config.pad_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        }

    @contextmanager
    def _active(self, task: str | None) -> Iterator[PreTrainedModel]:
        """Yields the model with one task's adapter, however the layout stores adapters."""
        if task is None:
            yield self._model
        elif self._stacked:
            self._load(self._model, self._config.task_index(task))
            yield self._model
            self._load(self._model, None)
        else:
            name = adapter_folder(task)  # names of PyTorch modules must not contain dots
            if name not in getattr(self._model, "peft_config", {}):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # several adapters are intended
                    folder = {"subfolder": self._folders[task]}
                    try:
                        info = self._model.load_adapter(str(self._directory), adapter_name=name, adapter_kwargs=folder)
                    except ValueError as error:
                        raise ValueError(f"{self._directory / self._folders[task]} cannot be compared: {error}") from error
                _check_read(self._directory / self._folders[task], info.unexpected_keys)
            self._model.set_adapter(name)
            self._model.enable_adapters()
            yield self._model
            self._model.disable_adapters()

    def _load(self, model: torch.nn.Module, task: int | None) -> None:
        """Loads the original's tensors into transformers' class.

        Args:
            model: an instance of the class.
            task: index of the adapter, folded in as W + alpha / rank B A; None = the base model.
        """
        assert self._state is not None
        native = {}
        for name, tensor in self._state.items():
            if ".lora_" in name or name.startswith("lm_head.") or name.endswith("position_ids"):
                continue
            weight = tensor.float()
            if name.endswith(".parametrizations.weight.original"):
                module = name.removesuffix(".parametrizations.weight.original")
                if task is not None:
                    a, b = (self._state[f"{module}.parametrizations.weight.0.lora_{x}"][task].float() for x in "AB")
                    scale = self._config.lora_alpha / self._config.lora_rank
                    weight = weight + scale * (a @ b if "embeddings" in module else b @ a)
                name = f"{module}.weight"
            for old, new in _NATIVE_NAMES.items():
                name = name.replace(old, new)
            if "mixer.Wqkv" in name:
                for part, value in zip("qkv", weight.chunk(3), strict=True):
                    native[name.replace("mixer.Wqkv", f"self_attn.{part}_proj")] = value
            else:
                native[name] = weight
        missing, unexpected = model.load_state_dict(native, strict=False)
        if unexpected or [name for name in missing if not name.startswith("pooler.")]:
            raise ValueError(f"the reference model lacks {missing} and does not know {unexpected}")


def _check_read(place: Path, names: Collection[str]) -> None:
    """Raises ValueError if transformers has left out tensors, which it only reports."""
    if names:
        raise ValueError(f"{place} cannot be compared: transformers does not read all of its tensors, among them {min(names)}")


def _to_torch(array) -> Tensor:
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)
