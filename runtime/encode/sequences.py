"""What a graph reads at once: the tokens of a text or of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["ImageLayout", "ImageTokens", "TokenIds", "TokenSequence"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenIds:
    """One text.

    Attributes:
        ids: int64 ``[tokens]``.
        type_ids: likewise, the types of tokens.
        truncated: whether it was cut.
        unpooled: how many of the first tokens pooling leaves out.
        attended: how many of the first tokens others attend to, ``None`` for all.
        scored: bool ``[tokens]``, which have a vector of their own among multi-vectors, ``None`` for all.
    """

    ids: Ints
    type_ids: Ints
    truncated: bool
    unpooled: int = 0
    attended: int | None = None
    scored: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ImageLayout:
    """Where an image's features stand among the tokens around them.

    Attributes:
        ids: int64 ``[tokens]``.
        positions: int64 ``[3, tokens]``: time, row and column.
        pooled: bool ``[tokens]``, what a mean includes.
        features: int64 ``[features]``, the indices of the tokens that features replace.
    """

    ids: Ints
    positions: Ints
    pooled: NDArray[np.bool_]
    features: Ints


@dataclass(frozen=True)
class ImageTokens:
    """One image: its layout, and float32 ``[features, hidden]`` from the vision tower."""

    layout: ImageLayout
    features: NDArray[np.float32]
    attended: None = None
    scored: None = None

    @property
    def ids(self) -> Ints:
        """int64 ``[tokens]``."""
        return self.layout.ids

    def __len__(self) -> int:
        return len(self.ids)


TokenSequence: TypeAlias = TokenIds | ImageTokens
