"""The stream of batches: each a function of its number, of one dataset and one language.

Processes share a batch without loss.
"""

import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")

from jina_jax import ModelConfig
from jina_jax.errors import DataError
from jina_jax.text.packing import max_texts
from train.config import DatasetConfig, Stage
from train.data.records import LabelledText, Pair, PlainText, Triplet, write_records
from train.data.stream import batch_stream, open_datasets, prefetch

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ModelConfig(vocab_size=16_000)
LANGUAGES = ("de", "en", "ja")


def pair(number: int, language: str = "en", mark: str = "q") -> Pair:
    return Pair(anchor=f"{mark} {number}", positive=f"answer {number}", language=language, group=f"{mark}{number}")


PAIRS = [pair(number) for number in range(50)]


def stage(*datasets: DatasetConfig, **fields) -> Stage:
    defaults = {"name": "s", "objective": "pairs", "steps": 10, "batch_size": 8, "max_length": 32, "learning_rate": 1e-3}
    return Stage(datasets=datasets or (DatasetConfig("d", "pair"),), **(defaults | {"row_length": 64} | fields))


@pytest.fixture
def stream(tokenizer):
    def make(stage: Stage, *sources, seed: int = 0, **share):
        return batch_stream(stage, sources or (PAIRS,), CONFIG, tokenizer, seed=seed, **share)

    return make


@pytest.fixture
def texts_of(tokenizer):
    def read(batch, devices: int = 1) -> list[tuple[str, ...]]:
        """The texts of each example, from the packed rows."""
        most, share = max_texts(batch.parts[0].tokens.shape[1]), len(batch.places) // devices
        return [
            tuple(_text(tokenizer, batch, place, most, n // share, devices) for place in places)
            for n, places in enumerate(batch.places.tolist())
        ]

    return read


def _text(tokenizer, batch, place: int, most: int, device: int, devices: int) -> str:
    for part in batch.parts:
        rows = len(part.tokens) // devices
        if place < rows * most:
            row = device * rows + place // most
            ids = part.tokens[row][part.segment_ids[row] == place % most + 1]
            return tokenizer.decode(ids, skip_special_tokens=True)
        place -= rows * most
    raise AssertionError("a place behind all parts")


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True)
    return a[0] == b[0] and all(np.array_equal(x, y) for x, y in pairs)


MLM = {"objective": "mlm", "max_length": 16}
CLASSES = {"objective": "classification", "adapters": ("classification",), "num_negatives": 2}
LABELLED = [LabelledText(text=f"text {i}", label="abc"[i % 3], language=LANGUAGES[i % 2]) for i in range(40)]
LONG = [PlainText(text=" ".join(f"word{i} {j}" for j in range(30))) for i in range(20)]
KINDS = {
    "pair": (stage(), PAIRS),
    "text": (stage(DatasetConfig("d", "text"), **MLM), LONG),
    "labelled_text": (stage(DatasetConfig("d", "labelled_text"), **CLASSES), LABELLED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_seed_and_number(kind, stream):
    first, second, other = (stream(*KINDS[kind], seed=seed) for seed in (3, 3, 4))
    backwards = [second[i] for i in reversed(range(12))][::-1]
    assert all(same(first[i], backwards[i]) for i in range(12))
    assert not any(same(first[i], first[i + 1]) or same(first[i], other[i]) for i in range(11))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [0, 4])
def test_reading_goes_on_from_any_number(kind, threads, stream):
    plan = stream(*KINDS[kind])
    expected = [plan[i] for i in range(8)]
    reading = prefetch(plan, threads)
    read, states = [], [reading.get_state()]
    for _ in range(8):
        read.append(next(reading))
        states.append(reading.get_state())
    assert all(map(same, read, expected))
    for start in (5, 0, 2):
        again = prefetch(stream(*KINDS[kind]), 4 - threads)
        again.set_state(dict(states[start]))
        assert all(same(next(again), expected[number]) for number in range(start, 8))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch(processes, stream, texts_of):
    whole = stream(stage())
    parts = [stream(stage(), process=process, processes=processes) for process in range(processes)]
    for number in range(15):
        shares = [texts_of(part[number][1]) for part in parts]
        assert all(len(share) == 8 // processes for share in shares)
        assert Counter(sum(shares, [])) == Counter(texts_of(whole[number][1]))


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_a_batch(devices, stream, texts_of):
    whole, shared = stream(stage()), stream(stage(), devices=devices)
    for number in range(10):
        every = texts_of(whole[number][1])
        assert texts_of(shared[number][1], devices) == [text for device in range(devices) for text in every[device::devices]]


def test_as_many_devices_have_the_same_shares_in_any_number_of_processes(stream, texts_of):
    one, two = stream(stage(), devices=4), [stream(stage(), devices=2, process=i, processes=2) for i in range(2)]
    for number in range(5):
        whole = texts_of(one[number][1], 4)
        parts = [texts_of(part[number][1], 2) for part in two]
        shares = [part[i : i + 2] for part in parts for i in (0, 2)]
        assert sorted(shares) == sorted(whole[i : i + 2] for i in (0, 2, 4, 6))


def test_all_processes_have_as_many_rows(stream):
    records = [pair(i, mark="q " * (40 if i % 2 else 1)) for i in range(50)]
    plan = stage(num_row_counts=8, max_length=60)
    two = [stream(plan, records, process=i, processes=2) for i in range(2)]
    met = Met(2)
    together = [stream(plan, records, process=i, processes=2, asking_main=met.asking_main(i)) for i in range(2)]
    alone = [[len(each[number][1].parts[0].tokens) for each in two] for number in range(6)]
    shapes = [[len(batch.parts[0].tokens) for batch in met.batches(together, number)] for number in range(6)]
    assert shapes == [[max(rows)] * 2 for rows in alone] and any(a != b for a, b in alone)


class Met:
    """Processes, here threads, that meet for each batch."""

    def __init__(self, count: int):
        self._barrier, self._values, self._made = threading.Barrier(count, timeout=60), [b""] * count, [b""] * count

    def asking_main(self, process: int):
        def ask(number, value, answers):
            self._values[process] = value
            self._barrier.wait()
            if process == 0:
                self._made = answers(list(self._values))
            self._barrier.wait()
            return self._made[process]

        return lambda name: ask

    @staticmethod
    def batches(streams, number: int):
        with ThreadPoolExecutor(len(streams)) as threads:
            return [batch for _, batch in threads.map(lambda each: each[number], streams)]


@pytest.mark.parametrize("processes", [2, 4])
def test_groups_do_not_depend_on_the_processes(processes, stream, texts_of):
    """Texts and groups are shared across processes, and negatives are texts of other ones."""
    records = [
        Triplet(
            anchor=f"q {i}",
            positive=f"answer {i % 17}",
            negatives=(f"answer {(i + 5) % 17}", f"other {i % 13}"),
            negative_groups=("", f"g{(i + 1) % 9}"),
            group=f"g{i}" if i % 3 == 0 else "",
        )
        for i in range(60)
    ]
    plan = stage(DatasetConfig("d", "triplet"), objective="retrieval", adapters=("a", "b"), num_negatives=2, batch_size=16)
    met, whole = Met(processes), stream(plan, records)
    shares = [stream(plan, records, process=i, processes=processes, asking_main=met.asking_main(i)) for i in range(processes)]
    for number in range(6):
        parts = met.batches(shares, number)
        numbers = dict(zip(texts_of(whole[number][1]), whole[number][1].groups.tolist(), strict=True))
        assert len({row[0] for row in numbers.values()}) < 16  # some are of one group
        found = [row for part in parts for row in zip(texts_of(part), part.groups.tolist(), strict=True)]
        assert sorted(found) == sorted(numbers.items())


def test_a_record_with_its_positive_among_its_negatives_is_told_of_once(stream, caplog):
    """As a dataset of an earlier version may hold it."""
    right = Triplet(anchor="a", positive="b", negatives=("c", "d"))
    wrong = right.model_copy(update={"negatives": ("c", "b")})
    plan = stage(DatasetConfig("d", "triplet"), objective="retrieval", adapters=("a", "b"), num_negatives=2)
    batches = stream(plan, [wrong, *[right.model_copy(update={"anchor": f"a{i}", "positive": f"b{i}"}) for i in range(7)]])
    for number in range(3):
        row = next(row for row in batches[number][1].groups.tolist() if row[0] in row[1:])
        assert len(set(row)) == 2
    assert caplog.messages == [
        "stage s: 1 of the 8 records of a batch have their own anchor, positive or group among their negatives; "
        "such negatives do not count, here and in later batches"
    ]


def test_what_is_drawn_does_not_depend_on_the_processes(stream, texts_of):
    plan, records = KINDS["labelled_text"]
    whole, *parts = stream(plan, records), *(stream(plan, records, process=process, processes=2) for process in range(2))
    for number in range(5):
        drawn = sum((texts_of(part[number][1]) for part in parts), [])
        assert Counter(drawn) == Counter(texts_of(whole[number][1]))


def test_an_epoch_holds_every_record_once_and_the_next_has_another_order(stream, texts_of):
    plan = stream(stage(batch_size=10))
    epochs = [
        [example for number in range(5 * epoch, 5 * epoch + 5) for example in texts_of(plan[number][1])] for epoch in (0, 1, 7)
    ]
    assert all(Counter(epoch) == Counter((pair.anchor, pair.positive) for pair in PAIRS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_record_is_drawn_for_anew_in_each_epoch(stream):
    plan = stream(stage(DatasetConfig("d", "text"), **(MLM | {"batch_size": 1})), LONG[:1])
    tokens = {plan[number][1].parts[0].tokens.tobytes() for number in range(10)}
    assert len(tokens) == 10  # another window and other masks


def test_fewer_records_than_a_batch_are_repeated(stream, texts_of):
    batch = stream(stage(), PAIRS[:3])[0][1]
    counts = Counter(texts_of(batch))
    assert len(counts) == 3 and set(counts.values()) <= {2, 3}
    assert len(np.unique(batch.groups)) == 3  # a record is no negative of itself


def test_datasets_are_mixed_by_weight(stream, texts_of):
    weights = {"a": 1.0, "b": 2.5, "c": 0.5}
    plan = stage(*(DatasetConfig(mark, "pair", weight=weight) for mark, weight in weights.items()), batch_size=2)
    mixed = stream(plan, *([pair(i, mark=mark) for i in range(10 * n)] for n, mark in enumerate(weights, 1)))
    marks = [{anchor[0] for anchor, _ in texts_of(mixed[number][1])} for number in range(200)]
    assert all(len(mark) == 1 for mark in marks)
    counts = Counter(mark for each in marks for mark in each)
    assert all(abs(counts[mark] - 50 * weight) <= 2 for mark, weight in weights.items())
    assert all(
        {"a", "b", "c"} == set.union(*marks[start : start + 12]) for start in range(0, 192, 12)
    )  # not one after the other


def test_kinds_are_told_with_the_batch(stream):
    plan = stage(
        DatasetConfig("a", "labelled_text"), DatasetConfig("b", "pair"), objective="separation", adapters=("separation",)
    )
    kinds = Counter(stream(plan, LABELLED, PAIRS)[number][0] for number in range(10))
    assert kinds == {"labelled_text": 5, "pair": 5}


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 2), (0.5, 2**0.5), (0.0, 1)])
def test_a_batch_holds_one_language(exponent, expected, stream, texts_of):
    counts = {"de": 80, "en": 40, "ja": 5, "ko": 3}  # the last two have less than a batch
    records = [pair(i, language, mark=language) for language, count in counts.items() for i in range(count)]
    plan = stage(DatasetConfig("d", "pair", by_language=True, language_exponent=exponent))
    batch_stream = stream(plan, records)
    seen = [frozenset(anchor.split()[0] for anchor, _ in texts_of(batch_stream[number][1])) for number in range(100)]
    found = Counter(seen)
    rare = {languages: found.pop(languages) for languages in list(found) if languages <= {"ja", "ko"}}
    assert set(found) == {frozenset({"de"}), frozenset({"en"})} and rare
    assert found[frozenset({"de"})] / found[frozenset({"en"})] == pytest.approx(expected, rel=0.1)


def test_texts_of_other_classes_are_of_the_batchs_language(stream, texts_of):
    labelled = [LabelledText(text=f"{'de' if i % 2 else 'en'} {i}", label=f"{i % 5}", language=f"{i % 2}") for i in range(60)]
    plan = stage(DatasetConfig("d", "labelled_text", by_language=True), **CLASSES)
    drawn = stream(plan, labelled)
    for number in range(10):
        texts = texts_of(drawn[number][1])
        assert len({text.split()[0] for example in texts for text in example}) == 1


def test_stages_and_datasets_have_seeds_of_their_own(stream, texts_of):
    plan = stage(DatasetConfig("a", "pair"), DatasetConfig("b", "pair"), batch_size=10)
    one, other = stream(plan, PAIRS, PAIRS), stream(stage(name="other", batch_size=10))
    orders = [texts_of(one[0][1]), texts_of(one[1][1]), texts_of(other[0][1])]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(("devices", "processes"), [(3, 1), (1, 3), (8, 2)])
def test_a_batch_that_does_not_divide_is_refused(devices, processes, stream):
    with pytest.raises(ValueError, match=f"stage s: batch_size 8 is not divisible by {devices * processes} devices"):
        stream(stage(), devices=devices, processes=processes)


def test_labelled_texts_of_one_label_are_refused(stream):
    plan, records = KINDS["labelled_text"]
    with pytest.raises(DataError, match=r"^d, split 'train': labelled texts need at least 2 labels, not \['a'\]$"):
        stream(plan, [record for record in records if record.label == "a"])


def test_the_language_of_one_label_is_named(stream):
    _, records = KINDS["labelled_text"]
    plan = stage(DatasetConfig("news", "labelled_text", split="all", by_language=True), **CLASSES)
    one = [record.model_copy(update={"label": "a"}) if record.language == "en" else record for record in records]
    message = r"news, split 'all', language 'en': labelled texts need at least 2 labels, not \['a'\]; set by_language=False"
    with pytest.raises(DataError, match=message):
        stream(plan, one)
    few = [record for record in records if record.language == "de"]
    few += [LabelledText(text=f"t {i}", label="b", language="fr") for i in range(3)]
    with pytest.raises(DataError, match=r"news, split 'all', languages \['fr'\] \(fewer than 8 records each\): .* not \['b'\]"):
        stream(plan, few)


def test_files_are_prepared_once_for_each_split_and_content(tmp_path):
    file = tmp_path / "r.jsonl"
    write_records(file, iter(PAIRS[:20]))
    plan = stage(DatasetConfig(str(file), "pair"), DatasetConfig(str(file), "pair", split="more"))
    sources = open_datasets(plan, tmp_path / "run")
    assert [sorted(pair.anchor for pair in source) for source in sources] == [sorted(pair.anchor for pair in PAIRS[:20])] * 2
    prepared = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.array_record*")}
    assert [list(source) for source in open_datasets(plan, tmp_path / "run")] == [list(source) for source in sources]
    assert prepared == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.array_record*")}
    write_records(file, iter(PAIRS[:21]))
    assert len(open_datasets(plan, tmp_path / "run")[0]) == 21
    with pytest.raises(FileNotFoundError, match="there is no dataset none"):
        open_datasets(stage(DatasetConfig("none", "pair")), tmp_path)


def test_a_datasets_languages_are_those_of_its_records(tmp_path, tokenizer):
    file = tmp_path / "r.jsonl"
    write_records(file, iter(LABELLED))
    plan = stage(DatasetConfig(str(file), "labelled_text", by_language=True), **CLASSES)
    (source,) = open_datasets(plan, tmp_path)
    stored, listed = (batch_stream(plan, [each], CONFIG, tokenizer, seed=0) for each in (source, list(source)))
    assert all(same(stored[number], listed[number]) for number in range(6))


def test_what_a_killed_run_left_is_not_taken(tmp_path):
    file = tmp_path / "r.jsonl"
    write_records(file, iter(PAIRS[:20]))
    plan = stage(DatasetConfig(str(file), "pair"))
    open_datasets(plan, tmp_path / "run")
    (done,) = (tmp_path / "run").rglob("1.0.0")
    (done / "features.json").unlink()
    done.rename(done.with_name("1.0.0.incompleteABCDEF"))
    assert len(open_datasets(plan, tmp_path / "run")[0]) == 20


def test_tensorflow_and_torch_stay_out(tmp_path):
    code = f"""if True:
        import sys
        from pathlib import Path
        from jina_jax import ModelConfig
        from jina_jax.text.tokenizer import load_tokenizer
        from train.config import DatasetConfig, Stage
        from train.data.stream import batch_stream, open_datasets, prefetch
        stage = Stage("s", "pairs", (DatasetConfig("{tmp_path}/r.jsonl", "pair"),), 1, 4, 32, 1e-3)
        config, sources = ModelConfig(vocab_size=16000), open_datasets(stage, Path("{tmp_path}"))
        tokenizer = load_tokenizer(Path("data/tokenizer"), config)
        next(prefetch(batch_stream(stage, sources, config, tokenizer, seed=0), 2))
        print(sorted({{"tensorflow", "torch"}} & set(sys.modules)))
    """
    write_records(tmp_path / "r.jsonl", iter(PAIRS))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
