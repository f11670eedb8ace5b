"""One call's arguments, checked and looked up."""

from __future__ import annotations

from dataclasses import dataclass

from embedge.runtime.arguments import (
    ON_TRUNCATE,
    check_choice,
    check_flag,
    check_positive,
    choose_dim,
    choose_prompt,
    choose_task,
)
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.errors import EmbedgeValueError

__all__ = ["BATCH_SIZE", "Request", "make_request"]

BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a call asks for.

    Attributes:
        prefix: text to put before every text.
        batch_size: most texts or images of a batch.
        max_batch_tokens: ``None``: what runs fastest here.
        dim: length of the vectors to give.
        normalize: L2-normalize even where the source does not.
        multi_vector: a vector per token.
    """

    task: str
    prefix: str
    batch_size: int
    max_batch_tokens: int | None
    dim: int
    normalize: bool
    on_truncate: str
    multi_vector: bool


def make_request(
    manifest: Manifest,
    precision: str,
    *,
    task: str | None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    batch_size: int = BATCH_SIZE,
    max_batch_tokens: int | None = None,
    truncate_dim: int | None = None,
    normalize_embeddings: bool = False,
    on_truncate: str = "warn",
    multi_vector: bool = False,
) -> Request:
    """The request of a call at a precision; arguments as for ``Embedder.encode``.

    Raises:
        EmbedgeValueError: for an argument that cannot be used, with what can.
    """
    model = manifest.model
    name = choose_task(manifest, precision, task)
    dim = choose_dim(model, truncate_dim)
    if check_flag("multi_vector", multi_vector):
        if model.multi_vector_dim is None:
            raise EmbedgeValueError(
                f"multi_vector: {manifest.source.name} has no multi-vector head; leave "
                "multi_vector out"
            )
        if truncate_dim is not None:
            raise EmbedgeValueError("truncate_dim is for single vectors, not multi_vector=True")
        dim = model.multi_vector_dim
    prefix = choose_prompt(name, manifest.tasks[name], prompt_name, prompt)
    if prefix and not model.include_prompt:
        raise EmbedgeValueError(
            f"prompt: {manifest.source.name} leaves the tokens of a prompt out of its pooling, which "
            "bundles do not do; leave the prompt out"
        )
    return Request(
        task=name,
        prefix=prefix,
        batch_size=check_positive("batch_size", batch_size),
        max_batch_tokens=None
        if max_batch_tokens is None
        else check_positive("max_batch_tokens", max_batch_tokens),
        dim=dim,
        normalize=check_flag("normalize_embeddings", normalize_embeddings),
        on_truncate=check_choice("on_truncate", on_truncate, ON_TRUNCATE),
        multi_vector=multi_vector,
    )
