"""Small random checkpoints in every published layout, and the torch models that read them.

Every parameter is random, biases, LayerNorms, pooler and both LoRA factors included: zeros and ones
hide mistakes. A writer takes a directory, sizes and a seed, and returns the tensors in the form of
the files, and the config.
Shapes: b texts, t tokens, d model, v vocab, k tasks, r rank, o output.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3ForMaskedLM,
    JinaEmbeddingsV3Model,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from .original import LORA_A, LORA_B, ORIGINAL, State, strip

TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "tokenizer"
TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
}
SIZES: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
CONSTANTS: dict[str, Any] = dict(
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    layer_norm_eps=1e-5,
    initializer_range=0.02,
    type_vocab_size=1,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
)
TARGETS = ["word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense"]
LORA: dict[str, Any] = {"target_modules": TARGETS}
PEFT = "base_model.model."
DELTA = 0.2  # size of an adapter's delta relative to its weight


# ---- random parameters ----


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tensor(name: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Random tensor of a base model by its name.

    It gives healthy activations, and nothing is near its initial value.
    """
    noise = torch.randn(shape, generator=g)
    if "norm" in name.lower() or "emb_ln" in name:
        return 0.2 * noise + name.endswith("weight")
    if name.endswith("bias"):
        return 0.2 * noise
    return 0.5 * noise if "embeddings" in name else noise / shape[-1] ** 0.5


def randomise(model: torch.nn.Module, g: torch.Generator) -> None:
    """Randomises every parameter of a model without adapters."""
    for name, parameter in model.named_parameters():
        parameter.data = random_tensor(name, parameter.shape, g)


def randomise_adapter(model: Any, adapter: str, g: torch.Generator, shared: bool) -> None:
    """Randomises one PEFT adapter of a model; `shared` gives q, k and v one A."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.scaling:
            continue
        if "embeddings" in name:
            # [r, v], [d, r]
            a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            # [r, in], [out, r]
            a, b = (factor[adapter].get_parameter("weight") for factor in (module.lora_A, module.lora_B))
        a.data = random_tensor(name, a.shape, g)
        b.data = DELTA / (module.scaling[adapter] * a.shape[0] ** 0.5) * torch.randn(b.shape, generator=g)
        if shared and name.endswith(("k_proj", "v_proj")):
            a.data = model.get_submodule(name[:-6] + "q_proj").lora_A[adapter].weight.data.clone()


# ---- files ----


def copy_tokenizer(source: Path | None, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if source:
        shutil.copytree(source, target, dirs_exist_ok=True)


def default_sizes(tokenizer: Path | None) -> dict[str, Any]:
    return {"vocab_size": vocab_size(tokenizer)} | SIZES


def vocab_size(tokenizer: Path | None) -> int:
    """Number of ids of a tokenizer directory; without one, that of the bundled tokenizer."""
    if tokenizer is None:
        return 16000
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    return max(len(content["model"]["vocab"]), *(token["id"] + 1 for token in content["added_tokens"]))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def save_state(directory: Path, state: State, shards: int = 1, pickle: bool = False) -> None:
    """Writes safetensors in one file or in shards with their index, or pytorch_model.bin."""
    if pickle:
        return torch.save(state, directory / "pytorch_model.bin")
    if shards == 1:
        return save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(state)}
    for file in sorted(set(files.values())):
        part = {name: tensor for name, tensor in state.items() if files[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def write_modules(directory: Path, max_seq_length: int, width: int, prompts: dict[str, str] | None = None) -> None:
    """Writes sentence-transformers' files beside a model: mean pooling, then normalisation."""
    parts = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Normalize", "models.Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    modes = {f"pooling_mode_{m}_token{s}": m == "mean" for m, s in (("cls", ""), ("mean", "s"), ("max", "s"))}
    write_json(directory / "modules.json", modules)
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    write_json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    if prompts is not None:
        write_json(directory / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})


# ---- the original layout ----


def original_config(
    *,
    tasks: tuple[str, ...] = TASKS,
    rank: int = 4,
    alpha: float = 1,
    rotary_emb_base: float = 20000.0,
    max_position_embeddings: int = 8194,
    model_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> dict:
    """config.json as published.

    It has no `model_type` unless one is given, and no LoRA fields without tasks.
    """
    code = "jinaai/xlm-roberta-flash-implementation--"
    config = {
        "architectures": ["XLMRobertaModel"],
        "auto_map": {
            "AutoConfig": code + "configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": code + ("modeling_lora.XLMRobertaLoRA" if tasks else "modeling_xlm_roberta.XLMRobertaModel"),
            "AutoModelForMaskedLM": code + "modeling_xlm_roberta.XLMRobertaForMaskedLM",
        },
        **SIZES,
        **CONSTANTS,
        "max_position_embeddings": max_position_embeddings,
        "position_embedding_type": "rotary",
        "rotary_emb_base": rotary_emb_base,
        "classifier_dropout": None,
        "emb_pooler": None,
        "matryoshka_dimensions": [dim for dim in (8, 16, 32) if dim < sizes["hidden_size"]] + [sizes["hidden_size"]],
        "truncate_dim": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.30.2",
        "use_cache": True,
        "use_flash_attn": True,
        "output_past": True,
        **sizes,
    }
    if tasks:
        config |= {
            "lora_adaptations": list(tasks),
            "lora_rank": rank,
            "lora_alpha": alpha,
            "lora_dropout_p": 0.0,
            "lora_main_params_trainable": False,
            "load_trained_adapters": True,
            "task_instructions": {task: INSTRUCTIONS.get(task, "") for task in tasks},
        }
    return config | ({"model_type": model_type} if model_type else {})


def original_modules(config: dict) -> dict[str, tuple[int, int]]:
    """Shapes of the adapted weights by name: [out, in], or [v, d] of an embedding."""
    v, d, f = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    modules = {"embeddings.word_embeddings": (v, d), "embeddings.token_type_embeddings": (1, d), "pooler.dense": (d, d)}
    parts = {"mixer.Wqkv": (3 * d, d), "mixer.out_proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    for layer in range(config["num_hidden_layers"]):
        modules |= {f"encoder.layers.{layer}.{part}": shape for part, shape in parts.items()}
    return modules


def original_state(config: dict, seed: int = 0) -> State:
    """Random tensors of a complete model, without prefix; parametrised if the config has tasks."""
    g, tasks = generator(seed), len(config.get("lora_adaptations", ()))
    state: State = {}
    for name, (rows, columns) in original_modules(config).items():
        state[name + (ORIGINAL if tasks else ".weight")] = random_tensor(name + ".weight", (rows, columns), g)
        if "embeddings" not in name:
            state[name + ".bias"] = random_tensor(name + ".bias", (rows,), g)
        if tasks:
            rank, b_size = config["lora_rank"], DELTA * config["lora_rank"] ** 0.5 / config["lora_alpha"]
            a, b = ((rows, rank), (rank, columns)) if "embeddings" in name else ((rank, columns), (rows, rank))
            state[name + LORA_A] = random_tensor(name, (tasks, *a), g)
            state[name + LORA_B] = b_size * torch.randn((tasks, *b), generator=g)
    norms = [f"encoder.layers.{i}.norm{j}" for i in range(config["num_hidden_layers"]) for j in (1, 2)]
    for name in (f"{norm}.{part}" for norm in ["emb_ln", *norms] for part in ("weight", "bias")):
        state[name] = random_tensor(name, (config["hidden_size"],), g)
    return state


def write_original(
    directory: Path,
    *,
    prefix: str = "roberta.",
    shards: int = 1,
    pickle: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = TOKENIZER,
    seed: int = 0,
    **fields,
) -> tuple[State, dict]:
    """Writes the layout of jinaai/jina-embeddings-v3.

    `fields` are those of `original_config`; `tasks=()` gives plain weights.
    """
    copy_tokenizer(tokenizer, directory)
    config = original_config(dtype=dtype, **(default_sizes(tokenizer) | fields))
    state = {prefix + name: tensor.to(dtype) for name, tensor in original_state(config, seed).items()}
    save_state(directory, state, shards, pickle)
    write_json(directory / "config.json", config)
    return state, config


# ---- transformers with PEFT adapters ----

NATIVE = {"emb_ln": "embeddings.LayerNorm", "encoder.layers": "layers", "mixer.out_proj": "self_attn.o_proj"}
NATIVE |= {"norm1": "post_attention_layernorm", "norm2": "post_mlp_layernorm"}


def native_name(name: str) -> str:
    """transformers' in-memory name of an original name; `mixer.Wqkv` stays."""
    for old, new in NATIVE.items():
        name = name.replace(old, new)
    return name


def published_name(name: str) -> str:
    """The published adapter files' key of an in-memory key.

    It has the old layer names around the new q, k and v.
    """
    name = name.removeprefix(PEFT).replace("self_attn.o_proj", "mixer.out_proj")
    return "roberta." + ("encoder." + name if name.startswith("layers.") else name)


def adapter_name(task: str) -> str:
    return task.replace(".", "_").replace("-", "_")


def split_qkv(name: str, tensor: Tensor) -> State:
    """Splits a tensor of the fused projection into thirds by in-memory name; keeps any other."""
    if "mixer.Wqkv" not in name:
        return {name: tensor}
    thirds = [tensor] * 3 if "lora_A" in name else tensor.chunk(3)
    return {name.replace("mixer.Wqkv", f"self_attn.{x}_proj"): t.clone() for x, t in zip("qkv", thirds, strict=True)}


def peft_from_original(state: State, config: dict) -> tuple[State, dict[str, State]]:
    """Base and adapters of an original state, under transformers' in-memory names."""
    base: State = {}
    adapters: dict[str, State] = {adapter_name(task): {} for task in config.get("lora_adaptations", ())}
    for name, tensor in strip(state).items():
        if name.endswith((LORA_A, LORA_B)):
            module, factor = name.split(".parametrizations.weight.0.")
            for adapter, part in zip(adapters.values(), tensor, strict=True):
                if "embeddings" in module:
                    part, key = part.T.contiguous(), f"{module}.{factor.replace('lora', 'lora_embedding')}"
                else:
                    key = f"{module}.{factor}.weight"
                adapter.update(split_qkv(native_name(key), part))
        else:
            base.update(split_qkv(native_name(name.replace(ORIGINAL, ".weight")), tensor))
    return base, adapters


def native_config(config: dict) -> JinaEmbeddingsV3Config:
    """transformers' config of an original config.

    The class ignores `rotary_emb_base`, so the base goes into `rope_parameters`.
    """
    names = ("vocab_size", "max_position_embeddings", *SIZES, *CONSTANTS)
    rope = {"rope_type": "default", "rope_theta": config["rotary_emb_base"]}
    return JinaEmbeddingsV3Config(**{name: config[name] for name in names}, rope_parameters=rope)


def published_config(config: dict) -> dict:
    """The original's fields under the new class.

    `rope_parameters` are given only where their default would be wrong.
    """
    config = {name: value for name, value in config.items() if name != "auto_map"}
    config |= {"architectures": ["JinaEmbeddingsV3Model"], "model_type": "jina_embeddings_v3"}
    unusual = config["rotary_emb_base"] != 20000.0
    return config | ({"rope_parameters": native_config(config).rope_parameters} if unusual else {})


def write_transformers(
    directory: Path,
    *,
    original: tuple[State, dict] | None = None,
    spelling: str = "published",
    adapters: dict[str, dict] | None = None,
    mlm_head: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = TOKENIZER,
    seed: int = 0,
    **fields,
) -> tuple[State, dict[str, State], dict]:
    """Writes transformers' own model, with fused names and one PEFT folder for each adapter.

    Args:
        spelling: "published" has the keys and config of the published repository, and one A for q,
            k and v; "peft" has the keys that transformers and PEFT write, and an A for each.
        adapters: name -> fields of LoraConfig; by default those of the tasks in `fields`, as in
            `original_config`.
        original: a state and its config, whose tensors are written instead of random ones.
        mlm_head: writes a head, and no adapters.

    Returns:
        (base, adapters, config).
    """
    copy_tokenizer(tokenizer, directory)
    config = original[1] if original else original_config(dtype=dtype, **(default_sizes(tokenizer) | fields))
    model: Any = (JinaEmbeddingsV3ForMaskedLM if mlm_head else JinaEmbeddingsV3Model)(native_config(config))
    base, given = peft_from_original(*original) if original else (None, {})
    if base:
        model.load_state_dict(base)
    else:
        randomise(model, generator(seed))
    model.to(dtype).save_pretrained(directory)
    if spelling == "published" and not mlm_head:
        write_json(directory / "config.json", published_config(config))

    if adapters is None:
        tasks = () if mlm_head else config.get("lora_adaptations", ())
        adapters = {adapter_name(task): dict(r=config["lora_rank"], lora_alpha=config["lora_alpha"]) for task in tasks}
    for i, (name, lora) in enumerate(adapters.items()):
        model.float().add_adapter(LoraConfig(**(LORA | lora)), name)
        model.set_adapter(name)
        randomise_adapter(model, name, generator(seed + i + 1), shared=spelling == "published")
        model.save_pretrained(directory / name)
        rewrite_adapter(directory / name / "adapter_model.safetensors", given.get(name), dtype, spelling)
        model.delete_adapter(name)
    states = {name: load_file(directory / name / "adapter_model.safetensors") for name in adapters}
    return load_file(directory / "model.safetensors"), states, read_json(directory / "config.json")


def rewrite_adapter(file: Path, given: State | None, dtype: torch.dtype, spelling: str) -> None:
    """Rewrites the adapter file that PEFT wrote, in another dtype.

    It holds other tensors where they are given, and the published keys if `spelling` says so.
    """
    state = load_file(file)
    if given is not None:
        assert {PEFT + name for name in given} == set(state)
        state = {PEFT + name: tensor for name, tensor in given.items()}
    rename = published_name if spelling == "published" else str
    replace(file, {rename(name): tensor.to(dtype) for name, tensor in state.items()})


def replace(file: Path, state: State) -> None:
    """Replaces a file through a second one: the tensors may be views of the first."""
    draft = file.with_suffix(".draft")
    save_file(state, draft, metadata={"format": "pt"})
    draft.replace(file)


# ---- XLM-RoBERTa and E5 ----


def write_xlmr(
    directory: Path,
    *,
    mlm_head: bool = True,
    prefix: str = "roberta.",
    redundant: bool = False,
    max_position_embeddings: int = 514,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = TOKENIZER,
    seed: int = 0,
    **sizes: int,
) -> tuple[State, dict]:
    """Writes an XLM-RoBERTa with absolute positions.

    `redundant` adds the tensors that older files with an MLM head hold: the tied decoder and the
    pooler.
    """
    copy_tokenizer(tokenizer, directory)
    fields = default_sizes(tokenizer) | CONSTANTS
    fields |= {"max_position_embeddings": max_position_embeddings, **sizes}
    config = XLMRobertaConfig(**fields)
    model: Any = (XLMRobertaForMaskedLM if mlm_head else XLMRobertaModel)(config)
    randomise(model, generator(seed))
    model.to(dtype).save_pretrained(directory)
    state = strip(load_file(directory / "model.safetensors"))
    if redundant:
        state["lm_head.decoder.weight"] = state["embeddings.word_embeddings.weight"].clone()
        state["lm_head.decoder.bias"] = state["lm_head.bias"].clone()
        for name, shape in (("weight", (config.hidden_size,) * 2), ("bias", (config.hidden_size,))):
            state[f"pooler.dense.{name}"] = random_tensor(name, shape, generator(seed + 1)).to(dtype)
    state = {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in state.items()}
    replace(directory / "model.safetensors", state)
    return state, read_json(directory / "config.json")


def write_e5(directory: Path, *, prompts: dict[str, str] | None = None, **fields) -> tuple[State, dict]:
    """Writes a multilingual-E5: no prefix, stored position ids, sentence-transformers' files.

    `fields` are those of `write_xlmr`.
    """
    state, config = write_xlmr(directory, mlm_head=False, prefix="", **fields)
    state["embeddings.position_ids"] = torch.arange(config["max_position_embeddings"])[None]
    replace(directory / "model.safetensors", state)
    write_modules(directory, config["max_position_embeddings"] - 2, config["hidden_size"], prompts)
    return state, config


# ---- the torch models that read them, in float32 ----


@torch.no_grad()
def transformers_states(directory: Path, input_ids: Tensor, attention_mask: Tensor, adapter: str | None = None) -> list[Tensor]:
    """States of JinaEmbeddingsV3Model, with one adapter folder or none.

    Returns:
        l + 1 states [b, t, d]: embeddings, then each layer.
    """
    model = load(JinaEmbeddingsV3Model, directory)
    if adapter:
        info = model.load_adapter(str(directory), adapter_name=adapter, adapter_kwargs={"subfolder": adapter})
        assert not info.missing_keys and not info.unexpected_keys, info
        model.set_adapter(adapter)
    return states(model, input_ids, attention_mask)


@torch.no_grad()
def xlmr_states(directory: Path, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """States of XLMRobertaModel: l + 1 of [b, t, d]."""
    return states(load(XLMRobertaModel, directory), input_ids, attention_mask)


@torch.no_grad()
def mlm_logits(directory: Path, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits [b, t, v] of any checkpoint with an MLM head."""
    return load(AutoModelForMaskedLM, directory)(input_ids=input_ids, attention_mask=attention_mask).logits


def load(kind: Any, directory: Path) -> Any:
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    return list(model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states)
