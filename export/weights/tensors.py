"""The tensors of one task under canonical names, as graphs read them."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """``stored · scale + offset``, in float32: what a stored tensor stands for.

    Attributes:
        scale: a factor.
        offset: a number.
    """

    scale: float = 1.0
    offset: float = 0.0

    def of(self, stored: NDArray[np.float32]) -> NDArray[np.float32]:
        """What some elements stand for; changed in place."""
        if self.scale != 1.0:
            stored *= np.float32(self.scale)
        if self.offset:
            stored += np.float32(self.offset)
        return stored


@dataclass(frozen=True, kw_only=True)
class NormRef:
    """LayerNorm, or RMSNorm with ``rms``, by the canonical name of its module.

    Attributes:
        name: of the module.
        epsilon: added to the variance.
        rms: whether it is RMSNorm.
        has_bias: whether it has a bias.
    """

    name: str
    epsilon: float
    rms: bool = False
    has_bias: bool = False

    @property
    def weight(self) -> str:
        """Canonical name of its weight."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str | None:
        """Canonical name of its bias, ``None`` without one."""
        return f"{self.name}.bias" if self.has_bias else None
