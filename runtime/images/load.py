"""Anything a caller may call an image, as one RGB picture.

What is done to it:
    * the first frame of an animation or a file of several pages;
    * turned as its EXIF orientation says, if that can be read;
    * 16-bit grey becomes 8-bit by its upper byte (Pillow alone would cut at 255), floats are taken as
      0…1;
    * everything else by ``Image.convert("RGB")``: palettes are looked up, alpha is dropped, grey is
      repeated, CMYK is converted without a colour profile. This is what transformers' processor sees.

Files are read by Pillow's decoders of :data:`FORMATS` alone: others start programs (EPS starts Ghostscript)
or are seldom tried with bad files. An image that the caller opened was read by the caller's choice, unless
reading it, which happens here, would start a program.
"""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from embedge.runtime.errors import EmbedgeImportError, EmbedgeValueError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "load_image"]

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class _UnusableError(Exception):
    """What is wrong with an image, without its name."""


_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|data:|file:)", re.IGNORECASE)
_KINDS = "a path, bytes, a PIL image or a numpy array"
_ARRAYS = (
    "uint8, uint16, bool or floats in 0…1 of shape [height, width] or [height, width, 1, 3 or 4]"
)


def load_image(source: Any, where: str) -> Image:
    """The picture, RGB.

    Args:
        source: a path, the bytes of an image file, a PIL image, or an array ``[height, width]`` or
            ``[height, width, channels]`` with 1 (grey), 3 (RGB) or 4 (RGBA) channels, of uint8, uint16,
            bool or floats from 0 to 1.
        where: how messages name it, e.g. ``"images[3]"``.

    Raises:
        EmbedgeValueError: it is none of these, a URL, missing, damaged, empty, or beyond Pillow's limit
            against decompression bombs.
        EmbedgeImportError: Pillow is not installed.
    """
    pillow = _pillow()
    if isinstance(source, str):
        if _URL.match(source):
            shown = source if len(source) <= 60 else source[:57] + "..."
            raise EmbedgeValueError(
                f"{where}: {shown!r} is a URL; embedge opens no network connections: download it and "
                "give its path or bytes"
            )
        source = Path(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, where)
    try:
        if isinstance(source, pillow.Image):
            return _from_picture(source)
        if isinstance(source, os.PathLike):
            with _open_file(source) as file:
                return _decoded(file, os.fsdecode(source))
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
            return _decoded(io.BytesIO(data), f"{len(data)} bytes")
    except _UnusableError as error:
        raise EmbedgeValueError(f"{where}: {error}") from error
    except pillow.DecompressionBombError as error:
        raise EmbedgeValueError(
            f"{where}: {error}; scale it down first, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever went wrong inside them
        name = os.fsdecode(source) if isinstance(source, os.PathLike) else "the image"
        raise EmbedgeValueError(
            f"{where}: {name} is damaged or cut short ({str(error) or type(error).__name__}); fetch or "
            "save it again"
        ) from error
    raise EmbedgeValueError(f"{where}: expected {_KINDS}, found {type(source).__name__}")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        from embedge.runtime.host.install_advice import install_command

        raise EmbedgeImportError(
            f"images need Pillow, which is not installed; run: {install_command('images')}"
        ) from error
    return Image


def _open_file(source: os.PathLike[str]) -> BinaryIO:
    """A regular file to read."""
    path = os.path.expanduser(os.fsdecode(source))
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise _UnusableError(f"{path} is a folder; name the image files in it")
        if not stat.S_ISREG(mode):  # a pipe would be waited for, a device need not end
            raise _UnusableError(
                f"expected a file, found {path}, a pipe, socket or device; read it first and give its bytes"
            )
        return open(path, "rb")
    except FileNotFoundError:
        raise _UnusableError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _UnusableError(f"{path!r}: {reason}; check the path and who may read it") from error


def _decoded(file: BinaryIO, name: str) -> Image:
    pillow = _pillow()
    pillow.init()  # registers decoders; some need libraries that Pillow may be built without
    formats = [name for name in FORMATS if name in pillow.OPEN]
    try:
        opened = pillow.open(file, formats=formats)
    except pillow.UnidentifiedImageError:
        file.seek(0)
        start = file.read(8)
        found = f"{name}, beginning with {start!r}" if start else f"{name}, without content"
        raise _UnusableError(
            f"expected an image file of a format that embedge reads ({', '.join(formats)}), found {found}; "
            "check that the file is complete, or save it as PNG"
        ) from None
    with opened as picture:
        picture.seek(0)
        picture.load()
        return _rgb(picture)


def _from_picture(picture: Image) -> Image:
    """The picture of an image that the caller opened, if no program is started to read it."""
    from PIL import ImageFile

    if isinstance(picture, ImageFile.ImageFile) and picture.format == "EPS" and picture.tile:
        raise _UnusableError(
            "expected pixels, found an EPS file that is not read yet, which would start Ghostscript; if you "
            "trust it, call its load() first"
        )
    return _rgb(picture)


def _rgb(picture: Image) -> Image:
    from PIL import Image, ImageOps

    if min(picture.size) < 1:
        raise _UnusableError(
            f"expected at least one pixel, found {picture.size[0]} × {picture.size[1]}"
        )
    picture.load()
    if _has_readable_exif(picture):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        if picture.mode == "F":
            return Image.fromarray(_unit_floats(values)).convert("RGB")
        return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB") if picture.mode != "RGB" else picture


def _has_readable_exif(picture: Image) -> bool:
    """Whether what an image says about itself can be read; its pixels do not depend on that."""
    try:
        picture.getexif()
    except MemoryError:
        raise
    except Exception:  # as Pillow's decoders
        return False
    return True


def _unit_floats(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Floats in 0…1 as bytes.

    Raises:
        _UnusableError: a value is not in 0…1.
    """
    if not np.isfinite(values).all():
        raise _UnusableError("expected finite numbers, found NaN or infinity")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise _UnusableError(
            f"expected floats from 0 to 1, found {low:.9g} to {high:.9g}; divide by the largest value or "
            "give uint8"
        )
    return np.asarray(np.rint(values * 255), np.uint8)


def _from_array(array: np.ndarray[Any, Any], where: str) -> Image:
    from PIL import Image

    shape = array.shape
    if array.ndim not in (2, 3) or 0 in shape or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        hint = ""
        if array.ndim == 3 and shape[0] in (1, 3, 4):
            hint = "; the channels come last: array.transpose(1, 2, 0)"
        raise EmbedgeValueError(f"{where}: expected {_ARRAYS}, found shape {list(shape)}{hint}")
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    try:
        if array.dtype == np.bool_:
            values = array.astype(np.uint8) * np.uint8(255)
        elif array.dtype == np.uint8:
            values = array
        elif array.dtype == np.uint16:
            values = (array >> 8).astype(np.uint8)
        elif array.dtype.kind == "f":
            values = _unit_floats(array)
        else:
            raise _UnusableError(f"expected {_ARRAYS}, found {array.dtype}")
    except _UnusableError as error:
        raise EmbedgeValueError(f"{where}: {error}") from error
    return Image.fromarray(np.ascontiguousarray(values)).convert("RGB")
