"""embedge's kernel for 4-bit matmuls: the integers of ONNX Runtime's, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedge.runtime.kernels.register import register
from embedge.runtime.kernels.repack import in_panels
from tests.helpers.kernel import LIBRARY, with_each_instruction_set
from tests.helpers.sessions import open_graph, session_options

Array = NDArray[Any]
DRAW = np.random.default_rng(2)
SHAPES = [  # depth, columns, block
    (64, 16, 32),
    (128, 48, 128),
    (300, 50, 32),
    (16, 1, 16),
    (576, 192, 64),
    (700, 300, 128),
    (1536, 576, 32),
]
PANELLED = [(576, 192, 64), (700, 304, 128), (1536, 576, 32)]


def operands(depth: int, columns: int, block: int, *, zero_points: bool = True) -> dict[str, Array]:
    draw = np.random.default_rng((depth, columns, block))
    blocks = -(-depth // block)
    values: dict[str, Array] = {
        "w": draw.integers(0, 256, (columns, blocks, block // 2), np.uint8),
        "scales": draw.uniform(0.001, 0.01, (columns, blocks)).astype(np.float32),
    }
    if zero_points:
        values["zeros"] = draw.integers(0, 256, (columns, (blocks + 1) // 2), np.uint8)
    return values


def open_session(
    values: dict[str, Array],
    depth: int,
    block: int,
    *,
    own: bool = True,
    panels: bool = False,
    threads: int = 1,
    constant: bool = True,
    **attributes: int,
) -> Any:
    columns = len(values["scales"])
    known: dict[str, Any] = {
        "K": depth,
        "N": columns,
        "bits": 4,
        "block_size": block,
        "accuracy_level": 4,
    }
    node = helper.make_node(
        "MatMulNBits", ["a", *values], ["y"], domain="com.microsoft", **{**known, **attributes}
    )
    info = helper.make_tensor_value_info
    inputs = [info("a", TensorProto.FLOAT, None)]
    if not constant:
        inputs.append(info("w", TensorProto.UINT8, values["w"].shape))
    tensors = [
        numpy_helper.from_array(value, name)
        for name, value in values.items()
        if name and (constant or name != "w")
    ]
    output = info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "product", inputs, [output], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = session_options(own=own, threads=threads)
    if own:
        assert LIBRARY is not None
        register(options, LIBRARY, panels=panels)
    return open_graph(model, options)


def run(session: Any, a: Array) -> Array:
    return np.asarray(session.run(None, {"a": a})[0])


def rows_of(rows: int, depth: int) -> NDArray[np.float32]:
    draw = np.random.default_rng((rows, depth))
    a = draw.standard_normal((rows, depth)) * 10.0 ** draw.integers(-2, 3, (rows, 1))
    a[:, ::97] *= 50
    return a.astype(np.float32)


def exact(values: dict[str, Array], a: Array, block: int) -> Array:
    """The definition in float64, with rows quantized block by block."""
    weight, scales = values["w"], values["scales"]
    columns, blocks = scales.shape
    depth = a.shape[-1]
    levels = np.stack([weight & 15, weight >> 4], -1).reshape(columns, blocks, block).astype(float)
    zeros = np.full((columns, blocks), 8.0)
    if "zeros" in values:
        pairs = values["zeros"]
        zeros = (
            np.stack([pairs & 15, pairs >> 4], -1).reshape(columns, -1)[:, :blocks].astype(float)
        )
    matrix = ((levels - zeros[:, :, None]) * scales[:, :, None]).reshape(columns, -1)
    padded = np.zeros((len(a), blocks * block))
    padded[:, :depth] = a
    parts = padded.reshape(len(a), blocks, block)
    step = np.abs(parts).max(-1, keepdims=True) / 127
    quantized = np.rint(parts / np.where(step > 0, step, 1)) * step
    return np.asarray(quantized.reshape(len(a), -1) @ matrix.T)


@with_each_instruction_set
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize(("depth", "columns", "block"), SHAPES)
def test_matmuls_are_those_of_onnx_runtime_but_for_the_order_of_their_sums(
    depth: int, columns: int, block: int, zero_points: bool
) -> None:
    values = operands(depth, columns, block, zero_points=zero_points)
    theirs = open_session(values, depth, block, own=False)
    for threads in (1, 2):
        own = open_session(values, depth, block, threads=threads)
        for rows in (1, 2, 7, 8, 9, 16, 40, 130):
            a = rows_of(rows, depth)
            found, expected = run(own, a), run(theirs, a)
            terms = np.abs(a).sum(1, keepdims=True) * 0.15  # at most, before they cancel
            assert found.shape == expected.shape
            assert (np.abs(found - expected) < 1e-6 * terms).all()


@with_each_instruction_set
@pytest.mark.parametrize(("depth", "columns", "block"), SHAPES)
def test_matmuls_are_the_definitions(depth: int, columns: int, block: int) -> None:
    values = operands(depth, columns, block)
    a = rows_of(21, depth)
    found, expected = run(open_session(values, depth, block), a), exact(values, a, block)
    # a value on the edge between two steps may be rounded to either
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error < 1e-3).all()
    assert np.median(error) < 3e-6


@with_each_instruction_set
@pytest.mark.parametrize(("depth", "columns", "block"), [(576, 192, 64), (300, 50, 32)])
def test_a_row_has_the_same_bits_in_any_batch(depth: int, columns: int, block: int) -> None:
    session = open_session(operands(depth, columns, block), depth, block, threads=2)
    a = rows_of(150, depth)
    together = run(session, a)
    for rows in ([0], [3, 149], range(7), range(20, 41), range(150)[::-1]):
        assert np.array_equal(run(session, a[list(rows)]), together[list(rows)])


@with_each_instruction_set
@pytest.mark.parametrize(("depth", "columns", "block"), PANELLED)
def test_weights_in_panels_give_the_same_matmuls(depth: int, columns: int, block: int) -> None:
    values = operands(depth, columns, block)
    laid_out = {**values, "w": in_panels(values["w"])}
    assert laid_out["w"] is not values["w"]
    a = rows_of(21, depth)
    expected = run(open_session(values, depth, block), a)
    assert np.array_equal(run(open_session(laid_out, depth, block, panels=True), a), expected)


@with_each_instruction_set
@pytest.mark.parametrize(("depth", "columns", "block"), [(64, 16, 32), (700, 300, 128)])
def test_weights_that_fill_no_panels_are_left(depth: int, columns: int, block: int) -> None:
    values = operands(depth, columns, block)
    assert in_panels(values["w"]) is values["w"]
    a = rows_of(5, depth)
    expected = run(open_session(values, depth, block), a)
    assert np.array_equal(run(open_session(values, depth, block, panels=True), a), expected)


def test_the_layout_of_panels() -> None:
    columns, blocks, block = 32, 3, 128
    weight = DRAW.integers(0, 256, (columns, blocks, block // 2), np.uint8)
    panels = in_panels(weight)
    assert (panels.shape, panels.dtype) == (weight.shape, weight.dtype)
    lines = panels.reshape(columns // 16, blocks * block // 8, 16, 4)

    def value(column: int, depth: int) -> int:
        byte = int(weight.reshape(columns, -1)[column, depth // 2])
        return byte >> 4 if depth % 2 else byte & 15

    for column in range(columns):
        for depth in range(blocks * block):
            byte = int(lines[column // 16, depth // 8, column % 16, depth % 4])
            found = byte >> 4 if depth % 8 >= 4 else byte & 15
            assert found == value(column, depth)


@with_each_instruction_set
def test_rows_of_zeros_no_rows_and_more_dimensions() -> None:
    values = operands(64, 16, 32)
    session = open_session(values, 64, 32)
    a = rows_of(6, 64)
    a[2] = 0
    found = run(session, a)
    assert (found[2] == 0).all()
    assert np.array_equal(run(session, a.reshape(2, 3, 64)), found.reshape(2, 3, 16))
    assert run(session, a[:0]).shape == (0, 16)


@with_each_instruction_set
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_value_that_is_not_finite_stays_so_in_its_row_alone(broken: float) -> None:
    session = open_session(operands(64, 16, 32), 64, 32)
    a = rows_of(3, 64)
    a[1, 40] = broken
    assert np.isfinite(run(session, a)).all(1).tolist() == [True, False, True]


@with_each_instruction_set
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy_level": 0}, "expected 4 bits, accuracy level 4"),
        ({"N": 15}, "constants of their sizes"),
        ({"constant": False}, "constants of their sizes"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_session(operands(64, 16, 32), 64, 32, **options)


@with_each_instruction_set
def test_a_bias_is_added_as_onnx_runtime_fuses_it() -> None:
    values = operands(64, 50, 32)
    a, bias = rows_of(9, 64), DRAW.standard_normal(50).astype(np.float32)
    expected = run(open_session(values, 64, 32), a) + bias
    fused = {**values, "": np.empty(0, np.float32), "bias": bias}
    assert np.array_equal(run(open_session(fused, 64, 32), a), expected)


@with_each_instruction_set
def test_another_depth_is_refused() -> None:
    with pytest.raises(Exception, match="rows and weight differ in depth"):
        run(open_session(operands(64, 16, 32), 64, 32), rows_of(2, 32))
