"""Lists that hold texts, images or both."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from embedge.runtime.encode.request import Request
from embedge.runtime.encode.texts import TextPipeline
from embedge.runtime.encode.vectors import Results, Vectors

if TYPE_CHECKING:
    from embedge.runtime.images.encode import ImagePipeline

__all__ = ["encode_mixed"]


def encode_mixed(
    items: Sequence[Any],
    request: Request,
    results: Results,
    *,
    texts: TextPipeline,
    images: ImagePipeline | None,
) -> Generator[tuple[int, Vectors], None, None]:
    """``(index, vector)`` of each item, as batches finish.

    Args:
        items: texts are strings, anything else an image.
        request: the call.
        results: as for :meth:`TextPipeline.encode`.
        texts: embeds the texts.
        images: embeds the images; ``None`` where there are none.
    """
    # Images first: they end with the task's graph open, which the texts then find.
    if images is not None:
        where = [index for index, item in enumerate(items) if not isinstance(item, str)]
        if where:
            pictures = [items[index] for index in where]
            yield from images.encode(pictures, where, request, name="inputs")
    where = [index for index, item in enumerate(items) if isinstance(item, str)]
    yield from texts.encode([items[index] for index in where], where, request, results)
