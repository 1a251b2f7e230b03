"""Embeddings, token states and logits equal PyTorch's, whatever layout a checkpoint comes in."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import torch
from peft import LoraConfig
from transformers import JinaEmbeddingsV3ForMaskedLM, JinaEmbeddingsV3Model, PreTrainedTokenizerFast, XLMRobertaModel

from jina_jax import Embedder
from jina_jax.checkpoints.torch_reader import read_torch_checkpoint
from jina_jax.embed.forward import token_states
from jina_jax.text import packing
from jina_jax.text.tokenizer import load_tokenizer
from oracles import checkpoints, original

EMBEDDINGS, STATES = 1e-5, 1e-4
"""Largest differences in float32, of normalised embeddings and of token states."""

TEXTS = (
    "",
    "An editor for photographs and other raster images.",
    "Ein Betrachter für Ölgemälde, der überall läuft: größer, schöner, heißer.",
    "日本語の形態素解析システム。辞書と設定ファイルを含みます。",
    "Программа для просмотра и редактирования изображений.",
    "🦊 emoji 👩‍👩‍👧 flags 🇩🇪🇯🇵 and 1️⃣",
    "  white \t space \n\n everywhere \u00a0\u3000 ",
    "a word " * 20,
    "<pad>first, <pad> and <pad><pad> inside </s> a <mask> text<s> <pad>",
    "<pad><pad>",
)
LENGTHS = (2, 17, 512, 513, 1024, 1500, 3000, 8194)

DIFFERENT_RANKS: dict[str, dict] = {"small": dict(r=2, lora_alpha=8), "wide": dict(r=7, lora_alpha=3)}
PATTERNS: dict[str, dict] = {
    "stabilised": dict(r=4, lora_alpha=3, use_rslora=True),
    "ranks": dict(r=4, lora_alpha=2, rank_pattern={"fc1": 6, "layers.1.self_attn.q_proj": 2}),
    "alphas": dict(r=4, lora_alpha=2, alpha_pattern={"o_proj": 5, r"layers\.[02]\.self_attn\.v_proj": 7}),
    "both": dict(r=4, lora_alpha=2, use_rslora=True, rank_pattern={"dense": 1, "v_proj": 5}, alpha_pattern={"v_proj": -3}),
}
PARTIAL: dict[str, dict] = {
    "queries": dict(r=3, lora_alpha=1, target_modules=["q_proj", "v_proj"]),
    "one_layer": dict(r=4, lora_alpha=1, target_modules=["fc1", "fc2"], layers_to_transform=[1], layers_pattern="layers"),
    "inputs": dict(r=4, lora_alpha=1, target_modules=["word_embeddings"]),
}
XLMR_ADAPTERS: dict[str, dict] = {
    "all": dict(
        r=3, lora_alpha=2, target_modules=["word_embeddings", "token_type_embeddings", "query", "key", "value", "dense"]
    ),
    "query": dict(r=4, lora_alpha=1, target_modules=["query"]),
}

Reference = Callable[[torch.Tensor, torch.Tensor, str | None], torch.Tensor]
"""Token ids and mask [b, t] and a task -> last states [b, t, d] in PyTorch."""


def original_layout(directory: Path, **options: Any) -> Reference:
    state, config = checkpoints.write_original(directory, **options)
    tasks = config.get("lora_adaptations", [])

    def states(ids: torch.Tensor, mask: torch.Tensor, task: str | None) -> torch.Tensor:
        adapter = torch.full((len(ids),), -1 if task is None else tasks.index(task))
        return original.hidden_states(state, config, ids, mask, adapter)[-1]

    return states


def transformers_layout(directory: Path, **options: Any) -> Reference:
    checkpoints.write_transformers(directory, **options)
    return partial(transformers_states, directory)


def split_names(directory: Path, kind: Any = JinaEmbeddingsV3Model, **options: Any) -> Reference:
    """The same with the names that the tensors have in memory: separate q, k and v."""
    checkpoints.write_transformers(directory, spelling="peft", **options)
    model = kind.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, save_original_format=False)
    return partial(transformers_states, directory)


def transformers_states(directory: Path, ids: torch.Tensor, mask: torch.Tensor, task: str | None) -> torch.Tensor:
    adapter = None if task is None else checkpoints.adapter_name(task)
    return checkpoints.transformers_states(directory, ids, mask, adapter)[-1]


def xlmr_layout(directory: Path, write: Callable[..., Any] = checkpoints.write_xlmr, **options: Any) -> Reference:
    write(directory, **options)
    return lambda ids, mask, task: checkpoints.xlmr_states(directory, ids, mask)[-1]


def xlmr_with_adapters(directory: Path, **options: Any) -> Reference:
    checkpoints.write_xlmr(directory, mlm_head=False)
    model = XLMRobertaModel.from_pretrained(directory)
    for seed, (name, lora) in enumerate(XLMR_ADAPTERS.items()):
        model.add_adapter(LoraConfig(**lora), name)
        checkpoints.randomise_adapter(model, name, checkpoints.generator(seed), shared=False)
        model.save_pretrained(directory / name)
        model.delete_adapter(name)

    @torch.no_grad()
    def states(ids: torch.Tensor, mask: torch.Tensor, task: str | None) -> torch.Tensor:
        model = checkpoints.load(XLMRobertaModel, directory)
        if task:
            model.load_adapter(str(directory), adapter_name=task, adapter_kwargs={"subfolder": task})
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return states


LAYOUTS: dict[str, Callable[[Path], Reference]] = {
    "original": original_layout,
    "original, no prefix": partial(original_layout, prefix=""),
    "original, bfloat16": partial(original_layout, dtype=torch.bfloat16),
    "original, float16": partial(original_layout, dtype=torch.float16),
    "original, shards": partial(original_layout, shards=3),
    "original, pickle": partial(original_layout, pickle=True),
    "original, rotary base 10000": partial(original_layout, rotary_emb_base=10000.0),
    "original, two tasks of rank 3": partial(original_layout, tasks=("one", "two.three"), rank=3, alpha=2),
    "original, one task of rank 1": partial(original_layout, tasks=("only",), rank=1, alpha=0.5),
    "original, no adapters": partial(original_layout, tasks=(), model_type="xlm-roberta"),
    "transformers": transformers_layout,
    "transformers, PEFT's spelling": partial(transformers_layout, spelling="peft"),
    "transformers, bfloat16": partial(transformers_layout, dtype=torch.bfloat16),
    "transformers, rotary base 10000": partial(transformers_layout, rotary_emb_base=10000.0),
    "transformers, no adapters": partial(transformers_layout, adapters={}),
    "transformers, MLM head": partial(transformers_layout, mlm_head=True),
    "transformers, split names": split_names,
    "transformers, split names, MLM head": partial(split_names, kind=JinaEmbeddingsV3ForMaskedLM, mlm_head=True),
    "adapters of different ranks": partial(transformers_layout, adapters=DIFFERENT_RANKS),
    "adapters of different ranks, PEFT's spelling": partial(transformers_layout, spelling="peft", adapters=DIFFERENT_RANKS),
    "adapters with patterns": partial(transformers_layout, spelling="peft", adapters=PATTERNS),
    "partial adapters": partial(transformers_layout, spelling="peft", adapters=PARTIAL),
    "XLM-R": xlmr_layout,
    "XLM-R, no MLM head": partial(xlmr_layout, mlm_head=False),
    "XLM-R, no MLM head, no prefix": partial(xlmr_layout, mlm_head=False, prefix=""),
    "XLM-R, redundant tensors": partial(xlmr_layout, redundant=True),
    "XLM-R, bfloat16": partial(xlmr_layout, dtype=torch.bfloat16),
    "XLM-R, adapters": xlmr_with_adapters,
    "E5": partial(xlmr_layout, write=checkpoints.write_e5),
}


class Case(NamedTuple):
    embedder: Embedder
    tokenizer: PreTrainedTokenizerFast
    reference: Reference

    @property
    def systems(self) -> tuple[str | None, ...]:
        return None, *self.embedder.config.tasks

    def expected(self, texts: Sequence[str], task: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """States [b, t, d] and mask [b, t], the task's instruction before each text."""
        instruction = "" if task is None else self.embedder.config.prompt(task) or ""
        texts, limit = [instruction + text for text in texts], self.embedder.max_length
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return self.reference(batch["input_ids"], batch["attention_mask"], task), batch["attention_mask"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Callable[[str], Case]:
    """Case of a layout, made when it is first asked for."""
    made: dict[str, Case] = {}

    def case(layout: str) -> Case:
        if layout not in made:
            directory = tmp_path_factory.mktemp("layout")
            reference = LAYOUTS[layout](directory)
            if "pickle" in layout:
                encoder = read_torch_checkpoint(directory, allow_pickle=True)
                embedder = Embedder(encoder, encoder.config, load_tokenizer(directory, encoder.config))
            else:
                embedder = Embedder.load(directory)
            made[layout] = Case(embedder, PreTrainedTokenizerFast.from_pretrained(directory), reference)
        return made[layout]

    return case


def assert_close(got: Iterable[np.ndarray], want: Iterable[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=tolerance)


def real(states: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """States of each text without padding."""
    return [text[own == 1] for text, own in zip(states, mask, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tasks_in_one_call_equal_torch_at_all_dims(cases, layout):
    case = cases(layout)
    model, systems = case.embedder, case.systems
    expected = [case.expected(TEXTS, task) for task in systems]
    texts, tasks = TEXTS * len(systems), [task for task in systems for _ in TEXTS]

    states = model.encode(texts, task=tasks, output_value="token_embeddings")
    assert_close(states, [state for pair in expected for state in real(*pair)], STATES)
    for dim in model.config.matryoshka_dims or (5, 64):
        embeddings = model.encode(texts, task=tasks, truncate_dim=dim)
        assert_close(embeddings, [row for pair in expected for row in original.pool(*pair, truncate_dim=dim)], EMBEDDINGS)


@pytest.mark.parametrize("layout", ["original", "transformers", "transformers, PEFT's spelling", "partial adapters"])
def test_each_task_on_its_own_equals_torch(cases, layout):
    case = cases(layout)
    for task in case.systems:
        states, mask = case.expected(TEXTS, task)
        assert_close(case.embedder.encode(TEXTS, task=task), original.pool(states, mask), EMBEDDINGS)
        assert_close(case.embedder.encode(TEXTS, task=task, output_value="token_embeddings"), real(states, mask), STATES)


def text_of(tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int = 0) -> str:
    """A text of random words that is this many tokens long, special tokens included."""
    vocabulary = sorted(piece[1:] for piece in tokenizer.get_vocab() if piece[0] == "▁" and len(piece) > 1)
    words = [word for word in vocabulary[::5] if len(tokenizer.tokenize(word)) == 1]
    text = " ".join(np.random.default_rng(seed).choice(words, tokens - 2))
    assert len(tokenizer(text)["input_ids"]) == tokens
    return text


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("layout, task", [("original", None), ("transformers, PEFT's spelling", "separation"), ("E5", None)])
def test_every_length_equals_torch(cases, layout, task, length):
    case = cases(layout)
    length = min(length, case.embedder.max_length)
    texts = [text_of(case.tokenizer, length)]
    states, mask = case.expected(texts, task)
    assert states.shape[1] == length
    assert_close(case.embedder.encode(texts, task=task), original.pool(states, mask), EMBEDDINGS)
    assert_close(case.embedder.encode(texts, task=task, output_value="token_embeddings"), states, STATES)


def test_lengths_and_tasks_mixed_in_one_call_equal_torch(cases):
    case = cases("original")
    texts = [text_of(case.tokenizer, length, seed) for seed, length in enumerate((1500, 40, 700, 2, 300))]
    tasks = ("separation", None, "retrieval.query", "retrieval.passage", "separation")
    expected = [original.pool(*case.expected([text], task))[0] for text, task in zip(texts, tasks, strict=True)]
    assert_close(case.embedder.encode(texts, task=tasks), expected, EMBEDDINGS)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("layout, limit", [("original", 8194), ("XLM-R", 512)])
def test_a_text_over_the_limit_is_cut_where_the_tokenizer_cuts_it(cases, layout, limit):
    case = cases(layout)
    texts = [text_of(case.tokenizer, limit + 1), "short", text_of(case.tokenizer, limit + 300)]
    with pytest.warns(UserWarning, match=f"2 of 3 texts are longer than {limit} tokens and were cut"):
        got = case.embedder.encode(texts)
    expected = [original.pool(*case.expected([text], None))[0] for text in texts]
    assert_close(got, expected, EMBEDDINGS)


def test_queries_and_documents_of_e5_get_their_prompts(tmp_path):
    checkpoints.write_e5(tmp_path, prompts={"query": "query: ", "passage": "passage: "})
    model = Embedder.load(tmp_path)
    case = Case(model, PreTrainedTokenizerFast.from_pretrained(tmp_path), lambda *_: torch.zeros(0))
    for encode, prompt in ((model.encode_query, "query: "), (model.encode_document, "passage: ")):
        batch = case.tokenizer([prompt + text for text in TEXTS], padding=True, return_tensors="pt")
        states = checkpoints.xlmr_states(tmp_path, batch["input_ids"], batch["attention_mask"])[-1]
        assert_close(encode(TEXTS), original.pool(states, batch["attention_mask"]), EMBEDDINGS)


@pytest.mark.parametrize(
    "layout",
    ["XLM-R", "XLM-R, redundant tensors", "transformers, MLM head", "transformers, split names, MLM head"],
)
def test_logits_of_the_mlm_head_equal_torch(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    encoder, tokenizer = read_torch_checkpoint(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [text.replace("a", "<mask>") for text in TEXTS]
    token_ids = tokenizer(texts)["input_ids"]
    batch = tokenizer.pad({"input_ids": token_ids}, return_tensors="pt")
    expected = real(checkpoints.mlm_logits(tmp_path, batch["input_ids"], batch["attention_mask"]), batch["attention_mask"])

    (plan,) = packing.plan_batches(list(map(len, token_ids)), 4096)
    rows = packing.lay_out(token_ids, plan, encoder.config.pad_id)
    states = token_states(encoder, rows.tokens, rows.segment_ids, rows.positions, None)
    assert encoder.mlm_head is not None
    logits = np.asarray(encoder.mlm_head(states, encoder.tokens.table[...]))
    for row, slot in zip(*np.nonzero(rows.texts >= 0), strict=True):
        text = rows.texts[row, slot]
        assert_close([logits[row][rows.segment_ids[row] == slot + 1]], [expected[text]], STATES)
