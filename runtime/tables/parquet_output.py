"""Vectors into a Parquet file, beside other columns, with their fingerprint in the file's metadata.

The column ``embedding`` is a ``fixed_size_list`` of float32 or float16, of multi-vectors a list of such lists. The
file's metadata has ``embedge.fingerprint``, as ``e1:0123456789abcdef``, and ``embedge.fingerprint_parts``, as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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
    "vector_array",
    "vector_type",
]

_FINGERPRINT = "embedge.fingerprint"
_PARTS = "embedge.fingerprint_parts"
_GROUP_BYTES = 32 << 20  # of vectors; a row group is held in memory until it is written


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
        self._held_bytes += table.column(EMBEDDING).nbytes
        if self._held_bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Writes what is held, and the file's end."""
        self._flush()
        self._opened().close()

    def _table_of(self, others: Others) -> pyarrow.Table:
        arrow = self._arrow
        if isinstance(others, arrow.Table):
            return others
        rows = [{key: row[key] for key in row if key != EMBEDDING} for row in others]
        if self._others is None:
            names = list(dict.fromkeys(key for row in rows for key in row))
            with named_errors(
                f"output rows {self._rows + 1} to {self._rows + len(rows)}", _ONE_TYPE
            ):
                columns = [arrow.array([row.get(name) for row in rows]) for name in names]
            kinds = [column.type for column in columns]
            self._others = arrow.schema(list(zip(names, kinds, strict=True)))
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
        with named_errors(
            f"output rows {self._rows + 1} to {self._rows + len(values)}: column {field.name!r}",
            _ONE_TYPE,
        ):
            column = self._arrow.array(values, field.type)
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
            table = self._arrow.concat_tables(self._held).cast(writer.schema.remove_metadata())
            writer.write_table(table, row_group_size=max(table.num_rows, 1))
            self._held, self._held_bytes = [], 0


_ONE_TYPE = "a Parquet column has one type; choose columns with --keep, or write JSONL"


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
