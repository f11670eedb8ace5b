"""Dataclasses that are the schema of a JSON object: reading, checking and writing follow from their annotations.

    @record
    class FileEntry(Record):
        size: Annotated[int, Within(0, MOST_BYTES)]
        sha256: Annotated[str, is_sha256]

What annotations mean:
    str, bool, float            a value of that type; a float is any finite number
    Annotated[int, Within(1)]   a whole number within bounds, which every ``int`` has
    Annotated[X, rule]          an X that a rule passes: it gives what is wrong, or ``None``
    Literal["a", "b"]           one of some strings
    X | None                    null, or no such key, as well
    tuple[X, ...]               a list
    Mapping[K, X]               an object, whose keys are read as K
    a Record                    an object with its members
    Any                         anything

A member with a default may be missing or null. A ``SPARSE`` one is written only where it differs from that.
Other keys are ignored. What cannot be read is a :class:`ManifestError` with the path of the key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, FrozenInstanceError, fields
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    Self,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from embedge.runtime.errors import ManifestError

__all__ = [
    "MOST_BYTES",
    "SPARSE",
    "Place",
    "ReadBy",
    "Record",
    "Since",
    "Within",
    "finite",
    "record",
]

MOST_BYTES = (1 << 63) - 1  # of a file
_MOST = (1 << 31) - 1  # of a whole number, where a member says nothing else
_ONE = {str: "a string", bool: "true or false", dict: "an object"}
_SEVERAL = {str: "strings", int: "whole numbers", float: "numbers"}


class Place(NamedTuple):
    """Where a value stands: the document's name, for messages, and the dotted path of its key there."""

    file: str = "manifest.json"
    path: str = ""

    def member(self, key: str) -> Place:
        """The place of a member of the object that stands here."""
        return Place(self.file, f"{self.path}.{key}" if self.path else key)

    def fail(self, problem: str) -> NoReturn:
        """Raises a :class:`ManifestError` about what stands here."""
        raise ManifestError(": ".join(part for part in (*self, problem) if part))


class ReadBy(NamedTuple):
    """``Annotated[X, ReadBy(f)]``: what a function makes of a value and its place."""

    read: Callable[[Any, Place], Any]


class Within(NamedTuple):
    """``Annotated[int, Within(1)]``: a whole number within bounds, both included."""

    least: int
    most: int = _MOST

    def read(self, value: Any, place: Place) -> int:
        """The value, which is one."""
        if isinstance(value, bool) or not isinstance(value, int) or value < self.least:
            place.fail(f"expected a whole number ≥ {self.least}, found {_shown(value)}")
        if value > self.most:
            place.fail(f"expected a whole number ≤ {self.most}, found {_shown(value)}")
        return value


class Since(NamedTuple):
    """``Annotated[X, Since("1.1")]``: the version of the format that brought a member."""

    version: str


SPARSE = "written only where it is not the default"


Class = TypeVar("Class")


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def record(cls: type[Class]) -> type[Class]:
    """Makes a class a frozen dataclass whose members are given by name; its methods are :class:`Record`'s.

    ``dataclass(frozen=True)`` compiles six methods for each class. A process imports some twenty, which took a tenth
    of the time to its first vector.
    """
    return dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)(cls)


class Record:
    """Base of the dataclasses that are read and written as this module says, each a :func:`record`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init__(self, **values: Any) -> None:
        for name, member in self.__dataclass_fields__.items():
            value = values.pop(name, MISSING)
            self.__dict__[name] = _default(member) if value is MISSING else value
            if self.__dict__[name] is MISSING:
                raise TypeError(f"{type(self).__name__}: {name} is missing")
        if values:
            raise TypeError(f"{type(self).__name__}: has no {', '.join(values)}")

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        members = zip(self.__dataclass_fields__, self._values(), strict=True)
        return f"{type(self).__qualname__}({', '.join(f'{name}={v!r}' for name, v in members)})"

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @classmethod
    def parse(cls, values: object, place: Place = Place()) -> Self:  # noqa: B008 - immutable
        """The object that a JSON value is.

        Args:
            values: as ``json`` gives it.
            place: where it stands.

        Raises:
            ManifestError: with the path of the first key that cannot be used.
        """
        members, given = _typed(dict, values, place), {}
        for field, hint in _members(cls):  # type: ignore[arg-type]
            name, value = field.name, members.get(field.name)
            if value is None and _default(field) is not MISSING:
                continue
            if name not in members and not _may_be_null(hint):
                place.member(name).fail("missing")
            given[name] = _read(hint, value, place.member(name))
        record = cls(**given)
        for key, problem in record._problems():
            (place.member(key) if key else place).fail(problem)
        return record

    def _problems(self) -> Iterator[tuple[str, str]]:
        """What is wrong where every member alone is right: a key, which may be empty, and a message."""
        return iter(())

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON, keys in the order of the members."""
        return {
            field.name: _written(getattr(self, field.name))
            for field, hint in _members(type(self))  # type: ignore[arg-type]
            if SPARSE not in _rules(hint) or getattr(self, field.name) != _default(field)
        }

    def changed(self) -> dict[str, Any]:
        """Those of its members as JSON that are not their defaults."""
        return {
            field.name: _written(getattr(self, field.name))
            for field, _ in _members(type(self))  # type: ignore[arg-type]
            if getattr(self, field.name) != _default(field)
        }


@functools.cache
def _members(cls: Any) -> list[tuple[Field[Any], Any]]:
    """Each member of a record with its annotation."""
    hints = get_type_hints(cls, include_extras=True)
    return [(field, hints[field.name]) for field in fields(cls)]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _rules(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _may_be_null(hint: Any) -> bool:
    return hint is Any or NoneType in get_args(_bare(hint))


def _read(hint: Any, value: Any, place: Place) -> Any:
    """A value as an annotation says."""
    reader = _READERS.get(get_origin(hint))
    if reader is not None:
        return reader(get_args(hint), value, place)
    if hint is Any:
        return value
    if hint is float:
        return float(finite(value, place))
    return hint.parse(value, place) if issubclass(hint, Record) else _typed(hint, value, place)


def finite(value: Any, place: Place) -> int | float:
    """A finite number as it is written, ``1`` or ``1.0``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
        place.fail(f"expected a number, found {_shown(value)}")
    return value


def _read_annotated(args: tuple[Any, ...], value: Any, place: Place) -> Any:
    hint, *rules = args
    reader = next((rule for rule in rules if isinstance(rule, (Within, ReadBy))), None)
    if reader is not None:
        return reader.read(value, place)
    found = _read(hint, value, place)
    for rule in rules:
        problem = rule(found) if callable(rule) else None
        if problem is not None:
            place.fail(problem)
    return found


def _read_nullable(args: tuple[Any, ...], value: Any, place: Place) -> Any:
    return None if value is None else _read(args[0], value, place)


def _read_choice(args: tuple[Any, ...], value: Any, place: Place) -> Any:
    if _typed(str, value, place) not in args:
        place.fail(f"expected one of {', '.join(args)}, found {_shown(value)}")
    return value


def _read_list(args: tuple[Any, ...], value: Any, place: Place) -> tuple[Any, ...]:
    items = _typed(list, value, place, f"a list of {_SEVERAL[_bare(args[0])]}")
    return tuple(
        _read(args[0], item, Place(place.file, f"{place.path}[{index}]"))
        for index, item in enumerate(items)
    )


def _read_mapping(args: tuple[Any, ...], value: Any, place: Place) -> dict[str, Any]:
    return {
        _read(args[0], key, place): _read(args[1], item, place.member(key))
        for key, item in _typed(dict, value, place).items()
    }


_READERS: Mapping[Any, Callable[[tuple[Any, ...], Any, Place], Any]] = {
    Annotated: _read_annotated,
    Union: _read_nullable,
    UnionType: _read_nullable,
    Literal: _read_choice,
    tuple: _read_list,
    Mapping: _read_mapping,
}


def _typed(kind: type[Any], value: Any, place: Place, expected: str | None = None) -> Any:
    if not isinstance(value, kind):
        place.fail(f"expected {expected or _ONE[kind]}, found {_shown(value)}")
    return value


def _written(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _written(item) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    """A value as JSON, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
