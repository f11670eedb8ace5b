"""The JSON of a request as objects; a field that is unknown or of another type is refused by name."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from embedge.runtime.server.errors import invalid, shown

__all__ = ["EmbeddingsFields", "Item", "MeaningFields", "RerankFields", "embeddings", "rerank"]

Item = str | bytes | list[int]  # a text, an image file, token ids
_TRUNCATES = {"NONE": False, "END": True}  # Cohere's words
_EXPECTED_INPUT = (
    "a text, a list of texts, token ids or a list of them, or objects of a text or an image"
)


@dataclass(frozen=True, kw_only=True)
class MeaningFields:
    """What a request says of its texts besides themselves.

    Attributes:
        model: ``NAME``, ``NAME:TASK``, ``NAME@PRECISION`` or ``NAME@PRECISION:TASK``.
        task: of the bundle, or in Jina's form ``retrieval.query``.
        input_type: in Cohere's or Voyage's form: ``search_query``, ``document``, …
        prompt_name: of the task.
        prompt: text to put before each text.
        truncate: cut texts that are too long; else they are refused.
    """

    model: str
    task: str | None = None
    input_type: str | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    truncate: bool = False


@dataclass(frozen=True, kw_only=True)
class EmbeddingsFields(MeaningFields):
    """A request for embeddings.

    Attributes:
        items: texts, images, token ids.
        dimensions: length of the vectors; ``None``: the source's.
        base64: vectors as the base64 of little-endian float32, not as lists of numbers.
        normalize_embeddings: as ``Embedder.encode`` has it.
        multi_vector: likewise.
    """

    items: list[Item]
    dimensions: int | None = None
    base64: bool = False
    normalize_embeddings: bool = False
    multi_vector: bool = False


@dataclass(frozen=True, kw_only=True)
class RerankFields(MeaningFields):
    """A request for scores of documents.

    Attributes:
        query: what the documents are scored for.
        documents: texts.
        top_n: how many of the best to give; ``None``: all.
        return_documents: give the texts back with the scores.
    """

    query: str
    documents: list[str]
    top_n: int | None = None
    return_documents: bool = False


def embeddings(document: Any, most: int) -> EmbeddingsFields:
    """The fields of ``/v1/embeddings``.

    Args:
        document: the request's JSON, parsed.
        most: texts and images that it may have.

    Raises:
        ApiError: 400, with the field.
    """
    given = _object(document, _EMBEDDINGS)
    meaning = _meaning(given)
    return EmbeddingsFields(
        items=_items(_required(given, "input"), most),
        dimensions=given.get("dimensions"),
        base64=_choice(given, "encoding_format", ("float", "base64")) == "base64",
        normalize_embeddings=given.get("normalize_embeddings") or False,
        multi_vector=given.get("multi_vector") or False,
        **meaning,
    )


def rerank(document: Any, most: int) -> RerankFields:
    """The fields of ``/v1/rerank``, as Jina and Cohere have them.

    Args:
        document: the request's JSON, parsed.
        most: documents that it may have.

    Raises:
        ApiError: 400, with the field.
    """
    given = _object(document, _RERANK)
    documents = _counted("documents", _required(given, "documents"), most)
    top = given.get("top_n")
    if top is not None and top < 1:
        raise invalid(f"top_n: expected a whole number of at least 1, found {top}", "top_n")
    return RerankFields(
        query=_text(_required(given, "query"), "query"),
        documents=[_text(item, f"documents[{i}]") for i, item in enumerate(documents)],
        top_n=top,
        return_documents=given.get("return_documents") or False,
        **_meaning(given),
    )


Check = Callable[[Any], bool]

_MEANING = [field.name for field in dataclasses.fields(MeaningFields) if field.name != "truncate"]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_STRING = (lambda value: isinstance(value, str), "a string")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_WHOLE = (_is_whole, "a whole number")
_LIST = (lambda value: isinstance(value, list), "a list")
_ANY: tuple[Check, str] = (lambda _: True, "")
_SHARED: dict[str, tuple[Check, str]] = {
    "model": _STRING,
    "task": _STRING,
    "input_type": _STRING,
    "prompt_name": _STRING,
    "prompt": _STRING,
    "truncate": (
        lambda value: isinstance(value, bool) or (isinstance(value, str) and value in _TRUNCATES),
        'true, false, "NONE" or "END"',
    ),
    "truncation": _FLAG,  # Voyage's name
    "user": _STRING,  # OpenAI's; says who asks, which no vector depends on
}
_EMBEDDINGS = _SHARED | {
    "input": _ANY,
    "dimensions": _WHOLE,
    "encoding_format": _STRING,
    "normalize_embeddings": _FLAG,
    "multi_vector": _FLAG,
}
_RERANK = _SHARED | {
    "query": _ANY,
    "documents": _LIST,
    "top_n": _WHOLE,
    "return_documents": _FLAG,
}


def _object(document: Any, known: Mapping[str, tuple[Check, str]]) -> dict[str, Any]:
    """The members that are not null, all of them known and of their types."""
    if not isinstance(document, dict):
        raise invalid(
            f"the body: expected a JSON object, found {_kind(document)}", None, "invalid_json"
        )
    given = {name: value for name, value in document.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise invalid(
                f"unknown field {shown(name)}; known are {', '.join(known)}",
                name[:80],
                "unknown_parameter",
            )
        check, expected = known[name]
        if not check(value):
            raise invalid(f"{name}: expected {expected}, found {_kind(value)}", name)
    return given


def _meaning(given: Mapping[str, Any]) -> dict[str, Any]:
    """The members that :class:`MeaningFields` has."""
    _required(given, "model")
    ways = [name for name in ("truncate", "truncation") if name in given]
    if len(ways) > 1:
        raise invalid("truncate and truncation say the same; send one of them", "truncation")
    truncate = given[ways[0]] if ways else False
    meaning = {name: given[name] for name in _MEANING if name in given}
    cut = _TRUNCATES[truncate] if isinstance(truncate, str) else truncate
    return meaning | {"truncate": cut}


def _required(given: Mapping[str, Any], name: str) -> Any:
    if name not in given:
        raise invalid(f"{name} is missing", name, "missing_required_parameter")
    return given[name]


def _choice(given: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value: str = given.get(name, choices[0])
    if value not in choices:
        raise invalid(f"{name}: expected {' or '.join(choices)}, found {shown(value)}", name)
    return value


def _counted(name: str, items: list[Any], most: int) -> list[Any]:
    """A list, before each of it is looked at."""
    if not items:
        raise invalid(f"{name}: expected at least one, found an empty list", name)
    if len(items) > most:
        raise invalid(
            f"{name}: expected at most {most}, found {len(items)}; send several requests", name
        )
    return items


def _items(value: Any, most: int) -> list[Item]:
    """The inputs of a request for embeddings."""
    if not isinstance(value, list):
        return [_item(value, "input")]
    if value and all(_is_whole(item) for item in value):
        return [_ids(value, "input")]
    _counted("input", value, most)
    return [_item(item, f"input[{index}]") for index, item in enumerate(value)]


def _item(value: Any, where: str) -> Item:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(_is_whole(item) for item in value):
        return _ids(value, where)
    if isinstance(value, dict):
        return _part(value, where)
    raise invalid(f"{where}: expected {_EXPECTED_INPUT}; found {_kind(value)}", "input")


def _ids(value: list[int], where: str) -> list[int]:
    if not value:
        raise invalid(f"{where}: expected at least one token id, found none", "input")
    wrong = next((item for item in value if not 0 <= item < 1 << 31), None)
    if wrong is not None:
        raise invalid(f"{where}: expected token ids from 0 to 2147483647, found {wrong}", "input")
    return value


def _part(value: dict[str, Any], where: str) -> Item:
    """A text or an image: ``{"text"}``, ``{"image"}``, and OpenAI's parts with a ``type``."""
    part = dict(value)
    kind = part.pop("type", None)
    if len(part) == 1 and kind in (None, next(iter(part))):
        [(name, content)] = part.items()
        if name == "image_url" and isinstance(content, dict) and set(content) <= {"url", "detail"}:
            content = content.get("url")
        if name == "text" and isinstance(content, str):
            return content
        if name in ("image", "image_url") and isinstance(content, str):
            return _image(content, where)
    raise invalid(
        f'{where}: expected {{"text": "…"}}, {{"image": "data:image/png;base64,…"}} or '
        f'{{"type": "image_url", "image_url": {{"url": "data:…"}}}}; found an object with '
        f"{', '.join(repr(name[:40]) for name in list(value)[:8]) or 'no members'}",
        "input",
    )


def _image(uri: str, where: str) -> bytes:
    """The bytes of an image's file in a data URI."""
    head, comma, data = uri.partition(",")
    if head.lower().startswith(("http:", "https:", "file:", "ftp:")):
        raise invalid(
            f"{where}: URLs are not fetched; send the image itself as data:image/png;base64,…",
            "input",
        )
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise invalid(
            f"{where}: expected an image as data:image/png;base64,…, found {uri[:40]!r}", "input"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{where}: the image is not base64: {error}", "input") from error


def _text(value: Any, where: str) -> str:
    """A text, or an object of one."""
    if isinstance(value, dict) and set(value) == {"text"}:
        value = value["text"]
    if isinstance(value, str):
        return value
    raise invalid(
        f'{where}: expected a text or {{"text": "…"}}, found {_kind(value)}',
        where.partition("[")[0],
    )


def _kind(value: Any) -> str:
    """A value of JSON as messages have it."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    return shown(value) if isinstance(value, str) else repr(value)[:80]
