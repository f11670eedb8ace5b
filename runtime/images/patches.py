"""Pictures to patches, as transformers' (slow) ``Qwen2VLImageProcessor`` makes them, without torch.

Source: Wang et al., "Qwen2-VL", arXiv 2409.12191, and transformers'
``models/qwen2_vl/image_processing_qwen2_vl.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.arguments import check_positive
from embedge.runtime.bundle.manifest import ImageSettings
from embedge.runtime.errors import EmbedgeValueError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImagePatches", "ImageProcessor", "pixel_range"]

_LARGEST_RATIO = 200  # transformers refuses longer images


@dataclass(frozen=True)
class ImagePatches:
    """One image as the vision tower takes it.

    Attributes:
        values: float32 ``[patches, channels · frames · side²]``, the patches of one feature together.
        grid: rows and columns of patches, both multiples of the merge size.
    """

    values: NDArray[np.float32]
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        """Patches of the image."""
        return self.grid[0] * self.grid[1]


class ImageProcessor:
    """Scales pictures, normalizes them and cuts them into patches.

    Args:
        settings: of the bundle.
    """

    def __init__(self, settings: ImageSettings) -> None:
        self._settings = settings
        # Every pixel value of every channel, normalized: 3 × 256 numbers
        values = np.arange(256, dtype=np.float64) * settings.rescale_factor
        mean, std = (
            np.array(settings.image_mean, np.float32),
            np.array(settings.image_std, np.float32),
        )
        self._normalized = (values.astype(np.float32)[None] - mean[:, None]) / std[:, None]

    def size(self, width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """``(width, height)`` an image is scaled to: multiples of the factor, within the pixels asked.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        factor = self._settings.factor
        if max(height, width) > _LARGEST_RATIO * min(height, width):
            raise ValueError(f"one side is more than {_LARGEST_RATIO} times the other")
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        if rows * columns > max_pixels:
            beta = math.sqrt(height * width / max_pixels)
            rows = max(factor, math.floor(height / beta / factor) * factor)
            columns = max(factor, math.floor(width / beta / factor) * factor)
        elif rows * columns < min_pixels:
            beta = math.sqrt(min_pixels / (height * width))
            rows = math.ceil(height * beta / factor) * factor
            columns = math.ceil(width * beta / factor) * factor
        return columns, rows

    def __call__(
        self,
        image: Image,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        where: str = "image",
    ) -> ImagePatches:
        """The patches of an RGB picture.

        Args:
            image: what :func:`load_image` gave.
            min_pixels: fewest pixels to scale to, ``None``: the bundle's.
            max_pixels: most pixels to scale to, ``None``: the bundle's.
            where: how messages name the image.

        Raises:
            EmbedgeValueError: the image is too long and thin.
        """
        settings = self._settings
        low, high = pixel_range(settings, min_pixels, max_pixels)
        try:
            width, height = self.size(*image.size, low, high)
        except ValueError as error:
            raise EmbedgeValueError(
                f"{where}: {image.size[0]} × {image.size[1]} pixels: {error}, which the model does not "
                "take; crop or split it"
            ) from error
        if (width, height) != image.size:
            image = image.resize((width, height), resample=settings.resample)
        return ImagePatches(
            self._patches(np.asarray(image)),
            (height // settings.patch_size, width // settings.patch_size),
        )

    def _patches(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """uint8 ``[height, width, 3]`` to float32 patches, groups of ``merge²`` together."""
        s = self._settings
        side, merge, frames = s.patch_size, s.merge_size, s.temporal_patch_size
        rows, columns = (length // (side * merge) for length in pixels.shape[:2])
        cut = pixels.reshape(rows, merge, side, columns, merge, side, 3)
        # To: the group's row and column, the patch's in its group, channel, the pixel's in its patch.
        cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)
        patches = np.empty((rows * columns * merge**2, 3, frames, side, side), np.float32)
        flat = np.ascontiguousarray(cut).reshape(-1, 3, side, side)
        for channel in range(3):
            patches[:, channel, :] = self._normalized[channel][flat[:, channel]][:, None]
        return patches.reshape(len(patches), -1)


def pixel_range(
    settings: ImageSettings, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The fewest and most pixels that a call's images are scaled to.

    Args:
        settings: of the bundle.
        min_pixels: fewest, ``None``: the bundle's, or ``max_pixels`` where that is less.
        max_pixels: most, ``None``: the bundle's, or ``min_pixels`` where that is more.

    Raises:
        EmbedgeValueError: one is not a positive number, or they contradict each other.
    """
    low, high = settings.min_pixels, settings.max_pixels
    if min_pixels is not None:
        low = check_positive("min_pixels", min_pixels)
        high = max(low, high)
    if max_pixels is not None:
        high = check_positive("max_pixels", max_pixels)
        low = min(low, high) if min_pixels is None else low
    if low > high:
        raise EmbedgeValueError(
            f"min_pixels: expected at most max_pixels ({high}), found {low}",
            arguments=["min_pixels", "max_pixels"],
        )
    return low, high
