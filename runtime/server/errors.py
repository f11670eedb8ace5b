"""Errors as clients get them: ``{"error": {"message", "type", "param", "code"}}`` with a status, as OpenAI has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedge.runtime.arguments import in_options
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError

__all__ = ["ApiError", "invalid", "of_embedge", "overloaded"]

# Fields of a request by the arguments of the library that its messages name.
_FIELDS = {"truncate_dim": "dimensions", "multi_vector": "multi_vector", "on_truncate": "truncate"}


class ApiError(Exception):
    """What a request is answered with, if not with vectors.

    Args:
        status: of HTTP.
        message: what is wrong, what was expected, what to do.
        kind: OpenAI's ``type``, such as "invalid_request_error".
        param: the field of the request.
        code: such as "model_not_found".
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """The answer's JSON."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(message: str, param: str | None, code: str | None = None) -> ApiError:
    """A request that is wrong in a field."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, seconds: int) -> ApiError:
    """A request that came when there is no room; ``seconds`` until there may be."""
    return ApiError(
        429,
        f"{message}; try again in {seconds} s",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": str(seconds)},
    )


def of_embedge(error: EmbedgeError, param: str | None = None) -> ApiError:
    """What the library refuses, in the request's words.

    Args:
        error: of :class:`~embedge.runtime.errors.EmbedgeError`; an argument that cannot be used is the client's,
            anything else the server's.
        param: the field, where the error does not tell.
    """
    names = [argument.partition("=")[0] for argument in error.arguments]
    message = in_options(str(error), error.arguments, _FIELDS)
    if isinstance(error, EmbedgeValueError):
        return invalid(message, next((_FIELDS.get(n, n) for n in names), param))
    return ApiError(500, message, kind="server_error")
