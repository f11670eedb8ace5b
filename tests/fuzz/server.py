"""Sends malformed requests to a real server, and asks it good ones between them.

    python -m tests.fuzz.server BUNDLE --precision int8 --seed 1 --count 10000

A request is a good one that was changed: its JSON, its bytes, its head, or where it ends. Each has to be answered
by something else than a fault of the server, or be cut off, within seconds. Every hundred requests a good one has to
get the library's vector. On the way the bundle is damaged and reloaded, the server is killed and started again, and
all that it says goes to a full disk. In the end it has to stop by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime import Embedder

TEXT = "w1 w2 how do I sort a dict"
SECONDS = 30.0  # for an answer
_EVERY = 100
_LAST_BITS = 1e-6
_ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e300, 2**63, 10**400, "", "\ud800", "\0", "w1 " * 3000, "💥" * 50),
    *([], {}, [[]], [None], [0], [-1], [2**31], [[1, 2], "a"], {"text": "a"}, {"image": "data:,"}),
    *(
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        [[[[[]]]]] * 9,
        "http://a",
    ),
]
_FIELDS = (
    *("model", "input", "task", "input_type", "prompt_name", "prompt", "truncate", "truncation"),
    *("user", "dimensions", "encoding_format", "normalize_embeddings", "multi_vector", "extra"),
    *("query", "documents", "top_n", "return_documents"),
)
_HEADS = (
    *(
        "Content-Length: -1",
        "Content-Length: 99999999999",
        "Content-Length: 5",
        "Host: evil.example",
    ),
    *(
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip",
        "Expect: 100-continue",
        "A: " + "b" * 70000,
    ),
    *("Connection: upgrade\r\nUpgrade: websocket", "Content-Type: text/plain", "A\0: b", ": b"),
)


class Wrong(Exception):
    """The server did what it must not."""


class Server:
    """The process of a server, which is started again after it was killed.

    Args:
        bundle: that it serves as ``served``.
        precision: of it.
    """

    def __init__(self, bundle: Path, precision: str) -> None:
        self._command = [sys.executable, "-m", "embedge", "serve", f"served={bundle}", "--port"]
        self._precision = precision
        self.port = 0
        self.start()

    def start(self) -> None:
        with open("/dev/full", "w") as full:
            self.process = subprocess.Popen(
                [*self._command, str(self.port), "--precision", self._precision],
                stdout=subprocess.PIPE,
                stderr=full,
                text=True,
            )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.start()

    def stop(self) -> None:
        """Ends it by SIGTERM.

        Raises:
            Wrong: if it does not end, or not well.
        """
        self.process.terminate()
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Wrong("it did not stop within 60 s") from None
        if self.process.returncode != 0:
            raise Wrong(f"it ended with {self.process.returncode}")

    def send(self, data: bytes, half: bool = False) -> tuple[int, bytes]:
        """The status and the body that some bytes are answered with; 0: the connection was closed without one.

        Args:
            data: to send.
            half: nothing follows, which the server is told.

        Raises:
            Wrong: if neither comes in time.
        """
        try:
            with socket.create_connection(("127.0.0.1", self.port), SECONDS) as connection:
                connection.sendall(data)
                if half:
                    connection.shutdown(socket.SHUT_WR)
                return _answer(connection)
        except TimeoutError:
            raise Wrong(f"no answer within {SECONDS} s to {data[:300]!r}") from None
        except ConnectionError as error:
            if self.process.poll() is not None:
                raise Wrong(f"it ended with {self.process.returncode}: {data[:300]!r}") from error
            return 0, b""


def _answer(connection: socket.socket) -> tuple[int, bytes]:
    """The first answer that is one: "100 Continue" stands before it."""
    data, status = b"", 100
    while status == 100:
        while b"\r\n\r\n" not in data:
            part = connection.recv(1 << 16)
            if not part:
                return 0, b""
            data += part
        head, _, data = data.partition(b"\r\n\r\n")
        status = int(head.split()[1])
    lines = head.lower().split(b"\r\n")
    length = next((int(n[15:]) for n in lines if n.startswith(b"content-length:")), 0)
    while len(data) < length:
        part = connection.recv(1 << 16)
        if not part:
            break
        data += part
    return status, data


def request(path: str, body: bytes, *heads: str) -> bytes:
    """The bytes of a request; a head in ``heads`` stands in the place of its own of that name."""
    own = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    for head in heads:
        own.pop(head.partition(":")[0], None)
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in own.items()), *heads]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def changed(rng: random.Random, task: str) -> tuple[bytes, bool]:
    """A request that was changed, and whether it is only half of one."""
    path = rng.choice(["/v1/embeddings", "/v1/embeddings", "/v1/rerank"])
    fields: dict[str, Any] = {"model": f"served:{task}"}
    fields |= {"query": "w1", "documents": [TEXT, "w3"]} if "rerank" in path else {"input": TEXT}
    way = rng.randrange(5)
    if way == 0:
        for _ in range(rng.randrange(1, 4)):
            fields[rng.choice(_FIELDS)] = rng.choice(_ODD)
    elif way == 1:
        fields.pop(rng.choice(list(fields)))
    body = json.dumps(fields).encode()
    if way == 2:
        content = bytearray(body)
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        body = bytes(content[: rng.randrange(len(content))] if rng.random() < 0.3 else content)
    heads = [rng.choice(_HEADS)] if way == 3 else []
    data = request(path, body, *heads)
    if way < 3:
        return data, False
    if way == 4:
        content = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        data = bytes(content)
    return data[: rng.randrange(1, len(data) + 1)], True


def check_good(server: Server, task: str, expected: NDArray[np.float32]) -> None:
    """Asks for a vector.

    Raises:
        Wrong: if it is not the library's.
    """
    body = json.dumps({"model": f"served:{task}", "input": TEXT}).encode()
    status, answer = server.send(request("/v1/embeddings", body))
    if status != 200:
        raise Wrong(f"a good request got {status}: {answer[:300]!r}")
    vector = np.array(json.loads(answer)["data"][0]["embedding"], np.float32)
    if not np.abs(vector - expected).max() <= _LAST_BITS:
        raise Wrong(f"a good request got another vector, by {np.abs(vector - expected).max()}")


def damaged(server: Server, manifest: Path) -> None:
    """Has the server reload a bundle whose manifest is cut, and puts it back."""
    content = manifest.read_bytes()
    manifest.write_bytes(content[: len(content) // 2])
    server.process.send_signal(signal.SIGHUP)
    for _ in range(20):  # it is read while these are answered
        server.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    manifest.write_bytes(content)


def fuzz(bundle: Path, *, precision: str, seed: int, count: int) -> Counter[int]:
    """How many requests were answered with each status.

    Args:
        bundle: to serve; a copy of it is damaged.
        precision: one of its precisions.
        seed: of the changes.
        count: requests.

    Raises:
        Wrong: for a fault.
    """
    rng = random.Random(seed)
    statuses = Counter[int]()
    with tempfile.TemporaryDirectory() as folder, Embedder(bundle, precision=precision) as model:
        copy = Path(shutil.copytree(bundle, Path(folder) / "bundle"))
        task = model.tasks[0]
        expected = model.encode(TEXT, task=task)
        server = Server(copy, model.precision)
        events: dict[int, Callable[[], object]] = {
            count // 3: lambda: damaged(server, copy / "manifest.json"),
            2 * count // 3: server.kill,
        }
        try:
            for number in range(count):
                events.get(number, lambda: None)()
                data, half = changed(rng, task)
                status, answer = server.send(data, half)
                if status >= 500:
                    raise Wrong(
                        f"request {number} got {status}: {answer[:300]!r}; it was {data[:600]!r}"
                    )
                statuses[status] += 1
                if number % _EVERY == 0:
                    check_good(server, task, expected)
            check_good(server, task, expected)
            server.stop()
        finally:
            server.process.kill()
            server.process.communicate()
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="tests.fuzz.server")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=10000)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        statuses = fuzz(
            options.bundle, precision=options.precision, seed=options.seed, count=options.count
        )
    except Wrong as error:
        print(f"wrong: {error}", file=sys.stderr)
        return 1
    said = ", ".join(
        f"{count} by {status or 'the end'}" for status, count in sorted(statuses.items())
    )
    print(f"{statuses.total()} requests were answered: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
