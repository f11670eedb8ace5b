"""What ``Embedder`` is made with, and the types of what its methods are called with."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from numpy.typing import NDArray

from embedge.runtime.arguments import check_cosine, check_positive, check_threads
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.host.memory import parse_bytes
from embedge.runtime.sessions.device import split_device
from embedge.runtime.tuning.choose_precision import AUTO

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    # What may stand for an image; a string is a path for encode_image and a text for encode.
    Image = os.PathLike[str] | bytes | NDArray[Any] | Picture
    Inputs = str | Image | Sequence[str | Image]

__all__ = [
    "EmbedderOptions",
    "EncodeOptions",
    "FingerprintOptions",
    "ImageOptions",
    "takes_sentences",
]

Method = TypeVar("Method", bound=Callable[..., Any])

# Arguments of sentence-transformers' encode, and where theirs is here.
_ELSEWHERE = {
    "precision": "that of the graph is Embedder's, and that of vectors output_format",
    "device": "it is Embedder's",
    "output_value": "vectors of tokens come with multi_vector=True from models with such a head",
    "pool": "an Embedder uses all cores by threads; for more, open it in each process",
    "chunk_size": "an Embedder uses all cores by threads; batches are batch_size and max_batch_tokens",
    "token_pooling": "pass pool_factor to encode_document",
}


@dataclass(frozen=True, kw_only=True)
class EmbedderOptions:
    """The arguments of ``Embedder``, which states what each means, beside the bundle.

    Raises:
        EmbedgeValueError: for one that cannot be used whatever the bundle is.
    """

    task: str | None
    precision: str | None
    device: str
    threads: int | None
    max_sessions: int | None
    memory_limit: int | str | None
    min_cosine: float | None
    verify: str
    prompts: Mapping[str, str] | None
    default_prompt_name: str | None
    truncate_dim: int | None
    max_seq_length: int | None

    def __post_init__(self) -> None:
        split_device(self.device)
        if self.threads is not None:
            check_threads("threads", self.threads)
        if self.max_sessions is not None:
            check_positive("max_sessions", self.max_sessions)
        if self.memory_limit is not None:
            check_positive("memory_limit", self.memory_bytes)
        if self.min_cosine is not None:
            check_cosine("min_cosine", self.min_cosine)
            if self.precision != AUTO:
                raise EmbedgeValueError(
                    f'min_cosine goes with precision="auto", which chooses by it; found {self.precision!r}',
                    arguments=["min_cosine", 'precision="auto"'],
                )
        if self.max_seq_length is not None:
            check_positive("max_seq_length", self.max_seq_length)
        if self.prompts is not None:
            object.__setattr__(self, "prompts", _checked_prompts(self.prompts))

    @property
    def memory_bytes(self) -> int | None:
        """The memory limit as a number, ``None``: none."""
        limit = self.memory_limit
        return parse_bytes("memory_limit", limit) if isinstance(limit, str) else limit


class _SharedOptions(TypedDict, total=False):
    task: str | None
    prompt_name: str | None
    prompt: str | None
    batch_size: int
    truncate_dim: int | None
    normalize_embeddings: bool
    show_progress_bar: bool | None
    ranges: Any
    pool_factor: float
    convert_to_numpy: bool


class EncodeOptions(_SharedOptions, total=False):
    """Options of ``encode``, but those on which the result's type depends."""

    max_batch_tokens: int | None
    on_truncate: str


class ImageOptions(_SharedOptions, total=False):
    """Likewise of ``encode_image``."""

    max_pixels: int | None
    min_pixels: int | None


class FingerprintOptions(TypedDict, total=False):
    """Options of ``encode`` that decide of which kind a vector is, and whose prompt it takes."""

    task: str | None
    prompt_name: str | None
    prompt: str | None
    truncate_dim: int | None
    normalize_embeddings: bool
    multi_vector: bool
    output_format: str
    ranges: Any
    pool_factor: float
    role: Literal["query", "document"] | None
    mapped: bool


def takes_sentences(method: Method) -> Method:
    """Lets a method take ``inputs`` under its former name ``sentences`` as well, and tells where others are."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        for name in _ELSEWHERE.keys() & options.keys():
            raise TypeError(f"{method.__qualname__}() takes no {name}: {_ELSEWHERE[name]}")
        if "sentences" in options:
            if arguments or "inputs" in options:
                raise TypeError(
                    f"{method.__qualname__}() got both inputs and sentences, its former name; pass one"
                )
            arguments = (options.pop("sentences"),)
        return method(self, *arguments, **options)

    return call  # type: ignore[return-value]


def _checked_prompts(prompts: object) -> dict[str, str]:
    if not isinstance(prompts, Mapping):
        raise EmbedgeValueError(
            f"prompts: expected texts by name, such as {{'query': 'query: '}}, found "
            f"{type(prompts).__name__}"
        )
    for name, text in prompts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise EmbedgeValueError(
                f"prompts[{name!r}]: expected a string under a string, found {type(text).__name__}"
            )
    return dict(prompts)
