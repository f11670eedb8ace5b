"""Strings that name an image, given where a string is a text.

On a bundle with a vision tower both are welcome, so the call goes on, with a warning.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

from embedge.runtime.errors import EmbedgeWarning

__all__ = ["warn_of_paths"]

_MOST_CHARACTERS = 4096  # of a path
_SUFFIX = r"\.(?:avif|bmp|gif|heic|heif|jp2|jpe?g|jxl|png|tiff?|webp)"
_IMAGE_URL = re.compile(
    rf"data:image/|(?:https?|ftp|file|s3|gs)://\S+{_SUFFIX}(?:[?#]\S*)?$", re.IGNORECASE
)
_IMAGE_NAME = re.compile(rf"[^\n]*{_SUFFIX}$", re.IGNORECASE)


def warn_of_paths(items: Sequence[Any]) -> None:
    """Warns if strings among some items are paths of existing files, or URLs of images."""
    named = [
        (i, item) for i, item in enumerate(items) if isinstance(item, str) and _names_one(item)
    ]
    if not named:
        return
    index, first = named[0]
    shown = first if len(first) <= 80 else first[:77] + "..."
    others = f", and {len(named) - 1} more" if len(named) > 1 else ""
    warnings.warn(
        f"inputs[{index}]: {shown!r} names a file or an image, and is embedded as the text it is{others}; "
        "for the image itself pass it to encode_image, or pathlib.Path(…) here (`embedge embed`: --images)",
        EmbedgeWarning,
        stacklevel=4,
    )


def _names_one(text: str) -> bool:
    if _IMAGE_URL.match(text):
        return True
    if len(text) > _MOST_CHARACTERS or not (os.sep in text or _IMAGE_NAME.match(text)):
        return False
    try:
        return os.path.isfile(os.path.expanduser(text))
    except ValueError:  # a null character
        return False
