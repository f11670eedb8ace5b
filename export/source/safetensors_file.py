"""One safetensors file, checked when opened and read tensor by tensor as float32.

safetensors' own numpy reader has no bfloat16, so the values are read here; the header by the bundle's reader.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import ExportError
from embedge.runtime.bundle.files import open_regular_file
from embedge.runtime.bundle.safetensors_header import ITEM_BYTES, HeaderError, read_header

__all__ = [
    "SafetensorsFile",
    "StoredTensors",
    "TensorSource",
    "check_finite",
    "first_not_finite",
    "row_range",
]

_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_CHUNK_BYTES = 1 << 22


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
                empty = not os.fstat(file.fileno()).st_size  # and cannot be mapped
                self._map = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._tensors = read_header(self._map)
        except OSError as problem:
            raise error(f"{path}: cannot be read: {problem.strerror or problem}") from problem
        except HeaderError as problem:
            raise error(
                f"{path}: not a complete safetensors file: {problem}; the file is truncated or damaged, fetch or save "
                "it again"
            ) from problem

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
            begin += first * prod(shape[1:]) * ITEM_BYTES[tensor.dtype]
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
