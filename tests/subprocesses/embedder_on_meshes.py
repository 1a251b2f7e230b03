"""Checks on eight devices that an embedder gives the same vectors without a mesh and on meshes."""

import jax
import numpy as np

from conftest import ROOT, TASKS, random_array
from jina_jax import Embedder, ModelConfig
from jina_jax.config import PUBLISHED_INSTRUCTIONS
from jina_jax.embed.batch_runner import Tuning
from jina_jax.embed.mixed_rows import MixedRows
from jina_jax.model.parameters import abstract_variables, from_arrays
from jina_jax.parallel.mesh import make_mesh
from jina_jax.serve.batcher import Batcher
from jina_jax.serve.metrics import Metrics
from jina_jax.serve.options import ServeOptions
from jina_jax.serve.tasks import resolve_task
from jina_jax.serve.texts import Limits, tokenize_texts
from jina_jax.serve.work import Work
from jina_jax.text.tokenizer import load_tokenizer, private_backend

prompts = tuple((task, PUBLISHED_INSTRUCTIONS[task]) for task in TASKS)
config = ModelConfig(vocab_size=16_000, hidden_size=64, num_layers=2, num_heads=4, mlp_size=128, tasks=TASKS, prompts=prompts)
rng = np.random.default_rng(0)
arrays = {path: random_array(path, variable.shape, rng) for path, variable in abstract_variables(config).items()}
encoder, tokenizer = from_arrays(config, arrays, dtype=np.float32), load_tokenizer(ROOT / "data" / "tokenizer", config)
texts = [" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], n)) for n in rng.integers(1, 80, 60)]
tasks = [None if i % 4 == 3 else TASKS[i % 4] for i in range(len(texts))]
calls = (
    (texts, {"task": tasks}),  # folded and mixed adapters
    (texts, {"task": "classification", "batch_size": 2}),
    (texts[:1], {}),  # fewer rows than devices
    ([], {}),
)

assert len(jax.devices()) == 8
characters = np.array([len(text) + len(dict(prompts).get(task, "")) for text, task in zip(texts, tasks, strict=True)])
# Two of the four tasks are worth folding.
tuning = Tuning(worth_folding=int(np.median([characters[i::4].sum() for i in range(4)])))
plain = Embedder(encoder, config, tokenizer, tuning=tuning)
wanted = [plain.encode(some, normalize_embeddings=False, **options) for some, options in calls]
documents = [[text[:9], text[9:] + " end"] for text in texts]
wanted_chunks = np.concatenate(plain.encode_chunks(documents, tasks, max_length=32))
wanted_states = plain.encode(texts[:9], output_value="token_embeddings")
for data, fsdp in ((8, 1), (2, 4), (1, 8), (1, 1)):
    spread = Embedder(encoder, config, tokenizer, mesh=make_mesh(data, fsdp), tuning=tuning)
    for (some, options), want in zip(calls, wanted, strict=True):
        got = spread.encode(some, normalize_embeddings=False, **options)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max(initial=1))
    chunks = np.concatenate(spread.encode_chunks(documents, tasks, max_length=32))
    np.testing.assert_allclose(chunks, wanted_chunks, rtol=0, atol=1e-5)
    states = spread.encode(texts[:9], output_value="token_embeddings")
    for got, want in zip(states, wanted_states, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)

# A server's rows, over all devices, with every task mixed.
spread = Embedder(encoder, config, tokenizer, mesh=make_mesh(8, 1))
rows = MixedRows(spread._batches.base, spread.mesh, [(8, 16), (8, 32), (8, 128), (8, 512)])
rows.compile()
batcher = Batcher(rows, config.pad_id, ServeOptions(names=("m",), max_batch_tokens=512), Metrics())
limits, backend = Limits(512, "none", str, ""), private_backend(tokenizer)
works = [
    Work(tokenize_texts(backend, [text], 0, resolve_task(task, config, "task"), limits))
    for text, task in zip(texts, tasks, strict=True)
]
for work in works:
    batcher.submit(work)
served = np.stack([work.future.result(60)[0] for work in works])
np.testing.assert_allclose(served, wanted[0], rtol=0, atol=1e-5 * np.abs(wanted[0]).max())
assert batcher.close(10.0)
print("equal")
