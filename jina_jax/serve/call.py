"""A request for embeddings, whatever the schema that it came in."""

from dataclasses import dataclass

from ..config import ModelConfig
from .tasks import Task
from .texts import Limits


@dataclass(frozen=True)
class EmbedCall:
    """What a request asks for.

    Attributes:
        texts: without instructions.
        task: what they are embedded with.
        limits: tokens of a text, and what becomes of a longer one.
        dim: leading dimensions to keep.
        normalized: scale embeddings to length 1.
        states: token states in place of embeddings.
        late_chunking: the texts are the chunks of one document, in order.
    """

    texts: list[str]
    task: Task
    limits: Limits
    dim: int
    normalized: bool = True
    states: bool = False
    late_chunking: bool = False


@dataclass(frozen=True)
class ServedModel:
    """What schemas need to know of the model and of the server.

    Attributes:
        names: that it is listed under.
        default_task: task of requests that name none.
        dim: width of embeddings where a request does not say.
        max_length: tokens of a text.
        max_texts: texts of a request.
        max_queued_tokens, max_batch_tokens: see `ServeOptions`.
        dtype: of the computation.
        created: when it was loaded, in seconds since 1970.
    """

    config: ModelConfig
    names: tuple[str, ...]
    default_task: str | None
    dim: int
    max_length: int
    max_texts: int
    max_queued_tokens: int
    max_batch_tokens: int
    dtype: str
    created: int
