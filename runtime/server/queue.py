"""What waits to be embedded: inputs of all requests, joined into batches by tokens, run as the cores come free.

Rules:
    * A batch is of one model, task and form of vectors, whatever its requests' prompts: they are among the tokens.
    * A batch has the inputs that are nearest in length to the longest of the oldest request. On CPU it ends where they
      would need much padding.
    * Nothing waits for company. What came while the cores were taken is the next batch.
    * Where much waits, batches are made ahead: a thread goes on with the next one, and the loop answers meanwhile.
    * Where a model's batches run at the same time, each core takes one of its own: while one runs, what came of the
      other is answered. Elsewhere a batch takes all cores. An input that is alone does so, too, where requests have
      come one at a time.
    * Before a batch that others run beside, the loop reads the requests that have come already.
    * A batch holds at most as many tokens as the model takes ``_RUN_SECONDS`` for, as measured of texts and of images,
      on one core and on all. Each request has the same share of it, so that a text does not wait for another request's
      thousands; what is left goes by length, then by age. Kinds of batches take turns.
    * A batch of several requests that fails runs again request by request, but for those that were given up: one's
      fault is not another's.
    * A request that is given up leaves the queue, and no tokens of it are counted any more.

Everything belongs to the event loop's thread, but the run itself and taking a batch that was made ahead. So only
``_ahead`` and ``_running`` have a lock.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
_MOST_PADDING = 32  # tokens of a batch: more cost more than another batch, see MAX_PADDING_TOKENS
_AHEAD = 2  # batches
_AHEAD_TOKENS = 128  # that have to wait for one: fewer would fill no batch
_LOOKED_AT = 512  # requests, the oldest, among which a batch looks for its lengths
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
        self.costs = costs = inputs.costs
        self.left = len(items)
        self.results: list[Any] = [None] * len(items)
        self.done: asyncio.Future[list[Vectors]] = asyncio.get_running_loop().create_future()
        # What waits, the shortest first.
        self._waiting = sorted(range(len(items)), key=costs.__getitem__)
        self._sizes = [costs[index] for index in self._waiting]

    @property
    def waits(self) -> int:
        """How many of its inputs wait."""
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Of the inputs that wait."""
        return sum(self._sizes)

    @property
    def longest(self) -> int:
        """Tokens of the longest input that waits."""
        return self._sizes[-1]

    def distance(self, tokens: int) -> int:
        """Of so many tokens to those of the nearest input that waits."""
        if len(self._sizes) == 1:  # most often
            return abs(self._sizes[0] - tokens)
        at = bisect_left(self._sizes, tokens)
        return min(abs(size - tokens) for size in self._sizes[max(0, at - 1) : at + 1])

    def take(self, near: int, most: int, batch: _Size) -> list[int]:
        """The inputs that are the nearest to a length, of at most so many tokens; one at least if the batch takes it.

        Args:
            near: tokens of an input.
            most: tokens of all.
            batch: gets them.
        """
        sizes = self._sizes
        low = high = bisect_left(sizes, near)
        tokens = 0
        while high - low < len(sizes):
            is_below = high == len(sizes) or (
                low > 0 and near - sizes[low - 1] < sizes[high] - near
            )
            size = sizes[low - 1 if is_below else high]
            if (tokens and tokens + size > most) or not batch.add(size):
                break
            tokens += size
            low, high = (low - 1, high) if is_below else (low, high + 1)
        taken = self._waiting[low:high]
        del self._waiting[low:high], sizes[low:high]
        return taken

    def drop(self) -> None:
        """Nothing of it waits any more."""
        self._waiting.clear()
        self._sizes.clear()

    def store(self, indices: Sequence[int], vectors: Sequence[Vectors]) -> None:
        for index, vector in zip(indices, vectors, strict=True):
            self.results[index] = vector
        self.left -= len(indices)
        if self.left == 0 and not self.done.done():
            self.done.set_result(self.results)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


Part = tuple[_Job, list[int]]


@dataclass
class _Size:
    """What a batch has and may have.

    Attributes:
        room: tokens that it may still take.
        padding: the most that it may have, in tokens; ``None``: any number.
        inputs: how many it has.
        tokens: of them.
        longest: tokens of the longest.
    """

    room: int
    padding: int | None
    inputs: int = 0
    tokens: int = 0
    longest: int = 0

    def add(self, tokens: int) -> bool:
        """Takes an input, or says that it does not fit; the first always does."""
        if self.inputs:
            longest = max(self.longest, tokens)
            padding = longest * (self.inputs + 1) - self.tokens - tokens
            if tokens > self.room or (self.padding is not None and padding > self.padding):
                return False
        self.inputs += 1
        self.tokens += tokens
        self.room -= tokens
        self.longest = max(self.longest, tokens)
        return True


@dataclass(eq=False, frozen=True)
class _Run:
    """A batch that runs, or will.

    Attributes:
        kind: of all its inputs.
        all_cores: it takes all of them.
        parts: of each request.
        tokens: of all.
    """

    kind: Kind
    all_cores: bool
    parts: list[Part]
    tokens: int

    def is_given_up(self) -> bool:
        """Whether nobody waits for any of it."""
        return all(job.done.done() for job, _ in self.parts)


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
        self._waiting: OrderedDict[Kind, dict[_Job, None]] = OrderedDict()  # by age
        self._waiting_tokens = 0
        self._again: deque[_Run] = deque()  # parts of batches that failed, each alone
        self._lock = threading.Lock()
        self._ahead: deque[_Run] = deque()  # what a thread goes on with when its batch has ended
        self._running: set[_Run] = set()
        self._under_way = 0  # batches that run, or whose vectors are not stored yet
        self._changed = asyncio.Event()
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
        self._waiting_tokens += total
        for job in jobs:
            self._waiting.setdefault(job.kind, {})[job] = None
        try:
            self._wake()
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
        with self._lock:
            made = [*self._running, *self._ahead, *self._again]
        return any(kind.model is model for kind in [*self._waiting, *(run.kind for run in made)])

    async def close(self) -> None:
        """Gives up what waits, and ends the threads when their batches have ended."""
        for job in [job for jobs in self._waiting.values() for job in jobs]:
            job.fail(ApiError(503, "the server is stopping", kind="server_error"))
            self._forget(job)
        while self._under_way or self._is_looping():
            self._changed.clear()
            await self._changed.wait()
        self._threads.shutdown()

    def _forget(self, job: _Job) -> None:
        """Takes a job out that was given up, or is done."""
        job.done.cancel()
        if not job.done.cancelled() and not job.waits:  # most often: all of it has its vectors
            return
        jobs = self._waiting.get(job.kind, {})
        if job in jobs:
            self.tokens -= job.tokens
            self._waiting_tokens -= job.tokens
            del jobs[job]
            if not jobs:
                del self._waiting[job.kind]
        with self._lock:
            for made in (self._ahead, self._again):
                for run in [run for run in made if run.is_given_up()]:
                    made.remove(run)
                    self.tokens -= run.tokens
        self._changed.set()  # it may have been what could not start

    def _is_looping(self) -> bool:
        return self._loop is not None and not self._loop.done()

    def _has_work(self) -> bool:
        """Whether there is anything that was not started."""
        return bool(self._waiting or self._ahead or self._again)

    def _wake(self) -> None:
        """Has the loop look at what there is to run."""
        self._changed.set()
        if not self._is_looping():
            self._loop = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        """Starts batches until nothing waits."""
        while self._has_work():
            if self._running and not self._again and self._is_free():
                await self._arrivals()
            run = self._taken()
            if run is not None:
                self._threads.submit(self._work, run, asyncio.get_running_loop())
            elif self._has_work():
                self._go_ahead()
                self._changed.clear()
                await self._changed.wait()
        self._changed.set()

    def _is_free(self) -> bool:
        """Whether a batch of what waits can start now."""
        with self._lock:
            if self._ahead or not self._waiting:
                return False
            return self._has_room(next(iter(self._waiting)))

    def _has_room(self, kind: Kind) -> bool:
        """Whether a batch of a kind can run beside those that do."""
        return len(self._running) < kind.at_once and not any(r.all_cores for r in self._running)

    def _could_go_ahead(self) -> bool:
        """Whether there is enough for a batch that a thread goes on with by itself."""
        return (
            self._waiting_tokens >= _AHEAD_TOKENS
            and len(self._ahead) < _AHEAD
            and not self._again
            and bool(self._running)
        )

    def _go_ahead(self) -> None:
        """Makes the batches that threads go on with by themselves."""
        while self._could_go_ahead():
            kind = next(iter(self._waiting))
            self._ahead.append(self._next(kind, all_cores=kind.at_once == 1))

    async def _arrivals(self) -> None:
        """Lets the loop read requests until no more come."""
        before = -1
        while self._submitted != before:
            before = self._submitted
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    def _taken(self) -> _Run | None:
        """The next batch, which runs from now on; ``None`` if there is none that can."""
        with self._lock:
            if self._ahead or self._again:
                made = self._ahead or self._again
                run = made.popleft() if self._has_room(made[0].kind) else None
            elif self._waiting and self._has_room(kind := next(iter(self._waiting))):
                jobs = self._waiting[kind]
                is_alone = len(jobs) == 1 and next(iter(jobs)).waits == 1 and not self._running
                run = self._next(kind, kind.at_once == 1 or (is_alone and self._company < _SELDOM))
            else:
                run = None
            if run is not None:
                self._running.add(run)
                self._under_way += 1
        return run

    def _work(self, run: _Run, loop: asyncio.AbstractEventLoop) -> None:
        """Runs batches in a thread: one, and those that were made ahead."""
        following: _Run | None = run
        while following is not None:
            run = following
            items = [job.items[index] for job, part in run.parts for index in part]
            start = time.perf_counter()
            outcome: Sequence[Vectors] | Exception
            try:
                outcome = run.kind.run(items, not run.all_cores)
            except Exception as error:
                outcome = error
            seconds = time.perf_counter() - start
            with self._lock:
                self._running.remove(run)
                following = None
                if self._ahead and self._has_room(self._ahead[0].kind):
                    following = self._ahead.popleft()
                    self._running.add(following)
                    self._under_way += 1
            loop.call_soon_threadsafe(self._end, run, outcome, seconds)

    def _end(self, run: _Run, outcome: Sequence[Vectors] | Exception, seconds: float) -> None:
        """Stores what a batch gave.

        Args:
            run: the batch.
            outcome: vectors of its inputs, or why there are none.
            seconds: that it took.
        """
        self.tokens -= run.tokens
        with self._lock:
            self._under_way -= 1
        if not isinstance(outcome, Exception):
            stored = 0
            for job, indices in run.parts:
                job.store(indices, outcome[stored : stored + len(indices)])
                stored += len(indices)
            batch = Batch(run.kind, stored, len(run.parts), run.tokens, seconds)
            self._measure(batch, run.all_cores)
            self._report(batch)
        elif len(run.parts) > 1:
            for part in run.parts:
                again = _Run(run.kind, run.all_cores, [part], _tokens([part]))
                if not again.is_given_up():
                    self.tokens += again.tokens
                    self._again.append(again)
        else:
            [(job, indices)] = run.parts
            job.fail(FailedItems(outcome, indices, run.kind))
        if self._has_work():
            self._go_ahead()
            self._wake()
        else:
            self._changed.set()

    def _next(self, kind: Kind, all_cores: bool) -> _Run:
        """The next batch of a kind, whose turn then ends.

        Batches that run at the same time share all that waits or runs: so that what waits does not go to one core while
        the other is about to come free.
        """
        batches = 1 if all_cores else kind.at_once
        jobs = self._waiting[kind]
        looked_at = list(islice(jobs, _LOOKED_AT))
        oldest = looked_at[0]
        room = self._budget(kind, all_cores)
        if batches > 1:
            room = min(room, -(-self.tokens // batches))
        on_cpu = kind.model.embedder.device == "cpu"
        batch = _Size(room, _MOST_PADDING if on_cpu else None)
        near = oldest.longest
        looked_at.sort(key=lambda job: job.distance(near))  # those of one distance by age
        taken: dict[_Job, list[int]] = {}
        share = max(1, room // len(looked_at))
        for of_each in (share, room):  # the same for all, then what is left
            for job in looked_at:
                if batch.inputs and batch.room <= 0:
                    break
                if job.waits and (indices := job.take(near, of_each, batch)):
                    taken.setdefault(job, []).extend(indices)
        for job in taken:
            if not job.waits:
                del jobs[job]
        if oldest.waits:  # it had its turn; the others keep their place
            jobs[oldest] = jobs.pop(oldest)
        self._waiting_tokens -= batch.tokens
        self._waiting.move_to_end(kind)
        if not jobs:
            del self._waiting[kind]
        return _Run(kind, all_cores, list(taken.items()), batch.tokens)

    @staticmethod
    def _budget(kind: Kind, all_cores: bool) -> int:
        """Tokens of the next batch."""
        rate = kind.model.rates.get((kind.images, all_cores))
        if rate is None:
            return _FIRST_TOKENS
        return min(_MOST_TOKENS, max(_FEWEST_TOKENS, int(rate * _RUN_SECONDS)))

    @staticmethod
    def _measure(batch: Batch, all_cores: bool) -> None:
        """Learns from a batch that did not fail how fast its kind of inputs runs."""
        rates, key = batch.kind.model.rates, (batch.kind.images, all_cores)
        rate = batch.tokens / max(batch.seconds, 1e-6)
        old = rates.get(key, rate)
        rates[key] = old + _NEWEST * (rate - old)


def _tokens(parts: Sequence[Part]) -> int:
    return sum(job.costs[index] for job, part in parts for index in part)
