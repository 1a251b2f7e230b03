"""Errors of this project: ValueErrors whose messages name the input and what would be valid."""


def how_to_install(extra: str) -> str:
    """Command that installs an extra, for messages: the package is not published on an index."""
    return f"pip install -e '.[{extra}]' in a checkout of jina-jax"


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
