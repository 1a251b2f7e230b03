"""What looks like a checkpoint and is none that is read here is named, with the way out."""

import pytest

pytest.importorskip("torch")
import torch
from safetensors.torch import load_file, save_file

from jina_jax import Embedder
from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.errors import CheckpointError
from oracles import checkpoints


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.gguf"], "model.gguf is a GGUF file of llama.cpp; take the checkpoint that it was exported from"),
        (["onnx/model.onnx"], "model.onnx is an ONNX export; take the checkpoint"),
        (["openvino_model.xml", "openvino_model.bin"], "openvino_model.xml is an OpenVINO export; take"),
        (["tf_model.h5"], "tf_model.h5 is TensorFlow weights; write it anew with transformers 4: .*from_tf=True"),
        (["flax_model.msgpack"], "flax_model.msgpack is Flax weights of transformers; write it anew.*from_flax=True"),
        (["epoch=3.ckpt"], "epoch=3.ckpt is a checkpoint of PyTorch Lightning or TensorFlow 1; write the encoder anew"),
        (["best.pt", "optimizer.pt"], "best.pt is a pickle of PyTorch of another name; write the encoder anew"),
        (["zero_to_fp32.py", "global_step9/x.pt"], "a DeepSpeed checkpoint; gather it: python zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "a sharded checkpoint of FSDP; gather it: accelerate merge-weights"),
        (["model-00001-of-00002.safetensors"], "shards of weights without model.safetensors.index.json; copy that file"),
        (["model_ema.safetensors"], "model_ema.safetensors is weights of another name; if they are .* rename them"),
        (["snapshots/abc/model.safetensors", "refs/main"], "the hub's cache of a model; give the folder snapshots/COMMIT"),
        (["arrays/_METADATA"], "a checkpoint of this library without its manifest.json, .*; copy it whole"),
        (["checkpoint-9/model.safetensors", "optimizer.pt"], r"no weights, its folders \['checkpoint-9'\] do; give one"),
        (["run/manifest.json", "run/arrays/x"], r"no weights, its folders \['run'\] do; give one"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_no_checkpoint_of_ours_is_named_with_the_way_out(tmp_path, files, message):
    for file in ["config.json", *files]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"of an unknown kind: .*{message}") as error:
        Embedder.load(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.layer.0.output.dense.weight.absmax", torch.zeros(8), "quantised by bitsandbytes.*quantised from"),
        ("encoder.layer.0.output.dense.qweight", torch.zeros(8, dtype=torch.int32), "quantised by GPTQ or AWQ"),
        ("encoder.layer.0.output.dense.weight_scale", torch.zeros(8), "quantised, it has the tensor"),
        ("encoder.layer.0.output.dense.weight", torch.zeros(64, 128).to(torch.float8_e4m3fn), "has dtype F8_E4M3.*quantised"),
        ("encoder.layer.0.output.dense.weight", torch.zeros(64, 128, dtype=torch.int8), "has dtype I8.*quantised"),
        ("encoder.layer.0.output.dense.base_layer.weight", torch.zeros(64, 128), "PEFT that is not merged.*merge_and_unload"),
        ("_flat_param", torch.zeros(8), "a sharded state of FSDP.*FULL_STATE_DICT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_are_no_weights_are_named_with_the_way_out(tmp_path, name, tensor, message):
    checkpoints.write_e5(tmp_path, tokenizer=None, vocab_size=300)
    state = load_file(tmp_path / "model.safetensors") | {name: tensor}
    save_file(state, tmp_path / "pytorch_model.safetensors")
    (tmp_path / "pytorch_model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_torch_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message.replace("F8_E4M3", "torch.float8_e4m3fn").replace("I8", "torch.int8")):
        read_torch_checkpoint(tmp_path, allow_pickle=True)


def test_pickles_of_other_shapes_are_named(tmp_path):
    checkpoints.write_e5(tmp_path, tokenizer=None, vocab_size=300)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: state_dict is a dict and not a tensor; .*save_pretrained"):
        read_torch_checkpoint(tmp_path, allow_pickle=True)
    for name in ("pytorch_model.bin", "pytorch_model_ema.bin"):
        torch.save(state, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"\['pytorch_model.bin', 'pytorch_model_ema.bin'\] of .* hold a tensor twice"):
        read_torch_checkpoint(tmp_path, allow_pickle=True)
