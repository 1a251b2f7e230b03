"""Mining of hard negatives: sentence-transformers' windows and margins, no false negatives.

And one line for every mistake.
"""

import json
import sys
import types
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("click")
pytest.importorskip("bm25s")
import torch
from click.testing import CliRunner
from sentence_transformers.util import hard_negatives

from train.data import hard_negatives as negatives
from train.data.corpus import BUNDLED, read_corpus
from train.data.hard_negatives import MiningConfig, bm25_scores, bm25_terms, embedding_scores, mine, select, top
from train.data.records import Pair, Triplet, read_records, write_records
from train.mine import main


class GivenEmbeddings:
    """A model, ours and sentence-transformers' alike, that knows the embedding of every text."""

    device = "cpu"
    similarity = staticmethod(lambda a, b: torch.as_tensor(a) @ torch.as_tensor(b).T)
    similarity_pairwise = staticmethod(lambda a, b: (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1))

    def __init__(self, texts, seed):
        vectors = np.random.default_rng(seed).standard_normal((len(texts), 4)).astype(np.float32)
        self.vectors = dict(zip(texts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))

    def encode_query(self, texts, **options):
        return np.stack([self.vectors[text] for text in texts])

    encode_document = encode_query


class Table:
    """As much of datasets.Dataset as sentence-transformers' mining needs."""

    column_names = ("anchor", "positive")

    def __init__(self, columns):
        self.columns = columns

    from_dict = classmethod(lambda table, columns: table(columns))

    def __len__(self):
        return len(self.columns["anchor"])

    def __getitem__(self, name):
        return self.columns[name]

    def to_pandas(self):
        return self

    def groupby(self, name):
        return self

    def count(self):
        return self

    def to_dict(self):
        anchors = self.columns["anchor"]
        return {"positive": {anchor: anchors.count(anchor) for anchor in anchors}}


@pytest.fixture(scope="module")
def mined_by_sentence_transformers():
    """Triplets of sentence-transformers as tuples of texts."""

    def mined(pairs, model, **options):
        table = Table({"anchor": [pair.anchor for pair in pairs], "positive": [pair.positive for pair in pairs]})
        found = hard_negatives.mine_hard_negatives(table, model, output_format="n-tuple", verbose=False, **options)
        return set(zip(*found.columns.values(), strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", types.SimpleNamespace(Dataset=Table))
        patch.setattr(hard_negatives, "is_datasets_available", lambda: True)
        patch.setattr(hard_negatives, "trange", lambda *bounds, desc: range(*bounds))
        yield mined


links = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)), min_size=1, max_size=30, unique=True)
windows = st.tuples(st.integers(0, 6), st.integers(1, 8), st.integers(0, 12))
limits = st.none() | st.floats(-0.5, 0.9)
margins = st.none() | st.floats(0, 0.6)


def pairs_of(links) -> list[Pair]:
    """Groups that hold nothing but an anchor's positives change nothing."""
    return [Pair(anchor=f"a{anchor}", positive=f"p{positive}", group=f"g{anchor}") for anchor, positive in links]


def as_tuples(triplets) -> set[tuple[str, ...]]:
    return {(triplet.anchor, triplet.positive, *triplet.negatives) for triplet in triplets}


@settings(max_examples=300)
@given(links, windows, limits, limits, margins, margins, st.integers(0, 99))
def test_the_negatives_are_those_of_sentence_transformers(
    mined_by_sentence_transformers, links, window, max_score, min_score, absolute_margin, relative_margin, seed
):
    range_min, num_negatives, more = window
    options = {
        "num_negatives": num_negatives,
        "range_min": range_min,
        "range_max": range_min + num_negatives + more,
        "max_score": max_score,
        "min_score": min_score,
        "absolute_margin": absolute_margin,
        "relative_margin": relative_margin,
    }
    pairs = pairs_of(links)
    model = GivenEmbeddings(sorted({text for pair in pairs for text in (pair.anchor, pair.positive)}), seed)
    expected = mined_by_sentence_transformers(pairs, model, sampling_strategy="top", **options)
    assert as_tuples(mine(pairs, embedding_scores(model), MiningConfig(**options))) == expected


@given(links, st.integers(0, 99), st.integers(1, 3), st.integers(0, 2))
def test_negatives_are_never_the_anchors_own(links, seed, num_negatives, groups):
    """By brute force, with texts that are both anchor and positive, and groups."""
    pairs = [Pair(anchor=f"t{a}", positive=f"t{p}", group=f"g{p % 4}" if p % 4 < groups else "") for a, p in links]
    model = GivenEmbeddings([f"t{i}" for i in range(21)], seed)
    own = defaultdict(set)
    for pair in pairs:
        own[pair.anchor] |= {pair.anchor, pair.positive}
        own[pair.anchor] |= {other.positive for other in pairs if other.group and other.group == pair.group}
    expected = set()
    for pair in pairs:
        others = {other.positive for other in pairs} - own[pair.anchor]
        ranked = sorted(others, key=lambda text: -(model.vectors[text] @ model.vectors[pair.anchor]))  # noqa: B023
        if len(ranked) >= num_negatives:
            expected.add((pair.anchor, pair.positive, *ranked[:num_negatives]))
    selection = MiningConfig(num_negatives, range_min=0, range_max=50)
    assert as_tuples(mine(pairs, embedding_scores(model), selection)) == expected


def test_a_text_is_excluded_from_all_groups_of_its_anchor():
    pairs = [
        Pair(anchor="a", positive="p1", group="x"),
        Pair(anchor="a", positive="p2", group="y"),
        Pair(anchor="b", positive="p3", group="x"),
        Pair(anchor="c", positive="p4", group="y"),
        Pair(anchor="d", positive="p5"),
    ]
    model = GivenEmbeddings([*"abcd", "p1", "p2", "p3", "p4", "p5"], 0)
    mined = mine(pairs, embedding_scores(model), MiningConfig(1, 0, 5))
    assert {triplet.negatives for triplet in mined if triplet.anchor == "a"} == {("p5",)}


def test_an_anchor_has_the_relations_of_all_languages():
    """What is its positive, or of its group, in another language is no negative in this one."""
    pairs = [
        Pair(anchor="a", positive="p1", language="da", group="x"),
        Pair(anchor="a", positive="p2", language="en", group="y"),
        Pair(anchor="b", positive="p3", language="da", group="y"),
        Pair(anchor="c", positive="p2", language="da"),
        Pair(anchor="d", positive="p4", language="da"),
    ]
    model = GivenEmbeddings([*"abcd", "p1", "p2", "p3", "p4"], 0)
    mined = mine(pairs, embedding_scores(model), MiningConfig(1, 0, 5), same_language=True)
    assert {triplet.negatives for triplet in mined if triplet.anchor == "a"} == {("p4",)}


def test_negatives_keep_the_group_of_their_pair():
    pairs = [Pair(anchor=f"a{i}", positive=f"p{i}", group=f"g{i}" if i % 2 else "") for i in range(8)]
    pairs.insert(0, Pair(anchor="a9", positive="p3"))  # the same text with a group comes later
    model = GivenEmbeddings([f"{mark}{i}" for i in range(10) for mark in "ap"], 0)
    scorer, selection = embedding_scores(model), MiningConfig(3, 0, 20)
    for triplet in (mined := mine(pairs, scorer, selection)):
        numbers = [int(text[1:]) for text in triplet.negatives]
        assert triplet.negative_groups == (
            tuple(f"g{i}" if i % 2 else "" for i in numbers) if any(i % 2 for i in numbers) else ()
        )
    assert len(mined) == 9
    without = mine([pair.model_copy(update={"group": ""}) for pair in pairs], scorer, selection)
    assert all(triplet.negative_groups == () for triplet in without)


def test_triplets_keep_language_group_and_order_and_repeated_pairs_count_once():
    pairs = [Pair(anchor=f"a{i % 6}", positive=f"p{i % 6}", language="da", group=f"g{i % 6}") for i in range(9)]
    model = GivenEmbeddings([text for i in range(6) for text in (f"a{i}", f"p{i}")], 0)
    mined = mine(pairs, embedding_scores(model), MiningConfig(2, 0, 5))
    assert [triplet.anchor for triplet in mined] == [f"a{i}" for i in range(6)]
    assert all(isinstance(triplet, Triplet) and len(triplet.negatives) == 2 for triplet in mined)
    assert all((triplet.language, triplet.group) == ("da", f"g{triplet.anchor[1:]}") for triplet in mined)


def test_same_language():
    pairs = [Pair(anchor=f"a{i}", positive=f"p{i}", language=("da", "en")[i % 2]) for i in range(12)]
    model = GivenEmbeddings([text for i in range(12) for text in (f"a{i}", f"p{i}")], 0)
    anywhere = mine(pairs, embedding_scores(model), MiningConfig(5, 0, 20))
    at_home = mine(pairs, embedding_scores(model), MiningConfig(5, 0, 20), same_language=True)
    own = [all(int(text[1:]) % 2 == int(t.anchor[1:]) % 2 for text in t.negatives) for t in anywhere]
    assert len(anywhere) == 12 and not all(own)
    assert len(at_home) == 12
    assert all(int(text[1:]) % 2 == int(t.anchor[1:]) % 2 for t in at_home for text in t.negatives)


def test_blocks_do_not_change_the_negatives(monkeypatch):
    pairs = pairs_of((i % 23, i) for i in range(40))
    model = GivenEmbeddings(sorted({text for pair in pairs for text in (pair.anchor, pair.positive)}), 0)
    for scorer in (embedding_scores(model), bm25_scores):
        expected = mine(pairs, scorer, MiningConfig(3, 2, 20, sampling="random"), seed=1)
        with monkeypatch.context() as patch:
            patch.setattr(negatives, "SCORES_AT_ONCE", 100)
            assert mine(pairs, scorer, MiningConfig(3, 2, 20, sampling="random"), seed=1) == expected


@given(st.integers(1, 8), st.integers(1, 60), st.integers(1, 70), st.integers(0, 9))
def test_top(rows, candidates, k, seed):
    scores = np.random.default_rng(seed).standard_normal((rows, candidates)).astype(np.float32)
    best, indices = top(scores, k)
    np.testing.assert_array_equal(indices, np.argsort(-scores, axis=1)[:, :k])
    np.testing.assert_array_equal(best, -np.sort(-scores, axis=1)[:, :k])


SCORES = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, -np.inf]], np.float32)
IDS = np.array([[7, 3, 5, 1, 9, 0]])
SECOND = np.array([[False, True, False, False, False, False]])


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (MiningConfig(2, 0, 6), [7, 5]),
        (MiningConfig(2, 1, 6), [5, 1]),
        (MiningConfig(4, 0, 6), [7, 5, 1, 9]),
        (MiningConfig(5, 0, 6), [7, 5, 1, 9, -1]),
        (MiningConfig(2, 3, 6), [9, -1]),
        (MiningConfig(1, 0, 6, max_score=0.7), [5]),
        (MiningConfig(3, 0, 6, min_score=0.65), [7, 5, -1]),
        (MiningConfig(2, 0, 6, absolute_margin=0), [5, 1]),
        (MiningConfig(2, 0, 6, absolute_margin=0.15), [1, 9]),
        (MiningConfig(2, 0, 6, relative_margin=0.2), [1, 9]),
        (MiningConfig(1, 1, 2, absolute_margin=0), [1]),  # ranks are of what is left
    ],
)
def test_select_by_hand(selection, expected):
    found = select(SCORES, IDS, SECOND, np.array([0.8], np.float32), selection, np.random.default_rng(0))
    assert found.tolist() == [expected]


@pytest.mark.parametrize(
    "limit", [{"max_score": 0.5}, {"min_score": 0.25}, {"absolute_margin": 0.25}, {"relative_margin": 1 / 3}]
)
def test_scores_on_the_limit_are_kept(limit):
    scores, positive = np.array([[0.5, 0.25]], np.float32), np.array([0.75], np.float32)
    found = select(
        scores, IDS[:, :2], np.zeros((1, 2), bool), positive, MiningConfig(2, 0, 2, **limit), np.random.default_rng(0)
    )
    assert found.tolist() == [[7, 3]]


def test_a_relative_margin_below_zero_goes_down():
    scores, positive = np.array([[-0.48, -0.6]], np.float32), np.array([-0.5], np.float32)
    selection = MiningConfig(1, 0, 2, relative_margin=0.1)
    assert select(scores, IDS[:, :2], np.zeros((1, 2), bool), positive, selection, np.random.default_rng(0)).tolist() == [[3]]


@pytest.mark.parametrize("margin", [{"absolute_margin": 0.0}, {"relative_margin": 0.0}, {"relative_margin": 0.1}])
def test_nothing_lies_below_a_positive_that_the_search_does_not_find(margin):
    positive = np.array([-np.inf], np.float32)
    found = select(SCORES, IDS, SECOND, positive, MiningConfig(1, 0, 6, **margin), np.random.default_rng(0))
    assert found.tolist() == [[-1]]


def test_random_sampling_is_even_in_the_window_and_best_first():
    rng = np.random.default_rng(0)
    scores = np.tile(np.linspace(1, 0, 12, dtype=np.float32), (6000, 1))
    indices = np.tile(np.arange(12), (6000, 1))
    nobody = np.zeros(scores.shape, bool)
    found = select(scores, indices, nobody, np.ones(6000, np.float32), MiningConfig(3, 2, 8, sampling="random"), rng)
    assert (np.diff(found, axis=1) > 0).all()
    np.testing.assert_allclose(np.bincount(found.ravel(), minlength=12)[2:8] / 6000, 0.5, atol=0.03)
    assert set(found.ravel().tolist()) == set(range(2, 8))


def test_random_sampling_takes_what_is_there_and_no_less():
    found = select(SCORES, IDS, SECOND, SCORES[:, 1], MiningConfig(4, 0, 6, sampling="random"), np.random.default_rng(0))
    assert found.tolist() == [[7, 5, 1, 9]]
    found = select(SCORES, IDS, SECOND, SCORES[:, 1], MiningConfig(5, 0, 6, sampling="random"), np.random.default_rng(0))
    assert found.tolist() == [[7, 5, 1, 9, -1]]


def test_the_seed_decides_the_sample():
    pairs = pairs_of((i, i) for i in range(30))
    scorer = embedding_scores(GivenEmbeddings([text for i in range(30) for text in (f"a{i}", f"p{i}")], 0))
    one, same, other = (mine(pairs, scorer, MiningConfig(3, 0, 20, sampling="random"), seed=seed) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Free libFoo-dev, 3D!", ["free", "libfoo", "dev", "3d"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("Ｌｉｎｕｘ用カーネル", ["linux", "用カ", "カー", "ーネ", "ネル"]),
        ("字", ["字"]),
        ("라이브러리 문서", ["라이브러리", "문서"]),
        ("--- !", []),
    ],
)
def test_terms(text, expected):
    assert bm25_terms(text) == expected


def test_bm25_ranks_by_shared_terms_and_finds_nothing_else(caplog):
    candidates = ["a fast image editor", "image viewer for cats", "chess engine", "画像を編集する", "..."]
    scores = np.concatenate(list(bm25_scores(["image editor", "画像編集", "!!", "unheard"], candidates)))
    assert scores.dtype == np.float32
    assert scores[0, 0] > scores[0, 1] > 0 and (scores[0, 2:] == -np.inf).all()
    assert scores[1, 3] > 0 and (scores[1, [0, 1, 2, 4]] == -np.inf).all()
    assert (scores[2:] == -np.inf).all()
    assert not caplog.records


def test_bm25_ranks_the_corpus_own_bodies_first():
    packages = read_corpus(BUNDLED, "validation")[:200]
    pairs = [Pair(anchor=p.text["en"].title, positive=p.text["en"].body, group=p.source) for p in packages]
    mined = mine(pairs, bm25_scores, MiningConfig(3, 0, 30, relative_margin=0.1))
    assert len(mined) > 50
    sources = {pair.positive: pair.group for pair in pairs}
    assert all(sources[text] != triplet.group for triplet in mined for text in triplet.negatives)


def test_tasks_of_the_model(embedder):
    texts = ["an image editor", "a game"]
    default = next(embedding_scores(embedder)(texts, texts))
    np.testing.assert_allclose(default, embedder.encode_query(texts) @ embedder.encode_document(texts).T, atol=1e-6)
    asked = next(embedding_scores(embedder, query_task="classification", document_task="classification")(texts, texts))
    vectors = embedder.encode(texts, "classification")
    np.testing.assert_allclose(asked, vectors @ vectors.T, atol=1e-6)
    with pytest.raises(ValueError, match="separation"):
        embedding_scores(embedder, document_task="separation")


def test_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        mine([], bm25_scores, MiningConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, not 0"),
        ({"range_min": -1}, "range_min must be in"),
        ({"range_min": 100}, "not 100 with range_max 100"),
        ({"range_min": 95}, "leave 5 candidates, fewer than num_negatives 7"),
        ({"sampling": "best"}, "unknown sampling 'best'"),
        ({"max_score": float("nan")}, "max_score must be a number"),
        ({"relative_margin": float("inf")}, "relative_margin must be a number"),
    ],
)
def test_selections_that_nothing_meets(fields, message):
    with pytest.raises(ValueError, match=message):
        MiningConfig(**fields)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    packages = read_corpus(BUNDLED, "validation")[:60]
    pairs = [
        Pair(anchor=text.title, positive=text.body, language=language, group=package.source)
        for package in packages
        for language, text in package.text.items()
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_records(path, iter(pairs))
    return path


def run(*arguments: object):
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_the_pairs_are_not_replaced_by_their_triplets(file, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(file)
    before = file.read_bytes()
    for out in (file, file.parent / "." / file.name, tmp_path / "link.jsonl"):
        result = run(file, "--out", out, "--bm25")
        assert result.exit_code == 1 and f"{out} is the input {file}, which would be lost" in result.output
    assert file.read_bytes() == before


def test_program_with_bm25(file, tmp_path):
    out = tmp_path / "triplets.jsonl"
    out.write_text("old")
    result = run(file, "--out", out, "--bm25", "--num-negatives", 2, "--range-min", 0, "--same-language")
    assert result.exit_code == 0, result.output
    pairs = list(read_records(file, "pair"))
    expected = mine(pairs, bm25_scores, MiningConfig(2, 0), same_language=True)
    assert list(read_records(out, "triplet")) == expected and len(expected) < len(pairs)
    assert f"{len(expected)} of {len(pairs)} pairs" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["triplets.jsonl"]


def test_program_with_a_model(file, embedder, tmp_path):
    embedder.save(tmp_path / "model")
    out = tmp_path / "triplets.jsonl"
    numbers = ("--num-negatives", 3, "--range-min", 1, "--range-max", 20, "--sampling", "random", "--seed", 5)
    result = run(file, "--out", out, "--model", tmp_path / "model", "--query-task", "classification", *numbers)
    assert result.exit_code == 0, result.output
    scorer = embedding_scores(embedder, query_task="classification")
    pairs = list(read_records(file, "pair"))
    assert list(read_records(out, "triplet")) == mine(pairs, scorer, MiningConfig(3, 1, 20, sampling="random"), seed=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "search with either --bm25 or --model"),
        (("--bm25", "--model", "x"), "search with either --bm25 or --model"),
        (("--bm25", "--query-task", "x"), "--query-task: only with --model"),
        (("--bm25", "--num-negatives", 0), "num_negatives must be at least 1"),
        (("--bm25", "--range-min", 9, "--range-max", 9), "not 9 with range_max 9"),
        (("--bm25", "--min-score", 1e9), "widen the ranks, scores or margins"),
        (("--model", "/no/such/model"), "/no/such/model"),
    ],
)
def test_mistakes_are_one_line_and_leave_the_output_alone(file, tmp_path, options, message):
    out = tmp_path / "triplets.jsonl"
    out.write_text("old")
    result = run(file, "--out", out, *options)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert message in result.output and result.output.count("\n") == 1
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no pairs"),
        ([{"text": "a"}], r"pairs.jsonl:1: not a pair record"),
        ([{"anchor": "a", "positive": "b"}, {"anchor": "a"}], "pairs.jsonl:2: not a pair record (positive"),
        ([{"anchor": "a", "positive": 3}], "pairs.jsonl:1"),
        ([["a", "b"]], "pairs.jsonl:1: a record is a JSON object"),
        (
            [{"anchor": "a", "positive": "b", "negatives": ["c", "b"]}],
            "pairs.jsonl:1: not a pair record (negative 2 is the pos",
        ),
    ],
)
def test_files_that_are_no_pairs(tmp_path, lines, message):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run(file, "--out", tmp_path / "out.jsonl", "--bm25")
    assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("out", "message"), [("out.parquet", "--out must end in .jsonl"), ("no/out.jsonl", "no directory"), ("d.jsonl", "is a dir")]
)
def test_outputs_that_cannot_be(file, tmp_path, out, message):
    (tmp_path / "d.jsonl").mkdir()
    result = run(file, "--out", tmp_path / out, "--bm25")
    assert result.exit_code == 1 and message in result.output


def test_a_missing_file(tmp_path):
    result = run(tmp_path / "none.jsonl", "--out", tmp_path / "out.jsonl", "--bm25")
    assert result.exit_code == 1 and "there is no file" in result.output
