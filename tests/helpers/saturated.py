"""Vectors of bundles, here or below an emulator: ``python -m tests.helpers.saturated JSON``."""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

from embedge.runtime import Embedder
from embedge.runtime.host.saturation import (
    describe_processor,
    keep_matmuls_exact,
    saturates_u8s8,
)
from embedge.runtime.kernels import library
from embedge.runtime.sessions import session as sessions

__all__ = ["found"]

TEXTS = ["ab", "a", "hello world, how are you?", "x" * 50, "0123456789 !"]


def found(int8: str, exported: list[list[str]]) -> dict[str, Any]:
    """What this processor gives, as JSON has it.

    Args:
        int8: a bundle of ``write_int8_bundle``, embedded by ONNX Runtime's kernels, asked for exact matmuls and
            not.
        exported: bundles and precisions.
    """
    return {
        "kernels": library.kernel_instructions(),
        "saturates": saturates_u8s8(),
        "line": describe_processor(),
        "int8": _asked_and_not(int8),
        "exported": {
            f"{bundle}={precision}": _of(bundle, precision) for bundle, precision in exported
        },
    }


def _asked_and_not(bundle: str) -> dict[str, Any]:
    texts = [f"w{i}" for i in range(30)]
    vectors: dict[str, Any] = {}
    for name, ask in (("asked", keep_matmuls_exact), ("not asked", lambda options: None)):
        with (
            mock.patch.object(sessions, "keep_matmuls_exact", ask),
            mock.patch.object(sessions, "own_kernels", return_value=False),
        ):
            model = Embedder(bundle, verify="none", threads=1)
            vectors[name] = model.encode(texts, batch_size=30).tolist()
            vectors[f"{name} alone"] = [model.encode(text).tolist() for text in texts]
    return vectors


def _of(bundle: str, precision: str) -> list[Any]:
    """Of all texts together, and of each alone."""
    model = Embedder(bundle, precision=precision, verify="none", threads=1)
    return [model.encode(TEXTS).tolist(), [model.encode(text).tolist() for text in TEXTS]]


if __name__ == "__main__":
    with mock.patch.object(library, "has_amx", return_value=False):  # the machine's, in /proc
        print(json.dumps(found(**json.loads(sys.argv[1]))))
