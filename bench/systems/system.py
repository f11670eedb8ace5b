"""What the bench measures: one thing that turns token ids, or texts, into vectors.

Two doors, because two questions are asked. ``forward`` takes ids, the same array for every system,
so that shapes are compared without anybody's tokenizer. ``encode`` takes texts and is what a user
calls; single-text latency, fidelity and quality go through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedge.bench.systems.reference import Reference
from embedge.bench.systems.tokens import Ids
from embedge.runtime import Embedder
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.scoring.quantization import ranges_of

__all__ = ["EmbedgeSystem", "System", "TorchSystem"]

Vectors = NDArray[np.float32]


class System(Protocol):
    """Something that embeds.

    Attributes:
        name: as the tables show it.
        role: ``"embedge"``, ``"torch"`` or ``"peer"``.
        precision: the bundle's precision, ``None`` for others.
        bytes_on_disk: graph and weights of one task, ``None`` if unknown.
    """

    name: str
    role: str
    precision: str | None
    bytes_on_disk: int | None

    def forward(self, ids: Ids, mask: Ids) -> object:
        """Run the model on int64 ``[batch, tokens]``, the work that shapes are timed by."""

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, role: str | None = None
    ) -> Vectors:
        """Return float32 ``[n, dim]``; ``role`` is ``"query"``, ``"document"`` or ``None``."""


class TorchSystem:
    """The source in torch with the adapter merged: what torch users would run."""

    def __init__(self, name: str, reference: Reference, bytes_on_disk: int | None = None) -> None:
        self.name = name
        self.role = "torch"
        self.precision: str | None = None
        self.bytes_on_disk = bytes_on_disk
        self._reference = reference

    def forward(self, ids: Ids, mask: Ids) -> Vectors:
        """Return the vectors, float32 ``[batch, dim]``."""
        return self._reference.forward(ids, mask)

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, role: str | None = None
    ) -> Vectors:
        """Return float32 ``[n, dim]``."""
        return self._reference.encode(texts, batch_size, self._reference.source.prompt(role))


class EmbedgeSystem:
    """A task of a bundle at one precision, through the runtime."""

    def __init__(
        self, bundle: Path, task: str, precision: str, threads: int, device: str = "cpu"
    ) -> None:
        opened = Bundle(bundle)
        self.name = f"embedge {precision}"
        self.role = "embedge"
        self.precision: str | None = precision
        self.bytes_on_disk: int | None = opened.disk_bytes(precision, task)
        self._task = task
        self._dim = opened.manifest.model.dim
        self._stored_ranges = opened.manifest.tasks[task].output_ranges
        self._model = Embedder(bundle, precision=precision, device=device, threads=threads)

    def forward(self, ids: Ids, mask: Ids) -> Vectors:
        """Return the vectors, float32 ``[batch, dim]``, by what ``encode`` does with its ids."""
        lengths = mask.sum(axis=1)
        return self._model.run_ids(
            [row[:length] for row, length in zip(ids, lengths, strict=True)], task=self._task
        )

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, role: str | None = None
    ) -> Vectors:
        """Return float32 ``[n, dim]``."""
        calls: dict[str | None, Any] = {
            None: self._model.encode,
            "query": self._model.encode_query,
            "document": self._model.encode_document,
        }
        vectors: Vectors = calls[role](
            list(texts),
            task=self._task,
            batch_size=batch_size,
            truncate_dim=self._dim,
            on_truncate="ignore",
        )
        return vectors

    def output_ranges(self, dim: int, vectors: Vectors) -> Vectors:
        """Return the ranges of 8-bit codes, float32 ``[2, dim]``: the bundle's, else those of some vectors.

        Args:
            dim: to which vectors are cut.
            vectors: float32 ``[n, dim]``.
        """
        if self._stored_ranges is None:
            return ranges_of(vectors)
        ranges: Vectors = self._model.get_output_ranges(task=self._task, truncate_dim=dim)
        return ranges
