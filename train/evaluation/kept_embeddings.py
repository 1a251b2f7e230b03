"""Embeddings that are kept in a file as they are made, so that no text is embedded twice."""

import contextlib
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from jina_jax import Embedder

TEXTS_PER_CALL = 256
"""Texts of one call of `Embedder.encode`, after which their embeddings are kept."""

_TABLE = """
CREATE TABLE IF NOT EXISTS embeddings (
    adapter TEXT, prompt TEXT, text TEXT, embedding BLOB, PRIMARY KEY (adapter, prompt, text)
) WITHOUT ROWID
"""


class Side(NamedTuple):
    """Texts, and what embeds them."""

    texts: Sequence[str]
    adapter: str | None
    """None = the base."""
    prompt: str | None = None
    """Text put before each input; None = the adapter's instruction, nothing for the base."""


class KeptEmbeddings:
    """Embeddings of a base and of adapters above it, by adapter, prompt and text."""

    def __init__(self, file: Path, embedder_of: Callable[[str | None], Embedder], max_length: int):
        """Opens the file, or makes it.

        Args:
            file: made by this class, with the same model and limit. Whoever opens it makes sure.
            embedder_of: returns the embedder of an adapter, or of the base. It is called only for
                texts that are not in the file.
            max_length: as in `Embedder.encode`.
        """
        self._file, self._embedder_of, self._max_length = file, embedder_of, max_length

    def add(self, sides: Iterable[Side], title: str, *, progress: bool) -> None:
        """Embeds all texts that are not in the file yet, those of the base first.

        Raises:
            NotFiniteError: an embedding is not finite.
        """
        wanted: dict[tuple[str | None, str | None], dict[str, None]] = {}
        for texts, adapter, prompt in sides:
            wanted.setdefault((adapter, prompt), {}).update(dict.fromkeys(texts))
        missing = {key: self._missing(list(texts), *key) for key, texts in wanted.items()}
        with tqdm(total=sum(map(len, missing.values())), desc=title, unit="text", disable=not progress) as bar:
            for (adapter, prompt), texts in sorted(missing.items(), key=lambda item: item[0][0] is not None):
                for start in range(0, len(texts), TEXTS_PER_CALL):
                    block = texts[start : start + TEXTS_PER_CALL]
                    self._keep(block, adapter, prompt)
                    bar.update(len(block))

    def get(self, side: Side) -> Float[np.ndarray, "n d"]:
        """Returns the embeddings of texts that were added, in full dimension."""
        found = self._found(side.texts, side.adapter, side.prompt)
        return np.stack([np.frombuffer(found[text], np.float32) for text in side.texts])

    def _missing(self, texts: list[str], adapter: str | None, prompt: str | None) -> list[str]:
        found = self._found(texts, adapter, prompt)
        return [text for text in texts if text not in found]

    def _keep(self, texts: list[str], adapter: str | None, prompt: str | None) -> None:
        embedder = self._embedder_of(adapter)
        length = min(self._max_length, embedder.max_length)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* and were cut$")  # the limit is there for that
            embeddings = embedder.encode(
                texts, adapter, prompt=prompt, batch_size=TEXTS_PER_CALL, max_length=length, show_progress_bar=False
            )
        rows = [(*_key(adapter, prompt), text, embedding.tobytes()) for text, embedding in zip(texts, embeddings, strict=True)]
        with self._open() as database:
            database.executemany("INSERT INTO embeddings VALUES (?, ?, ?, ?)", rows)

    def _found(self, texts: Sequence[str], adapter: str | None, prompt: str | None) -> dict[str, bytes]:
        with self._open() as database:
            rows = database.execute(
                "SELECT text, embedding FROM embeddings WHERE adapter = ? AND prompt = ?", _key(adapter, prompt)
            )
            wanted = set(texts)
            return {text: embedding for text, embedding in rows if text in wanted}

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are there all together or not at all."""
        with contextlib.closing(sqlite3.connect(self._file)) as database, database:
            database.execute(_TABLE)
            yield database


def _key(adapter: str | None, prompt: str | None) -> tuple[str, str]:
    """Key of an adapter and prompt. No adapter has an empty name, and no text a NUL before it."""
    return adapter or "", "\0" if prompt is None else prompt
