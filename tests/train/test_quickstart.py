"""The quickstart from end to end: a tiny base, a handful of packages, two steps a stage."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from helpers.training import compiled_once
from jina_jax import Embedder
from jina_jax.checkpoints.native import save_checkpoint
from train import quickstart
from train.evaluation import classification
from train.evaluation.kept_embeddings import KeptEmbeddings
from train.run.checkpoints import Saver
from train.run.metrics import read_metrics

TASKS = ("retrieval.query", "retrieval.passage", "text-matching", "classification", "separation")

TWO_STEPS = """
from dataclasses import replace
from configs import quickstart


def get_config():
    config = quickstart.get_config()
    few = {"steps": 2, "warmup_steps": 1, "batch_size": 4, "max_length": 48, "row_length": 48}
    stages = tuple(replace(stage, **few) for stage in config.stages)
    return replace(config, stages=stages, checkpoint_every=3)
"""


@pytest.fixture
def base(make_encoder, tokenizer, tmp_path) -> Path:
    """A random model of one layer, with prompts."""
    sizes = {"vocab_size": 16_000, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_size": 64}
    encoder = make_encoder(**sizes, prompts=(("query", "query: "), ("document", "passage: ")))
    save_checkpoint(tmp_path / "base", encoder, tokenizer)
    return tmp_path / "base"


@pytest.fixture
def run(base, small_corpus, monkeypatch, tmp_path):
    """Function that runs the program, and returns its exit status and output."""
    (tmp_path / "two_steps.py").write_text(TWO_STEPS)
    monkeypatch.setattr(quickstart, "PRESET", str(tmp_path / "two_steps.py"))
    monkeypatch.setattr(classification, "FITTED_PER_SECTION", 2)

    def invoke(**options: object) -> tuple[int, str]:
        options = {"workdir": tmp_path / "run", "model": base, "corpus": small_corpus} | options
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        done = CliRunner().invoke(quickstart.main, arguments)
        return done.exit_code, done.output

    return invoke


def interrupt(monkeypatch, owner: type, name: str, calls: int) -> list[int]:
    """Interrupts the program, as Ctrl-C does, after some calls of a method; returns those left."""
    method, left = getattr(owner, name), [calls]

    def interrupted(*arguments: object) -> object:
        result = method(*arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    return left


@pytest.fixture
def embedded(monkeypatch) -> Counter:
    """Counts how often each text is embedded, by adapter and prompt."""
    counts, encode = Counter(), Embedder.encode

    def counting(self, texts, task=None, *, prompt=None, **options):
        counts.update((task, prompt, text) for text in texts)
        return encode(self, texts, task, prompt=prompt, **options)

    monkeypatch.setattr(Embedder, "encode", counting)
    return counts


def test_it_continues_wherever_it_was_interrupted(run, embedded, base, tmp_path):
    workdir = tmp_path / "run"
    with compiled_once(tmp_path / "compiled"):
        # In the first searches, in training, in the evaluation.
        for owner, name, calls in ((KeptEmbeddings, "_keep", 1), (Saver, "save", 1), (KeptEmbeddings, "_keep", 2)):
            with pytest.MonkeyPatch.context() as patch:
                left = interrupt(patch, owner, name, calls)
                status, _ = run()
            assert status == 1 and left == [0] and not (workdir / "report.md").exists()
        status, output = run()
    assert status == 0, output
    for query in quickstart.SEARCHES:
        assert output.count(query) == 2  # before and after
    assert set(embedded.values()) == {1}
    assert {adapter for adapter, _, _ in embedded} == {None, *TASKS}
    assert [line["step"] for line in read_metrics(workdir)] == [*range(1, 9)]
    model = Embedder.load(workdir / "model")
    assert model.config.tasks == TASKS and model.config.matryoshka_dims == (4, 8, 16, 32)
    prompts = {"document": "passage: ", "retrieval.passage": "passage: ", "separation": "query: "}
    assert prompts.items() <= dict(model.config.prompts).items()
    np.testing.assert_array_equal(model.encode(["one"]), Embedder.load(base).encode(["one"]))

    contents = json.loads((workdir / "metrics.json").read_text("utf-8"))
    scores = {(each["task"], each["subset"], each["adapter"], each["dim"]): each["value"] for each in contents["records"]}
    assert {adapter for _, _, adapter, _ in scores} >= {None, "none", "text-matching", "classification", "separation"}
    assert {dim for *_, dim in scores} == {None, 4, 8, 16, 32}
    report = (workdir / "report.md").read_text("utf-8")
    after = scores["retrieval", "en", "retrieval.query+retrieval.passage", 32]
    assert re.search(rf"\| en \| 60 \|.* {100 * after:.1f} \|", report)
    for image in ("dimensions.png", "languages.png"):
        assert image in report and (workdir / image).read_bytes().startswith(b"\x89PNG")
    spent = contents["seconds"]
    assert [*spent] == ["model and data", "first searches", "training", "evaluation"]
    assert all(0 <= each["compiling"] < each["seconds"] for each in spent.values()) and spent["training"]["compiling"] > 0

    status, output = run(model=make_other(base, tmp_path))
    assert status == 1 and "holds another run: model: " in output and "--workdir" in output


def make_other(base: Path, directory: Path) -> Path:
    """The same model with another prompt."""
    model = Embedder.load(base)
    model.save(directory / "other")
    return directory / "other"


def test_a_finished_model_of_another_program_is_not_taken_for_its_own(run, base, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    status, output = run()
    assert status == 1 and "holds another run: it has a model of another program" in output
    assert not (tmp_path / "run" / "embeddings.sqlite").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"corpus": "absent.jsonl"}, "absent.jsonl"), ({"model": "/absent/model"}, "/absent/model")],
)
def test_what_is_not_there_is_one_error(run, options, message, tmp_path):
    status, output = run(**options)
    assert status == 1 and message in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()
