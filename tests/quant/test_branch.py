"""Branches: the best product of a rank, beside numpy's full SVD and Hessians' square roots; its rounding."""

from __future__ import annotations

import numpy as np
import pytest

from embedge.quant import branch, gptq
from tests.quant.test_gptq import inputs


def damped(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The damped Hessian of inputs, float64, and its factor."""
    hessian = x.T @ x
    R = gptq.cholesky(hessian)  # damps in place
    return hessian.astype(np.float64), R


def errors(rows: int, width: int, seed: int = 3) -> np.ndarray:
    """An adapter of rank 6 and noise, float32 ``[rows, width]``."""
    rng = np.random.default_rng(seed)
    product = rng.normal(0, 1, (rows, 6)) @ rng.normal(0, 1, (6, width))
    return (0.3 * product + rng.normal(0, 1, (rows, width))).astype(np.float32)


def cost(error: np.ndarray, hessian: np.ndarray) -> float:
    """``tr(E H Eᵀ)``."""
    return float(np.sum((error.astype(np.float64) @ hessian) * error))


def root(hessian: np.ndarray) -> np.ndarray:
    """The symmetric square root, another one than Cholesky's."""
    values, vectors = np.linalg.eigh(hessian)
    return np.asarray((vectors * np.sqrt(values)) @ vectors.T)


@pytest.mark.parametrize("shape", [(40, 64), (96, 32), (32, 32)])
def test_it_is_the_truncated_svd_of_what_the_outputs_see(shape: tuple[int, int]) -> None:
    hessian, R = damped(inputs(500, shape[1]))
    error = errors(*shape)
    half = root(hessian)
    u, s, v = np.linalg.svd(error.astype(np.float64) @ half)
    expected = (u[:, :16] * s[:16]) @ v[:16] @ np.linalg.inv(half)
    down, up = branch.fit(error, R, 16)
    assert down.shape == (shape[1], 16)
    assert up.shape == (16, shape[0])
    assert cost(error - (down @ up).T, hessian) == pytest.approx(np.square(s[16:]).sum(), rel=1e-3)
    assert cost((down @ up).T - expected, hessian) < 1e-6 * np.square(s).sum()


def test_without_a_factor_all_channels_count_alike() -> None:
    error = errors(48, 32)
    u, s, v = np.linalg.svd(error)
    down, up = branch.fit(error, None, 16)
    np.testing.assert_allclose((down @ up).T, (u[:, :16] * s[:16]) @ v[:16], atol=1e-4)


def test_no_other_branch_nearby_leaves_less() -> None:
    hessian, R = damped(inputs(500, 24))
    error = errors(32, 24)
    down, up = branch.fit(error, R, 16)
    least = cost(error - (down @ up).T, hessian)
    rng = np.random.default_rng(5)
    for size in (1e-1, 1e-2):
        for _ in range(50):
            other = (down + size * rng.normal(0, down.std(), down.shape)) @ (
                up + size * rng.normal(0, up.std(), up.shape)
            )
            assert cost(error - other.T, hessian) > least


def test_the_inputs_weigh_what_is_left() -> None:
    hessian, R = damped(inputs(500, 64))
    error = errors(48, 64)
    weighted, plain = (
        cost(error - np.matmul(*branch.fit(error, factor, 16)).T, hessian) for factor in (R, None)
    )
    assert weighted < 0.8 * plain


def test_what_exceeds_the_rank_of_the_error_is_zero() -> None:
    _, R = damped(inputs(500, 32))
    rng = np.random.default_rng(7)
    error = (rng.normal(0, 1, (80, 5)) @ rng.normal(0, 1, (5, 32))).astype(np.float32)
    for matrix in (error, error[:16], np.zeros_like(error)):
        down, up = branch.fit(matrix, R, 48)
        np.testing.assert_allclose((down @ up).T, matrix, atol=1e-3)
        assert down.shape[1] == up.shape[0] == 48
        empty = ~up.any(axis=1)
        assert empty.sum() >= 16
        assert not down[:, empty].any()
        restored = branch.quantize(down, up).restored()
        assert np.abs(restored - matrix).max() <= 0.1 * np.abs(matrix).max()


def test_a_wide_range_of_singular_values_keeps_its_digits() -> None:
    rng = np.random.default_rng(11)
    u, v = (np.linalg.qr(rng.normal(0, 1, (n, 32)))[0] for n in (64, 96))
    s = np.logspace(0, -5, 32)
    error = ((u * s) @ v.T).astype(np.float32)
    for matrix in (error, np.ascontiguousarray(error.T)):
        down, up = branch.fit(matrix, None, 16)
        assert np.linalg.norm((down @ up).T - matrix) == pytest.approx(
            np.linalg.norm(s[16:]), rel=0.02
        )


def test_values_that_are_not_finite_are_an_error() -> None:
    for value in (np.nan, np.inf):
        error = errors(32, 32)
        error[3, 4] = value
        with pytest.raises(ArithmeticError, match="NaN or infinity"):
            branch.fit(error, None, 16)


def test_a_branch_has_a_rank() -> None:
    with pytest.raises(ValueError, match="rank 0: expected at least 1"):
        branch.fit(errors(32, 32), None, 0)


def test_rounding_costs_little_beside_what_the_branch_leaves() -> None:
    hessian, R = damped(inputs(500, 64))
    error = errors(80, 64)
    down, up = branch.fit(error, R, 16)
    made = branch.quantize(down, up)
    assert made.down.dtype == made.up.dtype == np.int8
    assert max(np.abs(made.down).max(), np.abs(made.up).max()) == branch.QMAX
    assert made.down_scale.shape == (16,)
    assert made.up_scale.shape == (80,)
    left = cost(error - (down @ up).T, hessian)
    assert cost(error - made.restored(), hessian) < 1.02 * left


def test_panels_hold_four_rows_of_sixteen_columns() -> None:
    matrix = np.random.default_rng(0).integers(-63, 64, (12, 48)).astype(np.int8)
    panels = branch.panels_of(matrix)
    assert panels.shape == (3, 3, 16, 4)
    assert panels.flags.c_contiguous
    for depth, column in np.ndindex(matrix.shape):
        there = panels[column // 16, depth // 4, column % 16, depth % 4]
        assert there == matrix[depth, column]


@pytest.mark.parametrize("shape", [(6, 16), (8, 24)])
def test_other_shapes_have_no_panels(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected multiples of 4 and 16"):
        branch.panels_of(np.zeros(shape, np.int8))
