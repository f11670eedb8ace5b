"""Patches are transformers' slow processor's, to float rounding."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from embedge.bench.systems.qwen_vl import image_processor_class
from embedge.runtime import EmbedgeValueError
from embedge.runtime.bundle.manifest import ImageSettings
from embedge.runtime.bundle.schema import Place
from embedge.runtime.errors import ManifestError
from embedge.runtime.images.patches import ImageProcessor, pixel_range
from tests.helpers.images import SETTINGS

PROCESSOR = ImageProcessor(SETTINGS)


def slow(picture: Image.Image, low: int, high: int) -> tuple[np.ndarray, tuple[int, int]]:
    processor = image_processor_class()(min_pixels=low, max_pixels=high)
    options = {"input_data_format": "channels_last"}  # it guesses wrong at a height of 1 or 3
    result = processor(picture, return_tensors="np", **options)
    return result["pixel_values"], tuple(result["image_grid_thw"][0, 1:])


def picture(rng: np.random.Generator, number: int) -> Image.Image:
    long, short = int(rng.integers(1, 900)), int(rng.integers(1, 300))
    width, height = (long, short) if number % 2 else (short, long)
    mode = ("RGB", "L", "RGBA", "P", "CMYK", "LA", "1")[number % 7]
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    if number % 3 == 0:  # smooth, as photographs are
        noise = noise.resize((max(1, width // 9), max(1, height // 9))).resize((width, height))
    return noise.convert("L").convert(mode) if mode == "LA" else noise.convert(mode)


@pytest.mark.slow
def test_200_random_sizes_and_modes_equal_the_slow_processor() -> None:
    rng = np.random.default_rng(0)
    largest, done = 0.0, 0
    for number in range(230):
        image = picture(rng, number)
        if max(image.size) > 200 * min(image.size):
            continue
        low = int(rng.choice([3136, 784, 20000]))
        high = int(rng.choice([602112, 50000, 25000]))
        expected, grid = slow(image, low, high)
        found = PROCESSOR(image.convert("RGB"), low, high)
        assert found.grid == grid
        assert found.values.shape == expected.shape
        assert found.values.dtype == np.float32
        largest = max(largest, float(np.abs(found.values - expected).max()))
        done += 1
    assert done >= 200
    assert largest <= 1e-5


@pytest.mark.slow
def test_the_default_is_at_most_768_features() -> None:
    image = Image.new("RGB", (4000, 3000))
    patches = PROCESSOR(image)
    assert patches.patches // 4 <= 768
    assert patches.grid == (slow(image, 3136, 602112)[1])


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (5, 4000)])
def test_images_too_long_and_thin_are_refused(size: tuple[int, int]) -> None:
    message = rf"images\[2\]: {size[0]} × {size[1]} pixels.*200 times"
    with pytest.raises(EmbedgeValueError, match=message):
        PROCESSOR(Image.new("RGB", size), where="images[2]")


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0, None, "min_pixels"),
        (None, -1, "max_pixels"),
        (None, 2.5, "max_pixels"),
        (True, None, "min_pixels"),
        (5000, 4000, "at most max_pixels"),
    ],
)
def test_impossible_pixels_are_refused(low: object, high: object, message: str) -> None:
    with pytest.raises(EmbedgeValueError, match=message):
        pixel_range(SETTINGS, low, high)  # type: ignore[arg-type]


def test_one_limit_moves_the_other_where_they_would_cross() -> None:
    assert pixel_range(SETTINGS, None, 784) == (784, 784)
    assert pixel_range(SETTINGS, 10**6, None) == (10**6, 10**6)
    assert pixel_range(SETTINGS, None, None) == (3136, 602112)


@pytest.mark.slow
def test_twenty_megapixels_take_little_memory() -> None:
    image = Image.new("RGB", (5000, 4000), "red")
    tracemalloc.start()
    PROCESSOR(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # Pillow's scaled picture and 15 MB of patches


def test_settings_survive_json() -> None:
    assert ImageSettings.parse(SETTINGS.to_dict()) == SETTINGS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resample", 2),
        ("rotary_dim", 39),
        ("window_size", 100),
        ("min_pixels", 10**9),
        ("image_std", [1.0, 0.0, 1.0]),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, "x", 0.5]),
        ("pooled_before", 9),
        ("pooled_after", 9),
        ("before_ids", [1, -2]),
        ("patch_size", 0),
    ],
)
def test_broken_settings_name_the_key(key: str, value: object) -> None:
    with pytest.raises(ManifestError, match=rf"model\.image\.{key}"):
        ImageSettings.parse({**SETTINGS.to_dict(), key: value}, Place(path="model.image"))


def test_other_numbers_than_clips_are_honoured() -> None:
    settings = replace(SETTINGS, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    values = ImageProcessor(settings)(Image.new("RGB", (56, 56), (0, 255, 51))).values
    channels = values.reshape(len(values), 3, -1)
    assert channels[0, :, 0] == pytest.approx([-1.0, 1.0, -0.6])
