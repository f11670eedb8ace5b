"""A tiny bundle whose int8 graph is one per-row quantized product."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, DEPTH, COLUMNS = 40, 256, 128
CONSTANTS = {
    "embedge.act_step": {"dtype": "float32", "full": 1 / 127, "reduced": 1 / 63},
    "embedge.act_zero_point": {"dtype": "uint8", "full": 128, "reduced": 64},
}


def write_int8_bundle(tiny: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Gives a bundle an int8 graph of one per-row quantized product; its exact vectors.

    The text of word i is row i of a table, so that a vector is one row of the product.
    """
    generator = np.random.default_rng(11)
    # All of one sign: neighbouring products add up, which is what saturates.
    table = np.abs(generator.normal(size=(ROWS, DEPTH))).astype(np.float32)
    weight = generator.integers(-127, 128, size=(DEPTH, COLUMNS)).astype(np.int8)
    weight[:, ::2] = np.abs(weight[:, ::2])
    scales = np.full(COLUMNS, 0.01, np.float32)
    initializers: dict[str, np.ndarray[Any, Any]] = {
        "table": table,
        "weight": weight,
        "scales": scales,
        "one": np.array(1, np.float32),
        "last": np.array([-1], np.int64),
        "first": np.array(0, np.int64),
        "embedge.act_step": np.array(1 / 127, np.float32),
        "embedge.act_zero_point": np.array(128, np.uint8),
    }
    tensors = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Abs", ["x"], ["size"]),
        helper.make_node("ReduceMax", ["size", "last"], ["peak"], keepdims=1),
        helper.make_node("Mul", ["peak", "embedge.act_step"], ["scale"]),
        helper.make_node("Div", ["x", "scale"], ["steps"]),
        helper.make_node("QuantizeLinear", ["steps", "one", "embedge.act_zero_point"], ["q"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["q", "weight", "scale", "scales", "embedge.act_zero_point"],
            ["y"],
            domain="com.microsoft",
        ),
        helper.make_node("Gather", ["y", "first"], ["embedding"], axis=1),
        helper.make_node("Identity", ["attention_mask"], ["unused"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", COLUMNS]),
        helper.make_tensor_value_info("unused", TensorProto.INT64, ["batch", "tokens"]),
    ]
    graph = helper.make_graph(nodes, "int8", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    weights = tiny.path / "int8/retrieval.bin"
    weights.unlink()  # or what is saved would join it
    external = {"save_as_external_data": True, "location": weights.name, "size_threshold": 4096}
    onnx.save(model, tiny.path / "int8/retrieval.onnx", **external)

    def change(manifest: dict[str, Any]) -> None:
        manifest["model"].update(dim=COLUMNS, normalize=False)
        manifest["precisions"]["int8"]["activation_constants"] = CONSTANTS

    tiny.edit(change)
    exact: np.ndarray[Any, np.dtype[np.float32]] = table @ (weight * scales)
    return exact
