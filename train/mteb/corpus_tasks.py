"""The bundled corpus as tasks of MTEB.

They are the tasks of `train.evaluation` in mteb's protocols, with bitext mining beside them, and
retrieval in each language beside that across languages.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..data.corpus import SEED, Package, title_and_body
from ..evaluation.classification import classification_tasks
from ..evaluation.retrieval import MIN_PACKAGES
from ..evaluation.similarity import similarity_tasks
from .names import Task, mteb

LANGUAGES = {
    "cs": "ces-Latn",
    "da": "dan-Latn",
    "de": "deu-Latn",
    "en": "eng-Latn",
    "es": "spa-Latn",
    "fr": "fra-Latn",
    "it": "ita-Latn",
    "ja": "jpn-Jpan",
    "ko": "kor-Hang",
    "nl": "nld-Latn",
    "pl": "pol-Latn",
    "pt_BR": "por-Latn",
    "ru": "rus-Cyrl",
    "sk": "slk-Latn",
    "uk": "ukr-Cyrl",
    "zh_CN": "zho-Hans",
}
"""Languages of the corpus as mteb writes them: ISO 639-3 and script."""

MOST_PACKAGES = 400
"""Packages of each language in retrieval, drawn with a fixed seed: bodies take most of the time."""

SPLIT = "test"
"""Name of the only split, whatever split of the corpus it is."""


def corpus_tasks(packages: Sequence[Package], train_packages: Sequence[Package]) -> list[Task]:
    """Returns all tasks that the packages allow, with their data.

    Args:
        packages: those of the split to measure.
        train_packages: classifiers are fitted on a sample of these.

    Raises:
        ValueError: there is no task in them, or a language that mteb's name is not known of.
    """
    english = [package for package in packages if "en" in package.text]
    train = [package for package in train_packages if "en" in package.text]
    languages = _languages(packages)
    makers = (
        lambda: _retrieval("PackageRetrieval", {language: (language, language) for language in languages}, packages),
        lambda: _retrieval("PackageCrosslingualRetrieval", {f"{each}-en": (each, "en") for each in languages[1:]}, english),
        lambda: _bitext(english, languages[1:]),
        lambda: _classification(english, train),
        lambda: _clustering(english),
        lambda: _similarity(english),
    )
    tasks = [task for make in makers for task in make()]
    if not tasks:
        raise ValueError(f"there are too few packages for a task: {len(english)} have an English text")
    return tasks


def _retrieval(name: str, subsets: dict[str, tuple[str, str]], packages: Sequence[Package]) -> Iterator[Task]:
    """Yields retrieval of bodies by titles; a title's package is what it asks for.

    Across languages every body is a candidate, within one those of the packages that are asked for.
    """
    from datasets import Dataset

    data = {}
    for subset, (asked, answered) in subsets.items():
        queries = _sample([package for package in packages if asked in package.text and answered in package.text])
        candidates = queries if asked == answered else [package for package in packages if answered in package.text]
        if len(queries) < MIN_PACKAGES:
            continue
        corpus = [{"id": each.id, "title": "", "text": each.text[answered].body} for each in candidates]
        data[subset] = {
            SPLIT: {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list([{"id": each.id, "text": each.text[asked].title} for each in queries]),
                "relevant_docs": {each.id: {each.id: 1} for each in queries},
                "top_ranked": None,
            }
        }
    if data:
        description = "Bodies of descriptions of software packages by their titles."
        languages = {subset: _unique(LANGUAGES[each] for each in subsets[subset]) for subset in data}
        yield _task(mteb().abstasks.AbsTaskRetrieval, name, "Retrieval", "ndcg_at_10", languages, data, description)


def _bitext(packages: Sequence[Package], languages: Sequence[str]) -> Iterator[Task]:
    """Yields titles and their English translations; one that repeats has no single translation."""
    data = {}
    for language in languages:
        pairs = [(each.text[language].title, each.text["en"].title) for each in packages if language in each.text]
        seen = [{title for title in side if side.count(title) > 1} for side in zip(*pairs, strict=True)]
        rows = [(left, right) for left, right in pairs if left not in seen[0] and right not in seen[1]]
        if len(rows) >= MIN_PACKAGES:
            data[f"{language}-en"] = _rows([{"sentence1": left, "sentence2": right} for left, right in rows])
    if data:
        names = {subset: [LANGUAGES[subset.removesuffix("-en")], LANGUAGES["en"]] for subset in data}
        base = mteb().abstasks.AbsTaskBitextMining
        yield _task(base, "PackageTitleBitextMining", "BitextMining", "f1", names, data, "Titles and their translations.")


def _classification(english: Sequence[Package], train: Sequence[Package]) -> Iterator[Task]:
    for found in classification_tasks(english, train):
        numbers = {section: number for number, section in enumerate(sorted({*found.left_sections, *found.right_sections}))}
        measured, fitted = (
            [{"text": text, "label": numbers[section]} for text, section in zip(texts, sections, strict=True)]
            for texts, sections in ((found.right, found.right_sections), (found.left, found.left_sections))
        )
        yield _task(
            mteb().abstasks.AbsTaskClassification,
            "PackageSectionClassification",
            "Classification",
            "accuracy",
            None,
            _rows(measured, train=fitted),
            "Section of a package by its description.",
        )


def _clustering(english: Sequence[Package]) -> Iterator[Task]:
    rows = [{"sentences": title_and_body(each), "labels": each.section} for each in english]
    if len({row["labels"] for row in rows}) > 1:
        task = _task(
            mteb().abstasks.AbsTaskClustering,
            "PackageSectionClustering",
            "Clustering",
            "v_measure",
            None,
            _rows(rows),
            "Descriptions of packages by their section.",
        )
        task.max_fraction_of_documents_to_embed = None  # all of them
        task.max_documents_per_cluster = len(rows)
        yield task


def _similarity(english: Sequence[Package]) -> Iterator[Task]:
    data = {
        found.subset: _rows(
            [
                {"sentence1": left, "sentence2": right, "score": float(overlap)}
                for left, right, overlap in zip(found.left, found.right, found.overlaps, strict=True)
            ]
        )
        for found in similarity_tasks(english)
    }
    if data:
        others = [name for language, name in LANGUAGES.items() if language != "en"]
        languages = {subset: [LANGUAGES["en"]] if subset == "en" else [LANGUAGES["en"], *others] for subset in data}
        task = _task(
            mteb().abstasks.AbsTaskSTS,
            "PackageTagSTS",
            "STS",
            "cosine_spearman",
            languages,
            data,
            "Overlap of the tags of two packages, by their descriptions.",
        )
        task.min_score, task.max_score = 0, 1
        yield task


def _task(
    base: type, name: str, kind: str, main_score: str, languages: dict[str, list[str]] | None, data: Any, description: str
) -> Task:
    """Returns a task that holds its data; `languages` by subset, None = English without subsets.

    The hash of the data is their revision, so that results of other data are not taken for these.
    """
    metadata = mteb().TaskMetadata(
        dataset={"path": "bundled", "revision": _digest(data)},
        name=name,
        description=description,
        type=kind,
        category="t2c" if kind in ("Classification", "Clustering") else "t2t",
        eval_splits=[SPLIT],
        eval_langs=languages or [LANGUAGES["en"]],
        main_score=main_score,
    )
    task = type(name, (base,), {"metadata": metadata})()
    task.dataset, task.data_loaded = data, True
    return task


def _rows(rows: list[dict[str, Any]], **others: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list(content) for split, content in ({SPLIT: rows} | others).items()})


def _digest(data: Any) -> str:
    digest = hashlib.sha256()

    def add(content: Any) -> None:
        if isinstance(content, dict):
            for name, each in content.items():
                digest.update(str(name).encode())
                add(each)
        else:
            digest.update(repr(content if not hasattr(content, "to_list") else content.to_list()).encode())

    add(data)
    return digest.hexdigest()[:16]


def _sample(packages: list[Package]) -> list[Package]:
    """At most `MOST_PACKAGES` of the packages, in their order."""
    chosen = np.random.default_rng(SEED).permutation(len(packages))[:MOST_PACKAGES]
    return [packages[index] for index in sorted(chosen)]


def _languages(packages: Sequence[Package]) -> list[str]:
    """Languages of the packages: English, then those of most packages first."""
    counts: dict[str, int] = {}
    for package in packages:
        for language in package.text:
            counts[language] = counts.get(language, 0) + 1
    if unknown := sorted(counts.keys() - LANGUAGES.keys()):
        raise ValueError(f"the corpus has languages {unknown}; known are {sorted(LANGUAGES)}")
    return sorted(counts, key=lambda language: (language != "en", -counts[language], language))


def _unique(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))
