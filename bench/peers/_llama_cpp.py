"""llama.cpp: Llama and Qwen2 in float16 and in the types that its users take, Q8_0 to Q4_0.

Its graph of a decoder ends in a product with the whole token table for every token, which no
embedding needs. So it runs on a file with a table of a few rows and gets the rows of the real table,
as the quantized file has them, in place of ids; ``bytes_on_disk`` is of the whole file. All else is
its default: flash attention, a cache of keys and values in float16, weights repacked for the
processor. Each text is a sequence of its own.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench._tokens import Ids
from embedge.bench.peers._context import PeerContext
from embedge.bench.peers._gguf import read_table, write_gguf
from embedge.bench.peers._hidden_state import HiddenStateSystem

__all__ = ["f16", "q4_0", "q4_k_m", "q8_0"]

_ROWS = 32  # of the table in the file that runs: what a quantized block needs at least
_CELLS = 256  # the cache of a sequence is rounded up to as many tokens
_CONTEXTS = 4  # kept open, each of other sizes


@dataclass(frozen=True)
class _Layout:
    """A batch without its values: which row is which position of which sequence."""

    position: NDArray[np.int32]
    counts: NDArray[np.int32]
    sequence: NDArray[np.int32]
    pointers: NDArray[np.uint64]

    @staticmethod
    def of(lengths: NDArray[np.int64]) -> _Layout:
        total = int(lengths.sum())
        sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        start = sequence.ctypes.data
        pointers = start + np.arange(total, dtype=np.uint64) * np.uint64(sequence.itemsize)
        return _Layout(position, np.ones(total, np.int32), sequence, pointers.astype(np.uint64))


class _LlamaCppSystem(HiddenStateSystem):
    def __init__(self, name: str, file: Path, whole: Path, context: PeerContext) -> None:
        super().__init__(name, context.source, context.tokens, whole.stat().st_size)
        import llama_cpp

        self._api: Any = llama_cpp
        self._threads = context.threads
        self._table = read_table(whole)
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(bytes(file), settings)
        if not self._model:
            raise ValueError(f"{file.name}: llama.cpp does not load it")
        self._contexts: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def forward(self, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        lengths = mask.sum(axis=1)
        real = mask.astype(bool)
        rows = np.ascontiguousarray(self._table[ids[real]])
        context = self._context(len(ids), int(lengths.max()))
        layout = _Layout.of(lengths)
        api = self._api
        batch = api.llama_batch()
        batch.n_tokens = len(rows)
        batch.embd = _pointer(rows, ctypes.c_float)
        batch.pos = _pointer(layout.position, ctypes.c_int32)
        batch.n_seq_id = _pointer(layout.counts, ctypes.c_int32)
        batch.seq_id = _pointer(layout.pointers, ctypes.POINTER(ctypes.c_int32))
        api.llama_memory_clear(api.llama_get_memory(context), False)
        status = api.llama_decode(context, batch)
        if status != 0:
            raise ValueError(f"llama_decode of {len(ids)} x {ids.shape[1]} tokens: {status}")
        output = api.llama_get_embeddings(context)
        hidden = np.zeros((*ids.shape, rows.shape[1]), dtype=np.float32)
        hidden[real] = np.ctypeslib.as_array(output, rows.shape)
        return hidden

    def _context(self, sequences: int, tokens: int) -> Any:
        """Return a context for as many sequences of as many tokens, one used before if there is."""
        cells = -(-tokens // _CELLS) * _CELLS
        key = sequences, cells
        if key in self._contexts:
            self._contexts.move_to_end(key)
            return self._contexts[key]
        api = self._api
        settings = api.llama_context_default_params()
        settings.n_seq_max = sequences
        settings.n_ctx = settings.n_batch = sequences * cells
        settings.n_ubatch = min(settings.n_batch, 512)
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.embeddings = True
        settings.pooling_type = api.LLAMA_POOLING_TYPE_NONE
        settings.attention_type = api.LLAMA_ATTENTION_TYPE_CAUSAL
        context = api.llama_init_from_model(self._model, settings)
        if not context:
            raise ValueError(f"llama.cpp makes no context of {sequences} x {cells} tokens")
        self._contexts[key] = context
        if len(self._contexts) > _CONTEXTS:
            api.llama_free(self._contexts.popitem(last=False)[1])
        return context

    def __del__(self) -> None:
        for context in getattr(self, "_contexts", {}).values():
            self._api.llama_free(context)
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)


def _system(kind: str, context: PeerContext) -> HiddenStateSystem:
    import llama_cpp

    _silence()
    paths = []
    for name, rows in (("whole", None), ("body", _ROWS)):
        file = context.workdir / f"llama-{name}-F16.gguf"
        if not file.exists():
            write_gguf(context.merged.backbone, file, rows)
        made = context.workdir / f"llama-{name}-{kind}.gguf"
        if not made.exists():
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
            settings.nthread = context.threads
            status = llama_cpp.llama_model_quantize(
                bytes(file), bytes(made), ctypes.byref(settings)
            )
            if status != 0:
                raise ValueError(f"llama_model_quantize to {kind}: {status}")
        paths.append(made)
    whole, body = paths
    return _LlamaCppSystem(f"llama.cpp {kind}", body, whole, context)


def _silence() -> None:
    """Keep llama.cpp from writing its progress to standard error."""
    import llama_cpp

    llama_cpp.llama_log_set(_nothing(), None)
    llama_cpp.llama_backend_init()


def _nothing() -> Any:
    """Return a callback that says nothing, the same one each time: llama.cpp keeps its address."""
    global _CALLBACK  # noqa: PLW0603
    import llama_cpp

    if _CALLBACK is None:
        _CALLBACK = llama_cpp.llama_log_callback(lambda level, text, data: None)
    return _CALLBACK


_CALLBACK: Any = None


def _pointer(values: NDArray[Any], kind: Any) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(kind))


q8_0 = partial(_system, "Q8_0")
q4_0 = partial(_system, "Q4_0")
q4_k_m = partial(_system, "Q4_K_M")
f16 = partial(_system, "F16")
