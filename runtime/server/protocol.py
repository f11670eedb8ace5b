"""HTTP as uvicorn speaks it, with bounds of what a client may send without saying anything, and leave unread.

The head and the body of an answer, which uvicorn writes apart, go out together: one system call, one packet.

uvicorn bounds neither the bytes of a request's head (its line, its headers, what stands between parts of a body) nor
the time that it takes, and waits for ever for a client that does not read its answer.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedProtocol"]

_HEAD_BYTES = 64 << 10
_SECONDS = 30.0  # for a head, from its first byte or a connection's begin; for a client to take what is sent
_JOINED_BYTES = 16 << 10  # more are no faster together, and would be out of the transport's sight
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """A connection. Its arguments are uvicorn's."""

    _beside_body = 0  # bytes of the request that comes in, less those of its body
    _between = True  # two requests: the head of the next one has not come
    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Joined(transport, self.loop)))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._was_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._beside_body += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._beside_body > _HEAD_BYTES:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        elif self._between and self._beside_body and self._is_idle():
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._between = False
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        # As much again may stand around it, where it comes in parts.
        self._beside_body = max(-_HEAD_BYTES, self._beside_body - 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._between, self._beside_body = True, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._was_read()
        super().resume_writing()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(_SECONDS, self.transport.abort)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _was_read(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None


class _Joined:
    """A transport whose small writes of one turn of the loop go out together.

    Args:
        transport: has all else.
        loop: of the connection.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if len(data) > _JOINED_BYTES:
            self._parts.append(data)
            self._flush()
            return
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._parts.clear()
        self._transport.abort()

    def _flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._transport.write(data)
