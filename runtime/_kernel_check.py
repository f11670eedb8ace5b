"""Tries embedge's kernels on small matrices whose exact results are known, before a process uses them.

A library may have been compiled by anything, and for another ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime._kernels import in_panels, register
from embedge.runtime._onnx_model import FLOAT, UINT8, one_node_model

__all__ = ["is_right"]

_ROWS = (1, 21, 130)  # the last ones in tasks, for two threads
_SIZES = ((130, 50), (256, 64))  # depth and columns: neither fills its panels; both do
_BLOCK = 32

Array = NDArray[Any]


def is_right(library: str) -> bool:
    """Whether the kernels give the exact results, products in both layouts."""
    draw = np.random.default_rng(5)
    products = (
        check(library, draw, *size, panels=panels)
        for size in _SIZES
        for panels in (False, True)
        for check in (_products_of_8_bits, _products_of_4_bits)
    )
    return all(products) and _quantizers(library, draw.permutation(np.arange(-40, 42)))


def _products_of_8_bits(
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
        products = (a.astype(np.int64) - 128) @ weight.astype(np.int64)
        if not np.array_equal(run(a), products * 0.5 + weights[b"other"]):
            return False
    return True


def _products_of_4_bits(
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
    """Of whole numbers around zero, the largest above it by one."""
    x = values.astype(np.float32)[None]
    step = np.array(1 / x.max(), np.float32)
    left = FLOAT, x.size
    weights: dict[bytes, Array] = {b"step": step, b"zero": np.full((1, 1), 128, np.uint8)}
    of_rows = _opened(library, "QuantizeRows", left, weights, (UINT8, x.size), outputs=2)
    scale = x.max() * step
    if not np.array_equal(of_rows(x), np.rint(x / scale) + 128):
        return False
    weights = {b"other": np.ones_like(x), b"step": step}
    half = x[:, : x.size // 2]
    of_halves = _opened(library, "QuantizeHalves", left, weights, (UINT8, half.size), outputs=5)
    scale = (half.max() - half.min()) * step
    return np.array_equal(of_halves(x), np.rint((half - half.min()) / scale))


def _opened(
    library: str,
    op_type: str,
    left: tuple[int, int],
    weights: Mapping[bytes, Array],
    result: tuple[int, int],
    *,
    panels: bool = False,
    domain: bytes = b"embedge",
    outputs: int = 1,
    attributes: Mapping[bytes, int] | None = None,
) -> Callable[[Array], Array]:
    """Runs one operator of the library on ``[rows, columns]``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
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
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda a: np.asarray(session.run(None, {"a": a})[0])
