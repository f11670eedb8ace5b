"""What a call asks for: its options, checked when they are made, then looked up in a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from embedge.runtime.arguments import check_choice, check_flag, check_positive
from embedge.runtime.bundle.manifest import POOL_MASK, Manifest
from embedge.runtime.encode.lookup import choose_dim, choose_prompt, choose_task
from embedge.runtime.errors import EmbedgeValueError

__all__ = ["ON_TRUNCATE", "CallOptions", "Request"]

ON_TRUNCATE = ("ignore", "warn", "error")


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """The options of ``Embedder.encode``, which states what each means, with their defaults.

    ``role`` is "query" from ``encode_query``, "document" from ``encode_document``. ``one_thread`` is of
    ``encode_tokens``.

    Raises:
        EmbedgeValueError: for one that cannot be used whatever the bundle is.
    """

    task: str | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    batch_size: int = 32
    max_batch_tokens: int | None = None
    truncate_dim: int | None = None
    normalize_embeddings: bool = False
    on_truncate: str = "warn"
    multi_vector: bool = False
    role: str | None = None
    one_thread: bool = False

    def __post_init__(self) -> None:
        check_positive("batch_size", self.batch_size)
        if self.max_batch_tokens is not None:
            check_positive("max_batch_tokens", self.max_batch_tokens)
        check_flag("normalize_embeddings", self.normalize_embeddings)
        check_choice("on_truncate", self.on_truncate, ON_TRUNCATE)
        if check_flag("multi_vector", self.multi_vector) and self.truncate_dim is not None:
            raise EmbedgeValueError(
                "truncate_dim is for single vectors, not multi_vector=True",
                arguments=["truncate_dim", "multi_vector=True"],
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A call's options, and what they are in a bundle.

    Attributes:
        options: as they were given.
        task: whose graph runs.
        prefix: text to put before every text.
        dim: length of the vectors to give.
    """

    options: CallOptions
    task: str
    prefix: str
    dim: int

    @classmethod
    def look_up(cls, manifest: Manifest, precision: str, options: CallOptions) -> Request:
        """What a call asks of a bundle at a precision.

        Raises:
            EmbedgeValueError: for an option that this bundle does not have, with what it has.
        """
        model, source = manifest.model, manifest.source.name
        task = choose_task(manifest, precision, options.task)
        if model.late_interaction is not None and not options.multi_vector:
            raise EmbedgeValueError(
                f"{source} is a late-interaction model, of a vector a token and none a text: pass multi_vector=True "
                "to encode_query for queries, and to encode_document for documents",
                arguments=["multi_vector=True"],
            )
        dim = choose_dim(model, options.truncate_dim)
        if options.multi_vector:
            if model.multi_vector_dim is None:
                raise EmbedgeValueError(
                    f"multi_vector: {source} has no multi-vector head; leave multi_vector out",
                    arguments=["multi_vector"],
                )
            dim = model.multi_vector_dim
        prefix = choose_prompt(task, manifest.tasks[task], options.prompt_name, options.prompt)
        if prefix and not model.include_prompt and POOL_MASK not in model.inputs:
            raise EmbedgeValueError(
                f"prompt: {source} leaves the tokens of a prompt out of its pooling, which this bundle's "
                "graphs cannot; leave the prompt out, or export the model again"
            )
        return cls(options=options, task=task, prefix=prefix, dim=dim)
