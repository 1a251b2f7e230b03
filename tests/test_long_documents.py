"""The benchmark of long documents: each scores as its best chunk, and what was not run says so."""

import json
import lzma

import numpy as np
import pytest

pytest.importorskip("bm25s")
pytest.importorskip("sklearn")
from benchmarks.long_documents import NOT_RUN, Way, best_chunks, load_meetings, score_model, score_words, table


@pytest.fixture
def folder(tmp_path):
    texts = [
        f"meeting {number} about {word}. Another sentence. " * 30 for number, word in enumerate(("cheese", "cars", "maps"))
    ]
    with lzma.open(tmp_path / "docs.jsonl.xz", "wt") as file:
        file.write("".join(json.dumps({"id": f"m{number}", "text": text}) + "\n" for number, text in enumerate(texts)))
    queries = [{"text": word, "doc": f"m{number}"} for number, word in ((2, "maps"), (0, "cheese"), (1, "cars"), (0, "cheese"))]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    return tmp_path


def test_a_document_scores_as_its_best_chunk():
    rng = np.random.default_rng(0)
    queries, chunks = rng.standard_normal((5, 8)), [rng.standard_normal((count, 8)) for count in (3, 1, 4)]
    want = [[max(float(chunk @ query) for chunk in each) for each in chunks] for query in queries]
    np.testing.assert_allclose(best_chunks(queries, chunks)(slice(0, 5)), want)


def test_queries_of_the_meetings_that_are_drawn(folder):
    task = load_meetings(folder)
    assert len(task.right) == 3 and task.relevant.tolist() == [2, 0, 1, 0]
    drawn = load_meetings(folder, 2)
    assert len(drawn.right) == 2
    assert all(query in drawn.right[index] for query, index in zip(drawn.left, drawn.relevant, strict=True))
    assert score_words(task).score == 100


def test_every_way_embeds_every_meeting(folder, embedder):
    ways = ["cut", "naive", "framed", "plain"]
    found = [*score_model(embedder, load_meetings(folder), ways, chunk_tokens=32, overlap=8)]
    assert [way.meetings for way in found] == [3] * 4
    assert found[0].vectors == 3 and len({way.vectors for way in found[1:]}) == 1 and (found[1].vectors or 0) > 3
    assert all(0 <= way.score <= 100 for way in found)


def test_what_was_not_run_says_so():
    ways = [
        Way("bm25", 24, 90.0, 1.0),
        Way("bm25", 197, 83.3, 2.0),
        Way("cut", 197, 21.6, 9.0, 197),
        Way("cut", 24, 50.0, 3.0, 24),
    ]
    lines = table(ways, limit=512).splitlines()
    assert lines[2:] == [
        f"| cut at the limit | 50.00 | 21.60 | 21.51 | 3 | 24 | {NOT_RUN} |",
        "| BM25 | 90.00 | 83.30 | 83.23 | 1 |  |  |",
    ]
    assert NOT_RUN not in table(ways, limit=8194)
