"""Errors of this project. All are ValueErrors; their messages name the input and what would be valid."""


class JinaJaxError(ValueError):
    """Base of every error that this project raises for what it was given."""


class ConfigError(JinaJaxError):
    """A configuration that is contradictory or asks for what is not built; the message names the field."""


class CheckpointError(JinaJaxError):
    """A checkpoint that is damaged, incomplete, ambiguous or of an unknown kind; the message says which and where."""


class DataError(JinaJaxError):
    """A file of texts, records or packages that is not what it should be; the message names file and line."""


class RunError(JinaJaxError):
    """A run that cannot start or continue: a directory of another run, or a loss that is not finite."""
