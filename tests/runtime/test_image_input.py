"""Every kind of image becomes the RGB picture its author meant, or a readable error."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedge.runtime import EmbedgeValueError
from embedge.runtime._image_input import is_image, load_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def array(source: Any) -> np.ndarray[Any, Any]:
    picture = load_image(source, "images[0]")
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("make", [str, Path, lambda p: p.read_bytes(), Image.open, bytearray])
def test_every_way_to_name_a_file_gives_its_pixels(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "é x.png"
    Image.fromarray(PIXELS).save(path)
    source = make(path.read_bytes()) if make is bytearray else make(path)
    assert np.array_equal(array(source), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "PA"])
def test_modes_are_what_pillow_converts_them_to(mode: str) -> None:
    picture = Image.fromarray(PIXELS)
    picture = (
        picture.convert("L").convert(mode)
        if mode in ("LA", "PA")
        else (picture.convert("RGB").convert(mode))
    )
    assert np.array_equal(array(picture), np.asarray(picture.convert("RGB")))


def test_a_palette_with_a_transparent_colour() -> None:
    picture = Image.fromarray(PIXELS).quantize(8)
    data = encoded(picture, transparency=0)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(array(data), expected)


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    values = RNG.integers(0, 65536, (4, 6)).astype(np.uint16)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    data = encoded(Image.fromarray(values))
    for source in (data, values, Image.fromarray(values.astype(np.int32), "I")):
        assert np.array_equal(array(source), expected)


def test_floats_and_flags() -> None:
    grey = RNG.random((4, 6)).astype(np.float32)
    expected = np.repeat(np.rint(grey * 255).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(array(grey), expected)
    assert np.array_equal(array(grey.astype(np.float64)[..., None]), expected)
    assert np.array_equal(array(Image.fromarray(grey)), expected)
    assert np.array_equal(array(grey > 0.5), np.where((grey > 0.5)[..., None], 255, [0, 0, 0]))
    assert np.array_equal(array(PIXELS), PIXELS)
    assert np.array_equal(array(np.dstack([PIXELS, PIXELS[..., 0]])), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), exif=exif)
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }
    assert np.array_equal(array(data), turned[orientation])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("white", "black", "black")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (array(data) == 255).all()
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert (array(opened) == 0).all()  # a PIL image is the frame its owner chose


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (5000, 4000)])
def test_extreme_sizes_load(size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, "red"), "PNG")
    assert load_image(data, "x").size == size


BAD: dict[str, tuple[Any, str]] = {
    "web address": ("https://example.org/a.png", "is a URL"),
    "data address": ("data:image/png;base64,AAAA", "is a URL"),
    "file address": ("file:///etc/passwd", "is a URL"),
    "missing": ("no-such-file.png", "no such file"),
    "folder": (Path("."), "is a folder"),
    "no bytes": (b"", "cannot read as one"),
    "text": (b"this is not an image at all", "cannot read as one"),
    "number": (3, "found int"),
    "nothing": (None, "found NoneType"),
    "cut short": (encoded(Image.fromarray(np.tile(PIXELS, (40, 40, 1))))[:-600], "damaged or cut"),
    "cut jpeg": (encoded(Image.fromarray(np.tile(PIXELS, (40, 40, 1))), "JPEG")[:500], "damaged"),
    "NaN": (np.full((3, 3), np.nan), "NaN or infinity"),
    "floats to 255": (np.full((3, 3), 200.0), "from 0 to 1, found 200"),
    "int64": (np.zeros((3, 3), np.int64), "found int64"),
    "one axis": (np.zeros(9, np.uint8), r"found shape \[9\]"),
    "two channels": (np.zeros((3, 3, 2), np.uint8), r"found shape \[3, 3, 2\]"),
    "no pixels": (np.zeros((0, 3), np.uint8), r"found shape \[0, 3\]"),
    "channels first": (np.zeros((3, 8, 9), np.uint8), r"channels come last"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_is_refused_by_name(case: str) -> None:
    source, message = BAD[case]
    with pytest.raises(EmbedgeValueError, match=message) as caught:
        load_image(source, "images[3]")
    assert str(caught.value).startswith("images[3]: ")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (3000, 3000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(EmbedgeValueError, match=r"images\[3\].*MAX_IMAGE_PIXELS"):
        load_image(data, "images[3]")


def test_strings_are_texts_and_the_rest_images() -> None:
    assert is_image(Path("a.png"))
    assert is_image(b"x")
    assert is_image(PIXELS)
    assert is_image(Image.new("RGB", (1, 1)))
    assert not is_image("a.png")
    assert not is_image(3)


def test_the_runtime_does_not_import_pillow_by_itself() -> None:
    code = "import sys, embedge.runtime; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
