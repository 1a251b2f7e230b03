"""Settings that stand beside weights: obeyed as sentence-transformers obeys them, refused, or named
in a warning."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertConfig, JinaEmbeddingsV3Config, XLMRobertaConfig

from convert.verify import verify
from jina_jax import Embedder, ModelConfig
from jina_jax.checkpoints.load import load_encoder
from jina_jax.checkpoints.settings import check_settings, list_settings
from jina_jax.checkpoints.settings_table import TABLE
from jina_jax.checkpoints.sources import find_model
from jina_jax.checkpoints.torch_writer import write_sentence_transformers
from jina_jax.errors import CheckpointError, ConfigError
from jina_jax.text.tokenizer import load_tokenizer
from tests.oracles import checkpoints

PUBLISHED = Path(__file__).resolve().parents[1] / "fixtures" / "published_settings"
TEXTS = [
    "A LIBRARY of C++ templates, WITH Tools for Editing <mask> photographs and for Sorting them. " * 2,
    "Eine BIBLIOTHEK für Straßen und ÄRGER",
    "İSTANBUL <MASK> short",
    "photo",
]
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=66)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small XLM-RoBERTa as sentence-transformers lays it out."""
    directory = tmp_path_factory.mktemp("base") / "model"
    checkpoints.write_e5(directory, prompts={"query": "Query: ", "document": "Text: "}, **SMALL)
    return directory


@pytest.fixture
def copy(base, tmp_path) -> Callable[[], Path]:
    """Maker of copies of `base`."""

    def make(name: str = "model") -> Path:
        return Path(shutil.copytree(base, tmp_path / name))

    return make


def edit(directory: Path, file: str, **fields: Any) -> None:
    path = directory / file
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | fields), "utf-8")


def reference(directory: Path) -> SentenceTransformer:
    logging.disable(logging.WARNING)
    try:
        return SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    finally:
        logging.disable(logging.NOTSET)


def embed(model: Any, method: str = "encode") -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are longer than .* tokens")
        return getattr(model, method)(TEXTS, normalize_embeddings=True)


@pytest.fixture(scope="module")
def unchanged(base) -> np.ndarray:
    """Embeddings without any of the settings."""
    return embed(Embedder.load(base, strict=True))


def assert_same(directory: Path, methods: tuple[str, ...] = ("encode",), unlike: np.ndarray | None = None) -> Embedder:
    """Compares with sentence-transformers, and with the embeddings without the setting."""
    model, torch_model = Embedder.load(directory, strict=True), reference(directory)
    for method in methods:
        embeddings = embed(model, method)
        np.testing.assert_allclose(embeddings, embed(torch_model, method), atol=1e-5)
        if method == "encode" and unlike is not None:
            assert unlike.shape != embeddings.shape or np.abs(unlike - embeddings).max() > 1e-2
    return model


# ---- what is obeyed ----


def max_seq_length(directory: Path) -> None:
    edit(directory, "sentence_bert_config.json", max_seq_length=16)


def do_lower_case(directory: Path) -> None:
    edit(directory, "sentence_bert_config.json", do_lower_case=True)


def older_name(directory: Path) -> None:
    """An empty file is passed over; of two others the one that is looked for first counts."""
    (directory / "sentence_bert_config.json").write_text("{}")
    edit(directory, "sentence_xlnet_config.json", max_seq_length=5)
    edit(directory, "sentence_xlm-roberta_config.json", max_seq_length=16, do_lower_case=True)


def transformer_in_a_folder(directory: Path) -> None:
    """The root keeps other weights and settings, which count for nothing."""
    folder = directory / "0_Transformer"
    folder.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"):
        shutil.copy(directory / file, folder / file)
    tensors = {name: tensor * 1.5 for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors | {"embeddings.position_ids": torch.arange(66)[None]}, folder / "model.safetensors", {"format": "pt"})
    edit(folder, "sentence_bert_config.json", max_seq_length=16)
    edit(directory, "sentence_bert_config.json", max_seq_length=7)
    modules = json.loads((directory / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (directory / "modules.json").write_text(json.dumps(modules))


def truncate_dim(directory: Path) -> None:
    edit(directory, "config_sentence_transformers.json", truncate_dim=8)


def default_prompt(directory: Path) -> None:
    edit(directory, "config_sentence_transformers.json", prompts={"note": "NOTE to self: "}, default_prompt_name="note")


def limit_of_the_tokenizer(directory: Path) -> None:
    """Truncation and padding in tokenizer.json have no effect."""
    edit(directory, "tokenizer_config.json", model_max_length=20)
    edit(directory, "sentence_bert_config.json", max_seq_length=None)
    truncation = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 48}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 1, "pad_type_id": 0}
    edit(directory, "tokenizer.json", truncation=truncation, padding=padding | {"pad_token": "<pad>"})


def flags_of_added_tokens(directory: Path) -> None:
    """`<mask>` is found in normalised text, so that lower-casing finds it in `<MASK>`."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": True}
    edit(directory, "tokenizer_config.json", added_tokens_decoder={"15999": flags | {"content": "<mask>"}})
    edit(directory, "sentence_bert_config.json", do_lower_case=True)


@pytest.mark.parametrize(
    "change",
    [
        max_seq_length,
        do_lower_case,
        older_name,
        transformer_in_a_folder,
        truncate_dim,
        default_prompt,
        limit_of_the_tokenizer,
        flags_of_added_tokens,
    ],
    ids=lambda change: change.__name__,
)
def test_a_setting_counts_as_in_sentence_transformers(unchanged, copy, change):
    directory = copy()
    change(directory)
    assert_same(directory, ("encode", "encode_query"), unlike=unchanged)


def test_what_sentence_transformers_saves_is_read_the_same_and_kept_by_every_writer(unchanged, copy, tmp_path):
    directory = copy()
    edit(directory, "sentence_bert_config.json", max_seq_length=16, do_lower_case=True)
    saved = reference(directory)
    saved.truncate_dim, saved.prompts, saved.default_prompt_name = 8, {"query": "", "note": "NOTE: "}, "note"
    saved.save(str(tmp_path / "saved"), create_model_card=False)
    model = assert_same(tmp_path / "saved", ("encode", "encode_query", "encode_document"), unlike=unchanged)
    assert model.max_length == 16
    model.save(tmp_path / "native")
    write_sentence_transformers(tmp_path / "torch", model.encoder, model.tokenizer, max_length=model.max_length)
    for again in (Embedder.load(tmp_path / "native", strict=True), assert_same(tmp_path / "torch", ("encode", "encode_query"))):
        assert again.max_length == 16
        np.testing.assert_allclose(embed(again), embed(model), atol=1e-6)


def test_the_limit_is_the_least_of_three(copy):
    directory = copy()
    for of_tokenizer, of_module, expected in [(16, 32, 16), (32, 16, 16), (900, 900, 64)]:
        edit(directory, "tokenizer_config.json", model_max_length=of_tokenizer)
        edit(directory, "sentence_bert_config.json", max_seq_length=of_module)
        assert Embedder.load(directory).max_length == expected
    edit(directory, "sentence_bert_config.json", max_seq_length=1.5)
    with pytest.raises(ConfigError, match=r"max_seq_length must be an integer of at least 2, not 1\.5"):
        Embedder.load(directory)


def test_verify_reads_the_transformer_that_the_modules_name(copy, tmp_path):
    directory = copy()
    transformer_in_a_folder(directory)
    Embedder.load(directory).save(tmp_path / "native")
    assert verify(directory, tmp_path / "native")["ok"]


def test_prompts_without_text_are_empty_and_a_default_must_be_one_of_them(copy):
    directory = copy()
    edit(directory, "config_sentence_transformers.json", prompts={"query": None}, default_prompt_name="document")
    assert_same(directory, ("encode", "encode_query"))
    edit(directory, "config_sentence_transformers.json", default_prompt_name="passage")
    with pytest.raises(ValueError, match="'passage' not found"):
        reference(directory)
    with pytest.raises(ConfigError, match="default_prompt_name 'passage' is not one of its prompts"):
        Embedder.load(directory)
    edit(directory, "config_sentence_transformers.json", default_prompt_name=None, truncate_dim=8.5)
    with pytest.raises(ConfigError, match=r"truncate_dim must be an integer, not 8\.5"):
        Embedder.load(directory)


def word_pieces(directory: Path, lowercase: bool) -> Path:
    """Writes a small BERT tokenizer that knows words in both cases."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ärger", "arger", "Ärger", "Arger", "中", "文", "中文"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    backend.add_special_tokens(words[:5])
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    BertConfig(vocab_size=len(words)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("lowercase", "settings"),
    [
        (True, {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
        (False, {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True, "strip_accents": False}),
        (False, {"tokenizer_class": "BertTokenizer"}),
        (True, {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": True}),
        (True, {"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False}),
        (False, {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True}),
    ],
    ids=str,
)
def test_settings_of_a_bert_tokenizer_count_as_in_transformers(tmp_path, lowercase, settings):
    directory = word_pieces(tmp_path / "bert", lowercase)
    edit(directory, "tokenizer_config.json", **settings)
    text = "Ärger ärger Arger [MASK] [mask] 中文"
    tokenizer = load_tokenizer(directory, ModelConfig(vocab_size=12, pad_id=0))
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    assert (tokenizer.cls_token, tokenizer.bos_token, tokenizer.mask_token_id) == ("[CLS]", None, 4)
    assert len(tokenizer) == 12


def test_special_tokens_are_named_by_the_files_that_transformers_reads(base, copy):
    directory, config = copy(), ModelConfig(vocab_size=16_000)
    edit(directory, "special_tokens_map.json", mask_token={"content": "</s>"})
    assert load_tokenizer(directory, config).mask_token == AutoTokenizer.from_pretrained(directory).mask_token == "</s>"
    edit(directory, "tokenizer_config.json", added_tokens_decoder={}, mask_token="<mask>")
    assert load_tokenizer(directory, config).mask_token == AutoTokenizer.from_pretrained(directory).mask_token == "<mask>"
    edit(directory, "tokenizer_config.json", mask_token="o")  # a piece: it is cut out whole
    text = "photo tools"
    ids = load_tokenizer(directory, config)(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(directory)(text)["input_ids"] != load_tokenizer(base, config)(text)["input_ids"]
    edit(directory, "tokenizer_config.json", cls_token="[START]")
    with pytest.raises(CheckpointError, match=r"names the cls_token '\[START\]', which tokenizer\.json does not hold"):
        Embedder.load(directory)
    for damaged in ({"cls_token": ["<s>"]}, {"cls_token": None, "added_tokens_decoder": ["<mask>"]}):
        edit(directory, "tokenizer_config.json", **damaged)
        with pytest.raises(CheckpointError, match="a setting of the tokenizer has a value of the wrong type"):
            load_tokenizer(directory, config)


# ---- what is refused, and what is not known ----

REFUSED = [
    ("config.json", {"rotary_emb_fraction": 0.5}),
    ("config.json", {"rotary_emb_interleaved": True}),
    ("config.json", {"rotary_emb_scale_base": 512}),
    ("config.json", {"rotary_scaling_factor": 2.0}),
    ("config.json", {"rotary_emb_dim": 4}),
    ("config.json", {"head_dim": 4}),
    ("config.json", {"use_qk_norm": True}),
    ("config.json", {"window_size": [128, 128]}),
    ("config.json", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("config.json", {"is_decoder": True}),
    ("config.json", {"add_cross_attention": True}),
    ("config.json", {"pruned_heads": {"0": [1]}}),
    ("config.json", {"prenorm": True}),
    ("config.json", {"tie_word_embeddings": False, "architectures": ["XLMRobertaForMaskedLM"]}),
    ("config.json", {"quantization_config": {"bits": 4}}),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}),
    ("sentence_bert_config.json", {"modality_config": {"image": {"method": "forward", "method_output_name": "x"}}}),
    ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 8}}}),
    ("sentence_bert_config.json", {"query_length": 8}),
    ("sentence_bert_config.json", {"query_expansion": {"length": 8}}),
    ("sentence_bert_config.json", {"tokenizer_args": {"model_max_length": 9}}),
    ("sentence_bert_config.json", {"config_kwargs": {"num_hidden_layers": 2}}),
    ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}),
    ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}),
    ("1_Pooling/config.json", {"include_prompt": False}),
    ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}),
    ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}),
    ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}),
    ("tokenizer.json", {"truncation": {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}}),
    ("tokenizer_config.json", {"truncation_side": "left"}),
    ("tokenizer_config.json", {"split_special_tokens": True}),
    ("tokenizer_config.json", {"add_prefix_space": False}),
    ("tokenizer_config.json", {"extra_special_tokens": ["<new>"]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"15999": {"content": "<new>"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<mask>"}}}),
    ("special_tokens_map.json", {"additional_special_tokens": [{"content": "<new>"}]}),
    ("added_tokens.json", {"<new>": 15999}),
]


@pytest.mark.parametrize(("file", "fields"), REFUSED, ids=str)
def test_a_setting_that_would_change_the_result_is_refused_by_file_and_field(copy, file, fields):
    directory = copy()
    edit(directory, file, **fields)
    field = next(iter(fields))
    with pytest.raises(ConfigError, match=rf"{file}: {field}(\.partial_rotary_factor|\.direction)? .*supported is"):
        Embedder.load(directory)


def test_the_values_at_which_a_refused_setting_has_no_effect_are_let_pass(copy):
    directory = copy()
    edit(
        directory, "config.json", head_dim=8, rotary_emb_dim=8, rotary_emb_fraction=1.0, window_size=[-1, -1], use_qk_norm=False
    )
    edit(directory, "config.json", tie_word_embeddings=False, pruned_heads={}, is_decoder=False, use_qk_norm=False)
    edit(directory, "config_sentence_transformers.json", similarity_fn_name="dot", model_type="SentenceTransformer")
    edit(
        directory,
        "sentence_bert_config.json",
        model_args={"torch_dtype": "float32"},
        tokenizer_args={"trust_remote_code": True},
    )
    edit(directory, "1_Pooling/config.json", pooling_mode="mean", include_prompt=True)
    edit(directory, "tokenizer_config.json", add_prefix_space=True, extra_special_tokens=["<mask>"], truncation_side="right")
    edit(directory, "added_tokens.json", **{"<mask>": 15999})
    assert_same(directory)
    modules = json.loads((directory / "modules.json").read_text())
    (directory / "modules.json").write_text(json.dumps(modules[:2]))  # unnormalised, the dot product is not the cosine
    with pytest.raises(ConfigError, match="similarity_fn_name 'dot'.*'cosine', or 'dot' behind a Normalize module"):
        Embedder.load(directory)


@pytest.mark.parametrize(
    ("path", "kinds", "message"),
    [
        ("../other", ("Transformer", "Pooling"), r"names the folder '\.\./other'"),
        ("/", ("Transformer", "Pooling"), "names the folder '/'"),
        ("", ("Transformer",), r"lists \['Transformer'\]; supported are"),
        ("", ("Pooling", "Transformer"), "supported are a Transformer, Pooling"),
        ("", ("Transformer", "Pooling", "Transformer"), "supported are a Transformer, Pooling"),
        ("0_Transformer", ("Transformer", "Pooling"), "0_Transformer is of an unknown kind"),
    ],
)
def test_a_list_of_modules_that_is_not_built_is_refused(copy, path, kinds, message):
    directory = copy()
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path if i == 0 else "x"} for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        Embedder.load(directory)


def test_unknown_settings_give_one_warning_that_names_them_all_or_an_error(copy, tmp_path):
    directory = copy()
    edit(directory, "config.json", attention_flavour="wild", num_experts=4)
    edit(directory, "tokenizer_config.json", fancy=True)
    named = r"config\.json: attention_flavour, num_experts; .*tokenizer_config\.json: fancy"
    with pytest.warns(UserWarning, match=named) as caught:
        model = Embedder.load(directory)
    assert len(caught) == 1
    for load in (Embedder.load, load_encoder):
        with pytest.raises(ConfigError, match=named):
            load(directory, strict=True)
    model.save(tmp_path / "native")
    Embedder.load(tmp_path / "native", strict=True)


def test_settings_are_listed_with_their_verdicts(copy):
    directory = copy()
    edit(directory, "config.json", attention_flavour="wild", is_decoder=True)
    edit(directory, "a/adapter_config.json", r=4, use_dora=True)
    verdicts = {(s.file, s.field): (s.verdict, s.value) for s in list_settings(directory)}
    assert verdicts["config.json", "attention_flavour"] == ("unknown", "wild")
    assert verdicts["config.json", "is_decoder"] == ("refused", True)
    assert verdicts["config.json", "hidden_size"] == ("obeyed", 16)
    assert verdicts["config.json", "hidden_act"] == ("inert", "gelu")
    assert verdicts["modules.json", "1.path"] == ("obeyed", "1_Pooling")
    assert verdicts["1_Pooling/config.json", "pooling_mode_mean_tokens"] == ("inert", True)
    assert verdicts["sentence_bert_config.json", "max_seq_length"] == ("obeyed", 64)
    assert verdicts["a/adapter_config.json", "use_dora"] == ("refused", True)
    assert all(s.why for s in list_settings(directory) if s.verdict in ("inert", "refused"))


def test_the_table_knows_what_today_s_libraries_write():
    for kind in (XLMRobertaConfig, BertConfig, JinaEmbeddingsV3Config):
        fields = kind().to_dict()
        fields |= {f"rope_parameters.{field}": 0 for field in fields.pop("rope_parameters", None) or {}}
        assert not fields.keys() - TABLE["config.json"].keys(), kind
    assert not LoraConfig().to_dict().keys() - TABLE["adapter_config.json"].keys()


@pytest.mark.parametrize("file", sorted(PUBLISHED.glob("*.json")), ids=lambda file: file.stem)
def test_settings_of_published_models_are_all_known_and_none_is_refused(tmp_path, file):
    for path, fields in json.loads(file.read_text("utf-8")).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(fields), "utf-8")
    check_settings(tmp_path, strict=True)
    assert {s.verdict for s in list_settings(tmp_path)} == {"obeyed", "inert"}


@pytest.mark.hub
@pytest.mark.parametrize(
    "model",
    [
        "jinaai/jina-embeddings-v3",
        "jinaai/jina-embeddings-v3-hf",
        "FacebookAI/xlm-roberta-base",
        "FacebookAI/xlm-roberta-large",
        "intfloat/multilingual-e5-small",
        "intfloat/multilingual-e5-base",
        "intfloat/multilingual-e5-large",
        "intfloat/multilingual-e5-large-instruct",
        "sentence-transformers/all-MiniLM-L6-v2",
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
    ],
)
def test_settings_on_the_hub_are_all_known_and_none_is_refused(model):
    check_settings(Path(huggingface_hub.snapshot_download(model, allow_patterns=["*.json"])), strict=True)


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A hub that serves the directories of a folder, and only the files that are asked for."""

    def names(model: str, revision: str | None = None) -> list[str]:
        return [path.relative_to(tmp_path / model).as_posix() for path in (tmp_path / model).rglob("*") if path.is_file()]

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for name in filter_repo_objects(names(model), allow_patterns=allow_patterns):
            target = tmp_path / "cache" / model / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / model / name, target)
        return str(tmp_path / "cache" / model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", names)
    return tmp_path


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_on_the_hub_that_holds_only_pickles_is_fetched_where_they_are_allowed(hub, copy, shards):
    directory = copy("some/model")
    transformer_in_a_folder(directory)
    (directory / "model.safetensors").unlink()
    expected = embed(Embedder.load(directory))
    state = load_file(directory / "0_Transformer" / "model.safetensors")
    (directory / "0_Transformer" / "model.safetensors").unlink()
    index = {}
    for shard in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-0000{shard + 1}-of-00002.bin"
        part = {key: tensor for i, (key, tensor) in enumerate(sorted(state.items())) if i % shards == shard}
        torch.save(part, directory / "0_Transformer" / name)
        index |= dict.fromkeys(part, name)
    if shards > 1:
        edit(directory / "0_Transformer", "pytorch_model.bin.index.json", metadata={}, weight_map=index)
    (directory / "training_args.bin").write_bytes(b"never fetched")
    with pytest.raises(CheckpointError, match=r"some/model .* only as pickles \(0_Transformer/pytorch_model.*--allow-pickle"):
        Embedder.load("some/model")
    encoder, tokenizer, cache = load_encoder("some/model", allow_pickle=True)
    assert not (cache / "training_args.bin").exists()
    np.testing.assert_array_equal(embed(Embedder(encoder, encoder.config, tokenizer)), expected)


def test_pickles_are_fetched_only_in_place_of_what_is_lacking(hub, copy):
    directory = copy("some/model")
    torch.save({}, directory / "pytorch_model.bin")
    edit(directory, "style/adapter_config.json", r=4)
    torch.save({}, directory / "style" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only as pickles \(style/adapter_model\.bin\)"):
        find_model("some/model")
    cache = find_model("some/model", allow_pickle=True)
    assert (cache / "style" / "adapter_model.bin").exists() and not (cache / "pytorch_model.bin").exists()


def test_files_of_modules_come_from_the_hub(hub, copy):
    directory = copy("some/model")
    older_name(directory)
    (directory / "1_Pooling").rename(directory / "pool")
    modules = json.loads((directory / "modules.json").read_text())
    modules[1]["path"] = "pool"
    (directory / "modules.json").write_text(json.dumps(modules))
    np.testing.assert_array_equal(embed(Embedder.load("some/model")), embed(Embedder.load(directory)))
    edit(directory, "pool/config.json", pooling_mode_max_tokens=True)
    with pytest.raises(ConfigError, match=r"pool/config\.json: pooling_mode_max_tokens"):
        Embedder.load("some/model")
