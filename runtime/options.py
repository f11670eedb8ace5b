"""What ``Embedder.encode`` and its kin are called with."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    # What may stand for an image; a string is a path for encode_image and a text for encode.
    Image = os.PathLike[str] | bytes | NDArray[Any] | Picture
    Inputs = str | Image | Sequence[str | Image]

__all__ = ["EncodeOptions", "takes_sentences"]

Method = TypeVar("Method", bound=Callable[..., Any])


class EncodeOptions(TypedDict, total=False):
    """Options that ``encode_query`` and ``encode_document`` hand on to ``encode``."""

    task: str | None
    prompt_name: str | None
    prompt: str | None
    batch_size: int
    max_batch_tokens: int | None
    truncate_dim: int | None
    normalize_embeddings: bool
    show_progress_bar: bool | None
    on_truncate: str


def takes_sentences(method: Method) -> Method:
    """Lets a method take ``inputs`` under its former name ``sentences`` as well."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if "sentences" in options:
            if arguments or "inputs" in options:
                raise TypeError(
                    f"{method.__qualname__}() got both inputs and sentences, its former name; pass one"
                )
            arguments = (options.pop("sentences"),)
        return method(self, *arguments, **options)

    return call  # type: ignore[return-value]
