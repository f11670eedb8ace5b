"""What a server takes at once, and how long it works on it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from embedge.runtime.arguments import check_positive

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server; each is at least 1.

    Attributes:
        max_body: bytes of a request. Images come in it, as base64. Characters too, with a prompt before each text.
        max_held: bytes of the bodies of all requests at once, and of their answers until they are sent. At most two
            more are read to their end when their clients went away.
        max_inputs: texts and images of a request.
        max_request_tokens: tokens of a request, as the model reads them; an image counts as 1024.
        max_queued_tokens: tokens of all requests that wait or run; a request that comes when nothing waits always
            fits, whatever its tokens.
        max_requests: at once.
        timeout: seconds from a request's arrival to its answer, and as many for the client to take that.

    Raises:
        EmbedgeValueError: for one that is not a whole number of at least 1.
    """

    max_body: int = 16 << 20
    max_held: int = 256 << 20
    max_inputs: int = 2048
    max_request_tokens: int = 300_000
    max_queued_tokens: int = 600_000
    max_requests: int = 1024
    timeout: int = 120

    def __post_init__(self) -> None:
        for field in fields(self):
            check_positive(field.name, getattr(self, field.name))
