"""What waits to be embedded: inputs of all requests, joined into batches by tokens, run one batch after the other.

Rules:
    * A batch is of one model, task and form of vectors, whatever its requests' prompts: they are among the tokens.
    * Nothing waits for company. What came while a batch ran is the next batch.
    * A batch holds about as many tokens as the model takes ``_RUN_SECONDS`` for, as measured of texts and of images.
      Each request has the same share of it, so that a text does not wait for another request's thousands; what is left
      goes by age. Kinds of batches take turns.
    * A batch of several requests that fails runs again request by request: one's fault is not another's.
    * A request that is given up leaves the queue, and no tokens of it are counted any more.

Everything but the run itself belongs to the event loop's thread, so there are no locks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from embedge.runtime.encode.vectors import Vectors
from embedge.runtime.server.errors import ApiError, overloaded
from embedge.runtime.server.models import ServedModel

__all__ = ["Batch", "FailedItems", "Inputs", "Kind", "Queue"]

_RUN_SECONDS = 0.1
_FEWEST_TOKENS, _MOST_TOKENS = 512, 16384  # of a batch; a single input may have more
_FIRST_TOKENS = 2048  # of a batch before anything was measured
_NEWEST = 0.2  # weight of the last run in the rate
_LONGEST_RETRY = 60


@dataclass(frozen=True)
class Kind:
    """Inputs that can run together.

    Attributes:
        model: that embeds them.
        task: of its bundle.
        images: files of images, not tokens of texts.
        dim: length of the vectors; ``None``: the bundle's.
        normalize: L2-normalize in any case.
        multi_vector: a vector a token.
    """

    model: ServedModel
    task: str
    images: bool = False
    dim: int | None = None
    normalize: bool = False
    multi_vector: bool = False

    def run(self, items: Sequence[Any]) -> Sequence[Vectors]:
        """The vectors of some inputs: float32 ``[dim]`` each, or ``[tokens, dim]``."""
        embedder = self.model.embedder
        encode: Callable[..., Any] = embedder.encode if self.images else embedder.encode_tokens
        vectors: Sequence[Vectors] = encode(
            items,
            task=self.task,
            truncate_dim=self.dim,
            normalize_embeddings=self.normalize,
            multi_vector=self.multi_vector,
        )
        return vectors


class FailedItems(Exception):
    """Inputs of a request that could not be embedded.

    Args:
        error: why, naming the inputs by their place in ``indices``.
        indices: of the inputs that ran together, among those of their kind in the request.
        kind: of them.
    """

    def __init__(self, error: Exception, indices: Sequence[int], kind: Kind) -> None:
        super().__init__(str(error))
        self.error = error
        self.kind = kind
        self.indices = list(indices)


@dataclass(frozen=True)
class Batch:
    """What ran together, as it is reported.

    Attributes:
        kind: of all its inputs.
        inputs: how many.
        requests: of how many requests.
        tokens: of all.
        seconds: that it took.
    """

    kind: Kind
    inputs: int
    requests: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Inputs:
    """What a request has of one kind.

    Attributes:
        kind: of all of them.
        items: ``TokenIds``, or the bytes of images' files.
        costs: tokens of each.
    """

    kind: Kind
    items: Sequence[Any]
    costs: Sequence[int]


class _Job:
    """The inputs of a request that are of one kind, and what has come of them."""

    def __init__(self, inputs: Inputs) -> None:
        self.kind = inputs.kind
        self.items = items = inputs.items
        self.costs = inputs.costs
        self.taken = 0
        self.left = len(items)
        self.results: list[Any] = [None] * len(items)
        self.done: asyncio.Future[list[Vectors]] = asyncio.get_running_loop().create_future()

    def take(self, tokens: int) -> range:
        """The next inputs, of at most so many tokens; one at least."""
        start, stop, total = self.taken, self.taken + 1, self.costs[self.taken]
        while stop < len(self.items) and total + self.costs[stop] <= tokens:
            total += self.costs[stop]
            stop += 1
        self.taken = stop
        return range(start, stop)

    def store(self, indices: Sequence[int], vectors: Sequence[Vectors]) -> None:
        for index, vector in zip(indices, vectors, strict=True):
            self.results[index] = vector
        self.left -= len(indices)
        if self.left == 0 and not self.done.done():
            self.done.set_result(self.results)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


Part = tuple[_Job, range]


class Queue:
    """Runs what is submitted, in a thread of its own, until it is closed.

    Args:
        most_tokens: that wait or run at once.
        report: is told of each batch.
    """

    def __init__(
        self, most_tokens: int, report: Callable[[Batch], object] = lambda batch: None
    ) -> None:
        self._most_tokens = most_tokens
        self._report = report
        self._waiting: OrderedDict[Kind, deque[_Job]] = OrderedDict()
        self._running: Kind | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedge-run")
        self._loop: asyncio.Task[None] | None = None
        self.tokens = 0

    async def submit(self, *parts: Inputs) -> list[list[Vectors]]:
        """The vectors of each part of a request; whoever awaits it and is cancelled gives the rest of them up.

        Args:
            parts: of one request, for all of which there has to be room at once.

        Raises:
            ApiError: 429, if there is none.
            FailedItems: if they cannot be embedded.
        """
        total = sum(sum(part.costs) for part in parts)
        self._check_room(parts[0].kind.model, total)
        jobs = [_Job(part) for part in parts]
        self.tokens += total
        for job in jobs:
            self._waiting.setdefault(job.kind, deque()).append(job)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.ensure_future(self._run())
        try:
            if len(jobs) == 1:  # most often; gathering takes another turn of the loop
                return [await jobs[0].done]
            return list(await asyncio.gather(*(job.done for job in jobs)))
        finally:
            for job in jobs:
                self._forget(job)

    def _check_room(self, model: ServedModel, tokens: int) -> None:
        """Refuses tokens that there is no room for.

        Raises:
            ApiError: 429, with the seconds until there may be.
        """
        if self.tokens and self.tokens + tokens > self._most_tokens:
            raise overloaded(
                f"{self.tokens} tokens wait and {tokens} more would pass the {self._most_tokens} that the server "
                "holds",
                self.seconds(model),
            )

    def seconds(self, model: ServedModel) -> int:
        """About how long what waits will take, from 1 to 60."""
        rate = min(model.rates.values(), default=_FIRST_TOKENS / _RUN_SECONDS)
        return min(_LONGEST_RETRY, max(1, math.ceil(self.tokens / rate)))

    def holds(self, model: ServedModel) -> bool:
        """Whether inputs of a model wait or run."""
        running = self._running is not None and self._running.model is model
        return running or any(kind.model is model for kind in self._waiting)

    async def close(self) -> None:
        """Gives up what waits, and ends the thread when its batch has ended."""
        for jobs in self._waiting.values():
            for job in jobs:
                stopping = ApiError(503, "the server is stopping", kind="server_error")
                job.fail(stopping)
        self._waiting.clear()
        if self._loop is not None:
            await self._loop
        self._thread.shutdown()

    def _forget(self, job: _Job) -> None:
        """Takes a job out that was given up, or is done."""
        self.tokens -= sum(job.costs[job.taken :])
        job.taken = len(job.items)
        jobs = self._waiting.get(job.kind)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.kind]

    async def _run(self) -> None:
        """Runs batches until nothing waits."""
        while self._waiting:
            kind, parts = self._next()
            tokens = _tokens(parts)
            self._running = kind
            try:
                await self._run_batch(kind, parts)
            finally:
                self._running = None
                self.tokens -= tokens

    async def _run_batch(self, kind: Kind, parts: list[Part]) -> None:
        items = [job.items[index] for job, part in parts for index in part]
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        try:
            vectors = await loop.run_in_executor(self._thread, kind.run, items)
        except Exception as error:
            if len(parts) > 1:
                for part in parts:
                    await self._run_batch(kind, [part])
                return
            [(job, indices)] = parts
            job.fail(FailedItems(error, indices, kind))
            return
        seconds = time.perf_counter() - start
        stored = 0
        for job, indices in parts:
            job.store(indices, vectors[stored : stored + len(indices)])
            stored += len(indices)
        batch = Batch(kind, len(items), len(parts), _tokens(parts), seconds)
        self._measure(batch)
        self._report(batch)

    def _next(self) -> tuple[Kind, list[Part]]:
        """The next batch, taken from the kind whose turn it is."""
        kind, jobs = next(iter(self._waiting.items()))
        starts: dict[_Job, int] = {}
        room = self._budget(kind)
        share = max(1, room // len(jobs))
        for of_each in (share, room):  # the same for every request, then what is left by age
            for job in list(jobs):
                if room <= 0 or (starts and job.costs[job.taken] > room):
                    break
                starts.setdefault(job, job.taken)
                part = job.take(min(of_each, room))
                room -= sum(job.costs[part.start : part.stop])
                jobs.remove(job)
                if job.taken < len(job.items):
                    jobs.append(job)
        self._waiting.move_to_end(kind)
        if not jobs:
            del self._waiting[kind]
        return kind, [(job, range(start, job.taken)) for job, start in starts.items()]

    @staticmethod
    def _budget(kind: Kind) -> int:
        """Tokens of the next batch."""
        rate = kind.model.rates.get(kind.images)
        if rate is None:
            return _FIRST_TOKENS
        return min(_MOST_TOKENS, max(_FEWEST_TOKENS, int(rate * _RUN_SECONDS)))

    @staticmethod
    def _measure(batch: Batch) -> None:
        """Learns from a batch that did not fail how fast its kind of inputs runs."""
        rates, images = batch.kind.model.rates, batch.kind.images
        rate = batch.tokens / max(batch.seconds, 1e-6)
        old = rates.get(images, rate)
        rates[images] = old + _NEWEST * (rate - old)


def _tokens(parts: Sequence[Part]) -> int:
    return sum(sum(job.costs[part.start : part.stop]) for job, part in parts)
