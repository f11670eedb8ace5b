"""What the exported graphs rely on in ONNX Runtime's contrib operators, documented or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedge.quant import embedding_tables, int4, int8
from tests.helpers.sessions import EXACT_MODES, open_graph

RNG = np.random.default_rng(0)


def run(
    op_type: str,
    names: str,
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    *,
    domain: str = "com.microsoft",
    exact: bool = False,
    result: int = TensorProto.FLOAT,
    **attributes: Any,
) -> np.ndarray:
    """The output of one operator.

    Args:
        op_type: the operator.
        names: its inputs in order.
        inputs: those that are given at run time.
        constants: the others.
        domain: the operator's.
        exact: ask for exact integer products on any processor.
        result: ONNX element type of the output.
        **attributes: the operator's.
    """
    node = helper.make_node(op_type, names.split(), ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "test",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in inputs.items()
        ],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = open_graph(model, always_exact=exact)
    output: np.ndarray = session.run(None, inputs)[0]
    return output


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("width", [64, 72, 200])
def test_matmulnbits_reads_values_scales_and_zero_points_as_we_pack_them(
    width: int, block_size: int
) -> None:
    weight = RNG.normal(0, 1, (24, width)).astype(np.float32)
    parts = int4.split_blocks(weight, block_size)
    scales, zeros = int4.block_grid(parts)
    values = int4.quantize(parts, scales, zeros)
    restored = int4.dequantize(values, scales, zeros).reshape(24, -1)[:, :width]
    x = RNG.normal(0, 1, (2, 5, width)).astype(np.float32)
    y = run(
        "MatMulNBits",
        "x b s z",
        {"x": x},
        {"b": int4.pack_pairs(values), "s": scales, "z": int4.pack_pairs(zeros)},
        K=width,
        N=24,
        bits=4,
        block_size=block_size,
        accuracy_level=4,
    )
    expected = x @ restored.T
    assert np.abs(y - expected).max() < 0.02 * np.abs(expected).max()
    assert np.corrcoef(y.ravel(), expected.ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [32, 48, 128, 384])
def test_gatherblockquantized_reads_tables_as_we_pack_them(width: int, bits: int) -> None:
    table = RNG.normal(0, 1, (11, width)).astype(np.float32)
    block_size = embedding_tables.block_size_for(width, bits)
    assert block_size is not None
    values, scales, zeros = embedding_tables.quantize_table(
        table.__getitem__, table.shape, bits, block_size
    )
    blocks = values.reshape(11, -1, block_size).astype(np.float32)
    restored = ((blocks - zeros[..., None]) * scales[..., None]).reshape(11, width)
    stored = [int4.pack_pairs(v) if bits == 4 else v for v in (values, zeros)]
    ids = np.array([[0, 10, 3], [7, 7, 1]])
    y = run(
        "GatherBlockQuantized",
        "table ids s z",
        {"ids": ids},
        {"table": stored[0], "s": scales, "z": stored[1]},
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    assert y == pytest.approx(restored[ids], abs=1e-6)


@pytest.mark.parametrize("exact", EXACT_MODES)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_matmulintegertofloat_takes_a_scale_per_row(rows: int, exact: bool) -> None:
    """Undocumented; int8 graphs are wrong without it."""
    weight = RNG.normal(0, 1, (48, 20)).astype(np.float32)
    quantized = int8.quantize_rows(np.ascontiguousarray(weight.T))
    values, weight_scales = np.ascontiguousarray(quantized.values.T), quantized.scales
    x = RNG.integers(1, 255, (2, rows, 48)).astype(np.uint8)
    scale = np.exp(RNG.normal(0, 1, (2, rows, 1))).astype(np.float32)
    y = run(
        "MatMulIntegerToFloat",
        "x w sx sw zx",
        {"x": x, "sx": scale},
        {"w": values, "sw": weight_scales, "zx": np.array(128, np.uint8)},
        exact=exact,
    )
    centred = x.astype(np.float64) - 128
    expected = (centred @ values.astype(np.float64)) * scale * weight_scales
    assert y == pytest.approx(expected, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("exact", EXACT_MODES)
def test_matmulintegertofloat_without_a_zero_point_takes_values_from_zero_on(exact: bool) -> None:
    values = RNG.integers(-127, 128, (48, 20)).astype(np.int8)
    scales = np.exp(RNG.normal(0, 1, 20)).astype(np.float32)
    x = RNG.integers(0, 256, (2, 5, 48)).astype(np.uint8)
    x[0, 0] = 255
    scale = np.exp(RNG.normal(0, 1, (2, 5, 1))).astype(np.float32)
    y = run(
        "MatMulIntegerToFloat",
        "x w sx sw",
        {"x": x, "sx": scale},
        {"w": values, "sw": scales},
        exact=exact,
    )
    expected = (x.astype(np.float64) @ values.astype(np.float64)) * scale * scales
    assert y == pytest.approx(expected, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("width", [1, 7, 48, 200])
@pytest.mark.parametrize("zero_point", [0, 20, 128])
def test_a_block_of_quantizelinear_as_wide_as_the_row_is_a_scale_per_row(
    width: int, zero_point: int
) -> None:
    x = (RNG.normal(0, 1, (3, 5, width)) * np.exp(RNG.normal(0, 3, (3, 5, 1)))).astype(np.float32)
    x += np.float32(4) * np.abs(x).max(axis=-1, keepdims=True) if zero_point == 0 else 0
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scale = largest / np.float32(255 if zero_point == 0 else 254 / 2 - abs(128 - zero_point) / 10)
    zeros = {} if zero_point == 0 else {"z": np.full(scale.shape, zero_point, np.uint8)}
    q = run(
        "QuantizeLinear",
        "x s z" if zeros else "x s",
        {"x": x, "s": scale, **zeros},
        {},
        domain="",
        result=TensorProto.UINT8,
        axis=-1,
        block_size=width,
    )
    assert q.dtype == np.uint8 and q.shape == x.shape
    expected = np.clip(np.rint(x / scale) + zero_point, 0, 255)
    np.testing.assert_array_equal(q, expected)
