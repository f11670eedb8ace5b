"""4-bit blocks: packing, grids, and the error they leave."""

from __future__ import annotations

import numpy as np
import pytest

from embedge.quant import int4

RNG = np.random.default_rng(0)


def full_range(blocks: np.ndarray) -> np.ndarray:
    """What plain min-max rounding makes of the blocks."""
    low = np.minimum(blocks.min(-1), 0.0)
    high = np.maximum(blocks.max(-1), 0.0)
    scale = np.where(high > low, (high - low) / 15, 1.0).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 15).astype(np.uint8)
    return int4.dequantize(int4.quantize(blocks, scale, zero), scale, zero)


@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_values_are_the_halves_of_bytes_in_order(length: int) -> None:
    values = RNG.integers(0, 16, (3, 5, length)).astype(np.uint8)
    packed = int4.pack_pairs(values)
    assert packed.shape == (3, 5, (length + 1) // 2)
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(3, 5, -1)
    assert np.array_equal(halves[..., :length], values)


def test_the_earlier_value_is_in_the_low_half_of_the_byte() -> None:
    assert int4.pack_pairs(np.array([[3, 10]], np.uint8)) == 0xA3


def test_an_odd_length_ends_in_a_zero_half() -> None:
    assert int4.pack_pairs(np.array([7], np.uint8)) == 0x07


@pytest.mark.parametrize("spread", ["normal", "heavy tails", "one sign", "constant", "tiny"])
def test_the_chosen_grid_is_never_worse_than_the_full_range(spread: str) -> None:
    shape = (200, 32)
    blocks = {
        "normal": RNG.normal(0, 1, shape),
        "heavy tails": RNG.standard_t(2, shape),
        "one sign": RNG.uniform(1, 2, shape),
        "constant": np.full(shape, 0.3),
        "tiny": RNG.normal(0, 1e-20, shape),
    }[spread].astype(np.float32)
    scales, zeros = int4.block_grid(blocks)
    restored = int4.dequantize(int4.quantize(blocks, scales, zeros), scales, zeros)
    ours = np.square((restored - blocks).astype(np.float64)).sum(-1)
    plain = np.square((full_range(blocks) - blocks).astype(np.float64)).sum(-1)
    assert (ours <= plain * 1.0001).all()


def test_importance_moves_the_grid_towards_what_matters() -> None:
    blocks = RNG.standard_t(2, (100, 32)).astype(np.float32)
    weight = np.ones(32, np.float32)
    weight[:8] = 100
    errors = []
    for importance in (None, weight):
        scales, zeros = int4.block_grid(blocks, importance)
        restored = int4.dequantize(int4.quantize(blocks, scales, zeros), scales, zeros)
        errors.append(np.square(restored - blocks)[:, :8].sum())
    assert errors[1] < errors[0]


def test_values_inside_the_grid_are_within_half_a_step() -> None:
    blocks = RNG.normal(0, 1, (50, 16)).astype(np.float32)
    scales = (np.ptp(blocks, axis=-1) / 14).astype(np.float32)
    zeros = np.clip(np.rint(-blocks.min(-1) / scales), 0, 15).astype(np.uint8)
    restored = int4.dequantize(int4.quantize(blocks, scales, zeros), scales, zeros)
    inside = (restored > restored.min(-1, keepdims=True)) & (
        restored < restored.max(-1, keepdims=True)
    )
    error = np.abs(restored - blocks) / scales[:, None]
    assert error[inside].max() <= 0.5001


def test_a_block_of_zeros_is_restored_exactly() -> None:
    scales, zeros = int4.block_grid(np.zeros((2, 16), np.float32))
    values = int4.quantize(np.zeros((2, 16), np.float32), scales, zeros)
    assert not int4.dequantize(values, scales, zeros).any()
    assert np.isfinite(scales).all()


def test_zero_is_always_on_the_grid() -> None:
    blocks = RNG.uniform(3, 4, (20, 16)).astype(np.float32)
    blocks[:, 0] = 0
    scales, zeros = int4.block_grid(blocks)
    restored = int4.dequantize(int4.quantize(blocks, scales, zeros), scales, zeros)
    assert not restored[:, 0].any()


def test_the_last_block_of_a_row_is_padded_with_zeros() -> None:
    weight = RNG.normal(0, 1, (3, 40)).astype(np.float32)
    blocks = int4.split_blocks(weight, 16)
    assert blocks.shape == (3, 3, 16)
    assert np.array_equal(blocks.reshape(3, 48)[:, :40], weight)
    assert not blocks[:, 2, 8:].any()


def test_whole_blocks_are_a_view() -> None:
    weight = np.zeros((3, 32), np.float32)
    assert np.shares_memory(int4.split_blocks(weight, 16), weight)
