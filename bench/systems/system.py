"""What the bench measures: one thing that turns token ids, or texts, into vectors.

Two doors, because two questions are asked. ``forward`` takes ids, the same array for every system,
so that shapes are compared without anybody's tokenizer. ``encode`` takes texts and is what a user
calls; single-text latency, fidelity and quality go through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from embedge.bench.documents import Document
from embedge.bench.errors import BenchError
from embedge.bench.systems.page_reference import PageReference
from embedge.bench.systems.reference import Reference
from embedge.bench.systems.tokens import Ids
from embedge.runtime import Embedder
from embedge.runtime.bundle.contract import MAPS
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.images.layout import image_tokens
from embedge.runtime.images.load import load_image
from embedge.runtime.images.patches import ImageProcessor
from embedge.runtime.scoring.quantization import ranges_of

__all__ = ["EmbedgeSystem", "MappedSystem", "PageSystem", "System", "TorchSystem"]

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


@runtime_checkable
class PageSystem(System, Protocol):
    """A system that embeds images too, as one vector or as one a token."""

    def encode_images(self, images: Sequence[Document], max_pixels: int | None = None) -> Vectors:
        """Return float32 ``[n, dim]``; images of more than ``max_pixels`` are scaled down, ``None``: as the source."""

    def token_vectors(self, texts: Sequence[str], role: str | None = None) -> Sequence[Vectors]:
        """Return float32 ``[tokens, width]`` a text."""

    def image_token_vectors(self, images: Sequence[Document]) -> Sequence[Vectors]:
        """Return float32 ``[tokens, width]`` an image."""

    def token_scores(self, queries: Sequence[Vectors], pages: Sequence[Vectors]) -> Vectors:
        """Return MaxSim of each query and page, float32 ``[queries, pages]``."""

    def page_tokens(self, image: Document, max_pixels: int | None = None) -> int:
        """Return how many tokens an image is."""


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

    @property
    def _pages(self) -> PageReference:
        if not isinstance(self._reference, PageReference):
            raise BenchError(
                f"{self.name}: has no vision tower; expected a model that takes images"
            )
        return self._reference

    def encode_images(self, images: Sequence[Document], max_pixels: int | None = None) -> Vectors:
        """Return float32 ``[n, dim]``."""
        return self._pages.encode_images(images, max_pixels)

    def token_vectors(self, texts: Sequence[str], role: str | None = None) -> Sequence[Vectors]:
        """Return float32 ``[tokens, width]`` a text."""
        return self._pages.token_vectors(texts, role)

    def image_token_vectors(self, images: Sequence[Document]) -> Sequence[Vectors]:
        """Return float32 ``[tokens, width]`` an image."""
        return self._pages.image_token_vectors(images)

    def token_scores(self, queries: Sequence[Vectors], pages: Sequence[Vectors]) -> Vectors:
        """Return MaxSim of each query and page, float32 ``[queries, pages]``."""
        return self._pages.token_scores(queries, pages)

    def page_tokens(self, image: Document, max_pixels: int | None = None) -> int:
        """Return how many tokens an image is."""
        return self._pages.page_tokens(image, max_pixels)


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
        self._image = opened.manifest.model.image
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

    def encode_images(self, images: Sequence[Document], max_pixels: int | None = None) -> Vectors:
        """Return float32 ``[n, dim]``."""
        return self._model.encode_image(
            list(images), task=self._task, truncate_dim=self._dim, max_pixels=max_pixels
        )

    def token_vectors(self, texts: Sequence[str], role: str | None = None) -> Sequence[Vectors]:
        """Return float32 ``[tokens, width]`` a text."""
        call = {"query": self._model.encode_query, "document": self._model.encode_document}
        encode: Any = self._model.encode if role is None else call[role]
        rows: Sequence[Vectors] = encode(
            list(texts), task=self._task, multi_vector=True, on_truncate="ignore"
        )
        return rows

    def image_token_vectors(self, images: Sequence[Document]) -> Sequence[Vectors]:
        """Return float32 ``[tokens, width]`` an image."""
        rows: Any = self._model.encode_image(list(images), task=self._task, multi_vector=True)
        return list(rows)

    def token_scores(self, queries: Sequence[Vectors], pages: Sequence[Vectors]) -> Vectors:
        """Return MaxSim of each query and page, float32 ``[queries, pages]``."""
        return self._model.similarity(list(queries), list(pages))

    def page_tokens(self, image: Document, max_pixels: int | None = None) -> int:
        """Return how many tokens an image is."""
        assert self._image is not None
        picture = load_image(image, "image")
        grid = ImageProcessor(self._image)(picture, None, max_pixels).grid
        return image_tokens(grid, self._image)

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


class MappedSystem(EmbedgeSystem):
    """A task of a bundle by the maps of one precision: one pass that may give other tasks' vectors too."""

    def __init__(
        self, bundle: Path, task: str, precision: str, threads: int, device: str = "cpu"
    ) -> None:
        super().__init__(bundle, task, precision, threads, device)
        self.name = f"embedge {precision}, maps"
        self.precision = None  # is no graph of the task's own
        self.bytes_on_disk = Bundle(bundle).disk_bytes(precision, MAPS)

    def forward(self, ids: Ids, mask: Ids) -> Vectors:
        """Return the task's vectors, float32 ``[batch, dim]``; the pass makes those of all."""
        lengths = mask.sum(axis=1)
        rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        return self._model.run_ids(rows, task=self._task, mapped=True)

    def encode(
        self, texts: Sequence[str], batch_size: int = 32, role: str | None = None
    ) -> Vectors:
        """Return float32 ``[n, dim]``."""
        options: dict[str, Any] = {"role": role, "truncate_dim": self._dim}
        found: Vectors = self._model.encode_tasks(
            list(texts),
            tasks=[self._task],
            batch_size=batch_size,
            on_truncate="ignore",
            **options,
        )[self._task]
        return found
