"""Every client that we know of, unmodified, against `jina-jax serve` with real weights.

    make test-clients

A client is a process of its own, with packages of its own; it embeds two texts and must get the
vectors of `Embedder`, and on the two sides of a retrieval different ones.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jina_jax import Embedder
from jina_jax.checkpoints.demo_model import write_demo_model

HERE = Path(__file__).parent
KEY = "secret-key"
COSINE = 0.99999


def main() -> int:
    """Run all clients, and return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment with requirements.txt")
    parser.add_argument("--node-modules", type=Path, required=True, help="folder with what package.json asks for")
    parser.add_argument("--model", type=Path, help="as `jina-jax demo-model` writes; default: it is written")
    parser.add_argument("names", nargs="*", help="clients; default: all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or Path(scratch) / "model"
        if arguments.model is None:
            write_demo_model(model)
        keys = Path(scratch) / "keys"
        keys.write_text(KEY)
        commands = _commands(arguments.python, arguments.node_modules, Path(scratch))
        chosen = {name: command for name, command in commands.items() if not arguments.names or name in arguments.names}
        with _serving(model, keys) as url:
            return sum(not _passes(name, [*command, url, KEY], _expected(model)) for name, command in chosen.items())


def _commands(python: str, node_modules: Path, scratch: Path) -> dict[str, list[str]]:
    listed = re.findall(r"^    (\w+),$", (HERE / "python_clients.py").read_text(), re.MULTILINE)
    commands = {name: [python, str(HERE / "python_clients.py"), name] for name in listed}
    if shutil.which("node") is None or not node_modules.exists():
        print("node not found: npm clients skipped")
        return commands
    script = node_modules.parent / "node_clients.mjs"
    shutil.copy(HERE / "node_clients.mjs", script)
    names = json.loads(subprocess.run(["node", script], capture_output=True, text=True, check=True).stdout)
    return commands | {f"npm {name}": ["node", str(script), name] for name in names}


class _serving:
    """The server as a process, until the block ends."""

    def __init__(self, model: Path, keys: Path):
        command = [sys.executable, "-m", "jina_jax.cli", "serve", "--model", str(model), "--port", "0"]
        self._process = subprocess.Popen([*command, "--api-key-file", str(keys)], stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> str:
        url = ""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"running on (\S+)", line):
                url = found[1]
            if "ready after" in line:
                return url
        raise RuntimeError(f"the server ended with {self._process.wait()}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        assert self._process.wait(30) == 0


def _expected(model: Path) -> dict[str, np.ndarray]:
    if not _cache:
        embedder = Embedder.load(model)
        source = (HERE / "python_clients.py").read_text()
        texts = json.loads(re.search(r"^TEXTS = (\[.*\])$", source, re.MULTILINE)[1])  # type: ignore[index]
        sides = {"plain": embedder.encode, "query": embedder.encode_query, "passage": embedder.encode_document}
        _cache.update({side: np.asarray(encode(texts)) for side, encode in sides.items()})
    return _cache


_cache: dict[str, np.ndarray] = {}


def _passes(name: str, command: list[str], expected: dict[str, np.ndarray]) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        for side, vectors in found.items():
            given = np.array(vectors, np.float64)
            cosines = (given * expected[side]).sum(-1) / np.linalg.norm(given, axis=-1)
            assert given.shape == expected[side].shape and cosines.min() >= COSINE, f"{side}: cosines {cosines}"
        if {"query", "passage"} <= found.keys():
            assert not np.allclose(found["query"], found["passage"], atol=1e-3), "query and passage are alike"
    except (AssertionError, ValueError, IndexError, KeyError) as error:
        print(f"FAILED {name}: {error!r}\n{done.stderr[-2000:]}")
        return False
    print(f"passed {name}: {', '.join(found)}")
    return True


if __name__ == "__main__":
    sys.exit(min(main(), 1))
