"""Says what it is that looks like a model and is not read here, and the way out."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError
from ..files import read_json

_EXPORT = "take the checkpoint that it was exported from, with a model.safetensors"
_QUANTISED = "take the checkpoint that it was quantised from, in float32, bfloat16 or float16"
_OLD_TRANSFORMERS = "write it anew with transformers 4: AutoModel.from_pretrained(DIR, {}=True).save_pretrained(OUT)"
_PICKLE = "write the encoder anew in PyTorch: model.save_pretrained(OUT)"

_MODELS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "manifest.json")
"""Patterns of files that tell a model."""

_FILES = {
    "model-*-of-*.safetensors": ("shards of weights without model.safetensors.index.json", "copy that file, too"),
    "*.safetensors": ("weights of another name", "if they are the encoder's, rename them to model.safetensors"),
    "arrays/*": ("a checkpoint of this library without its manifest.json, which is written last", "copy it whole"),
    "zero_to_fp32.py": ("a DeepSpeed checkpoint", "gather it: python zero_to_fp32.py DIR OUT --safe_serialization"),
    "*.distcp": ("a sharded checkpoint of FSDP", "gather it: accelerate merge-weights DIR OUT"),
    "*/*.distcp": ("a sharded checkpoint of FSDP", "gather it: accelerate merge-weights DIR/FOLDER OUT"),
    "snapshots/*": ("the hub's cache of a model", "give the folder snapshots/COMMIT in it, or the model's id"),
    "*.gguf": ("a GGUF file of llama.cpp", _EXPORT),
    "*.onnx": ("an ONNX export", _EXPORT),
    "onnx/*.onnx": ("an ONNX export", _EXPORT),
    "openvino*.xml": ("an OpenVINO export", _EXPORT),
    "openvino/*.xml": ("an OpenVINO export", _EXPORT),
    "*.mlpackage": ("a Core ML export", _EXPORT),
    "*.tflite": ("a TensorFlow Lite export", _EXPORT),
    "saved_model.pb": ("a TensorFlow export", _EXPORT),
    "tf_model.h5": ("TensorFlow weights", _OLD_TRANSFORMERS.format("from_tf")),
    "flax_model.msgpack": ("Flax weights of transformers", _OLD_TRANSFORMERS.format("from_flax")),
    "rust_model.ot": ("weights of rust-bert", _EXPORT),
    "*.ckpt": ("a checkpoint of PyTorch Lightning or TensorFlow 1", _PICKLE),
    "*.pt": ("a pickle of PyTorch of another name", _PICKLE),
    "*.pth": ("a pickle of PyTorch of another name", _PICKLE),
    "*.bin": ("a pickle of another name", _PICKLE),
}
"""Pattern of a file -> what it is, and what to do if it is all there is; the first that fits."""

_OF_TRAINERS = re.compile(r"(training_args|optimizer|scheduler|rng_state|random_states|scaler|sampler).*")

_TENSORS = {
    r"\.(absmax|quant_map|nested_absmax|SCB|weight_format)$|\.quant_state\.": ("quantised by bitsandbytes", _QUANTISED),
    r"\.(qweight|qzeros|g_idx)$": ("quantised by GPTQ or AWQ", _QUANTISED),
    r"\.(weight|input|activation)_(scale|scale_inv|zero_point|packed)$": ("quantised", _QUANTISED),
    r"(^|[._])flat_param": ("a sharded state of FSDP", "write it anew with StateDictType.FULL_STATE_DICT"),
    r"\.base_layer\.": (
        "a model of PEFT that is not merged",
        "write model.merge_and_unload() instead, or the adapter into a folder of its own: model.save_pretrained(DIR/TASK)",
    ),
}
"""Pattern of a tensor name -> what holds it, and what to do."""


def refuse_foreign_directory(folder: Path) -> None:
    """Raises for a directory without weights that this library reads.

    Raises:
        CheckpointError: says what the directory is, as far as its files tell, and the way out.
    """
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder} holds an adapter without its base model, which is {base or 'not named'} (base_model_name_or_path): copy "
            f"it into the directory of that model as a folder named like its task (cp -r {folder} BASE/TASK), and load BASE"
        )
    if models := sorted({path.parent.name for pattern in _MODELS for path in folder.glob(f"*/{pattern}")}):
        raise CheckpointError(f"{folder} is of an unknown kind: it holds no weights, its folders {models} do; give one of them")
    for pattern, (what, cure) in _FILES.items():
        if found := sorted(path.name for path in folder.glob(pattern) if not _OF_TRAINERS.fullmatch(path.name)):
            raise CheckpointError(f"{folder} is of an unknown kind: {found[0]} is {what}; {cure}")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "nothing"
    raise CheckpointError(f"{folder} is of an unknown kind: it holds no checkpoint of a known layout, but {held}")


def refuse_foreign_tensors(names: Iterable[str], where: Path) -> None:
    """Raises CheckpointError if tensor names are those of weights that are none yet, or no more."""
    names = list(names)
    for pattern, (what, cure) in _TENSORS.items():
        if found := [name for name in names if re.search(pattern, name)]:
            raise CheckpointError(f"{where} is {what}, it has the tensor {found[0]}; {cure}")
