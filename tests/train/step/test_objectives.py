"""Objectives on packed batches, whole and in chunks, against a plain form.

The plain form encodes one text to a row, and writes the loss out.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")
from helpers.training import KINDS, WORDS, compiled_once, stages
from jina_jax.model.encoder import Encoder
from jina_jax.model.parameters import from_arrays, variables
from train.config import DatasetConfig, Stage
from train.data.collate import BatchShape, TrainBatch, collate, score_keys, text_encoder
from train.data.examples import Example
from train.data.row_counts import most_rows, texts_per_row
from train.step.objectives import objective, score_ranks

STAGES = stages({kind: DatasetConfig("not read", kind) for kind in KINDS}, encode_chunk_rows=None, remat="except_products")
CASES = [
    ("mlm", "text"),
    ("pairs", "pair"),
    ("retrieval", "triplet"),
    ("text_matching", "scored_pair"),
    ("classification", "labelled_text"),
    ("separation", "labelled_text"),
]
N = 8


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


def examples(name: str, kind: str) -> list[Example]:
    """Of different lengths; the second and the fifth belong together."""
    rng = np.random.default_rng(3)
    count = {"mlm": 1, "retrieval": 4, "classification": 4, "separation": 3}.get(name, 2)

    def example(number: int) -> Example:
        texts = tuple(" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(count))
        suffix = f" {number}" if name == "classification" else ""
        score = 1 + rng.integers(4) * 1e-12  # equal in float32
        return Example(texts, score, "together" if number in (1, 4) else "", suffix, seed=number)

    return [example(number) for number in range(N)]


class Case:
    """A stage's batch in packed rows, and the same texts one by one."""

    def __init__(self, name: str, kind: str, make_encoder, tokenizer, **fields):
        prefixes = {} if name == "mlm" else {"dims": (8, 32), "dim_weights": (2.0, 0.5)}
        self.stage, self.kind = replace(STAGES[name], **prefixes), kind
        prompts = (("retrieval.query", "alpha: "), ("retrieval.passage", "the beta: "))
        encoder = make_encoder(
            vocab_size=16_000,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            mlp_size=48,
            tasks=self.stage.adapters,
            mlm_head=name == "mlm",
            prompts=prompts,
            **fields,
        )
        self.config = encoder.config
        self.arrays = {path: variable.get_value() for path, variable in variables(encoder).items()}
        self.examples = examples(name, kind)
        self.encode = text_encoder(self.stage, dict(prompts), tokenizer)
        self.texts = self.encode(self.examples)

    def batch(self, stage: Stage) -> TrainBatch:
        shape = BatchShape(stage.row_length, texts_per_row(stage), (most_rows(N, len(self.texts.ids) // N, stage),))
        return collate(self.examples, self.encode, shape, 1, self.config.pad_id)

    def value_and_gradients(self, stage: Stage, batch: TrainBatch | None = None):
        batch, loss = batch or self.batch(stage), objective(stage, self.kind)
        trained, frozen = self.split()
        return jax.jit(jax.value_and_grad(lambda arrays, batch: loss(self.encoder(frozen | arrays), batch)))(trained, batch)

    def split(self) -> tuple[dict, dict]:
        """The arrays that the stage trains, and the others."""
        trained = {path for path in self.arrays if not self.stage.adapters or path.endswith((".a", ".b"))}
        return ({path: x for path, x in self.arrays.items() if (path in trained) == wanted} for wanted in (True, False))

    def encoder(self, arrays) -> Encoder:
        return from_arrays(self.config, arrays, dtype=jnp.float32)

    def plain(self):
        """From texts that have a row each."""
        longest = max(map(len, self.texts.ids))
        tokens = np.full((len(self.texts.ids), longest), self.config.pad_id, np.int32)
        labels = np.full(tokens.shape, -1, np.int32)
        for row, ids in enumerate(self.texts.ids):
            tokens[row, : len(ids)] = ids
            if self.texts.labels is not None:
                labels[row, : len(ids)] = self.texts.labels[row]
        real = np.array([[slot < len(ids) for slot in range(longest)] for ids in self.texts.ids])
        positions = np.broadcast_to(np.arange(longest, dtype=np.int32), tokens.shape)
        tasks = jnp.array(self.texts.parts, jnp.int32)[:, None] if self.stage.adapters else None
        trained, frozen = self.split()

        def loss(arrays):
            encoder = self.encoder(frozen | arrays)
            states = encoder(jnp.array(tokens), jnp.array(real, jnp.int32), jnp.array(positions), tasks)
            if self.stage.objective == "mlm":
                return plain_mlm(encoder.mlm_head(states, encoder.tokens.table[...]), labels)
            pooled = jnp.where(real[..., None], states, 0).sum(1) / real.sum(1, keepdims=True)
            embeddings = pooled.reshape(N, -1, pooled.shape[-1])
            dims = self.stage.dims or (self.config.hidden_size,)
            weights = self.stage.dim_weights or (1,) * len(dims)
            return sum(weight * self.plain_loss(embeddings[..., :dim]) for dim, weight in zip(dims, weights, strict=True))

        return jax.jit(jax.value_and_grad(loss))(trained)

    def plain_loss(self, embeddings):
        unit = embeddings / jnp.sqrt(jnp.square(embeddings).sum(-1, keepdims=True))
        if self.kind == "scored_pair":
            return plain_cosent((unit[:, 0] * unit[:, 1]).sum(-1), [e.score for e in self.examples], self.stage.temperature)
        if self.stage.objective == "separation":
            cosines = jnp.concatenate([(unit[:, 0] * unit[:, side]).sum(-1) for side in (1, 2)])
            return plain_cosent(cosines, [1] * N + [0] * N, self.stage.temperature)
        return plain_contrast(unit, [e.group or number for number, e in enumerate(self.examples)], self.stage.temperature)


@pytest.mark.parametrize("shards", [1, 4])
def test_ranks_are_those_of_float64_over_all_devices(shards):
    values = [0.1, 0.1 + 1e-15, -0.0, 0.0, 5e-324, -5e-324, 2.0**24, 2.0**24 + 1, -1e300]
    scores = np.random.default_rng(0).choice(values, 32)
    keys = jnp.asarray(score_keys(scores.tolist())).reshape(shards, -1, 2)
    ranks = jax.vmap(lambda keys: score_ranks(keys, "shards"), axis_name="shards")(keys).reshape(-1)
    np.testing.assert_array_equal(ranks, (scores[None] < scores[:, None]).sum(1))


def plain_mlm(logits, labels):
    rows, slots = np.nonzero(labels >= 0)
    return -jax.nn.log_softmax(logits[rows, slots])[np.arange(len(rows)), labels[rows, slots]].mean()


def plain_cosent(cosines, scores, temperature):
    lower, higher = np.nonzero(np.less.outer(scores, scores))
    return jnp.log(1 + jnp.exp((cosines[lower] - cosines[higher]) / temperature).sum())


def plain_contrast(unit, groups, temperature):
    """InfoNCE of [n, s, d] in both directions.

    All texts behind the second are candidates of every first.
    """
    explicit = unit[:, 2:].reshape(-1, unit.shape[-1])
    rivals = np.array([[i == j or groups[i] != groups[j] for j in range(N)] for i in range(N)])
    total = 0.0
    for anchors, others, further in ((unit[:, 0], unit[:, 1], explicit), (unit[:, 1], unit[:, 0], explicit[:0])):
        logits = jnp.concatenate([jnp.where(rivals, anchors @ others.T, -jnp.inf), anchors @ further.T], 1) / temperature
        total -= jnp.diagonal(jax.nn.log_softmax(logits)).mean()
    return total


def assert_same(got, want, tolerance=1e-5) -> None:
    """Relative to the largest number of each array, or to 1."""
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    for path, expected in want[1].items():
        scale = max(1.0, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(got[1][path], expected, rtol=0, atol=tolerance * scale, err_msg=path)


@pytest.mark.parametrize("name, kind", CASES)
def test_an_objective_is_its_plain_form_packed_cached_and_recomputed(name, kind, make_encoder, tokenizer):
    case = Case(name, kind, make_encoder, tokenizer)
    uncached = case.value_and_gradients(case.stage)
    assert_same(uncached, case.plain())
    chunk = 5 if name == "mlm" else 2
    cached = replace(case.stage, encode_chunk_rows=1 if name == "mlm" else 2, logit_chunk=chunk, remat="full")
    assert case.batch(cached).parts[-1].tokens.shape[0] > 2 or name == "mlm"
    assert_same(case.value_and_gradients(cached), uncached)


@pytest.mark.parametrize("name, kind, offset", [("mlm", "text", None), ("pairs", "pair", 0)])
def test_absolute_positions_have_the_gradients_of_the_plain_form(name, kind, offset, make_encoder, tokenizer):
    absolute = {"position_type": "absolute", "position_offset": offset, "max_position_embeddings": 32}
    case = Case(name, kind, make_encoder, tokenizer, **absolute)
    chunked = replace(case.stage, encode_chunk_rows=1, remat="full")
    got = case.value_and_gradients(chunked)
    assert_same(got, case.plain())
    moved = np.flatnonzero(np.abs(got[1]["positions.table"]).max(1))
    longest = max(map(len, case.texts.ids))
    first = 0 if offset == 0 else 2
    assert moved.tolist() == list(range(first, first + longest)) and case.batch(chunked).parts[0].tokens.shape[0] > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"encode_chunk_rows": 1},
        {"logit_chunk": 3},
        {"remat": "none"},
        {"remat": "full"},
        {"remat": "except_attention"},
        {"encode_chunk_rows": 3, "remat": "except_attention"},
    ],
)
def test_each_way_to_save_memory_leaves_the_gradients_alone(fields, make_encoder, tokenizer):
    case = Case("pairs", "pair", make_encoder, tokenizer)
    assert_same(case.value_and_gradients(replace(case.stage, **fields)), case.value_and_gradients(case.stage))


@pytest.mark.parametrize("name, kind", CASES)
def test_chunks_of_another_size_than_the_rows_divide_into_are_filled_up(name, kind, make_encoder, tokenizer):
    case = Case(name, kind, make_encoder, tokenizer)
    whole = replace(case.stage, row_length=24)
    batch = case.batch(whole)
    rows = batch.parts[-1].tokens.shape[0]
    chunk = next(n for n in range(2, rows) if rows % n)
    chunked = replace(whole, encode_chunk_rows=chunk)
    assert_same(case.value_and_gradients(chunked, batch), case.value_and_gradients(whole, batch))


def test_mlm_in_chunks_has_the_same_gradients_and_nothing_is_multiplied_twice(make_encoder, tokenizer):
    case = Case("mlm", "text", make_encoder, tokenizer)
    chunked = replace(case.stage, encode_chunk_rows=1, row_length=24)
    whole, batch = replace(chunked, encode_chunk_rows=None), case.batch(chunked)
    (part,) = batch.parts
    rows = part.tokens.shape[0]
    assert rows >= 3 and (part.labels >= 0).any(1).sum() >= 2

    def value_and_gradients(stage):
        loss = objective(stage, "text")
        return jax.jit(jax.value_and_grad(lambda arrays, batch: 3 * loss(case.encoder(arrays), batch)))

    assert_same(value_and_gradients(chunked)(case.arrays, batch), value_and_gradients(whole)(case.arrays, batch))
    of_chunks, of_whole = (products(value_and_gradients(stage), case.arrays, batch) for stage in (chunked, whole))
    assert of_whole > 0 and of_chunks == rows * of_whole


def products(function, *arguments) -> int:
    """Matmuls of a program, those in a loop once for each iteration."""

    def count(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            inner = sum(map(count, jaxprs_in_params(equation.params)))
            total += inner * equation.params.get("length", 1) + (equation.primitive.name == "dot_general")
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_gradients_reach_the_adapters_of_both_sides(make_encoder, tokenizer):
    case = Case("retrieval", "triplet", make_encoder, tokenizer)
    gradient = case.value_and_gradients(case.stage)[1]["layers.qkv.b"]  # [l, k, r, 3, o]
    assert jnp.abs(gradient).max((0, 2, 3, 4)).min() > 0
