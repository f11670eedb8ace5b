"""The graphs of one precision of a bundle: opened when they are needed, with what runs fast here.

Measured on MiniLM-L6 with 2 threads: batches of 512 tokens at the same time, one thread each, take
0.8 of the time (int8) to 0.6 (fp32) that runs of 1024 with both threads take. A text alone is
slower on one thread (0.5 of the speed at int4 and fp32, whatever its length), except up to 64
tokens at int8, where one thread is 1.1 times as fast as two. Past some tokens a batch no longer
fits into the cores' caches and every element-wise pass goes to memory (bench/LOG.md). Products with
thousands of columns scale well over threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

from embedge.runtime._bundle import Bundle
from embedge.runtime._lanes import Lanes
from embedge.runtime._manifest import VISION
from embedge.runtime._pool import GraphPool
from embedge.runtime._session import GraphSession

__all__ = ["Graphs"]

# Above it a graph's products are wide enough for all threads: 768 columns and 12 layers at int8 are
# about 110 MB, 384 columns and 6 layers are 23 MB (int8) to 90 MB (fp32).
SMALL_GRAPH_BYTES = 100_000_000
CPU_BATCH_TOKENS_PER_THREAD = 512
GPU_BATCH_TOKENS = 16384
VISION_INPUTS = (
    "pixel_values",
    "rotary_cos",
    "rotary_sin",
    "window_index",
    "window_lengths",
    "window_restore",
)
NARROW_TOKENS = 64  # at 8 bits the crossover lies between 64 and 128


class Graphs:
    """Opens graphs by name, a task's or ``VISION``, and bounds how many stay open.

    Args:
        bundle: where the graphs are.
        precision: one of its precisions.
        device: "cpu" or "cuda".
        threads: cores to use.
        max_sessions: most graphs open at once, ``None``: all.
        memory_limit: most bytes of their sessions, ``None``: no limit.
    """

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        *,
        device: str,
        threads: int,
        max_sessions: int | None,
        memory_limit: int | None,
    ) -> None:
        self._bundle = bundle
        self._precision = precision
        self._settings = bundle.manifest.precisions[precision]
        self._inputs = bundle.manifest.model.inputs
        self._device = device
        self._threads = threads
        self._keeps_arena = memory_limit is None
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="embedge")
        self._size_bytes = functools.cache(functools.partial(bundle.graph_bytes, precision))
        self._pool = GraphPool(
            self._make, self._size_bytes, max_graphs=max_sessions, memory_limit=memory_limit
        )

    def use(self, name: str) -> AbstractContextManager[Lanes]:
        """A graph, kept open until the block ends.

        Raises:
            EmbedgeError: if one session of the graph is above the memory limit.
        """
        return self._pool.use(name)

    def lanes(self, name: str) -> int:
        """Batches of a graph that run at the same time."""
        small = self._device == "cpu" and self._size_bytes(name) <= SMALL_GRAPH_BYTES
        return self._threads if small else 1

    def batch_tokens(self, name: str) -> int:
        """Padded tokens, or patches, of a run that is fast here."""
        if self._device == "cuda":
            return GPU_BATCH_TOKENS
        if self._size_bytes(name) <= SMALL_GRAPH_BYTES:
            return CPU_BATCH_TOKENS_PER_THREAD
        return CPU_BATCH_TOKENS_PER_THREAD * max(2, self._threads)

    def _make(self, name: str, may_open_second: Callable[[], bool]) -> Lanes:
        # Constants are listed where products are 8-bit integers.
        narrow_tokens = NARROW_TOKENS if self._settings.activation_constants else 0
        return Lanes(
            functools.partial(self._open, name),
            may_open_second,
            threads=self._threads,
            executor=self._executor if self.lanes(name) > 1 else None,
            narrow_tokens=narrow_tokens,
        )

    def _open(self, name: str, threads: int) -> GraphSession:
        return GraphSession(
            self._bundle.graph(self._precision, name),
            device=self._device,
            threads=threads,
            constants=self._settings.activation_constants,
            inputs=VISION_INPUTS if name == VISION and self._settings.vision else self._inputs,
            arena=self._keeps_arena,
        )
