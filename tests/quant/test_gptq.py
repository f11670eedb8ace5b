"""GPTQ: the factor it works with, and that it beats rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from embedge.quant import gptq, int4, int8


def inputs(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Correlated activations, float32 ``[rows, width]``."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(0, 1, (width, width)) * np.exp(rng.normal(0, 1, width))
    return (rng.normal(0, 1, (rows, width)) @ mix).astype(np.float32)


def weights(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1, (rows, width)).astype(np.float32)


def output_error(x: np.ndarray, weight: np.ndarray, restored: np.ndarray) -> float:
    return float(np.square(x.astype(np.float64) @ (weight - restored).T).sum())


def test_the_factor_squares_to_the_damped_hessian() -> None:
    x = inputs(400, 24)
    hessian = x.T @ x
    R = gptq.cholesky(hessian).astype(np.float64)  # damps in place
    assert np.array_equal(R, np.triu(R))
    assert np.abs(R @ R.T - hessian).max() < 1e-5 * hessian.max()


def test_the_energy_is_that_of_the_outputs() -> None:
    x, weight = inputs(400, 24), weights(8, 24)
    hessian = x.T @ x
    R = gptq.cholesky(hessian)
    exact = weight.astype(np.float64)
    assert gptq.energy(weight, R) == pytest.approx(np.sum((exact @ hessian) * exact), rel=1e-4)


def test_the_noise_is_the_energy_of_what_is_lost() -> None:
    x, weight = inputs(500, 300), weights(40, 300)  # more columns than one group, and than two
    hessian = x.T @ x
    R = gptq.cholesky(hessian)
    values, scales, of_rows = gptq.quantize_rows(weight, R)
    blocks = gptq.quantize_blocks(weight, R, 32)
    restored = int4.dequantize(*blocks[:3]).reshape(40, -1)[:, :300]
    for made, noise in ((values * scales[:, None], of_rows), (restored, blocks[3])):
        lost = weight.astype(np.float64) - made
        assert noise == pytest.approx(np.sum((lost @ hessian) * lost), rel=1e-3)


def test_columns_are_rounded_as_the_paper_says() -> None:
    x, weight = inputs(900, 300), weights(16, 300)
    hessian = x.T @ x
    R = gptq.cholesky(hessian)
    values, scales, _ = gptq.quantize_rows(weight, R)
    left = weight.astype(np.float64)  # Frantar et al., algorithm 1, column by column
    Hinv = np.linalg.cholesky(np.linalg.inv(hessian.astype(np.float64))).T
    expected = np.empty(weight.shape)
    for j in range(300):
        expected[:, j] = np.clip(np.rint(left[:, j] / scales), -127, 127)
        error = (left[:, j] - expected[:, j] * scales) / Hinv[j, j]
        left[:, j:] -= error[:, None] * Hinv[j, j:]
    assert np.mean(values != expected) < 0.01
    assert np.abs(values - expected).max() <= 1


def test_the_damping_is_a_hundredth_of_the_mean_diagonal() -> None:
    x = inputs(400, 24)
    hessian = x.T @ x
    before = np.diag(hessian).copy()
    gptq.cholesky(hessian)
    assert np.diag(hessian) - before == pytest.approx(np.full(24, 0.01 * before.mean()), rel=1e-2)


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("block_size", [16, 32])
def test_4_bit_blocks_have_a_smaller_output_error_than_rounding(
    width: int, block_size: int
) -> None:
    x, weight = inputs(500, width), weights(40, width)
    factor = gptq.cholesky(x.T @ x)
    restored = int4.dequantize(*gptq.quantize_blocks(weight, factor, block_size)[:3])
    parts = int4.split_blocks(weight, block_size)
    grid = int4.block_grid(parts)
    rounded = int4.dequantize(int4.quantize(parts, *grid), *grid)
    errors = [
        output_error(x, weight, made.reshape(40, -1)[:, :width]) for made in (restored, rounded)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_int8_rows_have_a_smaller_output_error_than_rounding() -> None:
    x, weight = inputs(500, 200), weights(40, 200)
    values, scales, _ = gptq.quantize_rows(weight, gptq.cholesky(x.T @ x))
    rounded = int8.quantize_rows(weight)
    ours = output_error(x, weight, values * scales[:, None])
    assert ours < 0.7 * output_error(x, weight, rounded.values * rounded.scales[:, None])


@pytest.mark.parametrize("width", [200, 201, 385])
def test_gptq_keeps_sums_of_pairs_and_still_beats_rounding(width: int) -> None:
    x, weight = inputs(600, width), weights(40, width)
    weight[:8] = np.abs(weight[:8])
    factor = gptq.cholesky(x.T @ x)
    values, scales, _ = gptq.quantize_rows(weight, factor, pairs=True)
    wide = values.astype(int)
    assert np.abs(wide[:, :-1:2] + wide[:, 1::2]).max() == int8.PAIR_SUM
    assert np.abs(wide).max() <= int8.QMAX
    rounded = int8.quantize_rows(weight, pairs=True)
    ours = output_error(x, weight, values * scales[:, None])
    assert ours < 0.85 * output_error(x, weight, rounded.values * rounded.scales[:, None])


def test_the_weight_is_not_changed() -> None:
    x, weight = inputs(100, 32), weights(8, 32)
    before = weight.copy()
    gptq.quantize_blocks(weight, gptq.cholesky(x.T @ x), 16)
    assert np.array_equal(weight, before)


def test_channels_that_never_fire_are_rounded_on_their_own() -> None:
    x, weight = inputs(100, 32), weights(8, 32)
    x[:, [3, 20]] = 0
    levels, scales, zeros, _ = gptq.quantize_blocks(weight, gptq.cholesky(x.T @ x), 16)
    restored = int4.dequantize(levels, scales, zeros).reshape(8, -1)
    step = np.repeat(scales, 16, axis=1)
    assert np.isfinite(restored).all()
    inside = np.abs(weight - restored) <= step * 0.5001
    assert inside[:, [3, 20]].mean() > 0.8  # the others may be clipped by the shrunk grid


def test_a_hessian_of_fewer_texts_than_channels_is_damped_until_it_works() -> None:
    x, weight = inputs(3, 64), weights(8, 64)
    restored = int4.dequantize(*gptq.quantize_blocks(weight, gptq.cholesky(x.T @ x), 32)[:3])
    assert np.isfinite(restored).all()


def test_a_hessian_of_zeros_gives_plain_rounding() -> None:
    weight = weights(8, 32)
    factor = gptq.cholesky(np.zeros((32, 32), np.float32))
    parts = int4.split_blocks(weight, 16)
    grid = int4.block_grid(parts)
    expected = int4.dequantize(int4.quantize(parts, *grid), *grid)
    assert int4.dequantize(*gptq.quantize_blocks(weight, factor, 16)[:3]) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(2, 2), (0, 1)])
def test_nan_or_infinity_in_the_hessian_is_an_error(bad: float, place: tuple[int, int]) -> None:
    hessian = np.eye(4, dtype=np.float32)
    hessian[place] = hessian[place[::-1]] = bad
    with pytest.raises(ArithmeticError):
        gptq.cholesky(hessian)


def test_what_pads_the_last_block_decodes_to_zero() -> None:
    x, weight = inputs(200, 40), weights(8, 40)
    levels, scales, zeros, _ = gptq.quantize_blocks(weight, gptq.cholesky(x.T @ x), 32)
    assert levels.shape == (8, 2, 32)
    assert not int4.dequantize(levels, scales, zeros)[:, 1, 8:].any()
