"""What decides the batch size, and whether batches run at the same time or one by one.

In this order:
    1. ``batch_size`` (32 rows unless a call says otherwise) and ``max_batch_tokens`` of a call
       (:mod:`embedge.runtime.encode.batches`);
    2. what `embedge prepare` measured of the precision on this machine (:mod:`embedge.runtime.tuning.cache`);
    3. the tokens and threads below.

None of them changes a vector.

Measured on MiniLM-L6 at int8 with 2 threads: batches of 512 tokens at the same time, one thread each,
take 0.86 of the time of runs of 1024 with both threads (0.78 for 8 texts of 16 tokens). With AMX a text
of 16 tokens is 1.1 times as fast with one thread as with two, and past some 100 tokens two are faster;
with AVX512-VNNI two are 1.4 times as fast from 16 tokens on.
ONNX Runtime's kernel cuts 8-bit matmuls into slices of 16 columns once there is a second thread, and
packs the left side again for each; with embedge's kernels, `embedge prepare` finds the same way the
fastest. At int4 and fp32 both ways are within 10 %, and a second session would hold the weights twice for
nothing; so are matmuls with thousands of columns.

Past some tokens a batch no longer fits into the cores' caches, and every element-wise pass goes to
memory (lab note 9).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from embedge.runtime.bundle.contract import MAPS
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.host.processor import has_amx
from embedge.runtime.sessions.session import SessionConfig
from embedge.runtime.sessions.session_workers import RunSettings

__all__ = [
    "MAX_PADDING_TOKENS",
    "SMALL_GRAPH_BYTES",
    "default_settings",
    "has_8_bit_matmuls",
    "settings_by_graph",
]

# Above it 8-bit matmuls are wide enough for all threads: 12 layers of 768 columns are about 110 MB,
# 6 layers of 384 columns 23 MB.
SMALL_GRAPH_BYTES = 100_000_000
CPU_BATCH_TOKENS_PER_THREAD = 512
GPU_BATCH_TOKENS = 4096  # more give an H100 no more texts a second, and cost memory (lab note 33)
# Padding of a batch that costs less than a further run: about 20 to 30 tokens. ``None``: any.
MAX_PADDING_TOKENS = {"cpu": 32, "cuda": None}
AMX_SINGLE_THREAD_TOKENS = 64  # the crossover lies between 64 and 128


def default_settings(
    bundle: Bundle, precision: str, name: str, config: SessionConfig
) -> RunSettings:
    """How the batches of a graph run where nothing was measured.

    Args:
        bundle: whose graph.
        precision: one of its precisions.
        name: of a task, or ``VISION``.
        config: how it is opened.
    """
    if config.device == "cuda":
        return RunSettings(
            batch_tokens=GPU_BATCH_TOKENS, single_thread=False, single_thread_tokens=0
        )
    single_thread = (
        has_8_bit_matmuls(bundle, precision)
        and bundle.graph_bytes(precision, name) <= SMALL_GRAPH_BYTES
    )
    return RunSettings(
        single_thread=single_thread,
        single_thread_tokens=AMX_SINGLE_THREAD_TOKENS if has_amx() else 0,
        batch_tokens=CPU_BATCH_TOKENS_PER_THREAD * (1 if single_thread else max(2, config.threads)),
    )


def has_8_bit_matmuls(bundle: Bundle, precision: str) -> bool:
    """Whether a precision's graphs multiply 8-bit integers: they list the constants of such inputs."""
    return bool(bundle.manifest.precisions[precision].activation_constants)


def settings_by_graph(
    bundle: Bundle,
    precision: str,
    config: SessionConfig,
    *,
    measured: RunSettings | None = None,
) -> Callable[[str], RunSettings]:
    """How the batches of each graph of a precision run, by its name.

    Args:
        bundle: whose graphs.
        precision: one of its precisions.
        config: how they are opened.
        measured: of a task's graph, on this machine's processor; ``None``: the defaults.
    """
    tasks = {*bundle.manifest.precisions[precision].graphs, MAPS}

    @functools.cache
    def settings(name: str) -> RunSettings:
        if measured is not None and config.device == "cpu" and name in tasks:
            return measured
        return default_settings(bundle, precision, name, config)

    return settings
