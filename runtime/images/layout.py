"""Everything that depends on an image's size: windows and angles of its patches, its tokens.

Source: transformers' ``Qwen2_5_VisionTransformerPretrainedModel.get_window_index`` and ``rot_pos_emb``,
``Qwen2_5_VLModel.get_rope_index``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.manifest import ImageSettings
from embedge.runtime.encode.sequences import ImageLayout
from embedge.runtime.images.patches import ImagePatches

__all__ = ["image_layout", "image_tokens", "vision_inputs"]

Grid = tuple[int, int]
Ints = NDArray[np.int64]


def image_tokens(grid: Grid, settings: ImageSettings) -> int:
    """Tokens of an image, with those around its features."""
    features = grid[0] * grid[1] // settings.merge_size**2
    return len(settings.before_ids) + features + len(settings.after_ids)


def image_layout(grid: Grid, settings: ImageSettings, *, pooled_only: bool = False) -> ImageLayout:
    """Tokens, positions and pooling of one image.

    Args:
        grid: rows and columns of its patches.
        settings: of the bundle.
        pooled_only: leave out the tokens behind the pooled ones: attention is causal, so that a mean
            does not depend on them.
    """
    rows, columns = (n // settings.merge_size for n in grid)
    before, after = settings.before_ids, settings.after_ids
    start, count = len(before), rows * columns
    ids = np.array([*before, *[settings.image_token_id] * count, *after], np.int64)
    positions = np.empty((3, len(ids)), np.int64)
    positions[:, :start] = np.arange(start)
    positions[0, start : start + count] = start
    positions[1, start : start + count] = start + np.repeat(np.arange(rows), columns)
    positions[2, start : start + count] = start + np.tile(np.arange(columns), rows)
    positions[:, start + count :] = start + max(rows, columns) + np.arange(len(after))
    pooled = np.zeros(len(ids), np.bool_)
    end = start + count + settings.pooled_after
    pooled[start - settings.pooled_before : end] = True
    kept = end if pooled_only else len(ids)
    features = np.arange(start, start + count)
    return ImageLayout(ids[:kept], positions[:, :kept], pooled[:kept], features)


def vision_inputs(
    images: Sequence[ImagePatches], settings: ImageSettings
) -> dict[str, NDArray[np.float32] | Ints]:
    """Inputs of the vision graph for images of one patch count; see ``ARCHITECTURE.md``.

    Args:
        images: at least one.
        settings: of the bundle.
    """
    angles = [_angles(image.grid, settings) for image in images]
    windows: list[Ints] = []
    offset = 0
    for image in images:
        windows += [window + offset for window in _windows(image.grid, settings)]
        offset += image.patches
    lengths = np.array([len(window) for window in windows], np.int64)
    width = int(lengths.max())
    index = np.zeros((len(windows), width), np.int64)
    real = np.arange(width) < lengths[:, None]
    index[real] = np.concatenate(windows)
    restore = np.empty(offset, np.int64)
    restore[index[real]] = np.flatnonzero(real)
    stacked = np.stack(angles)
    return {
        "pixel_values": np.stack([image.values for image in images]),
        "rotary_cos": np.cos(stacked),
        "rotary_sin": np.sin(stacked),
        "window_index": index,
        "window_lengths": lengths,
        "window_restore": restore,
    }


def _in_groups(values: Ints, grid: Grid, merge: int) -> Ints:
    """Values by row and column of a patch in the order of the patches: groups of ``merge²`` together."""
    rows, columns = grid
    groups = values.reshape(rows // merge, merge, columns // merge, merge)
    return groups.transpose(0, 2, 1, 3).reshape(-1)


def _angles(grid: Grid, settings: ImageSettings) -> NDArray[np.float32]:
    """float32 ``[patches, rotary_dim]``: angles by row, then by column."""
    rows, columns = grid
    half = settings.rotary_dim // 2
    exponents = np.arange(0, settings.rotary_dim, 2, dtype=np.float32) / settings.rotary_dim
    frequencies = np.float32(1) / np.power(np.float32(settings.rotary_theta), exponents)
    table = np.arange(max(grid), dtype=np.float32)[:, None] * frequencies[None]
    by_row = np.repeat(np.arange(rows), columns)
    by_column = np.tile(np.arange(columns), rows)
    angles = np.empty((rows * columns, 2, half), np.float32)
    angles[:, 0] = table[_in_groups(by_row, grid, settings.merge_size)]
    angles[:, 1] = table[_in_groups(by_column, grid, settings.merge_size)]
    return angles.reshape(rows * columns, settings.rotary_dim)


def _windows(grid: Grid, settings: ImageSettings) -> list[Ints]:
    """Patches of every window, windows row by row, in each window its groups row by row."""
    merge, side = settings.merge_size, settings.window_size // settings.factor
    rows, columns = (n // merge for n in grid)
    groups = np.arange(rows * columns).reshape(rows, columns)
    inside = np.arange(merge**2)
    return [
        (groups[top : top + side, left : left + side].reshape(-1, 1) * merge**2 + inside).reshape(
            -1
        )
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
