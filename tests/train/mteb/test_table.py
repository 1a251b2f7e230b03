"""The leaderboard's table: what of the published scores is comparable, and the means."""

import pytest

pytest.importorskip("matplotlib")

from train.mteb.names import Selection
from train.mteb.systems import Cell, System, TaskRun, TaskScore, published, published_cell
from train.mteb.table import Leaderboard, as_json, markdown, mean_task, mean_type, write

TWO_PAIRS = TaskRun("Tatoeba", "BitextMining", "f1", (Cell("test", "deu-eng"), Cell("test", "rus-eng")), 112)
BANKING = TaskRun("Banking77Classification", "Classification", "accuracy", (Cell("test", "default"),), 1)
STS = TaskRun("STS16", "STS", "cosine_spearman", (Cell("test", "default"),), 1)
STS12 = TaskRun("STS12", "STS", "cosine_spearman", (Cell("test", "default"),), 1)
UNKNOWN = TaskRun("OwnTask", "STS", "cosine_spearman", (Cell("test", "de"),), 2)


def system(label: str, **scores: float) -> System:
    return System(label, {name: TaskScore(value, {}) for name, value in scores.items()})


def others(*runs: TaskRun) -> dict[str, System]:
    return {each.label: each for each in published(runs)}


def test_languages_that_were_run_are_averaged_alone():
    score = others(TWO_PAIRS)["multilingual-e5-small"].scores["Tatoeba"]
    assert score.mean == pytest.approx((97.35 + 89.92) / 2)
    assert score.by_cell == {Cell("test", "deu-eng"): 97.35, Cell("test", "rus-eng"): 89.92}


def test_a_published_mean_is_of_a_whole_task_alone():
    every_pair = TWO_PAIRS._replace(name="NTREXBitextMining", all_cells=1916)
    assert not any(each.scores for each in others(every_pair).values())  # two of 1,916, and no scores by pair
    half = TaskRun("NusaXBitextMining", "BitextMining", "f1", (Cell("test", "a"), Cell("test", "b")), 2)
    assert not any(each.scores for each in others(half).values())  # the published task has other pairs


def test_a_task_of_one_split_is_its_mean():
    scores = others(BANKING, STS)["multilingual-e5-small"].scores
    assert (scores[BANKING.name].mean, scores[STS.name].mean) == (70.64, 83.49)
    assert published_cell("multilingual-e5-small", "STS16", Cell("test", "default")) == 83.49
    assert published_cell("multilingual-e5-small", "XQuADRetrieval", Cell("validation", "de")) is None


def test_means_are_over_tasks_and_over_types():
    runs = [STS, STS12, BANKING]
    found = system("a", STS16=80, STS12=60, Banking77Classification=40)
    assert mean_task(runs, found) == pytest.approx(60) and mean_type(runs, found) == pytest.approx(55)


def test_a_system_that_lacks_a_task_has_no_mean_with_it():
    runs, found = [STS, BANKING], system("a", STS16=80)
    assert mean_task(runs, found) is None and mean_type(runs, found) is None and mean_task([STS], found) == 80


@pytest.fixture
def board() -> Leaderboard:
    runs = [TWO_PAIRS, BANKING, UNKNOWN]
    own = System(
        "ours",
        {
            "Tatoeba": TaskScore(90, {Cell("test", "deu-eng"): 95, Cell("test", "rus-eng"): 85}),
            BANKING.name: TaskScore(60, {Cell("test", "default"): 60}),
            "OwnTask": TaskScore(-1, {Cell("test", "de"): -1}),
        },
    )
    selections = [Selection("MTEB(some)", [None, None], True), Selection("OwnTask", [None], False)]
    return Leaderboard(selections, {"MTEB(some)": 9, "OwnTask": 1}, runs, [own], published(runs))


def test_the_table_says_what_was_not_run(board):
    text = markdown(board)
    assert "2 of the 9 tasks of MTEB(some), OwnTask." in text
    assert "Tatoeba (2 of 112), OwnTask (1 of 2)" in text and "is not that of MTEB's leaderboard" in text


def test_rows_stand_beside_those_of_others(board):
    text = markdown(board)
    assert "| ours | 49.67 | 49.67 | 90.00 | 60.00 | -1.00 |" in text
    assert f"| multilingual-e5-small |  |  | {(97.35 + 89.92) / 2:.2f} | 70.64 |  |" in text
    # on the two tasks that both have: 75 against (93.635 + 70.64) / 2
    assert "| multilingual-e5-small | 2 | 75.00 | 82.14 | -7.14 |" in text
    assert "| Tatoeba deu-eng test | 95.00 |" in text and "BM25" not in text.split("Scores of other systems")[0]


def test_files_hold_what_the_table_says(board, tmp_path):
    write(tmp_path, board)
    assert "f4cc6c8b" in (tmp_path / "table.md").read_text()
    assert as_json(board)["systems"]["ours"]["scores"]["Tatoeba"]["cells"] == {"test/deu-eng": 95, "test/rus-eng": 85}
    assert (tmp_path / "table.png").stat().st_size > 1000
