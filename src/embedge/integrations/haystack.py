"""A bundle as Haystack's text and document embedders, and a component that refuses documents of another kind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

from embedge.integrations.task_encoder import EncoderOptions, TaskEncoder, missing_framework
from embedge.runtime import Embedder, EmbedgeValueError, FingerprintError

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.utils import ComponentDevice
except ImportError as error:
    raise missing_framework("haystack", "haystack", error) from error

__all__ = ["EmbedgeDocumentEmbedder", "EmbedgeFingerprintChecker", "EmbedgeTextEmbedder"]

_FIELD = "embedge_fingerprint"


class _HoldsEncoder:
    """What the components share: a bundle's task, and how it is stored."""

    _encoder: TaskEncoder
    _parameters: dict[str, Any]

    def _open(
        self,
        bundle: str | os.PathLike[str],
        task: str | None,
        fingerprint: str | Mapping[str, Any] | None,
        options: EncoderOptions,
    ) -> None:
        if isinstance(device := options.get("device"), ComponentDevice):
            options = {**options, "device": device.to_torch_str()}
        self._encoder = TaskEncoder(bundle, task=task, fingerprint=fingerprint, **options)
        self._parameters = {"bundle": os.fspath(bundle), "task": task, **options}
        if fingerprint is not None:
            self._parameters["fingerprint"] = fingerprint

    @property
    def embedder(self) -> Embedder:
        """What runs the bundle; other integrations of this process share it."""
        return self._encoder.embedder

    def fingerprint(self) -> str:
        """Of which kind the documents' vectors are."""
        return self._encoder.fingerprint

    def _meta(self) -> dict[str, Any]:
        encoder = self._encoder
        return {
            "model": encoder.model_name,
            "task": encoder.task,
            "precision": encoder.embedder.precision,
            "fingerprint": encoder.fingerprint,
        }


@component
class EmbedgeTextEmbedder(_HoldsEncoder):
    """Embeds a query with one task of a bundle. Safe to share between threads.

    The bundle is opened, and options are checked, where the component is made; ``warm_up`` opens the graph.

    Args:
        bundle: the bundle's folder.
        task: left out: the bundle's only one.
        fingerprint: of an index, from :meth:`fingerprint`; vectors of another kind are refused.
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
        self._open(bundle, task, fingerprint, options)

    def warm_up(self) -> None:
        """Opens the graph of queries, which a first run would do."""
        self.run("warm up")

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline's YAML holds it."""
        return default_to_dict(self, **self._parameters)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EmbedgeTextEmbedder:
        """What :meth:`to_dict` gave."""
        return default_from_dict(cls, data)

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """Embeds a query.

        Args:
            text: of the query.

        Returns:
            ``embedding``, ``dim`` floats, and ``meta`` with the model, task, precision and fingerprint.

        Raises:
            EmbedgeValueError: if it is no string.
        """
        return {"embedding": self._encoder.query(text).tolist(), "meta": self._meta()}

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """:meth:`run` beside the event loop."""
        return await asyncio.to_thread(self.run, text)


@component
class EmbedgeDocumentEmbedder(_HoldsEncoder):
    """Embeds documents with one task of a bundle. Safe to share between threads.

    Args:
        bundle: the bundle's folder.
        task: left out: the bundle's only one.
        fingerprint: of an index, from :meth:`fingerprint`; vectors of another kind are refused.
        meta_fields_to_embed: names of meta fields to put before a document's content.
        embedding_separator: stands between these and the content.
        fingerprint_field: the meta field that holds the fingerprint of a document's vector, for
            :class:`EmbedgeFingerprintChecker`; ``None``: none does.
        progress_bar: whether to show progress on standard error.
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
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        fingerprint_field: str | None = _FIELD,
        progress_bar: bool = False,
        **options: Unpack[EncoderOptions],
    ) -> None:
        self._open(bundle, task, fingerprint, options)
        self.meta_fields_to_embed = list(meta_fields_to_embed or [])
        self.embedding_separator = embedding_separator
        self.fingerprint_field = fingerprint_field
        self.progress_bar = progress_bar

    def warm_up(self) -> None:
        """Opens the graph of documents, which a first run would do."""
        self.run([Document(content="warm up")])

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline's YAML holds it."""
        return default_to_dict(
            self,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            fingerprint_field=self.fingerprint_field,
            progress_bar=self.progress_bar,
            **self._parameters,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EmbedgeDocumentEmbedder:
        """What :meth:`to_dict` gave."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embeds documents.

        Args:
            documents: each with content, or one of the meta fields to embed.

        Returns:
            ``documents``, copies with ``embedding`` and the fingerprint in their meta, and ``meta`` with the
            model, task, precision and fingerprint.

        Raises:
            TypeError: if they are no list of documents.
            EmbedgeValueError: for a document without a text, with its id.
        """
        texts = self._texts(documents)
        vectors = self._encoder.documents(texts, show_progress_bar=self.progress_bar)
        meta = self._meta()
        stored = (
            {} if self.fingerprint_field is None else {self.fingerprint_field: meta["fingerprint"]}
        )
        embedded = [
            replace(document, embedding=vector, meta={**document.meta, **stored})
            for document, vector in zip(documents, vectors.tolist(), strict=True)
        ]
        return {"documents": embedded, "meta": meta}

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """:meth:`run` beside the event loop."""
        return await asyncio.to_thread(self.run, documents)

    def _texts(self, documents: list[Document]) -> list[str]:
        expected = "EmbedgeDocumentEmbedder expects a list of Documents; EmbedgeTextEmbedder takes a string"
        if not isinstance(documents, list):
            raise TypeError(f"{expected}; found {type(documents).__name__}")
        for index, document in enumerate(documents):
            if not isinstance(document, Document):
                raise TypeError(f"{expected}; found {type(document).__name__} at index {index}")
        return [self._text(document) for document in documents]

    def _text(self, document: Document) -> str:
        values = (document.meta.get(name) for name in self.meta_fields_to_embed)
        parts = [str(value) for value in values if value is not None]
        if document.content is None and not parts:
            raise EmbedgeValueError(
                f"document {document.id}: expected content or one of the meta fields to embed "
                f"({', '.join(self.meta_fields_to_embed) or 'none named'}), found neither; leave it out"
            )
        return self.embedding_separator.join([*parts, document.content or ""])


@component
class EmbedgeFingerprintChecker(_HoldsEncoder):
    """Lets retrieved documents through whose vectors are of the kind that queries are compared with.

    Put it behind a retriever, made as the text embedder was.

    Args:
        bundle: the bundle's folder.
        task: left out: the bundle's only one.
        fingerprint_field: where :class:`EmbedgeDocumentEmbedder` put the fingerprint.
        options: of ``Embedder`` and ``encode``, see ``EncoderOptions`` in ``embedge.integrations.task_encoder``.

    Raises:
        EmbedgeError: as for :class:`EmbedgeTextEmbedder`.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        task: str | None = None,
        fingerprint_field: str = _FIELD,
        **options: Unpack[EncoderOptions],
    ) -> None:
        self._open(bundle, task, None, options)
        self.fingerprint_field = fingerprint_field

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline's YAML holds it."""
        return default_to_dict(self, fingerprint_field=self.fingerprint_field, **self._parameters)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EmbedgeFingerprintChecker:
        """What :meth:`to_dict` gave."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Gives the documents back.

        Args:
            documents: of a retriever.

        Raises:
            FingerprintError: for one whose vector is of another kind or is not known, with its id.
        """
        good = {self._encoder.fingerprint}
        for document in documents:
            stored = document.meta.get(self.fingerprint_field)
            if stored in good:
                continue
            if stored is None:
                raise FingerprintError(
                    f"document {document.id}: expected a fingerprint in its meta field {self.fingerprint_field!r}, "
                    "found none; embed it with EmbedgeDocumentEmbedder"
                )
            try:
                self._encoder.check_fingerprint(stored)
            except FingerprintError as error:
                raise FingerprintError(
                    f"document {document.id}: {error}", error.differing
                ) from None
            good.add(stored)  # of another class of arithmetic, which was warned of
        return {"documents": documents}
