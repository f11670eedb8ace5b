"""One safetensors file, checked when opened and read tensor by tensor as float32.

safetensors' own numpy reader has no bfloat16, so the (simple) format is read here:

    8 bytes      header length N, little-endian unsigned
    N bytes      JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest     the tensors' bytes; offsets count from here

The rules of the format that a damaged file breaks, and that are checked before anything is read:
offsets lie inside the file, a tensor's bytes are what its dtype and shape need, and the tensors
cover the rest of the file without holes, overlaps or bytes left over.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import ExportError
from embedge.runtime.bundle.files import open_regular_file
from embedge.runtime.bundle.json_object import parse_json

__all__ = [
    "SafetensorsFile",
    "StoredTensors",
    "TensorSource",
    "check_finite",
    "first_not_finite",
    "row_range",
]

_MAX_HEADER_BYTES = 100_000_000  # the limit that the format sets
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_CHUNK_BYTES = 1 << 22
_MOST_BYTES = 1 << 60  # what indices reach; a tensor without values may name any shape
_MOST_AXES = 32  # of an array in numpy 1


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int


class TensorSource(Protocol):
    """Named tensors, as :class:`SafetensorsFile` gives them; ``path`` is the file that they lie in."""

    @property
    def path(self) -> Path: ...
    def keys(self) -> tuple[str, ...]: ...
    def dtype(self, key: str) -> str: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]: ...
    def chunks(self, key: str) -> Iterator[bytes]: ...


class StoredTensors(Protocol):
    """What gives a checkpoint's tensors by their names: a file, a part of a tensor, or one that is restored."""

    @property
    def path(self) -> Path: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def is_float(self, key: str) -> bool: ...
    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]: ...


class SafetensorsFile:
    """The tensors of one file, mapped into memory: nothing is copied before :meth:`read`."""

    def __init__(self, path: Path, error: type[ExportError]) -> None:
        """Map ``path`` and check its header.

        Args:
            path: the file.
            error: the class that this file's errors are raised as.

        Raises:
            ExportError: as ``error``, if the file is missing, truncated or breaks the format.
        """
        self.path = path
        self._error = error
        try:
            with open_regular_file(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise self._damaged(
                        f"it holds {size} bytes, fewer than the 8 of a header length"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as problem:
            raise error(f"{path}: cannot be read: {problem.strerror or problem}") from problem
        self._tensors = self._parse(size)

    def _damaged(self, what: str) -> ExportError:
        return self._error(
            f"{self.path}: not a complete safetensors file: {what}; the file is truncated or "
            "damaged, fetch or save it again"
        )

    def _parse(self, size: int) -> dict[str, _Tensor]:
        header_bytes = int.from_bytes(self._map[:8], "little")
        if header_bytes > _MAX_HEADER_BYTES or 8 + header_bytes > size:
            raise self._damaged(f"the header should be {header_bytes} bytes, the file has {size}")
        try:
            header = parse_json(self._map[8 : 8 + header_bytes])
        except ValueError as problem:
            raise self._damaged(f"the header is not JSON ({problem})") from problem
        if not isinstance(header, dict):
            raise self._damaged("the header is not a JSON object")
        header.pop("__metadata__", None)
        start = 8 + header_bytes
        tensors = {key: self._entry(key, entry, start) for key, entry in header.items()}
        position = start
        for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if tensor.begin != position:
                raise self._damaged(
                    f"tensor {key!r} begins at byte {tensor.begin} of the file, expected {position}"
                )
            position = tensor.end
        if position != size:
            raise self._damaged(f"its tensors end at byte {position}, the file has {size}")
        return tensors

    def _entry(self, key: str, entry: Any, start: int) -> _Tensor:
        try:
            dtype, shape, (begin, end) = (
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
            numbers = (*shape, begin, end)
            sane = all(type(n) is int and 0 <= n <= _MOST_BYTES for n in numbers)
            sane = sane and isinstance(dtype, str) and len(shape) <= _MOST_AXES
            sane = sane and prod(max(n, 1) for n in shape) <= _MOST_BYTES
        except (TypeError, KeyError, ValueError):
            sane = False
        if not sane:
            raise self._damaged(f"the header entry of tensor {key!r} makes no sense")
        if dtype not in _ITEM_BYTES:
            raise self._error(
                f"{self.path}: tensor {key!r} has the dtype {dtype!r}, known are "
                f"{', '.join(_ITEM_BYTES)}"
            )
        needed = prod(shape) * _ITEM_BYTES[dtype]
        if end - begin != needed:
            raise self._damaged(
                f"tensor {key!r} of shape {list(shape)} and dtype {dtype} needs {needed} bytes, "
                f"its offsets give it {end - begin}"
            )
        return _Tensor(dtype=dtype, shape=shape, begin=start + begin, end=start + end)

    def keys(self) -> tuple[str, ...]:
        """Return the tensor names, sorted."""
        return tuple(sorted(self._tensors))

    def dtype(self, key: str) -> str:
        """Return the dtype of ``key`` as the file names it, e.g. ``"BF16"``."""
        return self._tensors[key].dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of ``key``."""
        return self._tensors[key].shape

    def is_float(self, key: str) -> bool:
        """Return whether :meth:`read` can give ``key``: float16, bfloat16, float32 or float64."""
        return self.dtype(key) == "BF16" or self.dtype(key) in _FLOATS

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return ``key`` as a fresh float32 array (bfloat16 and float16 exactly, float64 rounded).

        Args:
            key: the tensor.
            rows: neighbours along the first axis to read instead of all.

        Raises:
            ExportError: as the file's error class, if the tensor is not a float or holds NaN or
                infinity.
        """
        tensor = self._tensors[key]
        if not self.is_float(key):
            raise self._error(
                f"{self.path}: tensor {key!r} is {tensor.dtype}, expected F16, BF16, F32 or F64 "
                "(of quantized weights, bitsandbytes' are read where config.json has their quantization_config; start "
                "from the original model else)"
            )
        first, last = row_range(rows, tensor.shape)
        shape, begin = tensor.shape, tensor.begin
        if rows is not None:
            shape = (last - first, *shape[1:])
            begin += first * prod(shape[1:]) * _ITEM_BYTES[tensor.dtype]
        count = prod(shape)
        if tensor.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            bits = np.frombuffer(self._map, "<u2", count, begin).astype(np.uint32)
            bits <<= 16
            values = bits.view(np.float32)
        else:
            stored = np.frombuffer(self._map, _FLOATS[tensor.dtype], count, begin)
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, refused below
                values = stored.astype(np.float32)
        return check_finite(
            values.reshape(shape), f"{self.path}: tensor {key!r}", first, self._error
        )

    def stored_bytes(self, key: str) -> NDArray[np.uint8]:
        """Return the bytes of ``key`` as they are stored, mapped and read-only, whatever its dtype."""
        tensor = self._tensors[key]
        return np.frombuffer(self._map, np.uint8, tensor.end - tensor.begin, tensor.begin)

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the stored bytes of ``key`` a few MB at a time."""
        tensor = self._tensors[key]
        for begin in range(tensor.begin, tensor.end, _CHUNK_BYTES):
            yield self._map[begin : min(begin + _CHUNK_BYTES, tensor.end)]


def row_range(rows: slice | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the first row of a slice and that after its last; without a slice those of all, 0 of a scalar."""
    if rows is None:
        return 0, shape[0] if shape else 0
    first, last, _ = rows.indices(shape[0])
    return first, last


def check_finite(
    values: NDArray[np.float32], name: str, first: int, error: type[ExportError]
) -> NDArray[np.float32]:
    """Return ``values``, rows of a tensor.

    Args:
        values: float32, of any shape.
        name: the tensor's, for the message.
        first: number of its first row.
        error: what is raised.

    Raises:
        ExportError: as ``error``, naming the first place of a NaN or infinity.
    """
    bad = first_not_finite(values.reshape(-1))
    if bad is None:
        return values
    place = [int(i) for i in np.unravel_index(bad, values.shape)]
    if place:
        place[0] += first
    raise error(f"{name} holds {values.reshape(-1)[bad]} at {place}, expected finite numbers")


def first_not_finite(values: NDArray[np.float32]) -> int | None:
    """Return the flat index of the first NaN or infinity, ``None`` when all numbers are finite."""
    step = 1 << 20  # bounds the memory of the mask
    for begin in range(0, values.size, step):
        finite = np.isfinite(values[begin : begin + step])
        if not finite.all():
            return begin + int(np.argmin(finite))
    return None
