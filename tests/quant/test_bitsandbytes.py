"""bitsandbytes' numbers to the bit: its own where it is installed, numbers that it gave where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.quant import bitsandbytes as quant

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
# One bit of sign, two of exponent, one of mantissa, over the largest.
FP4 = [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
KINDS = ("nf4", "fp4")


def wave(rows: int, columns: int) -> NDArray[np.float32]:
    """Numbers that every platform computes alike: whole ones over a power of two, of uneven rows."""
    number = np.arange(rows * columns, dtype=np.int64)
    values = (number * 7919 + number * number * 31) % 2003 - 1001
    scale = 1 + (number // columns) % 5
    return (values * scale / 1024).astype(np.float32).reshape(rows, columns)


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)


def test_fractions_are_the_papers() -> None:
    assert np.array_equal(quant.CODES["nf4"], np.array(NF4.split(), np.float32))
    assert np.array_equal(quant.CODES["fp4"], np.array(FP4, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_becomes_the_nearest_fraction_of_its_blocks_maximum(kind: str) -> None:
    weight, table = wave(7, 50).reshape(-1), quant.CODES[kind].astype(np.float64)
    codes, absmax = quant.quantize(weight, quant.CODES[kind], 64)
    assert absmax.shape == (6,) and codes.dtype == np.uint8
    for number, value in enumerate(weight.astype(np.float64)):
        block = np.abs(weight[number // 64 * 64 :][:64]).max()
        distance = np.abs(table - value / block)
        assert absmax[number // 64] == block
        assert distance[codes[number]] <= distance.min() + 1e-7


def test_blocks_of_zeros_stay_zeros() -> None:
    codes, absmax = quant.quantize(np.zeros(70, np.float32), quant.CODES["nf4"], 64)
    assert not quant.dequantize(codes, absmax, quant.CODES["nf4"], 64).any()
    assert not quant.dequantize_int8(*quant.int8_rows(np.zeros((3, 5), np.float32))).any()


@pytest.mark.parametrize(
    ("first", "last"), [(0, 0), (0, 350), (1, 2), (63, 65), (64, 128), (65, 350), (130, 191)]
)
def test_a_part_is_that_of_the_whole(first: int, last: int) -> None:
    weight, table = wave(7, 50).reshape(-1), quant.CODES["nf4"]
    codes, absmax = quant.quantize(weight, table, 64)
    packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)
    part = quant.unpack(packed, first, last)
    whole = quant.dequantize(codes, absmax, table, 64)
    assert np.array_equal(part, codes[first:last])
    assert np.array_equal(quant.dequantize(part, absmax, table, 64, first), whole[first:last])


def test_rounding_to_16_bits_is_numpys_and_ml_dtypes() -> None:
    import ml_dtypes

    values = np.random.default_rng(0).integers(0, 1 << 32, 20000, np.uint32).view(np.float32)
    values = np.append(
        values[np.isfinite(values)], np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38], np.float32)
    )
    with np.errstate(over="ignore"):
        bfloat16, float16 = values.astype(ml_dtypes.bfloat16), values.astype(np.float16)
    assert np.array_equal(bits(quant.to_bfloat16(values)), bits(bfloat16.astype(np.float32)))
    assert np.array_equal(bits(quant.to_float16(values)), bits(float16.astype(np.float32)))


def test_double_quantization_keeps_maxima_within_a_step_of_8_bits() -> None:
    absmax = np.abs(wave(30, 40)).reshape(-1) + 1
    restored = quant.double_quantized(absmax)
    step = np.diff(quant.dynamic_map()).max() / 2
    centred = absmax - absmax.mean()
    largest = np.repeat([np.abs(centred[i : i + 256]).max() for i in range(0, 1200, 256)], 256)
    assert (np.abs(restored - absmax) <= step * largest[:1200] + 1e-5).all()
    assert np.abs(restored - absmax).max() > 1e-4  # it is quantized


def test_numbers_are_those_that_bitsandbytes_gave() -> None:
    """What bitsandbytes 0.50.2 gave on a CPU, where it is not installed."""
    weight = wave(3, 50)
    for kind, (packed, maxima, total) in RECORDED.items():
        codes, absmax = quant.quantize(weight.reshape(-1), quant.CODES[kind], 64)
        assert (codes[::2] << 4 | codes[1::2]).tobytes().hex() == packed
        assert absmax.tobytes().hex() == maxima
        restored = quant.dequantize(codes, absmax, quant.CODES[kind], 64)
        assert int(bits(restored).sum(dtype=np.uint64)) == total


# By type: codes, two a byte, and float32 maxima, little-endian, both as hexadecimals; the sum of the float32's bits.
_MAXIMA = "0080f33f0030344000e02640"
RECORDED = {
    "nf4": (
        "2cc233569b35926b494a4b73b742b9765555678ac359c4826c4e60a2fa41fda76555678bd248d38d5c4b4d72b63db854322211359df27e18"
        "f4e4e50b3fc620eca9878acef039e17e2b1a1c",
        _MAXIMA,
        305358164007,
    ),
    "fp4": (
        "d55ddcf964de6de4f6c7f49c41fd4619eeeee9675ce65f6d94f2eb7d37fa3571eeeee9645df65d12f4c4f59d49d241ecddddaade653d12a1"
        "3f2c2eb4d34eab25761167423bc62a92d4b7a4",
        _MAXIMA,
        326002413592,
    ),
}


@pytest.fixture(scope="module")
def bitsandbytes() -> Iterator[Any]:
    pytest.importorskip("bitsandbytes")
    import torch._dynamo

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes import functional
    with torch._dynamo.config.patch(disable=True):  # compiling takes longer than all else
        yield functional


# Rows of whole blocks, of parts of blocks, an odd number of values.
SHAPES = [(96, 384), (64, 40), (7, 50), (33, 65)]


def _quantized(functional: Any, weight: Any, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return functional.quantize_4bit(weight, **options)
    except RuntimeError:
        assert weight.numel() % 2  # before 0.50 no odd numbers of values
        pytest.skip("this bitsandbytes packs no odd number of values")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_restored_is_bitsandbytes_to_the_bit(
    kind: str, dtype: str, shape: tuple[int, int], bitsandbytes: Any
) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    weight = weight.to(getattr(torch, dtype))
    for block_size in (32, 64, 128):
        for double in (False, True):
            options = {"compress_statistics": double, "quant_type": kind, "blocksize": block_size}
            packed, state = _quantized(bitsandbytes, weight, **options)
            absmax = state.absmax.numpy()
            if double:
                nested, code = state.state2.absmax.numpy(), state.state2.code.numpy()
                absmax = quant.dequantize(absmax, nested, code, quant.NESTED_BLOCK)
                absmax = absmax + np.float32(state.offset.item())
            codes = quant.unpack(packed.numpy().reshape(-1), 0, weight.numel())
            values = quant.dequantize(codes, absmax, quant.CODES[kind], block_size)
            restored = quant.ROUND[dtype](values).reshape(shape)
            expected = _dequantized(bitsandbytes, packed, state).float().numpy()
            # fp4 has two zeros, and which of bitsandbytes' kernels keeps the sign goes by the processor
            assert np.array_equal(bits(restored + np.float32(0)), bits(expected + np.float32(0)))


def _dequantized(functional: Any, packed: Any, state: Any) -> Any:
    """By bitsandbytes' kernel; where rows hold no whole blocks by its operators of torch.

    Its AVX-512 kernel takes other blocks' maxima for rows of a multiple of 16 that are none of the block's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        columns = state.shape[-1]
        if columns % 16 or columns % state.blocksize == 0:
            return functional.dequantize_4bit(packed, state)
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        codes = torch_codes(packed)[: state.shape.numel()]
        table = functional.get_4bit_type(state.quant_type, device="cpu")
        scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
        return (table[codes.long()] * scales).reshape(state.shape).to(state.dtype)


def torch_codes(packed: Any) -> Any:
    import torch

    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).reshape(-1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_codes_and_maxima_are_bitsandbytes(
    kind: str, dtype: str, shape: tuple[int, int], bitsandbytes: Any
) -> None:
    from importlib.metadata import version

    import torch

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    # Before 0.50 its CPU code takes the last block in 16 bits, and the first of two fractions as near.
    older = tuple(map(int, version("bitsandbytes").split(".")[:2])) < (0, 50)
    for block_size in (32, 64, 2048):
        packed, state = _quantized(bitsandbytes, weight, quant_type=kind, blocksize=block_size)
        values = weight.float().numpy().reshape(-1)
        codes, absmax = quant.quantize(values, quant.CODES[kind], block_size)
        expected = quant.unpack(packed.numpy().reshape(-1), 0, values.size)
        assert np.array_equal(bits(absmax), bits(state.absmax.numpy()))
        differ = np.count_nonzero(quant.CODES[kind][codes] != quant.CODES[kind][expected])
        assert differ <= (0.01 * values.size if older else 0)


@pytest.mark.slow
def test_llm_int8_is_bitsandbytes(bitsandbytes: Any) -> None:
    import torch

    weight = torch.randn((192, 384), generator=torch.Generator().manual_seed(2))
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(weight.half())
    rows, absmax = quant.int8_rows(weight.numpy())
    restored = bitsandbytes.int8_vectorwise_dequant(codes, scales).numpy()
    assert np.array_equal(rows, codes.numpy()) and np.array_equal(absmax, scales.numpy())
    assert np.array_equal(bits(quant.dequantize_int8(rows, absmax)), bits(restored))


@pytest.mark.slow
def test_double_quantization_is_bitsandbytes_but_for_the_mean_and_near_ties(
    bitsandbytes: Any,
) -> None:
    import torch

    assert np.array_equal(quant.dynamic_map(), bitsandbytes.create_dynamic_map().numpy())
    weight = torch.randn((384, 384), generator=torch.Generator().manual_seed(3))
    _, state = _quantized(bitsandbytes, weight, quant_type="nf4", compress_statistics=True)
    offset = np.float32(state.offset.item())
    nested, code = state.state2.absmax.numpy(), state.state2.code.numpy()
    expected = quant.dequantize(state.absmax.numpy(), nested, code, quant.NESTED_BLOCK) + offset
    _, plain = quant.quantize(weight.numpy().reshape(-1), quant.CODES["nf4"], 64)
    found = quant.double_quantized(plain)
    assert abs(offset - plain.mean(dtype=np.float64)) <= 4 * np.spacing(offset)
    assert np.count_nonzero(np.abs(found - expected) > 1e-5) <= 0.02 * found.size
    assert np.abs(found - expected).max() <= 0.05
