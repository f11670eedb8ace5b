"""What annotations of a record mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

import pytest

from embedge.runtime import ManifestError
from embedge.runtime.bundle.schema import SPARSE, Place, ReadBy, Record, Within, record


def lower_problem(text: str) -> str | None:
    return None if text.islower() else f"expected lower case, found {text!r}"


def read_hex(value: Any, place: Place) -> int:
    try:
        return int(str(value), 16)
    except ValueError:
        place.fail("no hexadecimal number")


@record
class Inner(Record):
    size: Annotated[int, Within(1, 9)]


@record
class Outer(Record):
    name: Annotated[str, lower_problem]
    kind: Literal["a", "b"] = "a"
    note: Annotated[str | None, SPARSE] = None
    sizes: tuple[Annotated[int, Within(0)], ...] = ()
    inner: Inner | None
    by_name: Mapping[Annotated[str, lower_problem], Inner] = field(default_factory=dict)
    rate: float = 1.0
    colour: Annotated[int, ReadBy(read_hex)] = 0
    anything: Any = None

    def _problems(self) -> Iterator[tuple[str, str]]:
        if len(self.sizes) > 2:
            yield "sizes", f"expected 2 at most, found {len(self.sizes)}"


LEAST = {"name": "x", "inner": None}


def test_members_with_defaults_may_be_missing_or_null() -> None:
    expected = Outer(name="x", inner=None)
    assert Outer.parse(LEAST) == expected
    assert Outer.parse({"name": "x"}) == expected  # what may be null may be missing
    assert Outer.parse(LEAST | dict.fromkeys(("kind", "sizes", "by_name", "rate"))) == expected


def test_sparse_members_are_written_where_they_are_not_the_default() -> None:
    written: dict[str, Any] = {
        "name": "x",
        "kind": "a",
        "sizes": [],
        "inner": None,
        "by_name": {},
        "rate": 1.0,
        "colour": 0,
        "anything": None,
    }
    assert Outer.parse(LEAST).to_dict() == written
    assert list(Outer.parse(LEAST | {"note": "n"}).to_dict())[:3] == ["name", "kind", "note"]


def test_records_within_records_are_read_and_written() -> None:
    values = LEAST | {"inner": {"size": 3}, "by_name": {"y": {"size": 4, "unknown": 1}}, "rate": 2}
    outer = Outer.parse(values)
    assert outer.inner == Inner(size=3)
    assert outer.by_name == {"y": Inner(size=4)}
    assert isinstance(outer.rate, float)
    assert Outer.parse(outer.to_dict()) == outer
    assert outer.to_dict()["by_name"] == {"y": {"size": 4}}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"name": ...}, "part.name: missing"),
        ({"name": None}, "part.name: expected a string, found null"),
        ({"name": "X"}, "part.name: expected lower case, found 'X'"),
        ({"kind": "c"}, 'part.kind: expected one of a, b, found "c"'),
        ({"sizes": 1}, "part.sizes: expected a list of whole numbers, found 1"),
        ({"sizes": [1, -1]}, "part.sizes[1]: expected a whole number ≥ 0, found -1"),
        ({"sizes": [1, 1 << 31]}, "part.sizes[1]: expected a whole number ≤ 2147483647, found 2"),
        ({"sizes": [1, 1, 1]}, "part.sizes: expected 2 at most, found 3"),
        ({"inner": []}, "part.inner: expected an object, found []"),
        ({"inner": {"size": True}}, "part.inner.size: expected a whole number ≥ 1, found true"),
        ({"by_name": {"Y": {}}}, "part.by_name: expected lower case, found 'Y'"),
        ({"by_name": {"y": {}}}, "part.by_name.y.size: missing"),
        ({"rate": float("inf")}, "part.rate: expected a number, found Infinity"),
        ({"colour": "g"}, "part.colour: no hexadecimal number"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_path(values: dict[str, Any], problem: str) -> None:
    changed = {key: value for key, value in (LEAST | values).items() if value is not ...}
    with pytest.raises(ManifestError) as caught:
        Outer.parse(changed, Place("file.json", "part"))
    assert str(caught.value).startswith(f"file.json: {problem}")


def test_a_long_value_is_cut_in_its_message() -> None:
    with pytest.raises(ManifestError, match=r'found "y{56}\.\.\.$'):
        Outer.parse(LEAST | {"inner": "y" * 1000})
