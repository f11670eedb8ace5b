"""How busy a bulk job keeps the cores with the graph: ``python -m embedge.bench.studies.bulk BUNDLE --texts 10000``.

One ``encode`` of many different short texts (4 to 20 words of the bench's own texts in a row). Of the
cores' time, threads × seconds, three shares are shown:

* *in the graph*: the sum of all runs of the graph, each with the threads that it was given. The rest is
  cores that wait for tokens, for a batch or for Python.
* *on a core*: what the process computed, in the graph or not. Well below the first, other processes were
  on the cores, and the figures are worth little.
* *padding*: of the tokens that were run, those that only fill a row.

The last line is the same as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedge.bench.errors import BenchError
from embedge.bench.measure.texts import default_texts
from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.host.cores import available_cores
from embedge.runtime.sessions.session import GraphSession

__all__ = ["WORDS", "Bulk", "main", "measure", "short_texts"]

WORDS = (4, 20)  # of a short text, at least and at most


@dataclass(frozen=True, kw_only=True)
class Bulk:
    """One bulk job.

    Attributes:
        seconds: from the call to its vectors.
        in_graph: share of threads × seconds inside runs of the graph.
        on_core: share of threads × seconds that the process was on a core.
        padding: share of the tokens run that only fill a row.
        runs: of the graph.
        texts: vectors that were asked for.
        threads: cores that were to be used.
    """

    seconds: float
    in_graph: float
    on_core: float
    padding: float
    runs: int
    texts: int
    threads: int


@dataclass(frozen=True)
class _Run:
    """A run of a graph: threads × seconds, the tokens it was given, and how many of them count."""

    core_seconds: float
    tokens: int
    filled: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="embedge.bench.studies.bulk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", help="may be left out where the bundle has exactly one")
    parser.add_argument("--task", help="default: the bundle's first")
    parser.add_argument("--texts", type=int, default=10_000, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the cores there are")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    options = parser.parse_args(arguments)
    for name in ("texts", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, found {getattr(options, name)}")
    threads = options.threads or available_cores()
    try:
        model = Embedder(options.bundle, precision=options.precision, threads=threads)
        texts = short_texts(options.texts)
        rounds = [
            measure(model, texts, task=options.task or model.tasks[0], threads=threads)
            for _ in range(options.rounds)
        ]
    except EmbedgeError as error:
        print(f"embedge.bench.studies.bulk: {error}", file=sys.stderr)
        return 1
    print(f"{len(texts)} texts, {threads} threads, {model.precision}")
    for bulk in rounds:
        print(
            f"{bulk.seconds:8.2f} s {bulk.texts / bulk.seconds:8.0f} texts/s   in the graph "
            f"{bulk.in_graph:6.1%}   on a core {bulk.on_core:6.1%}   padding {bulk.padding:5.1%}"
        )
    print(json.dumps([asdict(bulk) for bulk in rounds]))
    return 0


def short_texts(count: int, seed: int = 0, words: tuple[int, int] = WORDS) -> list[str]:
    """Different texts of some words in a row, drawn from the bench's own.

    Args:
        count: of the texts.
        seed: of the drawing.
        words: fewest and most of a text.

    Raises:
        BenchError: if so many cannot be drawn.
    """
    everything = " ".join(text.text for text in default_texts()).split()
    generator = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    for _ in range(10 * count):
        length = int(generator.integers(*words, endpoint=True))
        start = int(generator.integers(len(everything) - length))
        texts[" ".join(everything[start : start + length])] = None
        if len(texts) == count:
            return list(texts)
    raise BenchError(
        f"--texts: {len(texts)} different texts can be drawn, not {count}; ask for less"
    )


def measure(model: Embedder, texts: Sequence[str], *, task: str, threads: int) -> Bulk:
    """Embeds the texts in one call, after one of a few that opens the graph.

    Args:
        model: with ``threads`` threads.
        texts: any number.
        task: of the bundle.
        threads: cores to use.
    """
    model.encode(list(texts[:64]), task=task, on_truncate="ignore")
    with _recorded() as runs:
        begin, computed = time.perf_counter(), time.process_time()
        model.encode(list(texts), task=task, on_truncate="ignore")
        seconds = time.perf_counter() - begin
        computed = time.process_time() - computed
    return Bulk(
        seconds=seconds,
        in_graph=sum(run.core_seconds for run in runs) / (threads * seconds),
        on_core=computed / (threads * seconds),
        padding=1 - sum(run.filled for run in runs) / sum(run.tokens for run in runs),
        runs=len(runs),
        texts=len(texts),
        threads=threads,
    )


@contextmanager
def _recorded() -> Iterator[list[_Run]]:
    """What every graph of this process runs until the block ends."""
    runs: list[_Run] = []
    original = GraphSession.run

    def recording(session: GraphSession, output: str, inputs: Any) -> Any:
        begin = time.perf_counter()
        result = original(session, output, inputs)
        seconds = time.perf_counter() - begin
        mask = inputs["attention_mask"]
        runs.append(_Run(session.threads * seconds, mask.size, int(mask.sum())))
        return result

    GraphSession.run = recording  # type: ignore[method-assign, assignment]
    try:
        yield runs
    finally:
        GraphSession.run = original  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
