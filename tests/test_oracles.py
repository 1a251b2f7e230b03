"""The torch oracles agree with one another, so that a parity test against one means something."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from oracles import checkpoints, original

SMALL: dict[str, Any] = dict(tokenizer=None, vocab_size=300)
LENGTHS = (40, 7, 1, 23, 2, 31)


def batch(vocab: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Random texts with padding on the right: ids and mask [b, t]."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, vocab, mask.shape, generator=torch.Generator().manual_seed(1))
    return torch.where(mask == 1, ids, 1), mask


def assert_states_equal(got: list, want: list, mask: torch.Tensor) -> None:
    assert len(got) == len(want) == 4
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[mask == 1], b[mask == 1], atol=1e-5, rtol=0)


def difference(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    return (a - b)[mask == 1].abs().mean().item()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[dict, dict, Path]:
    """The same random tensors as an original state with its config and a transformers directory."""
    state, config = checkpoints.write_original(tmp_path_factory.mktemp("original"), **SMALL)
    native = tmp_path_factory.mktemp("native")
    checkpoints.write_transformers(native, original=(state, config), tokenizer=None)
    return state, config, native


@pytest.mark.parametrize("task", [-1, 0, 1, 2, 3, 4])
def test_twin_equals_transformers_with_peft(pair, task):
    state, config, native = pair
    ids, mask = batch()
    twin = original.hidden_states(state, config, ids, mask, torch.full((len(ids),), task))
    adapter = None if task < 0 else checkpoints.adapter_name(config["lora_adaptations"][task])
    assert_states_equal(twin, checkpoints.transformers_states(native, ids, mask, adapter), mask)


def test_mixed_adapters_equal_single_ones_and_differ_visibly(pair):
    state, config, _ = pair
    ids, mask = batch()
    tasks = torch.tensor([-1, 0, 1, 2, 3, 4])
    mixed = original.hidden_states(state, config, ids, mask, tasks)
    base = original.hidden_states(state, config, ids, mask, torch.full((6,), -1))
    for row, task in enumerate(tasks.tolist()):
        single = original.hidden_states(state, config, ids, mask, torch.full((6,), task))
        for a, b in zip(mixed, single, strict=True):
            torch.testing.assert_close(a[row], b[row], atol=1e-5, rtol=0)
        if task >= 0:
            assert difference(single[-1], base[-1], mask) > 0.1


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype=torch.bfloat16),
        dict(rotary_emb_base=500.0, rank=3, alpha=2),
        dict(tasks=("one", "two.three"), prefix=""),
        dict(tasks=()),
    ],
)
@pytest.mark.parametrize("spelling", ["published", "peft"])
def test_variants_of_the_original(tmp_path, options, spelling):
    state, config = checkpoints.write_original(tmp_path / "original", **options, **SMALL)
    ids, mask = batch()
    dtype = options.get("dtype", torch.float32)
    native = tmp_path / "native"
    checkpoints.write_transformers(native, original=(state, config), spelling=spelling, dtype=dtype, tokenizer=None)
    names = config.get("lora_adaptations", [])
    for name in [None, *names[-1:]]:
        task = names.index(name) if name else -1
        twin = original.hidden_states(state, config, ids, mask, torch.full((len(ids),), task))
        adapter = checkpoints.adapter_name(name) if name else None
        assert_states_equal(twin, checkpoints.transformers_states(native, ids, mask, adapter), mask)


def test_embed_is_the_normalised_mean_of_the_cut(pair):
    state, config, _ = pair
    ids, mask = batch()
    tasks = torch.tensor([0, 1, -1, 3, 2, 4])
    last = original.hidden_states(state, config, ids, mask, tasks)[-1]
    got = original.embed(state, config, ids, mask, tasks, truncate_dim=16)
    for row, length in enumerate(LENGTHS):
        mean = last[row, :length, :16].mean(0)
        torch.testing.assert_close(got[row], mean / mean.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shards", [1, 3])
def test_original_files_hold_the_state(tmp_path, shards):
    state, config = checkpoints.write_original(tmp_path, shards=shards, **SMALL)
    files = sorted(tmp_path.glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == shards and len(stored) == 6 + 3 * 12 + 2 * 15
    assert json.loads((tmp_path / "config.json").read_text()) == config and "model_type" not in config
    for name, tensor in state.items():
        assert torch.equal(stored[name], tensor) and tensor.unique().numel() > tensor.numel() / 2, name
    if shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / file, "pt") as part:
                assert name in part.keys()  # noqa: SIM118


def test_pickle_holds_the_state(tmp_path):
    state, _ = checkpoints.write_original(tmp_path, pickle=True, **SMALL)
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert not list(tmp_path.glob("*.safetensors")) and all(torch.equal(stored[name], state[name]) for name in state)


def test_adapter_keys_of_both_spellings(tmp_path):
    layer = "layers.0.self_attn."
    for spelling, prefix, out in (
        ("published", "roberta.encoder.", "roberta.encoder.layers.0.mixer.out_proj"),
        ("peft", "base_model.model.", "base_model.model.layers.0.self_attn.o_proj"),
    ):
        base, adapters, _ = checkpoints.write_transformers(tmp_path / spelling, spelling=spelling, **SMALL)
        assert set(base) == set(checkpoints.original_state(checkpoints.original_config(tasks=(), **base_sizes())))
        assert sorted(adapters) == sorted(map(checkpoints.adapter_name, checkpoints.TASKS))
        for state in adapters.values():
            assert len(state) == 2 * (3 + 3 * 6) and out + ".lora_A.weight" in state
            q, k = (state[f"{prefix}{layer}{x}_proj.lora_A.weight"] for x in "qk")
            assert torch.equal(q, k) == (spelling == "published")


def base_sizes() -> dict:
    return checkpoints.SIZES | {"vocab_size": 300}


def test_peft_variants_load_and_change_the_output(tmp_path):
    adapters = {
        "plain": dict(r=2, lora_alpha=8),
        "stabilised": dict(r=4, lora_alpha=3, use_rslora=True, rank_pattern={"fc1": 6}, alpha_pattern={"o_proj": 5}),
        "attention_only": dict(r=3, lora_alpha=1, target_modules=["q_proj", "v_proj"]),
    }
    _, states, _ = checkpoints.write_transformers(tmp_path, spelling="peft", adapters=adapters, **SMALL)
    assert states["stabilised"]["base_model.model.layers.1.mlp.fc1.lora_A.weight"].shape == (6, 64)
    ids, mask = batch()
    last = [checkpoints.transformers_states(tmp_path, ids, mask, name)[-1] for name in (None, *adapters)]
    assert all(difference(a, b, mask) > 0.02 for i, a in enumerate(last) for b in last[:i])


@pytest.mark.parametrize("mlm_head", [False, True])
@pytest.mark.parametrize("prefix", ["", "roberta."])
def test_xlmr_reads_alike_under_both_prefixes(tmp_path, mlm_head, prefix):
    ids, mask = batch()
    state, config = checkpoints.write_xlmr(tmp_path / "a", mlm_head=mlm_head, prefix=prefix, **SMALL)
    checkpoints.write_xlmr(tmp_path / "b", mlm_head=mlm_head, **SMALL)
    got, want = (checkpoints.xlmr_states(tmp_path / x, ids, mask) for x in "ab")
    assert_states_equal(got, want, mask)
    assert config["max_position_embeddings"] == 514 and prefix + "embeddings.LayerNorm.bias" in state
    assert ("lm_head.layer_norm.weight" in state) == mlm_head and "lm_head.decoder.weight" not in state


def test_mlm_logits(tmp_path):
    ids, mask = batch()
    checkpoints.write_xlmr(tmp_path / "xlmr", **SMALL)
    checkpoints.write_xlmr(tmp_path / "older", redundant=True, **SMALL)
    checkpoints.write_transformers(tmp_path / "jina", mlm_head=True, **SMALL)
    logits = {name: checkpoints.mlm_logits(tmp_path / name, ids, mask) for name in ("xlmr", "older", "jina")}
    assert logits["jina"].shape == (6, 40, 300) and difference(logits["jina"], logits["xlmr"], mask) > 0.1
    torch.testing.assert_close(logits["older"], logits["xlmr"], atol=0, rtol=0)


def test_e5_reads_as_xlmr_and_carries_its_files(tmp_path):
    ids, mask = batch()
    state, _ = checkpoints.write_e5(tmp_path / "e5", prompts={"query": "query: ", "passage": "passage: "}, **SMALL)
    checkpoints.write_xlmr(tmp_path / "xlmr", mlm_head=False, **SMALL)
    got, want = (checkpoints.xlmr_states(tmp_path / x, ids, mask) for x in ("e5", "xlmr"))
    assert_states_equal(got, want, mask)
    assert state["embeddings.position_ids"].dtype == torch.int64
    modules = json.loads((tmp_path / "e5" / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
