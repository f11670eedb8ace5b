"""The list of 4-bit weights from which the 8-bit ones of a graph are made when it opens: ``NAME.unpack.json``.

Such a graph names int8 weights ``[in, out]`` and their scales as external data at ``UNPACKED``
(:mod:`embedge.runtime.bundle.contract`). The list beside it says where the 4-bit blocks lie, and what they
are multiplied by (:mod:`embedge.runtime.sessions.unpack`)::

    {"weights": {"layer.0.query": {
        "out_features": 384, "in_features": 384, "block_size": 32,
        "packed": {"location": "shared.bin", "offset": 4096, "length": 73728},
        "block_scales": {…}, "zero_points": {…},
        "columns": {"base64": "…"}, "rotation": null, "rows": null}}}

Small tensors lie in the list itself, as ``base64``. ``packed`` (the values) and ``zero_points`` are laid out as
``com.microsoft.MatMulNBits`` has them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np

from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.onnx_model import FLOAT, INT8, ExternalData
from embedge.runtime.bundle.schema import Place, ReadBy, Record, Within, record

__all__ = ["PackedWeight", "Tensor", "read_packed"]


def _tensor(value: Any, place: Place) -> ExternalData | bytes:
    if not isinstance(value, dict) or value.get("base64") is None:
        return ExternalData.parse(value, place)
    try:
        return base64.b64decode(_Inline.parse(value, place).base64, validate=True)
    except ValueError as error:  # binascii.Error, or a text that is not ASCII
        place.member("base64").fail(f"{error}; copy or export the bundle again")


Tensor: TypeAlias = Annotated[ExternalData | bytes, ReadBy(_tensor)]


@record
class _Inline(Record):
    base64: str


@record
class PackedWeight(Record):
    """One Linear's 4-bit weight, and what becomes of it.

    Attributes:
        out_features: rows.
        in_features: columns.
        block_size: columns that share a scale and a zero point.
        packed: uint8 ``[out, blocks, block_size / 2]``, two values to a byte, the earlier one low.
        block_scales: float32 ``[out, blocks]``.
        zero_points: uint8 ``[out, ceil(blocks / 2)]``, likewise two to a byte.
        columns: float32 ``[in]`` by which columns are multiplied, or ``None``.
        rotation: float32 ``[n, n]`` by which each block of ``n`` columns is multiplied then, or ``None``.
        rows: float32 ``[out]`` by which the scales are multiplied, or ``None``.
        values: what ``packed`` was called when blocks were not rotated.
    """

    out_features: Annotated[int, Within(1)]
    in_features: Annotated[int, Within(1)]
    block_size: Annotated[int, Within(2, 4096)]
    packed: Tensor
    block_scales: Tensor
    zero_points: Tensor
    columns: Tensor | None
    rotation: Tensor | None
    rows: Tensor | None
    values: Any = None

    @property
    def tensors(self) -> Iterator[tuple[Tensor, str, tuple[int, ...]]]:
        """Each stored tensor with its dtype and shape."""
        blocks = -(-self.in_features // self.block_size)
        rows = self.out_features
        yield self.packed, "uint8", (rows, blocks, self.block_size // 2)
        yield self.block_scales, "float32", (rows, blocks)
        yield self.zero_points, "uint8", (rows, -(-blocks // 2))
        if self.columns is not None:
            yield self.columns, "float32", (self.in_features,)
        if self.rotation is not None:
            size = math.isqrt((_nbytes(self.rotation) or 0) // 4)
            yield self.rotation, "float32", (size, size)
        if self.rows is not None:
            yield self.rows, "float32", (rows,)

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.values is not None:
            yield "", "an earlier embedge wrote it; export the bundle again"
        if self.block_size % 2:
            yield "block_size", f"expected an even number, found {self.block_size}"
        for tensor, dtype, shape in self.tensors:
            if tensor is self.rotation and (not shape[0] or self.in_features % shape[0]):
                yield "rotation", f"{shape[0]} rows do not divide {self.in_features} columns"
            expected, found = prod(shape) * np.dtype(dtype).itemsize, _nbytes(tensor)
            if found != expected:
                yield "", f"a tensor of shape {shape}: expected {expected} bytes, found {found}"

    def initializers(self, name: str) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
        """Name, ONNX element type and shape of what is made of the weight of a Linear."""
        yield f"{name}.weight", (INT8, (self.in_features, self.out_features))
        yield f"{name}.scales", (FLOAT, (self.out_features,))


@record
class _List(Record):
    weights: Mapping[str, PackedWeight]


def read_packed(file: Path) -> Mapping[str, PackedWeight]:
    """The weights that a list names, by the name of their Linear.

    Raises:
        BundleError: if the list cannot be read, or a tensor has not the bytes of its shape.
    """
    return _List.parse(read_json_object(file), Place(str(file))).weights


def _nbytes(tensor: Tensor) -> int | None:
    return len(tensor) if isinstance(tensor, bytes) else tensor.length
