"""The graphs of one precision of a bundle: opened when they are needed, with what runs fast here.

Measured on MiniLM-L6 at int8 with 2 threads: batches of 512 tokens at the same time, one thread each,
take 0.86 of the time of runs of 1024 with both threads (0.78 for 8 texts of 16 tokens). With AMX a text
of 16 tokens is 1.1 times as fast with one thread as with two, and past some 100 tokens two are faster;
with AVX512-VNNI two are 1.4 times as fast from 16 tokens on.
ONNX Runtime's kernel cuts 8-bit products into slices of 16 columns once there is a second thread, and
packs the left side again for each; with embedge's kernels, `embedge prepare` finds the same way the
fastest. At int4 and fp32 both ways are within 10 %, and a second session would hold the weights twice for
nothing; so are products with thousands of columns.

Past some tokens a batch no longer fits into the cores' caches, and every element-wise pass goes to
memory (bench/LOG.md).

These are the defaults; where `embedge prepare` measured a precision on the machine, what it found is
taken instead. Neither changes a vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from embedge.runtime.bundle.contract import VISION
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.graph_check import VISION_INPUTS
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.errors import BundleError
from embedge.runtime.host.fork import keep_forever, restart_after_fork
from embedge.runtime.host.processor import has_amx, saturates_u8s8
from embedge.runtime.host.workers import Workers
from embedge.runtime.sessions.packed_graphs import PreparedGraphs
from embedge.runtime.sessions.pool import GraphPool
from embedge.runtime.sessions.session import GraphSession
from embedge.runtime.sessions.session_workers import SessionWorkers
from embedge.runtime.sessions.unpack import unpacking
from embedge.runtime.tuning.cache import RunSettings

__all__ = ["SMALL_GRAPH_BYTES", "Graphs", "default_narrow_tokens", "graph_inputs"]

# Above it 8-bit products are wide enough for all threads: 12 layers of 768 columns are about 110 MB,
# 6 layers of 384 columns 23 MB.
SMALL_GRAPH_BYTES = 100_000_000
CPU_BATCH_TOKENS_PER_THREAD = 512
CPU_PADDING_TOKENS = 32  # what a run costs beside its tokens is about that of 20 to 30 tokens
GPU_BATCH_TOKENS = 4096  # more give an H100 no more texts a second, and cost memory (bench/LOG.md)
AMX_NARROW_TOKENS = 64  # the crossover lies between 64 and 128


class Graphs:
    """Opens graphs by name, a task's or ``VISION``, and bounds how many stay open.

    Args:
        bundle: where the graphs are.
        precision: one of its precisions.
        device: "cpu" or "cuda".
        device_index: number of the GPU.
        threads: cores to use.
        max_sessions: most graphs open at once, ``None``: all.
        memory_limit: most bytes of their sessions, ``None``: no limit.
        settings: how batches of the tasks' graphs run on a CPU, as measured; ``None``: the defaults.
        open_session: opens the session of a name and a number of threads; ``None``: each in its own.
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
        device_index: int = 0,
        settings: RunSettings | None = None,
        open_session: Callable[[str, int], GraphSession] | None = None,
    ) -> None:
        self._bundle = bundle
        self._precision = precision
        self._settings = bundle.manifest.precisions[precision]
        self._device = device
        self._device_index = device_index
        self._threads = threads
        self._keeps_arena = memory_limit is None
        self._measured = settings if device == "cpu" else None
        self._open_session = open_session or self.open
        self._prepared = PreparedGraphs(bundle)
        self._size_bytes = functools.cache(partial(bundle.graph_bytes, precision))
        self._token_rows = functools.cache(partial(bundle.token_rows, precision))
        self._new_pool = partial(
            GraphPool,
            size_bytes=self._size_bytes,
            max_graphs=max_sessions,
            memory_limit=memory_limit,
        )
        self._start()
        restart_after_fork(self)

    def _start(self) -> None:
        self._workers = Workers(self._threads)
        self._pool = self._new_pool(self._make)

    def restart(self) -> None:
        """In a forked child: without open graphs, those of the parent stay as they are."""
        keep_forever(self._pool)
        self._start()

    def use(self, name: str) -> AbstractContextManager[SessionWorkers]:
        """A graph, which is kept open inside the block.

        Raises:
            EmbedgeError: if one session of the graph is above the memory limit.
        """
        return self._pool.use(name)

    def close(self) -> None:
        """Closes the open graphs that are not in use."""
        self._pool.close_unused()

    def lanes(self, name: str) -> int:
        """Batches of a graph that run at the same time."""
        return self._threads if self.how(name).lanes else 1

    def batch_tokens(self, name: str) -> int:
        """Padded tokens, or patches, of a run that is fast here."""
        return GPU_BATCH_TOKENS if self._device == "cuda" else self.how(name).batch_tokens

    def token_rows(self, name: str) -> int | None:
        """Rows of the table in which a task's graph looks up token ids; ``None`` without such a table."""
        return self._token_rows(name)

    def max_padding(self) -> int | None:
        """Padding of a run that costs less than a second run would, in tokens; ``None``: any."""
        return None if self._device == "cuda" else CPU_PADDING_TOKENS

    def how(self, name: str) -> RunSettings:
        """How batches of a graph run on a processor: as measured, or the defaults."""
        if self._measured is not None and name in self._settings.graphs:
            return self._measured
        # Activation constants are listed where products are 8-bit integers.
        integer = self._device == "cpu" and bool(self._settings.activation_constants)
        narrow = integer and self._size_bytes(name) <= SMALL_GRAPH_BYTES
        return RunSettings(
            lanes=narrow,
            narrow_tokens=default_narrow_tokens(),
            batch_tokens=CPU_BATCH_TOKENS_PER_THREAD * (1 if narrow else max(2, self._threads)),
        )

    def _make(self, name: str, may_open_second: Callable[[], bool]) -> SessionWorkers:
        return SessionWorkers(
            partial(self._open_session, name),
            may_open_second,
            threads=self._threads,
            workers=self._workers if self.lanes(name) > 1 else None,
            narrow_tokens=self.how(name).narrow_tokens,
        )

    def open(self, name: str, threads: int) -> GraphSession:
        """A session of a graph, which nothing bounds.

        Raises:
            BundleError: if ONNX Runtime refuses the graph, or its files are not the bundle's any more.
        """
        prepared = self._find_prepared(name)
        if prepared is not None:
            try:
                return self._open(name, threads, prepared)
            except BundleError as error:
                self._prepared.warn(f"{prepared.parent}: not used: {error}")
        return self._open(name, threads, None)

    def _open(self, name: str, threads: int, prepared: Path | None) -> GraphSession:
        with self._bundle.reading(self._bundle.graph_files(self._precision, name)):
            return GraphSession(
                self._bundle.graph(self._precision, name),
                device=self._device,
                device_index=self._device_index,
                threads=threads,
                constants=self._settings.activation_constants,
                inputs=graph_inputs(self._bundle.manifest, self._precision, name),
                integer=self._bundle.multiplies_integers(self._precision),
                arena=self._keeps_arena,
                prepared=prepared,
                unpack=unpacking(self._bundle, self._precision, name, threads=self._threads),
            )

    def _find_prepared(self, name: str) -> Path | None:
        """What `embedge prepare` stored; not where other activation constants are needed."""
        if self._device != "cpu" or (self._settings.activation_constants and saturates_u8s8()):
            return None
        return self._prepared.find(self._precision, name)


def default_narrow_tokens() -> int:
    """Tokens up to which a text that is alone is faster with one thread, where nothing was measured."""
    return AMX_NARROW_TOKENS if has_amx() else 0


def graph_inputs(manifest: Manifest, precision: str, name: str) -> tuple[str, ...]:
    """Names of the inputs of a task's graph, or of ``VISION``."""
    is_tower = name == VISION and manifest.precisions[precision].vision is not None
    return tuple(VISION_INPUTS) if is_tower else tuple(manifest.model.inputs)
