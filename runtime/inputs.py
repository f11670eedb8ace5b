"""What a call may be given to embed: texts, images, lists of them; each refusal says what to pass."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from io import IOBase
from typing import Any

import numpy as np

from embedge.runtime.errors import EmbedgeValueError, warn

__all__ = ["as_images", "as_items", "as_texts", "is_image", "warn_of_paths"]

_MOST_PATH_CHARACTERS = 4096
_SUFFIX = r"\.(?:avif|bmp|gif|heic|heif|jp2|jpe?g|jxl|png|tiff?|webp)"
_IMAGE_URL = re.compile(
    rf"data:image/|(?:https?|ftp|file|s3|gs)://\S+{_SUFFIX}(?:[?#]\S*)?$", re.IGNORECASE
)
_IMAGE_NAME = re.compile(rf"[^\n]*{_SUFFIX}$", re.IGNORECASE)


def is_image(value: object) -> bool:
    """Whether a value in a list of texts and images is meant as an image; strings are texts."""
    if isinstance(value, (os.PathLike, bytes, bytearray, memoryview, np.ndarray)):
        return True
    return any(cls.__module__.startswith("PIL.") for cls in type(value).__mro__)


def as_texts(inputs: Any) -> tuple[list[str], bool]:
    """The texts of a call, and whether it was a single one.

    Raises:
        EmbedgeValueError: with the index and type of the first item that is not a string.
    """
    if isinstance(inputs, str):
        return [inputs], True
    expected = "a string or a list of strings"
    if isinstance(inputs, (bytes, bytearray)):
        raise EmbedgeValueError(f"inputs: expected {expected}, found {type(inputs).__name__}")
    texts = _listed_items("inputs", inputs, expected)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise EmbedgeValueError(f"inputs[{index}]: expected a string, found {_described(text)}")
    return texts, False


def as_items(inputs: Any) -> tuple[list[Any], bool]:
    """The texts (``str``) and images (anything else) of a call, and whether it was a single one.

    Raises:
        EmbedgeValueError: with the index and type of the first item that is neither.
    """
    expected = "a string or an image (a path, bytes, a PIL image or a numpy array)"
    return _items_or_one("inputs", inputs, "a string, an image or a list of them", expected)


def as_images(images: Any) -> tuple[list[Any], bool]:
    """The images of a call, strings being paths, and whether it was a single one.

    Raises:
        EmbedgeValueError: with the index and type of the first item that is none.
    """
    expected = "a path, bytes, a PIL image or a numpy array"
    return _items_or_one("images", images, "an image or a list of images", expected)


def _items_or_one(name: str, value: Any, expected: str, each: str) -> tuple[list[Any], bool]:
    """The strings and images of a call, and whether it was a single one; ``each`` is what one has to be."""
    if isinstance(value, str) or _is_one_image(value):
        return [value], True
    items = _listed_items(name, value, expected)
    for index, item in enumerate(items):
        if not isinstance(item, str) and not is_image(item):
            raise EmbedgeValueError(f"{name}[{index}]: expected {each}, found {_described(item)}")
    return items, False


def _is_one_image(value: Any) -> bool:
    """Whether a value is one image, not a list: an array of strings or of four axes is a list."""
    if isinstance(value, np.ndarray):
        return value.ndim < 4 and value.dtype.kind in "biuf"
    return is_image(value)


def _listed_items(name: str, value: Any, expected: str) -> list[Any]:
    """The items of a list, or of another thing that holds one item after the other.

    Raises:
        EmbedgeValueError: for what holds its items otherwise, with the way to a list.
    """
    found, advice = type(value).__name__, None
    if isinstance(value, Mapping):
        advice = f"list({name}.values())"
    elif hasattr(value, "columns") or hasattr(
        value, "column_names"
    ):  # iterated, it gives their names
        found, advice = f"a table ({found})", f"one of its columns, such as {_a_column(value)}"
    elif isinstance(value, Set):  # vectors could not be told apart
        found, advice = f"{found}, which has no order", f"sorted({name})"
    elif isinstance(value, IOBase):  # its lines hold their ends
        found, advice = f"a file ({found})", "[line.rstrip() for line in file]"
    elif isinstance(value, np.ndarray) and value.dtype.kind in "OSTU" and value.ndim != 1:
        found = f"an array of shape {list(value.shape)}"
        advice = "one column, such as array[:, 0]" if value.ndim > 1 else f"{name}.item()"
    elif isinstance(value, Iterable):
        try:
            return list(value)
        except TypeError as error:  # a NumPy scalar calls itself iterable
            raise EmbedgeValueError(f"{name}: expected {expected}: {error}") from error
    hint = f"; pass {advice}" if advice else ""
    raise EmbedgeValueError(f"{name}: expected {expected}, found {found}{hint}")


def _a_column(table: Any) -> str:
    """Python for the texts of a table."""
    names = getattr(table, "column_names", None)
    names = list(getattr(table, "columns", ()) if names is None else names)
    texts = [name for name in names if isinstance(name, str)] or ["text"]
    column = f"table[{('text' if 'text' in texts else texts[0])!r}]"
    return f"{column}.to_pylist()" if hasattr(table, "to_pylist") else f"list({column})"


def _described(item: Any) -> str:
    """The type of an item that is no text, and what to do about the usual ones."""
    kind = type(item).__name__
    if (
        item is None
        or (isinstance(item, float) and math.isnan(item))
        or kind in ("NAType", "NaTType")
    ):
        return f"{kind}, a missing value; fill or drop those"
    if isinstance(item, bytes):
        return f"{kind}; decode them, such as item.decode()"
    if type(item).__module__.startswith("pyarrow"):
        return f"{kind}; pass column.to_pylist()"
    return kind


def warn_of_paths(items: Sequence[Any]) -> None:
    """Warns if strings among some items are paths of existing files, or URLs of images.

    With a vision tower both texts and images are welcome, so the call goes on.
    """
    named = [
        (i, item) for i, item in enumerate(items) if isinstance(item, str) and _names_one(item)
    ]
    if not named:
        return
    index, first = named[0]
    shown = first if len(first) <= 80 else first[:77] + "..."
    others = f", and {len(named) - 1} more" if len(named) > 1 else ""
    warn(
        f"inputs[{index}]: {shown!r} names a file or an image, and is embedded as the text it is{others}; "
        "for the image itself pass it to encode_image, or pathlib.Path(…) here (`embedge embed`: --images)"
    )


def _names_one(text: str) -> bool:
    if _IMAGE_URL.match(text):
        return True
    if len(text) > _MOST_PATH_CHARACTERS or not (os.sep in text or _IMAGE_NAME.match(text)):
        return False
    try:
        return os.path.isfile(os.path.expanduser(text))
    except ValueError:  # a null character
        return False
