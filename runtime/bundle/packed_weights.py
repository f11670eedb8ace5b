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
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np

from embedge.runtime.bundle.graph_check import FLOAT, INT8
from embedge.runtime.bundle.json_object import MOST_BYTES, Table, read_json_object
from embedge.runtime.bundle.onnx_reader import ExternalData

__all__ = ["PackedWeight", "Tensor", "read_packed"]

_MOST_BLOCK_SIZE = 4096

Tensor: TypeAlias = ExternalData | bytes


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
