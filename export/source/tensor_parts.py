"""Neighbouring rows of a stored tensor as tensors of their own: what a checkpoint holds fused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.export.errors import CheckpointError
from embedge.export.source.safetensors_file import StoredTensors, row_range

__all__ = ["TensorPart", "part_names", "parts_of"]


@dataclass(frozen=True, kw_only=True)
class TensorPart:
    """One of several equal blocks of rows of a tensor, read as its file reads.

    Attributes:
        file: that of the whole tensor.
        key: the whole tensor.
        number: of the block, from 0.
        count: of blocks.
    """

    file: StoredTensors
    key: str
    number: int
    count: int

    @property
    def path(self) -> Path:
        """The file that holds it."""
        return self.file.path

    def shape(self, key: str) -> tuple[int, ...]:
        """The block's shape, whatever its ``key`` is; uneven rows are the last block's."""
        rows, *others = self.file.shape(self.key)
        first, last = self._ends(rows)
        return (last - first, *others)

    def is_float(self, key: str) -> bool:
        """Whether :meth:`read` can give it."""
        return self.file.is_float(self.key)

    def read(self, key: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The block, or neighbours along its first axis, float32, a fresh array.

        Raises:
            ExportError: as the file's error class, if it is not a float or holds NaN or infinity.
        """
        first, last = self._ends(self.file.shape(self.key)[0])
        begin, end = row_range(rows, (last - first,))
        return self.file.read(self.key, slice(first + begin, first + end))

    def _ends(self, rows: int) -> tuple[int, int]:
        size = rows // self.count
        first = self.number * size
        return first, rows if self.number == self.count - 1 else first + size


def parts_of(
    files: Mapping[str, StoredTensors],
    fused: Mapping[str, tuple[str, ...]],
    aside: str = "",
) -> dict[str, StoredTensors]:
    """The file or the block of every tensor.

    Args:
        files: the file of each stored tensor.
        fused: by the end of a fused module's name, the ends of those whose rows it holds, in order.
        aside: ends of the names of tensors that are left out, as a regular expression; "" for none.

    Raises:
        CheckpointError: a tensor is stored both alone and in a fused one.
    """
    found: dict[str, StoredTensors] = {}
    for key, file in files.items():
        if aside and re.search(f"(?:{aside})$", key):
            continue
        names = part_names(key, fused)
        if len(names) == 1 or not file.shape(key):
            found[key] = file
            continue
        for number, name in enumerate(names):
            if name in files:
                raise CheckpointError(
                    f"{file.path}: {name} is there, and {key}, which holds it too; expected one of them: delete "
                    "the one that the model does not use"
                )
            found[name] = TensorPart(file=file, key=key, number=number, count=len(names))
    return found


def part_names(key: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Names of the parts of a tensor in order; of one that is not fused its own.

    Args:
        key: the tensor.
        fused: as in :func:`parts_of`.
    """
    for whole, parts in fused.items():
        before, found, after = f".{key}".rpartition(f".{whole}.")
        if found:
            return [f"{before}.{part}.{after}".removeprefix(".") for part in parts]
    return [key]
