"""What a connection takes: heads of some bytes and seconds, and clients that read what they asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("httptools", reason="httptools is not installed: pip install -e '.[dev]'")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[dev]'")

from embedge.runtime.server import protocol  # noqa: E402 - what is missing skips the tests

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\n"


class Wire(asyncio.Transport):
    """A connection's other end, which writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.writes = 0
        self.ended = ""

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        self.sent += bytes(data)
        self.writes += 1

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


Scenario = Callable[[protocol.BoundedProtocol, Wire], Awaitable[None]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of a body."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message["body"]), message["more_body"]
    body = str(length).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def connected(scenario: Scenario) -> Wire:
    """The other end of a connection after a scenario."""
    wire = Wire()

    async def within() -> None:
        config = uvicorn.Config(echo, log_config=None, lifespan="off")
        state = uvicorn.server.ServerState()
        connection = protocol.BoundedProtocol(config, state, {}, asyncio.get_running_loop())
        connection.connection_made(wire)
        await scenario(connection, wire)
        connection.connection_lost(None)

    asyncio.run(within())
    return wire


async def answered(wire: Wire, body: bytes) -> None:
    for _ in range(200):
        if wire.sent.endswith(body):
            return
        await asyncio.sleep(0.001)
    raise AssertionError(wire.sent)


def test_an_answer_goes_out_at_once() -> None:
    async def scenario(connection: protocol.BoundedProtocol, wire: Wire) -> None:
        for count in (1, 2):
            connection.data_received(HEAD + b"content-length: 1\r\n\r\na")
            await answered(wire, b"\r\n\r\n1")
            assert wire.writes == count
            wire.sent = b""

    connected(scenario)


def test_the_last_answer_of_a_connection_is_sent_before_its_end() -> None:
    async def scenario(connection: protocol.BoundedProtocol, wire: Wire) -> None:
        connection.data_received(HEAD + b"connection: close\r\ncontent-length: 1\r\n\r\na")
        await answered(wire, b"\r\n\r\n1")
        assert wire.ended == "closed"

    connected(scenario)


def test_large_writes_do_not_wait() -> None:
    async def scenario() -> None:
        wire = Wire()
        joined = protocol._Joined(wire, asyncio.get_running_loop())
        joined.write(b"head")
        assert wire.sent == b""
        joined.write(b"a" * 20_000)
        assert wire.sent == b"head" + b"a" * 20_000  # so that the transport can say when it is full
        joined.write(b"behind")
        joined.abort()
        await asyncio.sleep(0)
        assert not wire.sent.endswith(b"behind")

    asyncio.run(scenario())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_SECONDS", 0.02)


@pytest.mark.parametrize("header", [b"a: " + b"b" * 40_000, b"a: b\r\n" * 6000])
def test_a_head_that_does_not_end(header: bytes) -> None:
    async def scenario(connection: protocol.BoundedProtocol, wire: Wire) -> None:
        connection.data_received(HEAD)
        connection.data_received(header)
        assert not wire.ended
        connection.data_received(header)

    wire = connected(scenario)
    assert wire.sent.startswith(b"HTTP/1.1 431 ")
    assert wire.ended == "closed"


def test_trailers_that_do_not_end() -> None:
    async def scenario(connection: protocol.BoundedProtocol, wire: Wire) -> None:
        connection.data_received(HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
        for _ in range(3):
            connection.data_received(b"a: " + b"b" * 30_000 + b"\r\n")

    assert connected(scenario).sent.startswith(b"HTTP/1.1 431 ")


def test_bodies_are_no_heads() -> None:
    async def scenario(connection: protocol.BoundedProtocol, wire: Wire) -> None:
        connection.data_received(HEAD + b"content-length: 1000000\r\n\r\n")
        for _ in range(10):
            connection.data_received(b"a" * 100_000)
            await asyncio.sleep(0)
        await answered(wire, b"1000000")
        connection.data_received(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(20_000):
            connection.data_received(b"10\r\n" + b"a" * 16 + b"\r\n")
        connection.data_received(b"0\r\n\r\n")
        await answered(wire, b"320000")
        assert not wire.ended

    assert connected(scenario).sent.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("begun", [b"", b"POST /v1", HEAD])
def test_a_head_that_takes_too_long(begun: bytes) -> None:
    async def scenario(connection: protocol.BoundedProtocol, wire: Wire) -> None:
        for part in (begun, b"x" if begun else b""):
            if part:
                connection.data_received(part)
        await asyncio.sleep(0.06)

    assert connected(scenario).ended == "aborted"


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("begun", [b"\r\n", b"GE"])
def test_the_next_head_of_a_connection_too(begun: bytes) -> None:
    async def scenario(connection: protocol.BoundedProtocol, wire: Wire) -> None:
        connection.data_received(HEAD + b"content-length: 1\r\n\r\na")
        await answered(wire, b"1")
        await asyncio.sleep(0.04)
        assert not wire.ended  # a connection may wait for its next request
        connection.data_received(begun)
        await asyncio.sleep(0.06)

    assert connected(scenario).ended == "aborted"


@pytest.mark.usefixtures("hasty")
def test_a_client_that_does_not_read() -> None:
    async def scenario(connection: protocol.BoundedProtocol, wire: Wire) -> None:
        connection.data_received(HEAD + b"content-length: 1\r\n\r\na")
        connection.pause_writing()
        connection.resume_writing()
        await asyncio.sleep(0.06)
        assert not wire.ended
        connection.pause_writing()
        await asyncio.sleep(0.06)

    assert connected(scenario).ended == "aborted"
