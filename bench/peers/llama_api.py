"""llama.cpp's C interface, as far as hidden states need it: rows of the token table in, states out.

Imports no torch, so that a child process that only tries a file starts in a moment.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
from llama_cpp import _ggml
from numpy.typing import NDArray

__all__ = ["LlamaFile", "quantize", "silence"]

Floats = NDArray[np.float32]
_CELLS = 256  # the cache of a sequence is rounded up to as many tokens
_CONTEXTS = 4  # kept open, each of other sizes
_CAUSAL_UBATCH = 512  # llama.cpp's default: tokens that run at once


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


class LlamaFile:
    """A GGUF file opened by llama.cpp.

    Args:
        file: the model.
        threads: of every call.
        causal: whether tokens see only those before them; else a call's tokens all run at once.
        repack: let weights be laid out anew for the processor, which is the default.
    """

    def __init__(self, file: Path, threads: int, *, causal: bool, repack: bool = True) -> None:
        silence()
        settings = api.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = repack
        self._threads, self._causal = threads, causal
        self._contexts: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._model: Any = api.llama_model_load_from_file(bytes(file), settings)
        if not self._model:
            raise ValueError(f"{file.name}: llama.cpp does not load it")
        weakref.finalize(self, _close, self._contexts, self._model)

    def hidden(self, rows: Floats, lengths: NDArray[np.int64]) -> Floats:
        """Return the last hidden states, float32 ``[tokens, width]``.

        Args:
            rows: of the token table, C-contiguous float32 ``[tokens, width]``, text after text.
            lengths: tokens of each text, int64.
        """
        context = self._context(len(lengths), int(lengths.max()))
        layout = _Layout.of(lengths)
        batch = api.llama_batch()
        batch.n_tokens = len(rows)
        batch.embd = _pointer(rows, ctypes.c_float)
        batch.pos = _pointer(layout.position, ctypes.c_int32)
        batch.n_seq_id = _pointer(layout.counts, ctypes.c_int32)
        batch.seq_id = _pointer(layout.pointers, ctypes.POINTER(ctypes.c_int32))
        if self._causal:
            api.llama_memory_clear(api.llama_get_memory(context), False)
        run = api.llama_decode if self._causal else api.llama_encode
        status = run(context, batch)
        if status != 0:
            raise ValueError(f"llama.cpp on {len(lengths)} texts, {len(rows)} tokens: {status}")
        output = api.llama_get_embeddings(context)
        return np.array(np.ctypeslib.as_array(output, rows.shape), dtype=np.float32)

    def _context(self, sequences: int, tokens: int) -> Any:
        """Return a context for as many sequences of as many tokens, one used before if there is."""
        cells = -(-tokens // _CELLS) * _CELLS
        key = sequences, cells
        if key in self._contexts:
            self._contexts.move_to_end(key)
            return self._contexts[key]
        settings = api.llama_context_default_params()
        settings.n_seq_max = sequences
        settings.n_ctx = settings.n_batch = settings.n_ubatch = sequences * cells
        if self._causal:
            settings.n_ubatch = min(settings.n_batch, _CAUSAL_UBATCH)
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.embeddings = True
        settings.pooling_type = api.LLAMA_POOLING_TYPE_NONE
        context = api.llama_init_from_model(self._model, settings)
        if not context:
            raise ValueError(f"llama.cpp makes no context of {sequences} x {cells} tokens")
        self._contexts[key] = context
        if len(self._contexts) > _CONTEXTS:
            api.llama_free(self._contexts.popitem(last=False)[1])
        return context


def quantize(file: Path, kind: str, out: Path, threads: int) -> None:
    """Write a file's tensors in another type, by llama.cpp's own rules of which gets which.

    Args:
        file: in float16.
        kind: ``"Q8_0"``, ``"Q4_K_M"`` and so on, a name of ``LLAMA_FTYPE_MOSTLY_…``.
        out: where to.
        threads: to work with.
    """
    silence()
    settings = api.llama_model_quantize_default_params()
    settings.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = threads
    status = api.llama_model_quantize(bytes(file), bytes(out), ctypes.byref(settings))
    if status != 0:
        raise ValueError(f"llama_model_quantize to {kind}: {status}")


def silence() -> None:
    """Start llama.cpp, and keep it from writing its progress to standard error.

    Raises:
        ValueError: it has no kernels for a CPU.
    """
    api.llama_log_set(_NOTHING, None)
    api.llama_backend_init()
    ggml, folder = _ggml.libggml, _ggml.libggml_base_path
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    if not ggml.ggml_backend_reg_count():  # built with GGML_BACKEND_DL: kernels are files beside it
        ggml.ggml_backend_load_all_from_path(bytes(folder))
    if not ggml.ggml_backend_reg_count():
        raise ValueError(f"{folder}: expected libggml-cpu-*, kernels of llama.cpp; found none")


def _close(contexts: Mapping[tuple[int, int], Any], model: Any) -> None:
    for context in contexts.values():
        api.llama_free(context)
    api.llama_model_free(model)


def _pointer(values: NDArray[Any], kind: Any) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(kind))


_NOTHING = api.llama_log_callback(lambda level, text, data: None)  # llama.cpp keeps its address
