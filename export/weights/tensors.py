"""What a graph reads weights from: the tensors of one task under canonical names."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BASE = "base"  # the version of a tensor that no adapter changes


class Weights(Protocol):
    """The tensors of one task.

    ``read`` gives float32, a whole tensor or neighbours along its first axis; ``version`` is the task whose
    adapter changes a tensor, or :data:`BASE`; ``absorbed`` says whether the norm of a weight is part of the
    embedding table already.
    """

    def has(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]: ...
    def version(self, name: str) -> str: ...
    def absorbed(self, norm: str) -> bool: ...
