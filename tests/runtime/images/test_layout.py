"""Windows, angles and positions are transformers' own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLModel,
)

from embedge.bench.systems.qwen_vl import rope_positions, vision_windows
from embedge.runtime.images.layout import image_layout, image_tokens, vision_inputs
from embedge.runtime.images.patches import ImagePatches
from tests.helpers.images import SETTINGS

GRIDS = [
    (2, 2), (2, 30), (30, 2), (8, 8), (8, 10), (10, 8), (16, 24), (14, 22), (26, 38), (4, 100), (54, 56),
]  # fmt: skip


@pytest.fixture(scope="module")
def tower() -> Qwen2_5_VisionTransformerPretrainedModel:
    config = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=160, num_heads=2, intermediate_size=32, out_hidden_size=16
    )
    return Qwen2_5_VisionTransformerPretrainedModel(config)


@pytest.fixture(scope="module")
def language() -> Qwen2_5_VLModel:
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 152000,
            "num_key_value_heads": 1, "intermediate_size": 32,
            "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "hidden_size": 160, "num_heads": 2, "intermediate_size": 32,
                       "out_hidden_size": 32},
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
        vision_end_token_id=151653,
    )  # fmt: skip
    return Qwen2_5_VLModel(config)


def patches(grid: tuple[int, int]) -> ImagePatches:
    return ImagePatches(np.zeros((grid[0] * grid[1], 1176), np.float32), grid)


def together() -> list[list[tuple[int, int]]]:
    return [[grid] for grid in GRIDS] + [
        [(16, 24), (24, 16), (8, 48)],
        [(2, 2)] * 5,
        [(10, 8), (8, 10)],
    ]


@pytest.mark.parametrize("grids", together(), ids=str)
def test_windows_and_angles(
    tower: Qwen2_5_VisionTransformerPretrainedModel, grids: list[tuple[int, int]]
) -> None:
    inputs = vision_inputs([patches(grid) for grid in grids], SETTINGS)
    thw = torch.tensor([[1, *grid] for grid in grids])
    order, bounds, angles = vision_windows(tower, thw)
    angles = angles.numpy().reshape(len(grids), -1, 40)
    flat = (np.asarray(order)[:, None] * 4 + np.arange(4)).reshape(-1)
    bounds = np.unique(np.asarray(bounds))
    expected = {frozenset(flat[a:b].tolist()) for a, b in itertools.pairwise(bounds)}
    index, lengths = inputs["window_index"], inputs["window_lengths"]
    found = [frozenset(row[:n].tolist()) for row, n in zip(index, lengths, strict=True)]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert all(len(window) == n for window, n in zip(found, lengths, strict=True))
    assert index.shape[1] == lengths.max() <= 64
    assert np.array_equal(index.reshape(-1)[inputs["window_restore"]], np.arange(len(flat)))
    assert np.abs(inputs["rotary_cos"] - np.cos(angles)).max() < 2e-6
    assert np.abs(inputs["rotary_sin"] - np.sin(angles)).max() < 2e-6
    assert inputs["rotary_cos"].dtype == inputs["pixel_values"].dtype == np.float32
    assert {inputs[n].dtype for n in inputs if n.startswith("window")} == {np.dtype(np.int64)}


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_row_of_an_image(language: Qwen2_5_VLModel, grid: tuple[int, int]) -> None:
    row = image_layout(grid, SETTINGS)
    count = grid[0] * grid[1] // 4
    before, after = list(SETTINGS.before_ids), list(SETTINGS.after_ids)
    assert row.ids.tolist() == [*before, *[151655] * count, *after]
    assert len(row.ids) == image_tokens(grid, SETTINGS)
    assert np.array_equal(row.features, np.flatnonzero(row.ids == 151655))
    ids = torch.from_numpy(row.ids)[None]
    expected = rope_positions(language, ids, torch.tensor([[1, *grid]]), torch.ones_like(ids))
    assert np.array_equal(row.positions, expected[:, 0].numpy())
    start, end = row.ids.tolist().index(151652), row.ids.tolist().index(151653)
    assert np.array_equal(np.flatnonzero(row.pooled), np.arange(start, end + 1))

    cut = image_layout(grid, SETTINGS, pooled_only=True)
    assert cut.ids.tolist() == row.ids.tolist()[: end + 1]
    assert np.array_equal(cut.positions, row.positions[:, : end + 1])
    assert np.array_equal(cut.pooled, row.pooled[: end + 1])
    assert np.array_equal(cut.features, row.features)
