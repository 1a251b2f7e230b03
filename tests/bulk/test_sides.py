"""Sides and prompts of a bulk run: in its identity, in its manifest, and in outputs that an earlier
version began."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
from jina_jax import Embedder
from jina_jax.bulk.run import BulkOptions, embed_files
from jina_jax.errors import RunError

OPTIONS = BulkOptions(task="classification", dim=16, shard_rows=4)
NEWER = ("prompt", "prompt_name", "side", "max_length")


@pytest.fixture
def files(tmp_path) -> list[str]:
    (tmp_path / "a.txt").write_text("".join(f"text {number}\n" for number in range(10)))
    return [str(tmp_path / "a.txt")]


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def begun_by_an_earlier_version(embedder: Embedder, files: list[str], output: Path, options: BulkOptions) -> None:
    """One of two processes has done its part; the identity is as version 0.1 wrote it."""
    embed_files(embedder, "model", files, output, options, process=1, processes=2)
    file = output / "_run" / "run.json"
    run = json.loads(file.read_text())
    assert run.pop("embedded") and set(NEWER) <= run["options"].keys()
    for name in NEWER:
        del run["options"][name]
    assert list(run) == ["format", "version", "model", "options", "inputs"]
    file.write_text(json.dumps(run))


def test_an_output_that_an_earlier_version_began_is_finished(embedder, files, tmp_path):
    embed_files(embedder, "model", files, tmp_path / "clean", OPTIONS)
    begun_by_an_earlier_version(embedder, files, tmp_path / "out", OPTIONS)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.parquet")}
    assert list(before) == ["part-00001.parquet"]
    assert embed_files(embedder, "model", files, tmp_path / "out", OPTIONS).complete
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.parquet")}
    assert len(after) == 3 and before.items() <= after.items()
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["embedded"] == {"task": "classification", "prompt": "", "side": None}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"prompt": "x"}, r'options\.prompt: null -> "x"'),
        ({"prompt_name": "note"}, r'options\.prompt_name: null -> "note"'),
        ({"task": None, "side": "query"}, r'options\.task: "classification" -> null; options\.side: null -> "query"'),
        ({"max_length": 9}, r"options\.max_length: null -> 9"),
    ],
    ids=str,
)
@pytest.mark.parametrize("earlier", [True, False])
def test_another_prompt_side_or_limit_is_another_run(embedder, files, tmp_path, changes, difference, earlier):
    if earlier:
        begun_by_an_earlier_version(embedder, files, tmp_path / "out", OPTIONS)
    else:
        embed_files(embedder, "model", files, tmp_path / "out", OPTIONS)
    with pytest.raises(RunError, match=f"they differ in: .*{difference}"):
        embed_files(embedder, "model", files, tmp_path / "out", replace(OPTIONS, **changes))


def test_the_same_options_with_other_prompts_of_the_model_are_another_run(make_encoder, tokenizer, files, tmp_path):
    """A model with the same files can have a caller's prompts, or the published ones of its id."""
    for number, prompt in enumerate(("query: ", "ask: ")):
        encoder = make_encoder(vocab_size=16_000, num_layers=1, prompts=(("query", prompt),))
        model = Embedder(encoder, encoder.config, tokenizer)
        if number == 0:
            embed_files(model, "model", files, tmp_path / "out", BulkOptions(side="query"))
            continue
        with pytest.raises(RunError, match=r'they differ in: embedded\.prompt: "query: " -> "ask: "'):
            embed_files(model, "model", files, tmp_path / "out", BulkOptions(side="query"))


@pytest.mark.parametrize("other", ["task", "prompt", "prompt_name"])
def test_a_side_excludes_what_it_brings(other):
    with pytest.raises(ValueError, match=f"--side and --{other.replace('_', '-')} exclude each other"):
        BulkOptions(**{"side": "query", other: ""})


def test_a_side_that_there_is_not(embedder, files, tmp_path, unchecked):
    with pytest.raises(ValueError, match="unknown side 'both'"):
        embed_files(embedder, "model", files, tmp_path / "out", BulkOptions(side="both"))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
