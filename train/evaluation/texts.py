"""What classification, clustering and similarity share: the text that stands for a package, and the seed of samples."""

from ..data.corpus import Package

SEED = 0


def title_and_body(package: Package, language: str = "en") -> str:
    title, body = package.text[language]
    return f"{title}\n{body}"
