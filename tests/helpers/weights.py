"""Tensors in memory that graphs are written with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


class StoredWeights:
    """Tensors by name; a task's adapter changes those in ``adapted``."""

    def __init__(
        self,
        tensors: Mapping[str, NDArray[np.float32]] | None = None,
        adapted: tuple[str, ...] = (),
    ) -> None:
        self.tensors = dict(tensors or {})
        self._adapted = adapted

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def absorbed(self, norm: str) -> bool:
        return False

    def version(self, name: str) -> str:
        return "task" if name in self._adapted else "base"

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        value = self.tensors[name].copy()
        return value if rows is None else value[rows]
