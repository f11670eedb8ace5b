"""Times a precision on this machine, and finds the way of running its batches that is fastest here.

Ways that are tried:
    * batches of 256, 512 and 1024 tokens a thread;
    * of 8-bit graphs that are not too large for a second copy of the weights, also one thread per
      batch, and one thread for a short text.

All of a shape run in turn, in an order drawn anew each round, after a pause in which ONNX Runtime's
threads fall asleep; medians count. What runs anyway is kept unless another way is faster by more than
such medians vary. Time is bounded: large models get fewer rounds, at last none but the default, and a
batch that would take longer than all of it is left out.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from embedge.runtime._bundle import Bundle
from embedge.runtime._graphs import SMALL_GRAPH_BYTES, Graphs
from embedge.runtime._request import make_request
from embedge.runtime._rows import RowRunner
from embedge.runtime._tokenize import TextTokenizer, TokenIds
from embedge.runtime._wisdom import MARGIN, Measured, RunSettings

__all__ = ["measure_precision", "medians_ms"]

SECONDS = 45.0  # of a precision
_ROUNDS = 9
_PAUSE_S = 0.05
_BLOCK_S = 0.02  # a short run is repeated for as long
_SHORT, _LONG = 16, 128  # tokens of a text that is alone
_BATCH = 64  # tokens of a text in a batch
_TOKENS_PER_THREAD = (256, 512, 1024)
# Lanes may hold the weights twice. The default's own limit comes from one machine; others may gain
# from somewhat larger graphs.
_LANES_BYTES = 4 * SMALL_GRAPH_BYTES
_TEXT = "An edge box turns every text into one vector, and looks up the nearest of many others."

Key = TypeVar("Key", bound=Hashable)
Shape = tuple[int, int]  # texts, tokens of each


def measure_precision(
    bundle: Bundle, precision: str, task: str, *, threads: int, seconds: float = SECONDS
) -> Measured:
    """Times of a precision on this machine's processor, with the fastest settings.

    Args:
        bundle: whose graph.
        precision: one that runs on a CPU.
        task: whose graph runs; the other tasks' are as fast.
        threads: cores to use.
        seconds: about how long to try, opening the graph not counted.

    Raises:
        BundleError: if the graph cannot be opened.
        InferenceError: if it fails.
    """
    host = _Host(bundle, precision, task, threads)
    limit = bundle.manifest.model.max_length
    lengths = sorted({min(_SHORT, limit), min(_LONG, limit)})
    batch = (_TOKENS_PER_THREAD[-1] * max(2, threads) // _BATCH, min(_BATCH, limit))
    alone = {tokens: medians_ms(host.alone(tokens), seconds / 4) for tokens in lengths}
    settings = replace(
        host.default, narrow_tokens=_narrow_tokens(alone, threads, host.default.narrow_tokens)
    )
    of_batch = {}
    token_ms = min(alone[lengths[-1]].values()) / lengths[-1]
    if token_ms * batch[0] * batch[1] < seconds / 2 * 1000:
        times = medians_ms(host.together(batch), seconds / 2)
        way = _fastest(times, host.default)
        settings = replace(way, narrow_tokens=settings.narrow_tokens)
        of_batch[batch] = times[way]
    milliseconds = {}
    for tokens, by_width in alone.items():
        width = 1 if settings.lanes and tokens <= settings.narrow_tokens else threads
        milliseconds[1, tokens] = by_width.get(width, min(by_width.values()))
    milliseconds |= of_batch
    graph = bundle.manifest.precisions[precision].graphs[task]
    return Measured(
        task=task,
        graph_sha256=bundle.manifest.files[graph].sha256,
        graph_bytes=bundle.graph_bytes(precision, task),
        milliseconds={f"{n}x{tokens}": round(ms, 4) for (n, tokens), ms in milliseconds.items()},
        settings=settings,
    )


def medians_ms(runs: Mapping[Key, Callable[[], object]], seconds: float) -> dict[Key, float]:
    """Median milliseconds of some runs, taken in turn.

    Args:
        runs: by any key; the first one runs in any case, and alone where time is short.
        seconds: about how long to go on.
    """
    begin = time.perf_counter()
    first = next(iter(runs))
    lasted = {first: _seconds(runs[first])}  # a warm-up, and an estimate for the others
    if 2 * len(runs) * lasted[first] > seconds:
        runs = {first: runs[first]}
        if 2 * lasted[first] > seconds:
            return {first: lasted[first] * 1000}
    lasted |= {key: _seconds(run) for key, run in runs.items() if key != first}
    times: dict[Key, list[float]] = {key: [] for key in runs}
    keys = list(runs)
    generator = np.random.default_rng(0)
    for turn in range(_ROUNDS):
        if turn and time.perf_counter() - begin + sum(lasted.values()) > seconds:
            break
        for place in generator.permutation(len(keys)):
            key = keys[place]
            repeats = max(1, int(_BLOCK_S / lasted[key]))
            time.sleep(_PAUSE_S)
            if repeats > 1:
                runs[key]()  # wakes the threads
            lasted[key] = _seconds(runs[key], repeats)
            times[key].append(lasted[key])
    return {key: float(np.median(values)) * 1000 for key, values in times.items()}


def _seconds(run: Callable[[], object], repeats: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


class _Host:
    """A task's graph with every way of running it; the ways share their sessions.

    Attributes:
        default: the settings without a measurement.
    """

    def __init__(self, bundle: Bundle, precision: str, task: str, threads: int) -> None:
        manifest = bundle.manifest
        self._manifest = manifest
        self._task = task
        self._threads = threads
        self._row_multiple = manifest.precisions[precision].row_multiple
        self._request = make_request(manifest, precision, task=task)
        self._make = functools.partial(
            Graphs,
            bundle,
            precision,
            device="cpu",
            threads=threads,
            max_sessions=None,
            memory_limit=None,
        )
        graphs = self._make()
        self._open = functools.cache(graphs.open)
        self.default = graphs.how(task)
        self._may_have_lanes = self.default.lanes or (
            bool(manifest.precisions[precision].activation_constants)
            and bundle.graph_bytes(precision, task) <= _LANES_BYTES
        )
        settings = manifest.tokenizer
        tokenizer = TextTokenizer(bundle.file(settings.file), settings, manifest.model.max_length)
        self._ids = tokenizer([_TEXT])[0].ids

    def alone(self, tokens: int) -> dict[int, Callable[[], object]]:
        """Runs of one text, by threads of the run; the default's first."""
        widths = [self._threads]
        if self._may_have_lanes and self._threads > 1:
            narrow = self.default.lanes and tokens <= self.default.narrow_tokens
            widths.insert(0 if narrow else 1, 1)
        return {
            width: self._run(
                (1, tokens), replace(self.default, lanes=width == 1, narrow_tokens=tokens)
            )
            for width in widths
        }

    def together(self, shape: Shape) -> dict[RunSettings, Callable[[], object]]:
        """Runs of many texts, by settings; the default's first."""
        ways = [self.default]
        for lanes in (True, False) if self._may_have_lanes and self._threads > 1 else (False,):
            for tokens in _TOKENS_PER_THREAD:
                batch_tokens = tokens * (1 if lanes else max(2, self._threads))
                ways.append(replace(self.default, lanes=lanes, batch_tokens=batch_tokens))
        return {way: self._run(shape, way) for way in dict.fromkeys(ways)}

    def _run(self, shape: Shape, settings: RunSettings) -> Callable[[], object]:
        """A call with some texts that are tokens already."""
        texts, tokens = shape
        ids = np.resize(self._ids, tokens)
        rows = [TokenIds(ids, np.zeros_like(ids), False)] * texts
        graphs = self._make(settings=settings, open_session=self._open)
        runner = RowRunner(
            graphs,
            self._manifest.model,
            pad_token_id=self._manifest.tokenizer.pad_token_id,
            row_multiple=self._row_multiple,
        )

        def run() -> None:
            runner.run(rows, range(texts), self._request, lambda *_: None, lambda _: None)

        return run


def _narrow_tokens(alone: Mapping[int, Mapping[int, float]], threads: int, default: int) -> int:
    """Most tokens of a text alone that takes one thread.

    Args:
        alone: milliseconds by tokens and threads of the run.
        threads: of the other way.
        default: where nothing speaks against it.
    """
    ratios = {
        tokens: by_width[1] / by_width[threads]
        for tokens, by_width in alone.items()
        if 1 in by_width and threads in by_width
    }
    if ratios and ratios[min(ratios)] > MARGIN:
        return 0
    if ratios and ratios[max(ratios)] * MARGIN < 1:
        return max(default, *ratios)
    return default


def _fastest(times: Mapping[RunSettings, float], default: RunSettings) -> RunSettings:
    """The fastest settings, or the default where they gain too little."""
    best = min(times, key=times.__getitem__)
    return best if times[best] * MARGIN < times[default] else default
