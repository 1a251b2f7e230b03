"""JAX settings and fixtures of all tests.

The fixtures are the bundled tokenizer and corpus, and small models with every parameter random.
"""

import gc
import importlib.util
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# These programs compile for longer than they run, six times as long with JAX's defaults. Processes
# that tests start inherit the settings.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import settings

from jina_jax import Embedder, Encoder, ModelConfig
from jina_jax.checkpoints.demo_model import PACKAGE, write_demo_model
from jina_jax.config import PUBLISHED_INSTRUCTIONS
from jina_jax.model.parameters import abstract_variables, from_arrays
from jina_jax.text.tokenizer import Tokenizer, load_tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("jina-jax", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("jina-jax")

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("retrieval.query", "retrieval.passage", "classification")
SIZES = {"vocab_size": 300, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "mlp_size": 128}


MAPPINGS = 8_000
"""Memory mappings of a process from which on its compiled programs are dropped: each has a few, a
process may have 65,530, and thousands of programs take gigabytes."""


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def unchecked():
    """Disables the type checks of the tests, so that the code runs as a user calls it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def optimized(monkeypatch):
    """Compiles programs as a user's are compiled.

    For tests that read a compiled program, or that run for longer than they compile.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., Encoder]:
    """Maker of small models in which every parameter is random: zeros and ones hide mistakes.

    Its `fields` are those of ModelConfig.
    """

    def make(seed: int = 0, **fields) -> Encoder:
        config, rng = ModelConfig(**(SIZES | fields)), np.random.default_rng(seed)
        arrays = {path: random_array(path, variable.shape, rng) for path, variable in abstract_variables(config).items()}
        return from_arrays(config, arrays, dtype=jnp.float32)

    return make


def random_array(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    """Random values of the parameter at a path.

    Activations stay near 1, and an adapter's update near a fifth of its weight.
    """
    leaf, noise = path.rpartition(".")[2], rng.standard_normal(shape)
    inputs = shape[1] if path.startswith("layers.") else shape[0]
    match leaf:
        case "kernel":
            values = noise / inputs**0.5
        case "table":
            values = 0.5 * noise
        case "a":
            values = 0.5 * noise if "token" in path else noise / inputs**0.5
        case "b":
            values = 0.2 * noise
        case "scale" if "norm" in path:
            values = 1 + 0.2 * noise
        case "scale":
            values = rng.uniform(0.3, 0.7, shape)  # differs for each task, and for q, k and v
        case _:
            values = 0.2 * noise
    return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope="session")
def encoder(make_encoder) -> Encoder:
    """A model with three tasks, rotary positions, a pooler and the bundled vocabulary."""
    prompts = tuple((task, PUBLISHED_INSTRUCTIONS[task]) for task in TASKS) + (("note", "Note: "),)
    return make_encoder(vocab_size=16_000, tasks=TASKS, prompts=prompts, matryoshka_dims=(8, 16, 32, 64), pooler=True)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ROOT / "data" / "tokenizer", ModelConfig(vocab_size=16_000))


@pytest.fixture(scope="session")
def embedder(encoder, tokenizer) -> Embedder:
    return Embedder(encoder, encoder.config, tokenizer)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Titles and bodies of the corpus' test split, in all languages, in the order of the file."""
    with lzma.open(ROOT / "data" / "debian_packages.jsonl.xz", "rt", encoding="utf-8") as lines:
        packages = [package for package in map(json.loads, lines) if package["split"] == "test"]
    return [text for package in packages for pair in package["text"].values() for text in (pair["title"], pair["body"])]


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory) -> Path:
    """Directory of multilingual-e5-small in bfloat16, with real weights.

    It is written once for a whole run, by the worker that first asks for it.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed: make .venv/.test, on Linux on x86-64")
    from filelock import FileLock

    of_worker = tmp_path_factory.getbasetemp()
    directory = (of_worker.parent if "PYTEST_XDIST_WORKER" in os.environ else of_worker) / "demo_model"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            write_demo_model(directory, "bfloat16")
    return directory
