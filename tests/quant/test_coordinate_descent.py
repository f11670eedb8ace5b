"""Coordinate descent: closer than GPTQ, on the same grid, and the steps are those of the paper."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.quant import coordinate_descent, gptq, int4, int8

Floats = NDArray[np.float32]
OUT, IN = 24, 300  # more columns than a span of them, in blocks of which the last is short


@pytest.fixture(scope="module")
def hessian() -> Floats:
    rng = np.random.default_rng(0)
    mix = rng.normal(0, 1, (IN, IN)) * np.exp(rng.normal(0, 1, IN))
    x = (rng.normal(0, 1, (900, IN)) @ mix).astype(np.float32)
    return x.T @ x


@pytest.fixture(scope="module")
def factor(hessian: Floats) -> Floats:
    return gptq.cholesky(hessian)  # damps it in place


@pytest.fixture(scope="module")
def weight() -> Floats:
    return np.random.default_rng(1).normal(0, 1, (OUT, IN)).astype(np.float32)


def energy(lost: NDArray[np.floating], hessian: Floats) -> float:
    exact = lost.astype(np.float64)
    return float(np.sum((exact @ hessian) * exact))


def restored(values: NDArray[np.uint8], scales: Floats, zeros: NDArray[np.uint8]) -> Floats:
    return int4.dequantize(values, scales, zeros).reshape(len(values), -1)[:, :IN]


def test_4_bit_blocks_come_closer_with_each_sweep(
    weight: Floats, hessian: Floats, factor: Floats
) -> None:
    values, scales, zeros, before = gptq.quantize_blocks(weight, factor, 32)
    kept = values.copy(), scales.copy()
    losses = [before]
    for sweeps in (1, 2, 4):
        found, own, noise = coordinate_descent.refine_blocks(
            weight, factor, values, scales, zeros, sweeps=sweeps
        )
        lost = weight - restored(found, own, zeros)
        assert noise == pytest.approx(energy(lost, hessian), rel=1e-3)
        assert found.dtype == np.uint8
        assert found.max() <= int4.LEVELS
        pads = found.reshape(OUT, -1)[:, IN:]
        assert np.array_equal(pads, np.repeat(zeros[:, -1:], pads.shape[1], axis=1))
        losses.append(noise)
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.97 * losses[0]
    assert np.array_equal(kept[0], values)
    assert np.array_equal(kept[1], scales)


@pytest.mark.parametrize("pairs", [False, True])
def test_int8_rows_come_closer_within_their_bounds(
    pairs: bool, weight: Floats, hessian: Floats, factor: Floats
) -> None:
    values, scales, before = gptq.quantize_rows(weight, factor, pairs=pairs)
    found, noise = coordinate_descent.refine_rows(
        weight, factor, values, scales, sweeps=2, pairs=pairs
    )
    assert noise == pytest.approx(energy(weight - found * scales[:, None], hessian), rel=1e-3)
    assert noise < 0.98 * before
    assert np.abs(found.astype(int)).max() <= int8.QMAX
    sums = np.abs(found.astype(int).reshape(OUT, -1, 2).sum(axis=2)).max()
    assert (sums <= int8.PAIR_SUM) == pairs


def test_a_sweep_is_that_of_the_paper(weight: Floats, hessian: Floats, factor: Floats) -> None:
    """QuantEase, algorithm 1, column by column in float64."""
    values, scales, _ = gptq.quantize_rows(weight, factor)
    found, _ = coordinate_descent.refine_rows(weight, factor, values, scales, sweeps=1)
    levels, H, step = values.astype(np.float64), hessian.astype(np.float64), scales[:, None]
    for j in range(IN):
        others = levels.copy()
        others[:, j] = 0
        beside = (weight - others * step) @ H[:, j] / H[j, j]
        levels[:, j] = np.clip(np.rint(beside / scales), -int8.QMAX, int8.QMAX)
    differing = (levels != found).mean()
    assert differing < 0.002, differing  # ties that float32 breaks otherwise
    assert (values != found).mean() > 0.02


def test_nothing_is_done_to_what_is_exact(factor: Floats) -> None:
    zeros = np.full((OUT, -(-IN // 32)), 8, np.uint8)
    scales = np.full(zeros.shape, 0.5, np.float32)
    values = np.random.default_rng(2).integers(0, 16, (*zeros.shape, 32)).astype(np.uint8)
    values.reshape(OUT, -1)[:, IN:] = 8
    exact = restored(values, scales, zeros)
    found, own, noise = coordinate_descent.refine_blocks(
        exact, factor, values, scales, zeros, sweeps=2
    )
    assert np.array_equal(found, values)
    np.testing.assert_allclose(own, scales, rtol=1e-6)
    assert noise == 0


def test_a_block_of_zeros_keeps_its_scale(factor: Floats) -> None:
    weight = np.zeros((OUT, IN), np.float32)
    values, scales, zeros, _ = gptq.quantize_blocks(weight, factor, 32)
    found, own, noise = coordinate_descent.refine_blocks(
        weight, factor, values, scales, zeros, sweeps=1
    )
    assert np.array_equal(found, values)
    assert np.array_equal(own, scales)
    assert noise == 0
