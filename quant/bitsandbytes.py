"""How bitsandbytes stores weights: 4 bits in blocks (NF4, FP4), scales of 8 bits, and LLM.int8; in numpy.

4 bits: a tensor is read as one long row, in blocks of neighbours. Each block has an absolute maximum, float32,
and each value is the nearest of 16 fractions of it. *Double quantization* stores these maxima themselves in 8
bits: less their mean, in blocks of 256. LLM.int8 has a maximum for each row, and 8 bits a value.

Every product is one of float32, rounded once to the dtype that the weights were loaded in. So bitsandbytes
computes on CPUs and on CUDA, and numbers here equal its to the bit. Two steps of its double quantization have no
one result: the mean, whose last bit goes by the order of the sum, and the choice between two neighbouring
8-bit fractions, which its CPU kernels look up in a table of 65536 steps since 0.50. Here the mean is rounded
once, and the nearest fraction taken, as on CUDA.

Sources: Dettmers et al., "QLoRA", arXiv 2305.14314 (NF4's fractions: appendix E; double quantization: section
3); "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861 (the dynamic map); "LLM.int8()", arXiv
2208.07339; bitsandbytes 0.50, ``backends/default/ops.py`` and ``functional.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

NESTED_BLOCK = 256  # scales that share one of their own
_SMALLEST = np.float32(1e-38)  # in place of the maximum of a block of zeros
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (
    0,
    0.0625,
    8,
    12,
    4,
    6,
    2,
    3,
    0,
    -0.0625,
    -8,
    -12,
    -4,
    -6,
    -2,
    -3,
)  # twelfths, by their bits

CODES: Mapping[str, FloatArray] = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array(_FP4, np.float32) / np.float32(12),
}
"""float32 ``[16]``: the fraction of its block's maximum that each 4-bit code is, by the type's name."""


def to_bfloat16(values: FloatArray) -> FloatArray:
    """Round finite float32 to the nearest bfloat16, ties to even; those beyond become infinite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bits = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def to_float16(values: FloatArray) -> FloatArray:
    """Round float32 to the nearest float16, ties to even; those beyond become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


ROUND: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "float32": lambda values: values,
    "bfloat16": to_bfloat16,
    "float16": to_float16,
}
"""float32 to the nearest numbers of a dtype, as float32, by the dtype's name in torch."""


def unpack(packed: ByteArray, first: int, last: int) -> ByteArray:
    """Return the codes ``first … last - 1`` of a packed row.

    Args:
        packed: uint8, two codes a byte, the first of them in the upper half.
        first: number of the first code.
        last: the number after the last.
    """
    some = packed[first // 2 : (last + 1) // 2]
    codes = np.empty(2 * some.size, np.uint8)
    codes[::2], codes[1::2] = some >> 4, some & 0xF
    return codes[first % 2 :][: last - first]


def dequantize(
    codes: ByteArray, absmax: FloatArray, table: FloatArray, block_size: int, first: int = 0
) -> FloatArray:
    """Return neighbouring values of a tensor that is stored in blocks.

    Args:
        codes: uint8 ``[n]``.
        absmax: float32 ``[blocks]``, of the whole tensor.
        table: float32, the fraction that each code is.
        block_size: values that share a maximum.
        first: number of the first value in the tensor, read as one row.

    Returns:
        float32 ``[n]``, each one product.
    """
    values = table[codes]
    begin = (-first) % block_size  # values before the first whole block
    blocks = absmax[first // block_size :]
    if begin:
        values[:begin] *= blocks[0]
        blocks = blocks[1:]
    whole = (values.size - begin) // block_size if values.size > begin else 0
    end = begin + whole * block_size
    values[begin:end].reshape(whole, block_size)[:] *= blocks[:whole, None]
    if values.size > end:
        values[end:] *= blocks[whole]
    return values


def quantize(
    values: FloatArray, table: FloatArray, block_size: int
) -> tuple[ByteArray, FloatArray]:
    """Store a tensor in blocks.

    Args:
        values: float32 ``[n]``, the tensor as one row.
        table: float32, the fraction that each code is.
        block_size: values that share a maximum.

    Returns:
        Codes, uint8 ``[n]``, and absolute maxima of the blocks, float32 ``[⌈n / block_size⌉]``.
    """
    whole = values.size // block_size
    end = whole * block_size
    blocks = values[:end].reshape(whole, block_size)
    absmax = np.abs(blocks).max(axis=1) if whole else np.empty(0, np.float32)
    scaled = np.empty_like(values)
    inverse = np.float32(1) / np.maximum(absmax, _SMALLEST)
    np.multiply(blocks, inverse[:, None], out=scaled[:end].reshape(whole, block_size))
    if (
        values.size > end
    ):  # divided, and not multiplied: so bitsandbytes does with the last block alone
        last = np.maximum(np.abs(values[end:]).max(), _SMALLEST)
        absmax = np.append(absmax, last)
        np.divide(values[end:], last, out=scaled[end:])
    return nearest(np.clip(scaled, -1, 1, out=scaled), table), absmax


def nearest(scaled: FloatArray, table: FloatArray) -> ByteArray:
    """Return the code of the nearest fraction of each value, uint8; of two as near, the lower one's.

    Args:
        scaled: float32 from -1 to 1, of any shape.
        table: float32, the fraction that each code is.
    """
    order = np.argsort(table, kind="stable")
    ordered = table[order]
    middle = (ordered[:-1] + ordered[1:]) / np.float32(2)
    return order.astype(np.uint8)[np.searchsorted(middle, scaled, side="left")]


@cache
def dynamic_map() -> FloatArray:
    """Return bitsandbytes' fractions of 8 bits, float32 ``[256]``, sorted: exponents of ten, and what bits remain."""
    positive: list[float] = []
    for exponent in range(7):
        edges = _linspace(2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive += (np.float32(10.0 ** (exponent - 6)) * means).tolist()
    return np.array(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), np.float32)


def _linspace(count: int) -> FloatArray:
    """``torch.linspace(0.1, 1, count)``: float32, counted from the nearer end, each rounded once."""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    number = np.arange(count)
    values = np.where(number < count // 2, first + step * number, last - step * number[::-1])
    return values.astype(np.float32)


def double_quantized(absmax: FloatArray) -> FloatArray:
    """Return maxima of blocks as double quantization restores them.

    Args:
        absmax: float32 ``[blocks]``.
    """
    offset = np.float32(absmax.mean(dtype=np.float64))
    codes, nested = quantize(absmax - offset, dynamic_map(), NESTED_BLOCK)
    return dequantize(codes, nested, dynamic_map(), NESTED_BLOCK) + offset


def int8_rows(weight: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """Store a matrix as LLM.int8 does, which rounds it to float16 first.

    Args:
        weight: float32 ``[out, in]``.

    Returns:
        int8 ``[out, in]`` and the maxima of the rows, float32 ``[out]``.
    """
    half = to_float16(weight)
    absmax = np.abs(half).max(axis=1)
    inverse = np.divide(1, absmax, out=np.zeros_like(absmax), where=absmax > 0)
    factor = inverse * np.float32(127)  # torch divides a number so
    return np.rint(half * factor[:, None]).astype(np.int8), absmax


def dequantize_int8(rows: NDArray[np.int8], absmax: FloatArray) -> FloatArray:
    """Return what LLM.int8 has stored.

    Args:
        rows: int8 ``[out, in]``.
        absmax: float32 ``[out]``.

    Returns:
        float32 ``[out, in]``.
    """
    values: FloatArray = rows.astype(np.float32) * absmax[:, None]
    values *= np.float32(1 / 127)
    return values
