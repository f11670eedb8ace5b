"""What waits to be embedded: inputs of all requests, joined into batches by tokens, run as the cores come free.

Rules:
    * A batch is of one model, task and form of vectors, whatever its requests' prompts: they are among the tokens.
    * Nothing waits for company. What came while the cores were taken is the next batch.
    * Where a model's batches run at the same time, each core takes one of its own: while one runs, what came of the
      other is answered. Elsewhere a batch takes all cores. An input that is alone does so, too, where requests have
      come one at a time.
    * Before a batch that others run beside, the loop reads the requests that have come already.
    * A batch holds about as many tokens as the model takes ``_RUN_SECONDS`` for, as measured of texts and of images,
      on one core and on all. Each request has the same share of it, so that a text does not wait for another request's
      thousands; what is left goes by age. Kinds of batches take turns.
    * A batch of several requests that fails runs again request by request, but for those that were given up: one's
      fault is not another's.
    * A request that is given up leaves the queue, and no tokens of it are counted any more.

Everything but the run itself belongs to the event loop's thread, so there are no locks.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
_NEWEST_REQUEST = 0.05  # weight of the last request in how many find company
_SELDOM = 0.1
_TURNS = 3  # of the loop, from a request's bytes to its inputs here


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

    @property
    def at_once(self) -> int:
        """Batches that run at the same time; 1: each takes all cores."""
        return 1 if self.images else self.model.calls_at_once[self.task]

    def run(self, items: Sequence[Any], one_thread: bool = False) -> Sequence[Vectors]:
        """The vectors of some inputs: float32 ``[dim]`` each, or ``[tokens, dim]``.

        Args:
            items: ``TokenIds``, or the bytes of images' files.
            one_thread: on one core.
        """
        embedder = self.model.embedder
        encode: Callable[..., Any] = (
            embedder.encode
            if self.images
            else partial(embedder.encode_tokens, one_thread=one_thread)
        )
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

    @property
    def left_to_take(self) -> int:
        return len(self.items) - self.taken

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


@dataclass(eq=False, frozen=True)
class _Run:
    """A batch that runs: of which kind, and whether on all cores."""

    kind: Kind
    all_cores: bool


class Queue:
    """Runs what is submitted, in threads of its own, until it is closed.

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
        self._running: dict[_Run, asyncio.Task[None]] = {}
        self._ended = asyncio.Event()
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="embedge-run")
        self._loop: asyncio.Task[None] | None = None
        self._submitted = 0
        self._company = 0.0  # how often a request finds another one, lately
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
        self._submitted += 1
        self._company += _NEWEST_REQUEST * (bool(self.tokens) - self._company)
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
        at_once = max(model.calls_at_once.values())
        rates = {images: rate for (images, all_cores), rate in model.rates.items() if all_cores}
        # Where there are such, what waits runs on one core each; on all cores a text that was alone.
        rates |= {
            images: rate * at_once
            for (images, all_cores), rate in model.rates.items()
            if not all_cores
        }
        rate = min(rates.values(), default=_FIRST_TOKENS / _RUN_SECONDS)
        return min(_LONGEST_RETRY, max(1, math.ceil(self.tokens / rate)))

    def holds(self, model: ServedModel) -> bool:
        """Whether inputs of a model wait or run."""
        kinds = [*self._waiting, *(run.kind for run in self._running)]
        return any(kind.model is model for kind in kinds)

    async def close(self) -> None:
        """Gives up what waits, and ends the threads when their batches have ended."""
        for jobs in self._waiting.values():
            for job in jobs:
                stopping = ApiError(503, "the server is stopping", kind="server_error")
                job.fail(stopping)
        self._waiting.clear()
        if self._loop is not None:
            await self._loop
        if self._running:
            await asyncio.wait(self._running.values())
        self._threads.shutdown()

    def _forget(self, job: _Job) -> None:
        """Takes a job out that was given up, or is done."""
        job.done.cancel()
        self.tokens -= sum(job.costs[job.taken :])
        job.taken = len(job.items)
        jobs = self._waiting.get(job.kind)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.kind]

    async def _run(self) -> None:
        """Starts batches until nothing waits."""
        while self._waiting:
            if not self._is_free():
                self._ended.clear()
                await self._ended.wait()
                continue
            if self._running:
                await self._arrivals()
            if self._waiting and self._is_free():
                self._start()

    def _is_free(self) -> bool:
        """Whether a batch of the kind whose turn it is can start now."""
        kind = next(iter(self._waiting))
        if any(run.all_cores for run in self._running):
            return False
        return len(self._running) < kind.at_once

    async def _arrivals(self) -> None:
        """Lets the loop read requests until no more come."""
        before = -1
        while self._submitted != before:
            before = self._submitted
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    def _start(self) -> None:
        """Starts a batch."""
        [kind, jobs] = next(iter(self._waiting.items()))
        is_alone = len(jobs) == 1 and jobs[0].left_to_take == 1 and not self._running
        all_cores = kind.at_once == 1 or (is_alone and self._company < _SELDOM)
        run = _Run(kind, all_cores)
        parts = self._next(run)
        self._running[run] = asyncio.ensure_future(self._run_one(run, parts))

    async def _run_one(self, run: _Run, parts: list[Part]) -> None:
        try:
            await self._run_batch(run, parts)
        finally:
            del self._running[run]
            self._ended.set()
            self.tokens -= _tokens(parts)

    async def _run_batch(self, run: _Run, parts: list[Part]) -> None:
        kind = run.kind
        items = [job.items[index] for job, part in parts for index in part]
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        try:
            vectors = await loop.run_in_executor(self._threads, kind.run, items, not run.all_cores)
        except Exception as error:
            if len(parts) > 1:
                for part in parts:
                    if not part[0].done.done():
                        await self._run_batch(run, [part])
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
        self._measure(run, batch)
        self._report(batch)

    def _next(self, run: _Run) -> list[Part]:
        """The next batch of a kind, whose turn then ends.

        Batches that run at the same time share all that waits or runs: so that what waits does not go to one core while
        the other is about to come free.
        """
        kind, batches = run.kind, 1 if run.all_cores else run.kind.at_once
        jobs = self._waiting[kind]
        starts: dict[_Job, int] = {}
        room = self._budget(run)
        if batches > 1:
            room = min(room, -(-self.tokens // batches))
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
        return [(job, range(start, job.taken)) for job, start in starts.items()]

    @staticmethod
    def _budget(run: _Run) -> int:
        """Tokens of the next batch."""
        rate = run.kind.model.rates.get((run.kind.images, run.all_cores))
        if rate is None:
            return _FIRST_TOKENS
        return min(_MOST_TOKENS, max(_FEWEST_TOKENS, int(rate * _RUN_SECONDS)))

    @staticmethod
    def _measure(run: _Run, batch: Batch) -> None:
        """Learns from a batch that did not fail how fast its kind of inputs runs."""
        rates, key = run.kind.model.rates, (run.kind.images, run.all_cores)
        rate = batch.tokens / max(batch.seconds, 1e-6)
        old = rates.get(key, rate)
        rates[key] = old + _NEWEST * (rate - old)


def _tokens(parts: Sequence[Part]) -> int:
    return sum(sum(job.costs[part.start : part.stop]) for job, part in parts)
