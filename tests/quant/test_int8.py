"""int8 weights are within half a step; smoothing moves outliers and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.quant import int8

RNG = np.random.default_rng(0)


def test_every_weight_is_within_half_a_step_of_its_row() -> None:
    values = RNG.normal(0, 1, (70, 30)) * np.exp(RNG.normal(0, 3, (70, 1)))
    weight = values.astype(np.float32)
    result = int8.quantize_rows(weight)
    assert result.values.dtype == np.int8
    scales = result.scales[:, None]
    error = np.abs(result.values * scales - weight)
    assert error.max(axis=1) == pytest.approx(result.scales / 2, rel=0.2)
    assert (error <= scales * 0.5001).all()


@pytest.mark.parametrize("smoothed", [False, True])
def test_the_noise_is_that_of_the_weight_itself(smoothed: bool) -> None:
    weight = RNG.normal(0, 1, (70, 30)).astype(np.float32)
    smooth = np.exp(RNG.normal(0, 1, 30)).astype(np.float32) if smoothed else None
    result = int8.quantize_rows(weight, smooth)
    restored = result.values * result.scales[:, None]
    if smooth is not None:
        restored = restored / smooth
    noise = np.square(weight - restored, dtype=np.float64).sum()
    signal = np.square(weight, dtype=np.float64).sum()
    assert result.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)


def test_the_largest_weight_of_a_row_is_exact_at_127() -> None:
    weight = RNG.normal(0, 1, (9, 5)).astype(np.float32)
    result = int8.quantize_rows(weight)
    assert (np.abs(result.values.astype(int)).max(axis=1) == 127).all()
    assert result.scales == pytest.approx(np.abs(weight).max(axis=1) / 127)


def test_a_row_of_zeros_stays_zero_with_scale_1() -> None:
    result = int8.quantize_rows(np.zeros((4, 2), np.float32))
    assert not result.values.any()
    assert (result.scales == 1).all()
    assert result.sqnr_db == float("inf")


def test_the_steps_that_bound_memory_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = RNG.normal(0, 1, (50, 8)).astype(np.float32)
    whole = int8.quantize_rows(weight)
    monkeypatch.setattr(int8, "_CACHED_ELEMENTS", 24)
    assert np.array_equal(int8.quantize_rows(weight).values, whole.values)


def saturating_sum(left: NDArray[np.int64], weight: NDArray[np.int8]) -> NDArray[np.int64]:
    """``left @ weight.T`` as ``vpmaddubsw`` adds it: pairs of products in 16 bits, then in 32."""
    products = left[:, None, :] * weight[None].astype(np.int64)
    whole = products.shape[2] // 2 * 2
    pairs = products[:, :, :whole].reshape(*products.shape[:2], -1, 2).sum(axis=3)
    return np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(axis=2) + products[:, :, whole:].sum(
        axis=2
    )


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 129])
@pytest.mark.parametrize("smoothed", [False, True])
def test_products_of_bounded_pairs_fit_16_bits(columns: int, smoothed: bool) -> None:
    draw = np.random.default_rng(columns)
    weight = draw.normal(0, 1, (40, columns)).astype(np.float32)
    weight[:5] = np.abs(weight[:5])
    weight[5:9] = 1  # both of a pair as large as can be
    smooth = np.exp(draw.normal(0, 1, columns)).astype(np.float32) if smoothed else None
    result = int8.quantize_rows(weight, smooth, pairs=True)
    left = np.stack([np.full(columns, 255), draw.choice([0, 255], columns)])
    exact = left @ result.values.T.astype(np.int64)
    assert np.array_equal(saturating_sum(left, result.values), exact)
    scaled = weight if smooth is None else weight * smooth
    error = np.abs(result.values * result.scales[:, None] - scaled)
    assert (error <= result.scales[:, None] * 1.5001).all()  # a pair may take back a step
    assert np.abs(error).mean(axis=1) == pytest.approx(result.scales / 4, rel=1.1)
    if columns == 64:
        usual = int8.quantize_rows(weight, smooth)
        assert not np.array_equal(
            saturating_sum(left, usual.values), left @ usual.values.T.astype(int)
        )
        assert usual.sqnr_db - 4 < result.sqnr_db < usual.sqnr_db  # a bit less would be 6


def test_smoothing_is_the_formula_of_smoothquant() -> None:
    activation = np.array([1.0, 4.0, 2.0, 0.5], np.float32)
    weight = np.array([0.5, 0.5, 1.0, 0.25], np.float32)
    scales = int8.smoothing_scales(activation, weight, 0.5)
    expected = np.sqrt(activation / weight)
    assert scales == pytest.approx(expected / np.exp(np.log(expected).mean()))


def test_an_outlier_channel_is_divided_by_more_than_the_others() -> None:
    activation = np.array([1, 1, 100, 1], np.float32)
    scales = int8.smoothing_scales(activation, np.ones(4, np.float32), 0.7)
    assert scales[2] > 10 * scales[0]


def test_channels_that_never_fire_keep_1() -> None:
    activation = np.array([0, 3, 5], np.float32)
    assert int8.smoothing_scales(activation, np.ones(3, np.float32), 0.7)[0] == 1


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e30])
def test_smoothing_stays_finite_and_positive(weight: float) -> None:
    scales = int8.smoothing_scales(
        np.array([1e-9, 1e-3, 1e6], np.float32), np.full(3, weight, np.float32), 0.7
    )
    assert np.isfinite(scales).all()
    assert (scales > 0).all()


def test_decibels_by_hand() -> None:
    assert int8.decibels(100, 1) == pytest.approx(20)
    assert int8.decibels(3, 0) == float("inf")
    assert int8.decibels(0, 3) == float("-inf")
