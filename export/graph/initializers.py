"""Initializers whose bytes are made when they are wanted, and dropped right after."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, ONNX element type and shape of an initializer that is not computed yet."""

    name: str
    elem_type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        dtype = helper.tensor_dtype_to_np_dtype(self.elem_type)
        return int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class LazyInitializer:
    """Initializers that are computed together, when their bytes are written.

    Attributes:
        key: identity of the result: two initializers of one precision with equal keys make equal bytes.
        specs: the initializers, in the order in which ``compute`` returns them.
        compute: makes the arrays; called at most once per export of a key.
        owner: the task whose adapter changes a source of the result, or ``"base"``: shared by all.
        describe: for the per-layer report: format and error; ``None`` for plain tensors.
    """

    key: str
    owner: str
    specs: tuple[TensorSpec, ...]
    compute: Callable[[], Sequence[Array]]
    describe: Callable[[Sequence[Array]], dict[str, Any]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def elements(self) -> int:
        """Elements of the largest initializer, a measure of what computing takes."""
        return max(int(np.prod(spec.shape, dtype=np.int64)) for spec in self.specs)


@dataclass(frozen=True, kw_only=True)
class UnpackedWeight:
    """A Linear's 8-bit weight that a graph's file does not hold: the runtime makes it of stored 4 bits.

    Attributes:
        specs: the initializers that unpacking makes.
        out_features: rows.
        in_features: columns.
        packed: the stored 4-bit tensors.
        block_size: columns that share a scale.
        columns: float32 ``[in]`` factors of the columns, or ``None``.
        rotation: float32 ``[n, n]`` by which each block of a row is multiplied then, or ``None``.
        rows: float32 ``[out]`` factors of the scales, or ``None``.
    """

    specs: tuple[TensorSpec, ...]
    out_features: int
    in_features: int
    packed: LazyInitializer
    block_size: int
    columns: LazyInitializer | None
    rotation: LazyInitializer | None
    rows: LazyInitializer | None

    @property
    def initializers(self) -> list[LazyInitializer]:
        """What has to be stored."""
        return [r for r in (self.packed, self.columns, self.rotation, self.rows) if r is not None]


def digest(*arrays: Array | None) -> str:
    """A short identity of constants, for initializer keys."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(b"-" if array is None else array.tobytes())
    return state.hexdigest()[:16]
