"""llama.cpp: Llama, Qwen2, Qwen3, EuroBERT and BERT in float16 and in the types that its users take, Q8_0 to Q4_0.

Its graph of a decoder ends in a product with the whole token table for every token, which no
embedding needs. So it runs on a file with a table of a few rows and gets the rows of the real table,
as the quantized file has them, in place of ids; ``bytes_on_disk`` is of the whole file. All else is
its default: flash attention, a cache of keys and values in float16, weights repacked for the
processor. Each text is a sequence of its own; an encoder, whose tokens all look at all of a call's,
gets at most as many at once as fill 512 tokens. Widths that no multiple of 256 divides get other types
than Q4_K, by llama.cpp's own rules. Its GELU is the approximation by tanh, also for BERT.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.gguf import ENCODERS, read_table, write_gguf
from embedge.bench.peers.hidden_state import HiddenStateSystem
from embedge.bench.peers.llama_probe import runs
from embedge.bench.systems.tokens import Ids

__all__ = ["f16", "q4_0", "q4_k_m", "q8_0"]

_WHOLE, _BODY = "whole.gguf", "body.gguf"
_ROWS = 32  # of the table in the file that runs: what a quantized block needs at least
_ENCODED = 512  # tokens of an encoder's call, unless a single text has more
_NOT_REPACKED = (
    "its weights are not repacked for this processor, as this build of llama.cpp crashes with such; if "
    "the processor has AMX, install it again with CXXFLAGS='-fno-dse -fno-tree-dse' or a newer compiler"
)


def _system(kind: str, context: PeerContext) -> HiddenStateSystem:
    from embedge.bench.peers.llama_api import LlamaFile, quantize

    tables = {_WHOLE: None, _BODY: _ROWS}

    def write(folder: Path) -> None:
        for name, rows in tables.items():
            write_gguf(context.merged.backbone, folder / name, rows)

    def write_quantized(folder: Path) -> None:
        for name in tables:
            quantize(floats / name, kind, folder / name, context.threads)

    floats = context.made("llama-F16", write)
    made = floats if kind == "F16" else context.made(f"llama-{kind}", write_quantized)
    whole, body = made / _WHOLE, made / _BODY
    table = read_table(whole)
    causal = context.config.model_type not in ENCODERS
    repack = runs(body, table.shape[1], causal=causal)
    model = LlamaFile(body, context.threads, causal=causal, repack=repack)

    def run(ids: Ids, mask: Ids) -> NDArray[np.float32]:
        hidden = np.zeros((*ids.shape, table.shape[1]), dtype=np.float32)
        step = len(ids) if causal else max(1, _ENCODED // ids.shape[1])
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            real = mask[part].astype(bool)
            rows = np.ascontiguousarray(table[ids[part][real]])
            hidden[part][real] = model.hidden(rows, mask[part].sum(axis=1))
        return hidden

    caveat = None if repack else _NOT_REPACKED
    return HiddenStateSystem(f"llama.cpp {kind}", run, context, whole.stat().st_size, caveat)


q8_0 = partial(_system, "Q8_0")
q4_0 = partial(_system, "Q4_0")
q4_k_m = partial(_system, "Q4_K_M")
f16 = partial(_system, "F16")
