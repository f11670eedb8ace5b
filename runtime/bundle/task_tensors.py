"""What a task brings to a graph that several tasks share: a safetensors file of some of the graph's inputs.

In the layout "shared" a precision has one graph, and for each task ``PRECISION/TASK.safetensors``: the branches
beside the Linears, biases, and columns that are multiplied in float32. Each tensor has the name, the type and the
shape of an input of the graph. The format, as https://github.com/huggingface/safetensors has it::

    8 bytes      length of the header, little-endian
    header       {"encoder.layer.0.query.branch_down": {"dtype": "I8", "shape": [1, 96, 16, 4],
                  "data_offsets": [0, 6144]}, …} and spaces
    the rest     the tensors' bytes, one behind the other; offsets count from here
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.files import open_regular_file, system_reason
from embedge.runtime.bundle.json_object import parse_json
from embedge.runtime.bundle.onnx_model import FLOAT, INT8, ValueType
from embedge.runtime.bundle.schema import Place, Record, Within, record
from embedge.runtime.errors import BundleError

__all__ = ["TaskTensors", "read_task_tensors"]

_LENGTH_BYTES, _HEADER_BYTES = 8, 64 << 20
_TYPES: Mapping[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<f4"), FLOAT),
    "I8": (np.dtype("i1"), INT8),
}
_AGAIN = "copy or export the bundle again"

_MOST_AXES, _SHOWN = 4, 80

Size: TypeAlias = Annotated[int, Within(0, 1 << 40)]
Length: TypeAlias = Annotated[int, Within(1, 1 << 40)]


@record
class _Tensor(Record):
    dtype: str
    shape: tuple[Length, ...]
    data_offsets: tuple[Size, ...]


class TaskTensors(NamedTuple):
    """A task's part of a shared graph's inputs, by name.

    Attributes:
        arrays: float32 and int8, mapped from the file.
    """

    arrays: Mapping[str, NDArray[Any]]

    @property
    def inputs(self) -> dict[str, ValueType]:
        """ONNX element type and rank of each."""
        types = dict(_TYPES.values())
        return {n: (types[array.dtype], array.ndim) for n, array in self.arrays.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(array.nbytes for array in self.arrays.values())


def read_task_tensors(file: Path) -> TaskTensors:
    """The tensors of a file, which is mapped into memory.

    Raises:
        BundleError: if the file cannot be read, or breaks a rule of the format.
    """
    try:
        with open_regular_file(file) as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            header = opened.read(min(length, _HEADER_BYTES))
            start = _LENGTH_BYTES + length
            data = np.memmap(opened, np.uint8, "r") if len(header) == length else None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = system_reason(error) if isinstance(error, OSError) else error
        raise BundleError(f"{file}: cannot be read: {reason}; {_AGAIN}") from error
    if data is None:
        raise BundleError(
            f"{file}: expected a header of {length} bytes, found {len(header)}; {_AGAIN}"
        )
    place = Place(str(file))
    try:
        entries = parse_json(header)
    except ValueError as error:
        raise BundleError(f"{file}: its header is no JSON: {error}; {_AGAIN}") from error
    if not isinstance(entries, dict):
        raise BundleError(f"{file}: expected tensors by name in its header; {_AGAIN}")
    entries.pop("__metadata__", None)
    arrays, end = {}, 0
    for name, value in sorted(entries.items(), key=_begin):
        at = place.member(name[:_SHOWN])
        tensor = _Tensor.parse(value, at)
        dtype, _ = _TYPES.get(tensor.dtype, (None, 0))
        size = 0 if dtype is None else prod(tensor.shape) * dtype.itemsize
        fits = len(tensor.shape) <= _MOST_AXES
        if dtype is None or not fits or tensor.data_offsets != (end, end + size):
            at.fail(
                f"expected {' or '.join(_TYPES)} of at most {_MOST_AXES} axes at {end}, found {tensor.dtype[:_SHOWN]} "
                f"of shape {list(tensor.shape[:8])} at {list(tensor.data_offsets[:8])}; {_AGAIN}"
            )
        end += size
        if start + end > len(data):
            raise BundleError(
                f"{file}: truncated: {name[:_SHOWN]} ends at byte {start + end}, found {len(data)}; {_AGAIN}"
            )
        arrays[name] = data[start + end - size : start + end].view(dtype).reshape(tensor.shape)
    if start + end != len(data):
        raise BundleError(
            f"{file}: {len(data) - start - end} bytes follow the last tensor; {_AGAIN}"
        )
    return TaskTensors(arrays)


def _begin(entry: tuple[str, Any]) -> int:
    """Where a header's entry says that its tensor begins; what is no entry comes first, and is refused."""
    value = entry[1]
    offsets = value.get("data_offsets") if isinstance(value, dict) else None
    first = offsets[0] if isinstance(offsets, list) and offsets else -1
    return first if isinstance(first, int) else -1
