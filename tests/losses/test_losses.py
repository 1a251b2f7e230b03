"""Losses against plain loops in float64, sentence-transformers and torch; and their memory."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jina_jax import ModelConfig
from jina_jax.losses import cosent, info_nce, masked_lm
from jina_jax.model.encoder import MLMHead

ROOT = Path(__file__).resolve().parents[2]
N, M, D = 11, 3, 16
DIMS, WEIGHTS = (4, 8, 16), (0.5, 1.0, 2.0)
PAPER_DIMS = (32, 64, 128, 256, 512, 768, 1024)


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    q, p = rng.standard_normal((2, N, D)).astype(np.float32) * [[[3.0]], [[0.2]]]
    return {
        "q": q.astype(np.float32),
        "p": (p + 0.1 * q).astype(np.float32),
        "negatives": rng.standard_normal((N, M, D)).astype(np.float32),
        "valid": np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0], bool),
        "group": np.array([0, 1, 1, 2, 0, 3, 3, 0, 7, -1, -1], np.int32),
        "negative_group": rng.choice([0, 1, 3, 7, -1, 99], (N, M)).astype(np.int32),
    }


def gradients(loss, *arrays):
    """Value, and gradient with respect to each array, of a function of jax arrays."""
    return jax.value_and_grad(loss, argnums=tuple(range(len(arrays))))(*map(jnp.asarray, arrays))


def torch_gradients(loss, *arrays):
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    value = loss(*tensors)
    value.backward()
    return value.item(), [tensor.grad.numpy() for tensor in tensors]


def assert_same(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


def plain_info_nce(
    q, p, negatives=None, *, temperature, bidirectional=True, dims, weights, valid=None, group=None, negative_group=None
):
    """Row by row, as the contract words it."""
    n = len(q)
    valid = np.ones(n, bool) if valid is None else valid
    group = np.arange(n) if group is None else group
    numbers = np.full((n, M), -2) if negative_group is None else negative_group
    total = q.sum() * 0
    for dim, weight in zip(dims, weights, strict=True):
        for anchors, others, explicit in [(q, p, negatives)] + [(p, q, None)] * bidirectional:
            for i in np.flatnonzero(valid):
                candidates = [others[i]] + [others[j] for j in np.flatnonzero(valid) if group[j] != group[i]]
                if explicit is not None:
                    rows, columns = np.nonzero(valid[:, None] & (numbers != group[i]))
                    candidates += [explicit[j, k] for j, k in zip(rows, columns, strict=True)]
                prefixes = torch.stack(candidates)[:, :dim]
                cosines = torch.cosine_similarity(anchors[i, None, :dim], prefixes, dim=1)
                total = total - weight * torch.log_softmax(cosines / temperature, 0)[0]
    return total / max(valid.sum(), 1)


ALL = ("negatives", "valid", "group", "negative_group")


@pytest.mark.parametrize(
    ("names", "chunk"),
    [((), None), ((), 4), (("valid",), 4), (("group",), 4), (("negatives",), 4), (ALL[:3], 4), (("negatives", *ALL[2:]), None)]
    + [(ALL, c) for c in (None, 1, 4, N, 100)],
)
def test_info_nce_is_the_plain_loop(batch, names, chunk):
    options = {"temperature": 0.1, "dims": DIMS, "weights": WEIGHTS}
    masks = {name: batch[name] for name in names if name != "negatives"}
    arrays = [batch[name] for name in ("q", "p", "negatives")[: 3 if "negatives" in names else 2]]
    for bidirectional in (True, False):
        got = gradients(partial(info_nce, **options, **masks, bidirectional=bidirectional, chunk=chunk), *arrays)
        want = partial(plain_info_nce, **options, **masks, bidirectional=bidirectional)
        assert_same(got, torch_gradients(want, *(array.astype(np.float64) for array in arrays)))


class Given(torch.nn.Module):
    """A model of sentence-transformers that returns the embeddings it is given."""

    def forward(self, features, **_):
        return {"sentence_embedding": features["embedding"]}

    def get_embedding_dimension(self) -> int:
        return D


def of_sentence_transformers(name: str, arrays, labels=None, **options):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = Given()
    loss = losses.MatryoshkaLoss(model, getattr(losses, name)(model, **options), DIMS, WEIGHTS)
    return torch_gradients(lambda *columns: loss([{"embedding": column} for column in columns], labels), *arrays)


@pytest.mark.parametrize("negatives", [0, M])
def test_info_nce_is_that_of_sentence_transformers(batch, negatives):
    columns = [batch["q"], batch["p"], *np.moveaxis(batch["negatives"], 1, 0)[:negatives]]
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}

    def ours(bidirectional, *columns):
        explicit = jnp.stack(columns[2:], axis=1) if negatives else None
        options = {"temperature": 0.05, "dims": DIMS, "weights": WEIGHTS, "bidirectional": bidirectional}
        return info_nce(*columns[:2], explicit, **options)

    def half(*columns):
        return ours(True, *columns) / 2

    name = "MultipleNegativesRankingLoss"
    assert_same(gradients(half, *columns), of_sentence_transformers(name, columns, **both))
    assert_same(gradients(partial(ours, False), *columns), of_sentence_transformers(name, columns))


def test_cosent_is_that_of_sentence_transformers(batch):
    score = np.array([0, 1, 2, 2, 5, 1, 0, 0.5, 5, 4, -1], np.float32)
    arrays = [batch["q"], batch["p"]]
    want = of_sentence_transformers("CoSENTLoss", arrays, torch.tensor(score))
    options = {"temperature": 0.05, "dims": DIMS, "weights": WEIGHTS}
    assert_same(gradients(lambda a, b: cosent(a, b, score, **options), *arrays), want)


def test_cosent_of_valid_rows_alone(batch):
    valid, options = batch["valid"], {"temperature": 0.1, "dims": (4, 16)}
    score = np.array([0, 1, np.nan, 2, 5, 1, 9, 0.5, 5, 4, -1], np.float32)
    got = cosent(batch["q"], batch["p"], score, valid=valid, **options)
    np.testing.assert_allclose(got, cosent(batch["q"][valid], batch["p"][valid], score[valid], **options), rtol=1e-6)


def test_cosent_without_an_order_is_zero(batch):
    loss = partial(cosent, score=np.ones(N, np.float32), temperature=0.05)
    value, grads = gradients(lambda a, b: loss(a, b), batch["q"], batch["p"])
    assert value == 0 and not any(np.any(grad) for grad in grads)


def plain_cross_entropy(states, embedding, parameters, labels, counted):
    """Twin of the head; float64, mean over `counted` positions."""
    kernel, bias, scale, shift, output = parameters
    hidden = torch.nn.functional.gelu(states @ kernel + bias)
    hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], scale, shift, 1e-5)
    logits = (hidden @ embedding.T + output).reshape(-1, len(embedding))[counted]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels.reshape(-1)[counted]).long())


@pytest.fixture
def masked():
    """States, labels, table and a head in which every parameter is random."""
    rng = np.random.default_rng(1)
    config = ModelConfig(vocab_size=40, hidden_size=D, num_heads=2)
    head = MLMHead(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    for variable in (head.dense.kernel, head.dense.bias, head.norm.scale, head.norm.bias, head.bias):
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), jnp.float32))
    states, embedding = rng.standard_normal((3, 7, D)), rng.standard_normal((40, D))
    labels = np.where(rng.random((3, 7)) < 0.4, rng.integers(0, 40, (3, 7)), -1).astype(np.int32)
    return states.astype(np.float32), labels, embedding.astype(np.float32), head


@pytest.mark.parametrize(("max_masked", "chunk"), [(21, None), (30, 4), (3, None), (3, 2)])
def test_masked_lm_is_the_cross_entropy_of_the_first_labels(masked, max_masked, chunk):
    states, labels, embedding, head = masked
    got = jax.value_and_grad(lambda *x: masked_lm(x[0], labels, *x[1:], max_masked=max_masked, chunk=chunk), (0, 1, 2))(
        states, jnp.asarray(embedding), head
    )
    counted = np.flatnonzero(labels.reshape(-1) >= 0)[:max_masked]
    parameters = [head.dense.kernel, head.dense.bias, head.norm.scale, head.norm.bias, head.bias]
    arrays = [np.asarray(x, np.float64) for x in (states, embedding, *(parameter[...] for parameter in parameters))]

    def plain(states, embedding, *parameters):
        return plain_cross_entropy(states, embedding, parameters, labels, counted)

    of_head = got[1][2]
    grads = [of_head.dense.kernel, of_head.dense.bias, of_head.norm.scale, of_head.norm.bias, of_head.bias]
    assert len(counted) >= min(max_masked, 5)
    assert_same((got[0], [*got[1][:2], *(grad[...] for grad in grads)]), torch_gradients(plain, *arrays))


@pytest.mark.parametrize("chunk", [None, 4])
def test_masked_lm_in_bfloat16_with_logits_in_the_hundreds_keeps_its_gradients(masked, chunk):
    """Against float32 with the same rounded inputs.

    The loss is multiplied by a weight, like one term of a sum.
    """
    states, labels, embedding, head = masked
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (states, 50 * embedding)]

    def gradients(dtype):
        head.dense.dtype = jnp.dtype(dtype)
        return jax.value_and_grad(lambda x, table: 3 * masked_lm(x, labels, table, head, max_masked=30, chunk=chunk), (0, 1))(
            *(x.astype(dtype) for x in rounded)
        )

    got, want = gradients(jnp.bfloat16), gradients(jnp.float32)
    assert want[0] > 100 and [x.dtype for x in got[1]] == [jnp.bfloat16] * 2
    np.testing.assert_allclose(got[0], want[0], rtol=0.01)
    for have, exact in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(np.float32(have), exact, rtol=0, atol=0.03 * float(jnp.abs(exact).max()))


def test_masked_lm_without_labels_is_zero(masked):
    states, labels, embedding, head = masked
    loss = partial(masked_lm, labels=np.full_like(labels, -1), max_masked=5)
    value, grads = jax.value_and_grad(lambda x: loss(x[0], embedding=x[1], head=x[2]))((states, embedding, head))
    assert value == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("chunk", [None, 4])
def test_what_is_not_valid_has_no_effect(batch, chunk):
    """NaN included; and with no valid row at all, value and gradients are zero."""
    arrays = [np.where(batch["valid"].reshape(-1, *[1] * (x.ndim - 1)), x, np.nan) for x in list(batch.values())[:3]]
    some = partial(info_nce, temperature=0.1, chunk=chunk, valid=batch["valid"])
    kept = [x[batch["valid"]] for x in arrays]
    got, want = gradients(some, *arrays), gradients(partial(info_nce, temperature=0.1), *kept)
    assert_same((got[0], [grad[batch["valid"]] for grad in got[1]]), want)
    assert not any(np.any(grad[~batch["valid"]]) for grad in got[1])

    none = np.zeros(N, bool)
    zero = gradients(partial(info_nce, temperature=0.1, chunk=chunk, valid=none), *arrays)
    assert zero[0] == 0 and not any(np.any(grad) for grad in zero[1])
    ordered = partial(cosent, score=np.arange(N, dtype=np.float32), temperature=0.1, valid=none)
    zero = gradients(lambda a, b: ordered(a, b), *arrays[:2])
    assert zero[0] == 0 and not any(np.any(grad) for grad in zero[1])


def test_a_single_pair_has_no_negatives(batch):
    value, grads = gradients(partial(info_nce, temperature=0.05), batch["q"][:1], batch["p"][:1])
    assert value == 0 and not any(np.any(grad) for grad in grads)


def test_equal_texts_cannot_be_told_apart():
    same = np.ones((8, 4), np.float32)
    np.testing.assert_allclose(info_nce(same, same, temperature=0.05), 2 * np.log(8), rtol=1e-6)
    assert info_nce(same, same, temperature=0.05, group=np.zeros(8, np.int32)) == 0


@pytest.mark.parametrize("chunk", [None, 4])
def test_an_anchor_without_negatives_of_another_group_loses_nothing(batch, chunk):
    """Its group is that of all rows and of all explicit negatives; one of another group counts."""
    arrays = [batch[name] for name in ("q", "p", "negatives")]
    groups = {"group": np.full(N, 5, np.int32), "negative_group": np.full((N, M), 5, np.int32)}
    loss = partial(info_nce, temperature=0.05, dims=DIMS, chunk=chunk)
    value, grads = gradients(partial(loss, **groups), *arrays)
    assert value == 0 and not any(np.any(grad) for grad in grads)
    groups["negative_group"][3, 1] = 6
    value, grads = gradients(partial(loss, **groups), *arrays)
    own = np.zeros((N, M), bool)
    own[3, 1] = True
    assert value > 0 and np.any(grads[2][own]) and not np.any(grads[2][~own])


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 0.05, 1e6])
def test_extremes_stay_finite(batch, temperature):
    """Zero vectors, tiny and huge ones, opposite ones, at any temperature."""
    q, p = batch["q"].copy(), batch["p"].copy()
    q[0], q[1], p[1], p[2], q[3], p[4] = 0, 0, 0, 1e-13, 1e15, -q[4]
    score = np.arange(N, dtype=np.float32)
    for loss in (info_nce, lambda a, b, **options: cosent(a, b, score, **options)):
        value, grads = gradients(partial(loss, temperature=temperature, dims=(2, 16)), q, p)
        assert np.isfinite(value) and value >= 0
        if temperature > 1e-20:  # below, gradients themselves are beyond float32
            assert all(np.isfinite(grad).all() for grad in grads)
            assert not np.any(grads[0][:2]) and not np.any(grads[1][1])


def test_small_losses_keep_their_digits():
    got = float(info_nce(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), temperature=1 / 30))
    np.testing.assert_allclose(got, 2 * np.log1p(np.exp(-30)), rtol=1e-5)


def test_half_precision_is_computed_in_float32(batch):
    halves = [jnp.asarray(batch[name], jnp.bfloat16) for name in ("q", "p")]
    got, want = (
        gradients(partial(info_nce, temperature=0.05, dims=DIMS), *x) for x in (halves, [h.astype("f4") for h in halves])
    )
    assert got[0] == want[0] and got[0].dtype == jnp.float32
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(mine, theirs.astype(jnp.bfloat16))


@given(st.permutations(range(N)), st.sampled_from([None, 4]))
def test_the_order_of_rows_does_not_matter(order, chunk):
    rng, order = np.random.default_rng(2), np.array(order)
    q, p = rng.standard_normal((2, N, D)).astype(np.float32)
    masks = {"valid": rng.random(N) < 0.7, "group": rng.integers(0, 6, N).astype(np.int32)}
    loss = partial(info_nce, temperature=0.1, dims=(8, 16), chunk=chunk)
    value, grads = gradients(partial(loss, **masks), q, p)
    moved = gradients(partial(loss, **{name: mask[order] for name, mask in masks.items()}), q[order], p[order])
    assert_same(moved, (value, [grad[order] for grad in grads]))


def test_scores_count_by_order_and_embeddings_by_direction(batch):
    score = np.arange(N, dtype=np.float32)
    first = cosent(batch["q"], batch["p"], score, temperature=0.1)
    second = cosent(7 * batch["p"], batch["q"] / 9, np.exp(score), temperature=0.1)
    np.testing.assert_allclose(second, first, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dims": ()}, "dims"),
        ({"dims": (0, 4)}, "dims"),
        ({"dims": (4, D + 1)}, "dims"),
        ({"dims": (4, 8), "weights": (1.0,)}, "weights"),
        ({"weights": (1.0, 1.0)}, "weights"),
        ({"chunk": 0}, "chunk"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"p": np.ones((N + 1, D))}, "p is"),
        ({"negatives": np.ones((N, D))}, "negatives"),
        ({"negatives": np.ones((N, 0, D))}, "negatives"),
        ({"negatives": np.ones((N, 2, D + 1))}, "negatives"),
        ({"valid": np.ones(N - 1, bool)}, "valid"),
        ({"group": np.ones((N, 1), np.int32)}, "group"),
        ({"negative_group": np.ones((N, 2), np.int32)}, "give both of them"),
        ({"negative_group": np.ones((N, 2), np.int32), "negatives": np.ones((N, 2, D))}, "give both of them"),
        (
            {"negative_group": np.ones((N, 1), np.int32), "negatives": np.ones((N, 2, D)), "group": np.ones(N, np.int32)},
            r"negative_group is \(11, 1\), should be \(11, 2\)",
        ),
        ({"q": np.ones((0, D)), "p": np.ones((0, D))}, "embeddings"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(unchecked, options, name):
    pair = {"q": np.ones((N, D)), "p": np.ones((N, D))}
    with pytest.raises(ValueError, match=name):
        info_nce(**{"temperature": 0.1} | pair | options)
    if set(options) <= {"dims", "weights", "temperature", "valid"}:
        with pytest.raises(ValueError, match=name):
            cosent(pair["q"], pair["p"], np.ones(N), **{"temperature": 0.1} | options)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"max_masked": 0}, "max_masked"), ({"chunk": -1}, "chunk"), ({"labels": np.ones((7, 3), int)}, "labels")]
    + [({"embedding": np.ones((40, D + 1))}, "embedding")],
    ids=str,
)
def test_bad_arguments_of_masked_lm_are_named(unchecked, masked, options, name):
    given = dict(zip(("states", "labels", "embedding", "head"), masked, strict=True)) | {"max_masked": 5}
    with pytest.raises(ValueError, match=name):
        masked_lm(**given | options)


def test_scores_are_one_for_each_row(unchecked, batch):
    with pytest.raises(ValueError, match="score"):
        cosent(batch["q"], batch["p"], np.ones(N + 1), temperature=0.1)


@pytest.mark.usefixtures("optimized")
def test_memory_grows_linearly_with_the_rows():
    """Compiled, not run: the paper's batch of 16,384 pairs with all its dimensions."""

    def compiled(n: int):
        loss = partial(info_nce, temperature=0.05, dims=PAPER_DIMS, chunk=1024)
        embeddings = jax.ShapeDtypeStruct((n, 1024), jnp.float32)
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(embeddings, embeddings).compile()

    half, whole = compiled(8192), compiled(16_384)
    temporary = whole.memory_analysis().temp_size_in_bytes
    assert temporary < 2.2 * half.memory_analysis().temp_size_in_bytes
    assert temporary < 2 * len(PAPER_DIMS) * 16_384**2 * 4 / 8  # of the logits of all prefixes and both directions
    assert "[16384,16384]" not in whole.as_text()
