"""What a server gives under load: ``python -m embedge.bench.studies.serve_load BUNDLE --precision int8``.

A server is started, and asked by clients of this process, each with a connection of its own. The parts:

* *throughput*: every client asks for one short text after the other. In the same rounds the same texts go through one
  ``encode``, on the same cores; what is shown is the ratio of the medians. ``--beside URL MODEL`` asks another server
  in the same rounds, at the address of its embeddings, for the same texts.
* *half load*: requests come at random, at half of that throughput: the median and the 95th percentile.
* *mixed*: for ``--minutes``, requests of one text, of lists and of long texts, for every task; the server's memory by
  half minutes, their medians.
* *full queue*: many large requests at once to a server that holds few tokens: some are answered by 429.

Each vector is compared with the library's, from which its last bit may differ with the rows of its batch. The
clients' own time on the cores is part of what is measured; its share is shown. The last line is the same as one JSON
document.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from numpy.typing import NDArray

from embedge.bench.errors import BenchError
from embedge.bench.studies.bulk import short_texts
from embedge.runtime import Embedder, EmbedgeError

__all__ = ["Load", "main", "measure"]

_LONG_WORDS = 120
_LIST_TEXTS = (2, 8, 32)
_FULL_REQUESTS, _FULL_TEXTS, _FULL_TOKENS = 60, 200, 8000
_MEMORY_EVERY = 1.0
_LAST_BITS = 1e-6

Vectors = NDArray[np.float32]


@dataclass(kw_only=True)
class Load:
    """What was measured.

    Attributes:
        clients: that asked at the same time.
        bulk_rate: texts a second of one ``encode``, the median of the rounds.
        server_rate: texts a second of the clients.
        ratio: of the second to the first.
        beside_rate: texts a second of another server, asked by the same clients; 0 without one.
        bulk_cpu_ms, server_cpu_ms, client_cpu_ms: a text's time on the cores, in threads' milliseconds, of one
            ``encode``, of the server, and of the clients. They hold where other processes are on the cores, too.
        client_share: of all cores' time that the clients took in the rounds of the server.
        batch_texts: of a batch of the server, the mean.
        half_median, half_p95: seconds of an answer at half load.
        mixed_requests: that were answered in the mixed part.
        minute_mb: resident memory in the second half minute of it, the median.
        later_mb: likewise of the half minute that had the most.
        peak_mb: the most at any time.
        refused: requests that a full queue refused.
        kept: requests that it answered.
        largest_difference: of any component from the library's.
        wrong: answers whose vectors are not the library's.
        lost: requests without an answer.
    """

    clients: int
    bulk_rate: float = 0.0
    server_rate: float = 0.0
    ratio: float = 0.0
    beside_rate: float = 0.0
    bulk_cpu_ms: float = 0.0
    server_cpu_ms: float = 0.0
    client_cpu_ms: float = 0.0
    client_share: float = 0.0
    batch_texts: float = 0.0
    half_median: float = 0.0
    half_p95: float = 0.0
    mixed_requests: int = 0
    minute_mb: float = 0.0
    later_mb: float = 0.0
    peak_mb: float = 0.0
    refused: int = 0
    kept: int = 0
    largest_difference: float = 0.0
    wrong: int = 0
    lost: int = 0


@dataclass
class _Answer:
    """A request's answer: its status, its body, and the seconds that it took."""

    status: int
    body: bytes
    seconds: float
    retry_after: str | None = None

    def vectors(self) -> Vectors:
        data = json.loads(self.body)["data"]
        return np.stack([np.frombuffer(base64.b64decode(o["embedding"]), "<f4") for o in data])


@dataclass
class _Connection:
    """A connection that is kept, with as little work as HTTP takes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    path: str = "/v1/embeddings"
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, body: bytes) -> _Answer:
        async with self.busy:
            start = time.perf_counter()
            self.writer.write(
                b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (self.path.encode(), len(body), body)
            )
            head = await self.reader.readuntil(b"\r\n\r\n")
            status = int(head[9:12])
            headers = dict(
                line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:] if line
            )
            content = await self.reader.readexactly(int(headers["content-length"]))
            seconds = time.perf_counter() - start
        return _Answer(status, content, seconds, headers.get("retry-after"))


@dataclass
class _Beside:
    """Another server: the address of its embeddings, and what it calls the model."""

    url: str
    model: str

    async def seconds(self, texts: Sequence[str], clients: int) -> float:
        """For texts that each have a request of their own.

        Raises:
            BenchError: the address is not of this machine, or one of them was not answered.
        """
        address = urlsplit(self.url)
        if address.scheme != "http" or address.hostname not in ("127.0.0.1", "localhost"):
            raise BenchError(f"expected http://127.0.0.1:PORT/PATH, found {self.url}")
        bodies = [json.dumps({"model": self.model, "input": [text]}).encode() for text in texts]
        try:
            async with _connected(address.port or 80, clients, address.path) as connections:
                start = time.perf_counter()
                answers = await _all_asked(connections, bodies)
                seconds = time.perf_counter() - start
        except (OSError, asyncio.IncompleteReadError) as error:
            raise BenchError(f"{self.url} does not answer: {error}") from error
        for answer in answers:
            if answer.status != 200:
                raise BenchError(f"{self.url} answered {answer.status}: {answer.body[:200]!r}")
        return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="embedge.bench.studies.serve_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", help="may be left out where the bundle has exactly one")
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--texts", type=int, default=6000, metavar="N", help="of a round")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="of the mixed part")
    parser.add_argument(
        "--beside",
        nargs=2,
        metavar=("URL", "MODEL"),
        help="another server's embeddings, and its name of a model",
    )
    options = parser.parse_args(arguments)
    for name in ("clients", "texts", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, found {getattr(options, name)}")
    try:
        load = measure(
            options.bundle,
            precision=options.precision,
            clients=options.clients,
            count=options.texts,
            rounds=options.rounds,
            minutes=options.minutes,
            beside=_Beside(*options.beside) if options.beside else None,
        )
    except EmbedgeError as error:
        print(f"embedge.bench.studies.serve_load: {error}", file=sys.stderr)
        return 1
    growth = load.later_mb / load.minute_mb - 1 if load.minute_mb else 0.0
    if load.beside_rate:
        print(
            f"{options.beside[1]}: {load.beside_rate:.0f} texts/s, {load.server_rate / load.beside_rate:.2f} times that"
        )
    print(
        f"{load.clients} clients: {load.server_rate:.0f} texts/s, one encode {load.bulk_rate:.0f}: "
        f"{load.ratio:.2f} (the clients took {load.client_share:.0%} of the cores)\n"
        f"on the cores a text takes {load.bulk_cpu_ms:.2f} ms in one encode, {load.server_cpu_ms:.2f} ms in the "
        f"server, in batches of {load.batch_texts:.0f}, and {load.client_cpu_ms:.2f} ms in the client\n"
        f"half load: median {load.half_median * 1e3:.1f} ms, p95 {load.half_p95 * 1e3:.1f} ms: "
        f"{load.half_p95 / load.half_median:.2f} times\n"
        f"mixed: {load.mixed_requests} requests, {load.minute_mb:.0f} MB in the second half minute, "
        f"{load.later_mb:.0f} MB in the highest: {growth:+.1%}; at most {load.peak_mb:.0f} MB\n"
        f"full queue: {load.refused} refused by 429, {load.kept} answered\n"
        f"wrong {load.wrong}, lost {load.lost}, largest difference {load.largest_difference:.1e}"
    )
    print(json.dumps(asdict(load)))
    return int(load.wrong > 0 or load.lost > 0)


def measure(
    bundle: Path,
    *,
    precision: str | None,
    clients: int,
    count: int,
    rounds: int,
    minutes: float,
    beside: _Beside | None = None,
) -> Load:
    """Runs all parts.

    Args:
        bundle: to serve.
        precision: one of its precisions; ``None``: its only one.
        clients: that ask at the same time.
        count: texts of a round.
        rounds: of the throughput.
        minutes: of the mixed part.
        beside: another server, for the throughput.
    """
    load = Load(clients=clients)
    texts = short_texts(count)
    with Embedder(bundle, precision=precision) as model:
        task = model.tasks[0]
        expected = _encoded(model, texts, task)
        with _server(bundle, model.precision) as (port, process):
            asyncio.run(_throughput(load, port, process, model, texts, expected, rounds, beside))
            asyncio.run(_half_load(load, port, task, texts, expected))
            asyncio.run(_mixed(load, port, process, model, texts, minutes))
        few = ("--max-queued-tokens", str(_FULL_TOKENS))
        with _server(bundle, model.precision, *few) as (port, _):
            asyncio.run(_full(load, port, task, texts, expected))
    return load


def _encoded(model: Embedder, texts: Sequence[str], task: str) -> Vectors:
    return model.encode(list(texts), task=task, on_truncate="ignore")


@contextmanager
def _server(bundle: Path, precision: str, *options: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server of a bundle, called ``served``: its port and its process."""
    command = [sys.executable, "-m", "embedge", "serve", f"served={bundle}", "--port", "0"]
    with subprocess.Popen(
        [*command, "--precision", precision, *options], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            yield int(said.rpartition(":")[2]), psutil.Process(process.pid)
        finally:
            process.terminate()


@asynccontextmanager
async def _connected(
    port: int, count: int, path: str = "/v1/embeddings"
) -> AsyncIterator[list[_Connection]]:
    connections = [
        _Connection(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 26), path)
        for _ in range(count)
    ]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.writer.close()


async def _all_asked(connections: Sequence[_Connection], bodies: Sequence[bytes]) -> list[_Answer]:
    """The answers to some bodies, for which each connection asks when it has its last answer."""
    answers: dict[int, _Answer] = {}
    numbers = iter(range(len(bodies)))

    async def client(connection: _Connection) -> None:
        for number in numbers:
            answers[number] = await connection.ask(bodies[number])

    await asyncio.gather(*map(client, connections))
    return [answers[number] for number in range(len(bodies))]


def _body(task: str, texts: Sequence[str]) -> bytes:
    fields = {"model": f"served:{task}", "input": list(texts), "encoding_format": "base64"}
    return json.dumps(fields | {"truncate": True}).encode()


def _compare(load: Load, answer: _Answer, expected: Vectors) -> None:
    """Counts an answer that is none, or has other vectors."""
    if answer.status != 200:
        load.lost += 1
        return
    difference = float(np.abs(answer.vectors() - expected).max())
    load.largest_difference = max(load.largest_difference, difference)
    load.wrong += not difference <= _LAST_BITS


async def _throughput(
    load: Load,
    port: int,
    process: psutil.Process,
    model: Embedder,
    texts: Sequence[str],
    expected: Vectors,
    rounds: int,
    beside: _Beside | None,
) -> None:
    """Rounds of one ``encode``, of many clients, and of those at another server, in turn."""
    task = model.tasks[0]
    bodies = [_body(task, [text]) for text in texts]
    bulk, served, others = [], [], []
    on_cores: list[tuple[float, float, float]] = []
    async with _connected(port, load.clients) as connections:
        for _ in range(rounds + 1):
            start, own = time.perf_counter(), time.process_time()
            _encoded(model, texts, task)
            bulk.append(time.perf_counter() - start)
            of_bulk = time.process_time() - own
            of_server, batches = _seconds_on_cores(process), await _batches(port)
            start, own = time.perf_counter(), time.process_time()
            answers = await _all_asked(connections, bodies)
            served.append(time.perf_counter() - start)
            of_clients = time.process_time() - own
            on_cores.append((of_bulk, _seconds_on_cores(process) - of_server, of_clients))
            batches = await _batches(port) - batches
            for answer, vector in zip(answers, expected, strict=True):
                _compare(load, answer, vector[None])
            if beside is not None:
                others.append(await beside.seconds(texts, load.clients))
    # The first round opens what the others find open.
    load.bulk_rate = len(texts) / float(np.median(bulk[1:]))
    load.server_rate = len(texts) / float(np.median(served[1:]))
    load.ratio = load.server_rate / load.bulk_rate
    if others:
        load.beside_rate = len(texts) / float(np.median(others[1:]))
    milliseconds = np.median(on_cores[1:], axis=0) / len(texts) * 1e3
    load.bulk_cpu_ms, load.server_cpu_ms, load.client_cpu_ms = map(float, milliseconds)
    cores = len(os.sched_getaffinity(process.pid))
    load.client_share = load.client_cpu_ms * load.server_rate / 1e3 / cores
    load.batch_texts = len(texts) / batches


def _seconds_on_cores(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _batches(port: int) -> int:
    """How many the server has run."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    [line] = (line for line in text.splitlines() if line.startswith("embedge_batch_tokens_count"))
    return int(float(line.split()[-1]))


async def _half_load(
    load: Load, port: int, task: str, texts: Sequence[str], expected: Vectors
) -> None:
    """Requests at random moments, half as many as the server can answer."""
    generator = np.random.default_rng(0)
    moments = np.cumsum(generator.exponential(2 / load.server_rate, len(texts)))
    answers: list[_Answer] = []
    async with _connected(port, load.clients) as connections:
        free = asyncio.Queue[_Connection]()
        for connection in connections:
            free.put_nowait(connection)
        start = time.perf_counter()

        async def request(number: int) -> None:
            connection = await free.get()
            answer = await connection.ask(_body(task, [texts[number]]))
            free.put_nowait(connection)
            _compare(load, answer, expected[number][None])
            answers.append(answer)

        async with asyncio.TaskGroup() as group:
            for number, moment in enumerate(moments):
                await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
                group.create_task(request(number))
    seconds = [answer.seconds for answer in answers]
    load.half_median, load.half_p95 = map(float, np.percentile(seconds, [50, 95]))


async def _mixed(
    load: Load,
    port: int,
    process: psutil.Process,
    model: Embedder,
    texts: Sequence[str],
    minutes: float,
) -> None:
    """Requests of all sizes and tasks, with the server's memory beside them."""
    words = " ".join(texts).split()
    starts = range(0, min(len(words) - _LONG_WORDS, 200 * _LONG_WORDS), _LONG_WORDS)
    long = [" ".join(words[start : start + _LONG_WORDS]) for start in starts]
    known = {
        task: (_encoded(model, texts, task), _encoded(model, long, task)) for task in model.tasks
    }
    end = time.perf_counter() + 60 * minutes
    memory: list[tuple[float, float]] = []

    async def client(connection: _Connection, seed: int) -> None:
        generator = np.random.default_rng(seed)
        while time.perf_counter() < end:
            task = model.tasks[int(generator.integers(len(model.tasks)))]
            is_long = bool(generator.random() < 0.1)
            pool, vectors = (long, known[task][1]) if is_long else (texts, known[task][0])
            size = int(generator.choice(_LIST_TEXTS)) if generator.random() < 0.3 else 1
            chosen = generator.integers(len(pool), size=size)
            answer = await connection.ask(_body(task, [pool[i] for i in chosen]))
            _compare(load, answer, vectors[chosen])
            load.mixed_requests += 1

    async def watch() -> None:
        start = time.perf_counter()
        while time.perf_counter() < end:
            memory.append((time.perf_counter() - start, process.memory_info().rss / 1e6))
            await asyncio.sleep(_MEMORY_EVERY)

    async with _connected(port, load.clients) as connections:
        clients = (client(connection, seed) for seed, connection in enumerate(connections))
        await asyncio.gather(watch(), *clients)
    by_half_minute: dict[int, list[float]] = defaultdict(list)
    for seconds, mb in memory:
        by_half_minute[int(seconds // 30)].append(mb)
    medians = [statistics.median(sizes) for sizes in by_half_minute.values()]
    _, *later = (
        medians if len(medians) > 1 else 2 * medians
    )  # the first has all that a server begins with
    load.minute_mb, load.later_mb = later[0], max(later)
    load.peak_mb = max(mb for _, mb in memory)


async def _full(load: Load, port: int, task: str, texts: Sequence[str], expected: Vectors) -> None:
    """More at once than a server holds."""
    sizes = [(i * 37 % max(1, len(texts) - _FULL_TEXTS)) for i in range(_FULL_REQUESTS)]
    async with _connected(port, len(sizes)) as connections:
        asked = [
            connection.ask(_body(task, texts[start : start + _FULL_TEXTS]))
            for start, connection in zip(sizes, connections, strict=True)
        ]
        for start, answer in zip(sizes, await asyncio.gather(*asked), strict=True):
            if answer.status == 429 and answer.retry_after is not None:
                load.refused += 1
                continue
            load.kept += 1
            _compare(load, answer, expected[start : start + _FULL_TEXTS])


if __name__ == "__main__":
    sys.exit(main())
