"""How requests become batches: joined, shared fairly, refused, given up, and kept apart when one fails."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from embedge.runtime import Embedder
from tests.helpers.serving import Client, Http, error_of, served, vectors_in
from tests.runtime.conftest import TinyBundle

Runs = list[list[int]]  # of each batch, the numbers of its texts


class Gate:
    """Holds the first batch until it is opened, and writes down which texts each batch has."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.started = threading.Event()
        self.runs: Runs = []
        self.one_thread: list[bool] = []
        self.most = self._inside = 0  # batches at the same time
        self.fails: Callable[[Sequence[Any]], bool] = lambda items: False

    def run(
        self, original: Callable[..., Any], kind: Any, items: Sequence[Any], one_thread: bool
    ) -> Any:
        self.runs.append([int(item.ids[1]) - 4 for item in items])
        self.one_thread.append(one_thread)
        self._inside += 1
        self.most = max(self.most, self._inside)
        self.started.set()
        try:
            assert self.opened.wait(30)
            if self.fails(items):
                raise MemoryError("no room")
            return original(kind, items, one_thread)
        finally:
            self._inside -= 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    from embedge.runtime.server import queue

    gate = Gate()
    original = queue.Kind.run
    monkeypatch.setattr(queue.Kind, "run", lambda *call: gate.run(original, *call))
    yield gate
    gate.opened.set()


@pytest.fixture
def small(tasks_bundle: TinyBundle) -> Iterator[Client]:
    """A server that holds 100 tokens."""
    with served(str(tasks_bundle.path), max_queued_tokens=100) as client:
        yield client


def asks(http: Http, texts: Sequence[str], task: str = "code") -> asyncio.Task[Any]:
    body = {"model": f"bundle:{task}", "input": list(texts)}
    return asyncio.ensure_future(http.post("/v1/embeddings", json=body))


async def settled(done: Callable[[], bool]) -> None:
    """Waits until something is so."""
    for _ in range(2000):
        if done():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that")


def holds(client: Client, tokens: int) -> bool:
    return held(client) == tokens


def held(client: Client) -> int:
    return client.service._queue.tokens


Message = dict[str, Any]


async def called(
    client: Client, texts: list[str], send: Callable[[Message], Any], closed: asyncio.Event
) -> None:
    """Calls the application as a server does."""
    body = json.dumps({"model": "bundle:code", "input": texts}).encode()
    sent = [{"type": "http.request", "body": body, "more_body": False}]
    scope: Message = {"type": "http", "method": "POST", "path": "/v1/embeddings"}
    scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b""}
    scope |= {"root_path": "", "http_version": "1.1", "scheme": "http"}

    async def receive() -> Message:
        if sent:
            return sent.pop()
        await closed.wait()
        return {"type": "http.disconnect"}

    await client.service.app(scope, receive, send)  # type: ignore[arg-type]


def test_what_came_while_a_batch_ran_is_the_next_batch(client: Client, gate: Gate) -> None:
    async def scenario(http: Http) -> list[Any]:
        first = asks(http, ["w0"])
        await settled(gate.started.is_set)
        others = [asks(http, [f"w{number}"]) for number in (1, 2, 3)]
        await settled(lambda: held(client) == 12)
        gate.opened.set()
        return await asyncio.gather(first, *others)

    for response in client.run(scenario):
        vectors_in(response)
    assert gate.runs == [[0], [1, 2, 3]]
    assert held(client) == 0


@pytest.fixture
def little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedge.runtime.server import queue

    monkeypatch.setattr(queue, "_MOST_PADDING", 4)


@pytest.mark.usefixtures("little_padding")
@pytest.mark.parametrize(
    ("device", "runs"),
    [
        ("cpu", [[1, 3, 5], [2, 4], [6]]),  # first the length of who came first
        ("cuda:0", [[1, 3, 5, 6, 4, 2]]),
    ],
)
def test_a_batch_has_texts_of_about_one_length(
    client: Client, gate: Gate, monkeypatch: pytest.MonkeyPatch, device: str, runs: Runs
) -> None:
    monkeypatch.setattr(Embedder, "device", device)
    texts = ["w1 " * 10, "w2", "w3 " * 9, "w4 w4", "w5 " * 11, "w6 " * 6]

    async def scenario(http: Http) -> list[Any]:
        waiting = [asks(http, ["w0"])]
        await settled(gate.started.is_set)
        for text in texts:
            before = held(client)
            waiting.append(asks(http, [text]))
            await settled(partial(lambda before: held(client) > before, before))
        gate.opened.set()
        return await asyncio.gather(*waiting)

    answers = client.run(scenario)
    assert gate.runs == [[0], *runs]
    for response, text in zip(answers, ["w0", *texts], strict=True):
        alone = client.embed(text, "bundle:code")
        np.testing.assert_allclose(vectors_in(response), vectors_in(alone), atol=1e-6)


@pytest.mark.usefixtures("little_padding")
def test_lengths_of_one_request_are_kept_apart_and_answered_in_order(
    client: Client, gate: Gate
) -> None:
    gate.opened.set()
    texts = ["w1", "w2 " * 12, "w3", "w4 " * 11, "w5 w5"]
    found = vectors_in(client.embed(texts, "bundle:code"))
    assert gate.runs == [[4, 2], [1, 3, 5]]
    for vector, text in zip(found, texts, strict=True):
        [alone] = vectors_in(client.embed(text, "bundle:code"))
        np.testing.assert_allclose(vector, alone, atol=1e-6)


@pytest.fixture
def little_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short texts that wait are enough for a batch that is made ahead."""
    from embedge.runtime.server import queue

    monkeypatch.setattr(queue, "_AHEAD_TOKENS", 6)


async def is_ahead(client: Client, http: Http) -> list[asyncio.Task[Any]]:
    """Requests, the first of which runs while two are in a batch made ahead, and a last one waits."""
    queue, waiting = client.service._queue, [asks(http, ["w0"])]
    await settled(lambda: len(queue._running) == 1)
    waiting += [asks(http, [f"w{number}"]) for number in (1, 2)]
    await settled(lambda: len(queue._ahead) == 1)
    waiting.append(asks(http, ["w3"]))
    await settled(lambda: held(client) == 12)
    return waiting


@pytest.mark.usefixtures("little_goes_ahead")
def test_a_thread_goes_on_without_the_loop(client: Client, gate: Gate) -> None:
    async def scenario(http: Http) -> list[Any]:
        waiting = await is_ahead(client, http)
        gate.opened.set()
        deadline = time.monotonic() + 30
        while len(gate.runs) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)  # in the loop's own thread
        assert gate.runs == [[0], [1, 2]]
        return await asyncio.gather(*waiting)

    for response in client.run(scenario):
        vectors_in(response)
    assert gate.runs == [[0], [1, 2], [3]]
    assert held(client) == 0


@pytest.mark.usefixtures("little_goes_ahead")
def test_faults_and_farewells_in_a_batch_that_was_made_ahead(client: Client, gate: Gate) -> None:
    gate.fails = lambda items: any(int(item.ids[1]) == 4 + 2 for item in items)

    async def scenario(http: Http) -> list[Any]:
        waiting = await is_ahead(client, http)
        gone = waiting.pop()
        gone.cancel()
        await settled(lambda: held(client) == 9)
        gate.opened.set()
        return await asyncio.gather(*waiting)

    zero, one, two = client.run(scenario)
    assert gate.runs == [[0], [1, 2], [1], [2]]
    for response in (zero, one):
        vectors_in(response)
    error_of(two, 500)
    assert held(client) == 0


@pytest.mark.usefixtures("little_goes_ahead")
def test_a_batch_that_was_made_ahead_and_given_up_does_not_run(client: Client, gate: Gate) -> None:
    async def scenario(http: Http) -> list[Any]:
        first, one, two, last = await is_ahead(client, http)
        one.cancel()
        await settled(one.done)
        assert held(client) == 12  # the other one still waits for it
        two.cancel()
        await settled(lambda: held(client) == 6)
        gate.opened.set()
        return list(await asyncio.gather(first, last))

    for response in client.run(scenario):
        vectors_in(response)
    assert gate.runs == [[0], [3]]
    assert held(client) == 0


def test_what_could_not_start_makes_room_when_it_is_given_up(
    client: Client, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedge.runtime.server.queue import Kind

    monkeypatch.setattr(Kind, "at_once", property(lambda kind: 1 + (kind.task == "code")))
    client.service._queue._company = 1.0  # requests found others lately

    async def scenario(http: Http) -> list[Any]:
        first = asks(http, ["w0"])
        await settled(gate.started.is_set)
        gone = asks(http, ["w1"], "retrieval")
        await settled(lambda: held(client) == 6)
        last = asks(http, ["w2"])
        await settled(lambda: held(client) == 9)
        assert gate.runs == [[0]]
        gone.cancel()
        await settled(lambda: gate.runs == [[0], [2]])
        gate.opened.set()
        return list(await asyncio.gather(first, last))

    for response in client.run(scenario):
        vectors_in(response)
    assert held(client) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("little_goes_ahead", "little_padding", "two_cores")
def test_threads_and_the_loop_lose_nothing_whenever_they_switch(tasks_bundle: TinyBundle) -> None:
    texts = [" ".join(f"w{(i * 7 + k) % 50}" for k in range(1 + i % 12)) for i in range(400)]
    expected = {
        task: Embedder(tasks_bundle.path, task=task).encode(texts) for task in ("code", "retrieval")
    }
    interval = sys.getswitchinterval()
    with served(str(tasks_bundle.path)) as client:

        async def scenario(http: Http) -> list[Any]:
            asked = [
                asks(http, [text], ("code", "retrieval")[i % 2]) for i, text in enumerate(texts)
            ]
            await settled(lambda: held(client) > 0)
            for task in asked[5::20]:
                task.cancel()
            return await asyncio.gather(*asked, return_exceptions=True)

        try:
            sys.setswitchinterval(1e-6)
            answers = client.run(scenario)
        finally:
            sys.setswitchinterval(interval)
        for i, answer in enumerate(answers):
            if isinstance(answer, asyncio.CancelledError):
                assert i % 20 == 5
                continue
            vector = expected[("code", "retrieval")[i % 2]][i]
            np.testing.assert_allclose(vectors_in(answer)[0], vector, atol=1e-6)
        queue = client.service._queue
        assert (held(client), queue._waiting_tokens, queue._under_way) == (0, 0, 0)


@pytest.mark.usefixtures("little_goes_ahead")
def test_what_was_made_ahead_runs_before_the_end(tasks_bundle: TinyBundle, gate: Gate) -> None:
    with served(str(tasks_bundle.path)) as client:

        async def scenario(http: Http) -> list[Any]:
            waiting = await is_ahead(client, http)
            closing = asyncio.ensure_future(client.service._queue.close())
            await asyncio.sleep(0)
            gate.opened.set()
            await closing
            return await asyncio.gather(*waiting)

        *answered, last = client.run(scenario)
    for response in answered:
        vectors_in(response)
    error_of(last, 503)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches run at the same time, two of them."""
    from embedge.runtime.server.queue import Kind

    monkeypatch.setattr(Kind, "at_once", 2)


@pytest.mark.usefixtures("two_cores")
def test_each_core_has_a_batch_of_its_own(client: Client, gate: Gate) -> None:
    async def scenario(http: Http) -> list[Any]:
        waiting = [asks(http, ["w0", "w1", "w2", "w3"])]  # shared by both
        await settled(lambda: len(gate.runs) == 2)
        for number in (4, 5, 6):
            waiting.append(asks(http, [f"w{number}"]))
            await settled(partial(holds, client, 3 * (number + 1)))
        assert len(gate.runs) == 2
        gate.opened.set()
        return await asyncio.gather(*waiting)

    assert [len(vectors_in(response)) for response in client.run(scenario)] == [4, 1, 1, 1]
    assert sorted(gate.runs[:2]) == [[0, 1], [2, 3]]
    assert sorted(number for run in gate.runs for number in run) == list(range(7))
    assert gate.one_thread == [True] * len(gate.runs)
    assert held(client) == 0


@pytest.mark.usefixtures("two_cores")
def test_a_text_takes_all_cores_where_requests_come_one_at_a_time(
    tasks_bundle: TinyBundle, gate: Gate
) -> None:
    gate.opened.set()
    with served(str(tasks_bundle.path)) as client:

        async def one_by_one(http: Http, count: int) -> None:
            for _ in range(count):
                vectors_in(await asks(http, ["w1"]))

        client.run(lambda http: one_by_one(http, 2))
        assert gate.one_thread == [False, False]
        client.run(lambda http: asyncio.gather(*(asks(http, ["w1"]) for _ in range(8))))
        gate.one_thread.clear()
        client.run(lambda http: one_by_one(http, 100))  # they were many a moment ago
        assert gate.one_thread[0] and not gate.one_thread[-1]


@pytest.mark.usefixtures("two_cores")
def test_who_takes_all_cores_has_them_alone(
    client: Client, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedge.runtime.server.queue import Kind

    monkeypatch.setattr(Kind, "at_once", property(lambda kind: 1 + (kind.task == "code")))
    client.service._queue._company = 1.0  # requests found others lately

    async def scenario(http: Http) -> None:
        waiting = [asks(http, ["w0"] * 2)]
        await settled(lambda: len(gate.runs) == 2)
        waiting.append(asks(http, ["w1", "w2"], "retrieval"))
        await settled(lambda: held(client) == 12)
        waiting.append(asks(http, ["w3"]))
        await settled(lambda: held(client) == 15)
        gate.opened.set()
        await asyncio.gather(*waiting)

    client.run(scenario)
    assert gate.runs == [[0], [0], [1, 2], [3]]
    assert gate.one_thread == [True, True, False, True]
    assert gate.most == 2 and held(client) == 0


def test_tasks_take_turns(client: Client, gate: Gate) -> None:
    async def scenario(http: Http) -> None:
        waiting = [asks(http, ["w0"])]
        await settled(gate.started.is_set)
        for number, task in enumerate(("code", "retrieval", "code"), 1):
            waiting.append(asks(http, [f"w{number}"], task))
            await settled(partial(holds, client, 3 * (number + 1)))
        gate.opened.set()
        await asyncio.gather(*waiting)

    client.run(scenario)
    assert gate.runs == [[0], [1, 3], [2]]


def test_a_text_does_not_wait_for_a_requests_hundreds(
    client: Client, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedge.runtime.server.queue import Queue

    monkeypatch.setattr(Queue, "_budget", staticmethod(lambda kind, all_cores: 30))  # of 10 texts

    async def scenario(http: Http) -> None:
        first = asks(http, ["w0"])
        await settled(gate.started.is_set)
        many = asks(http, [f"w{number}" for number in range(1, 21)])
        await settled(lambda: held(client) == 63)
        one = asks(http, ["w50"])
        await settled(lambda: held(client) == 66)
        gate.opened.set()
        await one
        assert not many.done()
        await asyncio.gather(first, many)

    client.run(scenario)
    assert gate.runs[1] == [*range(1, 10), 50]  # the rest of its share goes to who came first
    assert sorted(number for run in gate.runs for number in run) == [*range(21), 50]


def test_a_full_queue_is_429(small: Client, gate: Gate) -> None:
    async def scenario(http: Http) -> tuple[Any, Any, Any]:
        large = asks(http, ["w1"] * 33)  # 99 tokens
        await settled(gate.started.is_set)
        refused = await asks(http, ["w2"])
        gate.opened.set()
        return await large, refused, await asks(http, ["w2"])

    large, refused, later = small.run(scenario)
    error = error_of(refused, 429)
    assert error["message"].startswith("99 tokens wait and 3 more would pass the 100")
    assert error["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (len(vectors_in(large)), len(vectors_in(later))) == (33, 1)


def test_a_request_that_is_larger_than_the_queue_fits_when_nothing_waits(small: Client) -> None:
    assert len(vectors_in(small.embed(["w1"] * 50, "bundle:code"))) == 50


def test_a_client_that_goes_away_gives_its_texts_up(client: Client, gate: Gate) -> None:
    async def scenario(http: Http) -> Any:
        first = asks(http, ["w0"])
        await settled(gate.started.is_set)
        gone, stays = asks(http, ["w1"] * 30), asks(http, ["w2"])
        await settled(lambda: held(client) == 96)
        gone.cancel()
        await settled(lambda: held(client) == 6)
        gate.opened.set()
        return await asyncio.gather(first, stays)

    for response in client.run(scenario):
        vectors_in(response)
    assert gate.runs == [[0], [2]]


def test_a_connection_that_closes_is_told_by_asgi(client: Client, gate: Gate) -> None:
    closed = asyncio.Event()

    async def send(message: Message) -> None:
        pass

    async def scenario(http: Http) -> str:
        first = asks(http, ["w0"])
        await settled(gate.started.is_set)
        gone = asyncio.ensure_future(called(client, ["w1"] * 30, send, closed))
        await settled(lambda: held(client) == 93)
        closed.set()
        await gone
        await settled(lambda: held(client) == 3)
        gate.opened.set()
        vectors_in(await first)
        return (await http.get("/metrics")).text

    assert "embedge_clients_gone_total 1.0" in client.run(scenario).splitlines()
    assert gate.runs == [[0]]


def test_what_is_given_up_before_it_is_read_is_not_kept(
    tasks_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedge.runtime.server import api

    parsed, goes_on, reading = api._parsed, threading.Event(), list[int]()

    def slow(body: bytes | bytearray) -> Any:
        reading.append(len(body))
        assert goes_on.wait(30)
        return parsed(body)

    monkeypatch.setattr(api, "_parsed", slow)
    texts = ["w1 " * 5] * 6000

    async def send(message: Message) -> None:
        pass

    async def scenario(http: Http) -> Any:
        closed = asyncio.Event()
        gone = [asyncio.ensure_future(called(client, texts, send, closed)) for _ in range(6)]
        await settled(lambda: len(reading) == 2 and client.service._requests == 6)
        waiting = client.service._api._helpers._work_queue.qsize()
        closed.set()
        await asyncio.gather(*gone)
        assert waiting == client.service._requests == client.service._held_bytes == 0
        later = asks(http, texts[:1])
        goes_on.set()
        assert len(vectors_in(await asks(http, texts[:2000]))) == 2000
        return await later

    try:
        with served(str(tasks_bundle.path)) as client:
            vectors_in(client.run(scenario))
    finally:
        goes_on.set()
    assert len(reading) == 4  # two that nobody waited for any more, then those that stayed


def test_one_requests_fault_is_not_anothers(client: Client, gate: Gate) -> None:
    gate.fails = lambda items: any(int(item.ids[1]) == 4 + 7 for item in items)

    async def scenario(http: Http) -> list[Any]:
        first = asks(http, ["w0"])
        await settled(gate.started.is_set)
        others = [asks(http, ["w1"]), asks(http, ["w7"]), asks(http, ["w2"])]
        await settled(lambda: held(client) == 12)
        gate.opened.set()
        return await asyncio.gather(first, *others)

    zero, one, seven, two = client.run(scenario)
    assert gate.runs == [[0], [1, 7, 2], [1], [7], [2]]
    for response in (zero, one, two):
        vectors_in(response)
    error = error_of(seven, 500)
    assert error["type"] == "server_error"
    assert error["message"].startswith("the server failed (MemoryError), and its log says why")
    assert held(client) == 0


def test_a_batch_that_failed_does_not_run_again_for_who_has_gone(
    client: Client, gate: Gate
) -> None:
    inside, goes_on = threading.Event(), threading.Event()

    def fails(items: Sequence[Any]) -> bool:
        if len(items) == 1:
            return False
        inside.set()
        return goes_on.wait(30)

    gate.fails = fails

    async def scenario(http: Http) -> list[Any]:
        first = asks(http, ["w0"])
        await settled(gate.started.is_set)
        one, gone, three = [asks(http, [f"w{number}"]) for number in (1, 2, 3)]
        await settled(lambda: held(client) == 12)
        gate.opened.set()
        await settled(inside.is_set)
        gone.cancel()
        await settled(gone.done)
        goes_on.set()
        return list(await asyncio.gather(first, one, three))

    for response in client.run(scenario):
        vectors_in(response)
    assert gate.runs == [[0], [1, 2, 3], [1], [3]]
    assert held(client) == 0


@pytest.mark.usefixtures("two_cores")
def test_speed_is_measured_on_one_core_and_on_all(tasks_bundle: TinyBundle, gate: Gate) -> None:
    from embedge.runtime.server.queue import _FEWEST_TOKENS, Kind, Queue

    gate.opened.set()
    with served(str(tasks_bundle.path)) as client:
        [model] = client.service._models
        kind = Kind(model, "code")
        model.calls_at_once = {"code": 2}
        vectors_in(client.embed("w1", "bundle:code"))
        assert list(model.rates) == [(False, True)]
        gate.opened.clear()

        async def two_at_once(http: Http) -> Any:
            asked = asks(http, ["w1", "w2"])
            await settled(lambda: len(gate.runs) == 3)
            gate.opened.set()
            return await asked

        vectors_in(client.run(two_at_once))
        assert gate.one_thread == [False, True, True]
        assert list(model.rates) == [(False, True), (False, False)]
        queue = client.service._queue
        queue.tokens = 24_000
        model.rates = {(False, True): 15_000.0}
        assert queue.seconds(model) == 2
        model.rates[False, False] = 6_000.0  # two such batches at once make 12,000
        assert queue.seconds(model) == 2
        model.rates[False, False] = 4_000.0
        assert queue.seconds(model) == 3
        model.rates[True, True] = 2_000.0  # images may be what waits
        assert queue.seconds(model) == 12
        budgets = [Queue._budget(kind, all_cores) for all_cores in (True, False)]
        assert budgets == [1500, _FEWEST_TOKENS]


def test_what_failed_tells_nothing_of_speed(tasks_bundle: TinyBundle, gate: Gate) -> None:
    gate.opened.set()
    gate.fails = lambda items: True
    with served(str(tasks_bundle.path)) as client:
        error_of(client.embed(["w1", "w2"], "bundle:code"), 500)
        [model] = client.service._models
        assert model.rates == {}
        assert "embedge_tokens_total{" not in client.get("/metrics").text
        gate.fails = lambda items: False
        vectors_in(client.embed("w1", "bundle:code"))
        assert [images for images, _ in model.rates] == [False]


def test_a_fault_is_told_to_the_log_alone(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from embedge.runtime.errors import BundleError
    from embedge.runtime.server.queue import Kind

    def run(kind: Kind, items: Sequence[Any], one_thread: bool) -> Any:
        raise BundleError("/secret/bundle: truncated")

    monkeypatch.setattr(Kind, "run", run)
    error = error_of(client.embed("w1", "bundle:code"), 500)
    assert "BundleError" in error["message"] and "secret" not in error["message"]
    assert "/secret/bundle: truncated" in caplog.text


def test_what_nobody_foresaw_is_counted(
    tasks_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from embedge.runtime.server import api

    with served(str(tasks_bundle.path)) as client:
        monkeypatch.setattr(api, "_encoded", lambda *_: 1 / 0)
        error_of(client.embed("w1", "bundle:code"), 500)
        counted = 'embedge_requests_total{path="/v1/embeddings",status="500"} 1.0'
        assert counted in client.get("/metrics").text
    assert "ZeroDivisionError" in caplog.text


def test_an_answer_is_held_until_its_client_has_read_it(tasks_bundle: TinyBundle) -> None:
    texts = [f"w{number % 60}" for number in range(2000)]
    pieces: list[bytes] = []
    with served(str(tasks_bundle.path)) as client:
        service = client.service

        async def scenario(http: Http) -> None:
            reads = asyncio.Event()

            async def send(message: Message) -> None:
                if message["type"] == "http.response.body":
                    pieces.append(message["body"])
                    await reads.wait()

            asked = asyncio.ensure_future(called(client, texts, send, asyncio.Event()))
            await settled(lambda: bool(pieces))
            assert service._requests == 1
            assert service._held_bytes > len(pieces[0])
            reads.set()
            await asked
            assert service._requests == service._held_bytes == 0

        client.run(scenario)
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 256 << 10
    assert len(json.loads(b"".join(pieces))["data"]) == 2000


@pytest.mark.slow  # a second is the shortest limit
def test_an_answer_that_is_not_read_in_time_is_dropped(tasks_bundle: TinyBundle) -> None:
    with served(str(tasks_bundle.path), timeout=1) as client:

        async def scenario(http: Http) -> None:
            async def send(message: Message) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.Event().wait()

            await called(client, ["w1"], send, asyncio.Event())

        client.run(scenario)
        assert client.service._requests == client.service._held_bytes == 0


@pytest.mark.slow  # a second is the shortest limit
def test_a_request_without_an_answer_in_time(tasks_bundle: TinyBundle, gate: Gate) -> None:
    with served(str(tasks_bundle.path), timeout=1) as client:

        async def scenario(http: Http) -> Any:
            response = await asks(http, ["w0"])
            gate.opened.set()
            await settled(lambda: held(client) == 0)
            return response

        error = error_of(client.run(scenario), 503)
    assert (error["code"], error["type"]) == ("timeout", "server_error")


def test_a_server_that_stops_refuses_new_work(tasks_bundle: TinyBundle, gate: Gate) -> None:
    with served(str(tasks_bundle.path)) as client:

        async def scenario(http: Http) -> tuple[Any, Any, Any]:
            under_way = asks(http, ["w0"])
            await settled(gate.started.is_set)
            client.service.stopping = True
            refused = await asks(http, ["w1"])
            ready = await http.get("/ready")
            gate.opened.set()
            return await under_way, refused, ready

        under_way, refused, ready = client.run(scenario)
    assert len(vectors_in(under_way)) == 1
    assert error_of(refused, 503)["code"] == "stopping"
    assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
