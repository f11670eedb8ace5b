"""Functions of low-rank branches: what numpy says, to the bit, on plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from embedge.export.graph.ops import CONTRIB, DOMAIN
from embedge.runtime.bundle.graph_check import check_graph
from embedge.runtime.errors import BundleError
from tests.export.graph.test_fused_ops import model, node, results

Array = NDArray[Any]
BRANCH = "branch_values branch_scale branch_zero_point up up_scale"
STEP = np.float32(1 / 127)
A_ZERO_POINT = 20  # of an int8 product's rows, as behind GELU
NAMES = {
    "": "MatMulIntegerToFloatBranch",
    "Add": "MatMulIntegerToFloatBranchAdd",
    "Sub": "MatMulIntegerToFloatBranchSub",
}


class Shape(NamedTuple):
    batch: int
    tokens: int
    depth: int
    rank: int
    columns: int


SHAPES = [Shape(1, 1, 4, 16, 16), Shape(2, 9, 132, 32, 48), Shape(3, 40, 256, 64, 144)]
ids = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
places = pytest.mark.parametrize("constant", [False, True], ids=["inputs", "initializers"])


def panels(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """``[depth, columns]`` as ``[columns / 16, depth / 4, 16, 4]``, value by value."""
    depth, columns = matrix.shape
    laid = np.empty((columns // 16, depth // 4, 16, 4), np.int8)
    for row, column in np.ndindex(depth, columns):
        laid[column // 16, row // 4, column % 16, row % 4] = matrix[row, column]
    return laid


def small(draw: np.random.Generator, *shape: int) -> NDArray[np.int8]:
    return draw.integers(-63, 64, shape, np.int8)


def scales(draw: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return draw.uniform(0.001, 2, shape).astype(np.float32)


def product(a: Array, b: Array, a_scale: Array, b_scale: Array, zero_point: int) -> Array:
    """Whole numbers, which float64 holds exactly; then the columns' scales, then the rows'."""
    whole = (a.astype(np.float64) - zero_point) @ b.astype(np.float64)
    return np.asarray(whole.astype(np.float32) * b_scale * a_scale)


def down_operands(shape: Shape, zero_point: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Rows, and the branch's first matrix."""
    draw = np.random.default_rng(shape)
    rows = {
        "values": draw.integers(0, 256, (shape.batch, shape.tokens, shape.depth), np.uint8),
        "scale": scales(draw, shape.batch, shape.tokens, 1),
        "zero_point": np.array(zero_point, np.uint8),
        "step": np.array(STEP),
        "zeros": np.full((shape.batch, shape.tokens, 1), 128, np.uint8),
    }
    return rows, {
        "down": small(draw, shape.depth, shape.rank),
        "down_scale": scales(draw, shape.rank),
    }


def up_operands(shape: Shape) -> tuple[dict[str, Array], dict[str, Array]]:
    """Rows of a branch, and its second matrix."""
    draw = np.random.default_rng(shape)
    rows = {
        "branch_values": draw.integers(0, 256, (shape.batch, shape.tokens, shape.rank), np.uint8),
        "branch_scale": scales(draw, shape.batch, shape.tokens, 1),
        "branch_zero_point": np.array(128, np.uint8),
    }
    return rows, {
        "up": small(draw, shape.rank, shape.columns),
        "up_scale": scales(draw, shape.columns),
    }


def branch_of(rows: dict[str, Array], matrix: dict[str, Array]) -> Array:
    values, scale, zero_point = rows.values()
    return product(values, matrix["up"], scale, matrix["up_scale"], int(zero_point))


def laid_out(matrix: dict[str, Array]) -> dict[str, Array]:
    return {name: panels(value) if value.ndim == 2 else value for name, value in matrix.items()}


def proto(
    nodes: list[onnx.NodeProto],
    rows: dict[str, Array],
    matrices: dict[str, Array],
    fixed: dict[str, Array],
    outputs: str,
    *,
    constant: bool,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model whose matrices of branches are initializers or inputs, and what it is fed."""
    fed = rows if constant else rows | matrices
    constants = fixed | matrices if constant else fixed
    return model(nodes, fed, constants, outputs.split()), fed


def int8_call(how: str) -> onnx.NodeProto:
    other = " other" if how else ""
    inputs = f"a w a_scale w_scale{other} a_zero_point {BRANCH}"
    return node(NAMES[how], inputs, "y", DOMAIN)


def int8_case(
    shape: Shape, how: str, *, constant: bool
) -> tuple[onnx.ModelProto, dict[str, Array], Array]:
    """A product with a branch: its model, what it is fed, and what numpy says."""
    rows, matrix = up_operands(shape)
    draw = np.random.default_rng((*shape, 1))
    leading = shape.batch, shape.tokens
    own = {
        "a": draw.integers(0, 256, (*leading, shape.depth), np.uint8),
        "a_scale": scales(draw, *leading, 1),
    }
    if how:
        own["other"] = scales(
            draw, *((shape.columns,) if how == "Add" else (*leading, shape.columns))
        )
    fixed: dict[str, Array] = {
        "w": draw.integers(-127, 128, (shape.depth, shape.columns), np.int8),
        "w_scale": scales(draw, shape.columns),
        "a_zero_point": np.array(A_ZERO_POINT, np.uint8),
    }
    built, fed = proto(
        [int8_call(how)], own | rows, laid_out(matrix), fixed, "y", constant=constant
    )
    expected = product(own["a"], fixed["w"], own["a_scale"], fixed["w_scale"], A_ZERO_POINT)
    if how:
        expected = expected + own["other"] if how == "Add" else expected - own["other"]
    return built, fed, expected + branch_of(rows, matrix)


def rows_call(shape: Shape) -> onnx.NodeProto:
    inputs = "values scale zero_point down down_scale step zeros"
    return node("BranchRows", inputs, "branch branch_scale", DOMAIN, width=shape.rank)


def rows_case(
    shape: Shape, zero_point: int, *, constant: bool
) -> tuple[onnx.ModelProto, dict[str, Array], tuple[Array, Array]]:
    """Rows of a branch: their model, what it is fed, and what numpy says of the values and scales."""
    rows, matrix = down_operands(shape, zero_point)
    outputs = "branch branch_scale"
    built, fed = proto([rows_call(shape)], rows, laid_out(matrix), {}, outputs, constant=constant)
    exact = product(rows["values"], matrix["down"], rows["scale"], matrix["down_scale"], zero_point)
    scale = np.abs(exact).max(axis=-1, keepdims=True) * STEP
    return built, fed, ((np.rint(exact / scale) + 128).clip(0, 255), scale)


def int4_case(
    shape: Shape, *, constant: bool
) -> tuple[onnx.ModelProto, dict[str, Array], tuple[onnx.ModelProto, Array]]:
    """A product of 4 bits with a branch: its model, what it is fed, the product alone, and the branch by numpy."""
    rows, matrix = up_operands(shape)
    draw = np.random.default_rng((*shape, 2))
    blocks = -(-shape.depth // 32)
    fixed: dict[str, Array] = {
        "w": draw.integers(0, 256, (shape.columns, blocks, 16), np.uint8),
        "scales": scales(draw, shape.columns, blocks),
        "zero_points": draw.integers(0, 256, (shape.columns, -(-blocks // 2)), np.uint8),
    }
    x = draw.standard_normal((shape.batch, shape.tokens, shape.depth)).astype(np.float32)
    sizes = {"K": shape.depth, "N": shape.columns, "bits": 4, "block_size": 32, "accuracy_level": 4}
    operands = "x w scales zero_points"
    call = node("MatMulNBitsBranch", f"{operands} {BRANCH}", "y", DOMAIN, **sizes)
    built, fed = proto([call], {"x": x, **rows}, laid_out(matrix), fixed, "y", constant=constant)
    plain = model([node("MatMulNBits", operands, "y", CONTRIB, **sizes)], {"x": x}, fixed, ["y"])
    return built, fed, (plain, branch_of(rows, matrix))


@ids
@places
@pytest.mark.parametrize("zero_point", [128, 20, 0])
def test_rows_of_a_branch(shape: Shape, constant: bool, zero_point: int) -> None:
    built, fed, expected = rows_case(shape, zero_point, constant=constant)
    for found, wanted in zip(results(built, fed, own=False), expected, strict=True):
        assert np.array_equal(found, wanted)
        assert found.shape == wanted.shape


@ids
@places
@pytest.mark.parametrize("how", NAMES)
def test_a_product_and_a_branch(shape: Shape, how: str, constant: bool) -> None:
    built, fed, expected = int8_case(shape, how, constant=constant)
    [found] = results(built, fed, own=False)
    assert np.array_equal(found, expected)


@ids
@places
def test_a_product_of_4_bits_and_a_branch(shape: Shape, constant: bool) -> None:
    """ONNX Runtime's own operator plus what numpy says of the branch."""
    built, fed, (plain, branch) = int4_case(shape, constant=constant)
    [found] = results(built, fed, own=False)
    [main] = results(plain, {"x": fed["x"]}, own=False)
    assert np.array_equal(found, main + branch)


@pytest.mark.parametrize("how", NAMES)
def test_a_bundle_may_have_products_with_branches(how: str, tmp_path: Path) -> None:
    built, fed, _ = int8_case(SHAPES[0], how, constant=False)
    assert checked(built, fed, tmp_path) == {NAMES[how]}


def test_a_bundle_may_have_rows_of_branches(tmp_path: Path) -> None:
    rows, matrix = down_operands(SHAPES[0], 128)
    built, fed = proto([rows_call(SHAPES[0])], rows, laid_out(matrix), {}, "branch", constant=False)
    assert checked(built, fed, tmp_path) == {"BranchRows"}


@pytest.mark.parametrize("constant", [False, True])
def test_a_bundle_may_have_products_of_4_bits_with_branches(constant: bool, tmp_path: Path) -> None:
    built, fed, _ = int4_case(SHAPES[0], constant=constant)
    assert checked(built, fed, tmp_path) == {"MatMulNBitsBranch"}
    del built.graph.node[0].attribute[:1]
    with pytest.raises(BundleError, match=r"MatMulNBitsBranch \['y'\] lacks"):
        checked(built, fed, tmp_path)


@pytest.mark.parametrize("how", NAMES)
def test_a_weight_that_is_no_constant_is_refused(how: str, tmp_path: Path) -> None:
    built, fed, _ = int8_case(SHAPES[0], how, constant=False)
    built.graph.node[0].input[1] = "up"
    with pytest.raises(BundleError, match="reads 'up', which is no constant"):
        checked(built, fed, tmp_path)


def checked(built: onnx.ModelProto, fed: dict[str, Array], folder: Path) -> frozenset[str]:
    """The functions of a model that a bundle may hold."""
    typed = onnx.ModelProto.FromString(built.SerializeToString())
    for output in typed.graph.output:
        kind = TensorProto.UINT8 if output.name == "branch" else TensorProto.FLOAT
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, [None] * 3))
    file = folder / "graph.onnx"
    file.write_bytes(typed.SerializeToString())
    types = {n: (int(helper.np_dtype_to_tensor_dtype(v.dtype)), v.ndim) for n, v in fed.items()}
    return check_graph(file, inputs=types, outputs={}).functions
