"""Every kind of image becomes the RGB picture its author meant, or a readable error."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedge.runtime import EmbedgeValueError
from embedge.runtime.images.load import load_image
from embedge.runtime.inputs import is_image

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


@pytest.mark.slow
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
    "no bytes": (b"", "found 0 bytes, without content"),
    "text": (b"this is not an image at all", "found 27 bytes, beginning with b'this is '"),
    "other format": (encoded(Image.fromarray(PIXELS), "TGA"), "of a format that embedge reads"),
    "view": (memoryview(b"%PDF-1.7"), "beginning with b'%PDF-1.7'"),
    "device": (Path("/dev/null"), "a pipe, socket or device"),
    "null character": (Path("a\0.png"), r"'a\\x00.png': .*check the path"),
    "long name": (Path("a" * 5000), "name too long; check the path"),
    "nobody's home": (Path("~nobody-of-that-name/a.png"), "no such file"),
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


@pytest.mark.slow
def test_the_runtime_does_not_import_pillow_by_itself() -> None:
    code = "import sys, embedge.runtime; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
(any program) show
%%EOF
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a script stands for Ghostscript")
@pytest.mark.parametrize(
    "make", [Path, Path.read_bytes, lambda p: Image.open(io.BytesIO(p.read_bytes()))]
)
def test_no_program_is_started(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked up anew
    (tmp_path / "photo.png").write_bytes(EPS)
    with pytest.raises(EmbedgeValueError, match="beginning with b'%!PS|an EPS file"):
        load_image(make(tmp_path / "photo.png"), "images[0]")
    assert not (tmp_path / "started").exists()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(EmbedgeValueError, match="a pipe, socket or device"):
        load_image(tmp_path / "image.png", "images[0]")


KINDS: dict[str, dict[str, Any]] = {
    "AVIF": {},
    "BMP": {},
    "GIF": {"save_all": True, "append_images": [Image.new("RGB", (7, 5))]},
    "JPEG": {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"},
    "JPEG2000": {},
    "PNG": {"dpi": (72, 72)},
    "PPM": {},
    "TIFF": {"compression": "tiff_lzw"},
    "WEBP": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")
def test_damaged_files_are_pictures_or_errors(kind: str) -> None:
    """EMBEDGE_FUZZ times as many mutations as by default."""
    if kind not in Image.SAVE and not Image.init() and kind not in Image.SAVE:
        pytest.skip(f"Pillow was built without {kind}")
    whole = encoded(Image.fromarray(PIXELS), kind, **KINDS[kind])
    assert load_image(whole, "x").size in ((7, 5), (5, 7))  # turned, by its EXIF orientation
    chance = random.Random(kind)
    for _ in range(100 * int(os.environ.get("EMBEDGE_FUZZ", "1"))):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            place = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[place] ^= 1 << chance.randrange(8)
                case 1:
                    data[place] = chance.choice((0, 1, 127, 128, 255))
                case 2:
                    data[place : place + 4] = chance.randbytes(4)
                case 3:
                    del data[place : place + chance.choice((1, 4, len(data)))]
            if not data:
                break
        try:
            picture = load_image(bytes(data), "images[0]")
        except EmbedgeValueError:
            continue
        assert picture.mode == "RGB"


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_damaged_exif_does_not_keep_the_pixels_from_being_read(file_format: str) -> None:
    pixels = np.arange(75, dtype=np.uint8).reshape(5, 5, 3)
    plain, damaged = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(plain, file_format, lossless=True)
    Image.fromarray(pixels).save(damaged, file_format, lossless=True, exif=b"no EXIF at all")
    found, expected = (load_image(f.getvalue(), "images[0]") for f in (damaged, plain))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_a_value_just_above_1_is_told_apart_from_1() -> None:
    with pytest.raises(EmbedgeValueError, match=r"found 0 to 1\.0000001"):
        load_image(np.array([[0.0, 1.0000001]]), "images[0]")
