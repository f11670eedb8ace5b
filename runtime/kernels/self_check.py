"""Tries embedge's kernels on small matrices whose results are known, before a process uses them.

A library may have been compiled by anything, and for another ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.onnx_model import FLOAT, UINT8
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session
from embedge.runtime.host.probe_models import one_node_model
from embedge.runtime.kernels.register import register
from embedge.runtime.kernels.repack import in_panels

__all__ = ["is_right"]

_ROWS = (1, 21, 130)  # the last ones in tasks, for two threads
_SIZES = ((130, 50), (256, 64))  # depth and columns: neither fills its panels; both do
_BLOCK = 32
_BLOCK_ROTATED = 16
_LEVEL = 0.51  # of rounding to a level
_SCALE = 0.2
_ROUNDING = 0.04  # of a mean of values up to 4, of factors in bfloat16

Array = NDArray[Any]


def is_right(library: str) -> bool:
    """Whether the kernels give the known results, matmuls in both layouts to the bit."""
    draw = np.random.default_rng(5)
    matmuls = (
        check(library, draw, *size, panels=panels)
        for size in _SIZES
        for panels in (False, True)
        for check in (_matmuls_of_8_bits, _matmuls_of_4_bits)
    )
    quantizers = _quantizers(library, draw.permutation(np.arange(-40, 42)))
    return all(matmuls) and quantizers and _swiglu(library, draw) and _attention(library, draw)


def _matmuls_of_8_bits(
    library: str, draw: np.random.Generator, depth: int, columns: int, *, panels: bool
) -> bool:
    weight = draw.integers(-127, 128, (depth, columns), np.int8)
    weights: dict[bytes, Array] = {
        b"w": in_panels(weight) if panels else weight,
        b"a_scale": np.ones(1, np.float32),
        b"w_scale": np.full(columns, 0.5, np.float32),
        b"other": np.arange(columns, dtype=np.float32),
        b"zero": np.full(1, 128, np.uint8),
    }
    op_type = "MatMulIntegerToFloatAdd"
    run = _opened(library, op_type, (UINT8, depth), weights, (FLOAT, columns), panels=panels)
    for rows in _ROWS:
        a = draw.integers(0, 256, (rows, depth), np.uint8)
        result = (a.astype(np.int64) - 128) @ weight.astype(np.int64)
        if not np.array_equal(run(a), result * 0.5 + weights[b"other"]):
            return False
    return True


def _matmuls_of_4_bits(
    library: str, draw: np.random.Generator, depth: int, columns: int, *, panels: bool
) -> bool:
    """Of rows whose blocks have a largest value of 127, so that they are integers as they are."""
    depth = -(-depth // _BLOCK) * _BLOCK
    blocks = depth // _BLOCK
    weight = draw.integers(0, 256, (columns, blocks, _BLOCK // 2), np.uint8)
    zeros = draw.integers(0, 256, (columns, (blocks + 1) // 2), np.uint8)
    weights: dict[bytes, Array] = {
        b"w": in_panels(weight) if panels else weight,
        b"scales": np.full((columns, blocks), 0.5, np.float32),
        b"zeros": zeros,
    }
    sizes = {b"K": depth, b"N": columns, b"bits": 4, b"block_size": _BLOCK, b"accuracy_level": 4}
    run = _opened(
        *(library, "MatMulNBits", (FLOAT, depth), weights, (FLOAT, columns)),
        panels=panels,
        domain=b"com.microsoft",
        attributes=sizes,
    )
    values = _nibbles(weight).astype(np.int64) - _nibbles(zeros)[:, :blocks, None]
    for rows in _ROWS:
        a = draw.integers(-127, 128, (rows, blocks, _BLOCK)).astype(np.float32)
        a[..., 5] = 127
        a = a.reshape(rows, depth)
        if not np.array_equal(run(a), a @ values.reshape(columns, depth).T * 0.5):
            return False
    return True


def _nibbles(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 ``[..., 2 · n]`` of ``[..., n]``, the low half of a byte first."""
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)


def _quantizers(library: str, values: Array) -> bool:
    """Of whole numbers around zero, the largest above it by one; rotated, each one four times its block's."""
    x = values.astype(np.float32)[None]
    step = np.array(1 / x.max(), np.float32)
    left = FLOAT, x.size
    zero = np.full((1, 1), 128, np.uint8)
    weights: dict[bytes, Array] = {b"step": step, b"zero": zero}
    of_rows = _opened(library, "QuantizeRows", left, weights, (UINT8, x.size), outputs=2)
    if not np.array_equal(of_rows(x), np.rint(x / (x.max() * step)) + 128):
        return False
    rotation = np.full((_BLOCK_ROTATED, _BLOCK_ROTATED), 0.25, np.float32)
    blocks = np.array([0, 0, -1, _BLOCK_ROTATED], np.int64)
    x = x[:, : x.size // _BLOCK_ROTATED * _BLOCK_ROTATED]
    weights = {
        **{b"other": np.ones_like(x), b"rotation": rotation, b"blocks": blocks},
        **{b"step": step, b"zero": zero},
    }
    rotated = _opened(
        library, "QuantizeRotated", (FLOAT, x.size), weights, (UINT8, x.size), outputs=2
    )
    expected = (x.reshape(-1, _BLOCK_ROTATED) @ rotation).reshape(x.shape)
    scale = np.abs(expected).max() * step
    return np.array_equal(rotated(x), np.rint(expected / scale) + 128)


def _swiglu(library: str, draw: np.random.Generator) -> bool:
    """``silu(x) · 1`` beside numpy's, unrotated."""
    x = draw.normal(size=(3, 48)).astype(np.float32)
    weights: dict[bytes, Array] = {
        b"other": np.ones((3, 48), np.float32),
        b"rotation": np.ones((1, 1), np.float32),
        b"blocks": np.array([0, 0, -1, 1], np.int64),
        b"step": np.array(1 / 127, np.float32),
        b"zero": np.full((3, 1), 128, np.uint8),
    }
    run = _opened(library, "QuantizeRotatedSwiGLU", (FLOAT, 48), weights, (UINT8, 48), outputs=2)
    expected = x / (1 + np.exp(-x))
    expected *= 127 / np.abs(expected).max(axis=1, keepdims=True)
    return bool(np.abs(run(x) - 128.0 - expected).max() < _LEVEL)


def _attention(library: str, draw: np.random.Generator) -> bool:
    """Beside numpy's softmax: in tasks and in one, causal and of a text with padding."""
    for tokens, causal in ((300, True), (40, False)):
        size = 24
        q, k, v = (draw.normal(size=(1, tokens, size)).astype(np.float32) for _ in range(3))
        length = tokens if causal else 33
        weights: dict[bytes, Array] = {b"k": k, b"v": v}
        sizes: dict[bytes, float] = {b"num_heads": 1, b"kv_num_heads": 1, b"scale": _SCALE}
        if causal:
            weights[b"lengths"] = np.full(1, tokens - 1, np.int32)
            weights[b"total"] = np.full(1, tokens, np.int32)
            sizes[b"local_window_size"] = -1
        else:
            weights[b"lengths"] = np.full(1, length, np.int64)
        run = _opened(
            library,
            "CausalAttention" if causal else "PaddedAttention",
            (FLOAT, tokens, size),
            weights,
            (FLOAT, tokens, size),
            attributes=sizes,
        )
        scores = np.exp(_SCALE * (q[0] @ k[0].T))
        scores[:, length:] = 0
        if causal:
            scores = np.tril(scores)
        expected = scores @ v[0] / scores.sum(axis=1, keepdims=True)
        if not np.abs(run(q)[0] - expected).max() < _ROUNDING:  # a NaN is not
            return False
    return True


def _opened(
    library: str,
    op_type: str,
    left: tuple[int, ...],
    weights: Mapping[bytes, Array],
    result: tuple[int, ...],
    *,
    panels: bool = False,
    domain: bytes = b"embedge",
    outputs: int = 1,
    attributes: Mapping[bytes, float] | None = None,
) -> Callable[[Array], Array]:
    """Runs one operator of the library on rows of some columns, or of ``[tokens, columns]``."""
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    register(options, library, panels=panels)
    model = one_node_model(
        op_type.encode(),
        domain=domain,
        inputs={b"a": left},
        weights=weights,
        output=result,
        outputs=outputs,
        attributes=attributes,
    )
    session = open_session(model, options, ["CPUExecutionProvider"])
    return lambda a: np.asarray(session.run(None, {"a": a})[0])
