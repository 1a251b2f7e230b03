"""Batches: the texts of every example, tokenised as by the tokenizer, each where `places` says."""

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jina_jax.config import PUBLISHED_INSTRUCTIONS
from jina_jax.text.packing import best_fit_decreasing, max_texts
from train.config import DatasetConfig, Stage
from train.data.collate import BatchShape, PackedRows, TokenizedTexts, TrainBatch, collate, score_keys, text_encoder
from train.data.examples import Classes, Example, texts_per_example, to_example
from train.data.masking import max_masked, word_starts
from train.data.records import LabelledText, Pair, PlainText, ScoredPair, Triplet
from train.data.row_counts import chunk_count, most_rows, texts_per_row

KINDS = {"mlm": "text", "classification": "labelled_text", "separation": "labelled_text", "retrieval": "triplet"}
PAD = 1


def stage(objective: str = "pairs", **fields) -> Stage:
    adapters = {"retrieval": ("retrieval.query", "retrieval.passage"), "text_matching": ("text-matching",)}
    defaults = {
        "adapters": adapters.get(objective, () if objective in ("mlm", "pairs") else (objective,)),
        "datasets": (DatasetConfig("d", KINDS.get(objective, "pair")),),
        "num_negatives": 2 if objective in ("classification", "retrieval") else 0,
        "max_length": 24,
        "row_length": 64,
    }
    defaults |= {"name": "s", "objective": objective, "steps": 10, "batch_size": 8, "learning_rate": 1e-3}
    return Stage(**(defaults | fields))


def largest(examples: int, texts: int, plan: Stage) -> BatchShape:
    return BatchShape(plan.row_length, texts_per_row(plan), (most_rows(examples, texts, plan),))


def at(batch: TrainBatch, place: int, device: int = 0, devices: int = 1) -> tuple[PackedRows, int, np.ndarray]:
    """The part and row of a text, and the slots that it has there, by its place on its device."""
    most = max_texts(batch.parts[0].tokens.shape[1])
    for part in batch.parts:
        rows = len(part.tokens) // devices
        if place < rows * most:
            row = device * rows + place // most
            return part, row, part.segment_ids[row] == place % most + 1
        place -= rows * most
    raise AssertionError("a place behind all parts")


def tokens_at(batch: TrainBatch, place: int, device: int = 0, devices: int = 1) -> np.ndarray:
    part, row, slots = at(batch, place, device, devices)
    return part.tokens[row][slots]


def fake_encode(examples) -> TokenizedTexts:
    """Token ids told by the text itself: "5,8,1" is a text of part 1 of 8 tokens, all of them 5."""
    told = [list(map(int, text.split(","))) for example in examples for text in example.texts]
    ids = [np.full(length, token, np.int32) for token, length, _ in told]
    return TokenizedTexts(ids, [ids + 1 for ids in ids], [part for *_, part in told])


sizes = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 5))


@given(
    st.data(),
    sizes,
    st.sampled_from([(24, 64), (16, 16), (31, 64), (64, 64), (33, 64), (9, 100)]),
    st.integers(0, 3),
    st.sampled_from(["pairs", "retrieval"]),
)
def test_every_text_is_where_places_says(data, sizes, lengths, fewer, objective):
    per_device, devices, texts = sizes
    length, row_length = lengths
    plan = stage(objective, max_length=length, row_length=row_length)
    count, in_row = per_device * devices, max_texts(row_length)
    drawn = data.draw(st.lists(st.integers(1, length), min_size=count * texts, max_size=count * texts))
    part_of = [int(objective == "retrieval" and i % texts > 0) for i in range(count * texts)]
    names = [f"{100 + i},{n},{part}" for i, (n, part) in enumerate(zip(drawn, part_of, strict=True))]
    examples = [Example(tuple(names[i * texts : (i + 1) * texts]), score=i / 7) for i in range(count)]
    most = most_rows(per_device, texts, plan)
    shape = BatchShape(
        row_length, in_row, (*(tuple(max(rows - less, 1) for rows in most) for less in range(fewer, 0, -1)), most)
    )
    batch = collate(examples, fake_encode, shape, devices, PAD)
    shared = [example for device in range(devices) for example in examples[device::devices]]

    rows = tuple(len(part.tokens) // devices for part in batch.parts)
    assert rows in shape.row_counts and len(rows) == (2 if objective == "retrieval" else 1)
    for part, each in zip(batch.parts, rows, strict=True):
        assert {array.shape for array in part} == {(each * devices, row_length)}
    assert batch.places.shape == (count, texts)
    held = set()
    for i, places in enumerate(batch.places.tolist()):
        device = i // per_device
        for text, place in zip(shared[i].texts, places, strict=True):
            token, size, number = map(int, text.split(","))
            assert 0 <= place < sum(rows) * in_row  # of its own device
            part, row, slots = at(batch, place, device, devices)
            assert part is batch.parts[number]
            assert part.tokens[row][slots].tolist() == [token] * size
            assert part.labels[row][slots].tolist() == [token + 1] * size
            assert part.positions[row][slots].tolist() == list(range(size))
            held.add((device, place))
    assert len(held) == count * texts
    for part in batch.parts:
        empty = part.segment_ids == 0
        assert (part.tokens[empty] == PAD).all() and (part.labels[empty] == -1).all()
    assert sum((part.segment_ids > 0).sum() for part in batch.parts) == sum(drawn)
    np.testing.assert_array_equal(batch.scores, score_keys([example.score for example in shared]))


finite = st.floats(allow_nan=False, allow_infinity=False)
near = st.sampled_from([0.0, -0.0, 5e-324, 0.1, 0.1 + 1e-16, 16777216.0, 16777217.0, -1e300])


@given(st.lists(finite | near, max_size=9))
def test_score_keys_have_the_order_of_the_scores(scores):
    keys = list(map(tuple, score_keys(scores).tolist()))
    for score, key in zip(scores, keys, strict=True):
        assert [key < other for other in keys] == [score < other for other in scores]


@given(
    st.data(),
    st.integers(1, 400),
    st.integers(8, 128),
    st.integers(16, 256),
    st.sampled_from([None, 1, 4, 7]),
)
def test_the_largest_shape_holds_any_lengths(data, texts, length, row_length, chunk):
    length = min(length, row_length)
    (most,) = most_rows(texts, 1, stage(max_length=length, row_length=row_length, encode_chunk_rows=chunk))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    least = data.draw(st.integers(1, length))
    for lengths in ([length] * texts, rng.integers(least, length + 1, size=texts), rng.choice([1, length], size=texts)):
        assert len(best_fit_decreasing(list(map(int, lengths)), row_length, max_texts(row_length))) <= most
    assert most % chunk_count(most, chunk) == 0


@pytest.mark.parametrize("objective", ["pairs", "retrieval", "text_matching", "classification"])
def test_texts_are_tokenised_as_by_the_tokenizer_alone(objective, tokenizer, corpus):
    plan = stage(objective, max_length=48)
    prompts = PUBLISHED_INSTRUCTIONS | {"text-matching": "Compare: "}
    suffix = " 012345678" if objective == "classification" else ""
    examples = [Example(tuple(corpus[i : i + 3]), suffix=suffix) for i in range(0, 300, 3)]
    examples.append(Example(("日本語", " ", "x" * 100_000), suffix=suffix))
    texts = text_encoder(plan, prompts, tokenizer)(examples)
    assert texts.labels is None
    prefixes = [prompts[task] for task in plan.adapters] or [""]
    tail = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    cut = 0
    for number, ids in enumerate(texts.ids):
        anchor = number % 3 == 0
        text = examples[number // 3].texts[number % 3]
        whole = tokenizer(prefixes[0 if anchor else -1] + text)["input_ids"]
        assert len(ids) == min(len(whole) + len(tail), plan.max_length)
        kept = len(ids) - len(tail) - 1
        assert ids.tolist() == [*whole[:kept], *tail, tokenizer.eos_token_id]
        assert texts.parts[number] == (0 if anchor else max(len(plan.adapters) - 1, 0))
        cut += len(whole) + len(tail) > plan.max_length
    assert 50 < cut < 250


def test_prompts_stand_before_anchors_and_before_all_other_texts(tokenizer, corpus):
    plan = stage("pairs", max_length=16, prompts=("query: ", "a passage: "))
    examples = [Example(tuple(corpus[i : i + 3])) for i in range(0, 60, 3)]
    texts = text_encoder(plan, {}, tokenizer)(examples)
    wanted = [plan.prompts[number > 0] + text for example in examples for number, text in enumerate(example.texts)]
    whole = [tokenizer(text)["input_ids"] for text in wanted]
    assert [ids.tolist() for ids in texts.ids] == [[*ids[:-1][:15], ids[-1]] for ids in whole]
    assert {len(ids) > 16 for ids in whole} == {True, False} and set(texts.parts) == {0}


def test_the_tokenizer_itself_is_left_alone(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(5)
    try:
        encode = text_encoder(stage(), {}, tokenizer)
        assert len(encode([Example(("one two three four five six seven eight", "b"))]).ids[0]) > 5
        assert tokenizer.backend_tokenizer.truncation["max_length"] == 5
    finally:
        tokenizer.backend_tokenizer.no_truncation()


def test_a_length_without_room_for_text_is_refused(tokenizer):
    instructed = len(tokenizer(PUBLISHED_INSTRUCTIONS["retrieval.query"])["input_ids"])
    example = Example(("a", "b", "c"))
    with pytest.raises(
        ValueError, match=f"stage s: max_length {instructed} leaves no room for text; .* are {instructed} tokens"
    ):
        text_encoder(stage("retrieval", max_length=instructed), PUBLISHED_INSTRUCTIONS, tokenizer)([example])
    text_encoder(stage("retrieval", max_length=instructed + 1), PUBLISHED_INSTRUCTIONS, tokenizer)([example])
    prompted = stage("pairs", max_length=instructed, prompts=("", PUBLISHED_INSTRUCTIONS["retrieval.query"]))
    with pytest.raises(ValueError, match=f"no room for text; special tokens, prompt and suffix are {instructed} tokens"):
        text_encoder(prompted, {}, tokenizer)([example])
    with pytest.raises(ValueError, match="leaves no room for text"):
        text_encoder(stage("classification", max_length=8), {}, tokenizer)([example._replace(suffix=" 123456789")])


@given(st.integers(0, 2**31 - 1), st.integers(0, 400))
def test_masks_are_of_a_window_of_the_text(tokenizer, corpus, seed, number):
    plan = stage("mlm", max_length=32)
    texts = text_encoder(plan, {}, tokenizer)([Example((corpus[number],), seed=seed)])
    (ids,), (labels,), whole = texts.ids, texts.labels, tokenizer(corpus[number])["input_ids"]
    original = np.where(labels >= 0, labels, ids).tolist()
    windows = [[whole[0], *whole[start : start + 30], whole[-1]] for start in range(1, max(len(whole) - 30, 2))]
    assert original in windows if len(whole) > 32 else original == whole
    assert texts.parts == [0] and len(labels) == len(ids)
    ordinary = ~np.isin(original, tokenizer.all_special_ids)
    assert min(1, ordinary.sum()) <= (labels >= 0).sum() <= max_masked(int(ordinary.sum()), plan.mask_rate)
    assert not (labels >= 0)[~ordinary].any()


def test_windows_are_anywhere_and_masks_of_whole_words(tokenizer, corpus):
    text = max(corpus, key=len)
    whole = tokenizer(text)["input_ids"]
    examples = [Example((text,), seed=seed) for seed in range(300)]
    texts = text_encoder(stage("mlm", max_length=len(whole) - 3, row_length=512), {}, tokenizer)(examples)
    originals = [np.where(labels >= 0, labels, ids) for ids, labels in zip(texts.ids, texts.labels, strict=True)]
    firsts = Counter(tuple(original[1:5].tolist()) for original in originals)
    assert set(firsts) == {tuple(whole[start : start + 4]) for start in range(1, 5)} and min(firsts.values()) > 40
    starts = word_starts(tokenizer)
    for original, labels in zip(originals[:20], texts.labels, strict=False):
        special = np.isin(original, tokenizer.all_special_ids)
        words = np.where(special, -1, np.cumsum(starts[original] | special))
        assert all((labels[words == word] >= 0).all() for word in words[labels >= 0])


def test_groups_are_equal_where_records_are(tokenizer):
    examples = [
        Example(("a", "b"), group="x"),
        Example(("c", "d"), group="x"),
        Example(("a", "b"), group="y"),
        Example(("x", "y"), group="z"),
        Example(("z", "w")),
        Example(("v", "c")),
    ]
    batch = collate(examples, text_encoder(stage(), {}, tokenizer), largest(6, 2, stage()), 1, PAD)
    (groups,) = batch.groups.T
    equal = (groups[:, None] == groups[None]).tolist()
    same = [{0, 1, 2, 5}, {3}, {4}]  # a, or the group x; and c, which the group has as well
    assert equal == [[any({i, j} <= each for each in same) for j in range(6)] for i in range(6)]
    assert groups.dtype == np.int32 and (groups >= 0).all() and (batch.parts[0].labels == -1).all()


LABELLED = [LabelledText(text=f"{label} {i}", label=label) for i in range(12) for label in "abcd"] + [
    LabelledText(text="alone", label="e")
]


def test_masking_needs_a_mask_token(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.mask_token = None
    with pytest.raises(ValueError, match="stage s: the tokenizer has no mask token"):
        text_encoder(stage("mlm", mask_rate=0.3), {}, without)


@given(st.integers(0, 99), st.sampled_from(LABELLED), st.integers(1, 7))
def test_class_tuples(seed, record, negatives):
    make = to_example(stage("classification", num_negatives=negatives), "labelled_text", LABELLED)
    example = make(record, np.random.default_rng(seed))
    anchor, positive, *others = example.texts
    labels = {each.text: each.label for each in LABELLED}
    assert anchor == record.text and labels[positive] == record.label
    assert positive != anchor or record.label == "e"
    assert len(others) == negatives and all(labels[other] != record.label for other in others)
    assert example.suffix[0] == " " and example.suffix[1:].isdecimal() and len(example.suffix) == 10
    assert example.suffix != make(record, np.random.default_rng(seed + 1)).suffix
    assert len(example.texts) == texts_per_example(stage("classification", num_negatives=negatives), "labelled_text")


def test_excluded_tuples_of_one_class_are_one_group_and_have_no_number(tokenizer):
    plan = stage("classification", same_class="excluded")
    make = to_example(plan, "labelled_text", LABELLED)
    examples = [make(record, np.random.default_rng(i)) for i, record in enumerate(LABELLED[:16])]
    assert not any(example.suffix for example in examples)
    batch = collate(examples, text_encoder(plan, {}, tokenizer), largest(16, 4, plan), 1, PAD)
    classes = {record.text: record.label for record in LABELLED}
    labels = np.array([[classes[text] for text in (example.texts[0], *example.texts[2:])] for example in examples])
    own, others = batch.groups[:, 0], batch.groups.reshape(-1)
    assert ((own[:, None] == others[None]) == (labels[:, :1] == labels.reshape(1, -1))).all()


def test_a_text_of_two_classes_is_never_on_both_sides():
    """Where there is another text; where not, it counts as one of its own class."""
    both = [LabelledText(text="both", label=label) for label in "ab"]
    records = both + [LabelledText(text=f"{label} {i}", label=label) for label in "ab" for i in range(4)]
    make = to_example(stage("classification", same_class="excluded", num_negatives=1), "labelled_text", records)
    apart = to_example(stage("separation"), "labelled_text", records)
    drawn = [make_one(record, np.random.default_rng(i)) for i in range(40) for record in records for make_one in (make, apart)]
    assert all(example.texts[2] not in example.texts[:2] for example in drawn)
    assert all(example.group != example.negative_groups[0] for example in drawn)
    make = to_example(stage("classification", same_class="excluded"), "labelled_text", both)
    assert make(both[0], np.random.default_rng(0)).negative_groups == ("a", "a")


def test_a_tuple_of_classes_ends_in_one_number(tokenizer):
    plan = stage("classification", max_length=24)
    make = to_example(plan, "labelled_text", LABELLED)
    long = [record.model_copy(update={"text": record.text + " word" * 50}) for record in LABELLED]
    examples = [make(record, np.random.default_rng(i)) for i, record in enumerate(long[:16])]
    batch = collate(examples, text_encoder(plan, {}, tokenizer), largest(8, 4, plan), 2, PAD)
    numbers = []
    for i, places in enumerate(batch.places.tolist()):
        texts = [tokenizer.decode(tokens_at(batch, place, i // 8, 2), skip_special_tokens=True) for place in places]
        numbers.append({text[-9:] for text in texts})
        assert all(text.endswith(examples[i % 8 * 2 + i // 8].suffix) for text in texts)
    assert all(len(each) == 1 for each in numbers) and len(set.union(*numbers)) == 16


@given(st.integers(0, 99), st.sampled_from(LABELLED))
def test_separation_has_one_of_the_class_and_one_of_another(seed, record):
    example = to_example(stage("separation"), "labelled_text", LABELLED)(record, np.random.default_rng(seed))
    labels = {each.text: each.label for each in LABELLED}
    assert [labels[text] == record.label for text in example.texts] == [True, True, False] and example.suffix == ""
    assert texts_per_example(stage("separation"), "labelled_text") == 3


def test_classes_are_drawn_evenly_over_their_records():
    classes, rng = Classes(LABELLED), np.random.default_rng(0)
    same = Counter(classes.same("a", rng, {"a 0"}).text for _ in range(2200))
    others = Counter(classes.other("a", rng, {"a 0"}) for _ in range(3700))
    assert set(same) == {f"a {i}" for i in range(1, 12)} and min(same.values()) > 150
    assert len(others) == 37 and min(others.values()) > 60


@given(st.integers(0, 99), st.integers(1, 9), st.integers(0, 9))
def test_triplets_draw_their_negatives(seed, held, wanted):
    texts, groups = tuple(f"n{i}" for i in range(held)), tuple(f"g{i}" for i in range(held))
    record = Triplet(anchor="a", positive="p", negatives=texts, group="g", negative_groups=groups)
    plan = stage("retrieval", num_negatives=wanted)
    example = to_example(plan, "triplet", [record])(record, np.random.default_rng(seed))
    negatives = Counter(example.texts[2:])
    assert example.texts[:2] == ("a", "p") and example.group == "g" and negatives.total() == wanted
    assert set(negatives) <= set(record.negatives) and (wanted > held or max(negatives.values(), default=1) == 1)
    assert len(example.texts) == texts_per_example(plan, "triplet")
    assert example.negative_groups == tuple(f"g{text[1:]}" for text in example.texts[2:])


def test_all_negatives_of_a_triplet_have_their_turn():
    record = Triplet(anchor="a", positive="p", negatives=tuple("uvwxyz"))
    make, rng = to_example(stage("retrieval", num_negatives=2), "triplet", [record]), np.random.default_rng(0)
    counts = Counter(text for _ in range(600) for text in make(record, rng).texts[2:])
    assert set(counts) == set("uvwxyz") and min(counts.values()) > 150


def test_pairs_scores_and_texts_pass_through():
    rng = np.random.default_rng(0)
    scored = ScoredPair(sentence1="a", sentence2="b", score=-2.5)
    assert to_example(stage("text_matching"), "scored_pair", [scored])(scored, rng) == Example(("a", "b"), score=-2.5)
    pair = Pair(anchor="a", positive="b", group="g")
    assert to_example(stage(), "pair", [pair])(pair, rng) == Example(("a", "b"), group="g")
    example = to_example(stage("mlm"), "text", [])(PlainText(text="a"), rng)
    assert example.texts == ("a",) and example.seed != 0
    for kind, count in (("text", 1), ("pair", 2), ("scored_pair", 2)):
        assert texts_per_example(stage(), kind) == count
    with pytest.raises(ValueError, match="no examples are made of song records"):
        to_example(stage(), "song", [])
