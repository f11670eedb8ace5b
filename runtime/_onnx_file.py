"""Which bytes of which files an ONNX graph uses, read without the onnx package.

Only the fields needed are looked at, everything else is skipped by its length (protobuf,
little-endian base-128 varints)::

    ModelProto.graph = 7
    GraphProto.initializer = 5                 repeated TensorProto
    TensorProto.external_data = 13             repeated StringStringEntryProto {key = 1, value = 2}
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from embedge.runtime._errors import BundleError

__all__ = ["ExternalData", "read_external_data"]

_GRAPH, _INITIALIZER, _EXTERNAL_DATA, _KEY, _VALUE = 7, 5, 13, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True)
class ExternalData:
    """Where an initializer's bytes lie: ``location`` is relative to the graph's folder.

    Attributes:
        length: in bytes; ``None``: to the end of the file.
    """

    location: str
    offset: int
    length: int | None


def read_external_data(file: Path) -> list[ExternalData]:
    """The external data of a graph's initializers, in their order.

    Raises:
        BundleError: if the file is missing, or is not an ONNX model.
    """
    try:
        with file.open("rb") as stream:
            if stream.seek(0, 2) == 0:
                raise BundleError(f"{file}: empty; expected an ONNX model; copy the bundle again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _external_data(data)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError) as error:
        raise BundleError(
            f"{file}: not a readable ONNX model ({error}); `embedge inspect --verify` checks the "
            "bundle's files"
        ) from error


def _external_data(data: mmap.mmap) -> list[ExternalData]:
    found = []
    graph_seen = False
    for graph in _fields(data, 0, len(data), _GRAPH):
        graph_seen = True
        for tensor in _fields(data, *graph, _INITIALIZER):
            entries = {}
            for entry in _fields(data, *tensor, _EXTERNAL_DATA):
                key, value = (
                    b"".join(data[slice(*span)] for span in _fields(data, *entry, number)).decode()
                    for number in (_KEY, _VALUE)
                )
                entries[key] = value
            if "location" in entries:
                length = entries.get("length")
                found.append(
                    ExternalData(
                        location=entries["location"],
                        offset=int(entries.get("offset", 0)),
                        length=None if length is None else int(length),
                    )
                )
    if not graph_seen:
        raise ValueError("it holds no graph")
    return found


def _fields(data: mmap.mmap, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of each length-delimited field with a number, in a message's bytes."""
    at = start
    while at < stop:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            length, at = _varint(data, at)
            if at + length > stop:
                raise ValueError(f"a field at byte {at} is longer than what holds it")
            if number == wanted:
                yield at, at + length
            at += length
        else:
            raise ValueError(f"unknown field type {kind} at byte {at}")
    if at != stop:
        raise ValueError(f"a field ends at byte {at}, what holds it at {stop}")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
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
