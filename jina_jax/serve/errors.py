"""Errors that a client sees; each schema writes them in its own words."""

from ..errors import JinaJaxError


class ApiError(JinaJaxError):
    """A request that is not answered with embeddings.

    Attributes:
        status: of HTTP.
        param: field of the request that is at fault, such as `input[3]`.
        code: short name of the fault, for programs.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers that tell clients whether to try again: official ones do so after every 5xx."""
        if self.retry_after is not None:
            return {"retry-after": str(self.retry_after)}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """Returns the error of a field; the message begins with the field's name."""
    return ApiError(400, f"{param} {message}", param=param, code=code)
