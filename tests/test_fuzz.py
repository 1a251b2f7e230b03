"""Random command lines, options, configurations and contents of files never end in a traceback.

Every door of the shell is tried in process. What a command is given is made from a good input with
something random in it; the seed of a case makes it again.
"""

import copy
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("torch")
import click
from click.testing import CliRunner

import train.__main__
import train.adapter
import train.compile
import train.evaluate
import train.mine
import train.prepare
from convert.__main__ import main as convert
from jina_jax.cli import main as jina_jax
from oracles import checkpoints

CASES, CASES_IN_MAKE_TEST = 2000, 300
CHUNK = 50

ODD_VALUES = [None, True, -1, 0, 3, 2**70, 1e308, float("nan"), "", "x", "\0", "é[*]", [], [[]], {}, {"a": 1}, ["x", 1]]
ODD_NUMBERS = ["-1", "0", "1", "3", "99999999999999999999", "1e9", "nan", "", "x"]
ODD_NAMES = ["", "x", "a b", "[*]", "none", "-", "\n", "../..", "é", "retrieval.query", "\udcff", "~", "/", "."]
ODD_CONTENTS = [
    b"",
    b"\0" * 9,
    b"\xff\xfe\x00x",
    b"{",
    b"[]",
    b"null",
    b"1e999",
    b"[" * 100_000,
    b'"\\ud800"',
    b"\xef\xbb\xbf{}",
    b'{"text": "\\ud800"}\n',
    b'{"text": 1}\n',
    b'{"anchor": "a"}\n',
    b'{"anchor": "a", "positive": "a", "negatives": ["a"]}\n',
    b'{"sentence1": "a", "sentence2": "b", "score": NaN}\n',
    b"\x1f\x8b\x08garbage",
    b"\xfd7zXZ\0garbage",
    b"PAR1garbagePAR1",
    b"text\n" + b'"' * 200_000,
    b"a" * 300_000,
    b'{"a": ' * 3000,
    b"\x08\0\0\0\0\0\0\0{}      ",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
]
CONFIG = """
from jina_jax import ModelConfig
from train.config import DatasetConfig, InitialModel, Stage, TrainConfig

def get_config():
    stage = Stage(name="s", objective="pairs", datasets=(DatasetConfig("{data}", "pair"),), steps=1, batch_size=2,
                  max_length=16, row_length=16, learning_rate=1e-3)
    return TrainConfig(stages=(stage,), start=InitialModel("{model}"))
"""
FIELDS = ["seed", "steps", "stages", "stages.0", "stages.0.steps", "stages.0.datasets.0.path", "stages.0.datasets.0.kind", "x"]
FIELDS += ["stages.0.batch_size", "stages.0.max_length", "stages.0.dims", "stages.0.temperature", "start.source", "mesh.data"]
FIELDS += [
    "start.model",
    "start.tokenizer",
    "dtype",
    "checkpoint_every",
    "stages.0.adapters",
    "stages.0.objective",
    "mesh.fsdp",
]


@pytest.fixture(scope="module")
def good(tmp_path_factory, make_encoder, tokenizer) -> Path:
    """Small checkpoints of every layout, and a file."""
    from jina_jax.checkpoints.native import save_checkpoint

    root = tmp_path_factory.mktemp("good")
    save_checkpoint(root / "native", make_encoder(num_layers=1), None)
    shutil.copy(Path(__file__).parents[1] / "data" / "tokenizer" / "tokenizer.json", root / "tokenizer.json")
    checkpoints.write_original(root / "original")
    checkpoints.write_transformers(root / "transformers", spelling="peft")
    checkpoints.write_e5(root / "e5")
    return root


class Case:
    """A command line with random parts, and the files that it names."""

    def __init__(self, seed: int, good: Path, directory: Path):
        self.rng, self.good, self.directory = random.Random(seed), good, directory

    def command(self) -> tuple[click.Command, list[str]]:
        door = self.rng.choice([self.embed, self.embed, self.convert, self.convert, self.train, self.prepare, self.mine])
        if self.rng.random() < 0.1:
            door = self.rng.choice([self.evaluate, self.compile, self.info, self.info, self.adapter, self.adapter])
        command, arguments = door()
        if self.rng.random() < 0.2:
            arguments.insert(self.rng.randrange(len(arguments) + 1), self.rng.choice([*ODD_NAMES, "--x", "--help"]))
        return command, [argument.replace("\0", "0") for argument in arguments]

    def embed(self) -> tuple[click.Command, list[str]]:
        output = self.rng.choice(
            ["-", str(self.path("o.npy")), str(self.path("o.parquet")), f"{self.path('shards')}/", self.odd()]
        )
        options = ["--dim", "--batch-size", "--shard-rows", "--num-processes", "--process-id", "--max-length"]
        texts = [
            "--task",
            "--precision",
            "--field",
            "--id-field",
            *self.rng.choice([(), ("--prompt", "--prompt-name", "--side")]),
        ]
        given = [self.texts() for _ in range(self.rng.choice([1, 1, 2]))]
        return jina_jax, ["embed", *given, "--model", self.model(), "--output", output, *self.options(options, texts)]

    def convert(self) -> tuple[click.Command, list[str]]:
        name = self.rng.choice(["from_torch", "to_torch", "seal"])
        if name == "seal":
            return convert, [name, self.model()]
        layout = (
            ["--layout", self.rng.choice(["original", "transformers", "sentence-transformers", "x"])]
            if name == "to_torch"
            else []
        )
        options = self.options(["--rope-theta"] if layout else [], ["--task"] if layout else ["--revision"])
        return convert, [name, self.model(), self.new(), *layout, *options, *self.options([], ["--dtype"])]

    def info(self) -> tuple[click.Command, list[str]]:
        return jina_jax, ["info", self.model(), *self.rng.choice([[], ["--json"]])]

    def train(self) -> tuple[click.Command, list[str]]:
        return train.__main__.main, [self.config(), "--workdir", self.new(), *self.overrides()]

    def compile(self) -> tuple[click.Command, list[str]]:
        topology = self.rng.choice(["", "v5e", "v5e:0x0", "v9:2x2", "v5e:3x5x7", "v5e:axb"])
        return train.compile.main, [self.config(), "--topology", topology, *self.overrides()]

    def prepare(self) -> tuple[click.Command, list[str]]:
        if self.rng.random() < 0.2:
            return train.prepare.main, ["corpus", self.rng.choice(["pairs", "x"]), "--out", self.new(), "--file", self.texts()]
        kind = self.rng.choice(["text", "pair", "triplet", "scored_pair", "labelled_text", "x"])
        flags = self.rng.choice([[], ["--drop-overlapping"]])
        return train.prepare.main, [
            "records",
            self.texts(),
            "--kind",
            kind,
            "--out",
            self.new(),
            *flags,
            *self.options([], ["--split"]),
        ]

    def mine(self) -> tuple[click.Command, list[str]]:
        numbers = ["--num-negatives", "--range-min", "--range-max", "--max-score", "--relative-margin", "--seed"]
        search = self.rng.choice([["--bm25"], ["--model", self.model()], []])
        return train.mine.main, [
            self.texts(),
            "--out",
            str(self.path("mined.jsonl")),
            *search,
            *self.options(numbers, ["--sampling"]),
        ]

    def evaluate(self) -> tuple[click.Command, list[str]]:
        return train.evaluate.main, [self.model(), "--corpus", self.texts(), "--split", self.rng.choice(["test", "x"])]

    def adapter(self) -> tuple[click.Command, list[str]]:
        columns = [
            ("text", "label"),
            ("anchor", "positive"),
            ("anchor", "positive", "negative"),
            ("text",),
            ("text", "positive"),
        ]
        named = [
            x for option in self.rng.choice(columns) for x in (f"--{option}", self.rng.choice([option, option, self.odd()]))
        ]
        numbers = ["--batch-size", "--rank", "--max-length", "--learning-rate", "--held-out", "--seed", "--dims"]
        table = self.path("table.csv")
        table.write_text("text,label,anchor,positive,negative\n" + "".join(f"t{i},{i % 2},a{i},p{i},n{i}\n" for i in range(9)))
        file, new = self.rng.choice([str(table), str(table), self.texts()]), self.new()
        options = self.options(numbers, ["--name", "--test"])
        return train.adapter.main, [file, *named, "--model", self.model(), "--out", new, "--steps", "1", *options]

    # ---- parts

    def path(self, name: str) -> Path:
        return self.directory / name

    def odd(self) -> str:
        return self.rng.choice(ODD_NAMES)

    def options(self, numbers: list[str], names: list[str]) -> list[str]:
        chosen = [(name, ODD_NUMBERS) for name in numbers] + [(name, ODD_NAMES) for name in names]
        return [x for name, values in chosen if self.rng.random() < 0.25 for x in (name, self.rng.choice(values))]

    def new(self) -> str:
        return self.rng.choice(
            [str(self.path("new")), str(self.path("new[1]")), str(self.path("")), str(self.path("no/such/dir"))]
        )

    def texts(self) -> str:
        ending = self.rng.choice(["txt", "jsonl", "csv", "tsv", "parquet", "jsonl.gz", "txt.xz", "json", ""])
        file = self.path(f"{self.rng.choice(['a', 'b[1]', 'c d'])}.{ending}")
        match self.rng.randrange(8):
            case 0:
                return self.odd()
            case 1 if not os.path.lexists(file):
                file.mkdir()
            case 2 if not os.path.lexists(file):
                file.symlink_to(self.path("nowhere"))
            case _ if not os.path.lexists(file):
                file.write_bytes(self.rng.choice(ODD_CONTENTS))
        return str(file)

    def model(self) -> str:
        """A checkpoint with something wrong in one or two of its files; seldom a good one."""
        if self.rng.random() < 0.1:
            return self.odd()
        name = self.rng.choice(["native", "original", "transformers", "e5"])
        directory = self.path(f"{name}{self.rng.randrange(100)}")
        if not directory.exists():
            shutil.copytree(self.good / name, directory, copy_function=os.link)
            files = sorted(path for path in directory.rglob("*") if path.is_file())
            for file in self.rng.sample(files, 2):
                self.spoil(file)
        return str(directory)

    def spoil(self, file: Path) -> None:
        content = file.read_bytes()
        file.unlink()  # the good one is linked
        match self.rng.randrange(6):
            case 0:
                return
            case 1:
                file.mkdir()
            case 2:
                file.write_bytes(self.rng.choice(ODD_CONTENTS))
            case 3:
                file.write_bytes(content[: self.rng.randrange(len(content) + 1)])
            case _ if file.suffix == ".json" and len(content) < 100_000:
                file.write_text(json.dumps(self.spoilt(json.loads(content))))
            case _:
                damaged = bytearray(content or b"x")
                for _ in range(self.rng.choice([1, 8])):
                    damaged[self.rng.randrange(min(len(damaged), 2000))] = self.rng.randrange(256)
                file.write_bytes(damaged)

    def spoilt(self, node: Any) -> Any:
        """A JSON value with another one at a random place."""
        if not isinstance(node, dict | list) or not node or self.rng.random() < 0.1:
            return self.rng.choice(ODD_VALUES)
        node = copy.deepcopy(node)
        key = self.rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node, dict) and self.rng.random() < 0.2:
            del node[key]
        else:
            node[key] = self.spoilt(node[key])
        return node

    def config(self) -> str:
        if self.rng.random() < 0.2:
            return self.texts()
        file = self.path("config.py")
        text = CONFIG.replace("{data}", str(self.path("nowhere.jsonl"))).replace("{model}", self.model())
        if self.rng.random() < 0.2:
            place = self.rng.randrange(len(text))
            text = text[:place] + self.rng.choice(["(", "1 / 0\n", "x", "\\", "import nowhere\n", "é"]) + text[place:]
        file.write_text(text, "utf-8", "replace")
        return str(file) + self.rng.choice(["", "", "", ":get_config", ":nothing", ":"])

    def overrides(self) -> list[str]:
        count = self.rng.randrange(3)
        values = [*map(repr, ODD_VALUES), "(", "runs/x", "{'a': 1}"]
        return [x for _ in range(count) for x in ("--set", f"{self.rng.choice(FIELDS)}={self.rng.choice(values)}")]


def run(seed: int, good: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir()
    monkeypatch.chdir(directory)
    command, arguments = Case(seed, good, directory).command()
    result = CliRunner().invoke(command, arguments)
    where = f"case {seed}: {command.name} {arguments}"
    assert result.exception is None or isinstance(result.exception, SystemExit), (where, result.exception)
    assert result.exit_code in (0, 1, 2), where
    assert "Traceback" not in result.output, where
    if result.exit_code:
        assert "Error: " in result.output, (where, result.output)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, CASES_IN_MAKE_TEST, CHUNK))
def test_random_input_never_ends_in_a_traceback(good, tmp_path, monkeypatch, first):
    for seed in range(first, first + CHUNK):
        run(seed, good, tmp_path / str(seed), monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(CASES_IN_MAKE_TEST, CASES, CHUNK))
def test_more_random_input_never_ends_in_a_traceback(good, tmp_path, monkeypatch, first):
    test_random_input_never_ends_in_a_traceback(good, tmp_path, monkeypatch, first)
