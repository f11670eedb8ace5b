"""The ASGI application: routes, keys, limits, and every error as JSON."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from embedge.runtime.server.api import Api
from embedge.runtime.server.errors import ApiError, fault, overloaded
from embedge.runtime.server.hosts import check_local
from embedge.runtime.server.keys import Keys
from embedge.runtime.server.limits import Limits
from embedge.runtime.server.metrics import Metrics
from embedge.runtime.server.models import Models, ServedModel
from embedge.runtime.server.queue import Queue

__all__ = ["Service"]

_JSON = "application/json"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_GONE = 499  # nginx' status for a client that went away; nobody reads it
_DRAIN_SECONDS = 0.05
_PIECE_BYTES = 256 << 10  # of an answer, of which the connection holds one at a time
_CODES = {404: "not_found", 405: "method_not_allowed"}

log = logging.getLogger("embedge.server")

Endpoint = Callable[[bytes | bytearray], Awaitable[bytes]]


class Service:
    """Some models, and the application that serves them.

    Args:
        models: what is served.
        limits: of what is taken at once.
        keys: that requests have to carry.
        local: refuse requests that were sent to a name which is not this machine's own.

    Attributes:
        stopping: refuses new work; what is under way goes on.
    """

    def __init__(
        self,
        models: Models,
        *,
        limits: Limits | None = None,
        keys: Keys | None = None,
        local: bool = False,
    ) -> None:
        self.stopping = False
        self._models = models
        self._limits = limits or Limits()
        self._keys = keys or Keys(())
        self._local = local
        self._metrics = Metrics()
        self._queue = Queue(self._limits.max_queued_tokens, self._metrics.ran)
        self._metrics.watch(self._queue)
        self._api = Api(models, self._queue, self._limits)
        self._requests = self._held_bytes = 0
        self._reloading = asyncio.Lock()
        api = self._api
        rerank = self._posted(api.rerank)
        self._posts = {
            "/v1/embeddings": self._posted(api.embeddings),
            "/v1/rerank": rerank,
            "/rerank": rerank,
        }
        self._others = Starlette(
            routes=[
                *(Route(path, posted, methods=["POST"]) for path, posted in self._posts.items()),
                Route("/v1/models", self._asked(self._list), methods=["GET"]),
                Route("/v1/models/{name:path}", self._asked(self._one), methods=["GET"]),
                Route("/metrics", self._asked(self._show_metrics), methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/ready", self._ready, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _of_http, Exception: _of_bug},
            lifespan=self._lifespan,
        )
        self._others.router.redirect_slashes = False  # to an address of the client's making

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application. What is posted, of which there is much, passes Starlette by."""
        if scope["type"] == "http" and scope["method"] == "POST":
            posted = self._posts.get(scope["path"])
            if posted is not None:
                await posted(scope, receive, send)
                return
        await self._others(scope, receive, send)

    async def reload(self) -> None:
        """Opens bundles that changed; requests go on with what was there until it is open."""
        async with self._reloading:
            loop = asyncio.get_running_loop()
            replaced = await loop.run_in_executor(None, self._models.reload)
            self._metrics.reloaded(len(replaced))
            for model in replaced:
                await self._close(model)

    async def _close(self, model: ServedModel) -> None:
        """Closes a model's graphs once nothing runs on it any more."""
        while model.users or self._queue.holds(model):
            await asyncio.sleep(_DRAIN_SECONDS)
        await asyncio.get_running_loop().run_in_executor(None, model.embedder.close)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.stopping = True
        await self._queue.close()
        self._api.close()
        self._models.close()

    # -- endpoints -----------------------------------------------------------------------------------

    def _list(self, _: Request) -> Response:
        return Response(self._api.models(), media_type=_JSON)

    def _one(self, request: Request) -> Response:
        return Response(self._api.model(request.path_params["name"]), media_type=_JSON)

    def _show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=_TEXT)

    async def _health(self, _: Request) -> Response:
        """Whether the process answers at all."""
        return Response(b'{"status":"ok"}', media_type=_JSON)

    async def _ready(self, _: Request) -> Response:
        """Whether new requests are welcome."""
        if self.stopping:
            return Response(b'{"status":"stopping"}', 503, media_type=_JSON)
        return Response(b'{"status":"ready"}', media_type=_JSON)

    # -- what all have in common ---------------------------------------------------------------------

    def _asked(self, answer: Callable[[Request], Response]) -> Callable[..., Awaitable[Response]]:
        """An endpoint that takes no body."""

        async def endpoint(request: Request) -> Response:
            try:
                self._check_access(request)
                return answer(request)
            except ApiError as error:
                return _response(error)

        return endpoint

    def _posted(self, answer: Endpoint) -> _Posted:
        """An endpoint that takes JSON, within the limits."""

        async def serve(request: Request, send: Send) -> None:
            start = time.perf_counter()
            held = _Held()
            self._requests += 1
            try:
                response = await self._answered(request, answer, held)
                seconds = time.perf_counter() - start
                self._metrics.answered(request.scope["path"], response.status_code, seconds)
                await self._send(response, send)
            finally:
                self._requests -= 1
                self._hold(held, 0)

        return _Posted(serve)

    async def _answered(self, request: Request, answer: Endpoint, held: _Held) -> Response:
        try:
            self._admit(request)
            async with asyncio.timeout(self._limits.timeout):
                body = await self._body(request, held)
                content = await self._unless_gone(request, answer(body))
            self._hold(held, len(content))
            return Response(content, media_type=_JSON)
        except ApiError as error:
            return _response(error)
        except TimeoutError:
            message = f"no answer within {self._limits.timeout} s; send less at once, or try again"
            return _response(ApiError(503, message, kind="server_error", code="timeout"))
        except ClientDisconnect:
            self._metrics.client_gone()
            return Response(status_code=_GONE)
        except Exception as error:
            return _response(fault(error))

    async def _send(self, response: Response, send: Send) -> None:
        """Sends a response in pieces, so that a client which does not read them holds no more than one.

        The connection of a client that has not taken all of it in time is closed.
        """
        start = {"type": "http.response.start", "status": response.status_code}
        body = memoryview(response.body)
        try:
            async with asyncio.timeout(self._limits.timeout):
                await send({**start, "headers": response.raw_headers})
                for at in range(0, max(1, len(body)), _PIECE_BYTES):
                    piece, end = bytes(body[at : at + _PIECE_BYTES]), at + _PIECE_BYTES
                    message = {"type": "http.response.body", "body": piece}
                    await send({**message, "more_body": end < len(body)})
        except TimeoutError:
            self._metrics.client_gone()

    def _hold(self, held: _Held, count: int) -> None:
        """Counts what is held for a request: its body, then its answer, then nothing."""
        self._held_bytes += count - held.bytes
        held.bytes = count

    def _check_access(self, request: Request) -> None:
        if self._local:
            check_local(request.headers.get("host"))
        self._keys.check(request.headers.get("authorization"))

    def _admit(self, request: Request) -> None:
        """Refuses a request before its body is read."""
        self._check_access(request)
        if self.stopping:
            raise ApiError(
                503, "the server is stopping; try another", kind="server_error", code="stopping"
            )
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _JSON:
            # With another type a page of any site could send requests from its reader's machine.
            raise ApiError(
                415, f"expected the header Content-Type: {_JSON}, found {kind[:80] or 'none'}"
            )
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.max_body:
            raise self._too_large()
        if self._requests > self._limits.max_requests:
            raise overloaded(f"{self._limits.max_requests} requests are under way", self._seconds())

    async def _body(self, request: Request, held: _Held) -> bytearray:
        """The request's body, whose bytes are counted as held."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._limits.max_body:
                raise self._too_large()
            if self._held_bytes + len(chunk) > self._limits.max_held and self._requests > 1:
                raise overloaded("the bodies of other requests fill the memory", self._seconds())
            self._hold(held, len(body))
        return body

    async def _unless_gone(self, request: Request, answer: Awaitable[bytes]) -> bytes:
        """An answer, which is given up when the client goes away.

        Raises:
            ClientDisconnect: it did.
        """
        task = asyncio.current_task()
        assert task is not None
        gone = asyncio.ensure_future(_cancelled_when_gone(task, request))
        try:
            return await answer
        except asyncio.CancelledError:
            if gone.done() and not gone.cancelled() and task.uncancel() == 0:
                raise ClientDisconnect from None
            raise
        finally:
            gone.cancel()

    def _too_large(self) -> ApiError:
        most = self._limits.max_body
        return ApiError(413, f"expected a body of at most {most} bytes; send several requests")

    def _seconds(self) -> int:
        return max(self._queue.seconds(model) for model in self._models)


@dataclass
class _Held:
    """What is held for a request, in bytes."""

    bytes: int = 0


class _Posted:
    """An endpoint that sends its response itself, as Starlette takes it."""

    def __init__(self, serve: Callable[[Request, Send], Awaitable[None]]) -> None:
        self._serve = serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(Request(scope, receive), send)


async def _cancelled_when_gone(task: asyncio.Task[Any], request: Request) -> None:
    """Cancels the work on a request when its client went away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _response(error: ApiError) -> Response:
    return Response(
        orjson.dumps(error.document()), error.status, headers=error.headers, media_type=_JSON
    )


async def _of_http(request: Request, error: Exception) -> Response:
    """What Starlette refuses: an unknown path, another method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    message = {
        404: f"no path {path[:80]}; there are /v1/embeddings, /v1/rerank, /v1/models, /health, /ready, /metrics",
        405: f"{path[:80]} does not take {method}",
    }.get(error.status_code, error.detail)
    answer = ApiError(
        error.status_code, message, code=_CODES.get(error.status_code), headers=error.headers
    )
    return _response(answer)


async def _of_bug(_: Request, error: Exception) -> Response:
    return _response(fault(error))
