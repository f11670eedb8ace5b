"""Tries a GGUF file in a child process, where a fault of llama.cpp's ends nothing else.

Some versions of GCC, 12.2 for one, drop most of the tile configuration of ggml's AMX kernels as stores
that nobody reads; the first product with repacked weights then ends the process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

__all__ = ["runs"]

_TOKENS = 64  # more than the few that other kernels take


def runs(file: Path, width: int, *, causal: bool) -> bool:
    """Return whether llama.cpp embeds with the file's weights repacked.

    Args:
        file: the model.
        width: of its hidden states.
        causal: as for :class:`LlamaFile`.
    """
    command = [sys.executable, "-m", __name__, str(file), str(width), str(int(causal))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 0:  # a Python error, no fault
        raise ValueError((done.stderr.strip().splitlines() or ["llama.cpp failed"])[-1])
    return done.returncode == 0


def _try(file: str, width: str, causal: str) -> None:
    from embedge.bench.peers.llama_api import LlamaFile

    rows = np.full((_TOKENS, int(width)), 0.1, dtype=np.float32)
    LlamaFile(Path(file), 1, causal=causal == "1").hidden(rows, np.array([_TOKENS]))


if __name__ == "__main__":
    _try(*sys.argv[1:])
