"""Errors as clients get them: ``{"error": {"message", "type", "param", "code"}}`` with a status, as OpenAI has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from embedge.runtime.arguments import in_options
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError

__all__ = ["ApiError", "fault", "invalid", "of_error", "overloaded", "shown"]

# Fields of a request by the arguments of the library that its messages name.
_FIELDS = {"truncate_dim": "dimensions", "multi_vector": "multi_vector", "on_truncate": "truncate"}
_SHOWN_CHARACTERS = 80

log = logging.getLogger("embedge.server")


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


def shown(value: str) -> str:
    """A client's text as messages have it: quoted, and not longer than a name is."""
    cut = len(value) > _SHOWN_CHARACTERS
    return repr(f"{value[: _SHOWN_CHARACTERS - 1]}…" if cut else value)


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


def fault(error: BaseException) -> ApiError:
    """A fault of the server: the log has all of it, the client its kind, as messages name files."""
    kind = type(error).__name__
    trace = None if isinstance(error, EmbedgeError) else error  # ours say what is wrong themselves
    log.error("%s: %s", kind, error, exc_info=trace)
    message = f"the server failed ({kind}), and its log says why; its operator has to see to it"
    return ApiError(500, message, kind="server_error")


def of_error(error: Exception, param: str | None = None) -> ApiError:
    """What the library says, in the request's words.

    Args:
        error: an argument that cannot be used (:class:`~embedge.runtime.errors.EmbedgeValueError`) is the client's,
            anything else a fault of the server.
        param: the field, where the error does not tell.
    """
    if not isinstance(error, EmbedgeValueError):
        return fault(error)
    names = [argument.partition("=")[0] for argument in error.arguments]
    message = in_options(str(error), error.arguments, _FIELDS)
    return invalid(message, next((_FIELDS.get(n, n) for n in names), param))
