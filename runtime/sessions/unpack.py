"""4-bit weights unpacked to 8 bits when a graph opens: the disk of int4, the products of int8.

A graph of such a precision names int8 weights ``[in, out]`` and their scales as external data at
:data:`UNPACKED`, a place that does not exist. Beside it lies the list of where the 4-bit blocks are and
how they become 8 bits, which is done here and handed to ONNX Runtime as external initializers::

    w = (values - zero_points) · block_scales                  [out, in], blocks along in
    w = w · columns                                            smoothing; 0: multiplied elsewhere
    w = w · rotation                                           of each block along in, where there is one
    q = round(w / s),  s = max|w| / 127                        per row (output channel)
    weight = qᵀ,  scales = s · rows                            what was folded into the outputs

Rounding 4-bit blocks again, to 255 levels a row, adds about a hundredth of the noise they have.

The list is JSON: ``{"weights": {NAME: {"out_features", "in_features", "block_size", "packed",
"block_scales", "zero_points", "columns", "rotation", "rows"}}}``, where each tensor is ``{"location",
"offset", "length"}`` in a file of the graph's folder or ``{"base64"}``, and the last three may be null.
``packed`` (the values) and ``zero_points`` are laid out as ``com.microsoft.MatMulNBits`` has them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.json_object import MOST_BYTES, Table, read_json_object
from embedge.runtime.bundle.onnx_reader import ExternalData
from embedge.runtime.errors import BundleError
from embedge.runtime.host.probe_models import FLOAT, INT8
from embedge.runtime.host.workers import Workers

__all__ = [
    "UNPACKED",
    "Initializers",
    "PackedWeight",
    "read_packed",
    "unpack",
]

UNPACKED = "unpacked"
_QMAX = 127
_MOST_BLOCK_SIZE = 4096
_CHUNK_ELEMENTS = 1 << 17  # 512 KiB of float32 at a time, which a core's cache holds

Tensor: TypeAlias = ExternalData | bytes
Initializers: TypeAlias = dict[str, NDArray[Any]]
Resolve: TypeAlias = Callable[[ExternalData], Path]


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One Linear's 4-bit weight, and what becomes of it.

    Attributes:
        name: of the Linear; its initializers are ``NAME.weight`` and ``NAME.scales``.
        out_features: rows.
        in_features: columns.
        block_size: columns that share a scale and a zero point.
        values: uint8 ``[out, blocks, block_size / 2]``, two to a byte, the earlier one low.
        block_scales: float32 ``[out, blocks]``.
        zero_points: uint8 ``[out, ceil(blocks / 2)]``, likewise two to a byte.
        columns: float32 ``[in]`` by which columns are multiplied, or ``None``.
        rotation: float32 ``[n, n]`` by which each block of ``n`` columns is multiplied then, or ``None``.
        rows: float32 ``[out]`` by which the scales are multiplied, or ``None``.
    """

    name: str
    out_features: int
    in_features: int
    block_size: int
    values: Tensor
    block_scales: Tensor
    zero_points: Tensor
    columns: Tensor | None
    rotation: Tensor | None
    rows: Tensor | None

    @property
    def tensors(self) -> Iterator[tuple[Tensor, str, tuple[int, ...]]]:
        """Each stored tensor with its dtype and shape."""
        blocks = -(-self.in_features // self.block_size)
        rows = self.out_features
        yield self.values, "uint8", (rows, blocks, self.block_size // 2)
        yield self.block_scales, "float32", (rows, blocks)
        yield self.zero_points, "uint8", (rows, -(-blocks // 2))
        if self.columns is not None:
            yield self.columns, "float32", (self.in_features,)
        if self.rotation is not None:
            size = math.isqrt((_nbytes(self.rotation) or 0) // 4)
            yield self.rotation, "float32", (size, size)
        if self.rows is not None:
            yield self.rows, "float32", (rows,)

    @property
    def initializers(self) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
        """Name, ONNX element type and shape of what is made of it."""
        yield f"{self.name}.weight", (INT8, (self.in_features, self.out_features))
        yield f"{self.name}.scales", (FLOAT, (self.out_features,))


def read_packed(file: Path) -> list[PackedWeight]:
    """The weights that a list names.

    Raises:
        BundleError: if the list cannot be read, or a tensor has not the bytes of its shape.
    """
    table = Table(read_json_object(file), file=str(file))
    return [_parse(name, entry) for name, entry in table.table("weights").tables()]


def unpack(weights: list[PackedWeight], resolve: Resolve, *, threads: int) -> Initializers:
    """int8 ``[in, out]`` and float32 ``[out]``, by initializer name.

    Args:
        weights: from :func:`read_packed`.
        resolve: the file of a tensor, checked to lie inside the bundle and to have its bytes.
        threads: cores to use.

    Raises:
        BundleError: if a weight is not finite.
    """
    result: Initializers = {}
    workers = Workers(threads)
    for weight in weights:  # one after the other: few rows of each are floats at a time
        matrix = np.empty((weight.in_features, weight.out_features), np.int8)
        scales = np.empty(weight.out_features, np.float32)
        stored = [_read(t, dtype, shape, resolve) for t, dtype, shape in weight.tensors]
        step = max(1, _CHUNK_ELEMENTS // max(weight.in_features, weight.block_size))
        starts = range(0, weight.out_features, step)
        work = partial(_unpack_rows, weight, stored, matrix, scales, step)
        workers.run(work, starts, lambda *_: None, most=2 * threads)
        result |= {f"{weight.name}.weight": matrix, f"{weight.name}.scales": scales}
    return result


def _unpack_rows(
    weight: PackedWeight,
    stored: list[NDArray[Any]],
    matrix: NDArray[np.int8],
    scales: NDArray[np.float32],
    step: int,
    start: int,
) -> None:
    """Fills the columns of ``matrix`` and the scales that some rows of the weight make."""
    with np.errstate(all="ignore"):  # what is not finite is refused
        _unpack_quietly(weight, stored, matrix, scales, slice(start, start + step))


def _unpack_quietly(
    weight: PackedWeight,
    stored: list[NDArray[Any]],
    matrix: NDArray[np.int8],
    scales: NDArray[np.float32],
    rows: slice,
) -> None:
    values, block_scales, zero_points, *others = stored
    packed = values[rows]
    count, blocks, _ = packed.shape
    levels = _nibbles(packed).reshape(count, blocks, weight.block_size)
    zeros = _nibbles(zero_points[rows])[:, :blocks]
    floats: NDArray[np.float32] = levels.astype(np.float32)
    floats -= zeros.astype(np.float32)[:, :, None]
    floats *= block_scales[rows][:, :, None]
    floats = floats.reshape(count, -1)[:, : weight.in_features]
    if weight.columns is not None:
        floats *= others.pop(0)
    if weight.rotation is not None:
        rotation: NDArray[np.float32] = others.pop(0)
        floats = (floats.reshape(-1, len(rotation)) @ rotation).reshape(floats.shape)
    scale = np.abs(floats).max(axis=1) / np.float32(_QMAX)
    if not np.isfinite(scale).all():
        raise BundleError(
            f"weight {weight.name}: its 4-bit blocks hold values that are not finite; copy or export the "
            "bundle again"
        )
    scale = np.where(scale > 0, scale, np.float32(1))
    floats /= scale[:, None]
    matrix[:, rows] = np.rint(floats, out=floats).astype(np.int8).T
    scales[rows] = scale if weight.rows is None else scale * others[-1][rows]


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 ``[..., 2 · n]`` in 0…15 of ``[..., n]``, the low half of a byte first."""
    pairs = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=pairs[..., 0])
    np.right_shift(packed, 4, out=pairs[..., 1])
    return pairs.reshape(*packed.shape[:-1], -1)


def _read(tensor: Tensor, dtype: str, shape: tuple[int, ...], resolve: Resolve) -> NDArray[Any]:
    if isinstance(tensor, bytes):
        return np.frombuffer(tensor, dtype).reshape(shape)
    file = resolve(tensor)
    try:
        return np.memmap(file, dtype, "r", offset=tensor.offset, shape=shape)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{file}: cannot be read: {error}; copy or export the bundle again"
        ) from error


def _parse(name: str, entry: Table) -> PackedWeight:
    if entry.optional_table("values") is not None:  # as it was called when blocks were not rotated
        entry.fail(None, "an earlier embedge wrote it; export the bundle again")
    weight = PackedWeight(
        name=name,
        out_features=entry.integer("out_features", minimum=1),
        in_features=entry.integer("in_features", minimum=1),
        block_size=entry.integer("block_size", minimum=2, maximum=_MOST_BLOCK_SIZE),
        values=_tensor(entry.table("packed")),
        block_scales=_tensor(entry.table("block_scales")),
        zero_points=_tensor(entry.table("zero_points")),
        columns=_optional_tensor(entry, "columns"),
        rotation=_optional_tensor(entry, "rotation"),
        rows=_optional_tensor(entry, "rows"),
    )
    if weight.block_size % 2:
        entry.fail("block_size", f"expected an even number, found {weight.block_size}")
    for tensor, dtype, shape in weight.tensors:
        if tensor is weight.rotation and (not shape[0] or weight.in_features % shape[0]):
            entry.fail("rotation", f"{shape[0]} rows do not divide {weight.in_features} columns")
        expected, found = prod(shape) * np.dtype(dtype).itemsize, _nbytes(tensor)
        if found != expected:
            entry.fail(None, f"a tensor of shape {shape}: expected {expected} bytes, found {found}")
    return weight


def _nbytes(tensor: Tensor) -> int | None:
    return len(tensor) if isinstance(tensor, bytes) else tensor.length


def _optional_tensor(entry: Table, key: str) -> Tensor | None:
    table = entry.optional_table(key)
    return None if table is None else _tensor(table)


def _tensor(table: Table) -> Tensor:
    text = table.optional_string("base64")
    if text is None:
        return ExternalData(
            location=table.string("location"),
            offset=table.integer("offset", minimum=0, maximum=MOST_BYTES),
            length=table.integer("length", minimum=0, maximum=MOST_BYTES),
        )
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii.Error, or a text that is not ASCII
        table.fail("base64", f"{error}; copy or export the bundle again")
