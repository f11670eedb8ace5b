"""A process that serves: its socket, its signals, its end.

SIGTERM and SIGINT end it: no new connection is taken, what is under way is answered, within a limit of time; a second
one ends it at once. SIGHUP opens bundles that changed.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from embedge.runtime.bundle.files import system_reason
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError
from embedge.runtime.server.app import Service
from embedge.runtime.server.protocol import BoundedProtocol

__all__ = ["bound", "run", "url_of"]

# Longer than clients keep a connection that they mean to use again, so that they do not find it closed.
_KEEP_ALIVE_SECONDS = 75
_LAST_PORT = 65535


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address, and listens.

    Args:
        host: a name or an address.
        port: 0 for any that is free.

    Raises:
        EmbedgeValueError: for a port that no address has.
        EmbedgeError: if it cannot be bound.
    """
    if not 0 <= port <= _LAST_PORT:
        raise EmbedgeValueError(
            f"port is {port}; expected 0 for any that is free, or a number up to {_LAST_PORT}",
            arguments=["port"],
        )
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = system_reason(error) if isinstance(error, OSError) else str(error)
        raise EmbedgeError(
            f"{host}:{port} cannot be listened at: {reason}; choose another --host or --port"
        ) from error


def url_of(listener: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    service: Service,
    listener: socket.socket,
    *,
    stop_seconds: int,
    started: Callable[[], object] = lambda: None,
) -> None:
    """Serves until a signal ends it.

    Args:
        service: what is served.
        listener: where; closed at the end.
        stop_seconds: that requests under way get at the end.
        started: is called when requests are taken.
    """
    config = uvicorn.Config(
        service.app,
        interface="asgi3",
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on a client's address
        ws="none",
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=stop_seconds,
    )
    _Server(config, service, started).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's, with signals that end it with the exit code 0, and one that opens bundles anew."""

    def __init__(
        self, config: uvicorn.Config, service: Service, started: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._tell = started
        self._reloads: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop(number: int, _: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
                loop.call_soon_threadsafe(self._abort)
            self.should_exit = self._service.stopping = True

        def reload(number: int, _: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._reload)

        handlers = {signal.SIGINT: stop, signal.SIGTERM: stop}
        if hasattr(signal, "SIGHUP"):  # not on Windows
            handlers[signal.SIGHUP] = reload
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _abort(self) -> None:
        """Ends all connections: from Python 3.12 on a server waits for them, whatever it was told."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _reload(self) -> None:
        task = asyncio.ensure_future(self._service.reload())
        self._reloads.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._reloads.discard)
