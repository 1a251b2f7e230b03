"""Records of the bundled corpus: what its packages are as texts, pairs, scored pairs and labels.

`CORPUS_RECORDS` names them; `tfds_datasets.py` writes them as datasets.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from .corpus import Package, tag_overlap, title_and_body
from .records import LabelledText, Pair, PlainText, Record, ScoredPair


def plain_texts(packages: Sequence[Package]) -> Iterator[PlainText]:
    """Yields title and body of each description, as one text."""
    for package in packages:
        for language in package.text:
            yield PlainText(text=title_and_body(package, language), language=language)


def title_body_pairs(packages: Sequence[Package]) -> Iterator[Pair]:
    """Yields pairs of a title and its body, in one language."""
    for package in packages:
        for language, text in package.text.items():
            yield Pair(anchor=text.title, positive=text.body, language=language, group=package.source)


def translation_pairs(packages: Sequence[Package]) -> Iterator[Pair]:
    """Yields two pairs for each language other than English.

    They are the foreign title with the English body, and the English title with the foreign body.
    """
    for package in packages:
        for language, text in package.text.items():
            if language != "en":
                english = package.text["en"]
                yield Pair(anchor=text.title, positive=english.body, language=language, group=package.source)
                yield Pair(anchor=english.title, positive=text.body, language=language, group=package.source)


def search_pairs(packages: Sequence[Package]) -> Iterator[Pair]:
    """Yields the pairs that retrieval is measured on.

    They are the English body with the title in English, and with the title in one of the package's
    languages, which are taken in turn.
    """
    for number, package in enumerate(packages):
        languages = sorted(package.text)
        for language in dict.fromkeys(("en", languages[number % len(languages)])):
            title, body = package.text[language].title, package.text["en"].body
            yield Pair(anchor=title, positive=body, language=language, group=package.source)


def tag_overlaps(packages: Sequence[Package], per_package: int = 4) -> Iterator[ScoredPair]:
    """Yields two descriptions in one language, scored by the overlap of their packages' tags.

    The score is the Jaccard overlap. Half of the pairs share a section.
    """
    rng = random.Random(0)
    tagged = [package for package in packages if package.tags]
    by_section = defaultdict(list)
    for package in tagged:
        by_section[package.section].append(package)
    for package in tagged:
        for number in range(per_package):
            other = rng.choice(tagged if number % 2 else by_section[package.section])
            languages = sorted(package.text.keys() & other.text.keys())
            if other.source == package.source or not languages:
                continue
            language = rng.choice(languages)
            yield ScoredPair(
                sentence1=title_and_body(package, language),
                sentence2=title_and_body(other, language),
                score=tag_overlap(package, other),
                language=language,
            )


def section_labels(packages: Sequence[Package]) -> Iterator[LabelledText]:
    """Yields each description with its package's section as the label."""
    for package in packages:
        for language in package.text:
            yield LabelledText(
                text=title_and_body(package, language), label=package.section, language=language, group=package.source
            )


CORPUS_RECORDS: dict[str, tuple[str, Callable[[Sequence[Package]], Iterable[Record]]]] = {
    "texts": ("text", plain_texts),
    "pairs": ("pair", title_body_pairs),
    "translations": ("pair", translation_pairs),
    "searches": ("pair", search_pairs),
    "scored": ("scored_pair", tag_overlaps),
    "labelled": ("labelled_text", section_labels),
}
"""Record kind and generator function of each configuration of the bundled corpus."""
