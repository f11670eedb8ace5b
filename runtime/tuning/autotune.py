"""Times precisions on this machine, and finds the way of running batches that is fastest here.

Ways that are tried:
    * batches of 256, 512 and 1024 tokens a thread;
    * of 8-bit graphs that are not too large for a second copy of the weights, also one thread per
      batch, and one thread for a short text.

All of a shape run in turn, in an order drawn anew each round, after a pause in which ONNX Runtime's
threads fall asleep; medians count. What runs anyway is kept unless another way is faster by more than
such medians vary, twice in a row. Time is bounded: large models get fewer rounds, at last none but the
default, and a batch that would take longer than all of it is left out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.encode.batch_runner import BatchRunner
from embedge.runtime.encode.batch_size import (
    SMALL_GRAPH_BYTES,
    default_settings,
    has_8_bit_matmuls,
)
from embedge.runtime.encode.request import CallOptions, Request
from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.encode.tokenizer import read_tokenizer
from embedge.runtime.sessions.graphs import Graphs
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs
from embedge.runtime.sessions.session import SessionConfig
from embedge.runtime.sessions.session_workers import RunSettings
from embedge.runtime.tuning.cache import TunedPrecision, Tuning
from embedge.runtime.tuning.turns import seconds_of, take_turns

__all__ = ["measure_precisions", "medians_ms"]

MARGIN = 1.05  # harmless if noise gets past it: the ways are then about equally fast
SECONDS = 45.0  # of a precision
_ROUNDS = 15
_PAUSE_S = 0.05
_BLOCK_S = 0.02  # a short run is repeated for as long
_SHORT, _LONG = 16, 128  # tokens of a text that is alone
_BATCH = 64  # tokens of a text in a batch
_TOKENS_PER_THREAD = (256, 512, 1024)
# Two sessions hold the weights twice. The default's own limit comes from one machine; others may gain
# from somewhat larger graphs.
_SINGLE_THREAD_BYTES = 4 * SMALL_GRAPH_BYTES
_TOGETHER_BYTES = 1_000_000_000  # of graphs that are open at the same time
_TEXT = "An edge box turns every text into one vector, and looks up the nearest of many others."

Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")
Shape = tuple[int, int]  # texts, tokens of each


def measure_precisions(
    bundle: Bundle, tasks: Mapping[str, str], *, threads: int, seconds: float = SECONDS
) -> Iterator[Tuning]:
    """Times of some precisions on this machine's processor, each with its fastest settings.

    Those that fit into memory together are timed in turn, so that a moment in which the machine is
    busy does not speak against one of them; larger ones come one by one.

    Args:
        bundle: whose graphs.
        tasks: by precision, which has to run on a CPU, whose graph runs; the other tasks' are as fast.
        threads: cores to use.
        seconds: about how long to try a precision, opening its graph not counted.

    Raises:
        BundleError: if a graph cannot be opened.
        InferenceError: if it fails.
    """
    sizes = [bundle.graph_bytes(precision, task) for precision, task in tasks.items()]
    together = sum(sizes) <= _TOGETHER_BYTES
    for group in [list(tasks)] if together else [[precision] for precision in tasks]:
        yield _timed_in_turn([_TimedGraph(bundle, p, tasks[p], threads) for p in group], seconds)


def _timed_in_turn(graphs: Sequence[_TimedGraph], seconds: float) -> Tuning:
    """What is measured of some precisions, by name."""
    settings = {graph: _tuned(graph, seconds / 2) for graph in graphs}
    times: dict[_TimedGraph, dict[str, float]] = {graph: {} for graph in graphs}
    token_ms = 0.0  # the slowest one's, in a text that is alone
    for texts, tokens in graphs[0].shapes:
        if texts > 1 and token_ms * texts * tokens > seconds / 2 * 1000:
            continue
        runs = {graph: graph.run((texts, tokens), settings[graph]) for graph in graphs}
        found = medians_ms(runs, seconds / 6 * len(graphs), every=True)
        token_ms = max(found.values()) / (texts * tokens)
        for graph, median in found.items():
            times[graph][f"{texts}x{tokens}"] = round(median, 4)
    return {graph.precision: graph.measured(settings[graph], times[graph]) for graph in graphs}


def _tuned(graph: _TimedGraph, seconds: float) -> RunSettings:
    """The settings that are fastest; the default's where time does not suffice to tell."""
    *alone, batch = graph.shapes
    default = graph.default
    token_ms = 0.0

    def single_thread_tokens() -> int:
        nonlocal token_ms
        of_alone = {shape[1]: medians_ms(graph.alone(shape), seconds / 4) for shape in alone}
        longest = max(of_alone)
        token_ms = min(of_alone[longest].values()) / longest
        return _single_thread_tokens(of_alone, graph.threads, default.single_thread_tokens)

    def way() -> RunSettings:
        return _fastest(medians_ms(graph.ways(batch), seconds / 2), default)

    tokens = _found_twice(single_thread_tokens, default.single_thread_tokens)
    best = default
    if token_ms * batch[0] * batch[1] < seconds / 2 * 1000:
        best = _found_twice(way, default)
    return replace(best, single_thread_tokens=tokens)


def _found_twice(find: Callable[[], Found], default: Found) -> Found:
    """What two searches agree on, the second only where the first found another than the default.

    Something else that runs for a second can make a way look slow that is not.
    """
    found = find()
    return found if found == default or find() == found else default


def medians_ms(
    runs: Mapping[Key, Callable[[], object]], seconds: float, *, every: bool = False
) -> dict[Key, float]:
    """Median milliseconds of some runs, taken in turn.

    Args:
        runs: by any key; the first one runs in any case, and alone where time is short.
        seconds: about how long to go on.
        every: where time is short, run each of them once instead.
    """
    begin = time.perf_counter()
    first = next(iter(runs))
    lasted = {first: seconds_of(runs[first])}  # a warm-up, and an estimate for the others
    if every and 2 * len(runs) * lasted[first] > seconds:
        lasted |= {key: seconds_of(run) for key, run in runs.items() if key != first}
        return {key: 1000 * value for key, value in lasted.items()}
    if 2 * len(runs) * lasted[first] > seconds:
        runs = {first: runs[first]}
        if 2 * lasted[first] > seconds:
            return {first: lasted[first] * 1000}
    lasted |= {key: seconds_of(run) for key, run in runs.items() if key != first}
    times: dict[Key, list[float]] = {key: [] for key in runs}
    turns = take_turns(runs, lasted, pause_s=_PAUSE_S, block_s=_BLOCK_S, asleep_s=_BLOCK_S / 2)
    for number in range(_ROUNDS):
        if number and time.perf_counter() - begin + sum(lasted.values()) > seconds:
            break
        next(turns)
        for key, values in times.items():
            values.append(lasted[key])
    return {key: float(np.median(values)) * 1000 for key, values in times.items()}


class _TimedGraph:
    """A task's graph with every way of running it; the ways share their sessions.

    Attributes:
        precision: whose graph it is.
        threads: cores to use.
        default: the settings without a measurement.
    """

    def __init__(self, bundle: Bundle, precision: str, task: str, threads: int) -> None:
        manifest = bundle.manifest
        self._manifest = manifest
        self._task = task
        self.threads = threads
        self._bundle = bundle
        self.precision = precision
        self._row_multiple = manifest.precisions[precision].row_multiple
        late = manifest.model.late_interaction is not None
        options = CallOptions(task=task, multi_vector=late)
        self._request = Request.look_up(manifest, precision, options)
        config = SessionConfig(threads=threads, prepared=PreparedGraphs(bundle))
        self.default = default = default_settings(bundle, precision, task, config)
        self._graphs = Graphs(bundle, precision, config, settings=lambda _: default)
        self._may_take_one = threads > 1 and (
            self.default.single_thread
            or (
                has_8_bit_matmuls(bundle, precision)
                and bundle.graph_bytes(precision, task) <= _SINGLE_THREAD_BYTES
            )
        )
        self._tokenizer = read_tokenizer(bundle)
        self._ids = self._tokenizer([_TEXT])[0].ids

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What to time, within the model's limit: texts alone, the shortest first, then a batch."""
        limit = self._manifest.model.max_length
        lengths = sorted({min(_SHORT, limit), min(_LONG, limit)})
        batch = _TOKENS_PER_THREAD[-1] * max(2, self.threads) // _BATCH
        return (*((1, tokens) for tokens in lengths), (batch, min(_BATCH, limit)))

    def measured(self, settings: RunSettings, milliseconds: Mapping[str, float]) -> TunedPrecision:
        """The times of the precision, as they are stored."""
        graph = self._manifest.precisions[self.precision].graphs[self._task]
        return TunedPrecision(
            task=self._task,
            graph_sha256=self._manifest.files[graph].sha256,
            graph_bytes=self._bundle.graph_bytes(self.precision, self._task),
            milliseconds=milliseconds,
            settings=settings,
        )

    def alone(self, shape: Shape) -> dict[int, Callable[[], object]]:
        """Runs of one text, by threads of the run; the default's first."""
        default, tokens = self.default, shape[1]
        threads = [self.threads]
        if self._may_take_one:
            takes_one = default.single_thread and tokens <= default.single_thread_tokens
            threads.insert(0 if takes_one else 1, 1)
        return {
            count: self.run(
                shape, replace(default, single_thread=count == 1, single_thread_tokens=tokens)
            )
            for count in threads
        }

    def ways(self, shape: Shape) -> dict[RunSettings, Callable[[], object]]:
        """Runs of many texts, by settings; the default's first."""
        ways = [self.default]
        for single_thread in (True, False) if self._may_take_one else (False,):
            for tokens in _TOKENS_PER_THREAD:
                ways.append(
                    replace(
                        self.default,
                        single_thread=single_thread,
                        batch_tokens=tokens * (1 if single_thread else max(2, self.threads)),
                    )
                )
        return {way: self.run(shape, way) for way in dict.fromkeys(ways)}

    def run(self, shape: Shape, settings: RunSettings) -> Callable[[], object]:
        """A call with some texts that are tokens already."""
        texts, tokens = shape
        ids = np.resize(self._ids, tokens)
        items = list(enumerate([TokenIds(ids, np.zeros_like(ids), False)] * texts))
        graphs = self._graphs.with_settings(lambda _: settings)
        runner = BatchRunner(
            graphs,
            self._manifest.model,
            pad_token_id=self._manifest.tokenizer.pad_token_id,
            row_multiple=self._row_multiple,
            token_name=self._tokenizer.token_name,
        )

        def run() -> None:
            deque(runner.run(items, self._request), maxlen=0)

        return run


def _single_thread_tokens(
    alone: Mapping[int, Mapping[int, float]], threads: int, default: int
) -> int:
    """Most tokens of a text alone that takes one thread.

    Args:
        alone: milliseconds by tokens and threads of the run.
        threads: of the other way.
        default: where nothing speaks against it.
    """
    ratios = {
        tokens: by_threads[1] / by_threads[threads]
        for tokens, by_threads in alone.items()
        if 1 in by_threads and threads in by_threads
    }
    if ratios and ratios[min(ratios)] > MARGIN:
        return 0
    if ratios and ratios[max(ratios)] * MARGIN < 1:
        return max(default, *ratios)
    if ratios and ratios[min(ratios)] * MARGIN < 1:
        return max(default, min(ratios))
    return default


def _fastest(times: Mapping[RunSettings, float], default: RunSettings) -> RunSettings:
    """The fastest settings, or the default where they gain too little."""
    best = min(times, key=times.__getitem__)
    return best if times[best] * MARGIN < times[default] else default
