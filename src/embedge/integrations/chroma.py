"""A bundle as Chroma's ``EmbeddingFunction``, which a collection stores and builds again.

Importing this module makes it known to Chroma under the name "embedge".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack, cast

from embedge.integrations.task_encoder import EncoderOptions, TaskEncoder, missing_framework
from embedge.runtime import Embedder, EmbedgeValueError

try:
    from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
    from chromadb.utils.embedding_functions import register_embedding_function
except ImportError as error:
    raise missing_framework("chroma", "chroma", error) from error

if TYPE_CHECKING:
    from chromadb import Collection

__all__ = ["EmbedgeEmbeddingFunction"]

_REQUIRED = {"bundle": str, "task": str, "precision": str, "fingerprint": dict}


@register_embedding_function
class EmbedgeEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds a collection's documents and queries with one task of a bundle. Safe to share between threads.

    A collection stores how it was made, with the fingerprint of its vectors. It is built again from that where
    the collection is opened without an embedding function, and refused if the bundle gives other vectors now.

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
        self._encoder = TaskEncoder(bundle, task=task, fingerprint=fingerprint, **options)

    @property
    def embedder(self) -> Embedder:
        """What runs the bundle; other integrations of this process share it."""
        return self._encoder.embedder

    def __call__(self, input: Documents) -> Embeddings:
        """Vectors of documents, float32 ``[dim]`` each."""
        return cast("Embeddings", list(self._encoder.documents(input)))

    def embed_query(self, input: Documents) -> Embeddings:
        """Vectors of queries, float32 ``[dim]`` each."""
        return cast("Embeddings", list(self._encoder.queries(input)))

    @staticmethod
    def name() -> str:
        return "embedge"

    def default_space(self) -> Space:
        """How a collection compares where its configuration does not say: as the source model does."""
        return "ip" if self.embedder.similarity_fn_name == "dot" else "cosine"

    def supported_spaces(self) -> list[Space]:
        return ["cosine", "l2", "ip"]

    def get_config(self) -> dict[str, Any]:
        """What a collection stores: JSON, with the precision that "auto" took."""
        encoder = self._encoder
        prompts = encoder.options.get("prompts")
        return {
            **encoder.options,
            **({"prompts": dict(prompts)} if prompts is not None else {}),
            "bundle": encoder.bundle,
            "task": encoder.task,
            "fingerprint": encoder.stored_fingerprint,
        }

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> EmbedgeEmbeddingFunction:
        """What :meth:`get_config` described.

        Raises:
            EmbedgeError: as the constructor, which compares the fingerprint too.
        """
        EmbedgeEmbeddingFunction.validate_config(config)
        return EmbedgeEmbeddingFunction(**config)

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Refuses what :meth:`get_config` did not give.

        Raises:
            EmbedgeValueError: naming what is missing or unknown.
        """
        if missing := [n for n, kind in _REQUIRED.items() if not isinstance(config.get(n), kind)]:
            raise EmbedgeValueError(
                f"the collection's embedding function has no {', '.join(missing)}: expected what "
                "EmbedgeEmbeddingFunction.get_config() gives"
            )
        if unknown := set(config) - {*_REQUIRED, *EncoderOptions.__annotations__}:
            raise EmbedgeValueError(
                f"the collection's embedding function has options that this embedge does not know: "
                f"{', '.join(sorted(unknown))}; install the embedge that made the collection"
            )

    def validate_config_update(
        self, old_config: dict[str, Any], new_config: dict[str, Any]
    ) -> None:
        """Lets the bundle move, and its vectors stay what they are.

        Raises:
            FingerprintError: if the new ones would be of another kind.
            EmbedgeError: as the constructor.
        """
        self.validate_config(old_config)
        self.validate_config(new_config)
        self.build_from_config({**new_config, "fingerprint": old_config["fingerprint"]})

    def fingerprint(self) -> str:
        """Of which kind the documents' vectors are; a collection stores it with the rest."""
        return self._encoder.fingerprint

    def check_collection(self, collection: Collection) -> None:
        """Refuses a collection whose vectors are of another kind.

        Chroma compares no more than names where a collection is opened with an embedding function of one's own.

        Args:
            collection: as ``get_collection`` gave it.

        Raises:
            FingerprintError: naming what differs, as far as that is known.
            EmbedgeValueError: if the collection was not made with this embedding function.
        """
        stored = (collection.configuration_json or {}).get("embedding_function") or {}
        if stored.get("name") != self.name():
            raise EmbedgeValueError(
                f"collection {collection.name!r}: expected one made with the embedding function {self.name()!r}, found "
                f"{stored.get('name') or 'none stored'}; make it with embedding_function=EmbedgeEmbeddingFunction(…)"
            )
        config = stored.get("config") or {}
        self.validate_config(config)
        self._encoder.check_fingerprint(config["fingerprint"])
