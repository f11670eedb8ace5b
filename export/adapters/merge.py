"""How one tensor of a task is made from the base's and the adapter's, as PEFT does it, in float32.

    plain   W + s · B·A
    DoRA    m · (W + s · B·A) / ‖W + s · B·A‖, with one magnitude m and one norm per output

with A ``[rank, in]`` and B ``[out, rank]``. W is ``[out, in]`` in a Linear. It is ``[in, out]`` in
an embedding table (in = tokens) and in the Conv1D of GPT-2's kind, which are merged with
``transposed=True``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import AdapterError
from embedge.export.source.safetensors_file import TensorSource, first_not_finite

__all__ = ["MergeRule", "add_low_rank", "block_rows", "output_norms"]

_BLOCK_VALUES = 1 << 22  # 16 MB of B·A at a time


@dataclass(frozen=True, kw_only=True)
class MergeRule:
    """How one tensor changes; tensors of the adapter are given by their keys.

    Attributes:
        shape: the tensor's shape.
        replacement: takes the place of the base's tensor first.
        a, b: factors of the low-rank product, added with ``scaling``.
        magnitude: DoRA's, applied after that.
        shift: added with ``scaling`` (the bias of lora_B).
        rows: takes the place of the rows ``row_numbers`` of a table.
        row_numbers: which rows ``rows`` holds.
        transposed: whether the weight has its inputs first.
        block: number and count, where the adapter's tensors are of several modules, each with as many rows:
            which of these blocks is meant.
        zero_delta: whether B·A is all zero.
        changes: whether the result can differ from the base.
    """

    shape: tuple[int, ...]
    replacement: str | None = None
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    shift: str | None = None
    rows: str | None = None
    row_numbers: tuple[int, ...] = ()
    scaling: float = 1.0
    transposed: bool = False
    block: tuple[int, int] = (0, 1)
    zero_delta: bool = False
    changes: bool = True

    def merge(self, base: NDArray[np.float32] | None, adapter: TensorSource) -> NDArray[np.float32]:
        """Return the merged tensor; ``base`` is changed in place.

        Args:
            base: the base's tensor, ``None`` if it has none or ``replacement`` takes its place.
            adapter: the adapter's tensors.

        Raises:
            AdapterError: if the result is not finite or DoRA's norm is zero.
        """
        if self.replacement is not None:
            merged = self._rows(adapter, self.replacement)
        else:
            merged = np.zeros(self.shape, np.float32) if base is None else base
        # What overflows is refused below.
        with np.errstate(over="ignore", invalid="ignore"):
            if self.a is not None and self.b is not None:
                a, b = adapter.read(self.a), self._rows(adapter, self.b)
                add_low_rank(merged, a, b, self.scaling, transposed=self.transposed)
            if self.magnitude is not None:
                try:
                    magnitude = self._rows(adapter, self.magnitude)
                    scale_to_magnitude(merged, magnitude, transposed=self.transposed)
                except ZeroDivisionError as problem:
                    raise AdapterError(f"cannot be merged by DoRA: {problem}") from problem
            if self.rows is not None:
                merged[list(self.row_numbers)] = adapter.read(self.rows)
            if self.shift is not None:
                merged += self._rows(adapter, self.shift) * np.float32(self.scaling)
        bad = first_not_finite(merged.reshape(-1))
        if bad is not None:
            raise AdapterError(
                f"becomes {merged.reshape(-1)[bad]} when it is merged; "
                "the adapter's numbers are too large"
            )
        return merged

    def _rows(self, adapter: TensorSource, key: str) -> NDArray[np.float32]:
        """The rows of a tensor of the adapter that are meant."""
        return adapter.read(key, block_rows(self.block, adapter.shape(key)[0]))


def block_rows(block: tuple[int, int], rows: int) -> slice | None:
    """Which of some rows a block is (:attr:`MergeRule.block`), ``None`` for all."""
    number, count = block
    size = rows // count
    return None if count == 1 else slice(number * size, (number + 1) * size)


def add_low_rank(
    weight: NDArray[np.float32],
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    scaling: float,
    *,
    transposed: bool,
) -> None:
    """Add ``scaling · B·A`` to ``weight`` in place, a block of rows at a time.

    Args:
        weight: float32 ``[out, in]``, or ``[in, out]`` if ``transposed``.
        a: float32 ``[rank, in]``.
        b: float32 ``[out, rank]``.
        scaling: the factor s.
        transposed: whether ``weight`` has its inputs first.
    """
    left, right = (a.T, b.T) if transposed else (b, a)
    rows = max(1, _BLOCK_VALUES // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], rows):
        block = left[begin : begin + rows] @ right
        block *= np.float32(scaling)
        weight[begin : begin + rows] += block


def output_norms(weight: NDArray[np.float32], *, transposed: bool) -> NDArray[np.float64]:
    """Length of the weights of every output, ``[out]``.

    Args:
        weight: float32 ``[out, in]``, or ``[in, out]`` if ``transposed``.
        transposed: whether ``weight`` has its inputs first.
    """
    squares = "ij,ij->j" if transposed else "ij,ij->i"
    norms: NDArray[np.float64] = np.sqrt(np.einsum(squares, weight, weight, dtype=np.float64))
    return norms


def scale_to_magnitude(
    weight: NDArray[np.float32], magnitude: NDArray[np.float32], *, transposed: bool
) -> None:
    """Scale ``weight`` in place so that the weights of every output have the length ``magnitude``.

    Args:
        weight: float32 ``[out, in]``, or ``[in, out]`` if ``transposed``; the adapter is already
            added.
        magnitude: float32 ``[out]``.
        transposed: whether ``weight`` has its inputs first.

    Raises:
        ZeroDivisionError: if all weights of an output are zero, which have no direction.
    """
    norm = output_norms(weight, transposed=transposed)
    if not norm.all():
        raise ZeroDivisionError(f"output {int(np.argmin(norm))} has the norm 0")
    factor = (magnitude / norm).astype(np.float32)
    weight *= factor if transposed else factor[:, np.newaxis]
