"""How a bundle's images become patches, and what tokens stand around them: ``manifest.json: model.image``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from embedge.runtime.bundle.json_object import Table

__all__ = ["ImageSettings"]

BICUBIC = 3  # Pillow's number
_MOST_PIXELS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Preprocessing of Qwen2-VL's image processor, and the image prompt.

    Attributes:
        patch_size: pixels of a patch's side.
        temporal_patch_size: frames of a patch; a still image is repeated.
        merge_size: patches of a feature's side.
        min_pixels: fewest pixels an image is scaled to.
        max_pixels: most pixels an image is scaled to.
        image_mean: mean of each channel, of values from 0 to 1.
        image_std: standard deviation of each channel.
        rescale_factor: from pixel values to values from 0 to 1.
        resample: Pillow's number of the resampling filter; bicubic.
        window_size: pixels of an attention window's side.
        rotary_dim: rotary angles of a patch, half of them for its row, half for its column.
        rotary_theta: base of the angles' frequencies.
        hidden_size: width of an image feature.
        before_ids: tokens before the features.
        image_token_id: the token whose places the features take.
        after_ids: tokens after them.
        pooled_before: how many of the last ``before_ids`` a mean includes.
        pooled_after: how many of the first ``after_ids`` a mean includes.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float
    resample: int
    window_size: int
    rotary_dim: int
    rotary_theta: float
    hidden_size: int
    before_ids: tuple[int, ...]
    image_token_id: int
    after_ids: tuple[int, ...]
    pooled_before: int
    pooled_after: int

    @property
    def factor(self) -> int:
        """Pixels of a feature's side; both sides of a scaled image are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def parse(cls, table: Table) -> ImageSettings:
        """Reads the object, see :class:`Table` for what it raises."""
        settings = cls(
            patch_size=table.integer("patch_size", minimum=1, maximum=1024),
            temporal_patch_size=table.integer("temporal_patch_size", minimum=1, maximum=16),
            merge_size=table.integer("merge_size", minimum=1, maximum=64),
            min_pixels=table.integer("min_pixels", minimum=1, maximum=_MOST_PIXELS),
            max_pixels=table.integer("max_pixels", minimum=1, maximum=_MOST_PIXELS),
            image_mean=_channels(table, "image_mean"),
            image_std=_channels(table, "image_std"),
            rescale_factor=float(table.number("rescale_factor")),
            resample=table.integer("resample", minimum=0),
            window_size=table.integer("window_size", minimum=1),
            rotary_dim=table.integer("rotary_dim", minimum=2, maximum=4096),
            rotary_theta=float(table.number("rotary_theta")),
            hidden_size=table.integer("hidden_size", minimum=1, maximum=1 << 20),
            before_ids=table.integers("before_ids", minimum=0),
            image_token_id=table.integer("image_token_id", minimum=0),
            after_ids=table.integers("after_ids", minimum=0),
            pooled_before=table.integer("pooled_before", minimum=0),
            pooled_after=table.integer("pooled_after", minimum=0),
        )
        if settings.resample != BICUBIC:
            table.fail("resample", f"expected {BICUBIC} (bicubic), found {settings.resample}")
        if settings.rotary_dim % 2:
            table.fail("rotary_dim", f"expected an even number, found {settings.rotary_dim}")
        if settings.window_size % settings.factor:
            table.fail("window_size", f"expected a multiple of {settings.factor}")
        if settings.factor**2 > settings.max_pixels:
            table.fail("max_pixels", f"expected at least {settings.factor}², those of a feature")
        if settings.min_pixels > settings.max_pixels:
            table.fail("min_pixels", f"expected at most max_pixels, {settings.max_pixels}")
        if min(settings.image_std) <= 0:
            table.fail("image_std", "expected positive numbers")
        if settings.pooled_before > len(settings.before_ids):
            table.fail("pooled_before", f"expected at most {len(settings.before_ids)}")
        if settings.pooled_after > len(settings.after_ids):
            table.fail("pooled_after", f"expected at most {len(settings.after_ids)}")
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _channels(table: Table, key: str) -> tuple[float, ...]:
    values = table.numbers(key)
    if len(values) != 3:
        table.fail(key, f"expected 3 numbers, found {len(values)}")
    return values
