"""Tiny graphs with the inputs of a bundle with images, and what they give, in NumPy.

The vision graph lays patches out by window and back, and projects the mean of each feature's
patches; the task's graph puts features at their places, adds a sum of the three positions and
averages over the pooled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedge.runtime.bundle.manifest import ImageSettings
from embedge.runtime.images.layout import image_layout
from embedge.runtime.images.load import load_image
from embedge.runtime.images.patches import ImageProcessor

Floats = NDArray[np.float32]

HIDDEN, MULTI_DIM = 8, 4
PATCH_VALUES = 3 * 2 * 2 * 2
AXES = np.array([0.01, 0.02, 0.05], np.float32)  # weights of the three positions
TINY = ImageSettings(
    patch_size=2,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=16,
    max_pixels=800,  # at most 50 features
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.2, 0.3, 0.4),
    rescale_factor=1 / 255,
    resample=3,
    window_size=8,
    rotary_dim=4,
    rotary_theta=10000.0,
    hidden_size=HIDDEN,
    before_ids=(2, 10, 11, 12),
    image_token_id=13,
    after_ids=(14, 15, 3),
    pooled_before=1,
    pooled_after=1,
)
AROUND = len(TINY.before_ids) + len(TINY.after_ids)


def write_vision(path: Path, projection: Floats) -> None:
    """Writes the vision graph; ``projection`` is float32 ``[PATCH_VALUES, HIDDEN]``."""
    constants = {
        "projection": projection,
        "quarter": np.full(PATCH_VALUES, 0.25, np.float32),
        "axes": np.array([0, 1, 2], np.int64),
        "flat": np.array([-1, PATCH_VALUES], np.int64),
        "grouped": np.array([-1, 4, PATCH_VALUES], np.int64),
        "one": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
        "rest": np.array([-1, HIDDEN], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Reshape", ["pixel_values", "flat"], ["patches"]),
        node("Gather", ["patches", "window_index"], ["windows"]),
        node("Reshape", ["windows", "flat"], ["laid"]),
        node("Gather", ["laid", "window_restore"], ["back"]),
        node("Reshape", ["back", "grouped"], ["groups"]),
        node("ReduceSum", ["groups", "one"], ["sums"], keepdims=0),
        node("Mul", ["sums", "quarter"], ["means"]),
        node("MatMul", ["means", "projection"], ["projected"]),
        # Factors of one, if the windows hold each patch once and the angles are angles.
        node("ReduceSum", ["window_lengths", "zero"], ["held"], keepdims=0),
        node("Shape", ["window_restore"], ["all"]),
        node("Cast", ["held"], ["held_f"], to=TensorProto.FLOAT),
        node("Cast", ["all"], ["all_f"], to=TensorProto.FLOAT),
        node("Div", ["held_f", "all_f"], ["covered"]),
        node("Mul", ["rotary_cos", "rotary_cos"], ["cos2"]),
        node("Mul", ["rotary_sin", "rotary_sin"], ["sin2"]),
        node("Add", ["cos2", "sin2"], ["unit"]),
        node("ReduceMax", ["unit", "axes"], ["turned"], keepdims=0),
        node("Mul", ["covered", "turned"], ["factor"]),
        node("Mul", ["projected", "factor"], ["scaled"]),
        node("Shape", ["pixel_values"], ["shape"]),
        node("Slice", ["shape", "zero", "one", "zero"], ["images"]),
        node("Concat", ["images", "rest"], ["by_image"], axis=0),
        node("Reshape", ["scaled", "by_image"], ["image_features"]),
    ]
    info, f, i = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        info("pixel_values", f, ["images", "patches", PATCH_VALUES]),
        info("rotary_cos", f, ["images", "patches", 4]),
        info("rotary_sin", f, ["images", "patches", 4]),
        info("window_index", i, ["windows", "window_patches"]),
        info("window_lengths", i, ["windows"]),
        info("window_restore", i, ["all_patches"]),
    ]
    outputs = [info("image_features", f, ["images", "features", HIDDEN])]
    _write(path, nodes, inputs, outputs, constants)


def write_task(path: Path, table: Floats, matrix: Floats) -> None:
    """Writes a task's graph with both outputs."""
    constants = {
        "table": table,
        "matrix": matrix,
        "axes": AXES.reshape(3, 1, 1),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
        "multi": np.array([MULTI_DIM], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["embedded"]),
        node("ScatterND", ["embedded", "image_positions", "image_features"], ["placed"]),
        node("Cast", ["position_ids"], ["positions"], to=TensorProto.FLOAT),
        node("Mul", ["positions", "axes"], ["weighted"]),
        node("ReduceSum", ["weighted", "zero"], ["position"], keepdims=0),
        node("Unsqueeze", ["position", "last"], ["position3"]),
        node("Add", ["placed", "position3"], ["inputs"]),
        node("MatMul", ["inputs", "matrix"], ["states"]),
        node("Cast", ["pool_mask"], ["pool"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["pool", "last"], ["pool3"]),
        node("Mul", ["states", "pool3"], ["taken"]),
        node("ReduceSum", ["taken", "one"], ["sum"], keepdims=0),
        node("ReduceSum", ["pool", "one"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["pooled"]),
        node("ReduceL2", ["pooled", "last"], ["length"], keepdims=1),
        node("Div", ["pooled", "length"], ["embedding"]),
        node("Slice", ["states", "zero", "multi", "last"], ["first"]),
        node("ReduceL2", ["first", "last"], ["lengths"], keepdims=1),
        node("Div", ["first", "lengths"], ["unit"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "last"], ["mask3"]),
        node("Mul", ["unit", "mask3"], ["token_embeddings"]),
    ]
    info, f, i = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        info("input_ids", i, ["batch", "tokens"]),
        info("attention_mask", i, ["batch", "tokens"]),
        info("position_ids", i, [3, "batch", "tokens"]),
        info("pool_mask", i, ["batch", "tokens"]),
        info("image_features", f, ["image_tokens", HIDDEN]),
        info("image_positions", i, ["image_tokens", 2]),
    ]
    outputs = [
        info("embedding", f, ["batch", HIDDEN]),
        info("token_embeddings", f, ["batch", "tokens", MULTI_DIM]),
    ]
    _write(path, nodes, inputs, outputs, constants)


def _write(path: Path, nodes: Any, inputs: Any, outputs: Any, constants: dict[str, Any]) -> None:
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def of_text(table: Floats, matrix: Floats, ids: Sequence[int]) -> tuple[Floats, Floats]:
    """The vector and the multi-vectors of some token ids."""
    positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids)))
    return _results(table[list(ids)], matrix, positions, np.ones(len(ids), np.bool_))


def of_image(
    table: Floats, matrix: Floats, projection: Floats, image: Any, **pixels: Any
) -> tuple[Floats, Floats]:
    """The vector and the multi-vectors of an image."""
    patches = ImageProcessor(TINY)(load_image(image, "image"), **pixels)
    row = image_layout(patches.grid, TINY)
    inputs = table[row.ids]
    inputs[row.features] = patches.values.reshape(-1, 4, PATCH_VALUES).mean(axis=1) @ projection
    return _results(inputs, matrix, row.positions, row.pooled)


def _results(
    inputs: Floats, matrix: Floats, positions: Any, pooled: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    states = (inputs + (AXES @ positions)[:, None]) @ matrix
    vector = states[pooled].mean(axis=0)
    rows = states[:, :MULTI_DIM]
    return (
        (vector / np.linalg.norm(vector)).astype(np.float32),
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32),
    )
