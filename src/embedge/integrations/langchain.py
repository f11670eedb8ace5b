"""A bundle as LangChain's ``Embeddings``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Unpack

from embedge.integrations.task_encoder import EncoderOptions, TaskEncoder, missing_framework
from embedge.runtime import Embedder

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise missing_framework("langchain", "langchain", error) from error

__all__ = ["EmbedgeEmbeddings"]


class EmbedgeEmbeddings(Embeddings):
    """Embeds queries and documents with one task of a bundle. Safe to share between threads, and pickles.

    ``aembed_query`` and ``aembed_documents`` are LangChain's: they run in its executor, beside the event loop.

    Args:
        bundle: the bundle's folder.
        task: left out: the bundle's only one.
        fingerprint: of an index, from :meth:`stored_fingerprint` or :meth:`fingerprint`; vectors of
            another kind are refused.
        options: of ``Embedder`` and ``encode``, see ``EncoderOptions`` in ``embedge.integrations.task_encoder``.

    Raises:
        BundleError: if the bundle is missing, damaged, or too new.
        EmbedgeValueError: for a task, precision, dimension or other option that cannot be used.
        DeviceError: if ``device="cuda"`` does not work here.
        FingerprintError: if the index is of another kind.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        task: str | None = None,
        fingerprint: str | Mapping[str, Any] | None = None,
        **options: Unpack[EncoderOptions],
    ) -> None:
        self._encoder = TaskEncoder(bundle, task=task, fingerprint=fingerprint, **options)

    @property
    def embedder(self) -> Embedder:
        """What runs the bundle; other integrations of this process share it."""
        return self._encoder.embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of documents, with the task's prompt for them.

        Raises:
            EmbedgeValueError: if they are no list of strings.
        """
        vectors: list[list[float]] = self._encoder.documents(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query, with the task's prompt for queries.

        Raises:
            EmbedgeValueError: if it is no string.
        """
        vector: list[float] = self._encoder.query(text).tolist()
        return vector

    def fingerprint(self) -> str:
        """Of which kind the documents' vectors are, in short: ``e1:`` and 16 hexadecimal digits."""
        return self._encoder.fingerprint

    def stored_fingerprint(self) -> dict[str, Any]:
        """The fingerprint with its parts, which tell what differs: JSON, to be stored beside the index."""
        return dict(self._encoder.stored_fingerprint)

    def check_fingerprint(self, stored: str | Mapping[str, Any]) -> None:
        """Refuses an index of another kind, see :meth:`TaskEncoder.check_fingerprint`."""
        self._encoder.check_fingerprint(stored)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._encoder!r})"
