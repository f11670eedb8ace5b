"""An output that a killed run leaves in parts, which the next one continues: ``--resume``.

.. code-block:: text

    .vectors.parquet.parts.lock   whose they are, while a run is at it
    vectors.parquet.parts/        until vectors.parquet is there
        job.json                  what the vectors are made of
        000000000000-000000065536.parquet

Rules:
    * A folder of that name is taken if it is new or empty, or holds a job of embedge's and its files alone. No other
      file is ever deleted.
    * A part takes its name when it is whole and on the disk, and its name says which rows it holds: from, and up to
      the one after its last, counted from 0 in the rows of the call.
    * Parts are continued only by a call that makes the same: of the same bytes, the same kind of vectors, the same
      rows and columns. What differs is named.
    * They are joined when the last row is there, and go once the output has its name. One process at a time.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file, system_reason
from embedge.runtime.bundle.json_object import parse_json
from embedge.runtime.bundle.lock import check_own, sole_holder
from embedge.runtime.bundle.writing import partial_of, replace_file, sync_files
from embedge.runtime.cli.vector_output import Layout, csv_line, open_output, vector_writer
from embedge.runtime.encode.fingerprint import check_fingerprint
from embedge.runtime.errors import EmbedgeError, FingerprintError
from embedge.runtime.tables.arrow import load_pyarrow

if TYPE_CHECKING:
    from embedge.runtime.cli.rows import Columns
    from embedge.runtime.cli.vector_output import Vectors, VectorWriter
    from embedge.runtime.tables.chunk import Others

__all__ = ["Parts", "open_parts"]

_VERSION = 1
_JOB = "job.json"
_NAME = re.compile(r"([0-9]{12})-([0-9]{12})\.[a-z]+")
_NEXT = re.compile(r"next\.[a-z]+")
_UNFINISHED = re.compile(r"\.(next\.[a-z]+|job\.json)\.[0-9a-f]{16}\.partial")
_PART_SECONDS = 30.0
_PART_ROWS = 65_536
_BLOCK_BYTES = 1 << 20


@contextmanager
def open_parts(
    output: str,
    layout: Layout,
    job: Mapping[str, Any],
    columns: Columns,
    check: Callable[[], None],
) -> Iterator[Parts]:
    """The parts of an output, for this process alone until the block ends.

    Args:
        output: its name.
        layout: how it is written.
        job: what its rows depend on besides the vectors' kind, as JSON has it.
        columns: the other columns of the input.
        check: raises if the input is no longer what the job says; called before a part takes its name.

    Raises:
        EmbedgeError: they are of another job, another process is at it, the folder is not embedge's, or the
            output is there and no part is.
    """
    target = Path(os.path.realpath(output))
    folder = target.with_name(f"{target.name}.parts")
    with ExitStack() as stack:
        try:
            lock = folder.with_name(f".{folder.name}.lock")
            stack.enter_context(sole_holder(lock, lambda holder: _busy(folder, holder)))
            removed = partial_of(folder)
            if os.path.lexists(removed):  # a run was killed while it tidied up
                _remove(removed)
            if target.exists() and not os.path.lexists(folder / _JOB):
                raise EmbedgeError(
                    f"--resume: {output} is there already, and no {folder.name} to continue; delete it, name another "
                    "--output, or leave out --resume to replace it"
                )
            if not os.path.lexists(folder):
                folder.mkdir()
            _check_own(folder)
        except OSError as error:
            raise EmbedgeError(f"--resume: {folder}: {system_reason(error)}") from error
        yield stack.enter_context(Parts(output, folder, layout, job, columns, check))


def _busy(folder: Path, holder: str) -> EmbedgeError:
    return EmbedgeError(f"--resume: {folder} is being written by {holder}; wait until it ends")


def _check_own(folder: Path) -> None:
    """Refuses a folder that holds anything else than a job of embedge's and its files."""
    check_own(folder, stat.S_ISDIR, "a folder")
    paths = sorted(folder.iterdir())
    strange = next((path for path in paths if not _is_own(path)), None)
    if strange is not None:
        raise EmbedgeError(
            f"--resume: {folder}: expected a folder of --resume with its parts alone, found {strange.name} in it; "
            "nothing was deleted: move that folder away, or name another --output"
        )
    if any(_UNFINISHED.fullmatch(path.name) is None for path in paths):
        _job_in(folder)


def _is_own(path: Path) -> bool:
    named = path.name == _JOB or any(
        pattern.fullmatch(path.name) for pattern in (_NAME, _NEXT, _UNFINISHED)
    )
    return named and stat.S_ISREG(path.lstat().st_mode)


def _job_in(folder: Path) -> dict[str, Any]:
    """What a folder's parts are made of."""
    try:
        found = parse_json(read_regular_file(str(folder / _JOB), JSON_BYTES))
    except (OSError, ValueError) as error:
        raise EmbedgeError(
            f"--resume: {folder / _JOB}: {system_reason(error)}; if that folder is not needed, delete it to start anew"
        ) from error
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise EmbedgeError(
            f'--resume: {folder / _JOB}: expected a job of embedge\'s with "version": {_VERSION}, found another file; '
            "if that folder is not needed, delete it to start anew"
        )
    return found


def _remove(folder: Path) -> None:
    """Deletes the parts of a job, and the folder."""
    _check_own(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _JOB):  # the job last
        path.unlink()
    folder.rmdir()


class Parts:
    """Takes rows, and knows how many there are already; :func:`open_parts` makes it.

    Attributes:
        rows: that whole parts hold.
    """

    def __init__(
        self,
        output: str,
        folder: Path,
        layout: Layout,
        job: Mapping[str, Any],
        columns: Columns,
        check: Callable[[], None],
    ) -> None:
        self._output, self._folder, self._layout = output, folder, layout
        self._columns = columns
        self._check_input = check
        self._open: ExitStack | None = None
        self._writer: VectorWriter | None = None
        self._started = 0.0
        self._paths = self._check(job)
        self.rows = self._rows_of_parts()
        self._end = self.rows  # of the part that is open

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._open is not None:
            self._open.__exit__(kind, error, trace)
            self._open = None

    def write(self, others: Others, vectors: Vectors) -> None:
        """Adds rows, and ends the part where it is time."""
        if self._open is None:
            self._begin()
        assert self._writer is not None
        self._writer.write(others, vectors)
        self._end += len(vectors)
        long = time.monotonic() - self._started >= _PART_SECONDS
        if long or self._end - self.rows >= _PART_ROWS:
            self._finish()

    def join(self, rows: int) -> None:
        """Writes the output from the parts, and removes them.

        Args:
            rows: that it has to have.

        Raises:
            EmbedgeError: parts hold other rows, or the output cannot be written.
        """
        if self._open is not None:
            self._finish()
        if self.rows != rows:
            raise EmbedgeError(
                f"--resume: expected {rows} rows, found {self.rows} in {self._folder}: the input changed while it was "
                "read; delete that folder and start anew"
            )
        _check_own(self._folder)
        with open_output(self._output) as stream:
            self._join_into(stream)
        removed = partial_of(self._folder)
        try:
            os.rename(self._folder, removed)  # never found half deleted
            _remove(removed)
        except OSError as error:
            raise EmbedgeError(
                f"--resume: {self._output} is whole, but its parts could not be deleted: {removed}: "
                f"{system_reason(error)}; delete that folder"
            ) from error

    def _begin(self) -> None:
        self._open = ExitStack()
        self._started = time.monotonic()
        stream = self._open.enter_context(open_output(str(self._next)))
        columns = self._columns if self._columns is not None else self._first_columns()
        self._writer = self._open.enter_context(
            vector_writer(stream, self._layout, columns, before=self.rows)
        )

    def _finish(self) -> None:
        assert self._open is not None
        stack, self._open = self._open, None
        stack.close()
        self._check_input()
        name = f"{self.rows:012d}-{self._end:012d}.{self._layout.file_format}"
        os.rename(self._next, self._folder / name)
        sync_files(self._folder, [name])
        self._paths.append(self._folder / name)
        self.rows = self._end

    @property
    def _next(self) -> Path:
        return self._folder / f"next.{self._layout.file_format}"

    def _first_columns(self) -> Columns:
        """Of JSONL, whose first rows decide on the columns: those of the first part."""
        if not self._paths or self._layout.file_format not in ("csv", "parquet"):
            return None
        if self._layout.file_format == "csv":
            with open(self._paths[0], encoding="utf-8", newline="") as file:
                return next(csv.reader(file))[:-1]
        schema = load_pyarrow().parquet.read_schema(self._paths[0])
        return schema.remove(len(schema) - 1).remove_metadata()

    def _check(self, job: Mapping[str, Any]) -> list[Path]:
        """The parts, in their order, if they are of this job; a folder without any is taken for it."""
        paths = sorted(p for p in self._folder.iterdir() if _NAME.fullmatch(p.name))
        here = {
            "version": _VERSION,
            **job,
            "format": self._layout.file_format,
            "dtype": self._layout.dtype,
        }
        kind = dict(self._layout.kind or {})
        if not paths:
            replace_file(self._folder / _JOB, json.dumps(here | {"kind": kind}, indent=2) + "\n")
            return paths
        advice = f"call it as then, or delete {self._folder} to start anew"
        there = _job_in(self._folder)
        differing = [name for name in here if there.get(name) != here[name]]
        if differing:
            told = "; ".join(
                f"{name}: {json.dumps(there.get(name))} then, {json.dumps(here[name])} now"
                for name in differing
            )
            raise EmbedgeError(
                f"--resume: {self._folder} holds rows of another call: {told}; {advice}"
            )
        try:
            check_fingerprint(there.get("kind", {}), kind.get("parts", {}), ())
        except FingerprintError as error:
            raise FingerprintError(
                f"--resume: {self._folder} holds other vectors: {error}", error.differing
            ) from error
        return paths

    def _rows_of_parts(self) -> int:
        rows = 0
        for path in self._paths:
            found = _NAME.fullmatch(path.name)
            assert found is not None
            if int(found[1]) != rows:
                raise EmbedgeError(
                    f"--resume: {self._folder}: expected a part with row {rows}, found {path.name} next; delete that "
                    "folder to start anew"
                )
            rows = int(found[2])
        return rows

    def _join_into(self, stream: Any) -> None:
        if self._layout.file_format in ("jsonl", "csv"):
            for number, path in enumerate(self._paths):
                with path.open("rb") as part:
                    if self._layout.file_format == "csv" and number > 0:
                        part.seek(self._csv_head())
                    while block := part.read(_BLOCK_BYTES):
                        stream.write(block)
            if self._paths or self._layout.file_format == "jsonl":
                return
        with vector_writer(stream, self._layout, self._columns) as writer:
            for path in self._paths:
                if self._layout.file_format == "npy":
                    array = np.load(path, mmap_mode="r")
                    for start in range(0, len(array), 1024):
                        writer.write([], np.asarray(array[start : start + 1024]))
                else:
                    file = load_pyarrow().parquet.ParquetFile(path)
                    for group in range(file.num_row_groups):
                        writer.write_table(file.read_row_group(group))  # type: ignore[attr-defined]

    def _csv_head(self) -> int:
        """Bytes of the line with the columns' names, which a name may break."""
        with open(self._paths[0], encoding="utf-8", newline="") as file:
            names = next(csv.reader(file))
        return len(csv_line(names).encode())
