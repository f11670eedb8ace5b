"""Vectors as fewer bytes: float16, 8 bits a dimension, or one.

Named and behaving as sentence-transformers' ``quantize_embeddings`` (version 6): 8-bit codes divide the range of each
dimension into 255 steps, what lies outside is clipped, and bits tell which values are above zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.arguments import check_choice
from embedge.runtime.errors import EmbedgeValueError

__all__ = [
    "CODE_STEPS",
    "OUTPUT_FORMATS",
    "RANGED",
    "Ranges",
    "as_ranges",
    "code_dtype",
    "code_width",
    "dequantize_embeddings",
    "is_code",
    "quantize_embeddings",
    "ranges_of",
]

Vectors = NDArray[np.float32]
Codes = NDArray[Any]
Ranges = NDArray[np.float32]  # [2, dim]: the lowest and the highest value of each dimension

_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "uint8": np.uint8,
    "binary": np.int8,
    "ubinary": np.uint8,
}
OUTPUT_FORMATS = tuple(_DTYPES)
RANGED = ("int8", "uint8")  # what needs ranges
_BITS = ("binary", "ubinary")
CODE_STEPS = 255
_MOST_FLOAT16 = 65504
_OFFSET = 128  # between the codes of a signed format and of an unsigned one


def code_dtype(precision: str) -> Any:
    """The NumPy type of a format's codes."""
    return _DTYPES[precision]


def code_width(precision: str, dim: int) -> int:
    """How many codes a vector of ``dim`` values has: a byte holds 8 bits, the last one filled up with zeros."""
    return -(-dim // 8) if precision in _BITS else dim


def quantize_embeddings(
    embeddings: Any,
    precision: str,
    ranges: Any = None,
    calibration_embeddings: Any = None,
) -> Any:
    """Vectors in another format, as sentence-transformers' function of this name gives them.

    Unlike there, ranges are never taken from the vectors themselves: two calls would have two scales.

    Args:
        embeddings: floats ``[n, dim]`` or ``[dim]``, or a list of multi-vectors ``[tokens, dim]``.
        precision: "float32", "float16", "int8", "uint8", "binary" (int8) or "ubinary" (uint8).
        ranges: ``[2, dim]``, the lowest and highest value of each dimension, for int8 and uint8.
        calibration_embeddings: floats ``[n, dim]`` to take ranges from instead.

    Returns:
        codes ``[…, dim]``, of bits ``[…, ⌈dim / 8⌉]``. Of a list, a list.

    Raises:
        EmbedgeValueError: for a format that there is not, no ranges where they are needed, ranges of another
            length, vectors that are codes already, or a value beyond float16.
    """
    check_choice("precision", precision, OUTPUT_FORMATS)
    if isinstance(embeddings, (list, tuple)) and all(np.ndim(part) == 2 for part in embeddings):
        return [
            quantize_embeddings(part, precision, ranges, calibration_embeddings)
            for part in embeddings
        ]
    vectors = np.asarray(embeddings)
    if vectors.dtype.kind != "f":
        raise EmbedgeValueError(
            f"embeddings: expected floats, found {vectors.dtype}; quantize the vectors that encode gives without "
            "output_format"
        )
    if precision in _BITS:
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else _signed(bits)
    if precision in RANGED:
        if ranges is None and calibration_embeddings is not None:
            ranges = ranges_of(calibration_embeddings)
        codes = _codes(vectors, as_ranges(ranges, vectors.shape[-1], precision))
        return codes if precision == "uint8" else _signed(codes)
    if precision == "float16" and np.abs(vectors).max(initial=0) > _MOST_FLOAT16:
        raise EmbedgeValueError(
            f"embeddings: expected values that float16 has, up to {_MOST_FLOAT16:g}, found "
            f"{np.abs(vectors).max():g}; take float32"
        )
    return vectors.astype(code_dtype(precision))


def dequantize_embeddings(
    codes: Any, precision: str, ranges: Any = None, dim: int | None = None
) -> Any:
    """Vectors from their codes: the middle of each step, or −1 and 1 for bits.

    Args:
        codes: as :func:`quantize_embeddings` gave them: an array, or a list of multi-vectors.
        precision: their format.
        ranges: those that they were made with, for int8 and uint8.
        dim: of the vectors, for bits; ``None``: 8 for each byte.

    Returns:
        float32 ``[…, dim]``, or a list.

    Raises:
        EmbedgeValueError: for codes of another type than the format's, or as for :func:`quantize_embeddings`.
    """
    check_choice("precision", precision, OUTPUT_FORMATS)
    if isinstance(codes, (list, tuple)):
        return [dequantize_embeddings(part, precision, ranges, dim) for part in codes]
    found, expected = np.asarray(codes), np.dtype(code_dtype(precision))
    if found.dtype != expected:
        raise EmbedgeValueError(
            f"codes: expected {expected} of the format {precision}, found {found.dtype}; name the format that they "
            "were made with"
        )
    if precision in _BITS:
        bits = np.unpackbits(_unsigned(found), axis=-1, count=dim)
        return bits.astype(np.float32) * 2 - 1
    if precision in RANGED:
        lowest, step = _scale(as_ranges(ranges, found.shape[-1], precision))
        values = _unsigned(found).astype(np.float32)
        # All values of a dimension whose range is a point lie there.
        return lowest + np.where(step > 0, (values + np.float32(0.5)) * step, np.float32(0))
    return found.astype(np.float32)


def ranges_of(vectors: Any) -> Ranges:
    """The lowest and highest value of each dimension, float32 ``[2, dim]``.

    Args:
        vectors: floats ``[n, dim]``, or a list of multi-vectors ``[tokens, dim]``; at least two.

    Raises:
        EmbedgeValueError: for fewer.
    """
    if isinstance(vectors, (list, tuple)) and vectors and np.ndim(vectors[0]) == 2:
        vectors = np.concatenate(vectors)
    matrix = np.asarray(vectors, np.float32)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise EmbedgeValueError(
            f"ranges: expected at least two vectors [n, dim] to take them from, found {list(matrix.shape)}; pass "
            "some hundreds of vectors of texts such as you embed"
        )
    return np.stack([matrix.min(0), matrix.max(0)])


def as_ranges(ranges: Any, dim: int, precision: str) -> Ranges:
    """Ranges as float32 ``[2, dim]``.

    Raises:
        EmbedgeValueError: if there are none, or they are of another shape, not finite, or upside down.
    """
    if ranges is None:
        raise EmbedgeValueError(
            f"{precision} needs the range of each dimension, found none; pass ranges, float [2, {dim}], such as "
            "ranges_of(vectors) gives of some hundreds of vectors",
            arguments=["ranges"],
        )
    try:
        found = np.asarray(ranges, np.float32)
    except (TypeError, ValueError) as error:
        raise EmbedgeValueError(
            f"ranges: expected floats [2, {dim}], found {ranges!r:.60}"
        ) from error
    if found.shape != (2, dim):
        raise EmbedgeValueError(
            f"ranges: expected the shape [2, {dim}], found {list(found.shape)}; take ranges of vectors of the same "
            "length"
        )
    if not np.isfinite(found).all() or (found[1] < found[0]).any():
        raise EmbedgeValueError(
            "ranges: expected finite numbers, of each dimension the lowest in ranges[0] and the highest in ranges[1]"
        )
    return found


def _scale(ranges: Ranges) -> tuple[Vectors, Vectors]:
    """The lowest value of each dimension, and the width of its steps."""
    return ranges[0], (ranges[1] - ranges[0]) / CODE_STEPS


def _codes(vectors: NDArray[Any], ranges: Ranges) -> NDArray[np.uint8]:
    lowest, step = _scale(ranges)
    step = np.where(step == 0, np.float32(1), step)
    codes: NDArray[np.uint8] = np.clip(np.floor((vectors - lowest) / step), 0, CODE_STEPS).astype(
        np.uint8
    )
    return codes


def _signed(codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    return (codes ^ np.uint8(_OFFSET)).view(np.int8)  # minus 128


def _unsigned(codes: Codes) -> NDArray[np.uint8]:
    return codes if codes.dtype == np.uint8 else codes.view(np.uint8) ^ np.uint8(_OFFSET)


def is_code(value: object) -> bool:
    """Whether something is an array of codes, or a list with one."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value):
        value = value[0]
    return getattr(value, "dtype", None) in (np.int8, np.uint8)
