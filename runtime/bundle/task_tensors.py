"""What a task brings to a graph that several tasks share: a safetensors file of some of the graph's inputs.

In the layout "shared" a precision has one graph, and for each task ``PRECISION/TASK.safetensors``: the branches
beside the Linears, biases, and columns that are multiplied in float32. Each tensor has the name, the type and the
shape of an input of the graph: float32 or int8.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.files import open_regular_file, system_reason
from embedge.runtime.bundle.onnx_model import FLOAT, INT8, ValueType
from embedge.runtime.bundle.safetensors_header import HeaderError, StoredTensor, read_header
from embedge.runtime.errors import BundleError

__all__ = ["TaskTensors", "read_task_tensors"]

_TYPES: Mapping[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<f4"), FLOAT),
    "I8": (np.dtype("i1"), INT8),
}
_AGAIN = "copy or export the bundle again"

_MOST_AXES, _SHOWN = 4, 80


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
            empty = not os.fstat(opened.fileno()).st_size  # and cannot be mapped
            data = b"" if empty else mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        stored = read_header(data)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {system_reason(error)}; {_AGAIN}") from error
    except HeaderError as error:
        raise BundleError(f"{file}: {error}; {_AGAIN}") from error
    return TaskTensors({name: _array(file, data, name, at) for name, at in stored.items()})


def _array(file: Path, data: mmap.mmap | bytes, name: str, at: StoredTensor) -> NDArray[Any]:
    dtype, _ = _TYPES.get(at.dtype, (None, 0))
    if dtype is None or len(at.shape) > _MOST_AXES or 0 in at.shape:
        raise BundleError(
            f"{file}: tensor {name[:_SHOWN]!r}: expected {' or '.join(_TYPES)} of at most {_MOST_AXES} axes, found "
            f"{at.dtype} of shape {list(at.shape)}; {_AGAIN}"
        )
    return np.frombuffer(data, dtype, prod(at.shape), at.begin).reshape(at.shape)
