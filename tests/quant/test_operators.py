"""What the exported graphs rely on in ONNX Runtime's contrib operators, documented or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedge.quant import _int4, _int8, _tables

RNG = np.random.default_rng(0)


def run(
    op_type: str,
    names: str,
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    **attributes: Any,
) -> np.ndarray:
    """The output of one operator of com.microsoft.

    Args:
        op_type: the operator.
        names: its inputs in order.
        inputs: those that are given at run time.
        constants: the others.
        **attributes: the operator's.
    """
    node = helper.make_node(op_type, names.split(), ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "test",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, inputs)[0]
    return result


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("width", [64, 72, 200])
def test_matmulnbits_reads_values_scales_and_zero_points_as_we_pack_them(
    width: int, block_size: int
) -> None:
    weight = RNG.normal(0, 1, (24, width)).astype(np.float32)
    parts = _int4.split_blocks(weight, block_size)
    scales, zeros = _int4.block_grid(parts)
    values = _int4.quantize(parts, scales, zeros)
    restored = _int4.dequantize(values, scales, zeros).reshape(24, -1)[:, :width]
    x = RNG.normal(0, 1, (2, 5, width)).astype(np.float32)
    y = run(
        "MatMulNBits",
        "x b s z",
        {"x": x},
        {"b": _int4.pack_pairs(values), "s": scales, "z": _int4.pack_pairs(zeros)},
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
    block_size = _tables.block_size_for(width, bits)
    assert block_size is not None
    values, scales, zeros = _tables.quantize_table(table.__getitem__, table.shape, bits, block_size)
    blocks = values.reshape(11, -1, block_size).astype(np.float32)
    restored = ((blocks - zeros[..., None]) * scales[..., None]).reshape(11, width)
    stored = [_int4.pack_pairs(v) if bits == 4 else v for v in (values, zeros)]
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


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_matmulintegertofloat_takes_a_scale_per_row(rows: int) -> None:
    """Undocumented; int8 graphs are wrong without it."""
    weight = RNG.normal(0, 1, (48, 20)).astype(np.float32)
    quantized = _int8.quantize_rows(np.ascontiguousarray(weight.T))
    values, weight_scales = np.ascontiguousarray(quantized.values.T), quantized.scales
    x = RNG.integers(1, 255, (2, rows, 48)).astype(np.uint8)
    scale = np.exp(RNG.normal(0, 1, (2, rows, 1))).astype(np.float32)
    y = run(
        "MatMulIntegerToFloat",
        "x w sx sw zx",
        {"x": x, "sx": scale},
        {"w": values, "sw": weight_scales, "zx": np.array(128, np.uint8)},
    )
    centred = x.astype(np.float64) - 128
    expected = (centred @ values.astype(np.float64)) * scale * weight_scales
    assert y == pytest.approx(expected, rel=1e-5, abs=1e-3)
