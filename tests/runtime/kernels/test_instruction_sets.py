"""Instruction sets of embedge's kernels: what each of them computes is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.runtime.host.processor import instruction_sets
from embedge.runtime.kernels.register import uses_bfloat16
from tests.helpers.kernel import LIBRARY, SETS, needs_kernel, using
from tests.runtime.kernels import test_attention, test_matmul_int4

Array = NDArray[Any]
pytestmark = needs_kernel


def with_all_sets(run: Callable[[], Array]) -> list[Array]:
    found = []
    for name in SETS:
        with using(name):
            found.append(run())
    return found


def same_bits(run: Callable[[], Array]) -> bool:
    first, *others = with_all_sets(run)
    return all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("tokens", [1, 5, 33, 97, 300])
@pytest.mark.parametrize(("heads", "size", "window"), [((4, 2), 24, -1), ((3, 3), 33, 7)])
def test_attention_in_float32(tokens: int, heads: tuple[int, int], size: int, window: int) -> None:
    operands = test_attention.drawn(2, tokens, heads, size)
    assert same_bits(
        lambda: test_attention.run(test_attention.open_session("float32", heads, window), operands)
    )


@pytest.mark.parametrize("block", [16, 32])
def test_matmuls_of_4_bits(block: int) -> None:
    values = test_matmul_int4.operands(300, 50, block)
    a = test_matmul_int4.rows_of(21, 300)
    assert same_bits(
        lambda: test_matmul_int4.run(test_matmul_int4.open_session(values, 300, block), a)
    )


@pytest.mark.parametrize("block", [64, 128])
def test_larger_blocks_are_added_in_parts_with_avx2_alone(block: int) -> None:
    values = test_matmul_int4.operands(300, 50, block)
    a = test_matmul_int4.rows_of(21, 300)
    found = dict(
        zip(
            SETS,
            with_all_sets(
                lambda: test_matmul_int4.run(test_matmul_int4.open_session(values, 300, block), a)
            ),
            strict=True,
        )
    )
    avx2 = found.pop("avx2")
    for other in found.values():
        assert np.array_equal(other, next(iter(found.values())))
        assert np.abs(avx2 - other).max() < 1e-5 * np.abs(other).max()


def test_one_set_alone_multiplies_bfloat16_where_the_processor_does() -> None:
    assert LIBRARY is not None
    for name in SETS:
        with using(name):
            has_it = name == "avx512-vnni" and "avx512_bf16" in instruction_sets()
            assert uses_bfloat16(LIBRARY) == has_it
