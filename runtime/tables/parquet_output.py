"""Vectors into a Parquet file, beside other columns, with their fingerprint in the file's metadata.

The column ``embedding`` is a ``fixed_size_list`` of float32 or float16, of multi-vectors a list of such lists. The
file's metadata has ``embedge.fingerprint``, as ``e1:0123456789abcdef``, and ``embedge.fingerprint_parts``, as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.errors import EmbedgeError
from embedge.runtime.tables.arrow import load_pyarrow, named_errors
from embedge.runtime.tables.chunk import EMBEDDING

if TYPE_CHECKING:
    import pyarrow

    from embedge.runtime.tables.chunk import Others

__all__ = [
    "ParquetOutput",
    "as_dtype",
    "read_fingerprint",
    "read_metadata",
    "schema_of",
    "vector_array",
    "vector_type",
]

_FINGERPRINT = "embedge.fingerprint"
_PARTS = "embedge.fingerprint_parts"
_GROUP_BYTES = 32 << 20  # a row group is held in memory until it is written


class Sink(Protocol):
    """What takes the bytes; it says itself what failed."""

    def write(self, data: bytes) -> None: ...


class ParquetOutput:
    """A Parquet file that is written chunk by chunk, a row group at a time.

    Args:
        sink: takes the bytes in their order; nothing is written twice.
        dim: length of a vector.
        dtype: "float32" or "float16".
        multi_vector: whether a row has a vector a token.
        columns: the other columns, a ``pyarrow.Schema`` or names of columns of strings; ``None``: those of
            the first rows.
        kind: the fingerprint and its parts, as :func:`embedge.runtime.encode.fingerprint.described` has them.
        before: rows that other files have, for the numbers in messages.
        metadata: what else goes into the file's metadata, as JSON under these keys.

    Raises:
        EmbedgeImportError: pyarrow is missing.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        dim: int,
        kind: Mapping[str, Any],
        dtype: str = "float32",
        multi_vector: bool = False,
        columns: pyarrow.Schema | Sequence[str] | None = None,
        before: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._arrow = load_pyarrow()
        self._sink = _Sink(sink)
        self._dtype = dtype
        self._type = vector_type(dim, dtype, multi_vector=multi_vector)
        self._metadata = {
            _FINGERPRINT: str(kind["fingerprint"]),
            _PARTS: json.dumps(kind["parts"]),
            **{key: json.dumps(value) for key, value in (metadata or {}).items()},
        }
        self._others: pyarrow.Schema | None = None
        if isinstance(columns, self._arrow.Schema):
            self._others = columns
        elif columns is not None:
            self._others = self._arrow.schema([(name, self._arrow.string()) for name in columns])
        self._writer: Any = None
        self._held: list[pyarrow.Table] = []
        self._held_bytes = 0
        self._rows = before

    def write(
        self, others: Others, vectors: NDArray[np.float32] | Sequence[NDArray[np.float32]]
    ) -> None:
        """Adds rows: float32 ``[rows, dim]``, or of multi-vectors float32 ``[tokens, dim]`` a row.

        Raises:
            EmbedgeError: a row's other columns are not those of the first rows, or a value is too large for
                float16.
        """
        table = self._table_of(others)
        column = vector_array(vectors, self._type, self._dtype, first=self._rows + 1)
        self.write_table(table.append_column(EMBEDDING, column))

    def write_table(self, table: pyarrow.Table) -> None:
        """Adds rows that have their vectors already, as another such file holds them."""
        if self._others is None:
            self._others = table.schema.remove(
                table.schema.get_field_index(EMBEDDING)
            ).remove_metadata()
        self._rows += table.num_rows
        self._held.append(table.replace_schema_metadata(None))
        self._held_bytes += table.nbytes
        if self._held_bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Writes what is held, and the file's end."""
        self._flush()
        with self._named():
            self._opened().close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What Parquet has no form for; failures of the sink name themselves."""
        try:
            yield
        except self._arrow.ArrowException as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise EmbedgeError(f"output rows up to {self._rows}: {reason}; {_ONE_TYPE}") from error

    def _table_of(self, others: Others) -> pyarrow.Table:
        arrow = self._arrow
        if isinstance(others, arrow.Table):
            return others
        rows = [{key: row[key] for key in row if key != EMBEDDING} for row in others]
        if self._others is None:
            self._others = schema_of(rows, self._rows + 1)
        for number, row in enumerate(rows, self._rows + 1):
            if unknown := set(row) - set(self._others.names):
                raise EmbedgeError(
                    f"output row {number}: expected the columns of the first rows ({', '.join(self._others.names)}), "
                    f"found {', '.join(sorted(unknown))} too; choose columns that the first rows have with --keep"
                )
        columns = [
            self._column_of([row.get(field.name) for row in rows], field) for field in self._others
        ]
        if not columns:
            return _no_columns(arrow, len(rows))
        return arrow.Table.from_arrays(columns, schema=self._others)

    def _column_of(self, values: list[Any], field: pyarrow.Field) -> pyarrow.Array:
        column = _array(values, field.type, field.name, self._rows + 1)
        # pyarrow cuts 0.5 to 0 for a column of integers, and drops keys that a struct has not.
        for number, (value, taken) in enumerate(
            zip(values, column.to_pylist(), strict=True), self._rows + 1
        ):
            if not _is_same(value, taken):
                raise EmbedgeError(
                    f"output row {number}: column {field.name!r}: expected {field.type} as in the first rows, found "
                    f"{value!r:.40}; {_ONE_TYPE}"
                )
        return column

    def _opened(self) -> Any:
        if self._writer is None:
            others = self._others if self._others is not None else self._arrow.schema([])
            flat = [field.name for field in others if not self._arrow.types.is_nested(field.type)]
            schema = others.append(self._arrow.field(EMBEDDING, self._type, nullable=False))
            self._writer = self._arrow.parquet.ParquetWriter(
                self._sink,
                schema.with_metadata(self._metadata),
                compression=dict.fromkeys(flat, "zstd"),  # vectors do not get smaller
                use_dictionary=flat,
                write_statistics=flat,
            )
        return self._writer

    def _flush(self) -> None:
        if self._held:
            writer = self._opened()
            with self._named():
                table = self._arrow.concat_tables(self._held).cast(writer.schema.remove_metadata())
                writer.write_table(table, row_group_size=max(table.num_rows, 1))
            self._held, self._held_bytes = [], 0


_ONE_TYPE = "a Parquet column has one type; choose columns with --keep, or write JSONL"


def schema_of(rows: Sequence[Mapping[str, Any]], first: int = 1) -> pyarrow.Schema:
    """The columns that rows of JSON need, a ``pyarrow.Schema``; ``embedding`` is none of them.

    Where they hold nulls alone, or empty lists, strings are expected in later rows.

    Args:
        rows: the members of each.
        first: number of the first row, for messages.

    Raises:
        EmbedgeError: a column has no type that Parquet has.
    """
    arrow = load_pyarrow()
    names = [n for n in dict.fromkeys(key for row in rows for key in row) if n != EMBEDDING]
    fields = []
    for name in names:
        values = [row.get(name) for row in rows]
        kind = _with_strings(_array(values, None, name, first).type)
        if kind is None:
            row = next(row for row, value in enumerate(values, first) if value is not None)
            raise EmbedgeError(
                f"output row {row}: column {name!r}: expected values that Parquet has, found an object without keys, "
                "which it has not; leave that column out with --keep, or write JSONL"
            )
        fields.append((name, kind))
    return arrow.schema(fields)


def _with_strings(kind: Any) -> Any:
    """A type with strings where only nulls were; ``None`` if a struct in it has no field."""
    arrow = load_pyarrow()
    if arrow.types.is_null(kind):
        return arrow.string()
    if arrow.types.is_list(kind):
        inner = _with_strings(kind.value_type)
        return None if inner is None else arrow.list_(inner)
    if arrow.types.is_struct(kind):
        fields = [(field.name, _with_strings(field.type)) for field in kind]
        whole = fields and all(inner is not None for _, inner in fields)
        return arrow.struct(fields) if whole else None
    return kind


def _array(values: list[Any], kind: Any, name: str, first: int) -> pyarrow.Array:
    """Values as a column; an error names the first row that has none of its type."""
    arrow = load_pyarrow()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise EmbedgeError(
            f"output row {first}: expected columns' names that UTF-8 has, found half of a surrogate pair in {name!r}; "
            "leave that column out with --keep, or write JSONL"
        ) from error
    try:
        return arrow.array(values, kind)
    except (arrow.ArrowException, OverflowError, UnicodeError) as error:
        row = first + _first_refused(values, kind)
        reason = str(error).partition("\n")[0].rstrip(".")
        raise EmbedgeError(f"output row {row}: column {name!r}: {reason}; {_ONE_TYPE}") from error


def _first_refused(values: list[Any], kind: Any) -> int:
    """The shortest run of values from the first that is refused ends at this index."""
    arrow = load_pyarrow()
    taken, refused = 0, len(values)
    while refused - taken > 1:
        middle = (taken + refused) // 2
        try:
            arrow.array(values[:middle], kind)
            taken = middle
        except (arrow.ArrowException, OverflowError, UnicodeError):
            refused = middle
    return taken


def vector_type(dim: int, dtype: str, *, multi_vector: bool = False) -> Any:
    """The type of a column of vectors, a ``pyarrow.DataType``."""
    arrow = load_pyarrow()
    of_one = arrow.list_(getattr(arrow, dtype)(), dim)
    return arrow.list_(of_one) if multi_vector else of_one


def vector_array(
    vectors: NDArray[np.float32] | Sequence[NDArray[np.float32]],
    kind: Any,
    dtype: str,
    first: int = 1,
) -> pyarrow.Array:
    """Vectors as a column.

    Args:
        vectors: float32 ``[rows, dim]``, or of multi-vectors float32 ``[tokens, dim]`` a row.
        kind: what :func:`vector_type` gives.
        dtype: "float32" or "float16".
        first: number of the first row, for messages.

    Raises:
        EmbedgeError: a value is too large for float16.
    """
    arrow = load_pyarrow()
    if isinstance(vectors, np.ndarray):
        return arrow.FixedSizeListArray.from_arrays(
            arrow.array(as_dtype(vectors, dtype, first).reshape(-1)), type=kind
        )
    offsets = np.cumsum([0, *map(len, vectors)], dtype=np.int32)
    of_one = kind.value_type
    joined = (
        np.concatenate(vectors) if len(vectors) else np.zeros((0, of_one.list_size), np.float32)
    )
    values = arrow.FixedSizeListArray.from_arrays(
        arrow.array(as_dtype(joined, dtype, first).reshape(-1)), type=of_one
    )
    return arrow.ListArray.from_arrays(arrow.array(offsets), values, type=kind)


def as_dtype(vectors: NDArray[np.float32], dtype: str, first: int = 1) -> NDArray[Any]:
    """Vectors rounded to a type.

    Args:
        vectors: float32 ``[rows, dim]``.
        dtype: "float32" or "float16".
        first: number of the first row, for messages.

    Raises:
        EmbedgeError: a value is too large for float16.
    """
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(vectors, np.dtype(dtype).newbyteorder("<"))
    if dtype == "float16" and not np.isfinite(rounded).all():
        raise EmbedgeError(
            f"output rows {first} to {first + len(vectors) - 1}: expected values that float16 has, up to 65504, found "
            f"{np.abs(vectors).max():g}; write float32"
        )
    return rounded


def read_fingerprint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fingerprint that a file has, and its parts, as :class:`ParquetOutput` was given them.

    Args:
        path: of a Parquet file.

    Raises:
        EmbedgeError: the file cannot be read, or has none.
    """
    found = read_metadata(path)
    if _FINGERPRINT not in found or _PARTS not in found:
        raise EmbedgeError(
            f"{os.fspath(path)}: expected embedge.fingerprint in the file's metadata, found none; embed its texts anew"
        )
    return {"fingerprint": found[_FINGERPRINT], "parts": found[_PARTS]}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What embedge has put into a file's metadata, by key; nothing where another program wrote it.

    Args:
        path: of a Parquet file.

    Raises:
        EmbedgeError: the file cannot be read, or what it says is damaged.
    """
    arrow = load_pyarrow()
    name = os.fspath(path)
    with named_errors(name, "expected a whole Parquet file; name another"):
        found = arrow.parquet.read_metadata(path).metadata or {}
    texts = {key.decode(): value for key, value in found.items() if key.startswith(b"embedge.")}
    try:
        return {
            key: value.decode() if key == _FINGERPRINT else json.loads(value)
            for key, value in texts.items()
        }
    except ValueError as error:
        raise EmbedgeError(
            f"{name}: expected JSON in the metadata under {', '.join(texts)}, found something else; write it anew"
        ) from error


def _is_same(value: Any, taken: Any) -> bool:
    """Whether a column has taken a value as it is; a key that is missing is a null there."""
    if isinstance(value, dict) and isinstance(taken, dict):
        return all(_is_same(value.get(key), taken.get(key)) for key in {*value, *taken})
    if isinstance(value, list) and isinstance(taken, list):
        return len(value) == len(taken) and all(map(_is_same, value, taken))
    return bool(value == taken)


def _no_columns(arrow: Any, rows: int) -> pyarrow.Table:
    """A table of some rows without a column, to which one can be appended."""
    return arrow.table({"": arrow.nulls(rows)}).select([])


class _Sink:
    """What pyarrow takes for a file that is only written to."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._place = 0
        self.closed = False
        self.mode = "wb"

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._sink.write(piece)
        self._place += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._place

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing is held here."""

    def close(self) -> None:
        self.closed = True
