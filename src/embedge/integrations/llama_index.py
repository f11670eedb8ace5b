"""A bundle as LlamaIndex's ``BaseEmbedding``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from embedge.integrations.task_encoder import TaskEncoder, missing_framework
from embedge.runtime import Embedder, EmbedgeValueError

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
except ImportError as error:
    raise missing_framework("llama_index", "llama-index", error) from error

__all__ = ["EmbedgeEmbedding"]

_OPTIONS = (
    "query_task",
    "precision",
    "truncate_dim",
    "normalize_embeddings",
    "device",
    "threads",
    "memory_limit",
    "on_truncate",
)
_INSTRUCTIONS = {"query": "query_instruction", "document": "text_instruction"}


class EmbedgeEmbedding(BaseEmbedding):
    """Embeds queries and nodes with one task of a bundle. Safe to share between threads, and pickles.

    ``to_dict`` holds the fingerprint of the vectors: ``from_dict`` refuses a bundle that gives others, and an
    ingestion pipeline's cache does not take them for the same.

    Raises:
        BundleError: if the bundle is missing, damaged, or too new.
        EmbedgeValueError: for a task, precision, dimension or other option that cannot be used, and for an
            ``embeddings_cache`` where queries have a prompt of their own: LlamaIndex's is by text alone.
        DeviceError: if ``device="cuda"`` does not work here.
        FingerprintError: if ``fingerprint`` is of another kind.
    """

    model_config = ConfigDict(extra="forbid")  # a misspelt option is no silence

    bundle: str = Field(frozen=True, description="The bundle's folder.")
    task: str | None = Field(default=None, frozen=True, description="None: the bundle's only one.")
    query_task: str | None = Field(
        default=None, frozen=True, description="Of queries; None: as of nodes."
    )
    precision: str | None = Field(
        default=None, frozen=True, description='"int8", "int4", …, or "auto".'
    )
    truncate_dim: int | None = Field(
        default=None, frozen=True, description="Length of the vectors."
    )
    normalize_embeddings: bool = Field(
        default=False, frozen=True, description="Make vectors of length 1."
    )
    device: str = Field(
        default="auto", frozen=True, description='"cpu", "cuda", "cuda:1", or "auto".'
    )
    threads: int | None = Field(default=None, frozen=True, description="Threads of a run.")
    memory_limit: int | str | None = Field(
        default=None, frozen=True, description="Most bytes of open graphs."
    )
    on_truncate: str = Field(
        default="warn", frozen=True, description='"ignore", "warn" or "error".'
    )
    query_instruction: str | None = Field(
        default=None,
        frozen=True,
        description="Text before every query, in place of the task's prompt.",
    )
    text_instruction: str | None = Field(
        default=None,
        frozen=True,
        description="Text before every node, in place of the task's prompt.",
    )
    fingerprint: dict[str, Any] | str | None = Field(
        default=None,
        frozen=True,
        description="Of which kind the nodes' vectors are; given, it is compared.",
    )

    _encoder: TaskEncoder = PrivateAttr()

    def __init__(self, bundle: str | os.PathLike[str], **fields: Any) -> None:
        """Opens the bundle; fields by name, those of ``BaseEmbedding`` too."""
        instructions = {name: fields.get(field) for name, field in _INSTRUCTIONS.items()}
        encoder = TaskEncoder(
            bundle,
            task=fields.get("task"),
            fingerprint=fields.get("fingerprint"),
            prompts={name: text for name, text in instructions.items() if text is not None} or None,
            **{name: fields[name] for name in _OPTIONS if name in fields},
        )
        opened = {
            "model_name": f"{encoder.model_name}:{encoder.task}",
            "embed_batch_size": 256,  # texts that the graph may sort and join
            **fields,
            "bundle": encoder.bundle,
            "task": encoder.task,
            "query_task": encoder.query_task,
            "precision": encoder.embedder.precision,
            "fingerprint": encoder.stored_fingerprint,
        }
        super().__init__(**opened)
        self._encoder = encoder
        if self.embeddings_cache is not None and encoder.prompts_differ():
            raise EmbedgeValueError(
                f"embeddings_cache: LlamaIndex's holds one vector a text, and task {encoder.task!r} has different "
                "prompts for queries and documents; leave it out, and cache nodes in an IngestionPipeline"
            )

    @classmethod
    def class_name(cls) -> str:
        return "EmbedgeEmbedding"

    @property
    def embedder(self) -> Embedder:
        """What runs the bundle; other integrations of this process share it."""
        return self._encoder.embedder

    def check_fingerprint(self, stored: str | Mapping[str, Any]) -> None:
        """Refuses an index of another kind, see :meth:`TaskEncoder.check_fingerprint`."""
        self._encoder.check_fingerprint(stored)

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._encoder.query(query).tolist()
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._encoder.documents(texts).tolist()
        return vectors

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
