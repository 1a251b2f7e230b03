"""Options of the server, and the keys that its clients must send."""

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KEYS_VARIABLE = "JINA_JAX_API_KEYS"
"""Environment variable with keys, separated by commas or line ends."""


@dataclass(frozen=True)
class ServeOptions:
    """What bounds a request, and who may send one."""

    names: tuple[str, ...]
    """Names under which the model is listed; a request may give any name."""
    keys: tuple[str, ...] = ()
    """Keys of which a request must have one; none = all are served."""
    default_task: str | None = None
    """Adapter of requests that name no task; None = the base model."""
    max_body: int = 32 * 2**20
    """Bytes of a request."""
    max_texts: int = 2048
    """Texts of a request."""
    max_queued_tokens: int = 300_000
    """Tokens of bulk requests that are not computed yet; queries may take an eighth on top."""
    max_batch_tokens: int | None = None
    """Token slots that a device computes at once, or one row; None = by device."""
    deadline: float = 30.0
    """Seconds in which a request is answered or refused."""
    drain: float = 10.0
    """Seconds from SIGTERM to the end, at most."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server; "*" = all."""

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ValueError("the model needs a name to be served under: --served-model-name")
        for option in ("max_body", "max_texts", "max_queued_tokens", "max_batch_tokens"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option.replace('_', '-')} must be at least 1, not {value}")
        for option in ("deadline", "drain"):
            value = getattr(self, option)
            if not 0 < value < 86_400:
                raise ValueError(f"--{option} must be above 0 seconds and below a day, not {value}")


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the keys of a file, one a line, and of the environment. Never of the command line,
    which all users of a machine see.

    Raises:
        OSError: the file cannot be read.
        ValueError: a key is not printable ASCII without spaces, or the file holds none.
    """
    lines: Sequence[str] = [] if file is None else file.read_text("utf-8").splitlines()
    of_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if file is not None and not of_file:
        raise ValueError(f"{file} holds no key; write one a line")
    of_environment = [key.strip() for key in re.split(r"[,\n]", environment.get(KEYS_VARIABLE, "")) if key.strip()]
    for source, keys in ((str(file), of_file), (KEYS_VARIABLE, of_environment)):
        if wrong := [number for number, key in enumerate(keys, 1) if not re.fullmatch(r"[!-~]+", key)]:
            raise ValueError(f"{source}: key {wrong[0]} is not printable ASCII without spaces")
    return tuple(dict.fromkeys([*of_file, *of_environment]))


def is_allowed(keys: Sequence[str], authorization: str | None) -> bool:
    """Whether a request's Authorization header has one of the keys; each is compared in constant
    time."""
    if not keys:
        return True
    scheme, _, token = (authorization or "").partition(" ")
    sent = token.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
    return any([hmac.compare_digest(key.encode(), sent) for key in keys])
