"""Which bytes of which files an ONNX graph uses, read without the onnx package.

Only the fields needed are looked at, everything else is skipped by its length (protobuf,
little-endian base-128 varints)::

    ModelProto.graph = 7
    GraphProto.node = 1                        repeated NodeProto {input = 1, op_type = 4}
    GraphProto.initializer = 5                 repeated TensorProto
    TensorProto.dims = 1, name = 8
    TensorProto.external_data = 13             repeated StringStringEntryProto {key = 1, value = 2}
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, TypeVar

from embedge.runtime.bundle.contract import INLINE_BYTES
from embedge.runtime.bundle.files import open_regular_file
from embedge.runtime.bundle.schema import MOST_BYTES, Record, Within
from embedge.runtime.errors import BundleError

__all__ = [
    "BYTES",
    "FIXED32",
    "VARINT",
    "ExternalData",
    "StoredWeight",
    "all_fields",
    "read_external_data",
    "read_product_weights",
    "varint",
]

Result = TypeVar("Result")
Span = tuple[int, int]

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_INPUT, _OP_TYPE = 1, 4
_DIMS, _NAME, _EXTERNAL_DATA, _KEY, _VALUE = 1, 8, 13, 1, 2
# Dimensions and dtype of the weight, the second input, by operator.
_PRODUCTS = {
    b"MatMulIntegerToFloat": (2, "int8"),
    b"MatMulIntegerToFloatAdd": (2, "int8"),
    b"MatMulIntegerToFloatSub": (2, "int8"),
    b"MatMulNBits": (3, "uint8"),
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True)
class ExternalData(Record):
    """Where an initializer's bytes lie: ``location`` is relative to the graph's folder.

    Attributes:
        length: in bytes; ``None``: to the end of the file.
    """

    location: str
    offset: Annotated[int, Within(0, MOST_BYTES)]
    length: Annotated[int, Within(0, MOST_BYTES)] | None


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A weight of an integer product that lies beside its graph.

    Attributes:
        shape: ``(depth, columns)`` of 8 bits, ``(columns, blocks, block_size / 2)`` of 4 bits.
        dtype: "int8", or "uint8" with two values to a byte.
        data: where.
    """

    shape: tuple[int, ...]
    dtype: str
    data: ExternalData


def read_external_data(file: Path) -> list[ExternalData]:
    """The external data of a graph's initializers, in their order.

    Raises:
        BundleError: if the file is missing, or is not an ONNX model.
    """
    return _read(file, _external_data)


def read_product_weights(file: Path) -> dict[str, StoredWeight]:
    """The weights of a graph's integer products that lie beside it, by name.

    Raises:
        BundleError: as :func:`read_external_data`.
    """
    return _read(file, _product_weights)


def _read(file: Path, parse: Callable[[mmap.mmap], Result]) -> Result:
    try:
        with open_regular_file(file) as stream:
            if stream.seek(0, 2) == 0:
                raise BundleError(f"{file}: empty; expected an ONNX model; copy the bundle again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse(data)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError) as error:
        raise BundleError(
            f"{file}: not a readable ONNX model ({error}); `embedge inspect --verify` checks the "
            "bundle's files"
        ) from error


def _external_data(data: mmap.mmap) -> list[ExternalData]:
    places = [
        _place(data, tensor)
        for graph in _graphs(data)
        for tensor in _fields(data, *graph, _INITIALIZER)
    ]
    return [place for place in places if place is not None]


def _product_weights(data: mmap.mmap) -> dict[str, StoredWeight]:
    found = {}
    for graph in _graphs(data):
        kinds = {}
        for node in _fields(data, *graph, _NODE):
            kind = _PRODUCTS.get(_bytes(data, node, _OP_TYPE))
            if kind is not None:
                _, weight, *_ = (data[slice(*span)] for span in _fields(data, *node, _INPUT))
                kinds[weight] = kind
        for tensor in _fields(data, *graph, _INITIALIZER):
            name, place = _bytes(data, tensor, _NAME), _place(data, tensor)
            if name not in kinds:
                continue
            rank, dtype = kinds[name]
            shape = tuple(_numbers(data, *tensor, _DIMS))
            size = prod(shape)
            if len(shape) != rank or min(shape) < 1:
                raise ValueError(f"weight {name.decode()} has the shape {list(shape)}")
            if place is not None:
                if place.length not in (None, size):
                    raise ValueError(
                        f"weight {name.decode()}: expected {size} bytes, found {place.length}"
                    )
                found[name.decode()] = StoredWeight(shape=shape, dtype=dtype, data=place)
            elif size > INLINE_BYTES:
                raise ValueError(
                    f"weight {name.decode()} of {size} bytes lies in it, not beside it"
                )
    return found


def _graphs(data: mmap.mmap) -> list[Span]:
    graphs = list(_fields(data, 0, len(data), _GRAPH))
    if not graphs:
        raise ValueError("it holds no graph")
    return graphs


def _place(data: mmap.mmap, tensor: Span) -> ExternalData | None:
    """Where a tensor's bytes lie; ``None``: in the graph."""
    entries = {}
    for entry in _fields(data, *tensor, _EXTERNAL_DATA):
        entries[_bytes(data, entry, _KEY).decode()] = _bytes(data, entry, _VALUE).decode()
    if "location" not in entries:
        return None
    length = entries.get("length")
    return ExternalData(
        location=entries["location"],
        offset=int(entries.get("offset", 0)),
        length=None if length is None else int(length),
    )


def _bytes(data: mmap.mmap, message: Span, wanted: int) -> bytes:
    """A message's field of bytes; empty where it has none."""
    return b"".join(data[slice(*span)] for span in _fields(data, *message, wanted))


def _numbers(data: mmap.mmap, start: int, stop: int, wanted: int) -> list[int]:
    """A message's repeated field of numbers, packed or not."""
    numbers: list[int] = []
    for number, kind, at, end in all_fields(data, start, stop):
        if number == wanted and kind == VARINT:
            numbers.append(varint(data, at)[0])
        elif number == wanted and kind == BYTES:
            place = at
            while place < end:
                value, place = varint(data, place)
                numbers.append(value)
    return numbers


def _fields(data: mmap.mmap, start: int, stop: int, wanted: int) -> Iterator[Span]:
    """``(start, stop)`` of each length-delimited field with a number, in a message's bytes."""
    for number, kind, at, end in all_fields(data, start, stop):
        if number == wanted and kind == BYTES:
            yield at, end


def all_fields(
    data: mmap.mmap | bytes, start: int, stop: int
) -> Iterator[tuple[int, int, int, int]]:
    """Number, kind, and ``(start, stop)`` of the value of each field in a message's bytes."""
    at = start
    while at < stop:
        tag, at = (data[at], at + 1) if data[at] < 0x80 else varint(data, at)
        number, kind = tag >> 3, tag & 7
        length = 0
        if kind == BYTES:
            length, at = (data[at], at + 1) if data[at] < 0x80 else varint(data, at)
            if at + length > stop:
                raise ValueError(f"a field at byte {at} is longer than what holds it")
        elif kind == VARINT:
            length = 1 if data[at] < 0x80 else varint(data, at)[1] - at
        elif kind == FIXED64:
            length = 8
        elif kind == FIXED32:
            length = 4
        else:
            raise ValueError(f"unknown field type {kind} at byte {at}")
        yield number, kind, at, at + length
        at += length
    if at != stop:
        raise ValueError(f"a field ends at byte {at}, what holds it at {stop}")


def varint(data: mmap.mmap | bytes, at: int) -> tuple[int, int]:
    """The number at a position and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {at} is longer than 64 bits")
