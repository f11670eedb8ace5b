"""Protobuf messages, read without the protobuf package.

A message is fields, each a number, an encoding and a value: https://protobuf.dev/programming-guides/encoding/.
Whatever a specification does not allow is a ``ValueError``.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

__all__ = ["Message", "Spec", "fields_of", "spec"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # encodings

Spec: TypeAlias = Mapping[
    int, tuple[int, bool]
]  # encoding, and whether there may be many, by field


def spec(
    *,
    numbers: Sequence[int] = (),
    floats: Sequence[int] = (),
    data: Sequence[int] = (),
    many: Collection[int] = (),
) -> Spec:
    """The fields that a message may have.

    Args:
        numbers: those of whole numbers.
        floats: those of 32 bits.
        data: those of strings, bytes and messages.
        many: those that may be repeated.
    """
    kinds = ((_VARINT, numbers), (_FIXED32, floats), (_BYTES, data))
    return {field: (kind, field in many) for kind, fields in kinds for field in fields}


class Message:
    """The fields of a message, none of which is unknown or occurs more often than it may.

    Args:
        data: holds it.
        fields: that it may have.
        start: where it begins.
        stop: where it ends; ``None``: with the data.
    """

    __slots__ = ("_data", "_found")

    def __init__(self, data: bytes, fields: Spec, start: int = 0, stop: int | None = None) -> None:
        self._data = data
        self._found: dict[int, list[Any]] = {}  # numbers, and where what has a length lies
        for number, kind, at, end in fields_of(data, start, stop):
            expected, many = fields.get(number, (None, False))
            if kind == _BYTES and expected == _VARINT and many:  # packed
                self._found.setdefault(number, []).extend(_packed(data, at, end))
                continue
            if kind != expected or (number in self._found and not many):
                raise ValueError(f"a message has the unknown field {number}, or has it twice")
            value: Any = (at, end)
            if kind == _VARINT:
                value = _signed(_varint(data, at)[0])
            elif kind == _FIXED32:
                (value,) = struct.unpack_from("<f", data, at)
            self._found.setdefault(number, []).append(value)

    def __contains__(self, field: int) -> bool:
        return field in self._found

    def count(self, field: int) -> int:
        """How often a field occurs."""
        return len(self._found.get(field, ()))

    def number(self, field: int) -> Any:
        """An integer or a float; 0 if it is not there."""
        return self._found.get(field, (0,))[0]

    def numbers(self, field: int) -> list[int]:
        """All of a repeated field."""
        return self._found.get(field, [])

    def text(self, field: int) -> str:
        """A string; empty if it is not there."""
        return next(self.texts(field), "")

    def texts(self, field: int) -> Iterator[str]:
        """All strings of a repeated field."""
        return (str(self._data[slice(*span)], "utf-8") for span in self._found.get(field, ()))

    def size(self, field: int) -> int:
        """Bytes of a field that is there."""
        start, stop = self._found[field][0]
        return int(stop - start)

    def messages(self, field: int, fields: Spec) -> Iterator[Message]:
        """All messages of a repeated field."""
        return (Message(self._data, fields, *span) for span in self._found.get(field, ()))

    def span(self, field: int) -> tuple[int, int] | None:
        """Where the value of a field of bytes lies; ``None`` if it is not there."""
        found: list[tuple[int, int]] = self._found.get(field, [])
        return found[0] if found else None


def fields_of(
    data: bytes, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int, int, int]]:
    """Number, encoding, and ``(start, stop)`` of the value of each field in a message's bytes."""
    at, stop = start, len(data) if stop is None else stop
    while at < stop:
        tag, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            length, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
            if at + length > stop:
                raise ValueError(f"a field at byte {at} is longer than what holds it")
        elif kind == _VARINT:
            length = 1 if data[at] < 0x80 else _varint(data, at)[1] - at
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown field type {kind} at byte {at}")
        yield number, kind, at, at + length
        at += length
    if at != stop:
        raise ValueError(f"a field ends at byte {at}, what holds it at {stop}")


def _packed(data: bytes, at: int, end: int) -> Iterator[int]:
    while at < end:
        value, at = _varint(data, at)
        yield _signed(value)
    if at != end:
        raise ValueError("a packed list of numbers is cut")


def _varint(data: bytes, at: int) -> tuple[int, int]:
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


def _signed(value: int) -> int:
    """A varint as the int64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value
