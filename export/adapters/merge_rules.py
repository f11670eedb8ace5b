"""How one tensor of a task is made from the base's and the adapter's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedge.export.adapters.merge import add_low_rank, scale_to_magnitude
from embedge.export.errors import AdapterError
from embedge.export.source.safetensors_file import SafetensorsFile, first_not_finite

__all__ = ["MergeRule"]


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
    zero_delta: bool = False
    changes: bool = True

    def merge(
        self, base: NDArray[np.float32] | None, adapter: SafetensorsFile
    ) -> NDArray[np.float32]:
        """Return the merged tensor; ``base`` is changed in place.

        Args:
            base: the base's tensor, ``None`` if it has none or ``replacement`` takes its place.
            adapter: the adapter's tensors.

        Raises:
            AdapterError: if the result is not finite or DoRA's norm is zero.
        """
        if self.replacement is not None:
            merged = adapter.read(self.replacement)
        else:
            merged = np.zeros(self.shape, np.float32) if base is None else base
        # What overflows is refused below.
        with np.errstate(over="ignore", invalid="ignore"):
            if self.a is not None and self.b is not None:
                a, b = adapter.read(self.a), adapter.read(self.b)
                add_low_rank(merged, a, b, self.scaling, transposed=self.transposed)
            if self.magnitude is not None:
                try:
                    magnitude = adapter.read(self.magnitude)
                    scale_to_magnitude(merged, magnitude, transposed=self.transposed)
                except ZeroDivisionError as problem:
                    raise AdapterError(f"cannot be merged by DoRA: {problem}") from problem
            if self.rows is not None:
                merged[list(self.row_numbers)] = adapter.read(self.rows)
            if self.shift is not None:
                merged += adapter.read(self.shift) * np.float32(self.scaling)
        bad = first_not_finite(merged.reshape(-1))
        if bad is not None:
            raise AdapterError(
                f"becomes {merged.reshape(-1)[bad]} when it is merged; "
                "the adapter's numbers are too large"
            )
        return merged
