"""Late-interaction models: a vector a token, and scores of queries and documents."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from embedge.bench.errors import BenchError
from embedge.bench.systems.backbone import load_backbone, merge
from embedge.bench.systems.source import Source
from embedge.runtime import Embedder
from embedge.runtime.bundle.folder import Bundle

__all__ = [
    "EmbedgeMultiVectors",
    "MultiVectorReference",
    "MultiVectorSystem",
    "Rows",
    "Scores",
    "native_class",
]

Rows = Sequence[NDArray[np.float32]]
Scores = NDArray[np.float32]


class MultiVectorSystem(Protocol):
    """Something that embeds texts as a vector a token.

    Attributes:
        name: as the tables show it.
        role: ``"embedge"`` or ``"torch"``.
        precision: the bundle's precision, ``None`` for torch.
        bytes_on_disk: graph and weights of one task, ``None`` if unknown.
    """

    name: str
    role: str
    precision: str | None
    bytes_on_disk: int | None

    def encode(self, texts: Sequence[str], batch_size: int = 32, role: str | None = None) -> Rows:
        """Return float32 ``[tokens, dim]`` a text; ``role`` is ``"query"``, ``"document"`` or ``None``."""

    def scores(self, queries: Rows, documents: Rows) -> Scores:
        """Return the model's score of each query for each document, float32 ``[queries, documents]``."""


class MultiVectorReference:
    """sentence-transformers' own ``MultiVectorEncoder`` in float32, the adapter applied by PEFT."""

    def __init__(
        self,
        source: Source,
        adapter: Path | None = None,
        *,
        merged: bool = False,
        device: str = "cpu",
        name: str = "reference",
        bytes_on_disk: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            source: the model's folder.
            adapter: a folder in PEFT's format; ``None`` is the bare backbone.
            merged: add the adapter to the weights; fidelity is measured against the unmerged form.
            device: torch's name of what runs it.
            name: as the tables show it.
            bytes_on_disk: of the weights.

        Raises:
            BenchError: sentence-transformers has no such class, or tensors of the adapter find no place.
        """
        self.name, self.bytes_on_disk = name, bytes_on_disk
        self.role = "torch"
        self.precision: str | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = native_class()(str(source.path), device=device)
        if adapter is not None:
            backbone = load_backbone(source.transformer, adapter)
            self._model[0].model = (merge(backbone) if merged else backbone).to(device)

    def encode(self, texts: Sequence[str], batch_size: int = 32, role: str | None = None) -> Rows:
        """Return float32 ``[tokens, dim]`` a text."""
        calls: dict[str | None, Any] = {
            None: self._model.encode,
            "query": self._model.encode_query,
            "document": self._model.encode_document,
        }
        rows: Rows = calls[role](list(texts), batch_size=batch_size, convert_to_numpy=True)
        return rows

    def scores(self, queries: Rows, documents: Rows) -> Scores:
        """Return the model's score of each query for each document, float32 ``[queries, documents]``."""
        with torch.inference_mode():
            scores: torch.Tensor = self._model.similarity(queries, documents)
        return scores.cpu().numpy()


class EmbedgeMultiVectors:
    """A task of a bundle at one precision, through the runtime."""

    def __init__(
        self, bundle: Path, task: str, precision: str, threads: int, device: str = "cpu"
    ) -> None:
        self.name = f"embedge {precision}"
        self.role = "embedge"
        self.precision: str | None = precision
        self.bytes_on_disk: int | None = Bundle(bundle).disk_bytes(precision, task)
        self._task = task
        self._model = Embedder(bundle, precision=precision, device=device, threads=threads)

    def encode(self, texts: Sequence[str], batch_size: int = 32, role: str | None = None) -> Rows:
        """Return float32 ``[tokens, dim]`` a text."""
        calls: dict[str | None, Any] = {
            None: self._model.encode,
            "query": self._model.encode_query,
            "document": self._model.encode_document,
        }
        rows: Rows = calls[role](
            list(texts),
            task=self._task,
            batch_size=batch_size,
            multi_vector=True,
            on_truncate="ignore",
        )
        return rows

    def scores(self, queries: Rows, documents: Rows) -> Scores:
        """Return the model's score of each query for each document, float32 ``[queries, documents]``."""
        return self._model.similarity(list(queries), list(documents))


def native_class() -> Any:
    """Return sentence-transformers' ``MultiVectorEncoder``.

    Raises:
        BenchError: the installed version has no such class.
    """
    import sentence_transformers

    library: Any = sentence_transformers
    if not hasattr(library, "MultiVectorEncoder"):
        raise BenchError(
            f"sentence-transformers {library.__version__} has no MultiVectorEncoder, which is the reference of "
            'late-interaction models; run: pip install "sentence-transformers>=6"'
        )
    return library.MultiVectorEncoder
