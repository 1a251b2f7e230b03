"""Errors of this project: ValueErrors whose messages name the input and what would be valid."""

from collections.abc import Iterable
from difflib import get_close_matches


def how_to_install(extra: str) -> str:
    """Command that installs an extra, for messages: the package is not published on an index."""
    return f"pip install -e '.[{extra}]' in a checkout of jina-jax"


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: the nearest ones, "" where none is near.

    A name that differs in case or in blanks around it alone is the only one.
    """
    known = {each.strip().lower(): each for each in names}
    given = name.strip().lower() if isinstance(name, str) else ""
    near = [given] if given in known else get_close_matches(given, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(known[each]) for each in near)}?" if near else ""


class JinaJaxError(ValueError):
    """Base class of every error that this project raises for an invalid input."""


class ConfigError(JinaJaxError):
    """A configuration that is contradictory or asks for something unsupported.

    The message names the field.
    """


class CheckpointError(JinaJaxError):
    """A checkpoint that is damaged, incomplete, ambiguous or of an unknown kind.

    The message says which and where.
    """


class DataError(JinaJaxError):
    """An invalid file of texts, records or packages; the message names file and line."""


class BucketError(JinaJaxError):
    """A bucket that cannot be used: it does not exist, or permission or credentials are lacking.

    The message says which, and of what path.
    """


class NotFiniteError(JinaJaxError):
    """NaN or infinity where a model should give numbers.

    Attributes:
        indices: of the texts of the call that it was given for.
    """

    def __init__(self, message: str, indices: list[int]):
        super().__init__(message)
        self.indices = indices


class RunError(JinaJaxError):
    """A run that cannot start or continue.

    Its directory is of another run, or a loss is not finite.
    """
